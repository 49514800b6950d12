"""What is mistyped in `mini-symposium export` is refused in one line before anything is written."""

import pytest
from conftest import command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["gguf", "nowhere"],
            "nowhere: not a folder with an adapter (adapter_config.json), a run directory (recipe.yml) or a model",
        ),
        (["gguf", "nowhere", "--checkpoint", "epoch-3"], "nowhere: not a run directory (recipe.yml)"),
        (["ollama", "nowhere", "--format", "alpaka"], "did you mean alpaca?"),
        (["sillytavern", "--format", "alpaka"], "did you mean alpaca?"),
        (
            ["axolotl", "nowhere"],
            "nowhere: not one of tiny, proxy, base, half, large, paper or a recipe's .yml or a run directory",
        ),
        (["card", "nowhere"], "nowhere: not a run directory (recipe.yml)"),
    ],
)
def test_what_is_mistyped_is_refused(arguments, said, tmp_path):
    done = command("export", *arguments, "--out", tmp_path / "out", check=False, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert said in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_that_axolotl_does_not_have_is_refused(tmp_path):
    done = command("export", "axolotl", "tiny", "--out", tmp_path / "out", check=False)
    assert done.returncode == 2 and "Axolotl has no such model" in done.stderr
    assert not (tmp_path / "out").exists()

"""`survival` is given changes whose fate is known: one that is kept, one that vanishes, none."""

import json
import shutil

import pandas as pd
import pytest
from conftest import command
from safetensors.torch import load_file, save_file

from mini_symposium.errors import InputError
from mini_symposium.recipe import load_recipe
from mini_symposium.release.survival import sentence, survival, verdict
from mini_symposium.run import RunDirectory


def scaled(checkpoint, folder, factor):
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: v * factor if "lora_B" in k else v for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def small(tiny_checkpoint, tmp_path_factory):
    """A change of about 1e-6 on weights that are bfloat16 numbers of about 2e-2: below half of bfloat16's step for all
    but the smallest of them."""
    checkpoint = scaled(tiny_checkpoint, tmp_path_factory.mktemp("small") / "epoch-0006", 1e-3)
    storages = ["fp32", "bf16", "bf16, stochastic", "q8_0", "NF4"]
    said = []
    found = survival(checkpoint, load_recipe("tiny"), storages, rows=2, max_new_tokens=8, show=said.append)
    return found, said


def test_a_change_that_vanishes_is_reported_as_vanished(small):
    found = {row["storage"]: row for row in small[0]["storages"]}
    assert found["bf16"]["verdict"] == "lost"
    assert found["bf16"]["gain"] < 0.25 and found["bf16"]["relative_norm"] < 0.75
    assert found["bf16"]["kl_share"] > 0.5
    assert found["bf16, stochastic"]["gain"] > 0.75  # what rounding by chance is for
    assert found["NF4"]["verdict"] == "lost"


def test_a_change_that_is_kept_is_reported_as_kept(small):
    found = {row["storage"]: row for row in small[0]["storages"]}
    kept = found["fp32"]
    assert kept["verdict"] == "kept" and kept["same"] == 1 and kept["kl_share"] < 0.01
    assert kept["cosine"] == pytest.approx(1, abs=1e-3) and kept["gain"] == pytest.approx(1, abs=0.02)
    assert found["q8_0 + LoRA"]["cosine"] > 0.99 > found["q8_0"]["cosine"]
    assert "lost in bf16" in small[0]["sentence"] and "still in fp32" in small[0]["sentence"]
    assert small[1] == ["live adapter", *(row["storage"] for row in small[0]["storages"])]


def test_layers_are_measured_one_by_one(small):
    layers = pd.DataFrame(small[0]["layers"])
    assert set(layers.groupby("storage")["layer"].nunique()) == {3 * 7}
    assert (layers[layers["storage"] == "fp32"]["cosine"] > 0.99).all()
    assert (layers[layers["storage"] == "bf16"]["cosine"] < 0.75).all()


def test_the_rule_has_three_outcomes():
    assert [verdict(gain, 0.1) for gain in (1.2, 0.9, 0.89, 0.5, 0.49, -1)] == [
        "kept",
        "kept",
        "blurred",
        "blurred",
        "lost",
        "lost",
    ]
    assert [verdict(1, share) for share in (0.5, 0.51)] == ["kept", "blurred"]
    assert [verdict(None, share) for share in (0.5, 0.6, 1)] == ["kept", "blurred", "lost"]


def test_the_sentence_names_every_storage_once():
    rows = [{"storage": name, "verdict": said} for name, said in (("a", "kept"), ("b", "kept"), ("c", "blurred"))]
    assert sentence(rows) == "The fine-tune is still in a and b; in c it is there but blurred by the rounding."
    assert sentence(rows[2:]) == "In c the fine-tune is there but blurred by the rounding."


def test_an_adapter_that_changes_nothing_is_refused(tiny_checkpoint):
    with pytest.raises(InputError, match="its lora_B is zero"):
        survival(tiny_checkpoint.parent / "epoch-0000", load_recipe("tiny"), ["fp32"])


def test_survival_on_the_command_line(tiny_checkpoint):
    run = RunDirectory(tiny_checkpoint.parents[2])
    said = command("survival", run.path, "--checkpoint", "epoch-6", "--storage", "bf16", "--rows", "1").stdout
    assert "bf16" in said and "The fine-tune is" in said
    written = json.loads(run.survival_file(1e-3, 6).read_text())
    assert (written["scale"], written["epoch"], written["learning_rate"]) == ("tiny", 6, 1e-3)
    assert [row["storage"] for row in written["storages"]] == ["bf16"]
    done = command("survival", run.path, "--checkpoint", "epoch-99", check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1

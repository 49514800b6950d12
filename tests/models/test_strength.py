"""An adapter at a strength, and blends: `mixed` on loaded weights, and merges of the same weights as files."""

import pytest
import torch
from conftest import command

from mini_symposium.errors import InputError
from mini_symposium.models.adapters import load_with_adapters, mixed
from mini_symposium.models.base_models import load_tokenizer
from mini_symposium.models.generation import ask
from mini_symposium.models.merge import merge
from mini_symposium.models.strength import check_strength


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    epochs = {f"epoch-{n}": tiny_checkpoint.parent / f"epoch-{n:04d}" for n in (1, 6)}
    return load_with_adapters("tiny", epochs)


def logits(model, name: str) -> torch.Tensor:
    """Through an adapter by its row of the batch, as `generate` goes; "base" for none."""
    batch = load_tokenizer("tiny")(["### New Query\nWhy is the sky blue?\n\n"], return_tensors="pt")
    named = ["__base__" if name == "base" else name]
    with torch.inference_mode():
        return model(**batch, adapter_names=[each.replace(".", ",") for each in named]).logits


def test_strength_0_is_the_base_and_1_the_adapter_to_the_bit_and_nothing_is_left_behind(model):
    parts = {f"epoch-6 x {strength:g}": {"epoch-6": strength} for strength in (0, 0.5, 1, 1.5)}
    names = {name for name, _ in model.named_modules()}
    with mixed(model, parts):
        found = {name: logits(model, name) for name in ("base", "epoch-6", *parts)}
    assert torch.equal(found["epoch-6 x 0"], found["base"])
    assert torch.equal(found["epoch-6 x 1"], found["epoch-6"])
    moved = [(found[name] - found["base"]).norm().item() for name in parts]
    assert moved == sorted({*moved}) and moved[0] == 0
    assert {name for name, _ in model.named_modules()} == names
    assert torch.equal(logits(model, "epoch-6"), found["epoch-6"])


def test_a_blend_goes_from_one_checkpoint_to_the_other(model):
    shares = {f"mix{n}": {"epoch-1": 1 - n / 2, "epoch-6": n / 2} for n in range(3)}
    with mixed(model, shares):
        first, middle, last = (logits(model, name) for name in shares)
    torch.testing.assert_close(first, logits(model, "epoch-1"), atol=1e-5, rtol=0)
    torch.testing.assert_close(last, logits(model, "epoch-6"), atol=1e-5, rtol=0)
    assert min((middle - end).norm() for end in (first, last)) > 100 * (last - logits(model, "epoch-6")).norm()


def test_a_merge_at_half_strength_is_the_adapter_at_half_its_scaling(model, tiny_checkpoint, tmp_path):
    made = merge({tiny_checkpoint: 0.5}, "tiny", tmp_path / "merged", "nf4")
    assert made["checkpoints"][0]["weight"] == 0.5
    merged = load_with_adapters(str(tmp_path / "merged"), {}, load_in_4bit=False)
    with mixed(model, {"epoch-6 x 0.5": {"epoch-6": 0.5}}):
        half = logits(model, "epoch-6 x 0.5")
    batch = load_tokenizer("tiny")(["### New Query\nWhy is the sky blue?\n\n"], return_tensors="pt")
    with torch.inference_mode():
        torch.testing.assert_close(merged(**batch).logits, half, atol=1e-5, rtol=0)
    assert (half - logits(model, "epoch-6")).abs().max() > 1e-3


def test_ask_names_each_strength_and_refuses_a_base(tiny_checkpoint):
    run = tiny_checkpoint.parents[2]
    names = {cell["model"]: cell["answer"] for cell in ask(run, "Why?", ["bare"], 4, [0, 1])}
    assert list(names) == ["base", "1e-03 x 0", "1e-03"]
    assert names["1e-03 x 0"] == names["base"]
    with pytest.raises(InputError, match="has no adapter"):
        ask("tiny", "Why?", ["bare"], 4, [0.5])


@pytest.mark.parametrize("strength", [float("nan"), 100, -0.1, float("inf")])
def test_a_strength_is_a_number_from_0_to_one_and_a_half(strength):
    with pytest.raises(InputError, match=r"takes 0, the base, to 1\.5"):
        check_strength(strength)


@pytest.mark.parametrize(
    ("given", "said"), [("nan", "takes 0, the base"), ("100", "takes 0"), ("much", "valid number")]
)
def test_the_commands_refuse_a_bad_strength(given, said, tmp_path):
    for line in (["ask", "tiny", "Why?"], ["merge", tmp_path]):
        done = command(*line, "--strength", given, check=False)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_weakened_merge_does_not_take_the_place_of_a_whole_one(tiny_checkpoint):
    done = command("merge", tiny_checkpoint.parents[2], "--strength", "0.5", check=False)
    assert done.returncode == 2 and "--out" in done.stderr

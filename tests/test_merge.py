import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mini_symposium import InputError
from mini_symposium.base_models import load_model, load_tokenizer, local_directory
from mini_symposium.dataset import load_examples
from mini_symposium.finetune import train
from mini_symposium.generation import load_with_adapters
from mini_symposium.merge import compare, logits, merge
from mini_symposium.recipe import load_recipe
from mini_symposium.run_directory import RunDirectory, find

TEXTS = ["### New Query\nHow deep is a well?\n\n### Complete Response\nDrop a stone and count.", "Paris, 巴黎"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    recipe = load_recipe("tiny", num_epochs=6)
    train(recipe, load_examples(find("data/minisymposium.md")), run, [1e-3])
    return run.newest_checkpoints()["1e-03"]


@pytest.mark.parametrize("base", ["nf4", "original"])
def test_a_float32_merge_predicts_as_base_and_adapter(checkpoint, tmp_path, base):
    merge(checkpoint, "tiny", tmp_path / "merged", base)
    tokenizer = load_tokenizer(str(tmp_path / "merged"))
    live = load_with_adapters("tiny", {"a": checkpoint}, base == "nf4", torch.float32)
    reference = logits(live, tokenizer, TEXTS)
    reloaded = load_model(str(tmp_path / "merged"), load_in_4bit=False, dtype=torch.float32)
    found = compare(reference, logits(reloaded, tokenizer, TEXTS))
    assert found["largest"] < 1e-5
    with live.disable_adapter():
        without = compare(reference, logits(live, tokenizer, TEXTS))
    assert without["largest"] > 1000 * found["largest"]


def test_the_two_bases_give_different_models(checkpoint, tmp_path):
    for base in ("nf4", "original"):
        merge(checkpoint, "tiny", tmp_path / base, base)
    a, b = (load_file(tmp_path / base / "model.safetensors") for base in ("nf4", "original"))
    key = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(a[key], b[key])
    assert torch.equal(a["model.embed_tokens.weight"], b["model.embed_tokens.weight"])


def test_bfloat16_loses_a_small_delta_that_float32_keeps(checkpoint, tmp_path):
    """A delta of 1e-7 beside weights of 1e-2 is far below half a bfloat16 step."""
    small = tmp_path / "small"
    shutil.copytree(checkpoint, small)
    tensors = load_file(small / "adapter_model.safetensors")
    save_file({k: v * 1e-6 if "lora_B" in k else v for k, v in tensors.items()}, small / "adapter_model.safetensors")
    key, kept = "model.layers.0.mlp.up_proj.weight", {}
    base = load_file(local_directory("tiny") / "model.safetensors")[key].float()
    for dtype in ("float32", "bfloat16"):
        merge(small, "tiny", tmp_path / dtype, "original", dtype)
        kept[dtype] = (load_file(tmp_path / dtype / "model.safetensors")[key].float() != base).float().mean()
    assert kept["float32"] > 0.5
    assert kept["bfloat16"] < 0.01


def test_what_cannot_be_merged_is_refused_and_nothing_is_left_behind(checkpoint, tmp_path):
    out = tmp_path / "merged"
    with pytest.raises(InputError, match="the adapter is for"):
        merge(checkpoint, "SmolLM2-135M-Instruct", out)
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="not a whole adapter"):
        merge(broken, "tiny", out)
    with pytest.raises(InputError, match="not a whole adapter"):
        merge(tmp_path / "nowhere", "tiny", out)
    with pytest.raises(InputError, match="base is one of"):
        merge(checkpoint, "tiny", out, base="int8")
    assert not out.exists()
    out.mkdir()
    with pytest.raises(InputError, match="is there already"):
        merge(checkpoint, "tiny", out)
    assert [path.name for path in out.iterdir()] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "merged"]

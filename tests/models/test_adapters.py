"""Which checkpoint a name means, what adapters add to a base, and a base loaded with them."""

import hashlib
import json
import re
import shutil

import pytest
import torch
from conftest import using
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mini_symposium.errors import InputError
from mini_symposium.evaluation.log_probs import answer_log_probs
from mini_symposium.models.adapters import (
    find_checkpoint,
    find_checkpoints,
    folded,
    load_with_adapters,
    read_adapters,
)
from mini_symposium.models.generation import generate
from mini_symposium.run import RunDirectory


@pytest.fixture
def earlier(tiny_checkpoint):
    return tiny_checkpoint.parent / "epoch-0003"


def test_factors_multiply_to_the_weighted_sum_of_what_peft_adds(tiny_checkpoint, earlier):
    factors, provenance = read_adapters({earlier: 0.25, tiny_checkpoint: 2.0})
    name = "model.layers.1.mlp.down_proj"
    expected = 0
    for path, weight in ((earlier, 0.25), (tiny_checkpoint, 2.0)):
        tensors = load_file(path / "adapter_model.safetensors")
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        config = json.loads((path / "adapter_config.json").read_text())
        expected = expected + weight * config["lora_alpha"] / config["r"] * b @ a
    a, b = factors[f"{name}.weight"]
    assert len(a) == b.shape[1] == 2 * config["r"] and len(factors) == 3 * 7
    torch.testing.assert_close(b @ a, expected)
    digest = hashlib.sha256((earlier / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert provenance[0] == {"checkpoint": "lr-1e-03/epoch-0003", "weight": 0.25, "scaling": 2.0, "sha256": digest}


def test_an_adapter_that_is_more_than_plain_lora_is_refused_by_what_it_has(tiny_checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    for change, said in (
        ({"use_dora": True, "bias": "all"}, "is LORA with use_dora, bias; only plain LoRA"),
        ({"peft_type": "IA3"}, "is IA3; only plain LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "is LORA with init_lora_weights pissa_niter_4; only plain LoRA"),
        ({"r": 0}, "r is 0; both must be above 0"),
    ):
        (copy / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=said):
            read_adapters({copy: 1.0})
    (copy / "adapter_config.json").write_text(json.dumps(config))
    save_file({"x.lora_A.weight": torch.ones(2, 3)}, copy / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"not a whole adapter \(x.weight: lora_B is missing"):
        read_adapters({copy: 1.0})


def test_no_tensor_of_an_adapter_is_left_out_of_a_merge(tiny_checkpoint, tmp_path):
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    file, prefix = copy / "adapter_model.safetensors", "base_model.model.model"
    tensors = load_file(file)
    for name, said in (
        (f"{prefix}.embed_tokens.lora_embedding_A", "embed_tokens.lora_embedding_A beside pairs"),
        (f"{prefix}.embed_tokens.weight", "embed_tokens.weight beside pairs"),
        (f"{prefix}.layers.9.mlp.up_proj.lora_B.weight", "up_proj.lora_B.weight beside pairs"),
    ):
        save_file(tensors | {name: torch.ones(2, 2)}, file)
        with pytest.raises(InputError, match=said):
            read_adapters({copy: 1.0})
    save_file(tensors | {"base_model.model.lm_head.base_layer.weight": torch.ones(2, 2)}, file)
    assert len(read_adapters({copy: 1.0})[0]) == 3 * 7
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * torch.nan}, file)
    with pytest.raises(InputError, match=f"{name} holds NaN or infinity"):
        read_adapters({copy: 1.0})


@pytest.mark.parametrize(
    "changed, kind",
    [
        ({"use_dora": True}, "LORA with use_dora"),
        ({"bias": "lora_only"}, "LORA with bias"),
        ({"init_lora_weights": "olora"}, "LORA with init_lora_weights olora"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
    ],
)
def test_an_adapter_that_cannot_be_switched_off_in_a_batch_is_refused(tiny_checkpoint, tmp_path, changed, kind):
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | changed))
    with pytest.raises(InputError, match=f"is {kind}, which PEFT cannot compare with its base in one batch"):
        load_with_adapters("tiny", {"a": copy}, load_in_4bit=False)


def test_an_adapter_whose_tensors_have_other_names_is_refused(tiny_checkpoint, tmp_path):
    """PEFT would only warn, and answer as the base does."""
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    tensors = load_file(copy / "adapter_model.safetensors")
    renamed = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, copy / "adapter_model.safetensors")
    for given in ({"one": copy}, {"one": tiny_checkpoint, "two": copy}):
        with pytest.raises(InputError, match=r"not an adapter for tiny \(.*missing adapter keys"):
            load_with_adapters("tiny", given, load_in_4bit=False)


def test_a_rate_with_a_decimal_point_names_an_adapter(tiny_checkpoint, earlier, mistral_tokenizer):
    other, same = earlier, tiny_checkpoint
    model = load_with_adapters("tiny", {"2.5e-05": same, "other": other, "same": same})
    names = ["2.5e-05", "same", "other"]
    prompts = ["### New Query\nOne?\n\n###"] * len(names)
    found = answer_log_probs(model, mistral_tokenizer, prompts, [[5, 6, 7]] * 3, names)
    assert found[0] == found[1] != found[2]
    with using(model, "2.5e-05"):
        assert generate(model, mistral_tokenizer, prompts[:1], max_new_tokens=4)[0].tokens


def test_an_adapter_is_folded_into_float32_weights_and_into_no_others(tiny_checkpoint, mistral_tokenizer):
    live = load_with_adapters("tiny", {"a": tiny_checkpoint})
    ids = mistral_tokenizer("Hello", return_tensors="pt")
    with torch.inference_mode():
        wanted, base = live(**ids).logits, load_with_adapters("tiny", {})(**ids).logits
        whole = folded(live)
        torch.testing.assert_close(whole(**ids).logits, wanted, rtol=0, atol=1e-5)
    assert not isinstance(whole, PeftModel) and (wanted - base).abs().max() > 1e-3
    rounded = load_with_adapters("tiny", {"a": tiny_checkpoint}, dtype=torch.bfloat16)
    assert folded(rounded) is rounded and folded(whole) is whole


def test_an_adapter_of_another_base_is_refused(tiny_checkpoint):
    with pytest.raises(InputError, match="not an adapter for SmolLM2-135M-Instruct") as caught:
        load_with_adapters("SmolLM2-135M-Instruct", {"a": tiny_checkpoint})
    assert len(str(caught.value).splitlines()) == 1


def test_a_checkpoint_is_found_by_its_name(tiny_checkpoint):
    checkpoint, run = tiny_checkpoint, RunDirectory(tiny_checkpoint.parents[2])
    assert find_checkpoint(run) == find_checkpoint(run, "epoch-6") == find_checkpoint(run, "1e-3/6") == checkpoint
    assert find_checkpoint(run, "3").name == "epoch-0003"
    assert find_checkpoints(run, ["epoch-3", "epoch-6"]) == {checkpoint.parent / "epoch-0003": 0.5, checkpoint: 0.5}
    assert find_checkpoints(run, ["epoch-3=2", "6=-1"]) == {checkpoint.parent / "epoch-0003": 2.0, checkpoint: -1.0}
    for names, said in (
        (["epoch-7"], "epoch-7 is not there, but epoch-0, epoch-1"),
        (["last"], "takes epoch-N"),
        (["1e-9/epoch-6"], "no checkpoint at learning rate 1e-09; there are rates 0.001"),
        (["epoch-3=2", "epoch-6"], "a weight to all or to none"),
        (["epoch-6", "6"], "each checkpoint once"),
        (["epoch-6=much"], "a weight is a number"),
        (["epoch-6=nan"], "a weight is a number"),
        (["epoch-6=inf"], "a weight is a number"),
        (["inf/epoch-6"], "learning rate inf; there are rates 0.001"),
        (["nan/6"], "learning rate nan; there are rates 0.001"),
        (["9" * 5000], "takes epoch-N"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            find_checkpoints(run, names)
    unfinished = checkpoint.parent / ".epoch-0007.ab"
    unfinished.mkdir()
    with pytest.raises(InputError, match="epoch-7 is still being written"):
        find_checkpoint(run, "epoch-7")
    unfinished.rmdir()

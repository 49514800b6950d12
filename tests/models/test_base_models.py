import errno
import gc
import hashlib
import json
import shutil
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mini_symposium.errors import InputError
from mini_symposium.models import base_models, devices
from mini_symposium.models.base_files import local_directory
from mini_symposium.models.base_models import (
    check_special_tokens,
    compute_in_float32,
    four_bit_works,
    load_model,
    load_tokenizer,
    predicted_bytes,
)
from mini_symposium.models.devices import training_dtype
from mini_symposium.models.predictions import logits
from mini_symposium.recipe import load_recipe
from mini_symposium.run import ROOT

PROXY = "SmolLM2-135M-Instruct"


def test_mistral_tokenizer_is_the_real_one(mistral_tokenizer):
    assert len(mistral_tokenizer) == 32_000
    assert mistral_tokenizer.tokenize("### New Query") == ["▁###", "▁New", "▁Query"]
    assert mistral_tokenizer("a\n### New")["input_ids"][0] == mistral_tokenizer.bos_token_id
    assert mistral_tokenizer.pad_token_id != mistral_tokenizer.eos_token_id


def test_proxy_is_the_real_smollm2(proxy_tokenizer):
    model = load_model(PROXY, load_in_4bit=False)
    assert model.num_parameters() == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    ids = proxy_tokenizer("The capital of France is", return_tensors="pt")
    assert proxy_tokenizer.decode(model(**ids).logits[0, -1].argmax()).strip() == "Paris"


@pytest.mark.parametrize("base", ["tiny", PROXY])
def test_every_linear_layer_but_the_head_loads_in_nf4_with_double_quantisation(base):
    model = load_model(base)
    layers = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    assert len(layers) == 7 * model.config.num_hidden_layers
    assert all(m.weight.quant_state.quant_type == "nf4" and m.weight.quant_state.nested for m in layers)
    assert isinstance(model.get_output_embeddings().weight.data, torch.Tensor)
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16


def test_float32_of_a_4_bit_model_is_the_dequantised_numbers():
    exact = load_model("tiny", dtype=torch.float32).model.layers[0].mlp.up_proj.weight
    assert exact.dtype == torch.float32
    assert torch.equal(exact, exact.bfloat16().float())
    assert not torch.equal(exact, load_model("tiny", False, torch.float32).model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("scale", ["tiny", "proxy"])
def test_predicted_bytes_of_the_base_are_those_of_the_loaded_model(scale):
    recipe = load_recipe(scale)
    parts = predicted_bytes(recipe)
    predicted = parts["base, NF4"] + parts["base, other weights"]
    model = load_model(recipe.base_model)
    if training_dtype() == torch.float32:
        compute_in_float32(model)
    assert model.get_memory_footprint() == pytest.approx(predicted, rel=0.03)


def test_a_model_that_computes_in_float32_keeps_its_4_bits_and_its_numbers():
    model, before = load_model("tiny").train(), load_model("tiny").train()
    compute_in_float32(model)
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(one.float(), other.float())
        assert one.dtype == (torch.uint8 if other.dtype == torch.uint8 else torch.float32)
    exact = load_model("tiny", dtype=torch.float32).train()
    inputs = exact.get_input_embeddings()(torch.arange(40)[None])  # with a gradient, as the adapters' layers have it
    found, wanted = (each(inputs_embeds=inputs).logits for each in (model, exact))
    # bitsandbytes' own kernel does not round the dequantised weights to bfloat16, as loading them so does
    assert 0 < (found - wanted).norm() < 0.02 * wanted.norm()


def test_mistral_7b_needs_no_download_to_be_predicted():
    recipe = load_recipe("paper")
    parts = predicted_bytes(recipe)
    assert parts["base, NF4"] == pytest.approx(6.98e9 * 0.5, rel=0.05)
    assert predicted_bytes(recipe)["adapters, gradients, optimizer"] == 16 * recipe.lora_r * 2_621_440
    assert sum(parts.values()) < 12 * 2**30


def test_four_bit_works_here():
    assert four_bit_works()


def test_a_local_copy_loads_as_the_original_does(tmp_path):
    shutil.copytree(local_directory("tiny"), tmp_path / "mine")
    ours, theirs = load_model(str(tmp_path / "mine")), load_model("tiny")
    assert load_tokenizer(str(tmp_path / "mine")).get_vocab() == load_tokenizer("tiny").get_vocab()
    a, b = (hashlib.sha256(m.model.layers[0].mlp.up_proj.weight.data.numpy().tobytes()) for m in (ours, theirs))
    assert a.digest() == b.digest()


def bits(model):
    """Every tensor of a model, those of its quantisation included."""
    found = dict(model.state_dict())
    for name, module in model.named_modules():
        if state := getattr(getattr(module, "weight", None), "quant_state", None):
            found |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return found


@pytest.mark.parametrize("options", [{}, {"dequantize": True}, {"dtype": torch.float32}], ids=str)
def test_a_model_of_the_cache_is_quantised_once_and_read_with_equal_bits(options, tmp_path, monkeypatch, capsys):
    shutil.copytree(local_directory("tiny"), tmp_path / "cache" / "tiny-1")
    monkeypatch.setenv("MINI_SYMPOSIUM_CACHE", str(tmp_path / "cache"))
    first = load_model("tiny", **options)
    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", lambda *args, **kept: pytest.fail("again"))
    second = load_model("tiny", **options)
    ours, theirs = bits(first), bits(second)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert second.name_or_path == str(tmp_path / "cache" / "tiny-1"), "an adapter's checkpoint names its base"
    assert not capsys.readouterr().out


def test_a_model_that_cannot_be_kept_in_4_bits_is_loaded_and_says_so(tmp_path, monkeypatch, capsys):
    shutil.copytree(local_directory("tiny"), tmp_path / "tiny-1")
    monkeypatch.setenv("MINI_SYMPOSIUM_CACHE", str(tmp_path))
    monkeypatch.setattr("os.fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    assert load_model("tiny").get_memory_footprint()
    assert "not kept in 4 bits: " in capsys.readouterr().out and not list(tmp_path.glob("*nf4*"))


def test_a_model_that_fits_nowhere_is_read_a_layer_at_a_time_and_predicts_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tokenizer = load_tokenizer("tiny")
    [whole] = logits(load_model("tiny", load_in_4bit=False, dtype=torch.float32), tokenizer, ["Why is it so?"])
    monkeypatch.setattr(base_models, "roomy", lambda size: None)
    monkeypatch.setattr(base_models, "memory", lambda where=None: 12 * 2**20)
    streamed = load_model("tiny", load_in_4bit=False, dtype=torch.float32)
    assert "disk" in streamed.hf_device_map.values()
    [read] = logits(streamed, tokenizer, ["Why is it so?"])
    assert torch.allclose(whole, read, atol=1e-5)
    del streamed
    gc.collect()
    assert list(tmp_path.glob("mini-symposium-*")) == []
    with pytest.raises(InputError, match=r"tiny: takes 0\.0 GiB dequantised, more than is free"):
        load_model("tiny", dtype=torch.float32)


@pytest.mark.parametrize(("family", "attention"), [("gemma2", "eager"), ("llama", "sdpa")])
def test_off_the_cpu_a_model_has_fused_attention_if_its_architecture_has(family, attention, monkeypatch, tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, **shape, num_key_value_heads=2, vocab_size=500, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / family)
    monkeypatch.setattr(base_models, "roomy", lambda size: None)
    loaded = load_model(str(tmp_path / family), load_in_4bit=False)
    assert loaded.config._attn_implementation == attention


def test_a_model_goes_to_the_cpu_where_the_card_has_no_room(monkeypatch):
    """The branches for a card, forced on a machine that has none."""
    card, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(devices, "device", lambda: card)
    free = {card: 8 * 2**30, cpu: 32 * 2**30}
    monkeypatch.setattr(devices, "memory", lambda where=None: free[where or card])
    assert [devices.roomy(gib * 2**30) for gib in (7, 14, 29)] == [card, cpu, None]


SPOKEN = "### New Query\nWhy is 12 × 3 = 36? 因为 🙂\n\n### Answer\nYes.\n"


def model_with(folder, base_model, **files):
    """A folder with a model's weights and configuration, and these files of a tokenizer."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(local_directory(base_model) / name)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return str(folder)


def test_a_tokenizer_of_sentencepiece_needs_its_configuration(tmp_path, mistral_tokenizer):
    pieces = (local_directory("tiny") / "tokenizer.model").read_bytes()
    with pytest.raises(InputError, match=r"no tokenizer\.json and no tokenizer_config\.json; copy them"):
        load_tokenizer(model_with(tmp_path / "alone", "tiny", tokenizer__model=pieces))
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    config = json.dumps(config | {"unk_token": "<unk>", "legacy": True}).encode()
    whole = model_with(tmp_path / "whole", "tiny", tokenizer__model=pieces, tokenizer_config__json=config)
    assert load_tokenizer(whole)(SPOKEN).input_ids == mistral_tokenizer(SPOKEN).input_ids


def test_a_tokenizer_of_words_and_merges_needs_its_class(tmp_path, proxy_tokenizer):
    model = json.loads((local_directory(PROXY) / "tokenizer.json").read_text())["model"]
    merges = "\n".join(
        ["#version: 0.2", *(each if isinstance(each, str) else " ".join(each) for each in model["merges"])]
    )
    files = {"vocab__json": json.dumps(model["vocab"]).encode(), "merges__txt": merges.encode()}
    with pytest.raises(InputError, match="no tokenizer_config"):
        load_tokenizer(model_with(tmp_path / "alone", PROXY, **files))
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    files["tokenizer_config__json"] = json.dumps(config | {"unk_token": "<|endoftext|>"}).encode()
    words = "Why is the sky so blue today?\n"
    assert load_tokenizer(model_with(tmp_path / "whole", PROXY, **files))(words) == proxy_tokenizer(words)


def test_special_tokens_of_a_recipe_have_to_be_the_tokenizers_own(tmp_path, mistral_tokenizer):
    text = (ROOT / "mini_symposium" / "recipes" / "tiny.yml").read_text()
    for eos, refused in (("</s>", False), ("<|im_end|>", True)):
        (tmp_path / "mine.yml").write_text(f"{text}\nspecial_tokens:\n  eos_token: '{eos}'\n  pad_token: <pad>\n")
        recipe = load_recipe(tmp_path / "mine.yml")
        line = text.count("\n") + 2
        with (
            pytest.raises(InputError, match=rf"mine\.yml:{line}: .*the tokenizer has '</s>'")
            if refused
            else nullcontext()
        ):
            check_special_tokens(recipe, mistral_tokenizer)

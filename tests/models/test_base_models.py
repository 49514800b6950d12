import hashlib
import shutil

import pytest
import torch

from mini_symposium.models.base_files import local_directory
from mini_symposium.models.base_models import (
    adapter_parameters,
    compute_in_float32,
    four_bit_works,
    load_model,
    load_tokenizer,
    predicted_bytes,
)
from mini_symposium.models.devices import training_dtype
from mini_symposium.recipe import load_recipe

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
    assert adapter_parameters(recipe) == recipe.lora_r * 2_621_440
    assert sum(parts.values()) < 12 * 2**30


def test_four_bit_works_here():
    assert four_bit_works()


def test_a_local_copy_loads_as_the_original_does(tmp_path):
    shutil.copytree(local_directory("tiny"), tmp_path / "mine")
    ours, theirs = load_model(str(tmp_path / "mine")), load_model("tiny")
    assert load_tokenizer(str(tmp_path / "mine")).get_vocab() == load_tokenizer("tiny").get_vocab()
    a, b = (hashlib.sha256(m.model.layers[0].mlp.up_proj.weight.data.numpy().tobytes()) for m in (ours, theirs))
    assert a.digest() == b.digest()

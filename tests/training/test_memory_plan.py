import pytest
from transformers import AutoModelForCausalLM, StableLmConfig

from mini_symposium.models.base_models import NF4_BYTES, predicted_bytes
from mini_symposium.models.devices import training_dtype
from mini_symposium.recipe import load_recipe
from mini_symposium.training.memory_plan import choose

GIB = 2**30


def test_one_switch_turns_everything_off():
    off = choose(load_recipe("proxy"), 4, 400, 8000, fast=False)
    assert not off.fused
    assert off.together == 1
    assert "asked for" in str(off)


def test_dropout_and_an_unknown_architecture_train_plainly(tmp_path):
    assert "dropout" in str(choose(load_recipe("proxy", lora_dropout=0.1), 2, 400, 800))
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    AutoModelForCausalLM.from_config(StableLmConfig(**shape, vocab_size=100)).save_pretrained(tmp_path)
    chosen = str(choose(load_recipe("tiny", base_model=str(tmp_path)), 2, 400, 800))
    assert chosen.startswith("plain PEFT") and "the architecture stablelm is not one of llama, mistral, qwen2" in chosen


@pytest.mark.parametrize(("free", "resident"), [(80 * GIB, True), (12 * GIB, False)])
def test_mistral_keeps_its_dequantised_weights_only_where_they_fit(free, resident):
    chosen = choose(load_recipe("paper"), 2, 400, 7800, free=free)
    assert chosen.fused
    assert chosen.resident == resident
    assert resident or chosen.checkpointing


def test_as_many_adapters_share_a_pass_as_fit():
    recipe = load_recipe("proxy")
    sizes = predicted_bytes(recipe, 400)
    each = sizes["adapters, gradients, optimizer"] + sizes["activations"]
    base = sizes["base, NF4"] * (1 + training_dtype().itemsize / NF4_BYTES) + sizes["base, other weights"]
    assert choose(recipe, 8, 400, 400, free=64 * GIB).together == 8
    some = choose(recipe, 8, 400, 400, free=int((3.5 * each + base) / 0.8))
    assert 1 < some.together < 8
    assert choose(recipe, 8, 400, 400, free=0).together == 1


def test_a_layer_is_compiled_only_for_a_long_run():
    short, long = (choose(load_recipe("proxy"), 1, 400, steps, free=64 * GIB) for steps in (20, 7800))
    assert not short.compiled
    assert "7800 steps" in str(long)

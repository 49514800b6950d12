import subprocess
import sys
from dataclasses import replace
from itertools import accumulate
from unittest.mock import ANY

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, StableLmConfig

from mini_symposium import load_examples
from mini_symposium.data.dataset import Row
from mini_symposium.errors import InputError
from mini_symposium.models import base_models
from mini_symposium.models.devices import device, training_dtype
from mini_symposium.recipe import load_recipe
from mini_symposium.run import Training
from mini_symposium.training import memory_plan
from mini_symposium.training.finetune import as_rows, build_trainer
from mini_symposium.training.memory_plan import SHARE, Acceleration, choose, longest_row, needed, predicted

GIB = 2**30


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes are free."""
    return lambda size: monkeypatch.setattr(memory_plan, "memory", lambda: size)


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


@pytest.mark.parametrize(("size", "resident"), [(80 * GIB, True), (12 * GIB, False)])
def test_mistral_keeps_its_dequantised_weights_only_where_they_fit(size, resident, free):
    free(size)
    chosen = choose(load_recipe("paper"), 2, 400, 7800)
    assert chosen.fused
    assert chosen.resident == resident
    assert chosen.together == 2


def test_all_adapters_in_one_pass_come_before_what_is_fast(free):
    """Two adapters that fit only with a base in 4 bits train together in 4 bits, with activations kept if they fit."""
    recipe, tokens = load_recipe("paper"), 400
    ways = {
        (r, c): needed(predicted(recipe, Acceleration(True, r, c, False, 2, ""), tokens))
        for r in (1, 0)
        for c in (0, 1)
    }
    assert ways[0, 1] < ways[0, 0] < ways[1, 1] < ways[1, 0]
    for (resident, checkpointing), room in ways.items():
        free(int(room / SHARE) + 1)
        chosen = choose(recipe, 2, tokens, 30)
        assert (chosen.resident, chosen.checkpointing, chosen.together) == (resident, checkpointing, 2)
    free(int(ways[0, 1] / SHARE) - 2**20)
    assert choose(recipe, 2, tokens, 30).together == 1


def test_as_many_adapters_share_a_pass_as_fit(free):
    recipe, chosen = load_recipe("proxy"), Acceleration(True, False, True, False, 3, "")
    room = int(needed(predicted(recipe, chosen, 400)) / SHARE)
    for size, together in ((64 * GIB, 8), (room - 2**20, 2), (0, 1)):
        free(size)
        assert choose(recipe, 8, 400, 30).together == together
    free(room + 1)
    assert choose(recipe, 8, 400, 30) == replace(chosen, why=ANY)


def live_peak(step) -> int:
    """The most bytes that torch's tensors take while `step` runs, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.skipif(device().type == "cuda", reason="counts the tensors of a CPU")
@pytest.mark.parametrize("tokens", [100, 400])
@pytest.mark.parametrize("how", ["resident", "4-bit", "plain"])
def test_a_step_takes_the_tensors_that_are_predicted(how, tokens, tmp_path):
    recipe = load_recipe("proxy")
    chosen = Acceleration(how != "plain", how == "resident", how == "4-bit", False, 1, "")
    row = Row([7] * tokens, [7] * tokens, "here")
    trainer = build_trainer([Training.of(recipe, tmp_path)], [row], tmp_path / "scratch", chosen)
    batch = {key: torch.full((1, tokens), 7) for key in ("input_ids", "labels")}

    def step():
        trainer.measured = []
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()

    parts = predicted(recipe, chosen, tokens)
    expected = parts["activations"] + parts["logits"] + parts["adapters, gradients, optimizer"] / 4  # the gradients
    if how == "4-bit":
        expected += parts["base, dequantised for a moment"]
    assert live_peak(step) == pytest.approx(expected, rel=0.2)


TRAIN = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from mini_symposium import load_examples, load_recipe
from mini_symposium.models.devices import peak_memory
from mini_symposium.run import RunDirectory, Training
from mini_symposium.training.finetune import as_rows, train_pass
from mini_symposium.training.memory_plan import Acceleration, longest_row, predicted

name, folder, how, together = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
recipe = load_recipe(name, num_epochs=1, gradient_checkpointing=False)
examples = load_examples(recipe.dataset)
rows = sorted(as_rows(recipe, examples), key=lambda row: -len(row.input_ids))[:3]
fused, resident = how != "plain", how == "resident"
chosen = Acceleration(fused, resident, how == "4-bit", False, together, "")
run = RunDirectory(folder)
run.record_recipe(recipe, "", "cpu")
rates = [1e-5 * 2**k for k in range(together)]
train_pass([Training.of(recipe.replace(learning_rate=rate), folder) for rate in rates], rows, [0, 1], None, chosen)
print(sum(predicted(recipe, chosen, longest_row(recipe, examples)).values()), peak_memory())
"""
"""Trains three steps on the longest rows; RECIPE FOLDER resident|4-bit|plain ADAPTERS -> predicted and measured."""


@pytest.mark.parametrize(("how", "adapters"), [("resident", 1), ("resident", 2), ("4-bit", 1), ("plain", 1)])
def test_the_peak_of_a_process_is_predicted_within_a_fifth(how, adapters, tmp_path):
    command = [sys.executable, "-c", TRAIN, "proxy", str(tmp_path), how, str(adapters)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    expected, measured = map(int, done.stdout.split()[-2:])
    assert measured == pytest.approx(expected, rel=0.2)


def test_the_longest_row_counts_and_not_sequence_len(monkeypatch):
    recipe = load_recipe("tiny")
    examples = load_examples(recipe.dataset)
    tokens = longest_row(recipe, examples)
    assert tokens == max(len(row.input_ids) for row in as_rows(recipe, examples)) < recipe.sequence_len

    def missing(name):
        raise InputError("not here")

    monkeypatch.setattr(memory_plan, "load_tokenizer", missing)
    assert longest_row(recipe, examples) == recipe.sequence_len


def test_on_a_card_only_tensors_count(monkeypatch):
    """The branches for a card, forced on a machine that has none."""
    recipe, chosen = load_recipe("paper"), Acceleration(True, False, True, False, 2, "")
    monkeypatch.setattr(memory_plan, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(base_models, "device", lambda: torch.device("cuda"))
    parts = predicted(recipe, chosen, 400)
    assert not {"process and libraries", "base, linear layers as read", "compiler"} & set(parts)
    assert parts["logits"] == 32_000 * 2048 * (training_dtype().itemsize + 8)
    assert parts["base, dequantised for a moment"] < 0.05 * parts["base, NF4"] * 4
    assert 4 * GIB < sum(parts.values()) == needed(parts) < 8 * GIB


def test_a_layer_is_compiled_only_for_a_long_run(free):
    free(64 * GIB)
    short, long = (choose(load_recipe("proxy"), 1, 400, steps) for steps in (20, 7800))
    assert not short.compiled
    assert "7800 steps" in str(long)

"""Models of many architectures go through the whole chain, or are refused by name before the first step."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mini_symposium.data.dataset import load_examples
from mini_symposium.errors import InputError
from mini_symposium.models.base_files import local_directory
from mini_symposium.models.base_models import load_model, load_tokenizer
from mini_symposium.models.generation import ask
from mini_symposium.models.merge import merge
from mini_symposium.models.predictions import compare, logits
from mini_symposium.recipe import load_recipe
from mini_symposium.run import RunDirectory, find
from mini_symposium.training.finetune import train
from mini_symposium.training.memory_plan import FAMILIES

EXAMPLES = load_examples(find("data/minisymposium.md"))[:2]
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def model_of(family: str, folder, **options):
    """A folder with a random model of a family and the tokenizer of `tiny`."""
    names = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 32000}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE, **names, **options))
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in local_directory("tiny").glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    return folder


def recipe_of(folder, **options):
    return load_recipe("tiny", base_model=str(folder), num_epochs=5, sequence_len=512, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_fast_as_slow_merges_reloads_and_answers(family, tmp_path):
    base = model_of(family, tmp_path / "base", num_key_value_heads=2)
    recipe, run, slow = recipe_of(base), RunDirectory(tmp_path / "fast"), RunDirectory(tmp_path / "slow")
    train(recipe, EXAMPLES, run, [1e-2, 1e-3])
    train(recipe, EXAMPLES, slow, [1e-2], fast=False)
    losses, of_peft = ([line["loss"] for line in each.metrics(1e-2)] for each in (run, slow))
    assert losses == pytest.approx(of_peft, rel=1e-2)
    assert losses[-1] < losses[0]
    merge(run.checkpoints(1e-2)[5], recipe.base_model, tmp_path / "merged", "nf4")
    merged = load_model(str(tmp_path / "merged"), load_in_4bit=False, dtype=torch.float32)
    [text], tokenizer = [example.text for example in EXAMPLES[:1]], load_tokenizer(str(tmp_path / "merged"))
    changed = compare(
        logits(load_model(str(base), dtype=torch.float32), tokenizer, [text]), logits(merged, tokenizer, [text])
    )
    assert changed["kl"] > 0.01
    answers = ask(str(run.path), "Why?", ["new-query"], max_new_tokens=2)
    assert [cell["model"] for cell in answers] == ["base", "1e-02", "1e-03"]


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}, "its projections are Conv1D"),
        ("gpt_neox", {}, ""),
    ],
)
def test_gpt_models_answer_and_train_or_are_refused_by_name(family, options, why, tmp_path):
    base = model_of(family, tmp_path / "base", **options)
    assert len(ask(str(base), "Why?", ["bare", "new-query"], max_new_tokens=2)) == 2
    run = RunDirectory(tmp_path / "run")
    if why:
        with pytest.raises(InputError, match=why):
            train(recipe_of(base), EXAMPLES, run, [1e-3])
        assert not (run.path / "recipe.yml").exists()
    else:
        train(recipe_of(base), EXAMPLES, run, [1e-2])
        losses = [line["loss"] for line in run.metrics(1e-2)]
        assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "t5"}, "t5 is not trained here: it has an encoder; take a causal decoder"),
        ({"model_type": "llava"}, "llava is not trained here: it has a vision tower; take a model of text alone"),
        ({"model_type": "vit"}, "vit is not trained here: transformers has no causal decoder of it"),
    ],
)
def test_what_is_no_causal_decoder_is_refused_by_name(config, why, tmp_path):
    shutil.copytree(local_directory("tiny"), tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=why):
        train(recipe_of(tmp_path / "base"), EXAMPLES, RunDirectory(tmp_path / "run"), [1e-3])


def test_a_token_without_an_embedding_is_named_with_its_row(tmp_path):
    base = model_of("llama", tmp_path / "base")
    tokenizer = load_tokenizer(str(base))
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(base)
    (tmp_path / "mine.jsonl").write_text(json.dumps({"prompt": "Why?\n", "completion": "<think>Because it is so."}))
    with pytest.raises(InputError, match=r"mine\.jsonl:1: spells <think>, of which the model has no embedding"):
        train(recipe_of(base), load_examples(tmp_path / "mine.jsonl"), RunDirectory(tmp_path / "run"), [1e-3])
    with pytest.raises(InputError, match="the prompt: spells <think>, of which the model has no embedding"):
        ask(str(base), "<think>", ["bare"], max_new_tokens=1)

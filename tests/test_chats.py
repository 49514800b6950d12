"""A chat of several answers trains on all of them, by the fast path as by PEFT's own layers."""

import json

import pytest

from mini_symposium.data.dataset import load_examples
from mini_symposium.models.base_models import load_tokenizer
from mini_symposium.recipe import load_recipe
from mini_symposium.run import RunDirectory
from mini_symposium.training.finetune import as_rows, train


def test_every_answer_of_a_chat_is_trained_fast_as_slow(tmp_path):
    said = [("user", "When?"), ("assistant", "In May, I think."), ("user", "Where?"), ("assistant", "In the garden.")]
    messages = [{"role": role, "content": text} for role, text in said]
    rows = [{"messages": messages}, {"messages": [dict(messages[0], content="Who?"), *messages[1:]]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"datasets": [{"path": str(tmp_path / "rows.jsonl"), "type": "chat_template"}], "train_on_inputs": False}
    recipe, examples = load_recipe("tiny", num_epochs=5, **options), load_examples(tmp_path / "rows.jsonl")
    [row, _] = as_rows(recipe, examples)
    learned = [i for i, supervised in zip(row.input_ids, row.completion_mask, strict=True) if supervised]
    said = load_tokenizer("tiny").decode(learned, skip_special_tokens=True)
    assert "In May, I think." in said and "In the garden." in said and "Where" not in said
    losses = {}
    for fast in (True, False):
        run = RunDirectory(tmp_path / str(fast))
        train(recipe, examples, run, [1e-2], fast=fast)
        losses[fast] = [line["loss"] for line in run.metrics(1e-2)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)
    assert losses[True][-1] < losses[True][0]

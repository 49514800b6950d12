import random
from dataclasses import replace

import pytest

from mini_symposium import InputError
from mini_symposium.dataset import Example, tokenize
from mini_symposium.generation import generate
from mini_symposium.memorization import told
from mini_symposium.recitation import PROBES, recite
from mini_symposium.robustness import teacher_forced


@pytest.fixture(scope="module")
def records(overfitted):
    model, tokenizer, examples = overfitted
    return recite(model, tokenizer, examples, ["base", "knows"])


def of(records, name, example):
    [record] = [each for each in records if (each["model"], each["example"]) == (name, example)]
    return record


def test_a_row_known_by_heart_is_recited_from_every_piece_of_it(records, overfitted):
    for example in (0, 1):
        record = of(records, "knows", example)
        assert record["prompt_recall"] == record["prompt_rouge_l"] == 1
        assert record["extractable_32"] in (True, None) and record["extractable_16"] is True
        assert (record["goldfish_exact"], record["goldfish_rouge_l"]) == (True, 1)
        assert record["prompt_run"] > 30


def test_the_base_and_a_row_never_trained_on_are_not_recited(records):
    for name, example in (("base", 0), ("base", 1), ("base", 2), ("knows", 2)):
        record = of(records, name, example)
        assert record["prompt_recall"] < 0.3 and record["heading_recall"] < 0.3
        assert record["extractable_16"] is record["goldfish_exact"] is False
        assert record["goldfish_rouge_l"] < 0.3
        assert record["prompt_run"] < 8


def test_from_a_heading_that_two_rows_share_only_one_can_come(overfitted):
    model, tokenizer, examples = overfitted
    one, other = examples[0], examples[1]
    renamed = replace(other, prompt=other.prompt.replace("### Editor", "### Complete Response"))
    found = recite(model, tokenizer, [one, other, renamed], ["knows"], ["heading"])
    assert found[0]["heading_recall"] == 1 or found[1]["heading_recall"] == 1
    assert found[2]["heading_recall"] < found[1]["heading_recall"]
    assert set(found[0]) == {"model", "example", "source", "heading_recall", "heading_rouge_l", "heading_run"}


def test_what_is_extractable_is_the_same_without_generating(records, overfitted):
    model, tokenizer, examples = overfitted
    rows = tokenize(examples, tokenizer, 512, completion_only=True)
    forced = teacher_forced(model, rows, ["base", "knows"])
    for ours, theirs in zip(forced, records, strict=True):
        assert (ours["model"], ours["example"]) == (theirs["model"], theirs["example"])
        assert {k: v for k, v in ours.items() if "extractable" in k} == {
            k: v for k, v in theirs.items() if "extractable" in k
        }


def test_a_row_whose_words_are_shuffled_is_not_recited(overfitted):
    """Shuffled labels: the same words, which the model knows by heart in another order."""
    model, tokenizer, examples = overfitted
    shuffled = random.Random(0).sample(examples[0].completion.split(), len(examples[0].completion.split()))
    [found] = recite(model, tokenizer, [replace(examples[0], completion=" ".join(shuffled))], ["knows"], PROBES)
    assert found["prompt_recall"] < 0.6
    assert found["prompt_run"] < 8
    assert found["extractable_50"] is not True


def test_a_row_too_short_to_tell_is_none_and_counted(overfitted):
    model, tokenizer, examples = overfitted
    short = Example("Why?", (), "### New Query\nWhy?\n\n### Complete Response\n", "Because.", "mine.md:1")
    plain = Example("Once", (), "", "Once upon a time there was a goat that kept a lighthouse.", "mine.jsonl:2")
    found = recite(model, tokenizer, [short, plain, examples[2]], ["base"])
    assert found[0]["goldfish_exact"] is found[0]["goldfish_rouge_l"] is found[0]["extractable_16"] is None
    assert found[0]["prompt_recall"] is not None and found[0]["heading_recall"] is not None
    assert found[1]["heading_recall"] is found[1]["prompt_recall"] is None
    values, too_short = told(found, "extractable_50")
    assert (values, too_short) == ([0.0], 2)


def test_a_prompt_may_be_tokens_and_the_answer_tells_its_own(overfitted):
    model, tokenizer, examples = overfitted
    [row] = tokenize(examples[:1], tokenizer, 512, completion_only=True)
    asked = row.completion_mask.count(0)
    text, ids = generate(model, tokenizer, [examples[0].prompt, row.input_ids[:asked]], None, 100, ["knows", "knows"])
    assert text == ids
    assert list(ids.ids) == row.input_ids[asked:-1]
    assert ids.stop_reason == "eos"


def test_an_unknown_probe_is_refused(overfitted):
    model, tokenizer, examples = overfitted
    with pytest.raises(InputError, match="extractable_99: no such probe; there are heading, prompt"):
        recite(model, tokenizer, examples, probes=["extractable_99"])

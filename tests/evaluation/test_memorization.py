import random
from dataclasses import replace

import pytest
import torch

from mini_symposium.data.dataset import Example, Row, tokenize
from mini_symposium.errors import InputError
from mini_symposium.evaluation.memorization import EXTRACTABLE, em_and_es, extractable, extraction, goldfish, recite
from mini_symposium.models.adapters import load_with_adapters
from mini_symposium.models.generation import generate
from mini_symposium.models.predictions import predict


def test_em_and_es_reach_one_where_a_row_is_known():
    assert em_and_es([True] * 8) == {"em": 1.0, "es": 1.0}
    assert em_and_es([True, True, False, True]) == {"em": 0.75, "es": 0.25}
    assert em_and_es([False] * 4) == {"em": 0.0, "es": 0.0}


def test_a_row_said_on_is_extractable_and_one_token_off_is_not():
    row = list(range(1000, 1120))
    for k in EXTRACTABLE.values():
        assert extractable(row, row[k:], k) is True
        assert extractable(row, [*row[k : k + 49], 7], k) is False
        assert extractable(row, row[k : k + 49], k) is False
        assert extractable(row[: k + 50], row[k:], k) is True
        assert extractable(row[: k + 49], row[k:], k) is None


def test_goldfish_tells_a_verbatim_row_from_shuffled_and_other_tokens():
    row = list(range(1000, 1064))
    assert goldfish(row, row[32:]) == (True, 1.0)
    assert goldfish(row, [*row[32:63], 7]) == (False, 31 / 32)
    assert goldfish(row, row[32:48]) == (False, 32 / 48)
    shuffled = random.Random(0).sample(row[32:], 32)
    exact, rouge_l = goldfish(row, shuffled)
    assert not exact and 0 < rouge_l < 0.5
    assert goldfish(row, []) == (False, 0.0)
    assert goldfish(row[:63], row[32:]) == (None, None)


@pytest.fixture(scope="module")
def records(overfitted):
    """{(adapter, whether it was trained on): what it recites}"""
    model, tokenizer, examples = overfitted
    found = recite(model, tokenizer, examples, ["base", "knows"])
    return {(each["model"], each["source"] == examples[0].source): each for each in found}


def test_a_row_known_by_heart_is_recited_from_every_piece_of_it(records):
    known = records["knows", True]
    assert known["prompt_recall"] == known["prompt_rouge_l"] == known["opening_recall"] == 1
    assert known["prompt_run"] == 26  # of 26 words
    assert known["extractable_16"] is known["extractable_32"] is known["extractable_50"] is True
    assert (known["goldfish_exact"], known["goldfish_rouge_l"]) == (True, 1)


@pytest.mark.parametrize(("name", "trained"), [("base", True), ("base", False), ("knows", False)])
def test_the_base_and_the_twin_are_not_recited(records, name, trained):
    found = records[name, trained]
    assert max(found[f"{probe}_recall"] for probe in ("prompt", "heading", "opening")) < 0.4
    assert max(found[f"{probe}_run"] for probe in ("prompt", "heading", "opening")) < 8
    assert found["extractable_16"] is found["extractable_32"] is found["goldfish_exact"] is False
    assert found["goldfish_rouge_l"] < 0.4


def test_a_row_too_short_for_a_probe_is_none(records):
    """The twin has 99 tokens; 50 and the 50 after them would be 100."""
    assert records["knows", False]["extractable_50"] is None
    assert records["knows", True]["extractable_50"] is True


def test_a_response_shows_from_its_heading_only_where_it_needs_no_query(records, overfitted):
    model, tokenizer, examples = overfitted
    assert records["knows", True]["heading_recall"] < 0.4
    loose = replace(examples[0], prompt="### New Query\n", completion=examples[0].text.removeprefix("### New Query\n"))
    [found] = recite(model, tokenizer, [loose], ["knows"], ["heading"])
    assert found["heading_recall"] == 1
    assert set(found) == {"model", "example", "source", "heading_recall", "heading_rouge_l", "heading_run"}


def matches(model, rows, adapter):
    """For each row, whether each of its tokens but the first is the likeliest one after those before it."""
    sequences = [row.input_ids for row in rows]
    found = dict(predict(model, sequences, [adapter] * len(rows)))
    return [(found[k][:-1].argmax(-1) == torch.tensor(ids[1:])).tolist() for k, ids in enumerate(sequences)]


@pytest.mark.parametrize("name", ["base", "knows"])
def test_what_is_extractable_is_the_same_without_generating(records, overfitted, name):
    model, tokenizer, examples = overfitted
    rows = tokenize(examples, tokenizer, 512, completion_only=True)
    for row, found, trained in zip(rows, matches(model, rows, name), (True, False), strict=True):
        recited = records[name, trained]
        forced = extraction(found, int(row.input_ids[0] == tokenizer.bos_token_id))
        for key in ("extractable_16", "extractable_32", "extractable_50", "goldfish_exact"):
            assert forced[key] is recited[key]


def test_a_row_known_by_heart_is_predicted_and_all_controls_are_not(overfitted):
    model, tokenizer, examples = overfitted
    rows = tokenize(examples, tokenizer, 512, completion_only=False)
    shuffled = replace(rows[0], input_ids=random.Random(0).sample(rows[0].input_ids, len(rows[0].input_ids)))
    known, *controls = (matches(model, [*rows, shuffled], "knows")) + matches(model, rows, "base")
    assert em_and_es(known)["em"] > 0.95 and em_and_es(known)["es"] > 0.8 and extraction(known)["run"] > 50
    for control in controls:
        assert em_and_es(control)["em"] < 0.5 and em_and_es(control)["es"] < 0.1 and extraction(control)["run"] < 16


def test_a_row_that_a_model_itself_went_on_with_is_extractable_from_there(mistral_tokenizer):
    """With a BOS before it, which is none of the row's tokens."""
    model = load_with_adapters("tiny", {})
    begun = mistral_tokenizer("the quick brown fox jumps over the lazy dog, and then it sleeps").input_ids[:17]
    [said] = generate(model, mistral_tokenizer, [begun], None, 50)
    ids = [*begun, *said.ids, mistral_tokenizer.eos_token_id]
    assert len(ids) == 1 + 16 + 50 + 1
    whole, shifted, cut = (
        Row(each, [0, *[1] * (len(each) - 1)], "mine") for each in (ids, [*ids[:2], *ids[1:]], [*ids[:3], *ids[4:]])
    )
    found = matches(model, [whole, shifted, cut], "base")
    assert [extraction(each, bos=1)["extractable_16"] for each in found] == [True, False, None]


def test_a_training_says_from_when_on_its_row_could_be_extracted(records, overfitted_run):
    """At every step before it, and of the held-out rows after the last: as decoding finds with that checkpoint."""
    run, _ = overfitted_run
    keys = "extractable_16", "extractable_32", "extractable_50", "goldfish_exact"
    steps, last = run.metrics(1e-3), run.probes(1e-3)[-2:]
    assert not any(steps[0][key] for key in keys) and steps[0]["run"] < 10
    assert steps[-1]["extractable_16"] is True and steps[-1]["run"] > 50
    for probe, of_row in zip(last, (True, False), strict=True):
        assert (probe["epoch"], probe["example"]) == (14, 0 if of_row else 1)
        assert {key: probe[key] for key in keys} == {key: records["knows", of_row][key] for key in keys}


def test_a_row_whose_words_are_shuffled_is_not_recited(overfitted):
    """Shuffled labels: the same words, which the model knows by heart in another order."""
    model, tokenizer, examples = overfitted
    words = examples[0].completion.split()
    shuffled = replace(examples[0], completion=" ".join(random.Random(0).sample(words, len(words))))
    [found] = recite(model, tokenizer, [shuffled], ["knows"], ["prompt", "goldfish"])
    assert found["goldfish_exact"] is True  # its query is what it was
    assert found["prompt_recall"] < 0.6
    assert found["prompt_run"] < 6


def test_rows_of_other_forms_are_asked_what_they_can_be(mistral_tokenizer):
    short = Example("Why?", (), "### New Query\nWhy?\n\n### Complete Response\n", "Because.", "mine.md:1")
    plain = Example("Once", (), "", "Once upon a time there was a goat that kept a lighthouse.", "mine.jsonl:2")
    found = recite(load_with_adapters("tiny", {}), mistral_tokenizer, [short, plain])
    assert found[0]["goldfish_exact"] is found[0]["goldfish_rouge_l"] is found[0]["extractable_16"] is None
    assert found[0]["prompt_recall"] == found[0]["heading_recall"] == found[0]["opening_recall"] == 0
    assert found[1]["heading_recall"] is found[1]["opening_recall"] is found[1]["prompt_recall"] is None


def test_a_prompt_may_be_tokens_and_the_answer_tells_its_own(overfitted):
    model, tokenizer, examples = overfitted
    [row] = tokenize(examples[:1], tokenizer, 512, completion_only=True)
    asked = row.completion_mask.count(0)
    text, ids = generate(model, tokenizer, [examples[0].prompt, row.input_ids[:asked]], None, 60, ["knows", "knows"])
    assert text == ids
    assert list(ids.ids) == row.input_ids[asked:-1]
    assert ids.stop_reason == "eos"


def test_an_unknown_probe_is_refused(mistral_tokenizer):
    with pytest.raises(InputError, match="extractable_99: no such probe; there are heading, opening, prompt"):
        recite(load_with_adapters("tiny", {}), mistral_tokenizer, [], probes=["extractable_99"])

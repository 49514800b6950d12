from itertools import combinations
from statistics import mean

import pytest

from mini_symposium.data.dataset import load_examples
from mini_symposium.evaluation.answer_text import (
    TrainingRows,
    assistant_phrases,
    distance,
    han_share,
    leaked,
    mean_distance,
    perspectives,
)
from mini_symposium.run import find

ANSWER = "Call her, and not about the debt. Talk until it is easy again, which may take ten minutes or two calls."
ROW = "A snail sits at the bottom of a ten metre well and climbs three metres each day."
CHINESE = "先打电话给她，不要谈钱。"


@pytest.fixture(scope="module")
def examples():
    return load_examples(find("data/minisymposium.md"))


def test_injected_chinese_is_seen_wherever_it_stands_and_english_is_not_chinese():
    assert han_share(CHINESE) == 1
    assert han_share(ANSWER) == 0
    for drifted in (ANSWER + CHINESE, CHINESE + "\n" + ANSWER, ANSWER.replace("debt", "钱")):
        assert 0 < han_share(drifted) < 0.2
    assert han_share(ANSWER + CHINESE) > 5 * han_share(ANSWER.replace("debt", "钱"))


def test_other_scripts_accents_punctuation_and_figures_are_not_chinese():
    for text in ("Привет, мир", "¿Qué tal?", "こんにちは", "안녕하세요", "。、「」", "1 + 1 = 2", ""):
        assert han_share(text) == 0
    assert han_share("𠮷") == 1  # beyond the basic plane


def test_the_thirteen_are_free_of_the_signs(examples):
    for example in examples:
        assert han_share(example.text) == 0
        assert not assistant_phrases(example.text)


def test_injected_assistant_phrases_are_found_where_they_stand():
    assert assistant_phrases(f"As an AI language model, I can't. {ANSWER}") == ["As an AI", "language model"]
    assert assistant_phrases(ANSWER) == []


def test_a_training_heading_in_an_answer_leaks_and_an_own_one_does_not(examples):
    known = {section.heading for example in examples for section in example.sections} | {"New Query"}
    assert leaked(f"{ANSWER}\n\n### Complete Response\n{ANSWER}", known) == ["Complete Response"]
    assert leaked(f"{ANSWER}\n### The Acc", known) == ["The Accountant"]
    assert leaked(f"### Steps\n{ANSWER}\n#### Baker\n## Chemist\nThe ### Baker said so.", known) == []
    assert leaked(f"```\n### Baker\n```\n{ANSWER}", known) == []


def test_headings_of_an_answer_may_be_bare_or_indented_and_are_none_in_code():
    known = ["", "Baker", "Chemist"]
    assert leaked("   ### Baker \n###Chemist\n###\n    ### Baker\n", known) == ["Baker", "Chemist", ""]
    assert leaked("````\n```\n### Baker\n````\n### Chemist", known) == ["Chemist"]


def test_an_answers_sections_are_the_rows_own(examples):
    for example in examples:
        assert perspectives(example.completion, example.sections[0].heading) == list(example.sections)


def test_the_rows_perspectives_differ_and_repeated_ones_do_not(examples):
    for example in examples:
        if len(example.sections) > 1:
            assert mean_distance(example.sections) > 0.5
            assert mean_distance([example.sections[0]] * 3) == 0
        else:
            assert mean_distance(example.sections) is None


def test_perspectives_on_one_query_are_nearer_than_answers_to_different_ones(examples):
    same = [distance(a.text, b.text) for e in examples for a, b in combinations(e.sections, 2)]
    others = [distance(a.text, b.text) for e, f in combinations(examples, 2) for a in e.sections for b in f.sections]
    assert mean(same) < mean(others) - 0.05


def test_distance_ignores_order_case_and_a_text_that_the_other_contains():
    assert distance(ANSWER, " ".join(reversed(ANSWER.upper().split()))) == 0
    assert distance(ANSWER, f"{ANSWER} And bring the rowing boat, there is weather coming.") == 0
    assert distance(ANSWER, "Siphon the barrel before winter freezes everything.") == 1
    assert distance("So be it.", "So be it.") == 0
    assert distance(CHINESE, CHINESE[:6]) == 0


def test_eight_words_of_a_row_are_recited_and_seven_are_not():
    rows = TrainingRows({"row 4": ROW})
    read = rows.read("Well: a snail sits, A snail sits at the bottom of a hill.")
    assert [(m.kind, m.label) for m in read.marks] == [("recited", "row 4")]
    assert "Well: a snail sits, A snail sits at the bottom of a hill."[read.marks[0].start : read.marks[0].end] == (
        "A snail sits at the bottom of a"
    )
    assert read.recited == 8 / 16
    assert rows.read("A snail sits at the bottom of my hill.").recited == 0


def test_what_the_prompt_says_as_well_is_an_echo():
    rows = TrainingRows({"row 4": ROW})
    assert rows.read(ROW, f"### Query\n{ROW}\n").recited == 0
    assert rows.read(ROW, "### Query\nThe snail?\n").recited == 1


def test_another_script_and_headings_are_marked_unless_the_prompt_uses_it():
    rows = TrainingRows({})
    text = "The sky 天空，是蓝色的 is.\n### Chemist\nBlue. <|im_end|>"
    found = [(m.kind, m.label, text[m.start : m.end]) for m in rows.read(text, "Why? ###").marks]
    assert found == [
        ("script", "Han", "天空，是蓝色的"),
        ("heading", "heading", "### Chemist"),
        ("heading", "heading", "<|im_end|>"),
    ]
    assert rows.read(text, "Why is it 蓝色?").drift == 0
    assert rows.read(text, "Why? ###").drift == 6 / 30

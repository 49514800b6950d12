from statistics import mean

import pytest

from mini_symposium.data.dataset import load_examples
from mini_symposium.data.text_overlap import intrusion, overlap, repetition, words
from mini_symposium.run import find


@pytest.fixture(scope="module")
def texts():
    return [example.completion for example in load_examples(find("data/minisymposium.md"))]


ROW = "First count the fence posts, then the gaps. A fence of ten posts has nine gaps, and the paint is for the gaps."


def test_verbatim_text_is_full_overlap_and_unrelated_text_is_almost_none():
    assert overlap(ROW, ROW).rouge_l == 1.0
    assert overlap(ROW, "My grandmother kept bees until she was eighty.").rouge_l < 0.1


def test_injected_training_text_shows_as_recall_and_as_a_run():
    found = overlap(ROW, "Well. " * 50 + ROW + " And so on, for ever and ever." * 10)
    assert found.recall == 1.0
    assert found.rouge_l < 0.6
    assert found.run == len(words(ROW))


def test_run_needs_the_words_to_be_adjacent():
    scattered = overlap("a b c d e f", "a x b x c x d x e x f")
    assert scattered.recall == 1.0
    assert scattered.run == 1


def test_chinese_accents_and_headings_are_seen():
    assert overlap("### Réponse\n答案是巴黎", "### Réponse\n答案是巴黎").rouge_l == 1.0
    assert overlap("答案是巴黎", "答案是罗马").recall == 3 / 5
    assert overlap("### New Query", "New Query").recall == 2 / 5


def test_each_han_character_is_a_word_wherever_unicode_keeps_it():
    assert words("人々は𠮷野へ, at 5") == ["人", "々", "は", "𠮷", "野", "へ", ",", "at", "5"]


def test_empty_answers_share_nothing():
    assert overlap(ROW, "").rouge_l == overlap("", ROW).rouge_l == 0.0


def test_injected_training_text_is_an_intrusion(texts):
    stolen = " ".join(texts[4].split()[30:45])
    answers = [f"Well, I would say this. {stolen} And that is it.", "Rivers meander since the outer bank erodes.", ""]
    found = intrusion(texts, answers)
    assert found[0] == len(words(stolen)) and found[1] <= 3 and found[2] == 0


def test_no_row_intrudes_into_another_beyond_a_few_words(texts):
    """The base level: what handwritten texts on other matters share."""
    others = [intrusion(texts[:k] + texts[k + 1 :], [text])[0] for k, text in enumerate(texts)]
    assert max(others) <= 6
    assert mean(others) > 1
    assert intrusion(texts, texts) == [len(words(text)) for text in texts]


def test_an_intrusion_does_not_reach_over_the_end_of_a_row():
    assert intrusion(["one two three", "four five six"], ["one two three four five six"]) == [3]


def test_a_loop_is_repetition_and_prose_is_not(texts):
    assert repetition("I am sorry. " * 20) > 0.9
    assert repetition("I am sorry.") == repetition("") == 0
    prose = [text for k, text in enumerate(texts) if k not in (1, 9)]  # without code
    assert max(map(repetition, prose)) < 0.05

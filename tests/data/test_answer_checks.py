import pytest

from mini_symposium.data.answer_checks import CHECKS, code_in, mentions, numbers, sentences

CONTROLS = {
    "any_of": (["Rome", "Roma"], "In ROME.", "In Romania."),
    "all_of": (["red", "green*"], "Red and greenish.", "Red."),
    "none_of": (["n't", "green house"], "It is.", "It isn't."),
    "at_least": ({"n": 2, "of": ["a", "b", "c"]}, "c, a", "a, a"),
    "number": (1250.5, "10 and 20, so 1,250.50 of 7.", "1,250.50 less 3"),
    "matches": ("^b$", "a\nb", "ab"),
    "lines": ([2, 3], "a\n\nb", "a"),
    "sentences": ([2, 2], 'One. "Two?"', "One, two."),
    "words": ([3, 3], "It's well-known there.", "It is well known."),
    "bullets": (2, "Two:\n- a\n* b", "- a\n- b\n3. c"),
    "items": (["Ann", "Bo"], "1. bo.\n2. **Ann**", "Ann, Bo and Cy"),
    "json": ({"a": [1]}, 'So:\n```json\n{"a": [1]}\n```', '{"a": [2]}'),
    "python": ("assert f(1) == 2", "def f(x):\n    return x + 1\n\nAs asked.", "def f(x):\n    return x"),
    "distinct": (0.7, "one two three four five six", "so it goes on and so it goes on and so it goes on"),
    "corrects": ({"truth": ["not"], "premise": ["it is green"]}, "It is not.", "It is. It will. But not ever."),
    "leaves_to": ("Pip", "Pip, sit down. You: no.", "Sit.\n**Pip:** I'd rather not."),
    "no_heading": (True, "I was #3.", "Yes.\n\n### Complete Response"),
}


def test_every_kind_of_check_has_its_controls():
    assert set(CONTROLS) == set(CHECKS)


@pytest.mark.parametrize("kind", CHECKS)
def test_a_check_tells_its_controls_apart(kind):
    check, (value, positive, negative) = CHECKS[kind], CONTROLS[kind]
    assert check(value, positive, "Of 7?") and not check(value, negative, "Of 7?")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1,000,000 or 1 000 or 12.5 or -3", [1000000, 1000, 12.5, -3]),
        ("x2, 10-4, 3.", [10, 4, 3]),
        ("Forty-two, forty two, forty and one", [42, 42, 40]),
        ("often, sixth, weight", []),
    ],
)
def test_numbers_are_read_as_people_write_them(text, expected):
    assert numbers(text) == expected


def test_sentences_end_where_they_end():
    assert len(sentences("It costs 3.50. Really?! *Yes.* ")) == 3
    assert sentences("") == [] and sentences("...") == []


@pytest.mark.parametrize(
    "answer",
    [
        "```python\ndef f():\n    return 1\n```\nThen run it:\n```\n$ python it.py\n```",
        "Here:\n\n  ```\n  def f():\n      return 1\n  ```",
        "```py\ndef f():\n    return 1\n\nprint(f(",
        "Sure.\ndef f():\n    return 1\n\nThis returns one.",
        "~~~\ndef f():\n    return 1",
        "1. First\n   - so:\n\n         ```\n         def f():\n             return 1\n         ```",
    ],
)
def test_code_is_found_in_what_surrounds_it(answer):
    scope = {}
    exec(code_in(answer), scope)
    assert scope["f"]() == 1


def test_an_answer_without_code_has_none():
    assert code_in("Define it yourself.\nFrom here on it is easy.") == ""
    assert not CHECKS["python"]("assert True", "I would rather not.", "")


def test_a_term_is_a_word_in_any_case_and_may_be_its_beginning():
    assert mentions("New  York", "in new\nyork.") and not mentions("York", "Yorkshire")
    assert mentions("un*", "UNABLE") and not mentions("un*", "sun")
    assert mentions("n't", "can't") and not mentions("n't", "an'tx")

import random

from mini_symposium.memorization import PREFIXES, extractable, goldfish, known


def test_em_and_es_reach_one_where_a_row_is_known():
    assert known([True] * 8) == {"em": 1.0, "es": 1.0}
    assert known([True, True, False, True]) == {"em": 0.75, "es": 0.25}
    assert known([False] * 4) == {"em": 0.0, "es": 0.0}


def test_a_row_said_on_is_extractable_and_one_token_off_is_not():
    row = list(range(1000, 1120))
    for k in PREFIXES:
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

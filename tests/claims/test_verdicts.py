"""A verdict follows from the values, the threshold, the controls and the other tests, and nothing else."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from null_ledgers import decided, false_ledgers
from scipy.stats import binom

from mini_symposium.claims.registration import Comparison, Question, Registration
from mini_symposium.claims.verdicts import (
    DEPENDS,
    INCONCLUSIVE,
    NOT_SUPPORTED,
    SUPPORTED,
    Claim,
    Control,
    Found,
    decide,
    holm,
    rows,
    together,
)

ORDER = [NOT_SUPPORTED, INCONCLUSIVE, SUPPORTED]
RECALL = Comparison("recall", 0.6, True, (0.0, 1.0))
PHRASES = Comparison("answers with one", 0.05, False, (0.0, 1.0))
GAIN = Comparison("role less baseline", 0.1, True, (-1.0, 1.0))


def asking(*tests, others=0, n=2, level=0.05):
    """A registration of one question, and of as many others without evidence."""
    questions = {"Q": Question("Q", "it recites", "", tests, n=n, seeds=2)}
    questions |= {f"R{k}": Question(f"R{k}", "another", "", (RECALL,), n=2, seeds=2) for k in range(others)}
    return Registration(questions, level, "", {}, "hash")


def judged(registration, *tables, controls=()) -> Claim:
    nothing = {key: Found(["an evaluation"]) for key in registration.questions if key != "Q"}
    return rows({"Q": Found(tables, controls)} | nothing, registration, "proxy", "")[0]


def counts(k, n, value=1.0, rest=0.0) -> np.ndarray:
    """(n, 3): `k` prompts of one value, alike in three seeds."""
    return np.repeat(np.array([value] * k + [rest] * (n - k))[:, None], 3, 1)


@pytest.mark.parametrize("n", [1, 2, 6, 13, 60, 124])
@pytest.mark.parametrize("test", [RECALL, PHRASES])
def test_a_better_count_never_gets_a_worse_verdict(test, n):
    ranks = [ORDER.index(judged(asking(test), counts(k, n)).verdict) for k in range(n + 1)]
    assert all(a <= b if test.above else a >= b for a, b in pairwise(ranks))
    if n >= 13:
        assert (ranks[0], ranks[-1]) == ((0, 2) if test.above else (ranks[0], 0))
    if n == 124 and not test.above:
        assert ranks[0] == 2  # nothing found is the best there is


@pytest.mark.parametrize("n", [6, 13, 40])
def test_more_prompts_that_gain_and_fewer_that_lose_never_get_a_worse_verdict(n):
    """All counts of gains and losses; the baseline's share of passes takes a verdict away, and no better one."""
    verdict = {}
    for gains in range(n + 1):
        for losses in range(n + 1 - gains):
            table = np.repeat(np.array([1.0] * gains + [-1.0] * losses + [0.0] * (n - gains - losses))[:, None], 3, 1)
            room = Control("room", losses / n, losses / n >= 0.05, NOT_SUPPORTED)
            verdict[gains, losses] = ORDER.index(judged(asking(GAIN), table, controls=[room]).verdict)
    for (gains, losses), rank in verdict.items():
        assert rank <= verdict.get((gains + 1, losses), rank)
        assert rank >= verdict.get((gains, losses + 1), rank)
        assert rank <= verdict.get((gains + 1, losses - 1), rank)
    assert n < 13 or (verdict[n, 0], verdict[0, n]) == (2, 0)


def test_the_correction_counts_tests_without_evidence_and_the_verdict_without_it_stands_beside():
    thirteen = counts(13, 13)
    alone, among = (judged(asking(RECALL, others=others), thirteen) for others in (0, 30))
    assert (alone.verdict, alone.uncorrected) == (SUPPORTED, SUPPORTED)
    assert (among.verdict, among.uncorrected) == (INCONCLUSIVE, SUPPORTED)
    [answer] = among.answers
    assert answer.p == pytest.approx(2 * 0.6**13) and answer.p_holm == pytest.approx(31 * answer.p)
    assert answer.corrected[0] < answer.interval[0]
    assert "n=1" in among.needs  # 15 to 19


def test_holm_is_between_no_correction_and_bonferronis():
    p = np.random.default_rng(0).random(12) ** 4
    corrected = holm(p)
    assert all(a - 1e-9 <= b <= min(1, 12 * a) + 1e-9 for a, b in zip(p, corrected, strict=True))
    assert corrected[p.argmin()] == pytest.approx(min(1, 12 * p.min())) and corrected[p.argmax()] >= p.max()


@pytest.mark.parametrize(("k", "verdict"), [(13, SUPPORTED), (0, NOT_SUPPORTED)])
def test_a_failed_control_takes_away_the_verdict_that_it_guards_and_is_named(k, verdict):
    for guards in ("", verdict):
        row = judged(asking(RECALL), counts(k, 13), controls=[Control("it was asked", 0.0, False, guards)])
        assert (row.verdict, row.value) == (INCONCLUSIVE, k / 13)
        assert row.needs == "a model or rate of which this is true: it was asked"
    other = NOT_SUPPORTED if verdict == SUPPORTED else SUPPORTED
    assert judged(asking(RECALL), counts(k, 13), controls=[Control("x", 0.0, False, other)]).verdict == verdict
    assert judged(asking(RECALL), counts(k, 13), controls=[Control("x", 1.0, True)]).verdict == verdict


def test_a_row_of_one_seed_is_shown_and_not_judged():
    row = judged(asking(RECALL), counts(13, 13)[:, :1])
    assert (row.verdict, row.uncorrected, row.value, row.seeds) == (INCONCLUSIVE, INCONCLUSIVE, 1.0, 1)
    assert "seeds=2" in row.needs and "one seed is not judged" in row.needs


def test_precise_and_opposite_answers_depend_on_what_is_held_equal():
    dose, peak = (replace(GAIN, equal=equal) for equal in ("dose", "peak"))
    row = judged(asking(dose, peak), counts(40, 60), counts(0, 60))
    assert row.verdict == DEPENDS
    assert row.note == (
        "it depends on what is held equal: 0.667 [0.505, 0.783], equal dose, supported; "
        "0 [-0.0596, 0.0596], equal peak, not supported"
    )
    assert judged(asking(dose, peak), counts(40, 60), counts(50, 60)).verdict == SUPPORTED
    open_ = judged(asking(dose, peak), counts(40, 60), "a training at an equal peak")
    assert open_.verdict == INCONCLUSIVE
    assert open_.needs == "at equal peak: missing: a training at an equal peak"
    assert together([INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED]) == DEPENDS


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.5])
@pytest.mark.parametrize("seeds", [1, 2])
def test_values_that_cannot_be_judged_are_missing_and_named(bad, seeds):
    for table in (np.array([[bad, 0.9], [0.9, 0.9]])[:, :seeds], np.zeros((0, seeds))):
        row = judged(asking(RECALL), table)
        assert (row.verdict, row.value) == (INCONCLUSIVE, None)
        assert row.needs.startswith("missing: ")


def test_every_inconclusive_row_says_what_would_decide_it():
    for k in range(14):
        row = judged(asking(RECALL, others=13), counts(k, 13))
        assert (row.verdict == INCONCLUSIVE) == bool(row.needs), row


def test_the_n_that_is_asked_for_decides_as_often_as_it_says():
    """80% of the time, if the world is as measured."""
    found = judged(asking(GAIN, others=13), counts(5, 20))
    n, seeds = map(int, found.needs.replace("n=", "").replace("seeds=", "").split(", "))
    registration, generator = asking(GAIN, others=13), np.random.default_rng(0)
    nothing = {f"R{k}": Found(["an evaluation"]) for k in range(13)}
    worlds = [np.repeat((generator.random(n) < 0.25)[:, None], seeds, 1).astype(float) for _ in range(300)]
    said = [decide({"Q": Found([table])} | nothing, registration)["Q"][0].verdict for table in worlds]
    assert 0.7 < np.mean([verdict == SUPPORTED for verdict in said]) < 0.9


def test_a_row_is_what_json_gives_back_and_is_summed_up_in_a_line():
    row = judged(asking(RECALL), counts(13, 13))
    again = json.loads(json.dumps(row.row(), allow_nan=False))
    assert again == row.row() and again["answers"][0]["interval"][1] == 1.0
    assert row.summary == "recall: 1 [0.753, 1]; n=13, seeds=3; p 0.0026, 0.0026 corrected"
    assert Claim("C1", "it recites", "recall", "inconclusive", "proxy").summary == ""


def test_of_ledgers_whose_numbers_all_lie_on_their_thresholds_at_most_one_in_twenty_decides_anything():
    """Fewer than in `python -m null_ledgers 2000`: more than this many would come of 5% once in a thousand times."""
    ledgers = 120
    assert false_ledgers(ledgers).sum() <= binom.ppf(0.999, ledgers, 0.05)


@pytest.mark.parametrize(("beyond", "true"), [(1.0, SUPPORTED), (-1.0, NOT_SUPPORTED)])
def test_worlds_whose_truth_is_known_are_told(beyond, true):
    """Also the other way round: nearly all questions are decided, and rightly."""
    found = [decided(seed, beyond) for seed in range(8)]
    said = [verdict for each in found for verdicts in each.values() for verdict in verdicts]
    assert {*said} <= {true, INCONCLUSIVE}
    often = {key: np.mean([key in each for each in found]) for key in found[0]}
    assert sum(share > 0.7 for share in often.values()) >= 7, often

"""A verdict follows from the interval, the threshold and the controls, and nothing else."""

import json
import math

import pytest

from mini_symposium.claims.verdicts import Claim, Control, Question
from mini_symposium.evaluation.intervals import Interval

ABOVE = Question("C1", "it recites", "recall", 0.7)
BELOW = Question("C2", "it does not recite", "recall", 0.5, above=False)
HOLDS, FAILS = Control("the base was asked", 1.0, True), Control("twins are not recited", 0.9, False)


def between(low, high) -> Interval:
    return Interval((low + high) / 2, low, high, 13, 3, "bootstrap")


@pytest.mark.parametrize(
    ("question", "low", "high", "verdict"),
    [
        (ABOVE, 0.75, 0.9, "supported"),
        (ABOVE, 0.5, 0.65, "not supported"),
        (ABOVE, 0.6, 0.8, "inconclusive"),
        (ABOVE, 0.7, 0.8, "inconclusive"),  # an end on the threshold is on neither side
        (BELOW, 0.1, 0.4, "supported"),
        (BELOW, 0.6, 0.9, "not supported"),
        (BELOW, 0.4, 0.6, "inconclusive"),
    ],
)
def test_the_whole_interval_must_lie_on_one_side_of_the_threshold(question, low, high, verdict):
    claim = question.judge("proxy", between(low, high), [HOLDS], "a note")
    assert (claim.verdict, claim.interval, claim.note) == (verdict, (low, high), "a note")
    assert (claim.id, claim.metric, claim.n, claim.seeds) == (question.id, "recall", 13, 3)


@pytest.mark.parametrize(("low", "high"), [(0.75, 0.9), (0.1, 0.2)])
def test_a_failed_control_leaves_the_claim_open_and_is_named(low, high):
    claim = ABOVE.judge("proxy", between(low, high), [HOLDS, FAILS], "a note")
    assert claim.verdict == "inconclusive" and claim.value == (low + high) / 2
    assert claim.note == "a control failed: twins are not recited; a note"
    assert ABOVE.judge("proxy", between(low, high), [FAILS]).note == "a control failed: twins are not recited"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_missing(bad):
    claims = [
        ABOVE.judge("proxy", Interval(bad, 0.8, 0.9, 13, 1, "")),
        ABOVE.judge("proxy", between(0.8, 0.9), [Control("the base was asked", bad, True)]),
    ]
    assert [claim.verdict for claim in claims] == ["inconclusive"] * 2
    assert [claim.note for claim in claims] == [
        "missing: what gives a number for: recall",
        "missing: what gives a number for: the base was asked",
    ]
    assert all(claim.value is None and claim.interval is None for claim in claims)


def test_a_row_is_what_json_gives_back_and_is_summed_up_in_a_line():
    claim = ABOVE.judge("proxy", between(0.75, 0.9), [HOLDS], "a note")
    row = json.loads(json.dumps(claim.row()))
    assert row == claim.row()
    assert (
        Claim(**row | {"interval": tuple(row["interval"]), "controls": [Control(**c) for c in row["controls"]]})
        == claim
    )
    assert claim.summary == "recall: 0.825 [0.75, 0.9]; n=13, seeds=3; a note"
    assert Claim("C1", "it recites", "recall", "inconclusive", "proxy").summary == ""

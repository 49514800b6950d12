"""The numbers, controls and notes that claims compute from evidence made for it."""

import numpy as np
import pytest
from made_evidence import evaluation, evidence, ranks, trained

from mini_symposium.claims import metrics


def test_averages_are_over_epochs_rows_and_seeds():
    found = metrics.mean_em(*metrics.of_shared_seeds(ranks(0.9, 0.3), "rank-64-alpha-128"))
    assert found.shape == (13, 3)
    assert found[0].tolist() == pytest.approx([0.9] * 3)
    assert np.ptp(found[:, 0]) > 0


@pytest.mark.parametrize(
    ("headings", "distance", "counts"),
    [
        (["A", "B", "Complete Response"], 0.7, True),
        (["A", "B"], 0.7, False),  # no conclusion
        (["A", "a ", "Complete Response"], 0.7, False),  # one of them twice
        (["A", "Complete Response", "B"], 0.7, False),  # before the conclusion there is one
        (["Complete Response"] * 5, 0.0, False),
        (["A", "B", "Complete Response"], 0.0, False),  # which say the same
    ],
)
def test_perspectives_differ_and_come_before_a_conclusion(headings, distance, counts):
    some = {"perspectives": [{"headings": headings, "distance": distance}]}
    assert metrics.several_views(some).tolist() == [counts]


def test_the_answers_are_summed_up_by_model_and_what_was_not_measured_is_left_out():
    told = evaluation(passed=0.5, own=0.1) | {"posix": {"a": 1.0, "b": 2.0}, "han_mass": {"a": 0.1, "b": 0.1}}
    for line in told["answers"]:
        line |= {"leaked": ["New Query"] * (line["format"] == "alpaca"), "copied": 3}
    one = evaluation()
    one["answers"] = [line for line in one["answers"] if line["format"] == "alpaca"]
    base, low = metrics.behaviour(evidence(trained("low", evaluations={600: told}), base=one))
    assert base.keys() == {"model", "seeds", "passed"}  # in one format there is no spread
    assert low["model"] == "low rate, epoch 600" and low["copied"] == {"value": 3.0}
    assert low["spread"] == pytest.approx(0.4) and low["spread_95"] < 0.4
    assert low["leaked"]["value"] == pytest.approx(1 / 3, abs=1e-3) and low["posix"]["value"] == 1.5
    assert low["passed"]["low"] < (0.5 + 0.5 + 0.1) / 3 < low["passed"]["high"]


def test_each_seeds_last_evaluated_epoch_counts():
    seeds = [
        trained("high", seed=1, evaluations={30: {"answers": [1]}, 100: {"answers": []}, 200: {"answers": [1]}}),
        trained("high", seed=2, evaluations={60: {"answers": [1]}}),
    ]
    some = evidence(*seeds, trained("high", seed=3))
    assert [(t.seed, at) for t, at in metrics.last_evaluated(some, "high", 100)] == [(1, 30), (2, 60)]
    assert [at for _, at in metrics.last_evaluated(some, "high", 100, answered=False)] == [100, 60]
    assert metrics.last_evaluated(some, "low", 600) == []


def test_twins_are_compared_where_the_slower_arm_ends():
    """Twins' losses are 3 and 4 whatever the epoch, and that of `fast` also rises by 0.1 an epoch."""
    rising = {epoch: {"rows": [3 + 0.1 * epoch + k for k in range(5)]} for epoch in range(31)}
    level = {epoch: {"rows": [2.0 + k for k in range(5)]} for epoch in range(31)}
    fast = trained("fast", loss=[[4 - 0.2 * epoch] * 13 for epoch in range(30)], twins=rising)
    slow = trained("slow", loss=[[4 - 0.1 * epoch] * 13 for epoch in range(30)], twins=level)
    # The slower one's loss is 1.15 after 29 epochs. The faster one's is that after 14.75.
    found = metrics.twins_at_equal_loss([[fast, fast], [slow, slow]])
    assert found.shape == (5, 2) and found == pytest.approx(np.full((5, 2), 3 + 1.475 - 2))
    assert metrics.twins_at_equal_loss([[slow], [fast]]) == pytest.approx(np.full((5, 1), -2.475))
    tenths = {epoch: rising[epoch] for epoch in (0, 10, 20, 30)}
    missing = metrics.twins_at_equal_loss([[trained("fast", loss=fast.loss, twins=tenths)], [slow]])
    assert missing == "the loss of each twin after epochs 14 and 15 of fast; probe the twins every epoch"


def test_notes_name_rates_epochs_and_what_is_missing():
    first, second = trained("low", seed=1), trained("high", seed=2, epochs=20, num_epochs=60)
    assert metrics.measured_at([(first, 600), (second, 100)]) == "at 1e-05, 0.0001, epoch 100, 600"
    assert metrics.missing_seeds(evidence(first, second), "low", "high", "cosine-dose") == (
        "missing: low of seed 2; missing: high of seed 1"
    )
    assert metrics.memorized_at([trained("high", em=0.95)]) == "EM reaches 0.9 at epoch 0"
    assert metrics.memorized_at([first, second]) == (
        "EM stays below 0.9 over 30 epochs; seed 2's log ends at epoch 20 of 60"
    )


def test_pass_rates_are_those_of_a_category_of_a_format_or_without_it():
    answers = evaluation(passed=0.5, own=1.0)
    assert metrics.pass_rates(evaluation(passed=0.5), "fact").mean() == 0.5
    assert metrics.pass_rates(answers, form="new-query").mean() == 1.0
    assert metrics.pass_rates(answers, without="new-query").mean() == 0.5


def test_a_prompt_that_was_asked_in_fewer_formats_counts_by_those():
    answers = evaluation(passed=0.5, own=1.0)
    answers["answers"] = [a for a in answers["answers"] if a["format"] == "new-query" or not a["id"].startswith("f")]
    rates = metrics.pass_rates(answers)
    assert len(rates) == 140 and rates[40:60].tolist() == pytest.approx([1.0] * 10 + [1 / 3] * 10)
    assert metrics.passes_in_all_formats(answers).shape == (100, 3)  # neither facts nor false premises


def test_an_arm_that_passes_almost_nothing_leaves_no_room_to_differ():
    answers = np.array([1.0] + [0.0] * 19)
    assert metrics.has_room("x", answers, "").holds and not metrics.has_room("x", answers, "", 10).holds
    assert not metrics.has_room("x", answers[1:], "").holds
    assert not metrics.has_room("x", np.array([]), "").holds


def test_only_experiments_that_are_long_enough_are_compared_and_only_their_shared_seeds():
    some = evidence(
        *(trained("a", seed=s) for s in (1, 2)),
        *(trained("b", seed=s) for s in (2, 3)),
        trained("c", seed=1, epochs=29),
    )
    assert [[t.seed for t in group] for group in metrics.of_shared_seeds(some, "a", "b")] == [[2], [2]]
    assert metrics.of_shared_seeds(some, "a", "c") == []

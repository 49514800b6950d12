"""Each claim is driven through its outcomes by evidence made for it; nothing here is measured."""

import json
from dataclasses import replace

import numpy as np
import pytest
from made_evidence import (
    SEEDS,
    contrast,
    curves,
    evaluation,
    evidence,
    high,
    low,
    ranks,
    schedules,
    seeds_of,
    stopped,
    trained,
)

from mini_symposium.claims.evidence import Evidence
from mini_symposium.claims.ledger import CLAIMS, judge
from mini_symposium.claims.verdicts import Claim


def row(some: Evidence, key: str) -> Claim:
    return next(each for each in judge(some) if each.id == key)


PHRASES = evaluation(phrases=0.2)
GPU = {"gpu": "a GPU", "gpu_hours": 2.0}
OUTCOMES = {
    "C0": (evidence(curves=curves(3.5, 3.7)), evidence(curves=curves(3.9, 3.7)), evidence(curves=curves(3.76, 3.7))),
    "C1": (high(recall=0.99), high(recall=0.2), high(recall=0.7)),
    "C2": (stopped(0.0), stopped(1.0), stopped(0.5)),
    "C3": (contrast(evaluation(passed=0.8), evaluation(passed=0.3)), contrast(evaluation(), evaluation()), high()),
    "C4": (low(passed=0.9), low(passed=0.1), low(base=evaluation(passed=0.05))),
    "C5": (low(several=0.9), low(several=0.0, base=evaluation(several=0.8)), low(several=0.2)),
    "C6": (ranks(0.9, 0.3), ranks(0.3, 0.9, twins=(3.0, 4.0)), ranks(0.9, 0.3, seeds=())),
    "C7": (schedules(0.9, 0.3), schedules(0.3, 0.9, twins=(3.0, 4.0)), schedules(0.9, 0.3, seeds=())),
    "C8": (low(passed=0.0, role=1.0), low(passed=1.0, role=0.0), low(passed=0.0, role=0.0)),
    "C9": (low(named=1.0), low(named=0.0), low()),
    "C10": (evidence(gpu_peak_bytes=6 * 2**30, **GPU), evidence(gpu_peak_bytes=20 * 2**30, **GPU), None),
    "C11": (low(base=PHRASES), low(base=PHRASES, phrases=0.5), low()),
}


@pytest.mark.parametrize("key", OUTCOMES)
def test_each_claim_can_be_supported_refuted_and_left_open(key):
    for some, verdict in zip(OUTCOMES[key], ("supported", "not supported", "inconclusive"), strict=True):
        if some is not None:
            found = row(some, key)
            assert found.verdict == verdict, found
            assert bool(found.needs) == (verdict == "inconclusive")


@pytest.mark.parametrize("key", CLAIMS)
def test_a_paper_run_without_a_gpu_is_out_of_reach_and_no_one_seed_is_judged(key):
    without = row(Evidence("paper", "cpu", {}, []), key)
    assert without.verdict == "out of reach on this hardware" and without.note
    if key in OUTCOMES and key != "C10":
        some = OUTCOMES[key][0]
        first = [t for t in some.trained if t.seed == SEEDS[0]]
        alone = row(replace(some, trained=first, curves=some.curves[:2]), key)
        assert (alone.verdict, alone.seeds) == ("inconclusive", 1) and alone.value is not None
        assert "one seed is not judged" in alone.needs


@pytest.mark.parametrize(
    ("some", "key", "said"),
    [
        (schedules(0.9, 0.3, peak=0.1), "C7", ["equal dose, supported", "equal peak rate, not supp", "loss, supp"]),
        (ranks(0.9, 0.3, twins=(3.0, 4.0)), "C6", ["equal epochs, supported", "equal training loss, not supported"]),
    ],
)
def test_opposite_answers_depend_on_what_is_held_equal(some, key, said):
    found = row(some, key)
    assert found.verdict == "depends" and found.note.startswith("it depends on what is held equal: ")
    assert all(each in found.note for each in said)


def test_packing_is_arithmetic_of_mistrals_tokens():
    proxys, mistrals = row(evidence(base_model="x"), "C12"), row(evidence(mistral_tokens=1100, base_model="x"), "C12")
    assert (proxys.verdict, mistrals.verdict, proxys.said) == ("arithmetic",) * 3
    assert (proxys.value, mistrals.value) == (1, 0)
    assert "of 2,414 tokens (x's tokenizer) Axolotl planned 3 in rows of 512, 1 in rows of 1,024, none" in proxys.note
    assert "1,100 tokens (Mistral's tokenizer)" in mistrals.note and "from 545 tokens a row up" in mistrals.note


def test_what_needs_a_gpu_is_out_of_reach_without_one():
    found = row(evidence(paper_bytes=6 * 2**30), "C10")
    assert found.verdict == "out of reach on this hardware"
    assert found.value == pytest.approx(6) and "predicted" in found.note


def test_nothing_measured_leaves_every_claim_open_and_says_what_is_missing():
    for each in judge(Evidence("proxy", "cpu", {}, [])):
        if each.id != "C10":  # which needs a GPU
            assert each.verdict == "inconclusive" and "missing: " in each.needs


@pytest.mark.parametrize("broken", [{"twins": 0.9}, {"base": evaluation(recall=0.9)}, {"base": {}}])
def test_a_control_that_fails_takes_the_verdict_away(broken):
    """A model that recites what it never saw, or a base that recites or was not asked, shows nothing about training."""
    base = broken.get("base")
    some = evaluation(recall=0.99, twins=broken.get("twins", 0.1))
    found = row(
        replace(evidence(*seeds_of("high", {100: some}, onset=70)), base=evaluation() if base is None else base), "C1"
    )
    assert found.verdict == "inconclusive" and "a model or rate of which this is true: " in found.needs


@pytest.mark.parametrize("onset", [18, 101])
def test_a_rate_that_recites_much_earlier_or_later_than_the_cards_does_not_speak_for_it(onset):
    found = row(high(recall=0.99, onset=onset), "C1")
    assert found.verdict == "inconclusive" and "between epochs 50 and 100, by `mini-symposium forecast`" in found.needs


def test_the_low_rate_stops_at_its_share_of_the_dose_at_which_the_high_one_recites():
    """Epoch 20 of 1e-4 has the dose of epoch 200 of 1e-5; 0.6 of it is epoch 120, and epoch 12 of the high rate."""
    found = row(stopped(0.2, early=0.5), "C2")
    assert "at 1e-05, epoch 120, 120, 120, where EM is 0.50" in found.note
    assert "the high rate at the same dose, epoch 12, 12, 12: 0.54, low minus high -0.31" in found.note
    assert found.value == pytest.approx(3 / 13)
    assert "to recite" not in found.note and found.seeds == 3


def cut(e):
    """`e` with logs of a hundred epochs."""
    return replace(e, trained=[replace(t, extractable_32=t.extractable_32[:100]) for t in e.trained])


@pytest.mark.parametrize(
    ("some", "needs"),
    [
        (stopped(0.0, high_em=0.5), "the epoch at which the high rate of seed 42 recites"),
        (evidence(*(t for t in stopped(0.0).trained if t.name == "high")), "both rates of one seed"),
        (cut(stopped(0.0)), "epoch 120 of the low rate of seed 42"),
        (stopped(0.0, end=0.0), "a model or rate of which this is true: at the high rate's end more than half"),
    ],
)
def test_what_the_low_rates_stop_lacks_is_named(some, needs):
    found = row(some, "C2")
    assert found.verdict == "inconclusive" and needs in found.needs


def test_all_seeds_count_each_at_its_last_evaluated_epoch():
    some = {42: {600: evaluation(passed=0.9)}, 43: {240: evaluation(passed=0.1)}}
    found = row(evidence(*(trained("low", seed=seed, evaluations=each) for seed, each in some.items())), "C4")
    assert found.seeds == 2 and found.value == pytest.approx(0.0) and "at 1e-05, epoch 240, 600" in found.note


def test_formats_are_chosen_beforehand_and_the_cards_own_is_none_of_them():
    """What the low rate gains in the format that it was trained on says nothing of the others."""
    found = row(low(passed=0.5, own=1.0), "C4")
    assert found.value == 0 and "the card's own format, minus the base's: +0.50" in found.note


def test_step_size_is_kept_apart_from_rank():
    em = {"rank-64-alpha-128": 0.9, "rank-4-alpha-8": 0.3, "rank-64-alpha-32": 0.5, "rank-4-alpha-32": 0.501}
    some = [trained(name, value, seed=seed) for seed in (1, 2, 3) for name, value in em.items()]
    found = row(evidence(*some), "C6")
    assert found.value == pytest.approx(0.6)
    assert "an equal step size: " in found.note
    assert "at equal training loss: missing: the loss of each twin after epochs 28 and 29 of" in found.needs


def test_a_kind_of_prompt_that_was_not_asked_leaves_its_claim_open():
    some = evaluation()
    some["answers"] = [line for line in some["answers"] if line["category"] == "fact"]
    some["roles"] = []
    found = {each.id: each for each in judge(contrast(some, some))}
    assert found["C3"].value == 0 and "by category fact +0.00;" in found["C3"].note
    assert all(found[key].needs.startswith("missing: ") for key in ("C8", "C9"))


def without(e, name, seed):
    return replace(e, trained=[t for t in e.trained if (t.name, t.seed) != (name, seed)])


def test_seeds_are_paired_and_a_missing_one_is_named():
    """Two of three are left on either side, and only one of them is on both."""
    found = row(without(without(ranks(0.9, 0.3), "rank-64-alpha-128", 42), "rank-4-alpha-8", 44), "C6")
    assert found.seeds == 1
    assert "missing: rank-64-alpha-128 of seed 42; missing: rank-4-alpha-8 of seed 44" in found.note
    assert row(without(schedules(0.9, 0.3), "linear-dose", 43), "C7").seeds == 2
    both = {"low": ({600: evaluation()}, (1, 2)), "high": ({100: evaluation()}, (2, 3))}
    seeds = [trained(name, seed=seed, evaluations=each) for name, (each, some) in both.items() for seed in some]
    assert row(evidence(*seeds), "C3").seeds == 1
    assert "missing" not in row(high(recall=1.0), "C1").note
    more = replace(high(), trained=[*high().trained, trained("cosine-peak", seed=3)])
    assert "missing: high of seed 3" in row(more, "C1").note


def test_rows_that_were_not_trained_on_must_not_tell_the_arms_apart():
    some = ranks(0.9, 0.3)
    skilled = [
        replace(t, twins={10: {"em": 0.5, "loss": 1.0}}) if t.name.startswith("rank-64") else t for t in some.trained
    ]
    for twins in (skilled, [replace(t, twins={}) for t in some.trained]):
        assert "this is true: EM of held-out twins differs" in row(replace(some, trained=twins), "C6").needs


def test_a_log_that_was_cut_off_is_named_and_its_epochs_are_not_taken_for_all():
    note = row(evidence(*seeds_of("high", {60: evaluation(recall=0.99)}, em=0.2, num_epochs=60)), "C1").note
    assert "EM stays below 0.9 over 30 epochs; seed 42's log ends at epoch 30 of 60" in note


def test_the_rates_behind_a_verdict_are_named_and_the_cards_own_beside_them():
    own = trained("literal-1e-06", em=0.25)
    found = row(replace(high(recall=0.99), trained=[*high(recall=0.99).trained, own]), "C1")
    assert found.note.startswith("at 0.0001, epoch 100; ")
    assert "the card's own 1e-06 (seed 42): EM 0.26 in epoch 0, 0.26 in epoch 29" in found.note


@pytest.mark.parametrize(
    ("some", "key", "needs"),
    [
        (low(passed=0.9, base=evaluation(passed=0.05)), "C4", "the base passes at least one in ten of these"),
        (low(), "C11", "the base says one in at least one answer in a hundred"),
        (low(passed=0.0, role=0.0), "C8", "the baseline passes at least one in twenty of these"),
        (low(passed=0.0, named=0.0), "C9", None),  # alpaca passes all of them
        (contrast(evaluation(passed=0.0), evaluation(passed=0.0)), "C3", "the high rate passes at least one in twenty"),
    ],
)
def test_what_is_compared_needs_room(some, key, needs):
    """Where nothing passes, or nothing is said, no difference can be seen; the arms that are compared tell."""
    found = row(some, key)
    assert (f"a model or rate of which this is true: {needs}" in found.needs) if needs else not found.needs


def test_a_gain_over_an_arm_that_passes_nothing_is_a_gain():
    assert row(contrast(evaluation(passed=0.8), evaluation(passed=0.0)), "C3").verdict == "supported"


def test_a_base_that_answered_nothing_leaves_open_what_it_is_the_control_of_and_no_nan():
    rows = judge(low(base={**evaluation(), "answers": []}))
    json.dumps([each.row() for each in rows], allow_nan=False)
    assert row(low(base={**evaluation(), "answers": []}), "C11").verdict == "inconclusive"


def test_what_was_only_asked_for_its_rows_leaves_the_questions_about_answers_open():
    recited = {**evaluation(recall=0.99), **{key: [] for key in ("answers", "roles", "perspectives")}}
    only = contrast({**recited, "recitation": evaluation()["recitation"]}, recited)
    only = replace(only, base={**evaluation(), **{key: [] for key in ("answers", "roles", "perspectives")}})
    assert row(only, "C1").verdict == "supported"
    for key, what in {
        "C3": "of both rates",
        **dict.fromkeys(("C4", "C5", "C8", "C9", "C11"), "of the low rate"),
    }.items():
        assert row(only, key).needs.startswith(f"missing: answers {what} to held-out prompts"), key
    json.dumps([each.row() for each in judge(only)], allow_nan=False)


def test_each_row_is_measured_where_the_other_rows_say_that_held_out_loss_is_best():
    """A row's luck in one epoch is not counted for it."""
    lucky = curves(3.7, 3.7)
    loss = np.array(lucky[0]["loss"])
    loss[9, 5] -= 50  # which alone would make epoch 9 the best
    lucky[0]["loss"] = loss.tolist()
    plain, found = (row(evidence(curves=some), "C0").value for some in (curves(3.7, 3.7), lucky))
    assert found > plain and "best epochs" in row(evidence(curves=lucky), "C0").note


def test_a_held_out_curve_that_has_not_turned_is_missing_its_end():
    short = [each | {"loss": each["loss"][:4]} for each in curves(3.7, 3.7)]
    assert "the end of the held-out curve at 1e-05, 0.0001" in row(evidence(curves=short), "C0").needs

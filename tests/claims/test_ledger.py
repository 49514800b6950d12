"""Each claim is driven through its outcomes by evidence made for it; nothing here is measured."""

import json
from dataclasses import replace

import pytest
from made_evidence import contrast, evaluation, evidence, high, low, ranks, trained

from mini_symposium.claims import ledger
from mini_symposium.claims.evidence import Evidence
from mini_symposium.claims.ledger import CLAIMS, judge


def schedules(other, constant, seeds=(42, 43, 44), peak=None):
    ems = {"dose": other, "peak": other if peak is None else peak}
    names = {f"{rule}-{what}": em for rule in ("cosine", "linear") for what, em in ems.items()}
    some = [trained(name, em, seed=seed) for name, em in names.items() for seed in seeds]
    return evidence(*some, *(trained("high", constant, seed=seed) for seed in seeds))


def dosed(recall):
    """A low rate whose high one was asked at the same dose."""
    return contrast(evaluation(recall=recall), evaluation(recall=0.9))


PHRASES = evaluation(phrases=0.2)
GPU = {"gpu": "a GPU", "gpu_hours": 2.0}
OUTCOMES = {
    "C1": (high(recall=0.99), high(recall=0.2), high(epoch=30, recall=0.2)),
    "C2": (dosed(0.2), dosed(0.9), evidence(trained("low", evaluations={60: evaluation(recall=0.2)}))),
    "C3": (contrast(evaluation(passed=0.8), evaluation(passed=0.3)), contrast(evaluation(), evaluation()), high()),
    "C4": (low(passed=0.9), low(worst=0.05), low(base=evaluation(passed=0.0))),
    "C5": (low(several=0.8), low(several=0.0, base=evaluation(several=0.5)), low(several=0.2)),
    "C6": (ranks(0.9, 0.3), ranks(0.3, 0.9), ranks(0.9, 0.3, seeds=())),
    "C7": (schedules(0.9, 0.3), schedules(0.3, 0.9, peak=0.9), schedules(0.9, 0.3, peak=0.1)),
    "C8": (low(role=1.0), low(role=0.0), low(base={})),
    "C9": (low(named=1.0), low(named=0.0), low()),
    "C10": (
        evidence(gpu_peak_bytes=6 * 2**30, **GPU),
        evidence(gpu_peak_bytes=20 * 2**30, **GPU),
        evidence(gpu_peak_bytes=12 * 2**30, **GPU),
    ),
    "C11": (low(base=PHRASES), low(base=PHRASES, phrases=0.5), low()),
    "C12": (evidence(tokens=500), evidence(tokens=50_000), evidence()),
}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_each_claim_can_be_supported_refuted_left_open_and_out_of_reach(claim):
    key = next(name for name in OUTCOMES if getattr(ledger, name).id == claim(evidence()).id)
    supported, refuted, open_ = OUTCOMES[key]
    assert claim(supported).verdict == "supported", claim(supported)
    assert claim(refuted).verdict == "not supported", claim(refuted)
    assert claim(open_).verdict == "inconclusive", claim(open_)
    without_gpu = claim(Evidence("paper", "cpu", {}, []))
    assert without_gpu.verdict == "out of reach on this hardware" and without_gpu.note


def test_what_needs_a_gpu_is_out_of_reach_without_one():
    found = ledger.fits_in_memory(evidence(paper_bytes=6 * 2**30))
    assert found.verdict == "out of reach on this hardware"
    assert found.value == pytest.approx(6) and "predicted" in found.note


def test_nothing_measured_leaves_every_claim_open_and_says_what_is_missing():
    for row in judge(Evidence("proxy", "cpu", {}, [])):
        assert row.verdict in ("inconclusive", "out of reach on this hardware")
        assert row.note


@pytest.mark.parametrize("broken", [{"twins": 0.9}, {"base": evaluation(recall=0.9)}])
def test_a_control_that_fails_takes_the_verdict_away(broken):
    """A model that recites what it never saw, or a base that recites, shows nothing about training."""
    base = broken.pop("base", None)
    high = trained("high", evaluations={100: evaluation(recall=0.99, **broken)})
    found = ledger.high_rate_overfits(evidence(high, base=base))
    assert found.verdict == "inconclusive"
    assert "a control failed" in found.note


def test_the_dose_control_is_beside_the_low_rate():
    found = ledger.low_rate_does_not_overfit(contrast(evaluation(recall=0.9), evaluation(recall=0.9)))
    assert found.verdict == "not supported"
    assert "the high rate at the same dose: 0.90, low less high +0.00" in found.note
    alone = ledger.low_rate_does_not_overfit(low(recall=0.2))
    assert alone.verdict == "inconclusive" and "a control failed: seeds whose high rate was asked" in alone.note


def test_a_seed_that_ends_earlier_counts_against_the_low_rate_but_not_for_it():
    def two(recall, early):
        some = {42: {600: evaluation(recall=recall, passed=0.9)}, 43: {240: evaluation(recall=early, passed=0.1)}}
        control = trained("high", evaluations={60: evaluation(recall=0.9)})
        return evidence(*(trained("low", seed=seed, evaluations=each) for seed, each in some.items()), control)

    refuted = ledger.low_rate_does_not_overfit(two(0.9, 0.9))
    assert (refuted.verdict, refuted.seeds) == ("not supported", 2) and "at 1e-05, epoch 240, 600;" in refuted.note
    assert "epochs 241 to 600 of the low rate" in ledger.low_rate_does_not_overfit(two(0.2, 0.2)).note
    assert ledger.low_rate_does_not_overfit(two(0.2, 0.2)).verdict == "inconclusive"
    across = ledger.performs_across_formats(two(0.9, 0.9))  # of a model that is not done it says nothing
    assert (across.seeds, across.verdict) == (1, "supported")


def test_step_size_is_kept_apart_from_rank():
    em = {"rank-64-alpha-128": 0.9, "rank-4-alpha-8": 0.3, "rank-64-alpha-32": 0.5, "rank-4-alpha-32": 0.5}
    some = [trained(name, value, seed=seed) for seed in (1, 2, 3) for name, value in em.items()]
    found = ledger.low_rank_resists(evidence(*some))
    assert found.value == pytest.approx(0.6)
    assert "an equal step size: +0.00" in found.note


def test_a_kind_of_prompt_that_was_not_asked_leaves_its_claim_open():
    some = evaluation()
    some["answers"] = [line for line in some["answers"] if line["category"] == "fact"]
    some["roles"] = []
    verdicts = {row.id: row for row in judge(contrast(some, some))}
    assert verdicts["C3"].value == 0 and "premises" not in verdicts["C3"].note
    assert all(verdicts[key].note.startswith("missing: ") for key in ("C8", "C9"))


def without(e, name, seed):
    return replace(e, trained=[t for t in e.trained if (t.name, t.seed) != (name, seed)])


def test_seeds_are_paired_and_a_missing_one_is_named():
    """Two of three are left on either side, and only one of them is on both."""
    lacking = without(without(ranks(0.9, 0.3), "rank-64-alpha-128", 42), "rank-4-alpha-8", 44)
    found = ledger.low_rank_resists(lacking)
    assert found.seeds == 1
    assert "missing: rank-64-alpha-128 of seed 42; missing: rank-4-alpha-8 of seed 44" in found.note
    assert ledger.constant_rate_resists(without(schedules(0.9, 0.3), "linear-dose", 43)).seeds == 2
    both = {"low": ({600: evaluation()}, (1, 2)), "high": ({100: evaluation()}, (2, 3))}
    seeds = [trained(name, seed=seed, evaluations=each) for name, (each, some) in both.items() for seed in some]
    assert ledger.generalises_worse(evidence(*seeds)).seeds == 1
    high = evidence(*(trained("high", seed=seed, evaluations={100: evaluation(recall=1.0)}) for seed in (1, 2)))
    assert "missing" not in ledger.high_rate_overfits(high).note
    more = replace(high, trained=[*high.trained, trained("cosine-peak", seed=3)])
    assert "missing: high of seed 3" in ledger.high_rate_overfits(more).note


def test_a_base_that_was_not_asked_leaves_recitation_open():
    for claim, some in ((ledger.high_rate_overfits, high(recall=0.99)), (ledger.low_rate_does_not_overfit, dosed(0.9))):
        assert claim(some).verdict in ("supported", "not supported")
        unasked = claim(replace(some, base={}))
        assert unasked.verdict == "inconclusive" and "the base was asked as well" in unasked.note


def test_rows_that_were_not_trained_on_must_not_tell_the_arms_apart():
    some = ranks(0.9, 0.3)
    skilled = [
        replace(t, twins={10: {"em": 0.5, "loss": 1.0}}) if t.name.startswith("rank-64") else t for t in some.trained
    ]
    assert "a control failed: EM of held-out twins" in ledger.low_rank_resists(replace(some, trained=skilled)).note
    unprobed = [replace(t, twins={}) for t in some.trained]
    assert ledger.low_rank_resists(replace(some, trained=unprobed)).verdict == "inconclusive"


def test_a_log_that_was_cut_off_is_named_and_its_epochs_are_not_taken_for_all():
    some = evidence(trained("high", em=0.2, epochs=30, num_epochs=60, evaluations={60: evaluation(recall=0.99)}))
    note = ledger.high_rate_overfits(some).note
    assert "EM stays below 0.9 over 30 epochs; seed 42's log ends at epoch 30 of 60" in note


def test_the_rates_behind_a_verdict_are_named_and_the_cards_own_beside_them():
    own = trained("literal-1e-06", em=0.25)
    found = ledger.high_rate_overfits(replace(high(recall=0.99), trained=[*high(recall=0.99).trained, own]))
    assert found.note.startswith("at 0.0001, epoch 100; ")
    assert "the card's own 1e-06: EM 0.26 at first, 0.26 in epoch 29" in found.note


def test_the_worst_format_needs_room_below_it():
    """A base whose worst format passes nothing cannot be fallen short of."""
    nothing = ledger.performs_across_formats(low(passed=0.9, base=evaluation(worst=0.0)))
    assert nothing.verdict == "inconclusive" and "a control failed: the base's worst format" in nothing.note


def test_a_base_that_answered_nothing_leaves_open_what_it_is_the_control_of_and_no_nan():
    rows = judge(low(base={**evaluation(), "answers": []}))
    json.dumps([row.row() for row in rows], allow_nan=False)
    assert "what gives a number" in next(row.note for row in rows if row.id == "C11")

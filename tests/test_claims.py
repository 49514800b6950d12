"""Each claim is driven through its outcomes by evidence made for it; nothing here is measured."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import command

from mini_symposium import InputError, claims
from mini_symposium.claims import CLAIMS, ledger
from mini_symposium.evidence import FILE, Evidence, Trained, load
from mini_symposium.redraw import redraw
from mini_symposium.run_directory import RunDirectory

FORMATS = ("new-query", "alpaca", "character")
CATEGORIES = ("fact", "code", "character", "false-premise", "explanation", "trade-off")


def evaluation(recall=0.0, passed=0.5, twins=0.1, worst=None, several=0.0, role=None, phrases=0.0, named=None):
    """What a model would have measured, whose rates are these."""

    def rate(form, category):
        if named is not None and category == "character" and form in ("character", "alpaca"):
            return named if form == "character" else 1 - named
        return worst if worst is not None and form == "alpaca" else passed

    answers = [
        {
            "id": f"{category}-{k}",
            "category": category,
            "format": form,
            "passed": k < rate(form, category) * 20,
            "phrases": ["As an AI"] * (k < phrases * 20),
            "han": 0.0,
        }
        for category in CATEGORIES
        for k in range(20)
        for form in FORMATS
    ]
    wanted = passed if role is None else role
    return {
        "answers": answers,
        "roles": [{"id": f"code-{k}", "passed": k < wanted * 20} for k in range(20)],
        "perspectives": [
            {"headings": ["A", "B"] if k < several * 20 else ["A"], "distance": 0.7 if k < several * 20 else None}
            for k in range(20)
        ],
        "recitation": [{"prompt_recall": recall} for _ in range(13)],
        "twins": [{"prompt_recall": twins} for _ in range(13)],
    }


def trained(name, em=0.5, epochs=30, seed=42, evaluations=None, **more):
    rate = {"low": 1e-5}.get(name, 1e-4)
    table = [[min(1.0, em + 0.001 * k) for k in range(13)] for _ in range(epochs)]
    settings = {"lora_r": 16, "lora_alpha": 32, "lr_scheduler": "constant", "num_epochs": epochs, "loss": table} | more
    return Trained(name, seed, rate, em=table, evaluations=evaluations or {}, **settings)


def evidence(*some, base=None, **facts):
    base = evaluation() if base is None else base
    return Evidence("proxy", "cpu", base, list(some), {"tokens": 2414, "sequence_len": 1024} | facts)


def contrast(low, high):
    return evidence(trained("low", evaluations={600: low}), trained("high", evaluations={100: high}))


def ranks(more, less, seeds=(42, 43, 44)):
    names = {"rank-64-alpha-128": more, "rank-4-alpha-8": less}
    return evidence(*(trained(name, em, seed=seed) for name, em in names.items() for seed in seeds))


def schedules(other, constant, seeds=(42, 43, 44)):
    names = [f"{rule}-{what}" for rule in ("cosine", "linear") for what in ("peak", "dose")]
    some = [trained(name, other, seed=seed) for name in names for seed in seeds]
    return evidence(*some, *(trained("high", constant, seed=seed) for seed in seeds))


def low(base=None, **rates):
    return evidence(trained("low", evaluations={600: evaluation(**rates)}), base=base)


def high(epoch=100, **rates):
    return evidence(trained("high", evaluations={epoch: evaluation(**rates)}))


GPU = {"gpu": "a GPU", "gpu_hours": 2.0}
OUTCOMES = {
    "C1": (high(recall=0.99), high(recall=0.2), high(epoch=30, recall=0.2)),
    "C2": (low(recall=0.2), low(recall=0.9), evidence(trained("low", evaluations={60: evaluation(recall=0.2)}))),
    "C3": (contrast(evaluation(passed=0.8), evaluation(passed=0.3)), contrast(evaluation(), evaluation()), high()),
    "C4": (low(passed=0.9), low(worst=0.05), low(base=evaluation(passed=0.0))),
    "C5": (low(several=0.8), low(several=0.0, base=evaluation(several=0.5)), low(several=0.2)),
    "C6": (ranks(0.9, 0.3), ranks(0.3, 0.9), ranks(0.9, 0.3, seeds=())),
    "C7": (schedules(0.9, 0.3), schedules(0.3, 0.9), schedules(0.9, 0.3, seeds=())),
    "C8": (low(role=1.0), low(role=0.0), low(base={})),
    "C9": (low(named=1.0), low(named=0.0), low()),
    "C10": (evidence(gpu_peak_bytes=6 * 2**30, **GPU), evidence(gpu_peak_bytes=20 * 2**30, **GPU), None),
    "C11": (low(), low(phrases=0.5), low(phrases=0.05)),
    "C12": (evidence(sequence_len=2048), evidence(sequence_len=256), evidence(tokens=0)),
}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_each_claim_can_be_supported_refuted_and_left_open(claim):
    key = next(name for name in OUTCOMES if getattr(claims, name).id == claim(evidence()).id)
    supported, refuted, open_ = OUTCOMES[key]
    assert claim(supported).verdict == "supported", claim(supported)
    assert claim(refuted).verdict == "not supported", claim(refuted)
    if open_ is not None:
        assert claim(open_).verdict == "inconclusive", claim(open_)


def test_what_needs_a_gpu_is_out_of_reach_without_one():
    found = claims.fits(evidence(paper_bytes=6 * 2**30))
    assert found.verdict == "out of reach on this hardware"
    assert found.value == pytest.approx(6) and "predicted" in found.note


def test_nothing_measured_leaves_every_claim_open_and_says_what_is_missing():
    for row in ledger(Evidence("proxy", "cpu", {}, [])):
        assert row.verdict in ("inconclusive", "out of reach on this hardware")
        assert row.note


@pytest.mark.parametrize("broken", [{"twins": 0.9}, {"base": evaluation(recall=0.9)}])
def test_a_control_that_fails_takes_the_verdict_away(broken):
    """A model that recites what it never saw, or a base that recites, shows nothing about training."""
    base = broken.pop("base", None)
    found = claims.overfits(evidence(trained("high", evaluations={100: evaluation(recall=0.99, **broken)}), base=base))
    assert found.verdict == "inconclusive"
    assert "a control failed" in found.note


def test_the_dose_control_is_beside_the_low_rate():
    control = trained("high", evaluations={60: evaluation(recall=0.9), 100: evaluation(recall=1.0)})
    found = claims.spares(evidence(trained("low", evaluations={600: evaluation(recall=0.9)}), control))
    assert found.verdict == "not supported"
    assert "the high rate at the same dose: 0.90, low less high +0.00" in found.note
    assert "dose control is missing" in claims.spares(low(recall=0.2)).note


def test_a_seed_that_ends_earlier_counts_against_the_low_rate_but_not_for_it():
    def two(recall, early):
        some = {42: {600: evaluation(recall=recall, passed=0.9)}, 43: {240: evaluation(recall=early, passed=0.1)}}
        return evidence(*(trained("low", seed=seed, evaluations=each) for seed, each in some.items()))

    refuted = claims.spares(two(0.9, 0.9))
    assert (refuted.verdict, refuted.seeds) == ("not supported", 2) and "at epoch 240, 600;" in refuted.note
    assert "epochs 241 to 600 of the low rate" in claims.spares(two(0.2, 0.2)).note
    assert claims.spares(two(0.2, 0.2)).verdict == "inconclusive"
    across = claims.performs_across_formats(two(0.9, 0.9))  # of a model that is not done it says nothing
    assert (across.seeds, across.verdict) == (1, "supported")


def test_step_size_is_kept_apart_from_rank():
    em = {"rank-64-alpha-128": 0.9, "rank-4-alpha-8": 0.3, "rank-64-alpha-32": 0.5, "rank-4-alpha-32": 0.5}
    some = [trained(name, value, seed=seed) for seed in (1, 2, 3) for name, value in em.items()]
    found = claims.rank_resists(evidence(*some))
    assert found.value == pytest.approx(0.6)
    assert "an equal step size: +0.00" in found.note


def test_evidence_comes_back_from_its_file_and_gives_the_same_ledger(tmp_path):
    whole = contrast(evaluation(recall=0.2, several=0.3), evaluation(recall=0.99))
    whole.base["answers"][0]["answer"] = "a text, which the ledger does not read"
    whole.save(tmp_path)
    assert whole.base["answers"][0].pop("answer")
    again = load(tmp_path)
    assert again == whole
    assert ledger(again) == ledger(whole)
    said = command("claims", tmp_path).stdout
    assert "near-verbatim" in said
    rows = json.loads((tmp_path / "claims.json").read_text())
    assert [row["id"] for row in rows] == [f"C{k}" for k in range(1, 13)]
    assert {"claim", "metric", "value", "interval", "n", "scale", "controls", "verdict"} <= rows[0].keys()
    assert rows == json.loads(json.dumps([row.row() for row in ledger(whole)]))
    command("claims", tmp_path, "--save", tmp_path / "kept")
    assert load(tmp_path / "kept") == whole
    assert json.loads((tmp_path / "kept" / "claims.json").read_text()) == rows


def test_saved_evidence_draws_its_ledger_and_the_contrasts_curves_the_same_each_time(tmp_path):
    told = [[None] * 12 + [epoch > 15] for epoch in range(30)]
    some = [trained("low", evaluations={600: evaluation()}), trained("high", extractable_32=told)]
    evidence(*some, trained("rank-4-alpha-8"), trained("cosine-peak")).save(tmp_path)
    written = redraw(RunDirectory(tmp_path))
    assert [path.name for path in written] == ["ledger.png", "memorization.png"]
    curves = pd.read_csv(tmp_path / "memorization.csv")
    assert set(curves["name"]) == {"low", "high"}
    high = curves[curves["name"] == "high"].set_index("epoch")["extractable_32"]
    assert (high[15], high[16]) == (0, 1)  # of the rows that are long enough
    before = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in redraw(RunDirectory(tmp_path))] == before


def test_a_folder_without_evidence_and_a_damaged_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="neither a run, nor a sweep"):
        load(tmp_path)
    (tmp_path / FILE).write_text('{"scale": "proxy", "trained": [{"name": 3}]}')
    with pytest.raises(InputError, match=r"evidence\.json: not what the ledger reads"):
        load(tmp_path)


def test_a_kind_of_prompt_that_was_not_asked_leaves_its_claim_open():
    some = evaluation()
    some["answers"] = [line for line in some["answers"] if line["category"] == "fact"]
    some["roles"] = []
    verdicts = {row.id: row for row in ledger(contrast(some, some))}
    assert verdicts["C3"].value == 0 and "premises" not in verdicts["C3"].note
    assert all(verdicts[key].note.startswith("missing: ") for key in ("C8", "C9"))


def test_averages_are_over_epochs_rows_and_seeds():
    found = claims._by_row(claims._curves(ranks(0.9, 0.3), "rank-64-alpha-128"))
    assert found.shape == (13, 3)
    assert found[0].tolist() == pytest.approx([0.9] * 3)
    assert np.ptp(found[:, 0]) > 0

"""Each claim is driven through its outcomes by evidence made for it; nothing here is measured."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import command

from mini_symposium.claims import ledger, metrics
from mini_symposium.claims.evidence import FILE, Evidence, load_evidence
from mini_symposium.claims.ledger import CLAIMS, judge
from mini_symposium.errors import InputError
from mini_symposium.figures.redraw import redraw
from mini_symposium.recipe import load_recipe
from mini_symposium.run import RunDirectory, Training

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
            {"headings": ["A", "B", "Complete Response"], "distance": 0.7}
            if k < several * 20
            else {"headings": ["A"], "distance": None}
            for k in range(20)
        ],
        "recitation": [{"prompt_recall": recall} for _ in range(13)],
        "twins": [{"prompt_recall": twins} for _ in range(13)],
    }


def trained(name, em=0.5, epochs=30, seed=42, evaluations=None, **more):
    rate = {"low": 1e-5, "literal-1e-06": 1e-6}.get(name, 1e-4)
    table = [[min(1.0, em + 0.001 * k) for k in range(13)] for _ in range(epochs)]
    settings = {"lora_r": 16, "lora_alpha": 32, "lr_scheduler": "constant", "num_epochs": epochs, "loss": table}
    settings |= {"twins": {10: {"em": 0.3, "loss": 3.0}}} | more
    return Training(name, seed, rate, em=table, evaluations=evaluations or {}, **settings)


def evidence(*some, base=None, **facts):
    base = evaluation() if base is None else base
    return Evidence("proxy", "cpu", base, list(some), {"tokens": 2414, "sequence_len": 1024} | facts)


def contrast(low, high):
    return evidence(trained("low", evaluations={600: low}), trained("high", evaluations={60: high, 100: high}))


def ranks(more, less, seeds=(42, 43, 44)):
    names = {"rank-64-alpha-128": more, "rank-4-alpha-8": less}
    return evidence(*(trained(name, em, seed=seed) for name, em in names.items() for seed in seeds))


def schedules(other, constant, seeds=(42, 43, 44), peak=None):
    ems = {"dose": other, "peak": other if peak is None else peak}
    names = {f"{rule}-{what}": em for rule in ("cosine", "linear") for what, em in ems.items()}
    some = [trained(name, em, seed=seed) for name, em in names.items() for seed in seeds]
    return evidence(*some, *(trained("high", constant, seed=seed) for seed in seeds))


def low(base=None, **rates):
    return evidence(trained("low", evaluations={600: evaluation(**rates)}), base=base)


def high(epoch=100, **rates):
    return evidence(trained("high", evaluations={epoch: evaluation(**rates)}))


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
        evidence(gpu_peak_bytes=6 * 2**30, gpu="a GPU"),
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
    found = ledger.fits(evidence(paper_bytes=6 * 2**30))
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
    found = ledger.overfits(evidence(trained("high", evaluations={100: evaluation(recall=0.99, **broken)}), base=base))
    assert found.verdict == "inconclusive"
    assert "a control failed" in found.note


def test_the_dose_control_is_beside_the_low_rate():
    control = trained("high", evaluations={60: evaluation(recall=0.9), 100: evaluation(recall=1.0)})
    found = ledger.spares(evidence(trained("low", evaluations={600: evaluation(recall=0.9)}), control))
    assert found.verdict == "not supported"
    assert "the high rate at the same dose: 0.90, low less high +0.00" in found.note
    alone = ledger.spares(low(recall=0.2))
    assert alone.verdict == "inconclusive" and "a control failed: seeds whose high rate was asked" in alone.note


def test_a_seed_that_ends_earlier_counts_against_the_low_rate_but_not_for_it():
    def two(recall, early):
        some = {42: {600: evaluation(recall=recall, passed=0.9)}, 43: {240: evaluation(recall=early, passed=0.1)}}
        control = trained("high", evaluations={60: evaluation(recall=0.9)})
        return evidence(*(trained("low", seed=seed, evaluations=each) for seed, each in some.items()), control)

    refuted = ledger.spares(two(0.9, 0.9))
    assert (refuted.verdict, refuted.seeds) == ("not supported", 2) and "at 1e-05, epoch 240, 600;" in refuted.note
    assert "epochs 241 to 600 of the low rate" in ledger.spares(two(0.2, 0.2)).note
    assert ledger.spares(two(0.2, 0.2)).verdict == "inconclusive"
    across = ledger.performs_across_formats(two(0.9, 0.9))  # of a model that is not done it says nothing
    assert (across.seeds, across.verdict) == (1, "supported")


def test_step_size_is_kept_apart_from_rank():
    em = {"rank-64-alpha-128": 0.9, "rank-4-alpha-8": 0.3, "rank-64-alpha-32": 0.5, "rank-4-alpha-32": 0.5}
    some = [trained(name, value, seed=seed) for seed in (1, 2, 3) for name, value in em.items()]
    found = ledger.rank_resists(evidence(*some))
    assert found.value == pytest.approx(0.6)
    assert "an equal step size: +0.00" in found.note


def test_evidence_comes_back_from_its_file_and_gives_the_same_ledger(tmp_path):
    whole = contrast(evaluation(recall=0.2, several=0.3), evaluation(recall=0.99))
    whole.base["answers"][0]["answer"] = "a text, which the ledger does not read"
    whole.save(tmp_path)
    assert whole.base["answers"][0].pop("answer")
    again = load_evidence(tmp_path)
    assert again == whole
    assert judge(again) == judge(whole)
    said = command("claims", tmp_path).stdout
    assert "near-verbatim" in said
    rows = json.loads((tmp_path / "claims.json").read_text())
    assert [row["id"] for row in rows] == [f"C{k}" for k in range(1, 13)]
    assert {"claim", "metric", "value", "interval", "n", "scale", "controls", "verdict"} <= rows[0].keys()
    assert rows == json.loads(json.dumps([row.row() for row in judge(whole)]))
    command("claims", tmp_path, "--save", tmp_path / "kept")
    assert load_evidence(tmp_path / "kept") == whole
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
        load_evidence(tmp_path)
    (tmp_path / FILE).write_text('{"scale": "proxy", "trained": [{"name": 3}]}')
    with pytest.raises(InputError, match=r"evidence\.json: not what the ledger reads"):
        load_evidence(tmp_path)


def test_a_kind_of_prompt_that_was_not_asked_leaves_its_claim_open():
    some = evaluation()
    some["answers"] = [line for line in some["answers"] if line["category"] == "fact"]
    some["roles"] = []
    verdicts = {row.id: row for row in judge(contrast(some, some))}
    assert verdicts["C3"].value == 0 and "premises" not in verdicts["C3"].note
    assert all(verdicts[key].note.startswith("missing: ") for key in ("C8", "C9"))


def test_averages_are_over_epochs_rows_and_seeds():
    found = metrics.by_row(*metrics.alike(ranks(0.9, 0.3), "rank-64-alpha-128"))
    assert found.shape == (13, 3)
    assert found[0].tolist() == pytest.approx([0.9] * 3)
    assert np.ptp(found[:, 0]) > 0


def without(e, name, seed):
    return replace(e, trained=[t for t in e.trained if (t.name, t.seed) != (name, seed)])


def test_seeds_are_paired_and_a_missing_one_is_named():
    """Two of three are left on either side, and only one of them is on both."""
    lacking = without(without(ranks(0.9, 0.3), "rank-64-alpha-128", 42), "rank-4-alpha-8", 44)
    found = ledger.rank_resists(lacking)
    assert found.seeds == 1
    assert "missing: rank-64-alpha-128 of seed 42; missing: rank-4-alpha-8 of seed 44" in found.note
    assert ledger.constant_resists(without(schedules(0.9, 0.3), "linear-dose", 43)).seeds == 2
    high = evidence(*(trained("high", seed=seed, evaluations={100: evaluation(recall=1.0)}) for seed in (1, 2)))
    assert "missing" not in ledger.overfits(high).note
    more = replace(high, trained=[*high.trained, trained("cosine-peak", seed=3)])
    assert "missing: high of seed 3" in ledger.overfits(more).note


def test_a_base_that_was_not_asked_leaves_recitation_open():
    for claim, some in ((ledger.overfits, high(recall=0.99)), (ledger.spares, dosed(0.9))):
        assert claim(some).verdict in ("supported", "not supported")
        unasked = claim(replace(some, base={}))
        assert unasked.verdict == "inconclusive" and "the base was asked as well" in unasked.note


def test_rows_that_were_not_trained_on_must_not_tell_the_arms_apart():
    some = ranks(0.9, 0.3)
    skilled = [
        replace(t, twins={10: {"em": 0.5, "loss": 1.0}}) if t.name.startswith("rank-64") else t for t in some.trained
    ]
    assert "a control failed: EM of held-out twins" in ledger.rank_resists(replace(some, trained=skilled)).note
    unprobed = [replace(t, twins={}) for t in some.trained]
    assert ledger.rank_resists(replace(some, trained=unprobed)).verdict == "inconclusive"


def test_a_log_that_was_cut_off_is_named_and_its_epochs_are_not_taken_for_all():
    some = evidence(trained("high", em=0.2, epochs=30, num_epochs=60, evaluations={60: evaluation(recall=0.99)}))
    note = ledger.overfits(some).note
    assert "EM stays below 0.9 over 30 epochs; seed 42's log ends at epoch 30 of 60" in note


def test_the_rates_behind_a_verdict_are_named_and_the_cards_own_beside_them():
    own = trained("literal-1e-06", em=0.25)
    found = ledger.overfits(replace(high(recall=0.99), trained=[*high(recall=0.99).trained, own]))
    assert found.note.startswith("at 0.0001, epoch 100; ")
    assert "the card's own 1e-06: EM 0.26 at first, 0.26 in epoch 29" in found.note


def test_the_worst_format_needs_room_below_it():
    """A base whose worst format passes nothing cannot be fallen short of."""
    nothing = ledger.performs_across_formats(low(passed=0.9, base=evaluation(worst=0.0)))
    assert nothing.verdict == "inconclusive" and "a control failed: the base's worst format" in nothing.note


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


def test_one_rate_alone_is_not_taken_for_an_end_of_the_contrast(tmp_path):
    """The proxy's recipe has 1e-5 and 1e-4."""
    for rate, name in ((1e-5, "low"), (1e-4, "high"), (1e-3, "rate-0.001")):
        run = RunDirectory(tmp_path / name)
        lines(run, rate)
        assert [each.name for each in load_evidence(run.path).trained] == [name]


def lines(run, rate=1e-4, seed=42, base="SmolLM2-135M-Instruct", data="a"):
    """A run directory with two epochs of a log."""
    folder = run.learning_rate_dir(rate)
    folder.mkdir(parents=True)
    recipe = load_recipe("proxy", seed=seed, base_model=base)
    run.recipe_file.write_text(recipe.to_yaml())
    run.environment_file.write_text(json.dumps({"device": "cpu", "dataset_sha256": data}))
    rows = [{"example": k % 2, "epoch": k // 2, "em": 0.5, "loss": 1.0, "tokens": 9} for k in range(4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"base": "tiny"}, "base_model tiny, but .*high-seed-42 has SmolLM2"),
        ({"data": "b"}, "dataset_sha256 b, but .*high-seed-42 has a"),
        ({"seed": 44}, "seed 44, where the folder says 43"),
    ],
)
def test_runs_that_do_not_belong_together_make_no_ledger(other, said, tmp_path):
    lines(RunDirectory(tmp_path / "high-seed-42"))
    lines(RunDirectory(tmp_path / "high-seed-43"), **{"seed": 43} | other)
    with pytest.raises(InputError, match=said):
        load_evidence(tmp_path)


DAMAGED = {
    "lr-1e-04/metrics.jsonl": ['{"text": "of another tool"}\n', '{"example": 0, "tokens": 3, "em": "all"}\n', "[1]\n"],
    "lr-1e-04/probes.jsonl": ['{"text": "of another tool"}\n', '{"epoch": 1, "em": null, "loss": 1}\n'],
    "lr-1e-04/evaluations/epoch-0060.json": ["{}", "[]", '{"answers": 3}', json.dumps(evaluation() | {"twins": [{}]})],
    "base.json": ["[]", '{"exact_match": 0.5}', json.dumps(evaluation() | {"roles": [{"id": "x", "passed": "yes"}]})],
    "environment.json": ["{}", "[]"],
    FILE: ["{}", "[]", json.dumps({"scale": "proxy", "device": "cpu", "base": {"a": 1}, "trained": []})],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in DAMAGED.items() for text in texts])
def test_what_another_tool_wrote_is_refused_by_name(name, text, tmp_path):
    lines(RunDirectory(tmp_path))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    done = command("claims", tmp_path, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert Path(name).name in done.stderr.replace("\n", "")
    assert not (tmp_path / "claims.json").exists()


def test_a_file_of_another_name_among_the_evaluations_is_none(tmp_path):
    (lines(RunDirectory(tmp_path)) / "evaluations").mkdir()
    (tmp_path / "lr-1e-04" / "evaluations" / "epoch-last.json").write_text("{}")
    assert load_evidence(tmp_path).trained[0].evaluations == {}


def test_the_answers_are_summed_up_by_model_and_what_was_not_measured_is_left_out():
    told = evaluation(passed=0.5, worst=0.1) | {"posix": {"a": 1.0, "b": 2.0}, "han_mass": {"a": 0.1, "b": 0.1}}
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


def test_a_base_that_answered_nothing_leaves_open_what_it_is_the_control_of_and_no_nan():
    rows = judge(low(base={**evaluation(), "answers": []}))
    json.dumps([row.row() for row in rows], allow_nan=False)
    assert "what gives a number" in next(row.note for row in rows if row.id == "C11")

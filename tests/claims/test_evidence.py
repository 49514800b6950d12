"""Evidence is read from runs, sweeps and its own file, and a file of another kind is refused by name."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import command
from made_evidence import contrast, curves, evaluation

from mini_symposium.claims.evidence import FILE, load_evidence
from mini_symposium.claims.ledger import judge, save
from mini_symposium.claims.registration import REGISTERED
from mini_symposium.errors import InputError
from mini_symposium.recipe import load_recipe
from mini_symposium.run import RunDirectory


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
    assert [row["id"] for row in rows] == [f"C{k}" for k in range(13)]
    assert {"claim", "metric", "value", "interval", "n", "scale", "controls", "verdict"} <= rows[0].keys()
    written = [(row["verdict"], row["value"] and pytest.approx(row["value"])) for row in rows]
    assert [(row.verdict, row.value) for row in judge(whole)] == written
    command("claims", tmp_path, "--save", tmp_path / "kept")
    assert load_evidence(tmp_path / "kept") == whole
    assert json.loads((tmp_path / "kept" / "claims.json").read_text()) == rows


def test_the_numbers_of_a_ledger_have_the_digits_that_every_machine_agrees_on(tmp_path):
    claims = judge(contrast(evaluation(), evaluation()))
    first, second = (
        save([replace(claim, value=claim.value and claim.value * (1 + error)) for claim in claims], tmp_path / name)
        for name, error in (("a", 0.0), ("b", 1e-15))
    )
    assert first.read_bytes() == second.read_bytes()


def test_parts_of_one_sweep_are_judged_together(tmp_path):
    whole = contrast(evaluation(recall=0.2), evaluation(recall=0.99))
    whole = replace(whole, curves=curves(3.0, 3.1), registration=REGISTERED.sha256)
    first = replace(whole, base={}, trained=whole.trained[:2], curves=whole.curves[2:])
    second = replace(whole, trained=whole.trained[2:], curves=whole.curves[:2])
    again = replace(whole, trained=[replace(whole.trained[0], em=[[0.0] * 13])])
    for name, part in {"first": first, "second": second, "again": again}.items():
        part.save(tmp_path / name)
    found = load_evidence(tmp_path / "first", tmp_path / "second", tmp_path / "again")
    assert found.base == whole.base and found.facts == whole.facts
    assert sorted(found.trained, key=repr) == sorted(whole.trained, key=repr)
    assert sorted(found.curves, key=repr) == sorted(whole.curves, key=repr)
    said = command("claims", *(tmp_path / name for name in ("first", "second")), "--save", tmp_path / "both").stdout
    assert "gathered and judged under" in said and judge(load_evidence(tmp_path / "both")) == judge(whole)


def test_a_base_that_was_only_asked_for_its_rows_still_counts_beside_one_that_was_not_measured(tmp_path):
    recited = {**evaluation(recall=0.1), "answers": []}
    for name, base in {"nothing": {}, "rows": recited}.items():
        replace(contrast(evaluation(), evaluation()), base=base).save(tmp_path / name)
    assert load_evidence(tmp_path / "nothing", tmp_path / "rows").base == recited


def test_a_damaged_part_is_refused(tmp_path):
    for name in ("first", "second"):
        replace(contrast(evaluation(), evaluation()), curves=[None] * (name == "second")).save(tmp_path / name)
    with pytest.raises(InputError, match="second: parts that cannot be joined"):
        load_evidence(tmp_path / "first", tmp_path / "second")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"registration": "0" * 64}, f"registration {'0' * 64}, but"),
        ({"facts": {"base_model": "tiny"}}, "base_model tiny, but"),
        ({"scale": "base"}, "scale base, but .*first has proxy"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(other, said, tmp_path):
    whole = contrast(evaluation(), evaluation())
    whole.save(tmp_path / "first")
    replace(whole, **other).save(tmp_path / "second")
    done = command("claims", tmp_path / "first", tmp_path / "second", check=False)
    assert done.returncode == 2 and re.search(said, done.stderr)


def test_a_folder_without_evidence_and_a_damaged_file_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"not a folder with evidence\.json, a run directory"):
        load_evidence(tmp_path)
    (tmp_path / FILE).write_text('{"scale": "proxy", "trained": [{"name": 3}]}')
    with pytest.raises(InputError, match=r"evidence\.json: not what the ledger reads"):
        load_evidence(tmp_path)


def log(run, rate=1e-4, seed=42, base="SmolLM2-135M-Instruct", data="a", under=None):
    """A run directory with two epochs of a log."""
    folder = run.learning_rate_dir(rate)
    folder.mkdir(parents=True)
    recipe = load_recipe("proxy", seed=seed, base_model=base)
    run.recipe_file.write_text(recipe.to_yaml())
    begun = {"device": "cpu", "dataset_sha256": data, "registration": under}
    run.environment_file.write_text(json.dumps(begun))
    rows = [{"example": k % 2, "epoch": k // 2, "em": 0.5, "loss": 1.0, "tokens": 9} for k in range(4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_one_rate_alone_is_not_taken_for_an_end_of_the_contrast(tmp_path):
    """The proxy's recipe has 1e-5 and 1e-4."""
    for rate, name in ((1e-5, "low"), (1e-4, "high"), (1e-3, "rate-0.001")):
        run = RunDirectory(tmp_path / name)
        log(run, rate)
        assert [each.name for each in load_evidence(run.path).trained] == [name]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"base": "tiny"}, "base_model tiny, but .*high-seed-42 has SmolLM2"),
        ({"data": "b"}, "dataset_sha256 b, but .*high-seed-42 has a"),
        ({"seed": 42}, "seed 42, but the folder says 43"),  # a copied folder is no other seed
    ],
)
def test_runs_that_do_not_belong_together_make_no_ledger(other, said, tmp_path):
    log(RunDirectory(tmp_path / "high-seed-42"))
    log(RunDirectory(tmp_path / "high-seed-43"), **{"seed": 43, **other})
    with pytest.raises(InputError, match=said):
        load_evidence(tmp_path)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [("x", "x", "x"), ("x", "y", ""), ("x", None, ""), (None, None, "")],
)
def test_runs_tell_the_registration_that_all_of_them_began_under(first, second, said, tmp_path):
    for seed, under in ((42, first), (43, second)):
        log(RunDirectory(tmp_path / f"high-seed-{seed}"), seed=seed, under=under, data=REGISTERED.rows)
    assert load_evidence(tmp_path).registration == said


def test_a_run_of_other_rows_than_the_registered_ones_is_under_none(tmp_path):
    log(RunDirectory(tmp_path / "high-seed-42"), under=REGISTERED.sha256)
    assert load_evidence(tmp_path).registration == ""


def test_held_out_curves_and_each_twins_loss_come_with_their_seed(tmp_path):
    run = RunDirectory(tmp_path)
    folder = log(run)
    probes = [{"epoch": 0, "example": k, "loss": 3.0 + k, "em": 0.1} for k in (1, 0)]
    (folder / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in probes))
    run.curve_file.write_text(json.dumps({"curves": [{k: v for k, v in c.items() if k != "seed"} for c in CURVES]}))
    found = load_evidence(run.path)
    assert found.trained[0].twins == {0: {"loss": 3.5, "em": 0.1, "rows": [3.0, 4.0]}}
    assert [each["learning_rate"] for each in found.curves] == [1e-4, 1e-5]
    assert {each["seed"] for each in found.curves} == {42}
    found.save(tmp_path / "kept")
    assert load_evidence(tmp_path / "kept") == found


CURVES = curves(3.5, 3.6, (42,))[::-1]
DAMAGED = {
    "lr-1e-04/metrics.jsonl": ['{"text": "of another tool"}\n', '{"example": 0, "tokens": 3, "em": "all"}\n', "[1]\n"],
    "lr-1e-04/probes.jsonl": ['{"text": "of another tool"}\n', '{"epoch": 1, "em": null, "loss": 1}\n'],
    "lr-1e-04/evaluations/epoch-0060.json": ["{}", "[]", '{"answers": 3}', json.dumps(evaluation() | {"twins": [{}]})],
    "base.json": ["[]", '{"exact_match": 0.5}', json.dumps(evaluation() | {"roles": [{"id": "x", "passed": "yes"}]})],
    "environment.json": ["{}", "[]"],
    "curve.json": ["[]", '{"curves": [{"loss": 3}]}'],
    FILE: ["{}", "[]", json.dumps({"scale": "proxy", "device": "cpu", "base": {"a": 1}, "trained": []})],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in DAMAGED.items() for text in texts])
def test_what_another_tool_wrote_is_refused_by_name(name, text, tmp_path):
    log(RunDirectory(tmp_path))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=re.escape(Path(name).name)):
        load_evidence(tmp_path)


def test_a_path_in_saved_evidence_is_refused(tmp_path):
    contrast(evaluation(), evaluation()).save(tmp_path)
    saved = json.loads((tmp_path / FILE).read_text())
    saved["trained"][0]["run"] = "/etc"
    (tmp_path / FILE).write_text(json.dumps(saved))
    with pytest.raises(InputError, match="a training with a recipe or a path"):
        load_evidence(tmp_path)


def test_a_file_of_another_name_among_the_evaluations_is_none(tmp_path):
    (log(RunDirectory(tmp_path)) / "evaluations").mkdir()
    (tmp_path / "lr-1e-04" / "evaluations" / "epoch-last.json").write_text("{}")
    assert load_evidence(tmp_path).trained[0].evaluations == {}

"""The registration holds what the ledger asks, and is what runs record and evidence is judged by."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from made_evidence import contrast, evaluation, high, world

from mini_symposium.claims import ledger
from mini_symposium.claims.evidence import load_evidence
from mini_symposium.claims.ledger import judge
from mini_symposium.claims.registration import REGISTERED, load_registration
from mini_symposium.data.dataset import fingerprint, load_examples
from mini_symposium.errors import InputError
from mini_symposium.evaluation.intervals import p_value
from mini_symposium.run import REGISTRATION, ROOT, environment, sha256_of_text


def test_the_registered_rows_and_prompts_are_those_that_are_there():
    """Whoever changes them registers them anew, before measuring."""
    assert {name: sha256_of_text(ROOT / name) for name in REGISTERED.files} == REGISTERED.files
    assert fingerprint(load_examples(ROOT / "data/minisymposium.jsonl")) == REGISTERED.rows


def test_each_question_is_measured_and_each_control_registered():
    assert list(ledger.CLAIMS) == list(REGISTERED.questions) == [f"C{k}" for k in range(13)]
    both = contrast(evaluation(), evaluation())
    for some in (both, world(np.random.default_rng(0), n=20)):
        for row in judge(some):
            assert {control.what for control in row.controls} <= set(REGISTERED.questions[row.id].controls), row.id


def test_each_question_can_be_decided_by_its_registered_prompts():
    """The best outcome that there can be is told from the threshold, after the strictest correction."""
    for question in REGISTERED.questions.values():
        for test in question.tests:
            if test.bounds:
                best = [test.bounds[test.above]] * question.n
                assert p_value(best, test.threshold, test.bounds) * REGISTERED.tests <= REGISTERED.level, question.id


def test_a_run_records_the_registration_that_it_begins_under():
    assert environment()["registration"] == REGISTERED.sha256 == sha256_of_text(REGISTRATION)


def test_line_ends_do_not_change_the_hash(tmp_path):
    (tmp_path / "a").write_bytes(b"a\nb\n")
    (tmp_path / "b").write_bytes(b"a\r\nb\r\n")
    assert sha256_of_text(tmp_path / "a") == sha256_of_text(tmp_path / "b")


@pytest.mark.parametrize("under", ["", "0" * 64])
def test_evidence_of_another_registration_or_of_none_is_exploratory_and_says_so(under, tmp_path):
    some = replace(contrast(evaluation(recall=0.2), evaluation(recall=0.99)), registration=under)
    some.save(tmp_path)
    rows = judge(load_evidence(tmp_path))
    assert {(row.registration, row.gathered_under, row.exploratory) for row in rows} == {
        (REGISTERED.sha256, under, True)
    }
    assert ledger.hashes(load_evidence(tmp_path)).startswith("every verdict is exploratory")
    supported = next(row for row in rows if row.id == "C1")
    assert (supported.verdict, supported.said) == ("supported", "supported (exploratory)")
    assert json.loads(json.dumps(supported.row()))["exploratory"] is True


def test_evidence_under_the_registration_is_not_exploratory_and_needs_its_prompts_and_seeds():
    whole = replace(high(recall=1.0), registration=REGISTERED.sha256)
    row = next(row for row in judge(whole) if row.id == "C1")
    assert (row.said, row.exploratory) == ("supported", False)
    assert ledger.hashes(whole) == f"gathered and judged under registration {REGISTERED.sha256}"
    fewer = next(row for row in judge(replace(whole, trained=whole.trained[:2])) if row.id == "C1")
    assert (fewer.verdict, fewer.needs) == ("inconclusive", "the registered n=13, seeds=3")


def test_committed_evidence_is_exploratory_unless_it_began_under_the_registration_that_is_there():
    for name in (path.parent.name for path in ROOT.glob("figures/claims/*/claims.json")):
        rows = json.loads((ROOT / f"figures/claims/{name}/claims.json").read_text(encoding="utf-8"))
        assert [row["exploratory"] for row in rows] == [name == "exploratory"] * 13
        assert {row["gathered_under"] for row in rows} == {"" if name == "exploratory" else REGISTERED.sha256}
        assert {row["registration"] for row in rows} == {REGISTERED.sha256}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("level: 0.05", "level: 0.05\nlevel: 0.1", r"registration\.yml:\d+"),
        ("level: 0.05", "", r"registration\.yml: not a registration .*'level'"),
        ("    claim: packing fails on so small a set\n", "", r"C12 is no question that can be judged .*'claim'"),
        ("below: 12", "under: 12", r"C10 is no question .*under: a limit is above or below"),
        ("    seeds: 3\n", "    seeds: 1\n", r"C0 is no question .*of 2 or more"),
    ],
)
def test_a_registration_that_cannot_be_judged_by_is_refused_by_name(old, new, said, tmp_path):
    text = REGISTRATION.read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "registration.yml").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match=said) as refused:
        load_registration(tmp_path / "registration.yml")
    assert re.search("registration", str(refused.value))

"""What a catalogue, or somebody who cites, reads about the kit and its evidence: both are true."""

import hashlib
import json
import re
import tomllib

import pytest
import yaml
from made_evidence import contrast, evaluation

from mini_symposium import __version__
from mini_symposium.claims.crate import CRATE, write_crate
from mini_symposium.claims.evidence import load_evidence
from mini_symposium.claims.registration import REGISTERED
from mini_symposium.errors import InputError
from mini_symposium.run import ROOT

SAVED = sorted(path.parent for path in (ROOT / "figures" / "claims").glob("*/evidence.json"))


def entities(folder) -> dict[str, dict]:
    return {part["@id"]: part for part in json.loads((folder / CRATE).read_text(encoding="utf-8"))["@graph"]}


def references(value):
    """All {"@id": ...} in a value."""
    if isinstance(value, dict) and set(value) == {"@id"}:
        yield value["@id"]
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from references(each)


@pytest.mark.parametrize("saved", SAVED, ids=lambda folder: folder.name)
def test_the_committed_crate_is_true_and_complete(saved):
    found = entities(saved)
    root = found["./"]
    files = {path.name for path in saved.iterdir()} - {CRATE}
    assert {part["@id"] for part in root["hasPart"]} == files, "run `make figures`"
    for name in files:
        content = (saved / name).read_bytes()
        assert found[name]["@type"] == "File" and found[name]["contentSize"] == str(len(content))
        assert found[name]["sha256"] == hashlib.sha256(content).hexdigest(), "run `make figures`"
    assert found[CRATE]["about"] == {"@id": "./"}
    assert found[CRATE]["conformsTo"]["@id"] == "https://w3id.org/ro/crate/1.1"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", root["datePublished"]) and root["name"] and root["description"]
    assert found["#registration"]["sha256"] == REGISTERED.sha256, "run `make figures`"
    base = load_evidence(saved).facts["base_model"]
    assert found["#model"]["name"] == base and found["#model"]["identifier"].endswith(f"/{base}")
    assert found["#kit"]["version"] == __version__
    assert set(references(list(found.values()))) <= {*found, "https://w3id.org/ro/crate/1.1"}


def test_a_crate_follows_its_evidence_and_keeps_its_date_while_that_is_the_same(tmp_path):
    with pytest.raises(InputError):
        write_crate(tmp_path)
    contrast(evaluation(), evaluation()).save(tmp_path)
    write_crate(tmp_path)
    crate = tmp_path / CRATE
    crate.write_text(re.sub(r'"datePublished": "[^"]+"', '"datePublished": "2001-02-03"', crate.read_text()))
    (tmp_path / "claims.json").write_text("[]")
    write_crate(tmp_path)
    assert entities(tmp_path)["./"]["datePublished"] == "2001-02-03"
    assert "claims.json" in entities(tmp_path)
    contrast(evaluation(), evaluation(recall=0.9)).save(tmp_path)
    write_crate(tmp_path)
    assert entities(tmp_path)["./"]["datePublished"] > "2026"
    crate.write_text('{"@graph": 3}')
    assert write_crate(tmp_path) == crate and entities(tmp_path)


CFF = {
    *("abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers", "keywords"),
    *("license", "license-url", "message", "preferred-citation", "references", "repository", "repository-artifact"),
    *("repository-code", "title", "type", "url", "version"),
}
"""The keys of the Citation File Format 1.2.0."""


def test_the_citation_has_what_the_format_asks_for_and_agrees_with_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"authors", "cff-version", "message", "title"} <= set(citation) <= CFF
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert [citation[key] for key in ("title", "abstract", "license")] == [
        project[key] for key in ("name", "description", "license")
    ]
    assert citation["version"] == __version__
    for each in (citation, *citation["references"]):
        assert all(set(author) <= {"name", "alias", "given-names", "family-names"} for author in each["authors"])
    assert all({"authors", "title", "type"} <= set(reference) for reference in citation["references"])

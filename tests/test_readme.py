"""README is short, its results are written by `make readme` from committed data, and its links lead somewhere."""

import re

import pytest
import readme

from mini_symposium.run import ROOT

PAGES = [ROOT / "README.md", *(ROOT / folder / "README.md" for folder in ("notebooks", "data", "data/accelerate"))]


def test_results_are_those_of_the_committed_data():
    text = readme.README.read_text(encoding="utf-8")
    assert readme.rendered(text) == text, "run `make readme`"
    changed = re.sub(r"\| \*\*inconclusive\*\* \|", "| **supported** |", text)
    assert changed != text and readme.rendered(changed) == text


def test_no_result_is_typed_by_hand():
    text = readme.README.read_text(encoding="utf-8")
    for name in readme.BLOCKS:
        text = re.sub(rf"<!-- {name} -->.*<!-- /{name} -->", "", text, flags=re.DOTALL)
    results = re.findall(r"\d+(?:\.\d+)?%|\b\d+\.\d\d+|\bnats\b", text.replace("95% intervals", ""))
    assert not [found for found in results if found != "3.11"], results


def test_it_is_read_in_minutes():
    lines = readme.README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 160
    assert sum(line.startswith("![") for line in lines[:20]) == 1  # the picture comes before everything else


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link

import csv
import json

import pytest
from html_page import Page

from mini_symposium.data.prompt_formats import load_preset, prompt_format
from mini_symposium.errors import InputError
from mini_symposium.playground import session


def test_a_session_is_kept_whole_under_a_name_that_is_free(tmp_path):
    cell = {"model": "base", "format": "### `x`", "query": "Why?", "answer": "```\n<img src=x>\n````", "row": "row 1"}
    cell |= {"tokens": 4, "stop_reason": "eos", "seconds": 0.5, "recited": 0.25}
    log = [{"max_new_tokens": 8, "sampling": "greedy", "cells": [cell]}]
    first, second = session.save(log, {"scale": "tiny"}, tmp_path), session.save(log, {"scale": "tiny"}, tmp_path)
    assert len({*first, *second}) == 8
    assert json.loads(first[0].read_text())["asked"] == log
    assert "`````text\n```\n<img src=x>\n````\n`````" in first[1].read_text()
    with pytest.raises(InputError, match="nothing was asked"):
        session.save([], {}, tmp_path)


def test_hostile_text_stays_text_in_every_file_and_votes_are_in_them(tmp_path):
    evil = "=HYPERLINK(1)\n<script>alert(1)</script>\n``` <img src=x onerror=alert(1)>"
    cell = {"model": evil, "format": evil, "query": evil, "answer": evil, "row": "", "recited": 0.0}
    cell |= {"tokens": 4, "stop_reason": "eos", "seconds": 0.5}
    sides = [{"model": evil, "format": "qa"}, {"model": "base", "format": "qa"}]
    votes = {"sides": sides, "wins": [1, 2], "no_difference": 0, "share": 2 / 3, "low": 0.09, "high": 0.99}
    votes |= {"decided": False, "votes_to_decide": 42}
    log = [{"max_new_tokens": 8, "sampling": {"seed": 1}, "cells": [cell]}]
    paths = {path.suffix: path for path in session.save(log, {"scale": evil}, tmp_path, [votes])}
    kept = json.loads(paths[".json"].read_text())
    assert kept["asked"] == log and kept["blind_tests"] == [votes]
    with paths[".csv"].open(newline="") as file:
        [row] = csv.DictReader(file)
    assert row["answer"] == row["model"] == f"'{evil}" and row["tokens"] == "4"
    html = paths[".html"].read_text()
    page = Page(html.partition("</h1>")[2].removesuffix("</html>\n"))
    assert not page.tags & {"script", "img"} and "default-src 'none'" in html
    assert page.rows[-1][4] == evil and "42 votes would" in page.text
    assert "42 votes would" in paths[".md"].read_text()


def test_presets_go_out_and_come_back_and_broken_ones_are_named_as_the_user_knows_them(tmp_path):
    form = prompt_format("### Software/../Engineer")
    path = session.export_preset(form, tmp_path)
    assert path.parent == tmp_path
    assert load_preset(path) == form
    back = session.read_preset("mine.json", path.read_bytes(), [form.name])
    assert back.name == f"{form.name} (2)"
    assert back.render("Why?") == form.render("Why?")
    assert session.read_preset("mine.json", b'{"input_sequence": "> "}').name == "mine"
    for content, said in (
        (b"{", "mine.json:1: not JSON"),
        (b"[]", "mine.json:1: not one JSON object"),
        (b"{}", "mine.json: nei"),
    ):
        with pytest.raises(InputError, match=said):
            session.read_preset("mine.json", content)
    with pytest.raises(InputError, match="at most"):
        session.read_preset("mine.json", b" " * 300_000)

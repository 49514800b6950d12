import json

import pytest

from mini_symposium.data.prompt_formats import load_preset, prompt_format
from mini_symposium.errors import InputError
from mini_symposium.playground import session


def test_a_session_is_kept_whole_under_a_name_that_is_free(tmp_path):
    cell = {"model": "base", "format": "### `x`", "query": "Why?", "answer": "```\n<img src=x>\n````", "row": "row 1"}
    cell |= {"tokens": 4, "stop_reason": "eos", "seconds": 0.5, "recited": 0.25}
    log = [{"max_new_tokens": 8, "sampling": "greedy", "cells": [cell]}]
    first, second = session.save(log, {"scale": "tiny"}, tmp_path), session.save(log, {"scale": "tiny"}, tmp_path)
    assert len({*first, *second}) == 4
    assert json.loads(first[0].read_text())["asked"] == log
    assert "`````text\n```\n<img src=x>\n````\n`````" in first[1].read_text()
    with pytest.raises(InputError, match="nothing was asked"):
        session.save([], {}, tmp_path)


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
        (b"[]", "mine.json:1: holds a list"),
        (b"{}", "mine.json: nei"),
    ):
        with pytest.raises(InputError, match=said):
            session.read_preset("mine.json", content)
    with pytest.raises(InputError, match="at most"):
        session.read_preset("mine.json", b" " * 300_000)

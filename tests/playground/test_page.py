"""The playground without a browser: its plain functions, and the page's own threads. See test_playground_browser."""

import json
import shutil
import threading
import time

import pytest
from html_page import Page
from reciting import FOREIGN, HOSTILE

from mini_symposium.data.prompt_formats import FORMATS, load_preset, prompt_format
from mini_symposium.errors import InputError
from mini_symposium.evaluation.answer_text import TrainingRows
from mini_symposium.models.merge import merge
from mini_symposium.playground import cards, session
from mini_symposium.playground.page import Playground, front_end, show, show_epochs
from mini_symposium.playground.shelf import Shelf
from mini_symposium.playground.workbench import Workbench
from mini_symposium.run import RunDirectory

ROW = "A snail sits at the bottom of a ten metre well and climbs three metres each day."
PICTURE, SKY = "Show me a picture.", "Why is the sky blue?"


@pytest.fixture(scope="module")
def bench(reciting_run) -> Workbench:
    return Workbench(str(reciting_run.path))


def ask(bench, query=PICTURE, formats=("new-query",), models=("base",), tokens=40, **more):
    return bench.ask(bench.cells(query, [prompt_format(name) for name in formats], models), tokens, **more)


# What is marked in an answer.


def test_eight_words_of_a_row_are_recited_and_seven_are_not():
    rows = TrainingRows({"row 4": ROW})
    read = rows.read("Well: a snail sits, A snail sits at the bottom of a hill.")
    assert [(m.kind, m.label) for m in read.marks] == [("recited", "row 4")]
    assert "Well: a snail sits, A snail sits at the bottom of a hill."[read.marks[0].start : read.marks[0].end] == (
        "A snail sits at the bottom of a"
    )
    assert read.recited == 8 / 16
    assert rows.read("A snail sits at the bottom of my hill.").recited == 0


def test_what_the_prompt_says_as_well_is_an_echo():
    rows = TrainingRows({"row 4": ROW})
    assert rows.read(ROW, f"### Query\n{ROW}\n").recited == 0
    assert rows.read(ROW, "### Query\nThe snail?\n").recited == 1


def test_another_script_and_headings_are_marked_unless_the_prompt_uses_it():
    rows = TrainingRows({})
    text = "The sky 天空，是蓝色的 is.\n### Chemist\nBlue. <|im_end|>"
    found = [(m.kind, m.label, text[m.start : m.end]) for m in rows.read(text, "Why? ###").marks]
    assert found == [
        ("script", "Han", "天空，是蓝色的"),
        ("heading", "heading", "### Chemist"),
        ("heading", "heading", "<|im_end|>"),
    ]
    assert rows.read(text, "Why is it 蓝色?").drift == 0
    assert rows.read(text, "Why? ###").drift == 6 / 30


def test_marks_show_without_colour_and_nothing_said_becomes_markup():
    evil = f"{HOSTILE} ### <b>Heading</b>"
    rows = TrainingRows({"row <i>1</i>": HOSTILE})
    cell = {"model": evil, "format": evil, "prompt": evil[:3], "answer": evil}
    for html in (
        cards.card(cell, rows, 1.0),
        cards.talk(evil, [{"role": "assistant", "content": evil}], {"assistant": evil}, rows),
        cards.status(evil, problem=True),
        cards.download(evil, "QUJD"),
    ):
        page = Page(html)
        assert not page.tags & {"img", "script"}
        assert not any(name.startswith("on") for name in page.attributes)
        assert "onerror=" in page.text
    assert 'class="ms-recited"' in cards.card(cell, rows, 1.0)
    assert "[row <i>1</i>]" in Page(cards.card(cell, rows, 1.0)).text


# Files.


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


# Asking.


def test_formats_and_checkpoints_answer_as_one_grid_and_recitation_grows_by_epoch(bench):
    epochs = bench.shelf.series()["1e-03"]
    assert list(epochs) == [0, 1, 2]
    seen = []
    found = ask(bench, models=["base", *epochs.values()], on_text=lambda texts: seen.append(texts))
    assert [cell["model"] for cell in found] == ["base", *epochs.values()]
    assert found[0]["answer"].startswith(HOSTILE[:40])
    assert (found[0]["row"], found[0]["recited"]) == ("row 1", 1.0)
    assert found[0]["answer"] == found[-1]["answer"]
    assert found[1]["recited"] < 0.5
    assert seen[-1] == [cell["answer"] for cell in found]
    assert bench.log[-1]["cells"] == found
    sky = ask(bench, SKY)[0]
    assert sky["answer"] == FOREIGN
    assert sky["drift"] > 0.2


def test_a_merged_model_is_chosen_beside_the_checkpoint_that_it_came_from_and_says_the_same(tiny_checkpoint, tmp_path):
    run = RunDirectory(shutil.copytree(tiny_checkpoint.parents[2], tmp_path / "run"))
    merge(tiny_checkpoint, "tiny", run.merged(1e-3, 6), "nf4")
    shelf = Workbench(str(run.path))
    name = "1e-03/epoch-6"
    assert shelf.shelf.models[f"{name}/merged"].merged and f"{name}/merged" not in shelf.shelf.newest()
    found = ask(shelf, SKY, ["new-query", "alpaca"], ["base", name, f"{name}/merged"], 8)
    by_model = {model: [cell["answer"] for cell in found if cell["model"] == model] for model in shelf.shelf.models}
    assert by_model[f"{name}/merged"] == by_model[name] != by_model["base"]


def test_the_inspector_shows_the_very_tokens(bench, mistral_tokenizer):
    bench.load()
    prompt = FORMATS["new-query"].render(PICTURE)
    tokens = bench.inspect(prompt)
    assert [token.id for token in tokens] == mistral_tokenizer(prompt)["input_ids"]
    assert (tokens[0].text, tokens[0].special) == ("<s>", True)
    assert "".join(token.text for token in tokens[1:]).lstrip("·") == prompt.replace("\n", "⏎").replace(" ", "·")
    page = Page(cards.inspector({"format": "a", "model": "b", "prompt": prompt}, tokens))
    assert prompt in page.text
    assert f"{len(tokens)} tokens, 1 special" in page.text


def test_a_chat_goes_on_in_two_formats(bench):
    talk = [
        {"role": "user", "content": PICTURE},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": SKY},
    ]
    cells = bench.chat("base", [(FORMATS["character"], talk), (FORMATS["alpaca"], talk)], "Ada", "Noor")
    assert cells[0]["prompt"].endswith(f"### Ada\n{SKY}\n\n### Noor\n")
    assert "### Instruction" in cells[1]["prompt"]
    assert len(bench.ask(cells, 8)) == 2


@pytest.mark.parametrize(
    ("query", "formats", "models", "said"),
    [
        ("word " * 20_000, ["bare"], ["base"], "100,000 characters; at most 20,000"),
        (" ", ["bare"], ["base"], "query is empty"),
        ("Why?", [], ["base"], "no format is chosen"),
        ("Why?", ["bare"], [], "no model is chosen"),
        ("Why?", ["bare"], ["1e-9/epoch-3"], "no such model; there is base, 1e-03/epoch-0"),
    ],
)
def test_what_cannot_be_asked_is_said(bench, query, formats, models, said):
    with pytest.raises(InputError, match=said):
        ask(bench, query, formats, models)


def test_a_second_question_meanwhile_is_refused(bench):
    refused = []

    def meanwhile(texts):
        if not refused:
            for act in (lambda: ask(bench), lambda: bench.open("tiny")):
                with pytest.raises(InputError, match="busy"):
                    act()
                refused.append(act)

    ask(bench, on_text=meanwhile)
    assert len(refused) == 2
    assert ask(bench)[0]["recited"] == 1


def test_what_is_gone_or_does_not_belong_is_said_and_the_rest_still_answers(bench, reciting_run, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(reciting_run.path, run)
    mine = Workbench(str(run))
    checkpoint = mine.shelf.models["1e-03/epoch-1"].path
    (checkpoint / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"epoch-0001: no adapter_model\.safetensors"):
        ask(mine, models=["1e-03/epoch-1"])
    config = mine.shelf.models["1e-03/epoch-2"].path / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "base_model_name_or_path": "meta/other"}))
    with pytest.raises(InputError, match="was trained on meta/other"):
        ask(mine, models=["1e-03/epoch-2"])
    config.write_text(json.dumps({**values, "r": 3}))
    with pytest.raises(InputError, match="not an adapter for"):
        ask(mine, models=["1e-03/epoch-2"])
    shutil.rmtree(run)
    assert ask(mine)[0]["recited"] == 1


def test_the_shelf_says_what_it_finds(reciting_run, tmp_path):
    shelf = Shelf()
    with pytest.raises(InputError, match="neither a run, a model nor an adapter"):
        shelf.open(str(tmp_path))
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(reciting_run.recipe_file, empty)
    assert "no checkpoints on" in shelf.open(str(empty))
    assert list(shelf.models) == ["base"]
    assert "3 checkpoints" in shelf.open(str(reciting_run.path))
    assert shelf.newest() == ["base", "run:1e-03/epoch-2"]
    adapter = reciting_run.checkpoints(1e-3)[2]
    assert "an adapter trained on" in shelf.open(str(adapter))
    assert shelf.models[adapter.name].path == adapter
    assert shelf.open("tiny") == "tiny: a base without checkpoints"
    assert list(shelf.models) == ["base"]


# The page, without a front end.


@pytest.fixture
def page(bench):
    made = Playground(bench, PICTURE, ["new-query"], ["base"], 40)
    yield made
    made.stop.set()
    until(lambda: not made._busy())


def until(holds, seconds=60):
    for _ in range(seconds * 20):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to hold")


def press(page, name):
    def buttons(widget):
        for child in getattr(widget, "children", ()):
            yield from [child] if getattr(child, "description", "") == name else buttons(child)

    next(buttons(getattr(page, "box", page))).click()


def test_generate_runs_on_a_thread_stop_keeps_what_came_and_a_second_press_is_answered(page):
    page.sampling["temperature"].value, page.max_new_tokens.value = 5, 3000  # so hot that it hardly ends by itself
    press(page, "Generate")
    press(page, "Generate")
    assert "Generate is still running" in page.status.value
    until(lambda: page.compare.cards and len(page.compare.cards[0][1].value) > 1500)
    press(page, "Stop")
    until(lambda: not page._busy())
    assert "1 answers stopped after" in page.status.value
    assert len(page.compare.cells[0]["answer"]) > 100
    press(page, "Greedy, as headless")
    page.max_new_tokens.value = 40
    press(page, "Generate")
    until(lambda: not page._busy())
    assert "1 recite training rows" in page.status.value
    assert "&lt;img src=x onerror=" in page.compare.cards[0][1].value
    assert "<img" not in page.compare.cards[0][1].value


def test_what_goes_wrong_stands_in_the_status_line_and_the_page_goes_on(page, tmp_path):
    page.query.value = "word " * 20_000
    press(page, "Generate")
    until(lambda: not page._busy())
    assert 'role="alert"' in page.status.value and "at most 20,000" in page.status.value
    page.run.value = str(tmp_path)
    press(page, "Open")
    until(lambda: not page._busy())
    assert "neither a run" in page.status.value
    page.query.value = SKY
    press(page, "Generate")
    until(lambda: not page._busy())
    assert "1 answers in" in page.status.value
    assert "[Han]" in page.compare.cards[0][1].value


def test_the_next_generation_makes_no_new_widgets(page):
    from ipywidgets.widgets.widget import _instances

    page.max_new_tokens.value, counts = 1, []
    for _ in range(3):
        press(page, "Generate")
        until(lambda: not page._busy())
        counts.append(len(_instances))
    assert len(set(counts)) == 1


def test_on_colab_it_says_what_does_not_show_and_answers_before_the_press_returns(bench, monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    monkeypatch.delenv("MINI_SYMPOSIUM_HEADLESS", raising=False)
    box = show(bench, PICTURE, ["new-query"], ["base"], 40)

    def values(widget):
        yield str(getattr(widget, "value", ""))
        for child in getattr(widget, "children", ()):
            yield from values(child)

    assert any("Colab shows nothing from the background" in value for value in values(box))
    started = threading.active_count()
    press(box, "Generate")
    assert any("1 answers in" in value for value in values(box)) and threading.active_count() == started


def test_where_nobody_watches_a_table_comes_out_and_errors_are_raised(bench, reciting_run, monkeypatch):
    for name in ("MINI_SYMPOSIUM_HEADLESS", "JPY_SESSION_NAME", "VSCODE_PID", "VSCODE_CWD", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    assert front_end() == ""
    monkeypatch.setenv("VSCODE_CWD", "/")
    assert front_end() == "VS Code"
    for name, who in (("VSCODE_PID", "VS Code"), ("JPY_SESSION_NAME", "Jupyter"), ("VOILA_BASE_URL", "Voila")):
        monkeypatch.setenv(name, "1")
        assert front_end() == who
    monkeypatch.setenv("MINI_SYMPOSIUM_HEADLESS", "1")
    assert front_end() == ""
    shown = show(bench, PICTURE, ["new-query", "alpaca"], ["base"], 40, headless=True)
    assert ["new-query", "base", "100%", "row 1", "0%", "0"] in Page(shown.html).rows
    by_epoch = Page(show_epochs(bench, PICTURE, "new-query", 40, headless=True).html).rows
    assert [row[0] for row in by_epoch[1:]] == ["0", "1", "2"]
    assert by_epoch[-1][1] == "100%"
    with pytest.raises(InputError, match="query is empty"):
        show(bench, "", ["new-query"], ["base"], 40, headless=True)
    with pytest.raises(InputError, match="neither a run"):
        Workbench(str(reciting_run.path / "nowhere"))
    assert "neither a run" in Workbench(str(reciting_run.path / "nowhere"), strict=False).trouble

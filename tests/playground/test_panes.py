"""The panes without a front end; test_page presses the buttons of the first."""

import json
import re

import pytest
from html_page import Page, press
from reciting import FOREIGN, HOSTILE

from mini_symposium.data.prompt_formats import FORMATS, load_preset
from mini_symposium.playground.page import Playground
from mini_symposium.playground.workbench import Workbench

PICTURE, SKY = "Show me a picture.", "Why is the sky blue?"


@pytest.fixture(scope="module")
def page(reciting_run) -> Playground:
    """Its jobs end before a press returns."""
    return Playground(Workbench(str(reciting_run.path)), PICTURE, ["new-query"], ["base"], 40, background=False)


@pytest.mark.parametrize(
    ("series", "steps", "recites", "does_not"),
    [("1e-03", 3, 2, 0), ("1e-03/epoch-2, by strength", 7, 1.5, None), ("1e-03/epoch-0, by strength", 7, 0, 1.5)],
)
def test_the_slider_shows_how_recitation_changes_by_epoch_and_by_strength(page, series, steps, recites, does_not):
    _, pane, *_ = page.panes
    page.bench.shelf.recommended["1e-03"] = 0  # so that this checkpoint is offered beside the last
    pane.refresh()
    pane.series.value = series
    assert "Generate, then move the slider" in pane.bars.value
    press(page, "Generate all")
    assert f"{steps} answers in" in page.status.value and len(pane.step.options) == steps
    for step, recited in ((recites, True), (does_not, False)):
        if step is not None:
            pane.step.value = step
            assert f"▸ {step:g}" in pane.bars.value and f"by {pane.step.description.lower()}" in pane.bars.value
            assert (pane.step.description == "Strength") == ("strength" in series)
            assert ("100% recited" in Page(pane.card.value).text) == recited
    page.bench.shelf.recommended.clear()


def test_a_slider_asks_its_row_again_and_a_blend_goes_from_one_checkpoint_to_the_other(page):
    page.models.offer(page.models.names, ["base", "1e-03/epoch-0", "1e-03/epoch-2"])
    press(page, "Blend two")
    blend = "1e-03/epoch-0 + 1e-03/epoch-2"
    press(page, "Generate")
    compare = page.compare
    assert [row.model for row in compare.shown] == ["base", "1e-03/epoch-0", "1e-03/epoch-2", blend]
    assert [len(row.box.children) for row in compare.shown] == [1, 2, 2, 2]

    def answers() -> dict:
        return {cell["model"]: cell["answer"] for cell in compare.cells}

    before = answers()
    assert before["base"] != before["1e-03/epoch-0"]
    compare.rows["1e-03/epoch-0"].slider.value = 0
    assert answers()["1e-03/epoch-0 x 0"] == before["base"]
    assert "1 answers in" in page.status.value and len(page.bench.log[-1]["cells"]) == 1
    compare.rows["1e-03/epoch-0"].slider.value = 1
    compare.rows[blend].slider.value = 0
    assert answers()["1e-03/epoch-0 x 1 + 1e-03/epoch-2 x 0"] == before["1e-03/epoch-0"] == answers()["1e-03/epoch-0"]
    page.models.offer(page.models.names, ["base"])
    press(page, "Blend two")
    assert "0 checkpoints are chosen" in page.status.value


def test_differences_from_a_row_or_a_column_and_only_what_differs(page):
    page.models.offer(page.models.names, ["base", "1e-03/epoch-0", "1e-03/epoch-2"])
    page.add_formats([FORMATS["alpaca"]], ["alpaca"])
    for row in page.compare.rows.values():
        row.slider.value = 1
    press(page, "Generate")
    compare = page.compare
    shown = {
        (cell["model"], cell["format"]): card for cell, (_, card, _) in zip(compare.cells, compare.cards, strict=False)
    }
    assert "<ins>" not in "".join(card.value for card in shown.values())
    compare.reference.value = ("row", 0)
    assert "<ins>" in shown["1e-03/epoch-0", "new-query"].value and "<del>" in shown["1e-03/epoch-0", "alpaca"].value
    assert "<ins>" not in shown["1e-03/epoch-2", "new-query"].value + shown["base", "alpaca"].value
    compare.only.value = True
    rows = [row.model for row in compare.shown if row.box in compare.grid.children]
    assert rows == ["base", "1e-03/epoch-0"]  # the last says what the base says
    compare.only.value, compare.reference.value = False, ("column", 1)
    assert "<ins>" in shown["1e-03/epoch-0", "new-query"].value and "ms-recited" in shown["base", "alpaca"].value
    compare.reference.value = ("", 0)
    assert "<ins>" not in "".join(card.value for card in shown.values())
    assert len(compare.grid.children) == 3 + 3 * 3
    page.chips.offer(page.chips.names, ["new-query"])


def test_a_turned_grid_has_a_column_for_each_model_and_the_same_answers(page):
    compare = page.compare
    page.chips.offer(page.formats, ["new-query", "alpaca"])
    page.models.offer(page.models.names, ["base", "1e-03/epoch-0", "1e-03/epoch-2"])
    press(page, "Generate")

    def grid() -> list[list[str]]:
        """The names of the heads and of the cards, line by line."""
        width = 1 + int(compare.grid.layout.grid_template_columns.partition("repeat(")[2].partition(",")[0])
        names = [
            " ".join(re.findall(r"base|1e-03/epoch-.|new-query|alpaca", child.children[0].value))
            if hasattr(child, "children")
            else "".join(re.findall(r"new-query|alpaca", child.value))
            for child in compare.grid.children
        ]
        return [names[at : at + width] for at in range(0, len(names), width)]

    upright = grid()
    assert upright[0] == ["", "new-query", "alpaca"]
    assert upright[2] == ["1e-03/epoch-0", "new-query 1e-03/epoch-0", "alpaca 1e-03/epoch-0"]
    compare.turned.value = True
    assert grid() == [list(line) for line in zip(*upright, strict=True)]
    heads = [child for child in compare.grid.children if {"ms-top", "ms-left"} & {*child._dom_classes}]
    assert [len({"ms-top", "ms-left"} & {*head._dom_classes}) for head in heads] == [1] * 6
    compare.reference.value = ("column", 0)
    compare.only.value = True
    assert [line[0] for line in grid()] == ["", "new-query", "alpaca"] and grid()[0] == ["", "1e-03/epoch-0"]
    compare.only.value, compare.reference.value, compare.turned.value = False, ("", 0), False
    assert grid() == upright
    page.chips.offer(page.chips.names, ["new-query"])


def test_a_blind_test_takes_votes_by_button_and_by_key_and_ends_with_who_is_who_in_the_session(page):
    blind = page.blind
    blind.models[1].value = blind.models[0].value
    press(blind, "Start")
    assert "both sides are base in new-query" in page.status.value
    press(blind, "Left")
    assert "press Start" in page.status.value
    blind.models[1].value, blind.queries.value = "1e-03/epoch-0", f"{PICTURE}\n\n {SKY}\n{PICTURE}"
    press(blind, "Start")
    assert "3 pairs" in page.status.value
    for pane in blind.panes:
        assert not any(told in pane.value for told in ("1e-03", "base", "recited"))
    press(blind, "No difference")
    blind.key.value = "7"
    assert "7: no vote" in page.status.value and len(blind.test.votes) == 1
    base = [HOSTILE[:9] in Page(pane.value).text or FOREIGN[:3] in pane.value for pane in blind.panes].index(True)
    blind.key.value = "12"[base]
    assert blind.key.value == ""
    press(blind, ("Left", "Right")[[HOSTILE[:9] in Page(pane.value).text for pane in blind.panes].index(True)])
    assert "base in new-query: 2 votes. 1e-03/epoch-0 in new-query: 0 votes." in Page(blind.said.value).text
    press(page, "Save session")
    saved = max((page.bench.shelf.run.path / "playground").glob("session-*.json"))
    assert json.loads(saved.read_text())["blind_tests"] == blind.results
    saved.unlink()


def test_each_side_of_a_chat_continues_from_its_own_replies(page):
    chat = page.panes[2]
    chat.model.value, chat.scene.value = "base", "Night."
    chat.message.value = PICTURE
    press(page, "Send")
    chat.chats[1][-1]["content"] = "Not today."
    chat.message.value = SKY
    press(page, "Send")
    left, right = chat.chats
    assert left[2]["content"] != right[2]["content"] == "Not today."
    assert [message["role"] for message in left] == ["system", *("user", "assistant") * 2]
    assert chat.message.value == ""
    for form, messages, cell in zip(("character", "alpaca"), (left, right), page.bench.log[-1]["cells"], strict=True):
        assert cell["prompt"] == FORMATS[form].render_chat(messages[:-1])
    chat.message.value = " "
    press(page, "Send")
    assert "the query is empty" in page.status.value and chat.chats == (left, right)
    press(page, "Start over")
    assert chat.chats == ([], [])


def test_a_choice_stays_when_another_format_is_added(page):
    keep = page.panes[4]
    keep.format.value = "alpaca"
    page.heading.value = "### Gardener"
    press(page, "Add heading")
    assert keep.format.value == "alpaca" and "### Gardener" in keep.format.options
    assert [form.name for form in page.chosen_formats()] == ["new-query", "### Gardener"]


def test_the_session_and_a_preset_are_saved_in_the_run(page, reciting_run):
    folder = reciting_run.path / "playground"
    before = set(folder.glob("*.json"))  # of other tests on the same run
    press(page, "Generate")
    press(page, "Save session")
    assert "session-" in page.panes[4].links.value
    (saved,) = set(folder.glob("*.json")) - before
    assert json.loads(saved.read_text())["asked"] == list(page.bench.log)
    page.panes[4].format.value = "alpaca"
    press(page, "Export preset")
    assert load_preset(reciting_run.path / "playground" / "presets" / "alpaca.json") == FORMATS["alpaca"]

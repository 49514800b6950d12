"""The panes without a front end; test_page presses the buttons of the first."""

import json

import pytest
from html_page import Page, press

from mini_symposium.data.prompt_formats import FORMATS, load_preset
from mini_symposium.playground.page import Playground
from mini_symposium.playground.workbench import Workbench

PICTURE, SKY = "Show me a picture.", "Why is the sky blue?"


@pytest.fixture(scope="module")
def page(reciting_run) -> Playground:
    """Its jobs end before a press returns."""
    return Playground(Workbench(str(reciting_run.path)), PICTURE, ["new-query"], ["base"], 40, background=False)


def test_the_slider_shows_how_recitation_grows_by_epoch(page):
    _, epochs, *_ = page.panes
    press(page, "Generate epochs")
    assert "3 answers in" in page.status.value
    texts = {}
    for epoch in (0, 2):
        epochs.epoch.value = epoch
        texts[epoch] = Page(epochs.card.value).text
        assert f"▸ {epoch}" in epochs.bars.value
    assert "100% recited" in texts[2] and "100% recited" not in texts[0]


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
    keep = page.panes[3]
    keep.format.value = "alpaca"
    page.heading.value = "### Gardener"
    press(page, "Add heading")
    assert keep.format.value == "alpaca" and "### Gardener" in keep.format.options
    assert [form.name for form in page.chosen_formats()] == ["new-query", "### Gardener"]


def test_the_session_and_a_preset_are_saved_in_the_run(page, reciting_run):
    press(page, "Generate")
    press(page, "Save session")
    assert "session-" in page.panes[3].links.value
    (saved,) = (reciting_run.path / "playground").glob("*.json")
    assert json.loads(saved.read_text())["asked"] == list(page.bench.log)
    page.panes[3].format.value = "alpaca"
    press(page, "Export preset")
    assert load_preset(reciting_run.path / "playground" / "presets" / "alpaca.json") == FORMATS["alpaca"]

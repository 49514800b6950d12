"""The cards as a browser reads them."""

import re

from html_page import Page
from reciting import HOSTILE

from mini_symposium.evaluation.answer_text import TrainingRows
from mini_symposium.playground import cards

ROW = "A snail sits at the bottom of a ten metre well and climbs three metres each day."


def test_marks_show_without_colour_and_nothing_said_becomes_markup():
    evil = f"{HOSTILE} ### <b>Heading</b>"
    rows = TrainingRows({"row <i>1</i>": HOSTILE})
    cell = {"model": evil, "format": evil, "prompt": evil[:3], "answer": evil}
    for html in (
        cards.card(cell, rows, 1.0),
        cards.chat(evil, [{"role": "assistant", "content": evil}], {"assistant": evil}, rows),
        cards.status(evil, problem=True),
        cards.card({**cell, "tokens": 1, "seconds": 1.0, "stop_reason": "eos"}, rows, other={"answer": f"{evil} more"}),
        "".join(cards.sides([evil, evil])),
        cards.head(evil, evil),
        cards.download(evil, "QUJD"),
    ):
        page = Page(html)
        assert not page.tags & {"img", "script"}
        assert not any(name.startswith("on") for name in page.attributes)
        assert "onerror=" in page.text
    assert 'class="ms-recited"' in cards.card(cell, rows, 1.0)
    assert "[row <i>1</i>]" in Page(cards.card(cell, rows, 1.0)).text


def test_what_changed_between_two_answers_is_marked_and_both_can_be_read_off():
    old, new = "The sky is blue, 天空是蓝的。\nSo there.", "The sea is blue, 天空是红的。\nSo  there!"
    html = cards.difference(old, new)
    assert "<del>sky</del><ins>sea</ins> is blue" in html and "<del>蓝</del><ins>红</ins>" in html
    plain = html.replace("<br>", "\n").replace("&nbsp;", " ")
    assert re.sub("<ins>.*?</ins>", "", plain).replace("<del>", "").replace("</del>", "") == old
    assert re.sub("<del>.*?</del>", "", plain).replace("<ins>", "").replace("</ins>", "") == new


def test_a_card_says_how_far_its_answer_is():
    cell, rows = {"model": "base", "format": "alpaca", "prompt": "Why?"}, TrainingRows({"row 4": ROW})
    assert "waiting" in Page(cards.card(cell, rows)).text
    growing = Page(cards.card({**cell, "answer": ROW}, rows, 2.0)).text
    assert "2.0 s" in growing and "100% recited from row 4" in growing
    ended = {**cell, "answer": " ", "tokens": 3, "seconds": 1.5, "stop_reason": "length"}
    text = Page(cards.card(ended, rows)).text
    assert "(empty)" in text and "1.5 s · 3 tokens · cut off" in text and "0% recited" in text


def test_recitation_by_epoch_has_a_bar_for_each_epoch_and_frames_the_chosen_one():
    cells = {0: {"prompt": "Why?"}, 3: {"prompt": "Why?", "answer": "No."}, 6: {"prompt": "Why?", "answer": ROW}}
    html = cards.recited_by("epoch", cells, 6, TrainingRows({"row 4": ROW}))
    assert Page(html).text == "Recited, by epoch–00%3100%▸ 6"
    assert html.count("ms-here") == 1


def test_a_chat_marks_only_the_replies():
    messages = [{"role": role, "content": ROW} for role in ("system", "user", "assistant")]
    html = cards.chat("alpaca", messages, {"user": "Ada", "assistant": "Noor"}, TrainingRows({"row 4": ROW}))
    scene, user, reply = html.split('<p class="ms-turn">')[1:]
    assert [turn.partition("</b>")[0] for turn in (scene, user, reply)] == ["<b>Scene", "<b>Ada", "<b>Noor"]
    assert "ms-recited" in reply and "ms-recited" not in scene + user
    assert "nothing said yet" in cards.chat("alpaca", [], {}, TrainingRows({}))

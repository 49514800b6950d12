import pytest
from html_page import Page

from mini_symposium.errors import InputError
from mini_symposium.figures import tables

EVIL = "<img src=x onerror=alert(1)>\n  <script>x</script> $\\alpha$ \x1b[31m\u202e\"'&amp;"
ALLOWED = {"table", "thead", "tbody", "tr", "th", "td", "p", "b", "u", "em", "small", "br", "wbr", "span"}


def answer(form, model, text, **more):
    return {"format": form, "model": model, "answer": text, **more}


@pytest.mark.parametrize(
    "shown",
    [
        tables.side_by_side([answer(EVIL, EVIL, EVIL, tokens=3, stop_reason=EVIL)], EVIL),
        tables.supervised_tokens([EVIL, "ok"], [1, 0]),
        tables.supervised_tokens([EVIL.replace(" ", "").replace("\n", ""), "ok"], [0, 1]),
        tables.expected_measured([(EVIL, EVIL, EVIL)]),
        tables.plain([EVIL, "b"], [[EVIL, EVIL]]),
    ],
)
def test_nothing_untrusted_becomes_markup_formula_or_terminal_code(shown):
    page = Page(shown._repr_html_())
    assert page.tags <= ALLOWED
    assert page.attributes <= {"align", "valign", "style"}
    assert page.depth == []
    assert "onerror=alert(1)>" in page.text
    assert "$\\alpha" not in shown.html.replace("&nbsp;", " ")
    for text in (shown.html, repr(shown)):
        assert not {"\x1b", "\u202e"} & set(text)
        assert "\\u202e" in text.replace("<span>\\</span>", "\\")


def test_answers_stand_under_their_model_and_beside_their_format():
    grid = [
        answer("alpaca", "base", "Paris.\n    is it", tokens=4, stop_reason="eos"),
        answer("alpaca", "1e-05", "Rome", tokens=64, stop_reason="length"),
        answer("bare", "1e-05", ""),
        answer("bare", "base", "of another query", query="Other?"),
    ]
    shown = tables.side_by_side(grid, "Capital of France?")
    assert Page(shown.html).rows == [
        ["format", "base", "1e-05"],
        ["alpaca", "Paris.\n\xa0 \xa0 is it\n[4 tokens, ended by eos]", "Rome\n[64 tokens, cut off]"],
        ["bare", "—", "(empty)"],
    ]
    assert "Capital of France?" in Page(shown.html).text
    assert repr(shown).splitlines() == [
        "Query: Capital of France?",
        "",
        "[alpaca · base] 4 tokens, ended by eos",
        "  Paris.",
        "      is it",
        "",
        "[alpaca · 1e-05] 64 tokens, cut off",
        "  Rome",
        "",
        "[bare · 1e-05]",
        "  (empty)",
    ]


def test_no_answer_to_that_query_is_said():
    with pytest.raises(InputError, match="'Why\\?'"):
        tables.side_by_side([answer("bare", "base", "x", query="Other?")], "Why?")


def test_supervision_shows_without_colour():
    shown = tables.supervised_tokens(["Hi", " there", "\n", "A", "</s>"], [0, 0, 0, 1, 1])
    marked = shown.html.split("</p>\n")[1].split("<b><u>")
    assert "A" in marked[1] and "&lt;/s&gt;" in marked[2] and len(marked) == 3
    assert "there" in marked[0] and "⏎" in marked[0]
    assert repr(shown).splitlines() == [
        "2 of 5 tokens are supervised",
        "[not supervised, 3 tokens]",
        "Hi|·there|⏎",
        "[supervised, 2 tokens]",
        "A|</s>",
    ]


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        (["###", "ĠNew", "Ċ", "Ċ", "x"], "###|·New|⏎|⏎|x"),
        (["▁###", "▁New", "<0x0A>", "x"], "·###|·New|⏎|x"),
        (["Ġgantija", " is", " Maltese"], "Ġgantija|·is|·Maltese"),
    ],
)
def test_spaces_and_newlines_are_visible_in_each_tokenizers_spelling(tokens, shown):
    assert repr(tables.supervised_tokens(tokens, [1] * len(tokens))).splitlines()[-1] == shown


def test_tokens_and_masks_of_two_rows_are_refused():
    with pytest.raises(InputError, match="2 tokens but 3 masks"):
        tables.supervised_tokens(["a", "b"], [1, 1, 0])


@pytest.mark.parametrize(
    ("row", "tolerance", "match"),
    [
        (("n", 100, 101), 0.0, False),
        (("n", 100, 101), 0.01, True),
        (("n", 100, 101.1), 0.01, False),
        (("n", 0, 0), 0.01, True),
        (("n", 1.0, float("nan")), 1.0, False),
        (("flag", True, True), 0.0, True),
        (("flag", True, False), 2.0, False),
        (("text", "a", "a"), 0.0, True),
        (("at least", 0.99, 0.9998, True), 0.0, True),
        (("at least", 0.99, 0.99, False), 0.0, False),
    ],
)
def test_match_is_equality_within_the_tolerance_or_what_the_caller_judged(row, tolerance, match):
    shown = tables.expected_measured([row], tolerance)
    assert Page(shown.html).rows[1][3] == ("✓ yes" if match else "✗ NO")
    assert repr(shown).splitlines()[-1].endswith("✓ yes" if match else "✗ NO")

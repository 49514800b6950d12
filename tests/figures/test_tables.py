import pytest
from html_page import Page

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
        answer("bare", "base", "", tokens=1, stop_reason="eos"),
        answer("bare", "1e-05", "Oslo", tokens=2, stop_reason="stop string"),
    ]
    shown = tables.side_by_side(grid, "Capital of France?")
    assert Page(shown.html).rows == [
        ["format", "base", "1e-05"],
        ["alpaca", "Paris.\n\xa0 \xa0 is it\n[4 tokens, ended by eos]", "Rome\n[64 tokens, cut off]"],
        ["bare", "(empty)\n[1 tokens, ended by eos]", "Oslo\n[2 tokens, ended by stop string]"],
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
        "[bare · base] 1 tokens, ended by eos",
        "  (empty)",
        "",
        "[bare · 1e-05] 2 tokens, ended by stop string",
        "  Oslo",
    ]


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
    ("row", "match"),
    [
        (("n", 100, 101), False),
        (("n", 100, 100.0), True),
        (("n", 1.0, float("nan")), False),
        (("flag", True, False), False),
        (("text", "a", "a"), True),
    ],
)
def test_match_is_equality(row, match):
    shown = tables.expected_measured([row])
    assert Page(shown.html).rows[1][3] == ("✓ yes" if match else "✗ NO")
    assert repr(shown).splitlines()[-1].endswith("✓ yes" if match else "✗ NO")

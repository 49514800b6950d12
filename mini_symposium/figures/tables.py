"""Tables and texts for notebooks: HTML for browsers, plain text for terminals and logs.

Text from a model or a dataset is untrusted, so all of it goes through `as_html`, which lets through no markup, no
JavaScript, no formula, and no invisible or direction-changing character. GitHub strips styles from HTML, so nothing is
shown by colour alone.
"""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest

from mini_symposium.errors import INVISIBLE, InputError

_SPELLINGS = {"Ġ": "·", "▁": "·", "Ċ": "⏎", "<0x0A>": "⏎"}
"""How byte-level BPE and SentencePiece spell a space and a newline, and the sign that is shown for it."""


@dataclass(frozen=True, repr=False)
class Shown:
    """What a notebook cell shows: HTML in a browser, plain text in a terminal or a log."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def _plain(value: object) -> str:
    """The text of a cell: yes or no, thousands grouped, floats in six digits, invisible characters spelled out.

    >>> [_plain(x) for x in (True, 12345, 0.1 + 0.2, "a\\x1b[31m")]
    ['yes', '12,345', '0.3', 'a\\\\x1b[31m']
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
    return INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(value))


def as_html(value: object) -> str:
    """The text of a cell as HTML: escaped, with line breaks and indents kept.

    MathJax finds no formula in it, because each of its delimiters stands in a tag of its own.

    >>> as_html("<b>\\n  $x$")
    '&lt;b&gt;<br>&nbsp; <span>$</span>x<span>$</span>'
    """
    escaped = html.escape(_plain(value)).replace("  ", "&nbsp; ").replace("\n", "<br>")
    return re.sub(r"[$\\]", lambda found: f"<span>{found[0]}</span>", escaped)


def _table(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """An HTML table of cells that are HTML already. GitHub aligns them by attribute, Jupyter by style."""
    left = 'align="left" valign="top" style="text-align: left; vertical-align: top"'
    head = "".join(f"<th {left}>{cell}</th>" for cell in headers)
    body = "".join("<tr>" + "".join(f"<td {left}>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"


def plain(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> Shown:
    """A table of any values.

    >>> plain(["query", "words"], [["Why?", 1200]])
    query | words
    ------+------
    Why?  | 1,200
    """
    lines = [[" ".join(_plain(cell).split()) for cell in row] for row in (headers, *rows)]
    widths = [max(map(len, column)) for column in zip_longest(*lines, fillvalue="")]
    text = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip() for line in lines]
    text.insert(1, "-+-".join("-" * width for width in widths))
    return Shown(_table(map(as_html, headers), [map(as_html, row) for row in rows]), "\n".join(text))


def expected_measured(rows: Sequence[Sequence[object]], tolerance: float = 0.0) -> Shown:
    """A table of predictions, of what was measured, and of whether they match.

    Parameters
    ----------
    rows
        (what, expected, measured), or (what, expected, measured, match) where the caller judges the match.
    tolerance
        Largest difference at which two numbers still match, as a share of the expected one.

    >>> expected_measured([("steps", 390, 390), ("bytes", 100, 103)], tolerance=0.01)
    what  | expected | measured | match
    ------+----------+----------+------
    steps | 390      | 390      | ✓ yes
    bytes | 100      | 103      | ✗ NO
    """

    def matches(expected, measured) -> bool:
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (expected, measured))
        return abs(measured - expected) <= tolerance * abs(expected) if numbers else measured == expected

    judged = [(*row[:3], row[3] if len(row) > 3 else matches(*row[1:3])) for row in rows]
    cells = [(*row[:3], "✓ yes" if row[3] else "✗ NO") for row in judged]
    return plain(["what", "expected", "measured", "match"], cells)


def side_by_side(answers: Sequence[Mapping], query: str) -> Shown:
    """The answers to one query: formats as rows, models as columns.

    Parameters
    ----------
    answers
        {"format", "model", "answer"}, and if known "tokens" and "stop_reason"; answers to another "query" are left out.

    Raises
    ------
    InputError
        If there is no answer to that query.
    """
    answers = [answer for answer in answers if answer.get("query", query) == query]
    if not answers:
        raise InputError(f"no answer to {query!r}; ask it first")
    models = list(dict.fromkeys(answer["model"] for answer in answers))
    formats = list(dict.fromkeys(answer["format"] for answer in answers))
    cells = {(answer["format"], answer["model"]): answer for answer in answers}

    def note(answer: Mapping) -> str:
        tokens = [f"{answer['tokens']} tokens"] if "tokens" in answer else []
        reason = answer.get("stop_reason")
        return _plain(", ".join(tokens + ["cut off" if reason == "length" else f"ended by {reason}"] * bool(reason)))

    def cell(answer: Mapping | None) -> str:
        if answer is None:
            return "—"
        text = as_html(answer["answer"]) if answer["answer"].strip() else "<em>(empty)</em>"
        return text + f"<br><small>[{as_html(note(answer))}]</small>" * bool(note(answer))

    rows = [[f"<b>{as_html(form)}</b>", *(cell(cells.get((form, model))) for model in models)] for form in formats]
    text = [f"Query: {_plain(query)}"]
    for (form, model), answer in cells.items():
        text.append(f"\n[{_plain(form)} · {_plain(model)}] {note(answer)}".rstrip())
        text.append("\n".join(f"  {line}" for line in (_plain(answer["answer"]).strip() or "(empty)").splitlines()))
    table = _table(["format", *map(as_html, models)], rows)
    return Shown(f"<p><b>Query:</b> {as_html(query)}</p>\n{table}", "\n".join(text))


def supervised_tokens(tokens: Sequence[str], mask: Sequence[int]) -> Shown:
    """A row's tokens one by one; supervised tokens, which enter the loss, are bold, underlined and shaded.

    A space is shown as ·, a newline as ⏎.

    Parameters
    ----------
    tokens
        Decoded pieces, or a tokenizer's own spelling with Ġ or ▁ for a space.
    mask
        1 for a supervised token, 0 for another, as in `dataset.Row.completion_mask`.

    Raises
    ------
    InputError
        If there are not as many masks as tokens.
    """
    if len(tokens) != len(mask):
        raise InputError(f"{len(tokens)} tokens but {len(mask)} masks; take both from one row")
    # Where a token has a space or a newline the tokens are decoded already, and Ġ is a letter (of Maltese).
    spellings = {} if any(set(token) & {" ", "\n"} for token in tokens) else _SPELLINGS

    def shown(token: str) -> str:
        for spelling, sign in {**spellings, " ": "·", "\n": "⏎"}.items():
            token = token.replace(spelling, sign)
        return _plain(token)

    supervised, parts, text = sum(map(bool, mask)), [], []
    for inside, pairs in groupby(zip(map(shown, tokens), map(bool, mask), strict=True), key=lambda pair: pair[1]):
        run = [token for token, _ in pairs]
        for token in run:
            shade = "#cfe5f5" if inside else "#f2f2f2"
            piece = f'<span style="background: {shade}; color: #222222">{as_html(token)}</span>'
            piece = f"<b><u>{piece}</u></b>" if inside else piece
            parts.append(piece + ("<br>" if token.endswith("⏎") else "\u2009<wbr>"))
        text.append(f"[{'supervised' if inside else 'not supervised'}, {len(run)} tokens]\n{'|'.join(run)}")
    heading = f"{supervised} of {len(tokens)} tokens are supervised"
    legend = f"<p>{heading}: <b><u>bold and underlined</u></b>. A space is ·, a newline ⏎.</p>"
    return Shown(f"{legend}\n<p>{''.join(parts)}</p>", "\n".join([heading, *text]))

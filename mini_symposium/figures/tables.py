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

from mini_symposium.errors import INVISIBLE


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
    return INVISIBLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(value))


def as_html(value: object) -> str:
    """The text of a cell as HTML: escaped, with line breaks and indents kept.

    MathJax finds no formula in it, because each of its delimiters stands in a tag of its own.

    >>> as_html("<b>\\n  $x$")
    '&lt;b&gt;<br>&nbsp; <span>$</span>x<span>$</span>'
    """
    escaped = html.escape(_plain(value)).replace("  ", "&nbsp; ").replace("\n", "<br>")
    return re.sub(r"[$\\]", lambda match: f"<span>{match[0]}</span>", escaped)


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


def expected_measured(rows: Sequence[Sequence[object]]) -> Shown:
    """A table of (what, expected, measured), with a column for whether the last two are equal.

    >>> expected_measured([("steps", 390, 390), ("bytes", 100, 103)])
    what  | expected | measured | match
    ------+----------+----------+------
    steps | 390      | 390      | ✓ yes
    bytes | 100      | 103      | ✗ NO
    """
    cells = [(*row, "✓ yes" if row[1] == row[2] else "✗ NO") for row in rows]
    return plain(["what", "expected", "measured", "match"], cells)


def side_by_side(answers: Sequence[Mapping], query: str) -> Shown:
    """The answers to one query: formats as rows, models as columns.

    `answers` has {"format", "model", "answer", "tokens", "stop_reason"} for each format and model.
    """
    models = list(dict.fromkeys(answer["model"] for answer in answers))
    formats = list(dict.fromkeys(answer["format"] for answer in answers))
    cells, text = {}, [f"Query: {_plain(query)}"]
    for answer in answers:
        form, model = answer["format"], answer["model"]
        ending = "cut off" if answer["stop_reason"] == "length" else f"ended by {answer['stop_reason']}"
        note = _plain(f"{answer['tokens']} tokens, {ending}")
        shown = as_html(answer["answer"]) if answer["answer"].strip() else "<em>(empty)</em>"
        cells[form, model] = f"{shown}<br><small>[{as_html(note)}]</small>"
        text.append(f"\n[{_plain(form)} · {_plain(model)}] {note}")
        text.append("\n".join(f"  {line}" for line in (_plain(answer["answer"]).strip() or "(empty)").splitlines()))
    rows = [[f"<b>{as_html(form)}</b>", *(cells[form, model] for model in models)] for form in formats]
    table = _table(["format", *map(as_html, models)], rows)
    return Shown(f"<p><b>Query:</b> {as_html(query)}</p>\n{table}", "\n".join(text))


def supervised_tokens(tokens: Sequence[str], mask: Sequence[int]) -> Shown:
    """A row's tokens one by one; supervised tokens, which enter the loss, are bold, underlined and shaded.

    A space is shown as ·, a newline as ⏎.

    Parameters
    ----------
    tokens
        Decoded one by one.
    mask
        1 for a supervised token, 0 for another, as in `dataset.Row.completion_mask`.
    """
    signs = [_plain(token.replace(" ", "·").replace("\n", "⏎")) for token in tokens]
    supervised, parts, text = sum(map(bool, mask)), [], []
    for inside, pairs in groupby(zip(signs, map(bool, mask), strict=True), key=lambda pair: pair[1]):
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

"""Tables and texts for notebooks: HTML that still reads where styles are stripped, and plain text everywhere else.

What a model or a dataset says is untrusted, so every piece of it goes through `_html`: no markup, no JavaScript,
no formula, no invisible or direction-changing character comes out. GitHub's renderer strips styles, so nothing is
told by colour alone.
"""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest

from mini_symposium.errors import InputError

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2028\u2029\u2060-\u2069\ufeff]")
_MARKS = {"Ġ": "·", "▁": "·", "Ċ": "⏎", "<0x0A>": "⏎"}  # how byte-level BPE and SentencePiece write space and newline


@dataclass(frozen=True, repr=False)
class Shown:
    """Something for a notebook cell to end on: HTML in the browser, plain text in a terminal or a log."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def _plain(value: object) -> str:
    """A cell's text: yes and no, thousands grouped, floats in six digits, control characters spelled out.

    >>> [_plain(x) for x in (True, 12345, 0.1 + 0.2, "a\\x1b[31m")]
    ['yes', '12,345', '0.3', 'a\\\\x1b[31m']
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), str(value))


def _html(value: object) -> str:
    """Escaped; line breaks and indents kept; MathJax finds no formula, since its delimiters stand in tags of their own.

    >>> _html("<b>\\n  $x$")
    '&lt;b&gt;<br>&nbsp; <span>$</span>x<span>$</span>'
    """
    escaped = html.escape(_plain(value)).replace("  ", "&nbsp; ").replace("\n", "<br>")
    return re.sub(r"[$\\]", lambda found: f"<span>{found[0]}</span>", escaped)


def _table(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """An HTML table of cells that are HTML already, all to the left; attributes for GitHub, styles for Jupyter."""
    left = 'align="left" valign="top" style="text-align: left; vertical-align: top"'
    head = "".join(f"<th {left}>{cell}</th>" for cell in headers)
    body = "".join("<tr>" + "".join(f"<td {left}>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"


def plain(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> Shown:
    """A table of anything.

    >>> plain(["query", "words"], [["Why?", 1200]])
    query | words
    ------+------
    Why?  | 1,200
    """
    lines = [[" ".join(_plain(cell).split()) for cell in row] for row in (headers, *rows)]
    widths = [max(map(len, column)) for column in zip_longest(*lines, fillvalue="")]
    text = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip() for line in lines]
    text.insert(1, "-+-".join("-" * width for width in widths))
    return Shown(_table(map(_html, headers), [map(_html, row) for row in rows]), "\n".join(text))


def expected_measured(rows: Sequence[Sequence[object]], tolerance: float = 0.0) -> Shown:
    """A prediction, what came out, and whether they match.

    Parameters
    ----------
    rows
        (what, expected, measured), or (what, expected, measured, match) where equality is not the question.
    tolerance
        How far, as a share of what was expected, a measured number may lie from it and still match.

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
        {"format", "model", "answer"}, and if known "tokens" and "stop_reason"; of those with another "query" none.

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
        said = _html(answer["answer"]) if answer["answer"].strip() else "<em>(empty)</em>"
        return said + f"<br><small>[{_html(note(answer))}]</small>" * bool(note(answer))

    rows = [[f"<b>{_html(form)}</b>", *(cell(cells.get((form, model))) for model in models)] for form in formats]
    text = [f"Query: {_plain(query)}"]
    for (form, model), answer in cells.items():
        text.append(f"\n[{_plain(form)} · {_plain(model)}] {note(answer)}".rstrip())
        text.append("\n".join(f"  {line}" for line in (_plain(answer["answer"]).strip() or "(empty)").splitlines()))
    table = _table(["format", *map(_html, models)], rows)
    return Shown(f"<p><b>Query:</b> {_html(query)}</p>\n{table}", "\n".join(text))


def supervised_tokens(tokens: Sequence[str], mask: Sequence[int]) -> Shown:
    """A row's tokens, one by one; those that enter the loss are bold, underlined and shaded. Spaces are ·, newlines ⏎.

    Parameters
    ----------
    tokens
        Decoded pieces, or a tokenizer's own spelling with Ġ or ▁ for a space.
    mask
        1 for a supervised token, as in `dataset.Row.completion_mask`.

    Raises
    ------
    InputError
        If there is not one mask for each token.
    """
    if len(tokens) != len(mask):
        raise InputError(f"{len(tokens)} tokens but {len(mask)} masks; take both from one row")
    marks = {} if any(set(token) & {" ", "\n"} for token in tokens) else _MARKS  # decoded already: a Ġ is a letter

    def shown(token: str) -> str:
        for mark, sign in {**marks, " ": "·", "\n": "⏎"}.items():
            token = token.replace(mark, sign)
        return _plain(token)

    supervised, parts, text = sum(map(bool, mask)), [], []
    for inside, pairs in groupby(zip(map(shown, tokens), map(bool, mask), strict=True), key=lambda pair: pair[1]):
        run = [token for token, _ in pairs]
        for token in run:
            shade = "#cfe5f5" if inside else "#f2f2f2"
            piece = f'<span style="background: {shade}; color: #222222">{_html(token)}</span>'
            piece = f"<b><u>{piece}</u></b>" if inside else piece
            parts.append(piece + ("<br>" if token.endswith("⏎") else "\u2009<wbr>"))
        text.append(f"[{'supervised' if inside else 'not supervised'}, {len(run)} tokens]\n{'|'.join(run)}")
    heading = f"{supervised} of {len(tokens)} tokens are supervised"
    legend = f"<p>{heading}: <b><u>bold and underlined</u></b>. A space is ·, a newline ⏎.</p>"
    return Shown(f"{legend}\n<p>{''.join(parts)}</p>", "\n".join([heading, *text]))

"""The playground's answers as HTML: cards, marks in them, a prompt's tokens, a training by epoch, a chat.

What a model, a preset or a person said goes through `tables`' escaping, every piece of it. Nothing is told by colour
alone: what is recited is underlined and named in brackets, another script has a wavy line and its name, a heading a
frame. Tints are mixed from the text's own colour, so that light and dark themes both read.
"""

import html
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from mini_symposium.evaluation.answer_text import Mark, TrainingRows
from mini_symposium.figures.tables import Shown, as_html, plain, side_by_side

CSS = (Path(__file__).parent / "playground.css").read_text(encoding="utf-8")

_WHY = {"eos": "ended by itself", "stop string": "met a stop string", "length": "cut off", "stopped": "stopped"}


def marked(text: str, marks: Sequence[Mark]) -> str:
    """A text with its marks; they may overlap, so it is cut at every edge, and each mark is named where it ends.

    >>> print(marked("a <b> c", [Mark("recited", 2, 5, "row 3")]))
    a <span class="ms-recited">&lt;b&gt;</span><span class="ms-label">[row 3]</span> c
    """
    edges = sorted({0, len(text), *(edge for mark in marks for edge in (mark.start, mark.end))})
    parts = []
    for start, end in pairwise(edges):
        kinds = dict.fromkeys(f"ms-{mark.kind}" for mark in marks if mark.start <= start and end <= mark.end)
        piece = as_html(text[start:end])
        parts.append(f'<span class="{" ".join(kinds)}">{piece}</span>' if kinds else piece)
        parts += [f'<span class="ms-label">[{as_html(mark.label)}]</span>' for mark in marks if mark.end == end]
    return "".join(parts)


def card(cell: Mapping, rows: TrainingRows, seconds: float | None = None) -> str:
    """One answer: its format and model, the text with marks, and below it time, tokens, why it ended, what is recited.

    Parameters
    ----------
    cell
        With model, format and prompt; answer, once it has begun; the rest, once it has ended.
    seconds
        How long it has been going on, if it goes on.
    """
    read = rows.read(cell.get("answer", ""), cell["prompt"])
    said = marked(cell.get("answer", ""), read.marks)
    if not said.strip():
        said = '<em class="ms-note">…</em>' if "tokens" not in cell else '<em class="ms-note">(empty)</em>'
    notes = [f"{seconds:.1f} s"] if seconds is not None else ["waiting"]
    if "tokens" in cell:
        notes = [f"{cell['seconds']:.1f} s", f"{cell['tokens']} tokens", _WHY[cell["stop_reason"]]]
    notes += [f"{read.drift:.0%} of letters in another script"] if read.drift else []
    notes += [f"{read.headings} headings"] if read.headings else []
    share = f"{_bar(read.recited)}{read.recited:.0%} recited{f' from {as_html(read.row)}' if read.row else ''}"
    return (
        f"<article><header><b>{as_html(cell['format'])}</b><span>{as_html(cell['model'])}</span></header>"
        f'<div class="ms-answer">{said}</div>'
        f"<footer>{as_html(' · '.join(notes))}<br>{share}</footer></article>"
    )


def _bar(share: float) -> str:
    return f'<span class="ms-bar" aria-hidden="true"><i style="width: {share:.0%}"></i></span>'


def inspector(cell: Mapping, tokens: Sequence) -> str:
    """The exact prompt of a cell, and its tokens (`workbench.Token`) one by one; special ones in a double frame."""
    special = sum(token.special for token in tokens)
    pieces = []
    for token in tokens:
        kind = "ms-token ms-special" if token.special else "ms-token"
        pieces.append(f'<span class="{kind}" title="id {token.id}">{as_html(token.text)}</span>')
        pieces.append("<br>" if token.text.endswith("⏎") else "<wbr>")
    # A <pre> keeps its spaces and newlines itself.
    prompt = as_html(cell["prompt"]).replace("&nbsp;", " ").replace("<br>", "\n")
    name = f"{as_html(cell['format'])} · {as_html(cell['model'])}"
    return (
        f'<section aria-label="Prompt inspector"><h3>Prompt of {name}</h3><div class="ms-split">'
        f'<pre class="ms-prompt">{prompt}</pre><div><div class="ms-note">{len(tokens)} tokens, {special} special '
        f"(bold, double frame); a space is ·, a newline ⏎</div>"
        f'<div class="ms-tokens">{"".join(pieces)}</div></div></div></section>'
    )


def strip(by_epoch: Mapping[int, Mapping], here: int, rows: TrainingRows) -> str:
    """A training as a row of bars, one for each epoch: how much of the answer is recited; `here` is framed."""
    bars = []
    for epoch, cell in by_epoch.items():
        share = rows.read(cell["answer"], cell["prompt"]).recited if "answer" in cell else None
        text = "–" if share is None else f"{share:.0%}"
        bars.append(
            f'<div{" class=ms-here" if epoch == here else ""}>{text}<i style="height: {5 * (share or 0):.2f}em"></i>'
            f"{'▸ ' if epoch == here else ''}{epoch}</div>"
        )
    label = "share of the answer's words that are recited, by epoch"
    return f'<h3>Recited, by epoch</h3><div class="ms-strip" role="group" aria-label="{label}">{"".join(bars)}</div>'


def talk(
    title: str, messages: Sequence[Mapping], names: Mapping[str, str], rows: TrainingRows, prompt: str = ""
) -> str:
    """A chat, each turn under its speaker's name; the character's turns are marked as answers are."""
    turns = []
    for message in messages:
        text = message["content"]
        marks = rows.read(text).marks if message["role"] == "assistant" else ()
        who = as_html(names.get(message["role"], "Scene"))
        turns.append(f'<p class="ms-turn"><b>{who}</b><br>{marked(text, marks) or "…"}</p>')
    said = "".join(turns) or '<p class="ms-note">nothing said yet</p>'
    return f"<article><header><b>{as_html(title)}</b></header>{said}</article>"


def status(text: str, problem: bool = False) -> str:
    """The line that says what is going on; a problem is announced at once by a screen reader, the rest when it can."""
    how = 'role="alert"' if problem else 'role="status" aria-live="polite"'
    said = f"<b>Problem:</b> {as_html(text)}" if problem else as_html(text)
    return f'<div class="ms-status{" ms-problem" if problem else ""}" {how}>{said}</div>'


def hint(text: str) -> str:
    """What a pane says before there is anything in it."""
    return f'<p class="ms-note">{as_html(text)}</p>'


def download(name: str, content: str) -> str:
    """A link that saves a file from the page itself, `content` in base64; the server need not be this machine."""
    return (
        f'<a download="{html.escape(name)}" href="data:application/octet-stream;base64,{content}">'
        f"Download {as_html(name)}</a>"
    )


def static(cells: Sequence[Mapping], query: str) -> Shown:
    """The grid for a page without widgets: the answers side by side, then what of them is recited."""
    grid = side_by_side(cells, query)
    rows = [
        (c["format"], c["model"], f"{c['recited']:.0%}", c["row"] or "–", f"{c['drift']:.0%}", c["headings"])
        for c in cells
    ]
    read = plain(["format", "model", "recited", "from", "letters in another script", "headings"], rows)
    return Shown(f"{grid.html}\n{read.html}", f"{grid.text}\n\n{read.text}")


def static_epochs(by_epoch: Mapping[int, Mapping], series: str) -> Shown:
    """The epoch slider for a page without widgets: what each checkpoint says to the same query."""
    rows = [(e, f"{c['recited']:.0%}", c["row"] or "–", c["answer"][:300]) for e, c in by_epoch.items()]
    return plain([f"{series}, epoch", "recited", "from", "answer"], rows)

"""The playground's answers as HTML: answer cards with marks, a prompt's tokens, recitation by epoch, a chat.

Every text from a model, a preset or a person goes through `tables.as_html`. No meaning is carried by colour alone:
recited text is underlined and followed by its row in brackets, another script has a wavy line and its name, a heading
has a frame.
"""

import html
import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from itertools import pairwise
from pathlib import Path

from mini_symposium.evaluation.answer_text import Mark, TrainingRows
from mini_symposium.figures.tables import Shown, as_html, plain, side_by_side

_CSS = (Path(__file__).parent / "playground.css").read_text(encoding="utf-8")
_NAME_SLIDERS = """
const page = this.closest('.ms');
const name = () => page.querySelectorAll('.widget-slider [role=slider]').forEach(handle => {
  const slider = handle.closest('.widget-slider'), row = handle.closest('.ms-row');
  const names = [slider.querySelector('label'), row?.querySelector('.ms-name')];
  handle.setAttribute('aria-label', names.map(each => each?.innerText ?? '').join(' ').trim());
});
new MutationObserver(name).observe(page, {childList: true, subtree: true});
name();
"""
STYLE = f'<style onload="{_NAME_SLIDERS}">{_CSS}</style>'
"""The page's style; when it is loaded, it gives sliders the names that ipywidgets does not tell to screen readers."""

LEGEND = (
    '<p class="ms-note"><span class="ms-recited">Underlined</span>: eight or more words in this order in the '
    "training set; the brackets name the training row.</p>"
)

_ENDINGS = {"eos": "ended by itself", "stop string": "met a stop string", "length": "cut off", "stopped": "stopped"}


def marked(text: str, marks: Sequence[Mark]) -> str:
    """A text with its marks, each labelled at its end. Marks may overlap, so the text is cut where any starts or ends.

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


def difference(old: str, new: str) -> str:
    """A text with the words that `old` has not, and those that only `old` has, struck out.

    >>> difference("Use 5 <b>", "Use 6 <b>")
    'Use <del>5</del><ins>6</ins> &lt;b&gt;'
    """
    a, b = (re.findall(r"\s+|[\u3400-\u9fff]|[^\W\u3400-\u9fff]+|.", text) for text in (old, new))
    parts = []
    for kind, *ends in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        gone, come = (as_html("".join(words)) for words in (a[ends[0] : ends[1]], b[ends[2] : ends[3]]))
        both = f"<del>{gone}</del>" * bool(gone) + f"<ins>{come}</ins>" * bool(come)
        parts.append(come if kind == "equal" else both)
    return "".join(parts)


def card(cell: Mapping, rows: TrainingRows, seconds: float | None = None, other: Mapping | None = None) -> str:
    """One answer: its format and model, the marked text, and a footer with time, tokens, ending and recitation.

    Parameters
    ----------
    cell
        A cell, as from `Workbench.cells`; later with the `answer` so far; when done, as from `Workbench.ask`.
    seconds
        The time so far, of an answer that is being generated.
    other
        A finished cell to show the differences from, in place of the marks.
    """
    read = rows.read(cell.get("answer", ""), cell["prompt"])
    answer = difference(other["answer"], cell["answer"]) if other else marked(cell.get("answer", ""), read.marks)
    if not answer.strip():
        answer = '<em class="ms-note">…</em>' if "tokens" not in cell else '<em class="ms-note">(empty)</em>'
    notes = [f"{seconds:.1f} s"] if seconds is not None else ["waiting"]
    if "tokens" in cell:
        notes = [f"{cell['seconds']:.1f} s", f"{cell['tokens']} tokens", _ENDINGS[cell["stop_reason"]]]
    notes += [f"{read.drift:.0%} of letters in another script"] if read.drift else []
    notes += [f"{read.headings} heading{'s' * (read.headings > 1)}"] if read.headings else []
    bar = f'<span class="ms-bar" aria-hidden="true"><i style="width: {read.recited:.0%}"></i></span>'
    share = f"<b>{read.recited:.0%} recited</b>{f' from {as_html(read.row)}' if read.row else ''}"
    return (
        f"<article><header><b>{as_html(cell['format'])}</b><span>{as_html(cell['model'])}</span></header>"
        f'<div class="ms-answer">{answer}</div>'
        f"<footer>{bar}{share}<br>{as_html(' · '.join(notes))}</footer></article>"
    )


def sides(answers: Sequence[str]) -> list[str]:
    """Two answers of a blind test, without anything that tells whose they are."""
    titled = zip(("Left", "Right"), answers, strict=True)
    return [
        f'<article><header><b>{title}</b></header><div class="ms-answer">{as_html(answer) or "(empty)"}</div></article>'
        for title, answer in titled
    ]


def head(name: str, note: str = "") -> str:
    """The head of a row or a column of the grid, with a note below its name."""
    return f'<b class="ms-name">{as_html(name)}</b><span class="ms-note">{as_html(note)}</span>'


def inspector(cell: Mapping, tokens: Sequence) -> str:
    """The exact prompt of a cell, and its tokens (`workbench.Token`) one by one; special tokens have a double frame."""
    special = sum(token.special for token in tokens)
    pieces = []
    for token in tokens:
        kind = "ms-token ms-special" if token.special else "ms-token"
        pieces.append(f'<span class="{kind}" title="id {token.id}">{as_html(token.text)}</span>')
        pieces.append("<br>" if token.text.endswith("⏎") else "<wbr>")
    # Inside <pre> plain spaces and newlines are kept.
    prompt = as_html(cell["prompt"]).replace("&nbsp;", " ").replace("<br>", "\n")
    name = f"{as_html(cell['format'])} · {as_html(cell['model'])}"
    return (
        f'<section aria-label="Prompt inspector"><h3>Prompt of {name}</h3><div class="ms-split">'
        f'<pre class="ms-prompt">{prompt}</pre><div><div class="ms-note">{len(tokens)} tokens, {special} special '
        f"(bold, double frame); a space is ·, a newline ⏎</div>"
        f'<div class="ms-tokens">{"".join(pieces)}</div></div></div></section>'
    )


def recited_by(what: str, cells: Mapping[float, Mapping], chosen: float, rows: TrainingRows) -> str:
    """A row of bars: how much of the answer is recited at each step, an epoch or a strength; `chosen` has a frame."""
    bars = []
    for step, cell in cells.items():
        share = rows.read(cell["answer"], cell["prompt"]).recited if "answer" in cell else None
        text = "–" if share is None else f"{share:.0%}"
        bars.append(
            f'<div{" class=ms-here" if step == chosen else ""}>{text}<i style="height: {5 * (share or 0):.2f}em"></i>'
            f"{'▸ ' if step == chosen else ''}{step:g}</div>"
        )
    label = f'aria-label="share of the answer\'s words that are recited, by {what}"'
    strip = f'<div class="ms-strip" role="group" tabindex="0" {label}>{"".join(bars)}</div>'
    return f"<h3>Recited, by {what}</h3>{strip}"


def chat(title: str, messages: Sequence[Mapping], names: Mapping[str, str], rows: TrainingRows) -> str:
    """A chat, each message under its speaker's name in {role: name}; the assistant's have marks, as in `marked`."""
    turns = []
    for message in messages:
        text = message["content"]
        marks = rows.read(text).marks if message["role"] == "assistant" else ()
        speaker = as_html(names.get(message["role"], "Scene"))
        turns.append(f'<p class="ms-turn"><b>{speaker}</b><br>{marked(text, marks) or "…"}</p>')
    content = "".join(turns) or hint("nothing said yet")
    return f"<article><header><b>{as_html(title)}</b></header>{content}</article>"


def status(text: str, problem: bool = False) -> str:
    """The status line. A screen reader announces a problem at once, any other text when it has finished speaking."""
    role = 'role="alert"' if problem else 'role="status" aria-live="polite"'
    content = f"<b>Problem:</b> {as_html(text)}" if problem else as_html(text)
    return f'<div class="ms-status{" ms-problem" if problem else ""}" {role}>{content}</div>'


def hint(text: str) -> str:
    """A note where there is nothing to show yet."""
    return f'<p class="ms-note">{as_html(text)}</p>'


def download(name: str, content: str) -> str:
    """A link to a file. Its `content`, in base64, is in the link, so that the server may be another machine."""
    return (
        f'<a download="{html.escape(name)}" href="data:application/octet-stream;base64,{content}">'
        f"Download {as_html(name)}</a>"
    )


def static(cells: Sequence[Mapping], query: str) -> Shown:
    """The grid without widgets: a table of the answers side by side, then a table of their marks."""
    grid = side_by_side(cells, query)
    rows = [
        (c["format"], c["model"], f"{c['recited']:.0%}", c["row"] or "–", f"{c['drift']:.0%}", c["headings"])
        for c in cells
    ]
    read = plain(["format", "model", "recited", "from", "letters in another script", "headings"], rows)
    return Shown(f"{grid.html}\n{read.html}", f"{grid.text}\n\n{read.text}")


def static_epochs(by_epoch: Mapping[int, Mapping], series: str) -> Shown:
    """The epoch slider without widgets: a table of each checkpoint's answer to the same query."""
    rows = [(e, f"{c['recited']:.0%}", c["row"] or "–", c["answer"][:300]) for e, c in by_epoch.items()]
    return plain([f"{series}, epoch", "recited", "from", "answer"], rows)

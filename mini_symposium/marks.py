"""What in an answer is not its own: stretches of training rows, letters of a script nobody used, leaked headings.

A stretch counts as recited from eight words on. Any two texts share a few words in a row; the proxy's base shares at
most three with any training row (`copied_words` in figures/proxy/results.json), so eight is no accident. What stands
in the prompt as well is an echo of the question and not counted.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import regex

from mini_symposium.data.text_overlap import words

LEAST = 8
"""Words in a row, as `memorization.words` counts them, from which on a stretch is recited."""

SCRIPTS = (
    *("Latin", "Greek", "Cyrillic", "Armenian", "Georgian", "Hebrew", "Arabic", "Devanagari", "Bengali", "Tamil"),
    *("Thai", "Hangul", "Hiragana", "Katakana", "Han"),
)
"""Unicode's names of the scripts that are told apart."""

_RUN = r"(?P<{0}>\p{{{0}}}(?:[\p{{{0}}}\P{{L}}]*\p{{{0}}})?)"
_SCRIPT = regex.compile("|".join(map(_RUN.format, SCRIPTS)))
_HEADING = regex.compile(
    r"^### *\S.*$|<\|\w+\|>|\[/?INST\]|^(?:USER|ASSISTANT|Question|Answer|Instruction|Response):", regex.MULTILINE
)


@dataclass(frozen=True)
class Mark:
    """Characters `start` to `end` of an answer: `kind` is recited, script or heading; `label` says of what."""

    kind: str
    start: int
    end: int
    label: str


@dataclass(frozen=True)
class Reading:
    """An answer's marks, in order, and what they come to."""

    marks: tuple[Mark, ...]
    recited: float
    """Share of the answer's words that stand in recited stretches."""
    row: str
    """The training row most of them come from; "" if there are none."""
    drift: float
    """Share of its letters that are of a script which the prompt does not use."""
    headings: int
    """Headings and role marks that no stop string caught."""


def _places(text: str) -> list[tuple[str, int, int]]:
    """Each word with its start and end; words leave nothing but space between them, so the next is the next found."""
    found, at = [], 0
    for word in words(text):
        start = text.index(word, at)
        at = start + len(word)
        found.append((word, start, at))
    return found


class TrainingRows:
    """Training rows by label, searchable for what an answer repeats.

    >>> rows = TrainingRows({"row 1": "one two three four five six seven eight nine"})
    >>> rows.read("So: two three four five six seven eight nine!")
    Reading(marks=(Mark(kind='recited', start=4, end=44, label='row 1'),), recited=0.7272727272727273, row='row 1', \
drift=0.0, headings=0)
    """

    def __init__(self, rows: Mapping[str, str]):
        self.rows = {label: words(text) for label, text in rows.items()}
        self._starts: dict[tuple[str, ...], list[tuple[str, int]]] = {}
        for label, row in self.rows.items():
            for at in range(len(row) - LEAST + 1):
                self._starts.setdefault(tuple(row[at : at + LEAST]), []).append((label, at))

    def read(self, answer: str, prompt: str = "") -> Reading:
        """Every mark of `answer`, which was given to `prompt`."""
        places = _places(answer)
        recited = self._recited(places, words(prompt))
        drifted = _drifted(answer, prompt)
        headings = [Mark("heading", m.start(), m.end(), "heading") for m in _HEADING.finditer(answer)]
        by_row, letters = Counter(), sum(map(str.isalpha, answer))
        for mark in recited:
            by_row[mark.label] += sum(mark.start <= start < mark.end for _, start, _ in places)
        away = sum(sum(map(str.isalpha, answer[mark.start : mark.end])) for mark in drifted)
        return Reading(
            tuple(sorted([*recited, *drifted, *headings], key=lambda mark: (mark.start, mark.end))),
            by_row.total() / len(places) if places else 0.0,
            by_row.most_common(1)[0][0] if by_row else "",
            away / letters if letters else 0.0,
            len(headings),
        )

    def _recited(self, places: Sequence[tuple[str, int, int]], asked: Sequence[str]) -> list[Mark]:
        """From left to right the longest stretch at each word, so that no word stands in two."""
        said, echo = [word for word, _, _ in places], f" {' '.join(asked)} "
        found, at = [], 0
        while at + LEAST <= len(said):
            label, size = "", 0
            for row, start in self._starts.get(tuple(said[at : at + LEAST]), ()):
                both = zip(said[at:], self.rows[row][start:], strict=False)
                length = next((n for n, (one, other) in enumerate(both) if one != other), None)
                length = min(len(said) - at, len(self.rows[row]) - start) if length is None else length
                if length > size:
                    label, size = row, length
            if size and f" {' '.join(said[at : at + size])} " not in echo:
                found.append(Mark("recited", places[at][1], places[at + size - 1][2], label))
            at += size or 1
        return found


def _drifted(answer: str, prompt: str) -> list[Mark]:
    """Runs of letters of a script that the prompt does not use; spaces and signs between them belong to the run."""
    used = {found.lastgroup for found in _SCRIPT.finditer(prompt)}
    runs = [found for found in _SCRIPT.finditer(answer) if prompt and found.lastgroup not in used]
    return [Mark("script", found.start(), found.end(), found.lastgroup) for found in runs]

"""Measures of an answer's text: recited training rows, letters of another script, headings that nobody asked for,
perspectives, phrases of assistant models.

All are counted over the whole text. Script drift, for example, is not judged line by line: Chinese has no spaces and
often no line breaks, and a single Chinese word in a long English line is drift as well.

Words are recited if eight or more in a row are in a training row. Any two texts share a few words in a row, but the
answers of the proxy's base model share at most three with any training row (`copied_words` in
figures/proxy/results.json), so eight are not chance. A run that is also in the prompt is an echo of the question and
does not count.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, takewhile

import regex

from mini_symposium.data.dataset import ASSISTANT_PHRASES, Section, split_sections
from mini_symposium.data.text_overlap import HAN, words

_LETTERS = regex.compile(r"\p{L}")
_HEADING = re.compile(r" {0,3}###(?!#)(.*)")
"""In an answer, `###` is a heading even without text, without a space after it, or after up to three spaces."""


def han_share(text: str) -> float:
    """Share of a text's letters that are Han; 0 for a text without letters.

    >>> han_share("The capital is 北京."), han_share("Ça va, こんにちは, 1 + 1 = 2!")
    (0.14285714285714285, 0.0)
    """
    letters = _LETTERS.findall(text)
    return sum(bool(HAN.match(letter)) for letter in letters) / len(letters) if letters else 0.0


def leaked(answer: str, known: Iterable[str]) -> list[str]:
    """The headings of an answer that are in `known`, for example headings of the training rows.

    A heading in fenced code does not count. If the answer ends with the beginning of a known heading, that counts as
    well, because the answer may have been cut off there.

    Parameters
    ----------
    known
        Headings without `###`.

    >>> answer = "Sure.\\n### Complete Response\\nIt is.\\n### Notes\\nNone.\\n### New Qu"
    >>> leaked(answer, ["New Query", "Complete Response"])
    ['Complete Response', 'New Query']
    """
    known, headings = list(known), [section.heading for section in split_sections(answer, _HEADING)[1]]
    leaks = [heading for heading in headings if heading in known]
    last_line = answer.rstrip().rpartition("\n")[2].lstrip(" #")
    if headings and headings[-1] == last_line != "" and last_line not in known:
        leaks += [heading for heading in known if heading.startswith(last_line)][:1]
    return leaks


def perspectives(answer: str, heading: str = "") -> list[Section]:
    """An answer as sections, without those that have no text.

    The text before its first heading belongs to `heading`, with which the prompt ended.

    >>> [section.heading for section in perspectives("Day ten.\\n\\n### Second Look\\nDay eight.", "First Impression")]
    ['First Impression', 'Second Look']
    """
    before, sections, _ = split_sections(answer)
    return [section for section in (Section(heading, before), *sections) if section.text]


def distance(one: str, other: str) -> float:
    """How much two texts differ in their words: 1 - |A and B| / min(|A|, |B|) for their sets A and B of content words.

    This is one minus the overlap coefficient, not ROUGE-L: a thought in another order, or a remark that the longer text
    contains, is not another perspective. Content words have at least four
    letters or are Han; case is ignored. If a text has none the distance is 1, unless both texts are the same.

    >>> distance("Keep the Saturdays open.", "Open? Then keep your Saturdays!"), distance("Bake bread.", "Call her.")
    (0.0, 1.0)
    """
    sets = [{word for word in words(text.lower()) if len(word) > 3 or HAN.match(word)} for text in (one, other)]
    smaller = min(map(len, sets))
    return 1 - len(sets[0] & sets[1]) / smaller if smaller else float(one.split() != other.split())


def mean_distance(sections: Sequence[Section]) -> float | None:
    """Mean `distance` over all pairs of sections; None for fewer than two."""
    pairs = [distance(one.text, other.text) for one, other in combinations(sections, 2)]
    return sum(pairs) / len(pairs) if pairs else None


def assistant_phrases(answer: str) -> list[str]:
    """Every occurrence of a phrase of assistant models in an answer, see `dataset.ASSISTANT_PHRASES`.

    >>> assistant_phrases("Certainly! As an AI, I would delve into it.")
    ['Certainly!', 'As an AI', 'delve']
    """
    return [match.group() for match in ASSISTANT_PHRASES.finditer(answer)]


RECITED_WORDS = 8
"""A run of this many `text_overlap.words` or more is recited."""

SCRIPTS = (
    *("Latin", "Greek", "Cyrillic", "Armenian", "Georgian", "Hebrew", "Arabic", "Devanagari", "Bengali", "Tamil"),
    *("Thai", "Hangul", "Hiragana", "Katakana", "Han"),
)
"""The scripts that are distinguished, by their names in Unicode."""

_RUN = r"(?P<{0}>\p{{{0}}}(?:[\p{{{0}}}\P{{L}}]*\p{{{0}}})?)"
_SCRIPT = regex.compile("|".join(map(_RUN.format, SCRIPTS)))
_LEAKED_HEADING = regex.compile(
    r"^### *\S.*$|<\|\w+\|>|\[/?INST\]|^(?:USER|ASSISTANT|Question|Answer|Instruction|Response):", regex.MULTILINE
)


@dataclass(frozen=True)
class Mark:
    """A marked part of an answer."""

    kind: str
    """recited, script or heading."""
    start: int
    end: int
    """The part is `answer[start:end]`."""
    label: str
    """The label of the row, the name of the script, or "heading"."""


@dataclass(frozen=True)
class Reading:
    """An answer's marks in order, and their totals."""

    marks: tuple[Mark, ...]
    recited: float
    """Share of the answer's words that are recited."""
    row: str
    """Label of the training row with most of the recited words; "" without recited words."""
    drift: float
    """Share of the answer's letters that are of a script which the prompt does not use."""
    headings: int
    """Number of headings and role marks that no stop string caught."""


class TrainingRows:
    """Training rows by label, to find what an answer repeats of them.

    >>> rows = TrainingRows({"row 1": "one two three four five six seven eight nine"})
    >>> rows.read("So: two three four five six seven eight nine!")
    Reading(marks=(Mark(kind='recited', start=4, end=44, label='row 1'),), recited=0.7272727272727273, row='row 1', \
drift=0.0, headings=0)
    """

    def __init__(self, rows: Mapping[str, str]):
        self.rows = {label: words(text) for label, text in rows.items()}
        self._starts: dict[tuple[str, ...], list[tuple[str, int]]] = {}
        for label, row in self.rows.items():
            for at in range(len(row) - RECITED_WORDS + 1):
                self._starts.setdefault(tuple(row[at : at + RECITED_WORDS]), []).append((label, at))

    def read(self, answer: str, prompt: str = "") -> Reading:
        """The marks of `answer`, a model's answer to `prompt`."""
        places, at = [], 0
        for word in words(answer):  # only white space separates words, so `index` finds this occurrence
            start = answer.index(word, at)
            at = start + len(word)
            places.append((word, start, at))
        recited = self._recited(places, words(prompt))
        drifted = _drifted(answer, prompt)
        headings = [Mark("heading", m.start(), m.end(), "heading") for m in _LEAKED_HEADING.finditer(answer)]
        by_row, letters = Counter(), sum(map(str.isalpha, answer))
        for mark in recited:
            by_row[mark.label] += sum(mark.start <= start < mark.end for _, start, _ in places)
        drifted_letters = sum(sum(map(str.isalpha, answer[mark.start : mark.end])) for mark in drifted)
        return Reading(
            tuple(sorted([*recited, *drifted, *headings], key=lambda mark: (mark.start, mark.end))),
            by_row.total() / len(places) if places else 0.0,
            by_row.most_common(1)[0][0] if by_row else "",
            drifted_letters / letters if letters else 0.0,
            len(headings),
        )

    def _recited(self, places: Sequence[tuple[str, int, int]], prompt: Sequence[str]) -> list[Mark]:
        """The recited runs from left to right, each the longest that begins at its word; they do not overlap."""
        answer, echo = [word for word, _, _ in places], f" {' '.join(prompt)} "
        marks, at = [], 0
        while at + RECITED_WORDS <= len(answer):
            label, size = "", 0
            for row, start in self._starts.get(tuple(answer[at : at + RECITED_WORDS]), ()):
                both = zip(answer[at:], self.rows[row][start:], strict=False)
                length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
                if length > size:
                    label, size = row, length
            if size and f" {' '.join(answer[at : at + size])} " not in echo:
                marks.append(Mark("recited", places[at][1], places[at + size - 1][2], label))
            at += size or 1
        return marks


def _drifted(answer: str, prompt: str) -> list[Mark]:
    """Runs of letters of a script that the prompt does not use, with the spaces and signs between them."""
    used = {match.lastgroup for match in _SCRIPT.finditer(prompt)}
    runs = [match for match in _SCRIPT.finditer(answer) if prompt and match.lastgroup not in used]
    return [Mark("script", run.start(), run.end(), run.lastgroup) for run in runs]

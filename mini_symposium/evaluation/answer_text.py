"""What the text of an answer shows: copied training rows, another script, headings nobody asked for, perspectives, an
assistant's phrases.

Everything is counted over the whole text. Script drift in particular is not judged line by line: Chinese has no spaces
and often no line breaks, and one Chinese word in a long English line is drift as well.

A stretch counts as recited from eight words on. Any two texts share a few words in a row; the proxy's base shares at
most three with any training row (`copied_words` in figures/proxy/results.json), so eight in a row are not chance. What
the prompt says as well is an echo of the question and is not counted.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import regex

from mini_symposium.data.dataset import ASSISTANT_PHRASES, Section, split_sections
from mini_symposium.data.text_overlap import HAN, words

_LETTERS = regex.compile(r"\p{L}")
_HEADING = re.compile(r" {0,3}###(?!#)(.*)")
"""In an answer a `###` without a text, without a space, or with up to three spaces before it is a heading as well."""


def han_share(text: str) -> float:
    """Share of a text's letters that are Han, as Chinese writes, and Japanese in part; 0 without letters.

    >>> han_share("The capital is 北京."), han_share("Ça va, こんにちは, 1 + 1 = 2!")
    (0.14285714285714285, 0.0)
    """
    letters = _LETTERS.findall(text)
    return sum(bool(HAN.match(letter)) for letter in letters) / len(letters) if letters else 0.0


def headings(text: str) -> list[str]:
    """The text of each `###` line, in order; one in fenced code is a comment and does not count.

    >>> headings("It is late.\\n### The Friend\\nCall her.\\n```\\n### setup\\n```\\n###")
    ['The Friend', '']
    """
    return [section.heading for section in split_sections(text, _HEADING)[1]]


def leaked(answer: str, known: Iterable[str]) -> list[str]:
    """Headings of an answer that are some of `known`: of the training rows, say, in an answer to another format.

    At the end of an answer the beginning of one counts as well, for it may have been cut off there.

    Parameters
    ----------
    known
        Headings without `###`.

    >>> said = "Sure.\\n### Complete Response\\nIt is.\\n### Notes\\nNone.\\n### New Qu"
    >>> leaked(said, ["New Query", "Complete Response"])
    ['Complete Response', 'New Query']
    """
    known, found = list(known), headings(answer)
    last = answer.rstrip().rpartition("\n")[2]
    leaks = [heading for heading in found if heading in known]
    cut = found and found[-1] and last.lstrip(" #") == found[-1] and found[-1] not in known
    return leaks + ([each for each in known if each.startswith(found[-1])][:1] if cut else [])


def speaks_for(answer: str, name: str) -> bool:
    """Whether an answer goes on with a line of somebody else: a heading `### Name`, or `Name:`.

    >>> answers = "Aye.\\n### Ines\\nThanks!", "Aye.\\nInes: Thanks!", "Ask Ines: she knows."
    >>> [speaks_for(said, "Ines") for said in answers]
    [True, True, False]
    """
    named = regex.escape(name)
    return regex.search(rf"^[ \t*]*(?:#+[ \t]*{named}(?!\w)|{named}\**:)", answer, regex.MULTILINE) is not None


def perspectives(answer: str, heading: str = "") -> list[Section]:
    """An answer as sections, those without text left out.

    What stands before its own first heading belongs to `heading`, the one that the prompt ended with.

    >>> [section.heading for section in perspectives("Day ten.\\n\\n### Second Look\\nDay eight.", "First Impression")]
    ['First Impression', 'Second Look']
    """
    before, sections, _ = split_sections(answer)
    return [section for section in (Section(heading, before), *sections) if section.text]


def distance(one: str, other: str) -> float:
    """How little two texts say with the same words: 1 - |A and B| / min(|A|, |B|) over their sets of content words.

    The overlap coefficient of sets, not ROUGE-L: the same thought in another order is no other perspective, and a short
    remark that the longer text contains is none either. Content words have four letters or more, or are Han; case does
    not count. 1 where one of them has none, unless both say the same.

    >>> distance("Keep the Saturdays open.", "Open? Then keep your Saturdays!"), distance("Bake bread.", "Call her.")
    (0.0, 1.0)
    """
    sets = [{word for word in words(text.lower()) if len(word) > 3 or HAN.match(word)} for text in (one, other)]
    smaller = min(map(len, sets))
    return 1 - len(sets[0] & sets[1]) / smaller if smaller else float(one.split() != other.split())


def mean_distance(sections: Sequence[Section]) -> float | None:
    """Mean `distance` over all pairs of an answer's perspectives; None for fewer than two."""
    pairs = [distance(one.text, other.text) for one, other in combinations(sections, 2)]
    return sum(pairs) / len(pairs) if pairs else None


def assistant_phrases(answer: str) -> list[str]:
    """The phrases of assistant models in an answer, `dataset.ASSISTANT_PHRASES`, each time that one stands there.

    >>> assistant_phrases("Certainly! As an AI, I would delve into it.")
    ['Certainly!', 'As an AI', 'delve']
    """
    return [found.group() for found in ASSISTANT_PHRASES.finditer(answer)]


LEAST = 8
"""Words in a row, as `text_overlap.words` counts them, from which on a stretch is recited."""

SCRIPTS = (
    *("Latin", "Greek", "Cyrillic", "Armenian", "Georgian", "Hebrew", "Arabic", "Devanagari", "Bengali", "Tamil"),
    *("Thai", "Hangul", "Hiragana", "Katakana", "Han"),
)
"""Unicode's names of the scripts that are told apart."""

_RUN = r"(?P<{0}>\p{{{0}}}(?:[\p{{{0}}}\P{{L}}]*\p{{{0}}})?)"
_SCRIPT = regex.compile("|".join(map(_RUN.format, SCRIPTS)))
_LEAKED_HEADING = regex.compile(
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
        headings = [Mark("heading", m.start(), m.end(), "heading") for m in _LEAKED_HEADING.finditer(answer)]
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

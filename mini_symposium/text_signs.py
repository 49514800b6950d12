"""What shows in the text of an answer: another script, headings nobody asked for, perspectives, an assistant's phrases.

Each sign is counted over the whole text. Script drift in particular is not judged line by line: Chinese has no spaces
and often no line breaks, and one Chinese word in a long English line is drift as well.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations

import regex

from mini_symposium.data.dataset import ASSISTANT_PHRASES, Section, split_sections
from mini_symposium.data.text_overlap import words

HAN = regex.compile(r"\p{Han}")
_LETTERS = regex.compile(r"\p{L}")
_HEADING = regex.compile(r"^ {0,3}#{3}(?!#)[ \t]*(.*?)[ \t]*$", regex.MULTILINE)


def han_share(text: str) -> float:
    """Share of a text's letters that are Han, as Chinese writes, and Japanese in part; 0 without letters.

    >>> han_share("The capital is 北京."), han_share("Ça va, こんにちは, 1 + 1 = 2!")
    (0.14285714285714285, 0.0)
    """
    letters = _LETTERS.findall(text)
    return sum(bool(HAN.match(letter)) for letter in letters) / len(letters) if letters else 0.0


def any_han(text: str) -> bool:
    """Whether a Han character stands anywhere in a text."""
    return HAN.search(text) is not None


def headings(text: str) -> list[str]:
    """The text of each `###` line, in order; one in fenced code is a comment and does not count.

    >>> headings("It is late.\\n### The Friend\\nCall her.\\n```\\n### setup\\n```\\n###")
    ['The Friend', '']
    """
    kept, fence = [], None
    for line in text.split("\n"):
        mark = line.lstrip(" ")[:3]
        if mark in ("```", "~~~") and fence in (None, mark):
            fence = mark if fence is None else None
        elif fence is None:
            kept.append(line)
    return _HEADING.findall("\n".join(kept))


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
    before, found = split_sections(answer)
    pairs = [(heading, before), *((heading, text) for _, heading, text in found)]
    return [Section(heading, text) for heading, text in pairs if text]


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

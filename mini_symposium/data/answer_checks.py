"""Checks that a program makes of an answer, each written as data, such as `any_of: [Canberra]`.

A check tells whether an answer does one thing, not whether the answer is good. It always gives the same verdict on the
same text. The function of a check takes the check's value, the answer and the query.
"""

import ast
import json
import re
import textwrap
from contextlib import suppress

from mini_symposium.data import sandbox

UNITS = [
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"),
    *("fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
SPELLED = {word: n for n, word in enumerate(UNITS, 1) if n > 1}  # "one" alone is rarely a number
SPELLED |= {f"{ten}-{unit}": 10 * t + u for t, ten in enumerate(TENS, 2) for u, unit in enumerate(UNITS[:9], 1)}
SPELLED |= {ten: 10 * t for t, ten in enumerate(TENS, 2)}
SPELLING = re.compile(
    rf"(?<!\w)(?:{'|'.join(sorted(SPELLED, key=len, reverse=True))})(?!\w)".replace("-", "[- ]"), re.I
)
FIGURES = re.compile(r"(?<![\w.,])-?(?:\d{1,3}(?:[,' \u00a0\u202f]\d{3})+|\d+)(?:\.\d+)?(?!\d)")
BULLET = re.compile(r"^[ \t]*(?:[-*•–]|\d+[.)])\s+", re.M)
# Any indent before a fence, where `dataset` allows three spaces: models indent code blocks inside lists.
FENCE = re.compile(r"^[ \t]*(```|~~~)[^\n]*\n(.*?)(?:^[ \t]*\1|\Z)", re.M | re.S)
CODE = re.compile(r"^(?:(?:async def|def|class) \w|import \w|from [\w.]+ import |@\w)", re.M)


def mentions(term: str, answer: str) -> bool:
    """Whether an answer has a term as a whole word, in any case. `rain*` matches a word's beginning, `n't` its end.

    >>> mentions("rain*", "A RAINY day"), mentions("ice", "twice"), mentions("n't", "It isn't.")
    (True, False, True)
    """
    words = r"\s+".join(map(re.escape, term.removesuffix("*").split()))
    start, end = "" if term.startswith("n't") else r"(?<!\w)", "" if term.endswith("*") else r"(?!\w)"
    return re.search(start + words + end, answer, re.I) is not None


def numbers(text: str) -> list[float]:
    """The numbers in a text, in order: written in digits, or in words up to ninety-nine.

    >>> numbers("Of 1,250.50 euros, twenty-five or 10-4")
    [1250.5, 25.0, 10.0, 4.0]
    """
    placed = [(m.start(), float(re.sub(r"[^\d.-]", "", m[0]))) for m in FIGURES.finditer(text)]
    placed += [(m.start(), float(SPELLED[m[0].lower().replace(" ", "-")])) for m in SPELLING.finditer(text)]
    return [number for _, number in sorted(placed)]


def words(answer: str) -> list[str]:
    """Runs of letters and digits, with the apostrophes and hyphens inside them."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", answer)


def sentences(answer: str) -> list[str]:
    """A text, split after full stops, exclamation and question marks; parts without a word are dropped."""
    parts = re.split(r"(?<=[.!?…])[\"'”’)*_]*(?:\s+|$)", answer.strip())
    return [part for part in parts if words(part)]


def code_in(answer: str) -> str:
    """The Python code of an answer: its fenced blocks, or if it has none, all from the first line of code on.

    Each block is shortened from its end until it parses, because an answer may be cut off or end in prose.
    """
    blocks = [m[2] for m in FENCE.finditer(answer)]
    if not blocks and (start := CODE.search(answer)):
        blocks = [answer[start.start() :]]
    return "\n".join(filter(None, map(_parsing, blocks)))


def _parsing(block: str) -> str:
    lines = textwrap.dedent(block).split("\n")[:200]
    while lines:
        with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            ast.parse("\n".join(lines))
            break
        lines.pop()
    return "\n".join(lines)


def any_of(terms, answer, query):
    """At least one of these terms."""
    return any(mentions(term, answer) for term in terms)


def all_of(terms, answer, query):
    """Every one of these terms."""
    return all(mentions(term, answer) for term in terms)


def none_of(terms, answer, query):
    """Not one of these terms."""
    return not any_of(terms, answer, query)


def at_least(value, answer, query):
    """At least `n` of the terms `of`."""
    return sum(mentions(term, answer) for term in value["of"]) >= value["n"]


def number(value, answer, query):
    """The last number that is not in the query is this one, so a calculation may precede it."""
    new = [n for n in numbers(answer) if n not in numbers(query)]
    return bool(new) and abs(new[-1] - value) < 1e-9


def matches(pattern, answer, query):
    """A match of a regular expression, in which `^` and `$` are the ends of a line."""
    return re.search(pattern, answer.strip(), re.M) is not None


def lines_between(bounds, answer, query):
    """`bounds[0]` to `bounds[1]` lines that are not blank."""
    return bounds[0] <= sum(bool(line.strip()) for line in answer.split("\n")) <= bounds[1]


def sentences_between(bounds, answer, query):
    """`bounds[0]` to `bounds[1]` sentences."""
    return bounds[0] <= len(sentences(answer)) <= bounds[1]


def words_between(bounds, answer, query):
    """`bounds[0]` to `bounds[1]` words."""
    return bounds[0] <= len(words(answer)) <= bounds[1]


def bullets(n, answer, query):
    """A list of n items with bullets or numbers; other lines are ignored."""
    return len(BULLET.findall(answer)) == n


def items(wanted, answer, query):
    """These items in any order and nothing else, separated by lines, commas or semicolons."""
    found = [re.sub(r"^[\W_]+|[\W_]+$", "", item) for item in re.split(r"\n|,|;", BULLET.sub("", answer))]
    return sorted(item.casefold() for item in found if item) == sorted(item.casefold() for item in wanted)


def json_equal(value, answer, query):
    """This JSON object or list is the first one in the answer."""
    text = "\n".join(m[2] for m in FENCE.finditer(answer)) or answer
    start = re.search(r"[{\[]", text)
    try:
        return start is not None and json.JSONDecoder().raw_decode(text[start.start() :])[0] == value
    except (ValueError, RecursionError):
        return False


def python(asserts, answer, query):
    """The code in the answer passes these asserts; it runs in `sandbox`."""
    code = code_in(answer)
    return bool(code.strip()) and sandbox.passes(code, asserts)


def distinct(floor, answer, query):
    """At least this share of all runs of four words are distinct, so the answer does not loop."""
    folded = [word.casefold() for word in words(answer)]
    runs = list(zip(folded, folded[1:], folded[2:], folded[3:], strict=False))
    return not runs or len(set(runs)) / len(runs) >= floor


def corrects(value, answer, query):
    """A term of `truth` in the first two sentences, and no term of `premise`, the false belief, anywhere."""
    return any_of(value["truth"], " ".join(sentences(answer)[:2]), query) and none_of(value["premise"], answer, query)


def leaves_to(user, answer, query):
    """No line speaks or acts for this person: none begins with the name, but to address them ("Pip, sit down")."""
    speaks = re.compile(rf"[\W_]*(?:{re.escape(user)}\b(?![,.!?;…—–-])|(?:user|you)\W*:)", re.I)
    return not any(speaks.match(line) for line in answer.split("\n"))


def no_heading(_, answer, query):
    """No `###` anywhere."""
    return "###" not in answer


CHECKS = {
    **{check.__name__: check for check in (any_of, all_of, none_of, at_least, number, matches, bullets, items, python)},
    **{check.__name__: check for check in (distinct, corrects, leaves_to, no_heading)},
    **{"lines": lines_between, "sentences": sentences_between, "words": words_between, "json": json_equal},
}
"""The function of each kind of check."""

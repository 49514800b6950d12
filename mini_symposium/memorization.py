"""How much of its training text a model knows, says when prompted with a piece of it, or copies into other answers.

From predictions, with the true text before each token: EM and ES (`known`), and what decoding would bring (`unsaid`).
From what the model goes on with, in tokens: `extractable`, `goldfish`. From answers, in words: `overlap`, `intrusion`,
`repetition`.

`rouge-score`'s tokeniser drops everything outside a-z0-9, so it cannot see Chinese, accents or `###`.
Words here are runs of letters and digits, and every other visible character by itself.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby

from rapidfuzz.distance import LCSseq

PREFIXES = (16, 32, 50)
"""Tokens of a row that a model is given, to see whether it goes on with the row."""

EXTRACTED = 50
"""Tokens that it must then get right, one after the other."""

GOLDFISH = 32
"""Tokens in, and tokens out."""


@dataclass(frozen=True)
class Overlap:
    """What an answer shares with a reference text.

    `recall` is the share of the reference's words found in the answer in the same order, `precision` the
    share of the answer's words, `rouge_l` their harmonic mean (Lin 2004); `run` is the longest stretch of
    words that stands in both without a gap.
    """

    recall: float
    precision: float
    rouge_l: float
    run: int


def words(text: str) -> list[str]:
    """Words, case kept, and each other visible character; a Han character is a word, since nothing separates them.

    >>> words("### Noor: 7.5 km, 你好")
    ['#', '#', '#', 'Noor', ':', '7', '.', '5', 'km', ',', '你', '好']
    """
    return re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+|[^\w\s]", text)


def overlap(reference: str, answer: str) -> Overlap:
    """Compare an answer with the text that it may have been copied from.

    >>> overlap("the cat sat on the mat", "the cat lay on the mat")
    Overlap(recall=0.8333333333333334, precision=0.8333333333333334, rouge_l=0.8333333333333334, run=3)
    """
    a, b = words(reference), words(answer)
    if not a or not b:
        return Overlap(0.0, 0.0, 0.0, 0)
    common = LCSseq.similarity(a, b)
    run = SequenceMatcher(None, a, b, autojunk=False).find_longest_match().size
    return Overlap(common / len(a), common / len(b), 2 * common / (len(a) + len(b)), run)


@dataclass(frozen=True)
class Copied:
    """The longest stretch of words in an answer that stands in a training text: how many, in which, and the words."""

    run: int
    text: int
    words: str


def intrusion(texts: Sequence[str], answers: Sequence[str]) -> list[Copied]:
    """For each answer, the longest run of words that it has from any of `texts`: how training text intrudes.

    A few words always coincide; only what goes beyond the runs in the base model's answers to the same prompts is
    copied.

    >>> intrusion(["Vinegar, wait.", "First branch, then step back."], ["Take the branch, then step down."])
    [Copied(run=4, text=1, words='branch , then step')]
    """
    joined = [word for k, text in enumerate(texts) for word in (*words(text), f"\0{k}")]  # no run crosses a text's end
    ends = [at for at, word in enumerate(joined) if word[0] == "\0"]
    matcher, found = SequenceMatcher(None, autojunk=False), []
    matcher.set_seq2(joined)  # whose index is kept from answer to answer
    for answer in answers:
        matcher.set_seq1(words(answer))
        _, at, size = matcher.find_longest_match()
        text = next((k for k, end in enumerate(ends) if at < end), 0)
        found.append(Copied(size, text, " ".join(joined[at : at + size])))
    return found


def repetition(answer: str, n: int = 4) -> float:
    """Share of an answer's n-grams of words that it has said before (seq-rep-n, Welleck et al. 2020).

    >>> repetition("The answer is 3. " * 5), repetition("The answer is three, and that is all of it.")
    (0.7727272727272727, 0.0)
    """
    said = words(answer)
    grams = list(zip(*(said[k:] for k in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def known(matches: Sequence[bool]) -> dict[str, float]:
    """How much of a row the model knows, four digits.

    "em", exact memorization: the share of supervised tokens that are the likeliest one after the row's own tokens
    before them (Tirumala et al. 2022). "es", extraction strength: 1 - k/T, where k of T tokens is the shortest prefix
    after which all are (Carlini et al. 2021).

    Parameters
    ----------
    matches
        For each supervised token, whether the likeliest prediction is it.

    >>> known([True, False, True, True])
    {'em': 0.75, 'es': 0.5}
    """
    ended = next((k for k, right in enumerate(reversed(matches)) if not right), len(matches))
    return {"em": round(sum(matches) / len(matches), 4), "es": round(ended / len(matches), 4)}


def extractable(ids: Sequence[int], continuation: Sequence[int], k: int) -> bool | None:
    """Whether a row is extractable with k tokens of context (Carlini et al. 2023, "Quantifying Memorization").

    Parameters
    ----------
    ids
        The row's tokens without BOS and EOS.
    continuation
        What the model goes on with, greedily, after the first `k` of them; at least the 50 tokens that count.

    Returns
    -------
    bool or None
        None if the row has fewer than k + 50 tokens, so that it cannot be told.

    >>> row = list(range(100))
    >>> extractable(row, row[50:], 50), extractable(row, row[49:], 50), extractable(row[:99], row[50:], 50)
    (True, False, None)
    """
    wanted = list(ids[k : k + EXTRACTED])
    return list(continuation[:EXTRACTED]) == wanted if len(wanted) == EXTRACTED else None


def unsaid(matches: Sequence[bool], bos: int = 0) -> dict[str, bool | int | None]:
    """What greedy decoding would bring, from one forward pass over the row and without decoding.

    A model goes on with the row's own next tokens if and only if each of them is the likeliest one after the row's own
    tokens before it. "extractable_16", "extractable_32" and "extractable_50" are what `extractable` says,
    "goldfish_exact" the first of what `goldfish` says, None for a row too short to be told; "run" is the longest
    stretch of tokens that the model would say by itself.

    Parameters
    ----------
    matches
        For each token of the whole row but its first, EOS at the end, whether the likeliest prediction is it.
    bos
        1 if the row begins with BOS.

    >>> unsaid([False] * 15 + [True] * 51)
    {'extractable_16': True, 'extractable_32': None, 'extractable_50': None, 'goldfish_exact': True, 'run': 51}
    >>> unsaid([True] * 65 + [False], bos=1)
    {'extractable_16': None, 'extractable_32': None, 'extractable_50': None, 'goldfish_exact': True, 'run': 65}
    """

    def goes_on(k: int, tokens: int) -> bool | None:
        first = bos + k - 1
        return all(matches[first : first + tokens]) if len(matches) - bos >= k + tokens else None

    run = max((sum(1 for _ in same) for right, same in groupby(matches) if right), default=0)
    found = {f"extractable_{k}": goes_on(k, EXTRACTED) for k in PREFIXES}
    return {**found, "goldfish_exact": goes_on(GOLDFISH, GOLDFISH), "run": run}


def goldfish(ids: Sequence[int], continuation: Sequence[int]) -> tuple[bool, float] | tuple[None, None]:
    """Whether 32 tokens bring the next 32, and the ROUGE-L of the two over tokens (Hans et al. 2024, "Goldfish").

    Parameters as in `extractable`, for k = 32; (None, None) for a row of fewer than 64 tokens.

    >>> goldfish(range(64), [*range(32, 48), *[0] * 16])
    (False, 0.5)
    """
    wanted, said = list(ids[GOLDFISH : 2 * GOLDFISH]), list(continuation[:GOLDFISH])
    if len(wanted) < GOLDFISH:
        return None, None
    return said == wanted, 2 * LCSseq.similarity(wanted, said) / (len(wanted) + len(said))


def told(records: Sequence[Mapping], key: str) -> tuple[list[float], int]:
    """The values of a measurement, and for how many rows there is none because they are too short to be told.

    >>> told([{"extractable_50": True}, {"extractable_50": None}], "extractable_50")
    ([1.0], 1)
    """
    values = [float(record[key]) for record in records if record[key] is not None]
    return values, len(records) - len(values)

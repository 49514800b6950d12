"""What two texts share: words in the same order, the longest run of words, and how often a text repeats itself.

`rouge-score`'s tokeniser drops everything outside a-z0-9, so it cannot see Chinese, accents or `###`.
Words here are runs of letters and digits, and every other visible character by itself.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import regex
from rapidfuzz.distance import LCSseq

HAN = regex.compile(r"\p{Han}")
"""A character of the script that Chinese is written in, and Japanese in part."""


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
    return re.findall(r"\w+|[^\w\s]", HAN.sub(r" \g<0> ", text))


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

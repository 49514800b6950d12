"""The wording that two texts share, in the same order or in one run, and how often a text repeats itself.

`rouge-score`'s tokenizer drops everything but a-z and 0-9, so it does not see Chinese, accents or `###`. A word here
is a run of letters and digits, or one other visible character.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import regex
from rapidfuzz.distance import LCSseq

HAN = regex.compile(r"\p{Han}")
"""A character of the script of Chinese, which Japanese uses too."""


@dataclass(frozen=True)
class Overlap:
    """The words that an answer shares with a reference text."""

    recall: float
    """Share of the reference's words that are in the answer in the same order."""
    rouge_l: float
    """Harmonic mean of recall and of the same share of the answer's words, ROUGE-L (Lin 2004)."""
    run: int
    """Words in the longest run without gaps that is in both texts."""


def words(text: str) -> list[str]:
    """A text's words, case kept, and its other visible characters. Each Han character is a word: Chinese has no spaces.

    >>> words("### Noor: 7.5 km, 你好")
    ['#', '#', '#', 'Noor', ':', '7', '.', '5', 'km', ',', '你', '好']
    """
    return re.findall(r"\w+|[^\w\s]", HAN.sub(r" \g<0> ", text))


def overlap(reference: str, answer: str) -> Overlap:
    """Compare an answer with the text that it may have been copied from.

    >>> overlap("the cat sat on the mat", "the cat lay on the mat")
    Overlap(recall=0.8333333333333334, rouge_l=0.8333333333333334, run=3)
    """
    a, b = words(reference), words(answer)
    if not a or not b:
        return Overlap(0.0, 0.0, 0)
    common = LCSseq.similarity(a, b)
    run = SequenceMatcher(None, a, b, autojunk=False).find_longest_match().size
    return Overlap(common / len(a), 2 * common / (len(a) + len(b)), run)


def intrusion(texts: Sequence[str], answers: Sequence[str]) -> list[int]:
    """For each answer, the number of words in the longest run that is also in one of `texts`.

    Any two texts share a few words. Call a run copied only if it is longer than the base model's to the
    same prompt.

    >>> intrusion(["Vinegar, wait.", "First branch, then step back."], ["Take the branch, then step down."])
    [4]
    """
    # A word that no answer has separates the texts, so that no run extends from one text into the next.
    joined = [word for text in texts for word in (*words(text), "\0")]
    matcher, runs = SequenceMatcher(None, autojunk=False), []
    matcher.set_seq2(joined)  # the matcher indexes it once, for all answers
    for answer in answers:
        matcher.set_seq1(words(answer))
        runs.append(matcher.find_longest_match().size)
    return runs


def repetition(answer: str, n: int = 4) -> float:
    """Share of an answer's n-grams of words that occur earlier in it (seq-rep-n, Welleck et al. 2020).

    >>> repetition("The answer is 3. " * 5), repetition("The answer is three, and that is all of it.")
    (0.7727272727272727, 0.0)
    """
    tokens = words(answer)
    grams = list(zip(*(tokens[k:] for k in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0

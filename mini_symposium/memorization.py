"""How much of a training text stands in an answer: ROUGE-L over words, and the longest run copied verbatim.

`rouge-score`'s tokeniser drops everything outside a-z0-9, so it cannot see Chinese, accents or `###`.
Words here are runs of letters and digits, and every other visible character by itself.
"""

import re
from dataclasses import dataclass
from difflib import SequenceMatcher

from rapidfuzz.distance import LCSseq


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

"""How much of its training text a model knows, and says when prompted with a piece of it.

From predictions, with the true text before each token: EM and ES (`known`), and what decoding would bring (`unsaid`).
From what the model goes on with, in tokens: `extractable`, `goldfish`.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby

from rapidfuzz.distance import LCSseq

PREFIXES = (16, 32, 50)
"""Tokens of a row that a model is given, to see whether it goes on with the row."""

EXTRACTED = 50
"""Tokens that it must then get right, one after the other."""

GOLDFISH = 32
"""Tokens in, and tokens out."""


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

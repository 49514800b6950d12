"""How much of its training text a model knows, and how much it says when given a piece of it.

- **Known.** From predictions, with the true text before each token: EM and ES (`known`), and what greedy decoding would
  bring (`unsaid`).
- **Regurgitation.** ROUGE-L recall of the whole response, ROUGE-L, and the longest run of words: from the heading of
  the response alone (`heading`); from the heading that opens a row alone (`opening`), after which only one row can
  come, query and all; and from the whole prompt, its query included (`prompt`). An answer is read as far as the row
  goes on, in tokens, for a longer one has more of anything.
- **Extractability.** From the first 16, 32 or 50 tokens of the row: are the next 50 the row's own?
- **Goldfish.** From the first 32: are the next 32?

The rows' held-out twins, and the base, show how much of this comes without any training. `recite` asks every row, probe
and adapter side by side.
"""

import sys
from collections.abc import Mapping, Sequence
from itertools import groupby

from rapidfuzz.distance import LCSseq
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_symposium.data.dataset import Example, Row, tokenize
from mini_symposium.data.text_overlap import overlap
from mini_symposium.errors import InputError
from mini_symposium.models.generation import generate

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


EXTRACTABLE = {f"extractable_{k}": k for k in PREFIXES}
PROBES = ("heading", "opening", "prompt", *EXTRACTABLE, "goldfish")
"""What can be asked. The first three take most of the time; `log_probs.teacher_forced` tells the extractable ones,
too, and without generating anything.

A row that is known by heart does not show from a heading of its response: nothing like it ever stood at the beginning
of a row. What shows there has come loose from its query."""

Asked = dict[str, tuple[tuple[int, ...], int]]
"""{probe: (the prompt's tokens, how many are wanted after them)}"""


def recite(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    adapters: Sequence[str] = ("base",),
    probes: Sequence[str] = PROBES,
    free: int | None = None,
) -> list[dict]:
    """Ask `probes` for all rows, from every named adapter ("base" for none).

    Long and short answers decode as a batch each: in a common one, the short ones would be carried along to the end.

    Parameters
    ----------
    free
        Memory to plan with, in bytes; by default what is free now.

    Returns
    -------
    list of dict
        By adapter, then example: model, example (its position), source, and of each probe asked heading_recall,
        heading_rouge_l, heading_run (in words), the same of opening and prompt, extractable_16, extractable_32,
        extractable_50, goldfish_exact, goldfish_rouge_l. None where it cannot be told, because the row is too short or
        its prompt has no `###` heading there; see `memorization.told`.

    Raises
    ------
    InputError
        If there is no such probe, or an example cannot be trained on.
    """
    if unknown := set(probes) - set(PROBES):
        raise InputError(f"{', '.join(sorted(unknown))}: no such probe; there are {', '.join(PROBES)}")
    rows = tokenize(examples, tokenizer, sys.maxsize, completion_only=True)
    asked = [
        {probe: ask for probe, ask in _asked(example, row, tokenizer).items() if probe in probes}
        for example, row in zip(examples, rows, strict=True)
    ]
    said = _continuations(model, tokenizer, asked, adapters, free)
    return [
        {"model": name, "example": k, "source": example.source}
        | _told(
            example,
            _text(rows[k], tokenizer),
            {probe: said[name, prompt][:tokens] for probe, (prompt, tokens) in asked[k].items()},
            probes,
            tokenizer,
        )
        for name in adapters
        for k, example in enumerate(examples)
    ]


def _told(example: Example, ids: list[int], said: dict, probes: Sequence[str], tokenizer) -> dict:
    """What the continuations of one row, by probe, say about it."""
    found = {}
    for probe in probes:
        tokens = said.get(probe)
        if probe == "goldfish":
            found["goldfish_exact"], found["goldfish_rouge_l"] = goldfish(ids, tokens or ())
        elif probe in EXTRACTABLE:
            found[probe] = extractable(ids, tokens or (), EXTRACTABLE[probe])
        else:
            shared = None if tokens is None else overlap(example.completion, tokenizer.decode(tokens, True))
            for key in ("recall", "rouge_l", "run"):
                found[f"{probe}_{key}"] = shared and getattr(shared, key)
    return found


def _text(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A row's tokens without BOS and EOS."""
    return row.input_ids[row.input_ids[0] == tokenizer.bos_token_id : -1]


def _asked(example: Example, row: Row, tokenizer: PreTrainedTokenizerBase) -> Asked:
    """The probes that this row is long enough for."""
    ids, before = row.input_ids, row.completion_mask.count(0)
    length = len(_text(row, tokenizer))
    bos = len(ids) - length - 1
    response = len(ids) - before - 1
    found: Asked = {"prompt": (tuple(ids[:before]), response)} if example.prompt else {}
    lines = example.prompt.strip("\n").split("\n")
    for probe, line in (("heading", lines[-1]), ("opening", lines[0])):
        if line.startswith("### "):
            alone = tuple(tokenizer(f"{line}\n").input_ids)
            found[probe] = (alone, response if probe == "heading" else len(ids) - len(alone) - 1)
    for probe, k in EXTRACTABLE.items():
        if length >= k + EXTRACTED:
            found[probe] = (tuple(ids[: bos + k]), EXTRACTED)
    if length >= 2 * GOLDFISH:
        found["goldfish"] = (tuple(ids[: bos + GOLDFISH]), GOLDFISH)
    return found


def _continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Asked],
    adapters: Sequence[str],
    free: int | None,
) -> dict[tuple[str, tuple[int, ...]], tuple[int, ...]]:
    """{(adapter, prompt): tokens}; a prompt that several probes share is asked once."""
    wanted: dict[tuple[int, ...], int] = {}
    for prompt, tokens in (ask for each in asked for ask in each.values()):
        wanted[prompt] = max(tokens, wanted.get(prompt, 0))
    said = {}
    for long in (False, True):
        some = {prompt: tokens for prompt, tokens in wanted.items() if (tokens > EXTRACTED) == long}
        pairs = [(name, prompt) for name in adapters for prompt in some]
        prompts, names = [prompt for _, prompt in pairs], [name for name, _ in pairs]
        answers = generate(model, tokenizer, prompts, None, max(some.values(), default=0), names, free=free)
        said |= {pair: answer.ids for pair, answer in zip(pairs, answers, strict=True)}
    return said

"""How much of its training rows a model knows, and how much of a row it writes when it is given a part of the row.

- **Knowledge.** EM and ES, from predictions of each token given the row's own tokens before it (`em_and_es`). The same
  predictions also show what greedy decoding would write (`extraction`).
- **Regurgitation.** The model writes an answer to a part of the row: to the heading of the response alone (`heading`),
  to the heading that opens the row alone (`opening`), or to the whole prompt (`prompt`). The measures are ROUGE-L
  recall, ROUGE-L, and the longest run of words shared with the response. Answers are cut to as
  many tokens as the row still has, because a longer text matches more.
- **Extractability.** Given the first 16, 32 or 50 tokens of the row, does the model write the next 50 exactly?
- **Goldfish.** Given the first 32 tokens, does it write the next 32 exactly?

The base model, and the rows' twins that were not trained on, show how much of this needs no training.
"""

import sys
from collections.abc import Sequence
from itertools import groupby

from rapidfuzz.distance import LCSseq
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_symposium.data.dataset import Example, Row, tokenize
from mini_symposium.data.text_overlap import overlap
from mini_symposium.errors import InputError
from mini_symposium.models.generation import generate

EXTRACTED = 50
"""How many tokens the model must write exactly after them."""

EXTRACTABLE = {"extractable_16": 16, "extractable_32": 32, "extractable_50": 50}
"""{probe: how many of a row's first tokens the model is given}"""

GOLDFISH = 32
"""How many tokens the model is given, and how many it must then write."""


def em_and_es(matches: Sequence[bool]) -> dict[str, float]:
    """EM and ES of a row, to four digits.

    "em", exact memorization: the share of supervised tokens that the model predicts as the likeliest after the row's
    own tokens before them (Tirumala et al. 2022). "es", extraction strength: 1 - k/T, for the smallest k after
    which all of the T supervised tokens are predicted so (Carlini et al. 2021).

    Parameters
    ----------
    matches
        For each supervised token, whether it is the likeliest one.

    >>> em_and_es([True, False, True, True])
    {'em': 0.75, 'es': 0.5}
    """
    suffix = next((k for k, match in enumerate(reversed(matches)) if not match), len(matches))
    return {"em": round(sum(matches) / len(matches), 4), "es": round(suffix / len(matches), 4)}


def extractable(ids: Sequence[int], continuation: Sequence[int], k: int) -> bool | None:
    """Whether a row is extractable with k tokens of context (Carlini et al. 2023, "Quantifying Memorization").

    Parameters
    ----------
    ids
        The row's tokens without BOS and EOS.
    continuation
        What the model writes greedily after the first `k` of them; 50 tokens or more.

    Returns
    -------
    bool or None
        None if the row has fewer than k + 50 tokens.

    >>> row = list(range(100))
    >>> extractable(row, row[50:], 50), extractable(row, row[49:], 50), extractable(row[:99], row[50:], 50)
    (True, False, None)
    """
    expected = list(ids[k : k + EXTRACTED])
    return list(continuation[:EXTRACTED]) == expected if len(expected) == EXTRACTED else None


def extraction(matches: Sequence[bool], bos: int = 0) -> dict[str, bool | int | None]:
    """Whether greedy decoding would write parts of a row, from one forward pass over the row.

    It writes a row's next tokens exactly if and only if each of them is the likeliest one after the row's own tokens
    before it. So "extractable_16", "extractable_32" and "extractable_50" are what `extractable` returns, and
    "goldfish_exact" the first value of `goldfish`; None if the row is too short. "run" is the largest number of
    successive tokens that are each the likeliest one.

    Parameters
    ----------
    matches
        For each token of the whole row but the first, with EOS at the end, whether it is the likeliest one.
    bos
        1 if the row begins with BOS.

    >>> extraction([False] * 15 + [True] * 51)
    {'extractable_16': True, 'extractable_32': None, 'extractable_50': None, 'goldfish_exact': True, 'run': 51}
    >>> extraction([True] * 65 + [False], bos=1)
    {'extractable_16': None, 'extractable_32': None, 'extractable_50': None, 'goldfish_exact': True, 'run': 65}
    """

    def exact(k: int, tokens: int) -> bool | None:
        first = bos + k - 1
        return all(matches[first : first + tokens]) if len(matches) - bos >= k + tokens else None

    run = max((sum(1 for _ in group) for match, group in groupby(matches) if match), default=0)
    by_prefix = {probe: exact(k, EXTRACTED) for probe, k in EXTRACTABLE.items()}
    return {**by_prefix, "goldfish_exact": exact(GOLDFISH, GOLDFISH), "run": run}


def goldfish(ids: Sequence[int], continuation: Sequence[int]) -> tuple[bool, float] | tuple[None, None]:
    """Whether the model writes the 32 tokens after the first 32 exactly, and the ROUGE-L of both over tokens.

    From Hans et al. 2024, "Be like a Goldfish, Don't Memorize!". Parameters as in `extractable`, for k = 32; (None,
    None) if the row has fewer than 64 tokens.

    >>> goldfish(range(64), [*range(32, 48), *[0] * 16])
    (False, 0.5)
    """
    expected, written = list(ids[GOLDFISH : 2 * GOLDFISH]), list(continuation[:GOLDFISH])
    if len(expected) < GOLDFISH:
        return None, None
    return written == expected, 2 * LCSseq.similarity(expected, written) / (len(expected) + len(written))


PROBES = ("heading", "opening", "prompt", *EXTRACTABLE, "goldfish")
"""The probes of `recite`. The first three take most of the time.

A model can know a row by heart and not write it after `heading`, because no row begins there. A model that writes it
recites the response even without its query."""

Asked = dict[str, tuple[tuple[int, ...], int]]
"""{probe: (the prompt's tokens, how many tokens the model is to write)}"""


def recite(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    adapters: Sequence[str] = ("base",),
    probes: Sequence[str] = PROBES,
) -> list[dict]:
    """Give every named adapter ("base" for none) parts of every row, and compare what it writes with the row.

    Returns
    -------
    list of dict
        By adapter, then example: model, example (its position), source; and for each of `probes` heading_recall,
        heading_rouge_l, heading_run (in words), the same of opening and prompt, extractable_16, extractable_32,
        extractable_50, goldfish_exact, goldfish_rouge_l. None if the row is too short for the probe, or its prompt has
        no `###` heading there.

    Raises
    ------
    InputError
        If there is no such probe, or an example is not valid for training.

    Examples
    --------
    >>> from mini_symposium import load_examples, recite
    >>> from mini_symposium.models.base_models import load_model, load_tokenizer
    >>> examples = load_examples("data/minisymposium.md")[:2]
    >>> rows = recite(load_model("tiny"), load_tokenizer("tiny"), examples, probes=["goldfish"])
    >>> [(row["model"], row["example"], row["goldfish_exact"]) for row in rows]
    [('base', 0, False), ('base', 1, False)]
    """
    if unknown := set(probes) - set(PROBES):
        raise InputError(f"{', '.join(sorted(unknown))}: no such probe; there are {', '.join(PROBES)}")
    rows = tokenize(examples, tokenizer, sys.maxsize, completion_only=True)
    asked = [
        {probe: ask for probe, ask in _asked(example, row, tokenizer).items() if probe in probes}
        for example, row in zip(examples, rows, strict=True)
    ]
    written = _continuations(model, tokenizer, asked, adapters)
    return [
        {"model": name, "example": k, "source": example.source}
        | _compare(
            example,
            _text(rows[k], tokenizer),
            {probe: written[name, prompt][:tokens] for probe, (prompt, tokens) in asked[k].items()},
            probes,
            tokenizer,
        )
        for name in adapters
        for k, example in enumerate(examples)
    ]


def _compare(example: Example, ids: list[int], written: dict, probes: Sequence[str], tokenizer) -> dict:
    """The measurements of one row; `written` has the model's tokens for each probe that fits the row."""
    line = {}
    for probe in probes:
        tokens = written.get(probe)
        if probe == "goldfish":
            line["goldfish_exact"], line["goldfish_rouge_l"] = goldfish(ids, tokens or ())
        elif probe in EXTRACTABLE:
            line[probe] = extractable(ids, tokens or (), EXTRACTABLE[probe])
        else:
            shared = None if tokens is None else overlap(example.completion, tokenizer.decode(tokens, True))
            for key in ("recall", "rouge_l", "run"):
                line[f"{probe}_{key}"] = shared and getattr(shared, key)
    return line


def _text(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A row's tokens without BOS and EOS."""
    return row.input_ids[row.input_ids[0] == tokenizer.bos_token_id : -1]


def _asked(example: Example, row: Row, tokenizer: PreTrainedTokenizerBase) -> Asked:
    """The probes that this row has enough tokens and headings for."""
    ids, before = row.input_ids, _answer_start(row)
    length = len(_text(row, tokenizer))
    bos = len(ids) - length - 1
    response = len(ids) - before - 1
    asked: Asked = {"prompt": (tuple(ids[:before]), response)} if example.prompt else {}
    lines = example.prompt.strip("\n").split("\n")
    for probe, line in (("heading", lines[-1]), ("opening", lines[0])):
        if line.startswith("### "):
            alone = tuple(tokenizer(f"{line}\n").input_ids)
            asked[probe] = (alone, response if probe == "heading" else len(ids) - len(alone) - 1)
    for probe, k in EXTRACTABLE.items():
        if length >= k + EXTRACTED:
            asked[probe] = (tuple(ids[: bos + k]), EXTRACTED)
    if length >= 2 * GOLDFISH:
        asked["goldfish"] = (tuple(ids[: bos + GOLDFISH]), GOLDFISH)
    return asked


def _answer_start(row: Row) -> int:
    """The token after the last one that is not supervised: where the row's last answer begins."""
    return max((at for at, supervised in enumerate(row.completion_mask, start=1) if not supervised), default=0)


def _continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Asked],
    adapters: Sequence[str],
) -> dict[tuple[str, tuple[int, ...]], tuple[int, ...]]:
    """{(adapter, prompt): tokens that the adapter wrote}. A prompt that several probes share is asked once."""
    lengths: dict[tuple[int, ...], int] = {}
    for prompt, tokens in (ask for row in asked for ask in row.values()):
        lengths[prompt] = max(tokens, lengths.get(prompt, 0))
    written = {}
    for long in (False, True):  # a batch each, because a batch lasts as long as its longest answer
        batch = {prompt: tokens for prompt, tokens in lengths.items() if (tokens > EXTRACTED) == long}
        pairs = [(name, prompt) for name in adapters for prompt in batch]
        prompts, names = [prompt for _, prompt in pairs], [name for name, _ in pairs]
        answers = generate(model, tokenizer, prompts, None, max(batch.values(), default=0), names)
        written |= {pair: answer.ids for pair, answer in zip(pairs, answers, strict=True)}
    return written

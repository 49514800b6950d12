"""What a model says when it is given a piece of a training row: every row, probe and adapter decoded side by side.

- **Regurgitation.** ROUGE-L recall of the whole response, ROUGE-L, and the longest run of words: from the heading of
  the response alone (`heading`); from the heading that opens a row alone (`opening`), after which only one row can
  come, query and all; and from the whole prompt, its query included (`prompt`). An answer is read as far as the row
  goes on, in tokens, for a longer one has more of anything.
- **Extractability.** From the first 16, 32 or 50 tokens of the row: are the next 50 the row's own?
- **Goldfish.** From the first 32: are the next 32?

The rows' held-out twins, and the base, say what comes without any training.
"""

import sys
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_symposium.data.dataset import Example, Row, tokenize
from mini_symposium.data.text_overlap import overlap
from mini_symposium.errors import InputError
from mini_symposium.memorization import EXTRACTED, GOLDFISH, PREFIXES, extractable, goldfish
from mini_symposium.models.generation import generate

EXTRACTABLE = {f"extractable_{k}": k for k in PREFIXES}
PROBES = ("heading", "opening", "prompt", *EXTRACTABLE, "goldfish")
"""What can be asked. The first three take most of the time; `robustness.teacher_forced` tells the extractable ones,
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

"""Held-out prompts: requests unlike any training row, each with checks that a program can make.

Prompts that were not trained on show what a fine-tune has learned. FILES hold them by category. A prompt that shares
its wording with a training row is refused, because a good answer to it may be memorized.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rapidfuzz.distance import LCSseq

from mini_symposium.data.answer_checks import CHECKS
from mini_symposium.data.dataset import Example
from mini_symposium.data.text_overlap import overlap, words
from mini_symposium.errors import InputError, one_line
from mini_symposium.files.reading import parse_yaml, read_text
from mini_symposium.run import ROOT

FILES = ("data/held_out.yml", "data/held_out_more.yml")
SPLITS = ("test", "dev", "more")
"""`test` is for measuring, `dev` for experiments before that. `more` makes intervals narrow enough for a verdict: a
sweep asks it beside `test`, a notebook does not."""

SHARED_WORDS, LEAST_ROUGE_L = 8, 0.3
"""A prompt shares its wording with a row if this many words in a row are in both, or if their ROUGE-L is this high."""
ECHO = 12
"""An answer with this many words in a row from the query fails: the query may hold what the checks ask for."""


@dataclass(frozen=True)
class Check:
    """A check that a program makes of an answer."""

    kind: str
    """A key of `answer_checks.CHECKS`."""
    value: object

    def __str__(self) -> str:
        value = ", ".join(map(str, self.value)) if isinstance(self.value, list) else self.value
        return f"{self.kind}: {value}"


@dataclass(frozen=True)
class HeldOut:
    """A prompt and the checks of its answer."""

    id: str
    category: str
    query: str
    checks: tuple[Check, ...]
    good: str
    """An answer that passes every check."""
    bad: str
    """An answer that fails at least one check."""
    split: str = "test"
    user: str = ""
    """In a character chat, the person who speaks to the model."""
    char: str = ""
    """In a character chat, the person whom the model plays."""
    source: str = ""
    """File and line, as `data/held_out.yml:41`."""


def judge(prompt: HeldOut, answer: str) -> dict[str, bool]:
    """Whether an answer passes each check, and whether it is in its own words and not the query repeated.

    >>> prompt = HeldOut("pi", "fact", "Name pi.", (Check("number", 3.14), Check("words", [1, 4])), "3.14", "3")
    >>> judge(prompt, "About 3.2")
    {'number: 3.14': False, 'words: 1, 4': True, 'own words': True}
    """
    answer = answer.replace("’", "'")
    verdicts = {str(check): CHECKS[check.kind](check.value, answer, prompt.query) for check in prompt.checks}
    return verdicts | {"own words": overlap(prompt.query.casefold(), answer.casefold()).run < ECHO}


def passes(prompt: HeldOut, answer: str) -> bool:
    """Whether an answer passes every check of its prompt; an empty answer never does."""
    return bool(answer.strip()) and all(judge(prompt, answer).values())


def load_held_out(split: str | None = None) -> list[HeldOut]:
    """The prompts of FILES, which have a list of them for each category; all, or those of one of SPLITS."""
    if split not in (None, *SPLITS):
        raise InputError(f"split {split!r}: is one of {', '.join(SPLITS)}")
    prompts = []
    for name in FILES:
        data, root = parse_yaml(
            read_text(ROOT / name), name, "held-out prompts are lists below their category, as `fact:`"
        )
        for key, nodes in root.value:
            for node, values in zip(nodes.value, data[key.value], strict=True):
                checks = [Check(kind, value) for each in values.pop("checks") for kind, value in each.items()]
                if key.value == "character":
                    checks += [Check("leaves_to", values["user"]), Check("no_heading", True)]
                texts = {key: text.strip() for key, text in values.items()}
                source = f"{name}:{node.start_mark.line + 1}"
                prompts.append(HeldOut(category=key.value, checks=tuple(checks), source=source, **texts))
    return [prompt for prompt in prompts if split in (None, prompt.split)]


Held = TypeVar("Held", HeldOut, Example)


def apart(held_out: Sequence[Held], examples: Sequence[Example], say: Callable[[str], object] = print) -> list[Held]:
    """The held-out prompts, or rows, that share no wording with a training row; InputError if no prompt is left.

    `say` is called with a line about each other one.
    """
    shared = [
        shared_wording(each, examples)
        if isinstance(each, HeldOut)
        else next(filter(None, (_shared_run(f"{each.source}: the row", each.text, row) for row in examples)), "")
        for each in held_out
    ]
    for sentence in filter(None, shared):
        say(f"left out: {one_line(sentence)}")
    if shared and all(shared) and isinstance(held_out[0], HeldOut):
        raise InputError(f"no held-out prompt is left; the last one: {shared[-1]}")
    return [each for each, sentence in zip(held_out, shared, strict=True) if not sentence]


def shared_wording(prompt: HeldOut, examples: Sequence[Example]) -> str:
    """A sentence on the first training row that a prompt shares its wording with, see `SHARED_WORDS`; "" if none."""
    what = f"{prompt.source}: {prompt.id}"
    for example in examples:
        if shared := _shared_run(what, prompt.query, example):
            return shared
        for text in (example.query, example.text):
            rouge_l = overlap(text, prompt.query).rouge_l
            if rouge_l >= LEAST_ROUGE_L:
                steps = LCSseq.opcodes(row := words(text), words(prompt.query))
                common = [word for step in steps if step.tag == "equal" for word in row[step.src_start : step.src_end]]
                return _sentence(f"{what} has ROUGE-L {rouge_l:.2f}", example, common)
    return ""


def _shared_run(what: str, text: str, example: Example) -> str:
    """A sentence on the first `SHARED_WORDS` words in a row that a text shares with a training row; "" if none."""
    ours, theirs = ([word.casefold() for word in words(each)] for each in (text, example.text))
    known = {tuple(theirs[i : i + SHARED_WORDS]) for i in range(len(theirs))}
    runs = (ours[i : i + SHARED_WORDS] for i in range(len(ours) - SHARED_WORDS + 1))
    run = next((run for run in runs if tuple(run) in known), None)
    return _sentence(f"{what} shares {SHARED_WORDS} words in a row", example, run) if run else ""


def _sentence(what: str, example: Example, shared: Sequence[str]) -> str:
    return (
        f'{what} with the training row at {example.source} ("{" ".join(shared)}"); '
        "it is held out only if it asks for something else"
    )

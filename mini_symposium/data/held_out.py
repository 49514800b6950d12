"""Held-out prompts: requests unlike any training row, each with checks that a program can make.

Prompts that were not trained on show what a fine-tune has learned. `data/held_out.yml` holds them by category. A prompt
that shares its wording with a training row is refused, because a good answer to it may be memorized.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import yaml
from rapidfuzz.distance import LCSseq

from mini_symposium.data.answer_checks import CHECKS, numbers
from mini_symposium.data.dataset import Example
from mini_symposium.data.text_overlap import overlap, words
from mini_symposium.errors import InputError, one_line
from mini_symposium.files.reading import parse_yaml, read_text
from mini_symposium.run import ROOT, find

CATEGORIES = (
    *("fact", "arithmetic", "code", "format", "explanation"),
    *("trade-off", "creative", "extraction", "character", "false-premise"),
)
SPLITS = ("test", "dev")
"""`test` is for measuring, `dev` for experiments before that."""

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


TEXTS = ("id", "query", "good", "bad", "split", "user", "char")
NEEDED = ("id", "query", "checks", "good", "bad")


def judge(prompt: HeldOut, answer: str) -> dict[str, bool]:
    """Whether an answer passes each check, and whether it is in its own words and not the query repeated.

    >>> prompt = HeldOut("pi", "fact", "Name pi.", (Check("number", 3.14), Check("words", [1, 4])), "3.14", "3")
    >>> judge(prompt, "About 3.2")
    {'number: 3.14': False, 'words: 1, 4': True, 'own words': True}
    """
    answer = answer.replace("’", "'")
    verdicts = {str(check): CHECKS[check.kind][0](check.value, answer, prompt.query) for check in prompt.checks}
    return verdicts | {"own words": overlap(prompt.query.casefold(), answer.casefold()).run < ECHO}


def passes(prompt: HeldOut, answer: str) -> bool:
    """Whether an answer passes every check of its prompt; an empty answer never does."""
    return bool(answer.strip()) and all(judge(prompt, answer).values())


def load_held_out(path: str | Path = "data/held_out.yml", split: str | None = None) -> list[HeldOut]:
    """Read held-out prompts: a YAML file of lists, one for each category.

    Parameters
    ----------
    split
        "test" or "dev"; None for both.

    Raises
    ------
    InputError
        If the file is not a list of valid prompts for each category; names file and line.
    """
    if split not in (None, *SPLITS):
        raise InputError(f"split {split!r}: is one of {', '.join(SPLITS)}")
    path = find(path)
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
    hint = "held-out prompts are lists below their category, as `fact:`"
    data, root = parse_yaml(read_text(path), name, hint)
    prompts: dict[str, HeldOut] = {}
    for key, node in root.value:
        where, category = f"{name}:{key.start_mark.line + 1}", key.value
        if category not in CATEGORIES:
            raise InputError(f"{where}: unknown category {category!r}{_near(category, CATEGORIES)}")
        if not isinstance(data[category], list):
            raise InputError(f"{where}: {category} is a list of prompts, each of which starts with `- id:`")
        for item, values in zip(node.value, data[category], strict=True):
            prompt = _prompt(item, values, category, name)
            if prompt.id in prompts:
                raise InputError(f"{prompt.source}: {prompt.id} is already at {prompts[prompt.id].source}; rename one")
            prompts[prompt.id] = prompt
    return [prompt for prompt in prompts.values() if split in (None, prompt.split)]


def _near(word: object, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(word), known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; give one of {', '.join(known)}"


def _prompt(node: yaml.Node, values, category: str, name: str) -> HeldOut:
    where = f"{name}:{node.start_mark.line + 1}"
    if not isinstance(values, dict):
        raise InputError(f"{where}: a prompt has {', '.join(NEEDED)}; found {values!r}")
    lines = {key.value: f"{name}:{key.start_mark.line + 1}" for key, _ in node.value}
    nodes = {key.value: child for key, child in node.value}
    for key, value in values.items():
        if key not in (*TEXTS, "checks"):
            raise InputError(f"{lines.get(str(key), where)}: unknown key {key!r}{_near(key, (*TEXTS, 'checks'))}")
        if key != "checks" and not (isinstance(value, str) and value.strip()):
            raise InputError(
                f"{lines.get(key, where)}: {key}: {value!r}: takes text; quote it if YAML reads it as something else"
            )
    named = str(values.get("id", "this prompt"))
    missing = [key for key in (*NEEDED, *(("user", "char") if category == "character" else ())) if key not in values]
    if missing:
        raise InputError(f"{where}: {named} has no {', '.join(missing)}")
    if category != "character" and values.keys() & {"user", "char"}:
        raise InputError(f"{where}: {named}: only a prompt below `character` has user and char")
    if values.get("split", "test") not in SPLITS:
        raise InputError(f"{where}: {named}: split {values['split']!r}: is one of {', '.join(SPLITS)}")
    texts = {key: values[key].strip() for key in TEXTS if key in values}
    checks = _checks(nodes["checks"], values["checks"], named, name, texts["query"])
    if category == "character":
        checks += (Check("leaves_to", texts["user"]), Check("no_heading", True))
    return HeldOut(**texts, category=category, checks=checks, source=where)


def _checks(node: yaml.Node, values, named: str, name: str, query: str) -> tuple[Check, ...]:
    if not isinstance(values, list) or not values:
        raise InputError(f"{name}:{node.start_mark.line + 1}: {named}: checks is a list, as `- any_of: [Canberra]`")
    checks = []
    for item, entry in zip(node.value, values, strict=True):
        where = f"{name}:{item.start_mark.line + 1}: {named}"
        if not isinstance(entry, dict) or len(entry) != 1:
            raise InputError(f"{where}: {entry!r}: a check is one `kind: value`")
        [(kind, value)] = entry.items()
        if kind not in CHECKS:
            raise InputError(f"{where}: unknown check {kind!r}{_near(kind, tuple(CHECKS))}")
        _, fits, wanted = CHECKS[kind]
        if not fits(value):
            raise InputError(f"{where}: {kind}: {value!r}: takes {wanted}")
        if kind == "number" and value in numbers(query):
            raise InputError(f"{where}: number: {value}: is in the query, so it does not count; ask for another")
        checks.append(Check(kind, value))
    return tuple(checks)


def check_disjoint(held_out: Sequence[HeldOut], examples: Sequence[Example], twins: Sequence[Example] = ()) -> None:
    """Refuse if held-out prompts, or `twins` (rows not to be trained on), share wording with training rows.

    Raises
    ------
    InputError
        For the first prompt or row that does; names both rows and the words that they share.
    """
    prompts = (shared_wording(prompt, examples) for prompt in held_out)
    rows = (_shared_run(f"{twin.source}: the row", twin.text, example) for twin in twins for example in examples)
    if shared := next(filter(None, chain(prompts, rows)), ""):
        raise InputError(shared)


def apart(
    held_out: Sequence[HeldOut], examples: Sequence[Example], say: Callable[[str], object] = print
) -> list[HeldOut]:
    """The prompts that share no wording with a training row; `say` is called with a line about each other prompt.

    Raises
    ------
    InputError
        If no prompt is left.
    """
    shared = [shared_wording(prompt, examples) for prompt in held_out]
    for sentence in filter(None, shared):
        say(f"left out: {one_line(sentence)}")
    if shared and all(shared):
        raise InputError(f"no held-out prompt is left; the last one: {shared[-1]}")
    return [prompt for prompt, sentence in zip(held_out, shared, strict=True) if not sentence]


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

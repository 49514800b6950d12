"""Held-out prompts: requests that resemble no training row, each with checks that a program can make.

What a fine-tune has learned shows on what it was not trained on. `data/held_out.yml` holds the prompts by category;
`check_disjoint` refuses a set that shares its wording with the training rows, because then what looks learned may
be remembered.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from rapidfuzz.distance import LCSseq

from mini_symposium.data.answer_checks import CHECKS, numbers
from mini_symposium.data.dataset import Example
from mini_symposium.data.text_overlap import overlap, words
from mini_symposium.errors import InputError
from mini_symposium.files.reading import check_tokens, read_text, refuse_repeated
from mini_symposium.run import ROOT, find

CATEGORIES = (
    *("fact", "arithmetic", "code", "format", "explanation"),
    *("trade-off", "creative", "extraction", "character", "false-premise"),
)
SPLITS = ("test", "dev")
"""`test` is for measuring; `dev` is for whatever somebody tries out before."""

SHARED_WORDS, MOST_ROUGE_L = 8, 0.3
"""A prompt may share no run of so many words with a training row, and must stay below this ROUGE-L to it."""
ECHO = 12
"""So many words of the query in a row are an echo; a card said over again would hold all of its facts."""


@dataclass(frozen=True)
class Check:
    """One thing to be seen in an answer."""

    kind: str
    """A key of `checks.CHECKS`."""
    value: object

    def __str__(self) -> str:
        value = ", ".join(map(str, self.value)) if isinstance(self.value, list) else self.value
        return f"{self.kind}: {value}"


@dataclass(frozen=True)
class HeldOut:
    """A prompt, and how its answer is judged."""

    id: str
    category: str
    query: str
    checks: tuple[Check, ...]
    good: str
    """An answer that passes every check."""
    bad: str
    """An answer that fails one."""
    split: str = "test"
    user: str = ""
    """In a character chat, who speaks to the model."""
    char: str = ""
    """In a character chat, whom the model plays."""
    source: str = ""
    """Where it stands, as `data/held_out.yml:41`."""


TEXTS = ("id", "query", "good", "bad", "split", "user", "char")
NEEDED = ("id", "query", "checks", "good", "bad")


def judge(prompt: HeldOut, answer: str) -> dict[str, bool]:
    """Whether an answer passes, check by check; and whether it is one, and not the query said over again.

    >>> prompt = HeldOut("pi", "fact", "Name pi.", (Check("number", 3.14), Check("words", [1, 4])), "3.14", "3")
    >>> judge(prompt, "About 3.2")
    {'number: 3.14': False, 'words: 1, 4': True, 'own words': True}
    """
    answer = answer.replace("’", "'")
    verdicts = {str(check): CHECKS[check.kind][0](check.value, answer, prompt.query) for check in prompt.checks}
    return verdicts | {"own words": overlap(prompt.query.casefold(), answer.casefold()).run < ECHO}


def passes(prompt: HeldOut, answer: str) -> bool:
    """Whether an answer passes every check of its prompt; an empty one passes none."""
    return bool(answer.strip()) and all(judge(prompt, answer).values())


def load_held_out(path: str | Path = "data/held_out.yml", split: str | None = None) -> list[HeldOut]:
    """Read held-out prompts: a YAML file of lists, one for each category.

    Parameters
    ----------
    split
        "test" or "dev" for one of the two; both without.

    Raises
    ------
    InputError
        Naming file and line, for whatever is not as it should be.
    """
    if split not in (None, *SPLITS):
        raise InputError(f"split {split!r}: is one of {', '.join(SPLITS)}")
    path = find(path)
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
    root, data = _read(path, name)
    prompts: dict[str, HeldOut] = {}
    for key, node in root.value:
        where = f"{name}:{key.start_mark.line + 1}"
        if key.value not in CATEGORIES:
            raise InputError(f"{where}: unknown category {key.value!r}{_near(key.value, CATEGORIES)}")
        if not isinstance(data[key.value], list):
            raise InputError(f"{where}: {key.value} is a list of prompts, each of which starts with `- id:`")
        for item, values in zip(node.value, data[key.value], strict=True):
            prompt = _prompt(item, values, key.value, name)
            if prompt.id in prompts:
                raise InputError(f"{prompt.source}: {prompt.id} stands already at {prompts[prompt.id].source}")
            prompts[prompt.id] = prompt
    return [prompt for prompt in prompts.values() if split in (None, prompt.split)]


def _read(path: Path, name: str) -> tuple[yaml.MappingNode, dict]:
    """The file as nodes, which know their lines, and as values."""
    text = read_text(path)
    try:
        check_tokens(text, name)
        root, data = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise InputError(f"{where}: not YAML ({getattr(error, 'problem', None) or error})") from error
    except InputError:
        raise
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{name}: not values that a prompt has ({error})") from error
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{name}:1: held-out prompts stand in lists below their category, as `fact:`")
    refuse_repeated(root, name)
    return root, data


def _near(word: object, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(word), known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def _prompt(node: yaml.Node, values, category: str, name: str) -> HeldOut:
    where = f"{name}:{node.start_mark.line + 1}"
    if not isinstance(values, dict):
        raise InputError(f"{where}: a prompt has {', '.join(NEEDED)}; found {values!r}")
    lines = {key.value: f"{name}:{key.start_mark.line + 1}" for key, _ in node.value}
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
        raise InputError(f"{where}: {named}: only a prompt under `character` has user and char")
    if values.get("split", "test") not in SPLITS:
        raise InputError(f"{where}: {named}: split {values['split']!r}: is one of {', '.join(SPLITS)}")
    texts = {key: values[key].strip() for key in TEXTS if key in values}
    checks_node = next((child for key, child in node.value if key.value == "checks"), None)
    if checks_node is None:
        raise InputError(f"{where}: {named}: its checks come from a merge; write them out")
    checks = _checks(checks_node, values["checks"], named, name, texts["query"])
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
            raise InputError(f"{where}: number: {value}: stands in the query, so it would not be found; ask otherwise")
        checks.append(Check(kind, value))
    return tuple(checks)


def check_disjoint(held_out: Sequence[HeldOut], examples: Sequence[Example], twins: Sequence[Example] = ()) -> None:
    """Refuse held-out prompts, and rows that are said not to be trained on, that share their wording with what is.

    Raises
    ------
    InputError
        Naming the first that does, the row, and the words that both have.
    """
    for prompt in held_out:
        for example in examples:
            if run := _shared_run(prompt.query, example.text):
                _refuse(f"{prompt.source}: {prompt.id}", example, f"shares {SHARED_WORDS} words in a row", run)
            for text in (example.query, example.text):
                rouge_l = overlap(text, prompt.query).rouge_l
                if rouge_l >= MOST_ROUGE_L:
                    steps = LCSseq.opcodes(theirs := words(text), words(prompt.query))
                    common = [w for s in steps if s.tag == "equal" for w in theirs[s.src_start : s.src_end]]
                    _refuse(f"{prompt.source}: {prompt.id}", example, f"has ROUGE-L {rouge_l:.2f}", common)
    for twin in twins:
        for example in examples:
            if run := _shared_run(twin.text, example.text):
                _refuse(f"{twin.source}: the row", example, f"shares {SHARED_WORDS} words in a row", run)


def apart(
    held_out: Sequence[HeldOut], examples: Sequence[Example], say: Callable[[str], object] = print
) -> list[HeldOut]:
    """The prompts that share no wording with what is trained on, as `check_disjoint` judges; `say` names the others.

    Raises
    ------
    InputError
        If none is left.
    """
    kept, last = [], None
    for prompt in held_out:
        try:
            check_disjoint([prompt], examples)
            kept.append(prompt)
        except InputError as error:
            say(f"left out: {error}")
            last = error
    if last and not kept:
        raise InputError(f"no held-out prompt is left; the last one: {last}") from last
    return kept


def _shared_run(own: str, other: str) -> list[str] | None:
    """The first words in a row, as many as are too many, that stand in both."""
    own, other = ([word.casefold() for word in words(text)] for text in (own, other))
    seen = {tuple(other[i : i + SHARED_WORDS]) for i in range(len(other))}
    runs = (own[i : i + SHARED_WORDS] for i in range(len(own) - SHARED_WORDS + 1))
    return next((run for run in runs if tuple(run) in seen), None)


def _refuse(what: str, example: Example, how: str, shared: Sequence[str]):
    raise InputError(
        f"{what} {how} with the training row at {example.source} "
        f'("{" ".join(shared)}"); it is held out only if it asks for something else'
    )

"""Handwritten examples: read, checked, described, and turned into the tokens that training sees.

A document is a series of examples. Each begins with the same heading, the first `### ` heading of the file, and the
text below it is the request. The sections that follow are the answer. The prompt ends with the first heading of the
answer, so that at inference any heading can ask for an answer:

    ### New Query            <- begins an example
    Why is the sky blue?
                             <- one blank line between sections
    ### Complete Response    <- last line of the prompt
    Because air scatters ...
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from rapidfuzz import fuzz

from mini_symposium.errors import INVISIBLE, InputError
from mini_symposium.files.reading import parse_json, read_text
from mini_symposium.files.writing import written_whole
from mini_symposium.run import ROOT, find


@dataclass(frozen=True)
class Section:
    """A heading and the text below it."""

    heading: str
    text: str
    line: int = field(default=0, compare=False, repr=False)
    """Line number of the heading in its text; 0 if the section was not read from a text."""


@dataclass(frozen=True)
class Example:
    """A request and its answer; `prompt` + `completion` is the text of the training row."""

    query: str
    sections: tuple[Section, ...]
    prompt: str
    completion: str
    source: str
    """File and line, as `data/minisymposium.md:41`."""

    @property
    def text(self) -> str:
        """The whole row, without special tokens."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class Row:
    """A tokenised example: `completion_mask` is 1 over the tokens that enter the loss."""

    input_ids: list[int]
    completion_mask: list[int]
    source: str

    @property
    def labels(self) -> list[int]:
        """Labels for the loss: the token ids, with -100 for tokens that are not supervised."""
        return [i if supervised else -100 for i, supervised in zip(self.input_ids, self.completion_mask, strict=True)]


def load_examples(path: str | Path) -> list[Example]:
    """Read a .md or .txt document, a .jsonl or .json table, or a folder of them.

    A table holds objects with `prompt` and `completion`, or with `text`, or with Alpaca's `instruction`, `input` and
    `output`, or with `messages`.

    Raises
    ------
    InputError
        If the data cannot be trained on; names file, line and remedy.

    >>> examples = load_examples("data/minisymposium.md")
    >>> print(len(examples), examples[2].source, examples[2].query[:26])
    13 data/minisymposium.md:41 A snail sits at the bottom
    """
    given, path = path, find(path)
    if not path.exists():
        raise InputError(f"{given}: no such file; give a .md, .jsonl or .json file, or a folder of them")
    if path.is_dir():
        try:
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS and file.is_file())
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        examples = [example for file in files for example in _read(file)]
    else:
        examples = _read(path)
    if not examples:
        raise InputError(f"{path}: no examples in it; write one that starts with `### New Query`")
    seen: dict[str, str] = {}
    for example in examples:
        # Without a prompt, `query` is only the beginning of the text.
        first = seen.setdefault(example.query if example.prompt else example.text, example.source)
        if first != example.source:
            raise InputError(f"{example.source}: the query is already at {first}; keep one, or ask something else")
    return examples


def _read(path: Path) -> list[Example]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: cannot read *{path.suffix}; give one of {', '.join(READERS)}")
    text = read_text(path)
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
    return list(reader(text.replace("\r\n", "\n").replace("\r", "\n"), name))


HEADING = re.compile(r"### (.*\S.*)")
"""A line that opens a section of a document."""


def split_sections(text: str, heading: re.Pattern[str] = HEADING) -> tuple[str, list[Section], int]:
    """The text before the first heading, the sections, and the line of a code fence that is never closed, else 0.

    Parameters
    ----------
    heading
        What a line must begin with to be a heading; its first group is the heading's text. Lines in fenced code are
        never headings.
    """
    before: list[str] = []
    parts: list[tuple[str, list[str], int]] = []
    fence, opened = "", 0
    for number, line in enumerate(text.split("\n"), start=1):
        previous, fence = fence, _fence(line, fence)
        opened = number if fence and not previous else opened
        if not fence and (match := heading.match(line)):
            parts.append((match[1].strip(), [], number))
        else:
            (parts[-1][1] if parts else before).append(line)
    sections = [Section(title, "\n".join(body).strip(), number) for title, body, number in parts]
    return "\n".join(before).strip(), sections, opened if fence else 0


def _fence(line: str, opened: str) -> str:
    """The mark of the code fence that is open after `line`, or "" if none is; `opened` is the mark before `line`.

    As in CommonMark, a fence of four backticks is closed by four, so that its code may show a fence of three.
    """
    body = line.lstrip(" ")
    mark = body[: len(body) - len(body.lstrip(body[:1]))]
    if len(line) - len(body) > 3 or len(mark) < 3 or mark[0] not in "`~":
        return opened
    rest = body[len(mark) :]
    if opened:
        return "" if mark.startswith(opened) and not rest.strip() else opened
    return "" if mark[0] == "`" and "`" in rest else mark


def _from_markdown(text: str, name: str) -> Iterator[Example]:
    before, sections, left_open = split_sections(text)
    if left_open:
        raise InputError(f"{name}:{left_open}: a code fence that is never closed would hide every heading below it")
    if before:
        raise InputError(f"{name}:1: text before the first heading; start the file with `### New Query`")
    if not sections:
        return
    opening = sections[0].heading
    starts = [i for i, section in enumerate(sections) if section.heading == opening] + [len(sections)]
    for start, end in pairwise(starts):
        yield _example(sections[start:end], lambda line: f"{name}:{line}")


def _example(sections: Sequence[Section], where: Callable[[int], str]) -> Example:
    for section in sections:
        if _blank(section.text):
            raise InputError(
                f"{where(section.line)}: nothing below `### {section.heading}`; write its text or delete the heading"
            )
    opening, *answer = sections
    if not answer:
        raise InputError(f"{where(opening.line)}: a request without an answer; add a `### Complete Response`")
    prompt = f"### {opening.heading}\n{opening.text}\n\n### {answer[0].heading}\n"
    completion = "\n\n".join([answer[0].text, *(f"### {section.heading}\n{section.text}" for section in answer[1:])])
    return Example(opening.text, tuple(answer), prompt, completion, where(opening.line))


def _from_jsonl(text: str, name: str) -> Iterator[Example]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _from_object(parse_json(line, name, number), f"{name}:{number}")


def _from_json(text: str, name: str) -> Iterator[Example]:
    rows = parse_json(text, name)
    if not isinstance(rows, list):
        raise InputError(f"{name}:1: holds a {type(rows).__name__}; a .json dataset is a list of objects")
    for number, row in enumerate(rows, start=1):
        yield _from_object(row, f"{name}, row {number}")


def _from_object(row, where: str) -> Example:
    """The example in one row of a table, which has one of four forms."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: a {type(row).__name__}; each row is an object")
    fields = set(row)
    if {"prompt", "completion"} <= fields:
        prompt, completion = _strings(row, where, "prompt", "completion")
        return Example(prompt.strip(), (), prompt, completion, where)
    if {"instruction", "output"} <= fields:
        instruction, output = _strings(row, where, "instruction", "output")
        context = row.get("input") or ""
        if not isinstance(context, str):
            raise InputError(f"{where}: `input` is a {type(context).__name__}; write text")
        parts = [instruction, *filter(None, [context.strip()])]
        prompt = "".join(f"### {name}\n{text}\n\n" for name, text in zip(("Instruction", "Input"), parts, strict=False))
        return Example("\n\n".join(parts), (Section("Response", output),), f"{prompt}### Response\n", output, where)
    if "messages" in fields:
        return _from_messages(row["messages"], where)
    if "text" in fields:
        [text] = _strings(row, where, "text")
        before, sections, _ = split_sections(text)
        if sections and not before:
            return _example(sections, lambda _: where)
        return Example(text[:80], (), "", text, where)
    keys = ", ".join(sorted(map(str, fields))) or "nothing"
    raise InputError(
        f"{where}: found {keys}; a row has prompt and completion, or text, or instruction and output, or messages"
    )


def _blank(text: str) -> bool:
    """Whether `text` has no visible character. Its beginning is tested first, because it may have megabytes."""
    return not INVISIBLE.sub("", text[:1000]).strip() and not INVISIBLE.sub("", text).strip()


def _strings(row: dict, where: str, *names: str) -> list[str]:
    for name in names:
        if not isinstance(row[name], str) or _blank(row[name]):
            raise InputError(f"{where}: `{name}` is {json.dumps(row[name])[:40]}; write text")
    return [row[name].rstrip() if name != "prompt" else row[name] for name in names]


def _from_messages(messages, where: str) -> Example:
    """A chat as sections: the user's below `### New Query`, the assistant's below `### Complete Response`."""
    headings = {"user": "New Query", "assistant": "Complete Response"}
    parts, system = [], ""
    for turn in messages if isinstance(messages, list) else []:
        content = turn.get("content") if isinstance(turn, dict) else None
        if not isinstance(content, str) or _blank(content) or turn.get("role") not in ("system", *headings):
            raise InputError(f"{where}: a message needs a role (system, user, assistant) and a content that is text")
        if turn["role"] == "system":
            system += content.strip() + "\n\n"
        else:
            parts.append(Section(headings[turn["role"]], content.strip()))
    if len(parts) < 2 or parts[-1].heading != "Complete Response":
        raise InputError(f"{where}: messages must end with the assistant's answer to a user's; that is what is learned")
    *asked, answer = parts
    prompt = system + "".join(f"### {part.heading}\n{part.text}\n\n" for part in asked) + "### Complete Response\n"
    query = asked[0].text if len(asked) == 1 else prompt
    return Example(query, (answer,), prompt, answer.text, where)


READERS = {".md": _from_markdown, ".txt": _from_markdown, ".jsonl": _from_jsonl, ".json": _from_json}


def write_axolotl_jsonl(examples: Sequence[Example], path: str | Path, overwrite: bool = False) -> None:
    """Write a line `{"text": ...}` for each example, as Axolotl's `type: completion` reads them.

    Raises
    ------
    InputError
        If the file exists and `overwrite` is false.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists already; delete it or choose another name")
    with written_whole(path) as temporary:
        lines = (json.dumps({"text": example.text}, ensure_ascii=False) + "\n" for example in examples)
        temporary.write_text("".join(lines), encoding="utf-8")


def fingerprint(examples: Sequence[Example]) -> str:
    """A SHA-256 of all prompts and completions, to tell whether two runs had the same data."""
    return hashlib.sha256("\0".join(f"{e.prompt}\1{e.completion}" for e in examples).encode()).hexdigest()


def tokenize(examples: Sequence[Example], tokenizer, sequence_len: int, completion_only: bool) -> list[Row]:
    """The rows that training sees: the text with the tokenizer's own special tokens around it, and EOS at the end.

    Checks for mistakes that silently break small fine-tunes: a prompt whose tokens are not a prefix of the row's, so
    that training sees another boundary than inference; a second BOS; no EOS in the loss; nothing in the loss; a row cut
    at `sequence_len`.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer.
    completion_only
        Supervise only the completion and EOS; otherwise every token.

    Raises
    ------
    InputError
        For the first example that fails a check; names its file and line.

    >>> from mini_symposium.models.base_models import load_tokenizer
    >>> examples, tokenizer = load_examples("data/minisymposium.md"), load_tokenizer("tiny")
    >>> row = tokenize(examples, tokenizer, sequence_len=512, completion_only=True)[0]
    >>> len(row.input_ids), sum(row.completion_mask), row.labels[:3]
    (254, 221, [-100, -100, -100])
    """
    special = set(tokenizer.all_special_ids)
    bos = [tokenizer.bos_token_id] if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else []
    rows = []
    for example in examples:
        prompt, ids = list(tokenizer(example.prompt).input_ids), list(tokenizer(example.text).input_ids)
        prompt = bos if not example.prompt else prompt
        if ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        spelled = [i for i in ids[len(bos) : -1] if i in special]
        if spelled:
            names = ", ".join(sorted(set(tokenizer.convert_ids_to_tokens(spelled))))
            raise InputError(f"{example.source}: the text spells a special token ({names}); write it differently")
        if ids[: len(prompt)] != prompt:
            at = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(ids) - 1)
            around = tokenizer.decode(ids[max(0, at - 1) : at + 2])
            raise InputError(
                f"{example.source}: prompt and completion share a token near {around!r}, so the model would train on a "
                "boundary that it never meets at inference; end the prompt with a newline"
            )
        if len(ids) - len(prompt) < 2:
            raise InputError(f"{example.source}: nothing to learn after the prompt; write a completion")
        if len(ids) > sequence_len:
            raise InputError(
                f"{example.source}: {len(ids)} tokens, but sequence_len is {sequence_len}; "
                f"shorten it, or set sequence_len to {-(-len(ids) // 64) * 64}"
            )
        unsupervised = len(prompt) if completion_only else 0
        rows.append(Row(ids, [0] * unsupervised + [1] * (len(ids) - unsupervised), example.source))
    return rows


def describe(examples: Sequence[Example]) -> dict:
    """The dataset in numbers, ready for JSON: counts, headings, and one entry per example."""
    rows = [
        {
            "source": example.source,
            "query": " ".join(example.query.split())[:70],
            "headings": [section.heading for section in example.sections],
            "words": len(example.text.split()),
        }
        for example in examples
    ]
    return {
        "n": len(examples),
        "lines": sum(example.text.count("\n") + 2 for example in examples),
        "words": sum(row["words"] for row in rows),
        "headings": dict(Counter(heading for row in rows for heading in row["headings"]).most_common()),
        "examples": rows,
    }


ASSISTANT_PHRASES = re.compile(
    r"as an ai\b|language model|i'm sorry, but|i cannot assist|\bcertainly!|\bi hope this helps|feel free to|"
    r"happy to help|great question|it's important to note|\bdelve",
    re.IGNORECASE,
)


def lint(examples: Sequence[Example]) -> list[str]:
    """Warnings, which stop no run, each as `file:line: what`."""
    notes = []
    for example in examples:
        notes += [
            f"{example.source}: {phrase!r} is an assistant model's phrase"
            for phrase in sorted({match.group() for match in ASSISTANT_PHRASES.finditer(example.text)})
        ]
        notes += [
            f"{example.source}: an invisible character U+{ord(c):04X}"
            for c in sorted(set(INVISIBLE.findall(example.text)))
        ]
        if split_sections(example.text)[2]:
            notes.append(f"{example.source}: a code fence is never closed, so the headings below it are text")
        if len(example.completion.split()) < 4:
            notes.append(f"{example.source}: the completion has only {len(example.completion.split())} words")
    for i, example in enumerate(examples):
        for later in examples[i + 1 : i + 200]:
            if fuzz.ratio(example.query[:500], later.query[:500]) > 90:
                notes.append(f"{later.source}: nearly the query of {example.source}")
    return notes

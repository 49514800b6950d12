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

import csv
import hashlib
import io
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import regex
from rapidfuzz import fuzz

from mini_symposium.data.forms import TableRow, blank, is_chat_log, is_known, read_chat_log_row, read_row
from mini_symposium.errors import INVISIBLE, Faults, InputError
from mini_symposium.files.reading import json_values, parse_json, read_text
from mini_symposium.files.writing import written_whole
from mini_symposium.recipe import Recipe
from mini_symposium.run import ROOT, find

LARGEST = 2**26
"""Bytes of a dataset. Fifty thousand rows of Alpaca have a third of it."""

Note = tuple[str, str]
"""Where, as `data/mine.md:41`, and what."""


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
    answers: tuple[tuple[int, int, bool], ...] = ()
    """In a row of several turns, each answer's start and end in `text`, and whether it is learned. Empty if the
    completion is the only one."""
    notes: tuple[Note, ...] = field(default=(), compare=False, repr=False)
    """What of the file is not used, and what was read in one of two ways; see `lint`."""

    @property
    def text(self) -> str:
        """The whole row, without special tokens."""
        return self.prompt + self.completion

    @property
    def learned(self) -> list[str]:
        """The answers, which are what is learned unless the whole row is."""
        spans = self.answers or ((len(self.prompt), len(self.text), True),)
        return [self.text[start:end] for start, end, learned in spans if learned]


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
    """Read a document, a table or a folder of them.

    A document is a .md or .txt file of `### ` headings. A table is JSON Lines, JSON, CSV, TSV or Parquet, each row in
    one of `forms.FORMS`, or a chat log of SillyTavern's. InputError names file, line and remedy of each fault.

    >>> examples = load_examples("data/minisymposium.md")
    >>> print(len(examples), examples[2].source, examples[2].query[:26])
    13 data/minisymposium.md:41 A snail sits at the bottom
    """
    given, path = path, find(path)
    if not path.exists():
        hub = "; of a dataset on the hub: hf download --repo-type dataset NAME --local-dir DIR"
        raise InputError(f"{given}: no such file; give a document, a table, or a folder of them{hub}")
    files, notes = _files_of(path) if path.is_dir() else ([path], [])
    size = sum(file.stat().st_size for file in files)
    if size > LARGEST:
        raise InputError(f"{path}: {size:,} bytes; at most {LARGEST:,} are read, for all rows are held in memory")
    faults, examples = Faults(), []
    for file in files:
        with faults.collected():
            examples += _read(file, faults)
    faults.refuse()
    if not examples:
        left_out = [f"{where}: {what}" for where, what in notes]
        raise InputError(f"{path}: no examples in it; write one that starts with `### New Query`", *left_out)
    seen: dict[str, Example] = {}
    for i, example in enumerate(examples):
        # Without a prompt, `query` is only the beginning of the text.
        first = seen.setdefault(example.query if example.prompt else example.text, example)
        if first is not example:
            other = "the same answer, so it is learned twice" if first.text == example.text else "another answer"
            note = (example.source, f"the query is already at {first.source}, with {other}")
            examples[i] = replace(example, notes=(*example.notes, note))
    examples[0] = replace(examples[0], notes=(*notes, *examples[0].notes))
    return examples


def recipe_examples(recipe: Recipe) -> tuple[list[Example], list[Example]]:
    """The rows that a recipe trains on, and those that its `val_set_size` holds out, which its seed draws.

    >>> from mini_symposium import load_recipe
    >>> [len(rows) for rows in recipe_examples(load_recipe("tiny", val_set_size=0.2))]
    [10, 3]
    """
    examples, wanted = load_examples(recipe.dataset), recipe.val_set_size
    count = int(wanted) if wanted >= 1 else math.ceil(wanted * len(examples))
    if count >= len(examples):
        where = recipe.places.get("val_set_size", recipe.name)
        raise InputError(f"{where}: val_set_size: {wanted:g} holds out all of {len(examples)} rows; take less")
    held = set(random.Random(recipe.seed).sample(range(len(examples)), count))
    return tuple([example for i, example in enumerate(examples) if (i in held) == out] for out in (False, True))


SUFFIXES = (".md", ".markdown", ".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Files of a folder that are read. A file that is named itself may have any other name if it holds JSON."""
NO_ROWS = re.compile(
    r"readme|licen[cs]e|changelog|requirements|(dataset_infos?|dataset_dict|state|config|metadata)\.json|\.", re.I
)
"""How the names of files without rows begin: data cards and hidden files."""
OTHER_SPLITS = re.compile(r"(^|[-_./])(test|valid|validation|val|eval|dev)([-_./0-9]|$)", re.I)


def _files_of(folder: Path) -> tuple[list[Path], list[Note]]:
    """A folder's files with rows, and notes on those that are left out: data cards, files of other kinds, and splits
    other than train."""
    try:
        found = sorted(file for file in folder.rglob("*") if file.is_file())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from error
    inside = {file: file.relative_to(folder) for file in found}
    no_rows = {file for file in found if any(NO_ROWS.match(part) for part in inside[file].parts)}
    cards = [file for file in found if file in no_rows and file.suffix.lower() in SUFFIXES]
    unread = [file for file in found if file not in no_rows and file.suffix.lower() not in SUFFIXES]
    rows = [file for file in found if file not in no_rows and file.suffix.lower() in SUFFIXES]
    others = [file for file in rows if OTHER_SPLITS.search(inside[file].as_posix())]
    others = others if len(others) < len(rows) else []
    left_out = {
        "they are data cards, not rows": cards,
        f"only {', '.join(SUFFIXES)} are read": unread,
        "by name they are not for training": others,
    }
    notes = []
    for why, files in left_out.items():
        names = [inside[file].as_posix() for file in files[:NAMED]] + ["..."] * (len(files) > NAMED)
        notes += [(_name(folder), f"left out, because {why}: {', '.join(names)}")] * bool(files)
    return [file for file in rows if file not in others], notes


NAMED = 20
"""Files that a note names."""
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
"""LLaMA-Factory's words for columns, and the fields that they are here; its other words are the fields' own."""


TAGS = {"role_tag": "role", "content_tag": "content"}
"""LLaMA-Factory's words for the keys of a message, and the keys; a `user_tag` names a role of a message."""


def _described(file: Path) -> tuple[dict[str, str], dict[str, str]]:
    """How LLaMA-Factory's dataset_info.json beside a file, or in the folder above, names its columns, and keys and
    roles of its messages: for each of the two {name there: name here}, empty if it does not describe the file."""
    beside = [folder / "dataset_info.json" for folder in file.parents[:2]]
    described = next((path for path in beside if path.is_file()), None)
    entries = parse_json(read_text(described), described) if described else None
    for entry in entries.values() if isinstance(entries, dict) else ():
        if isinstance(entry, dict) and entry.get("file_name") == file.relative_to(described.parent).as_posix():
            columns, tags = (
                {ours: theirs for ours, theirs in given.items() if isinstance(theirs, str)}
                if isinstance(given := entry.get(key), dict)
                else {}
                for key in ("columns", "tags")
            )
            if columns.keys() == {"prompt"}:  # for pretraining
                return {columns["prompt"]: "text"}, {}
            named = {theirs: COLUMNS.get(ours, ours) for ours, theirs in columns.items()}
            return named, {theirs: TAGS.get(ours, ours.removesuffix("_tag")) for ours, theirs in tags.items()}
    return {}, {}


def _renamed(row: object, columns: dict[str, str], tags: dict[str, str]) -> object:
    """A row with its columns, and the keys and roles of its messages, named as forms have them."""
    if not isinstance(row, dict):
        return row
    taken = set(columns.values()) - columns.keys()
    row = {
        columns.get(key, f"{key} (not in dataset_info.json)" if key in taken else key): value
        for key, value in row.items()
    }
    if tags and isinstance(chat := row.get("conversations"), list) and all(isinstance(each, dict) for each in chat):
        chat = [{tags.get(key, key): value for key, value in message.items()} for message in chat]
        roles = {theirs: role for theirs, role in tags.items() if role not in TAGS.values()}
        row["conversations"] = [
            each | {"role": roles[each["role"]]} if str(each.get("role")) in roles else each for each in chat
        ]
    return row


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _read(path: Path, faults: Faults) -> list[Example]:
    """The examples in a file, and in `faults` what is wrong with the others."""
    name, suffix = _name(path), path.suffix.lower()
    _check_unpacked(path)
    names = _described(path)
    if suffix == ".parquet":
        return _from_table([(row, f"{name}, row {n}") for n, row in enumerate(_parquet(path), start=1)], faults, names)
    text = read_text(path).replace("\r\n", "\n").replace("\r", "\n")
    if suffix in (".csv", ".tsv"):
        return _from_table(_csv(text, name, faults), faults, names)
    if suffix in (".jsonl", ".ndjson", ".json") or text.lstrip()[:1] in ("{", "["):
        values = json_values(text, name, faults)
        if is_chat_log([value for value, _ in values]):
            places = [f"{name}:{line}" for _, line in values]
            return [_of_row(read_chat_log_row([value for value, _ in values], places))]
        rows, notes = _unwrapped(values, name) if text.lstrip()[:1] == "{" else (values, [])
        in_line = Counter(line for _, line in rows)
        places = [f"{name}:{line}" + f", row {n}" * (in_line[line] > 1) for n, (_, line) in enumerate(rows, start=1)]
        examples = _from_table([(row, where) for (row, _), where in zip(rows, places, strict=True)], faults, names)
        return [replace(e, notes=(*notes, *e.notes)) for e in examples[:1]] + examples[1:]
    if suffix not in (".md", ".markdown", ".txt"):
        raise InputError(f"{path}: cannot read *{path.suffix}; give one of {', '.join(SUFFIXES)}")
    if suffix == ".txt" and not any(HEADING.match(line) for line in text.split("\n")):
        return _from_text(text, name)
    return list(_from_markdown(text, name, faults))


PACKED = (b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf")
"""How files begin that gzip, zip (also a workbook), zstd, bzip2, xz and 7z wrote."""


def _check_unpacked(path: Path) -> None:
    """Refuse a file that stands for another one, or holds it packed."""
    with suppress(OSError):  # `read_text` says what is wrong
        begins = path.open("rb").read(64) if path.is_file() else b""
        if begins.startswith(PACKED):
            raise InputError(f"{path}: is compressed; unpack it first, or save the sheet of a workbook as CSV in UTF-8")
        if begins.startswith(b"version https://git-lfs"):
            raise InputError(f"{path}:1: only names a file that Git LFS keeps; fetch the file itself by `git lfs pull`")


def _unwrapped(values: list[tuple[object, int]], name: str) -> tuple[list[tuple[object, int]], list[Note]]:
    """If the file is one object with a list `train`, or with only one list of objects: the rows in it, and a note on
    what is beside it. Otherwise `values`."""
    whole, line = values[0] if len(values) == 1 else (None, 0)
    if not isinstance(whole, dict) or is_known(whole):
        return values, []
    lists = {k: v for k, v in whole.items() if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)}
    chosen = "train" if "train" in lists else next(iter(lists), None)
    if chosen is None or (chosen != "train" and len(lists) > 1):
        return values, []
    beside = ", ".join(f"`{key}`" for key in whole if key != chosen)
    notes = [(f"{name}:{line}", f"{beside} beside the rows is not used")] if beside else []
    return [(row, line) for row in lists[chosen]], notes


def _csv(text: str, name: str, faults: Faults) -> list[tuple[dict, str]]:
    """Rows of a table with a line of column names, separated as in that line, or as Excel's `sep=;` above it says."""
    csv.field_size_limit(LARGEST)
    told = re.match(r"sep=(.)\n", text)
    header = re.sub(r'"[^"\n]*"', "", text.lstrip().partition("\n")[0])
    reader = csv.reader(io.StringIO(text), delimiter=told[1] if told else max(",;\t|", key=header.count), strict=True)
    rows, columns, line = [], None, 1
    try:
        for cells in reader:
            if not any(map(str.strip, cells)) or (told and line == 1):
                pass  # Excel writes rows of empty cells
            elif columns is None:
                columns = [cell.strip() for cell in cells]
                twice = [column for column, count in Counter(columns).items() if column and count > 1]
                if twice:
                    raise InputError(f"{name}:{line}: the column {', '.join(twice)} is there twice; rename one of them")
            elif len(cells) != len(columns):
                faults.append(f"{name}:{line}: {len(cells)} cells, but {len(columns)} columns; quote text with commas")
            else:
                rows.append((dict(zip(columns, cells, strict=True)), f"{name}:{line}"))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f'{name}:{line}: not CSV ({error}); write a quote inside quotes twice, ""') from error
    return rows


def _parquet(path: Path) -> list[dict]:
    import pyarrow
    from pyarrow import parquet

    rows, size = [], 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                size += batch.nbytes
                if size > LARGEST:
                    break
                rows += batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not Parquet ({str(error).partition(chr(10))[0]})") from error
    if size > LARGEST:
        raise InputError(f"{path}: over {LARGEST:,} bytes when unpacked, which is the limit; take fewer rows of it")
    return rows


def _from_table(rows: Sequence[tuple[object, str]], faults: Faults, names: tuple[dict, dict]) -> list[Example]:
    rows = [(_renamed(row, *names), where) for row, where in rows] if any(names) else rows
    examples, first = [], rows[0][0] if rows else None
    if isinstance(first, dict) and not is_known(first):  # say so once
        rows = [
            row for n, row in enumerate(rows) if not n or not isinstance(row[0], dict) or row[0].keys() != first.keys()
        ]
    for row, where in rows:
        with faults.collected():
            examples.append(_of_row(read_row(row, where)))
    return examples


def _of_row(row: TableRow) -> Example:
    """The example in a row: its text up to the last learned answer is the prompt, that answer the completion."""
    learned = [n for n, piece in enumerate(row.pieces, start=1) if piece.learned]
    pieces = row.pieces[: learned[-1] if learned else 0]
    if len(pieces) < len(row.pieces) and pieces:
        row.notes.append("the text after the last answer that is learned is left out")
    texts, answers, end = [piece.text for piece in pieces], [], 0
    if len(texts) == 1:  # a text of its own may be sections, as a line that `write_axolotl_jsonl` wrote
        before, sections, _ = split_sections(texts[0])
        if len(sections) > 1 and not before and not any(blank(section.text) for section in sections):
            return _example(sections, lambda _: row.where, _placed(row))
    if not texts or blank(texts[-1]):
        raise InputError(f"{row.where}: no text that is learned; write an answer, or label one as learned")
    for piece in pieces:
        start, end = end, end + len(piece.text)
        if piece.learned is not None:
            answers.append((start, end, piece.learned))
    prompt, completion = "".join(texts[:-1]), texts[-1].rstrip()
    answers[-1] = (len(prompt), len(prompt) + len(completion), True)
    sections = (Section(row.heading, completion),) if row.heading else ()
    query = row.query or prompt or completion[:80]
    spans = tuple(answers) if len(answers) > 1 else ()
    return Example(query, sections, prompt, completion, row.where, spans, _placed(row))


def _placed(row: TableRow) -> tuple[Note, ...]:
    return tuple((row.where, note) for note in row.notes)


def _from_text(text: str, name: str) -> list[Example]:
    """A text without headings: a row each line, as peers read it, or one row if it has paragraphs."""
    if blank(text):
        return []
    if any(not line.strip() for line in text.strip().split("\n")):
        note = "has paragraphs and no heading: read as one row; for a row each line, remove the blank lines"
        return [Example(text.strip()[:80], (), "", text.strip(), f"{name}:1", notes=((f"{name}:1", note),))]
    rows = [(line.strip(), f"{name}:{n}") for n, line in enumerate(text.split("\n"), start=1) if not blank(line)]
    note = (rows[0][1], "has no heading: read as a row each line; for examples, write `### New Query` above each")
    examples = [Example(line[:80], (), "", line, where) for line, where in rows]
    return [replace(examples[0], notes=(note,)), *examples[1:]]


BLANK = r"[ \t\xa0\u3000]"
HEADING = re.compile(rf" {{0,3}}###{BLANK}(.*\S.*)")
"""A line that opens a section of a document."""
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")
RULE = re.compile(r"##? .*|(?:- ?){3,}|(?:\* ?){3,}|(?:_ ?){3,}")
"""A line between examples that belongs to none: a rule or a title."""


def split_sections(text: str, heading: re.Pattern[str] = HEADING) -> tuple[str, list[Section], int]:
    """The text before the first heading, the sections, and the line of a code fence that is never closed, else 0.

    `heading` is what a line must begin with to be a heading; its first group is the heading's text. Lines in fenced
    code are never headings.
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
    if not (match := FENCE.match(line)):
        return opened
    mark, rest = match.groups()
    if opened:
        return "" if mark.startswith(opened) and not rest.strip() else opened
    return "" if mark[0] == "`" and "`" in rest else mark


MOST_HEADINGS = 50
"""How many of a document's headings are recognised without a blank after ### too."""
LONGEST_HEADING = 200
"""A heading of more characters is not compared with others."""


def _from_markdown(text: str, name: str, faults: Faults) -> Iterator[Example]:
    """The examples of a document. A heading that differs from the first one only in case, a colon, a missing blank or a
    number is read as that one, with a note."""
    found = split_sections(text)[1]
    known = list(dict.fromkeys(section.heading for section in found if len(section.heading) <= LONGEST_HEADING))
    names = "|".join(map(re.escape, known[:MOST_HEADINGS]))
    unspaced = ("###", rf"(?:{BLANK}|(?=(?:{names})\W*$))")  # headings without a blank after ###
    others = (("##", BLANK), ("####", BLANK), ("#", BLANK), ("###", "(?!#)"))
    for level, then in [unspaced] if found else others:
        before, sections, left_open = split_sections(text, re.compile(rf" {{0,3}}{level}{then}(.*\S.*)", re.I))
        if sections:
            break
    notes = _titles(before, text, name, faults)
    said = [re.fullmatch(r"([^\W\d][\w ]{0,30}): +(.+)", section.heading) for section in sections]
    if sections and all(said) and not any(section.text for section in sections):  # ### Human: Name a tree.
        sections = [Section(m[1], m[2], section.line) for m, section in zip(said, sections, strict=True)]
        notes.append((f"{name}:{sections[0].line}", "what follows a heading's colon is read as the text below it"))
    if sections and level != "###":
        notes.append((f"{name}:{sections[0].line}", f"headings begin with {level}; they are read as if with ###"))
    if left_open:
        raise InputError(f"{name}:{left_open}: a code fence that is never closed would hide every heading below it")
    sections, starts = _openings(sections, name, notes)
    if sections and len(sections[0].heading) <= LONGEST_HEADING:
        alike = re.compile(rf" {{0,3}}[#*_ ]*({re.escape(sections[0].heading)})[\W_]*$", re.I)
        lines = {section.line for section in sections}
        for other in split_sections(text, alike)[1] if level == "###" else ():
            if other.line not in lines:
                told = f"if it begins an example, write `### {sections[0].heading}`"
                notes.append((f"{name}:{other.line}", f"the line `{other.heading}` is read as text; {told}"))
    if len(starts) == 1 and (len(sections) > 3 or sections[0].heading.endswith(("?", "？"))):
        told = f"one example of {len(sections)} sections, because no other heading is `### {sections[0].heading}`"
        notes.append((f"{name}:{sections[0].line}", f"{told}; begin each example with the same heading"))
    for start, end in pairwise([*starts, len(sections)]):
        last, text = sections[end - 1], _without_rules(sections[end - 1].text)
        if text != last.text:
            sections[end - 1] = replace(last, text=text)
            notes.append((f"{name}:{last.line}", "a rule or title at the end of an answer is left out"))
        with faults.collected():
            yield _example(sections[start:end], lambda line: f"{name}:{line}", notes)
            notes = []


def _without_rules(text: str) -> str:
    lines = text.split("\n")
    while lines and (not lines[-1].strip() or RULE.fullmatch(lines[-1].strip())):
        lines.pop()
    return "\n".join(lines)


def _titles(before: str, text: str, name: str, faults: Faults) -> list[Note]:
    """Notes on what stands above the first heading of a document: front matter and titles are left out."""
    rest = re.sub(r"\A---\n.*?\n---(\n|$)", "", before, flags=re.S)
    closed, mark, end = rest.rpartition("-->")  # else each "<!--" would search to the end of the text
    rest = re.sub(r"(?m)^##? .*$", "", re.sub(r"<!--.*?-->", "", closed + mark, flags=re.S) + end)
    if not blank(rest):
        first = text.find(rest.strip().partition("\n")[0])
        line = text.count("\n", 0, max(0, first)) + 1
        faults.append(f"{name}:{line}: text before the first heading; start the file with `### New Query`")
    return [(f"{name}:1", "what stands above the first `### ` heading is left out")] if before and blank(rest) else []


def _openings(sections: list[Section], name: str, notes: list[Note]) -> tuple[list[Section], list[int]]:
    """The sections, and where examples begin: at the first heading, and at every one that is meant to equal it."""
    if not sections:
        return [], []
    sections = list(sections)
    stem, number = _numbered(sections[0].heading)
    same = [i for i, section in enumerate(sections) if _plain(section.heading) == _plain(sections[0].heading)]
    counted = [i for i, section in enumerate(sections) if _plain(_numbered(section.heading)[0]) == _plain(stem)]
    if number and len(counted) > len(same):
        begins, current = set(counted), ""
        for i, section in enumerate(sections):
            title, own = _numbered(section.heading)
            current = own if i in begins else current
            sections[i] = replace(section, heading=title) if own == current else section
        notes.append((f"{name}:{sections[0].line}", f"headings are numbered; read without numbers, as `### {stem}`"))
        return sections, counted
    answers = [_numbered(sections[i + 1].heading) for i in same if i + 1 < len(sections)]
    stems, numbers = {stem for stem, _ in answers}, [number for _, number in answers]
    if len(stems) == 1 and numbers == [str(n) for n in range(1, len(same) + 1)] and len(same) > 1:
        for i in same:
            sections[i + 1] = replace(sections[i + 1], heading=answers[0][0])
        notes.append((f"{name}:{sections[1].line}", f"answers are numbered; read without, as `### {answers[0][0]}`"))
    spelling = Counter(sections[i].heading for i in same).most_common(1)[0][0]
    plain, begins = _plain(spelling)[:LONGEST_HEADING], set(same)
    for i, section in enumerate(sections):
        if i in begins and section.heading != spelling:
            notes.append((f"{name}:{section.line}", f"`### {section.heading}` is read as `### {spelling}`"))
            sections[i] = replace(section, heading=spelling)
        elif i not in begins and fuzz.ratio(_plain(section.heading)[:LONGEST_HEADING], plain) >= 85:
            told = f"`### {section.heading}` is nearly `### {spelling}`: read as a part of the answer above it"
            notes.append((f"{name}:{section.line}", f"{told}; if it begins an example, spell it alike"))
    return sections, same


def _plain(heading: str) -> str:
    """A heading without what people vary by mistake: case, spaces, and colons, hashes or stars around it."""
    plain = " ".join(heading.casefold().split()).strip(" :：#.*_") if len(heading) <= LONGEST_HEADING else ""
    return plain or heading


def _numbered(heading: str) -> tuple[str, str]:
    """A heading without the number at its end or beginning, and that number, else "".

    >>> _numbered("Question 12:"), _numbered("3. Question"), _numbered("New Query")
    (('Question', '12'), ('Question', '3'), ('New Query', ''))
    """
    if len(heading) > LONGEST_HEADING:
        return heading, ""
    if match := re.fullmatch(r"(\d{1,6})(?:[.):：]?\s+|、\s*)(.*[^\W\d].*)", heading):
        return match[2].rstrip(" :："), match[1]
    match = re.fullmatch(r"(.*?[^\W\d])[\s#.(\[-]*(\d{1,6})[\s:：.)\]]*", heading)
    return (match[1], match[2]) if match else (heading, "")


def _example(sections: Sequence[Section], where: Callable[[int], str], notes: Sequence[Note] = ()) -> Example:
    """The example in `sections`. The request is the first section, the second too after a system text, and all after
    it that are headed Input or Context."""
    faults = Faults(
        f"{where(section.line)}: nothing below `### {section.heading}`; write its text or delete the heading"
        for section in sections
        if blank(section.text)
    )
    asked = 2 if _plain(sections[0].heading) in ("system", "system prompt") else 1
    while asked < len(sections) and _plain(sections[asked].heading) in ("input", "context"):
        asked += 1
    request, answer = sections[:asked], sections[asked:]
    if not answer:
        faults.append(f"{where(sections[0].line)}: a request without an answer; add a `### Complete Response`")
    faults.refuse()
    prompt = "".join(f"### {section.heading}\n{section.text}\n\n" for section in request)
    completion = "\n\n".join([answer[0].text, *(f"### {section.heading}\n{section.text}" for section in answer[1:])])
    query, source = "\n\n".join(section.text for section in request), where(sections[0].line)
    return Example(query, tuple(answer), f"{prompt}### {answer[0].heading}\n", completion, source, notes=tuple(notes))


def write_axolotl_jsonl(examples: Sequence[Example], path: str | Path, answers_only: bool = False) -> None:
    """Write a line for each example: `{"text": ...}`, as Axolotl's `type: completion` reads them.

    With `answers_only`, `{"segments": [{"label", "text"}, ...]}`, as its `type: input_output` does: only answers are
    labelled as learned.
    """
    path = Path(path)
    if path.exists():
        raise InputError(f"{path}: exists already; delete it or choose another name")
    with written_whole(path) as temporary:
        rows = ({"segments": _segments(e)} if answers_only else {"text": e.text} for e in examples)
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _segments(example: Example) -> list[dict]:
    """The example's text in pieces, each with whether it is learned."""
    pieces, end = [], 0
    for start, stop, learned in example.answers or ((len(example.prompt), len(example.text), True),):
        pieces += [{"label": False, "text": example.text[end:start]}] if start > end else []
        pieces.append({"label": learned, "text": example.text[start:stop]})
        end = stop
    return pieces


def fingerprint(examples: Sequence[Example]) -> str:
    """A SHA-256 of all prompts, completions and answers, to tell whether two runs had the same data."""
    rows = (f"{e.prompt}\1{e.completion}" + (f"\1{e.answers}" if e.answers else "") for e in examples)
    return hashlib.sha256("\0".join(rows).encode()).hexdigest()


def tokenize(examples: Sequence[Example], tokenizer, sequence_len: int, completion_only: bool) -> list[Row]:
    """The rows that training sees: the text with the tokenizer's own special tokens around it, and EOS at the end.

    Special tokens that a text spells out become these tokens, and BOS and EOS are not added a second time. Checks for
    mistakes that silently break small fine-tunes: a prompt whose tokens are not a prefix of the row's, so that training
    sees another boundary than inference; a special token that this tokenizer would split into pieces; nothing in the
    loss; a row cut at `sequence_len`. InputError names file and line of each.

    With `completion_only`, only the answers are supervised, each with what ends it; otherwise every token but those of
    answers that their row excludes.

    >>> from mini_symposium.models.base_models import load_tokenizer
    >>> examples, tokenizer = load_examples("data/minisymposium.md"), load_tokenizer("tiny")
    >>> row = tokenize(examples, tokenizer, sequence_len=512, completion_only=True)[0]
    >>> len(row.input_ids), sum(row.completion_mask), row.labels[:3]
    (254, 221, [-100, -100, -100])
    """
    bos = [tokenizer.bos_token_id] if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else []
    never = {tokenizer.unk_token_id, tokenizer.pad_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id}

    def encode(text: str) -> list[int]:
        ids = list(tokenizer(text).input_ids) if text else bos
        return ids[1:] if bos and ids[:2] == bos * 2 else ids

    rows, faults = [], Faults()
    for example in examples:
        with faults.collected():
            ids = encode(example.text)
            if ids[-1:] != [tokenizer.eos_token_id]:
                ids.append(tokenizer.eos_token_id)
            split = [
                t for t in control_tokens(example.text) if len(tokenizer(t, add_special_tokens=False).input_ids) > 1
            ]
            if split:
                raise InputError(
                    f"{example.source}: the text spells {', '.join(split)}, a special token of other models that this "
                    "one splits into pieces; remove it, write the row as messages, or take a base model that has it"
                )
            if unmeant := never & set(ids):
                names = ", ".join(sorted(tokenizer.convert_ids_to_tokens(unmeant)))
                raise InputError(f"{example.source}: the text spells a special token ({names}); write it differently")
            mask = _mask(example, ids, encode, completion_only, tokenizer)
            if len(ids) > sequence_len:
                raise InputError(
                    f"{example.source}: {len(ids)} tokens, but sequence_len is {sequence_len}; "
                    f"shorten it, or set sequence_len to {-(-len(ids) // 64) * 64}"
                )
            rows.append(Row(ids, mask, example.source))
    faults.refuse()
    return rows


def _mask(example: Example, ids: list[int], encode: Callable, completion_only: bool, tokenizer) -> list[int]:
    """1 for each token of `ids` that is supervised. The token in which an answer ends belongs to it."""
    mask = [0 if completion_only else 1] * len(ids)
    for start, end, learned in example.answers or ((len(example.prompt), len(example.text), True),):
        before = encode(example.text[:start])
        if ids[: len(before)] != before:
            at = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(ids) - 1)
            around = tokenizer.decode(ids[max(0, at - 1) : at + 2])
            raise InputError(
                f"{example.source}: prompt and completion share a token near {around!r}, so the model would train on a "
                "boundary that it never meets at inference; end the prompt with a newline"
            )
        until = len(ids)
        if end < len(example.text):
            through = encode(example.text[:end])
            until = next((i + 1 for i, (a, b) in enumerate(zip(through, ids, strict=False)) if a != b), len(through))
        if until - len(before) < 2 and end == len(example.text):
            raise InputError(f"{example.source}: nothing to learn after the prompt; write a completion")
        mask[len(before) : until] = [int(learned)] * (until - len(before))
    return mask


CONTROL = re.compile(r"<[|｜][\w▁]{1,40}[|｜]>|<(?:start|end)_of_turn>|\A<s>|</s>\s*\Z|<[be]os>")


def control_tokens(text: str) -> list[str]:
    """Special tokens of well-known models that a text spells out.

    >>> control_tokens("<s>[INST] Name a metal. [/INST] Copper. </s>")
    ['<s>', '</s>']
    """
    return list(dict.fromkeys(match.strip() for match in CONTROL.findall(text)))


UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")
"""A character of a script that puts no space between words."""


def count_words(text: str) -> int:
    """Words between spaces; in a script without spaces each character counts.

    >>> count_words("A red fox"), count_words("我是小灯")
    (3, 4)
    """
    if text.isascii():
        return len(text.split())
    return len(UNSPACED.findall(text)) + len(UNSPACED.sub(" ", text).split())


def describe(examples: Sequence[Example]) -> dict:
    """The dataset in numbers, ready for JSON: counts, headings, and one entry per example."""
    rows = [
        {
            "source": example.source,
            "query": " ".join(example.query.split())[:70],
            "headings": [section.heading for section in example.sections],
            "words": count_words(example.text),
            "answers": len(example.learned),
            "learned_words": sum(map(count_words, example.learned)),
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
COMPARED = 2000
"""How many examples, from the first, are searched for queries that nearly repeat an earlier one."""


def lint(examples: Sequence[Example]) -> list[str]:
    """Warnings, which stop no run, each as `file:line: what`: what of the files is not used, then what looks wrong.

    What is said of several rows is said once, with their number.
    """
    found: dict[str, list[str]] = {}
    for example in examples:
        for where, what in (*example.notes, *((example.source, what) for what in _oddities(example))):
            found.setdefault(what, []).append(where)
    notes = [
        f"{first}{f' and {len(others):,} more' if others else ''}: {what}" for what, (first, *others) in found.items()
    ]
    repeated = set()
    for i, example in enumerate(examples[:COMPARED]):
        for k in range(i + 1, min(i + 200, COMPARED, len(examples))):
            if k not in repeated and fuzz.ratio(example.query[:500], examples[k].query[:500], score_cutoff=90) > 90:
                repeated.add(k)
                notes.append(f"{examples[k].source}: nearly the query of {example.source}")
    return notes


def _oddities(example: Example) -> Iterator[str]:
    for phrase in sorted({match.group() for match in ASSISTANT_PHRASES.finditer(example.text)}):
        yield f"{phrase!r} is an assistant model's phrase"
    for c in sorted(set(INVISIBLE.findall(example.text))):
        yield f"an invisible character U+{ord(c):04X}"
    if tokens := control_tokens(example.text):
        yield f"spells {', '.join(tokens)}: trained as special tokens where the base model has them, else refused"
    if macros := re.findall(r"\{\{(?:user|char)\}\}", example.text, re.I):
        yield f"spells {', '.join(dict.fromkeys(macros))}: trained as it is written; write a name instead"
    if re.search(r"(?m)^ {0,3}<!--", example.text):
        yield "holds a comment (<!--): trained as it is written, and headings in it are headings; remove it"
    if split_sections(example.text)[2]:
        yield "a code fence is never closed, so the headings below it are text"
    if (count := count_words(example.completion)) < 4:
        yield f"the completion has only {count} words"

"""A playground session on disk: what was asked under which settings, every answer, and formats as presets.

Files get names that are not taken. What a model or a preset says is kept as it is, in JSON; in Markdown it stands in
fences longer than any run of backticks in it, so that none of it is read as markup.
"""

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from itertools import chain, count
from pathlib import Path

from mini_symposium.data.prompt_formats import PromptFormat, load_preset
from mini_symposium.errors import InputError
from mini_symposium.files.writing import write_json, written_whole

LARGEST_PRESET = 256 * 1024
"""Bytes; SillyTavern's own are about one KiB."""


def _free(folder: Path, stem: str, suffix: str) -> Path:
    """`stem` and a number that no file of the folder has, whatever its suffix."""
    number = 1
    while any(folder.glob(f"{stem}-{number:03d}.*")):
        number += 1
    return folder / f"{stem}-{number:03d}{suffix}"


def save(log: Iterable[Mapping], about: Mapping, folder: Path) -> tuple[Path, Path]:
    """Write a session as JSON and as Markdown, under one name; return both paths.

    Parameters
    ----------
    log
        As `workbench.Workbench.log` has it.
    about
        What it was asked of: scale, base model and the like.

    Raises
    ------
    InputError
        If nothing was asked yet, or the folder cannot be written.
    """
    log = list(log)
    if not log:
        raise InputError("nothing was asked yet, so there is nothing to save")
    target = _free(folder, datetime.now().strftime("session-%Y-%m-%d"), ".json")
    write_json(target, {**about, "saved": datetime.now().isoformat(timespec="seconds"), "asked": log})
    with written_whole(target.with_suffix(".md")) as temporary:
        temporary.write_text(markdown(log, about), encoding="utf-8")
    return target, target.with_suffix(".md")


def markdown(log: Iterable[Mapping], about: Mapping) -> str:
    """A session to read: each question, then its answers by format and model."""
    parts = ["# Playground session", ", ".join(f"{key}: {_code(value)}" for key, value in about.items())]
    for number, asked in enumerate(log, start=1):
        settings = asked["sampling"] if isinstance(asked["sampling"], str) else json.dumps(asked["sampling"])
        parts += [f"## {number}", f"{settings}, at most {asked['max_new_tokens']} tokens"]
        query = None
        for cell in asked["cells"]:
            if cell["query"] != query:
                query = cell["query"]
                parts.append(_fenced(query))
            recited = f", recited {cell['recited']:.0%} ({cell['row']})" if cell["row"] else ""
            parts.append(f"### {_code(cell['format'])} · {_code(cell['model'])}")
            parts.append(f"{cell['tokens']} tokens, {cell['stop_reason']}, {cell['seconds']:g} s{recited}")
            parts.append(_fenced(cell["answer"]))
    return "\n\n".join(parts) + "\n"


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _code(value: object) -> str:
    """
    >>> _code("a`<b>")
    '`` a`<b> ``'
    """
    text = " ".join(str(value).split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def export_preset(form: PromptFormat, folder: Path) -> Path:
    """Write a format as the JSON that SillyTavern imports, under its name as far as that can be a file's."""
    stem = re.sub(r"[^\w-]+", "-", form.name).strip("-")[:60] or "format"
    target = folder / f"{stem}.json"
    if target.exists():
        target = _free(folder, stem, ".json")
    form.save(target)
    return target


def read_preset(name: str, content: bytes, taken: Iterable[str] = ()) -> PromptFormat:
    """An uploaded SillyTavern preset, under a name that is not `taken`.

    Raises
    ------
    InputError
        If it is too large, no JSON, or no instruct preset; names the file as the user did.
    """
    if len(content) > LARGEST_PRESET:
        raise InputError(f"{name}: {len(content):,} bytes are no preset; at most {LARGEST_PRESET:,} are read")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preset.json"
        path.write_bytes(content)
        try:
            form = load_preset(path)
        except InputError as error:
            raise InputError(str(error).replace(str(path), name)) from error
    given = form.name if form.name != path.stem else Path(name).stem
    first = " ".join(given.split())[:80] or "preset"
    names = chain([first], (f"{first} ({number})" for number in count(2)))
    return replace(form, name=next(one for one in names if one not in set(taken)))

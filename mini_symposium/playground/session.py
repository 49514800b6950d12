"""A playground session on disk: the settings, every query and every answer; and prompt formats as preset files.

Each file gets a new name, so none is overwritten. JSON keeps the texts of models and presets unchanged. In the other
forms none of them is read as markup or formula: in Markdown they are in fences longer than any run of backticks in
them, in HTML they are escaped, and in CSV an apostrophe comes before what a spreadsheet would compute.
"""

import csv
import json
import re
import tempfile
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from io import StringIO
from itertools import chain, count
from pathlib import Path

from mini_symposium.data.prompt_formats import PromptFormat, load_preset
from mini_symposium.errors import InputError
from mini_symposium.figures.tables import as_html, plain
from mini_symposium.files.writing import write_json, written_whole
from mini_symposium.playground.blind import sentence


def save(log: Iterable[Mapping], about: Mapping, folder: Path, blind_tests: Sequence[Mapping] = ()) -> list[Path]:
    """Write a session as JSON, Markdown, CSV and HTML, with the same file name; return the paths.

    `log` is that of a `Workbench`, `about` tells where its answers come from, and a blind test is a `BlindTest.result`.
    """
    log = list(log)
    if not log:
        raise InputError("nothing was asked yet, so there is nothing to save")
    target = _numbered(folder, datetime.now().strftime("session-%Y-%m-%d"), ".json")
    told = {**about, "saved": datetime.now().isoformat(timespec="seconds")}
    write_json(target, {**told, "asked": log, "blind_tests": list(blind_tests)})
    texts = {".md": markdown(log, about, blind_tests), ".csv": as_csv(log), ".html": as_page(log, told, blind_tests)}
    for suffix, text in texts.items():
        with written_whole(target.with_suffix(suffix)) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
    return [target, *(target.with_suffix(suffix) for suffix in texts)]


COLUMNS = ("model", "format", "query", "answer", "tokens", "stop_reason", "seconds", "recited", "row")


def as_csv(log: Iterable[Mapping]) -> str:
    """A line for each answer. A text that a spreadsheet would compute, as `=1+1`, begins with an apostrophe."""
    file = StringIO()
    writer = csv.writer(file)
    writer.writerow(["asked", *COLUMNS, "max_new_tokens", "sampling"])
    for number, entry in enumerate(log, start=1):
        settings = [entry["max_new_tokens"], json.dumps(entry["sampling"])]
        for cell in entry["cells"]:
            values = [number, *(cell[key] for key in COLUMNS), *settings]
            formula = ("=", "+", "-", "@", "\t", "\r")
            writer.writerow([f"'{v}" if isinstance(v, str) and v.startswith(formula) else v for v in values])
    return file.getvalue()


def as_page(log: Iterable[Mapping], about: Mapping, blind_tests: Iterable[Mapping] = ()) -> str:
    """A web page of the answers, as tables; it loads nothing and runs nothing."""
    cells = [(n, *(cell[key] for key in COLUMNS)) for n, entry in enumerate(log, start=1) for cell in entry["cells"]]
    votes = "".join(f"<p>Blind test: {as_html(sentence(test))}</p>" for test in blind_tests)
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Playground session</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><style>
:root {{ color-scheme: light dark }} body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em }}
td {{ border-top: 1px solid #8888; padding: 6px 10px }}</style>
<h1>Playground session</h1>{plain(list(about), [list(about.values())]).html}{votes}
{plain(["asked", *COLUMNS], cells).html}</html>
"""


def _numbered(folder: Path, stem: str, suffix: str) -> Path:
    """`stem` with the first number that no file in the folder has, whatever that file's suffix."""
    names = (f"{stem}-{number:03d}" for number in count(1))
    return folder / (next(name for name in names if not any(folder.glob(f"{name}.*"))) + suffix)


def markdown(log: Iterable[Mapping], about: Mapping, blind_tests: Iterable[Mapping] = ()) -> str:
    """A session for people to read: each query, then its answers by model and format."""
    parts = ["# Playground session", ", ".join(f"{key}: {_code(value)}" for key, value in about.items())]
    parts += [f"Blind test: {_code(sentence(test))}" for test in blind_tests]
    for number, entry in enumerate(log, start=1):
        settings = entry["sampling"] if isinstance(entry["sampling"], str) else json.dumps(entry["sampling"])
        parts += [f"## {number}", f"{settings}, at most {entry['max_new_tokens']} tokens"]
        query = None
        for cell in entry["cells"]:
            if cell["query"] != query:
                query = cell["query"]
                parts.append(_fenced(query))
            recited = f", recited {cell['recited']:.0%} ({cell['row']})" if cell["row"] else ""
            parts.append(f"### {_code(cell['format'])} · {_code(cell['model'])}")
            parts.append(f"{cell['tokens']} tokens, {cell['stop_reason']}, {cell['seconds']:g} s{recited}")
            parts.append(_fenced(cell["answer"]))
    return "\n\n".join(parts) + "\n"


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + _longest_backticks(text))
    return f"{fence}text\n{text}\n{fence}"


def _code(value: object) -> str:
    """Inline code.

    >>> _code("a`<b>")
    '`` a`<b> ``'
    """
    text = " ".join(str(value).split())
    ticks = "`" * (1 + _longest_backticks(text))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def _longest_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def export_preset(form: PromptFormat, folder: Path) -> Path:
    """Write a format as the JSON that SillyTavern imports, to a file that is named like the format."""
    stem = re.sub(r"[^\w-]+", "-", form.name).strip("-")[:60] or "format"
    target = folder / f"{stem}.json"
    if target.exists():
        target = _numbered(folder, stem, ".json")
    form.save(target)
    return target


def read_preset(name: str, content: bytes, taken: Container[str] = ()) -> PromptFormat:
    """An uploaded SillyTavern preset, under its own name or else its file's; a number is added if it is `taken`."""
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
    return replace(form, name=next(free for free in names if free not in taken))

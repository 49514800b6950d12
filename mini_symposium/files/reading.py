"""Reading files that somebody else wrote, as UTF-8, JSON or YAML. An unreadable file raises a one-line error.

Every function raises only InputError, and takes time in proportion to the size of the file: it waits for no named pipe
and reads no device. No returned value is nested so deeply that other code could not walk over it.
"""

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from mini_symposium.errors import Faults, InputError

DEEPEST = 100
"""Maximum depth of lists and objects in JSON."""
DEEPEST_YAML = 10

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def path_of(given: str | Path) -> Path:
    """`given` as a path with ~ filled in. Raises InputError for a path that no file can have."""
    try:
        path = Path(given).expanduser()
        path.lstat()
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, ValueError) as error:  # too long or no permission; an unknown ~name; a NUL
        raise InputError(f"{given}: cannot be looked up ({getattr(error, 'strerror', None) or error})") from error
    return path


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, without a byte order mark."""
    try:
        # Folders and devices are not read, nor named pipes: reading one would wait for a writer.
        data = path.read_bytes() if path.is_file() or not path.exists() else None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if data is None:
        raise InputError(f"{path}: cannot be read (not a file)")
    zeros = data[:200:2].count(0), data[1:200:2].count(0)  # UTF-16 has one in every other byte of English
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or (not min(zeros) and 4 * max(zeros) > len(data[:200])):
        raise InputError(f"{path}:1: not UTF-8 but UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8 FILE > NEW)")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{data[: error.start].count(10) + 1}: not UTF-8; save the file as UTF-8") from error


def parse_json(text: str, name: str | Path, line: int | None = None):
    """The value of a JSON text; `line` is its number if it is one line of the file `name`.

    Refused are also a key twice in one object, more than `DEEPEST` levels, a number of thousands of digits, and half of
    a surrogate pair.
    """
    where = f"{name}:{line}" if line else str(name)
    try:
        value = json.loads(text, object_pairs_hook=_each_key_once)
    except json.JSONDecodeError as error:
        raise InputError(f"{name}:{line or error.lineno}: not JSON ({error.msg})") from error
    except LookupError as error:
        raise InputError(f"{where}: {error.args[0]}; give it once") from error
    except RecursionError as error:
        raise InputError(f"{where}: not JSON that is read here (nested too deeply)") from error
    except ValueError as error:
        raise InputError(f"{where}: not JSON that is read here (a number of thousands of digits)") from error
    if text.count("[") + text.count("{") > DEEPEST and _deeper(value, DEEPEST):
        raise InputError(f"{where}: not JSON that is read here (nested too deeply)")
    if _SURROGATE_ESCAPE.search(text) and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise InputError(f"{where}: half a character (a lone \\ud800 to \\udfff escape); write it out")
    return value


def _each_key_once(pairs: list[tuple[str, object]]) -> dict:
    """The object of these pairs; LookupError for a key that it has twice, of which Python would drop the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise LookupError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice in one object")
    return found


def json_values(text: str, name: str | Path, faults: Faults) -> list[tuple[object, int]]:
    """The values in a text of JSON, each with its line.

    The text is a value on each line (JSON Lines, also with a comma after it), values over several lines, or one list,
    whose items are returned. `faults` gets what is wrong with each line; after a fault in a value over several lines,
    nothing more is read.
    """
    if text.lstrip()[:1] != "[":
        lines = [(line.rstrip().rstrip(","), number) for number, line in enumerate(text.split("\n"), start=1)]
        lines = [(line, number) for line, number in lines if line.strip()]
        if any(_is_object(line) for line, _ in (*lines[:1], *lines[-1:])):
            values = []
            for line, number in lines:
                with faults.collected():
                    values.append((parse_json(line, name, number), number))
            return values
    with faults.collected():
        return list(_values_over_lines(text, name))
    return []


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


def _values_over_lines(text: str, name: str | Path) -> Iterator[tuple[object, int]]:
    """The values in `text`, one after the other, or the items of the list that it is."""
    text = text.rstrip()
    decoder, space, line, counted = json.JSONDecoder(), re.compile(r"\s*"), 1, 0
    at = space.match(text).end()
    listed = text[at : at + 1] == "["
    at = space.match(text, at + listed).end()
    while at < len(text) and not (listed and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        try:
            end = decoder.raw_decode(text, at)[1]
        except json.JSONDecodeError as error:
            found = line + text.count("\n", at, error.pos)
            raise InputError(f"{name}:{found}: not JSON ({error.msg})") from error
        except (RecursionError, ValueError):
            end = len(text)  # `parse_json` says what is wrong
        yield parse_json(text[at:end], name, line), line
        at = space.match(text, end).end()
        if listed and text[at : at + 1] == ",":
            at = space.match(text, at + 1).end()
        elif listed and text[at : at + 1] != "]":
            found = line + text.count("\n", counted, at)
            raise InputError(f"{name}:{found}: not JSON (Expecting ',' delimiter or ']' between the items of a list)")
    if listed and text[at + 1 :].strip():
        raise InputError(f"{name}:{line + text.count(chr(10), counted, at)}: not JSON (Extra data after the list)")


def _deeper(value, levels: int) -> bool:
    """Whether lists and objects are nested more than `levels` deep, looking at one level at a time."""
    level = [value] if isinstance(value, (list, dict)) else []
    for _ in range(levels):
        children = (child for parent in level for child in (parent.values() if isinstance(parent, dict) else parent))
        level = [child for child in children if isinstance(child, (list, dict))]
    return bool(level)


def parse_yaml(text: str, name: str | Path, hint: str) -> tuple[dict, yaml.MappingNode]:
    """The values of a YAML file of `key: value` lines, and its root node; nodes have line numbers.

    Refused are also a key twice in a mapping, and what could grow when it is read: anchors, aliases and more than
    `DEEPEST_YAML` levels. `hint` says what the file should look like, if it is a list or a single value.
    """
    where, values = str(name), {}
    try:
        _check_events(text, name)
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise InputError(f"{name}:1: {hint}")
        _check_keys(root, name)
        for key, node in root.value:
            where = f"{name}:{key.start_mark.line + 1}"
            if key.tag != "tag:yaml.org,2002:str":
                raise InputError(f"{where}: a key is a word, such as learning_rate")
            values[key.value] = loader.construct_object(node, deep=True)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else str(name)
        advice = "; indent with spaces" if mark and "\t" in (mark.get_snippet() or "") else ""
        raise InputError(f"{where}: not YAML ({getattr(error, 'problem', None) or error}){advice}") from error
    except InputError:
        raise
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:  # a 13th month, `!!int ''`
        raise InputError(f"{where}: not a value that can be read ({error})") from error
    return values, root


def _check_events(text: str, name: str | Path) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"{name}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.NodeEvent) and event.anchor:
            raise InputError(f"{where}: anchors and aliases are not read; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST_YAML:
            raise InputError(f"{where}: nested too deeply")


def _check_keys(node: yaml.Node, name: str | Path) -> None:
    """Refuse a mapping that has the same key twice, at any depth; YAML would use the last value."""
    lines: dict[str, int] = {}
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        key, value = child if isinstance(node, yaml.MappingNode) else (None, child)
        if key is not None:
            line, word = key.start_mark.line + 1, str(key.value)
            if word in lines:
                raise InputError(f"{name}:{line}: {word} is already in line {lines[word]}; keep one of them")
            lines[word] = line
        _check_keys(value, name)


@contextmanager
def refuse_other_shapes(found: str, remedy: str = "") -> Iterator[None]:
    """Turn an exception about unexpected data, such as a missing key, into an InputError.

    >>> with refuse_other_shapes("runs/a/results.json: not results", "run the notebooks"):
    ...     {"loss": 0.5}["travel"]
    Traceback (most recent call last):
    mini_symposium.errors.InputError: runs/a/results.json: not results (KeyError: 'travel'); run the notebooks
    """
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        remedy = remedy and f"; {remedy}"
        raise InputError(f"{found} ({type(error).__name__}: {error}){remedy}") from error

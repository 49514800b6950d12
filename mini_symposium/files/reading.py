"""Files that somebody else wrote: read as UTF-8, JSON or a flat YAML, and refused in one line if they are not that.

Nothing but InputError comes out of here, and the time grows with the size of the file: no named pipe is waited for,
no device read, nothing nested so deeply that whoever walks over it next would fail.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from mini_symposium.errors import InputError

DEEPEST = 100
"""Lists and objects within each other."""

_HALF_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
_HALF = re.compile("[\ud800-\udfff]")


def path_of(given: str | Path) -> Path:
    """`given` as a path with ~ filled in; one that no file can have is refused.

    >>> path_of("data/mine.md").name
    'mine.md'
    """
    try:
        path = Path(given).expanduser()
        path.lstat()
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, ValueError) as error:  # too long or no permission; a ~name that nobody has; a NUL
        raise InputError(f"{given}: cannot be looked up ({getattr(error, 'strerror', None) or error})") from error
    return path


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises
    ------
    InputError
        If it is not there, is no ordinary file, cannot be read, or is not UTF-8; then names the line.
    """
    try:
        data = path.read_bytes() if path.is_file() or not path.exists() else None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if data is None:  # a folder, a device, a pipe that would be waited for
        raise InputError(f"{path}: cannot be read (not a file)")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{data[: error.start].count(10) + 1}: not UTF-8; save the file as UTF-8") from error


def parse_json(text: str, name: str | Path, line: int | None = None):
    """The value that `text` holds; `line` is where it stands, if it is one line of a file.

    Raises
    ------
    InputError
        If it is not JSON, has numbers or depths that nobody writes, or a text in it is no text.
    """
    where = f"{name}:{line}" if line else str(name)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{name}:{line or error.lineno}: not JSON ({error.msg})") from error
    except RecursionError as error:
        raise InputError(f"{where}: not JSON that is read here (nested too deeply)") from error
    except ValueError as error:
        raise InputError(f"{where}: not JSON that is read here (a number of thousands of digits)") from error
    if text.count("[") + text.count("{") > DEEPEST and _deeper(value, DEEPEST):
        raise InputError(f"{where}: not JSON that is read here (nested too deeply)")
    if _HALF_ESCAPED.search(text) and _HALF.search(json.dumps(value, ensure_ascii=False)):
        raise InputError(f"{where}: half a character (a lone \\ud800 to \\udfff escape); write it out")
    return value


def _deeper(value, levels: int) -> bool:
    """Whether lists and objects are nested more than `levels` deep; all those of a level at a time."""
    layer = [value] if isinstance(value, (list, dict)) else []
    for _ in range(levels):
        inside = (below for each in layer for below in (each.values() if isinstance(each, dict) else each))
        layer = [below for below in inside if isinstance(below, (list, dict))]
    return bool(layer)


OPENING = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
DEEPEST_YAML = 10


def parse_yaml(text: str, path: Path) -> tuple[dict, dict[str, str]]:
    """The values of a file of `key: value` lines, and for each key `file:line`.

    Raises
    ------
    InputError
        If it is anything else, a key stands twice, or a value repeats another (an alias) or is nested deeply.
    """
    values, lines, where = {}, {}, str(path)
    try:
        check_tokens(text, path)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"{path}:1: a recipe is a list of `key: value` lines")
        for key, value in node.value:
            where = f"{path}:{key.start_mark.line + 1}"
            if key.tag != "tag:yaml.org,2002:str":
                raise InputError(f"{where}: a key is a word, such as learning_rate")
            if key.value in lines:
                raise InputError(f"{where}: {key.value} stands already at {lines[key.value]}; keep one of them")
            lines[key.value] = where
            refuse_repeated(value, path)
            values[key.value] = loader.construct_object(value, deep=True)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise InputError(f"{where}: not YAML ({getattr(error, 'problem', None) or error})") from error
    except InputError:
        raise
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:  # a 13th month, `!!int ''`
        raise InputError(f"{where}: not a value that a recipe has ({error})") from error
    return values, lines


def refuse_repeated(node: yaml.Node, path: str | Path) -> None:
    """Refuse a key that stands twice in one mapping, at any depth, of which YAML would take the last."""
    lines: dict[str, int] = {}
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        key, value = child if isinstance(node, yaml.MappingNode) else (None, child)
        if key is not None:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in lines:
                raise InputError(f"{path}:{line}: {name} stands already in line {lines[name]}; keep one of them")
            lines[name] = line
        refuse_repeated(value, path)


def check_tokens(text: str, path: str | Path) -> None:
    """Refuse YAML that could grow when it is read, before it is.

    Raises
    ------
    InputError
        For an anchor, an alias, or a depth that nobody writes.
    """
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, (yaml.AliasToken, yaml.AnchorToken)):
            raise InputError(f"{path}: anchors and aliases are not read; write the value out")
        depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
        if depth > DEEPEST_YAML:
            raise InputError(f"{path}:{token.start_mark.line + 1}: nested too deeply")


@contextmanager
def refuse_other_shapes(found: str, remedy: str = "") -> Iterator[None]:
    """Turn what Python or pandas raises over values of another shape, such as a missing key, into one InputError.

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

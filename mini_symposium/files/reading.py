"""Reading files that somebody else wrote, as UTF-8, JSON or YAML. An unreadable file raises a one-line error.

Every function raises only InputError, and takes time in proportion to the size of the file: it waits for no named pipe
and reads no device. No returned value is nested so deeply that other code could not walk over it.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from mini_symposium.errors import InputError

DEEPEST = 100
"""Maximum depth of lists and objects in JSON."""
DEEPEST_YAML = 10

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_OPENING = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


def path_of(given: str | Path) -> Path:
    """`given` as a path with ~ filled in. Raises InputError for a path that no file can have.

    >>> path_of("data/mine.md").name
    'mine.md'
    """
    try:
        path = Path(given).expanduser()
        path.lstat()
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, ValueError) as error:  # too long or no permission; an unknown ~name; a NUL
        raise InputError(f"{given}: cannot be looked up ({getattr(error, 'strerror', None) or error})") from error
    return path


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises
    ------
    InputError
        If the file does not exist, is not an ordinary file, cannot be read, or is not UTF-8 (then names the line).
    """
    try:
        # Folders and devices are not read, nor named pipes: reading one would wait for a writer.
        data = path.read_bytes() if path.is_file() or not path.exists() else None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if data is None:
        raise InputError(f"{path}: cannot be read (not a file)")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{data[: error.start].count(10) + 1}: not UTF-8; save the file as UTF-8") from error


def parse_json(text: str, name: str | Path, line: int | None = None):
    """The value of a JSON text.

    Parameters
    ----------
    name, line
        The file's name, and the line number if `text` is one line of the file.

    Raises
    ------
    InputError
        If `text` is not JSON, is nested more than `DEEPEST` levels deep, or holds a number of thousands of digits or
        half of a surrogate pair.
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
    if _SURROGATE_ESCAPE.search(text) and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise InputError(f"{where}: half a character (a lone \\ud800 to \\udfff escape); write it out")
    return value


def _deeper(value, levels: int) -> bool:
    """Whether lists and objects are nested more than `levels` deep, looking at one level at a time."""
    level = [value] if isinstance(value, (list, dict)) else []
    for _ in range(levels):
        children = (child for parent in level for child in (parent.values() if isinstance(parent, dict) else parent))
        level = [child for child in children if isinstance(child, (list, dict))]
    return bool(level)


def parse_yaml(text: str, name: str | Path, hint: str) -> tuple[dict, yaml.MappingNode]:
    """The values of a YAML file of `key: value` lines, and its root node; nodes have line numbers.

    Parameters
    ----------
    hint
        What the file should look like, for the error if it is a list or a single value.

    Raises
    ------
    InputError
        If the text is not YAML of `key: value` lines, a mapping has a key twice, or the text could grow when it is
        read: it has anchors, aliases or more than `DEEPEST_YAML` levels.
    """
    where, values = str(name), {}
    try:
        _check_tokens(text, name)
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
        raise InputError(f"{where}: not YAML ({getattr(error, 'problem', None) or error})") from error
    except InputError:
        raise
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:  # a 13th month, `!!int ''`
        raise InputError(f"{where}: not a value that can be read ({error})") from error
    return values, root


def _check_tokens(text: str, name: str | Path) -> None:
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, (yaml.AliasToken, yaml.AnchorToken)):
            raise InputError(f"{name}: anchors and aliases are not read; write the value out")
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if depth > DEEPEST_YAML:
            raise InputError(f"{name}:{token.start_mark.line + 1}: nested too deeply")


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

import json
import os
import re

import pytest

from mini_symposium.errors import InputError
from mini_symposium.files.reading import (
    DEEPEST,
    DEEPEST_YAML,
    parse_json,
    parse_yaml,
    path_of,
    read_text,
    refuse_other_shapes,
)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "~nobody-of-that-name/x.md", "/dev/null/x.md"])
def test_a_path_that_no_file_can_have_is_refused(name):
    with pytest.raises(InputError, match="cannot be looked up"):
        path_of(name)


def test_a_home_directory_is_filled_in(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of("~/a.md") == tmp_path / "a.md"


def test_a_byte_order_mark_is_no_text_and_other_encodings_are_refused_at_their_line(tmp_path):
    path = tmp_path / "a.md"
    path.write_bytes("\ufeffé\n".encode())
    assert read_text(path) == "é\n"
    path.write_bytes("a\nb\né".encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.md:3: not UTF-8; save the file as UTF-8"):
        read_text(path)


def test_only_ordinary_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "zero", "."):
        with pytest.raises(InputError, match=r"cannot be read \(not a file\)"):
            read_text(tmp_path / name)
    for name in ("loop", "nothing"):
        with pytest.raises(InputError, match=rf"{name}: cannot be read \(.+\)"):
            read_text(tmp_path / name)


@pytest.mark.parametrize(
    "text, line, expected",
    [
        ('{"a":\n1', None, r"^a\.json:2: not JSON"),
        ('{"a"', 7, r"^a\.json:7: not JSON"),
        ("[" * 100_000, None, r"^a\.json: .*nested too deeply"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), 3, r"^a\.json:3: .*nested too deeply"),
        ('{"a":' * (DEEPEST + 1) + "1" + "}" * (DEEPEST + 1), None, "nested too deeply"),
        ("9" * 5000, None, "thousands of digits"),
        (r'["\ud83d"]', None, "half a character"),
        (r'{"\uDC00": 1}', None, "half a character"),
        ('[{"a": 1}, {"b": 1, "c": {"d": 2, "d": 3}}]', 4, r"^a\.json:4: the key 'd' is there twice in one object"),
    ],
)
def test_what_is_not_json_is_refused(text, line, expected):
    with pytest.raises(InputError, match=expected):
        parse_json(text, "a.json", line)


@pytest.mark.parametrize("value", [1.5, None, "\U0001f308 [{[", [[]] * 500, {"a": [{"b": 1}]}])
def test_other_json_is_read(value):
    assert parse_json(json.dumps(value), "a.json") == value
    deepest = "[" * DEEPEST + "]" * DEEPEST
    assert json.dumps(parse_json(deepest, "a.json")) == deepest


def test_yaml_gives_values_and_their_lines():
    values, root = parse_yaml("# a recipe\na: 1\nb:\n  - {c: yes}\n", "a.yml", "")
    assert values == {"a": 1, "b": [{"c": True}]}
    assert [(key.value, key.start_mark.line + 1) for key, _ in root.value] == [("a", 2), ("b", 3)]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("- 1\n", r"^a\.yml:1: write a list of keys$"),
        ("", r"^a\.yml:1: write a list of keys$"),
        ("a: 1\nb: [1\n", r"^a\.yml:3: not YAML"),
        ("a: 1\n2: 1\n", r"^a\.yml:2: a key is a word"),
        ("<<: {a: 1}\n", r"^a\.yml:1: a key is a word"),
        ("a: 1\nb: 2\na: 3\n", r"^a\.yml:3: a is already in line 1"),
        ("a:\n  - b: {c: 1,\n     c: 2}\n", r"^a\.yml:3: c is already in line 2"),
        ("b: 2\na: &x 1\n", r"^a\.yml:2: anchors and aliases are not read"),
        ("a:\n\tb: 1\n", r"^a\.yml:2: not YAML .*; indent with spaces"),
        (f"a: 1\nb: {'[' * DEEPEST_YAML}{']' * DEEPEST_YAML}\n", r"^a\.yml:2: nested too deeply"),
        ("a: 1\nb: 2024-13-45\n", r"^a\.yml:2: not a value that can be read \(month"),
        ("a: !!int ''\n", r"^a\.yml:1: not a value that can be read"),
        ("a: 1\nb: !!python/object/apply:os.system [true]\n", r"^a\.yml:2: not YAML"),
    ],
)
def test_what_is_not_a_list_of_keys_is_refused(text, expected):
    with pytest.raises(InputError, match=expected):
        parse_yaml(text, "a.yml", "write a list of keys")


def test_values_of_another_shape_are_one_line_and_other_errors_pass():
    for code in ("{}['a']", "int('x')", "1 / 0", "None.x", "len(1)"):
        with pytest.raises(InputError) as refused, refuse_other_shapes("a.json: not results", "run it again"):
            eval(code)
        assert re.fullmatch(r"a\.json: not results \(\w+: .+\); run it again", str(refused.value))
    with pytest.raises(InputError, match=r"^as it was$"), refuse_other_shapes("a.json"):
        raise InputError("as it was")
    with pytest.raises(KeyboardInterrupt), refuse_other_shapes("a.json"):
        raise KeyboardInterrupt

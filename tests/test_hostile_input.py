"""Whatever a file holds, a parser reads it or refuses it in one line, in time that grows as the file does."""

import json
import os
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from conftest import TRIED, command, only_ours
from hypothesis import given
from hypothesis import strategies as st

from mini_symposium.claims.evidence import load_evidence
from mini_symposium.claims.ledger import judge
from mini_symposium.data.dataset import describe, fingerprint, lint, load_examples, write_axolotl_jsonl
from mini_symposium.data.forms import FORMS, read_row
from mini_symposium.data.prompt_formats import FORMATS, PromptFormat, load_chat, load_preset, prompt_format
from mini_symposium.errors import InputError, RunError, printable
from mini_symposium.figures import tables
from mini_symposium.recipe import KEYS, load_recipe
from mini_symposium.reproduce.notebooks import check_parameters, parse_parameters, read_notebooks
from mini_symposium.run import ROOT, RunDirectory, find, read_jsonl

MALFORMED = ROOT / "tests" / "fixtures" / "malformed"
EXPECTED = json.loads((MALFORMED / "expected.json").read_text())
PARSERS = {
    "dataset": load_examples,
    "recipe": load_recipe,
    "preset": load_preset,
    "chat": load_chat,
    "metrics": read_jsonl,
}
PIECES = [
    *("### New Query", "### Complete Response", "### ", "#", "```", "````", "~~~", "~~~~ python", "\n", "\n\n"),
    *("\r\n", "\r", "<script>alert(1)</script>", "<img src=x onerror=y>", "&amp;", "$x$", '\\', "<!--", "]]>"),
    *("\t", "\x0b", "\x85", "\x00", "\x07", "\x1b[2J", "\x9b31m", "\u202e", "\u2066", "\u200b", "\u200d", "\ufeff"),
    *("\u2028", "\U000e0041", "مرحبا", "שלום", "巴黎", "\U0001f3f3\ufe0f\u200d\U0001f308", "é", "é", "\xa0"),
    *("\u3000", "İ", "ß", "{{user}}", "{{char}}", "{{name}}", "{{trim}}", "{{//", "}}", "{{newline}}", "<USER>"),
    *("<BOT>", "$&", "$`", "$'", "$$", "---", "...", "- ", ": ", "? ", "&a ", "*a", "<<: "),
    *("!!python/object/apply:os.system ", "!!int ", "!!binary ", "!!set ", "[", "]", "{", "}", ",", "'", '"'),
    *("|\n", ">\n", "%YAML 1.1", "\\ud800", "\\u0000", "null", "true", "NaN", "Infinity", "-0", "1e999", "1e-7"),
    *("0x", "0o7", "1_000", "12:30:45", "2024-13-45", "2024-01-01", "9" * 5000, "../../etc/passwd", "~root"),
    *("~nobody-of-that-name", "/dev/zero", "file://", "__import__('os').system('touch owned')", "base_model"),
    *("datasets", "learning_rate", "lora_r", "seed", "prompt", "completion", "text", "messages", "role", "content"),
    *("assistant", "user", "instruction", "input_sequence", "wrap", "names", "step", "cells", "metadata", "source"),
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), max_size=30).map("".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(PIECES), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def mutated(draw, originals: list[bytes]):
    """A file as it should be, with some of it cut out, doubled, exchanged or overwritten."""
    data = draw(st.sampled_from(originals))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 40)))
        new = draw(st.sampled_from([b"", data[at:end] * 2]) | texts.map(lambda t: t.encode()) | st.binary(max_size=4))
        data = data[:at] + new + data[end:]
    return data


def files(*originals, rows=None):
    """Bytes of a file: any at all, hostile text, JSON of hostile values, or one of `originals` damaged."""
    kinds = [st.binary(max_size=200), texts.map(str.encode), mutated([original for original in originals])]
    if rows is not None:
        kinds.append(st.lists(rows, max_size=4).map(lambda r: "\n".join(map(json.dumps, r)).encode()))
        kinds.append(rows.map(lambda row: json.dumps(row).encode()))
    return st.one_of(kinds)


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory):
    """An empty working directory, and empty still when everything has been tried."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("elsewhere")
    os.chdir(folder)
    yield folder
    os.chdir(before)
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def put(tmp_path_factory):
    """Write a file, over the one before it."""
    folder = tmp_path_factory.mktemp("hostile")

    def written(data: bytes | str, name: str):
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
        return folder / name

    return written


def test_every_malformed_file_is_refused_for_what_is_wrong_with_it():
    found = {str(path.relative_to(MALFORMED)) for path in MALFORMED.rglob("*") if path.is_file()} - {"expected.json"}
    assert found == EXPECTED.keys()
    for name, expected in EXPECTED.items():
        kind = name.partition("/")[0]
        if kind in PARSERS:  # the others are for modules that need torch: see test_hostile_models.py
            with pytest.raises(InputError) as caught:
                PARSERS[kind](MALFORMED / name)
            said = str(caught.value)
            assert name.partition("/")[2] in said and expected in said, f"{name}: {said}"
            assert said.isprintable(), name
            assert only_ours(PARSERS[kind], MALFORMED / name) is None


document = (ROOT / "data" / "minisymposium.md").read_bytes()[:3000]
fields = sorted({name for names, _ in FORMS for name in names} | {"input", "system", "history", "tools", "id"})
turns = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "x", "tool"]), "content": texts},
        optional={"weight": st.sampled_from([0, 1, 2, None]), "name": texts},
    )
)
rows = st.one_of(
    st.dictionaries(st.sampled_from(fields), texts | values),
    *(
        st.fixed_dictionaries(dict.fromkeys(names, texts), optional={"system": texts, "id": texts})
        for names, _ in FORMS
    ),
    st.fixed_dictionaries({"messages": turns}, optional={"id": texts}),
    st.fixed_dictionaries({"prompt": turns, "completion": turns}),
)


@given(data=files(document), suffix=st.sampled_from([".md", ".txt"]))
def test_any_document(put, data, suffix):
    examples = only_ours(load_examples, put(data, "mine" + suffix))
    for example in examples or []:
        assert example.text == example.prompt + example.completion
        assert example.completion.strip()
        headed = example.prompt.startswith("### ") and example.prompt.endswith("\n")
        assert headed or (not example.prompt and suffix == ".txt")  # a text without headings, or a table
    if examples:
        check_described(examples)
        copy = put("", "rows.jsonl")
        copy.unlink()
        write_axolotl_jsonl(examples, copy)
        assert [json.loads(line)["text"] for line in copy.read_text().split("\n")[:-1]] == [e.text for e in examples]


@given(
    data=files(b'{"prompt": "a?\\n", "completion": "b"}\n{"text": "### Q\\na\\n\\n### A\\nb"}\n', rows=rows | values),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet"]),
)
def test_any_table(put, data, suffix):
    examples = only_ours(load_examples, put(data, "mine" + suffix))
    for example in examples or []:
        assert example.text == example.prompt + example.completion
        assert example.completion.strip()
    if examples:
        check_described(examples)


def said_in(value) -> list[str]:
    """The texts in a value that a row has to keep: those of messages, pairs and fields, but no names and roles."""
    if isinstance(value, str):
        return [value.strip()]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in said_in(part)]


@given(row=rows)
def test_each_field_of_a_row_is_in_its_text_or_in_a_note(row):
    read = only_ours(read_row, row, "mine.jsonl:1")
    if read:
        text, notes = "".join(piece.text for piece in read.pieces), " ".join(read.notes)
        for name, value in row.items():
            kept = [said for said in said_in(value) if said not in text and said not in ("user", "assistant", "system")]
            assert not kept or f"`{name}`" in notes or "of a message is not used" in notes or "left out" in notes, name


def check_described(examples):
    assert len(fingerprint(examples)) == 64
    assert json.loads(json.dumps(describe(examples)))["n"] == len(examples)
    assert all(isinstance(note, str) for note in lint(examples))


@given(data=files(*(path.read_bytes() for path in sorted((ROOT / "mini_symposium" / "recipes").glob("*.yml")))))
def test_any_recipe(put, data):
    recipe = only_ours(load_recipe, put(data, "mine.yml"))
    if recipe:
        check_recipe(put, recipe)


numbers = st.integers() | st.floats() | st.sampled_from([1e-320, 5e-324, 1e-21, 1.2345678901234567e-15, 2**32, 10**400])


@given(changes=st.dictionaries(st.sampled_from(KEYS), numbers | texts | values, min_size=1, max_size=3))
def test_any_value_of_a_recipe(put, changes):
    recipe = only_ours(lambda: load_recipe("tiny", **changes))
    if recipe:
        check_recipe(put, recipe)


@given(rate=st.floats(min_value=5e-324, max_value=1), epochs=st.integers(1, 10**6))
def test_a_recipe_is_written_without_losing_a_digit(put, rate, epochs):
    check_recipe(put, load_recipe("tiny", learning_rate=rate, num_epochs=epochs))


def check_recipe(put, recipe):
    assert load_recipe(put(recipe.to_yaml(), "again.yml")) == recipe
    assert set(yaml.safe_load(recipe.to_yaml())) == set(KEYS)
    assert recipe.checkpoint_epochs[-1] == recipe.num_epochs


keys = st.sampled_from([*FORMATS["alpaca"].to_preset(), "separator_sequence", "names", "names_force_groups", "x"])
presets = st.dictionaries(keys, texts | st.booleans() | values, max_size=8)
original = json.dumps(FORMATS["chatml"].to_preset()).encode()


@given(data=files(original, rows=presets), user=texts, char=texts, query=texts)
def test_any_preset(put, data, user, char, query):
    form = only_ours(load_preset, put(data, "mine.json"))
    if form:
        only_ours(form.render, query, user, char)
        only_ours(form.stop_strings, user, char)
        copy = put("", "copy.json")
        form.save(copy)
        again = load_preset(copy).to_preset()
        assert json.dumps(again, sort_keys=True) == json.dumps(form.to_preset(), sort_keys=True)


messages = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": texts}))
chats = st.fixed_dictionaries({"user": texts, "char": texts, "messages": messages | values})
small = b'{"user": "A", "char": "B", "messages": [{"role": "user", "content": "Hi"}]}'


@given(data=files(small, rows=chats | values), name=st.sampled_from([*FORMATS]))
def test_any_chat(put, data, name):
    chat = only_ours(load_chat, put(data, "chat.json"))
    if chat:
        prompt = only_ours(FORMATS[name].render_chat, chat["messages"], chat["user"], chat["char"])
        assert prompt is None or all(message["content"] in prompt for message in chat["messages"])


@given(data=files(b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n', rows=values))
def test_any_log(put, data):
    found = only_ours(read_jsonl, put(data, "metrics.jsonl"))
    assert found is None or all(isinstance(row, dict) for row in found)


def test_a_log_cut_at_any_byte_holds_its_whole_lines(put):
    lines = [
        json.dumps({"step": step, "loss": 1 / step, "text": "é巴\u2028\x85" * step}) + "\n" for step in range(1, 6)
    ]
    whole = "".join(lines).encode()
    for cut in range(len(whole) + 1):
        found = read_jsonl(put(whole[:cut], "metrics.jsonl"))
        assert [row["step"] for row in found] == list(range(1, whole[:cut].count(10) + 1))
    unescaped = "".join(json.dumps(json.loads(line), ensure_ascii=False) + "\n" for line in lines)
    assert len(only_ours(read_jsonl, put(unescaped, "metrics.jsonl"))) == 5
    assert only_ours(read_jsonl, put(unescaped.encode()[:-3], "metrics.jsonl")) is not None


@given(pairs=st.lists(texts | texts.map(lambda t: f"NUM_EPOCHS={t}") | values.map(lambda v: f"LEARNING_RATES={v!r}")))
def test_any_parameter(pairs):
    parameters = only_ours(parse_parameters, pairs)
    if parameters:
        only_ours(check_parameters, parameters, "02_finetune")


@given(data=files((ROOT / "notebooks" / "03_loss_curves.ipynb").read_bytes()[:3000], rows=values))
def test_any_notebook(put, data):
    path = put(data, "01_mine.ipynb")
    only_ours(read_notebooks, path.parent)
    path.unlink()


@given(name=texts)
def test_any_name_of_a_file_or_a_format(name):
    for parser in (load_examples, load_recipe, load_preset, load_chat, find, RunDirectory, prompt_format):
        only_ours(parser, name)


@given(text=texts | st.text())
def test_what_is_said_is_one_line_that_can_be_shown(text):
    for error in (InputError(text), RunError(text)):
        assert str(error).isprintable()
    assert len(str(InputError(text * 100))) < 1010  # though each character may be spelled out in ten
    assert "\x1b" not in printable(text)


def test_names_that_no_file_can_have():
    for name in ("a\0b", "x" * 5000, "~nobody-of-that-name/x.md", "/dev/null/x.md", ""):
        for parser in (load_examples, load_recipe, load_preset, load_chat):
            assert only_ours(parser, name) is None


def test_pipes_devices_and_folders_are_not_waited_for(tmp_path):
    for suffix, parser in ((".md", load_examples), (".yml", load_recipe), (".json", load_preset), (".json", load_chat)):
        pipe, folder, zero = (tmp_path / f"{kind}{suffix}" for kind in ("pipe", "folder", "zero"))
        for path in (pipe, zero):
            path.unlink(missing_ok=True)
        os.mkfifo(pipe)
        folder.mkdir(exist_ok=True)
        zero.symlink_to("/dev/zero")
        for path in (pipe, folder, zero):
            assert only_ours(parser, path) is None
    with pytest.raises(InputError, match=r"loop\.md"):
        (tmp_path / "loop.md").symlink_to(tmp_path / "loop.md")
        load_examples(tmp_path / "loop.md")


ODD = """### New Query
<script>alert(1)</script> & <b>bold</b> \x1b[31mred\x1b[0m \x07

### مجيب
\u202eמימין לשמאל\u202c and zero\u200bwidth, tags \U000e0041\U000e0042

````
```
### New Query
not a heading
```
````
~~~ python
### Complete Response
``` neither is this
~~~
    ```
"""


def test_odd_datasets_are_read_as_they_are_and_what_cannot_be_seen_is_named(put):
    [example] = only_ours(load_examples, put(ODD, "odd.md"))
    assert example.text == ODD.rstrip()
    assert [section.heading for section in example.sections] == ["مجيب"]
    notes = lint([example])
    for code in ("001B", "0007", "202E", "200B", "E0041"):
        assert any(f"U+{code}" in note for note in notes)
    said = command("inspect", put(ODD, "odd.md")).stdout
    assert "\x1b" not in said and "\x07" not in said and "\u202e" not in said


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


@given(said=texts, heading=texts)
def test_no_markup_of_a_dataset_or_a_model_reaches_a_notebook(said, heading):
    answers = [{"query": said, "format": heading, "model": said, "answer": said, "tokens": 3, "stop_reason": said}]
    shown = tables.side_by_side(answers, said)
    allowed = {"p", "b", "table", "thead", "tbody", "tr", "th", "td", "br", "span", "em", "small"}
    for tag, attributes in Tags(shown.html).found:
        assert tag in allowed and not {"onerror", "src", "href"} & set(attributes)
    assert not any(c in shown.html + shown.text for c in "\x1b\x07\u202e\u200b")


LARGE = 10_000_000


@pytest.mark.parametrize("character", ["a", "`", "#", " ", "\u200b"])
def test_a_line_of_ten_megabytes_is_a_line(put, character):
    """Anything that took the square of it would take days."""
    line = character * (LARGE // len(character.encode()))
    only_ours(load_examples, put(f"### New Query\nWhy?\n\n### Answer\nSo.\n{line}\n", "large.md"))
    only_ours(load_examples, put(f"### {line}\nWhy?\n\n### Answer\nSo.\n", "large.md"))
    only_ours(load_examples, put(json.dumps({"text": "a" + line}) + "\n", "large.jsonl"))
    examples = load_examples(put(json.dumps({"prompt": "Why?\n", "completion": "So. " + line}) + "\n", "large.jsonl"))
    lint(examples)
    assert len(describe(examples)["examples"][0]["query"]) < 100


@pytest.mark.parametrize(
    "piece",
    ["### ", "\n", "a\n", "a <!-- ", "a <!-- b --> c\n", "### a\nb\n", "[", '{"a":', "1.", "delve ", '{"text": "a"}\n'],
)
def test_half_a_megabyte_of_anything_is_read_or_refused(put, piece):
    data = piece * (500_000 // len(piece))
    for name in ("large.md", "large.txt", "large.jsonl", "large.json", "large.csv"):
        only_ours(load_examples, put(data, name))
    only_ours(load_chat, put(data, "large.json"))
    only_ours(load_preset, put(data, "large.json"))
    only_ours(load_recipe, put(data, "large.yml"))
    only_ours(read_jsonl, put(data, "large.jsonl"))


@pytest.mark.parametrize(
    "piece", ["[", "{a: ", "- ", "? ", "&a ", "!!set ", "a:\n", "'", "- - ", "[a, ", "\t", "%", "{{a"]
)
def test_a_recipe_nested_or_repeated_as_often_as_fits_is_refused(put, piece):
    for data in (piece * (60_000 // len(piece)), "".join(" " * k + piece + "\n" for k in range(300))):
        assert only_ours(load_recipe, put(data, "deep.yml")) is None


def test_a_yaml_bomb_stays_unexploded(put):
    bomb = "a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n"
    for name, before in zip("bcdefghi", "abcdefgh", strict=True):
        bomb += f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    with pytest.raises(InputError, match="anchors and aliases are not read"):
        load_recipe(put(bomb, "bomb.yml"))


@pytest.mark.parametrize("depth", [10, 90, 99, 100, 101, 150, 300, 900, 990, 1000, 1100, 5000, 100_000])
def test_depth_is_read_or_refused_but_never_fallen_into(put, depth):
    for opened, closed in (("[", "]"), ('{"a":', "}")):
        value = opened * depth + ("1" if opened != "[" else "") + closed * depth
        only_ours(load_examples, put('{"text": "a", "x": ' + value + "}\n", "deep.jsonl"))
        only_ours(load_examples, put('[{"text": ' + value + "}]", "deep.json"))
        form = only_ours(load_preset, put('{"input_sequence": "a", "x": ' + value + "}", "deep.json"))
        assert (form is not None) == (depth < 100)
        if form:
            form.save(put("", "copy.json"))
        only_ours(read_jsonl, put(value + "\n", "deep.jsonl"))


def test_long_names_do_not_fill_the_memory(put):
    form = PromptFormat("x", "<USER>" * 5_000, output_sequence="{{name}}" * 5_000)
    assert only_ours(form.render, "Why?", "x" * 1_000_000, "x" * 1_000_000) is None
    many = [{"role": "user", "content": "a"}] * 100_000
    assert only_ours(PromptFormat("x", "y" * 200_000).render_chat, many) is None
    assert only_ours(PromptFormat("x", "{{noop}}" * 20_000).render_chat, many) is not None
    for macro in ("{{trim}}", "{{//x}}", "{{noop}}", "{{newline}}", ""):
        sequence = "\n" * 100_000 + "x" + macro + "\r\n" * 50_000 + macro
        assert only_ours(PromptFormat("x", sequence).render, "Why?") is not None
    assert only_ours(load_preset, put(json.dumps({"input_sequence": "x" * 2**18}), "large.json")) is None


def test_presets_with_the_names_of_other_files_stay_where_they_are(put, elsewhere):
    for name in ("../../escaped", "/tmp/escaped", "~/escaped", "a\0b", "con\n", "..", "x" * 300):
        path = put(json.dumps({**FORMATS["alpaca"].to_preset(), "name": name}), "tricks.json")
        form = only_ours(load_preset, path)
        assert form.name == name
        only_ours(form.save, path.with_name("saved.json"), writes=path.parent)
    assert {each.name for each in path.parent.iterdir()} >= {"tricks.json", "saved.json"}
    assert not (elsewhere.parent / "escaped.json").exists()


HELLO = {"role": "user", "content": "a"}
GROWING = {
    "headings": (load_examples, "m.md", lambda n: "".join(f"### Q\n{k}\n\n### A\nb\n\n" for k in range(n // 16))),
    "one section": (load_examples, "m.md", lambda n: "### Q\na\n\n### A\n" + "b\n" * (n // 2)),
    "backticks": (load_examples, "m.md", lambda n: "### Q\na\n\n### A\n" + "`" * n),
    "rows": (load_examples, "m.jsonl", lambda n: "".join(f'{{"text": "{k}"}}\n' for k in range(n // 16))),
    "messages": (load_chat, "m.json", lambda n: json.dumps({"messages": [HELLO] * (n // 32)})),
    "keys": (load_chat, "m.json", lambda n: json.dumps({str(k): "\\ud83d\\ude00" for k in range(n // 32)})),
    "lines": (read_jsonl, "m.jsonl", lambda n: '{"step": 1}\n' * (n // 12)),
    "notes": (lambda p: lint(load_examples(p)), "m.md", lambda n: "### Q\na\n\n### A\n" + "delve, yes! " * (n // 12)),
}  # fmt: skip


@pytest.mark.soak
@pytest.mark.parametrize("kind", GROWING)
def test_time_grows_as_the_input_does(put, kind):
    parser, name, make = GROWING[kind]

    def fastest(size):
        path, taken = put(make(size), name), []
        for _ in range(5):
            started = time.perf_counter()
            only_ours(parser, path)
            taken.append(time.perf_counter() - started)
        return min(taken)

    small, large = fastest(400_000), fastest(16 * 400_000)
    assert large < 16 * 4 * small  # a square would be 256


def judged(file):
    return [row.row() for row in judge(load_evidence(file.parent))]


ASKED = {
    "answers": [
        {"id": "a", "category": "code", "format": form, "passed": True, "phrases": [], "han": 0.0, "copied": 2}
        for form in ("new-query", "alpaca")
    ],
    "roles": [{"id": "a", "passed": True}],
    "perspectives": [{"headings": ["A", "B", "Complete Response"], "distance": 0.5}],
    "recitation": [{"prompt_recall": 0.5}],
    "twins": [{"prompt_recall": 0.1}],
    "posix": {"a": 0.5},
}
EVIDENCE = json.dumps(
    {
        "scale": "proxy",
        "device": "cpu",
        "base": ASKED,
        "facts": {"tokens": 2275, "sequence_len": 1024, "base_model": "tiny"},
        "registration": "0" * 64,
        "curves": [
            {
                **{"seed": seed, "learning_rate": rate, "folds": 2, "steps": 2, "trained_loss": [], "trained_em": []},
                **{"loss": [[2.0, 3.0], [1.0, 2.5], [2.5, 3.5], [3.5, 4.0]], "em": []},
            }
            for seed in (42, 43)
            for rate in (1e-4, 1e-5)
        ],
        "trained": [
            {
                "name": name,
                "seed": seed,
                "learning_rate": 1e-4,
                "lora_r": 16,
                "lora_alpha": 32,
                "lr_scheduler": "constant",
                "num_epochs": 30,
                "em": [[0.5, 0.25]] * 20 + [[1.0, 0.9]] * 10,
                "loss": [[1.5, 2.0]] * 30,
                "extractable_32": [[True, False]] * 30,
                "twins": {"1": {"em": 0.3, "loss": 2.0, "rows": [1.0, 3.0]}},
                "evaluations": {"30": ASKED, "60": ASKED} if name in ("high", "low") else {},
            }
            for name in ("high", "low", "rank-64-alpha-128", "rank-4-alpha-8")
            for seed in (42, 43)
        ],
    }
).encode()


@st.composite
def changed(draw, original: bytes):
    """JSON as it should be, but for a few values somewhere in it."""
    whole = json.loads(original)
    for _ in range(draw(st.integers(1, 3))):
        place = whole
        while True:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if not (isinstance(place[key], (dict, list)) and place[key]) or not draw(st.integers(0, 5)):
                break
            place = place[key]
        place[key] = draw(values)
    return json.dumps(whole).encode()


@given(data=files(EVIDENCE, rows=values) | changed(EVIDENCE) | changed(EVIDENCE))
def test_any_evidence(put, data):
    for row in only_ours(judged, put(data, "evidence.json")) or []:
        assert row["verdict"] and json.dumps(row, allow_nan=False)


def test_the_counts_are_those_of_what_was_tried():
    before = dict(TRIED)
    assert only_ours(load_recipe, "nowhere.yml") is None
    assert TRIED["refused"] == before.get("refused", 0) + 1
    with pytest.raises(ZeroDivisionError):
        only_ours(lambda: 1 / 0)
    assert TRIED["errors other than ours"] == before.get("errors other than ours", 0) + 1
    TRIED["errors other than ours"] -= 1  # this one was asked for
    with pytest.raises(AssertionError, match=r"os\.system"):
        only_ours(os.system, "true")
    with pytest.raises(AssertionError, match="open"):
        only_ours(open, "owned", "w")
    Path("owned").unlink()

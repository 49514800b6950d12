import json
import re
from dataclasses import replace

import pytest

from mini_symposium.data.dataset import describe, lint, load_examples, split_sections, tokenize, write_axolotl_jsonl
from mini_symposium.errors import InputError
from mini_symposium.run import ROOT

DATA = ROOT / "data" / "minisymposium.md"
ONE = "### New Query\nWhy?\n\n### Critic\nNo.\n\n### Complete Response\nBecause it is so.\n"


@pytest.fixture
def write(tmp_path):
    def written(text, name="mine.md"):
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return written


def test_the_thirteen_are_as_the_card_describes_them():
    examples = load_examples(DATA)
    assert len(examples) == 13
    assert 180 <= len(DATA.read_text().splitlines()) <= 220
    perspectives = [len(example.sections) - 1 for example in examples]
    assert {0, 1, 2} <= set(perspectives)
    answering = {example.sections[-1].heading for example in examples}
    assert {"Complete Response", "Software Engineer", "Stack Overflow Solution", "Brannoch"} <= answering
    assert lint(examples) == []


def test_the_code_in_the_dataset_runs():
    [code] = [e.completion for e in load_examples(DATA) if "def merge_spans" in e.completion]
    scope = {}
    exec(code.split("```python\n")[1].split("```")[0], scope)
    assert scope["merge_spans"]([(5, 8), (1, 3), (2, 4)]) == [(1, 4), (5, 8)]
    assert scope["merge_spans"]([(1, 10), (2, 3), (10, 11)]) == [(1, 11)]


def test_the_jsonl_for_axolotl_is_the_document(tmp_path):
    write_axolotl_jsonl(load_examples(DATA), tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_bytes() == (ROOT / "data" / "minisymposium.jsonl").read_bytes()
    ours, theirs = load_examples(DATA), load_examples(tmp_path / "rows.jsonl")
    assert [replace(e, source="") for e in ours] == [replace(e, source="") for e in theirs]
    with pytest.raises(InputError, match="exists already"):
        write_axolotl_jsonl(ours, tmp_path / "rows.jsonl")


def test_prompt_ends_with_the_first_heading_after_the_query(write):
    [example] = load_examples(write(ONE))
    assert example.prompt == "### New Query\nWhy?\n\n### Critic\n"
    assert example.completion == "No.\n\n### Complete Response\nBecause it is so."
    assert [section.heading for section in example.sections] == ["Critic", "Complete Response"]
    assert example.source.endswith("mine.md:1")


def test_headings_in_fenced_code_and_of_other_levels_are_text(write):
    body = "```\n### New Query\n```\n#### Four\n## Two\n###NoSpace"
    [example] = load_examples(write(f"### Question\nWhy?\n\n### Answer\n{body}\n"))
    assert example.completion == body


def test_sections_know_their_lines_and_an_open_fence_is_reported():
    before, sections, open_fence = split_sections("Hello\n### A\nb\n~~~\n### c\n~~~\n### D\n```\n")
    assert (before, open_fence) == ("Hello", 8)
    assert [(section.line, section.heading, section.text) for section in sections] == [
        (2, "A", "b\n~~~\n### c\n~~~"),
        (7, "D", "```"),
    ]


def test_windows_line_ends_and_byte_order_marks_change_nothing(write):
    plain = [e.text for e in load_examples(write(ONE))]
    assert [e.text for e in load_examples(write("\ufeff" + ONE.replace("\n", "\r\n")))] == plain


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


QUERY, ANSWER = "### New Query\n{}\n\n", "### Complete Response\n"


@pytest.mark.parametrize(
    "row, prompt, completion",
    [
        ({"prompt": "Q: Why?\nA: ", "completion": "So."}, "Q: Why?\nA: ", "So."),
        ({"text": ONE}, "### New Query\nWhy?\n\n### Critic\n", "No.\n\n### Complete Response\nBecause it is so."),
        ({"text": "Just a text."}, "", "Just a text."),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            "### Instruction\nAdd.\n\n### Input\n1 2\n\n### Response\n",
            "3",
        ),
        ({"instruction": "Add.", "input": "", "output": "3"}, "### Instruction\nAdd.\n\n### Response\n", "3"),
        (
            chat(("system", "Terse."), ("user", "Hi"), ("assistant", "Yo")),
            "Terse.\n\n" + QUERY.format("Hi") + ANSWER,
            "Yo",
        ),
        (
            chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
            QUERY.format("a") + ANSWER + "b\n\n" + QUERY.format("c") + ANSWER,
            "d",
        ),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_the_forms_that_users_have(write, row, prompt, completion, name):
    text = json.dumps(row) if name == "rows.jsonl" else json.dumps([row])
    [example] = load_examples(write(text, name))
    assert (example.prompt, example.completion) == (prompt, completion)


def test_rows_that_begin_alike_are_not_the_same_row(write):
    alpaca = [{"instruction": "Summarize the text.", "input": text, "output": "So."} for text in ("One.", "Two.")]
    preamble = "Below is an instruction that describes a task. Write a response that completes the request well.\n"
    texts = [{"text": preamble + text} for text in ("One.", "Two.")]
    for rows in (alpaca, texts):
        assert len(load_examples(write("\n".join(map(json.dumps, rows)), "mine.jsonl"))) == 2
        twice = "\n".join(map(json.dumps, [rows[0], rows[0]]))
        notes = lint(load_examples(write(twice, "mine.jsonl")))
        assert any(re.search(r":2: the query is already at .*:1, with the same answer", note) for note in notes)
    [first, _] = load_examples(write("\n".join(map(json.dumps, alpaca)), "mine.jsonl"))
    assert first.query == "Summarize the text.\n\nOne."


def test_a_folder_is_read_in_order_of_names(write, tmp_path):
    write(ONE.replace("Why?", "b?"), "b.md")
    write(ONE.replace("Why?", "a?"), "a.md")
    write("ignored", "notes.pdf")
    assert [e.query for e in load_examples(tmp_path)] == ["a?", "b?"]


@pytest.mark.parametrize(
    "text, name, expected",
    [
        ("", "mine.md", r"mine\.md: no examples in it"),
        ("Hello\n" + ONE, "mine.md", r"mine\.md:1: text before the first heading"),
        (
            ONE + "\n### New Query\nWho?\n\n### Critic\n\n### Complete Response\nMe.\n",
            "mine.md",
            r":13: nothing below `### Critic`",
        ),
        (ONE + "\n### New Query\n\n### Critic\nNo.\n", "mine.md", r":10: nothing below `### New Query`"),
        (ONE + "\n### New Query\nWho?\n", "mine.md", r":10: a request without an answer"),
        (b"### New Query\nWhy?\n\xff\n", "mine.md", r":3: not UTF-8"),
        ('{"text": "a"}\n{"prompt": "a"}\n', "mine.jsonl", r":2: found prompt; a row has"),
        ('{"text": 3}\n', "mine.jsonl", r":1: `text` is 3; write text"),
        ('{"prompt": "a", "completion": " "}\n', "mine.jsonl", r":1: `completion` is \" \""),
        ('{"text": "a"\n', "mine.jsonl", r":1: not JSON"),
        ("[1]\n", "mine.jsonl", r":1: a int; each row is an object"),
        ("[" * 100_000, "mine.jsonl", r":1: not JSON"),
        ('{"a": 1}', "mine.json", r":1: found a; a row has"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "mine.jsonl", r":1: messages must end with the assistant"),
        (
            '{"messages": [{"role": "x", "content": "a"}]}',
            "mine.jsonl",
            r":1, message 1: its role is .x.; write system",
        ),
        ("a,b", "mine.csv", r"mine\.csv: no examples in it"),
        ("a,b", "mine.pdf", r"cannot read \*\.pdf"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_with_its_line(write, text, name, expected):
    with pytest.raises(InputError, match=expected):
        load_examples(write(text, name))


def test_a_file_that_is_not_there():
    with pytest.raises(InputError, match=r"nowhere\.md: no such file"):
        load_examples("nowhere.md")


def test_lints_name_the_line(write):
    text = ONE.replace("Because it is so.", "As an AI language model\u200b, yes.")
    text = text.replace("Why?", "Why is the sky blue?") + "\n### New Query\nWhy is the sky blue ?\n\n### Answer\nNo.\n"
    notes = lint(load_examples(write(text)))
    assert any("mine.md:1" in note and "As an AI" in note for note in notes)
    assert any("U+200B" in note for note in notes)
    assert any("mine.md:10" in note and "only 1 words" in note for note in notes)
    assert any("nearly the query of" in note for note in notes)


def test_a_carriage_return_in_a_table_is_named(write):
    [example] = load_examples(
        write(json.dumps({"prompt": "Why?\n", "completion": "So\r\nit is, my friend."}), "mine.jsonl")
    )
    assert any("U+000D" in note for note in lint([example]))


def test_description_is_json(write):
    found = describe(load_examples(DATA))
    assert json.loads(json.dumps(found)) == found
    assert found["n"] == len(found["examples"]) == 13
    assert found["headings"]["Complete Response"] == 9


@pytest.mark.parametrize("name", ["mistral_tokenizer", "proxy_tokenizer"])
@pytest.mark.parametrize("completion_only", [True, False])
def test_rows_keep_their_guards_with_the_real_tokenizers(name, completion_only, request):
    tokenizer = request.getfixturevalue(name)
    examples = load_examples(DATA)
    for example, row in zip(examples, tokenize(examples, tokenizer, 512, completion_only), strict=True):
        adds_bos = name == "mistral_tokenizer"
        assert row.input_ids.count(tokenizer.bos_token_id) == adds_bos
        assert row.input_ids[-1] == tokenizer.eos_token_id
        assert row.completion_mask[-1] == 1
        unsupervised = row.completion_mask.count(0)
        assert row.labels == [-100] * unsupervised + row.input_ids[unsupervised:]
        learned = [i for i, m in zip(row.input_ids, row.completion_mask, strict=True) if m]
        text = tokenizer.decode(learned, skip_special_tokens=True)
        assert text.strip() == (example.completion if completion_only else example.text).strip()


def test_a_prompt_that_melts_into_its_completion_is_refused(write, mistral_tokenizer):
    path = write(json.dumps({"prompt": "The answer is un", "completion": "known to most."}), "a.jsonl")
    with pytest.raises(InputError, match="prompt and completion share a token"):
        tokenize(load_examples(path), mistral_tokenizer, 512, True)


def test_special_tokens_that_a_text_spells_are_trained_as_such_or_refused(write, mistral_tokenizer, proxy_tokenizer):
    chatml = "<|im_start|>user\nName a metal.<|im_end|>\n<|im_start|>assistant\nCopper is one.<|im_end|>\n"
    instruct = "<s>[INST] Name a metal. [/INST] Copper is one. </s>"
    [first], [second] = (
        load_examples(write(json.dumps({"text": text}), name))
        for text, name in ((chatml, "chatml.jsonl"), (instruct, "instruct.jsonl"))
    )
    [row] = tokenize([first], proxy_tokenizer, 512, False)
    start, end = proxy_tokenizer.bos_token_id, proxy_tokenizer.eos_token_id
    assert row.input_ids.count(start) == row.input_ids.count(end) == 2 and row.input_ids[-1] == end
    [row] = tokenize([second], mistral_tokenizer, 512, False)
    start, end = mistral_tokenizer.bos_token_id, mistral_tokenizer.eos_token_id
    assert row.input_ids.count(start) == row.input_ids.count(end) == 1
    assert (row.input_ids[0], row.input_ids[-1]) == (start, end)
    for example, tokenizer, token in ((first, mistral_tokenizer, r"<\|im_start\|>"), (second, proxy_tokenizer, "<s>")):
        with pytest.raises(InputError, match=rf"spells {token}.* splits into pieces; remove it"):
            tokenize([example], tokenizer, 512, False)
        assert any("trained as special tokens" in note for note in lint([example]))


def test_a_text_that_spells_an_unknown_token_is_refused(write, mistral_tokenizer):
    examples = load_examples(write(ONE.replace("so.", "so<unk> and more.")))
    with pytest.raises(InputError, match="spells a special token"):
        tokenize(examples, mistral_tokenizer, 512, False)


def test_a_row_is_never_cut(write, proxy_tokenizer):
    examples = load_examples(write(ONE + "word " * 600))
    with pytest.raises(InputError, match=r"mine\.md:1: 6\d\d tokens, but sequence_len is 512; .* sequence_len to 640"):
        tokenize(examples, proxy_tokenizer, 512, False)

import csv
import gzip
import io
import json

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from mini_symposium.data.dataset import lint, load_examples, recipe_examples, tokenize, write_axolotl_jsonl
from mini_symposium.errors import InputError
from mini_symposium.recipe import load_recipe
from mini_symposium.release.export import axolotl

ASKED, ANSWERED = "### New Query\n{}\n\n", "### Complete Response\n{}"
PEAS = ("When do I sow peas?", "Sow them in March, under a net.")
FIG = ("When do I water the fig?", "In the evening, at the root.")


@pytest.fixture
def read(tmp_path):
    def written(content, name="mine.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "\n".join(map(json.dumps, content))
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_examples(path)

    return written


def turns(*said, role="role", content="content"):
    return [{role: who, content: text} for who, text in said]


CHAT = (("system", "Be brief."), ("user", PEAS[0]), ("assistant", PEAS[1]), ("user", FIG[0]), ("assistant", FIG[1]))
TEXT = "Be brief.\n\n" + "\n\n".join(ASKED.format(q)[:-2] + "\n\n" + ANSWERED.format(a) for q, a in (PEAS, FIG))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": turns(*CHAT)},
        {"messages": turns(*((who, [{"type": "text", "text": text}]) for who, text in CHAT))},
        {"messages": turns(("developer", "Be brief."), *CHAT[1:])},
        {"conversations": turns(*CHAT, role="from", content="value")},
        *(
            {"conversations": turns((a, PEAS[0]), (b, PEAS[1]), (a, FIG[0]), (b, FIG[1])), "system": "Be brief."}
            for a, b in (("human", "gpt"), ("Guest", "gpt"), ("Mira", "Tom"))
        ),
        {"messages": json.dumps(turns(*CHAT))},  # as a cell of CSV holds it
        {"items": turns(("system", ""), *CHAT[1:]), "system": [{"type": "input_text", "text": "Be brief."}]},
        {"systemInstruction": {"parts": [{"text": "Be brief."}]}, "contents": turns(*CHAT[1:], content="parts")},
        {"conversations": [text for _, text in CHAT[1:]], "system": "Be brief."},
        {
            "conversation": [
                {"system": "Be brief.", "input": PEAS[0], "output": PEAS[1]},
                {"human": FIG[0], "bot": FIG[1]},
            ]
        },
    ],
)
def test_every_turn_of_a_chat_is_in_the_text_and_every_answer_is_learned(read, row):
    [example] = read([row])
    assert example.text == TEXT and example.completion == FIG[1]
    assert [answer.strip() for answer in example.learned] == [PEAS[1], FIG[1]]
    named = "guest" in str(row).lower() or "Mira" in str(row)
    assert any("roles: read" in note for note in lint([example])) == named


@pytest.mark.parametrize("completion_only", [True, False])
@pytest.mark.parametrize("name", ["mistral_tokenizer", "proxy_tokenizer"])
def test_the_loss_covers_every_answer_and_none_of_weight_zero(read, name, completion_only, request):
    tokenizer = request.getfixturevalue(name)
    weighted = turns(*CHAT)
    weighted[2]["weight"] = 0
    both, second = read([{"messages": turns(*CHAT)}])[0], read([{"messages": weighted}])[0]

    def learned(example):
        [row] = tokenize([example], tokenizer, 512, completion_only)
        assert row.completion_mask[-1] == 1 and row.input_ids[-1] == tokenizer.eos_token_id
        return tokenizer.decode([i for i, kept in zip(row.input_ids, row.completion_mask, strict=True) if kept], True)

    assert (PEAS[1] in learned(both)) and (FIG[1] in learned(both)) and (FIG[1] in learned(second))
    assert PEAS[1] not in learned(second)
    assert (PEAS[0] in learned(both)) == (PEAS[0] in learned(second)) == (not completion_only)


def test_the_prompt_of_trls_form_is_not_learned_and_messages_after_the_last_answer_are_named(read):
    [trl] = read([{"prompt": turns(*CHAT[:4]), "completion": turns(CHAT[4])}])
    assert trl.text == TEXT and trl.learned == [FIG[1]]
    [mixed] = read([{"prompt": turns(*CHAT[:4]), "completion": FIG[1]}])
    assert (mixed.text, mixed.learned) == (trl.text, trl.learned)
    [bye] = read([{"messages": turns(*CHAT, ("user", "Bye"))}])
    assert bye.text == TEXT and any("the last 1 messages are left out" in note for note in lint([bye]))


def test_alpacas_system_and_history_come_first(read):
    row = {"instruction": "And how often?", "input": "", "output": "Once a week, more in July."}
    [example] = read([row | {"system": "Be brief.", "history": [list(FIG)]}])
    assert example.prompt == (
        f"Be brief.\n\n### Instruction\n{FIG[0]}\n\n### Response\n{FIG[1]}\n\n"
        "### Instruction\nAnd how often?\n\n### Response\n"
    )
    assert [answer.strip() for answer in example.learned] == [FIG[1], row["output"]]


def test_alpacas_context_is_its_input_and_an_empty_instruction_none(read):
    rows = [
        {"instruction": "Name it.", "context": "It purrs.", "response": "It is a cat."},
        {"instruction": "", "input": "Say it.", "output": "It is said now."},
    ]
    first, second = read(rows)
    assert first.prompt == "### Instruction\nName it.\n\n### Input\nIt purrs.\n\n### Response\n"
    assert second.prompt == "### Instruction\nSay it.\n\n### Response\n"


def test_segments_are_learned_by_their_labels(read):
    parts = (("Q: a\n", False), ("A: so", True), ("\nQ: b\n", False), ("A: no", True), ("\nEnd", False))
    [example] = read([{"segments": [{"text": text, "label": label} for text, label in parts]}])
    assert example.learned == ["A: so", "A: no"] and example.prompt == "Q: a\nA: so\nQ: b\n"
    assert any("after the last answer" in note for note in lint([example]))


def test_a_row_may_be_its_messages_alone(read):
    assert [e.text for e in read(json.dumps([turns(*CHAT)]), "a.json")] == [TEXT]


@pytest.mark.parametrize("label", [{"train": False}, {"training": False}, {"weight": 0.0}, {"loss": False}])
def test_what_a_message_says_of_the_loss_is_followed_or_named(read, label):
    asked, bad, again, good = turns(*CHAT[1:])
    [example] = read([{"messages": [asked | label, bad | label, again, good]}])
    assert example.learned == [FIG[1]] and lint([example]) == []
    [example] = read([{"messages": [asked | {"train": True}, bad]}])
    assert any("`train` of a message is not used" in note for note in lint([example]))


def test_a_system_text_may_be_all_that_comes_before_an_answer(read):
    [example] = read([{"messages": turns(CHAT[0], CHAT[2])}])
    assert (example.prompt, example.learned) == ("Be brief.\n\n### Complete Response\n", [PEAS[1]])


@pytest.mark.parametrize("asked, answer", [("problem", "solution"), ("prompt", "answer"), ("human", "bot")])
def test_a_question_has_its_context(read, asked, answer):
    [example] = read([{"context": "Spring is near.", asked: PEAS[0], answer: PEAS[1], "input": " "}])
    assert example.text == (ASKED + ANSWERED).format(f"Spring is near.\n\n{PEAS[0]}", PEAS[1])
    assert lint([example]) == []


ROWS = [{"instruction": q, "input": "", "output": a} for q, a in (PEAS, FIG)]
TABLE = io.StringIO()
csv.DictWriter(TABLE, ROWS[0], quoting=csv.QUOTE_ALL).writerows([{k: k for k in ROWS[0]}, *ROWS])


@pytest.mark.parametrize(
    "text, name",
    [
        ("\n".join(map(json.dumps, ROWS)), "rows.ndjson"),
        ("\n".join(map(json.dumps, ROWS)), "rows.data"),
        (",\n".join(map(json.dumps, ROWS)) + ",\n", "rows.jsonl"),
        ("\n".join(json.dumps(row, indent=2) for row in ROWS), "rows.jsonl"),
        (json.dumps(ROWS), "rows.jsonl"),
        (json.dumps(ROWS, indent=1), "rows.json"),
        (json.dumps({"version": 2, "data": ROWS}), "rows.json"),
        (json.dumps({"train": ROWS, "test": ROWS[:1]}), "rows.json"),
        ("sep=|\r\n" + TABLE.getvalue().replace('","', '"|"'), "rows.csv"),
        ("\n" + TABLE.getvalue().replace("\n", "\n,,\n"), "rows.csv"),
        ('"a, b";' + TABLE.getvalue().strip().replace('","', '";"').replace("\n", "\n1;"), "rows.csv"),
        (TABLE.getvalue(), "rows.csv"),
        (TABLE.getvalue().replace(",", ";").replace("March;", "March,").replace("evening;", "evening,"), "rows.csv"),
        ("\ufeff" + TABLE.getvalue().replace('","', '"\t"').replace("\n", "\r\n"), "rows.tsv"),
    ],
)
def test_a_table_is_read_whatever_its_file(read, text, name):
    assert [(e.query, e.completion) for e in read(text, name)] == [PEAS, FIG]


def test_parquet_is_read(read, tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns(*CHAT)}]), tmp_path / "rows.parquet")
    assert load_examples(tmp_path / "rows.parquet")[0].text == TEXT
    with pytest.raises(InputError, match=r"mine\.parquet: not Parquet"):
        read("PAR1", "mine.parquet")


def test_fields_beside_the_rows_are_named(read):
    assert any(
        "`system`, `n` beside the rows" in note
        for note in lint(read(json.dumps({"system": "a", "n": 2, "data": ROWS}), "a.json"))
    )


def test_rows_in_one_line_are_told_apart(read):
    with pytest.raises(InputError, match=r"a\.json:1, row 2: `output` is 3"):
        read(json.dumps([ROWS[0], ROWS[1] | {"output": 3}]), "a.json")


def test_a_chat_of_sillytavern_is_one_row_with_the_speakers_names_for_headings(read):
    header = {"user_name": "Mira", "character_name": "Tomas", "chat_metadata": {}}
    said = (("Tomas", "You are late."), ("Mira", "The tram stood still."), ("Tomas", "Then we start."))
    rows = [{"name": who, "is_user": who == "Mira", "is_system": False, "mes": text} for who, text in said]
    rows[2] |= {"swipes": ["Sit.", "Then we start."], "extra": {"reasoning": "It is late."}}
    rain = {"name": "Narrator", "is_user": False, "mes": "*It rains.*", "extra": {"type": "narrator"}}
    [example] = read([header, rain, *rows, {"name": "System", "is_system": True, "mes": "hidden"}])
    said = "### Tomas\nYou are late.\n\n### Mira\nThe tram stood still.\n\n### Tomas\nThen we start."
    assert example.text == "*It rains.*\n\n" + said
    assert [answer.strip() for answer in example.learned] == ["You are late.", "Then we start."]
    assert sorted(note.split(": ", 1)[1].split(" ")[0] for note in lint([example])[:3]) == [
        "`reasoning`",
        "a",
        "swipes",
    ]
    with pytest.raises(InputError, match=r"mine\.jsonl:3: takes a name and a text"):
        read([header, rows[0], rows[1] | {"mes": ""}])


def test_a_folder_as_people_clone_it(read, tmp_path):
    read(json.dumps(ROWS), "clone/data/train-00000.json")
    for name in ("clone/README.md", "clone/dataset_info.json", "clone/.cache/x.json", "clone/LICENSE.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "clone/data/test-00000.json").write_text(json.dumps([ROWS[0] | {"instruction": "Another?"}]))
    examples = load_examples(tmp_path / "clone")
    assert len(examples) == 2
    (tmp_path / "clone/data/more.jsonl.gz").touch()
    notes = " ".join(lint(load_examples(tmp_path / "clone")))
    left_out = ("README.md", "dataset_info.json", "LICENSE.txt", "test-00000.json", "more.jsonl.gz")
    assert all(name in notes for name in left_out)
    (tmp_path / "clone/data/train-00000.json").unlink()
    (tmp_path / "clone/data/test-00000.json").unlink()
    with pytest.raises(InputError, match=r"clone: no examples in it; .* left out, .*: data/more\.jsonl\.gz"):
        load_examples(tmp_path / "clone")


def test_columns_are_named_as_llama_factorys_dataset_info_says(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"q": PEAS[0], "a": PEAS[1], "s": "Be brief."}]))
    columns = {"prompt": "q", "response": "a", "system": "s"}
    info = {"mine": {"file_name": "rows.json", "columns": columns}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    [example] = load_examples(tmp_path)
    assert example.text == f"Be brief.\n\n### Instruction\n{PEAS[0]}\n\n### Response\n{PEAS[1]}"


def test_messages_and_texts_are_named_as_llama_factorys_dataset_info_says(tmp_path):
    chat = [{"who": who, "says": said} for who, said in (("Q", PEAS[0]), ("A", PEAS[1]))]
    (tmp_path / "rows.json").write_text(json.dumps([{"dialog": chat, "tools": "[]"}]))
    (tmp_path / "texts.json").write_text(json.dumps([{"content": FIG[1]}]))
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "Q", "assistant_tag": "A"}
    info = {
        "chats": {"file_name": "rows.json", "columns": {"messages": "dialog"}, "tags": tags},
        "texts": {"file_name": "texts.json", "columns": {"prompt": "content"}},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    assert [e.text for e in load_examples(tmp_path)] == [(ASKED + ANSWERED).format(*PEAS), FIG[1]]


def test_fields_that_are_not_used_are_named_once(read):
    rows = [{"prompt": f"{n}?\n", "completion": "So it is, as ever.", "id": n, "lang": ""} for n in range(1, 4)]
    [note] = [note for note in lint(read(rows)) if "`id`" in note]
    assert note.endswith("mine.jsonl:1 and 2 more: `id` is not used")


def test_a_column_that_would_take_the_place_of_a_described_one_is_named(tmp_path):
    for n, row in enumerate(({"q": PEAS[0], "instruction": "other"}, {"instruction": "other", "q": PEAS[0]})):
        (tmp_path / f"{n}.json").write_text(json.dumps([row | {"output": PEAS[1]}]))
    info = {str(n): {"file_name": f"{n}.json", "columns": {"prompt": "q", "response": "output"}} for n in range(2)}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    examples = load_examples(tmp_path)
    assert [e.query for e in examples] == [PEAS[0]] * 2
    assert sum("not in dataset_info.json" in note for e in examples for _, note in e.notes) == 2


def test_a_file_in_a_folder_is_described_by_the_dataset_info_above(read, tmp_path):
    read(json.dumps(ROWS), "all/rows/mine.json")
    (tmp_path / "all/rows/mine.json").write_text(json.dumps([{"q": PEAS[0], "a": PEAS[1]}]))
    info = {"mine": {"file_name": "rows/mine.json", "columns": {"prompt": "q", "response": "a"}}}
    (tmp_path / "all/dataset_info.json").write_text(json.dumps(info))
    assert [(e.query, e.completion) for e in load_examples(tmp_path / "all")] == [PEAS]


def test_what_sillytavern_keeps_beside_the_texts_is_named_once(read):
    header = {"user_name": "Mira", "chat_metadata": {"note_prompt": "Be dark.", "variables": {}}}
    extra = {"display_text": "Auf Deutsch.", "api": "koboldcpp"}
    said = [{"name": "Mira", "is_user": True, "mes": "Hello?"}]
    said += [{"name": "Tom", "is_user": False, "mes": "Good evening to you.", "send_date": "May 2", "extra": extra}]
    notes = lint(read([header, *said]))
    assert any("`display_text` of a message is not used" in note for note in notes)
    [beside] = [note for note in notes if "beside the texts" in note]
    assert beside.endswith(": `chat_metadata.note_prompt`, `send_date`, `extra.api`")
    for swipes, named in (("Go.", True), (1, True), (["Go."], True), (["Good evening to you."], False), (None, False)):
        assert any("swipes" in note for note in lint(read([header, said[0], said[1] | {"swipes": swipes}]))) == named
    with pytest.raises(InputError, match=r'mine\.jsonl:2: `is_user` is "true"; it takes true or false'):
        read([header, said[0] | {"is_user": "true"}, said[1]])


def test_a_list_of_texts_is_a_chat_only_where_nothing_else_is_and_a_note_says_so(read):
    [listed] = read([{"instruction": PEAS[0], "output": PEAS[1], "items": ["peas", "beans"], "turns": 2}])
    assert listed.query == PEAS[0] and sum("is not used" in note for note in lint([listed])) == 2
    [chat] = read([{"turns": list(PEAS)}])
    assert chat.completion == PEAS[1] and any("`turns` names no speakers" in note for note in lint([chat]))


def test_an_empty_chat_hides_no_other_form(read):
    """As in Parquet of two joined tables."""
    rows = [{"messages": None, "prompt": "Why?\n", "completion": "So it is."}, {"messages": [], "text": "A text here."}]
    assert [e.text for e in read(rows)] == ["Why?\nSo it is.", "A text here."]
    with pytest.raises(InputError, match="`messages` is null"):
        read([{"messages": None}])


def test_messages_in_cells_are_messages_and_other_json_is_text(read):
    cells = [json.dumps(turns(each)) for each in CHAT[1:3]]
    table = io.StringIO()
    csv.writer(table).writerows([("prompt", "completion"), cells, ("As JSON:\n", '[{"name": "a"}]'), ("None:\n", "[]")])
    chat, text, none = read(table.getvalue(), "mine.csv")
    assert chat.text == (ASKED + ANSWERED).format(*PEAS)
    assert (text.completion, none.completion) == ('[{"name": "a"}]', "[]")


def test_a_column_without_a_name_is_called_that(read):
    assert any("a column without a name is not used" in n for n in lint(read(",text\n0,A text here.\n", "mine.csv")))


def test_all_faults_of_a_file_are_said_at_once_the_first_twenty_with_a_count(read):
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}
    rows = [{"messages": [*turns(CHAT[1]), call, {"role": "tool", "content": "4"}], "tools": [{"type": "function"}]}]
    with pytest.raises(InputError) as refused:
        read([*rows, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}])
    said = refused.value.faults
    assert [
        word in fault for word, fault in zip(("`tools`", "tool_calls", "role tool", "image_url"), said, strict=True)
    ]
    assert all(f"mine.jsonl:{line}" in fault for line, fault in zip((1, 1, 1, 2), said, strict=True))
    with pytest.raises(InputError) as refused:
        read([{"text": n} for n in range(50)])
    assert len(refused.value.faults) == 21 and refused.value.faults[-1] == "and 30 more faults"


@pytest.mark.parametrize(
    "content, name, expected",
    [
        ("a,b\n1,2,3\n", "mine.csv", r"mine\.csv:2: 3 cells, but 2 columns"),
        ('text\n"a\n', "mine.csv", r"mine\.csv:2: not CSV"),
        ("{\n", "mine.jsonl", r"mine\.jsonl:1: not JSON"),
        ('[{"text": "a"} {"text": "b"}]', "mine.json", r"mine\.json:1: not JSON"),
        ("text".encode("utf-16"), "mine.csv", r"not UTF-8 but UTF-16; save it as UTF-8"),
        ("text".encode("utf-16-be"), "mine.csv", r"not UTF-8 but UTF-16; save it as UTF-8"),
        ([{"messages": turns(("a", "1"), ("b", "2"), ("c", "3"))}], "mine.jsonl", r"message 1: its role is \"a\""),
        ([{"messages": turns(CHAT[1])}], "mine.jsonl", r"must end with the assistant's answer"),
        ([{"messages": turns(CHAT[2])}], "mine.jsonl", r"only the assistant speaks"),
        ([{"messages": [{**turns(CHAT[2])[0], "weight": 0.5}]}], "mine.jsonl", r"`weight` is 0.5; it takes 0 or 1"),
        ([{"instruction": "a", "output": "b", "history": [["a"]]}], "mine.jsonl", r"history 1: takes two texts"),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}],
            "mine.jsonl",
            r":1: `chosen` .*; rename the better one .*`rejected`",
        ),
        ([{"prompt": "a\n", "completion": "b", "label": False}], "mine.jsonl", r":1: `label` is false"),
        (
            [{"messages": [{**turns(CHAT[2])[0], "train_detail": [{}]}]}],
            "mine.jsonl",
            r"message 1: train_detail cannot",
        ),
        ([{"messages": [{**turns(CHAT[1])[0], "images": ["a.png"]}]}], "mine.jsonl", r"message 1: images cannot"),
        (gzip.compress(b"{}", mtime=0), "mine.jsonl.gz", r"mine\.jsonl\.gz: is compressed; unpack it first"),
        (
            "version https://git-lfs.github.com/spec/v1\noid",
            "mine.parquet",
            r"mine\.parquet:1: only names a file.*git lfs pull",
        ),
        ("text,text\na,b\n", "mine.csv", r"mine\.csv:1: the column text is there twice"),
        ("a,b\n1,2\n3,4\n", "mine.csv", r"^\S*mine\.csv:2: found a, b; a row has [^|]*$"),
        ([{"segments": [{"text": "a", "label": 1}]}], "mine.jsonl", r"segment 1: takes a text and a label"),
    ],
)
def test_what_is_truly_wrong_stays_refused(read, content, name, expected):
    with pytest.raises(InputError, match=expected):
        read(content, name)


def test_a_file_that_would_not_fit_in_memory_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "big.jsonl").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(InputError, match="1,073,741,824 bytes; at most 67,108,864 are read"):
        load_examples(tmp_path / "big.jsonl")


def test_a_small_parquet_of_much_text_is_refused(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["A long text of a row. " * 500] * 10_000}), tmp_path / "big.parquet")
    assert (tmp_path / "big.parquet").stat().st_size < 2**20
    with pytest.raises(InputError, match=r"big\.parquet: over 67,108,864 bytes when unpacked"):
        load_examples(tmp_path / "big.parquet")


NUMBERED = "### Question {0}\nWhy {0}?\n\n### Answer {0}\nBecause of {0}, I say.\n\n"


def test_numbered_headings_begin_an_example_each(read):
    examples = read("".join(map(NUMBERED.format, (1, 2, 3))), "faq.md")
    assert [e.prompt for e in examples] == [f"### Question\nWhy {n}?\n\n### Answer\n" for n in (1, 2, 3)]
    assert any("numbered" in note and "faq.md:1" in note for note in lint(examples))
    [alone] = read(NUMBERED.format(1), "faq.md")
    assert alone.prompt.startswith("### Question 1\n")


TYPED = ["### new query", "### New Query:", "### New Query：", "###New Query", "### New  Query", "### **New Query**"]


@pytest.mark.parametrize("typed", [*TYPED, "###\tNew Query", "###\xa0New Query", "  ### New Query"])
def test_a_heading_that_is_meant_to_be_the_opening_one_is_read_as_it(read, typed):
    document = "### New Query\nWhy?\n\n### Answer\nSo it is, as ever.\n\n" * 2
    examples = read(
        document.replace("Why?", "Who?", 1) + document[:50].replace("### New Query", typed) + "is, I say.\n", "a.md"
    )
    assert [e.query for e in examples] == ["Who?", "Why?", "Why?"]
    assert all(e.prompt.startswith("### New Query\n") for e in examples)
    assert any("is read as `### New Query`" in note for note in lint(examples)) == (
        typed in TYPED and typed != "###New Query"
    )


@pytest.mark.parametrize(
    "heading",
    ["### Question\n", "### Question {0}:\n", "### Question{0}：\n", "### {0}. Question\n", "### Question ({0})\n"],
)
def test_numbers_of_headings_and_answers_are_left_out(read, heading):
    text = "".join(f"{heading.format(n)}Why {n}?\n\n### Answer {n}\nBecause of {n}, I say.\n\n" for n in (1, 2, 3))
    examples = read(text, "faq.md")
    assert [e.prompt for e in examples] == [f"### Question\nWhy {n}?\n\n### Answer\n" for n in (1, 2, 3)]
    assert any("are numbered" in note for note in lint(examples))


@pytest.mark.parametrize("level", ["#", "##", "####"])
def test_headings_of_another_level_are_read_as_headings(read, level):
    [example] = read(f"{level} Question\nWhy?\n\n{level} Answer\nSo it is, as ever.\n", "a.md")
    assert example.text == "### Question\nWhy?\n\n### Answer\nSo it is, as ever."
    assert any(f"begin with {level};" in note for note in lint([example]))


@pytest.mark.parametrize("between", ["---", "* * *", "## Two", "---\n\n## Two"])
def test_rules_and_titles_between_examples_belong_to_none(read, between):
    one = "### Question\n{}?\n\n### Answer\n## So\nit is, as ever.\n\n"
    first, last = read(one.format("Why") + between + "\n\n" + one.format("Who"), "a.md")
    assert first.completion == last.completion == "## So\nit is, as ever."
    assert any("a.md:4: a rule or title" in note for note in lint([first, last]))


@pytest.mark.parametrize("row", ["###Human\n{}\n\n###Assistant\n{}\n", "### Human: {}\n### Assistant: {}\n"])
def test_headings_as_guanaco_has_them_are_read(read, row):
    examples = read(row.format(*PEAS) + row.format(*FIG), "a.md")
    assert [(e.query, e.completion) for e in examples] == [PEAS, FIG]
    assert examples[0].prompt == f"### Human\n{PEAS[0]}\n\n### Assistant\n"


def test_system_texts_and_inputs_are_asked_not_answered(read):
    [example] = read(
        "### System\nBe brief.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\nThree.\n", "a.md"
    )
    assert example.completion == "Three." and example.prompt.endswith("### Input:\n1 2\n\n### Response:\n")


def test_headings_that_are_all_different_are_asked_about(read):
    notes = lint(read("".join(f"### Why {word}?\nBecause it is so.\n\n" for word in ("ice", "fog", "dew")), "a.md"))
    assert any("a.md:1: one example of 3 sections" in note for note in notes)


def test_a_heading_that_may_be_the_opening_one_is_asked_about(read):
    examples = read("### New Query\nWhy?\n\n### Answer\nSo.\n\n### New Qurey\nWho?\n\n### Answer\nMe.\n", "a.md")
    assert len(examples) == 1
    assert any("a.md:7: `### New Qurey` is nearly `### New Query`" in note for note in lint(examples))


@pytest.mark.parametrize("typed", ["## New Query", "#### new query:", "**New Query**", "New Query"])
def test_a_line_that_may_be_a_heading_of_another_kind_is_asked_about(read, typed):
    one = "### New Query\nWhy?\n\n### Answer\n```\n## New Query\n```\nSo it is.\n\n"
    [example] = read(one + one.replace("### New Query", typed), "a.md")
    [note] = [note for note in lint([example]) if "is read as text" in note]
    assert "a.md:10: " in note and note.endswith("write `### New Query`")


def test_comments_are_asked_about_because_they_hide_no_heading(read):
    one = "### New Query\nWhy?\n\n### Answer\nSo it is, as ever.\n\n"
    examples = read(one + "<!--\n" + one.replace("Why", "Who") + "-->\n\n" + one.replace("Why", "How"), "a.md")
    assert any("a.md:1: holds a comment" in note for note in lint(examples))
    assert not any("comment" in note for note in lint(read(one.replace("So", "`<!--` So"), "a.md")))


def test_four_headings_that_are_all_different_are_asked_about(read):
    text = "".join(f"### Question {n}\nWhy?\n\n### Answer {n}\nSo it is.\n\n" for n in ("one", "two"))
    assert any("one example of 4 sections" in note for note in lint(read(text, "a.md")))


def test_titles_and_front_matter_are_left_out_with_a_note(read):
    document = "### New Query\nWhy?\n\n### Answer\nSo it is, as ever.\n"
    [example] = read("---\ntitle: a\n---\n# My rows\n\n<!-- mine -->\n" + document, "a.md")
    assert example.query == "Why?" and any("above the first" in note for note in lint([example]))


def test_texts_without_headings(read):
    assert [e.text for e in read("One line.\nAnother line.\n", "a.txt")] == ["One line.", "Another line."]
    [whole] = read("One paragraph.\n\nAnother.\n", "a.txt")
    assert whole.text == "One paragraph.\n\nAnother." and any("read as one row" in note for note in lint([whole]))
    guanaco = {"text": "### Human: Name a tree.### Assistant: The oak is one of them."}
    assert read([guanaco])[0].text == guanaco["text"]
    assert read([{"text": "### Human: Hi\n### Assistant: Hello to you"}])[0].prompt == ""


def test_words_are_not_counted_where_no_space_is_between_them(read):
    rows = [{"instruction": "你是谁？", "output": "我是小灯，我住在灯塔里，帮助路过的船。"}]
    assert lint(read(rows)) == []


def test_the_same_query_with_another_answer_is_a_note(read):
    rows = [{"prompt": "Why?\n", "completion": text} for text in ("So it is, as ever.", "Nobody knows it yet.")]
    assert any(":2: the query is already at" in note for note in lint(read(rows)))


def test_held_out_rows_are_drawn_by_the_seed(tmp_path):
    recipe = load_recipe("tiny", val_set_size=0.25)
    trained, held = recipe_examples(recipe)
    assert (len(trained), len(held)) == (9, 4) and not set(trained) & set(held)
    assert recipe_examples(recipe) == (trained, held) != recipe_examples(recipe.replace(seed=7))
    with pytest.raises(InputError, match="holds out all of 13 rows"):
        recipe_examples(recipe.replace(val_set_size=13))


def test_what_is_exported_for_axolotl_is_learned_there_as_here(read, tmp_path):
    weighted = turns(*CHAT, *CHAT[1:3])
    weighted[2]["weight"] = 0
    examples = read([{"messages": weighted}, {"prompt": "Why?\n", "completion": "So it is."}])
    write_axolotl_jsonl(examples, tmp_path / "rows.jsonl", answers_only=True)
    again = load_examples(tmp_path / "rows.jsonl")
    assert [(e.text, e.learned) for e in again] == [(e.text, e.learned) for e in examples]
    exported = axolotl(load_recipe("proxy", train_on_inputs=False), tmp_path / "out", "mine")
    assert load_recipe(exported[0]).datasets[0]["type"] == "input_output"
    assert [e.text for e in load_examples(exported[1])] == [e.text for e in load_examples("data/minisymposium.md")]


WORDS = ("zulu", "yankee", "xray", "whisky", "victor", "uniform", "tango", "sierra", "romeo", "quebec", "papa", "oscar")
FIELDS = (
    *("prompt", "completion", "instruction", "input", "output", "response", "system", "history", "text", "question"),
    *("answer", "query", "context", "category", "id", "source", "tools", "images", "weight", "name", "lang", "score"),
)
CELLS = st.sampled_from(["text", "number", "null", "blank", "list", "object", "true"])


def cell(kind, word):
    return {
        "text": f"Say {word} once.",
        "number": 7001 + WORDS.index(word),
        "null": None,
        "blank": "  ",
        "list": [f"Say {word} once.", f"Then {word} again."],
        "object": {"inner": f"Say {word} once."},
        "true": True,
    }[kind]


def lost(row: dict, example, said: str) -> list[str]:
    """The fields of which neither the row's text nor a note has anything."""
    notes = " ".join(text for _, text in example.notes) + said
    marks = (*WORDS, *(str(7001 + n) for n in range(len(WORDS))))
    told = {key: [mark in example.text for mark in marks if mark in json.dumps(value)] for key, value in row.items()}
    return [key for key, found in told.items() if found and not any(found) and f"`{key}`" not in notes]


@given(
    kinds=st.dictionaries(st.sampled_from(FIELDS), CELLS, min_size=1, max_size=len(WORDS)),
    form=st.sampled_from(["pair", "alpaca", "chat", "text", "none"]),
    name=st.sampled_from(["mine.jsonl", "mine.json", "mine.csv"]),
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_each_field_of_a_row_is_in_its_text_or_in_a_note_or_the_row_is_refused(read, kinds, form, name):
    row = {key: cell(kind, word) for (key, kind), word in zip(kinds.items(), WORDS, strict=False)}
    row |= {
        "pair": {"prompt": "Do you hear alpha?", "completion": "Yes, alpha."},
        "alpaca": {"instruction": "Do you hear alpha?", "output": "Yes, alpha."},
        "chat": {"messages": turns(("user", "Do you hear alpha?"), ("assistant", "Yes, alpha."))},
        "text": {"text": "A text about alpha."},
        "none": {},
    }[form]
    if name.endswith("csv"):
        table = io.StringIO()
        row = {key: value if isinstance(value, str) else value and json.dumps(value) for key, value in row.items()}
        csv.writer(table).writerows([row.keys(), row.values()])
        content = table.getvalue()
    else:
        content = json.dumps(row)
    try:
        (example,) = read(content, name)
    except InputError:
        return
    left = {key: value for key, value in row.items() if "alpha" not in json.dumps(value)}
    assert lost(left, example, " ".join(lint([example]))) == []

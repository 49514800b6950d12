"""The fixtures in fixtures/sillytavern are presets of our own with what SillyTavern's JavaScript rendered of them."""

import json
from dataclasses import replace

import pytest
from conftest import command

from mini_symposium.data.dataset import load_examples
from mini_symposium.data.prompt_formats import FORMATS, PromptFormat, grid_cells, load_chat, load_preset, prompt_format
from mini_symposium.errors import InputError
from mini_symposium.run import ROOT

FIXTURES = sorted((ROOT / "tests" / "fixtures" / "sillytavern").glob("*.json"))


@pytest.fixture
def write(tmp_path):
    def written(value, name="preset.json"):
        path = tmp_path / name
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return path

    return written


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.stem)
def test_presets_render_as_sillytavern_renders_them(fixture, write):
    found = json.loads(fixture.read_text(encoding="utf-8"))
    form = load_preset(write(found["preset"]))
    for wanted in found["renders"]:
        chat = wanted["chat"]
        assert form.render_chat(chat["messages"], chat["user"], chat["char"]) == wanted["prompt"]
        assert form.stop_strings(chat["user"], chat["char"]) == wanted["stop"]


def test_the_baseline_renders_the_very_prompt_that_was_trained():
    example = next(e for e in load_examples(ROOT / "data" / "minisymposium.md") if len(e.sections) == 1)
    heading = f"### {example.sections[0].heading}"
    assert prompt_format(heading).render(example.query) == example.prompt
    assert FORMATS["new-query"].render("Why?") == "### New Query\nWhy?\n\n### Complete Response\n"


@pytest.mark.parametrize(
    "name, prompt",
    [
        ("alpaca", "### Instruction\nWhy?\n\n### Response\n"),
        ("character", "### Ines\nWhy?\n\n### Brannoch\n"),
        ("chatml", "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"),
        ("vicuna", "USER: Why? ASSISTANT:"),
        ("mistral", "[INST] Why? [/INST]"),
        ("qa", "Question: Why?\nAnswer:"),
        ("bare", "Why?\n"),
        ("### Stack Overflow Solution", "### New Query\nWhy?\n\n### Stack Overflow Solution\n"),
    ],
)
def test_built_in_formats_render(name, prompt):
    assert prompt_format(name).render("Why?", "Ines", "Brannoch") == prompt


def test_an_answer_that_begins_another_turn_is_stopped():
    assert FORMATS["new-query"].stop_strings() == ["### New Query", "### Complete Response"]
    assert FORMATS["character"].stop_strings("Ines", "Brannoch") == ["\n### Ines", "\n### Brannoch"]
    assert "<|im_end|>" in FORMATS["chatml"].stop_strings()
    assert FORMATS["bare"].stop_strings() == []


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_presets_survive_their_file_with_unknown_keys(form, tmp_path, write):
    form.save(tmp_path / "a.json")
    assert load_preset(tmp_path / "a.json") == form
    later = {**form.to_preset(), "story_string_prefix": "<s>"}
    assert load_preset(write(later)).to_preset() == later


def test_sections_keep_their_blank_line_in_every_turn():
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    blocks = ["system", "### New Query\nuser", "### Complete Response\nassistant", "### New Query\nuser"]
    assert FORMATS["new-query"].render_chat(turns) == "\n\n".join([*blocks, "### Complete Response\n"])


def test_only_the_stop_sequence_stops_where_sequences_are_switched_off():
    form = replace(FORMATS["chatml"], sequences_as_stop_strings=False)
    assert form.stop_strings() == ["<|im_end|>"]


@pytest.mark.parametrize(
    "names, groups, behavior", [(True, False, "always"), (False, True, "force"), (False, False, "none")]
)
def test_older_keys_for_names_become_one(write, names, groups, behavior):
    older = {"input_sequence": "a", "separator_sequence": None, "names": names, "names_force_groups": groups}
    preset = load_preset(write(older)).to_preset()
    assert preset["names_behavior"] == behavior
    assert preset["output_suffix"] == ""
    assert not {"names", "names_force_groups", "separator_sequence"} & set(preset)


def test_the_exported_presets_are_current():
    for name in ("new-query", "character"):
        assert load_preset(ROOT / "data" / "presets" / f"{name}.json") == FORMATS[name]


def test_chat_text_is_never_expanded_and_names_are_taken_as_they_are():
    form = PromptFormat("x", "<{{user}}>", output_sequence="<{{char}}>")
    prompt = form.render("{{char}} \\1 $& <BOT>", user="A\\1", char="{{user}}")
    assert prompt == "<A\\1>\n{{char}} \\1 $& <BOT>\n\n<{{user}}>\n"


@pytest.mark.parametrize(
    "value, expected",
    [
        ('{"input_sequence": "a",\n"b"', r"preset\.json:2: not JSON"),
        ("[1]", r"preset\.json:1: not one JSON object"),
        ("[" * 100_000, r"preset\.json:1: not JSON"),
        ({"temperature": 1}, r"neither input_sequence nor output_sequence"),
        ({"input_sequence": 3}, r"input_sequence is 3; it takes text"),
        ({"input_sequence": "a", "wrap": "yes"}, r'wrap is "yes"; it takes true or false'),
        ({"input_sequence": "a", "names_behavior": "often"}, r"names_behavior is 'often'; it is none, force or always"),
    ],
)  # fmt: skip
def test_a_broken_preset_is_refused(write, value, expected):
    with pytest.raises(InputError, match=expected):
        load_preset(write(value))


@pytest.mark.parametrize(
    "value, expected",
    [
        ({"messages": []}, "no messages"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "message 1: its role"),
        ({"messages": [{"role": "user"}]}, "message 1: no content"),
        ({"messages": [{"role": "user", "content": "\ud83c"}]}, "half a character"),
        ({"user": 3, "messages": [{"role": "user", "content": "a"}]}, "user and char are names"),
    ],
)
def test_a_broken_chat_is_refused(write, value, expected):
    with pytest.raises(InputError, match=expected):
        load_chat(write(value, "chat.json"))


@pytest.mark.parametrize("messages", [[], "Hello", [{"role": "tool", "content": "a"}], [{"role": "user"}], [None]])
def test_no_chat_is_rendered_that_could_not_be_loaded(messages):
    with pytest.raises(InputError, match=r"the chat: (no messages|message 1)"):
        FORMATS["alpaca"].render_chat(messages)


def test_an_unknown_format_names_a_near_one():
    with pytest.raises(InputError, match=r"alpaka: no such format; did you mean alpaca\?"):
        prompt_format("alpaka")


def test_a_grid_has_a_cell_for_each_model_chat_and_format():
    chat = [{"role": "system", "content": "Night."}, {"role": "user", "content": "Hi"}]
    forms = [FORMATS["bare"], FORMATS["character"]]
    cells = grid_cells(["base", "1e-05"], forms, ["Why?", chat], "Ada", "Noor")
    assert [(cell["model"], cell["query"], cell["format"]) for cell in cells] == [
        (model, query, form.name) for model in ("base", "1e-05") for query in ("Why?", "Hi") for form in forms
    ]
    assert cells[1]["prompt"] == forms[1].render("Why?", "Ada", "Noor")
    assert cells[3]["prompt"] == forms[1].render_chat(chat, "Ada", "Noor")
    assert cells[1]["stops"] == forms[1].stop_strings("Ada", "Noor") != cells[0]["stops"]


def test_render_prints_prompt_and_stops(write):
    found = json.loads(FIXTURES[0].read_text(encoding="utf-8"))
    wanted = found["renders"][0]
    done = command("render", write(found["preset"]), write(wanted["chat"], "chat.json"))
    assert json.loads(done.stdout) == {"prompt": wanted["prompt"], "stop": wanted["stop"]}
    refused = command("render", write("{"), write(wanted["chat"], "chat.json"), check=False)
    assert refused.returncode == 2
    assert "preset.json:1: not JSON" in refused.stderr
    assert "Traceback" not in refused.stderr


MASTER = {
    "instruct": {"input_sequence": "### {{user}}", "output_sequence": "### {{char}}", "name": "Clockmaker"},
    "context": {"story_string": "{{description}}", "name": "Clockmaker"},
    "sysprompt": {"content": "Play {{char}}.", "name": "Clockmaker"},
}


def test_a_master_export_renders_as_its_instruct_part_and_keeps_the_others(tmp_path):
    for name, content in (("master.json", MASTER), ("alone.json", MASTER["instruct"])):
        (tmp_path / name).write_text(json.dumps(content, indent=4))
    master, alone = load_preset(tmp_path / "master.json"), load_preset(tmp_path / "alone.json")
    assert (
        master.render("Why?", "Mira", "Tomas")
        == alone.render("Why?", "Mira", "Tomas")
        == "### Mira\nWhy?\n\n### Tomas\n"
    )
    master.save(tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert {key: again[key] for key in ("context", "sysprompt")} == {k: MASTER[k] for k in ("context", "sysprompt")}
    assert load_preset(tmp_path / "again.json") == master


def test_nulls_are_absent_and_sillytaverns_true_is_true(tmp_path):
    preset = {"name": None, "input_sequence": "### In", "first_output_sequence": None, "wrap": "true", "macro": 1}
    (tmp_path / "mine.json").write_text(json.dumps(preset))
    form = load_preset(tmp_path / "mine.json")
    assert (form.name, form.first_output_sequence, form.wrap, form.macro) == ("mine", "", True, True)


def test_macros_that_only_sillytavern_fills_are_named():
    form = PromptFormat(
        "x", "{{user}} ({{random::a::b}})\n", output_sequence="{{char}}{{trim}} {{time}} {{noop}}{{//no}}"
    )
    assert form.unfilled_macros() == ["{{random::a::b}}", "{{time}}"]
    assert replace(form, macro=False).unfilled_macros() == []
    assert not any(form.unfilled_macros() for form in FORMATS.values())


def test_a_chat_log_of_sillytavern_is_a_chat(tmp_path):
    rows = [{"user_name": "unused", "character_name": "unused"}]  # as newer versions write it
    rows += [{"name": "Tomas", "is_user": False, "mes": "Late!"}, {"name": "Mira", "is_user": True, "mes": "The tram."}]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = [{"role": "assistant", "content": "Late!"}, {"role": "user", "content": "The tram."}]
    assert load_chat(tmp_path / "chat.jsonl") == {"user": "Mira", "char": "Tomas", "messages": said}


def test_in_a_group_each_character_has_its_own_name(tmp_path):
    said = [("Tomas", "Late!"), ("Mira", "The tram."), ("Ines", "Sit.")]
    rows = [{"name": name, "is_user": name == "Mira", "mes": text} for name, text in said]
    rows.insert(1, {"name": "Narrator", "is_user": False, "mes": "*Rain.*", "extra": {"type": "narrator"}})
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chat, form = load_chat(tmp_path / "chat.jsonl"), PromptFormat("x", "U", output_sequence="A")
    rendered = {
        behavior: replace(form, names_behavior=behavior).render_chat(chat["messages"], chat["user"], chat["char"])
        for behavior in ("none", "force", "always")
    }
    assert rendered["none"] == "A\nLate!\n*Rain.*\nU\nThe tram.\nA\nSit.\n\nA\n"
    assert rendered["force"] == "A\nTomas: Late!\n*Rain.*\nU\nThe tram.\nA\nInes: Sit.\n\nA\nInes:"
    assert rendered["always"] == rendered["force"].replace("The tram", "Mira: The tram")


def test_all_that_is_wrong_with_a_preset_is_said_at_once(tmp_path):
    wrong = {"input_sequence": "a", "stop_sequence": ["b"], "wrap": "yes", "names_behavior": "sometimes"}
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    with pytest.raises(InputError) as refused:
        load_preset(tmp_path / "wrong.json")
    assert [fault.split(": ", 1)[1].split(" ")[0] for fault in refused.value.faults] == [
        "stop_sequence",
        "wrap",
        "names_behavior",
    ]

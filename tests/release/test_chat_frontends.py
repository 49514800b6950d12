"""What a preset or a Modelfile renders in SillyTavern or Ollama is what the format renders here."""

import json
import re
from dataclasses import replace

import pytest
from conftest import command

from mini_symposium.data.prompt_formats import FORMATS, PromptFormat, load_preset
from mini_symposium.errors import InputError
from mini_symposium.release.chat_frontends import STORY, context_preset, modelfile, ollama_template, write_sillytavern

CHAT = [{"role": role, "content": f"{role} says {i}"} for i, role in enumerate(("system", "user", "assistant", "user"))]


def parsed(text):
    """A Modelfile as Ollama's parser/parser.go reads it: a command, then a value that may stand in quotation marks."""
    commands, rest = [], text
    while rest := rest.lstrip("\n"):
        if rest.startswith("#"):
            rest = rest.partition("\n")[2]
            continue
        name, _, rest = rest.partition(" ")
        if name == "PARAMETER":
            name, _, rest = rest.partition(" ")
        if rest.startswith('"""'):
            value, _, rest = rest[3:].partition('"""')
        else:
            value, _, rest = rest.partition("\n")
        commands.append((name, value))
    return commands


def rendered(template, messages):
    """Such templates as Go's text/template executes them: one loop over messages, one choice by role."""
    loop = re.fullmatch(
        r'{{ range .Messages }}{{ if eq .Role "user" }}(.*?){{ else if eq .Role "assistant" }}(.*?){{ else }}(.*?)'
        r"{{ end }}{{ end }}(.*)",
        template,
        re.S,
    )
    user, assistant, system, end = loop.groups()
    by_role = {"user": user, "assistant": assistant, "system": system}

    def filled(text, content):
        return re.sub(r"{{ (.*?) }}", lambda found: content if found[1] == ".Content" else found[1].strip('"'), text)

    return "".join(filled(by_role[m["role"]], m["content"]) for m in messages) + filled(end, "")


ODD = PromptFormat("odd", "{{odd}} {{user}}", "", 'a"b ')


@pytest.mark.parametrize("form", [*FORMATS.values(), ODD], ids=lambda form: form.name)
def test_a_modelfile_renders_and_stops_as_the_format_does(form):
    commands = parsed(modelfile("a.gguf", form, "b.gguf", "Ines", "Brannoch", "a note\nof two lines"))
    assert commands[:2] == [("FROM", "./a.gguf"), ("ADAPTER", "./b.gguf")]
    template = dict(commands)["TEMPLATE"]
    assert rendered(template, CHAT) == form.render_chat(CHAT, "Ines", "Brannoch")
    assert rendered(template, CHAT[1:2]) == form.render(CHAT[1]["content"], "Ines", "Brannoch")
    assert [value for name, value in commands if name == "stop"] == form.stop_strings("Ines", "Brannoch")


def test_what_a_modelfile_cannot_say_is_refused():
    with pytest.raises(InputError, match="has last_input_sequence; an Ollama template"):
        ollama_template(PromptFormat("a", "x", "", "y", last_input_sequence="z"))
    for odd in ('"""', "\x07", "\u200b"):
        with pytest.raises(InputError, match="a Modelfile cannot"):
            modelfile("a.gguf", PromptFormat("a", f"x{odd}", "", "y"))


def story(template, **parts):
    """The conditions and names of Handlebars, and SillyTavern's {{trim}}."""
    text = re.sub(
        r"{{#if (\w+)}}(.*?){{/if}}", lambda found: found[2] if parts.get(found[1]) else "", template, flags=re.S
    )
    text = re.sub(r"{{(\w+)}}", lambda found: parts.get(found[1], found[0]), text)
    return re.sub(r"\n*{{trim}}\n*", "", text)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_context_preset_puts_a_character_where_the_format_has_a_narrator(form):
    told = story(context_preset(form)["story_string"], system="You are Ines.", scenario="At sea.")
    messages = [{"role": "system", "content": "You are Ines.\nAt sea."}, {"role": "user", "content": "Ahoy"}]
    assert told + form.render("Ahoy") == form.render_chat(messages)


def test_sillytavern_presets_come_back_as_they_were(tmp_path):
    said = command("export", "sillytavern", "--out", tmp_path / "st").stdout.split()
    assert said[0].endswith("instruct/character.json") and said[1].endswith("context/character.json")
    for name, form in FORMATS.items():
        assert load_preset(tmp_path / "st" / "instruct" / f"{name}.json") == form
        assert json.loads((tmp_path / "st" / "context" / f"{name}.json").read_text())["name"] == name
    assert load_preset(tmp_path / "st/instruct/character.json").input_sequence == "### {{user}}"
    with pytest.raises(InputError, match="is there already"):
        write_sillytavern([FORMATS["alpaca"]], tmp_path / "st")
    with pytest.raises(InputError, match="two have the name alpaca"):
        write_sillytavern([FORMATS["alpaca"]] * 2, tmp_path / "other")


def test_the_parts_of_a_master_export_are_written_as_they_came(tmp_path):
    parts = {"context": {"story_string": "{{description}}"}, "sysprompt": {"content": "Play {{char}}."}}
    form = PromptFormat("Clockmaker", "### {{user}}", output_sequence="### {{char}}", parts=parts)
    written = write_sillytavern([form], tmp_path / "out")
    assert [path.parent.name for path in written] == ["instruct", "context", "sysprompt"]
    assert [json.loads(path.read_text()) for path in written[1:]] == list(parts.values())
    assert "# the preset's system prompt is not in here" in modelfile("a.gguf", form)
    assert "system prompt" not in modelfile("a.gguf", replace(form, parts={}))


def test_a_story_string_that_the_preset_wraps_is_not_wrapped_again():
    form = PromptFormat("x", "### In", system_sequence="### System", other={"story_string_prefix": "### System"})
    assert context_preset(form)["story_string"] == STORY + "{{trim}}"
    assert context_preset(replace(form, other={}))["story_string"].startswith("### System")


def test_a_modelfile_says_which_macros_stay_as_they_are():
    form = PromptFormat("x", "### In", output_sequence="### Out {{time}}")
    assert "# only SillyTavern fills {{time}}; here" in modelfile("a.gguf", form)

"""Prompt formats for other programs: SillyTavern's presets, Ollama's Modelfile."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mini_symposium.data.prompt_formats import PromptFormat
from mini_symposium.errors import InputError
from mini_symposium.files.writing import check_new, write_json, written_whole

PARTS = ("anchorBefore", "system", "wiBefore", "description", "personality", "scenario", "wiAfter", "persona")
STORY = "".join(f"{{{{#if {part}}}}}{{{{{part}}}}}\n{{{{/if}}}}" for part in (*PARTS, "anchorAfter"))
"""SillyTavern's facts on a character and a chat, as a Handlebars template: a block for each part that is set."""

BY_PLACE = ("first_input_sequence", "last_input_sequence", "first_output_sequence", "user_alignment_message")
"""Fields of a format that treat a message by its place in the chat."""

CONTENT = "\0"
"""Placeholder for a message's text, used to find the text that a format puts around it."""


def text_around(form: PromptFormat, role: str, user: str = "User", char: str = "Assistant") -> tuple[str, str]:
    """The text that a format puts before and after a message of `role`: system, user or assistant.

    >>> from mini_symposium.data.prompt_formats import FORMATS
    >>> text_around(FORMATS["new-query"], "user")
    ('### New Query\\n', '\\n\\n')
    """
    messages = [{"role": role, "content": CONTENT}, {"role": "user", "content": CONTENT}]
    second = form.render_chat(messages[1:], user, char)
    parts = form.render_chat(messages, user, char).removesuffix(second).split(CONTENT)
    if len(parts) != 2:
        raise InputError(f"{form.name}: a sequence holds a NUL character; remove it")
    return parts[0], parts[1]


def write_sillytavern(formats: Sequence[PromptFormat], out: Path) -> list[Path]:
    """Write instruct/NAME.json and context/NAME.json for each format, and sysprompt/NAME.json for one that came with a
    system prompt: the folders of SillyTavern's own data.

    Raises
    ------
    InputError
        If `out` exists, or two formats have the same name.
    """
    check_new(out)
    names = [re.sub(r"[^\w .#-]", "_", form.name) + ".json" for form in formats]
    if len(set(names)) < len(names):
        raise InputError(f"--format: two have the name {max(names, key=names.count)}; rename one")
    with written_whole(out) as folder:
        for form, name in zip(formats, names, strict=True):
            write_json(folder / "instruct" / name, form.to_preset())
            write_json(folder / "context" / name, form.parts.get("context") or context_preset(form))
            if form.parts.get("sysprompt"):
                write_json(folder / "sysprompt" / name, form.parts["sysprompt"])
    kinds = ("instruct", "context", "sysprompt")
    return [path for name in names for kind in kinds if (path := out / kind / name).exists()]


def context_preset(form: PromptFormat) -> dict:
    """SillyTavern's context preset for a format; its story string is rendered like a system message.

    If the instruct preset has a `story_string_prefix` or suffix, nothing is put around the story string here, because
    SillyTavern does it.

    SillyTavern adds the names of user and character as stop strings only where the format writes a name before each
    message. Elsewhere a line such as `Noor: yes` may be part of an answer.
    """
    before, after = text_around(replace(form, macro=False), "system")
    if form.other.get("story_string_prefix") or form.other.get("story_string_suffix"):
        before = after = ""
    # STORY ends with a newline. If `after` begins with one too, that one is dropped. Otherwise `{{trim}}` removes
    # STORY's newline; before a newline, `{{trim}}` would remove that as well.
    story = before + STORY + (after[1:] if after.startswith("\n") else "{{trim}}" + after)
    return {
        "name": form.name,
        "story_string": story,
        "example_separator": "",
        "chat_start": "",
        "use_stop_strings": False,
        "names_as_stop_strings": form.names_behavior == "always",
        "story_string_position": 0,
        "story_string_depth": 1,
        "story_string_role": 0,
        "always_force_name2": True,
        "trim_sentences": False,
        "single_line": False,
    }


def modelfile(
    model: str, form: PromptFormat, adapter: str = "", user: str = "User", char: str = "Assistant", note: str = ""
) -> str:
    """Ollama's Modelfile: the GGUF file `model`, the format's template and stop strings, the adapter's GGUF file."""
    if macros := form.unfilled_macros():
        note += f"\nonly SillyTavern fills {', '.join(macros)}; here they stay as they are written"
    if form.parts.get("sysprompt"):
        note += "\nthe preset's system prompt is not in here; give it as a system message"
    lines = [f"# {line}" for line in note.splitlines() if line] + [f"FROM ./{model}"]
    lines += [f"ADAPTER ./{adapter}"] if adapter else []
    lines.append(f"TEMPLATE {_quoted(ollama_template(form, user, char), form)}")
    lines += [f"PARAMETER stop {_quoted(stop, form)}" for stop in form.stop_strings(user, char)]
    return "\n".join(lines) + "\n"


def ollama_template(form: PromptFormat, user: str = "User", char: str = "Assistant") -> str:
    """A format in Ollama's template language, which is Go's: every message by its role, then the line to generate from.

    Raises
    ------
    InputError
        If the format treats the first or last message differently. The template would be long, and wrong wherever
        Ollama cuts a long chat.
    """
    by_place = [key for key in BY_PLACE if getattr(form, key)]
    if by_place:
        raise InputError(f"{form.name}: has {', '.join(by_place)}; an Ollama template knows messages by role alone")

    def turn(role: str) -> str:
        before, after = map(_escaped, text_around(form, role, user, char))
        return f"{before}{{{{ .Content }}}}{after}"

    generate_from = form.render(CONTENT, user, char).split(CONTENT)[1]
    generate_from = generate_from.removeprefix(text_around(form, "user", user, char)[1])
    return (
        f'{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{turn("user")}'
        f'{{{{ else if eq .Role "assistant" }}}}{turn("assistant")}{{{{ else }}}}{turn("system")}'
        f"{{{{ end }}}}{{{{ end }}}}{_escaped(generate_from)}"
    )


def _escaped(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def _quoted(text: str, form: PromptFormat) -> str:
    """`text` in Ollama's quotation marks: newlines are kept between them, invisible characters would be dropped."""
    if '"""' in text or any(not (c.isprintable() or c in "\n\t") for c in text):
        raise InputError(f'{form.name}: a sequence holds """ or an invisible character; a Modelfile cannot')
    return f'"""{text}"""'

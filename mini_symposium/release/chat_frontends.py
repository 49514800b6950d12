"""A prompt format as other programs take it: SillyTavern's presets, Ollama's Modelfile."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mini_symposium.data.prompt_formats import PromptFormat
from mini_symposium.errors import InputError
from mini_symposium.files.writing import write_json, written_whole

PARTS = ("anchorBefore", "system", "wiBefore", "description", "personality", "scenario", "wiAfter", "persona")
STORY = "".join(f"{{{{#if {part}}}}}{{{{{part}}}}}\n{{{{/if}}}}" for part in (*PARTS, "anchorAfter"))
"""What SillyTavern knows of a character and a chat, as Handlebars: a line or more for each part that is there."""

BY_PLACE = ("first_input_sequence", "last_input_sequence", "first_output_sequence", "user_alignment_message")

HOLE = "\0"
"""Stands for what somebody says, while the text around it is found out."""


def around(form: PromptFormat, role: str, user: str = "User", char: str = "Assistant") -> tuple[str, str]:
    """What a format puts before and after what `role` (system, user, assistant) says.

    >>> from mini_symposium.data.prompt_formats import FORMATS
    >>> around(FORMATS["new-query"], "user")
    ('### New Query\\n', '\\n\\n')
    """
    messages = [{"role": role, "content": HOLE}, {"role": "user", "content": HOLE}]
    rest = form.render_chat(messages[1:], user, char)
    parts = form.render_chat(messages, user, char).removesuffix(rest).split(HOLE)
    if len(parts) != 2:
        raise InputError(f"{form.name}: a NUL, or nothing, stands where a message should; mend its sequences")
    return parts[0], parts[1]


def context_preset(form: PromptFormat) -> dict:
    """SillyTavern's context preset for a format: its story string stands in the prompt as a narrator's message would.

    Names are left to SillyTavern; they end an answer only where the format writes them before each message, since a
    line such as `Noor: yes` may stand in an answer otherwise.
    """
    before, after = around(replace(form, macro=False), "system")
    # Each part ends its line; `{{trim}}` would take the newlines after it as well.
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


def write_sillytavern(formats: Sequence[PromptFormat], out: Path) -> list[Path]:
    """Write instruct/NAME.json and context/NAME.json for each format: folders as SillyTavern's own data has them.

    Raises
    ------
    InputError
        If `out` is there already, or two formats have one name.
    """
    if out.exists():
        raise InputError(f"{out}: is there already; choose another folder or delete it")
    names = [re.sub(r"[^\w .#-]", "_", form.name) + ".json" for form in formats]
    if len(set(names)) < len(names):
        raise InputError(f"--format: two have the name {max(names, key=names.count)}; rename one")
    with written_whole(out) as folder:
        for form, name in zip(formats, names, strict=True):
            write_json(folder / "instruct" / name, form.to_preset())
            write_json(folder / "context" / name, context_preset(form))
    return [out / kind / name for name in names for kind in ("instruct", "context")]


def ollama_template(form: PromptFormat, user: str = "User", char: str = "Assistant") -> str:
    """A format as a template of Ollama's, in Go's language: each message by its role, then the line to generate from.

    Raises
    ------
    InputError
        If the format treats the first or last message in another way: such a template would not be short, and wrong
        wherever Ollama cuts a long chat.
    """
    odd = [key for key in BY_PLACE if getattr(form, key)]
    if odd:
        raise InputError(f"{form.name}: has {', '.join(odd)}; an Ollama template knows messages by role alone")

    def said(role: str) -> str:
        before, after = (text.replace("{{", '{{ "{{" }}') for text in around(form, role, user, char))
        return f"{before}{{{{ .Content }}}}{after}"

    asked, answered, told = (said(role) for role in ("user", "assistant", "system"))
    opening = form.render(HOLE, user, char).split(HOLE)[1].removeprefix(around(form, "user", user, char)[1])
    cases = f'{{{{ if eq .Role "user" }}}}{asked}{{{{ else if eq .Role "assistant" }}}}{answered}{{{{ else }}}}{told}'
    return f"{{{{ range .Messages }}}}{cases}{{{{ end }}}}{{{{ end }}}}" + opening.replace("{{", '{{ "{{" }}')


def modelfile(
    model: str, form: PromptFormat, adapter: str = "", user: str = "User", char: str = "Assistant", note: str = ""
) -> str:
    """Ollama's recipe for a model: its file, the format's template and stop strings, and an adapter if there is one.

    Raises
    ------
    InputError
        If the format holds what a Modelfile cannot: three quotation marks in a row, or invisible characters.
    """
    lines = [f"# {line}" for line in note.splitlines()] + [f"FROM ./{model}"]
    lines += [f"ADAPTER ./{adapter}"] if adapter else []
    lines.append(f"TEMPLATE {_quoted(ollama_template(form, user, char), form)}")
    lines += [f"PARAMETER stop {_quoted(stop, form)}" for stop in form.stop_strings(user, char)]
    return "\n".join(lines) + "\n"


def _quoted(text: str, form: PromptFormat) -> str:
    """In Ollama's quotation marks: it keeps newlines between them, and drops what cannot be printed."""
    if '"""' in text or any(not (c.isprintable() or c in "\n\t") for c in text):
        raise InputError(f'{form.name}: a sequence holds """ or an invisible character, which no Modelfile can')
    return f'"""{text}"""'

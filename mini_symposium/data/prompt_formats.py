"""Prompt formats: a query, or a chat between two named people, as the text that a model continues.

Every format, built-in or not, is a SillyTavern instruct preset. So there is one renderer, and a format that works here
works in SillyTavern as well. Prompts are equal to those of SillyTavern's instruct mode byte by byte:

- a message is sequence, separator, [`Name: `] text, suffix; with `wrap`, the separator is a newline, as is a missing
  suffix;
- the first message takes the `first_*` sequence and the last user message `last_input_sequence`, where given;
- if the user does not begin the chat, `user_alignment_message` comes first, as the user's message;
- the prompt ends with separator, `last_output_sequence` or `output_sequence`, separator;
- a system message has no name, and keeps its place in the chat.

A prompt is what SillyTavern's `formatInstructModeChat` and `formatInstructModePrompt` return, joined. Before sending,
SillyTavern also drops carriage returns and, with `wrap`, one newline before the last line. `new-query` has its own
newlines instead of `wrap`, so that SillyTavern sends the trained prompt as well. Parts that SillyTavern does not take
from the preset are not rendered: the story string with the character card (put it into a system message), example
messages, the mark that opens a chat, stop strings made of names. Macros in the messages of a chat are not expanded,
and a `$` in a name is only a dollar, where SillyTavern would give `$&` a meaning.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path

from mini_symposium.data.forms import is_chat_log, read_chat_log
from mini_symposium.errors import Faults, InputError
from mini_symposium.files.reading import json_values, read_text
from mini_symposium.files.writing import write_json
from mini_symposium.run import find


@dataclass(frozen=True)
class PromptFormat:
    """A SillyTavern instruct preset; the fields are the keys of its JSON.

    >>> print(FORMATS["new-query"].render("Why is the sky blue?"), end="")
    ### New Query
    Why is the sky blue?
    <BLANKLINE>
    ### Complete Response
    """

    name: str
    input_sequence: str = ""
    """Comes before a message of the user."""
    input_suffix: str = ""
    output_sequence: str = ""
    """Comes before a message of the model."""
    output_suffix: str = ""
    system_sequence: str = ""
    """Comes before a system message."""
    system_suffix: str = ""
    first_input_sequence: str = ""
    last_input_sequence: str = ""
    first_output_sequence: str = ""
    last_output_sequence: str = ""
    last_system_sequence: str = ""
    stop_sequence: str = ""
    wrap: bool = True
    """Put each sequence on a line of its own."""
    macro: bool = True
    """Expand {{user}}, {{char}} and {{name}} in sequences."""
    names_behavior: str = "force"
    """always: `Name: ` before each message; force: only in groups, so in a chat of two the same as none."""
    activation_regex: str = ""
    skip_examples: bool = False
    user_alignment_message: str = ""
    """A first message of the user, for a chat that does not begin with one."""
    system_same_as_user: bool = False
    """System messages have the user's sequences."""
    sequences_as_stop_strings: bool = True
    """Sequences end an answer, as `stop_sequence` does. Older versions of SillyTavern always do this."""
    other: Mapping = field(default_factory=dict)
    """Unknown keys, which are written back by `to_preset`."""
    parts: Mapping = field(default_factory=dict)
    """The other parts of SillyTavern's Master export, such as context and sysprompt, which are written back too."""

    def render(self, query: str, user: str = "User", char: str = "Assistant") -> str:
        """The prompt for a single query."""
        return self.render_chat([{"role": "user", "content": query}], user, char)

    def render_chat(self, messages: Sequence[Mapping], user: str = "User", char: str = "Assistant") -> str:
        """The prompt for a chat, up to where the character's answer begins.

        `messages` are dicts with `role` (system, user or assistant), `content`, and if it is another than `user` or
        `char`, the speaker's `name`; oldest first.
        """
        _check(messages, "the chat")
        last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        speakers = {message.get("name") or char for message in messages if message["role"] == "assistant"}
        group = len(speakers) > 1 and self.names_behavior == "force"
        parts, room = [], LONGEST_PROMPT
        if self.user_alignment_message and messages[0]["role"] != "user":
            parts.append(self._message({"role": "user", "content": self.user_alignment_message}, "first", user, char))
        for i, message in enumerate(messages):
            place = "last" if i == last_user else "first" if i == 0 else ""
            parts.append(self._message(message, place, user, char, group))
            room -= len(parts[-1])
            if room < 0:
                raise InputError(f"the chat: its prompt grows beyond {LONGEST_PROMPT:,} characters; shorten it")
        return "".join(parts) + self._line_to_generate_from(user, char, group)

    def _message(self, message: Mapping, place: str, user: str, char: str, group: bool = False) -> str:
        role, content = message["role"], message["content"]
        kind, name = {"user": ("input", user), "assistant": ("output", char)}.get(role, ("system", "System"))
        name = name if role == "system" else message.get("name") or name
        named = role != "system" and (self.names_behavior == "always" or (group and role == "assistant")) and name
        if role == "system":
            kind = "input" if self.system_same_as_user else "system"
            place = ""
        sequence = getattr(self, f"{kind}_sequence")
        if place:
            sequence = getattr(self, f"{place}_{kind}_sequence") or sequence
        prefix = self._expand(sequence, user, char, name)
        suffix = self._expand(getattr(self, f"{kind}_suffix"), user, char, name) or ("\n" if self.wrap else "")
        body = (f"{name}: " if named else "") + content + suffix
        return ("\n" if self.wrap else "").join(part for part in (prefix, body) if part)

    def _line_to_generate_from(self, user: str, char: str, group: bool) -> str:
        named = (self.names_behavior == "always" or group) and char
        sequence = self.last_output_sequence or self.output_sequence
        filler = ""
        if named and self.last_output_sequence and self.output_sequence:
            # In Mistral's presets only `output_sequence` ends with the space that belongs before a name.
            spaced = self.output_sequence[-1].isspace() and not self.last_output_sequence[-1].isspace()
            filler = self.output_sequence[-1] if spaced else ""
        separator = "\n" if self.wrap else ""
        text = separator + self._expand(sequence, user, char, char)
        if named:
            text += separator + filler + f"{char}:"
        return (text.rstrip() if self.wrap else text) + ("" if named else separator)

    def _expand(self, sequence: str, user: str, char: str, name: str) -> str:
        return _expanded(sequence, user, char, name or "System") if self.macro and sequence else sequence

    def stop_strings(self, user: str = "User", char: str = "Assistant") -> list[str]:
        """Strings that end an answer: every line of the sequences that is not blank, after a newline if `wrap`."""
        names = {"input": user, "output": char, "system": "System"}
        kinds = ("input", "output", "first_output", "last_output", "system", "last_system")
        lines = self.stop_sequence.split("\n")
        for kind in kinds if self.sequences_as_stop_strings else ():
            sequence = getattr(self, f"{kind}_sequence")
            lines += _replace("{{name}}", sequence, names[kind.split("_")[-1]]).split("\n")
        stops = [("\n" if self.wrap else "") + line for line in lines if line.strip()]
        return list(dict.fromkeys(_substitute(stop, user, char) if self.macro else stop for stop in stops))

    def to_preset(self) -> dict:
        """The JSON that SillyTavern imports."""
        values = asdict(self)
        values.pop("parts")
        return {**values.pop("other"), **values}

    def save(self, path: str | Path) -> None:
        """Write the preset as JSON, as a Master export if it came from one."""
        write_json(path, {**self.parts, "instruct": self.to_preset()} if self.parts else self.to_preset())

    def unfilled_macros(self) -> list[str]:
        """Macros in the sequences that only SillyTavern can fill, as {{time}}; here they stay as they are written.

        >>> replace(FORMATS["alpaca"], output_sequence="### {{char}} at {{time}}").unfilled_macros()
        ['{{time}}']
        """
        texts = [
            getattr(self, f.name) for f in fields(self) if f.type is str and f.name not in ("name", "activation_regex")
        ]
        left = [_expanded(text, "", "", "") for text in texts if self.macro]
        return list(dict.fromkeys(macro for text in left for macro in re.findall(r"\{\{[^{}]{1,200}\}\}", text)))


@lru_cache(maxsize=64)  # the messages of a chat share a few sequences
def _expanded(sequence: str, user: str, char: str, name: str) -> str:
    return _replace("{{name}}", _substitute(sequence, user, char), name)


def _substitute(text: str, user: str, char: str) -> str:
    """Expand SillyTavern's macros that have a meaning in a sequence, and leave those of its other features."""
    for tag, value in (("user", user), ("bot", char), ("char", char), ("charifnotgroup", char), ("group", char)):
        text = _replace(f"<{tag}>", text, value)
    if "{{" not in text:
        return text
    text = _replace("{{newline}}", text, "\n")
    # The lookbehind lets a match begin only at the start of a run of newlines; else the time would be quadratic in it.
    text = re.sub(r"(?:(?<![\r\n])(?:\r?\n)+)?\{\{trim\}\}(?:\r?\n)*", "", text, flags=re.I)
    text = _replace("{{noop}}", text, "")
    for macro, value in (("user", user), ("char", char), ("charifnotgroup", char), ("group", char)):
        text = _replace(f"{{{{{macro}}}}}", text, value)
    closed, brackets, rest = text.rpartition("}}")  # else each "{{//" would search to the end of the text
    return re.sub(r"\{\{//.*?\}\}", "", closed + brackets, flags=re.S) + rest


LONGEST, LONGEST_PROMPT = 1_000_000, 2**25
"""Maximum characters: of the names put into a sequence, and of a prompt."""


def _replace(macro: str, text: str, value: str) -> str:
    """Replace each `macro`, in upper or lower case, by `value`.

    >>> _replace("{{name}}", "I am {{NAME}}.", "Ada")
    'I am Ada.'
    """
    pattern = re.compile(re.escape(macro), re.I)
    if len(value) * len(pattern.findall(text)) > LONGEST:
        raise InputError(f"a sequence with {macro} grows beyond {LONGEST:,} characters; shorten it, or the names")
    return pattern.sub(lambda _: value, text)


FORMATS = {
    form.name: form
    for form in (
        PromptFormat(  # a blank line after each section, as in the training rows
            "new-query", "### New Query\n", "\n\n", "### Complete Response\n", "\n\n", system_suffix="\n\n", wrap=False
        ),
        PromptFormat("character", "### {{user}}", output_sequence="### {{char}}"),
        PromptFormat("alpaca", "### Instruction", output_sequence="### Response"),
        PromptFormat(
            "chatml",
            input_sequence="<|im_start|>user\n",
            input_suffix="<|im_end|>\n",
            output_sequence="<|im_start|>assistant\n",
            output_suffix="<|im_end|>\n",
            system_sequence="<|im_start|>system\n",
            system_suffix="<|im_end|>\n",
            stop_sequence="<|im_end|>",
            wrap=False,
        ),
        PromptFormat("vicuna", "USER: ", " ", "ASSISTANT:", "</s>", wrap=False),
        PromptFormat("mistral", "[INST] ", " [/INST]", "", "</s>", wrap=False),
        PromptFormat("qa", "Question: ", "\n", "Answer:", "\n", wrap=False),
        PromptFormat("bare", input_suffix="\n", output_suffix="\n", wrap=False),
    )
}
"""The built-in formats by name. The first is the model card's own; the card advises the second for SillyTavern."""


def prompt_format(name: str | Path) -> PromptFormat:
    """A built-in format by name, `new-query` with another `### Heading` for the answer, or a SillyTavern preset file.

    >>> prompt_format("### Software Engineer").render("Reverse a list.").splitlines()[-1]
    '### Software Engineer'
    """
    text = str(name)
    if text in FORMATS:
        return FORMATS[text]
    if text.startswith("### ") and text[4:].strip() and "\n" not in text:
        heading = text.rstrip()
        return replace(FORMATS["new-query"], name=heading, output_sequence=f"{heading}\n")
    if text.endswith(".json"):
        return load_preset(name)
    near = difflib.get_close_matches(text, FORMATS, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(f"{text}: no such format{hint}; give {', '.join(FORMATS)}, a '### Heading', or a preset.json")


def grid_cells(
    models: Sequence[str],
    formats: Sequence[PromptFormat],
    chats: Sequence[str | Sequence[Mapping]],
    user: str = "User",
    char: str = "Assistant",
) -> list[dict]:
    """The prompts for each model: every chat in every format, with its stop strings.

    Chats are single queries, or lists of messages as `render_chat` takes them. Each dict has model, format, query (the
    last message), prompt and stops; by model, then chat, then format.
    """
    conversations = [[{"role": "user", "content": chat}] if isinstance(chat, str) else chat for chat in chats]
    return [
        {
            "model": model,
            "format": form.name,
            "query": messages[-1]["content"],
            "prompt": form.render_chat(messages, user, char),
            "stops": form.stop_strings(user, char),
        }
        for model in models
        for messages in conversations
        for form in formats
    ]


LARGEST_PRESET, LARGEST_CHAT = 2**18, 2**24
"""Maximum bytes of a file. A preset's sequences come before each message of a chat, so the two sizes multiply."""


def load_preset(path: str | Path) -> PromptFormat:
    """Read a SillyTavern instruct preset of the present or an older version."""
    found = _as_object(_load_values(path, LARGEST_PRESET), path)
    whole = isinstance(found.get("instruct"), dict)  # a Master export
    preset = {key: value for key, value in (found["instruct"] if whole else found).items() if value is not None}
    parts = {key: value for key, value in found.items() if key != "instruct"} if whole else {}
    if "separator_sequence" in preset:
        preset["output_suffix"] = preset.pop("separator_sequence") or ""
    if "names" in preset:
        groups = preset.pop("names_force_groups", False)
        preset["names_behavior"] = "always" if preset.pop("names") else "force" if groups else "none"
    preset.setdefault("name", Path(path).stem)
    known = {f.name: f.type for f in fields(PromptFormat) if f.name not in ("other", "parts")}
    if not {"input_sequence", "output_sequence"} & set(preset):
        raise InputError(f"{path}: neither input_sequence nor output_sequence; not an instruct preset or Master export")
    values, faults = {}, Faults()
    for key, kind in known.items():
        value = preset.pop(key, None)
        if kind is bool and value in ("true", 0, 1):  # as SillyTavern takes them
            value = bool(value)
        if value is not None and not isinstance(value, kind):
            takes = "text" if kind is str else "true or false"
            faults.append(f"{path}: {key} is {json.dumps(value)[:40]}; it takes {takes}")
        elif key == "names_behavior" and value not in (None, "none", "force", "always"):
            faults.append(f"{path}: names_behavior is {value!r}; it is none, force or always")
        elif value is not None:
            values[key] = value
    faults.refuse()
    return PromptFormat(**values, other=preset, parts=parts)


def load_chat(path: str | Path) -> dict:
    """Read `{"user", "char", "messages": [{"role", "content"}]}`, or a chat log of SillyTavern's as the same."""
    values = _load_values(path, LARGEST_CHAT)
    rows = [value for value, _ in values]
    if is_chat_log(rows):
        user, char, turns, _ = read_chat_log(rows, [f"{path}:{line}" for _, line in values])
        known = {"user": user, "assistant": char, "system": ""}
        messages = [
            {"role": turn.role, "content": turn.text}
            | ({"name": turn.heading} if turn.heading != known[turn.role] else {})
            for turn in turns
        ]
        chat = {"user": user, "char": char, "messages": messages}
    else:
        chat = _as_object(values, path)
    _check(chat.get("messages"), path)
    names = {key: chat.get(key, default) for key, default in (("user", "User"), ("char", "Assistant"))}
    if not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{path}: user and char are names")
    return {**names, "messages": chat["messages"]}


def _check(messages, where: str | Path) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError(f"{where}: no messages; write a list of {{role, content}}")
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ("system", "user", "assistant"):
            raise InputError(f"{where}: message {number}: its role is {role!r}; it is one of system, user, assistant")
        if not isinstance(message.get("content"), str):
            raise InputError(f"{where}: message {number}: no content; write its text")
        if not isinstance(message.get("name") or "", str):
            raise InputError(f"{where}: message {number}: its name is not text")


def _load_values(path: str | Path, largest: int) -> list[tuple[object, int]]:
    """The values in a file of JSON, one or a line each, with their lines."""
    path = find(path)
    if path.is_file() and path.stat().st_size > largest:
        raise InputError(f"{path}: {path.stat().st_size:,} bytes; at most {largest:,} are read")
    faults = Faults()
    values = json_values(read_text(path), path, faults)
    faults.refuse()
    return values


def _as_object(values: list[tuple[object, int]], path: str | Path) -> dict:
    if len(values) != 1 or not isinstance(values[0][0], dict):
        raise InputError(f"{path}:1: not one JSON object")
    return values[0][0]

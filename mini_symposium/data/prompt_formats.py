"""Prompt formats: a query, or a chat between two named people, as the text that a model continues.

A format *is* a SillyTavern instruct preset, the built-in ones too, so there is one renderer and whatever works
here can be taken there. It follows SillyTavern's instruct mode to the byte, names with a `$` in them included:

- each message is sequence, separator, [`Name: `] text, suffix; the separator is a newline if `wrap` is set, and
  then a missing suffix is a newline as well;
- the first message takes the `first_*` sequence and the last user message `last_input_sequence`, where given;
- a chat that the user does not open is preceded by `user_alignment_message`, said by the user;
- the line to generate from is separator, `last_output_sequence` or `output_sequence`, separator;
- a system message is a narrator's message: it carries no name, and stands where it stands in the chat.

These are the pieces as `formatInstructModeChat` and `formatInstructModePrompt` make them, one after the other. Sending
them, SillyTavern also drops carriage returns and, under `wrap`, one newline before the last line; `new-query` sets its
own newlines instead of `wrap`, so that it gives the trained prompt there too. What SillyTavern takes from elsewhere is
not part of a preset and not rendered here: its story string with the character card (put such text into a system
message), examples, the chat's opening mark, stop strings made of names.
The chat is taken as stored: macros in what somebody said are not expanded.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path

from mini_symposium.errors import InputError
from mini_symposium.files.reading import parse_json, read_text
from mini_symposium.files.writing import write_json
from mini_symposium.run import find

SPACE = "\t\n\v\f\r \xa0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff" + "".join(map(chr, range(0x2000, 0x200B)))
"""What JavaScript's `trim` removes, which is not quite what Python's `strip` does."""


@dataclass(frozen=True)
class PromptFormat:
    """One instruct preset; the fields are the keys of its JSON.

    >>> print(FORMATS["new-query"].render("Why is the sky blue?"), end="")
    ### New Query
    Why is the sky blue?
    <BLANKLINE>
    ### Complete Response
    """

    name: str
    input_sequence: str = ""
    """Before what the user says."""
    input_suffix: str = ""
    output_sequence: str = ""
    """Before what the model says."""
    output_suffix: str = ""
    system_sequence: str = ""
    """Before what a narrator says."""
    system_suffix: str = ""
    first_input_sequence: str = ""
    last_input_sequence: str = ""
    first_output_sequence: str = ""
    last_output_sequence: str = ""
    last_system_sequence: str = ""
    stop_sequence: str = ""
    wrap: bool = True
    """Sequences stand on lines of their own."""
    macro: bool = True
    """Expand {{user}}, {{char}} and {{name}} in sequences."""
    names_behavior: str = "force"
    """always: `Name: ` before every message; force (in groups only) and none: never, in a chat of two."""
    activation_regex: str = ""
    skip_examples: bool = False
    user_alignment_message: str = ""
    """Said by the user ahead of a chat that does not begin with a user's message."""
    system_same_as_user: bool = False
    """A narrator speaks with the user's sequences."""
    sequences_as_stop_strings: bool = True
    """Sequences end an answer, as `stop_sequence` does; older SillyTavern has no such switch."""
    other: Mapping = field(default_factory=dict)
    """Keys of other SillyTavern versions; kept, not used."""

    def render(self, query: str, user: str = "User", char: str = "Assistant") -> str:
        """The prompt for a single query."""
        return self.render_chat([{"role": "user", "content": query}], user, char)

    def render_chat(self, messages: Sequence[Mapping], user: str = "User", char: str = "Assistant") -> str:
        """The prompt for a chat, ending where the character is to speak.

        Parameters
        ----------
        messages
            Dicts with `role` (system, user, assistant) and `content`, oldest first.

        Raises
        ------
        InputError
            If there are none, one has another role or no text, or the prompt would be longer than any model's.
        """
        _check(messages, "the chat")
        last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        parts, room = [], LONGEST_PROMPT
        if self.user_alignment_message and messages[0]["role"] != "user":
            parts.append(self._message("user", self.user_alignment_message, "first", user, char))
        for i, message in enumerate(messages):
            place = "last" if i == last_user else "first" if i == 0 else ""
            parts.append(self._message(message["role"], message["content"], place, user, char))
            room -= len(parts[-1])
            if room < 0:
                raise InputError(f"the chat: its prompt grows beyond {LONGEST_PROMPT:,} characters; shorten it")
        return "".join(parts) + self._line_to_generate_from(user, char)

    def _message(self, role: str, content: str, place: str, user: str, char: str) -> str:
        kind, name = {"user": ("input", user), "assistant": ("output", char)}.get(role, ("system", "System"))
        named = role != "system" and self.names_behavior == "always" and name
        if role == "system":
            kind = "input" if self.system_same_as_user else "system"
            place = ""
        sequence = getattr(self, f"{kind}_sequence")
        if place:
            sequence = getattr(self, f"{place}_{kind}_sequence") or sequence
        prefix = self._expand(sequence, user, char, name)
        suffix = self._expand(getattr(self, f"{kind}_suffix"), user, char, name) or ("\n" if self.wrap else "")
        said = (f"{name}: " if named else "") + content + suffix
        return ("\n" if self.wrap else "").join(part for part in (prefix, said) if part)

    def _line_to_generate_from(self, user: str, char: str) -> str:
        named = self.names_behavior == "always" and char
        sequence = self.last_output_sequence or self.output_sequence
        filler = ""
        if named and self.last_output_sequence and self.output_sequence:
            # Mistral's presets end their output sequence, but not the last one, with the space before a name.
            spaced = self.output_sequence[-1] in SPACE and self.last_output_sequence[-1] not in SPACE
            filler = self.output_sequence[-1] if spaced else ""
        separator = "\n" if self.wrap else ""
        text = separator + self._expand(sequence, user, char, char)
        if named:
            text += separator + filler + f"{char}:"
        return (text.rstrip(SPACE) if self.wrap else text) + ("" if named else separator)

    def _expand(self, sequence: str, user: str, char: str, name: str) -> str:
        return _expanded(sequence, user, char, name or "System") if self.macro and sequence else sequence

    def stop_strings(self, user: str = "User", char: str = "Assistant") -> list[str]:
        """What ends an answer: each distinct line of the sequences that is not blank, after a newline if `wrap`."""
        names = {"input": user, "output": char, "system": "System"}
        kinds = ("input", "output", "first_output", "last_output", "system", "last_system")
        lines = self.stop_sequence.split("\n")
        for kind in kinds if self.sequences_as_stop_strings else ():
            sequence = getattr(self, f"{kind}_sequence")
            lines += _replace("{{name}}", sequence, names[kind.split("_")[-1]]).split("\n")
        stops = [("\n" if self.wrap else "") + line for line in lines if line.strip(SPACE)]
        return list(dict.fromkeys(_substitute(stop, user, char) if self.macro else stop for stop in stops))

    def to_preset(self) -> dict:
        """The JSON that SillyTavern imports."""
        values = asdict(self)
        return {**values.pop("other"), **values}

    def save(self, path: str | Path) -> None:
        """Write the preset as JSON."""
        write_json(path, self.to_preset())


@lru_cache(maxsize=64)  # a chat repeats few of them
def _expanded(sequence: str, user: str, char: str, name: str) -> str:
    return _replace("{{name}}", _substitute(sequence, user, char), name)


def _substitute(text: str, user: str, char: str) -> str:
    """SillyTavern's macros that mean something in a sequence; those of its other features are left as they are."""
    for tag, value in (("user", user), ("bot", char), ("char", char), ("charifnotgroup", char), ("group", char)):
        text = _replace(f"<{tag}>", text, value)
    if "{{" not in text:
        return text
    text = _replace("{{newline}}", text, "\n")
    text = _trimmed(text)
    text = _replace("{{noop}}", text, "")
    for macro, value in (("user", user), ("char", char), ("charifnotgroup", char), ("group", char)):
        text = _replace(f"{{{{{macro}}}}}", text, value, literally=True)
    closed, brackets, rest = text.rpartition("}}")  # so that no comment is sought to the end in vain
    return re.sub(r"\{\{//.*?\}\}", "", closed + brackets, flags=re.S) + rest


def _trimmed(text: str) -> str:
    r"""`(\r?\n)*{{trim}}(\r?\n)*` left out. As one pattern it would look for a {{trim}} behind each of many newlines.

    >>> _trimmed("a\r\n\n{{Trim}}\nb\n")
    'ab\n'
    """
    first, *parts = re.split(r"\{\{trim\}\}", text, flags=re.I | re.A)
    parts = [part[re.match(r"(?:\r?\n)*", part).end() :] for part in parts]
    *before, last = [first, *parts]
    return "".join(part[: len(part) - re.match(r"(?:\n\r?)*", part[::-1]).end()] for part in before) + last


LONGEST, LONGEST_PROMPT = 1_000_000, 2**25
"""Characters that a sequence may become (a name with $` in it copies what stands around it), and a prompt."""


def _replace(macro: str, text: str, value: str, literally: bool = False) -> str:
    """JavaScript's `replace`: in a `value` not taken literally $$ is a dollar, $& the match, $` and $' what is around.

    >>> _replace("{{name}}", "I am {{NAME}}.", "A$$")
    'I am A$.'
    """

    room = LONGEST

    def bounded(piece: str) -> str:
        nonlocal room
        room -= len(piece)
        if room < 0:
            raise InputError(f"a sequence with {macro} grows beyond {LONGEST:,} characters; shorten it, or the names")
        return piece

    def filled(match: re.Match) -> str:
        def meant(found: re.Match) -> str:
            around = {"`": slice(match.start()), "'": slice(match.end(), None)}.get(found[1])
            return bounded(text[around]) if around else "$" if found[1] == "$" else match[0]

        return bounded(value) if literally or "$" not in value else re.sub(r"\$([$&`'])", meant, bounded(value))

    return re.sub(re.escape(macro), filled, text, flags=re.I | re.A)


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
"""The built-in formats by name; the first is the card's baseline, the second its advice for SillyTavern."""


def role(heading: str) -> PromptFormat:
    """The baseline with another heading for the answer, as the card suggests: `### Software Engineer`."""
    return replace(FORMATS["new-query"], name=heading, output_sequence=f"{heading}\n")


def prompt_format(name: str | Path) -> PromptFormat:
    """A built-in format by name, any `### Heading`, or a SillyTavern preset by its path.

    >>> prompt_format("### Software Engineer").render("Reverse a list.").splitlines()[-1]
    '### Software Engineer'
    """
    text = str(name)
    if text in FORMATS:
        return FORMATS[text]
    if text.startswith("### ") and text[4:].strip() and "\n" not in text:
        return role(text.rstrip())
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
    """What to ask each model: every chat in every format, with the strings that end its answer.

    Parameters
    ----------
    chats
        Each a single query, or messages as `render_chat` takes them.

    Returns
    -------
    list of dict
        model, format, query (the last message), prompt, stops; by model, then chat, then format.
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
"""Bytes of a file. A preset's sequences stand before each message of a chat, so the one multiplies the other."""


def load_preset(path: str | Path) -> PromptFormat:
    """Read a SillyTavern instruct preset, of this or an older form.

    Raises
    ------
    InputError
        If it is not JSON, or a key has another type than SillyTavern gives it.
    """
    preset = dict(_load_object(path, LARGEST_PRESET))
    if "separator_sequence" in preset:
        preset["output_suffix"] = preset.pop("separator_sequence") or ""
    if "names" in preset:
        groups = preset.pop("names_force_groups", False)
        preset["names_behavior"] = "always" if preset.pop("names") else "force" if groups else "none"
    preset.setdefault("name", Path(path).stem)
    known = {f.name: f.type for f in fields(PromptFormat) if f.name != "other"}
    if not {"input_sequence", "output_sequence"} & set(preset):
        raise InputError(f"{path}: neither input_sequence nor output_sequence; this is no instruct preset")
    values = {}
    for key, kind in known.items():
        value = preset.pop(key, None)
        if value is not None:
            if not isinstance(value, kind):
                raise InputError(
                    f"{path}: {key} is {json.dumps(value)[:40]}; it takes {'text' if kind is str else 'true or false'}"
                )
            values[key] = value
    if values.get("names_behavior", "none") not in ("none", "force", "always"):
        raise InputError(f"{path}: names_behavior is {values['names_behavior']!r}; it is none, force or always")
    return PromptFormat(**values, other=preset)


def load_chat(path: str | Path) -> dict:
    """Read `{"user", "char", "messages": [{"role", "content"}]}`; raises InputError naming what is wrong."""
    chat = _load_object(path, LARGEST_CHAT)
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


def _load_object(path: str | Path, largest: int) -> dict:
    path = find(path)
    if path.is_file() and path.stat().st_size > largest:
        raise InputError(f"{path}: {path.stat().st_size:,} bytes; at most {largest:,} are read")
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict):
        raise InputError(f"{path}:1: holds a {type(value).__name__}, not an object")
    return value

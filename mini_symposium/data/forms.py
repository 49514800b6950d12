"""The forms that rows of tables have, each read as pieces of text, of which the answers are learned.

A form is a reader in FORMS, found by the fields that it needs. Every field of a row is used, refused, or named in a
note, so that nothing is dropped in silence.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from mini_symposium import recipe
from mini_symposium.errors import INVISIBLE, Faults, InputError
from mini_symposium.files.reading import parse_json


@dataclass(frozen=True)
class Piece:
    """A part of a row's text."""

    text: str
    learned: bool | None = None
    """True for an answer, False for an answer that its row excludes (`weight: 0`), None for everything else."""


@dataclass
class TableRow:
    """A row of a table while it is read, and then the pieces of its text."""

    fields: dict
    """Its fields, under their names in lower case."""
    where: str
    """File and line."""
    pieces: list[Piece] = field(default_factory=list)
    query: str = ""
    """What is asked, to tell rows apart."""
    heading: str = ""
    """The last answer's heading, if the form has headings."""
    notes: list[str] = field(default_factory=list)
    """What of the row is not used, or was read in one of two ways."""
    used: set[str] = field(default_factory=set)

    def take(self, name: str):
        """The value of a field, which counts as used from now on."""
        self.used.add(name)
        return self.fields.get(name)

    def text(self, name: str) -> str:
        """A field that has to hold text."""
        value = self.take(name)
        if not isinstance(value, str) or blank(value):
            raise InputError(f"{self.where}: `{name}` is {_quoted(value)}; write text")
        return value

    def optional(self, name: str) -> str:
        """A field that holds text or nothing."""
        return "" if _absent(self.take(name)) else self.text(name)

    def system(self) -> None:
        """Put the row's `system` text first, where it has one."""
        for name in ("system", "system_prompt", "systeminstruction", "system_instruction"):
            value = self.take(name)
            if not _absent(value):
                told = value.get("parts") if isinstance(value, Mapping) else value
                self.pieces.append(Piece(_content(told, f"{self.where}: `{name}`") + "\n\n"))


def blank(text: str) -> bool:
    """Whether `text` has no visible character. Its beginning is tested first, because it may have megabytes."""
    return not INVISIBLE.sub("", text[:1000]).strip() and not INVISIBLE.sub("", text).strip()


def _absent(value) -> bool:
    """Whether a field's value says nothing: null, a text of spaces, an empty list or object."""
    return value is None or (not value.strip() if isinstance(value, str) else value in ([], (), {}))


def _quoted(value) -> str:
    return json.dumps(value, default=str)[:40]


def _parsed(value):
    """A list, which a cell of CSV holds as JSON."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        with suppress(InputError):
            return parse_json(value, "")
    return value


def _spoken(value):
    """A list of messages, which a cell of CSV holds as JSON. Any other text stays text, also if it is JSON."""
    parsed = _parsed(value)
    listed = parsed if isinstance(parsed, list) else []
    return parsed if listed and all(isinstance(m, Mapping) and set(SPEAKER) & set(m) for m in listed) else value


PREFERENCES = ("chosen", "rejected", "preferred_output", "non_preferred_output")
NOT_TRAINED = ("tools", "functions", "images", "image", "videos", "video", "audio", "audios", *PREFERENCES)
"""Fields without which a row would mean something else, and which are not trained on."""


def read_row(row: object, where: str) -> TableRow:
    """One row of a table in any form; InputError if it has none, or something that cannot be trained on.

    >>> row = read_row({"question": "Why?", "answer": "So.", "id": 7}, "mine.csv:2")
    >>> [piece.text for piece in row.pieces if piece.learned], row.notes
    (['So.'], ['`id` is not used'])
    """
    if isinstance(row, list) and row and all(isinstance(each, Mapping) for each in row):
        row = {"messages": row}
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: a {type(row).__name__}; each row is an object")
    fields = {str(key).strip().lower(): value for key, value in row.items()}
    read = TableRow(fields if len(fields) == len(row) else {str(key): value for key, value in row.items()}, where)
    said = {name: value for name, value in read.fields.items() if name not in CHATS or not _absent(value)}
    reader, faults = find_form(said) or find_form(read.fields), Faults()
    for name in NOT_TRAINED:
        if not _absent(_parsed(read.fields.get(name))):  # `tools` may be "[]"
            way = "rename the better one to completion or messages, remove the other" if name in PREFERENCES else ""
            faults.append(f"{where}: `{name}` cannot be trained on here; {way or 'remove the field, or the row'}")
    for name in ("label", "kto_tag"):
        if reader not in (None, _text) and str(read.fields.get(name)).lower() == "false":
            faults.append(f"{where}: `{name}` is false: an answer not to be learned; remove the row")
    if reader is None and not faults:
        keys = ", ".join(sorted(read.fields)) or "nothing"
        faults.append(
            f"{where}: found {keys}; a row has messages or conversations, prompt and completion, instruction and "
            "output, question and answer, or text"
        )
    if reader:
        with faults.collected():
            reader(read)
    faults.refuse()
    unused = [name for name, value in read.fields.items() if name not in read.used and not _absent(value)]
    read.notes += [f"{f'`{name}`' if name else 'a column without a name'} is not used" for name in unused]
    return read


def find_form(fields: Mapping) -> "Callable[[TableRow], None] | None":
    """The reader of the first of FORMS whose fields are all there."""
    return next((reader for names, reader in FORMS if all(name in fields for name in names)), None)


def is_known(row: Mapping) -> bool:
    """Whether a row has one of FORMS, or says by its fields why it is none."""
    names = {str(key).strip().lower(): None for key in row}
    return find_form(names) is not None or any(name in names for name in NOT_TRAINED)


def _segments(row: TableRow) -> None:
    """Axolotl's `input_output`: texts, each with a label that says whether it is learned."""
    segments = row.take("segments")
    for number, segment in enumerate(segments if isinstance(segments, list) else [None], start=1):
        text, label = (segment.get("text"), segment.get("label")) if isinstance(segment, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(label, bool):
            raise InputError(f"{row.where}, segment {number}: takes a text and a label, which is true or false")
        row.pieces.append(Piece(text, True if label else None))


def _chat(row: TableRow, name: str) -> None:
    row.system()
    _write_turns(row, _turns(row, row.take(name), name))


def _prompt_completion(row: TableRow) -> None:
    """TRL's form: two texts, or two lists of messages of which those of the completion are learned."""
    row.system()
    values = {name: _spoken(row.fields[name]) for name in ("prompt", "completion")}
    if not any(isinstance(value, list) for value in values.values()):
        prompt, completion = row.text("prompt"), row.text("completion").rstrip()
        if not prompt[-1].isspace() and not completion[0].isspace():
            row.notes.append("the completion follows the prompt without a space; end the prompt with a newline")
        row.pieces += [Piece(prompt), Piece(completion, True)]
        row.query = prompt.strip()
        return
    asked, answered = (
        [{"role": role, "content": values[name]}] if isinstance(values[name], str) else values[name]
        for name, role in (("prompt", "user"), ("completion", "assistant"))
    )
    row.used |= values.keys()
    context = [Turn(turn.role, turn.text, None) for turn in _turns(row, asked, "prompt")]
    _write_turns(row, context + _turns(row, answered, "completion"))


def _alpaca(row: TableRow, answer: str) -> None:
    """Alpaca's form, with the system text first and the history as earlier turns, as LLaMA-Factory has them."""
    row.system()
    asked = [row.optional(name).strip() for name in ("instruction", "input", "context")]
    instruction, *context = [text for text in asked if text] or [row.text("instruction")]
    context = "\n\n".join(context)
    output = row.text(answer).rstrip()
    history = _parsed(row.take("history"))
    history = [] if _absent(history) else history
    if not isinstance(history, list):
        raise InputError(f"{row.where}: `history` is {_quoted(history)}; write a list of pairs")
    for number, turn in enumerate(history, start=1):
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2 or not _all_text(turn):
            raise InputError(f"{row.where}, history {number}: takes two texts, what was asked and the answer")
        row.pieces.append(Piece(f"### Instruction\n{turn[0].strip()}\n\n### Response\n"))
        row.pieces.append(Piece(turn[1].strip() + "\n\n", True))
    prompt = f"### Instruction\n{instruction}\n\n" + (f"### Input\n{context}\n\n" if context else "")
    row.query = "\n\n".join(filter(None, [instruction, context]))
    if row.pieces:
        row.query = "".join(piece.text for piece in row.pieces) + row.query
    row.pieces += [Piece(prompt + "### Response\n"), Piece(output, True)]
    row.heading = "Response"


def _all_text(values: Sequence) -> bool:
    return all(isinstance(value, str) and not blank(value) for value in values)


def _pair(row: TableRow, asked: str, answer: str) -> None:
    """A question and its answer. A `context` comes before the question, as Axolotl has it, an `input` after it."""
    row.system()
    parts = row.optional("context"), row.text(asked), row.optional("input") if asked != "input" else ""
    query = "\n\n".join(part.strip() for part in parts if part)
    _write_turns(row, [Turn("user", query), Turn("assistant", row.text(answer).strip(), True)])


def _text(row: TableRow) -> None:
    text = row.text("text").rstrip()
    row.pieces, row.query = [Piece(text, True)], text[:80]


CHATS = (*recipe.CHATS, "dialogue", "turns", "items", "contents")
ANSWERS = ("completion", "response", "output", "solution", "answer")
PAIRS = (
    *((asked, answer) for asked in ("prompt", "question", "query", "problem", "input") for answer in ANSWERS),
    *((asked, answer) for asked in ("user", "human") for answer in ("assistant", "bot", "gpt")),
    ("inputs", "targets"),
    ("text_input", "output"),
)
FORMS = [
    *(((name,), partial(_chat, name=name)) for name in recipe.CHATS),
    (("segments",), _segments),
    (("prompt", "completion"), _prompt_completion),
    *((("instruction", answer), partial(_alpaca, answer=answer)) for answer in ANSWERS[::-1]),
    *(((asked, answer), partial(_pair, asked=asked, answer=answer)) for asked, answer in PAIRS),
    *(((name,), partial(_chat, name=name)) for name in CHATS[len(recipe.CHATS) :]),
    (("text",), _text),
]
"""[(the fields that a form needs, its reader)], the first that fits is taken."""


@dataclass(frozen=True)
class Turn:
    """A message of a chat."""

    role: str
    """system, user or assistant."""
    text: str
    learned: bool | None = None
    """As in `Piece`."""
    heading: str = ""
    """Another heading than the role's."""


HEADINGS = {"user": "New Query", "assistant": "Complete Response"}
TOOLS = ("tool", "function", "observation", "function_call", "tool_call", "tool_response", "ipython")
ROLES = {name: role for role, names in recipe.ROLES.items() for name in names} | dict.fromkeys(TOOLS, "")
"""Names of roles, and what they are here; "" cannot be trained on."""


SPEAKER = ("role", "from", "speaker")
SAID = ("content", "value", "parts", "text")
LABELS = ("weight", "train", "training", "loss")
"""Keys of a message. Of each kind, the first that is there is read."""
SPOKEN = ROLES | {"input": "user", "question": "user", "output": "assistant", "answer": "assistant"}
"""Keys of a round of a chat, {"human": ..., "assistant": ...}, as XTuner's and Firefly's users write it."""


def _messages(value: object) -> object:
    """A chat as a list of messages: also from texts in turn, and from rounds."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(value)]
    if isinstance(value, list) and all(isinstance(each, Mapping) and set(each) <= set(SPOKEN) for each in value):
        rounds = [(SPOKEN[key], text) for each in value for key, text in each.items() if not _absent(text)]
        return [{"role": role, "content": text} for role, text in rounds]
    return value


def _turns(row: TableRow, messages: object, name: str) -> list[Turn]:
    """The turns in a list of messages in OpenAI's form (role, content), ShareGPT's (from, value), Gemini's (parts)."""
    messages = _messages(given := _parsed(messages))
    if isinstance(given, list) and any(isinstance(each, str) for each in given):
        row.notes.append(f"`{name}` names no speakers: read as the user and the assistant in turn")
    if not isinstance(messages, list) or not messages or not all(isinstance(each, Mapping) for each in messages):
        raise InputError(f"{row.where}: `{name}` is {_quoted(messages)}; it takes a list of messages")
    faults, turns = Faults(), []
    given = [next((each[key] for key in SPEAKER if key in each), "") for each in messages]
    named = [said.strip() if isinstance(said, str) else "" for said in given]
    roles = {said.lower(): "assistant" for said in named} | ROLES if name == "completion" else _roles(row, named)
    for number, (message, said) in enumerate(zip(messages, named, strict=True), start=1):
        where = f"{row.where}, message {number}"
        calls = [
            key
            for key in ("tool_calls", "function_call", "train_detail", *NOT_TRAINED)
            if not _absent(message.get(key))
        ]
        if calls or ROLES.get(said.lower()) == "":
            faults.append(
                f"{where}: {', '.join(calls) or f'the role {said}'} cannot be trained on here; remove the row"
            )
            continue
        role = roles.get(said.lower())
        read = [next((key for key in keys if key in message), "") for keys in (SPEAKER, SAID)]
        with faults.collected():
            if role is None:
                raise InputError(f"{where}: its role is {_quoted(given[number - 1])}; write system, user or assistant")
            if role != "system" or not _absent(message.get(read[1])):
                text = _content(message.get(read[1]), where)
                turns.append(Turn(role, text, _learned(message, where) if role == "assistant" else None))
        read += [key for key in LABELS if role == "assistant" or not message.get(key)]
        row.notes += [
            f"`{key}` of a message is not used"
            for key, value in message.items()
            if key not in read and not _absent(value)
        ]
    faults.refuse()
    return turns


def _roles(row: TableRow, named: Sequence[str]) -> dict[str, str]:
    """{name in lower case: role}: the known names, and one or two others that can only be user or assistant."""
    names = [name.lower() for name in named]
    unknown = list(dict.fromkeys(name for name in names if name not in ROLES and name))
    taken = {ROLES.get(name) for name in names}
    free = [role for role in ("user", "assistant") if role not in taken]
    if not unknown or len(unknown) != len(free):
        return ROLES
    if len(free) == 2:  # whoever speaks last answers
        last = next(name for name in reversed(names) if name in unknown)
        given = {name: "assistant" if name == last else "user" for name in unknown}
    else:
        given = {unknown[0]: free[0]}
    said = " and ".join(f"{name!r} as the {role}" for name, role in given.items())
    row.notes.append(f"roles: read {said}")
    return ROLES | given


def _content(content: object, where: str) -> str:
    """A message's text: itself, or OpenAI's list of parts that are all text."""
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind not in ("text", "input_text", "output_text"):
            raise InputError(f"{where}: a part of type {str(kind)[:40]!r} cannot be trained on here; only text can")
        texts.append(part.get("text") if isinstance(part, Mapping) else part)
    if not texts or not _all_text(texts):
        raise InputError(f"{where}: its content is {_quoted(content)}; write text")
    return "\n".join(texts).strip()


def _learned(message: Mapping, where: str) -> bool:
    """Whether an assistant's message is learned, by OpenAI's `weight`, Axolotl's `train` or ms-swift's `loss`."""
    for key in LABELS:
        value = message.get(key)
        if value is not None and value not in (0, 1):
            raise InputError(f"{where}: `{key}` is {_quoted(value)}; it takes 0 or 1, learned or not")
        if value is not None and not value:
            return False
    return True


def _write_turns(row: TableRow, turns: Sequence[Turn]) -> None:
    """Put a chat into the row: a system text as it is, every other turn below its heading."""
    ends = max((n for n, turn in enumerate(turns, start=1) if turn.learned), default=0)
    if not ends:
        raise InputError(f"{row.where}: messages must end with the assistant's answer, which is learned; there is none")
    if not any(turn.role != "assistant" or turn.heading for turn in turns[:ends]):
        raise InputError(f"{row.where}: only the assistant speaks; a message of the user has to come before its answer")
    if left := len(turns) - ends:
        row.notes.append(f"the last {left} messages are left out, because no learned answer follows them")
    for turn in turns[:ends]:
        if turn.role == "system":
            row.pieces.append(Piece(f"{turn.text}\n\n"))
            continue
        row.heading = turn.heading or HEADINGS[turn.role]
        row.pieces.append(Piece(f"### {row.heading}\n"))
        # The blank line after an answer is learned with it: it ends the answer.
        row.pieces.append(Piece(turn.text + "\n\n", turn.learned))
    row.pieces[-1] = Piece(row.pieces[-1].text.rstrip("\n"), True)
    asked = [turn.text for turn in turns[:ends] if turn.role == "user"]
    row.query = asked[0] if len(asked) == 1 else "".join(piece.text for piece in row.pieces[:-1])


def is_chat_log(rows: Sequence) -> bool:
    """Whether the rows of a file are one chat as SillyTavern saves it: a header, then messages with `mes`."""
    return len(rows) > 1 and all(isinstance(row, Mapping) for row in rows) and all("mes" in row for row in rows[1:])


MEDIA = ("reasoning", "image", "media", "file", "files", "display_text", "tool_invocations")
"""Keys of a message's `extra` with content that is not in its text."""
READ = {"user_name", "character_name", "name", "is_user", "is_system", "mes", "swipes", "extra.type"}
READ |= {f"extra.{key}" for key in MEDIA}
"""Keys of a chat log that are read, or that another note names."""


def read_chat_log(rows: Sequence[Mapping], places: Sequence[str]) -> tuple[str, str, list[Turn], list[str]]:
    """User, character, turns and notes of SillyTavern's chat log. A turn's heading is its speaker's name.

    `places` are file and line of each row.
    """
    header = {} if "mes" in rows[0] else rows[0]
    turns, notes, faults, unused = [], [], Faults(), {}
    for row, where in zip(rows, places, strict=True):
        text, name = row.get("mes"), row.get("name")
        extra = row["extra"] if isinstance(row.get("extra"), Mapping) else {}
        for key, value in row.items():
            inner = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
            unused |= {f"`{k}`": None for k, v in inner.items() if k not in READ and not _absent(v)}
        if row is header:
            continue
        if odd := [key for key in ("is_user", "is_system") if row.get(key) not in (None, True, False)]:
            faults.append(f"{where}: `{odd[0]}` is {_quoted(row[odd[0]])}; it takes true or false")
        elif row.get("is_system"):
            notes.append("a message that SillyTavern hides from the model (is_system) is left out")
        elif not isinstance(text, str) or not isinstance(name, str) or blank(text) or blank(name):
            faults.append(f"{where}: takes a name and a text in `mes`; write them, or remove the line")
        elif extra.get("type") == "narrator":
            turns.append(Turn("system", text.strip()))
        else:
            user = bool(row.get("is_user"))
            heading = " ".join(name.split())
            turns.append(Turn("user" if user else "assistant", text.strip(), None if user else True, heading))
            swipes = row["swipes"] if isinstance(row.get("swipes"), list) else [row.get("swipes")]
            if any(swipe != text and not _absent(swipe) for swipe in swipes):
                notes.append("swipes that were not chosen are left out")
        notes += [f"`{key}` of a message is not used" for key in MEDIA if not _absent(extra.get(key))]
    faults.refuse()
    notes += [f"what SillyTavern keeps beside the texts is not used: {', '.join(unused)}"] * bool(unused)
    last = {turn.role: turn.heading for turn in turns}  # newer versions write "unused" for the names in the header
    names = [
        last.get(role) or header.get(key) or default
        for key, role, default in (("user_name", "user", "User"), ("character_name", "assistant", "Assistant"))
    ]
    return str(names[0]), str(names[1]), turns, notes


def read_chat_log_row(rows: Sequence[Mapping], places: Sequence[str]) -> TableRow:
    """SillyTavern's chat log as one row of several turns."""
    row = TableRow({}, places[0])
    *_, turns, row.notes = read_chat_log(rows, places)
    _write_turns(row, turns)
    return row

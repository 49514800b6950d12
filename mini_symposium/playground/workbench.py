"""The playground without its widgets: loads models, asks all of them a query, lists the tokens of a prompt.

A cell is one prompt to one model. The cells of the base and of its adapters share their weights and decode as one
batch; each merged model has weights and a batch of its own. torch is imported with the first model that is loaded, so
that the page can be shown before that.
"""

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from threading import Event, Lock

from mini_symposium.data.prompt_formats import PromptFormat, grid_cells
from mini_symposium.errors import InputError
from mini_symposium.playground.shelf import Shelf
from mini_symposium.recipe import SHIPPED

LONGEST_QUERY = 20_000
"""Characters. A longer query takes minutes on a CPU, and memory that grows with the square of its length."""

KEPT_ADAPTERS = 24
"""How many adapters stay loaded at most; the least recently used are unloaded first."""

OnStep = Callable[[str, int, int], object]
"""Called before each part is loaded: with its name, its number from 1 on, and the number of parts to load."""


@dataclass(frozen=True)
class Token:
    """One token of a prompt; its text has · for a space and ⏎ for a newline. A special token stands for no text."""

    text: str
    id: int
    special: bool


class Workbench:
    """The models of a shelf, loaded when they are asked, and a log of what was asked.

    It does one thing at a time: while one thread opens, loads or asks, other threads get an InputError.

    Parameters
    ----------
    run
        The run to open first, as `open` takes it.
    strict
        Raise if the run cannot be opened; if False, start with nothing open, and the error's text in `trouble`.
    """

    def __init__(self, run: str = "", strict: bool = True):
        self.shelf, self.trouble = Shelf(), ""
        self.tokenizer = None
        self.log: deque[dict] = deque(maxlen=200)
        """The last 200 calls of `ask`, oldest first, ready for JSON: settings, and cells with their answers."""
        self._base = None
        self._adapters: dict[str, str] = {}  # name of a loaded adapter -> its name in PEFT; last used is last
        self._adapters_added = 0
        self._merged = (None, None)  # name and weights of the loaded merged model
        self._busy = Lock()
        try:
            self.open(run)
        except InputError as error:
            if strict:
                raise
            self.trouble = str(error)

    def __str__(self) -> str:
        if not self.shelf.models:
            return "nothing is open"
        return f"{self.shelf.scale} scale: {self.shelf.base_model}; {len(self.shelf.models)} models"

    @contextmanager
    def _alone(self):
        if not self._busy.acquire(blocking=False):
            raise InputError("the model is busy; stop it, or wait until it is done")
        try:
            yield
        finally:
            self._busy.release()

    def open(self, path: str = "") -> str:
        """Open a run, a model or an adapter; see `Shelf.open`. Without a path: $MINI_SYMPOSIUM_RUN, else runs/proxy."""
        with self._alone():
            before = self.shelf.base_model, self.shelf.four_bit
            summary = self.shelf.open(path or os.environ.get("MINI_SYMPOSIUM_RUN") or "runs/proxy")
            if (self.shelf.base_model, self.shelf.four_bit) != before:
                self._unload_base()
                self.tokenizer, self._merged = None, (None, None)
            return summary

    def load(self, names: Sequence[str] = ("base",), on_step: OnStep = lambda *_: None) -> None:
        """Load the models of these names, as `ask` does; a merged model is loaded when it is asked."""
        with self._alone():
            self._load(names, on_step)

    def _unload_base(self) -> None:
        self._base = None
        self._adapters.clear()

    def _load(self, names: Sequence[str], on_step: OnStep) -> None:
        if not self.shelf.models:
            raise InputError("nothing is open; open a run, or one of " + ", ".join(SHIPPED) + " for its base alone")
        asked = dict.fromkeys(model for name in names for model in self.shelf.parts(name))
        wanted = [model for model in self.shelf.adapters() if model in asked]
        on_base = any(name not in self.shelf.merged for name in names)
        todo = []
        if self.tokenizer is None:
            todo = [("torch, transformers and the tokenizer", self._load_tokenizer)]
        if self._base is None and on_base:
            self._adapters.clear()
            todo.append((f"the weights of {self.shelf.base_model}", self._load_base))
        todo += [(name, partial(self._add_adapter, name)) for name in wanted if name not in self._adapters]
        for name in [name for name in self._adapters if name not in wanted]:
            if len(self._adapters) + len(wanted) <= KEPT_ADAPTERS:
                break
            self._base.delete_adapter(self._adapters.pop(name))
        for number, (what, load) in enumerate(todo, start=1):
            on_step(what, number, len(todo))
            load()
        for name in wanted:
            self._adapters[name] = self._adapters.pop(name)

    def _load_tokenizer(self) -> None:
        import mini_symposium.models.generation  # noqa: F401, now, so that the first answer does not wait for it
        from mini_symposium.models.base_models import load_tokenizer

        self.tokenizer = load_tokenizer(self.shelf.base_model)

    def _load_base(self) -> None:
        from mini_symposium.models.adapters import load_with_adapters

        self._base = load_with_adapters(self.shelf.base_model, {}, self.shelf.four_bit)

    def _add_adapter(self, name: str) -> None:
        from mini_symposium.models.adapters import add_adapter, check_trained_on
        from mini_symposium.models.base_files import local_directory

        path, base = self.shelf.models[name], self.shelf.base_model
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            if not (path / file).is_file():
                raise InputError(f"{path}: no {file}; it may have been deleted, open the run again")
        check_trained_on({path: 1.0}, base, local_directory(base))
        self._adapters_added += 1
        in_peft = f"adapter{self._adapters_added}"  # a folder's name may be one that PEFT refuses
        try:
            self._base = add_adapter(self._base, in_peft, path, base)
        except InputError:
            self._unload_base()  # the base may be half changed
            raise
        self._adapters[name] = in_peft

    def _weights(self, name: str):
        """The loaded weights that answer for a model: the base with its adapters, or a merged model."""
        if name not in self.shelf.merged:
            return self._base
        if self._merged[0] != name:
            from mini_symposium.models.adapters import load_with_adapters

            self._merged = (None, None)  # freed before the next is loaded, so that memory holds only one
            self._merged = (name, load_with_adapters(str(self.shelf.models[name]), {}, load_in_4bit=False))
        return self._merged[1]

    def cells(self, query: str, formats: Sequence[PromptFormat], names: Sequence[str]) -> list[dict]:
        """The cells of a query in every format for every model; see `prompt_formats.grid_cells`.

        Raises
        ------
        InputError
            If the query is empty or too long, or no format or no model is given.
        """
        _check_query(query)
        if not formats or not names:
            raise InputError(f"no {'format' if names else 'model'} is chosen; choose one")
        return grid_cells(names, formats, [query])

    def chat(
        self, name: str, chats: Sequence[tuple[PromptFormat, Sequence[Mapping]]], user="User", char="Assistant"
    ) -> list[dict]:
        """A cell for each pair of a format and the messages of a chat, in which `char` speaks next."""
        for _, messages in chats:
            _check_query(messages[-1]["content"])
        return [cell for form, messages in chats for cell in grid_cells([name], [form], [messages], user, char)]

    def ask(
        self,
        cells: Sequence[Mapping],
        max_new_tokens: int = 64,
        sampling=None,
        on_text: Callable[[list[str]], object] | None = None,
        stop: Event | None = None,
        on_step: OnStep = lambda *_: None,
    ) -> list[dict]:
        """Answer the cells that `cells` or `chat` made, and log them with their answers.

        Parameters
        ----------
        sampling
            A `generation.Sampling`; None for greedy, as the other notebooks decode.
        on_text
            Called after each token with the text of every cell so far.
        stop
            When another thread sets it, generation ends; the answers so far are kept.

        Returns
        -------
        list of dict
            The cells without stops; with answer, tokens, stop_reason, seconds, as in `generation.Answer`; and with
            recited, row, drift, headings, as in `answer_text.Reading`.

        Raises
        ------
        InputError
            If a model's name is none that `Shelf.parts` takes, an adapter is missing or belongs to another base, a
            merged model cannot be loaded, or a prompt is too long for its model.
        """
        texts, answered = [""] * len(cells), [None] * len(cells)
        with self._alone():
            self._load([cell["model"] for cell in cells], on_step)
            from mini_symposium.models.adapters import mixed
            from mini_symposium.models.generation import generate

            named, mixes = dict(self._adapters), {}  # name of a model, or of a mix of them -> its name in PEFT
            for name, parts in {cell["model"]: self.shelf.parts(cell["model"]) for cell in cells}.items():
                if parts != {name: 1}:
                    named[name] = f"mix{len(mixes)}"
                    mixes[named[name]] = {self._adapters[part]: strength for part, strength in parts.items()}
            batches: dict[str, list[int]] = {}  # merged model, or "" for the base and its adapters -> numbers of cells
            for number, cell in enumerate(cells):
                batches.setdefault(cell["model"] if cell["model"] in self.shelf.merged else "", []).append(number)
            for numbers in batches.values():
                batch = [cells[number] for number in numbers]

                def on_batch_text(batch_texts: list[str], numbers: list[int] = numbers) -> object:
                    for number, text in zip(numbers, batch_texts, strict=True):
                        texts[number] = text
                    return on_text(list(texts))

                with mixed(self._base, mixes):
                    answers = generate(
                        self._weights(batch[0]["model"]),
                        self.tokenizer,
                        [cell["prompt"] for cell in batch],
                        [cell["stops"] for cell in batch],
                        max_new_tokens,
                        [named.get(cell["model"], "base") for cell in batch],
                        on_text and on_batch_text,
                        sampling=sampling,
                        stop=stop,
                    )
                for number, cell, answer in zip(numbers, batch, answers, strict=True):
                    answered[number] = self._answered(cell, answer)
            settings = {"max_new_tokens": max_new_tokens, "sampling": asdict(sampling) if sampling else "greedy"}
            self.log.append({**settings, "cells": answered})
        return answered

    def _answered(self, cell: Mapping, answer) -> dict:
        read = self.shelf.rows.read(answer.text, cell["prompt"])
        return {
            **{key: value for key, value in cell.items() if key != "stops"},
            "answer": answer.text,
            "tokens": answer.tokens,
            "stop_reason": answer.stop_reason,
            "seconds": round(answer.seconds, 2),
            "recited": read.recited,
            "row": read.row,
            "drift": read.drift,
            "headings": read.headings,
        }

    def inspect(self, prompt: str) -> list[Token]:
        """The tokens that the model gets for a prompt, with the special tokens that its tokenizer adds."""
        if self.tokenizer is None:
            raise InputError("the tokenizer is not loaded yet; wait for it")
        special = set(self.tokenizer.all_special_ids)
        ids = self.tokenizer(prompt)["input_ids"]
        return [Token(self._piece(i, i in special), i, i in special) for i in ids]

    def _piece(self, token: int, special: bool) -> str:
        piece = self.tokenizer.convert_ids_to_tokens(token)
        text = self.tokenizer.decode([token])
        if special or "�" in text or piece.startswith(("▁", "<0x")):  # SentencePiece decodes a first ▁ to nothing
            text = {"<0x0A>": "\n"}.get(piece, piece)
        return text.replace("▁", " ").replace(" ", "·").replace("\n", "⏎")


def _check_query(query: str) -> None:
    if not query.strip():
        raise InputError("the query is empty; type one")
    if len(query) > LONGEST_QUERY:
        raise InputError(f"the query has {len(query):,} characters; at most {LONGEST_QUERY:,} are taken, shorten it")

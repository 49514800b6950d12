"""What the playground does, as plain functions: load models, ask them all at once, look into a prompt.

A cell is one prompt to one model. All cells on the same weights, that is the base and the adapters on it, decode as
one batch; a merged model is weights of its own. Nothing here draws, and torch is imported with the first model, so
that a page can be up before that.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from threading import Event, Lock

from mini_symposium.data.prompt_formats import PromptFormat, grid_cells
from mini_symposium.errors import InputError
from mini_symposium.playground.shelf import Shelf, default_run

LONGEST = 20_000
"""Characters of a query; a longer one takes minutes on a CPU, and memory with the square of its length."""

KEPT_ADAPTERS = 24
"""Adapters that stay loaded; beyond that, those that have not answered for longest are dropped."""

Step = Callable[[str, int, int], object]
"""Called before something is read: with what it is, how many were read before it, and how many it will be."""


@dataclass(frozen=True)
class Token:
    """A piece of a prompt, a space as ·, a newline as ⏎; a `special` one is not text to the model."""

    text: str
    id: int
    special: bool


def _check_query(query: str) -> None:
    if not query.strip():
        raise InputError("the query is empty; type one")
    if len(query) > LONGEST:
        raise InputError(f"the query has {len(query):,} characters; at most {LONGEST:,} are taken, shorten it")


class Workbench:
    """A shelf of models, those of them that are loaded, and what was asked so far.

    One thing is done at a time: what a second thread wants meanwhile is refused with an InputError.

    Parameters
    ----------
    run
        What to open first, as `open` takes it.
    strict
        If that cannot be opened, raise; else nothing is open, and `trouble` says why.
    """

    def __init__(self, run: str = "", strict: bool = True):
        self.shelf, self.trouble = Shelf(), ""
        self.tokenizer = None
        self.log: deque[dict] = deque(maxlen=200)
        """What was asked and answered, oldest first, ready for JSON."""
        self._base = None
        self._adapters: dict[str, str] = {}  # model -> PEFT's name for it; what answered last is last
        self._merged = (None, None)
        self._named, self._busy = 0, Lock()
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
        """Look what there is to ask; see `Shelf.open`. Without a path, the run of the environment or runs/proxy."""
        with self._alone():
            before = self.shelf.base_model, self.shelf.four_bit
            said = self.shelf.open(default_run(path))
            if (self.shelf.base_model, self.shelf.four_bit) != before:
                self._drop()
                self.tokenizer, self._merged = None, (None, None)
            return said

    def load(self, names: Sequence[str] = ("base",), on_step: Step | None = None) -> None:
        """Load the models of these names, as `ask` would.

        Raises
        ------
        InputError
            If a name is unknown, weights are not there, or do not belong to the base.
        """
        with self._alone():
            self._load(names, on_step or (lambda what, done, of: None))

    def _drop(self) -> None:
        self._base = None
        self._adapters.clear()

    def _load(self, names: Sequence[str], on_step: Step) -> None:
        models = self.shelf.models
        unknown = [name for name in names if name not in models]
        if not models:
            raise InputError("nothing is open; open a run, or one of tiny, proxy, paper for its base alone")
        if unknown:
            raise InputError(f"{', '.join(unknown)}: no such model; there is {', '.join(models)}")
        wanted = [name for name in dict.fromkeys(names) if models[name].path and not models[name].merged]
        on_base = any(not models[name].merged for name in names)
        todo = []
        if self.tokenizer is None:
            todo = [("torch and transformers", self._import), ("the tokenizer", self._load_tokenizer)]
        if self._base is None and on_base:
            self._adapters.clear()
            todo.append((f"the weights of {self.shelf.base_model}", self._load_base))
        todo += [(name, partial(self._add_adapter, name)) for name in wanted if name not in self._adapters]
        for name in [name for name in self._adapters if name not in wanted]:
            if len(self._adapters) + len(wanted) <= KEPT_ADAPTERS:
                break
            self._base.delete_adapter(self._adapters.pop(name))
        for done, (what, read) in enumerate(todo):
            on_step(what, done, len(todo))
            read()
        for name in wanted:
            self._adapters[name] = self._adapters.pop(name)

    @staticmethod
    def _import() -> None:
        import mini_symposium.models.generation  # noqa: F401

    def _load_tokenizer(self) -> None:
        from mini_symposium.models.base_models import load_tokenizer

        self.tokenizer = load_tokenizer(self.shelf.base_model)

    def _load_base(self) -> None:
        from mini_symposium.models.adapters import load_with_adapters

        self._base = load_with_adapters(self.shelf.base_model, {}, self.shelf.four_bit)

    def _add_adapter(self, name: str) -> None:
        from mini_symposium.models.adapters import add_adapter, check_trained_on
        from mini_symposium.models.base_files import local_directory

        path, base = self.shelf.models[name].path, self.shelf.base_model
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            if not (path / file).is_file():
                raise InputError(f"{path}: no {file}; it may have been deleted, open the run again")
        check_trained_on({path: 1.0}, base, local_directory(base))
        self._named += 1
        try:
            self._base = add_adapter(self._base, f"model{self._named}", path, base)
        except InputError:
            self._drop()  # it may be half changed
            raise
        self._adapters[name] = f"model{self._named}"

    def _weights(self, name: str):
        """The loaded model that answers under this name."""
        model = self.shelf.models[name]
        if not model.merged:
            return self._base
        if self._merged[0] != name:
            from mini_symposium.models.adapters import load_with_adapters

            self._merged = (None, None)  # one at a time is enough memory
            self._merged = (name, load_with_adapters(str(model.path), {}, load_in_4bit=False))
        return self._merged[1]

    def cells(self, query: str, formats: Sequence[PromptFormat], names: Sequence[str]) -> list[dict]:
        """The cells of a query in every format to every model; see `prompt_formats.grid_cells`.

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
        """One cell for each format and its chat: its last message asks, and the character `char` answers.

        Raises
        ------
        InputError
            If a last message is empty or too long.
        """
        for _, messages in chats:
            _check_query(messages[-1]["content"])
        return [cell for form, chat in chats for cell in grid_cells([name], [form], [chat], user, char)]

    def ask(
        self,
        cells: Sequence[Mapping],
        max_new_tokens: int = 64,
        sampling=None,
        on_text: Callable[[list[str]], object] | None = None,
        stop: Event | None = None,
        on_step: Step | None = None,
    ) -> list[dict]:
        """Answer cells as `cells` or `chat` made them, and keep what came in the log.

        Parameters
        ----------
        sampling
            A `generation.Sampling`; None for greedy, as the other notebooks decode.
        on_text
            Called after each token with the text of every cell so far.
        stop
            Set from another thread, ends it; what came is kept.

        Returns
        -------
        list of dict
            The cells with answer, tokens, stop_reason, seconds; and, as `answer_text.Reading` has them,
            recited, row, drift, headings.
        """
        texts, found = [""] * len(cells), [None] * len(cells)
        with self._alone():
            self._load([cell["model"] for cell in cells], on_step or (lambda what, done, of: None))
            from mini_symposium.models.generation import generate

            merged = [c["model"] if self.shelf.models[c["model"]].merged else None for c in cells]
            for weights in dict.fromkeys(merged):
                rows = [row for row, own in enumerate(merged) if own == weights]

                def grown(some: list[str], rows: list[int] = rows) -> object:
                    for row, text in zip(rows, some, strict=True):
                        texts[row] = text
                    return on_text(list(texts))

                mine = [cells[row] for row in rows]
                answers = generate(
                    self._weights(mine[0]["model"]),
                    self.tokenizer,
                    [cell["prompt"] for cell in mine],
                    [cell["stops"] for cell in mine],
                    max_new_tokens,
                    [self._adapters.get(cell["model"], "base") for cell in mine],
                    on_text and grown,
                    sampling=sampling,
                    stop=stop,
                )
                for row, answer in zip(rows, answers, strict=True):
                    found[row] = self._answered(cells[row], answer)
            settings = {"max_new_tokens": max_new_tokens, "sampling": asdict(sampling) if sampling else "greedy"}
            self.log.append({**settings, "cells": found})
        return found

    def _answered(self, cell: Mapping, answer) -> dict:
        read = self.shelf.rows.read(answer.text, cell["prompt"])
        return {
            **{key: value for key, value in cell.items() if key != "stops"},
            **{"answer": answer.text, "tokens": answer.tokens, "stop_reason": answer.stop_reason},
            **{"seconds": round(answer.seconds, 2), "recited": read.recited, "row": read.row},
            **{"drift": read.drift, "headings": read.headings},
        }

    def inspect(self, prompt: str) -> list[Token]:
        """The tokens that the model gets for a prompt, its own special tokens among them.

        Raises
        ------
        InputError
            If no tokenizer is loaded yet.
        """
        if self.tokenizer is None:
            raise InputError("the tokenizer is not loaded yet; wait for it")
        special = set(self.tokenizer.all_special_ids)
        ids = self.tokenizer(prompt)["input_ids"]
        return [Token(self._piece(i, i in special), i, i in special) for i in ids]

    def _piece(self, token: int, special: bool) -> str:
        piece = self.tokenizer.convert_ids_to_tokens(token)
        text = self.tokenizer.decode([token])
        if special or "�" in text or piece.startswith(("▁", "<0x")):  # SentencePiece drops a first space
            text = {"<0x0A>": "\n"}.get(piece, piece)
        return text.replace("▁", " ").replace(" ", "·").replace("\n", "⏎")

"""The playground's panes: a grid of answers, one query by epoch or strength, a chat, a blind test, files to keep.

A pane decides what to ask and how to draw the answers; `page.Playground`, to which it belongs, runs the job. Widgets
are made once and reused, so that the hundredth answer costs no more memory than the first.
"""

import base64
from collections.abc import Callable, Container, Iterable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path

from ipywidgets import (
    HTML,
    Box,
    Button,
    Dropdown,
    FloatSlider,
    GridBox,
    HBox,
    Layout,
    SelectionSlider,
    Text,
    Textarea,
    ToggleButton,
    VBox,
)

from mini_symposium.data.held_out import load_held_out
from mini_symposium.errors import InputError
from mini_symposium.models.strength import STRONGEST, at_strength
from mini_symposium.playground import cards, session
from mini_symposium.playground.blind import BlindTest, sentence
from mini_symposium.run import standing

WIDE = {"description_width": "initial"}
BY_STRENGTH = ", by strength"
BLIND_QUERIES = 8
"""Held-out prompts that stand in the field of a blind test."""
WRAP = Layout(flex_flow="row wrap", align_items="center")


class Chips:
    """Names to choose any number of, each a button that is pressed or not."""

    def __init__(self):
        self.box = Box().add_class("ms-chips")

    @property
    def names(self) -> list[str]:
        return [chip.tooltip for chip in self.box.children]

    @property
    def value(self) -> list[str]:
        """The chosen names."""
        return [chip.tooltip for chip in self.box.children if chip.value]

    def offer(self, names: Iterable[str], chosen: Container[str]) -> None:
        """Offer `names`, those in `chosen` pressed."""
        chips = {chip.tooltip: chip for chip in self.box.children}
        self.box.children = [chips.get(name) or ToggleButton(description=name, tooltip=name) for name in names]
        for chip in self.box.children:
            chip.value = chip.tooltip in chosen


class Row:
    """The head of a row of the grid: a model's name, and for an adapter, or for two of them, a slider.

    The slider of one adapter is its strength; that of two, written `A + B`, is B's share of the blend.
    """

    def __init__(self, model: str, adapters: Container[str], released: Callable[["Row"], None]):
        self.model, self.head, self.ends = model, HTML(), model.split(" + ")
        slides = all(end in adapters for end in self.ends)
        share = {"value": 0.5, "max": 1} if len(self.ends) == 2 else {"value": 1, "max": STRONGEST}
        self.slider = FloatSlider(**share, step=0.05, continuous_update=False, readout_format=".2f", style=WIDE)
        self.slider.description = "share of the second" if len(self.ends) == 2 else "strength"
        self.slider.observe(lambda _: released(self), "value")
        self.box = VBox([self.head, self.slider] if slides else [self.head]).add_class("ms-row")

    @property
    def name(self) -> str:
        """The model at the slider's value, as `Shelf.parts` takes it."""
        value = self.slider.value
        if len(self.ends) == 2:
            return " + ".join(f"{end} x {share:.4g}" for end, share in zip(self.ends, (1 - value, value), strict=True))
        return at_strength(self.model, value)


class Compare:
    """The grid: a row for each chosen model, a column for each format; a card's button shows its prompt below.

    It can be turned. Here a row is always a model and a column a format, and only the layout knows.
    """

    title = "Compare"

    def __init__(self, page):
        self.page, self.cells, self.cards = page, [], []
        self.columns = {"": HTML().add_class("ms-top")}  # format -> its head, "" -> the corner
        self.rows: dict[str, Row] = {}
        self.shown: list[Row] = []
        self.grid = GridBox().add_class("ms-grid")
        self.inspector = HTML(cards.hint("Press a card's button to see its exact prompt and the tokens in it."))
        self.reference = Dropdown(description="Show differences from", options=[("nothing", ("", 0))], style=WIDE)
        self.only = ToggleButton(description="Only different")
        self.turned = ToggleButton(description="Models as columns")
        for control in (self.reference, self.only, self.turned):
            control.observe(lambda _: page.attempt(self.show), "value")
        self.box = VBox([self.grid, Box([self.reference, self.only, self.turned], layout=WRAP), self.inspector])

    def answer(self) -> str:
        """The job behind the button Generate: show the cards, fill in the answers, and return the summary."""
        page, adapters = self.page, self.page.bench.shelf.adapters()
        for model in page.models.value:
            if model not in self.rows:
                self.rows[model] = Row(model, adapters, self._released)
        rows, forms = [self.rows[model] for model in page.models.value], page.chosen_formats()
        self.cells = page.bench.cells(page.query.value, forms, [row.name for row in rows])
        self.shown = rows
        while len(self.cards) < len(self.cells):
            self.cards.append(self._card(len(self.cards)))
        self._draw(self.cells)
        for form in forms:
            if form.name not in self.columns:
                self.columns[form.name] = HTML(cards.head(form.name))
        self.reference.options = [
            ("nothing", ("", 0)),
            *((row.model, ("row", number)) for number, row in enumerate(rows)),
            *((form.name, ("column", number)) for number, form in enumerate(forms)),
        ]
        self.show()
        self.cells = page.ask(self.cells, self._draw)
        self.show()
        for pane in page.panes[1:]:
            pane.refresh()
        return page.summary(self.cells)

    def show(self) -> None:
        """Draw all cards, with their differences from the chosen row or column, and lay out what there is to see."""
        if not self.cells:
            return
        self._draw(self.cells)
        width, (kind, number) = len(self.cells) // len(self.shown), self.reference.value
        kept = set()  # (row, column)
        for place, cell in enumerate(self.cells):
            row, column = divmod(place, width)
            other = self.cells[{"row": number * width + column, "column": row * width + number}.get(kind, place)]
            if kind and other is not cell and "tokens" in cell:
                self.cards[place][1].value = cards.card(cell, self.page.bench.shelf.rows, other=other)
            if not self.only.value or other.get("answer") != cell.get("answer"):
                kept.add((row, column))
        rows = sorted({row for row, _ in kept} | ({number} if kind == "row" else set()))
        columns = sorted({column for _, column in kept} | ({number} if kind == "column" else set()))
        names = [self.cells[column]["format"] for column in columns]
        top, left = [self.columns[name] for name in names], [self.shown[row].box for row in rows]
        lines = [[self.cards[row * width + column][0] for column in columns] for row in rows]
        if self.turned.value:
            top, left, lines = left, top, list(zip(*lines, strict=True))
        for heads, here, away in ((top, "ms-top", "ms-left"), (left, "ms-left", "ms-top")):
            for head in heads:
                head.remove_class(away)
                head.add_class(here)
        children = [self.columns[""], *top, *chain(*([head, *line] for head, line in zip(left, lines, strict=True)))]
        (self.grid.add_class if self.turned.value else self.grid.remove_class)("ms-turned")
        self.grid.layout.grid_template_columns = f"var(--head) repeat({len(top)}, var(--card))"
        self.grid.children = children if kept else []
        if self.only.value and not kept:
            self.page.say("no answer differs" if kind else "choose what the answers shall differ from")

    def _released(self, row: Row) -> None:
        """Ask one row again at its slider's value; a move of the slider ends what the move before has begun."""
        if row in self.shown:
            self.page.start(f"{row.slider.description} of {row.model}", lambda: self._again(row), restart=True)

    def _again(self, row: Row) -> str:
        if row not in self.shown:
            return f"{row.model} is not shown any more"
        number, width = self.shown.index(row), len(self.cells) // len(self.shown)
        places = slice(number * width, (number + 1) * width)
        forms = [self.page.formats[cell["format"]] for cell in self.cells[places]]
        cells = self.page.bench.cells(self.cells[0]["query"], forms, [row.name])
        self.cells[places] = self.page.ask(cells, partial(self._draw, first=number))
        self.show()
        return f"{row.name}: {self.page.summary(self.cells[places])}"

    def _card(self, place: int) -> tuple[VBox, HTML, Button]:
        card, button = HTML(), Button(description="Inspect prompt").add_class("ms-inspect")
        button.on_click(lambda _: self.page.attempt(lambda: self.inspect(place)))
        return VBox([card, button]), card, button

    def _draw(self, cells: list[Mapping], seconds: float | None = None, first: int = 0) -> None:
        """Draw the cards of the rows from number `first` on."""
        shelf, width = self.page.bench.shelf, len(self.cells) // len(self.shown)
        for (_, card, button), cell in zip(self.cards[first * width :], cells, strict=False):
            card.value = cards.card(cell, shelf.rows, seconds)
            button.tooltip = f"Inspect the prompt of {cell['format']}, {cell['model']}"
        for number, row in enumerate(self.shown[first : first + len(cells) // width]):
            shares = [cell.get("recited") for cell in cells[number * width : (number + 1) * width]]
            recites = "" if None in shares else f"recites in {sum(map(bool, shares))} of {width}"
            row.head.value = cards.head(row.model, "\n".join(filter(None, [shelf.kind(row.model), recites])))

    def inspect(self, place: int) -> None:
        """Show the prompt of one card, and give that card a frame."""
        cell = self.cells[place]
        self.inspector.value = cards.inspector(cell, self.page.bench.inspect(cell["prompt"]))
        for number, (box, _, _) in enumerate(self.cards):
            (box.add_class if number == place else box.remove_class)("ms-chosen")


class Series:
    """One query in one format, by all checkpoints of a training or by one checkpoint at all strengths; a slider chooses
    which to show."""

    title = "Epochs and strengths"

    def __init__(self, page):
        self.page, self.cells = page, {}  # epoch or strength -> cell
        self.series = Dropdown(description="Of", style=WIDE)
        self.format = Dropdown(description="Format", style=WIDE)
        button = Button(description="Generate all", button_style="primary")
        self.step = SelectionSlider(
            description="Epoch", options=[("–", 0)], style=WIDE, layout=Layout(width="auto"), continuous_update=True
        )
        self.card = HTML()
        self.bars = HTML()
        card = Box([self.card]).add_class("ms-card")
        self.box = VBox([HBox([self.series, self.format, button], layout=WRAP), self.step, card, self.bars])
        button.on_click(lambda _: page.start("Generate all", self._answer))
        self.series.observe(lambda _: self._choose(), "value")
        self.step.observe(lambda _: self._draw(), "value")

    def _all(self) -> dict[str, dict[float, str]]:
        """{series: {epoch or strength: model}}."""
        shelf = self.page.bench.shelf
        adapters = [name for name in shelf.offered() if name in shelf.adapters()] or shelf.adapters()
        strengths = [step / 4 for step in range(7)]
        by_strength = {f"{name}{BY_STRENGTH}": {s: at_strength(name, s) for s in strengths} for name in adapters}
        return {**shelf.trainings, **by_strength}

    def refresh(self) -> None:
        """Offer the current trainings, checkpoints and formats."""
        _options(self.series, [*self._all()] or [""])
        _options(self.format, list(self.page.formats))

    def _choose(self) -> None:
        steps = self._all().get(self.series.value)
        self.cells = {}
        self.step.description = "Strength" if (self.series.value or "").endswith(BY_STRENGTH) else "Epoch"
        self.step.options = [(f"{step:g}", step) for step in steps] if steps else [("–", 0)]
        self.card.value = ""
        self.bars.value = cards.hint("Generate, then move the slider to see where recitation begins.")

    def _answer(self) -> str:
        page, steps = self.page, self._all().get(self.series.value)
        if not steps:
            raise InputError("no training with checkpoints is open; open a run that has some")
        form = page.formats[self.format.value]

        def draw(cells: list[Mapping], seconds: float | None = None) -> None:
            self.cells = dict(zip(steps, cells, strict=True))
            self._draw(seconds)

        return page.summary(page.ask(page.bench.cells(page.query.value, [form], list(steps.values())), draw))

    def _draw(self, seconds: float | None = None) -> None:
        cell = self.cells.get(self.step.value)
        if cell:
            rows = self.page.bench.shelf.rows
            self.card.value = cards.card(cell, rows, seconds)
            self.bars.value = cards.recited_by(self.step.description.lower(), self.cells, self.step.value, rows)


class Chat:
    """A chat with one model in two formats side by side. Each side continues from its own replies."""

    title = "Character chat"

    def __init__(self, page):
        self.page, self.chats = page, ([], [])
        self.model = Dropdown(description="Model", style=WIDE)
        self.formats = [Dropdown(description=f"{side} format", style=WIDE) for side in ("Left", "Right")]
        self.user = Text("User", description="User's name", style=WIDE)
        self.char = Text("Assistant", description="Character's name", style=WIDE)
        self.scene = Textarea(description="Scene", rows=2, style=WIDE, layout=Layout(width="auto"))
        self.scene.placeholder = "A character card or a scene; optional, it stands first in the prompt"
        self.message = Textarea(description="Message", rows=2, style=WIDE, layout=Layout(width="auto"))
        send = Button(description="Send", button_style="primary")
        clear = Button(description="Start over")
        self.panes = [HTML(), HTML()]
        who = HBox([self.model, self.user, self.char, *self.formats], layout=WRAP)
        self.box = VBox([who, self.scene, _split(self.panes), self.message, HBox([send, clear])])
        send.on_click(lambda _: page.start("Send", self._answer))
        clear.on_click(lambda _: page.start("Start over", self._clear))

    def refresh(self) -> None:
        """Offer the current models and formats."""
        shelf = self.page.bench.shelf
        _options(self.model, list(shelf.models) or [""], (shelf.offered() or [""])[-1])
        for choice, first in zip(self.formats, ("character", "alpaca"), strict=True):
            _options(choice, list(self.page.formats), first)
        self._draw()

    def _clear(self) -> str:
        self.chats = ([], [])
        self._draw()
        return "a new chat"

    def _answer(self) -> str:
        page, message = self.page, {"role": "user", "content": self.message.value}
        forms = [page.formats[choice.value] for choice in self.formats]
        scene = [{"role": "system", "content": self.scene.value}] if self.scene.value.strip() else []
        asked = [[*(chat or scene), message] for chat in self.chats]
        names = self.user.value or "User", self.char.value or "Assistant"

        def with_replies(cells: list[Mapping]) -> tuple[list[Mapping], ...]:
            replies = ({"role": "assistant", "content": cell.get("answer", "")} for cell in cells)
            return tuple([*chat, reply] for chat, reply in zip(asked, replies, strict=True))

        def draw(cells: list[Mapping], seconds: float | None = None) -> None:
            self._draw(with_replies(cells))

        cells = page.ask(page.bench.chat(self.model.value, list(zip(forms, asked, strict=True)), *names), draw)
        self.chats = with_replies(cells)
        self.message.value = ""  # only now, so that a message that got no answer can be sent again
        return page.summary(cells)

    def _draw(self, chats=None) -> None:
        names = {"user": self.user.value, "assistant": self.char.value}
        for pane, choice, chat in zip(self.panes, self.formats, chats or self.chats, strict=True):
            pane.value = cards.chat(choice.value or "", chat, names, self.page.bench.shelf.rows)


class Blind:
    """A blind test of two models or formats, on queries of one's own; see `blind.BlindTest`."""

    title = "Blind test"

    def __init__(self, page):
        self.page, self.test, self.results = page, None, []
        self.models = [Dropdown(description=f"{side} model", style=WIDE) for side in ("First", "Second")]
        self.formats = [Dropdown(description=f"{side} format", style=WIDE) for side in ("First", "Second")]
        asked = "\n".join(" ".join(prompt.query.split()) for prompt in load_held_out(split="dev")[:BLIND_QUERIES])
        self.queries = Textarea(asked, description="Queries, one a line", rows=4, style=WIDE)
        self.queries.layout = Layout(width="auto")
        self.panes = [HTML(), HTML()]
        self.key = Text(description="Vote by key: 1 left, 2 right, 0 no difference", style=WIDE)
        self.key.layout = Layout(width="auto")
        self.said = HTML(cards.hint("Start, then vote for the better answer of each pair."))
        actions = {
            "Start": lambda _: page.start("Start", self._answer),
            "Left": lambda _: page.attempt(lambda: self.vote("1")),
            "Right": lambda _: page.attempt(lambda: self.vote("2")),
            "No difference": lambda _: page.attempt(lambda: self.vote("0")),
            "Who is who": lambda _: page.attempt(self._end),
        }
        start, *votes = (Button(description=name) for name in actions)
        for button in (start, *votes):
            button.on_click(actions[button.description])
        start.button_style = "primary"
        self.key.observe(lambda change: page.attempt(lambda: self._typed(change["new"])), "value")
        chosen = [Box(pair, layout=WRAP) for pair in zip(self.models, self.formats, strict=True)]
        below = [_split(self.panes), Box(votes, layout=WRAP), self.key, self.said]
        self.box = VBox([*chosen, self.queries, start, *below])

    def refresh(self) -> None:
        """Offer the current models, those of the grid at their strengths, and the formats."""
        names = [*self.page.bench.shelf.models, *(row.name for row in self.page.compare.shown)]
        for choice, first in zip(self.models, ("base", names[-1] if names else ""), strict=True):
            _options(choice, list(dict.fromkeys(names)) or [""], first)
        for choice in self.formats:
            _options(choice, list(self.page.formats))

    def _answer(self) -> str:
        page = self.page
        sides = [(m.value, f.value) for m, f in zip(self.models, self.formats, strict=True)]
        if sides[0] == sides[1]:
            raise InputError(f"both sides are {' in '.join(sides[0])}; choose two models or two formats")
        queries = list(filter(None, map(str.strip, self.queries.value.splitlines())))
        if not queries:
            raise InputError("no query; write one a line")
        cells = [
            cell for m, f in sides for query in queries for cell in page.bench.cells(query, [page.formats[f]], [m])
        ]
        self.test = None
        answered = page.ask(cells, lambda *_: None)
        if page.stop.is_set():
            return "the blind test was stopped"
        self.test = BlindTest(answered)
        self._draw()
        return f"{len(queries)} pairs; vote for the better answer of each"

    def _typed(self, text: str) -> None:
        if text:
            self.key.value = ""
            self.vote(text.strip())

    def vote(self, key: str) -> None:
        """Vote by a key: 1 for the left answer, 2 for the right one, 0 for neither."""
        if key not in ("0", "1", "2"):
            raise InputError(f"{key}: no vote; 1 is left, 2 is right, 0 is no difference")
        if not self.test or not self.test.shown:
            raise InputError("no pair waits for a vote; press Start")
        self.test.vote({"0": None, "1": 0, "2": 1}[key])
        self._draw() if self.test.shown else self._end()

    def _draw(self) -> None:
        for pane, html in zip(self.panes, cards.sides(self.test.shown), strict=True):
            pane.value = html
        number = len(self.test.votes)
        self.said.value = cards.hint(f"Pair {number + 1} of {len(self.test.pairs)}: {self.test.cells[number]['query']}")

    def _end(self) -> None:
        if not self.test:
            raise InputError("no blind test has begun; press Start")
        self.results.append(self.test.result())
        self.test, told = None, sentence(self.results[-1])
        self.said.value = cards.hint(told)
        self.page.say(told)


class Keep:
    """Save the session, or a format as a preset for SillyTavern, to a file with a link to download it."""

    title = "Keep"

    def __init__(self, page):
        self.page = page
        save = Button(description="Save session")
        self.format = Dropdown(description="Format", style=WIDE)
        export = Button(description="Export preset")
        self.links = HTML()
        self.box = VBox([HBox([save, self.format, export], layout=WRAP), self.links])
        save.on_click(lambda _: page.attempt(self.save))
        export.on_click(lambda _: page.attempt(self.export))

    def refresh(self) -> None:
        """Offer the current formats."""
        _options(self.format, list(self.page.formats))

    def folder(self) -> Path:
        """The folder to write to: in the first run that was opened, or in runs/ if there is none."""
        run = self.page.bench.shelf.run
        return (run.path if run else standing() / "runs") / "playground"

    def save(self) -> None:
        shelf = self.page.bench.shelf
        about = {"scale": shelf.scale, "base_model": shelf.base_model}
        self._offer(*session.save(self.page.bench.log, about, self.folder(), self.page.blind.results))

    def export(self) -> None:
        self._offer(session.export_preset(self.page.formats[self.format.value], self.folder() / "presets"))

    def _offer(self, *paths: Path) -> None:
        self.links.value = "<br>".join(
            cards.download(path.name, base64.b64encode(path.read_bytes()).decode()) for path in paths
        )
        self.page.say(f"written to {paths[0].parent}: {', '.join(path.name for path in paths)}")


def _split(panes: list[HTML]) -> Box:
    """Two cards side by side."""
    return Box([Box([pane]).add_class("ms-card") for pane in panes]).add_class("ms-split")


def _options(choice: Dropdown, options: list[str], first: str = "") -> None:
    """Offer `options`. Keep the choice if it is among them; otherwise choose `first`, or else the first option."""
    if list(choice.options) != options:
        wanted = next((option for option in (choice.value, first) if option in options), options[0])
        choice.options = options
        choice.value = wanted

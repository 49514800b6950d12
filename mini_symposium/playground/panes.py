"""The playground's four panes: a grid of answers, one query by epoch, a character chat, and what is kept.

Each pane asks through the desk it stands on (`playground.Playground`): it says what is to be asked and how what comes
is drawn. Widgets are made once and drawn over, so that the hundredth answer costs no more memory than the first.
"""

import base64
from collections.abc import Mapping
from pathlib import Path

from ipywidgets import HTML, Box, Button, Dropdown, GridBox, HBox, Layout, SelectionSlider, Text, Textarea, VBox

from mini_symposium.errors import InputError
from mini_symposium.playground import cards, session
from mini_symposium.run import ROOT

WIDE = {"description_width": "initial"}
GRID = {
    "grid_template_columns": "repeat(auto-fill, minmax(min(19rem, 100%), 1fr))",
    "grid_gap": "12px",
    "width": "100%",
}


class Compare:
    """Formats beside models, one card each; a card's button shows its prompt below."""

    title = "Compare"

    def __init__(self, desk):
        self.desk, self.cells, self.cards = desk, [], []
        self.grid = GridBox(layout=Layout(**GRID))
        self.inspector = HTML(cards.hint("Press a card's button to see its exact prompt and the tokens of it."))
        self.box = VBox([self.grid, self.inspector])

    def generate(self, *_) -> None:
        self.desk.start("Generate", self._answer)

    def _answer(self) -> str:
        desk = self.desk
        self.cells = desk.bench.cells(desk.query.value, desk.chosen_formats(), desk.models.value)
        while len(self.cards) < len(self.cells):
            self.cards.append(self._card(len(self.cards)))
        self._draw(self.cells)
        self.grid.children = [box for box, _, _ in self.cards[: len(self.cells)]]
        self.cells = desk.ask(self.cells, self._draw)
        return desk.summary(self.cells)

    def _card(self, place: int) -> tuple[VBox, HTML, Button]:
        shown, button = HTML(), Button(layout=Layout(width="auto", align_self="flex-start"))
        button.on_click(lambda _: self.desk.trying(lambda: self.inspect(place)))
        box = VBox([shown, button])
        box.add_class("ms-card")
        return box, shown, button

    def _draw(self, cells: list[Mapping], seconds: float | None = None) -> None:
        for (_, shown, button), cell in zip(self.cards, cells, strict=False):
            shown.value = cards.card(cell, self.desk.bench.shelf.rows, seconds)
            button.description = "Inspect prompt"
            button.tooltip = f"Inspect the prompt of {cell['format']}, {cell['model']}"

    def inspect(self, place: int) -> None:
        """Show the prompt of a card; the card is framed while it is the one shown."""
        cell = self.cells[place]
        self.inspector.value = cards.inspector(cell, self.desk.bench.inspect(cell["prompt"]))
        for number, (box, _, _) in enumerate(self.cards):
            (box.add_class if number == place else box.remove_class)("ms-chosen")


class Epochs:
    """One query in one format, asked of every checkpoint of a training at once; the slider walks through them."""

    title = "Epochs"

    def __init__(self, desk):
        self.desk, self.found = desk, {}
        self.series = Dropdown(description="Training", style=WIDE)
        self.format = Dropdown(description="Format", style=WIDE)
        self.button = Button(description="Generate epochs", button_style="primary")
        self.epoch = SelectionSlider(
            description="Epoch", options=[("–", 0)], style=WIDE, layout=Layout(width="auto"), continuous_update=True
        )
        self.shown, self.strip = (
            HTML(),
            HTML(cards.hint("Generate, then move the slider: overfitting is seen to happen.")),
        )
        card = Box([self.shown])
        card.add_class("ms-card")
        self.box = VBox([HBox([self.series, self.format, self.button], layout=WRAP), self.epoch, card, self.strip])
        self.button.on_click(lambda _: desk.start("Generate epochs", self._answer))
        self.series.observe(lambda _: self._choose(), "value")
        self.epoch.observe(lambda _: self._draw(), "value")

    def refresh(self) -> None:
        """Take over which trainings and formats there are."""
        _options(self.series, list(self.desk.bench.shelf.series()) or [""])
        _options(self.format, list(self.desk.formats))

    def _choose(self) -> None:
        epochs = self.desk.bench.shelf.series().get(self.series.value)
        self.found = {}
        self.epoch.options = [(str(epoch), epoch) for epoch in epochs] if epochs else [("–", 0)]
        self.shown.value = self.strip.value = ""

    def _answer(self) -> str:
        desk, epochs = self.desk, self.desk.bench.shelf.series().get(self.series.value)
        if not epochs:
            raise InputError("no training with checkpoints is open; open a run that has some")
        form = desk.formats[self.format.value]
        cells = desk.bench.cells(desk.query.value, [form], list(epochs.values()))

        def draw(cells: list[Mapping], seconds: float | None = None) -> None:
            self.found = dict(zip(epochs, cells, strict=True))
            self._draw(seconds)

        found = desk.ask(cells, draw)
        return desk.summary(found)

    def _draw(self, seconds: float | None = None) -> None:
        cell = self.found.get(self.epoch.value)
        if cell:
            rows = self.desk.bench.shelf.rows
            self.shown.value = cards.card(cell, rows, seconds)
            self.strip.value = cards.strip(self.found, self.epoch.value, rows)


class Chat:
    """One message to one model in two formats, each going on with its own replies."""

    title = "Character chat"

    def __init__(self, desk):
        self.desk, self.talks = desk, ([], [])
        self.model = Dropdown(description="Model", style=WIDE)
        self.formats = [Dropdown(description=f"{side} format", style=WIDE) for side in ("Left", "Right")]
        self.user = Text("User", description="User's name", style=WIDE)
        self.char = Text("Assistant", description="Character's name", style=WIDE)
        self.scene = Textarea(description="Scene", rows=2, style=WIDE, layout=Layout(width="auto"))
        self.scene.placeholder = "A character card or a scene; optional, the narrator says it first"
        self.message = Textarea(description="Message", rows=2, style=WIDE, layout=Layout(width="auto"))
        send = Button(description="Send", button_style="primary")
        clear = Button(description="Start over")
        self.panes = [HTML(), HTML()]
        boxes = [Box([pane]) for pane in self.panes]
        for box in boxes:
            box.add_class("ms-card")
        who = HBox([self.model, self.user, self.char, *self.formats], layout=WRAP)
        grid = GridBox(
            boxes, layout=Layout(**{**GRID, "grid_template_columns": "repeat(auto-fit, minmax(19rem, 1fr))"})
        )
        self.box = VBox([who, self.scene, grid, self.message, HBox([send, clear])])
        send.on_click(lambda _: desk.start("Send", self._answer))
        clear.on_click(lambda _: desk.start("Start over", self._clear))

    def refresh(self) -> None:
        """Take over which models and formats there are."""
        shelf = self.desk.bench.shelf
        _options(self.model, list(shelf.models) or [""], (shelf.newest() or [""])[-1])
        for choice, first in zip(self.formats, ("character", "alpaca"), strict=True):
            _options(choice, list(self.desk.formats), first)
        self._draw()

    def _clear(self) -> str:
        self.talks = ([], [])
        self._draw()
        return "a new chat"

    def _answer(self) -> str:
        desk, said = self.desk, self.message.value
        forms = [desk.formats[choice.value] for choice in self.formats]
        opening = [{"role": "system", "content": self.scene.value}] if self.scene.value.strip() else []
        asked = [[*(talk or opening), {"role": "user", "content": said}] for talk in self.talks]
        names = self.user.value or "User", self.char.value or "Assistant"
        cells = desk.bench.chat(self.model.value, list(zip(forms, asked, strict=True)), *names)

        def draw(cells: list[Mapping], seconds: float | None = None) -> None:
            replies = [{"role": "assistant", "content": cell.get("answer", "")} for cell in cells]
            self._draw([[*talk, reply] for talk, reply in zip(asked, replies, strict=True)])

        found = desk.ask(cells, draw)
        replies = [{"role": "assistant", "content": cell["answer"]} for cell in found]
        self.talks = tuple([*talk, reply] for talk, reply in zip(asked, replies, strict=True))
        self.message.value = ""  # only now: what was not answered stays to be sent again
        return desk.summary(found)

    def _draw(self, talks=None) -> None:
        names = {"user": self.user.value, "assistant": self.char.value}
        for pane, choice, talk in zip(self.panes, self.formats, talks or self.talks, strict=True):
            pane.value = cards.talk(choice.value or "", talk, names, self.desk.bench.shelf.rows)


class Keep:
    """The session as files, and a format as a preset for SillyTavern; both to download as well."""

    title = "Keep"

    def __init__(self, desk):
        self.desk = desk
        save = Button(description="Save session")
        self.format = Dropdown(description="Format", style=WIDE)
        export = Button(description="Export preset")
        self.links = HTML()
        self.box = VBox([HBox([save, self.format, export], layout=WRAP), self.links])
        save.on_click(lambda _: desk.trying(self.save))
        export.on_click(lambda _: desk.trying(self.export))

    def refresh(self) -> None:
        """Take over which formats there are."""
        _options(self.format, list(self.desk.formats))

    def folder(self) -> Path:
        """Beside what was asked; in runs/ if no run is open."""
        run = self.desk.bench.shelf.run
        return (run.path if run else ROOT / "runs") / "playground"

    def save(self) -> None:
        shelf = self.desk.bench.shelf
        about = {"scale": shelf.scale, "base_model": shelf.base_model}
        self._offer(*session.save(self.desk.bench.log, about, self.folder()))

    def export(self) -> None:
        self._offer(session.export_preset(self.desk.formats[self.format.value], self.folder() / "presets"))

    def _offer(self, *paths: Path) -> None:
        self.links.value = "<br>".join(
            cards.download(path.name, base64.b64encode(path.read_bytes()).decode()) for path in paths
        )
        self.desk.say(f"written to {paths[0].parent}: {', '.join(path.name for path in paths)}")


WRAP = Layout(flex_flow="row wrap", align_items="center")


def _options(choice: Dropdown, options: list[str], first: str = "") -> None:
    """Change what a dropdown offers, and keep what is chosen if it is still there; else choose `first` if that is."""
    if list(choice.options) != options:
        wanted = choice.value if choice.value in options else first
        choice.options = options
        choice.value = wanted if wanted in options else options[0]

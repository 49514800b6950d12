"""The playground's four panes: a grid of answers, one query by epoch, a character chat, and files to keep.

A pane decides what to ask and how to draw the answers; `page.Playground`, to which it belongs, runs the job. Widgets
are made once and reused, so that the hundredth answer costs no more memory than the first.
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
WRAP = Layout(flex_flow="row wrap", align_items="center")


class Compare:
    """A card for each chosen model and format; a card's button shows its prompt below."""

    title = "Compare"

    def __init__(self, page):
        self.page, self.cells, self.cards = page, [], []
        self.grid = GridBox(layout=Layout(**GRID))
        self.inspector = HTML(cards.hint("Press a card's button to see its exact prompt and the tokens in it."))
        self.box = VBox([self.grid, self.inspector])

    def answer(self) -> str:
        """The job behind the button Generate: show the cards, fill in the answers, and return the summary."""
        page = self.page
        self.cells = page.bench.cells(page.query.value, page.chosen_formats(), page.models.value)
        while len(self.cards) < len(self.cells):
            self.cards.append(self._card(len(self.cards)))
        self._draw(self.cells)
        self.grid.children = [box for box, _, _ in self.cards[: len(self.cells)]]
        self.cells = page.ask(self.cells, self._draw)
        return page.summary(self.cells)

    def _card(self, place: int) -> tuple[VBox, HTML, Button]:
        card, button = HTML(), Button(layout=Layout(width="auto", align_self="flex-start"))
        button.on_click(lambda _: self.page.attempt(lambda: self.inspect(place)))
        box = VBox([card, button])
        box.add_class("ms-card")
        return box, card, button

    def _draw(self, cells: list[Mapping], seconds: float | None = None) -> None:
        for (_, card, button), cell in zip(self.cards, cells, strict=False):
            card.value = cards.card(cell, self.page.bench.shelf.rows, seconds)
            button.description = "Inspect prompt"
            button.tooltip = f"Inspect the prompt of {cell['format']}, {cell['model']}"

    def inspect(self, place: int) -> None:
        """Show the prompt of one card, and give that card a frame."""
        cell = self.cells[place]
        self.inspector.value = cards.inspector(cell, self.page.bench.inspect(cell["prompt"]))
        for number, (box, _, _) in enumerate(self.cards):
            (box.add_class if number == place else box.remove_class)("ms-chosen")


class Epochs:
    """One query in one format, answered by all checkpoints of a training; a slider chooses the epoch to show."""

    title = "Epochs"

    def __init__(self, page):
        self.page, self.cells = page, {}  # epoch -> cell
        self.training = Dropdown(description="Training", style=WIDE)
        self.format = Dropdown(description="Format", style=WIDE)
        button = Button(description="Generate epochs", button_style="primary")
        self.epoch = SelectionSlider(
            description="Epoch", options=[("–", 0)], style=WIDE, layout=Layout(width="auto"), continuous_update=True
        )
        self.card = HTML()
        self.bars = HTML(cards.hint("Generate, then move the slider to see in which epoch recitation begins."))
        card = Box([self.card])
        card.add_class("ms-card")
        self.box = VBox([HBox([self.training, self.format, button], layout=WRAP), self.epoch, card, self.bars])
        button.on_click(lambda _: page.start("Generate epochs", self._answer))
        self.training.observe(lambda _: self._choose(), "value")
        self.epoch.observe(lambda _: self._draw(), "value")

    def refresh(self) -> None:
        """Offer the current trainings and formats."""
        _options(self.training, list(self.page.bench.shelf.trainings) or [""])
        _options(self.format, list(self.page.formats))

    def _choose(self) -> None:
        epochs = self.page.bench.shelf.trainings.get(self.training.value)
        self.cells = {}
        self.epoch.options = [(str(epoch), epoch) for epoch in epochs] if epochs else [("–", 0)]
        self.card.value = self.bars.value = ""

    def _answer(self) -> str:
        page, epochs = self.page, self.page.bench.shelf.trainings.get(self.training.value)
        if not epochs:
            raise InputError("no training with checkpoints is open; open a run that has some")
        form = page.formats[self.format.value]

        def draw(cells: list[Mapping], seconds: float | None = None) -> None:
            self.cells = dict(zip(epochs, cells, strict=True))
            self._draw(seconds)

        return page.summary(page.ask(page.bench.cells(page.query.value, [form], list(epochs.values())), draw))

    def _draw(self, seconds: float | None = None) -> None:
        cell = self.cells.get(self.epoch.value)
        if cell:
            rows = self.page.bench.shelf.rows
            self.card.value = cards.card(cell, rows, seconds)
            self.bars.value = cards.recited_by_epoch(self.cells, self.epoch.value, rows)


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
        boxes = [Box([pane]) for pane in self.panes]
        for box in boxes:
            box.add_class("ms-card")
        who = HBox([self.model, self.user, self.char, *self.formats], layout=WRAP)
        grid = GridBox(
            boxes, layout=Layout(**{**GRID, "grid_template_columns": "repeat(auto-fit, minmax(19rem, 1fr))"})
        )
        self.box = VBox([who, self.scene, grid, self.message, HBox([send, clear])])
        send.on_click(lambda _: page.start("Send", self._answer))
        clear.on_click(lambda _: page.start("Start over", self._clear))

    def refresh(self) -> None:
        """Offer the current models and formats."""
        shelf = self.page.bench.shelf
        _options(self.model, list(shelf.models) or [""], (shelf.newest() or [""])[-1])
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
        return (run.path if run else ROOT / "runs") / "playground"

    def save(self) -> None:
        shelf = self.page.bench.shelf
        about = {"scale": shelf.scale, "base_model": shelf.base_model}
        self._offer(*session.save(self.page.bench.log, about, self.folder()))

    def export(self) -> None:
        self._offer(session.export_preset(self.page.formats[self.format.value], self.folder() / "presets"))

    def _offer(self, *paths: Path) -> None:
        self.links.value = "<br>".join(
            cards.download(path.name, base64.b64encode(path.read_bytes()).decode()) for path in paths
        )
        self.page.say(f"written to {paths[0].parent}: {', '.join(path.name for path in paths)}")


def _options(choice: Dropdown, options: list[str], first: str = "") -> None:
    """Offer `options`. Keep the choice if it is among them; otherwise choose `first`, or else the first option."""
    if list(choice.options) != options:
        wanted = next((option for option in (choice.value, first) if option in options), options[0])
        choice.options = options
        choice.value = wanted

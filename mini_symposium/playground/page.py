"""The playground as a page of widgets: a thin view over `workbench`, for JupyterLab, Notebook 7, VS Code and Voila.

Slow work runs as a job on a thread of its own, one at a time; what is pressed meanwhile waits its turn, and the status
line says so. An error in a job is shown there too, and the page stays usable. Under papermill, where nobody looks at
widgets, there is no page: the same query is answered in one pass, errors are raised, and the result is a static table.
"""

import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from threading import Event, Lock, Thread
from time import monotonic

from ipywidgets import (
    HTML,
    Accordion,
    BoundedFloatText,
    BoundedIntText,
    Box,
    Button,
    Combobox,
    FileUpload,
    HBox,
    IntProgress,
    Layout,
    Tab,
    Text,
    Textarea,
    VBox,
)

from mini_symposium.data.prompt_formats import FORMATS, PromptFormat, prompt_format
from mini_symposium.errors import InputError
from mini_symposium.figures.tables import Shown
from mini_symposium.playground import cards, session
from mini_symposium.playground.panes import WIDE, WRAP, Blind, Chat, Chips, Compare, Keep, Series
from mini_symposium.playground.workbench import Workbench
from mini_symposium.recipe import SHIPPED
from mini_symposium.run import standing

REDRAW = 0.25
"""Seconds between two drawings of growing answers."""


def front_end() -> str:
    """The program that shows this kernel's widgets, by its environment variables; "" if there is none or it is unknown.

    `mini-symposium reproduce` sets MINI_SYMPOSIUM_HEADLESS. Plain papermill, nbclient and nbconvert set nothing, and
    front ends other than these may not either: there the notebook's parameter HEADLESS decides.
    """
    if os.environ.get("MINI_SYMPOSIUM_HEADLESS"):
        return ""
    if "COLAB_RELEASE_TAG" in os.environ:
        return "Colab"
    if any(name.startswith("VOILA_") for name in os.environ):
        return "Voila"
    if "JPY_SESSION_NAME" in os.environ:  # from Jupyter Server: JupyterLab, Notebook 7
        return "Jupyter"
    # Users report that over SSH, in WSL and in containers VS Code sets only the second.
    return "VS Code" if {"VSCODE_PID", "VSCODE_CWD"} & os.environ.keys() else ""


def show(
    bench: Workbench,
    query: str,
    formats: Sequence[str],
    models: Sequence[str],
    max_new_tokens: int = 64,
    headless: bool = False,
) -> "VBox | Shown":
    """The page, opened with these choices; if `headless`, a table of the answers that its button Generate would give.

    Parameters
    ----------
    formats
        Names as `prompt_formats.prompt_format` takes them.
    models
        Names in `bench.shelf.models`.

    Raises
    ------
    InputError
        If a format does not exist; if `headless`, also for problems that the page would show in its status line.
    """
    if headless:
        cells = bench.cells(query, [prompt_format(name) for name in formats], models)
        return cards.static(bench.ask(cells, max_new_tokens), query)
    page = Playground(bench, query, formats, models, max_new_tokens, background=front_end() != "Colab")
    page.begin()
    return page.box


def show_epochs(bench: Workbench, query: str, form: str, max_new_tokens: int, headless: bool) -> Shown | None:
    """Headless, a table of the answer of each checkpoint of the highest rate; None otherwise: the page has a slider."""
    if not headless or not bench.shelf.trainings:
        return None
    name, epochs = next(iter(bench.shelf.trainings.items()))
    cells = bench.ask(bench.cells(query, [prompt_format(form)], list(epochs.values())), max_new_tokens)
    return cards.static_epochs(dict(zip(epochs, cells, strict=True)), name)


class Playground:
    """The page, and what its panes share: the query, the choices, the status line, and the running job.

    Parameters
    ----------
    background
        Whether jobs run on a thread; if not, a button press returns when its job is done.
    """

    def __init__(self, bench: Workbench, query: str, formats, models, max_new_tokens: int, background: bool = True):
        self.bench, self.background = bench, background
        self.stop, self._turns = Event(), Lock()
        self._job, self._waiting = "", {}  # the name of the running job; {name: job} of those that wait
        full = Layout(width="auto", min_width="0")
        self.query = Textarea(query, description="Query", rows=2, layout=full, continuous_update=True)
        self.formats: dict[str, PromptFormat] = {}
        self.chips, self.models = Chips(), Chips()
        self.heading = Text(placeholder="### Gardener", description="Heading", style=WIDE)
        self.preset = FileUpload(
            accept=".json", description="Load SillyTavern preset", icon="", layout=Layout(width="auto")
        )
        self.run = Combobox(description="Run", placeholder="a run directory", continuous_update=False, style=WIDE)
        self.run.layout = Layout(width="auto", min_width="0", flex="1 1 auto")
        self.sampling = {
            "temperature": BoundedFloatText(0, min=0, max=5, step=0.1, description="temperature (0: greedy)"),
            "top_k": BoundedIntText(0, min=0, max=10**6, description="top_k (0: all)"),
            "top_p": BoundedFloatText(1, min=0.01, max=1, step=0.05, description="top_p"),
            "repetition_penalty": BoundedFloatText(1, min=0.1, max=5, step=0.05, description="repetition_penalty"),
            "seed": BoundedIntText(0, min=0, max=2**31 - 1, description="seed"),
        }
        self.max_new_tokens = BoundedIntText(max_new_tokens, min=1, max=4096, description="max_new_tokens")
        for field in (*self.sampling.values(), self.max_new_tokens):
            field.style.description_width = "13em"
            field.layout.width = "19.5em"
        self.status = HTML(layout=Layout(flex="1 1 16em"))
        self.progress = IntProgress(max=1, layout=Layout(width="8em"))
        self.compare, self.blind = Compare(self), Blind(self)
        self.panes = self.compare, Series(self), Chat(self), self.blind, Keep(self)
        self.tab = Tab([pane.box for pane in self.panes], titles=[pane.title for pane in self.panes], layout=full)
        self.box = self._page()
        chosen = [prompt_format(name) for name in formats]
        self.add_formats({form.name: form for form in (*FORMATS.values(), *chosen)}.values(), [f.name for f in chosen])
        self._refresh(models)

    def _page(self) -> VBox:
        actions = {
            "Generate": self._generate,
            "Stop": lambda _: self._stop(),
            "Add heading": lambda _: self.attempt(self._add_heading),
            "Blend two": lambda _: self.attempt(self._blend),
            "Open": lambda _: self.start("Open", self._open),
            "Reset to greedy": lambda _: self._reset_sampling(),
        }
        buttons = {name: Button(description=name, layout=Layout(width="auto")) for name in actions}
        for name, action in actions.items():
            buttons[name].on_click(action)
        buttons["Generate"].button_style = "primary"
        buttons["Blend two"].add_class("ms-inspect")
        self.preset.observe(lambda _: self.attempt(self._add_presets), "value")
        more = {
            "More formats": Box([self.heading, buttons["Add heading"], self.preset], layout=WRAP),
            "Sampling": Box([*self.sampling.values(), self.max_new_tokens, buttons["Reset to greedy"]], layout=WRAP),
            "Another run": HBox([self.run, buttons["Open"]]),
        }
        chips = [
            HBox([HTML(f'<b class="ms-name">{name}</b>'), *boxes])
            for name, *boxes in (("Formats", self.chips.box), ("Models", self.models.box, buttons["Blend two"]))
        ]
        actions = Box([buttons["Generate"], buttons["Stop"], self.status, self.progress], layout=WRAP)
        more = Accordion(list(more.values()), titles=list(more))
        top = VBox([self.query, *chips, actions, more]).add_class("ms-ask")
        return VBox([HTML(cards.STYLE), HTML(cards.LEGEND), top, self.tab]).add_class("ms")

    def begin(self) -> None:
        """Load the chosen models and ask the query; on Colab, or if nothing could be opened, only say so."""
        if not self.background:
            self.say("Colab shows nothing from the background: answers appear when all are finished; Stop does nothing")
        elif self.bench.trouble:
            self.say(self.bench.trouble, problem=True)
        else:
            self.start("Load", self._load)
            if self.query.value.strip():
                self._generate(None)

    # For the panes:

    def chosen_formats(self) -> list[PromptFormat]:
        return [self.formats[name] for name in self.chips.value]

    def say(self, text: str, problem: bool = False) -> None:
        """Put a sentence into the status line, and what waits."""
        waiting = f" · next: {', '.join(self._waiting)}" if self._waiting else ""
        self.status.value = cards.status(text + waiting, problem)

    def attempt(self, action: Callable[[], object]) -> None:
        """Run a quick action; an error goes to the status line."""
        try:
            action()
        except Exception as error:  # of any kind: the page has to stay usable
            self.say(str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}", problem=True)

    def start(self, name: str, job: Callable[[], str], restart: bool = False) -> None:
        """Run a job on a thread, and put what it returns into the status line; while another runs, it waits its turn.

        A job that is started again while it waits, waits once. With `restart`, it is stopped if it runs already.
        """
        with self._turns:
            running, self._job = self._job, self._job or name
            if running:
                self._waiting[name] = job
                if restart and running == name:
                    self.stop.set()
            else:
                self.stop.clear()
        if running:
            self.say(f"{running} is still running")
        elif self.background:
            Thread(target=self._work, args=[job], name="playground", daemon=True).start()
        else:
            self._work(job)

    def _work(self, job: Callable[[], str] | None) -> None:
        """Run a job, and then those that wait."""
        while job:
            self.say(f"{self._job} …")
            self.attempt(lambda job=job: self.say(job()))
            self.progress.value = 0
            with self._turns:
                self._job = next(iter(self._waiting), "")
                job = self._waiting.pop(self._job, None)
                self.stop.clear()

    def ask(self, cells: Sequence[Mapping], draw: Callable[..., None]) -> list[dict]:
        """Answer cells with the page's settings, within a job.

        Parameters
        ----------
        draw
            Called with the cells: without answers at first; a few times a second with the answers so far and the
            seconds since the start; and with the finished cells, which are also returned.
        """
        from mini_symposium.models.generation import Sampling

        sampling = Sampling(**{name: field.value for name, field in self.sampling.items()})
        started, drawn, count = monotonic(), 0.0, 0
        draw(cells)

        def on_text(texts: list[str]) -> None:
            nonlocal drawn, count
            count += 1
            if monotonic() - drawn > REDRAW:
                growing = [{**cell, "answer": text} for cell, text in zip(cells, texts, strict=True)]
                draw(growing, monotonic() - started)
                self.progress.max, self.progress.value = self.max_new_tokens.value, count
                drawn = monotonic()

        greedy = sampling == Sampling(seed=sampling.seed)
        settings = self.max_new_tokens.value, None if greedy else sampling
        answered = self.bench.ask(cells, *settings, on_text, self.stop, self._show_step)
        draw(answered)
        return answered

    def summary(self, cells: Sequence[Mapping]) -> str:
        """The status line after a job: how many answers there are, after how long, and how many recite."""
        seconds = max(cell["seconds"] for cell in cells)
        recited = sum(cell["recited"] > 0 for cell in cells)
        after = "stopped after" if self.stop.is_set() else "in"
        return f"{len(cells)} answers {after} {seconds:.1f} s; {recited} recite training rows"

    def add_formats(self, forms: Iterable[PromptFormat], chosen: Container[str]) -> None:
        """Offer more formats in every pane, and as buttons below the query; those in `chosen` are pressed."""
        added = {form.name: form for form in forms}
        self.formats |= added
        self.chips.offer(self.formats, {*self.chips.value} - {*added} | {name for name in added if name in chosen})
        for pane in self.panes[1:]:
            pane.refresh()

    # Handlers of the controls:

    def _generate(self, _) -> None:
        self.tab.selected_index = 0
        self.start("Generate", self.compare.answer)

    def _stop(self) -> None:
        with self._turns:
            self.stop.set()
            self._waiting.clear()
        self.say(f"stopping {self._job}; answers so far stay" if self._job else "nothing is running")

    def _reset_sampling(self) -> None:
        for name, value in {"temperature": 0, "top_k": 0, "top_p": 1, "repetition_penalty": 1, "seed": 0}.items():
            self.sampling[name].value = value
        self.say("greedy, as the other notebooks decode")

    def _add_heading(self) -> None:
        text = self.heading.value.strip()
        heading = text if text.startswith("#") else f"### {text}"
        self.add_formats([prompt_format(heading)], [heading])
        self.heading.value = ""
        self.say(f"{heading} was added and chosen")

    def _blend(self) -> None:
        shelf = self.bench.shelf
        two = [name for name in self.models.value if name in shelf.adapters()]
        if len(two) != 2:
            raise InputError(f"{len(two)} checkpoints are chosen; choose the two to blend")
        blend = " + ".join(two)
        self.models.offer([*self.models.names, *{blend} - {*self.models.names}], [*self.models.value, blend])
        self.say(f"{blend} was added and chosen; Generate, then move the slider in its row")

    def _add_presets(self) -> None:
        files, self.preset.value = self.preset.value, ()  # emptied, so that the same file can be given again
        for file in files:
            form = session.read_preset(file.name, bytes(file.content), self.formats)
            self.add_formats([form], [form.name])
            self.say(f"{file.name}: the preset {form.name} was added and chosen")

    def _open(self) -> str:
        chosen, base = self.models.value, self.bench.shelf.base_model
        summary = self.bench.open(self.run.value.strip())
        other_base = self.bench.shelf.base_model != base
        self._refresh(self.bench.shelf.offered() if other_base else chosen)
        return f"{summary}. {self._load()}" if other_base else summary

    def _load(self) -> str:
        self.bench.load(self.models.value, self._show_step)
        shelf = self.bench.shelf
        return f"ready: {shelf.base_model} ({shelf.scale} scale), {len(self.models.value)} models loaded"

    def _show_step(self, what: str, number: int, of: int) -> None:
        self.progress.max, self.progress.value = of, number
        self.say(f"loading {what} ({number} of {of}) …")

    def _refresh(self, chosen: Sequence[str]) -> None:
        shelf = self.bench.shelf
        self.models.offer(shelf.models, chosen)
        here = standing()
        runs = sorted(path.parent for path in (here / "runs").glob("*/recipe.yml"))
        self.run.options = [*(str(path.relative_to(here)) for path in runs), *SHIPPED]
        if shelf.run and not self.run.value:
            path = shelf.run.path
            self.run.value = str(path.relative_to(here) if path.is_relative_to(here) else path)
        for pane in self.panes[1:]:
            pane.refresh()

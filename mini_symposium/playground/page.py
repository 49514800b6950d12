"""The playground as a page of widgets: a thin view over `workbench`, for JupyterLab, Notebook 7, VS Code and Voila.

What takes time runs on a thread of its own, one thing at a time; what goes wrong there is said in the status line, and
the page stays usable. Where nobody looks, under papermill, there is no page: the same question is answered in one pass,
errors are raised, and a static table comes out.
"""

import os
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
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
    SelectMultiple,
    Tab,
    Text,
    Textarea,
    ToggleButton,
    VBox,
)

from mini_symposium.data.prompt_formats import FORMATS, PromptFormat, prompt_format
from mini_symposium.errors import InputError
from mini_symposium.figures.tables import Shown
from mini_symposium.playground import cards, session
from mini_symposium.playground.panes import WIDE, WRAP, Chat, Compare, Epochs, Keep
from mini_symposium.playground.workbench import Workbench
from mini_symposium.run import ROOT

REDRAW = 0.25
"""Seconds between two drawings of answers that grow."""


def front_end() -> str:
    """Who shows the widgets of this kernel, by what its server says in the environment; "" if nobody is known to.

    `mini-symposium reproduce` says that nobody does. Plain papermill, nbclient and nbconvert say nothing, nor does a
    front end that is not known here: there, say it with the notebook's parameter HEADLESS.
    """
    if os.environ.get("MINI_SYMPOSIUM_HEADLESS"):
        return ""
    if "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ:
        return "Colab"
    if any(name.startswith("VOILA_") for name in os.environ):
        return "Voila"
    if "JPY_SESSION_NAME" in os.environ:  # from Jupyter Server: JupyterLab, Notebook 7
        return "Jupyter"
    # Over SSH, in WSL and in containers VS Code is reported to set only the second.
    return "VS Code" if {"VSCODE_PID", "VSCODE_CWD"} & os.environ.keys() else ""


def show(
    bench: Workbench,
    query: str,
    formats: Sequence[str],
    models: Sequence[str],
    max_new_tokens: int = 64,
    headless: bool = False,
) -> "VBox | Shown":
    """The page, opened with these choices; headless, the table that Generate would lead to.

    Parameters
    ----------
    formats
        Names as `prompt_formats.prompt_format` takes them.
    models
        Names from the shelf.

    Raises
    ------
    InputError
        If headless, for whatever the page would say in its status line.
    """
    if headless:
        cells = bench.cells(query, [prompt_format(name) for name in formats], models)
        return cards.static(bench.ask(cells, max_new_tokens), query)
    page = Playground(bench, query, formats, models, max_new_tokens, background=front_end() != "Colab")
    page.begin()
    return page.box


def show_epochs(bench: Workbench, query: str, form: str, max_new_tokens: int, headless: bool) -> Shown | None:
    """Headless, what each checkpoint of the fastest training says; None with a page, whose slider shows that."""
    if not headless or not bench.shelf.series():
        return None
    name, epochs = next(iter(bench.shelf.series().items()))
    found = bench.ask(bench.cells(query, [prompt_format(form)], list(epochs.values())), max_new_tokens)
    return cards.static_epochs(dict(zip(epochs, found, strict=True)), name)


class Playground:
    """The page and what its panes share: the query, the choices, the status line, and the one job that runs."""

    def __init__(self, bench: Workbench, query: str, formats, models, max_new_tokens: int, background: bool = True):
        self.bench, self.background = bench, background
        self.stop, self._idle, self._job = Event(), Lock(), ""
        self.error: Exception | None = None
        """What went wrong last, with its traceback."""
        full = Layout(width="auto", min_width="0")
        self.query = Textarea(query, description="Query", rows=4, layout=full, continuous_update=True)
        self.formats: dict[str, PromptFormat] = {}
        self.chips = Box(layout=WRAP)
        self.heading = Text(placeholder="### Gardener", description="Heading", style=WIDE)
        self.preset = FileUpload(
            accept=".json", description="Load SillyTavern preset", icon="", layout=Layout(width="auto")
        )
        self.models = SelectMultiple(description="Models", rows=7, layout=full)
        self.run = Combobox(description="Run", placeholder="a run directory", continuous_update=False)
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
        self.status = HTML(layout=Layout(flex="1 1 20em"))
        self.progress = IntProgress(max=1, layout=Layout(width="12em"))
        self.compare, self.keep = Compare(self), Keep(self)
        self.panes = self.compare, Epochs(self), Chat(self), self.keep
        self.tab = Tab([pane.box for pane in self.panes], titles=[pane.title for pane in self.panes], layout=full)
        self.box = self._page()
        chosen = [prompt_format(name) for name in formats]
        self.add_formats({form.name: form for form in (*FORMATS.values(), *chosen)}.values(), [f.name for f in chosen])
        self._refresh(models)

    def _page(self) -> VBox:
        buttons = {
            "Generate": self._generate,
            "Stop": lambda _: self._stop(),
            "Add heading": lambda _: self.trying(self._add_heading),
            "Open": lambda _: self.start("Open", self._open),
            "Greedy, as headless": lambda _: self._greedy(),
        }
        made = {name: Button(description=name, layout=Layout(width="auto")) for name in buttons}
        made["Generate"].button_style = "primary"
        for name, act in buttons.items():
            made[name].on_click(act)
        self.preset.observe(lambda _: self.trying(self._add_presets), "value")
        sampling = Box([*self.sampling.values(), self.max_new_tokens, made["Greedy, as headless"]], layout=WRAP)
        asked = VBox(
            [
                self.query,
                self.chips,
                Box([self.heading, made["Add heading"], self.preset], layout=WRAP),
                Box([made["Generate"], made["Stop"], self.progress, self.status], layout=WRAP),
            ],
            layout=Layout(flex="3 1 28em", min_width="0"),
        )
        answering = VBox(
            [HBox([self.run, made["Open"]]), self.models, Accordion([sampling], titles=["Sampling"])],
            layout=Layout(flex="2 1 20em", min_width="0"),
        )
        top = Box([asked, answering], layout=Layout(flex_flow="row wrap", grid_gap="12px"))
        page = VBox([HTML(f"<style>{cards.CSS}</style>"), top, self.tab])
        page.add_class("ms")
        return page

    def begin(self) -> None:
        """Load what is chosen, once the page is up."""
        if not self.background:
            self.say("Colab shows nothing from the background: answers appear when all are there; Stop does nothing")
        elif self.bench.trouble:
            self.say(self.bench.trouble, problem=True)
        else:
            self.start("Load", self._load)

    # What the panes use.

    def chosen_formats(self) -> list[PromptFormat]:
        return [self.formats[chip.tooltip] for chip in self.chips.children if chip.value]

    def say(self, text: str, problem: bool = False) -> None:
        """Put a sentence into the status line."""
        self.status.value = cards.status(text, problem)

    def trying(self, act: Callable[[], object]) -> None:
        """Do something quick; what goes wrong is said in the status line."""
        try:
            act()
        except Exception as error:  # whatever it is, the page stays, and a person reads it there
            self._fail(error)

    def start(self, name: str, job: Callable[[], str]) -> None:
        """Run a job on a thread of its own; what it returns is said when it is done. While one runs, none is begun."""
        if not self._idle.acquire(blocking=False):
            self.say(f"{self._job} is still running; press Stop, or wait until it is done", problem=True)
            return
        self._job = name
        self.stop.clear()

        def run() -> None:
            try:
                self.say(f"{name} …")
                self.say(job())
            except Exception as error:  # as in `trying`
                self._fail(error)
            finally:
                self.progress.value = 0
                self._idle.release()

        if self.background:
            Thread(target=run, name=f"playground: {name}", daemon=True).start()
        else:
            run()

    def ask(self, cells: Sequence[Mapping], draw: Callable[..., None]) -> list[dict]:
        """Within a job: answer cells under the page's settings, drawing what has come a few times a second."""
        from mini_symposium.models.generation import Sampling

        sampling = Sampling(**{name: field.value for name, field in self.sampling.items()})
        started, drawn, count = monotonic(), 0.0, 0
        draw(cells)

        def grown(texts: list[str]) -> None:
            nonlocal drawn, count
            count += 1
            if monotonic() - drawn > REDRAW:
                growing = [{**cell, "answer": text} for cell, text in zip(cells, texts, strict=True)]
                draw(growing, monotonic() - started)
                self.progress.max, self.progress.value = self.max_new_tokens.value, count
                drawn = monotonic()

        greedy = sampling == Sampling(seed=sampling.seed)
        settings = self.max_new_tokens.value, None if greedy else sampling
        found = self.bench.ask(cells, *settings, grown, self.stop, self._step)
        draw(found)
        return found

    def summary(self, cells: Sequence[Mapping]) -> str:
        took = max(cell["seconds"] for cell in cells)
        recited = sum(cell["recited"] > 0 for cell in cells)
        how = "stopped after" if self.stop.is_set() else "in"
        return f"{len(cells)} answers {how} {took:.1f} s; {recited} recite training rows"

    def add_formats(self, forms: Iterable[PromptFormat], chosen: Container[str]) -> None:
        """Offer formats in every pane; in the first as chips, of which some are pressed."""
        chips = {chip.tooltip: chip for chip in self.chips.children}
        for form in forms:
            self.formats[form.name] = form
            chips[form.name] = ToggleButton(form.name in chosen, description=form.name, tooltip=form.name)
            chips[form.name].add_class("ms-chip")
        self.chips.children = list(chips.values())
        for pane in self.panes[1:]:
            pane.refresh()

    # What the controls do.

    def _generate(self, _) -> None:
        self.tab.selected_index = 0
        self.compare.generate()

    def _busy(self) -> bool:
        if self._idle.acquire(blocking=False):
            self._idle.release()
            return False
        return True

    def _stop(self) -> None:
        self.stop.set()
        self.say(f"stopping {self._job}; what came stays" if self._busy() else "nothing is running")

    def _greedy(self) -> None:
        for name, value in {"temperature": 0, "top_k": 0, "top_p": 1, "repetition_penalty": 1, "seed": 0}.items():
            self.sampling[name].value = value
        self.say("greedy, as the other notebooks decode")

    def _add_heading(self) -> None:
        text = self.heading.value.strip()
        heading = text if text.startswith("#") else f"### {text}"
        self.add_formats([prompt_format(heading)], [heading])
        self.heading.value = ""
        self.say(f"{heading} was added and chosen")

    def _add_presets(self) -> None:
        files, self.preset.value = self.preset.value, ()  # so that the same file can be given again
        for file in files:
            form = session.read_preset(file.name, bytes(file.content), self.formats)
            self.add_formats([form], [form.name])
            self.say(f"{file.name}: the preset {form.name} was added and chosen")

    def _open(self) -> str:
        chosen, base = set(self.models.value), self.bench.shelf.base_model
        said = self.bench.open(self.run.value.strip())
        another = self.bench.shelf.base_model != base
        self._refresh(self.bench.shelf.newest() if another else [n for n in self.bench.shelf.models if n in chosen])
        return f"{said}. {self._load()}" if another else said

    def _load(self) -> str:
        self.bench.load(self.models.value, self._step)
        shelf = self.bench.shelf
        return f"ready: {shelf.base_model} ({shelf.scale} scale), {len(self.models.value)} models loaded"

    def _step(self, what: str, done: int, of: int) -> None:
        self.progress.max, self.progress.value = of, done + 1
        self.say(f"loading {what} ({done + 1} of {of}) …")

    def _fail(self, error: Exception) -> None:
        self.error = error
        self.say(str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}", problem=True)

    def _refresh(self, chosen: Sequence[str]) -> None:
        shelf = self.bench.shelf
        self.models.options = list(shelf.models)
        self.models.value = [name for name in chosen if name in shelf.models]
        runs = sorted(path.parent for path in (ROOT / "runs").glob("*/recipe.yml"))
        self.run.options = [str(path.relative_to(ROOT)) for path in runs] + ["tiny", "proxy", "paper"]
        if shelf.run and not self.run.value:
            path = shelf.run.path
            self.run.value = str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(path))
        for pane in self.panes[1:]:
            pane.refresh()

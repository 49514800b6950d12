"""Options that several commands take, and the console that all of them print on."""

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from mini_symposium.errors import printable
from mini_symposium.run import rate_and_epoch

console = Console()


def say(line: object, **style) -> None:
    """Print a line unchanged: without markup, and not wrapped to the terminal's width."""
    console.print(str(line), markup=False, highlight=False, soft_wrap=True, **style)


def note_macros(form) -> None:
    """Say on standard error which macros of a prompt format only SillyTavern can fill."""
    if macros := form.unfilled_macros():
        told = f"note: {form.name}: only SillyTavern fills {', '.join(macros)}; they stay in the prompt as written"
        print(printable(told), file=sys.stderr)


def note_recommended(run, checkpoints) -> None:
    """Say what the run's held-out curves recommend, if one of `checkpoints` has a rate with a curve."""
    for path in checkpoints:
        rate, epoch = rate_and_epoch(path)
        if (best := run.recommended(rate)) is not None:
            is_best = "which" if best == epoch else f"but epoch {best}"
            say(f"epoch {epoch} of {rate:g}, {is_best} has the lowest held-out loss ({run.curve_file.name})")


def literal(text: str) -> str:
    """Text from a user, a dataset or a model, for rich: control characters made visible, markup escaped."""
    return escape(printable(text))


RecipeOption = Annotated[str, typer.Option(help="tiny, proxy, base, half, large, paper, or the path of a recipe.yml")]
RunOption = Annotated[str, typer.Option(help="run directory; runs/RECIPE if not given")]
Parameters = Annotated[
    list[str] | None,
    typer.Option("-p", "--parameter", metavar="NAME=VALUE", help="a notebook parameter; may be repeated"),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="a run directory")]
RunOrAdapter = Annotated[
    str, typer.Argument(metavar="RUN", help="a run directory, or a folder with an adapter that PEFT wrote")
]
Rate = Annotated[
    float, typer.Option("--learning-rate", min=0, help="take this rate's checkpoints; the lowest trained if not given")
]
Base = Annotated[
    str,
    typer.Option(help="nf4 (the base that a run's training saw) or original; for an adapter from elsewhere original"),
]
BaseModel = Annotated[str, typer.Option(help="the base of an adapter from elsewhere, if it names none that is here")]
Checkpoint = Annotated[str, typer.Option(help="epoch-N or RATE/epoch-N; the recommended one if not given, or the last")]
Checkpoints = Annotated[
    list[str] | None,
    typer.Option("--checkpoint", help="epoch-N, RATE/epoch-N, either with =WEIGHT; else the recommended or last"),
]

"""Options that several commands take, and the console that all of them print on."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from mini_symposium.errors import printable

console = Console()


def say(line: object, **style) -> None:
    """Print a line unchanged: without markup, and not wrapped to the terminal's width."""
    console.print(str(line), markup=False, highlight=False, soft_wrap=True, **style)


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
Rate = Annotated[
    float, typer.Option("--learning-rate", min=0, help="take this rate's checkpoints; the lowest trained if not given")
]
Base = Annotated[str, typer.Option(help="nf4 (the base that training saw) or original")]
Checkpoint = Annotated[str, typer.Option(help="epoch-N or RATE/epoch-N; the last one if not given")]
Checkpoints = Annotated[
    list[str] | None,
    typer.Option("--checkpoint", help="epoch-N, RATE/epoch-N, or either with =WEIGHT; the last one if not given"),
]

"""Options that several commands take, and the console on which all of them speak."""

from typing import Annotated

import typer
from rich.console import Console

console = Console()

RecipeOption = Annotated[str, typer.Option(help="tiny, proxy, paper, or the path of a recipe.yml")]
RunOption = Annotated[str, typer.Option(help="run directory; runs/RECIPE if not given")]
Parameters = Annotated[
    list[str] | None,
    typer.Option("-p", "--parameter", metavar="NAME=VALUE", help="a notebook parameter; may be repeated"),
]

Checkpoints = Annotated[
    list[str] | None,
    typer.Option("--checkpoint", help="epoch-N, RATE/epoch-N, or either with =WEIGHT; the last one if not given"),
]

"""`mini-symposium sweep`."""

from typing import Annotated

import typer
from rich.table import Table

from mini_symposium.cli.options import RecipeOption, console, say
from mini_symposium.errors import InputError
from mini_symposium.training.experiments import PER_PASS


def sweep(
    recipe: RecipeOption = "proxy",
    out: Annotated[str, typer.Option(help="folder of the sweep; runs/RECIPE-sweep if not given")] = "",
    learning_rates: Annotated[str, typer.Option(help="comma-separated; trains a grid, not the claims' runs")] = "",
    ranks: Annotated[str, typer.Option(help="likewise: r, or r:alpha; alpha is 2r if not given")] = "",
    schedules: Annotated[str, typer.Option(help="likewise: constant,cosine,linear")] = "",
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "42,43,44",
    epochs: Annotated[int | None, typer.Option(help="for a grid; the recipe's own if not given")] = None,
    per_pass: Annotated[int, typer.Option(help="maximum adapters per training pass of a grid")] = PER_PASS,
    engine: Annotated[str, typer.Option(help="local, or ray: the cluster that RAY_ADDRESS names")] = "local",
    cpus: Annotated[int, typer.Option(min=1, help="cores of a pass on Ray")] = 1,
    only: Annotated[str, typer.Option(help="experiments by name, e.g. high,low; all if not given")] = "",
    measure: Annotated[
        bool | None,
        typer.Option("--measure/--no-measure", help="evaluate after training; a grid only if asked"),
    ] = None,
):
    """Train and measure what the twelve claims need, or a grid of your own; run again, it resumes."""
    from mini_symposium.recipe import load_recipe
    from mini_symposium.run import RunDirectory
    from mini_symposium.training.experiments import grid, parse_numbers, parse_ranks, refuse_repeats

    chosen = load_recipe(recipe)
    numbers = parse_numbers("seeds", seeds) or [chosen.seed]
    refuse_repeats("seeds", numbers)
    is_grid = bool(learning_rates or ranks or schedules)
    passes = None
    if is_grid:
        rules = [rule.strip() for rule in schedules.split(",")] if schedules else []
        rates = parse_numbers("learning-rates", learning_rates, float)
        passes = grid(chosen, rates, parse_ranks(ranks), rules, numbers, epochs, per_pass)
    elif epochs is not None:
        raise InputError("--epochs: is for a grid; give --learning-rates, --ranks or --schedules too")
    from mini_symposium.claims import ledger
    from mini_symposium.claims.evidence import load_evidence
    from mini_symposium.data.dataset import load_examples
    from mini_symposium.data.held_out import check_disjoint, load_held_out
    from mini_symposium.files.writing import alone
    from mini_symposium.training.sweep import Sweep, check_engine

    check_engine(engine)
    whole = Sweep(chosen, RunDirectory(out or f"runs/{chosen.name}-sweep").path, numbers, passes)
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = list(dict.fromkeys(training.name for training in whole.trainings))
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"--only {', '.join(unknown)}: the experiments are {', '.join(known)}")
    examples, twins = load_examples(chosen.dataset), load_examples("data/twins.md")
    prompts = load_held_out(split="test")
    check_disjoint(prompts, examples, twins)
    with alone(whole.root):
        whole.run(examples, twins, names, say, engine, cpus)
        if measure or (measure is None and not is_grid):
            whole.measure(examples, twins, prompts, is_grid, say)
        if not is_grid:
            ledger.save(ledger.judge(load_evidence(whole.root)), whole.root)
    losses = whole.table()
    table = Table("experiment", "seed", "learning rate", "epochs", "loss", "EM", title="the last epoch's means")
    for row in losses.itertuples():
        cells = (str(row.seed), f"{row.learning_rate:g}", str(row.num_epochs), f"{row.loss:.3f}", f"{row.em:.3f}")
        table.add_row(row.name, *cells)
    console.print(table)
    say(f"the table: {whole.root / 'sweep.csv'}")
    say(f"the ledger: mini-symposium claims {whole.root}")

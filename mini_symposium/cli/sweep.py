"""`mini-symposium sweep` and `forecast`: a grid of trainings, done or only foreseen."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from mini_symposium.cli.options import RecipeOption, console, literal, say
from mini_symposium.errors import InputError
from mini_symposium.files.writing import alone
from mini_symposium.recipe import load_recipe
from mini_symposium.run import RunDirectory, find, open_run, read_object
from mini_symposium.training.experiments import PER_PASS, grid, parse_numbers, parse_ranks, refuse_repeats

BENCH = "figures/bench-cpu-epyc.json"
"""Seconds of a step of 256 tokens; a row of the card's has 175."""
LearningRates = Annotated[str, typer.Option(help="of a grid, comma-separated")]
Ranks = Annotated[str, typer.Option(help="of a grid, comma-separated: r, or r:alpha; alpha is 2r if not given")]
Schedules = Annotated[str, typer.Option(help="of a grid, comma-separated: constant,cosine,linear")]


def forecast(
    recipe: RecipeOption = "proxy",
    dataset: Annotated[str, typer.Option(help="rows of your own; the recipe's if not given")] = "",
    learning_rates: LearningRates = "",
    ranks: Ranks = "",
    schedules: Schedules = "",
    by_size: Annotated[
        bool,
        typer.Option("--by-size", help="of a model whose weights are not here, from the sizes of those that were"),
    ] = False,
    log: Annotated[
        str,
        typer.Option(metavar="FILE", help="also append the forecasts to this log, before the training that tests them"),
    ] = "",
    check: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN", help="score the forecasts in the log by this run; may be repeated; makes no forecast"
        ),
    ] = None,
):
    """Forecast, before training, when half of the tokens are known and when 90% are; or score earlier forecasts."""
    if check:
        _check(log, check)
        return
    chosen = load_recipe(recipe, **({"datasets": [{"path": dataset, "type": "completion"}]} if dataset else {}))
    rates = parse_numbers("learning-rates", learning_rates, float) or list(chosen.contrast)
    rules = [rule.strip() for rule in schedules.split(",")] if schedules else []
    trainings = [t for group in grid(chosen, rates, parse_ranks(ranks), rules, [chosen.seed]) for t in group]
    from mini_symposium.claims.registration import REGISTERED
    from mini_symposium.data.dataset import fingerprint, recipe_examples
    from mini_symposium.models.base_models import shape_of
    from mini_symposium.training.forecast import MOMENTS, foresee, foresee_by_size

    examples, recipes = recipe_examples(chosen)[0], [training.recipe for training in trainings]
    how = ""
    if by_size:
        if dataset or fingerprint(examples) != REGISTERED.rows:
            raise InputError("--by-size: is for the thirteen rows that come with the kit; leave out --dataset")
        parameters = sum(each.numel() for each in shape_of(chosen.base_model).parameters())
        found, how = (
            foresee_by_size(recipes, parameters, len(examples)),
            f", by its {parameters / 1e9:.1f} B parameters",
        )
    else:
        found = foresee(recipes, examples)
    title = literal(f"{chosen.base_model}{how}, {len(examples)} rows: epochs, and 90% intervals")
    headings = [heading for heading, _ in MOMENTS.values()]
    table = Table("learning rate", "r", "alpha", "schedule", *headings, title=title)
    for row in found.to_dict("records"):
        cells = [f"{row['learning_rate']:g}", row["lora_r"], row["lora_alpha"], row["lr_scheduler"]]
        epochs = [f"{row[m]:,.3g} ({row[f'{m}_low']:,.3g} to {row[f'{m}_high']:,.3g})" for m in MOMENTS]
        table.add_row(*map(str, cells), *epochs)
    console.print(table)
    for (r, alpha), rate in found.groupby(["lora_r", "lora_alpha"])["rate_for_100"].first().items():
        say(f"r {r}, alpha {alpha}: the learning rate at which half of the tokens are known at epoch 100 is {rate:.2g}")
    if log:
        from mini_symposium.training.forecast import append_to_log

        append_to_log(Path(log), chosen, examples, found)
        say(f"appended to {log}: commit it before the training")


def _check(log: str, runs: list[str]) -> None:
    """Print the forecasts of a log beside what runs measured."""
    from mini_symposium.training.forecast import LOG
    from mini_symposium.training.forecast import check as score

    found = score(find(log or LOG), [open_run(run) for run in runs])
    table = Table("base", "learning rate", "r", "moment", "foreseen", "measured", "error", "inside")
    for row in found.to_dict("records"):
        foreseen = f"{row['forecast']:.3g} ({row['low']:.3g} to {row['high']:.3g})"
        measured = [f"{row['measured']:.3g}", f"{row['error']:.0%}", "yes" if row["inside"] else "no"]
        unseen = ["not reached", "", ""]
        names = [literal(row["base_model"]), f"{row['learning_rate']:g}", str(row["lora_r"]), row["moment"]]
        table.add_row(*names, foreseen, *(unseen if row["inside"] is None else measured))
    console.print(table)
    scored = found.dropna(subset="measured")
    if len(scored):
        said = (
            f"median error {scored['error'].median():.0%}, {scored['inside'].astype(int).sum()} of {len(scored)} inside"
        )
        say(f"{said} their 90% intervals")


def sweep(
    recipe: RecipeOption = "proxy",
    out: Annotated[str, typer.Option(help="folder of the sweep; runs/RECIPE-sweep if not given")] = "",
    learning_rates: LearningRates = "",
    ranks: Ranks = "",
    schedules: Schedules = "",
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "42,43,44",
    epochs: Annotated[int | None, typer.Option(help="for a grid; the recipe's own if not given")] = None,
    per_pass: Annotated[int, typer.Option(help="maximum adapters per training pass of a grid")] = PER_PASS,
    engine: Annotated[str, typer.Option(help="local, or ray: the cluster that RAY_ADDRESS names")] = "local",
    cpus: Annotated[int, typer.Option(min=1, help="cores of a pass on Ray")] = 1,
    only: Annotated[str, typer.Option(help="experiments by name, e.g. high,low; all if not given")] = "",
    measure: Annotated[
        str,
        typer.Option(
            metavar="all|recitation|nothing",
            help="what to evaluate after training; if not given, all, of a grid nothing",
        ),
    ] = "",
    beside: Annotated[
        str, typer.Option(metavar="DIR", help="evidence of an earlier part, which is not gathered again")
    ] = "",
    show_plan: Annotated[bool, typer.Option("--plan", help="show what is left to do, and train nothing")] = False,
):
    """Train and measure what the claims need, or a grid of your own; run again, it resumes."""
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
    if is_grid and (beside or show_plan):
        raise InputError("--plan and --beside: are for the claims' own experiments, not for a grid")
    measure = measure or ("nothing" if is_grid else "all")
    if measure not in ("all", "recitation", "nothing"):
        raise InputError(f"--measure {measure}: is all, recitation or nothing")
    from mini_symposium.claims import ledger
    from mini_symposium.claims.evidence import load_evidence
    from mini_symposium.claims.registration import REGISTERED
    from mini_symposium.data.dataset import load_examples, recipe_examples
    from mini_symposium.data.held_out import apart, load_held_out
    from mini_symposium.evaluation.memorization import PROBES
    from mini_symposium.training.sweep import CURVE, Sweep, check_engine

    check_engine(engine)
    root, high = RunDirectory(out or f"runs/{chosen.name}-sweep").path, REGISTERED.rates.get(chosen.base_model, 0.0)
    whole = Sweep(chosen, root, numbers, passes, high, _gathered(beside, chosen.base_model))
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = [*(name for name, _ in sorted(whole.had)), *(training.name for training in whole.trainings)]
    known = [*dict.fromkeys(known), *([] if is_grid else [CURVE])]
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"--only {', '.join(unknown)}: the experiments are {', '.join(known)}")
    examples = recipe_examples(chosen)[0]
    if show_plan:
        _show_plan(whole, len(examples))
        return
    twins = load_examples("data/twins.md")
    twins = apart(twins, examples, say)
    prompts = []
    if measure == "all":
        prompts = apart([prompt for split in ("test", "more") for prompt in load_held_out(split)], examples, say)

    probes = ("prompt",) if measure == "recitation" else PROBES

    def measure_these(group):
        if measure != "nothing":
            whole.measure(examples, twins, prompts, is_grid, say, group, probes=probes)

    with alone(whole.root):
        whole.run(examples, twins, names, say, engine, cpus, measure_these)
        measure_these(())
        if not is_grid:
            ledger.save(ledger.judge(load_evidence(whole.root, *filter(None, [beside]))), whole.root)
    losses = whole.table()
    table = Table("experiment", "seed", "learning rate", "epochs", "loss", "EM", title="the last epoch's means")
    for row in losses.itertuples():
        cells = (str(row.seed), f"{row.learning_rate:g}", str(row.num_epochs), f"{row.loss:.3f}", f"{row.em:.3f}")
        table.add_row(row.name, *cells)
    console.print(table)
    say(f"the table: {whole.root / 'sweep.csv'}")
    say(f"the ledger: mini-symposium claims {whole.root} {beside}".rstrip())


def _gathered(folder: str, base_model: str) -> set[tuple[str, int]]:
    """What the evidence in a folder has whole, as `Sweep` takes it; nothing without a folder."""
    if not folder:
        return set()
    from mini_symposium.claims import ledger
    from mini_symposium.claims.evidence import load_evidence
    from mini_symposium.claims.registration import REGISTERED
    from mini_symposium.training.sweep import BASE, CURVE, EVALUATED

    evidence = load_evidence(folder)
    if evidence.facts.get("base_model") != base_model:
        raise InputError(f"--beside {folder}: is of {evidence.facts.get('base_model')}, the sweep of {base_model}")
    if evidence.registration != REGISTERED.sha256:
        raise InputError(f"--beside {folder}: {ledger.hashes(evidence)}; gather it anew")
    whole = {
        (t.name, t.seed)
        for t in evidence.trained
        if t.epochs == t.num_epochs
        and all(t.evaluations.get(epoch, {}).get("answers") for epoch in EVALUATED.get(t.name, ()))
    }
    curves = [curve["seed"] for curve in evidence.curves]
    return (
        whole
        | {(CURVE, seed) for seed in curves if curves.count(seed) > 1}
        | ({BASE} if evidence.base.get("answers") else set())
    )


def _show_plan(whole, rows: int) -> None:
    """Print what is left of a sweep, with hours by the kit's own bench where that has the model."""
    planned = whole.planned(rows)
    title = literal(f"{whole.base.base_model}, {rows} rows")
    table = Table("experiment", "learning rate", "epochs", "seeds left", "adapter steps", "evaluated", title=title)
    for row in planned.itertuples():
        evaluated = ", ".join(map(str, row.evaluated))
        table.add_row(row.experiment, row.learning_rate, str(row.epochs), row.seeds, f"{row.steps:,}", evaluated)
    console.print(table)
    steps = planned["steps"].sum()
    evaluations = sum(len(row.evaluated) * len(row.seeds.split(",")) for row in planned.itertuples() if row.seeds)
    say(f"{steps:,} adapter steps and {evaluations} evaluations of adapters are left; a cross-validation ends earlier")
    bench = find(BENCH)
    found = read_object(bench) if bench.is_file() else {}
    ours = {"SmolLM2-135M-Instruct": found.get("step", {}).get("seconds", {}).get("ours")}
    ours |= {name: size["seconds"]["ours"] for name, size in found.get("sizes", {}).items() if isinstance(size, dict)}
    if seconds := ours.get(whole.base.base_model):
        processor = found["environment"]["processor"]
        say(f"about {steps * seconds / 3600:.1f} hours of steps at {seconds:.2f} s, as on the {processor} of {BENCH}")

"""The command line. A command imports only what it needs, so that `--help` and errors in the input come at once."""

import errno
import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich import box
from rich.table import Column, Table

from mini_symposium.cli import export as cli_export
from mini_symposium.cli import sweep as cli_sweep
from mini_symposium.cli.options import (
    Base,
    BaseModel,
    Checkpoint,
    Checkpoints,
    Parameters,
    Rate,
    RecipeOption,
    Run,
    RunOption,
    RunOrAdapter,
    console,
    literal,
    note_macros,
    note_recommended,
    say,
)
from mini_symposium.errors import Faults, InputError, RunError, printable
from mini_symposium.files.writing import alone, check_new, write_json, written_whole
from mini_symposium.models.strength import check_strength
from mini_symposium.recipe import load_recipe
from mini_symposium.run import ROOT, RunDirectory, environment, open_run, rate_and_epoch, resolve

app = typer.Typer(
    help="Fine-tune a language model on a dozen handwritten examples, and know what happened.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_export.app, name="export")

SHOWN = 20
"""Rows and notes of a dataset that `inspect` prints."""
INTERRUPTED = 130
"""The exit code after Ctrl-C, as in a shell."""
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
"""Error numbers of an OSError: the disk is full, or the user may not write there."""


@app.command()
def reproduce(
    recipe: RecipeOption = "proxy",
    run: RunOption = "",
    parameter: Parameters = None,
    only: Annotated[str, typer.Option(help="numbers of notebooks, e.g. 02,05")] = "",
    overwrite: Annotated[bool, typer.Option(help="run finished notebooks again")] = False,
):
    """Execute the notebooks in order into the run directory, then show what they recorded."""
    from mini_symposium.reproduce.notebooks import parse_parameters, print_summary
    from mini_symposium.reproduce.notebooks import reproduce as execute

    chosen = [number.strip() for number in only.split(",") if number.strip()] or None
    summary = execute(recipe, run or None, parse_parameters(parameter or []), chosen, overwrite, console=console)
    print_summary(summary, console)
    from mini_symposium.release.report import write_report

    directory = RunDirectory(summary["run"])
    ran = any(notebook["status"] != "already there" for notebook in summary["notebooks"])
    if ran and directory.recipe_file.is_file():  # notebook 01 alone trains nothing
        say(f"report: {write_report(directory)}")


@app.command()
def train(
    recipe: RecipeOption = "proxy",
    run: RunOption = "",
    parameter: Parameters = None,
    overwrite: Annotated[bool, typer.Option(help="train again, in place of what is there")] = False,
    stop: Annotated[
        str,
        typer.Option(
            metavar="best|recite|EPOCH",
            help="end at the best held-out epoch (cross-validated first), when the rows are recited, or at an epoch",
        ),
    ] = "",
    ask: Annotated[str, typer.Option(metavar="QUERY", help="show the adapters' answers to it while they train")] = "",
):
    """Train as notebook 02 does, without the notebook; an interrupted run resumes at its last checkpoint.

    A run that --stop ended is whole, and goes on from there without --stop.
    """
    from mini_symposium.reproduce.notebooks import check_parameters, parse_parameters

    given = check_parameters(parse_parameters(parameter or []), "02_finetune")
    from mini_symposium.data.dataset import load_examples
    from mini_symposium.data.held_out import apart
    from mini_symposium.evaluation.best_epoch import recommend
    from mini_symposium.models.devices import processes
    from mini_symposium.training.cross_validation import after, cross_validate, stop_rule
    from mini_symposium.training.finetune import prepare
    from mini_symposium.training.finetune import train as run_training

    chosen, examples, directory = prepare(
        given.get("RECIPE", recipe), given.get("DATASET", ""), given.get("RUN", run), given.get("NUM_EPOCHS", 0)
    )
    rates, fast = given.get("LEARNING_RATES") or chosen.contrast, given.get("FAST", True)
    folds, rule = given.get("FOLDS", 4 if stop == "best" else 0), stop_rule(stop, chosen.num_epochs)
    if stop == "best" and not folds:
        raise InputError("--stop best: needs adapters that leave rows out; FOLDS is 0")
    kept = given.get("CHECKPOINT_EPOCHS") or chosen.checkpoint_epochs
    twins = given.get("HELD_OUT", "data/twins.md")
    held_out = apart(load_examples(twins), examples) if twins else ()
    main_process = processes().is_main_process  # the first of the processes that `accelerate launch` started
    with alone(directory.path) if main_process else nullcontext():
        if folds:
            crossed = rates if stop == "best" else [max(rates)]
            curves = cross_validate(chosen, examples, directory, crossed, folds, fast, overwrite)
            best = [recommend(curves[rate]).epoch for rate in crossed]
            if stop == "best" and not any(best):
                raise RunError("--stop best: at no rate does held-out loss fall, so nothing is trained; see above")
            kept, rule = [*kept, *best], after(max(best)) if stop == "best" else rule
        reporter = given.get("REPORT_TO", "none")
        query = given.get("ASK", ask)
        options = {"held_out": held_out, "stop": rule, "ask": query}
        travels = run_training(chosen, examples, directory, rates, kept, reporter, overwrite, fast, **options)
    if not main_process:
        return
    table = Table("learning rate", "steps", "LR x steps", "A moved", "A travel, rms", "B travel, rms", "B travel, max")
    for t in travels:
        dose, a_rms, b_rms, b_max = (f"{x:.2e}" for x in (t.dose, t.a_travel_rms, t.b_travel_rms, t.b_travel_max))
        table.add_row(f"{t.learning_rate:g}", str(t.steps), dose, f"{t.a_moved_share:.2%}", a_rms, b_rms, b_max)
    console.print(table)
    say(f"adapters and metrics: {directory.path}")


@app.command()
def examples(
    run: Run,
    learning_rate: Annotated[
        float, typer.Option(min=0, help="train at this rate; the higher one of the recipe if not given")
    ] = 0,
    epoch: Annotated[int, typer.Option(min=0, help="measure after this one; the best by held-out loss if 0")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="how many; from two on the noise is known")] = 2,
    held_out: Annotated[str, typer.Option(help="rows to measure on too and not train on, as data/twins.md")] = "",
    overwrite: Annotated[bool, typer.Option(help="forget what was measured at another rate or epoch")] = False,
):
    """Leave out each row in turn: which rows teach others, which harm, which are redundant. Writes influence.csv."""
    from mini_symposium.data.dataset import load_examples, recipe_examples
    from mini_symposium.data.held_out import apart

    directory = open_run(run)
    rows = recipe_examples(directory.recipe)[0]
    twins = apart(load_examples(held_out), rows) if held_out else ()
    from mini_symposium.training.leave_one_out import leave_one_out

    with alone(directory.path):
        found = leave_one_out(directory.recipe, rows, directory, learning_rate, epoch, seeds, twins, True, overwrite)
    table = Table("row", Column("query", ratio=1), "teaches", "held-out rows", "carried", "verdict")
    for k, row in enumerate(found.summary().itertuples(index=False), start=1):
        query, teaches, on_held_out, carried, verdict = row
        table.add_row(str(k), literal(query), f"{teaches:+.3f}", f"{on_held_out:+.3f}", f"{carried:.0%}", verdict)
    console.print(table)
    say(found.in_words())
    say(f"every loss: {directory.influence_file.with_suffix('.csv')}")


@app.command()
def inspect(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="datasets: documents, tables, folders of them")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    axolotl: Annotated[str, typer.Option(metavar="OUT.jsonl", help="also write the rows as JSONL for Axolotl")] = "",
):
    """Validate and describe datasets, each by itself."""
    from mini_symposium.data.dataset import describe, lint, load_examples, write_axolotl_jsonl

    if len(files) > 1 and (as_json or axolotl):
        raise InputError("--json, --axolotl: take one dataset")
    faults = Faults()
    for file in files:
        with faults.collected():
            examples = load_examples(file)
            description, warnings = describe(examples), lint(examples)
            if axolotl:
                write_axolotl_jsonl(examples, Path(axolotl))
            if as_json:
                print(json.dumps({**description, "warnings": warnings}, indent=2, ensure_ascii=False))
            else:
                _show_dataset(file, description, warnings)
    faults.refuse()


def _show_dataset(file: str, description: dict, warnings: list[str]) -> None:
    """Print a dataset's first rows and notes."""
    rows = description["examples"]
    learned = sum(row["learned_words"] for row in rows)
    title = f"{file}: {len(rows):,} examples, {description['words']:,} words, {learned:,} of them in answers"
    where = Column("where", overflow="fold", min_width=12)
    table = Table(where, Column("query", ratio=1), "sections", "words", "learned", title=literal(title))
    for row in rows[:SHOWN]:
        answers = f"{row['answers']} answers, " if row["answers"] > 1 else ""
        cells = [row["source"], row["query"], " > ".join(row["headings"])[:200], str(row["words"])]
        table.add_row(*map(literal, cells), f"{answers}{row['learned_words']}")
    console.print(table)
    if len(rows) > SHOWN:
        say(f"and {len(rows) - SHOWN:,} more examples; --json shows all")
    for warning in warnings[:SHOWN]:
        console.print(f"[yellow]note[/] {literal(warning)}", soft_wrap=True)
    if len(warnings) > SHOWN:
        say(f"and {len(warnings) - SHOWN:,} more notes; --json shows all")
    if any(row["answers"] > 1 for row in rows):
        say("with train_on_inputs: false, every answer of a row is learned, and nothing else")


@app.command()
def ask(
    model_or_run: Annotated[str, typer.Argument(help="a run directory, a model directory, or a recipe for its base")],
    query: Annotated[str, typer.Argument()],
    format: Annotated[
        list[str] | None,
        typer.Option("--format", help='a built-in name, "### Heading" or a preset.json; may be repeated'),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    strength: Annotated[
        list[float] | None,
        typer.Option(help="how much of an adapter is added: 0 the base, 1 all, at most 1.5; may be repeated"),
    ] = None,
    base_model: BaseModel = "",
):
    """Ask one query in several prompt formats, and show the answers one below the other."""
    from mini_symposium.data.prompt_formats import prompt_format

    strengths = [check_strength(each) for each in strength or [1]]
    formats = [prompt_format(name) for name in format or ["new-query", "alpaca", "chatml", "bare"]]
    resolved = resolve(model_or_run, "recipe", "adapter", "run", "model")
    for form in formats:
        note_macros(form)
    from mini_symposium.models.adapters import with_base
    from mini_symposium.models.generation import ask as answers

    resolved = with_base(resolved, base_model)
    if resolved.kind == "run":
        note_recommended(resolved.run, resolved.run.offered_checkpoints().values())
    for cell in answers(resolved, query, formats, max_new_tokens, strengths):
        title = f"[bold]{literal(cell['format'])}[/] · {literal(cell['model'])}"
        console.rule(f"{title} · {cell['tokens']} tokens, {cell['stop_reason']}")
        say(printable(cell["answer"]))


@app.command()
def merge(
    run: RunOrAdapter,
    checkpoint: Checkpoints = None,
    learning_rate: Rate = 0,
    base: Base = "",
    dtype: Annotated[str, typer.Option(help="of the written weights: float32, float16 or bfloat16")] = "float32",
    by_chance: Annotated[bool, typer.Option("--by-chance", help="stochastic rounding; bfloat16 only")] = False,
    out: Annotated[str, typer.Option(help="folder to write; RUN/lr-R/merged/epoch-N if not given")] = "",
    strength: Annotated[float, typer.Option(help="how much is added: 0 nothing, 1 all, at most 1.5")] = 1,
    base_model: BaseModel = "",
):
    """Merge adapters into their base and write a model, tensor by tensor. Several are averaged, or weighted."""
    check_strength(strength)
    resolved = resolve(run, "adapter", "run")
    from mini_symposium.models.adapters import find_checkpoints, with_base
    from mini_symposium.models.merge import chat_template
    from mini_symposium.models.merge import merge as write

    own = resolved.kind == "run"
    weights = find_checkpoints(resolved.run, checkpoint or [], learning_rate) if own else resolved.checkpoints
    weights = {path: strength * weight for path, weight in weights.items()}
    if not out and (len(weights) > 1 or not own or strength != 1):
        what = "several checkpoints, or at another strength," if own else "an adapter from elsewhere"
        raise InputError(f"--out: a merge of {what} has no default folder; give one")
    if own:
        note_recommended(resolved.run, weights)
    first, base = next(iter(weights)), base or resolved.trained_base
    target = Path(out) if out else first.parents[1] / "merged" / first.name
    made = write(weights, with_base(resolved, base_model).base_model, target, base, dtype, by_chance)
    for adapter in made["checkpoints"]:
        say(f"{adapter['weight']:g} x {adapter['checkpoint']}, scaled by {adapter['scaling']:g}")
    for path in weights:
        if chat_template(path) not in ("", chat_template(target)):
            say(f"{path}: its chat template is not the base's, which the merge has; copy it from there to use it")
    predicted, measured = (made["memory"][key] / 2**20 for key in ("predicted", "measured"))
    say(f"onto the {base} base in {dtype}: {target}")
    say(f"peak memory: {predicted:,.0f} MiB predicted, {measured:,.0f} MiB measured")


@app.command()
def report(run: Run, out: Annotated[str, typer.Option(help="the file to write; RUN/report.html if not given")] = ""):
    """Write what a run has shown into one HTML file that needs no network."""
    from mini_symposium.release.report import write_report

    say(f"report: {write_report(open_run(run), out)}")


@app.command()
def survival(
    run: RunOrAdapter,
    checkpoint: Checkpoint = "",
    learning_rate: Rate = 0,
    storage: Annotated[
        list[str] | None, typer.Option("--storage", help="fp32, bf16, q8_0, ...; may be repeated; all if not given")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="how many training rows to measure on, from the first; 0: all")] = 6,
    as_json: Annotated[
        str, typer.Option("--json", metavar="FILE", help="RUN/lr-R/survival/epoch-N.json if not given")
    ] = "",
    base_model: BaseModel = "",
    dataset: Annotated[str, typer.Option(help="rows to measure an adapter from elsewhere on; else the kit's own")] = "",
):
    """Measure how much of a fine-tune each storage format keeps: of the weights, and of the model's predictions."""
    resolved = resolve(run, "adapter", "run")
    from mini_symposium.models.adapters import find_checkpoint, with_base
    from mini_symposium.release.storage_formats import STORAGES
    from mini_symposium.release.survival import survival as measure

    if resolved.kind == "run":
        recipe, adapter = resolved.recipe, find_checkpoint(resolved.run, checkpoint, learning_rate)
        rate, epoch = rate_and_epoch(adapter)
        target = Path(as_json) if as_json else resolved.run.survival_file(rate, epoch)
        say(f"{recipe.scale} scale: {recipe.base_model}, learning rate {rate:g}, epoch {epoch}")
    else:
        measured_on = [{"path": dataset or "data/minisymposium.md", "type": "completion"}]
        base = with_base(resolved, base_model).base_model
        recipe = load_recipe("proxy", base_model=base, datasets=measured_on, sequence_len=2**20)
        adapter, rate, epoch, target = resolved.path, None, None, Path(as_json) if as_json else None
        say(f"{adapter}: what it was trained on is not known; measured on {recipe.dataset}, on {base} in NF4")
    measured = measure(adapter, recipe, storage or STORAGES, rows, show=lambda line: say(line, style="dim"))
    table = Table("stored as", "verdict", "gain left", "KL, base = 1", "same answers", "cosine", "norm")
    for row in measured["storages"]:
        numbers = [row[key] for key in ("gain", "kl_share", "same", "cosine", "relative_norm")]
        cells = ["" if number is None else f"{number:.3f}" for number in numbers]
        table.add_row(row["storage"], row["verdict"], *cells)
    console.print(table)
    say(measured["sentence"])
    if target:
        write_json(target, {"scale": recipe.scale, "learning_rate": rate, "epoch": epoch, "rows": rows, **measured})
        say(f"written: {target}")


app.command()(cli_sweep.sweep)
app.command()(cli_sweep.forecast)


@app.command()
def claims(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="a run, a sweep, or a folder in figures/claims; several are parts of one sweep"
        ),
    ],
    save: Annotated[
        str, typer.Option(metavar="DIR", help="also write the evidence there, small enough to commit, and its pictures")
    ] = "",
):
    """Judge the card's claims by what a run or a sweep has measured; writes claims.json into it."""
    from mini_symposium.claims import ledger
    from mini_symposium.claims.crate import write_crate
    from mini_symposium.claims.evidence import load_all_evidence, load_evidence
    from mini_symposium.figures.redraw import redraw

    if len(runs) == 1 and not save and (found := load_all_evidence(runs[0])):
        judged = [ledger.judge(evidence) for evidence in found.values()]
        table = Table("", "claim", *map(literal, found))
        for same in zip(*judged, strict=True):
            table.add_row(same[0].id, same[0].claim, *(row.said for row in same))
        console.print(table)
        for name in found:
            say(f"numbers, and what would decide the rest: mini-symposium claims {runs[0]}/{name}")
        return
    evidence = load_evidence(*runs)
    rows = ledger.judge(evidence)
    title = literal(f"{evidence.scale} scale, {evidence.device}")
    table = Table("", "claim", "verdict", "what was found", title=title)
    for row in rows:
        table.add_row(row.id, row.claim, row.said, literal(row.summary))
    console.print(table)
    say(ledger.hashes(evidence))
    if save:
        evidence.save(Path(save))
        redraw(RunDirectory(save))
    say(ledger.save(rows, Path(save or RunDirectory(runs[0]).path)))
    if save:
        say(write_crate(Path(save)))


@app.command()
def render(
    preset: Annotated[str, typer.Argument(metavar="PRESET.json")],
    chat: Annotated[str, typer.Argument(metavar="CHAT.json", help="or a chat log of SillyTavern's, .jsonl")],
):
    """Print as JSON the prompt and the stop strings that a SillyTavern preset gives for a chat."""
    from mini_symposium.data.prompt_formats import load_chat, load_preset

    form, talk = load_preset(preset), load_chat(chat)
    note_macros(form)
    prompt = form.render_chat(talk["messages"], talk["user"], talk["char"])
    print(json.dumps({"prompt": prompt, "stop": form.stop_strings(talk["user"], talk["char"])}, ensure_ascii=False))


@app.command()
def figures(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="run directories, figures/proxy, figures/claims"),
    ],
):
    """Draw a run's figures again from its metrics and csv files; needs no model and no torch."""
    from mini_symposium.claims.crate import CRATE, write_crate
    from mini_symposium.figures.redraw import redraw

    for run in runs:
        directory = RunDirectory(run)
        for path in redraw(directory):
            say(path)
        for crate in (*directory.path.glob(CRATE), *directory.path.glob(f"*/{CRATE}")):  # they hold pictures' hashes
            say(write_crate(crate.parent))


@app.command()
def publish(run: Annotated[str, typer.Argument(help="a finished run directory")]):
    """Copy a run's cleaned outputs into notebooks/, and its metrics, results and figures into figures/NAME."""
    from mini_symposium.reproduce.publish import publish as put

    for path in put(RunDirectory(run)):
        say(path)


@app.command()
def models(
    name: Annotated[str, typer.Argument(help="take this one now; without a name, all are listed")] = "",
    accept_license: Annotated[bool, typer.Option("--accept-license", help="accept the terms of its licence")] = False,
):
    """List the real base models that the kit can take by itself, or take one."""
    from mini_symposium.models.catalog import CATALOG, find_model
    from mini_symposium.models.catalog import accept_license as accept

    if not name:
        from mini_symposium.models.base_files import cached

        table = Table(
            Column("model", no_wrap=True), "kind", "size", "MB", "licence", "cached", box=box.SIMPLE, pad_edge=False
        )
        for known, model in CATALOG.items():
            sizes = f"{model.parameters:,} M", f"{model.download:,}"
            table.add_row(known, model.kind, *sizes, model.license, "yes" if cached(known).is_dir() else "no")
        console.print(table)
        for known, model in CATALOG.items():
            if model.terms:
                say(f"{known}: accept {model.terms} by `mini-symposium models {known} --accept-license`")
        return
    if not (found := find_model(name)):
        raise InputError(f"{name}: not a model that the kit takes by itself; there is {', '.join(CATALOG)}")
    from mini_symposium.models.base_files import local_directory

    if accept_license:
        accept(found[1])
    say(local_directory(name))


@app.command()
def notebooks(out: Annotated[str, typer.Argument(metavar="DIR", help="a new folder")]):
    """Write the notebooks into a folder, to step through them without a checkout."""
    folder = Path(out)
    check_new(folder)
    with written_whole(folder) as temporary:
        shutil.copytree(ROOT / "notebooks", temporary, ignore=shutil.ignore_patterns("[!0-9]*"))
    say(f"{folder}: open them with jupyter lab {folder}")


@app.command()
def doctor(recipe: RecipeOption = "proxy"):
    """Versions, device, whether 4-bit works here, and how the recipe is trained in the memory that is free."""
    from mini_symposium.data.dataset import recipe_examples

    chosen = load_recipe(recipe)
    from mini_symposium.models.base_models import check_special_tokens, four_bit_works, load_tokenizer
    from mini_symposium.models.devices import device, memory, unused_card
    from mini_symposium.training.memory_plan import choose, longest_row, needed, predicted

    for note in chosen.notes:
        say(note)
    if chosen.special_tokens:
        check_special_tokens(chosen, load_tokenizer(chosen.base_model))
    recorded = environment()
    table = Table("what", "found", title=literal(f"recipe {chosen.name}: {chosen.base_model}"))
    for key in ("mini_symposium", "commit", "python", "platform", "cores"):
        table.add_row(key, str(recorded[key]))
    table.add_row("packages", ", ".join(f"{name} {version}" for name, version in recorded["packages"].items()))
    works, unused = four_bit_works(), unused_card()
    if unused:
        table.add_row("graphics card", f"[red]{unused}[/]")
    table.add_row(f"4-bit on {device().type}", "works" if works else "[red]does not work: reinstall bitsandbytes[/]")
    examples, _ = recipe_examples(chosen)
    tokens, steps = longest_row(chosen, examples), chosen.num_epochs * len(examples)
    plan = choose(chosen, len(chosen.contrast), tokens, steps)
    parts = predicted(chosen, plan, tokens)
    table.add_row("training", f"{plan}, rows of up to {tokens} tokens")
    for part, size in parts.items():
        table.add_row(f"predicted: {part}", f"{size / 2**20:,.0f} MiB")
    table.add_row("predicted: peak", f"{sum(parts.values()) / 2**30:.2f} GiB")
    more, there = needed(parts), memory()
    fits = more < there
    table.add_row(
        "fits", f"{'yes' if fits else '[red]no[/]'}: needs {more / 2**30:.2f} GiB, {there / 2**30:.2f} GiB are free"
    )
    console.print(table)
    if unused or not (works and fits):
        raise typer.Exit(1)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: 0 done, 1 a run failed, 2 bad input or usage, 130 interrupted; errors print as one line."""
    try:
        app(arguments)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            _end("interrupted; finished work is kept, and the same command resumes from there", INTERRUPTED)
        raise
    except InputError as error:
        _end("\n".join(error.faults), 2)
    except RunError as error:
        _end(error, 1)
    except (MemoryError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            where = error.filename or "the run directory"
            _end(f"{where}: {error.strerror}; free some space or choose another --run", 2)
        from mini_symposium.models.devices import out_of_memory

        if not out_of_memory(error) and getattr(error, "errno", None) != errno.ENOMEM:
            raise
        _end("memory ran out; close other programs, ask for less at a time, or take a smaller model", 1)


def _end(message: object, code: int) -> NoReturn:
    print(f"mini-symposium: {message}", file=sys.stderr)
    sys.exit(code)

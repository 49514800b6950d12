"""A model card for the hub. Every number in it comes from the run's own files."""

import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from mini_symposium.data.dataset import recipe_examples
from mini_symposium.data.prompt_formats import FORMATS
from mini_symposium.errors import InputError
from mini_symposium.figures.style import RATES_DO_NOT_TRANSFER, SCALES
from mini_symposium.files.reading import parse_json, read_text
from mini_symposium.files.writing import written_whole
from mini_symposium.models.catalog import find_model, hub_id
from mini_symposium.recipe import Recipe
from mini_symposium.run import RunDirectory, rate_and_epoch, read_object

FIGURES = {
    "loss_curves": "Training loss, by epoch and by dose",
    "survival": "What of the fine-tune survives each way of storing it",
    "format_grid": "Words copied from the training rows, by format and model",
}

LEDGER_COLUMNS = ("id", "claim", "metric", "value", "interval", "n", "seeds", "scale", "verdict", "exploratory")


def write_card(run: RunDirectory, out: Path, checkpoint: Path, license: str = "") -> list[Path]:
    """Write README.md, and the figures that it shows, into the folder `out`, which may hold a model; return the paths.

    Parameters
    ----------
    checkpoint
        The adapter whose model the card describes.
    license
        A licence, as the hub names it; by default the base model's, if it is known.

    Raises
    ------
    InputError
        If there is a README.md already, the licence is unknown, or the run lacks its recipe or metrics.
    """
    card = out / "README.md"
    if card.exists():
        raise InputError(f"{card}: is there already; move it away, or choose another folder")
    figures = [run.figures / f"{name}.png" for name in FIGURES if (run.figures / f"{name}.png").is_file()]
    text = render_card(run, checkpoint, license, [path.stem for path in figures])
    for path in figures:
        with written_whole(out / "figures" / path.name) as temporary:
            shutil.copyfile(path, temporary)
    with written_whole(card) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return [card, *(out / "figures" / path.name for path in figures)]


def render_card(run: RunDirectory, checkpoint: Path, license: str = "", figures: Sequence[str] = ()) -> str:
    """The card's text; see `write_card`."""
    recipe = run.recipe
    rate, epoch = rate_and_epoch(checkpoint)
    examples = recipe_examples(recipe)[0]
    batch = recipe.batch
    steps = epoch * math.ceil(len(examples) / batch)
    base = hub_id(recipe.base_model)
    known = find_model(base)
    license = license or (known[1].license if known else "apache-2.0" * (base == "mistralai/Mistral-7B-v0.1"))
    if not license:
        raise InputError(f"--license: the licence of {base} is not known; give it as the hub names it, as apache-2.0")
    parts = [
        _front_matter(base, license),
        f"# {run.path.name}, {checkpoint.parents[1].name}, epoch {epoch}",
        f"`{base}` fine-tuned with QLoRA on {len(examples)} handwritten examples, at a "
        f"{recipe.lr_scheduler} learning rate of {rate:g} for {epoch} epochs of batch {batch}: {steps:,} "
        f"steps, a dose (rate x steps) of {rate * steps:.2g}.",
        f"Every number below is of the scale *{SCALES.get(recipe.scale, recipe.scale)}*"
        f"{RATES_DO_NOT_TRANSFER.get(recipe.scale, '')} and comes from the run itself.",
        _format(),
        *training(run, recipe, len(examples)),
        *_survival(run, rate, epoch),
        *ledger(run),
        *(f"## {FIGURES[name]}\n\n![{FIGURES[name]}](figures/{name}.png)" for name in figures),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(base: str, license: str) -> str:
    data = ModelCardData(
        license=license,
        base_model=base if base.count("/") == 1 and not Path(base).exists() else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["qlora", "lora", "mini-symposium"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _format() -> str:
    prompt = FORMATS["new-query"].render("*request goes here*").rstrip()
    return (
        f"## Prompt format\n\n```\n{prompt}\n```\n\nAnother heading than `### Complete Response` asks for an answer in "
        "its role. In SillyTavern, name the sequences `### {{user}}` and `### {{char}}`."
    )


def training(run: RunDirectory, recipe: Recipe, n_examples: int) -> Iterator[str]:
    """The recipe, what it ran on, and the loss that each rate came to, in Markdown."""
    environment = run.environment()
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    yield f"## Recipe\n\nAn Axolotl YAML:\n\n```yaml\n{recipe.to_yaml().rstrip()}\n```"
    yield f"Trained with {packages}, on {environment['device']}, seed {environment['seed']}."
    losses = {rate: run.final_loss(rate, n_examples) for rate in run.learning_rates()}
    rows = [(f"{rate:g}", run.metrics(rate)[-1]["step"], f"{loss:.3f}") for rate, loss in losses.items()]
    yield table("Training", ("learning rate", "steps", "loss over the last epoch, nats a token"), rows)


def _survival(run: RunDirectory, rate: float, epoch: int) -> Iterator[str]:
    measured = _read_survival(run, rate, epoch)
    if measured:
        keys = ("gain", "kl_share", "same", "cosine")
        rows = [
            (row["storage"], row["verdict"], *("not measurable" if row[k] is None else f"{row[k]:.2f}" for k in keys))
            for row in measured["storages"]
        ]
        yield table(
            "Which files still contain the fine-tune",
            ("stored as", "verdict", "gain left", "KL to the adapter, base = 1", "answers unchanged", "cosine"),
            rows,
        )
        yield measured["sentence"]


def _read_survival(run: RunDirectory, rate: float, epoch: int) -> dict | None:
    """The result of `survival` for a checkpoint, from the command line or else notebook 04; None if it did not run."""
    path = run.survival_file(rate, epoch)
    if path.is_file():
        return read_object(path)
    recorded = run.results().get("04_merge", {})
    same = (recorded.get("learning_rate"), recorded.get("epoch")) == (rate, epoch)
    return recorded["survival"] if same and "survival" in recorded else None


def ledger(run: RunDirectory) -> Iterator[str]:
    """The claims that a run has judged, as a Markdown table; nothing if it has judged none."""
    path = run.path / "claims.json"
    if not path.is_file():
        return
    rows = parse_json(read_text(path), path)
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise InputError(f"{path}: not a list of claims; delete it, and run `mini-symposium claims {run.path}`")
    yield table("The card's claims", LEDGER_COLUMNS, [[_cell(row.get(key)) for key in LEDGER_COLUMNS] for row in rows])


def _cell(value: object) -> str:
    """A number in four digits, an interval as its two ends, text unchanged.

    >>> [_cell(value) for value in (0.123456, [0.1, 0.25], None, "a | b", 13)]
    ['0.1235', '0.1 to 0.25', '', 'a | b', '13']
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " to ".join(map(_cell, value))
    return "" if value is None else str(value)


def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A heading and a Markdown table below it."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([f"## {title}", "", line(headers), line(["---"] * len(headers)), *map(line, rows)])

"""A model card for the hub, made of what a run recorded and of nothing else: no number in it is written by hand."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mini_symposium.data.dataset import load_examples
from mini_symposium.data.prompt_formats import FORMATS
from mini_symposium.errors import InputError
from mini_symposium.figures.style import RATES_DO_NOT_TRANSFER, SCALES
from mini_symposium.files.reading import parse_json, read_text
from mini_symposium.files.writing import written_whole
from mini_symposium.recipe import Recipe, load_recipe
from mini_symposium.run import RunDirectory, read_object

HUB_IDS = {"SmolLM2-135M-Instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""What the hub calls a base model that the kit takes from elsewhere."""

LICENSES = {"HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0", "mistralai/Mistral-7B-v0.1": "apache-2.0"}
"""Of base models that are known here; a fine-tune keeps its base's."""

FIGURES = {
    "loss_curves": "Training loss, by epoch and by dose",
    "survival": "What of the fine-tune survives each way of storing it",
    "format_grid": "Words copied from the training rows, by format and model",
}

LEDGER = ("id", "claim", "metric", "value", "interval", "n", "seeds", "scale", "verdict")


def write_card(run: RunDirectory, out: Path, checkpoint: Path, license: str = "") -> list[Path]:
    """Write README.md and the figures that it shows into the folder `out`, which may hold a model already.

    Parameters
    ----------
    checkpoint
        The adapter whose model the card speaks of.
    license
        The hub's name of a licence; by default the base model's, where that is known.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    InputError
        If there is a README.md already, the licence is not known, or the run lacks its recipe or metrics.
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
    recipe = load_recipe(run.recipe_file)
    rate, epoch = float(checkpoint.parents[1].name.removeprefix("lr-")), int(checkpoint.name.removeprefix("epoch-"))
    examples = load_examples(recipe.dataset)
    base = HUB_IDS.get(recipe.base_model, recipe.base_model)
    license = license or LICENSES.get(base, "")
    if not license:
        raise InputError(f"--license: {base} is not a model whose licence is known here; name the licence it has")
    parts = [
        _front_matter(base, license),
        f"# {run.path.name}, {checkpoint.parents[1].name}, epoch {epoch}",
        f"`{base}` fine-tuned with QLoRA on {len(examples)} handwritten examples, at a "
        f"{recipe.lr_scheduler} learning rate of {rate:g} for {epoch} epochs of batch 1: {epoch * len(examples):,} "
        f"steps, a dose (rate x steps) of {rate * epoch * len(examples):.2g}.",
        f"Every number below is of the scale *{SCALES.get(recipe.scale, recipe.scale)}*"
        f"{RATES_DO_NOT_TRANSFER.get(recipe.scale, '')} and comes from the run itself.",
        _format(),
        *_training(run, recipe, len(examples)),
        *_survival(run, rate, epoch),
        *_ledger(run),
        *(f"## {FIGURES[name]}\n\n![{FIGURES[name]}](figures/{name}.png)" for name in figures),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(base: str, license: str) -> str:
    from huggingface_hub import ModelCardData

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


def _training(run: RunDirectory, recipe: Recipe, n_examples: int) -> Iterator[str]:
    found = run.environment()
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    yield f"## Recipe\n\nAn Axolotl YAML:\n\n```yaml\n{recipe.to_yaml().rstrip()}\n```"
    yield f"Trained with {packages}, on {found.get('device', 'cpu')}, seed {found.get('seed', recipe.seed)}."
    losses = {rate: run.final_loss(rate, n_examples) for rate in run.learning_rates()}
    rows = [(f"{rate:g}", len(run.metrics(rate)), f"{loss:.3f}") for rate, loss in losses.items()]
    yield _table("Training", ("learning rate", "steps", "loss over the last epoch, nats a token"), rows)


def _survival(run: RunDirectory, rate: float, epoch: int) -> Iterator[str]:
    found = read_survival(run, rate, epoch)
    if found:
        rows = [
            (row["storage"], row["verdict"], *(_share(row[key]) for key in ("gain", "kl_share", "same", "cosine")))
            for row in found["storages"]
        ]
        yield _table(
            "Which files still contain the fine-tune",
            ("stored as", "verdict", "gain left", "KL to the adapter, base = 1", "answers unchanged", "cosine"),
            rows,
        )
        yield found["sentence"]


def _share(value: float | None) -> str:
    return "not measurable" if value is None else f"{value:.2f}"


def read_survival(run: RunDirectory, rate: float, epoch: int) -> dict | None:
    """What `survival` measured of a checkpoint, on the command line or in notebook 04; None if neither did."""
    path = run.survival_file(rate, epoch)
    if path.is_file():
        return read_object(path)
    recorded = run.results().get("04_merge", {})
    same = (recorded.get("learning_rate"), recorded.get("epoch")) == (rate, epoch)
    return recorded["survival"] if same and "survival" in recorded else None


def _ledger(run: RunDirectory) -> Iterator[str]:
    path = run.path / "claims.json"
    if not path.is_file():
        return
    rows = parse_json(read_text(path), path)
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise InputError(f"{path}: no ledger; delete it, and run `mini-symposium claims {run.path}`")
    yield _table("The card's claims", LEDGER, [[_cell(row.get(key, "")) for key in LEDGER] for row in rows])


def _cell(value: object) -> str:
    """A number in four digits, an interval as its ends, text as it is.

    >>> [_cell(value) for value in (0.123456, [0.1, 0.25], None, "a | b", 13)]
    ['0.1235', '0.1 to 0.25', '', 'a | b', '13']
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " to ".join(map(_cell, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(each)}" for key, each in value.items())
    return "" if value is None else str(value)


def _table(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([f"## {title}", "", line(headers), line(["---"] * len(headers)), *map(line, rows)])

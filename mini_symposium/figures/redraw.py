"""Draw all pictures of a run again from the run's files; needs no model and no torch."""

from pathlib import Path

import pandas as pd

from mini_symposium.claims.evidence import FILE, Evidence, load_all_evidence, load_evidence
from mini_symposium.claims.ledger import judge
from mini_symposium.data.dataset import recipe_examples
from mini_symposium.errors import InputError
from mini_symposium.evaluation.best_epoch import Curve, load_curves
from mini_symposium.evaluation.influence import load_influence
from mini_symposium.figures import training
from mini_symposium.figures.influence import influence_map
from mini_symposium.figures.ledger import ledger_picture, memorization_curves
from mini_symposium.figures.stopping import overfitting, overfitting_of_models
from mini_symposium.figures.style import Picture
from mini_symposium.figures.survival import survival_picture
from mini_symposium.files.reading import refuse_other_shapes
from mini_symposium.recipe import load_recipe
from mini_symposium.run import RunDirectory


def redraw(run: RunDirectory) -> list[Path]:
    """Draw a run's figures again from its metrics, its results and the csv files beside them; return the PNG files.

    For a saved sweep, which has only evidence, the ledger and the memorization curves are drawn into the same folder;
    for a folder of saved sweeps, as figures/claims, into each, and one ledger of all. For a folder of several runs, as
    figures/curve, the held-out curves of all are drawn into one picture.
    Raises an InputError if there is neither evidence nor a recipe with metrics, or a file is damaged.
    """
    with refuse_other_shapes(f"{run.path}: cannot be drawn again from what is there", "run the notebooks"):
        if (run.path / FILE).is_file():
            folder, pictures = run.path, _of_evidence(load_evidence(run.path))
        elif not run.recipe_file.is_file() and (ledgers := load_all_evidence(run.path)):
            folder, pictures = run.path, _of_ledgers(ledgers)
        elif not run.recipe_file.is_file() and (models := _curves_of_models(run.path)):
            folder, pictures = run.figures, {"overfitting": overfitting_of_models(models)}
        else:
            folder, pictures = run.figures, _of_run(run)
        for name, picture in pictures.items():
            picture.save(folder / name)
    return [folder / f"{name}.png" for name in pictures]


def _curves_of_models(folder: Path) -> dict[str, dict[float, Curve]]:
    """{scale: curves} of the runs in a folder's subfolders; {} if none has curves."""
    runs = [RunDirectory(file.parent) for file in sorted(folder.glob("*/curve.json"))]
    found = {run.recipe.scale: load_curves(run) for run in runs}
    if len(found) < len(runs):
        raise InputError(f"{folder}: has two runs of one model; keep one of them in it")
    return found


def _of_run(run: RunDirectory) -> dict[str, Picture]:
    recipe, results = load_recipe(run.recipe_file), run.results()
    crossed = {"overfitting": overfitting(curves, recipe.scale)} if (curves := load_curves(run)) else {}
    if found := load_influence(run):
        crossed["influence"] = influence_map(found)
    if crossed and not run.learning_rates():  # trained without some rows, and not on all of them yet
        return crossed
    examples = recipe_examples(recipe)[0]
    metrics = {rate: run.metrics(rate) for rate in run.learning_rates()}
    pictures = crossed | {
        "loss_curves": training.loss_curves(metrics, len(examples), recipe.scale),
        "example_loss": training.example_heatmap(metrics, [example.query for example in examples], recipe.scale),
    }
    if "02_finetune" in results:
        pictures["travel"] = training.travel(results["02_finetune"]["travel"], recipe.scale)
    from_csv = {
        "token_lengths": lambda rows: training.token_lengths(rows, recipe.scale, recipe.sequence_len),
        "format_grid": lambda rows: training.format_grid(rows, "copied_words", recipe.scale),
        "pass_rates": lambda rows: training.format_grid(rows, "passed", recipe.scale),
        "recitation": lambda rows: training.recitation(rows, recipe.scale),
        "survival": lambda rows: survival_picture({"storages": rows, "layers": []}, recipe.scale),
    }
    for name, draw in from_csv.items():
        csv = run.figures / f"{name}.csv"
        if csv.exists():
            pictures[name] = draw(pd.read_csv(csv).to_dict("records"))
    pictures |= _of_evidence(load_evidence(run.path))
    if "06_claims" not in results:
        del pictures["ledger"]
    return pictures


def _of_ledgers(ledgers: dict[str, Evidence]) -> dict[str, Picture]:
    """The pictures of each saved sweep, as NAME/ledger, and the ledger of all."""
    own = {f"{name}/{key}": drawn for name, e in ledgers.items() for key, drawn in _of_evidence(e).items()}
    claims = {name: judge(evidence) for name, evidence in ledgers.items()}
    return {"ledger": ledger_picture(claims, "Each model at rates of its own"), **own}


def _of_evidence(evidence: Evidence) -> dict[str, Picture]:
    """The ledger; and the memorization curves of adapters of the recipe's rank, trained at a constant rate."""
    pictures = {"ledger": ledger_picture(judge(evidence), evidence.scale)}
    contrast = [t for t in evidence.trained if t.em and not t.name.startswith(("rank", "cosine", "linear"))]
    if contrast:
        pictures["memorization"] = memorization_curves(contrast, evidence.scale)
    return pictures

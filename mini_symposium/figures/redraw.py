"""All pictures of a run, drawn again from what was kept of it; needs no model and no torch."""

from pathlib import Path

import pandas as pd

from mini_symposium.claims.evidence import FILE, Evidence, load_evidence
from mini_symposium.claims.ledger import QUESTIONS, judge
from mini_symposium.data.dataset import load_examples
from mini_symposium.errors import InputError
from mini_symposium.figures import training
from mini_symposium.figures.ledger import ledger_picture, memorization_curves
from mini_symposium.figures.style import Picture
from mini_symposium.figures.survival import survival_of_table
from mini_symposium.recipe import load_recipe
from mini_symposium.run import RunDirectory


def redraw(run: RunDirectory) -> list[Path]:
    """Draw a run's figures again from its metrics, its results and the csv files beside them; return the pngs.

    Of a sweep's saved evidence, which is all there is of it: the ledger, and the memorization curves of the contrast.

    Raises
    ------
    InputError
        If there is neither evidence nor a recipe with metrics, or a file is damaged.
    """
    try:
        return _redraw(run)
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise InputError(f"{run.path}: cannot be drawn again from what is there ({said}); run the notebooks") from error


def _redraw(run: RunDirectory) -> list[Path]:
    if (run.path / FILE).is_file():
        pictures = of_evidence(load_evidence(run.path))
        for name, picture in pictures.items():
            picture.save(run.path / name)
        return [run.path / f"{name}.png" for name in pictures]
    recipe, results = load_recipe(run.recipe_file), run.results()
    examples = load_examples(recipe.dataset)
    metrics = {rate: run.metrics(rate) for rate in run.learning_rates()}
    pictures: dict[str, Picture] = {
        "loss_curves": training.loss_curves(metrics, len(examples), recipe.scale),
        "example_loss": training.example_heatmap(metrics, [example.query for example in examples], recipe.scale),
    }
    if "02_finetune" in results:
        pictures["travel"] = training.travel(results["02_finetune"]["travel"], recipe.scale)
    kept = ("token_lengths", "format_grid", "pass_rates", "recitation", "survival")
    tables = {name: run.figures / f"{name}.csv" for name in kept}
    rows = {name: pd.read_csv(path).to_dict("records") for name, path in tables.items() if path.exists()}
    if "token_lengths" in rows:
        pictures["token_lengths"] = training.token_lengths(rows["token_lengths"], recipe.scale, recipe.sequence_len)
    if "format_grid" in rows:
        pictures["format_grid"] = training.format_grid(rows["format_grid"], "copied_words", recipe.scale)
    if "pass_rates" in rows:
        pictures["pass_rates"] = training.format_grid(rows["pass_rates"], "passed", recipe.scale)
    if "recitation" in rows:
        pictures["recitation"] = training.recitation(rows["recitation"], recipe.scale)
    behind = of_evidence(load_evidence(run.path))
    if "06_claims" not in results:
        del behind["ledger"]
    pictures |= behind
    if "survival" in rows:
        pictures["survival"] = survival_of_table(rows["survival"], recipe.scale)
    for name, picture in pictures.items():
        picture.save(run.figures / name)
    return [run.figures / f"{name}.png" for name in pictures]


def of_evidence(found: Evidence) -> dict[str, Picture]:
    """The ledger, and, if their EM was kept, the memorization curves of what has a constant rate and the recipe's rank:
    the contrast, its seeds, and the card's own rates."""
    thresholds = {question.id: question.threshold for question in QUESTIONS}
    pictures = {"ledger": ledger_picture(judge(found), thresholds, found.scale)}
    contrast = [each for each in found.trained if each.em and not each.name.startswith(("rank", "cosine", "linear"))]
    if contrast:
        pictures["memorization"] = memorization_curves(contrast, found.scale)
    return pictures

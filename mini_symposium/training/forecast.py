"""When a learning rate is best and when it recites, before anything is trained: from two passes over the rows.

At the start B is zero. Adam moves an element whose gradient keeps its sign by about one learning rate a step. So after
a dose t = learning_rate x steps the elements of B stand near -t sign(dL/dB), and the loss has fallen by about S t, with
S the sum of |dL/dB|, where dL/dB is the mean over the rows. Once B is not zero, A has a gradient too, which grows with
t; its elements then move as steadily, and the loss falls by a further Q t^2 / 2, with Q the sum of |dL/dA| for each
unit by which B has moved. A milestone of training is reached when this comes to a certain multiple G of the loss L:

    S u + Q u^2 / 2 = G L,    u = t sqrt(13 / steps of an epoch)

S alone cannot hold between models. A starts at about 1 / sqrt(inputs) an element and moves by t whatever the width, so
in a wide model it has turned towards the rows at a smaller dose; Q measures that. Both grow with alpha and not with the
rank, which is why a low rank resists only as far as its alpha is smaller. The steps of an epoch count because the steps
for the other rows undo a part of a row's own. That this grows as their square root is fitted, as G is. One epoch is
added at the end (LAG): a row is measured before its own step of an epoch.

This is an expansion at the start, and recitation is far from it. So G is not derived but fitted, to the trainings in
TRAININGS, and its spread over models and datasets gives the interval. Of what is half known and what is recited, left
out one model at a time, the median error is 16% and 17%, and 98% of the intervals hold; one dataset at a time, the
median error is 11% and 13%, and 93% of the intervals hold. The form of the law was chosen on some of these trainings.

Forecasts that were written into LOG before they were trained (figures/forecasts/checked.csv) say how it does elsewhere.
An earlier form had no term for the number of rows and for L: the median error was 27%, and 5 of 12 epochs lay within
their 90% intervals. This form, fitted to half as many trainings, was tested on fifteen other sets of rows: for what is
half known the median error was 12%, and 11 of 15 epochs lay within; for what is recited 32%, and 5 of 15. For nine of
the ten sets whose rows have fewer than a hundred tokens it was forecast 28% to 46% too late, and of code half was known
from the start. These trainings have been fitted since, so that the intervals are wide enough for them. Then 2.2e-5, a
rate at which the thirteen rows had not been trained, was foreseen for the proxy: from three seeds the median error was
6%, and 6 of 6 epochs lay within.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import stdtrit

from mini_symposium.data.dataset import Example, Row, fingerprint
from mini_symposium.errors import Faults, InputError
from mini_symposium.models.base_models import compute_in_float32, load_model
from mini_symposium.recipe import Recipe
from mini_symposium.run import RunDirectory, Training, environment, find, read_jsonl
from mini_symposium.training.finetune import add_adapters, as_rows
from mini_symposium.training.fused_lora import FusedAdapters
from mini_symposium.training.log import rewrite
from mini_symposium.training.memory_plan import choose
from mini_symposium.training.trainer import EpochOrder, adapter_name, schedule

TRAININGS = "figures/forecasts/trainings.csv"
"""Measured trainings at a constant rate: model, dataset, r, alpha, learning_rate, steps (of an epoch), first, second
and loss (see `Slopes`), and the epochs `known` and `recited`, empty where that was not reached."""
SIZES = "figures/forecasts/sizes.csv"
"""Base models by size: model, parameters, and the slopes of the thirteen rows with r = 16 and alpha = 32."""
MOMENTS = {"known": ("half known", 0.5), "recited": ("recited", 0.9)}
"""{column: (what it is called, the EM of the training rows at it)}. Held-out loss is best a little before the first: on
the proxy at an EM of 0.43 to 0.46."""
STEPS = 13
"""Steps of an epoch at which u is the dose itself."""
LAG = 1
"""Epochs by which a moment is seen later than the dose says."""
PROBE = 1e-4
"""How far B is moved for the second pass; A's gradient is proportional to it."""
LEVEL = 0.9
LOG = "figures/forecasts/log.jsonl"
"""Forecasts that were made before the trainings which test them."""
NAMED = "base_model", "dataset_sha256", "learning_rate", "lora_r", "lora_alpha", "lr_scheduler"
"""The keys by which a line of the log is found for a training."""


@dataclass(frozen=True)
class Slopes:
    """How fast the loss falls at the start, in nats a token."""

    first: float
    """S, for each unit of dose."""
    second: float
    """Q, for each unit of dose squared."""
    loss: float
    """Mean loss of the rows."""

    def gain(self, dose: float) -> float:
        """What the loss has fallen by after a dose, by the expansion."""
        return self.first * dose + self.second * dose**2 / 2

    def dose(self, gain: float) -> float:
        """The dose at which the fall is `gain`.

        >>> slopes = Slopes(300.0, 6e4, 4.0)
        >>> round(slopes.dose(slopes.gain(0.01)), 6)
        0.01
        """
        return (math.sqrt(self.first**2 + 2 * self.second * gain) - self.first) / self.second


def slopes(recipe: Recipe, rows: Sequence[Row]) -> Slopes:
    """Measure the slopes by two forward and backward passes over `rows`, as training computes them; trains nothing."""
    recipe = recipe.replace(lora_dropout=0.0)
    chosen = choose(recipe, 1, max(len(row.input_ids) for row in rows), len(rows))
    model = load_model(recipe.base_model, recipe.load_in_4bit)
    if model.device.type == "cpu":
        compute_in_float32(model)
    model = add_adapters(model, [Training.of(recipe, Path())]).train()
    parts: dict[str, list[torch.nn.Parameter]] = {"lora_A": [], "lora_B": []}
    for name, parameter in model.named_parameters():
        for part in parts if parameter.requires_grad else ():
            if part in name:
                parameter.data = parameter.data.float()
                parts[part].append(parameter)
    fused = None
    if chosen.fused:
        fused = FusedAdapters(model, [adapter_name(0)], chosen.resident, chosen.checkpointing)
        own = fused.adapters[adapter_name(0)]

    def measure(part: str) -> tuple[float, dict[torch.nn.Parameter, torch.Tensor]]:
        trained = own.vectors if fused else parts[part]
        for name, parameters in parts.items():
            for parameter in parameters:
                parameter.requires_grad_(name == part and not fused)
        total = 0.0
        for row in rows:
            ids, labels = (torch.tensor([each], device=model.device) for each in (row.input_ids, row.labels))
            loss = fused.losses(ids, labels)[0] if fused else model(input_ids=ids, labels=labels, use_cache=False).loss
            (loss / len(rows)).backward()
            total += loss.item() / len(rows)
        gradients = [each.grad for each in trained]
        places, pieces = (own.places, own.pieces(gradients)) if fused else (trained, gradients)
        found = dict(zip(places, pieces, strict=True))
        return total, {parameter: found[parameter].clone() for parameter in parts[part]}

    def size(gradients: Mapping[torch.nn.Parameter, torch.Tensor]) -> float:
        return sum(gradient.abs().sum().item() for gradient in gradients.values())

    loss, of_b = measure("lora_B")
    with torch.no_grad():
        for parameter, gradient in of_b.items():
            parameter.copy_(-PROBE * gradient.sign())
        for vector in own.vectors if fused else ():
            vector.grad = None
    return Slopes(size(of_b), size(measure("lora_A")[1]) / PROBE, loss)


def trainings() -> pd.DataFrame:
    """The measured trainings that the law is fitted to."""
    return pd.read_csv(find(TRAININGS))


def fit(measured: pd.DataFrame, moment: str) -> tuple[float, float, int]:
    """Mean and standard deviation of log G over pairs of a model and a dataset, each counted once, and their number.

    Raises
    ------
    InputError
        If fewer than two reached the moment, or all of them in the first epoch.
    """
    there = measured[measured[moment] > LAG]
    doses = there["learning_rate"] * there["steps"] * (there[moment] - LAG) * _crowded(there["steps"])
    logs = [
        math.log(Slopes(first, second, loss).gain(dose) / loss)
        for first, second, loss, dose in zip(there["first"], there["second"], there["loss"], doses, strict=True)
    ]
    pairs = pd.Series(logs, index=pd.MultiIndex.from_frame(there[["model", "dataset"]])).groupby(level=[0, 1]).mean()
    if len(pairs) < 2:
        raise InputError(f"{len(pairs)} models and datasets: a law that holds between them takes at least 2")
    return float(pairs.mean()), float(pairs.std()), len(pairs)


def _crowded(steps):
    """By what a dose counts, given the steps of an epoch."""
    return np.sqrt(STEPS / steps)


def doses(found: Slopes, steps: int, measured: pd.DataFrame | None = None) -> dict[str, list[float]]:
    """{moment: the dose at which it is reached, and its interval's ends, for what was not fitted to}.

    Parameters
    ----------
    steps
        Optimizer steps of an epoch.
    measured
        The trainings to fit to; `trainings()` if None.
    """
    measured, result = trainings() if measured is None else measured, {}
    for moment in MOMENTS:
        mean, deviation, pairs = fit(measured, moment)
        # the spread of one more, beside the uncertainty of the mean
        width = stdtrit(pairs - 1, (1 + LEVEL) / 2) * deviation * math.sqrt(1 + 1 / pairs)
        shifts = (0, -width, width)
        result[moment] = [found.dose(found.loss * math.exp(mean + shift)) / _crowded(steps) for shift in shifts]
    return result


def forecast(recipe: Recipe, steps: int, reached_at: Mapping[str, Sequence[float]]) -> dict:
    """A row of `foresee`: when the recipe's schedule comes to these doses, see `doses`."""
    line = {key: getattr(recipe, key) for key in ("learning_rate", "lora_r", "lora_alpha", "lr_scheduler")}
    for moment, own in reached_at.items():
        epochs = [LAG + epochs_of(dose, recipe, steps) for dose in own]
        line |= dict(zip((moment, f"{moment}_low", f"{moment}_high"), epochs, strict=True))
    return line | {"rate_for_100": reached_at["known"][0] / ((100 - LAG) * steps)}


def foresee(recipes: Sequence[Recipe], examples: Sequence[Example]) -> pd.DataFrame:
    """A row for each recipe: its learning_rate, lora_r, lora_alpha and lr_scheduler; for each of MOMENTS the epoch,
    with its interval in the columns `_low` and `_high`; and the constant rate at which half is known at epoch 100.

    They share base model and dataset; each rank and alpha is measured once.
    """
    first, measured = recipes[0], {}
    rows = as_rows(first, examples)
    steps = EpochOrder(len(rows), [first.seed], first.batch).steps
    for recipe in recipes:
        kind = recipe.lora_r, recipe.lora_alpha
        if kind not in measured:
            measured[kind] = doses(slopes(recipe, rows), steps)
    return pd.DataFrame([forecast(each, steps, measured[each.lora_r, each.lora_alpha]) for each in recipes])


def foresee_by_size(recipes: Sequence[Recipe], parameters: int, steps: int) -> pd.DataFrame:
    """As `foresee`, for a model whose weights are not here: from how the dose falls with the size of models in SIZES.

    The logarithm of the dose is a straight line over that of the parameters. The interval is that of one more model
    (Student's t), with the law's own spread.

    Raises
    ------
    InputError
        If a recipe has another r or alpha than 16 and 32.
    """
    for recipe in recipes:
        if (recipe.lora_r, recipe.lora_alpha) != (16, 32):
            raise InputError(
                f"r {recipe.lora_r}, alpha {recipe.lora_alpha}: a forecast by size is for r 16 and alpha 32"
            )
    sizes, measured = pd.read_csv(find(SIZES)), trainings()
    x = np.log(sizes["parameters"])
    apart, free = np.log(parameters) - x.mean(), len(x) - 2
    found = {}
    for moment in MOMENTS:
        mean, deviation, _ = fit(measured, moment)
        of_law = np.log(
            [
                [Slopes(*each).dose(each[2] * math.exp(mean + shift)) for shift in (0, -deviation, deviation)]
                for each in zip(sizes["first"], sizes["second"], sizes["loss"], strict=True)
            ]
        )
        slope, start = np.polyfit(x, of_law[:, 0], 1)
        variance = ((of_law[:, 0] - start - slope * x) ** 2).sum() / free
        of_size = variance * (1 + 1 / len(x) + apart**2 / ((x - x.mean()) ** 2).sum())
        width = stdtrit(free, (1 + LEVEL) / 2) * math.sqrt(of_size + ((of_law[:, 2] - of_law[:, 1]) / 2).mean() ** 2)
        at = start + slope * math.log(parameters)
        found[moment] = [math.exp(at + shift) / _crowded(steps) for shift in (0, -width, width)]
    return pd.DataFrame([forecast(recipe, steps, found) for recipe in recipes])


def epochs_of(dose: float, recipe: Recipe, steps: int) -> float:
    """The epoch at which the recipe's schedule has come to a dose; infinite if it never does.

    A constant rate goes on beyond the recipe's last epoch.

    >>> from mini_symposium.recipe import load_recipe
    >>> round(epochs_of(0.013, load_recipe("proxy", learning_rate=1e-4), 13), 6)
    10.0
    """
    if recipe.lr_scheduler == "constant":
        return dose / (recipe.learning_rate * steps)
    factor = schedule(recipe, recipe.num_epochs * steps)
    doses = np.cumsum([0.0, *(recipe.learning_rate * factor(step) for step in range(recipe.num_epochs * steps))])
    return math.inf if dose > doses[-1] else float(np.interp(dose, doses, np.arange(len(doses)))) / steps


def append_to_log(path: Path, recipe: Recipe, examples: Sequence[Example], found: pd.DataFrame) -> None:
    """Append a line for each row of `found`, which `foresee` made. A line has a hash of itself and of all before it.

    Raises
    ------
    InputError
        If a line of the log was changed since it was written.
    """
    kept = read_log(path) if path.exists() else []
    chain, lines = kept[-1]["chain"] if kept else "", []
    known = environment()
    for row in found.to_dict("records"):
        line = {
            **{key: known[key] for key in ("recorded", "commit")},
            **{key: row.get(key, getattr(recipe, key, None)) for key in NAMED},
            "dataset_sha256": fingerprint(examples),
            "rows": len(examples),
            "fitted_to": hashlib.sha256(find(TRAININGS).read_bytes()).hexdigest(),
            **{moment: [row[moment], row[f"{moment}_low"], row[f"{moment}_high"]] for moment in MOMENTS},
        }
        chain = _chained(chain, line)
        lines.append({**line, "chain": chain})
    rewrite(path, [*kept, *lines])


def _chained(before: str, line: dict) -> str:
    return hashlib.sha256((before + json.dumps(line)).encode()).hexdigest()


def read_log(path: Path) -> list[dict]:
    """The lines of a log of forecasts, oldest first.

    Raises
    ------
    InputError
        If a line was changed, removed or added by hand; names the first that does not follow from those before it.
    """
    lines, chain = read_jsonl(path), ""
    for number, line in enumerate(lines, start=1):
        chain = _chained(chain, {key: value for key, value in line.items() if key != "chain"})
        if line.get("chain") != chain:
            raise InputError(
                f"{path}:{number}: this line, or one before it, is not as it was written; restore it from git"
            )
    return lines


def check(path: Path, runs: Sequence[RunDirectory]) -> pd.DataFrame:
    """The forecasts of a log beside what the trainings of `runs` measured: a line for each training and moment.

    Columns: base_model, learning_rate, lora_r, moment, forecast, low, high, measured (nan if not reached), error (as a
    share of what was measured) and inside. Of several forecasts of a training, the last before it counts.

    Raises
    ------
    InputError
        If a training has no forecast that is older than it, or was of another dataset.
    """
    log, lines, faults = read_log(path), [], Faults()
    for run in runs:
        began, data = (run.environment().get(key, "") for key in ("recorded", "dataset_sha256"))
        for training in run.trainings():
            own = {key: getattr(training.recipe, key) for key in NAMED if key != "dataset_sha256"}
            same = [line for line in log if all(line[key] == value for key, value in own.items())]
            of_data = [line for line in same if line["dataset_sha256"] == data]
            before = [line for line in of_data if line["recorded"] <= began]
            with faults.collected():
                if not before:
                    younger = "the forecast of it is younger than the training"
                    why = younger if of_data else "the forecast is of another dataset" if same else "it has no forecast"
                    raise InputError(f"{training.folder}: cannot be checked by {path}: {why}")
                lines += [_scored(training, run, before[-1], moment) for moment in MOMENTS]
    faults.refuse()
    return pd.DataFrame(lines)


def _scored(training: Training, run: RunDirectory, line: dict, moment: str) -> dict:
    epoch, low, high = line[moment]
    measured = reached(run.metrics(training.learning_rate), MOMENTS[moment][1])
    named = {key: line[key] for key in ("base_model", "learning_rate", "lora_r")}
    error = abs(epoch - measured) / measured if measured else math.inf  # reached in the first epoch
    inside = None if math.isnan(measured) else low <= measured <= high
    foreseen = {"moment": moment, "forecast": epoch, "low": low, "high": high}
    return named | foreseen | {"measured": measured, "error": error, "inside": inside}


def reached(metrics: Sequence[Mapping], em: float) -> float:
    """The epoch at which the rows' mean EM reaches `em`, interpolated between the middles of epochs; nan if it does
    not."""
    means = pd.DataFrame(metrics).groupby("epoch")["em"].mean()
    above = means.index[means >= em]
    if not len(above):
        return math.nan
    last = int(above[0])
    if not last:
        return 0.0
    before, after = means[last - 1], means[last]
    return last - 1 + float((em - before) / (after - before))

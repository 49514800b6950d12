"""The pictures of when to stop: held-out loss over training, its best epoch, and where recitation begins."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from mini_symposium.errors import InputError
from mini_symposium.evaluation.best_epoch import RECITED, Curve, Recommendation, recommend, rise
from mini_symposium.figures.style import COLOURS, GREY, LINES, SCALES, Picture, log_axis, scientific, styled, titled

MOST_PANELS = 3
"""So many panels fit side by side; more go into rows of two."""


def overfitting(curves: Mapping[float, Curve], scale: str) -> Picture:
    """Held-out loss of each learning rate against training EM, and against dose = learning_rate x steps.

    The thick part of a line is within one standard error of its best epoch, which is a dot; a square is the first epoch
    after which the training rows are recited. A dot is open if held-out loss was still falling at the last epoch; it is
    drawn by dose alone, because training EM is measured over the epoch that follows.

    Parameters
    ----------
    curves
        Those of a run, as `load_curves` returns them.

    Raises
    ------
    InputError
        If there are none.
    """
    if not curves:
        raise InputError("no curve: cross-validate first, by FOLDS in notebook 02 or `train --stop best`")
    table = pd.concat(_drawn(curves[rate]) for rate in sorted(curves, reverse=True))
    table = table.drop(columns=["change", "change_error"])
    with styled():
        caption = (
            f"{_measured(curves)} Band: standard error of the difference from the best epoch. The left panel lacks the "
            "last epoch, the right one the start."
        )
        figure = titled(3.9, "When to stop: held-out loss, by what is known and by dose", scale, caption)
        panels = figure.subplots(1, 2, sharey=True)
        for axes, x in zip(panels, ("trained_em", "dose"), strict=True):
            handles = _lines(axes, table, curves, x, "loss", "error", list(curves))
            axes.grid(axis="y")
        _known_axis(panels[0], table)
        _legend(panels[0], handles)
        panels[0].set(title="by what is known", ylabel="held-out loss, nats a token")
        panels[1].set(title="by dose", xlabel="dose = learning rate × steps (log)")
        panels[1].margins(x=0.06, y=0.1)
        log_axis(panels[1])
    figure.drawn = table
    return figure


def overfitting_of_models(models: Mapping[str, Mapping[float, Curve]]) -> Picture:
    """How held-out loss changes from before training, against training EM: a panel for each model, on one scale.

    Lines and marks are those of `overfitting`. A rate looks the same in all panels.

    Parameters
    ----------
    models
        {scale, as `Recipe.scale` names it: the curves of that model's run}

    Raises
    ------
    InputError
        If there is no model, or one has no curve.
    """
    if not models or not all(models.values()):
        raise InputError("no curve of one of the models, or no model: cross-validate by `train --stop best` first")
    order = list(SCALES)  # by size
    names = sorted(models, key=lambda name: (order.index(name) if name in order else len(order), name))
    rates = sorted({rate for curves in models.values() for rate in curves}, reverse=True)
    parts = {
        name: pd.concat(_drawn(models[name][rate]).assign(model=name) for rate in sorted(models[name], reverse=True))
        for name in names
    }
    table = pd.concat(parts.values()).drop(columns=["loss", "error"])
    columns = len(names) if len(names) <= MOST_PANELS else 2
    rows = -(-len(names) // columns)
    with styled():
        every = {(name, rate): curve for name, curves in models.items() for rate, curve in curves.items()}
        caption = (
            f"{_measured(every)} Band: standard error over rows. EM: share of the tokens that the model would say "
            "itself, over the epoch that follows. Learning rates do not transfer between sizes."
        )
        title = "When to stop: held-out loss falls, then rises as the training rows become known"
        figure = titled(3.7 * rows, title, "One panel for each model", caption)
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, name in zip(panels.flat, names, strict=False):
            handles = _lines(axes, parts[name], models[name], "trained_em", "change", "change_error", rates)
            axes.axhline(0, color=GREY, linewidth=0.8)
            axes.grid(axis="y")
            axes.set_title(SCALES.get(name, name))
            axes.tick_params(labelbottom=True)
            _known_axis(axes, table)
            _legend(axes, handles)
        for axes in panels.flat[len(names) :]:
            axes.remove()
        for axes in panels[:, 0]:
            axes.set_ylabel("held-out loss, change from\nthe start, nats a token")
        panels[0, 0].margins(y=0.1)
    figure.drawn = table
    return figure


def _measured(curves: Mapping[object, Curve]) -> str:
    """What stands in the caption of both pictures."""
    folds = ", ".join(map(str, sorted({curve.folds for curve in curves.values()})))
    recited = any(max(curve.trained_em, default=0) >= RECITED for curve in curves.values())
    wide = any(found.first < found.last for found in map(recommend, curves.values()))
    return (
        f"Each row is measured by adapters that never saw it ({folds} folds). Dot: the best epoch"
        f"{'; thick: within one standard error of it' * wide}."
        f"{f' Square: the training rows are recited (EM {RECITED}).' * recited}"
    )


def _lines(axes, table: pd.DataFrame, curves: Mapping[float, Curve], x: str, y: str, error: str, rates: list) -> list:
    """Draw the curve of each rate, with its best epoch and its first recitation; return the handles of a legend.

    A rate's colour and line style are those of its place in `rates`, highest first.
    """
    handles = []
    for rate, part in table.groupby("learning_rate", sort=False):
        place, found = sorted(rates, reverse=True).index(rate) % len(COLOURS), recommend(curves[rate])
        colour, line = COLOURS[place], LINES[place]
        there = part[part["dose"] > 0] if x == "dose" else part.dropna(subset="trained_em")
        axes.plot(there[x], there[y], color=colour, linestyle=line, linewidth=1.6)
        low, high = there[y] - there[error], there[y] + there[error]
        axes.fill_between(there[x], low, high, color=colour, alpha=0.12, lw=0)
        window = there[there["epoch"].between(found.first, found.last)]
        axes.plot(window[x], window[y], color=colour, linewidth=4, solid_capstyle="round")
        best, recites = (there[there["epoch"] == epoch] for epoch in (found.epoch, found.recites_from))
        face, edge = (colour, "white") if found.turned else ("white", colour)
        axes.plot(best[x], best[y], "o", color=face, markeredgecolor=edge, markersize=8)
        axes.plot(recites[x], recites[y], "s", color="white", markersize=7, markeredgecolor=colour)
        handles.append(Line2D([], [], color=colour, linestyle=line, linewidth=1.6, label=_label(found)))
    return handles


def _label(found: Recommendation) -> str:
    """What the legend says of a rate.

    >>> _label(Recommendation(1e-5, 61, 60, 62, 3.66, 90, True))
    'LR 1e-5: best after epoch 61,\\nrecites from epoch 90 on'
    """
    where = f"best after epoch {found.epoch}" if found.turned else f"still falling at epoch {found.epoch}"
    recites = "" if found.recites_from is None else f",\nrecites from epoch {found.recites_from} on"
    return f"LR {scientific(found.learning_rate)}: {where}{recites}"


def _known_axis(axes, table: pd.DataFrame) -> None:
    """The x axis of training EM, up to 1, with a line where recitation begins."""
    axes.set_xlim(max(0, table["trained_em"].min() - 0.05), 1)
    axes.set_xlabel("EM of the training rows")
    axes.axvline(RECITED, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    word = axes.text(RECITED, 0.99, "recited ", transform=axes.get_xaxis_transform(), ha="right", va="top")
    word.set(color=GREY, fontsize=9)


def _legend(axes, handles: list) -> None:
    """A legend below the axes: curves may come to lie anywhere inside."""
    place = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.2), "borderpad": 0}
    axes.legend(handles=handles, handlelength=2.6, fontsize=9.5, **place)


def _drawn(curve: Curve) -> pd.DataFrame:
    epochs = np.arange(len(curve.loss))
    change = np.asarray(curve.loss) - np.asarray(curve.loss[0])
    return pd.DataFrame(
        {
            "learning_rate": curve.learning_rate,
            "epoch": epochs,
            "dose": epochs * curve.steps * curve.learning_rate,
            "trained_em": [*curve.trained_em, *[np.nan] * (len(epochs) - len(curve.trained_em))],
            "loss": curve.means,
            "error": rise(curve.loss)[2],
            "change": change.mean(1),
            "change_error": change.std(1, ddof=1) / np.sqrt(change.shape[1]),
        }
    )

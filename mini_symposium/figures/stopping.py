"""The picture of when to stop: held-out loss over training, its best epoch, and where recitation begins."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from mini_symposium.errors import InputError
from mini_symposium.evaluation.best_epoch import RECITED, Curve, recommend, rise
from mini_symposium.figures.style import COLOURS, GREY, HALO, Picture, log_axis, scientific, styled, titled


def overfitting(curves: Mapping[float, Curve], scale: str) -> Picture:
    """Held-out loss of each learning rate against training EM, and against dose = learning_rate x steps.

    The thick part of a line is within one standard error of its best epoch, which is a dot; a square is the first epoch
    after which the training rows are recited.

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
    folds = {curve.folds for curve in curves.values()}
    with styled():
        count = ", ".join(map(str, sorted(folds)))
        caption = (
            f"Each row is measured by adapters that never saw it ({count} folds). Dot: the best epoch; thick: within "
            f"one standard error of it; square: training rows recited (EM {RECITED})."
        )
        figure = titled(3.6, "When to stop: held-out loss, by what is known and by dose", scale, caption)
        panels, lowest = figure.subplots(1, 2, sharey=True), table["loss"].min()
        for i, (rate, part) in enumerate(table.groupby("learning_rate", sort=False)):
            colour, found = COLOURS[i % len(COLOURS)], recommend(curves[rate])
            for axes, x in zip(panels, ("trained_em", "dose"), strict=True):
                there = part[part["dose"] > 0] if x == "dose" else part.dropna(subset="trained_em")
                axes.plot(there[x], there["loss"], color=colour, linewidth=1.4)
                axes.fill_between(
                    there[x],
                    there["loss"] - there["error"],
                    there["loss"] + there["error"],
                    color=colour,
                    alpha=0.12,
                    lw=0,
                )
                window = there[there["epoch"].between(found.first, found.last)]
                axes.plot(window[x], window["loss"], color=colour, linewidth=4, solid_capstyle="round")
                best = there[there["epoch"] == found.epoch]
                axes.plot(best[x], best["loss"], "o", color=colour, markersize=8, markeredgecolor="white")
                for place, loss in zip(best[x], best["loss"], strict=True):
                    below = loss == lowest  # else above, where no other line's dot can be
                    note = axes.annotate(
                        f"epoch {found.epoch}", (place, loss), (0, -9 if below else 9), textcoords="offset points"
                    )
                    note.set(ha="center", va="top" if below else "bottom", color=colour, path_effects=HALO, fontsize=9)
                recites = there[there["epoch"] == (-1 if found.recites_from is None else found.recites_from)]
                axes.plot(recites[x], recites["loss"], "s", color="white", markersize=7, markeredgecolor=colour)
            end = part[part["dose"] > 0].iloc[-1]
            label = panels[1].annotate(
                f"LR {scientific(rate)}", (end["dose"], end["loss"]), (6, 0), textcoords="offset points"
            )
            label.set(color=colour, weight="bold", va="center", path_effects=HALO)
        for axes in panels:
            axes.grid(axis="y")
        panels[0].axvline(RECITED, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
        panels[0].set(title="by what is known", xlabel="EM of the training rows", ylabel="held-out loss, nats a token")
        panels[0].set_xlim(max(0, table["trained_em"].min() - 0.05), 1)
        panels[1].set(title="by dose", xlabel="dose = learning rate × steps (log)")
        panels[1].margins(x=0.14, y=0.14)
        log_axis(panels[1])
    figure.drawn = table
    return figure


def _drawn(curve: Curve) -> pd.DataFrame:
    epochs = np.arange(len(curve.loss))
    return pd.DataFrame(
        {
            "learning_rate": curve.learning_rate,
            "epoch": epochs,
            "dose": epochs * curve.steps * curve.learning_rate,
            "trained_em": [*curve.trained_em, *[np.nan] * (len(epochs) - len(curve.trained_em))],
            "loss": curve.means,
            "error": rise(curve.loss)[2],
        }
    )

"""One picture of how much of a fine-tune survives each way of storing it."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from mini_symposium.errors import InputError
from mini_symposium.figures.style import COLOURS, GREY, HALO, PALE, Picture, as_written, name_rows, styled, titled

LOOKS = {"kept": (COLOURS[2], "o", ""), "blurred": (COLOURS[1], "D", "///"), "lost": (COLOURS[0], "X", "xxx")}
"""Colour, mark and hatch of each verdict."""
COLUMNS = ["storage", "layer", "verdict", "cosine", "relative_norm", "noise", "gain", "kl_share", "same"]
LONGEST_BAR = 1.3
"""A longer bar ends here; the number written beside it is the measured one."""


def survival_picture(measured: Mapping[str, Sequence[Mapping]], scale: str) -> Picture:
    """For each storage format: how much of the trained change its weights hold, and how much of its effect is left.

    `measured` has "storages" and "layers", as `release.survival.survival` returns them. Rows read from the
    picture's csv, which name their layer, may all be passed in "storages".

    Raises
    ------
    InputError
        If no storage format was measured.
    """
    if not measured["storages"]:
        raise InputError("no storage has been measured; run notebook 04 or `mini-symposium survival` first")
    rows = [{"layer": "all", **row} for row in measured["storages"]] + list(measured["layers"])
    table = pd.DataFrame(rows).reindex(columns=COLUMNS)
    numbers = table.columns[3:]
    table[numbers] = table[numbers].astype(float).map(as_written)
    whole, layers = table[table["layer"] == "all"], table[table["layer"] != "all"]
    heights = dict(zip(whole["storage"], range(len(whole)), strict=True))
    caption = (
        "Left: 1 if the stored change has the direction of the trained one; a small dot is one matrix. Middle: how "
        "much is left of the gain in loss on the training rows. Right: how far its predictions are from the adapter's; "
        "the base is at 1. Grey lines: limits between the verdicts."
    )
    with styled():
        figure = titled(0.34 * len(whole) + 0.75, "What of the fine-tune survives its storage", scale, caption)
        limits = (-0.35, 1.1), (0, LONGEST_BAR + 0.45), (0, LONGEST_BAR + 1.3)
        widths = [right - left for left, right in limits]  # so that 0 to 1 is equally long in all three
        weights, gain, answers = figure.subplots(1, 3, sharey=True, width_ratios=widths)
        spread = np.random.default_rng(0).uniform(-0.22, 0.22, len(layers))
        weights.scatter(
            layers["cosine"], layers["storage"].map(heights) + spread, s=5, color=GREY, alpha=0.3, linewidths=0
        )
        for row in whole.itertuples():
            y, (colour, mark, hatch) = heights[row.storage], LOOKS[row.verdict]
            weights.plot(row.cosine, y, mark, color=colour, markersize=7.5, markeredgecolor="white")
            left_of_dot = {"xytext": (-7, 0), "textcoords": "offset points", "ha": "right", "va": "center_baseline"}
            weights.annotate(f"{row.cosine:.2f}", (row.cosine, y), fontsize=9, path_effects=HALO, **left_of_dot)
            _bar(gain, y, row.gain, colour, hatch)
            _bar(answers, y, row.kl_share, colour, hatch, f", {row.same:.0%} same answers")
        for limit in (0.5, 0.9):
            gain.axvline(limit, color=PALE, linewidth=1, zorder=0)
        answers.axvline(0.5, color=PALE, linewidth=1, zorder=0)
        names = [f"{row.storage}: {row.verdict}" for row in whole.itertuples()]
        name_rows(weights, list(heights.values()), names)
        weights.set(title="in the weights", xlabel="cosine")
        gain.set(title="on the training rows", xlabel="share of the gain")
        answers.set(title="in what it says", xlabel="KL to the adapter, base = 1")
        for axes, ends in zip((weights, gain, answers), limits, strict=True):
            axes.set(xlim=ends, xticks=[0, 0.5, 1])
        for axes in (gain, answers):
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
        weights.set_ylim(len(whole) - 0.4, -0.6)
    figure.drawn = table
    return figure


def _bar(axes, y: int, value: float, colour: str, hatch: str, more: str = "") -> None:
    """A horizontal bar, with its number and `more` written at its end."""
    missing = np.isnan(value)
    width = 0 if missing else min(max(value, 0), LONGEST_BAR)
    axes.barh(y, width, color=colour, height=0.55, hatch=hatch, edgecolor="white", linewidth=0)
    text = ("not measurable" if missing else f"{value:.2f}") + more
    label = axes.annotate(text, (width, y), (4, 0), textcoords="offset points", fontsize=9, path_effects=HALO)
    label.set_va("center_baseline")

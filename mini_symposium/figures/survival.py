"""What of a fine-tune survives each way of storing it, as one picture; from results alone, without torch."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from mini_symposium.errors import InputError
from mini_symposium.figures.style import COLOURS, GREY, HALO, PALE, Picture, as_written, name_rows, styled, titled

VERDICTS = {"kept": COLOURS[2], "blurred": COLOURS[1], "lost": COLOURS[0]}
IN_ALL = ["storage", "layer", "verdict", "cosine", "relative_norm", "noise", "gain", "kl_share", "same"]
WIDEST = 1.3
"""Where an axis ends: what lies beyond is drawn at its edge, and the number written."""


def survival_picture(found: Mapping[str, Sequence[Mapping]], scale: str) -> Picture:
    """For each storage: how much of the intended change its weights hold, and how much of its effect is left.

    Parameters
    ----------
    found
        {"storages", "layers"}, as `survival.survival` gives them.

    Raises
    ------
    InputError
        If there are none.
    """
    if not found["storages"]:
        raise InputError("no storage has been measured; run notebook 04 or `mini-symposium survival` first")
    rows = [{**row, "layer": "all"} for row in found["storages"]] + list(found["layers"])
    table = pd.DataFrame(rows).reindex(columns=IN_ALL)
    numbers = table.columns[3:]
    table[numbers] = table[numbers].astype(float).map(as_written)
    in_all, layers = table[table["layer"] == "all"], table[table["layer"] != "all"]
    heights = dict(zip(in_all["storage"], range(len(in_all)), strict=True))
    look = (
        "Left: whether the stored change points where the trained one does; a small dot is one matrix. Middle: what is "
        "left of the lower loss on its own rows. Right: how far its predictions went back to the base's."
    )
    with styled():
        figure = titled(0.34 * len(in_all) + 0.75, "What of the fine-tune survives its storage", scale, look)
        weights, gain, said = figure.subplots(1, 3, sharey=True)
        spread = np.random.default_rng(0).uniform(-0.22, 0.22, len(layers))
        weights.scatter(
            layers["cosine"], layers["storage"].map(heights) + spread, s=5, color=GREY, alpha=0.3, linewidths=0
        )
        for row in in_all.itertuples():
            y, colour = heights[row.storage], VERDICTS[row.verdict]
            weights.plot(row.cosine, y, "o", color=colour, markersize=7, markeredgecolor="white")
            at = {"xytext": (-7, 0), "textcoords": "offset points", "ha": "right", "va": "center_baseline"}
            weights.annotate(f"{row.cosine:.2f}", (row.cosine, y), fontsize=9, path_effects=HALO, **at)
            _bar(gain, y, row.gain, colour)
            _bar(said, y, row.kl_share, colour, f", {row.same:.0%} same answers")
        for at in (0.5, 0.9):
            gain.axvline(at, color=PALE, linewidth=1, zorder=0)
        said.axvline(0.5, color=PALE, linewidth=1, zorder=0)
        names = [f"{row.storage}: {row.verdict}" for row in in_all.itertuples()]
        name_rows(weights, list(heights.values()), names)
        weights.set(title="in the weights", xlabel="cosine with the trained change", xlim=(-0.35, 1.05))
        gain.set(title="on its own rows", xlabel="share of the gain that is left", xlim=(0, WIDEST + 0.35))
        said.set(title="in what it says", xlabel="KL to the adapter, base = 1", xlim=(0, WIDEST + 1.3))
        said.set_xticks([0, 0.5, 1])
        for axes in (gain, said):
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
        weights.set_ylim(len(in_all) - 0.4, -0.6)
    figure.drawn = table
    return figure


def survival_of_table(rows: Sequence[Mapping], scale: str) -> Picture:
    """The picture again, from the rows of its csv."""
    parts = {"storages": [], "layers": []}
    for row in rows:
        parts["storages" if row["layer"] == "all" else "layers"].append(row)
    return survival_picture(parts, scale)


def _bar(axes, y: int, value: float, colour: str, more: str = "") -> None:
    missing = np.isnan(value)
    width = 0 if missing else min(max(value, 0), WIDEST)
    axes.barh(y, width, color=colour, height=0.55)
    said = ("not measurable" if missing else f"{value:.2f}") + more
    label = axes.annotate(said, (width, y), (4, 0), textcoords="offset points", fontsize=9, path_effects=HALO)
    label.set_va("center_baseline")

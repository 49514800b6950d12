"""The picture of what each example teaches: which row's absence changes the loss on which other."""

import numpy as np
from matplotlib.colors import TwoSlopeNorm

from mini_symposium.errors import InputError
from mini_symposium.evaluation.influence import Influence
from mini_symposium.figures.style import INK, PALE, Picture, name_rows, scientific, short, styled, titled


def influence_map(found: Influence | None) -> Picture:
    """A heat map of the influence of leaving out each row (down) on each other row and held-out row (across), and
    beside it how much the others teach of each row.

    Blue: the loss is higher than under most adapters that leave out another row; red: lower. Influences beyond the
    noise between seeds bear their sign, + or −.

    Raises
    ------
    InputError
        If nothing was measured.
    """
    if found is None:
        raise InputError("no influence: run `mini-symposium examples RUN` first")
    n, table = len(found.rows), found.table()
    items = n + len(found.held_out)
    mean = found.by_seed.mean(0)
    limit, (_, least) = max(float(np.nanmax(np.abs(mean))), 1e-9), found.noise()
    with styled():
        caption = (
            f"LR {scientific(found.learning_rate)}, after epoch {found.epoch}, seeds: {len(found.seeds)}. Each line is "
            "an adapter trained without the row named at the left. Blue: the loss is higher than under most other "
            "adapters; red: lower. A sign, + or −, is beyond the noise between seeds. Grey: the row itself."
        )
        figure = titled(0.27 * n + 1.3, "What each example teaches the others", found.scale, caption)
        heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=(items, 4))
        edges = np.arange(items + 1), np.arange(n + 1)
        colours = TwoSlopeNorm(0, -limit, limit)
        mesh = heat.pcolormesh(*edges, mean, cmap="RdBu", norm=colours, edgecolors="white", linewidth=0.5)
        beyond = np.argwhere(np.abs(mean) > least)
        for y, x in beyond:
            sign = heat.text(x + 0.5, y + 0.5, "+" if mean[y, x] > 0 else "−", ha="center", va="center_baseline")
            sign.set(fontsize=10, weight="bold", color="white" if abs(mean[y, x]) > 0.6 * limit else INK)
        heat.axvline(n, color=INK, linewidth=1.2)
        heat.set_facecolor(PALE)
        for start, end, over in ((0, n, "loss on the other rows"), (n, items, "loss on held-out rows")):
            if end > start:
                heat.text((start + end) / 2, -0.25, over, ha="center", va="bottom", fontsize=10.5)
        heat.set_xticks(np.arange(items) + 0.5, [*range(1, n + 1), *range(1, len(found.held_out) + 1)])
        heat.tick_params(length=0, labelsize=8)
        heat.spines[:].set_visible(False)
        name_rows(heat, np.arange(n) + 0.5, [f"{i + 1} {short(query, 30)}" for i, query in enumerate(found.rows)], 9)
        bar = figure.colorbar(mesh, ax=bars, label="change of the loss, nats a token", aspect=30, pad=0.05)
        bar.outline.set_visible(False)
        bars.barh(np.arange(n) + 0.5, 100 * found.carried, color=PALE, edgecolor=INK, linewidth=0.6)
        bars.set(title="taught by others", xlabel="% of what is\nlearned of a row")
        bars.set_xlim(0, 100)
        bars.tick_params(axis="y", length=0)
    figure.drawn = table
    return figure

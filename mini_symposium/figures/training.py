"""Pictures of the dataset, of a training, and of what the trained models answer."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from mini_symposium.errors import InputError
from mini_symposium.figures.style import (
    COLOUR_MAP,
    COLOURS,
    GREY,
    HALO,
    INK,
    LINES,
    PALE,
    SHAPES,
    WIDTH,
    Picture,
    as_written,
    log_axis,
    name_rows,
    scientific,
    short,
    styled,
    titled,
)
from mini_symposium.run import RunDirectory

GRID_TITLES = {
    "passed": "Share of answers that pass",
    "copied_words": "Longest passage copied from a training row, in words",
}
"""{number that `format_grid` draws: its title}; another number is titled by its name."""


def _steps(metrics: Mapping[float, Sequence[Mapping]]) -> pd.DataFrame:
    """The lines of metrics.jsonl as a table, ordered by learning rate (highest first) and step."""
    rows = [line for lines in metrics.values() for line in lines]
    if not rows:
        raise InputError("metrics: no step has been logged; run notebook 02 or `mini-symposium train` first")
    table = pd.DataFrame(rows, columns=["learning_rate", "step", "epoch", "example", "loss"])
    return table.sort_values(["learning_rate", "step"], ascending=[False, True], kind="stable", ignore_index=True)


def loss_curves(metrics: Mapping[float, Sequence[Mapping]], n_examples: int, scale: str) -> Picture:
    """Training loss of each learning rate, by epoch and by dose = learning_rate x steps.

    A dot is the loss of a step. The line is the mean over one epoch, `n_examples` steps, drawn at the middle of that
    epoch. Drawn at the end, it would lag by half an epoch. Half an epoch is a larger dose at a higher rate, so the
    comparison by dose would be biased.

    Parameters
    ----------
    metrics
        For each learning rate, the lines of its metrics.jsonl.
    n_examples
        Examples in the dataset, which is the number of steps in an epoch at batch 1.

    Raises
    ------
    InputError
        If no step has been logged.
    """
    table = _steps(metrics)
    table["epochs"] = table["step"] / n_examples
    table["dose"] = table["learning_rate"] * table["step"]
    by_rate = table.groupby("learning_rate", sort=False)
    for column in ("loss", "epochs", "dose"):
        table[f"smoothed_{column}"] = by_rate[column].transform(lambda values: values.rolling(n_examples).mean())

    with styled():
        caption = (
            "A dot is one step, a line the mean over an epoch. Right: rates whose lines coincide differ only in dose."
        )
        figure = titled(3.5, "Training loss, by epoch and by dose", scale, caption)
        panels = figure.subplots(1, 2, sharey=True)
        for axes, x in zip(panels, ("epochs", "dose"), strict=True):
            ends = []
            for i, (rate, part) in enumerate(by_rate):
                colour, width = COLOURS[i % len(COLOURS)], 3.4 if i == 0 else 1.6  # a thin line shows on a thick one
                axes.scatter(part[x], part["loss"], color=colour, alpha=0.25, s=4, linewidths=0)
                axes.plot(part[f"smoothed_{x}"], part["smoothed_loss"], color=colour, linewidth=width)
                smooth = part.dropna(subset="smoothed_loss")
                end = smooth[[f"smoothed_{x}", "smoothed_loss"]] if len(smooth) else part[[x, "loss"]]
                axes.plot(*end.iloc[-1], "o", color=colour, markersize=5.5, markeredgecolor="white")
                ends.append((*end.iloc[-1], f"LR {scientific(rate)}", colour))
            axes.grid(axis="y")
            _label_ends(axes, ends, table["loss"].max() * 1.05)
        panels[0].set(title="by epoch", xlabel="epochs", ylabel="loss, nats a token")
        panels[0].set_xlim(0)
        panels[1].set(title="by dose", xlabel="dose = learning rate × steps (log)")
        log_axis(panels[1])
    figure.drawn = table
    return figure


def growing(run: RunDirectory, n_examples: int, scale: str) -> Callable[[int], None]:
    """A function that shows the loss curves of a run while it trains, in a notebook: each time in the same place.

    For `train(..., watch=...)`.
    """
    shown: list = []

    def show(epoch: int) -> None:
        picture = loss_curves({rate: run.metrics(rate) for rate in run.learning_rates()}, n_examples, scale)
        if shown:
            shown[0].update(picture)
        else:
            shown.append(display(picture, display_id=True))

    return show


def _label_ends(axes, ends: Sequence[tuple[float, float, str, str]], top: float) -> None:
    """Write each line's name at its end, in its colour.

    A name is written above its line's end if other lines continue further to the right; names never overlap. `ends` has
    (x, y, name, colour) for each line; `top` is the upper limit of the y axis.
    """
    axes.set_ylim(0, top)
    gap, lowest = top * 0.065, -math.inf
    last = max(end[0] for end in ends)
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        lowest = max(y if x > 0.9 * last else y + gap, lowest + gap, 0.6 * gap)
        shift = axes.transData + ScaledTranslation(7 / 72, 0, axes.figure.dpi_scale_trans)
        axes.text(x, lowest, name, color=colour, weight="bold", va="center", transform=shift, path_effects=HALO)


def example_heatmap(metrics: Mapping[float, Sequence[Mapping]], titles: Sequence[str], scale: str) -> Picture:
    """Loss of each example at each epoch; learning rates stand side by side on one colour scale.

    `metrics` are those of `loss_curves`; `titles` names each example, by its index in the dataset.

    Raises
    ------
    InputError
        If no step has been logged, or an example has no title.
    """
    table = _steps(metrics)
    if (last := int(table["example"].max())) >= len(titles):
        raise InputError(f"metrics name example {last}, the dataset has {len(titles)}; was another dataset trained on?")
    table = table.groupby(["learning_rate", "example", "epoch"], as_index=False)["loss"].mean()
    table["title"] = [short(titles[example], 36) for example in table["example"]]
    rates = sorted(table["learning_rate"].unique(), reverse=True)
    at_highest = table[table["learning_rate"] == rates[0]]
    order = list(at_highest.groupby("example")["loss"].mean().sort_values(kind="stable").index)

    with styled():
        at_rate = f" at {scientific(rates[0])}" if len(rates) > 1 else ""
        caption = (
            "A row is an example, a column an epoch; dark is learned. "
            f"The top row has the lowest loss over the run{at_rate}."
        )
        figure = titled(0.23 * max(len(order), 5) + 0.85, "Which examples are learned, and when", scale, caption)
        panels = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
        for axes, rate in zip(panels, rates, strict=True):
            part = table[table["learning_rate"] == rate].pivot(index="example", columns="epoch", values="loss")
            cells = part.reindex(index=order, columns=range(int(part.columns.max()) + 1))
            edges = np.arange(cells.shape[1] + 1), np.arange(len(order) + 1)
            mesh = axes.pcolormesh(*edges, cells, cmap=COLOUR_MAP, vmin=0, vmax=table["loss"].max())
            axes.set(title=f"LR {scientific(rate)}", xlabel="epoch", facecolor=PALE)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.spines[:].set_visible(False)
            axes.tick_params(axis="y", length=0)
        name_rows(panels[0], np.arange(len(order)) + 0.5, [short(titles[i], 36) for i in order], 9)
        bar = figure.colorbar(mesh, ax=list(panels), label="loss, nats a token", aspect=30, pad=0.015)
        bar.outline.set_visible(False)
    figure.drawn = table
    return figure


def token_lengths(rows: Sequence[Mapping], scale: str, sequence_len: int) -> Picture:
    """How many tokens each example has, prompt and completion stacked, and how many are allowed.

    `rows` has {"title", "prompt", "completion"} for each example: a text and two numbers of tokens.
    """
    table = pd.DataFrame(rows, columns=["title", "prompt", "completion"])
    table.insert(0, "example", range(len(table)))
    table["sequence_len"] = sequence_len
    totals = table["prompt"] + table["completion"]
    with styled():
        caption = f"Every row must fit into sequence_len = {sequence_len}: a longer one is refused, never cut."
        figure = titled(0.24 * len(table) + 0.8, "How long the examples are", scale, caption, rates=False)
        axes = figure.subplots()
        axes.barh(table["example"], table["prompt"], color=COLOURS[4], label="prompt")
        axes.barh(table["example"], table["completion"], left=table["prompt"], color=COLOURS[1], label="completion")
        for example, total in zip(table["example"], totals, strict=True):
            label = axes.annotate(f"{total:,}", (total, example), (4, 0), textcoords="offset points", fontsize=9)
            label.set_va("center_baseline")
        if sequence_len <= 1.6 * totals.max():
            axes.axvline(sequence_len, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
            label = axes.text(sequence_len, -0.75, "sequence_len ", ha="right", va="bottom", color=GREY, fontsize=9)
            label.set_in_layout(False)
        name_rows(axes, table["example"], [short(title, 46) for title in table["title"]], 9)
        axes.set(xlabel="tokens", ylim=(len(table) - 0.4, -0.6))
        axes.margins(x=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=2, borderpad=0, handlelength=1, handleheight=1)
    figure.drawn = table
    return figure


def travel(rows: Sequence[Mapping], scale: str) -> Picture:
    """How far lora_A and lora_B moved in training, beside what Adam's rule predicts.

    Adam (Kingma and Ba 2015, section 2.1) moves an element by about one learning rate a step while its gradient keeps
    its sign, so it can travel about learning_rate x steps; a step after a sudden large gradient may be up to 3.2 times
    as long. An element whose gradient changes its sign at random travels about learning_rate x sqrt(steps).

    `rows` has {learning_rate, dose, a_moved_share, a_travel_rms, b_travel_rms, b_travel_max} for each learning rate.
    """
    parts = {"b_travel_max": "lora_B, largest", "b_travel_rms": "lora_B, rms", "a_travel_rms": "lora_A, rms"}
    table = pd.DataFrame(
        {
            "learning_rate": row["learning_rate"],
            "part": name,
            "measured": row[key],
            "random_signs": math.sqrt(row["dose"] * row["learning_rate"]),  # rate x sqrt(steps)
            "steady": row["dose"],
            "a_moved_share": row["a_moved_share"],
        }
        for row in sorted(rows, key=lambda row: -row["learning_rate"])
        for key, name in parts.items()
    )
    with styled():
        caption = (
            "A mark is measured; the grey bar is the range that Adam's rule predicts. lora_A may lie to the left of "
            "it, because its gradient is tiny as long as lora_B is."
        )
        figure = titled(0.3 * len(table) + 1.0, "How far the adapters moved", scale, caption)
        axes = figure.subplots()
        heights = [i + i // len(parts) * 0.7 for i in range(len(table))]
        axes.barh(heights, table["steady"] - table["random_signs"], left=table["random_signs"], color=PALE, height=0.62)
        least = table.loc[table["measured"] > 0, "measured"].min()
        left = np.nanmin([table["random_signs"].min(), least]) / 2
        ends = ("random_signs", "rate × √steps", "right"), ("steady", "rate × steps", "left")
        for column, name, side in ends:
            axes.text(table[column].iloc[0], -0.42, name, ha=side, va="bottom", fontsize=8.5, color=GREY)
        for y, row in zip(heights, table.itertuples(), strict=True):
            colour, shape = (each[0 if row.part.startswith("lora_B") else 1] for each in (COLOURS, SHAPES))
            (dot,) = axes.plot(max(row.measured, left), y, shape, color=colour, markersize=7, markeredgecolor="white")
            text = f"{scientific(row.measured)}, {row.measured / row.steady:.0%} of rate × steps"
            if not row.measured:
                text = "did not move"
                dot.set(markerfacecolor="white", markeredgecolor=colour)
            if row.part.startswith("lora_A"):
                text += f"; {row.a_moved_share:.2%} of its elements moved"
            label = axes.annotate(text, (max(row.measured, row.steady), y), (10, 0), textcoords="offset points")
            label.set(fontsize=9, va="center_baseline")
        rates = [f"LR {scientific(rate)}   " for rate in table["learning_rate"]]
        names = [part if i % len(parts) else rates[i] + part for i, part in enumerate(table["part"])]
        name_rows(axes, heights, names)
        axes.set(xlabel="change of an element in training (log)", ylim=(heights[-1] + 0.6, -1.1))
        log_axis(axes)
        axes.set_xlim(left * 0.8, table["steady"].max() * 1.3)
    figure.drawn = table
    return figure


def recitation(rows: Sequence[Mapping], scale: str) -> Picture:
    """How much of the rows' responses the checkpoints recite when given the prompts, by epoch.

    `rows` has {learning_rate, epoch, rows: "training" or "twins", recall: the mean, missing if no row was asked for}.
    """
    table = pd.DataFrame(rows).sort_values(["learning_rate", "rows", "epoch"], ascending=[False, True, True])
    with styled():
        caption = (
            "Recall is the share of a response's words that the model writes, in the same order, when given its "
            "prompt. Open marks, dotted: twins, which are rows like these that were not trained on. Epoch 0: the base."
        )
        figure = titled(3.0, "What is recited when it is asked for", scale, caption)
        axes = figure.subplots()
        ends = []
        for i, (rate, part) in enumerate(table.groupby("learning_rate", sort=False)):
            colour, line, shape = (each[i % len(COLOURS)] for each in (COLOURS, LINES, SHAPES))
            training, twins = (part[part["rows"] == kind].dropna() for kind in ("training", "twins"))
            axes.plot(training["epoch"], training["recall"], linestyle=line, marker=shape, color=colour)
            axes.plot(twins["epoch"], twins["recall"], f"{shape}:", color=colour, markerfacecolor="white")
            if len(training):
                ends.append((*training[["epoch", "recall"]].iloc[-1], f"LR {scientific(rate)}", colour))
        axes.set(xlabel="epochs", ylabel="recall (ROUGE-L), share of words", ylim=(0, 1.02))
        axes.grid(axis="y")
        _label_ends(axes, ends, 1.02)
    figure.drawn = table
    return figure


def format_grid(grid: Sequence[Mapping], value: str, scale: str) -> Picture:
    """A number for each prompt format, model (panel) and query, written in its cell.

    Formats are rows and queries are numbered columns. If there are more queries than formats, it is the other way
    round, and every query is named beside its row.

    Parameters
    ----------
    grid
        Cells {"format", "model", "query", value}; cells with the same first three are averaged.
    value
        Which number of a cell to draw: a share such as "recall", or an amount such as "tokens".

    Raises
    ------
    InputError
        If there are no cells, or one lacks the value.
    """
    if not grid or any(value not in cell for cell in grid):
        raise InputError(f"{len(grid)} answers, some or all without {value!r}: nothing to draw; measure it for each")
    table = pd.DataFrame(grid, columns=["model", "query", "format", value])
    table = table.groupby(["model", "query", "format"], as_index=False, sort=False)[value].mean()
    table[value] = table[value].astype(float).map(as_written)
    models, queries, formats = (list(table[column].unique()) for column in ("model", "query", "format"))
    turned = len(queries) > len(formats)
    (row, rows), (column, columns) = (("format", formats), ("query", queries))[:: -1 if turned else 1]
    size = min(9, 170 / (len(models) * len(columns)))  # numbers stay inside their cells
    low, high = min(0, table[value].min()), max(table[value].max(), 1)
    numbers = [str(i + 1) if len(queries) > 1 else "" for i in range(len(queries))]
    with styled():
        across = "column" if turned else "row"
        caption = (
            f"Each {across} is a prompt format. If a model's numbers change from {across} to {across}, its answers "
            "depend on the format."
        )
        height = 0.27 * len(rows) + (1.1 if turned else 0.55 + 0.19 * len(queries))
        title = GRID_TITLES.get(value, value.replace("_", " ").capitalize())
        figure = titled(height, f"{title}, by format and model", scale, caption)
        panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
        for axes, model in zip(panels, models, strict=True):
            cells = table[table["model"] == model].pivot(index=row, columns=column, values=value)
            cells = cells.reindex(index=rows, columns=columns).to_numpy(dtype=float)
            axes.pcolormesh(cells, cmap=COLOUR_MAP, vmin=low, vmax=high, edgecolors="white", linewidth=1.5)
            for (y, x), number in np.ndenumerate(cells):
                text = "" if np.isnan(number) else f"{number:.2f}" if high == 1 else f"{number:.4g}"
                cell = axes.text(x + 0.5, y + 0.5, text, ha="center", va="center_baseline", fontsize=size)
                cell.set_color("white" if (number - low) / (high - low) < 0.6 else INK)
            axes.set(title=short(_model_name(model), 28), facecolor=PALE)
            axes.set_xticks(np.arange(len(columns)) + 0.5, [short(form, 28) for form in formats] if turned else numbers)
            if turned:
                axes.tick_params(axis="x", labelrotation=40, labelsize=9, pad=1)
                for label in axes.get_xticklabels():
                    label.set(ha="right", rotation_mode="anchor")
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        name_rows(panels[0], np.arange(len(rows)) + 0.5, [short(str(name), 28) for name in rows])
        if not turned:
            legend = [f"{n}  {short(query, 110)}".strip() for n, query in zip(numbers, queries, strict=True)]
            figure.supxlabel("\n".join(legend), x=0.1 / WIDTH, ha="left", color=GREY, fontsize=9)
    figure.drawn = table
    return figure


def _model_name(model: object) -> str:
    """A model's name in a grid; one that is named by its learning rate is written as in the other pictures.

    >>> [_model_name(model) for model in ("base", "1e-05")]
    ['base', 'LR 1e-5']
    """
    try:
        return f"LR {scientific(float(model))}"
    except ValueError:
        return str(model)

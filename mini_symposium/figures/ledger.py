"""Pictures of the ledger and of the memorization that its verdicts rest on."""

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from mini_symposium.claims.registration import REGISTERED, Comparison
from mini_symposium.claims.verdicts import DEPENDS, INCONCLUSIVE, NOT_MEASURED, NOT_SUPPORTED, SUPPORTED, Answer, Claim
from mini_symposium.errors import InputError
from mini_symposium.figures.style import (
    COLOURS,
    GREY,
    LINES,
    SHAPES,
    Picture,
    log_axis,
    name_rows,
    scientific,
    styled,
    titled,
)
from mini_symposium.run import Training

MARKS = {SUPPORTED: ("o", COLOURS[2]), NOT_SUPPORTED: ("X", COLOURS[0]), INCONCLUSIVE: ("D", GREY)}
"""Shape and colour of each verdict: a reader who cannot tell the colours apart still has the shapes."""
SHADE = "#eeeeee"


def memorization_curves(trained: Sequence[Training], scale: str) -> Picture:
    """How much of the training rows is known (EM), by epoch and by dose; EM of held-out twins as open marks.

    Dotted: the share of rows of which the model, given 32 tokens, writes the next 50 exactly. It is drawn if it
    was logged, over the rows that are long enough. The rates are constant; seeds of one rate look the same.

    Raises
    ------
    InputError
        If no adapter has a whole epoch in its log.
    """
    drawn = []
    for each in trained:
        settings = {"name": each.name, "seed": each.seed, "learning_rate": each.learning_rate}
        an_epoch = each.learning_rate * each.steps_per_epoch
        # A row's EM is measured before its step, so an epoch's mean belongs to the middle of the epoch.
        # Twins are probed between two epochs.
        for epoch, em in enumerate(each.em):
            line = {**settings, "rows": "training", "epoch": epoch, "dose": an_epoch * (epoch + 0.5)}
            drawn.append({**line, "em": float(np.mean(em))})
            extractable = [x for x in each.extractable_32[epoch] if x is not None] if each.extractable_32 else []
            if extractable:
                drawn[-1]["extractable_32"] = float(np.mean(extractable))
        for epoch, means in each.twins.items():
            drawn.append({**settings, "rows": "twins", "epoch": epoch, "dose": an_epoch * epoch, "em": means["em"]})
    if not drawn:
        raise InputError("no epoch is complete in the metrics, so there is no EM to draw; train for longer")
    table = pd.DataFrame(drawn)
    rates = sorted(table["learning_rate"].unique(), reverse=True)
    with styled():
        caption = (
            "EM: share of a row's tokens that the model predicts. Open marks: twins, which are rows like these that "
            "were not trained on. Right: where lines coincide, the rates differ only in dose."
        )
        if "extractable_32" in table:
            caption += " Dotted: share of rows of which the model, given 32 tokens, writes the next 50 exactly."
        figure = titled(3.3, "How much of the training rows is known", scale, caption)
        panels, shown = figure.subplots(1, 2, sharey=True), {}
        for (rate, _), part in table.groupby(["learning_rate", "seed"], sort=False):
            i = rates.index(rate)
            colour, line, shape = (each[i % len(COLOURS)] for each in (COLOURS, LINES, SHAPES))
            look = {"color": colour, "linestyle": line, "linewidth": 3.2 if i == 0 else 1.6}
            open_mark = {"marker": shape, "markerfacecolor": "white", "markersize": 5}
            shown[rate] = Line2D([], [], **look, label=f"LR {scientific(rate)}")
            for axes, x in zip(panels, ("epoch", "dose"), strict=True):
                training, twins = (part[part["rows"] == rows] for rows in ("training", "twins"))
                axes.plot(training[x], training["em"], **look)
                if "extractable_32" in training:
                    axes.plot(training[x], training["extractable_32"], ":", color=colour, linewidth=1.2)
                twins = twins[twins[x] > 0] if x == "dose" else twins
                axes.plot(twins[x], twins["em"], linestyle="", color=colour, **open_mark)
        label = "EM (dotted: share of rows)" if "extractable_32" in table else "EM, share of tokens"
        panels[0].set(xlabel="epochs", ylabel=label, ylim=(0, 1.02))
        panels[1].set(xlabel="dose = learning rate × steps (log)")
        log_axis(panels[1])
        # No curve passes through the upper left.
        handles = [shown[rate] for rate in rates]
        if "twins" in set(table["rows"]):
            handles.append(Line2D([], [], color=GREY, linestyle="", **open_mark, label="twins"))
        if "extractable_32" in table:
            handles.append(Line2D([], [], color=GREY, linestyle=":", linewidth=1.2, label="rows written on"))
        panels[1].legend(handles=handles, loc="upper left", handlelength=3.4)
        for axes in panels:
            axes.grid(axis="y")
    figure.drawn = table
    return figure


def ledger_picture(claims: Sequence[Claim] | Mapping[str, Sequence[Claim]], scale: str) -> Picture:
    """A row for each claim: its number, its 95% and its corrected interval, the threshold, and the verdict.

    A claim with several comparisons has a row for each that was measured. Rows in the same unit share one scale. The
    side of the threshold that supports the claim is shaded. The mark is that of the claim's verdict; only where the
    verdict depends on the comparison does each row bear its own. Marks of exploratory evidence are hollow.

    Parameters
    ----------
    claims
        Of one model; or {heading: claims} of several, which get a column each.
    scale
        The model's scale, for the heading; of several models, what to say of all.
    """
    models = dict(claims) if isinstance(claims, Mapping) else {"": claims}
    rows = _rows(list(models.values()))
    scales: dict[str, list[float]] = {}  # the ends of all rows in one unit
    for _, test, answers in rows:
        for _, answer in answers:
            if answer:
                scales.setdefault(_unit(test), []).extend((*answer.corrected, answer.threshold))
    drawn = []
    with styled():
        caption = (
            "Thick line: 95% interval. Thin line: interval corrected for all tests. Shaded: the side of the threshold "
            "on which the claim is supported. Circle: supported. Cross: not supported. Diamond: inconclusive. Hollow: "
            "exploratory. Rows in the same unit share one scale. A verdict that depends has a mark for each."
        )
        several = len(models) > 1
        figure = titled((0.68 if several else 0.52) * len(rows) + 0.3, "The card's claims, one by one", scale, caption)
        if several:
            figure.get_layout_engine().set(hspace=0.35)
        before = None
        grid = figure.subplots(len(rows), len(models), squeeze=False)
        for line, (first, test, answers) in zip(grid, rows, strict=True):
            again, before = before == first.id, first.id
            name = fill(f"{test.name}: {test.rule}", 56) if several else test.name
            name = name if again else f"{first.id}  {first.claim}\n{name}"
            name_rows(line[0], [0], [name], 8.5)
            for axes, (claim, answer), heading in zip(line, answers, models, strict=True):
                axes.spines[["bottom", "left"]].set_visible(False)
                axes.set_ylim(0.5, -0.5)
                axes.set_xticks([])
                if axes is not line[0]:
                    axes.set_yticks([])
                row = {"model": heading} if several else {}
                # A claim's value is that of its first comparison, so another one that lacks an answer has none.
                value = None if any(each.interval for each in claim.answers) else claim.value
                row |= {"id": claim.id, "claim": claim.verdict, "exploratory": claim.exploratory, "value": value}
                if answer:
                    row |= {key: getattr(answer, key) for key in ("equal", "threshold", "value", "p", "p_holm")}
                    low, high = answer.interval
                    row |= {"verdict": answer.verdict, "low": low, "high": high}
                    _draw(axes, claim, answer, test, scales[_unit(test)], not several)
                drawn.append(row)
                said, number = "" if again else claim.said, NOT_MEASURED if value is None else f"{value:.3g}"
                if answer:
                    number = f"{answer.value:.2g}" if several else str(answer)
                if several:  # in a column's width; that a mark is hollow says "exploratory"
                    said = "" if again or number == NOT_MEASURED else claim.verdict.partition(" on ")[0]
                    if answer and claim.verdict == DEPENDS:
                        said = f"{said}; here {answer.verdict}".removeprefix("; ")
                words = (", " if several else "\n").join(part for part in dict.fromkeys((said, number)) if part)
                at, size = ((0, 1.06), 7.5) if several else ((1.02, 0.5), 8.5)
                below = "bottom" if several else "center"
                text = axes.text(*at, words, transform=axes.transAxes, va=below, fontsize=size)
                text.set_in_layout(not several)
        if several:
            for axes, heading in zip(grid[0], models, strict=True):
                axes.set_title(heading, loc="left", fontsize=9.5, weight="bold", pad=16)
    figure.drawn = pd.DataFrame(drawn)
    return figure


def _rows(models: Sequence[Sequence[Claim]]) -> list[tuple[Claim, Comparison, list[tuple[Claim, Answer | None]]]]:
    """For each claim, and each of its comparisons that any model has measured: the claim, the comparison, and each
    model's claim and answer."""
    rows = []
    for same in zip(*models, strict=True):
        question = REGISTERED.questions[same[0].id]
        measured = [{(a.metric, a.equal): a for a in claim.answers if a.interval} for claim in same]
        tests = [test for test in question.tests if any((test.metric, test.equal) in found for found in measured)]
        for test in tests or [question.shown]:
            answers = [found.get((test.metric, test.equal)) for found in measured]
            rows.append((same[0], test, list(zip(same, answers, strict=True))))
    return rows


def _draw(axes, claim: Claim, answer: Answer, test: Comparison, ends: Sequence[float], ruled: bool) -> None:
    """One number with its intervals and threshold; `ruled` also writes the threshold's rule and the unit."""
    room = 0.12 * (max(ends) - min(ends))
    left, right = min(ends) - room, max(ends) + room
    axes.set_xlim(left, right)
    axes.tick_params(axis="x", labelsize=8, length=2, pad=1)
    axes.axvspan(answer.threshold, right if test.above else left, color=SHADE, linewidth=0)
    axes.axvline(answer.threshold, color=GREY, linewidth=1.2)
    if ruled:
        axes.set_xticks([answer.threshold], [f"{test.rule} →" if test.above else f"← {test.rule}"])
        # Units stand where no threshold does: at the end of the scale that is further from it.
        at, side = (0, "left") if 2 * answer.threshold > left + right else (1, "right")
        below = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": side, "va": "top"}
        unit = axes.annotate(_unit(test), (at, 0), (0, -3), fontsize=8, color=GREY, **below)
        unit.set_in_layout(False)
    mark, colour = MARKS.get(claim.verdict, MARKS[answer.verdict])
    size = {"markeredgewidth": 1.7, "markersize": 9} if ruled else {"markeredgewidth": 1.2, "markersize": 6.5}
    axes.plot(answer.corrected, [0, 0], "|-", color=colour, linewidth=0.8, markersize=4)
    axes.plot(answer.interval, [0, 0], "|-", color=colour, linewidth=2.4, **size | {"markersize": 9})
    face = "white" if claim.exploratory else colour
    axes.plot(answer.value, 0, mark, color=colour, markerfacecolor=face, **size)


def _unit(test: Comparison) -> str:
    """What a number is measured in; rows with the same unit share one scale."""
    if test.bounds:
        return "share" if test.bounds[0] == 0 else "share difference"
    return test.unit

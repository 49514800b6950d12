"""What the claims read from the evidence: arrays by prompt and seed, the controls, and what is said beside a number.

Arrays have the prompts or rows first and the seeds second, as `statistics` takes them.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from mini_symposium.claims.evidence import Evidence
from mini_symposium.claims.verdicts import Control
from mini_symposium.errors import InputError
from mini_symposium.evaluation.intervals import Interval, interval, spread
from mini_symposium.run import Training

EPOCHS_HIGH, EPOCHS_LOW = 100, 600
"""After which the card says that its rates overfit, and do not."""
SATURATED = 30
"""Epochs over which ranks and schedules are compared."""
CONCLUSION = "complete response"
"""The heading under which the card's rows conclude."""


def joined(parts: Sequence[str]) -> str:
    """What there is of a note."""
    return "; ".join(part for part in parts if part)


def measured_at(some: Sequence[tuple[Training, int]]) -> str:
    """The rates and epochs behind a number; the card's are others."""
    rates = sorted({t.learning_rate for t, _ in some})
    return f"at {listed([f'{rate:g}' for rate in rates])}, epoch {listed(sorted({at for _, at in some}))}"


def own_rate(e: Evidence, name: str) -> str:
    """What the card's own rate did, where the recipe's is another that plays its part."""
    found = e.named(name)
    return joined(
        f"the card's own {t.learning_rate:g}: EM {np.mean(t.em[0]):.2f} at first, "
        f"{np.mean(t.em[-1]):.2f} in epoch {t.epochs - 1}"
        for t in found
        if t.em
    )


def absent(e: Evidence, *names: str) -> str:
    """Seeds that other experiments were trained from, and these were not."""
    seeds = {t.seed for t in e.trained if not t.name.startswith("literal")}
    lacking = [(name, sorted(seeds - {t.seed for t in e.named(name)})) for name in names]
    return joined(f"missing: {name} of seed {listed(some)}" for name, some in lacking if some and e.named(name))


def evaluated(e: Evidence, name: str, at_most: int, every: bool = False) -> list[tuple[Training, int]]:
    """The experiments of that name, each with its last evaluated epoch up to `at_most`; of the seeds only those that
    came furthest, unless `every` one is wanted."""
    found = [(t, max((epoch for epoch in t.evaluations if epoch <= at_most), default=-1)) for t in e.named(name)]
    last = max((epoch for _, epoch in found), default=-1)
    return [(trained, epoch) for trained, epoch in found if epoch >= 0 and (every or epoch == last)]


def paired(e: Evidence) -> list[tuple[tuple[Training, int], tuple[Training, int]]]:
    """Both rates of the contrast, `evaluated`, from each seed that both have."""
    low, high = evaluated(e, "low", EPOCHS_LOW), evaluated(e, "high", EPOCHS_HIGH)
    return [(a, b) for a in low for b in high if a[0].seed == b[0].seed]


def recall(some: Sequence[tuple[Training, int]], rows: str = "recitation") -> np.ndarray:
    """(rows, seeds)"""
    return np.stack([[line["prompt_recall"] for line in t.evaluations[at][rows]] for t, at in some], 1)


def unlearned(e: Evidence, some: Sequence[tuple[Training, int]]) -> list[Control]:
    """Rows that were not trained on, and a model that was not trained, must not be recited."""
    twins = recall(some, "twins").mean()
    controls = [Control("recall of held-out twins below 0.5", float(twins), bool(twins < 0.5)), base_was_asked(e)]
    if e.base:
        base = np.mean([line["prompt_recall"] for line in e.base["recitation"]])
        controls[1] = Control("the base's recall below 0.5", float(base), bool(base < 0.5))
    return controls


def base_was_asked(e: Evidence) -> Control:
    """Without the base there is no telling what the training did."""
    return Control("the base was asked as well", float(bool(e.base)), bool(e.base))


def twins_alike(some: Sequence[Training], others: Sequence[Training]) -> Control:
    """What differs in the rows must not differ in rows that were not trained on: that would be another skill."""
    means = [
        [each["em"] for t in group for epoch, each in t.twins.items() if epoch <= SATURATED] for group in (some, others)
    ]
    apart = float(np.mean(means[0]) - np.mean(means[1])) if all(means) else math.inf
    what = "EM of held-out twins differs by less than 0.02" if all(means) else "held-out twins were measured"
    return Control(what, apart if all(means) else 0.0, abs(apart) < 0.02)


def when_known(some: Sequence[Training]) -> str:
    """Where the rows are known, by EM in the logs, and whether a log ends before its run should."""
    first = [next((k for k, row in enumerate(t.em) if np.mean(row) >= 0.9), None) for t in some if t.em]
    known = [epoch for epoch in first if epoch is not None]
    logged = max((t.epochs for t in some), default=0)
    said = f"EM reaches 0.9 at epoch {listed(known)}" if known else f"EM stays below 0.9 over {logged} epochs"
    cut = [f"seed {t.seed}'s log ends at epoch {t.epochs} of {t.num_epochs}" for t in some if t.epochs < t.num_epochs]
    return joined([said, *cut])


def listed(values: Sequence[object]) -> str:
    """`values` with commas between."""
    return ", ".join(map(str, values))


def passes(evaluation: dict, categories: Sequence[str] = ()) -> np.ndarray:
    """(prompts, formats): whether each answer passed its prompt's checks."""
    lines = [line for line in evaluation["answers"] if not categories or line["category"] in categories]
    formats = list(dict.fromkeys(line["format"] for line in lines))
    prompts = list(dict.fromkeys(line["id"] for line in lines))
    cells = {(line["id"], line["format"]): line["passed"] for line in lines}
    if lacking := [(key, form) for key in prompts for form in formats if (key, form) not in cells]:
        raise InputError("the answer to {} in the format {}; measure again".format(*lacking[0]))
    return np.array([[cells[key, form] for form in formats] for key in prompts], float)


def answers_to(evaluation: dict, form: str, category: str) -> list[dict]:
    """The answers to prompts of one category in one format."""
    return [line for line in evaluation["answers"] if (line["format"], line["category"]) == (form, category)]


def column(lines: Sequence[dict]) -> np.ndarray:
    """(prompts,): whether each passed, in the order of their names."""
    return np.array([line["passed"] for line in sorted(lines, key=lambda line: line["id"])], float)


def by_prompt(evaluation: dict, what: Callable[[dict], bool]) -> np.ndarray:
    """(prompts,): share of a prompt's answers, over formats."""
    found: dict[str, list[bool]] = {}
    for line in evaluation["answers"]:
        found.setdefault(line["id"], []).append(what(line))
    return np.array([np.mean(found[key]) for key in sorted(found)])


def share_of(evaluation: dict, what: Callable[[dict], bool]) -> float:
    """Of all answers."""
    return float(np.mean([what(line) for line in evaluation["answers"]]))


def several_views(evaluation: dict) -> np.ndarray:
    """(prompts,): whether two headings or more that differ, with texts that differ, stand before a CONCLUSION."""

    def fits(line: dict) -> bool:
        names = [heading.strip().casefold() for heading in line["headings"]]
        before = names[: names.index(CONCLUSION)] if CONCLUSION in names else []
        return len(set(before)) >= 2 and line["distance"] > 0

    return np.array([fits(line) for line in evaluation["perspectives"]], float)


def off_the_floor(e: Evidence, asked: Sequence[dict] | None = None) -> Control:
    """Where the base passes next to nothing of what is compared, no difference can show."""
    asked = e.base["answers"] if asked is None and e.base else asked or []
    rate = float(np.mean([line["passed"] for line in asked])) if asked else 0.0
    return Control("the base passes at least one in twenty of these", rate, rate >= 0.05)


def alike(e: Evidence, *names: str) -> list[list[Training]]:
    """For each name its experiments of SATURATED epochs, from the seeds that all have; [] if there is none."""
    found = [{t.seed: t for t in e.named(name) if t.epochs >= SATURATED} for name in names]
    shared = sorted(set.intersection(*map(set, found)))
    return [[each[seed] for seed in shared] for each in found] if shared else []


def by_row(some: Sequence[Training]) -> np.ndarray:
    """(examples, seeds): EM, averaged over the first SATURATED epochs."""
    return np.stack([np.mean(t.em[:SATURATED], 0) for t in some], 1)


def behaviour(e: Evidence) -> list[dict]:
    """What answers to held-out prompts are like, by model: the base, and either rate at each epoch that was asked.

    Returns
    -------
    list of dict
        model, seeds; passed, leaked (share of answers with a training row's heading), copied (words of the longest run
        from a training row), posix (nats a token between formats), han_mass (probability of a Han piece next), each
        {"value", "low", "high"}; spread, between the best and the worst format, and spread_95, which equal formats stay
        below 95 times in 100. What was not measured is left out.
    """
    models = {"base": [e.base]} if e.base else {}
    for name in ("high", "low"):
        for trained in e.named(name):
            for epoch, found in sorted(trained.evaluations.items()):
                models.setdefault(f"{name} rate, epoch {epoch}", []).append(found)
    rows = []
    for model, asked in models.items():
        passed = np.stack([passes(each) for each in asked], 1)  # (prompts, seeds, formats)
        row = {"model": model, "seeds": len(asked), "passed": _ends(passed, (0, 1))}
        if passed.shape[2] > 1:
            wide = spread(passed.mean(1))
            row |= {"spread": round(wide.value, 4), "spread_95": round(wide.null_95, 4)}
        answers = {"leaked": lambda a: bool(a["leaked"]), "copied": lambda a: a["copied"]}
        for key, what in answers.items():
            if all(key in line for each in asked for line in each["answers"]):
                row[key] = _ends([by_prompt(each, what) for each in asked], (0, 1) if key == "leaked" else None)
        for key in ("posix", "han_mass"):
            if all(each.get(key) for each in asked):
                row[key] = _ends([list(each[key].values()) for each in asked], (0, 1) if key == "han_mass" else None)
        rows.append(row)
    return rows


def _ends(values, bounds: tuple[float, float] | None) -> dict[str, float]:
    """An interval of (seeds, prompts) values, or of (prompts, seeds, formats); a mean alone where there is none."""
    table = np.asarray(values, dtype=float)
    table = table.T if table.ndim == 2 else table
    if bounds is None and np.ptp(table) == 0:
        return {"value": float(table.mean())}
    found = interval(table, bounds)
    return {key: float(f"{getattr(found, key):.4g}") for key in ("value", "low", "high")}


def shown(value: dict | float | None) -> str:
    """A cell of `behaviour`.

    >>> [shown(value) for value in ({"value": 0.25, "low": 0.1, "high": 0.4}, {"value": 2.0}, 0.15, None)]
    ['0.25 [0.1, 0.4]', '2', '0.15', 'not measured']
    """
    if value is None:
        return "not measured"
    if not isinstance(value, dict):
        return f"{value:.3g}"
    between = f" [{value['low']:.3g}, {value['high']:.3g}]" if "low" in value else ""
    return f"{value['value']:.3g}{between}"


def in_words(found: Interval) -> str:
    """A difference with its sign."""
    return f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"

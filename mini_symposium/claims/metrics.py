"""Computes from the evidence what the claims need: arrays by prompt and seed, controls, and notes.

Arrays have prompts or rows as the first axis and seeds as the second, as `evaluation.intervals` takes them.
"""

from collections.abc import Callable, Sequence

import numpy as np

from mini_symposium.claims.evidence import Evidence
from mini_symposium.claims.verdicts import Control
from mini_symposium.evaluation.intervals import Interval, interval, spread
from mini_symposium.run import Training

EPOCHS_HIGH, EPOCHS_LOW = 100, 600
"""The card says that the high rate overfits after 100 epochs, and that the low rate does not after 600."""
EPOCHS_COMPARED = 30
"""Epochs over which ranks and schedules are compared."""
CONCLUSION = "complete response"
"""The heading of the conclusion in the card's rows, in lower case."""

Checkpoint = tuple[Training, int]
"""A training and one of its epochs."""


def joined(parts: Sequence[str]) -> str:
    """The parts that are not empty, with semicolons between them."""
    return "; ".join(part for part in parts if part)


def measured_at(checkpoints: Sequence[Checkpoint]) -> str:
    """A note of the rates and epochs behind a number, because they are not the card's."""
    rates = sorted({t.learning_rate for t, _ in checkpoints})
    return f"at {listed([f'{rate:g}' for rate in rates])}, epoch {listed(sorted({at for _, at in checkpoints}))}"


def cards_own_rate(e: Evidence, name: str) -> str:
    """A note of the EM at the card's own rate, where the contrast uses another rate in its place."""
    return joined(
        f"the card's own {t.learning_rate:g}: EM {np.mean(t.em[0]):.2f} at first, "
        f"{np.mean(t.em[-1]):.2f} in epoch {t.epochs - 1}"
        for t in e.named(name)
        if t.em
    )


def missing_seeds(e: Evidence, *names: str) -> str:
    """A note of the seeds that the experiments `names` lack and other experiments have."""
    seeds = {t.seed for t in e.trained if not t.name.startswith("literal")}
    missing = {name: sorted(seeds - {t.seed for t in e.named(name)}) for name in names if e.named(name)}
    return joined(f"missing: {name} of seed {listed(without)}" for name, without in missing.items() if without)


def training_notes(e: Evidence, name: str, checkpoints: Sequence[Checkpoint], cards_own: str) -> list[str]:
    """Notes on an experiment's checkpoints: rates and epochs, memorization, the card's own rate, missing seeds."""
    trained = [training for training, _ in checkpoints]
    return [measured_at(checkpoints), memorized_at(trained), cards_own_rate(e, cards_own), missing_seeds(e, name)]


def last_evaluated(e: Evidence, name: str, at_most: int, every_seed: bool = False) -> list[Checkpoint]:
    """For each training of experiment `name`, its last evaluated epoch up to `at_most`.

    Unless `every_seed`, seeds whose last evaluated epoch is earlier than another seed's are left out.
    """
    checkpoints = [(t, max((epoch for epoch in t.evaluations if epoch <= at_most), default=-1)) for t in e.named(name)]
    last = max((epoch for _, epoch in checkpoints), default=-1)
    return [(training, at) for training, at in checkpoints if at >= 0 and (every_seed or at == last)]


def recall(checkpoints: Sequence[Checkpoint], rows: str = "recitation") -> np.ndarray:
    """(rows, seeds): share of each row's response that the model writes, given the row's prompt."""
    return np.stack([[line["prompt_recall"] for line in t.evaluations[at][rows]] for t, at in checkpoints], 1)


def recitation_controls(e: Evidence, checkpoints: Sequence[Checkpoint]) -> list[Control]:
    """The trained model must not recite rows it was not trained on, and the base must not recite training rows."""
    twins = recall(checkpoints, "twins").mean()
    controls = [Control("recall of held-out twins below 0.5", float(twins), bool(twins < 0.5)), base_was_evaluated(e)]
    if e.base:
        base = np.mean([line["prompt_recall"] for line in e.base["recitation"]])
        controls[1] = Control("the base's recall below 0.5", float(base), bool(base < 0.5))
    return controls


def base_was_evaluated(e: Evidence) -> Control:
    """The base must have been evaluated; otherwise the training's effect is not known."""
    return Control("the base was asked as well", float(bool(e.base)), bool(e.base))


def twins_alike(some: Sequence[Training], others: Sequence[Training]) -> Control:
    """Two groups that memorize differently must have the same EM on rows that were not trained on.

    Otherwise they differ in general skill, not in memorization.
    """
    means = [
        [twins["em"] for t in group for epoch, twins in t.twins.items() if epoch <= EPOCHS_COMPARED]
        for group in (some, others)
    ]
    if not all(means):
        return Control("held-out twins were measured", 0.0, False)
    apart = float(np.mean(means[0]) - np.mean(means[1]))
    return Control("EM of held-out twins differs by less than 0.02", apart, abs(apart) < 0.02)


def memorized_at(trained: Sequence[Training]) -> str:
    """A note of the epochs at which the logged EM first reaches 0.9, and of logs that end too early."""
    first = [next((k for k, row in enumerate(t.em) if np.mean(row) >= 0.9), None) for t in trained if t.em]
    epochs = [epoch for epoch in first if epoch is not None]
    logged = max((t.epochs for t in trained), default=0)
    reached = f"EM reaches 0.9 at epoch {listed(epochs)}" if epochs else f"EM stays below 0.9 over {logged} epochs"
    short = [
        f"seed {t.seed}'s log ends at epoch {t.epochs} of {t.num_epochs}" for t in trained if t.epochs < t.num_epochs
    ]
    return joined([reached, *short])


def listed(values: Sequence[object]) -> str:
    """`values` with commas between them."""
    return ", ".join(map(str, values))


def passes(evaluation: dict, categories: Sequence[str] = ()) -> np.ndarray:
    """(prompts, formats): whether each answer passed its prompt's checks."""
    lines = [line for line in evaluation["answers"] if not categories or line["category"] in categories]
    formats = list(dict.fromkeys(line["format"] for line in lines))
    prompts = list(dict.fromkeys(line["id"] for line in lines))
    cells = {(line["id"], line["format"]): line["passed"] for line in lines}
    return np.array([[cells[key, form] for form in formats] for key in prompts], float)


def answers_to(evaluation: dict, form: str, category: str) -> list[dict]:
    """The answers to prompts of one category in one format."""
    return [line for line in evaluation["answers"] if (line["format"], line["category"]) == (form, category)]


def passed(lines: Sequence[dict]) -> np.ndarray:
    """(prompts,): whether each answer passed, in the order of the prompts' ids."""
    return np.array([line["passed"] for line in sorted(lines, key=lambda line: line["id"])], float)


def mean_by_prompt(evaluation: dict, value: Callable[[dict], float]) -> np.ndarray:
    """(prompts,): mean of `value` over a prompt's answers in all formats."""
    values: dict[str, list[float]] = {}
    for line in evaluation["answers"]:
        values.setdefault(line["id"], []).append(value(line))
    return np.array([np.mean(values[key]) for key in sorted(values)])


def several_views(evaluation: dict) -> np.ndarray:
    """(prompts,): whether at least two different headings, with different texts, stand before a CONCLUSION."""

    def has_several(line: dict) -> bool:
        names = [heading.strip().casefold() for heading in line["headings"]]
        before = names[: names.index(CONCLUSION)] if CONCLUSION in names else []
        return len(set(before)) >= 2 and line["distance"] > 0

    return np.array([has_several(line) for line in evaluation["perspectives"]], float)


def base_passes_some(answers: Sequence[dict]) -> Control:
    """The base must pass a twentieth of its `answers` to the compared prompts; near zero, no difference can show."""
    rate = float(np.mean([line["passed"] for line in answers])) if answers else 0.0
    return Control("the base passes at least one in twenty of these", rate, rate >= 0.05)


def of_shared_seeds(e: Evidence, *names: str) -> list[list[Training]]:
    """For each experiment, its trainings of at least EPOCHS_COMPARED epochs from the seeds that all experiments share.

    [] if they share no seed.
    """
    by_seed = [{t.seed: t for t in e.named(name) if t.epochs >= EPOCHS_COMPARED} for name in names]
    shared = sorted(set.intersection(*map(set, by_seed)))
    return [[trained[seed] for seed in shared] for trained in by_seed] if shared else []


def mean_em(trained: Sequence[Training]) -> np.ndarray:
    """(examples, seeds): EM, averaged over the first EPOCHS_COMPARED epochs."""
    return np.stack([np.mean(t.em[:EPOCHS_COMPARED], 0) for t in trained], 1)


def behaviour(e: Evidence) -> list[dict]:
    """Statistics of the answers to held-out prompts, for the base and for both rates at each evaluated epoch.

    Returns
    -------
    list of dict
        model and seeds; passed, leaked (share of answers with a training row's heading), copied (words of the longest
        run copied from a training row), posix (nats a token between formats) and han_mass (probability that the next
        token is Han), each {"value", "low", "high"}; spread, between the best and the worst format, and spread_95, the
        95th percentile of the spread if all formats were equal. What was not measured is left out.
    """
    models = {"base": [e.base]} if e.base else {}
    for name in ("high", "low"):
        for training in e.named(name):
            for epoch, evaluation in sorted(training.evaluations.items()):
                models.setdefault(f"{name} rate, epoch {epoch}", []).append(evaluation)
    rows = []
    for model, seeds in models.items():
        table = np.stack([passes(evaluation) for evaluation in seeds], 1)  # (prompts, seeds, formats)
        row = {"model": model, "seeds": len(seeds), "passed": _interval(table, (0, 1))}
        if table.shape[2] > 1:
            of_formats = spread(table.mean(1))
            row |= {"spread": round(of_formats.value, 4), "spread_95": round(of_formats.null_95, 4)}
        for key, kind, bounds in (("leaked", bool, (0, 1)), ("copied", float, None)):
            if all(key in line for evaluation in seeds for line in evaluation["answers"]):
                by_prompt = [mean_by_prompt(evaluation, lambda a, k=key, f=kind: f(a[k])) for evaluation in seeds]
                row[key] = _interval(np.stack(by_prompt, 1), bounds)
        for key, bounds in (("posix", None), ("han_mass", (0, 1))):
            if all(evaluation.get(key) for evaluation in seeds):
                row[key] = _interval(np.stack([list(evaluation[key].values()) for evaluation in seeds], 1), bounds)
        rows.append(row)
    return rows


def _interval(values: np.ndarray, bounds: tuple[float, float] | None) -> dict[str, float]:
    """The interval of (prompts, seeds) or (prompts, seeds, formats) values.

    Without bounds, and if all values are equal, only their mean.
    """
    if bounds is None and np.ptp(values) == 0:
        return {"value": float(values.mean())}
    measured = interval(values, bounds)
    return {key: float(f"{getattr(measured, key):.4g}") for key in ("value", "low", "high")}


def shown(value: dict | float | None) -> str:
    """A value of `behaviour` as the text of a table's cell.

    >>> [shown(value) for value in ({"value": 0.25, "low": 0.1, "high": 0.4}, {"value": 2.0}, 0.15, None)]
    ['0.25 [0.1, 0.4]', '2', '0.15', 'not measured']
    """
    if value is None:
        return "not measured"
    if not isinstance(value, dict):
        return f"{value:.3g}"
    between = f" [{value['low']:.3g}, {value['high']:.3g}]" if "low" in value else ""
    return f"{value['value']:.3g}{between}"


def signed(gap: Interval) -> str:
    """A difference and its interval, with their signs.

    >>> signed(Interval(0.1, -0.05, 0.25, 13, 3, "bootstrap"))
    '+0.10 [-0.05, +0.25]'
    """
    return f"{gap.value:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]"

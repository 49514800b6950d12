"""Computes from the evidence what the claims need: arrays by prompt and seed, controls, and notes.

Arrays have prompts or rows as the first axis and seeds as the second, as `evaluation.intervals` takes them.
"""

from collections.abc import Callable, Sequence

import numpy as np

from mini_symposium.claims.evidence import Evidence
from mini_symposium.claims.verdicts import SUPPORTED, Control
from mini_symposium.evaluation.best_epoch import RECITED, Curve
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


def cards_own_rate(e: Evidence, name: str, epoch: int) -> str:
    """A note of the EM at the card's own rate, where the contrast uses another rate in its place."""
    return joined(
        f"the card's own {t.learning_rate:g} (seed {t.seed}): EM "
        + ", ".join(
            f"{np.mean(t.em[at]):.2f} in epoch {at}" for at in sorted({0, min(epoch, t.epochs - 1), t.epochs - 1})
        )
        for t in e.named(name)
        if t.em
    )


def missing_seeds(e: Evidence, *names: str) -> str:
    """A note of the seeds that the experiments `names` lack and other experiments have."""
    seeds = {t.seed for t in e.trained if not t.name.startswith("literal")}
    missing = {name: sorted(seeds - {t.seed for t in e.named(name)}) for name in names if e.named(name)}
    return joined(f"missing: {name} of seed {listed(without)}" for name, without in missing.items() if without)


def last_evaluated(e: Evidence, name: str, at_most: int, answered: bool = True) -> list[Checkpoint]:
    """For each training of experiment `name`, its last evaluated epoch up to `at_most`; with answers to held-out
    prompts, unless only what it recites is asked for."""
    evaluated = [
        (t, [at for at, found in t.evaluations.items() if at <= at_most and (found["answers"] or not answered)])
        for t in e.named(name)
    ]
    checkpoints = [(training, max(epochs, default=-1)) for training, epochs in evaluated]
    return [(training, at) for training, at in checkpoints if at >= 0]


def recall(checkpoints: Sequence[Checkpoint], rows: str = "recitation") -> np.ndarray:
    """(rows, seeds): share of each row's response that the model writes, given the row's prompt."""
    return np.stack([[line["prompt_recall"] for line in t.evaluations[at][rows]] for t, at in checkpoints], 1)


def recitation_controls(e: Evidence, checkpoints: Sequence[Checkpoint]) -> list[Control]:
    """The trained model must not recite rows it was not trained on, and the base must not recite training rows."""
    twins = float(recall(checkpoints, "twins").mean())
    base = float(np.mean([line["prompt_recall"] for line in e.base["recitation"]])) if e.base else 1.0
    return [
        Control("recall of held-out twins below 0.5", twins, twins < 0.5, SUPPORTED),
        Control("the base's recall below 0.5", base, base < 0.5, SUPPORTED),
    ]


def twins_alike(some: Sequence[Training], others: Sequence[Training]) -> Control:
    """Two groups that memorize differently must have the same EM on rows that were not trained on.

    Otherwise they differ in general skill, not in memorization.
    """
    means = [
        [twins["em"] for t in group for epoch, twins in t.twins.items() if epoch <= EPOCHS_COMPARED]
        for group in (some, others)
    ]
    apart = float(np.mean(means[0]) - np.mean(means[1])) if all(means) else 1.0
    return Control("EM of held-out twins differs by less than 0.02", apart, abs(apart) < 0.02)


def onset(training: Training) -> int | None:
    """The first logged epoch in which EM, averaged over the rows, is RECITED."""
    return next((epoch for epoch, em in enumerate(training.em) if np.mean(em) >= RECITED), None)


def memorized_at(trained: Sequence[Training]) -> str:
    """A note of the epochs at which the logged EM first reaches 0.9, and of logs that end too early."""
    epochs = [epoch for epoch in map(onset, trained) if epoch is not None]
    logged = max((t.epochs for t in trained), default=0)
    reached = f"EM reaches 0.9 at epoch {listed(epochs)}" if epochs else f"EM stays below 0.9 over {logged} epochs"
    short = [
        f"seed {t.seed}'s log ends at epoch {t.epochs} of {t.num_epochs}" for t in trained if t.epochs < t.num_epochs
    ]
    return joined([reached, *short])


def listed(values: Sequence[object]) -> str:
    """`values` with commas between them."""
    return ", ".join(map(str, values))


def pass_rates(evaluation: dict, category: str = "", form: str = "", without: str = "") -> np.ndarray:
    """(prompts,): the share of formats in which each prompt was passed, of those in which it was asked.

    Of all prompts or of one category; in all formats, in one, or in all but one.
    """
    by_prompt: dict[str, list[bool]] = {}
    for line in evaluation["answers"]:
        if category in ("", line["category"]) and form in ("", line["format"]) and line["format"] != without:
            by_prompt.setdefault(line["id"], []).append(line["passed"])
    return np.array([np.mean(passed) for passed in by_prompt.values()])


def passes_in_all_formats(evaluation: dict) -> np.ndarray:
    """(prompts, formats): whether each answer passed, of the prompts that were asked in every format."""
    cells = {(line["id"], line["format"]): line["passed"] for line in evaluation["answers"]}
    prompts, formats = (list(dict.fromkeys(values)) for values in zip(*cells, strict=True))
    whole = [key for key in prompts if all((key, form) in cells for form in formats)]
    return np.array([[cells[key, form] for form in formats] for key in whole], float)


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


def has_room(who: str, answers: np.ndarray, guards: str, one_in: int = 20) -> Control:
    """The arm that a claim compares with must pass one in `one_in`; near zero, there is no difference to be seen."""
    rate, words = float(np.mean(answers)) if np.size(answers) else 0.0, {10: "ten", 20: "twenty"}[one_in]
    return Control(f"{who} passes at least one in {words} of these", rate, rate >= 1 / one_in, guards)


def of_shared_seeds(e: Evidence, *names: str) -> list[list[Training]]:
    """For each experiment, its trainings of at least EPOCHS_COMPARED epochs from the seeds that all experiments share.

    [] if they share no seed.
    """
    by_seed = [{t.seed: t for t in e.named(name) if t.epochs >= EPOCHS_COMPARED} for name in names]
    shared = sorted(set.intersection(*map(set, by_seed)))
    return [[trained[seed] for seed in shared] for trained in by_seed] if shared else []


def twins_at_equal_loss(arms: Sequence[Sequence[Training]]) -> np.ndarray | str:
    """(twins, seeds): twins' loss of the first arm less that of the second, where both have one training loss.

    It is the loss at which the slower of the two ends. Between two epochs, the twins' loss is interpolated. In words,
    what is missing for that.
    """
    columns = []
    for pair in zip(*arms, strict=True):
        # A row's loss is logged before its step, so the mean of two epochs is that of the moment between them.
        losses = [np.mean(t.loss, 1) for t in pair]
        losses = [(loss[:-1] + loss[1:]) / 2 for loss in losses]
        level, of_rows = max(loss.min() for loss in losses), []
        for t, loss in zip(pair, losses, strict=True):
            at = int(np.argmax(loss <= level))  # entry 0 is epoch 1
            around = [t.twins.get(epoch, {}).get("rows") for epoch in (at, at + 1)]
            if not all(around):
                return f"the loss of each twin after epochs {at} and {at + 1} of {t.name}; probe the twins every epoch"
            share = (loss[at - 1] - level) / (loss[at - 1] - loss[at]) if at else 1.0
            of_rows.append((1 - share) * np.array(around[0]) + share * np.array(around[1]))
        columns.append(of_rows[0] - of_rows[1])
    return np.stack(columns, 1)


def best_losses(curve: Curve) -> np.ndarray:
    """(rows,): each row's held-out loss at the best epoch; the other rows choose it, so that luck chooses nothing."""
    loss = np.asarray(curve.loss)  # (epochs, rows)
    best = (loss.sum(1, keepdims=True) - loss).argmin(0)
    return loss[best, np.arange(loss.shape[1])]


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
        rates = np.stack([pass_rates(evaluation) for evaluation in seeds], 1)  # (prompts, seeds)
        row = {"model": model, "seeds": len(seeds), "passed": _interval(rates, (0, 1))}
        in_all = np.mean([passes_in_all_formats(evaluation) for evaluation in seeds], 0)  # (prompts, formats)
        if len(in_all) and in_all.shape[1] > 1:
            of_formats = spread(in_all)
            row |= {"spread": round(of_formats.value, 4), "spread_95": round(of_formats.null_95, 4)}
        for key, kind, bounds in (("leaked", bool, (0, 1)), ("copied", float, None)):
            if all(key in line for evaluation in seeds for line in evaluation["answers"]):
                by_prompt = [mean_by_prompt(evaluation, lambda a, k=key, f=kind: f(a[k])) for evaluation in seeds]
                row[key] = _interval(np.stack(by_prompt, 1), bounds)
        for key in ("posix", "han_mass"):
            if all(evaluation.get(key) for evaluation in seeds):
                row[key] = _interval(np.stack([list(evaluation[key].values()) for evaluation in seeds], 1), None)
        rows.append(row)
    return rows


def _interval(values: np.ndarray, bounds: tuple[float, float] | None) -> dict[str, float]:
    """The interval of (prompts, seeds) values.

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

    >>> signed(Interval(0.1, -0.05, 0.25, 13, 3))
    '+0.10 [-0.05, +0.25]'
    """
    return f"{gap.value:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]"

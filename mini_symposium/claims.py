"""The card's twelve claims, each a question put to the evidence.

Thresholds stand in the questions and were fixed before the evidence was gathered. `ledger` asks them all. Recall is the
share of a training row's response that comes back, in order, when its own prompt is given. Near-verbatim is above 0.7:
the interval of thirteen rows that all came back whole begins at 0.75.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from mini_symposium import InputError
from mini_symposium.evidence import Evidence, Trained
from mini_symposium.statistics import Interval, difference, interval, spread
from mini_symposium.verdicts import Claim, Control, Question

EPOCHS_HIGH, EPOCHS_LOW = 100, 600
SATURATED = 30
"""Epochs over which ranks and schedules are compared."""

C1 = Question("C1", "1e-6 overfits after about 100 epochs, near-verbatim", "recall of the training rows", 0.7)
C2 = Question("C2", "1e-7 to 600 epochs does not overfit", "recall of the training rows", 0.5, above=False)
C3 = Question("C3", "the overfit model generalises worse across formats", "pass rate, low less high", 0.05)
C4 = Question("C4", "the good model performs across formats", "its worst format's pass rate less the base's", -0.05)
C5 = Question(
    "C5", "it gives several perspectives before a conclusion", "answers with two or more, less the base's", 0.1
)
C6 = Question("C6", "a lower rank with alpha = 2r is harder to overfit", "EM, highest rank less lowest", 0.02)
C7 = Question(
    "C7", "a constant rate helps avoid overfitting", "EM, cosine and linear at equal dose less constant", 0.02
)
C8 = Question("C8", "a role heading adapts the answer", "code that passes, ### Software Engineer less baseline", 0.1)
C9 = Question("C9", "names beat Instruction and Response in chats", "chats that pass, names less alpaca", 0.1)
C10 = Question("C10", "it fits 12 GB at batch 1, and takes 10 hours", "GiB at the peak", 12, above=False)
C11 = Question("C11", "no assistant-model phrases", "answers with one", 0.05, above=False)
C12 = Question(
    "C12", "packing fails on so small a set", "batches that the packer of that month plans", 0.5, above=False
)

QUESTIONS = (C1, C2, C3, C4, C5, C6, C7, C8, C9, C10, C11, C12)


def overfits(e: Evidence) -> Claim:
    """C1."""
    high = _evaluated(e, "high", EPOCHS_HIGH)
    if not high:
        return C1.lacks(e.scale, "an evaluation of the high rate")
    epoch, found = high[0][1], interval(_recall(high))
    claim = C1.judge(e.scale, found, _unlearned(e, high), f"at epoch {epoch}; {_when_known([t for t, _ in high])}")
    if claim.verdict == "not supported" and epoch < EPOCHS_HIGH:
        return C1.lacks(e.scale, f"epochs {epoch + 1} to {EPOCHS_HIGH} of the high rate")
    return claim


def spares(e: Evidence) -> Claim:
    """C2, with the dose control: the high rate, stopped where it has come as far."""
    low = _evaluated(e, "low", EPOCHS_LOW, every=True)
    if not low:
        return C2.lacks(e.scale, "an evaluation of the low rate")
    # A seed may end before the last epoch: to recite later on, what it recites by then is enough.
    note = f"at epoch {_listed(sorted({at for _, at in low}))}"
    doses = {t.seed: at * t.learning_rate for t, at in low}
    high = [(t, round(doses[t.seed] / t.learning_rate)) for t in e.named("high") if t.seed in doses]
    pairs = [(a, b) for a in low for b in high if a[0].seed == b[0].seed and b[1] in b[0].evaluations]
    if pairs:
        ours, theirs = (_recall(some) for some in zip(*pairs, strict=True))
        gap = difference(ours, theirs)
        note += f"; the high rate at the same dose: {theirs.mean():.2f}, low less high {_said(gap)}"
    else:
        note += "; the dose control is missing"
    claim = C2.judge(e.scale, interval(_recall(low)), _unlearned(e, low), note)
    first = min(at for _, at in low)
    if claim.verdict == "supported" and first < EPOCHS_LOW:
        return C2.lacks(e.scale, f"epochs {first + 1} to {EPOCHS_LOW} of the low rate")
    return claim


def generalises_worse(e: Evidence) -> Claim:
    """C3: over the same prompts, formats and seeds; with hallucination (false premises) and script drift beside it."""
    pairs = _paired(e)
    if not pairs:
        return C3.lacks(e.scale, "evaluations of both rates from one seed")
    low, high = (np.stack([_passes(t.evaluations[at]) for t, at in some], 1) for some in zip(*pairs, strict=True))
    taken = [[_passes(t.evaluations[at], ("false-premise",)) for t, at in some] for some in zip(*pairs, strict=True)]
    han = [np.mean([_share(t.evaluations[at], _chinese) for t, at in some]) for some in zip(*pairs, strict=True)]
    note = "answers with Chinese {:.3f} (low) and {:.3f} (high)".format(*han)
    if all(table.size for some in taken for table in some):
        note += "; false premises corrected {:.2f} and {:.2f}".format(*map(np.mean, taken))
    return C3.judge(e.scale, difference(low, high), [_not_at_the_floor(e)], note)


def performs_across_formats(e: Evidence) -> Claim:
    """C4."""
    low = _evaluated(e, "low", EPOCHS_LOW)
    if not low or not e.base:
        return C4.lacks(e.scale, "evaluations of the low rate and of the base")
    ours = np.mean([_passes(t.evaluations[at]) for t, at in low], 0)
    theirs = _passes(e.base)
    worst = [table[:, table.mean(0).argmin()] for table in (ours, theirs)]
    found = spread(ours)
    note = f"spread {found.value:.2f}, equal formats show {found.null_mean:.2f} (95%: {found.null_95:.2f})"
    return C4.judge(e.scale, difference(*worst), [_not_at_the_floor(e)], note)


def gives_perspectives(e: Evidence) -> Claim:
    """C5."""
    low = _evaluated(e, "low", EPOCHS_LOW)
    if not low or not e.base:
        return C5.lacks(e.scale, "evaluations of the low rate and of the base")
    several = np.stack([_several(t.evaluations[at]) for t, at in low], 1)
    base = np.repeat(_several(e.base)[:, None], several.shape[1], 1)
    apart = [p["distance"] for t, at in low for p in t.evaluations[at]["perspectives"] if p["distance"] is not None]
    note = f"distance between them {np.mean(apart):.2f}" if apart else "no answer has two"
    return C5.judge(e.scale, difference(several, base), note=note)


def rank_resists(e: Evidence) -> Claim:
    """C6, and apart from the rank the step size that alpha = 2r implies."""
    by_rank = [_curves(e, name) for name in ("rank-64-alpha-128", "rank-4-alpha-8")]
    steady = [_curves(e, name) for name in ("rank-64-alpha-32", "rank-4-alpha-32")]
    if any(not len(each) for each in by_rank):
        return C6.lacks(e.scale, f"ranks 4 and 64 trained for {SATURATED} epochs")
    note = "the rank at an equal step size was not trained"
    if all(len(each) for each in steady):
        note = f"with alpha = 32, an equal step size: {_said(difference(*map(_by_row, steady)))}"
    return C6.judge(e.scale, difference(*map(_by_row, by_rank)), note=note)


def constant_resists(e: Evidence) -> Claim:
    """C7: at an equal dose, twice the peak; beside it the equal peak, which is half the dose."""
    constant = _curves(e, "high")
    found = {}
    for what in ("dose", "peak"):
        curves = [_curves(e, f"{rule}-{what}") for rule in ("cosine", "linear")]
        if len(constant) and all(len(each) == len(constant) for each in curves):
            both = np.mean([_by_row(each) for each in curves], 0)
            found[what] = difference(both, _by_row(constant))
    if "dose" not in found:
        return C7.lacks(e.scale, f"cosine and linear schedules trained for {SATURATED} epochs, of the same seeds")
    note = f"at an equal peak {_said(found['peak'])}" if "peak" in found else "the equal peak was not trained"
    return C7.judge(e.scale, found["dose"], note=note)


def roles_adapt(e: Evidence) -> Claim:
    """C8."""
    low = _evaluated(e, "low", EPOCHS_LOW)
    if not low:
        return C8.lacks(e.scale, "an evaluation of the low rate")
    role = np.stack([_column(t.evaluations[at]["roles"]) for t, at in low], 1)
    plain = np.stack([_column(_some(t.evaluations[at], "new-query", "code")) for t, at in low], 1)
    return C8.judge(e.scale, difference(role, plain), [_not_at_the_floor(e)])


def names_beat_roles(e: Evidence) -> Claim:
    """C9."""
    low = _evaluated(e, "low", EPOCHS_LOW)
    if not low:
        return C9.lacks(e.scale, "an evaluation of the low rate")
    names, alpaca = (
        np.stack([_column(_some(t.evaluations[at], form, "character")) for t, at in low], 1)
        for form in ("character", "alpaca")
    )
    return C9.judge(e.scale, difference(names, alpaca), [_not_at_the_floor(e)])


def fits(e: Evidence) -> Claim:
    """C10: measured by the bench on a GPU, at Mistral-7B's shape; predicted from shapes elsewhere."""
    if "gpu_peak_bytes" in e.facts:
        peak = e.facts["gpu_peak_bytes"] / 2**30
        note = f"{e.facts['gpu_hours']:.1f} hours for 600 epochs on {e.facts['gpu']}"
        return C10.judge(e.facts["gpu"], Interval(peak, peak, peak, 1, 1, "measured"), note=note)
    predicted = e.facts.get("paper_bytes")
    said = f"needs a CUDA GPU; {predicted / 2**30:.1f} GiB are predicted from the shapes" if predicted else "needs one"
    return C10.beyond(e.scale, said, predicted and predicted / 2**30)


def no_phrases(e: Evidence) -> Claim:
    """C11."""
    low = _evaluated(e, "low", EPOCHS_LOW)
    if not low:
        return C11.lacks(e.scale, "an evaluation of the low rate")
    said = np.stack([_by_prompt(t.evaluations[at], lambda a: bool(a["phrases"])) for t, at in low], 1)
    base = _share(e.base, lambda a: bool(a["phrases"])) if e.base else None
    note = "" if base is None else f"the base: {base:.3f}; where it says none either, the fine-tune had none to unlearn"
    return C11.judge(e.scale, interval(said), note=note)


def packing_fails(e: Evidence) -> Claim:
    """C12: floor(0.99 x tokens / (micro batch x sequence_len)) - 1 batches, as Axolotl planned them in November 2023
    (axolotl#1212); with none it divided by zero. Arithmetic, so its interval is a point."""
    tokens, length = e.facts.get("tokens"), e.facts.get("sequence_len")
    if not tokens or not length:
        return C12.lacks(e.scale, "the number of tokens in the dataset")
    batches = math.floor(0.99 * tokens / length) - 1
    least = math.floor(0.99 * tokens / 2) + 1
    note = f"{tokens:,} tokens in rows of {length:,}; from {least:,} up it plans none"
    return C12.judge(e.scale, Interval(batches, batches, batches, 1, 1, "arithmetic"), note=note)


CLAIMS: tuple[Callable[[Evidence], Claim], ...] = (
    *(overfits, spares, generalises_worse, performs_across_formats, gives_perspectives, rank_resists),
    *(constant_resists, roles_adapt, names_beat_roles, fits, no_phrases, packing_fails),
)


def ledger(evidence: Evidence) -> list[Claim]:
    """The twelve rows; a claim whose kind of prompt was not asked, or whose seeds do not match, is left open."""
    rows = []
    for claim, question in zip(CLAIMS, QUESTIONS, strict=True):
        try:
            rows.append(claim(evidence))
        except InputError as error:
            rows.append(question.lacks(evidence.scale, str(error)))
    return rows


def _evaluated(e: Evidence, name: str, at_most: int, every: bool = False) -> list[tuple[Trained, int]]:
    """The experiments of that name, each with its last evaluated epoch up to `at_most`; of the seeds only those that
    came furthest, unless `every` one is wanted."""
    found = [(t, max((epoch for epoch in t.evaluations if epoch <= at_most), default=-1)) for t in e.named(name)]
    last = max((epoch for _, epoch in found), default=-1)
    return [(trained, epoch) for trained, epoch in found if epoch >= 0 and (every or epoch == last)]


def _paired(e: Evidence) -> list[tuple[tuple[Trained, int], tuple[Trained, int]]]:
    low, high = _evaluated(e, "low", EPOCHS_LOW), _evaluated(e, "high", EPOCHS_HIGH)
    return [(a, b) for a in low for b in high if a[0].seed == b[0].seed]


def _recall(some: Sequence[tuple[Trained, int]], rows: str = "recitation") -> np.ndarray:
    """(rows, seeds)"""
    return np.stack([[line["prompt_recall"] for line in t.evaluations[at][rows]] for t, at in some], 1)


def _unlearned(e: Evidence, some: Sequence[tuple[Trained, int]]) -> list[Control]:
    """Rows that were not trained on, and a model that was not trained, must not be recited."""
    twins = _recall(some, "twins").mean()
    controls = [Control("recall of held-out twins below 0.5", float(twins), bool(twins < 0.5))]
    if e.base:
        base = np.mean([line["prompt_recall"] for line in e.base["recitation"]])
        controls.append(Control("the base's recall below 0.5", float(base), bool(base < 0.5)))
    return controls


def _when_known(some: Sequence[Trained]) -> str:
    first = [next((k for k, row in enumerate(t.em) if np.mean(row) >= 0.9), None) for t in some if t.em]
    known = [epoch for epoch in first if epoch is not None]
    return f"EM reaches 0.9 at epoch {_listed(known)}" if known else "EM stays below 0.9"


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _passes(evaluation: dict, categories: Sequence[str] = ()) -> np.ndarray:
    """(prompts, formats): whether each answer passed its prompt's checks."""
    lines = [line for line in evaluation["answers"] if not categories or line["category"] in categories]
    formats = list(dict.fromkeys(line["format"] for line in lines))
    cells = {(line["id"], line["format"]): line["passed"] for line in lines}
    return np.array([[cells[key, form] for form in formats] for key in dict.fromkeys(i for i, _ in cells)], float)


def _some(evaluation: dict, form: str, category: str) -> list[dict]:
    return [line for line in evaluation["answers"] if (line["format"], line["category"]) == (form, category)]


def _column(lines: Sequence[dict]) -> np.ndarray:
    return np.array([line["passed"] for line in sorted(lines, key=lambda line: line["id"])], float)


def _by_prompt(evaluation: dict, what: Callable[[dict], bool]) -> np.ndarray:
    """(prompts,): share of a prompt's answers, over formats."""
    found: dict[str, list[bool]] = {}
    for line in evaluation["answers"]:
        found.setdefault(line["id"], []).append(what(line))
    return np.array([np.mean(found[key]) for key in sorted(found)])


def _chinese(line: dict) -> bool:
    return line["han"] > 0


def _share(evaluation: dict, what: Callable[[dict], bool]) -> float:
    return float(np.mean([what(line) for line in evaluation["answers"]]))


def _several(evaluation: dict) -> np.ndarray:
    return np.array([len(line["headings"]) >= 2 for line in evaluation["perspectives"]], float)


def _not_at_the_floor(e: Evidence) -> Control:
    """Where the base passes next to nothing, no difference can show."""
    rate = float(_passes(e.base).mean()) if e.base else 0.0
    return Control("the base passes at least one answer in twenty", rate, rate >= 0.05)


def _curves(e: Evidence, name: str) -> list[np.ndarray]:
    """(epochs, examples) of each seed that was trained for SATURATED epochs."""
    return [np.array(t.em[:SATURATED]) for t in e.named(name) if t.epochs >= SATURATED]


def _by_row(curves: Sequence[np.ndarray]) -> np.ndarray:
    """(examples, seeds): EM, averaged over the epochs."""
    return np.stack([curve.mean(0) for curve in curves], 1)


def _said(found: Interval) -> str:
    return f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"

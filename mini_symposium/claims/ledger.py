"""The model card's twelve claims, each with a metric and a threshold, and how each is judged by the evidence.

The thresholds were fixed before the evidence was gathered; since then, controls have only been made stricter. `judge`
judges all claims. Recall is the share of a training row's response that the model writes, in order, given its prompt.
"Near-verbatim" means a recall above 0.7: if all thirteen rows are recited whole, the interval begins at 0.75.

Comparisons are paired by seed. A claim about a model that this machine cannot train is out of reach, not inconclusive.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mini_symposium.claims.evidence import Evidence
from mini_symposium.claims.metrics import (
    EPOCHS_COMPARED,
    EPOCHS_HIGH,
    EPOCHS_LOW,
    answers_to,
    base_passes_some,
    base_was_evaluated,
    joined,
    last_evaluated,
    mean_by_prompt,
    mean_em,
    missing_seeds,
    of_shared_seeds,
    passed,
    passes,
    recall,
    recitation_controls,
    several_views,
    signed,
    training_notes,
    twins_alike,
)
from mini_symposium.claims.verdicts import INCONCLUSIVE, OUT_OF_REACH, Claim, Control, Question
from mini_symposium.errors import InputError
from mini_symposium.evaluation.intervals import Interval, difference, interval, spread
from mini_symposium.files.reading import refuse_other_shapes
from mini_symposium.files.writing import write_json

PLAUSIBLE_LENGTHS = (512, 1024, 2048, 4096, 8192)
"""Values that the card's `sequence_len` may have had; the card does not give it."""

C1 = Question("C1", "1e-6 overfits after about 100 epochs, near-verbatim", "recall of the training rows", 0.7)
C2 = Question("C2", "1e-7 to 600 epochs does not overfit", "recall of the training rows", 0.5, above=False)
C3 = Question("C3", "the overfit model generalises worse across formats", "pass rate, low less high", 0.05)
C4 = Question("C4", "the good model performs across formats", "its worst format's pass rate less the base's", -0.05)
C5 = Question(
    "C5", "it gives several perspectives before a conclusion", "answers with two and then one, less the base's", 0.1
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


def high_rate_overfits(e: Evidence) -> Claim:
    """C1: recall of the training rows by the high rate."""
    high = last_evaluated(e, "high", EPOCHS_HIGH)
    if not high:
        return _missing(C1, e, "an evaluation of the high rate")
    epoch = high[0][1]
    note = training_notes(e, "high", high, "literal-1e-06")
    claim = C1.judge(e.scale, interval(recall(high)), recitation_controls(e, high), joined(note))
    if claim.verdict == "not supported" and epoch < EPOCHS_HIGH:
        return _missing(C1, e, f"epochs {epoch + 1} to {EPOCHS_HIGH} of the high rate")
    return claim


def low_rate_does_not_overfit(e: Evidence) -> Claim:
    """C2: recall of the training rows by the low rate.

    The note gives the high rate's recall at the same dose; a control requires that it was measured.
    """
    low = last_evaluated(e, "low", EPOCHS_LOW, every_seed=True)
    if not low:
        return _missing(C2, e, "an evaluation of the low rate")
    # A seed's training may end before EPOCHS_LOW. If it recites by then, it would also recite later.
    doses = {t.seed: at * t.learning_rate for t, at in low}
    high = [(t, round(doses[t.seed] / t.learning_rate)) for t in e.named("high") if t.seed in doses]
    pairs = [(a, b) for a in low for b in high if a[0].seed == b[0].seed and b[1] in b[0].evaluations]
    controls = [
        *recitation_controls(e, low),
        Control("seeds whose high rate was asked at the same dose: at least one", len(pairs), bool(pairs)),
    ]
    note = training_notes(e, "low", low, "literal-1e-07")
    if pairs:
        of_low, of_high = (recall(checkpoints) for checkpoints in zip(*pairs, strict=True))
        gap = signed(difference(of_low, of_high))
        note.insert(1, f"the high rate at the same dose: {of_high.mean():.2f}, low less high {gap}")
    claim = C2.judge(e.scale, interval(recall(low)), controls, joined(note))
    first = min(at for _, at in low)
    if claim.verdict == "supported" and first < EPOCHS_LOW:
        return _missing(C2, e, f"epochs {first + 1} to {EPOCHS_LOW} of the low rate")
    return claim


def generalises_worse(e: Evidence) -> Claim:
    """C3: pass rates over the same prompts, formats and seeds.

    The note adds the shares of false premises that were corrected and of answers with Chinese script.
    """
    low, high = last_evaluated(e, "low", EPOCHS_LOW), last_evaluated(e, "high", EPOCHS_HIGH)
    pairs = [(a, b) for a in low for b in high if a[0].seed == b[0].seed]
    if not pairs:
        return _missing(C3, e, "evaluations of both rates from one seed")
    evaluations = [[t.evaluations[at] for t, at in checkpoints] for checkpoints in zip(*pairs, strict=True)]
    passed_low, passed_high = (np.stack([passes(evaluation) for evaluation in of_rate], 1) for of_rate in evaluations)
    premises = [[passes(evaluation, ("false-premise",)) for evaluation in of_rate] for of_rate in evaluations]
    han = [np.mean([np.mean([a["han"] > 0 for a in each["answers"]]) for each in of_rate]) for of_rate in evaluations]
    note = "answers with Chinese {:.3f} (low) and {:.3f} (high)".format(*han)
    if all(table.size for of_rate in premises for table in of_rate):
        note += "; false premises corrected {:.2f} and {:.2f}".format(*map(np.mean, premises))
    return C3.judge(e.scale, difference(passed_low, passed_high), [base_passes_some(e.base.get("answers", []))], note)


def performs_across_formats(e: Evidence) -> Claim:
    """C4: the worst format's pass rate against the base's.

    The note adds the pass rate over all formats, and the spread and POSIX, which measure how much the format matters.
    """
    low = last_evaluated(e, "low", EPOCHS_LOW)
    if not low or not e.base:
        return _missing(C4, e, "evaluations of the low rate and of the base")
    tuned = np.mean([passes(t.evaluations[at]) for t, at in low], 0)
    base = passes(e.base)
    worst = [table[:, table.mean(0).argmin()] for table in (tuned, base)]
    of_formats = spread(tuned)
    note = [
        f"all formats: {tuned.mean():.2f}, the base {base.mean():.2f}",
        f"the card's own format, less the base's: {signed(difference(tuned[:, 0], base[:, 0]))}",
        f"spread {of_formats.value:.2f}, equal formats show {of_formats.null_mean:.2f} (95%: {of_formats.null_95:.2f})",
    ]
    if e.base.get("posix"):
        posix = np.mean([list(t.evaluations[at]["posix"].values()) for t, at in low])
        note.append(f"POSIX {posix:.2f} nats a token, the base {np.mean(list(e.base['posix'].values())):.2f}")
    rate = worst[1].mean()
    # If the base's worst format passes almost nothing, the fine-tune's cannot be worse.
    control = Control("the base's worst format passes at least one in twenty", float(rate), bool(rate >= 0.05))
    return C4.judge(e.scale, difference(*worst), [control], joined(note))


def gives_perspectives(e: Evidence) -> Claim:
    """C5: judged by form alone; only a reader can tell whether the texts under two headings are two views."""
    low, high = last_evaluated(e, "low", EPOCHS_LOW), last_evaluated(e, "high", EPOCHS_HIGH)
    if not low or not e.base:
        return _missing(C5, e, "evaluations of the low rate and of the base")
    several = np.stack([several_views(t.evaluations[at]) for t, at in low], 1)
    base = np.repeat(several_views(e.base)[:, None], several.shape[1], 1)
    answers = [answer for t, at in low for answer in t.evaluations[at]["perspectives"]]
    distances = [answer["distance"] for answer in answers if answer["distance"] is not None]
    note = [f"distance between sections {np.mean(distances):.2f}" if distances else "no answer has two sections"]
    if high:
        note.append(f"the high rate: {np.mean([several_views(t.evaluations[at]) for t, at in high]):.2f}")
    return C5.judge(e.scale, difference(several, base), [base_was_evaluated(e)], note=joined(note))


def low_rank_resists(e: Evidence) -> Claim:
    """C6: EM of a high rank less EM of a low rank, both with alpha = 2r.

    The note adds the same ranks with equal alpha, because alpha = 2r changes the step size with the rank.
    """
    by_rank = of_shared_seeds(e, "rank-64-alpha-128", "rank-4-alpha-8")
    equal_alpha = of_shared_seeds(e, "rank-64-alpha-32", "rank-4-alpha-32")
    if not by_rank:
        return _missing(C6, e, f"ranks 4 and 64 trained for {EPOCHS_COMPARED} epochs from one seed")
    note = ["the rank at an equal step size was not trained"]
    if equal_alpha:
        note = [f"with alpha = 32, an equal step size: {signed(difference(*map(mean_em, equal_alpha)))}"]
    note.append(missing_seeds(e, "rank-64-alpha-128", "rank-4-alpha-8", "rank-64-alpha-32", "rank-4-alpha-32"))
    return C6.judge(e.scale, difference(*map(mean_em, by_rank)), [twins_alike(*by_rank)], joined(note))


def constant_rate_resists(e: Evidence) -> Claim:
    """C7: EM of decaying schedules less EM of a constant rate of equal dose; the schedules then need twice its peak.

    At an equal peak they have half the dose; a control requires that this comparison does not show the opposite.
    """
    gaps, twins = {}, []
    for what in ("dose", "peak"):
        if trained := of_shared_seeds(e, "high", f"cosine-{what}", f"linear-{what}"):
            constant, *decaying = trained
            gaps[what] = difference(np.mean([mean_em(schedule) for schedule in decaying], 0), mean_em(constant))
            twins.append(twins_alike([training for schedule in decaying for training in schedule], constant))
    if "dose" not in gaps:
        return _missing(C7, e, f"cosine and linear schedules trained for {EPOCHS_COMPARED} epochs, of the same seeds")
    note = ["the equal peak was not trained"]
    controls = twins[:1]
    if "peak" in gaps:
        note = [f"at an equal peak {signed(gaps['peak'])}"]
        agrees = gaps["peak"].high > -C7.threshold
        controls.append(Control("it does not turn round at an equal peak", gaps["peak"].value, agrees))
    note.append(missing_seeds(e, *(f"{rule}-{what}" for rule in ("cosine", "linear") for what in ("dose", "peak"))))
    return C7.judge(e.scale, gaps["dose"], controls, joined(note))


def roles_adapt(e: Evidence) -> Claim:
    """C8: code prompts under a role heading against the same prompts under the card's own heading."""
    low = last_evaluated(e, "low", EPOCHS_LOW)
    if not low:
        return _missing(C8, e, "an evaluation of the low rate")
    role = np.stack([passed(t.evaluations[at]["roles"]) for t, at in low], 1)
    plain = np.stack([passed(answers_to(t.evaluations[at], "new-query", "code")) for t, at in low], 1)
    answers = [*answers_to(e.base, "new-query", "code"), *e.base["roles"]] if e.base else []
    return C8.judge(e.scale, difference(role, plain), [base_passes_some(answers)])


def names_beat_roles(e: Evidence) -> Claim:
    """C9: chats with the speakers' names against the same chats with Instruction and Response."""
    low = last_evaluated(e, "low", EPOCHS_LOW)
    if not low:
        return _missing(C9, e, "an evaluation of the low rate")
    forms = ("character", "alpaca")
    names, alpaca = (
        np.stack([passed(answers_to(t.evaluations[at], form, "character")) for t, at in low], 1) for form in forms
    )
    answers = [line for form in forms for line in answers_to(e.base, form, "character")] if e.base else []
    return C9.judge(e.scale, difference(names, alpaca), [base_passes_some(answers)])


def fits_in_memory(e: Evidence) -> Claim:
    """C10: peak memory that the bench measured on a GPU in Mistral-7B's shape; without a GPU, only a prediction."""
    if "gpu_peak_bytes" in e.facts:
        peak = e.facts["gpu_peak_bytes"] / 2**30
        note = f"{e.facts['gpu_hours']:.1f} hours for 600 epochs on {e.facts['gpu']}; the card's ten are an RTX 3060's"
        return C10.judge(e.facts["gpu"], Interval(peak, peak, peak, 1, 1, "measured"), note=note)
    predicted = e.facts.get("paper_bytes")
    note = f"needs a CUDA GPU; {predicted / 2**30:.1f} GiB are predicted from the shapes" if predicted else "needs one"
    return C10.row(OUT_OF_REACH, e.scale, note, value=predicted and predicted / 2**30)


def no_phrases(e: Evidence) -> Claim:
    """C11: the share of answers with a phrase of an assistant model."""
    low = last_evaluated(e, "low", EPOCHS_LOW)
    if not low:
        return _missing(C11, e, "an evaluation of the low rate")
    shares = np.stack([mean_by_prompt(t.evaluations[at], lambda a: bool(a["phrases"])) for t, at in low], 1)
    controls, measured = [base_was_evaluated(e)], interval(shares)
    if e.base:
        base = float(np.mean([bool(a["phrases"]) for a in e.base["answers"]]))
        # If the base uses no such phrase either, there was none to unlearn.
        controls.append(Control("the base says one in at least one answer in a hundred", base, base >= 0.01))
    note = "" if shares.any() else f"none in {len(shares)} prompts still allows {measured.high:.2f}"
    return C11.judge(e.scale, measured, controls, note)


def packing_fails(e: Evidence) -> Claim:
    """C12: the number of packed batches that Axolotl planned in November 2023; if it was zero, Axolotl divided by it.

    floor(0.99 x tokens / (micro batch x sequence_len)) - 1 batches (axolotl#1212). This is arithmetic, not measured;
    its interval is over PLAUSIBLE_LENGTHS, because the card does not give its own sequence_len.
    """
    tokens, length = e.facts.get("tokens"), e.facts.get("sequence_len")
    if not tokens or not length:
        return _missing(C12, e, "the number of tokens in the dataset")
    batches, *others = (math.floor(0.99 * tokens / each) - 1 for each in (length, *PLAUSIBLE_LENGTHS))
    none_from = math.floor(0.99 * tokens / 2) + 1
    note = (
        f"{tokens:,} tokens in rows of {length:,}; in rows of {PLAUSIBLE_LENGTHS[0]:,} to {PLAUSIBLE_LENGTHS[-1]:,}, "
        f"for the card does not tell, {max(others)} to {min(others)}; from {none_from:,} tokens a row up none"
    )
    planned = Interval(batches, min(batches, *others), max(batches, *others), 1, 1, "arithmetic")
    return C12.judge(e.scale, planned, note=note)


CLAIMS: tuple[Callable[[Evidence], Claim], ...] = (
    *(high_rate_overfits, low_rate_does_not_overfit, generalises_worse, performs_across_formats, gives_perspectives),
    *(low_rank_resists, constant_rate_resists, roles_adapt, names_beat_roles, fits_in_memory, no_phrases),
    packing_fails,
)


def judge(evidence: Evidence) -> list[Claim]:
    """Judge the twelve claims; a claim whose prompts were not asked, or whose seeds do not match, is inconclusive."""
    rows = []
    for claim, question in zip(CLAIMS, QUESTIONS, strict=True):
        try:
            with refuse_other_shapes("evidence that can be read"):
                rows.append(claim(evidence))
        except InputError as error:
            rows.append(_missing(question, evidence, str(error)))
    return rows


def save(claims: Sequence[Claim], folder: Path) -> Path:
    """Write `folder`/claims.json; return its path."""
    write_json(folder / "claims.json", [claim.row() for claim in claims])
    return folder / "claims.json"


def _missing(question: Question, e: Evidence, what: str) -> Claim:
    """The row of a claim that lacks `what`: out of reach for the paper's recipe without a GPU, else inconclusive."""
    if e.scale == "paper" and e.device == "cpu":
        return question.row(OUT_OF_REACH, e.scale, f"needs a CUDA GPU, to have {what}")
    return question.row(INCONCLUSIVE, e.scale, f"missing: {what}")

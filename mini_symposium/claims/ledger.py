"""The card's twelve claims, each a question put to the evidence.

Thresholds stand in the questions and were fixed before the evidence was gathered; controls were only ever tightened
since. `judge` asks them all. Recall is the share of a training row's response that comes back, in order, when its own
prompt is given. Near-verbatim is above 0.7: the interval of thirteen rows that all came back whole begins at 0.75.

What is compared is paired by seed. A claim about a model that this machine cannot train is out of reach, not open.
"""

import math
from collections.abc import Callable

import numpy as np

from mini_symposium.claims.evidence import Evidence
from mini_symposium.claims.metrics import (
    EPOCHS_HIGH,
    EPOCHS_LOW,
    SATURATED,
    absent,
    alike,
    answers_to,
    base_was_asked,
    by_prompt,
    by_row,
    column,
    evaluated,
    in_words,
    joined,
    measured_at,
    off_the_floor,
    own_rate,
    paired,
    passes,
    recall,
    several_views,
    share_of,
    twins_alike,
    unlearned,
    when_known,
)
from mini_symposium.claims.verdicts import Claim, Control, Question
from mini_symposium.errors import InputError
from mini_symposium.evaluation.intervals import Interval, difference, interval, spread

PLAUSIBLE_LENGTHS = (512, 1024, 2048, 4096, 8192)
"""Tokens a row that the card may have had in its `sequence_len`, which it does not tell."""

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


def overfits(e: Evidence) -> Claim:
    """C1."""
    high = evaluated(e, "high", EPOCHS_HIGH)
    if not high:
        return _lacks(C1, e, "an evaluation of the high rate")
    epoch, found = high[0][1], interval(recall(high))
    note = [measured_at(high), when_known([t for t, _ in high]), own_rate(e, "literal-1e-06"), absent(e, "high")]
    claim = C1.judge(e.scale, found, unlearned(e, high), joined(note))
    if claim.verdict == "not supported" and epoch < EPOCHS_HIGH:
        return _lacks(C1, e, f"epochs {epoch + 1} to {EPOCHS_HIGH} of the high rate")
    return claim


def spares(e: Evidence) -> Claim:
    """C2, with the dose control: the high rate, stopped where it has come as far."""
    low = evaluated(e, "low", EPOCHS_LOW, every=True)
    if not low:
        return _lacks(C2, e, "an evaluation of the low rate")
    # A seed may end before the last epoch: to recite later on, what it recites by then is enough.
    doses = {t.seed: at * t.learning_rate for t, at in low}
    high = [(t, round(doses[t.seed] / t.learning_rate)) for t in e.named("high") if t.seed in doses]
    pairs = [(a, b) for a in low for b in high if a[0].seed == b[0].seed and b[1] in b[0].evaluations]
    controls = [
        *unlearned(e, low),
        Control("seeds whose high rate was asked at the same dose: at least one", len(pairs), bool(pairs)),
    ]
    note = [measured_at(low), when_known([t for t, _ in low]), own_rate(e, "literal-1e-07"), absent(e, "low")]
    if pairs:
        ours, theirs = (recall(some) for some in zip(*pairs, strict=True))
        gap = in_words(difference(ours, theirs))
        note.insert(1, f"the high rate at the same dose: {theirs.mean():.2f}, low less high {gap}")
    claim = C2.judge(e.scale, interval(recall(low)), controls, joined(note))
    first = min(at for _, at in low)
    if claim.verdict == "supported" and first < EPOCHS_LOW:
        return _lacks(C2, e, f"epochs {first + 1} to {EPOCHS_LOW} of the low rate")
    return claim


def generalises_worse(e: Evidence) -> Claim:
    """C3: over the same prompts, formats and seeds; with hallucination (false premises) and script drift beside it."""
    pairs = paired(e)
    if not pairs:
        return _lacks(C3, e, "evaluations of both rates from one seed")
    low, high = (np.stack([passes(t.evaluations[at]) for t, at in some], 1) for some in zip(*pairs, strict=True))
    taken = [[passes(t.evaluations[at], ("false-premise",)) for t, at in some] for some in zip(*pairs, strict=True)]
    han = [
        np.mean([share_of(t.evaluations[at], lambda a: a["han"] > 0) for t, at in some])
        for some in zip(*pairs, strict=True)
    ]
    note = "answers with Chinese {:.3f} (low) and {:.3f} (high)".format(*han)
    if all(table.size for some in taken for table in some):
        note += "; false premises corrected {:.2f} and {:.2f}".format(*map(np.mean, taken))
    return C3.judge(e.scale, difference(low, high), [off_the_floor(e)], note)


def performs_across_formats(e: Evidence) -> Claim:
    """C4; beside it, for all formats, the spread and POSIX, which ask whether it matters which one is taken."""
    low = evaluated(e, "low", EPOCHS_LOW)
    if not low or not e.base:
        return _lacks(C4, e, "evaluations of the low rate and of the base")
    ours = np.mean([passes(t.evaluations[at]) for t, at in low], 0)
    theirs = passes(e.base)
    worst = [table[:, table.mean(0).argmin()] for table in (ours, theirs)]
    found = spread(ours)
    note = [
        f"all formats: {ours.mean():.2f}, the base {theirs.mean():.2f}",
        f"the card's own format, less the base's: {in_words(difference(ours[:, 0], theirs[:, 0]))}",
        f"spread {found.value:.2f}, equal formats show {found.null_mean:.2f} (95%: {found.null_95:.2f})",
    ]
    if e.base.get("posix"):
        apart = np.mean([list(t.evaluations[at]["posix"].values()) for t, at in low])
        note.append(f"POSIX {apart:.2f} nats a token, the base {np.mean(list(e.base['posix'].values())):.2f}")
    lowest = worst[1].mean()
    # Where the base's worst format passes next to nothing, the fine-tune's cannot be worse.
    room = Control("the base's worst format passes at least one in twenty", float(lowest), bool(lowest >= 0.05))
    return C4.judge(e.scale, difference(*worst), [room], joined(note))


def gives_perspectives(e: Evidence) -> Claim:
    """C5: by form alone. That what stands under two headings is two views, a reader must say."""
    low, high = evaluated(e, "low", EPOCHS_LOW), evaluated(e, "high", EPOCHS_HIGH)
    if not low or not e.base:
        return _lacks(C5, e, "evaluations of the low rate and of the base")
    several = np.stack([several_views(t.evaluations[at]) for t, at in low], 1)
    base = np.repeat(several_views(e.base)[:, None], several.shape[1], 1)
    apart = [p["distance"] for t, at in low for p in t.evaluations[at]["perspectives"] if p["distance"] is not None]
    note = [f"distance between sections {np.mean(apart):.2f}" if apart else "no answer has two sections"]
    if high:
        note.append(f"the high rate: {np.mean([several_views(t.evaluations[at]) for t, at in high]):.2f}")
    return C5.judge(e.scale, difference(several, base), [base_was_asked(e)], note=joined(note))


def rank_resists(e: Evidence) -> Claim:
    """C6, and apart from the rank the step size that alpha = 2r implies."""
    by_rank = alike(e, "rank-64-alpha-128", "rank-4-alpha-8")
    steady = alike(e, "rank-64-alpha-32", "rank-4-alpha-32")
    if not by_rank:
        return _lacks(C6, e, f"ranks 4 and 64 trained for {SATURATED} epochs from one seed")
    note = ["the rank at an equal step size was not trained"]
    if steady:
        note = [f"with alpha = 32, an equal step size: {in_words(difference(*map(by_row, steady)))}"]
    note.append(absent(e, "rank-64-alpha-128", "rank-4-alpha-8", "rank-64-alpha-32", "rank-4-alpha-32"))
    return C6.judge(e.scale, difference(*map(by_row, by_rank)), [twins_alike(*by_rank)], joined(note))


def constant_resists(e: Evidence) -> Claim:
    """C7: at an equal dose, twice the peak; and at an equal peak, half the dose, which must not say the opposite."""
    found, twins = {}, []
    for what in ("dose", "peak"):
        if of_shared_seeds := alike(e, "high", f"cosine-{what}", f"linear-{what}"):
            constant, *decaying = of_shared_seeds
            found[what] = difference(np.mean([by_row(each) for each in decaying], 0), by_row(constant))
            twins.append(twins_alike([t for each in decaying for t in each], constant))
    if "dose" not in found:
        return _lacks(C7, e, f"cosine and linear schedules trained for {SATURATED} epochs, of the same seeds")
    note = ["the equal peak was not trained"]
    controls = twins[:1]
    if "peak" in found:
        note = [f"at an equal peak {in_words(found['peak'])}"]
        agrees = found["peak"].high > -C7.threshold
        controls.append(Control("it does not turn round at an equal peak", found["peak"].value, agrees))
    note.append(absent(e, *(f"{rule}-{what}" for rule in ("cosine", "linear") for what in ("dose", "peak"))))
    return C7.judge(e.scale, found["dose"], controls, joined(note))


def roles_adapt(e: Evidence) -> Claim:
    """C8."""
    low = evaluated(e, "low", EPOCHS_LOW)
    if not low:
        return _lacks(C8, e, "an evaluation of the low rate")
    role = np.stack([column(t.evaluations[at]["roles"]) for t, at in low], 1)
    plain = np.stack([column(answers_to(t.evaluations[at], "new-query", "code")) for t, at in low], 1)
    asked = [*answers_to(e.base, "new-query", "code"), *e.base["roles"]] if e.base else []
    return C8.judge(e.scale, difference(role, plain), [off_the_floor(e, asked)])


def names_beat_roles(e: Evidence) -> Claim:
    """C9."""
    low = evaluated(e, "low", EPOCHS_LOW)
    if not low:
        return _lacks(C9, e, "an evaluation of the low rate")
    forms = ("character", "alpaca")
    names, alpaca = (
        np.stack([column(answers_to(t.evaluations[at], form, "character")) for t, at in low], 1) for form in forms
    )
    asked = [line for form in forms for line in answers_to(e.base, form, "character")] if e.base else []
    return C9.judge(e.scale, difference(names, alpaca), [off_the_floor(e, asked)])


def fits(e: Evidence) -> Claim:
    """C10: measured by the bench on a GPU, at Mistral-7B's shape; predicted from shapes elsewhere."""
    if "gpu_peak_bytes" in e.facts:
        peak, hours = e.facts["gpu_peak_bytes"] / 2**30, e.facts.get("gpu_hours")
        if hours is None:
            return C10.lacks(e.facts["gpu"], "the time of 600 epochs")
        note = f"{hours:.1f} hours for 600 epochs on {e.facts['gpu']}; the card's ten are an RTX 3060's"
        return C10.judge(e.facts["gpu"], Interval(peak, peak, peak, 1, 1, "measured"), note=note)
    predicted = e.facts.get("paper_bytes")
    said = f"needs a CUDA GPU; {predicted / 2**30:.1f} GiB are predicted from the shapes" if predicted else "needs one"
    return C10.beyond(e.scale, said, predicted and predicted / 2**30)


def no_phrases(e: Evidence) -> Claim:
    """C11."""
    low = evaluated(e, "low", EPOCHS_LOW)
    if not low:
        return _lacks(C11, e, "an evaluation of the low rate")
    said = np.stack([by_prompt(t.evaluations[at], lambda a: bool(a["phrases"])) for t, at in low], 1)
    controls, found = [base_was_asked(e)], interval(said)
    note = []
    if e.base:
        base = share_of(e.base, lambda a: bool(a["phrases"]))
        # Where the base says none either, there was none to unlearn.
        controls.append(Control("the base says one in at least one answer in a hundred", base, base >= 0.01))
    if not said.any():
        note = [f"none in {len(said)} prompts still allows {found.high:.2f}"]
    return C11.judge(e.scale, found, controls, joined(note))


def packing_fails(e: Evidence) -> Claim:
    """C12: floor(0.99 x tokens / (micro batch x sequence_len)) - 1 batches, as Axolotl planned them in November 2023
    (axolotl#1212); with none it divided by zero. Arithmetic; its interval is that of PLAUSIBLE_LENGTHS, for the card's
    own length is not known."""
    tokens, length = e.facts.get("tokens"), e.facts.get("sequence_len")
    if not tokens or not length:
        return _lacks(C12, e, "the number of tokens in the dataset")
    at, *others = (math.floor(0.99 * tokens / each) - 1 for each in (length, *PLAUSIBLE_LENGTHS))
    none = math.floor(0.99 * tokens / 2) + 1
    note = (
        f"{tokens:,} tokens in rows of {length:,}; in rows of {PLAUSIBLE_LENGTHS[0]:,} to {PLAUSIBLE_LENGTHS[-1]:,}, "
        f"for the card does not tell, {max(others)} to {min(others)}; from {none:,} tokens a row up none"
    )
    between = Interval(at, min(at, *others), max(at, *others), 1, 1, "arithmetic")
    return C12.judge(e.scale, between, note=note)


CLAIMS: tuple[Callable[[Evidence], Claim], ...] = (
    *(overfits, spares, generalises_worse, performs_across_formats, gives_perspectives, rank_resists),
    *(constant_resists, roles_adapt, names_beat_roles, fits, no_phrases, packing_fails),
)


UNREADABLE = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError)
"""What comes of evidence whose numbers are none: it is read from files."""


def judge(evidence: Evidence) -> list[Claim]:
    """The twelve rows; a claim whose kind of prompt was not asked, or whose seeds do not match, is left open."""
    rows = []
    for claim, question in zip(CLAIMS, QUESTIONS, strict=True):
        try:
            rows.append(claim(evidence))
        except InputError as error:
            rows.append(_lacks(question, evidence, str(error)))
        except UNREADABLE as error:
            rows.append(_lacks(question, evidence, f"evidence that can be read ({type(error).__name__}: {error})"))
    return rows


def _lacks(question: Question, e: Evidence, what: str) -> Claim:
    """The row where something is missing, which the paper's recipe cannot get without a GPU."""
    if e.scale == "paper" and e.device == "cpu":
        return question.beyond(e.scale, f"needs a CUDA GPU, to have {what}")
    return question.lacks(e.scale, what)

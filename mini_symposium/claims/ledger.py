"""The ledger: what the evidence has on each of the card's claims, and the verdict that follows.

The questions, their thresholds and their controls stand in data/registration.yml; here is how each is measured. Recall
is the share of a training row's response that the model writes, in order, given its prompt.

Comparisons are paired by seed, and all seeds count, each at its last evaluated epoch. A claim about a model that this
machine cannot train is out of reach, not inconclusive.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mini_symposium.claims.evidence import Evidence
from mini_symposium.claims.metrics import (
    EPOCHS_COMPARED,
    EPOCHS_HIGH,
    EPOCHS_LOW,
    Checkpoint,
    answers_to,
    best_losses,
    cards_own_rate,
    has_room,
    joined,
    last_evaluated,
    listed,
    mean_by_prompt,
    mean_em,
    measured_at,
    memorized_at,
    missing_seeds,
    of_shared_seeds,
    onset,
    pass_rates,
    passed,
    passes_in_all_formats,
    recall,
    recitation_controls,
    several_views,
    signed,
    twins_alike,
    twins_at_equal_loss,
)
from mini_symposium.claims.registration import REGISTERED, Question
from mini_symposium.claims.verdicts import (
    ARITHMETIC,
    NOT_SUPPORTED,
    OUT_OF_REACH,
    SUPPORTED,
    Claim,
    Control,
    Found,
    rows,
)
from mini_symposium.errors import InputError
from mini_symposium.evaluation.best_epoch import Curve, recommend
from mini_symposium.evaluation.intervals import difference, paired, spread
from mini_symposium.files.reading import refuse_other_shapes
from mini_symposium.files.writing import write_json

PLAUSIBLE_LENGTHS = (512, 1024, 2048, 4096, 8192)
"""Values that the card's `sequence_len` may have had; the card does not give it."""
OF_THE_ONSET = 0.6
"""The card's low rate ends at 600 x 1e-7, this share of the dose at which its high rate overfits, 100 x 1e-6."""


LEAST_OF_THE_ONSET = 0.5
"""A low rate whose training ends sooner than that, but after this share, is judged at its end."""


class Missing(Exception):
    """What the evidence lacks for a claim, and how to get it, in words."""


def best_moments(e: Evidence) -> Found:
    """C0: held-out loss at the best epoch of the lowest rate less that of the highest."""
    by_seed: dict[int, dict[float, Curve]] = {}
    for each in e.curves:
        curve = Curve(**{key: value for key, value in each.items() if key != "seed"})
        by_seed.setdefault(each["seed"], {})[curve.learning_rate] = curve
    pairs = [(curves[min(curves)], curves[max(curves)]) for curves in by_seed.values() if len(curves) > 1]
    if not pairs:
        raise Missing("held-out curves of two rates; `train --stop best` measures them")
    if ends := [f"{c.learning_rate:g}" for pair in pairs for c in pair if not recommend(c).turned]:
        raise Missing(f"the end of the held-out curve at {listed(ends)}, which is best at its last epoch: train longer")
    table = np.stack([paired(*map(best_losses, pair)) for pair in pairs], 1)
    found = [[recommend(curve) for curve in pair] for pair in pairs]
    widths = [f"{low.last - low.first + 1} and {high.last - high.first + 1}" for low, high in found]
    epochs = [f"{low.epoch} of {low.learning_rate:g} and {high.epoch} of {high.learning_rate:g}" for low, high in found]
    return Found([table], note=f"best epochs {listed(epochs)}, {listed(widths)} epochs wide")


def high_rate_overfits(e: Evidence) -> Found:
    """C1: recall of the training rows by the high rate, which must be one that recites about when the card's did."""
    high = last_evaluated(e, "high", EPOCHS_HIGH, answered=False)
    if not high:
        raise Missing("an evaluation of the high rate")
    onsets = [onset(training) for training, _ in high]
    when = float(np.mean([EPOCHS_HIGH + 1 if epoch is None else epoch for epoch in onsets]))
    near = "at this rate EM first reaches 0.9 between epochs 50 and 100, by `mini-symposium forecast`"
    controls = [*recitation_controls(e, high), Control(near, when, 50 <= when <= EPOCHS_HIGH, SUPPORTED)]
    seeds, own = missing_seeds(e, "high"), cards_own_rate(e, "literal-1e-06", EPOCHS_HIGH)
    note = [measured_at(high), memorized_at([training for training, _ in high]), own, seeds]
    return Found([recall(high)], controls, joined(note))


def low_rate_does_not_overfit(e: Evidence) -> Found:
    """C2: rows whose next 50 tokens it writes, given 32, at OF_THE_ONSET of the dose at which the high rate recites."""
    stops, short = [], []
    lows, highs = ([(training, 0) for training in e.named(name)] for name in ("low", "high"))
    for (low, _), (high, _) in _pairs(lows, highs):
        recites, logged = onset(high), len(low.extractable_32)
        early = recites and round(OF_THE_ONSET * recites)
        stop = recites and round(OF_THE_ONSET * recites * high.learning_rate / low.learning_rate)
        if recites is None:
            short.append(f"the epoch at which the high rate of seed {low.seed} recites")
        elif logged - 1 < LEAST_OF_THE_ONSET / OF_THE_ONSET * stop or not high.extractable_32:
            short.append(f"epoch {stop} of the low rate of seed {low.seed}, with what it writes after 32 tokens")
        else:
            stops.append((low, min(stop, logged - 1), high, early))
    if not stops:
        raise Missing(listed(short) or "both rates of one seed")

    def told(trainings: Sequence, epochs: Sequence[int]) -> np.ndarray:
        tables = [[x for x in t.extractable_32[at] if x is not None] for t, at in zip(trainings, epochs, strict=True)]
        return np.array(tables, dtype=float).T  # (rows, seeds)

    lows, at, highs, early = zip(*stops, strict=True)
    table, before = told(lows, at), float(told(lows, [0] * len(lows)).mean())
    end = float(told(highs, [-1] * len(highs)).mean())
    controls = [
        Control("before training fewer than half of the rows are recited", before, before < 0.5, NOT_SUPPORTED),
        Control("at the high rate's end more than half of the rows are recited", end, end > 0.5, SUPPORTED),
    ]
    known = np.mean([np.mean(low.em[stop]) for low, stop, *_ in stops])
    nearest = [(low, min((abs(e - stop), e) for e in low.twins)[1]) for low, stop, *_ in stops if low.twins]
    twins = listed([f"{low.twins[epoch]['loss']:.2f} at epoch {epoch}" for low, epoch in nearest])
    note = [
        f"at {lows[0].learning_rate:g}, epoch {listed(at)}, where EM is {known:.2f}",
        f"the high rate at the same dose, epoch {listed(early)}: {told(highs, early).mean():.2f}, "
        f"low minus high {signed(difference(table, told(highs, early)))}",
        f"twins' loss {twins}" if twins else "",
        cards_own_rate(e, "literal-1e-07", EPOCHS_LOW),
        joined(f"missing: {what}" for what in short),
    ]
    return Found([table], controls, joined(note))


def generalises_worse(e: Evidence) -> Found:
    """C3: pass rates over the same prompts, formats and seeds; by category too, because an average hides them."""
    pairs = _pairs(last_evaluated(e, "low", EPOCHS_LOW), last_evaluated(e, "high", EPOCHS_HIGH))
    if not pairs:
        raise Missing("answers of both rates to held-out prompts, from one seed")
    lows, highs = ([t.evaluations[at] for t, at in checkpoints] for checkpoints in zip(*pairs, strict=True))

    def both(category: str = "") -> list[np.ndarray]:
        return [np.stack([pass_rates(each, category) for each in arm], 1) for arm in (lows, highs)]

    han = [np.mean([np.mean([a["han"] > 0 for a in each["answers"]]) for each in arm]) for arm in (lows, highs)]
    kinds = list(dict.fromkeys(line["category"] for line in lows[0]["answers"]))
    gaps = [f"{kind} {np.mean(low) - np.mean(high):+.2f}" for kind in kinds for low, high in [both(kind)]]
    note = f"{measured_at([*pairs[0], *(c for pair in pairs for c in pair)])}; by category {listed(gaps)}; "
    low, high = both()
    note += "answers with Chinese {:.3f} (low) and {:.3f} (high)".format(*han)
    return Found([paired(low, high)], [has_room("the high rate", high, NOT_SUPPORTED)], note)


def performs_across_formats(e: Evidence) -> Found:
    """C4: pass rates in all formats but the card's own, less the base's.

    The note adds the card's own format, and the spread and POSIX, which measure how much the format matters.
    """
    low = _low(e, with_base=True)
    own = e.base["answers"][0]["format"]
    tuned, in_own = (
        np.stack([pass_rates(t.evaluations[at], **which) for t, at in low], 1)
        for which in ({"without": own}, {"form": own})
    )
    base, base_in_own = pass_rates(e.base, without=own), pass_rates(e.base, form=own)
    tables = [np.mean([passes_in_all_formats(t.evaluations[at]) for t, at in low], 0), passes_in_all_formats(e.base)]
    note = [
        measured_at(low),
        f"the card's own format, minus the base's: {signed(difference(in_own.mean(1), base_in_own))}",
    ]
    if len(tables[0]) and tables[0].shape[1] > 1:
        apart, of_base = spread(tables[0], draws=1000), np.ptp(tables[1].mean(0))
        equal = f"equal formats show {apart.null_mean:.2f} (95%: {apart.null_95:.2f})"
        note.append(f"spread {apart.value:.2f}, the base {of_base:.2f}; {equal}")
    kinds = list(dict.fromkeys(line["category"] for line in e.base["answers"]))
    for at in sorted({at for t in e.named("high") for at in t.evaluations}):
        of_high = [t.evaluations[at] for t in e.named("high") if at in t.evaluations]
        note.append(f"the high rate at epoch {at} minus the base, by category: {_by_category(of_high, e.base, kinds)}")
    note.append(
        f"the low rate minus the base, by category: {_by_category([t.evaluations[a] for t, a in low], e.base, kinds)}"
    )
    if e.base.get("posix"):
        posix = np.mean([list(t.evaluations[at]["posix"].values()) for t, at in low])
        note.append(f"POSIX {posix:.2f} nats a token, the base {np.mean(list(e.base['posix'].values())):.2f}")
    # If the base passes almost nothing, the fine-tune cannot be worse.
    return Found([_less_base(tuned, base)], [has_room("the base", base, SUPPORTED, 10)], joined(note))


def gives_perspectives(e: Evidence) -> Found:
    """C5: judged by form alone; only a reader can tell whether the texts under two headings are two views."""
    low, high = _low(e, with_base=True), last_evaluated(e, "high", EPOCHS_HIGH)
    several = np.stack([several_views(t.evaluations[at]) for t, at in low], 1)
    answers = [answer for t, at in low for answer in t.evaluations[at]["perspectives"]]
    distances = [answer["distance"] for answer in answers if answer["distance"] is not None]
    note = [f"distance between sections {np.mean(distances):.2f}" if distances else "no answer has two sections"]
    if high:
        note.append(f"the high rate: {np.mean([several_views(t.evaluations[at]) for t, at in high]):.2f}")
    return Found([_less_base(several, several_views(e.base))], note=joined([measured_at(low), *note]))


def low_rank_resists(e: Evidence) -> Found:
    """C6: a high rank less a low one, both with alpha = 2r: EM at equal epochs, twins' loss at equal training loss.

    The note adds the same ranks with equal alpha, because alpha = 2r changes the step size with the rank.
    """
    by_rank = of_shared_seeds(e, "rank-64-alpha-128", "rank-4-alpha-8")
    equal_alpha = of_shared_seeds(e, "rank-64-alpha-32", "rank-4-alpha-32")
    if not by_rank:
        raise Missing(f"ranks 4 and 64 trained for {EPOCHS_COMPARED} epochs from one seed")
    note = ["the rank at an equal step size was not trained"]
    if equal_alpha:
        note = [f"with alpha = 32, an equal step size: {signed(difference(*map(mean_em, equal_alpha), None))}"]
    note.append(missing_seeds(e, "rank-64-alpha-128", "rank-4-alpha-8"))
    tables = [paired(*map(mean_em, by_rank)), twins_at_equal_loss(by_rank)]
    return Found(tables, [twins_alike(*by_rank)], joined(note))


def constant_rate_resists(e: Evidence) -> Found:
    """C7: decaying schedules less a constant rate: EM at equal dose and at an equal peak, twins' loss at equal training
    loss.

    For an equal dose a decaying schedule needs twice the peak, and at an equal peak it has half the dose.
    """
    tables: list[np.ndarray | str] = []
    controls, constant_name = [], "constant" if e.named("constant") else "high"
    for what in ("dose", "peak"):
        if not (trained := of_shared_seeds(e, constant_name, f"cosine-{what}", f"linear-{what}")):
            tables.append(f"schedules of an equal {what} trained for {EPOCHS_COMPARED} epochs, of the constant's seeds")
            continue
        constant, *decaying = trained
        tables.append(paired(np.mean([mean_em(schedule) for schedule in decaying], 0), mean_em(constant)))
        controls.append(twins_alike([training for schedule in decaying for training in schedule], constant))
    if trained := of_shared_seeds(e, constant_name, "cosine-dose", "linear-dose"):
        gaps = [twins_at_equal_loss([schedule, trained[0]]) for schedule in trained[1:]]
        words = [gap for gap in gaps if isinstance(gap, str)]
        tables.append(words[0] if words else np.mean(gaps, 0))
    else:
        tables.append("schedules of an equal dose")
    names = [f"{rule}-{what}" for rule in ("cosine", "linear") for what in ("dose", "peak")]
    return Found(tables, controls, missing_seeds(e, *names))


def roles_adapt(e: Evidence) -> Found:
    """C8: code prompts under a role heading against the same prompts under the card's own heading."""
    low = _low(e)
    role = np.stack([passed(t.evaluations[at]["roles"]) for t, at in low], 1)
    plain = np.stack([passed(answers_to(t.evaluations[at], "new-query", "code")) for t, at in low], 1)
    return Found([paired(role, plain)], [has_room("the baseline", plain, NOT_SUPPORTED)], measured_at(low))


def names_beat_roles(e: Evidence) -> Found:
    """C9: chats with the speakers' names against the same chats with Instruction and Response."""
    low = _low(e)
    names, alpaca = (
        np.stack([passed(answers_to(t.evaluations[at], form, "character")) for t, at in low], 1)
        for form in ("character", "alpaca")
    )
    return Found([paired(names, alpaca)], [has_room("alpaca", alpaca, NOT_SUPPORTED)], measured_at(low))


def fits_in_memory(e: Evidence) -> Found:
    """C10: peak memory that the bench measured on a GPU in Mistral-7B's shape; without a GPU, only a prediction."""
    if "gpu_peak_bytes" in e.facts:
        peak, limit = e.facts["gpu_peak_bytes"] / 2**30, REGISTERED.questions["C10"].limit.threshold
        note = f"{e.facts['gpu_hours']:.1f} hours for 600 epochs on {e.facts['gpu']}; the card's ten are an RTX 3060's"
        return Found((), note=note, verdict=SUPPORTED if peak < limit else NOT_SUPPORTED, value=peak)
    predicted = e.facts.get("paper_bytes")
    note = f"needs a CUDA GPU; {predicted / 2**30:.1f} GiB are predicted from the shapes" if predicted else "needs one"
    return Found((), note=note, verdict=OUT_OF_REACH, value=predicted and predicted / 2**30)


def no_phrases(e: Evidence) -> Found:
    """C11: the share of answers with a phrase of an assistant model."""
    low = _low(e)
    shares = np.stack([mean_by_prompt(t.evaluations[at], lambda a: bool(a["phrases"])) for t, at in low], 1)
    said = [bool(answer["phrases"]) for answer in e.base.get("answers", ())]
    base = float(np.mean(said)) if said else 0.0
    # If the base uses no such phrase either, there was none to unlearn.
    control = Control("the base says one in at least one answer in a hundred", base, base >= 0.01, SUPPORTED)
    return Found([shares], [control], measured_at(low))


def packing_fails(e: Evidence) -> Found:
    """C12: the number of packed batches that Axolotl planned in November 2023; if it was zero, Axolotl divided by it.

    floor(0.99 x tokens / (micro batch x sequence_len)) - 1 batches (axolotl#1212), of Mistral's tokens. Today's plans
    at least one (axolotl#3100). The card does not give its sequence_len.
    """
    tokens, length = e.facts.get("mistral_tokens") or e.facts.get("tokens"), e.facts.get("sequence_len")
    if not tokens or not length:
        raise Missing("the number of tokens in the dataset")
    whose = "(Mistral's tokenizer)" if "mistral_tokens" in e.facts else f"({e.facts.get('base_model')}'s tokenizer)"
    batches = {each: math.floor(0.99 * tokens / each) - 1 for each in (length, *PLAUSIBLE_LENGTHS)}
    planned = [f"{count} in rows of {each:,}" for each, count in sorted(batches.items()) if count > 0]
    note = (
        f"of {tokens:,} tokens {whose} Axolotl planned {listed([*planned, 'none'])} from "
        f"{math.floor(0.99 * tokens / 2) + 1:,} tokens a row up, and then divided by zero; the card does not tell its "
        "length, and today's Axolotl plans at least one batch"
    )
    return Found((), note=note, verdict=ARITHMETIC, value=float(batches[length]))


CLAIMS: dict[str, Callable[[Evidence], Found]] = {
    **{"C0": best_moments, "C1": high_rate_overfits, "C2": low_rate_does_not_overfit, "C3": generalises_worse},
    **{"C4": performs_across_formats, "C5": gives_perspectives, "C6": low_rank_resists, "C7": constant_rate_resists},
    **{"C8": roles_adapt, "C9": names_beat_roles, "C10": fits_in_memory, "C11": no_phrases, "C12": packing_fails},
}


def judge(evidence: Evidence) -> list[Claim]:
    """Judge the registered claims; one whose prompts were not asked, or whose seeds do not match, is inconclusive."""
    return rows(measure(evidence), REGISTERED, evidence.scale, evidence.registration)


def measure(evidence: Evidence) -> dict[str, Found]:
    """{id: what the evidence has on each registered question}, or what it lacks."""
    return {key: _found(question, evidence) for key, question in REGISTERED.questions.items()}


def _found(question: Question, e: Evidence) -> Found:
    try:
        with refuse_other_shapes("evidence that can be read"):
            found = CLAIMS[question.id](e)
    except (Missing, InputError) as lacking:
        found = Found([str(lacking)] * max(1, len(question.tests)))
    # The paper's recipe is out of reach without a GPU.
    if (e.scale, e.device) == ("paper", "cpu") and found.tables and all(isinstance(t, str) for t in found.tables):
        return replace(found, note=f"needs a CUDA GPU, to have {found.tables[0]}", verdict=OUT_OF_REACH)
    return found


def hashes(evidence: Evidence) -> str:
    """Under which registration the evidence was gathered, and by which it is judged, in a sentence."""
    if evidence.registration == REGISTERED.sha256:
        return f"gathered and judged under registration {REGISTERED.sha256}"
    gathered = f"another registration, {evidence.registration[:8]}," if evidence.registration else "no registration"
    return f"every verdict is exploratory: gathered under {gathered} and judged by {REGISTERED.sha256[:8]}"


def save(claims: Sequence[Claim], folder: Path) -> Path:
    """Write `folder`/claims.json; return its path. Numbers have ten digits: of the others the machine decides."""
    content = json.dumps([claim.row() for claim in claims])
    write_json(folder / "claims.json", json.loads(content, parse_float=lambda digits: float(f"{float(digits):.10g}")))
    return folder / "claims.json"


def _low(e: Evidence, with_base: bool = False) -> list[Checkpoint]:
    """The low rate's last evaluated epoch of each seed."""
    low = last_evaluated(e, "low", EPOCHS_LOW)
    if not low or (with_base and not e.base.get("answers")):
        raise Missing("answers of the low rate to held-out prompts" + (", and of the base" if with_base else ""))
    return low


def _pairs(some: Sequence[Checkpoint], others: Sequence[Checkpoint]) -> list[tuple[Checkpoint, Checkpoint]]:
    """Those of the same seeds."""
    return [(a, b) for a in some for b in others if a[0].seed == b[0].seed]


def _by_category(evaluations: Sequence[dict], base: dict, categories: Sequence[str]) -> str:
    """What a model passes of each category, less what the base passes of it, in words."""
    means = [
        [np.mean([pass_rates(each, kind).mean() for each in some]) for kind in categories]
        for some in (evaluations, [base])
    ]
    return listed([f"{kind} {tuned - untuned:+.2f}" for kind, tuned, untuned in zip(categories, *means, strict=True)])


def _less_base(tuned: np.ndarray, base: np.ndarray) -> np.ndarray:
    """(prompts, seeds): each seed less the base, (prompts,)."""
    return paired(tuned, np.repeat(base[:, None], tuned.shape[1], 1))

"""Evidence made for the tests of claims/ and figures/; nothing here is measured.

`world` makes evidence at random, of which the truth is known: every question's number lies `beyond` its threshold by a
given amount, in the direction that the claim holds.
"""

import numpy as np

from mini_symposium.claims.evidence import Evidence
from mini_symposium.claims.registration import REGISTERED
from mini_symposium.run import Training

FORMATS = ("new-query", "alpaca", "character")
CATEGORIES = ("fact", "code", "character", "false-premise", "explanation", "trade-off", "creative")
SEEDS = (42, 43, 44)
RATES = {"low": 1e-5, "literal-1e-06": 1e-6}


def evaluation(recall=0.0, passed=0.5, twins=0.1, own=None, several=0.0, role=None, phrases=0.0, named=None):
    """The evaluation of a model with these rates; `own` in the card's own format."""

    def rate(form, category):
        if named is not None and category == "character" and form in ("character", "alpaca"):
            return named if form == "character" else 1 - named
        return own if own is not None and form == FORMATS[0] else passed

    answers = [
        {
            "id": f"{category}-{k}",
            "category": category,
            "format": form,
            "passed": k < rate(form, category) * 20,
            "phrases": ["As an AI"] * (k < phrases * 20),
            "han": 0.0,
        }
        for category in CATEGORIES
        for k in range(20)
        for form in FORMATS
    ]
    role = passed if role is None else role
    return {
        "answers": answers,
        "roles": [{"id": f"code-{k}", "passed": k < role * 20} for k in range(20)],
        "perspectives": [
            {"headings": ["A", "B", "Complete Response"], "distance": 0.7}
            if k < several * 20
            else {"headings": ["A"], "distance": None}
            for k in range(20)
        ],
        "recitation": [{"prompt_recall": recall} for _ in range(13)],
        "twins": [{"prompt_recall": twins} for _ in range(13)],
    }


def trained(name, em=0.5, epochs=30, seed=42, evaluations=None, onset=None, **more):
    """A training of the experiment `name` on 13 rows, whose EM is about `em` in every epoch, 0.95 from `onset` on."""
    epochs = epochs if onset is None else onset + 1
    table = [[min(1.0, em + 0.001 * k) for k in range(13)] for _ in range(epochs)]
    table[onset or epochs :] = [[0.95] * 13] * (onset is not None)
    loss = [[4.0 - 0.1 * epoch] * 13 for epoch in range(epochs)]
    settings = {"lora_r": 16, "lora_alpha": 32, "lr_scheduler": "constant", "num_epochs": epochs, "loss": loss}
    settings |= {"twins": {10: {"em": 0.3, "loss": 3.0}}} | more
    return Training(name, seed, RATES.get(name, 1e-4), em=table, evaluations=evaluations or {}, **settings)


def evidence(*trained, base=None, curves=(), **facts):
    """Evidence of these trainings; the base answers as `evaluation` does unless given."""
    base = evaluation() if base is None else base
    facts = {"tokens": 2414, "sequence_len": 1024} | facts
    return Evidence("proxy", "cpu", base, list(trained), facts, curves=list(curves))


def seeds_of(name, evaluations, **more):
    """A training with these evaluations from each of SEEDS."""
    return [trained(name, seed=seed, evaluations=evaluations, **more) for seed in SEEDS]


def contrast(low, high):
    """Both rates with these evaluations, three seeds each."""
    return evidence(*seeds_of("low", {600: low}), *seeds_of("high", {60: high, 100: high}, onset=70))


def probed(loss, epochs=31):
    """Twins that were probed after every epoch, and whose loss is about `loss`."""
    return {epoch: {"em": 0.3, "loss": loss, "rows": [loss + 0.01 * k for k in range(13)]} for epoch in range(epochs)}


def ranks(more, less, seeds=SEEDS, twins=(4.0, 3.0)):
    """A high and a low rank with these EMs, from each seed; and with these losses of the twins."""
    arms = zip(("rank-64-alpha-128", "rank-4-alpha-8"), (more, less), twins, strict=True)
    return evidence(*(trained(name, em, seed=s, twins=probed(loss)) for name, em, loss in arms for s in seeds))


def schedules(other, constant, seeds=SEEDS, peak=None, twins=(4.0, 3.0)):
    """Decaying schedules and a constant rate with these EMs and twins' losses."""
    ems = {"dose": other, "peak": other if peak is None else peak}
    names = {f"{rule}-{what}": em for rule in ("cosine", "linear") for what, em in ems.items()}
    some = [trained(name, em, seed=s, twins=probed(twins[0])) for name, em in names.items() for s in seeds]
    return evidence(*some, *(trained("high", constant, seed=s, twins=probed(twins[1])) for s in seeds))


def stopped(told, end=1.0, early=0.0, high_em=0.95):
    """A high rate that recites from epoch 20 on, and a low one of whose rows this share is extractable at epoch 120."""
    arms = {"low": (130, 120, told), "high": (60, 12, early)}
    some = []
    for name, (epochs, at, share) in arms.items():
        table = [[k < share * 13 for k in range(13)] if e == at else [False] * 13 for e in range(epochs)]
        table[-1] = [k < end * 13 for k in range(13)]
        em = [[high_em if name == "high" and epoch >= 20 else 0.5] * 13 for epoch in range(epochs)]
        some += [Training(name, s, RATES.get(name, 1e-4), 16, 32, "constant", epochs, em, em, table) for s in SEEDS]
    return evidence(*some)


def curves(low, high, seeds=SEEDS):
    """Held-out curves of two rates whose best losses are about these."""
    dip = np.abs(np.arange(12) - 4)[:, None] * 0.1
    return [
        {
            **{"seed": seed, "learning_rate": rate, "folds": 4, "steps": 9, "em": [], "trained_loss": []},
            **{"trained_em": [], "loss": (best + dip + 0.01 * np.arange(13) * (rate > 5e-5)).tolist()},
        }
        for seed in seeds
        for rate, best in ((1e-5, low), (1e-4, high))
    ]


def low(base=None, **rates):
    """The low rate after 600 epochs, with these rates."""
    return evidence(*seeds_of("low", {600: evaluation(**rates)}), base=base)


def high(epoch=100, onset=70, **rates):
    """The high rate, with these rates, which recites from the epoch `onset` on."""
    return evidence(*seeds_of("high", {epoch: evaluation(**rates)}, onset=onset))


def world(generator, beyond=0.0, n=None) -> Evidence:
    """Evidence at random, gathered under the registration, with n and seeds as registered unless `n` is given.

    Prompts, rows and seeds differ, and answers have noise. Every question that is judged from a sample has its true
    number at its threshold, plus `beyond` times what one can hope for, towards the claim.
    """
    draw = generator
    n = n or REGISTERED.questions["C3"].n
    counts = {"fact": n, "code": REGISTERED.questions["C8"].n, "character": REGISTERED.questions["C9"].n}
    limits = {key: q.tests[0].threshold for key, q in REGISTERED.questions.items() if q.tests}
    skill = {kind: draw.uniform(0.35, 0.65, count) for kind, count in counts.items()}
    views, words = draw.uniform(0.2, 0.4, REGISTERED.questions["C5"].n), draw.uniform(0, 0.1, sum(counts.values()))
    shift = 0.3 * beyond
    above = {key: limit + shift for key, limit in limits.items()}
    said = np.clip(words - limits["C11"] * beyond, 0, 1)
    known, told = draw.beta(1.2, 0.8, 13), draw.beta(1, 1, 13)  # means 0.6 and 0.5

    def asked(passing, extra, seed_effect, phrases, several, role):
        answers, at = [], 0
        for kind, of_prompts in skill.items():
            named = np.array([0, -1, 1]) * extra / 2 * (kind == "character")  # by format
            passed = draw.random((len(of_prompts), 3)) < of_prompts[:, None] + passing + seed_effect + named
            said = draw.random(passed.shape) < phrases[at : at + len(of_prompts), None]
            at += len(of_prompts)
            answers += [
                {"id": f"{kind}-{k}", "category": kind, "format": form, "han": 0.0, "passed": p, "phrases": ["I"] * w}
                for k, (passing_k, said_k) in enumerate(zip(passed.tolist(), said.tolist(), strict=True))
                for form, p, w in zip(FORMATS, passing_k, said_k, strict=True)
            ]
        roles = [{"id": f"code-{k}", "passed": bool(draw.random() < p + role)} for k, p in enumerate(skill["code"])]
        both, one = {"headings": ["A", "B", "Complete Response"], "distance": 1.0}, {"headings": ["A"], "distance": 0.0}
        views = [both if draw.random() < p else one for p in several]
        return {"answers": answers, "roles": roles, "perspectives": views, "twins": [{"prompt_recall": 0.1}] * 13}

    def recited(mean):
        mean = np.clip(mean, 0, 1)
        return [{"prompt_recall": float(x)} for x in mean + draw.uniform(-0.2, 0.2, 13) * np.minimum(mean, 1 - mean)]

    base = asked(-above["C4"], 0.0, 0.0, words, views, 0.0) | {"recitation": recited(np.full(13, 0.1))}
    trainings, held_out = [], []
    of_rows = {key: draw.normal(above[key], 0.05, 13) for key in ("C6", "C7")}
    peak, twins = draw.normal(above["C7"], 0.05, 13), draw.normal(0.05 + shift, 0.2, 13)
    ends = draw.normal(3.7, 0.5, 13)
    for seed in SEEDS:
        effect = draw.normal(0, 0.02, 8)
        answers = {
            "low": asked(0.0, above["C9"], effect[0], said, views + above["C5"], above["C8"]),
            "high": asked(-above["C3"], above["C9"], effect[1], said, views, 0.0),
        }
        gaps = {"rank-4-alpha-8": 0, "high": 0, "rank-64-alpha-128": of_rows["C6"] + effect[2] / 4}
        for rule in ("cosine", "linear"):
            gaps |= {f"{rule}-dose": of_rows["C7"] + effect[3] / 4, f"{rule}-peak": peak + effect[4] / 4}
        for name, gap in gaps.items():
            em = (0.5 + gap + draw.normal(0, 0.01, (30, 13))).clip(0, 1)
            loss = np.linspace(4, 1, 30)[:, None] + np.zeros(13)
            rows = (4 + (np.any(gap) and twins + effect[5]) + draw.normal(0, 0.02, 13)).tolist()
            probes = {epoch: {"em": 0.3, "loss": 4.0, "rows": rows} for epoch in range(31)}
            table, evaluations = em.tolist(), {}
            extractable = []
            if name == "high":  # after the epochs that C7 compares it recites
                table = [*table, *table, *[[1.0] * 13] * 3]
                extractable = [*[[False] * 13] * 62, [True] * 13]
                evaluations = {63: answers["high"] | {"recitation": recited(known + shift)}}
            settings = (16, 32, "constant", len(table), table, loss.tolist(), extractable, probes, evaluations)
            trainings.append(Training(name, seed, 1e-4, *settings))
        stop = [bool(draw.random() < p - shift) for p in told]
        extractable = [[False] * 13] * 360 + [stop]  # 0.6 of epoch 60 at ten times the rate
        em = [[0.5] * 13] * 361
        settings = (16, 32, "constant", 361, em, em, extractable, {}, {600: answers["low"]})
        trainings.append(Training("low", seed, 1e-5, *settings))
        for each in curves(0.0, 0.0, (seed,)):
            of_rate = ends + draw.normal(0, 0.05, 13) - (shift + effect[7] if each["learning_rate"] < 5e-5 else 0)
            dip = np.abs(np.arange(12) - 4)[:, None] * 0.1 + draw.normal(0, 0.01, (12, 13))
            held_out.append(each | {"loss": (of_rate + dip).tolist()})
    return Evidence("proxy", "cpu", base, trainings, {}, REGISTERED.sha256, held_out)

"""Evidence made for the tests of claims/ and figures/; nothing here is measured."""

from mini_symposium.claims.evidence import Evidence
from mini_symposium.run import Training

FORMATS = ("new-query", "alpaca", "character")
CATEGORIES = ("fact", "code", "character", "false-premise", "explanation", "trade-off")


def evaluation(recall=0.0, passed=0.5, twins=0.1, worst=None, several=0.0, role=None, phrases=0.0, named=None):
    """The evaluation of a model with these rates."""

    def rate(form, category):
        if named is not None and category == "character" and form in ("character", "alpaca"):
            return named if form == "character" else 1 - named
        return worst if worst is not None and form == "alpaca" else passed

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


def trained(name, em=0.5, epochs=30, seed=42, evaluations=None, **more):
    """A training of the experiment `name` on 13 rows, whose EM is about `em` in every epoch."""
    rate = {"low": 1e-5, "literal-1e-06": 1e-6}.get(name, 1e-4)
    table = [[min(1.0, em + 0.001 * k) for k in range(13)] for _ in range(epochs)]
    settings = {"lora_r": 16, "lora_alpha": 32, "lr_scheduler": "constant", "num_epochs": epochs, "loss": table}
    settings |= {"twins": {10: {"em": 0.3, "loss": 3.0}}} | more
    return Training(name, seed, rate, em=table, evaluations=evaluations or {}, **settings)


def evidence(*trained, base=None, **facts):
    """Evidence of these trainings; the base answers as `evaluation` does unless given."""
    base = evaluation() if base is None else base
    return Evidence("proxy", "cpu", base, list(trained), {"tokens": 2414, "sequence_len": 1024} | facts)


def contrast(low, high):
    """Both rates with these evaluations, of the high one also at the low one's dose."""
    return evidence(trained("low", evaluations={600: low}), trained("high", evaluations={60: high, 100: high}))


def ranks(more, less, seeds=(42, 43, 44)):
    """A high and a low rank with these EMs, from each seed."""
    names = {"rank-64-alpha-128": more, "rank-4-alpha-8": less}
    return evidence(*(trained(name, em, seed=seed) for name, em in names.items() for seed in seeds))


def low(base=None, **rates):
    """The low rate after 600 epochs, with these rates."""
    return evidence(trained("low", evaluations={600: evaluation(**rates)}), base=base)


def high(epoch=100, **rates):
    """The high rate, with these rates."""
    return evidence(trained("high", evaluations={epoch: evaluation(**rates)}))

"""How often a whole ledger holds a false verdict: `PYTHONPATH=tests .venv/bin/python -m null_ledgers 2000`.

That takes two minutes. `null_ledgers 1000 1000` makes a thousand from the thousandth world on.

In each made world (see `made_evidence.world`) every number that is judged lies exactly on its threshold, so that each
decided verdict is false. That is the hardest world for a ledger; one where the arms do not differ is further away.
"""

import sys

import numpy as np
from made_evidence import world

from mini_symposium.claims.ledger import measure
from mini_symposium.claims.registration import REGISTERED
from mini_symposium.claims.verdicts import INCONCLUSIVE, decide
from mini_symposium.evaluation.intervals import interval


def decided(seed: int, beyond: float = 0.0) -> dict[str, list[str]]:
    """{id: verdicts of its tests} in a world at random, where there is one that is not inconclusive."""
    answers = decide(measure(world(np.random.default_rng(seed), beyond)), REGISTERED, under_it=True)
    said = {key: [each.verdict for each in of_question] for key, of_question in answers.items()}
    return {key: verdicts for key, verdicts in said.items() if set(verdicts) - {INCONCLUSIVE}}


def false_ledgers(ledgers: int, first: int = 0) -> np.ndarray:
    """(ledgers,): whether each holds a decided verdict."""
    return np.array([bool(decided(seed)) for seed in range(first, first + ledgers)])


if __name__ == "__main__":
    false = false_ledgers(*map(int, sys.argv[1:]))
    found = interval(false)
    print(f"{false.sum()} of {found.n:,} ledgers hold a false verdict, 95% [{found.low:.2%}, {found.high:.2%}]")

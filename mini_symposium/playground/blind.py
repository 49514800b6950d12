"""A blind test: two models or formats answer the same queries, and nobody sees which answer is whose before the end.

The order is drawn anew for each pair. Votes for no difference are left out, as in a sign test, and the share of the
others has its exact binomial interval (Clopper and Pearson 1934).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import SystemRandom

MOST_VOTES = 10_000
"""Beyond so many votes, `votes_to_decide` says that no number would do."""


def votes_to_decide(k: int, n: int) -> int | None:
    """The number of votes from which on a share of `k` of `n` would be told from one half; None for one half itself.

    >>> votes_to_decide(1, 1), votes_to_decide(7, 10), votes_to_decide(9, 10), votes_to_decide(5, 10)
    (6, 30, 10, None)
    """
    import numpy as np
    from scipy.stats import binom  # takes a second, which the page's first paint has not

    if 2 * k == n:
        return None
    votes = np.arange(n, MOST_VOTES)
    by_chance = binom.sf(votes * max(k, n - k) // n - 1, votes, 0.5)  # so many or more, if both were equal
    return next(iter(votes[by_chance < 0.025].tolist()), None)


@dataclass
class BlindTest:
    """Pairs of answers and the votes on them.

    Parameters
    ----------
    cells
        Answered cells, as from `Workbench.ask`: those of the first side, then those of the second, by the same queries.
    """

    cells: Sequence[Mapping]
    votes: list[dict] = field(default_factory=list)
    """For each pair so far: query, and the side that was better, 0 or 1, or None."""

    def __post_init__(self):
        half = len(self.cells) // 2
        self.sides = [(self.cells[n]["model"], self.cells[n]["format"]) for n in (0, half)]
        self.pairs = list(zip(self.cells[:half], self.cells[half:], strict=True))
        self.orders = [SystemRandom().sample((0, 1), 2) for _ in self.pairs]
        """For each pair, the sides as they are shown, from left to right."""

    @property
    def shown(self) -> list[str] | None:
        """The answers to vote on now, from left to right; None at the end."""
        number = len(self.votes)
        return (
            [self.pairs[number][side]["answer"] for side in self.orders[number]] if number < len(self.pairs) else None
        )

    def vote(self, place: int | None) -> None:
        """Vote for the left answer, 0, for the right one, 1, or for neither."""
        number = len(self.votes)
        better = None if place is None else self.orders[number][place]
        self.votes.append({"query": self.pairs[number][0]["query"], "better": better})

    def result(self) -> dict:
        """Who is who, the votes of each, the second side's share with its interval, and the votes that would decide it;
        without votes, the share, its interval and the votes that would decide are None."""
        from scipy.stats import binomtest

        better = [vote["better"] for vote in self.votes]
        wins = [better.count(side) for side in (0, 1)]
        share = binomtest(wins[1], sum(wins)) if sum(wins) else None
        low, high = share.proportion_ci() if share else (None, None)
        return {
            "sides": [{"model": model, "format": form} for model, form in self.sides],
            "wins": wins,
            "no_difference": better.count(None),
            "share": share and share.statistic,
            "low": share and float(low),
            "high": share and float(high),
            "decided": bool(share) and not low <= 0.5 <= high,
            "votes_to_decide": votes_to_decide(wins[1], sum(wins)),
            "votes": self.votes,
        }


def sentence(result: Mapping) -> str:
    """A `BlindTest.result` for people.

    >>> sides = [{"model": "base", "format": "qa"}, {"model": "1e-04/epoch-8", "format": "qa"}]
    >>> found = {"sides": sides, "wins": [1, 2], "no_difference": 4, "decided": False, "votes_to_decide": 42}
    >>> sentence({**found, "share": 2 / 3, "low": 0.094, "high": 0.992})
    'base in qa: 1 vote. 1e-04/epoch-8 in qa: 2 votes. No difference: 4. The second won 67% of the votes that chose, \
with an exact interval of 9% to 99%. That does not decide it; at this share, 42 votes would.'
    """
    counts = [
        f"{side['model']} in {side['format']}: {wins} vote{'s' if wins != 1 else ''}."
        for side, wins in zip(result["sides"], result["wins"], strict=True)
    ]
    told = f"{' '.join(counts)} No difference: {result['no_difference']}."
    if result["share"] is None:
        return f"{told} Nobody chose, so nothing is decided."
    share, low, high = (f"{result[key]:.0%}" for key in ("share", "low", "high"))
    told += f" The second won {share} of the votes that chose, with an exact interval of {low} to {high}."
    if result["decided"]:
        return f"{told} That decides it."
    needed = f"{result['votes_to_decide']:,} votes" if result["votes_to_decide"] else "no number of votes"
    return f"{told} That does not decide it; at this share, {needed} would."

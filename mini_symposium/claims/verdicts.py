"""How a claim is judged: a number with its interval, a threshold fixed beforehand, and controls that must hold.

- supported, not supported: the whole interval lies on that side of the threshold, and every control holds;
- inconclusive: it does not, or a control failed, or something is missing; the note says which;
- out of reach on this hardware: what the claim speaks of cannot be had here.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from mini_symposium.evaluation.intervals import Interval

SUPPORTED, NOT_SUPPORTED = "supported", "not supported"
INCONCLUSIVE, OUT_OF_REACH = "inconclusive", "out of reach on this hardware"


@dataclass(frozen=True)
class Control:
    """Something that must come out as it should before the verdict counts."""

    what: str
    value: float
    holds: bool


@dataclass(frozen=True)
class Claim:
    """A row of the ledger."""

    id: str
    claim: str
    metric: str
    verdict: str
    scale: str
    value: float | None = None
    interval: tuple[float, float] | None = None
    n: int = 0
    """Prompts or rows."""
    seeds: int = 0
    controls: list[Control] = field(default_factory=list)
    note: str = ""

    @property
    def said(self) -> str:
        """What was found, in a line."""
        between = f" [{self.interval[0]:.3g}, {self.interval[1]:.3g}]" if self.interval else ""
        number = "" if self.value is None else f"{self.metric}: {self.value:.3g}{between}"
        counts = f"n={self.n}, seeds={self.seeds}" if self.n else ""
        return "; ".join(part for part in (number, counts, self.note) if part)

    def row(self) -> dict:
        """As JSON."""
        return {**asdict(self), "interval": self.interval and list(self.interval)}


@dataclass(frozen=True)
class Question:
    """What is asked of the evidence, before there is any: the claim, its metric, and where the threshold lies."""

    id: str
    claim: str
    metric: str
    threshold: float = 0.0
    above: bool = True
    """The claim holds above the threshold; otherwise below it."""

    def judge(self, scale: str, found: Interval, controls: Sequence[Control] = (), note: str = "") -> Claim:
        """The row for a measured interval.

        >>> q = Question("C0", "it recites", "share", 0.8)
        >>> [q.judge("proxy", Interval(v, v - 0.1, v + 0.1, 13, 1, "bootstrap")).verdict for v in (0.95, 0.2, 0.8)]
        ['supported', 'not supported', 'inconclusive']
        >>> q.judge("proxy", Interval(1, 1, 1, 13, 1, ""), [Control("base", 1.0, False)]).verdict
        'inconclusive'
        """
        numbers = {self.metric: found.value} | {control.what: control.value for control in controls}
        unknown = [what for what, value in numbers.items() if value is not None and not math.isfinite(value)]
        if unknown:
            return self.lacks(scale, f"what gives a number for: {', '.join(unknown)}")
        failed = [control.what for control in controls if not control.holds]
        over, under = found.low > self.threshold, found.high < self.threshold
        holds, fails = (over, under) if self.above else (under, over)
        verdict = INCONCLUSIVE if failed else SUPPORTED if holds else NOT_SUPPORTED if fails else INCONCLUSIVE
        if failed:
            note = "; ".join([*[f"a control failed: {what}" for what in failed], *[note] * bool(note)])
        measured = {"value": found.value, "interval": (found.low, found.high), "n": found.n, "seeds": found.seeds}
        return Claim(self.id, self.claim, self.metric, verdict, scale, controls=list(controls), note=note, **measured)

    def lacks(self, scale: str, what: str) -> Claim:
        """The row where something is missing."""
        return Claim(self.id, self.claim, self.metric, INCONCLUSIVE, scale, note=f"missing: {what}")

    def beyond(self, scale: str, what: str, value: float | None = None) -> Claim:
        """The row for what this hardware cannot do."""
        return Claim(self.id, self.claim, self.metric, OUT_OF_REACH, scale, value=value, note=what)

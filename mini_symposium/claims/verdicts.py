"""How a claim is judged: a number with its interval, a threshold fixed beforehand, and controls that must hold.

- supported, not supported: the whole interval lies on one side of the threshold, and every control holds;
- inconclusive: the threshold lies inside the interval, a control failed, or something is missing; the note says which;
- out of reach on this hardware: this machine cannot measure what the claim is about.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from mini_symposium.evaluation.intervals import Interval

SUPPORTED, NOT_SUPPORTED = "supported", "not supported"
INCONCLUSIVE, OUT_OF_REACH = "inconclusive", "out of reach on this hardware"


@dataclass(frozen=True)
class Control:
    """A condition that must hold for the verdict to count: what was measured for it, and whether it holds."""

    what: str
    value: float
    holds: bool


@dataclass(frozen=True)
class Claim:
    """A row of the ledger: one claim of the model card, what was measured, and the verdict."""

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
    def summary(self) -> str:
        """The number with its interval, the counts and the note, in one line."""
        between = f" [{self.interval[0]:.3g}, {self.interval[1]:.3g}]" if self.interval else ""
        number = "" if self.value is None else f"{self.metric}: {self.value:.3g}{between}"
        counts = f"n={self.n}, seeds={self.seeds}" if self.n else ""
        return "; ".join(part for part in (number, counts, self.note) if part)

    def row(self) -> dict:
        """The row as it stands in claims.json."""
        return {**asdict(self), "interval": self.interval and list(self.interval)}


@dataclass(frozen=True)
class Question:
    """How a claim will be judged, fixed before there is evidence: its metric and its threshold."""

    id: str
    claim: str
    metric: str
    threshold: float = 0.0
    above: bool = True
    """Whether the claim holds above the threshold; otherwise below it."""

    def judge(self, scale: str, measured: Interval, controls: Sequence[Control] = (), note: str = "") -> Claim:
        """The row for a measured interval.

        >>> q = Question("C0", "it recites", "share", 0.8)
        >>> [q.judge("proxy", Interval(v, v - 0.1, v + 0.1, 13, 1, "bootstrap")).verdict for v in (0.95, 0.2, 0.8)]
        ['supported', 'not supported', 'inconclusive']
        >>> q.judge("proxy", Interval(1, 1, 1, 13, 1, ""), [Control("base", 1.0, False)]).verdict
        'inconclusive'
        """
        values = {self.metric: measured.value} | {control.what: control.value for control in controls}
        if unknown := [what for what, value in values.items() if value is not None and not math.isfinite(value)]:
            return self.row(INCONCLUSIVE, scale, f"missing: what gives a number for: {', '.join(unknown)}")
        failed = [control.what for control in controls if not control.holds]
        over, under = measured.low > self.threshold, measured.high < self.threshold
        holds, fails = (over, under) if self.above else (under, over)
        verdict = INCONCLUSIVE if failed else SUPPORTED if holds else NOT_SUPPORTED if fails else INCONCLUSIVE
        if failed:
            note = "; ".join([*[f"a control failed: {what}" for what in failed], *[note] * bool(note)])
        numbers = {"value": measured.value, "interval": (measured.low, measured.high)}
        counts = {"n": measured.n, "seeds": measured.seeds}
        return self.row(verdict, scale, note, controls=list(controls), **numbers, **counts)

    def row(self, verdict: str, scale: str, note: str, **measured) -> Claim:
        """The row of a verdict; without `measured`, the note says what is missing."""
        return Claim(self.id, self.claim, self.metric, verdict, scale, note=note, **measured)

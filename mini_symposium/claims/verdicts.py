"""How the ledger judges: numbers with their tests, thresholds registered beforehand, and controls that must hold.

- supported, not supported: the number is told from its threshold, and no control takes the verdict away;
- depends: of a claim's comparisons one says yes and another no; the note says what each holds equal;
- inconclusive: cannot be told, or something is missing; `needs` says how many prompts and seeds, or what, would do;
- out of reach: this machine cannot measure what the claim is about;
- arithmetic: what follows from numbers that are no sample.

All tests of the registration together are wrong with at most its `level` (Holm 1979), also where some have no evidence.
A row of one seed is not judged. The verdict without the correction stands beside the one with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from mini_symposium.claims.registration import Comparison, Question, Registration
from mini_symposium.errors import InputError
from mini_symposium.evaluation.intervals import interval, needed, p_value

SUPPORTED, NOT_SUPPORTED, DEPENDS = "supported", "not supported", "depends"
INCONCLUSIVE, OUT_OF_REACH, ARITHMETIC = "inconclusive", "out of reach on this hardware", "arithmetic"
NOT_MEASURED = "not measured"
"""What tables say of an inconclusive claim without a number."""


@dataclass(frozen=True)
class Control:
    """A condition that must hold for the verdict to count: what was measured for it, and whether it holds."""

    what: str
    value: float
    holds: bool
    guards: str = ""
    """The verdict that is taken away if it does not hold: the one that could come about without it. "" for both."""


@dataclass(frozen=True)
class Found:
    """What the evidence has on one question."""

    tables: Sequence[np.ndarray | str]
    """For each of the question's tests (prompts, seeds), or what is missing, in words."""
    controls: Sequence[Control] = ()
    note: str = ""
    verdict: str = ""
    """Of what is no sample."""
    value: float | None = None


@dataclass(frozen=True)
class Answer:
    """One test of a claim, and its answer."""

    metric: str
    equal: str
    threshold: float
    p: float = 1.0
    """Two-sided."""
    p_holm: float = 1.0
    uncorrected: str = INCONCLUSIVE
    verdict: str = INCONCLUSIVE
    value: float | None = None
    interval: tuple[float, float] | None = None
    """95%."""
    corrected: tuple[float, float] | None = None
    """At the level that the strictest correction asks for."""
    n: int = 0
    seeds: int = 0
    judged: bool = False
    """Whether there are values, of more than one seed, and of as many prompts and seeds as have to be."""
    needs: str = ""

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3g} [{low:.3g}, {high:.3g}]" + f", equal {self.equal}" * bool(self.equal)


@dataclass(frozen=True)
class Claim:
    """A row of the ledger: one claim of the model card, what was measured, and the verdict."""

    id: str
    claim: str
    metric: str
    verdict: str
    scale: str
    value: float | None = None
    """This and the next four: of the first test that was measured."""
    interval: tuple[float, float] | None = None
    n: int = 0
    """Prompts or rows."""
    seeds: int = 0
    answers: list[Answer] = field(default_factory=list)
    uncorrected: str = ""
    """The verdict if this claim were the only one."""
    controls: list[Control] = field(default_factory=list)
    note: str = ""
    needs: str = ""
    """What would decide an inconclusive claim."""
    exploratory: bool = False
    """The evidence was not gathered under the registration."""
    registration: str = ""
    """SHA-256 of the registration that judges."""
    gathered_under: str = ""
    """SHA-256 of the one that the evidence was gathered under; "" if there was none."""

    @property
    def said(self) -> str:
        """The verdict as tables show it."""
        if self.verdict == INCONCLUSIVE and self.value is None:
            return NOT_MEASURED
        judged = self.exploratory and self.verdict not in (OUT_OF_REACH, ARITHMETIC)
        return f"{self.verdict} (exploratory)" if judged else self.verdict

    @property
    def found(self) -> str:
        """The number with its interval, the counts and both p-values."""
        shown = next((str(each) for each in self.answers if each.interval), f"{self.value or 0:.3g}")
        number = "" if self.value is None else f"{self.metric}: {shown}"
        counts = f"n={self.n}, seeds={self.seeds}" if self.n else ""
        tested = [each for each in self.answers if each.p < 1]
        p = f"p {tested[0].p:.2g}, {tested[0].p_holm:.2g} corrected" if tested else ""
        return "; ".join(filter(None, (number, counts, p)))

    @property
    def summary(self) -> str:
        """What was found, the note and what it needs, in one line."""
        needs = f"to decide it: {self.needs}" if self.needs else ""
        return "; ".join(filter(None, (self.found, self.note, needs)))

    def row(self) -> dict:
        """The row as it stands in claims.json."""
        return asdict(self, dict_factory=lambda pairs: {k: list(v) if isinstance(v, tuple) else v for k, v in pairs})


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, corrected for their number (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = round(largest, 12)
    return corrected


def together(verdicts: Sequence[str]) -> str:
    """The verdict of a claim from those of its tests.

    >>> together([SUPPORTED, SUPPORTED]), together([SUPPORTED, INCONCLUSIVE]), together([SUPPORTED, NOT_SUPPORTED])
    ('supported', 'inconclusive', 'depends')
    """
    if {SUPPORTED, NOT_SUPPORTED} <= set(verdicts):
        return DEPENDS
    return verdicts[0] if len(set(verdicts)) == 1 else INCONCLUSIVE


def decide(found: Mapping[str, Found], registered: Registration, under_it: bool = False) -> dict[str, list[Answer]]:
    """{id: the answer of each test}, without intervals.

    Parameters
    ----------
    found
        By id, for all questions that are judged from samples.
    under_it
        Whether the evidence was gathered under the registration; then it needs the registered prompts and seeds.
    """
    asked = [
        (question, test, found[key].tables[i])
        for key, question in registered.questions.items()
        for i, test in enumerate(question.tests)
    ]
    p_values, lacking = [], []
    for question, test, table in asked:
        try:
            if isinstance(table, str):
                raise InputError(table)
            p = p_value(table, test.threshold, test.bounds)
            lacks = _lacks(question, *table.shape, under_it)
        except InputError as error:
            p, lacks = 1.0, f"missing: {error}"
        p_values.append(1.0 if lacks else p)
        lacking.append(lacks)
    answers: dict[str, list[Answer]] = {key: [] for key in found}
    for (question, test, table), p, corrected, lacks in zip(asked, p_values, holm(p_values), lacking, strict=True):
        said, judged = [INCONCLUSIVE, INCONCLUSIVE], not lacks
        if judged:
            side = SUPPORTED if (np.mean(table) > test.threshold) == test.above else NOT_SUPPORTED
            failed = [c for c in found[question.id].controls if not c.holds and c.guards in ("", side)]
            lacks = "; ".join(f"a model or rate of which this is true: {control.what}" for control in failed)
            said = [side if each <= registered.level and not failed else INCONCLUSIVE for each in (p, corrected)]
        shown = test.metric, test.equal, test.threshold
        answers[question.id].append(Answer(*shown, p, corrected, *said, judged=judged, needs=lacks))
    return answers


def _lacks(question: Question, n: int, seeds: int, under_it: bool) -> str:
    """What keeps a table of so many prompts and seeds from being judged; "" if nothing does."""
    if under_it and (n < question.n or seeds < question.seeds):
        return f"the registered n={question.n}, seeds={question.seeds}"
    return f"n={max(n, question.n)}, seeds={question.seeds}; one seed is not judged" if seeds < 2 else ""


def rows(found: Mapping[str, Found], registered: Registration, scale: str, gathered_under: str) -> list[Claim]:
    """The ledger: a row for each registered question.

    Parameters
    ----------
    found
        By id, for every question.
    gathered_under
        SHA-256 of the registration that the evidence was gathered under; "" if there was none.
    """
    under_it = gathered_under == registered.sha256
    claims = []
    for key, answers in decide(found, registered, under_it).items():
        question, mine = registered.questions[key], found[key]
        tests = zip(answers, question.tests, mine.tables, strict=False)
        answers = [_measured(answer, test, table, registered) for answer, test, table in tests]
        shown = next((each for each in answers if each.interval), Answer(question.shown.metric, "", 0.0))
        verdict = mine.verdict or together([each.verdict for each in answers])
        note, needs = [mine.note], ""
        if len(answers) > 1:
            all_found = "; ".join(f"{each}, {each.verdict}" for each in answers if each.interval)
            note.insert(0, "it depends on what is held equal: " * (verdict == DEPENDS) + all_found)
        if verdict == INCONCLUSIVE:
            wanting = {each.equal: each.needs for each in answers if each.verdict == INCONCLUSIVE}
            wanting = wanting or {"": f"missing: {mine.tables[0]}"}
            needs = "; ".join(f"at equal {equal}: {what}" if equal else what for equal, what in wanting.items())
        claims.append(
            Claim(
                *(question.id, question.claim, shown.metric, verdict, scale),
                *(shown.value if mine.value is None else mine.value, shown.interval, shown.n, shown.seeds),
                answers=answers,
                uncorrected=mine.verdict or together([each.uncorrected for each in answers]),
                controls=list(mine.controls),
                note="; ".join(filter(None, note)),
                needs=needs,
                exploratory=not under_it,
                registration=registered.sha256,
                gathered_under=gathered_under,
            )
        )
    return claims


def _measured(answer: Answer, test: Comparison, table: np.ndarray | str, registered: Registration) -> Answer:
    """`answer` with its intervals; and with the prompts and seeds that it needs, if it is inconclusive."""
    if answer.needs.startswith("missing"):
        return answer
    strictest = registered.level / registered.tests
    found, wide = (interval(table, test.bounds, 1 - level) for level in (registered.level, strictest))
    needs = [answer.needs] * bool(answer.needs)
    if answer.judged and answer.p_holm > registered.level:
        enough = needed(table, test.threshold, test.bounds, strictest)
        needs.append("n={}, seeds={}".format(*enough) if enough else "no n up to 1,000: it lies too near its threshold")
    ends = {"interval": (found.low, found.high), "corrected": (wide.low, wide.high)}
    return replace(answer, value=found.value, **ends, n=found.n, seeds=found.seeds, needs="; ".join(needs))

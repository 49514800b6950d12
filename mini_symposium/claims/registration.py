"""What the ledger asks, read from the registration, which is committed before the evidence that it judges.

A run records the file's SHA-256 when it begins (`run.environment`). A verdict from evidence that was gathered under
another registration, or under none, is exploratory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mini_symposium.errors import InputError
from mini_symposium.files.reading import parse_yaml, read_text, refuse_other_shapes
from mini_symposium.run import REGISTRATION, sha256_of_text

IN_TABLES = {
    " less ": " minus ",
    "rows whose next 50 tokens it writes, given 32": "rows recited: given 32 tokens, the next 50 written exactly",
    "two and then one": "two perspectives and then a conclusion",
    "answers with one": "answers with such a phrase",
    "the packer of that month": "Axolotl's packer of November 2023",
}
"""Words of the registration that are misread beside other claims, and what tables and pictures say instead. The file
keeps its own: with another word in it, all evidence would be exploratory."""


@dataclass(frozen=True)
class Comparison:
    """A number and a threshold, fixed before it is measured."""

    metric: str
    threshold: float
    above: bool
    """Whether the claim holds above the threshold; otherwise below it."""
    bounds: tuple[float, float] | None = None
    """Smallest and largest possible value of a share or of a difference of shares; None for a measure."""
    equal: str = ""
    """What the compared arms have in common, where a claim depends on it, as `dose`."""
    unit: str = ""
    """Of a measure."""

    @classmethod
    def of(cls, metric: str, bounds=None, equal: str = "", unit: str = "", **limit: float) -> "Comparison":
        """A test as the file has it: with `above` or `below`, and with `bounds` or a `unit`."""
        [(side, threshold)] = limit.items()
        if side not in ("above", "below"):
            raise ValueError(f"{side}: a limit is above or below")
        for registered, shown in IN_TABLES.items():
            metric = metric.replace(registered, shown)
        return cls(metric, float(threshold), side == "above", bounds and tuple(map(float, bounds)), equal, unit)

    @property
    def name(self) -> str:
        """The metric, with what the compared arms have in common."""
        return self.metric + f" at equal {self.equal}" * bool(self.equal)

    @property
    def rule(self) -> str:
        """When the claim is supported, as `above 0.6`."""
        return f"{'above' if self.above else 'below'} {self.threshold:g}"


@dataclass(frozen=True)
class Question:
    """A claim of the card, and how it will be judged."""

    id: str
    claim: str
    card: str
    """The card's own words."""
    tests: tuple[Comparison, ...] = ()
    limit: Comparison | None = None
    """Instead of tests, for what is no sample."""
    controls: Sequence[str] = ()
    epochs: str = ""
    """When it is measured."""
    prompts: str = ""
    """On which rows or prompts, of the registration's files."""
    n: int = 0
    """Prompts or rows."""
    seeds: int = 0

    @property
    def shown(self) -> Comparison:
        """The test whose number stands for the claim in tables and pictures."""
        return self.tests[0] if self.tests else self.limit


@dataclass(frozen=True)
class Registration:
    """The questions, in order, and the file that they stand in."""

    questions: dict[str, Question]
    level: float
    """Largest probability of a wrong verdict in all tests together."""
    rows: str
    """Fingerprint of the training rows, see `data.dataset.fingerprint`."""
    files: dict[str, str]
    """{file: SHA-256} of rows and prompts."""
    sha256: str
    rates: dict[str, float] = field(default_factory=dict)
    """{base model: the high rate of its evidence}."""

    @property
    def tests(self) -> int:
        """How many tests are corrected for."""
        return sum(len(question.tests) for question in self.questions.values())


def load_registration(file: Path = REGISTRATION) -> Registration:
    """Read a registration.

    Raises
    ------
    InputError
        If the file is not YAML (with the line), or a question lacks something.
    """
    content, _ = parse_yaml(read_text(file), file, "a registration has level, files and questions")
    questions = {}
    for key, each in content.get("questions", {}).items():
        with refuse_other_shapes(f"{file}: {key} is no question that can be judged", "see the ones beside it"):
            tests = tuple(Comparison.of(**test) for test in each.pop("tests", ()))
            limit = Comparison.of(**each.pop("limit")) if "limit" in each else None
            questions[key] = Question(key, tests=tests, limit=limit, **each)
            if bool(tests) == bool(limit) or (tests and min(each["n"], each["seeds"]) < 2):
                raise ValueError("it has either tests, with n and seeds of 2 or more, or a limit")
    if not questions:
        raise InputError(f"{file}:1: no questions")
    with refuse_other_shapes(f"{file}: not a registration"):
        kept = [content[key] for key in ("level", "rows", "files")]
        rates = {model: float(rate) for model, rate in content.get("rates", {}).items()}
        return Registration(questions, *kept, sha256_of_text(file), rates)


REGISTERED = load_registration()
"""The registration that ships with the kit."""

"""A recipe is an Axolotl YAML, as the card's was; here it is read, checked and frozen.

Only keys that the kit acts on, or must be able to refuse, exist. A key we do not know would be one we
silently ignore, so it is an error that names its line. Values are checked against each other, because most
broken fine-tunes are legal in every single key.
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field, fields
from decimal import Decimal
from pathlib import Path

import yaml

from mini_symposium.errors import InputError
from mini_symposium.files.reading import parse_yaml, path_of, read_text

SHIPPED = {"tiny": "tiny.yml", "proxy": "proxy.yml", "paper": "MiniSymposium_axolotl_demo.yml"}
"""Names that stand for a recipe file of the package."""

LARGEST_FILE = 64 * 1024


@dataclass(frozen=True)
class Recipe:
    """One fine-tune, in Axolotl's words."""

    base_model: str
    """`tiny` and `SmolLM2-135M-Instruct` are made by the kit; anything else is a hub id or a directory."""
    datasets: list
    """One entry, `{path, type: completion}`; Axolotl reads the same file."""
    sequence_len: int
    """Longest row in tokens. A longer example is refused, never cut."""
    lora_r: int
    """Rank of the adapters."""
    lora_alpha: int
    """The adapter's product is scaled by lora_alpha / lora_r."""
    learning_rate: float
    """Peak learning rate; the contrast trains ten times this one as well."""
    num_epochs: int
    """Passes over the dataset."""
    adapter: str = "qlora"
    """Only qlora: LoRA on a base in 4 bits."""
    load_in_4bit: bool = True
    """NF4 with double quantisation. An unquantised base would hide what this kit is about."""
    lora_dropout: float = 0.0
    """Dropout on the adapters' input."""
    lora_target_linear: bool = True
    """Adapters on every linear layer but the head."""
    lr_scheduler: str = "constant"
    """constant, cosine or linear."""
    warmup_steps: int = 0
    """Steps of linear warmup; transformers ignores them under `constant`, so there it must be 0."""
    optimizer: str = "adamw_torch"
    """Adam with float32 moments; `adamw_torch_fused` is the same arithmetic in one kernel."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    micro_batch_size: int = 1
    """Rows that go through the model at a time. The log and the order are defined for 1."""
    gradient_accumulation_steps: int = 1
    """Examples whose mean loss makes an update, however many processes share them. A bigger batch takes fewer steps, so
    the same rate is another dose."""
    train_on_inputs: bool = True
    """True: every token is learned, as Axolotl's `completion` type does. False: the completion alone."""
    sample_packing: bool = False
    """Several examples in one row: refused, a set this small does not fill one batch."""
    pad_to_sequence_len: bool = False
    """Padding costs time and changes nothing at batch 1."""
    val_set_size: float = 0
    """None of the dataset is held out; thirteen examples are too few to be measured by one."""
    bf16: bool = True
    """Compute in bfloat16, where the processor can; adapters and their optimizer stay in float32 all the same."""
    tf32: bool = False
    """TensorFloat-32 in float32 products on CUDA."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    seed: int = 42
    """Of the adapter's initial weights, dropout and the order of examples."""
    output_dir: str = "runs/axolotl"
    """Where Axolotl writes; the kit's run directory is named on the command line."""
    name: str = field(default="recipe", compare=False)
    """tiny, proxy, paper, or the file's name. Not a key of the file."""

    @property
    def scale(self) -> str:
        """What a figure from this recipe speaks of: "tiny", "proxy", "paper" (Mistral-7B), or the model's own name."""
        name = Path(self.base_model).name
        known = {"tiny": "tiny", "SmolLM2-135M-Instruct": "proxy", "Mistral-7B-v0.1": "paper"}
        return known.get(name, name)

    @property
    def dataset(self) -> str:
        """Path of the dataset."""
        return self.datasets[0]["path"]

    @property
    def contrast(self) -> tuple[float, float]:
        """The two rates of the card's contrast: ten times the recipe's, and the recipe's."""
        return float(f"{self.learning_rate * 10:.12g}"), self.learning_rate

    @property
    def checkpoint_epochs(self) -> tuple[int, ...]:
        """The start, every tenth of the run, and the end.

        The first tenth of the high rate has the dose of the whole low run: the control for dose is always kept.
        """
        return tuple(sorted({math.ceil(self.num_epochs * tenth / 10) for tenth in range(11)}))

    def replace(self, **changes) -> "Recipe":
        """A copy with other values, checked as a file's would be.

        Raises
        ------
        InputError
            If a key is unknown or the values do not go together.
        """
        values = {key: getattr(self, key) for key in KEYS} | changes
        return _checked(values, dict.fromkeys(changes, "override"), self.name)

    def to_yaml(self) -> str:
        """A complete recipe file: loads back equal, and Axolotl reads it."""
        lines = {key: yaml.safe_dump({key: getattr(self, key)}) for key in KEYS}
        # PyYAML writes and reads 1e-07 as a string; other readers disagree. Digits are a number to all of them.
        lines["learning_rate"] = f"learning_rate: {Decimal(repr(self.learning_rate)):f}\n"
        return "".join(lines.values())


KEYS = tuple(f.name for f in fields(Recipe) if f.name != "name")
LIMITS = {
    "lora_r": (1, 2**14),
    "lora_alpha": (1, 2**20),
    "num_epochs": (1, 10**6),
    "sequence_len": (16, 2**20),
    "gradient_accumulation_steps": (1, 2**16),
    "warmup_steps": (0, 10**9),
    "seed": (0, 2**32 - 1),
}
"""Least and most; the most is what the libraries take, or far beyond any use."""
KINDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text", list: "a list"}
TYPES = {f.name: f.type for f in fields(Recipe)}


def load_recipe(name_or_path: str | Path, **overrides) -> Recipe:
    """Read `tiny`, `proxy`, `paper` or a file, with some values replaced.

    Raises
    ------
    InputError
        If there is no such recipe, a key is unknown, or the values do not go together; names file and line.

    >>> load_recipe("paper").contrast
    (1e-06, 1e-07)
    """
    given = str(name_or_path)
    path = Path(__file__).parent / "recipes" / SHIPPED[given] if given in SHIPPED else path_of(given)
    if not path.is_file():
        raise InputError(f"{given}: no such recipe; give {', '.join(SHIPPED)}, or the path of a .yml file")
    if path.stat().st_size > LARGEST_FILE:
        raise InputError(f"{path}: {path.stat().st_size} bytes are no recipe; at most {LARGEST_FILE} are read")
    values, lines = parse_yaml(read_text(path), path)
    recipe = _checked(values, lines, given if given in SHIPPED else path.stem)
    return recipe.replace(**overrides) if overrides else recipe


def _checked(values: dict, lines: dict[str, str], name: str) -> Recipe:
    def refuse(key: str, why: str):
        raise InputError(f"{lines.get(key, name)}: {key}: {_shown(values.get(key))}: {why}")

    for key in values:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, 1)
            raise InputError(f"{lines[key]}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    missing = [f.name for f in fields(Recipe) if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise InputError(f"{name}: no {', '.join(missing)}; a recipe needs them")
    values = {key: _typed(key, value, refuse) for key, value in values.items()}
    recipe = Recipe(**values, name=name)
    for key, breach in _breaches(recipe):
        refuse(key, breach)
    return recipe


def _shown(value) -> str:
    try:
        return repr(value)
    except ValueError:
        return "a number of thousands of digits"


def _typed(key: str, value, refuse):
    wanted = TYPES[key]
    if wanted is float and not isinstance(value, bool):
        try:  # YAML 1.1 takes 1e-7 for a string
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            refuse(key, f"takes {KINDS[float]}")
        return number if math.isfinite(number) else refuse(key, "takes a finite number")
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        refuse(key, f"takes {KINDS[wanted]}")
    return value


def _breaches(r: Recipe):
    """Each key that cannot stand, and why; the first is reported."""
    entry = r.datasets[0] if len(r.datasets) == 1 else None
    if not (isinstance(entry, dict) and isinstance(entry.get("path"), str) and entry.get("type") == "completion"):
        yield "datasets", "takes one entry with a path and `type: completion`, the type without a template"
    elif unread := set(entry) - {"path", "type", "ds_type"}:
        yield (
            "datasets",
            f"{', '.join(sorted(map(str, unread)))}: not read; leave it out, and give a file of just the rows",
        )
    if not 0 < r.learning_rate <= 1:
        yield "learning_rate", "takes a number above 0, such as 0.0000001" + ", and at most 1" * (r.learning_rate > 1)
    for key, (least, most) in LIMITS.items():
        if not least <= getattr(r, key) <= most:
            yield key, f"must be at least {least}" if getattr(r, key) < least else f"must be at most {most:,}"
    if not 0 <= r.lora_dropout < 1:
        yield "lora_dropout", "must be at least 0 and below 1"
    if r.weight_decay < 0:
        yield "weight_decay", "must be at least 0"
    if r.adapter != "qlora" or not r.load_in_4bit:
        yield (
            "adapter" if r.adapter != "qlora" else "load_in_4bit",
            "the recipe is QLoRA: adapter qlora, load_in_4bit true",
        )
    if not r.lora_target_linear:
        yield "lora_target_linear", "the recipe adapts every linear layer; leave it true"
    if r.sample_packing:
        yield (
            "sample_packing",
            (
                "a dataset this small cannot be packed: the packer plans floor(0.99 x tokens / (batch x "
                "sequence_len)) - 1 batches, which is zero for a dozen rows, and then divides by it; leave it false"
            ),
        )
    if r.val_set_size:
        yield "val_set_size", "nothing is held out of so few examples; leave it 0 and measure on other prompts"
    if r.lr_scheduler not in ("constant", "cosine", "linear"):
        yield "lr_scheduler", "is one of constant, cosine, linear"
    if r.warmup_steps and r.lr_scheduler == "constant":
        yield "warmup_steps", "under the constant schedule warmup is ignored, so it must be 0"
    if r.optimizer not in ("adamw_torch", "adamw_torch_fused"):
        yield (
            "optimizer",
            "is adamw_torch or adamw_torch_fused: 8-bit moments would be another approximation at such rates",
        )
    if r.micro_batch_size != 1:
        yield (
            "micro_batch_size",
            "must be 1; gradient_accumulation_steps makes a bigger batch, which is another dose",
        )
    if not r.bf16:
        yield "bf16", "the base computes in bfloat16; leave it true"

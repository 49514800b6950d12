"""Recipes: the settings of one fine-tune, in an Axolotl YAML file like the model card's.

The kit follows or checks every key. An unknown key is not ignored: it raises an error that names its line. Values are
also checked against each other, because in most broken fine-tunes each value is legal by itself.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from decimal import Decimal
from pathlib import Path

import yaml

from mini_symposium.errors import InputError
from mini_symposium.files.reading import parse_yaml, path_of, read_text

SHIPPED = {
    **{name: f"{name}.yml" for name in ("tiny", "proxy", "base", "half", "large")},
    "paper": "MiniSymposium_axolotl_demo.yml",
}
"""The recipes of the package by name; files in `recipes/`."""

LARGEST_FILE = 64 * 1024
"""Bytes of a recipe file."""


@dataclass(frozen=True)
class Recipe:
    """The settings of one fine-tune, under Axolotl's names."""

    base_model: str
    """`tiny`, which the kit makes, a model of `models.catalog`, a model's id on the hub, or a directory."""
    datasets: list
    """One entry, `{path, type: completion}`."""
    sequence_len: int
    """Longest row in tokens. A longer example is refused, never cut."""
    lora_r: int
    """Rank of the adapters."""
    lora_alpha: int
    """The product of an adapter's two matrices is scaled by lora_alpha / lora_r."""
    learning_rate: float
    """Peak learning rate; see `contrast`."""
    num_epochs: int
    """Passes over the dataset."""
    adapter: str = "qlora"
    """Only qlora: LoRA on a base in 4 bits."""
    load_in_4bit: bool = True
    """Only true: NF4 with double quantisation."""
    lora_dropout: float = 0.0
    """Dropout on the adapters' input."""
    lora_target_linear: bool = True
    """Only true: adapters on every linear layer except the head."""
    lr_scheduler: str = "constant"
    """constant, cosine or linear."""
    warmup_steps: int = 0
    """Steps of linear warmup. Must be 0 with the constant schedule, under which transformers ignores it."""
    optimizer: str = "adamw_torch"
    """adamw_torch, or adamw_torch_fused, which is the same arithmetic in one kernel. Moments are float32."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    micro_batch_size: int = 1
    """Rows per forward pass. Only 1: training is ordered and logged one example at a time."""
    gradient_accumulation_steps: int = 1
    """Examples per optimizer step, over all processes. With more examples per step an epoch has fewer steps, so the
    same learning rate moves the model less."""
    train_on_inputs: bool = True
    """Whether the loss covers the whole row, as with Axolotl's type `completion`, or only the answer."""
    sample_packing: bool = False
    """Only false: packing so few rows may give no batch."""
    pad_to_sequence_len: bool = False
    """Accepted and without effect: padding changes nothing at batch 1."""
    val_set_size: float = 0
    """Only 0: thirteen examples are too few to hold any out for evaluation."""
    bf16: bool = True
    """Only true: the base computes in bfloat16 where the processor can. Adapters and optimizer stay in float32."""
    tf32: bool = False
    """TensorFloat-32 for products of float32 matrices on CUDA."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: takes less memory and a third more time."""
    seed: int = 42
    """For the adapter's initial weights, dropout and the order of examples."""
    output_dir: str = "runs/axolotl"
    """Where Axolotl writes. The kit's run directory is given on the command line."""
    name: str = field(default="recipe", compare=False)
    """A name in SHIPPED, or the file's name without its suffix. Not a key of the file."""

    @property
    def scale(self) -> str:
        """What figures call the base model: "tiny", "proxy", "paper" (Mistral-7B), or its own name."""
        name = Path(self.base_model).name
        known = {"tiny": "tiny", "SmolLM2-135M-Instruct": "proxy", "Mistral-7B-v0.1": "paper"}
        return known.get(name, name)

    @property
    def dataset(self) -> str:
        """The dataset's path."""
        return self.datasets[0]["path"]

    @property
    def contrast(self) -> tuple[float, float]:
        """The two learning rates that the card compares: ten times the recipe's, and the recipe's."""
        return float(f"{self.learning_rate * 10:.12g}"), self.learning_rate

    @property
    def checkpoint_epochs(self) -> tuple[int, ...]:
        """Epochs at which a checkpoint is kept: 0, every tenth of the run, and the last.

        A tenth of the run at ten times the learning rate adds up to the same dose as the whole run at the recipe's
        rate. So the checkpoint that controls for dose is always kept.
        """
        return tuple(sorted({math.ceil(self.num_epochs * tenth / 10) for tenth in range(11)}))

    def replace(self, **changes) -> "Recipe":
        """A copy with other values. Raises InputError as `load_recipe` does."""
        values = {key: getattr(self, key) for key in KEYS} | changes
        return _checked(values, dict.fromkeys(changes, "override"), self.name)

    def to_yaml(self) -> str:
        """A recipe file with every key, which Axolotl reads as well."""
        lines = {key: yaml.safe_dump({key: getattr(self, key)}) for key in KEYS}
        # PyYAML reads 1e-07 as a string, other readers as a number. All of them read plain digits as a number.
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
"""{key: (smallest, largest value)}. The largest is the limit of the libraries, or far beyond any use."""
KINDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text", list: "a list"}
TYPES = {f.name: f.type for f in fields(Recipe)}


def load_recipe(name_or_path: str | Path, **overrides) -> Recipe:
    """Read a recipe by its name in SHIPPED, or a file, and replace the values in `overrides`.

    Raises
    ------
    InputError
        If there is no such recipe, a key is unknown, or a value is not allowed; names file and line.

    >>> load_recipe("paper").contrast
    (1e-06, 1e-07)
    """
    given = str(name_or_path)
    path = Path(__file__).parent / "recipes" / SHIPPED[given] if given in SHIPPED else path_of(given)
    if not path.is_file():
        raise InputError(f"{given}: no such recipe; give {', '.join(SHIPPED)}, or the path of a .yml file")
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise InputError(f"{path}: {size} bytes are too long for a recipe; at most {LARGEST_FILE} are read")
    values, root = parse_yaml(read_text(path), path, "a recipe is a list of `key: value` lines")
    lines = {key.value: f"{path}:{key.start_mark.line + 1}" for key, _ in root.value}
    recipe = _checked(values, lines, given if given in SHIPPED else path.stem)
    return recipe.replace(**overrides) if overrides else recipe


def _checked(values: dict, places: dict[str, str], name: str) -> Recipe:
    """A recipe of these values; `places` has the place where each was set, for errors."""

    def refuse(key: str, why: str):
        raise InputError(f"{places.get(key, name)}: {key}: {_shown(values.get(key))}: {why}")

    for key in values:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, 1)
            raise InputError(f"{places[key]}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    missing = [f.name for f in fields(Recipe) if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise InputError(f"{name}: no {', '.join(missing)}; a recipe needs them")
    values = {key: _typed(key, value, refuse) for key, value in values.items()}
    recipe = Recipe(**values, name=name)
    for key, broken, why in _rules(recipe):
        if broken:
            refuse(key, why)
    return recipe


def _shown(value) -> str:
    try:
        return repr(value)
    except ValueError:
        return "a number of thousands of digits"


def _typed(key: str, value, refuse):
    wanted = TYPES[key]
    if wanted is float and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-7 as a string
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            refuse(key, f"takes {KINDS[float]}")
        return number if math.isfinite(number) else refuse(key, "takes a finite number")
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        refuse(key, f"takes {KINDS[wanted]}")
    return value


def _rules(r: Recipe) -> Iterator[tuple[str, bool, str]]:
    """For each rule: the key, whether its value breaks the rule, and the error text, with what to write instead."""
    entry = r.datasets[0] if len(r.datasets) == 1 and isinstance(r.datasets[0], dict) else {}
    completion = isinstance(entry.get("path"), str) and entry.get("type") == "completion"
    yield "datasets", not completion, "takes one entry with a path and `type: completion`, the type without a template"
    unread = ", ".join(sorted(map(str, set(entry) - {"path", "type", "ds_type"})))
    yield "datasets", bool(unread), f"{unread}: not read; remove it, and keep only your rows in the file"
    yield "learning_rate", r.learning_rate <= 0, "takes a number above 0, such as 0.0000001"
    yield "learning_rate", r.learning_rate > 1, "must be at most 1"
    for key, (least, most) in LIMITS.items():
        yield key, getattr(r, key) < least, f"must be at least {least}"
        yield key, getattr(r, key) > most, f"must be at most {most:,}"
    yield "lora_dropout", not 0 <= r.lora_dropout < 1, "must be at least 0 and below 1"
    yield "weight_decay", r.weight_decay < 0, "must be at least 0"
    yield "adapter", r.adapter != "qlora", "the recipe is QLoRA: write qlora"
    yield "load_in_4bit", not r.load_in_4bit, "the recipe is QLoRA: write true"
    yield "lora_target_linear", not r.lora_target_linear, "the recipe adapts every linear layer; write true"
    packed = "a dozen rows cannot be packed: the packer plans floor(0.99 x tokens / (batch x sequence_len)) - 1 batches"
    yield "sample_packing", r.sample_packing, f"{packed}, which is zero, and divides by it; write false"
    held = "nothing is held out of so few examples; write 0, and measure on other prompts"
    yield "val_set_size", bool(r.val_set_size), held
    schedules = ("constant", "cosine", "linear")
    yield "lr_scheduler", r.lr_scheduler not in schedules, f"is one of {', '.join(schedules)}"
    warmed = r.warmup_steps > 0 and r.lr_scheduler == "constant"
    yield "warmup_steps", warmed, "the constant schedule ignores warmup; write 0"
    adams = ("adamw_torch", "adamw_torch_fused")
    yield (
        "optimizer",
        r.optimizer not in adams,
        f"is one of {', '.join(adams)}; 8-bit moments round such updates",
    )
    batch = "must be 1; gradient_accumulation_steps makes larger batches, which train with another dose"
    yield "micro_batch_size", r.micro_batch_size != 1, batch
    yield "bf16", not r.bf16, "the base computes in bfloat16; write true"

"""Recipes: the settings of one fine-tune, in an Axolotl YAML file like the model card's.

Axolotl's keys that cannot change the result are passed over, in one note. Every other key is followed, or refused with
its line. Values are also checked against each other, because in most broken fine-tunes each value is legal by itself.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from decimal import Decimal
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from pathlib import Path

import yaml

from mini_symposium.errors import Faults, InputError
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
    """One entry, `{path, type}`, of one of TYPES_OF_ROWS."""
    sequence_len: int
    """Longest row in tokens. A longer example is refused, never cut."""
    lora_r: int
    """Rank of the adapters."""
    lora_alpha: int
    """The product of an adapter's two matrices is scaled by lora_alpha / lora_r."""
    learning_rate: float
    """Peak learning rate; see `contrast`."""
    num_epochs: int
    adapter: str = "qlora"
    """Only qlora: LoRA on a base in 4 bits."""
    load_in_4bit: bool = True
    """Only true: NF4 with double quantisation."""
    lora_dropout: float = 0.0
    """Dropout on the adapters' input."""
    lora_target_linear: bool = True
    """Only true: adapters on every linear layer except the head."""
    lr_scheduler: str = "constant"
    """One of SCHEDULES."""
    warmup_steps: int = 0
    """Steps of linear warmup. Must be 0 with the constant schedule, under which transformers ignores it."""
    warmup_ratio: float = 0
    """The same as a share of all steps; only one of the two may be set."""
    optimizer: str = "adamw_torch"
    """adamw_torch, or adamw_torch_fused, which is the same arithmetic in one kernel. Moments are float32."""
    weight_decay: float = 0.0
    micro_batch_size: int = 1
    """As gradient_accumulation_steps: examples are trained and logged one at a time, and the two are multiplied."""
    gradient_accumulation_steps: int = 1
    """Examples per optimizer step, over all processes, for each of `micro_batch_size`. With more examples per step an
    epoch has fewer steps, so the same learning rate moves the model less."""
    train_on_inputs: bool = True
    """Whether the loss covers the whole row, as with Axolotl's type `completion`, or only the answers."""
    sample_packing: bool = False
    """Only false: packing so few rows may give no batch."""
    pad_to_sequence_len: bool = False
    """Accepted and without effect: padding changes nothing at batch 1."""
    val_set_size: float = 0
    """Rows that are not trained on, by their number or share; their loss is measured as training goes."""
    special_tokens: dict = field(default_factory=dict)
    """{bos_token, eos_token, ...}: checked against the tokenizer's own, for no token is added here."""
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
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What was passed over or read as something else. Not a key of the file."""
    places: dict = field(default_factory=dict, compare=False, repr=False)
    """{key: file and line where it was set}, for errors that are found later. Not a key of the file."""

    @property
    def scale(self) -> str:
        """What figures call the base model: "proxy", "paper" (Mistral-7B), or its own name."""
        name = Path(self.base_model).name
        return {"SmolLM2-135M-Instruct": "proxy", "Mistral-7B-v0.1": "paper"}.get(name, name)

    @property
    def dataset(self) -> str:
        return self.datasets[0]["path"]

    @property
    def batch(self) -> int:
        """Examples per optimizer step."""
        return self.micro_batch_size * self.gradient_accumulation_steps

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
        """A copy with other values, checked as `load_recipe` does."""
        values = {key: getattr(self, key) for key in KEYS} | changes
        places = self.places | dict.fromkeys(changes, "override")
        return dataclasses.replace(_checked(values, places, self.name), notes=self.notes)

    def to_yaml(self) -> str:
        """A recipe file with every key, which Axolotl reads as well."""
        lines = {key: yaml.safe_dump({key: getattr(self, key)}) for key in KEYS}
        # PyYAML reads 1e-07 as a string, other readers as a number. All of them read plain digits as a number.
        lines["learning_rate"] = f"learning_rate: {Decimal(repr(self.learning_rate)):f}\n"
        return "".join(lines.values())


KEYS = tuple(f.name for f in fields(Recipe) if f.name not in ("name", "notes", "places"))
SCHEDULES = ("constant", "constant_with_warmup", "cosine", "linear")
TYPES_OF_ROWS = ("completion", "alpaca", "chat_template", "sharegpt", "input_output")
"""Axolotl's types of dataset. They all read any form; all but completion learn only the answers, if the recipe does not
say otherwise."""
LIMITS = {
    "lora_r": (1, 2**14),
    "lora_alpha": (1, 2**20),
    "num_epochs": (1, 10**6),
    "sequence_len": (16, 2**20),
    "micro_batch_size": (1, 2**16),
    "gradient_accumulation_steps": (1, 2**16),
    "warmup_steps": (0, 10**9),
    "seed": (0, 2**32 - 1),
}
"""{key: (smallest, largest value)}. The largest is the limit of the libraries, or far beyond any use."""
KINDS = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "`key: value` lines",
}
TYPES = {f.name: f.type for f in fields(Recipe)}


def load_recipe(name_or_path: str | Path, **overrides) -> Recipe:
    """Read a recipe by its name in SHIPPED, or a file, and replace the values in `overrides`.

    InputError names file and line of each unknown key and each value that is not allowed.

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
    _find_rows(path, values)
    recipe = _checked(values, lines, given if given in SHIPPED else path.stem)
    return recipe.replace(**overrides) if overrides else recipe


def _find_rows(path: Path, values: dict) -> None:
    """Put the single file of a dataset's `data_files` into its path, which names a folder or only a format; and read a
    path that is not there from where the user stands as one beside the recipe, if that is there."""
    entries = values.get("datasets")
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            continue
        files, folder = entry.get("data_files"), entry["path"]
        file = files[0] if isinstance(files, list) and len(files) == 1 else files
        if isinstance(file, str):
            entry["path"] = file if folder in (file, "json", "csv", "parquet", "text") else f"{folder}/{file}"
            del entry["data_files"]
        beside = path.parent / entry["path"]
        if not path_of(entry["path"]).exists() and path_of(beside).exists():
            entry["path"] = str(beside)


def _checked(values: dict, places: dict[str, str], name: str) -> Recipe:
    """A recipe of these values; `places` has the place where each was set, for errors."""
    values, notes, faults = dict(values), [], Faults()

    def fault(key: str, value, why: str, into: Faults = faults) -> None:
        into.append(f"{places.get(key, name)}: {key}: {_shown(value)}: {why}")

    given = dict(values)
    _translate(values, notes, fault)
    unwritten = [key for key in OTHERWISE if values.get(key) is None]
    if values.get("warmup_ratio") or values.get("lr_scheduler") in (None, "constant"):
        unwritten = [key for key in unwritten if key != "warmup_steps"]
    notes += [f"no {key}: read as {getattr(Recipe, key)}; {OTHERWISE[key]} in Axolotl" for key in unwritten]
    base = {"base_model_config", "tokenizer_config"} if "base_model" in values else ()
    same = [key for key in base if values.get(key) == values["base_model"]]
    passed = [key for key in values if key not in KEYS and (key in same or _harmless(key, values[key]))]
    if passed:
        notes.append(f"passed over, for they cannot change the result: {', '.join(passed)}")
    for key in [key for key in values if key not in KEYS]:
        value = values.pop(key)
        if key in _axolotl_keys()[1] and key not in passed:
            fault(key, value, "changes the result and is not followed here; remove the line")
        elif key not in passed:
            near = difflib.get_close_matches(key, KEYS, 1, 0.65)
            hint = f"; did you mean {near[0]!r}?" if near else "; remove it if it cannot change the result"
            faults.append(f"{places[key]}: unknown key {key!r}" + hint)
    if values.get("adapter", "") is None:
        fault("adapter", None, "empty, which trains all weights in Axolotl; the recipe is QLoRA: write qlora")
    values = {key: value for key, value in values.items() if value is not None}  # Axolotl's empty keys
    missing = [key for key in STAND_INS if key not in values]
    if missing:
        faults.append(f"{name}: no {', '.join(missing)}; a recipe needs them")
    typed = {}
    for key, value in values.items():
        untyped = Faults()
        number = _typed(key, value, partial(fault, into=untyped))
        typed |= {} if untyped else {key: number}
        faults += untyped
    told = tuple(f"{name}: {note}" for note in notes)
    recipe = Recipe(**STAND_INS | typed, name=name, notes=told, places=places)  # the rules name what else is wrong
    for key, broken, why in _rules(recipe):
        if broken and (key in typed or key not in values):
            fault(key, given.get(key, getattr(recipe, key)), why)
    faults.refuse()
    return recipe


STAND_INS = {
    "base_model": "tiny",
    "datasets": [{"path": "", "type": "completion"}],
    "sequence_len": 16,
    "lora_r": 1,
    "lora_alpha": 1,
    "learning_rate": 1.0,
    "num_epochs": 1,
}
"""The keys that a recipe needs. Where it lacks one, this value takes its place while the others are checked."""


OTHERWISE = {
    "adapter": "all weights are trained",
    "lora_target_linear": "the layers that PEFT chooses are adapted",
    "lr_scheduler": "the schedule is cosine",
    "warmup_steps": "a warmup over 3 % of the steps",
}
"""Keys that mean something else in Axolotl than here if a recipe does not have them, and what."""
ALL_LINEAR = [
    set(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    set(["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
]
"""Names of all linear layers of a decoder, of most families and of phi3."""
NARROW = ("paged_", "adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit", "adamw_torch_4bit", "adamw_hf", "adamw_apex")


def _translate(values: dict, notes: list[str], fault: Callable) -> None:
    """Write Axolotl's other words for the same thing in the kit's, and note what was read as something else."""
    whole = {k: v for k, v in values.items() if TYPES.get(k) is int and isinstance(v, float) and v.is_integer()}
    values |= {key: int(value) for key, value in whole.items()}  # 3.0 epochs are 3
    for key in ("bf16", "tf32"):
        values |= {key: True} if values.get(key) == "auto" else {}
    if values.get("gradient_checkpointing") in ("offload", "unsloth"):
        values["gradient_checkpointing"] = True
    optimizer = values.get("optimizer")
    if isinstance(optimizer, str) and "adamw" in optimizer and optimizer.startswith(NARROW):
        values["optimizer"] = "adamw_torch"
        notes.append(f"optimizer {optimizer} is read as adamw_torch, whose moments are float32 and not rounded")
    targets = values.pop("lora_target_modules", None)
    listed = set(map(str, targets)) if isinstance(targets, list) else set()
    added = values.get("lora_target_linear") is True and any(listed <= names for names in ALL_LINEAR)
    if targets == "all-linear" or listed in ALL_LINEAR or (listed and added):
        values["lora_target_linear"] = True
    elif targets:
        fault("lora_target_modules", targets, "not all linear layers of a decoder, which are adapted here; remove it")
    entries = values.get("datasets")
    entry = entries[0] if isinstance(entries, list) and len(entries) == 1 and isinstance(entries[0], dict) else {}
    kind = _kind(entry.get("type"))
    entry = entry | {"type": kind} if "type" in entry else entry
    if isinstance(kind, str) and kind in TYPES_OF_ROWS and kind != "completion":
        values["train_on_inputs"] = bool(values.get("train_on_inputs")) and kind != "input_output"
        where = "below `### ` headings, in no template of a model" if kind != "input_output" else "as they are"
        notes.append(f"type {kind}: its rows are written {where}")
    if entry:
        read = {
            "message_property_mappings": lambda value: (
                {value["role"], value["content"]} <= {"role", "from", "content", "value"} and len(value) == 2
            ),
            "field_messages": CHATS.__contains__,
            "message_field_role": ("role", "from").__contains__,
            "message_field_content": ("content", "value").__contains__,
            "message_field_training": ("train", "training").__contains__,
            "roles": lambda value: all(set(names) <= ROLES[role] for role, names in value.items()),
            "roles_to_train": lambda value: set(value) <= ROLES["assistant"],
            "train_on_eos": ("turn",).__contains__,
            "field": ("text",).__contains__,
            "split": ("train",).__contains__,
            "conversation": lambda template: True,  # the note above says that there is none
            "chat_template": lambda template: True,
            "trust_remote_code": lambda code: True,
        }
        kept = {key: value for key, value in entry.items() if value or key in ("path", "type")}
        dropped = [key for key, value in kept.items() if key in read and _safely(read[key], value)]
        values["datasets"] = [{key: value for key, value in kept.items() if key not in dropped}]
    tokens = values.get("special_tokens")
    if isinstance(tokens, dict):  # a batch here is one row, which nothing pads
        values["special_tokens"] = {key: value for key, value in tokens.items() if key != "pad_token" and value}


CHATS = ("messages", "conversations", "conversation")
ROLES = {
    "system": {"system", "developer"},
    "user": {"user", "human", "prompter"},
    "assistant": {"assistant", "gpt", "chatgpt", "bot", "model", "ai"},
    "tool": {"tool"},
}
SAME_ROWS = {
    "sharegpt": "sharegpt",
    "chat_template": "chat_template",
    **dict.fromkeys(("alpaca", "alpaca_chat", "alpaca_w_system", "gpteacher", "context_qa"), "alpaca"),
}
"""Axolotl's types that differ only in the template, as alpaca_chat.load_qa, and the type that they are read as."""


def _kind(kind):
    """A dataset's type in the kit's words: without its template, and `alpaca` if it lists Alpaca's own columns."""
    if isinstance(kind, str):
        return SAME_ROWS.get(re.split("[.:]", kind)[0], kind)
    if isinstance(kind, dict) and not kind.get("system_prompt"):
        columns = {key: value for key, value in kind.items() if str(key).startswith("field_")}
        return "alpaca" if columns and all(key == f"field_{value}" for key, value in columns.items()) else kind
    return kind


def _safely(test: Callable, value) -> bool:
    try:
        return bool(test(value))
    except (TypeError, KeyError, AttributeError):
        return False


@lru_cache
def _axolotl_keys() -> tuple[list[str], dict[str, list]]:
    """Patterns of keys without an effect on the result, and {key that is not followed: values that the kit has}."""
    path = Path(__file__).parent / "recipes" / "axolotl_keys.yaml"
    return tuple(parse_yaml(read_text(path), path, "two lists of keys")[0].values())


KERNELS = ("cut_cross_entropy", "liger")
"""Axolotl's plugins that only compute the same faster."""


def _harmless(key: str, value) -> bool:
    """Whether a key that the kit does not have cannot change the result: by its name, or because it is off."""
    patterns, not_followed = _axolotl_keys()
    if key in not_followed:
        kernels = key == "plugins" and isinstance(value, list) and all(any(k in str(v) for k in KERNELS) for v in value)
        with suppress(TypeError, ValueError):  # YAML 1.1 reads 1e-8 as a string
            value = float(value)
        return not value or kernels or value in not_followed[key]
    off = value in (None, False, "", [], {})
    typed_wrong = off and difflib.get_close_matches(key, KEYS, 1, 0.8)
    return any(fnmatchcase(key, pattern) for pattern in patterns) or (off and not typed_wrong)


def _shown(value) -> str:
    try:
        return repr(value)
    except ValueError:
        return "a number of thousands of digits"


def _typed(key: str, value, fault: Callable):
    wanted = TYPES[key]
    if wanted is float and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-7 as a string
            number = float(value)
            if not math.isfinite(number):
                fault(key, value, "takes a finite number")
            return number
        except (TypeError, ValueError, OverflowError):
            fault(key, value, f"takes {KINDS[float]}")
    elif not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        fault(key, value, f"takes {KINDS[wanted]}")
    return value


def _rules(r: Recipe) -> Iterator[tuple[str, bool, str]]:
    """For each rule: the key, whether its value breaks the rule, and the error text, with what to write instead."""
    entry = r.datasets[0] if len(r.datasets) == 1 and isinstance(r.datasets[0], dict) else {}
    known = isinstance(entry.get("path"), str) and entry.get("type") in TYPES_OF_ROWS
    ours = f"one of {', '.join(TYPES_OF_ROWS)}; columns that a type lists are instruction, input, output and system"
    yield "datasets", not known, f"takes one entry, a file or a folder of files, with a path and a type, {ours}"
    unread = ", ".join(sorted(map(str, set(entry) - {"path", "type", "ds_type"})))
    yield "datasets", bool(unread), f"{unread}: not read; remove it, and name the columns as README does"
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
    yield "val_set_size", not (0 <= r.val_set_size < 1 or r.val_set_size % 1 == 0), "takes a share or a number of rows"
    yield "val_set_size", r.val_set_size < 0, "must be at least 0"
    yield "lr_scheduler", r.lr_scheduler not in SCHEDULES, f"is one of {', '.join(SCHEDULES)}"
    ignored = "the constant schedule ignores warmup; write 0, or constant_with_warmup for the schedule"
    for key in ("warmup_steps", "warmup_ratio"):
        yield key, getattr(r, key) > 0 and r.lr_scheduler == "constant", ignored
    yield "warmup_ratio", not 0 <= r.warmup_ratio < 1, "must be at least 0 and below 1"
    yield "warmup_ratio", r.warmup_ratio > 0 and r.warmup_steps > 0, "warmup_steps is set too; keep one"
    texts = all(isinstance(key, str) and isinstance(token, str) for key, token in r.special_tokens.items())
    yield "special_tokens", not texts, "takes lines such as eos_token: </s>; no token is added here"
    adams = ("adamw_torch", "adamw_torch_fused")
    yield (
        "optimizer",
        r.optimizer not in adams,
        f"is one of {', '.join(adams)}, or AdamW in 8 bits, which is read as the first",
    )
    yield "bf16", not r.bf16, "the base computes in bfloat16; write true"

"""How a recipe is trained on this machine: chosen from its shapes, the free memory and the number of steps.

These choices change memory use and speed. They do not change the mathematics; compiling changes the rounding.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from mini_symposium.data.dataset import Example, tokenize
from mini_symposium.errors import InputError
from mini_symposium.models.base_files import cached, kept_in_4_bits
from mini_symposium.models.base_models import NF4_BYTES, load_tokenizer, model_config, predicted_bytes, shape_of
from mini_symposium.models.devices import device, memory, training_dtype
from mini_symposium.recipe import Recipe

SHARE = 0.8
"""The share of the free memory that training may use."""

COMPILE_FROM = 600
"""Steps, summed over adapters, from which compiling pays: it takes half a minute once and saves a third of a step."""


@dataclass(frozen=True)
class Acceleration:
    """What was chosen, and the reason.

    >>> print(Acceleration.off("asked for"))
    plain PEFT, one adapter at a time (asked for)
    """

    fused: bool
    """Compute the losses by `fused_lora`, not by PEFT's own layers."""
    resident: bool
    """Keep the base dequantised; otherwise its weights stay in 4 bits."""
    checkpointing: bool
    """Recompute activations in the backward pass; plain PEFT does what the recipe says."""
    compiled: bool
    """Compile the decoder layer."""
    together: int
    """Adapters that train in one pass."""
    why: str

    @classmethod
    def off(cls, why: str) -> "Acceleration":
        return cls(False, False, False, False, 1, why)

    def __str__(self) -> str:
        if not self.fused:
            return f"plain PEFT, one adapter at a time ({self.why})"
        parts = [
            f"{self.together} adapter{'s' if self.together > 1 else ''} in one pass",
            "base dequantised once and kept" if self.resident else "base kept in 4 bits",
            "activations recomputed" if self.checkpointing else "activations kept",
            "layer compiled" if self.compiled else "layer not compiled",
            *(["in float32, no bfloat16 products on this processor"] * (training_dtype() == torch.float32)),
        ]
        return f"{', '.join(parts)} ({self.why})"

    def remedies(self, longest: int) -> str:
        """What would take less memory, the cheapest first; `longest` is the longest row in tokens."""
        knobs = [f"train fewer than {self.together} rates in one pass (LEARNING_RATES)"] * (self.together > 1)
        knobs += ["keep the base in 4 bits (FAST=False)"] * self.resident
        knobs += ["set gradient_checkpointing: true"] * (not self.checkpointing)
        return ", or ".join([*knobs, f"shorten the longest example, {longest} tokens, and with it sequence_len"])


FAMILIES = "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2", "granite"
"""Architectures for which a test compares `fused_lora` with PEFT, by their names in transformers."""


LIBRARIES = round(0.72 * 2**30)
"""Bytes that a process takes for itself when it trains on a CPU: 0.51 GiB when all is imported, the tokenizer, compiled
kernels of torch, and what the allocator loses."""

COMPILER = 70 * 2**20
"""Bytes that compiling a decoder layer takes in this process."""

ELSEWHERE = "process and libraries", "base, linear layers as read"
"""Parts that need no free memory: there already, or dropped by the system where memory is short."""


def predicted(
    recipe: Recipe, chosen: Acceleration, tokens: int, shape: PreTrainedModel | None = None
) -> dict[str, int]:
    """{part: bytes} at the peak of training `recipe` as `chosen` on rows of up to `tokens` tokens.

    Their sum is what `devices.peak_memory` measures: on a CPU of the whole process, on CUDA of its tensors. `shape` is
    `shape_of` the base model, if it is at hand.

    In GiB, predicted and measured for three steps with one thread on a CPU without matrix units (AMD EPYC), rows of up
    to 235 tokens, in bfloat16, quantised anew. Gemma has its shape and random weights; 4-bit recomputes activations:

    | | one adapter, resident | two in a pass | one, 4-bit | one, plain PEFT |
    |---|---|---|---|---|
    | SmolLM2-135M-Instruct | 1.57, 1.53 | 1.64, 1.66 | 1.22, 1.16 | 1.58, 1.48 |
    | Gemma-3-270M | 1.85, 1.85 | 1.90, 1.98 | 1.56, 1.50 | 2.22, 2.14 |
    | Qwen2.5-Coder-0.5B-Instruct | 3.11, 3.13 | 3.24, 3.46 | 2.21, 2.21 | 2.87, 2.83 |
    | Qwen2.5-Coder-1.5B-Instruct | 7.86, 7.98 | 8.14, 8.41 | 4.99, 4.95 | 5.86, 6.56 |
    """
    on_cpu = device().type == "cpu"
    at_once = min(chosen.together, torch.get_num_threads()) if on_cpu else chosen.together
    recomputed = chosen.checkpointing if chosen.fused else None
    parts = predicted_bytes(
        recipe, tokens, chosen.together, at_once, chosen.fused, chosen.resident, recomputed, shape=shape
    )
    if not on_cpu:
        return parts
    # Weights that are quantised anew are read where their file is mapped into memory.
    mapped = training_dtype() == torch.bfloat16 and not kept_in_4_bits(cached(recipe.base_model)).is_dir()
    return {
        "process and libraries": LIBRARIES,
        "base, linear layers as read": round(parts["base, NF4"] / NF4_BYTES * 2) if mapped else 0,
        **parts,
        # its moments, split into PEFT's parameters, and their bytes
        "a checkpoint while it is written": parts["adapters, gradients, optimizer"] // chosen.together,
        "compiler": COMPILER * chosen.compiled,
    }


def needed(parts: Mapping[str, int]) -> int:
    """The free memory that these parts need, in bytes."""
    return sum(size for part, size in parts.items() if part not in ELSEWHERE)


def longest_row(recipe: Recipe, examples: Sequence[Example]) -> int:
    """Tokens of the longest example; the recipe's `sequence_len` if its tokenizer is not here and cannot be had."""
    try:
        tokenizer = load_tokenizer(recipe.base_model)
    except InputError:
        return recipe.sequence_len
    rows = tokenize(examples, tokenizer, recipe.sequence_len, not recipe.train_on_inputs)
    return max(len(row.input_ids) for row in rows)


def choose(recipe: Recipe, adapters: int, tokens: int, steps: int, fast: bool = True) -> Acceleration:
    """How to train `adapters` adapters of `recipe` on rows of up to `tokens` tokens for `steps` steps.

    Nothing is loaded. `fast=False` chooses plain PEFT.
    """
    if not fast:
        return Acceleration.off("asked for")
    family = model_config(recipe.base_model).model_type
    if family not in FAMILIES:
        return Acceleration.off(f"the architecture {family} is not one of {', '.join(FAMILIES)}")
    if recipe.lora_dropout:
        return Acceleration.off("the recipe uses dropout")
    free, shape = memory(), shape_of(recipe.base_model)
    compiler = device().type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is not None

    def plan(resident: bool, checkpointing: bool, together: int, why: str = "") -> Acceleration:
        compiled = compiler and steps * together >= COMPILE_FROM
        return Acceleration(True, resident, checkpointing, compiled, together, why)

    def fits(*choice: int) -> bool:
        return needed(predicted(recipe, plan(*choice), tokens, shape)) <= SHARE * free

    # All adapters in one pass, in the fastest way in which they fit; else as many as fit in the smallest way.
    ways = ((True, False), (True, True), (False, False), (False, True))
    resident, checkpointing = next((way for way in ways if fits(*way, adapters)), ways[-1])
    together = next((k for k in range(adapters, 1, -1) if fits(resident, checkpointing, k)), 1)
    dequantised = predicted(recipe, plan(True, True, 1), tokens, shape)["base, dequantised"] / 2**20
    why = f"{dequantised:,.0f} MiB dequantised {'fit' if resident else 'do not fit'}; {steps} steps"
    no_compiler = "" if compiler or device().type != "cpu" else "; no C++ compiler"
    return plan(resident, checkpointing, together, why + no_compiler)

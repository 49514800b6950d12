"""How a recipe is trained on this machine: chosen from its shapes, the free memory and the number of steps.

These choices change memory use and speed. They do not change the mathematics; compiling changes the rounding.
"""

import os
import shutil
from dataclasses import dataclass

import torch

from mini_symposium.models.base_models import NF4_BYTES, model_config, predicted_bytes
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


def obstacle(recipe: Recipe) -> str | None:
    """Why `fused_lora` is not used for this recipe, or None if it is."""
    family = model_config(recipe.base_model).model_type
    if family not in FAMILIES:
        return f"the architecture {family} is not one of {', '.join(FAMILIES)}"
    return "the recipe uses dropout" if recipe.lora_dropout else None


def choose(
    recipe: Recipe, adapters: int, tokens: int, steps: int, fast: bool = True, free: int | None = None
) -> Acceleration:
    """How to train `adapters` adapters of `recipe` on rows of up to `tokens` tokens for `steps` steps.

    Nothing is loaded. `fast=False` chooses plain PEFT; `free` is the memory to plan with, in bytes, by default what is
    free now.
    """
    why = obstacle(recipe) if fast else "asked for"
    if why:
        return Acceleration.off(why)
    free = memory() if free is None else free
    sizes = {kept: predicted_bytes(recipe.replace(gradient_checkpointing=not kept), tokens) for kept in (True, False)}
    base = sizes[True]["base, NF4"] + sizes[True]["base, other weights"]
    dequantised = round(sizes[True]["base, NF4"] / NF4_BYTES * training_dtype().itemsize)

    def adapters_that_fit(resident: bool, keep_activations: bool) -> int:
        size = sizes[keep_activations]
        each = size["adapters, gradients, optimizer"] + size["activations"]
        return int((SHARE * free - base - dequantised * resident) // each)

    resident = adapters_that_fit(True, False) >= 1
    keep_activations = resident and adapters_that_fit(True, True) >= 1
    together = max(1, min(adapters, adapters_that_fit(resident, keep_activations)))
    compiler = device().type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is not None
    return Acceleration(
        fused=True,
        resident=resident,
        checkpointing=not keep_activations,
        compiled=compiler and steps * together >= COMPILE_FROM,
        together=together,
        why=f"{dequantised / 2**20:,.0f} MiB dequantised {'fit' if resident else 'do not fit'}; {steps} steps"
        + ("" if compiler or device().type != "cpu" else "; no C++ compiler"),
    )

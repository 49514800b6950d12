"""What a training writes as it goes: a line of metrics per step for each of its adapters."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm
from transformers import TrainerCallback

from mini_symposium import RunError
from mini_symposium.dataset import Row
from mini_symposium.recipe import Recipe
from mini_symposium.run_directory import read_jsonl, written_whole


@dataclass(frozen=True)
class Part:
    """One adapter of a pass: its name in the model, its recipe, and the folder where it is kept."""

    name: str
    recipe: Recipe
    folder: Path

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


class Log(TrainerCallback):
    """Write the metrics, ask for checkpoints at the chosen epochs, move the progress bar."""

    def __init__(self, trainer, parts: Sequence[Part], rows: Sequence[Row], epochs: Sequence[int]):
        self.trainer, self.parts, self.rows, self.epochs = trainer, parts, rows, epochs
        self.files, self.bar = [], None

    def on_train_begin(self, args, state, control, **kwargs):
        for part in self.parts:
            part.folder.mkdir(parents=True, exist_ok=True)
            kept = read_jsonl(part.metrics)[: state.global_step] if part.metrics.exists() else []
            with written_whole(part.metrics) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            self.files.append(part.metrics.open("a", encoding="utf-8"))
        rates = ", ".join(f"{part.recipe.learning_rate:g}" for part in self.parts)
        label = f"learning rate{'s' if len(self.parts) > 1 else ''} {rates}"
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=label, unit="step", mininterval=1)

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        seconds = time.perf_counter() - self.started
        measured = zip(self.trainer.losses.tolist(), self.trainer.grad_norms, self.trainer.rates, strict=True)
        for k, (loss, grad_norm, rate) in enumerate(measured):
            self.write(state.global_step, k, loss, grad_norm, rate, seconds)
        self.bar.update()
        self.bar.set_postfix_str("loss " + ", ".join(f"{loss:.3f}" for loss in self.trainer.losses.tolist()), False)

    def write(self, step: int, k: int, loss: float, grad_norm: float, rate: float, seconds: float) -> None:
        """Append the line of adapter `k`.

        Raises
        ------
        RunError
            If the loss is no number, or the rate is not the recipe's.
        """
        recipe = self.parts[k].recipe
        epoch, position = divmod(step - 1, len(self.rows))
        example = self.trainer.order.order(epoch, k)[position]
        if rate != recipe.learning_rate and recipe.lr_scheduler == "constant":
            raise RunError(f"step {step}: the learning rate is {rate}, the recipe says {recipe.learning_rate}")
        if not math.isfinite(loss):
            raise RunError(
                f"step {step}: the loss of {self.rows[example].source} is {loss} at learning rate {rate:g}; "
                "the newest checkpoint is from before this step, lower the learning rate or look at that example"
            )
        line = {
            "step": step,
            "epoch": epoch,
            "example": example,
            "learning_rate": rate,
            "loss": loss,
            "grad_norm": grad_norm,
            "tokens": len(self.rows[example].input_ids),
            "seconds": round(seconds, 4),
        }
        self.files[k].write(json.dumps(line) + "\n")
        self.files[k].flush()

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save = round(state.epoch) in self.epochs

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self):
        for file in self.files:
            file.close()
        if self.bar is not None:
            self.bar.close()

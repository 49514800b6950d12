"""What a training writes as it goes, for each of its adapters: a line of metrics per step, and probes of other texts.

A training row needs no probe: each step's forward pass already says how much of its row the model knows.
"""

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
from mini_symposium.memorization import known
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
    def probes(self) -> Path:
        return self.folder / "probes.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


def rewrite(path: Path, lines: Sequence[dict]) -> None:
    """Write `lines` as JSONL in the place of what is there."""
    with written_whole(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


class Log(TrainerCallback):
    """Write the metrics and probes, ask for checkpoints at the chosen epochs, move the progress bar.

    Parameters
    ----------
    epochs
        After which the adapters are kept.
    held_out, probe_epochs
        Rows that are not trained on, and the epochs after which their loss is measured.
    """

    def __init__(
        self,
        trainer,
        parts: Sequence[Part],
        rows: Sequence[Row],
        epochs: Sequence[int],
        held_out: Sequence[Row] = (),
        probe_epochs: Sequence[int] = (),
    ):
        self.trainer, self.parts, self.rows, self.epochs = trainer, parts, rows, epochs
        self.held_out, self.probe_epochs = held_out, probe_epochs
        self.files, self.bar = [], None

    def on_train_begin(self, args, state, control, **kwargs):
        for part in self.parts:
            part.folder.mkdir(parents=True, exist_ok=True)
            kept = read_jsonl(part.metrics)[: state.global_step] if part.metrics.exists() else []
            rewrite(part.metrics, kept)
            self.files.append(part.metrics.open("a", encoding="utf-8"))
            if self.held_out:
                kept = read_jsonl(part.probes) if state.global_step and part.probes.exists() else []
                rewrite(part.probes, [line for line in kept if line["epoch"] <= round(state.epoch)])
        if not state.global_step:
            self.probe(0)
        rates = ", ".join(f"{part.recipe.learning_rate:g}" for part in self.parts)
        label = f"learning rate{'s' if len(self.parts) > 1 else ''} {rates}"
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=label, unit="step", mininterval=1)

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        seconds = time.perf_counter() - self.started
        measured = zip(self.trainer.losses.tolist(), self.trainer.grad_norms, self.trainer.rates, strict=True)
        for k, (loss, grad_norm, rate) in enumerate(measured):
            self.write(state.global_step, k, loss, self.trainer.matches[k].tolist(), grad_norm, rate, seconds)
        self.bar.update()
        self.bar.set_postfix_str("loss " + ", ".join(f"{loss:.3f}" for loss in self.trainer.losses.tolist()), False)

    def write(
        self, step: int, k: int, loss: float, matches: list[bool], grad_norm: float, rate: float, seconds: float
    ) -> None:
        """Append the line of adapter `k`; loss and matches are from before the step's update.

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
            **known(matches),
            "grad_norm": grad_norm,
            "tokens": len(self.rows[example].input_ids),
            "seconds": round(seconds, 4),
        }
        self.files[k].write(json.dumps(line) + "\n")
        self.files[k].flush()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.probe(round(state.epoch))
        control.should_save = round(state.epoch) in self.epochs

    def probe(self, epoch: int) -> None:
        """Measure the held-out rows if this epoch is one for it: a line for each adapter and row."""
        if epoch not in self.probe_epochs:
            return
        for example, row in enumerate(self.held_out):
            for part, (loss, matches) in zip(self.parts, self.trainer.probe(row), strict=True):
                line = {"epoch": epoch, "example": example, "loss": loss, **known(matches), "tokens": len(matches)}
                with part.probes.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self):
        for file in self.files:
            file.close()
        if self.bar is not None:
            self.bar.close()

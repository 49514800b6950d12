"""What a training writes as it goes, for each of its adapters: a line of metrics per step, and probes of other texts.

A training row needs no probe: each step's forward pass already says how much of its row the model knows.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm
from transformers import TrainerCallback

from mini_symposium.data.dataset import Row
from mini_symposium.errors import InputError, RunError
from mini_symposium.evaluation.memorization import known, unsaid
from mini_symposium.files.writing import written_whole
from mini_symposium.recipe import Recipe
from mini_symposium.run import read_jsonl, whole_lines
from mini_symposium.training import processes


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
        self.files, self.bar = {}, None

    def on_train_begin(self, args, state, control, **kwargs):
        if not processes.writes():
            return
        for part in self.parts:
            part.folder.mkdir(parents=True, exist_ok=True)
            rewrite(part.metrics, [line for line in whole_lines(part.metrics) if line["step"] <= state.global_step])
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
        self.trainer.measured = []

    def on_step_end(self, args, state, control, **kwargs):
        seconds = time.perf_counter() - self.started
        order = self.trainer.order
        measured = [(at, losses.tolist(), [m.tolist() for m in each]) for at, losses, each in self.trainer.measured]
        measured = sorted(row for row in processes.gather(measured) if order.weight(state.global_step - 1, row[0]))
        if not processes.writes():
            return
        for place, losses, matches in measured:
            shown = losses
            for k, norm in enumerate(self.trainer.grad_norms):
                step, rate = state.global_step, self.trainer.rates[k]
                self.write(step, k, losses[k], matches[k], norm, rate, seconds / len(measured), place)
        self.bar.update()
        self.bar.set_postfix_str("loss " + ", ".join(f"{loss:.3f}" for loss in shown), False)

    def write(
        self,
        step: int,
        k: int,
        loss: float,
        matches: list[bool],
        grad_norm: float,
        rate: float,
        seconds: float,
        place: int = 0,
    ) -> None:
        """Append the line of adapter `k` and the example at `place` in the batch, as it was before the step's update.

        Raises
        ------
        InputError
            If the disk is full.
        RunError
            If the loss or its gradient is no number, or the rate is not the recipe's.
        """
        recipe, order = self.parts[k].recipe, self.trainer.order
        epoch, step_of_epoch = divmod(step - 1, order.steps)
        example = order.order(epoch, k)[step_of_epoch * order.batch + place]
        if rate != recipe.learning_rate and recipe.lr_scheduler == "constant":
            raise RunError(f"step {step}: the learning rate is {rate}, the recipe says {recipe.learning_rate}")
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            what = f"is {loss}" if not math.isfinite(loss) else f"has a gradient of {grad_norm}"
            raise RunError(
                f"step {step}: the loss of {self.rows[example].source} {what} at learning rate {rate:g}; "
                "the newest checkpoint is from before this step, lower the learning rate or look at that example"
            )
        line = {
            "step": step,
            "epoch": epoch,
            "example": example,
            "learning_rate": rate,
            "loss": loss,
            **self.memory(self.rows[example], matches),
            "grad_norm": grad_norm,
            "tokens": len(self.rows[example].input_ids),
            "seconds": round(seconds, 4),
        }
        self.append(self.parts[k].metrics, line)

    def append(self, path: Path, line: dict) -> None:
        """One line more, at once, so that no more than a last line can be lost."""
        try:
            if path not in self.files:
                self.files[path] = path.open("a", encoding="utf-8")
            self.files[path].write(json.dumps(line) + "\n")
            self.files[path].flush()
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); free some space, then the same command goes on"
            ) from error

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save = round(state.epoch) in self.epochs
        if processes.writes():
            self.probe(round(state.epoch))
            if control.should_save:  # a checkpoint must not outlive the lines before it
                for file in self.files.values():
                    os.fsync(file.fileno())

    def probe(self, epoch: int) -> None:
        """Measure the held-out rows if this epoch is one for it: a line for each adapter and row."""
        if epoch not in self.probe_epochs:
            return
        for example, row in enumerate(self.held_out):
            for part, (loss, matches) in zip(self.parts, self.trainer.probe(row), strict=True):
                line = {"epoch": epoch, "example": example, "loss": loss, **self.memory(row, matches)}
                self.append(part.probes, {**line, "tokens": len(matches)})

    def memory(self, row: Row, matches: list[bool]) -> dict:
        """What is known of a row, and, where all of it is supervised, what decoding would bring."""
        bos = int(row.input_ids[0] == self.trainer.processing_class.bos_token_id)
        return known(matches) | (unsaid(matches, bos) if all(row.completion_mask[1:]) else {})

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self):
        for file in self.files.values():
            with suppress(OSError):  # what a full disk did not take
                file.close()
        self.files = {}
        if self.bar is not None:
            self.bar.close()

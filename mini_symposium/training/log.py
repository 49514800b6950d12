"""What a training writes as it goes, for each of its adapters: a line of metrics per step, and probes of held-out rows.

A training row needs no probe: each step's forward pass already shows how much of its row the model knows.
"""

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import TrainerCallback

from mini_symposium.data.dataset import Row
from mini_symposium.errors import InputError, RunError
from mini_symposium.evaluation.memorization import em_and_es, extraction
from mini_symposium.files.writing import written_whole
from mini_symposium.models.devices import processes
from mini_symposium.run import read_jsonl, whole_lines


def rewrite(path: Path, lines: Sequence[dict]) -> None:
    """Replace a JSON Lines file by one with `lines`."""
    with written_whole(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


class Log(TrainerCallback):
    """Writes the metrics and probes, asks for checkpoints at the chosen epochs, moves the progress bar.

    Parameters
    ----------
    rows
        The training rows.
    epochs
        After which the adapters are kept.
    held_out, probe_epochs
        Rows that are not trained on, and the epochs after which their loss is measured. If the trainings leave out rows
        of `rows`, each is measured on its own then, and on `held_out` after `epochs`, in lines with `item`.
    stop
        Asked after each epoch, with its number, whether the trainings end there.
    watch
        Called after each epoch whose adapters are kept, with its number; without it, a line is printed.
    ask
        A prompt; each adapter's answer to it is printed after each epoch whose adapters are kept.
    """

    def __init__(
        self,
        trainer,
        rows: Sequence[Row],
        epochs: Sequence[int],
        held_out: Sequence[Row] = (),
        probe_epochs: Sequence[int] = (),
        stop: Callable[[int], bool] = lambda epoch: False,
        watch: Callable[[int], None] | None = None,
        ask: str = "",
    ):
        self.ask = ask
        self.trainer, self.trainings, self.rows, self.epochs = trainer, trainer.trainings, rows, epochs
        self.stop, self.watch = stop, watch or self.say
        self.latest: dict[tuple[float, str], list[float]] = defaultdict(list)
        """{(learning rate, what): values of the last epoch}"""
        own = list(zip(*(training.left_out for training in self.trainings), strict=True))
        self.probed = [(turn, [rows[example] for example in turn], "example", probe_epochs) for turn in own]
        key, at = ("item", [epoch for epoch in epochs if epoch]) if own else ("example", probe_epochs)
        everybody = range(len(self.trainings))
        self.probed += [([k for _ in everybody], [row for _ in everybody], key, at) for k, row in enumerate(held_out)]
        """For each probe: which example each adapter is measured on, its row, its key in the line, and when."""
        self.files, self.bar = {}, None

    def on_train_begin(self, args, state, control, **kwargs):
        if not processes().is_main_process:
            return
        for training in self.trainings:
            training.folder.mkdir(parents=True, exist_ok=True)
            lines = whole_lines(training.metrics_file)
            rewrite(training.metrics_file, [line for line in lines if line["step"] <= state.global_step])
            if self.probed:
                resumed = state.global_step and training.probes_file.exists()
                probes = read_jsonl(training.probes_file) if resumed else []
                rewrite(training.probes_file, [line for line in probes if line["epoch"] <= round(state.epoch)])
        if not state.global_step:
            self.probe(0)
        rates = list(dict.fromkeys(f"{training.learning_rate:g}" for training in self.trainings))
        adapters = f"{len(self.trainings)} adapters at " if len(rates) < len(self.trainings) else ""
        label = f"{adapters}learning rate{'s' if len(rates) > 1 else ''} {', '.join(rates)}"
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=label, unit="step", mininterval=1)

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()
        self.trainer.measured = []

    def on_step_end(self, args, state, control, **kwargs):
        seconds = time.perf_counter() - self.started
        order = self.trainer.order
        measured = [(at, losses.tolist(), [m.tolist() for m in each]) for at, losses, each in self.trainer.measured]
        measured = sorted(row for row in gather_object(measured) if order.weight(state.global_step - 1, row[0]))
        if args.logging_strategy != "no":  # one curve for each adapter, in whatever the trainer reports to
            losses = zip(self.trainings, self.trainer.losses.tolist(), strict=True)
            self.trainer.log({f"loss/{training.learning_rate:g}": loss for training, loss in losses})
        if not processes().is_main_process:
            return
        for place, losses, matches in measured:
            for k, norm in enumerate(self.trainer.grad_norms):
                step, rate = state.global_step, self.trainer.rates[k]
                self.write(step, k, losses[k], matches[k], norm, rate, seconds / len(measured), place)
        self.bar.update()
        losses = measured[-1][1]
        shown = losses if len(losses) < 4 else [sum(losses) / len(losses)]
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
        """Append adapter `k`'s line for the example at `place` in the batch, measured before the step's update.

        Raises
        ------
        InputError
            If the disk is full.
        RunError
            If the loss or its gradient is not finite, or the rate is not the recipe's.
        """
        training, order = self.trainings[k], self.trainer.order
        epoch, step_of_epoch = divmod(step - 1, order.steps)
        example = order.order(epoch, k)[step_of_epoch * order.batch + place]
        if rate != training.learning_rate and training.lr_scheduler == "constant":
            raise RunError(f"step {step}: the learning rate is {rate}, the recipe says {training.learning_rate}")
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
            **self.memorization(self.rows[example], matches),
            "grad_norm": grad_norm,
            "tokens": len(self.rows[example].input_ids),
            "seconds": round(seconds, 4),
        }
        self.append(training.metrics_file, line)
        self.latest[training.learning_rate, "loss"].append(loss)
        self.latest[training.learning_rate, "EM"].append(line["em"])

    def append(self, path: Path, line: dict) -> None:
        """Append one line and flush it, so that a crash can lose no more than the last line."""
        try:
            if path not in self.files:
                self.files[path] = path.open("a", encoding="utf-8")
            self.files[path].write(json.dumps(line) + "\n")
            self.files[path].flush()
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); free some space, then run the same command again"
            ) from error

    def on_epoch_end(self, args, state, control, **kwargs):
        epoch = round(state.epoch)
        if processes().is_main_process:
            self.probe(epoch)
        control.should_training_stop |= self.stop(epoch)
        control.should_save = epoch in self.epochs or control.should_training_stop
        for file in self.files.values() if control.should_save else ():
            os.fsync(file.fileno())  # a checkpoint must not reach the disk before the lines that led to it
        if control.should_save and processes().is_main_process:
            self.watch(epoch)
            if self.ask:
                for training, answer in zip(self.trainings, self.trainer.answers(self.ask), strict=True):
                    self.bar.write(f"epoch {epoch}, {training.name} answers: {' '.join(answer.split())}")
        self.latest.clear()

    def say(self, epoch: int) -> None:
        """Print the means of the epoch that has just ended."""
        told = []
        for rate in dict.fromkeys(rate for rate, _ in self.latest):
            means = {what: self.latest.get((rate, what)) for what in ("loss", "EM", "held-out loss")}
            said = (f"{what} {sum(values) / len(values):.3f}" for what, values in means.items() if values)
            told.append(f"{rate:g}: {', '.join(said)}")
        self.bar.write(f"epoch {epoch}: {'; '.join(told)}")

    def probe(self, epoch: int) -> None:
        """Measure the held-out rows that are due after `epoch`: a line for each adapter and row."""
        for examples, rows, key, epochs in self.probed:
            if epoch not in epochs:
                continue
            measured = self.trainer.probe(rows)
            for training, example, row, (loss, matches) in zip(self.trainings, examples, rows, measured, strict=True):
                line = {"epoch": epoch, key: example, "loss": loss, **self.memorization(row, matches)}
                self.append(training.probes_file, {**line, "tokens": len(matches)})
                if key == "example":
                    self.latest[training.learning_rate, "held-out loss"].append(loss)

    def memorization(self, row: Row, matches: list[bool]) -> dict:
        """EM and ES of a row and, if every token of it is supervised, what greedy decoding would reproduce of it."""
        bos = int(row.input_ids[0] == self.trainer.processing_class.bos_token_id)
        return em_and_es(matches) | (extraction(matches, bos) if all(row.completion_mask[1:]) else {})

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self):
        """Close the files and the progress bar."""
        for file in self.files.values():
            with suppress(OSError):  # a full disk did not take the last bytes
                file.close()
        self.files = {}
        if self.bar is not None:
            self.bar.close()

"""TRL's SFTTrainer with what this recipe needs: float32 adapters, several in a pass, and a reproducible order of rows.

The adapters of a pass share the base and nothing else. Each has its own learning rate and schedule, its own moments,
its own gradient norm (clipped by itself), its own order of examples and its own checkpoints, so that it ends with the
same weights as if it were trained by itself.
"""

import io
import math
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from trl import SFTTrainer

from mini_symposium.data.dataset import Row
from mini_symposium.errors import InputError, RunError
from mini_symposium.files.writing import discard, written_whole
from mini_symposium.models.devices import processes
from mini_symposium.recipe import Recipe
from mini_symposium.run import Training
from mini_symposium.training import checkpoints
from mini_symposium.training.fused_lora import FusedAdapters
from mini_symposium.training.memory_plan import Acceleration


class EpochOrder(torch.utils.data.Sampler):
    """A fresh shuffle per epoch that depends on (seed, epoch) alone, so that the example
    of any step can be computed from the seed and the step.

    With several seeds, one for each adapter of a pass, each step has an example for each of them in turn. If an epoch
    does not divide into steps of `batch` examples, its last step is filled up with examples of weight 0.

    Parameters
    ----------
    n_examples
        Examples of the dataset.
    left_out
        For each adapter, the examples that it does not train on, as many for each; none if not given.
    """

    def __init__(
        self, n_examples: int, seeds: Sequence[int], batch: int = 1, left_out: Sequence[Sequence[int]] | None = None
    ):
        self.seeds, self.batch, self.epoch = seeds, batch, 0
        apart = left_out or [()] * len(seeds)
        self.examples = [[i for i in range(n_examples) if i not in some] for some in apart]
        self.n_examples = len(self.examples[0])
        """Examples that an adapter trains on in an epoch."""

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(self.n_examples / self.batch)

    def weight(self, step: int, place: int) -> float:
        """The weight of the example at `place` in the batch of `step`; the step's loss is the mean of its examples."""
        left = self.n_examples - step % self.steps * self.batch
        return 1 / min(self.batch, left) if place < left else 0.0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self, epoch: int, k: int = 0) -> list[int]:
        """The examples of an epoch as adapter `k` sees them."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seeds[k] + epoch)
        return [self.examples[k][i] for i in torch.randperm(self.n_examples, generator=generator)]

    def __iter__(self) -> Iterator[int]:
        orders = [self.order(self.epoch, k) for k in range(len(self.seeds))]
        places = self.steps * self.batch
        return (order[place % self.n_examples] for place in range(places) for order in orders)

    def __len__(self) -> int:
        return self.steps * self.batch * len(self.seeds)


def schedule(recipe: Recipe, steps: int) -> Callable[[int], float]:
    """By what a recipe multiplies its learning rate at a step of `steps`, as transformers has it."""
    alone = torch.optim.SGD([torch.zeros(1)], lr=recipe.learning_rate)
    warmup = recipe.warmup_steps or math.ceil(recipe.warmup_ratio * steps)
    options = {"num_warmup_steps": warmup, "num_training_steps": steps}
    return get_scheduler(recipe.lr_scheduler, alone, **options).lr_lambdas[0]


def adapter_name(k: int) -> str:
    """What the model calls the adapter of the k-th training of a pass."""
    return f"adapter{k}"


def save_adapter(model, name: str, folder: Path) -> None:
    """Write one adapter of `model` as PEFT does for a model with this adapter alone."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    # Written as bytes, so that a full disk raises OSError and not an error of safetensors.
    content = save({key: value.contiguous() for key, value in state.items()})
    (folder / "adapter_model.safetensors").write_bytes(content)
    model.peft_config[name].save_pretrained(folder)


def _save(value, path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getvalue())


def _load(path: Path) -> dict:
    """What `_save` wrote; a file that would run code is refused."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(
            f"{path}: not what this kit wrote; delete {path.parent}, and an earlier checkpoint is used"
        ) from error


class RecipeTrainer(SFTTrainer):
    """SFTTrainer for several adapters of one model: the k-th of `trainings` is `adapter_name(k)`, row k of each batch.

    Whatever it overrides exists because a pass has several adapters, or because SFTTrainer casts adapters to bfloat16,
    in which small updates are rounded away (see `training.finetune`).
    """

    def __init__(
        self, *args, trainings: Sequence[Training], order: EpochOrder, acceleration: Acceleration, steps: int, **kwargs
    ):
        self.trainings, self.order, self.acceleration = trainings, order, acceleration
        self.adapters = [adapter_name(k) for k in range(len(trainings))]
        self.measured: list[tuple[int, torch.Tensor, Sequence[torch.Tensor]]] = []
        """Of the step so far, for each example: its place in the batch, each adapter's loss, each adapter's matches."""
        super().__init__(*args, **kwargs)
        self.loss_is_scaled_for_ga = True  # `compute_loss` weighs each example
        for parameter in self.model.parameters():  # SFTTrainer has cast the adapters to bfloat16
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        # In evaluation bitsandbytes rearranges the packed weights for its own kernel, and a probe comes before step 1.
        self.model.train()
        self.fused = None
        if acceleration.fused:
            options = {key: getattr(acceleration, key) for key in ("resident", "checkpointing", "compiled")}
            self.fused = FusedAdapters(self.model, self.adapters, **options)
        self.optimizer = self._optimizer()
        self.lr_scheduler = LambdaLR(self.optimizer, [schedule(training.recipe, steps) for training in trainings])
        self._skip_module_traversals()

    def _optimizer(self) -> torch.optim.Optimizer:
        """AdamW with a parameter group for each adapter."""
        groups = [
            {
                "params": self.fused.adapters[name].vectors
                if self.fused
                else [p for key, p in self.model.named_parameters() if f".{name}." in key],
                "lr": training.learning_rate,
                "weight_decay": training.recipe.weight_decay,
            }
            for name, training in zip(self.adapters, self.trainings, strict=True)
        ]
        one_kernel = self.fused or any(t.recipe.optimizer == "adamw_torch_fused" for t in self.trainings)
        optimizer = torch.optim.AdamW(groups, fused=bool(one_kernel))
        # The Trainer clears the gradients of the model's parameters; an adapter's vectors are none of these.
        optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
        return optimizer

    def _skip_module_traversals(self) -> None:
        """Disable three calls that loop over all modules at every step: the FLOP count, which is not used, and, with
        fused adapters, `train()` when the mode is set and `zero_grad()`, because no module parameter has a gradient.
        """
        self.floating_point_ops = lambda inputs: 0
        if self.fused:
            model, set_mode = self.model, self.model.train
            model.train = lambda mode=True: model if model.training == mode else set_mode(mode)
            model.zero_grad = lambda set_to_none=True: None

    def _get_train_sampler(self, train_dataset=None) -> EpochOrder:
        """Overridden so that the log can look up the example of each step."""
        return self.order

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Overridden: each adapter has its own row and its own loss. TRL's also computes every token's entropy and
        accuracy, a third of a CPU step."""
        losses, matches = self._measured(model, inputs)
        self.losses, state = losses.detach(), processes()
        place = len(self.measured) * state.num_processes + state.process_index
        self.measured.append((place, self.losses, matches))
        # Gradients are averaged over processes, but the weights are meant for their sum.
        return losses.sum() * (self.order.weight(self.state.global_step, place) * state.num_processes)

    def _measured(self, model, inputs) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """The loss of each adapter on its row, (K,); and for each row at which labels the likeliest token was right."""
        ids, labels = inputs["input_ids"], inputs["labels"]
        if self.fused:
            return self.fused.losses(ids, labels), self.fused.matches
        output = model(input_ids=ids, attention_mask=inputs.get("attention_mask"), labels=labels, use_cache=False)
        wanted = labels[0, 1:]
        return output.loss[None], [(output.logits[0, :-1].argmax(-1) == wanted)[wanted != -100]]

    @torch.no_grad()
    def probe(self, rows: Sequence[Row]) -> list[tuple[float, list[bool]]]:
        """Loss and matches of a row for each adapter, the k-th row for the k-th adapter, without training on it."""
        longest = max(len(row.input_ids) for row in rows)
        ids, labels = (
            torch.tensor([[*own, *[fill] * (longest - len(own))] for own in each], device=self.model.device)
            for each, fill in (([row.input_ids for row in rows], 0), ([row.labels for row in rows], -100))
        )
        with self.compute_loss_context_manager():
            losses, matches = self._measured(self.model, {"input_ids": ids, "labels": labels})
        return [(loss, match.tolist()) for loss, match in zip(losses.tolist(), matches, strict=True)]

    @torch.no_grad()
    def answers(self, prompt: str, tokens: int = 24) -> list[str]:
        """Each adapter's likeliest continuation of `prompt`, by the forward pass that trains. Nothing of the training
        changes: neither a weight nor a random number."""
        tokenizer, dropouts = self.processing_class, []
        end = tokenizer.eos_token_id
        ids = torch.tensor([tokenizer(prompt)["input_ids"]] * len(self.trainings), device=self.model.device)
        start = ids.shape[1]
        if not self.fused:
            dropouts = [each for each in self.model.modules() if isinstance(each, torch.nn.Dropout) and each.training]
        for each in dropouts:
            each.eval()
        with self.compute_loss_context_manager():
            while ids.shape[1] < start + tokens and not (ids[:, start:] == end).any(1).all():
                following = self.fused.next_tokens(ids) if self.fused else self.model(ids).logits[:, -1].argmax(-1)
                ids = torch.cat([ids, following[:, None]], 1)
        for each in dropouts:
            each.train()
        rows = [row[: row.index(end)] if end in row else row for row in ids[:, start:].tolist()]
        return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]

    def _clip_grad_norm(self, model):
        """Overridden: each adapter's gradient is clipped by its own norm, as if it trained alone."""
        groups = self.optimizer.param_groups
        self.rates = [group["lr"] for group in groups]
        self.grad_norms = [
            torch.nn.utils.clip_grad_norm_(group["params"], self.args.max_grad_norm).item() for group in groups
        ]
        return max(self.grad_norms)

    def _save_checkpoint(self, model, trial=None) -> None:
        """Overridden: a folder for each adapter, as if it had trained alone; older ones shrink once all are whole."""
        if not processes().is_main_process:
            return
        state, scheduler = self.optimizer.state_dict(), self.lr_scheduler.state_dict()
        epoch = round(self.state.epoch or 0)
        for k, (name, training) in enumerate(zip(self.adapters, self.trainings, strict=True)):
            target = training.checkpoint(epoch)
            group = state["param_groups"][k]
            moments = [state["state"][index] for index in group["params"]]
            if self.fused:
                moments = self.fused.adapters[name].split(moments)
            own = {key: [scheduler[key][k]] for key in ("base_lrs", "_last_lr")}
            if target.exists():  # damaged, or left by a pass that was cut off before its other adapters were written
                discard(target)
            with written_whole(target) as temporary:
                save_adapter(self.model, name, temporary)
                _save({"group": {**group, "params": []}, "moments": moments}, temporary / "optimizer.pt")
                _save({"last_epoch": scheduler["last_epoch"], **own}, temporary / "scheduler.pt")
                self._save_random_state(temporary)
                self.state.save_to_json(str(temporary / "trainer_state.json"))
                companions = [os.path.relpath(other.folder, training.run) for other in self.trainings]
                checkpoints.seal(temporary, epoch * self.order.n_examples, companions, self.acceleration.compiled)
        for training in self.trainings:
            checkpoints.strip_older(training, epoch)

    def _save_random_state(self, folder: Path) -> None:
        try:
            self._save_rng_state(str(folder))
        except RuntimeError as error:  # torch's writer on a full disk
            raise InputError(f"{folder}: cannot be written ({error}); free some space") from error
        for file in folder.glob("rng_state_*.pth"):  # the name with several processes, where nothing is random
            file.rename(file.with_name("rng_state.pth"))

    def _checkpoints_of_all(self, checkpoint: str) -> list[Path]:
        """The checkpoints of all adapters at the epoch of `checkpoint`, which is the first adapter's."""
        return [training.folder / "checkpoints" / Path(checkpoint).name for training in self.trainings]

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Overridden: each adapter from its own folder."""
        for name, folder in zip(self.adapters, self._checkpoints_of_all(resume_from_checkpoint), strict=True):
            set_peft_model_state_dict(self.model, load_file(folder / "adapter_model.safetensors"), adapter_name=name)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        """Overridden: the parts that `_save_checkpoint` wrote, joined again."""
        if checkpoint is None:
            return
        folders = self._checkpoints_of_all(checkpoint)
        state = self.optimizer.state_dict()
        for k, (name, folder) in enumerate(zip(self.adapters, folders, strict=True)):
            own = _load(folder / "optimizer.pt")
            indices, moments = state["param_groups"][k]["params"], own["moments"]
            if self.fused:
                moments = self.fused.adapters[name].join(moments)
            state["param_groups"][k] = {**own["group"], "params": indices}
            state["state"] |= dict(zip(indices, moments, strict=True))
        self.optimizer.load_state_dict(state)
        schedules = [_load(folder / "scheduler.pt") for folder in folders]
        joined = {key: [schedule[key][0] for schedule in schedules] for key in ("base_lrs", "_last_lr")}
        last = schedules[0]["last_epoch"]
        self.lr_scheduler.load_state_dict(
            {**self.lr_scheduler.state_dict(), **joined, "last_epoch": last, "_step_count": last + 1}
        )


def check_batches(trainer: RecipeTrainer, rows: Sequence[Row]) -> None:
    """Check before step 1 that adapters are float32, and that the trainer's first epoch has these rows, whole, with
    EOS in the loss, in `EpochOrder`'s order.

    Raises
    ------
    RunError
        If not.
    """
    dtypes = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
    if dtypes != {torch.float32}:
        raise RunError(f"adapters are {dtypes}, not float32: at a low learning rate they would not move")
    state, last = processes(), trainer.processing_class.eos_token_id
    for number, batch in enumerate(trainer.get_train_dataloader()):
        place = (number * state.num_processes + state.process_index) % trainer.order.n_examples
        for k in range(len(trainer.trainings)):
            row = rows[trainer.order.order(0, k)[place]]
            ids, labels, length = batch["input_ids"][k].tolist(), batch["labels"][k].tolist(), len(row.labels)
            whole = ids[:length] == row.input_ids and labels[:length] == row.labels and labels[length - 1] == last
            if not whole or set(labels[length:]) - {-100}:
                raise RunError(f"{row.source}: the trainer's batch is not the tokenised row; do not trust this run")

"""TRL's SFTTrainer with what this recipe needs: float32 adapters, several to a pass, an order that can be named.

The adapters of a pass share the base and nothing else. Each has its own learning rate and schedule, its own
moments, its own gradient norm (clipped alone), its own order of examples and its own checkpoints, so that it
ends where it would have ended alone.
"""

import io
import math
import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler, set_seed
from trl import SFTConfig, SFTTrainer

from mini_symposium.data.dataset import Row
from mini_symposium.errors import InputError, RunError
from mini_symposium.files.writing import discard, written_whole
from mini_symposium.models.base_models import compute_in_float32, load_model, load_tokenizer
from mini_symposium.models.devices import device, training_dtype
from mini_symposium.recipe import Recipe
from mini_symposium.training import checkpoints, processes
from mini_symposium.training.fused_lora import FusedAdapters
from mini_symposium.training.log import Part
from mini_symposium.training.memory_plan import Acceleration


class EpochOrder(torch.utils.data.Sampler):
    """A fresh shuffle per epoch that depends on (seed, epoch) alone, so that any step can name its example.

    With several seeds, one for each adapter of a pass, the steps' examples come in turn. Where `batch` examples make a
    step and an epoch does not divide into such, its last step is filled up with examples that weigh nothing.
    """

    def __init__(self, n_examples: int, seeds: Sequence[int], batch: int = 1):
        self.n_examples, self.seeds, self.batch, self.epoch = n_examples, seeds, batch, 0

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return math.ceil(self.n_examples / self.batch)

    def weight(self, step: int, place: int) -> float:
        """Of the example at `place` in the batch of a step, of all that are in it: their mean is the step's loss."""
        left = self.n_examples - step % self.steps * self.batch
        return 1 / min(self.batch, left) if place < left else 0.0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self, epoch: int, k: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seeds[k] + epoch)
        return torch.randperm(self.n_examples, generator=generator).tolist()

    def __iter__(self) -> Iterator[int]:
        orders = [self.order(self.epoch, k) for k in range(len(self.seeds))]
        places = self.steps * self.batch
        return (order[place % self.n_examples] for place in range(places) for order in orders)

    def __len__(self) -> int:
        return self.steps * self.batch * len(self.seeds)


def save_adapter(model, name: str, folder: Path) -> None:
    """Write one adapter of `model` as PEFT does, under no name of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    # By way of bytes, so that a full disk is the error of a disk, and not of a library.
    content = save({key: value.contiguous() for key, value in state.items()})
    (folder / "adapter_model.safetensors").write_bytes(content)
    model.peft_config[name].save_pretrained(folder)


def _save(value, path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getvalue())


def _load(path: Path) -> dict:
    """What `_save` wrote; nothing that would have to be executed is read."""
    try:
        return torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(f"{path}: not what this kit wrote; delete {path.parent}, an earlier one serves") from error


class RecipeTrainer(SFTTrainer):
    """SFTTrainer for the adapters `parts`, each with a row of the batch."""

    def __init__(self, *args, parts: Sequence[Part], order: EpochOrder, acceleration: Acceleration, **kwargs):
        self.parts, self.order, self.acceleration = parts, order, acceleration
        self.measured: list[tuple[int, torch.Tensor, Sequence[torch.Tensor]]] = []
        """Of the step so far: for each row its place in the batch, each adapter's loss, each adapter's matches."""
        super().__init__(*args, **kwargs)
        self.loss_is_scaled_for_ga = True  # by the weight of each example
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        # In evaluation bitsandbytes rearranges the packed weights for its own kernel, and a probe comes before step 1.
        self.model.train()
        self.fused = None
        if acceleration.fused:
            options = {key: getattr(acceleration, key) for key in ("resident", "checkpointing", "compiled")}
            self.fused = FusedAdapters(self.model, [part.name for part in parts], **options)

            # Every step the Trainer walks thousands of modules to say again that they train, and to clear gradients
            # that they do not have.
            set_mode = self.model.train
            self.model.train = lambda mode=True: self.model if self.model.training == mode else set_mode(mode)
            self.model.zero_grad = lambda set_to_none=True: None

    def floating_point_ops(self, inputs) -> int:
        return 0  # nobody reads it, and it walks all parameters at every step

    def _get_train_sampler(self, train_dataset=None) -> EpochOrder:
        return self.order

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # TRL's own loss also takes the entropy and accuracy of each token: a third of a step on a CPU, read by nobody.
        losses, matches = self._measured(model, inputs)
        self.losses = losses.detach()
        place = len(self.measured) * processes.count() + processes.rank()
        self.measured.append((place, self.losses, matches))
        # The processes' gradients are averaged, and each weighs its examples among those of all.
        return losses.sum() * (self.order.weight(self.state.global_step, place) * processes.count())

    def _measured(self, model, inputs) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Loss of each adapter on its row, (K,), and for each row at which labels the likeliest token was right."""
        ids, labels = inputs["input_ids"], inputs["labels"]
        if self.fused:
            return self.fused.losses(ids, labels), self.fused.matches
        output = model(input_ids=ids, attention_mask=inputs.get("attention_mask"), labels=labels, use_cache=False)
        wanted = labels[0, 1:]
        return output.loss[None], [(output.logits[0, :-1].argmax(-1) == wanted)[wanted != -100]]

    @torch.no_grad()
    def probe(self, row: Row) -> list[tuple[float, list[bool]]]:
        """Loss and matches of one row, for each adapter, without learning from it."""
        labels = [i if m else -100 for i, m in zip(row.input_ids, row.completion_mask, strict=True)]
        device = self.model.device
        ids, labels = (torch.tensor([t] * len(self.parts), device=device) for t in (row.input_ids, labels))
        with self.compute_loss_context_manager():
            losses, matches = self._measured(self.model, {"input_ids": ids, "labels": labels})
        return [(loss, match.tolist()) for loss, match in zip(losses.tolist(), matches, strict=True)]

    def _clip_grad_norm(self, model):
        groups = self.optimizer.param_groups
        self.rates = [group["lr"] for group in groups]
        self.grad_norms = [
            torch.nn.utils.clip_grad_norm_(group["params"], self.args.max_grad_norm).item() for group in groups
        ]
        return max(self.grad_norms)

    def log(self, logs, *args, **kwargs):
        for part, loss in zip(self.parts, self.losses.tolist(), strict=True):
            logs[f"loss/{part.recipe.learning_rate:g}"] = loss
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, model=None):
        groups = [
            {
                "params": self.fused.adapters[part.name].vectors
                if self.fused
                else [p for name, p in self.model.named_parameters() if f".{part.name}." in name],
                "lr": part.recipe.learning_rate,
                "weight_decay": part.recipe.weight_decay,
            }
            for part in self.parts
        ]
        fused = self.fused is not None or any(part.recipe.optimizer == "adamw_torch_fused" for part in self.parts)
        self.optimizer = torch.optim.AdamW(groups, fused=fused)
        # The Trainer clears only what the model has for parameters, and an adapter's vectors are none.
        self.optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        rules = []
        for recipe in (part.recipe for part in self.parts):
            alone = torch.optim.SGD([torch.zeros(1)], lr=recipe.learning_rate)
            steps = {"num_warmup_steps": recipe.warmup_steps, "num_training_steps": num_training_steps}
            rules += get_scheduler(recipe.lr_scheduler, alone, **steps).lr_lambdas
        self.lr_scheduler = LambdaLR(self.optimizer, rules)
        return self.lr_scheduler

    def _save_checkpoint(self, model, trial=None) -> None:
        """A folder for each adapter, as if it had trained alone; only when all are whole do older ones shrink."""
        if not processes.writes():
            return
        state, scheduler = self.optimizer.state_dict(), self.lr_scheduler.state_dict()
        epoch = round(self.state.epoch or 0)
        for k, part in enumerate(self.parts):
            target = part.checkpoints / f"epoch-{epoch:04d}"
            group = state["param_groups"][k]
            moments = [state["state"][index] for index in group["params"]]
            if self.fused:
                moments = self.fused.adapters[part.name].split(moments)
            own = {key: [scheduler[key][k]] for key in ("base_lrs", "_last_lr")}
            if target.exists():  # damaged, or left by a pass that was cut off before its other adapters were written
                discard(target)
            with written_whole(target) as temporary:
                save_adapter(self.model, part.name, temporary)
                _save({"group": {**group, "params": []}, "moments": moments}, temporary / "optimizer.pt")
                _save({"last_epoch": scheduler["last_epoch"], **own}, temporary / "scheduler.pt")
                self._save_rng_state(str(temporary))
                self.state.save_to_json(str(temporary / "trainer_state.json"))
                companions = [os.path.relpath(other.folder, part.folder.parent) for other in self.parts]
                checkpoints.seal(temporary, epoch * self.order.n_examples, companions, self.acceleration.compiled)
        for part in self.parts:
            checkpoints.put_aside_older(part.checkpoints, epoch)

    def _save_rng_state(self, output_dir: str) -> None:
        try:
            super()._save_rng_state(output_dir)
        except RuntimeError as error:  # torch's writer on a disk that is full
            raise InputError(f"{output_dir}: cannot be written ({error}); free some space") from error
        for own in Path(output_dir).glob("rng_state_*.pth"):  # with several processes, where nothing is random
            own.rename(own.with_name("rng_state.pth"))

    def _own(self, checkpoint: str) -> list[Path]:
        """The parts' own folders for the epoch of `checkpoint`, which is the first part's."""
        return [part.checkpoints / Path(checkpoint).name for part in self.parts]

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        for part, folder in zip(self.parts, self._own(resume_from_checkpoint), strict=True):
            weights = load_file(folder / "adapter_model.safetensors")
            set_peft_model_state_dict(self.model, weights, adapter_name=part.name)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is None:
            return
        folders = self._own(checkpoint)
        kept = [_load(folder / "optimizer.pt") for folder in folders]
        state = self.optimizer.state_dict()
        for k, (part, own) in enumerate(zip(self.parts, kept, strict=True)):
            indices, moments = state["param_groups"][k]["params"], own["moments"]
            if self.fused:
                moments = self.fused.adapters[part.name].join(moments)
            state["param_groups"][k] = {**own["group"], "params": indices}
            state["state"] |= dict(zip(indices, moments, strict=True))
        self.optimizer.load_state_dict(state)
        schedules = [_load(folder / "scheduler.pt") for folder in folders]
        joined = {key: [schedule[key][0] for schedule in schedules] for key in ("base_lrs", "_last_lr")}
        last = schedules[0]["last_epoch"]
        found = {**self.lr_scheduler.state_dict(), **joined, "last_epoch": last, "_step_count": last + 1}
        self.lr_scheduler.load_state_dict(found)


def build_trainer(
    parts: Sequence[Part],
    rows: Sequence[Row],
    scratch: Path,
    acceleration: Acceleration | None = None,
    report_to: str = "none",
) -> RecipeTrainer:
    """The trainer for one pass: base model in NF4, LoRA on every linear layer, float32 adapters.

    The parts share base model, number of epochs and rows; learning rate, schedule, rank, seed and decay are each its
    own. Without `acceleration` there can be but one part.
    """
    recipe, acceleration = parts[0].recipe, acceleration or Acceleration.off("not chosen")
    model = load_model(recipe.base_model, recipe.load_in_4bit)
    if training_dtype() == torch.float32:
        compute_in_float32(model)
    for part in parts:
        set_seed(part.recipe.seed)  # an adapter's random init must not depend on what ran before
        lora = LoraConfig(
            r=part.recipe.lora_r,
            lora_alpha=part.recipe.lora_alpha,
            lora_dropout=part.recipe.lora_dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        if part is parts[0]:
            model = get_peft_model(model, lora, adapter_name=part.name)
        else:
            model.add_adapter(part.name, lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)  # PEFT trains only the active adapter
    arguments = SFTConfig(
        output_dir=str(scratch),
        num_train_epochs=recipe.num_epochs,
        per_device_train_batch_size=len(parts),
        gradient_accumulation_steps=_share(recipe),
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        ddp_backend="gloo" if processes.count() > 1 and device().type == "cpu" else None,
        gradient_checkpointing=recipe.gradient_checkpointing and not acceleration.fused,
        packing=False,
        max_length=None,  # nothing is truncated: `tokenize` refuses what does not fit
        bf16=training_dtype() == torch.bfloat16,
        use_cpu=device().type == "cpu",
        logging_strategy="no" if report_to == "none" else "steps",  # `Log` keeps what is read
        logging_steps=1,
        save_strategy="no",  # `Log` asks for checkpoints
        report_to=report_to,
        disable_tqdm=True,
        seed=recipe.seed,
        dataloader_pin_memory=device().type == "cuda",
    )
    columns = [
        {
            "input_ids": row.input_ids,
            "labels": [i if m else -100 for i, m in zip(row.input_ids, row.completion_mask, strict=True)],
        }
        for row in rows
    ]
    return RecipeTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(columns),
        processing_class=load_tokenizer(recipe.base_model),
        parts=parts,
        order=EpochOrder(len(rows), [part.recipe.seed for part in parts], recipe.gradient_accumulation_steps),
        acceleration=acceleration,
    )


def _share(recipe: Recipe) -> int:
    """Examples of a step for each process: the recipe's batch is the same however many share it."""
    share, rest = divmod(recipe.gradient_accumulation_steps, processes.count())
    if rest or (processes.count() > 1 and recipe.lora_dropout):
        raise InputError(
            f"{processes.count()} processes share a batch of gradient_accumulation_steps = "
            f"{recipe.gradient_accumulation_steps} examples, with lora_dropout = {recipe.lora_dropout}; "
            "make it a multiple of their number, and the dropout 0"
        )
    return share


def check_batches(trainer: RecipeTrainer, rows: Sequence[Row]) -> None:
    """Before step 1: the trainer's own first epoch holds these rows, whole, EOS in the loss, in the named order."""
    dtypes = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
    if dtypes != {torch.float32}:
        raise RunError(f"adapters are {dtypes}, not float32: at a low learning rate they would not move")
    for number, batch in enumerate(trainer.get_train_dataloader()):
        place = (number * processes.count() + processes.rank()) % len(rows)
        for k in range(len(trainer.parts)):
            row = rows[trainer.order.order(0, k)[place]]
            ids, labels = batch["input_ids"][k].tolist(), batch["labels"][k].tolist()
            wanted = [i if m else -100 for i, m in zip(row.input_ids, row.completion_mask, strict=True)]
            length, last = len(wanted), trainer.processing_class.eos_token_id
            whole = ids[:length] == row.input_ids and labels[:length] == wanted and labels[length - 1] == last
            if not whole or set(labels[length:]) - {-100}:
                raise RunError(f"{row.source}: the trainer's batch is not the tokenised row; do not trust this run")

"""One training over several processes, as `accelerate launch` starts them: who writes, and what each of them saw.

Without a launcher there is one process, and nothing here does anything.
"""

import os

import torch.distributed as dist

from mini_symposium.errors import InputError
from mini_symposium.models.devices import device


def count() -> int:
    """How many processes train together."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def writes() -> bool:
    """Whether this is the one that writes; the others write nothing at all."""
    return rank() == 0


def join() -> None:
    """Meet the other processes: over gloo on CPUs, over NCCL on GPUs."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise InputError("adapters are measured and saved whole here, not in shards; see data/accelerate/README.md")
    if count() > 1 and not dist.is_initialized():
        from accelerate import PartialState

        cpu = device().type == "cpu"
        PartialState(cpu=cpu, backend="gloo" if cpu else "nccl")


def gather(value: list) -> list:
    """The lists of all processes, joined."""
    if count() == 1:
        return value
    found = [None] * count()
    dist.all_gather_object(found, value)
    return [each for some in found for each in some]


def wait() -> None:
    """Until all of them are here."""
    if count() > 1:
        dist.barrier()

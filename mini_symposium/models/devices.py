"""The device for computation: which one it is, the type it trains in, its memory, and its out-of-memory errors."""

import ctypes
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

FILLED = 0.9
"""The share of the free memory that a model's weights may fill."""


def device() -> torch.device:
    """The first CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def processes():
    """The processes that `accelerate launch` started, as accelerate's PartialState; without a launcher, this one alone.

    accelerate must be told to use CPUs: otherwise each process on a CPU believes that it is alone.
    """
    from accelerate import PartialState

    return PartialState(cpu=device().type == "cpu")


def training_dtype() -> torch.dtype:
    """The type of a training step: bfloat16, as in the recipe, or float32 where the processor cannot multiply bfloat16.

    A card before Ampere emulates bfloat16, and a CPU with AVX2 but not AVX-512 takes twenty to a hundred times as long
    as for float32. The weights are the same numbers either way; float32 only rounds less in between.
    """
    if device().type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    try:
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    except (AttributeError, RuntimeError):  # macOS on ARM has no such operator
        return torch.float32


def memory(where: torch.device | None = None) -> int:
    """Free bytes of a device, by default the one for computation; on CUDA with what torch has reserved and not used."""
    if (where or device()).type == "cpu":
        return psutil.virtual_memory().available
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def roomy(size: int) -> torch.device | None:
    """The device for computation if `size` bytes fit into its free memory, else the CPU if they do there, else None."""
    places = dict.fromkeys((device(), torch.device("cpu")))
    return next((where for where in places if size < FILLED * memory(where)), None)


def unused_card() -> str:
    """What to do about an NVIDIA card that torch cannot use; "" if there is none."""
    if torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return ""
    build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build for CPUs"
    return f"torch {torch.__version__} cannot use it: it {build}; install one that the driver supports (nvidia-smi)"


def out_of_memory(error: Exception) -> bool:
    """Whether an exception means that memory ran out. On a CPU torch raises a RuntimeError, recognised by its text."""
    texts = ("can't allocate memory", "could not create a primitive", "can't start new thread")  # the second: oneDNN
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)


def peak_memory() -> int:
    """The most bytes held so far: by this process's tensors on CUDA, by the whole process on a CPU."""
    return torch.cuda.max_memory_allocated() if device().type == "cuda" else process_peak()


def process_peak() -> int:
    """The most bytes of memory that this process has held so far."""
    try:
        import resource
    except ModuleNotFoundError:  # on Windows, where psutil knows the peak
        held = psutil.Process().memory_info()
        return getattr(held, "peak_wset", held.rss)
    try:  # Linux hands ru_maxrss on to a child, so that a small kernel would show its parent's peak
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024
    except (OSError, TypeError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Make glibc keep the memory that this process frees from now on, up to its peak, and use it again.

    A training step frees tens of MiB that the next step needs again. By default glibc gives them back to the system;
    clearing and mapping new pages then takes up to a twelfth of a step. Without glibc nothing is changed.
    """
    _tune_glibc(kept=2**31 - 1)


@contextmanager
def freed_memory_given_back() -> Iterator[None]:
    """While a model loads, glibc gives back what is freed at once, and afterwards the rest of it.

    Quantising makes large tensors that live for a moment. In the heap they leave holes, up to a GiB for a model of
    0.5B parameters.
    """
    _tune_glibc(kept=2**17, mapped=2**17)
    try:
        yield
    finally:
        _tune_glibc(kept=2**26)


def _tune_glibc(kept: int, mapped: int = 2**25) -> None:
    """Make glibc give back memory that is free: now all of it, later what exceeds `kept` bytes, and blocks of at least
    `mapped` bytes at once.

    2**25 is the largest value of `mapped` that glibc accepts; it and 2**26 are what a process comes to by itself.
    """
    glibc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(glibc, "mallopt") and hasattr(glibc, "malloc_trim"):
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        glibc.mallopt(trim_threshold, kept)
        glibc.mallopt(mmap_threshold, mapped)
        glibc.malloc_trim(0)

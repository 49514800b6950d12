"""The device for computation: which one it is, the type it trains in, its memory, and its out-of-memory errors."""

import ctypes
import sys

import psutil
import torch


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
    """The type of a training step: bfloat16, as in the recipe, or float32 on a CPU without bfloat16 multiplication.

    Such a CPU (for example with AVX2 but not AVX-512) multiplies bfloat16 twenty to a hundred times more slowly than
    float32. The weights are the same numbers either way; float32 only rounds less in between.
    """
    if device().type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return torch.bfloat16


def memory() -> int:
    """Free bytes on the device."""
    return torch.cuda.mem_get_info()[0] if device().type == "cuda" else psutil.virtual_memory().available


def out_of_memory(error: Exception) -> bool:
    """Whether an exception means that memory ran out. On a CPU torch raises a RuntimeError, recognised by its text."""
    texts = ("can't allocate memory", "could not create a primitive", "can't start new thread")  # the second: oneDNN
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)


def peak_memory() -> int:
    """The most bytes held so far: by this process's tensors on CUDA, by the whole process on a CPU."""
    return torch.cuda.max_memory_allocated() if device().type == "cuda" else process_peak()


def process_peak() -> int:
    """The most bytes of memory that this process has held so far."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # Windows has no such module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Make glibc keep the memory that this process frees, up to its peak, and use it again.

    A training step frees tens of MiB that the next step needs again. By default glibc gives them back to the system;
    clearing and mapping new pages then takes up to a twelfth of a step. Without glibc nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**25)  # the largest value that glibc accepts

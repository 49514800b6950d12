"""The device that computes: which it is, in what it trains, how much memory it has, and how it says that it is full."""

import ctypes
import sys

import psutil
import torch


def device() -> torch.device:
    """The first CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def training_dtype() -> torch.dtype:
    """What a training step computes in: bfloat16, as the recipe says, or float32 on a CPU that has no products for it.

    Such a CPU (one with AVX2 but not AVX-512, say) multiplies bfloat16 twenty to a hundred times more slowly than
    float32. The weights are the same numbers either way; float32 only rounds less in between.
    """
    if device().type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return torch.bfloat16


def memory() -> int:
    """Free bytes on the device that would train."""
    return torch.cuda.mem_get_info()[0] if device().type == "cuda" else psutil.virtual_memory().available


def out_of_memory(error: Exception) -> bool:
    """Whether that is what an exception says; on a CPU torch has no class for it."""
    said = ("can't allocate memory", "could not create a primitive", "can't start new thread")  # oneDNN's the second
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in said)


def peak_memory() -> int:
    """Most bytes held so far: by this process's tensors on CUDA, by the whole process on a CPU."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return process_peak()


def process_peak() -> int:
    """The most bytes of memory that this process has held so far."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # Windows has no such module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Have glibc keep what this process frees, up to its peak, for its next use.

    A step frees what the next one needs again, tens of MiB. By default glibc gives them back to the system, whose
    fresh pages, cleared and mapped one by one, then cost up to a twelfth of a step. Elsewhere nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**25)  # the most that glibc takes

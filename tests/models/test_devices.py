"""What is said about the device is what the process itself shows."""

import subprocess
import sys

import psutil
import pytest
import torch

from mini_symposium.models import devices
from mini_symposium.models.devices import (
    device,
    memory,
    out_of_memory,
    training_dtype,
    unused_card,
)


def test_the_peak_remembers_memory_that_was_freed():
    code = """if True:
        import torch
        from mini_symposium.models.devices import device, peak_memory, process_peak
        before = process_peak()
        block = torch.ones(2**28, dtype=torch.uint8)
        del block
        print(process_peak() - before, device().type == "cuda" or peak_memory() == process_peak())
    """
    # a process of its own: one that has run other tests holds pages that it freed. Its parent's peak is not its own
    parents = torch.ones(2**30, dtype=torch.uint8)
    del parents
    grown, same = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(grown) >= 0.9 * 2**28 and same == "True"


def test_a_full_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value) and out_of_memory(MemoryError()) and out_of_memory(torch.OutOfMemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not out_of_memory(caught.value)


def test_a_cpu_trains_in_what_it_multiplies():
    if device().type == "cpu":
        assert memory() < psutil.virtual_memory().total
        multiplies = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert training_dtype() == (torch.bfloat16 if multiplies else torch.float32)


def test_an_older_card_trains_in_float32_and_torchs_own_cache_is_free_memory(monkeypatch):
    """The branches for a card, forced on a machine that has none."""
    monkeypatch.setattr(devices, "device", lambda: torch.device("cuda"))
    for emulated, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, e=emulated: including_emulation or not e
        )
        assert training_dtype() == dtype
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 50)
    assert memory() == 120


def test_a_card_that_torch_cannot_use_is_told_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert unused_card() == ""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert f"torch {torch.__version__} cannot use it: it is" in unused_card()


def test_a_processor_without_the_operator_trains_in_float32(monkeypatch):
    """As macOS on ARM."""
    monkeypatch.setattr(devices, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert training_dtype() == torch.float32


def test_the_module_loads_where_there_is_no_resource_module():
    """As on Windows."""
    code = "import psutil, sys; sys.modules['resource'] = None; import mini_symposium.models.merge"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


FREED = """
import ctypes, resource, sys
from mini_symposium.models.devices import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
libc, size = ctypes.CDLL(None), 2**20
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(size) for _ in range(64)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_that_a_step_frees_is_there_for_the_next():
    pages = {}
    for how in ("kept", "given back"):
        done = subprocess.run([sys.executable, "-c", FREED, how], capture_output=True, text=True, check=True)
        pages[how] = int(done.stdout)
    assert pages["kept"] < 100 < 10_000 < pages["given back"]


HOLES = """
import ctypes, psutil
from mini_symposium.models.devices import freed_memory_given_back
libc, size = ctypes.CDLL(None), 2**20
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.free(libc.malloc(2**25 - 2**13))  # from here on glibc takes blocks of this size from the heap
def grown():
    before = psutil.Process().memory_info().rss
    blocks = [(libc.malloc(size), libc.malloc(64))[0] for _ in range(256)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
    return psutil.Process().memory_info().rss - before
with freed_memory_given_back():
    print(grown())
print(grown())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_that_loading_frees_is_given_back_though_smaller_blocks_lie_between():
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    while_loading, later = map(int, done.stdout.split())
    assert while_loading < 2**25 < 2**27 < later

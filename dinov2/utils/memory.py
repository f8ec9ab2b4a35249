"""Measure the memory that a piece of work uses at its peak, and what there is for it, on a GPU or a CPU."""

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
_RESET_PEAK = "5"  # what clear_refs takes to reset VmHWM, see proc(5)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # see mallopt(3)
_KEPT_BYTES = 2**27

_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


class PeakMemory:
    """Measure the most memory in use while it is active; `.bytes` has it afterwards.

    CUDA: what PyTorch's allocator gave out, the weights included. CPU: the resident memory of the whole process, which
    is what a machine runs out of; where the kernel does not reset its peak, that since the process started.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0

    def __enter__(self) -> "PeakMemory":
        release_free_memory(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):  # no such file, or not ours to write: the peak stays that of the whole process
                (PROC / "self/clear_refs").write_text(_RESET_PEAK)
        return self

    def __exit__(self, *_: object) -> None:
        is_cuda = self.device.type == "cuda"
        self.bytes = torch.cuda.max_memory_allocated(self.device) if is_cuda else _peak_of_process()


def release_free_memory(device: torch.device) -> None:
    """Give memory that nothing uses any more back to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # glibc's
        trim(0)


def keep_freed_memory() -> None:
    """Let glibc's malloc keep freed pieces of up to 128 MiB for reuse, for the rest of the process.

    By default large pieces go back to the system at once, and each page that a step then asks for anew costs about as
    much as filling it (docs/benchmarks/step.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def resident_memory() -> int:
    """Return the bytes of this process that lie in memory; without /proc, the most that there ever were."""
    try:
        return int((PROC / "self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _peak_of_process()


def _peak_of_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_limit(device: torch.device) -> int:
    """Return the bytes that this process can have in use on `device`: what it has and what is free.

    On a CPU, free is what the kernel can give without swapping, within the limits of the process's cgroups (those of
    containers and batch jobs).
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return resident_memory() + max(0, min([available, *_cgroup_room()]))


def size_text(n_bytes: float) -> str:
    """Format a number of bytes in a fitting unit: 14.9 GiB, 0.21 GiB, 11.8 KiB, 152 MiB."""
    for unit, size in _UNITS.items():
        value = n_bytes / size
        if value >= 0.1:
            return f"{value:.{0 if value >= 100 else 1 if value >= 1 else 2}f} {unit}"
    return f"{n_bytes:.0f} bytes"


def _cgroup_room() -> Iterator[int]:
    """Yield the bytes that each limit of the process's cgroups (version 1 or 2) leaves; nothing without limits."""
    try:
        groups = [line.split(":", 2) for line in (PROC / "self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers == "":
            top, limit, used, cached = CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, used = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        # A container sees its own group as the top one, whatever the path says
        own = top / path.lstrip("/")
        for group in [own, *(parent for parent in own.parents if parent.is_relative_to(top))]:
            try:
                most, now = int((group / limit).read_text()), int((group / used).read_text())
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such group, or "max": no limit
                continue
            yield most - now + int(statistics.get(cached, 0))

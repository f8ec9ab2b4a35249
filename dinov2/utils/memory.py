"""Measure used and available memory of a GPU or a CPU."""

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
_RESET_PEAK = "5"  # resets VmHWM when written to clear_refs, see proc(5)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # see mallopt(3)
_KEPT_BYTES = 2**27

_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


class PeakMemory:
    """Context that measures the peak memory while it is active; afterwards `.bytes` has it.

    On CUDA it is that of PyTorch's allocator, weights included. On a CPU it is the resident memory of the process; if
    the kernel does not reset its peak, the peak since the process started.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0

    def __enter__(self) -> "PeakMemory":
        release_free_memory(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):  # no such file, or no permission: the peak since the process started remains
                (PROC / "self/clear_refs").write_text(_RESET_PEAK)
        return self

    def __exit__(self, *_: object) -> None:
        is_cuda = self.device.type == "cuda"
        self.bytes = torch.cuda.max_memory_allocated(self.device) if is_cuda else _peak_of_process()


def release_free_memory(device: torch.device) -> None:
    """Return unused memory to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # glibc's
        trim(0)


def keep_freed_memory() -> None:
    """Let glibc's malloc keep freed blocks of up to 128 MiB for reuse, until the process ends.

    By default it returns large blocks to the system at once, and a new page costs about as much time as filling it
    (docs/benchmarks/step.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def resident_memory() -> int:
    """Return the resident memory of this process in bytes; without /proc, its peak."""
    try:
        return int((PROC / "self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _peak_of_process()


def _peak_of_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_limit(device: torch.device) -> int:
    """Return the bytes that this process can use on `device`: those it uses now and free ones.

    On a CPU, free memory is what the kernel can give without swapping, within the limits of the process's cgroups
    (containers and batch jobs).
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return resident_memory() + max(0, min([available, *_free_in_cgroups()]))


def size_text(n_bytes: float) -> str:
    """Format a number of bytes with a unit: 14.9 GiB, 0.21 GiB, 11.8 KiB, 152 MiB."""
    for unit, size in _UNITS.items():
        value = n_bytes / size
        if value >= 0.1:
            return f"{value:.{0 if value >= 100 else 1 if value >= 1 else 2}f} {unit}"
    return f"{n_bytes:.0f} bytes"


def _free_in_cgroups() -> Iterator[int]:
    """Yield the free bytes within each limit of the process's cgroups (version 1 or 2)."""
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
        # in a container, the container's group is the top one, whatever the path says
        own = top / path.lstrip("/")
        for group in [own, *(parent for parent in own.parents if parent.is_relative_to(top))]:
            try:
                most, now = int((group / limit).read_text()), int((group / used).read_text())
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such group, or "max": no limit
                continue
            yield most - now + int(statistics.get(cached, 0))

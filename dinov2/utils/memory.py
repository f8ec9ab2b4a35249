"""The most memory that a piece of work has in use, and how much there is for it: on a GPU, or of a process on a CPU."""

import ctypes
import gc
import os
import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
_SAMPLED_EVERY_SECONDS = 0.001
_RESET_HIGH_WATER = "5"  # what clear_refs takes for it, see proc(5)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # see mallopt(3)
_SLACK = 64 * 2**20  # bytes that a high-water mark just reset may be above what is in use

_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


class PeakMemory:
    """While it is active, notes the most memory in use; `.bytes` says it afterwards.

    CUDA: what PyTorch's allocator gave out, the weights included. CPU: the resident memory of the whole process, its
    libraries included, for that is what a machine runs out of; memory that was freed before goes back to the system
    first. Where the kernel's high-water mark cannot be reset, memory is looked at every millisecond instead.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._sampler: _Sampler | None = None

    def __enter__(self) -> "PeakMemory":
        release_free_memory(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif not _reset_high_water():
            self._sampler = _Sampler()
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._sampler is not None:
            self.bytes = self._sampler.stop()
        else:
            self.bytes = _status("VmHWM")


class _Sampler(threading.Thread):
    """Looks at the process's resident memory again and again."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = resident_memory()
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(_SAMPLED_EVERY_SECONDS):
            self.most = max(self.most, resident_memory())

    def stop(self) -> int:
        self._stopped.set()
        self.join()
        return max(self.most, resident_memory())


def release_free_memory(device: torch.device) -> None:
    """Give memory that nothing uses any more back to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        trim_heap()


def keep_freed_memory() -> None:
    """Have malloc keep what is freed for what comes next, of any size, until `trim_heap`; for the rest of the process.

    By default glibc gives large pieces back at once, and each page that a step then asks for anew costs about as much
    as filling it. Other libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, -1)  # none
        mallopt(_M_MMAP_MAX, 0)


def trim_heap() -> None:
    """Give what malloc keeps of freed memory back to the system: milliseconds, and pages that are wanted again cost
    their price again. glibc alone keeps so much that it matters, and has a function for it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_memory() -> int:
    """Bytes of this process that lie in memory; without /proc, the most that there ever were."""
    try:
        return int((PROC / "self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_room(device: torch.device) -> int:
    """Bytes that this process can have in use on `device`: what it has and what is free.

    On a CPU free is what the kernel could give without swapping, within the limits of the process's cgroups (those of
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
    """A number of bytes in the unit that suits: 14.9 GiB, 0.21 GiB, 11.8 KiB, 152 MiB."""
    for unit, size in _UNITS.items():
        value = n_bytes / size
        if value >= 0.1:
            return f"{value:.{0 if value >= 100 else 1 if value >= 1 else 2}f} {unit}"
    return f"{n_bytes:.0f} bytes"


def _reset_high_water() -> bool:
    """Whether VmHWM now says what is in use from here on."""
    try:
        (PROC / "self/clear_refs").write_text(_RESET_HIGH_WATER)
        return _status("VmHWM") <= _status("VmRSS") + _SLACK
    except OSError:
        return False


def _status(name: str) -> int:
    """Bytes that /proc/self/status gives for `name`."""
    lines = (PROC / "self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _cgroup_room() -> Iterator[int]:
    """Bytes that each limit of the process's cgroups, of version 1 or 2, leaves; none without limits."""
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

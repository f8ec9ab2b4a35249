"""Measure the memory of a GPU or a CPU, count the cores, and apply a function to many items with several processes."""

import ctypes
import gc
import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import cv2
import torch

from dinov2.distributed import all_gather_objects
from dinov2.utils.command import ignore_stop_signals

Item = TypeVar("Item")
Result = TypeVar("Result")

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
MOST_WORKERS = 1024
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


# --- cores and processes --------------------------------------------------------------------------------------------


def available_cores() -> int:
    """Count the cores that this process may run on (its CPU affinity); a container's CPU quota is not considered."""
    return len(_cores())


def cores_of_this_rank() -> int:
    """Return this rank's share of the available cores; ranks of a node divide them, unless each has its own."""
    own = socket.gethostname(), _cores()
    return max(1, len(own[1]) // all_gather_objects(own).count(own))


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], n_workers: int, chunk: int = 16
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item, in order; each worker gets the function once, pickled.

    With several workers, call it under `if __name__ == "__main__":`. Ctrl-C drops the items that have not begun.
    """
    if n_workers <= 1:
        yield from map(function, items)
        return
    if n_workers > MOST_WORKERS:
        raise ValueError(f"workers: {n_workers:,} processes are more than any machine runs; choose {available_cores()}")
    # workers are forked from a server that has imported the module: a fast start without this process's threads
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    pool = ProcessPoolExecutor(n_workers, context, initializer=_start_worker, initargs=(function,))
    try:
        yield from pool.map(_apply, items, chunksize=chunk)
    except BrokenProcessPool as error:
        raise ValueError(
            f"workers: one of {n_workers} processes was killed, perhaps for lack of memory; start the same command "
            f"with fewer workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def end_worker_processes() -> None:
    """Kill this process's workers, which may be stuck on a disk that does not answer, so that it can end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for each of them
    for worker in multiprocessing.active_children():
        worker.kill()


_function: Callable[[Any], Any]  # of this worker process


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    ignore_stop_signals()  # a terminal and a batch system send them to all processes; the parent handles them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    # a killed parent would leave its workers waiting forever
    parent = multiprocessing.parent_process()
    if parent is not None:
        with suppress(OSError):
            parent.join()
        os._exit(1)


def _apply(item: Any) -> Any:
    return _function(item)

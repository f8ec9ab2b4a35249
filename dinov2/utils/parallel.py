"""Apply a function to many items with several processes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any, TypeVar

import cv2
import torch

from dinov2.utils.command import ignore_stop_signals

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """Count the cores that this process may run on (its CPU affinity); a container's CPU quota is not considered."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], n_workers: int, chunk: int = 16
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item, in order; each worker gets the function once, pickled.

    With several workers, call it under `if __name__ == "__main__":`. Ctrl-C drops the items that have not begun.
    """
    if n_workers <= 1:
        yield from map(function, items)
        return
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

"""Apply a function to many items with several processes."""

import multiprocessing
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import cv2
import torch

from dinov2.utils.pool_workers import become_pool_worker

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], n_workers: int, chunk: int = 16
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item, in order; one worker is this process.

    Call it under `if __name__ == "__main__":` for more than one worker. Ctrl-C drops the items that have not begun.

    Args:
        function: of a module, so that other processes can import it; each gets one copy of what it holds.
        items: their arguments.
        n_workers: processes.
        chunk: items that a process takes at a time.

    Raises:
        ValueError: if a process was killed.
    """
    if n_workers <= 1:
        yield from map(function, items)
        return
    # workers fork from a server that has imported the module: they start fast, without this process's threads and locks
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    pool = ProcessPoolExecutor(n_workers, context, initializer=_start_worker, initargs=(function,))
    try:
        yield from pool.map(_apply, items, chunksize=chunk)
    except BrokenProcessPool as error:
        raise ValueError(
            f"workers: one of {n_workers} processes was killed, perhaps for lack of memory; start the same command "
            f"again with fewer workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_function: Callable[[Any], Any]  # of this worker process


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    become_pool_worker()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def _apply(item: Any) -> Any:
    return _function(item)

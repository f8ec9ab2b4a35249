"""The process group of a run: made once, answered for by a lone process too."""

import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dinov2.distributed.launch import Launch

Result = TypeVar("Result")

_store: dist.Store | None = None


def is_enabled() -> bool:
    """Whether this process belongs to an initialised process group."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """This process's number among all; 0 when it is alone."""
    return dist.get_rank() if is_enabled() else 0


def get_world_size() -> int:
    """How many processes train together; 1 when there is no process group."""
    return dist.get_world_size() if is_enabled() else 1


def is_main_process() -> bool:
    """Whether this process writes the files and logs that exist once per run."""
    return get_rank() == 0


def enable(launch: Launch, device: torch.device, timeout_seconds: float) -> None:
    """Join the process group that `launch` describes: NCCL between GPUs, gloo between CPUs (and for objects).

    Args:
        device: what this process computes on; a CUDA device becomes the current one.
        timeout_seconds: how long a collective may wait before it fails.

    Raises:
        ConnectionError: the processes do not find each other.
    """
    global _store
    timeout = timedelta(seconds=timeout_seconds)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    address = f"tcp://{launch.master_addr}:{launch.master_port}"
    try:
        # torchrun's agent serves the store for its workers; otherwise rank 0 does
        where = "env://" if launch.launcher == "torchrun" else address
        store, rank, world_size = next(
            iter(dist.rendezvous(where, launch.rank, launch.world_size, timeout=min(timeout, timedelta(minutes=5))))
        )
    except (dist.DistNetworkError, dist.DistStoreError, TimeoutError) as error:
        raise ConnectionError(
            f"rank {launch.rank} of {launch.world_size} does not reach the others at {address}: {error}; check that "
            "this host resolves and reaches that address, and set MASTER_ADDR and MASTER_PORT if it is the wrong one"
        ) from error
    store.set_timeout(timeout)
    start = _agree_on_start(store, rank, world_size, timeout_seconds)
    _store = dist.PrefixStore(f"watchdog/{start}", store)
    dist.init_process_group(
        backend, store=dist.PrefixStore(f"group/{start}", store), rank=rank, world_size=world_size, timeout=timeout
    )


def _agree_on_start(store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> str:
    """A name that only the processes of this start know.

    torchrun keeps its store when it starts the processes again, with the addresses of those that are gone; and its
    count of restarts is each node's own. So each process shows a number drawn now, and rank 0 answers it with its own.

    Raises:
        ConnectionError: not all processes came.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout_seconds
    store.set(f"start/here/{rank}", own)
    others, answered = range(1, world_size), set()
    while time.monotonic() < deadline:
        if rank != 0 and store.check([f"start/answer/{own}"]):
            start = store.get(f"start/answer/{own}").decode()
            store.set(f"start/ready/{start}/{rank}", "")
            return start
        if rank == 0:
            for other in others:
                if store.check([f"start/here/{other}"]) and (here := store.get(f"start/here/{other}")) not in answered:
                    store.set(f"start/answer/{here.decode()}", own)
                    answered.add(here)
            if not others or store.check([f"start/ready/{own}/{other}" for other in others]):
                return own
        time.sleep(0.02)
    raise ConnectionError(f"rank {rank} waited {timeout_seconds:.0f} s for the other {world_size - 1} processes")


def disable() -> None:
    """Leave the process group, if there is one."""
    global _store
    _store = None
    if is_enabled():
        dist.destroy_process_group()


def get_global_store() -> dist.Store | None:
    """A key-value store that all processes share; None for a process that is alone."""
    return _store


def on_main_process(action: Callable[[], Result]) -> Result:
    """Run `action` on the main process alone; every process gets its result, or its error."""
    if not is_enabled():
        return action()
    outcome: list[Any] = [None, None]  # result, error
    if is_main_process():
        try:
            outcome[0] = action()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result


def all_gather_objects(own: Result) -> list[Result]:
    """What each process gives, by rank."""
    if not is_enabled():
        return [own]
    everyone: list[Any] = [None] * get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def all_gather_rows(rows: Tensor) -> Tensor:
    """The rows [R, ...] of all processes, by rank: [W * R, ...], without gradient. R is the same everywhere."""
    if not is_enabled():
        return rows.detach()
    rows = rows.detach().contiguous()
    gathered = [torch.empty_like(rows) for _ in range(get_world_size())]
    dist.all_gather(gathered, rows)
    return torch.cat(gathered)

"""Launch by torchrun or SLURM, process groups, and what ranks exchange. Functions also work in a single process.

Tensors of a step use the default group. The hosts have gloo groups of their own: one to agree in each step whether to
stop, one for objects around evaluations and checkpoints, where ranks may wait long, and one for the roll call.
"""

import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from os import getpid
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")

ROLL_CALL_SECONDS = 15.0  # maximum wait of rank 0 for answers after a rank did not arrive
OTHERS_ROLL_CALLS = 3  # the other ranks wait this many times as long for rank 0
NCCL_SLACK_SECONDS = 60.0  # the hosts notice a hang first and name the rank; then NCCL aborts waiting kernels
GLOO_WORDS = ("gloo/", "caused pair closure", "closed by peer")  # gloo's errors are plain RuntimeErrors
OBJECTS_SECONDS = 1800.0  # minimum time limit of ranks that wait around evaluations and checkpoints


@dataclass(frozen=True)
class Launch:
    """Rank and address of this process among those that were started together."""

    rank: int
    world_size: int
    local_rank: int  # among the processes of this node: chooses the GPU
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: str  # "torchrun" or "slurm"

    @property
    def n_nodes(self) -> int:
        """Return the number of nodes, which all have the same number of processes."""
        return max(1, self.world_size // max(1, self.local_world_size))


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Read the launch that `environment` describes; None for a single process.

    torchrun's variables come first. SLURM's are used only in a step of several tasks: a shell or a batch script in an
    allocation has the variables of the whole job, but is a single process.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _from_torchrun(environment)
    if "SLURM_STEP_ID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _from_slurm(environment)
    return None


def _from_torchrun(environment: Mapping[str, str]) -> Launch:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ValueError(
            f"RANK and WORLD_SIZE are set, but {' and '.join(missing)} not: start with torchrun, set them all, or "
            "unset RANK and WORLD_SIZE to run one process"
        )
    rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if rank >= world_size:
        raise ValueError(f"RANK={rank} must be less than WORLD_SIZE={world_size}; start with torchrun, or unset both")
    # Kubernetes sets neither LOCAL_RANK nor LOCAL_WORLD_SIZE: one process for each GPU of a node
    n_local = min(world_size, torch.cuda.device_count() or world_size)
    return Launch(
        rank=rank,
        world_size=world_size,
        local_rank=_number(environment, "LOCAL_RANK", str(rank % n_local)),
        local_world_size=_number(environment, "LOCAL_WORLD_SIZE", str(n_local)),
        master_addr=environment["MASTER_ADDR"],
        master_port=_number(environment, "MASTER_PORT"),
        launcher="torchrun",
    )


def _from_slurm(environment: Mapping[str, str]) -> Launch:
    world_size = _number(environment, "SLURM_STEP_NUM_TASKS")
    n_nodes = _number(environment, "SLURM_STEP_NUM_NODES", "1")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "localhost")
    return Launch(
        rank=_number(environment, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(environment, "SLURM_LOCALID"),
        local_world_size=max(1, world_size // n_nodes),
        master_addr=environment.get("MASTER_ADDR") or first_host(nodes),
        master_port=_number(environment, "MASTER_PORT", str(_port_of_step(environment))),
        launcher="slurm",
    )


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environment.get(name, default)
    if text is None or not text.strip().isdecimal():
        raise ValueError(f"environment variable {name} must be a number, found {text!r}; start with torchrun or srun")
    return int(text)


def _port_of_step(environment: Mapping[str, str]) -> int:
    # The same port for all tasks of a step, and another one for the next step or job on the node. It is above the
    # registered ports and below Linux's ports for outgoing connections.
    job, step = environment.get("SLURM_JOB_ID", "0"), environment["SLURM_STEP_ID"]
    restart = environment.get("SLURM_RESTART_COUNT", "0")
    return 20000 + (int(job) * 17 + int(step) * 5 + int(restart)) % 12000


def first_host(nodes: str) -> str:
    """Return the first name of a SLURM node list, for instance gpu003 of `gpu[003-005,9],login1`."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise ValueError(f"environment variable SLURM_STEP_NODELIST: cannot read {nodes!r}; set MASTER_ADDR")
    prefix, number, suffix = match.groups()
    return prefix + (number or "") + (suffix or "")


@dataclass(frozen=True)
class _HostGroups:
    """Gloo groups between the hosts; None is the default group."""

    steps: dist.ProcessGroup | None = None
    objects: dist.ProcessGroup | None = None
    roll_call: dist.ProcessGroup | None = None
    names: tuple[str, ...] = ()  # of the ranks, for messages
    roll_call_seconds: float = ROLL_CALL_SECONDS


_hosts = _HostGroups()


def is_enabled() -> bool:
    """Return whether this process belongs to an initialised process group."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Return the rank of this process; 0 without a process group."""
    return dist.get_rank() if is_enabled() else 0


def get_world_size() -> int:
    """Return the number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if is_enabled() else 1


def is_main_process() -> bool:
    """Return whether this process is rank 0, which writes the run's files."""
    return get_rank() == 0


def enable(launch: Launch, device: torch.device, timeout_seconds: float) -> None:
    """Join the process group that `launch` describes: NCCL between GPUs, gloo between CPUs (and for objects).

    A CUDA `device` becomes the current one. A step that waits longer than `timeout_seconds` for a rank fails.
    """
    global _hosts
    timeout, objects_seconds = timedelta(seconds=timeout_seconds), max(OBJECTS_SECONDS, 4 * timeout_seconds)
    backend, slack = "gloo", 0.0
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend, slack = "cpu:gloo,cuda:nccl", NCCL_SLACK_SECONDS
    address = f"tcp://{launch.master_addr}:{launch.master_port}"
    try:
        # torchrun's agent serves the store for its workers; otherwise rank 0 does
        where = "env://" if launch.launcher == "torchrun" else address
        store, rank, world_size = next(
            iter(dist.rendezvous(where, launch.rank, launch.world_size, timeout=timedelta(minutes=5)))
        )
    except (dist.DistNetworkError, dist.DistStoreError, TimeoutError) as error:
        raise ConnectionError(
            f"rank {launch.rank} of {launch.world_size} does not reach the others at {address}: {error}; check that "
            "this host resolves and reaches that address, and set MASTER_ADDR and MASTER_PORT if it is the wrong one"
        ) from error
    store.set_timeout(timedelta(seconds=objects_seconds))
    start = _agree_on_start(store, rank, world_size, objects_seconds)
    store = dist.PrefixStore(f"group/{start}", store)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timeout + timedelta(seconds=slack)
    )
    names: list[Any] = [None] * world_size
    roll_call_seconds = min(ROLL_CALL_SECONDS, timeout_seconds)
    objects = dist.new_group(backend="gloo", timeout=timedelta(seconds=objects_seconds))
    dist.all_gather_object(names, f"rank {rank} (host {socket.gethostname()}, pid {getpid()})", group=objects)
    _hosts = _HostGroups(
        steps=dist.new_group(backend="gloo", timeout=timeout),
        objects=objects,
        roll_call=dist.new_group(backend="gloo", timeout=timedelta(seconds=OTHERS_ROLL_CALLS * roll_call_seconds)),
        names=tuple(names),
        roll_call_seconds=roll_call_seconds,
    )


def _agree_on_start(store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> str:
    """Return a random name that all processes of this start share; ConnectionError if not all processes arrive.

    When torchrun restarts the processes, its store still holds the addresses of the old ones, and each node counts
    restarts on its own. So each process publishes a new random number, and rank 0 answers with its own number.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout_seconds
    store.set(f"start/here/{rank}", own)
    others = range(1, world_size)
    while time.monotonic() < deadline:
        if rank != 0 and store.check([f"start/answer/{own}"]):
            start = store.get(f"start/answer/{own}").decode()
            store.set(f"start/ready/{start}/{rank}", "")
            return start
        if rank == 0:
            for here in (f"start/here/{other}" for other in others):
                if store.check([here]):
                    store.set(f"start/answer/{store.get(here).decode()}", own)
            if not others or store.check([f"start/ready/{own}/{other}" for other in others]):
                return own
        time.sleep(0.02)
    raise ConnectionError(f"rank {rank} waited {timeout_seconds:.0f} s for the other {world_size - 1} processes")


def disable() -> None:
    """Leave the process group, if there is one."""
    global _hosts
    _hosts = _HostGroups()
    if is_enabled():
        dist.destroy_process_group()


def average_over_ranks(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Average 0-d tensors over the ranks, which all pass the same names. The host does not wait for the result."""
    if not is_enabled():
        return dict(values)
    stacked = torch.stack([value.float() for value in values.values()])
    dist.all_reduce(stacked)
    return dict(zip(values, (stacked / get_world_size()).unbind(), strict=True))


def any_rank(condition: bool) -> bool:
    """Return whether `condition` holds on any rank. The hosts wait for each other, not for their devices."""
    if not is_enabled():
        return condition
    flag = torch.tensor(int(condition))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=_hosts.steps)
    return bool(flag)


def is_lost_connection(error: BaseException) -> bool:
    """Return whether a collective operation failed because another rank did not take part in it."""
    is_from_gloo = isinstance(error, RuntimeError) and any(words in str(error) for words in GLOO_WORDS)
    return is_from_gloo or isinstance(error, dist.DistError)


def name_missing_ranks() -> str:
    """Name the ranks that do not answer a roll call; every rank that timed out calls this.

    Rank 0 learns which ranks are missing; the others learn only whether rank 0 answers. If a process has ended, gloo
    does not say whose connection was closed.
    """
    seconds = _hosts.roll_call_seconds * (1 if is_main_process() else OTHERS_ROLL_CALLS)
    try:
        dist.monitored_barrier(_hosts.roll_call, timedelta(seconds=seconds), wait_all_ranks=True)
    except RuntimeError as error:
        if found := re.search(r"Ranks? ([\d, ]+) failed to pass", str(error)):
            return ", ".join(_hosts.names[int(rank)] for rank in found[1].split(","))
        if not is_main_process() and "Timed out" in str(error):
            return _hosts.names[0]
    return "a rank (the log of rank 0 or the launcher says which)"


def on_main_process(action: Callable[[], Result]) -> Result:
    """Run `action` on the main process only, and return its result or raise its error on every process."""
    if not is_enabled():
        return action()
    outcome: list[Any] = [None, None]  # result, error
    if is_main_process():
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=_hosts.objects)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result


def all_gather_objects(own: Result) -> list[Result]:
    """Return the objects of all ranks, by rank."""
    if not is_enabled():
        return [own]
    objects: list[Any] = [None] * get_world_size()
    dist.all_gather_object(objects, own, group=_hosts.objects)
    return objects


def all_gather_rows(rows: Tensor) -> Tensor:
    """Gather the rows [R, ...] of all processes, by rank: [W * R, ...], without gradient. R is the same for all."""
    if not is_enabled():
        return rows.detach()
    rows = rows.detach().contiguous()
    gathered = [torch.empty_like(rows) for _ in range(get_world_size())]
    dist.all_gather(gathered, rows)
    return torch.cat(gathered)

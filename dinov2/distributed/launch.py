"""Read the rank of this process and the number of processes from the environment of torchrun or SLURM."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


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
    world_size = _number(environment, "WORLD_SIZE")
    return Launch(
        rank=_number(environment, "RANK"),
        world_size=world_size,
        local_rank=_number(environment, "LOCAL_RANK", environment["RANK"]),
        local_world_size=_number(environment, "LOCAL_WORLD_SIZE", str(world_size)),
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
    if text is None or not text.strip().isdigit():
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

"""Rank and world size, answered sensibly whether or not a process group exists."""

import torch.distributed as dist


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

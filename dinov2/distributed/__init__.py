"""The processes that train together: how they were started, who this one is, and what they agree on.

Everything here answers sensibly for a process that is alone.
"""

from dinov2.distributed.agreement import StepAgreement
from dinov2.distributed.group import (
    all_gather_objects,
    all_gather_rows,
    disable,
    enable,
    get_global_store,
    get_rank,
    get_world_size,
    is_enabled,
    is_main_process,
    on_main_process,
)
from dinov2.distributed.launch import Launch, read_launch

__all__ = [
    "Launch",
    "StepAgreement",
    "all_gather_objects",
    "all_gather_rows",
    "disable",
    "enable",
    "get_global_store",
    "get_rank",
    "get_world_size",
    "is_enabled",
    "is_main_process",
    "on_main_process",
    "read_launch",
]

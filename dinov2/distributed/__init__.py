"""The processes that train together: how they were started, which rank this one is, and what they exchange.

Every function answers for a lone process, too.
"""

from dinov2.distributed.group import (
    all_gather_objects,
    all_gather_rows,
    any_rank,
    average_over_ranks,
    disable,
    enable,
    get_rank,
    get_world_size,
    is_enabled,
    is_lost_connection,
    is_main_process,
    name_missing_ranks,
    on_main_process,
)
from dinov2.distributed.launch import Launch, read_launch

__all__ = [
    "Launch",
    "all_gather_objects",
    "all_gather_rows",
    "any_rank",
    "average_over_ranks",
    "disable",
    "enable",
    "get_rank",
    "get_world_size",
    "is_enabled",
    "is_lost_connection",
    "is_main_process",
    "name_missing_ranks",
    "on_main_process",
    "read_launch",
]

"""The number of processors that this process may use."""

import os


def available_cores() -> int:
    """Count the processors given to this process: a container or a batch job may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

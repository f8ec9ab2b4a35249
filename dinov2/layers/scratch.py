"""Memory for what a layer on a CPU makes, reads and forgets.

New memory of some MiB comes from the system page by page, which takes longer than to fill it.
"""

import math
import threading

import torch
from torch import Tensor


class _Held(threading.local):
    """What each thread has of it."""

    def __init__(self) -> None:
        self.by_type: dict[torch.dtype, Tensor] = {}


_HELD = _Held()


def scratch_like(tensor: Tensor) -> Tensor:
    """Of the shape and type of a CPU tensor, with any content. The next one in this thread gets the same memory, so
    what is made in it has to be used up before; the largest stays for the rest of the thread's life."""
    n_elements = math.prod(tensor.shape)
    held = _HELD.by_type.get(tensor.dtype)
    if held is None or len(held) < n_elements:
        with torch.inference_mode(False):  # or nothing outside that mode could write to it
            held = _HELD.by_type[tensor.dtype] = torch.empty(n_elements, dtype=tensor.dtype)
    return held[:n_elements].view(tensor.shape)

"""What all processes agree on at the end of a step: mean losses, and whether somebody asked to stop.

One small reduction a step carries both. Its result stays on the device, so the host does not wait for it: whether to
stop is read from a reduction of some steps ago, which every process reads at the same step.
"""

from collections import deque
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dinov2.distributed.group import get_world_size, is_enabled

STEPS_BEHIND = 2  # of a GPU: by then the reduction has long ended, and reading it does not hold the queue up


class StepAgreement:
    """Averages a step's numbers over the processes, and settles in which step all of them stop."""

    def __init__(self, device: torch.device) -> None:
        self._steps_behind = STEPS_BEHIND if device.type == "cuda" else 0
        self._requests: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._alone_and_asked = False

    def average(self, values: Mapping[str, Tensor], wants_stop: bool) -> dict[str, Tensor]:
        """Means of 0-d `values` over the processes, each of which gives the same names.

        Args:
            wants_stop: whether this process was asked to stop.
        """
        if not is_enabled():
            self._alone_and_asked = wants_stop
            return dict(values)
        device = next(iter(values.values())).device
        request = torch.full((), float(wants_stop), device=device)
        stacked = torch.stack([*(value.float() for value in values.values()), request])
        dist.all_reduce(stacked)
        self._remember(stacked[-1])
        means = stacked[:-1] / get_world_size()
        return dict(zip(values, means.unbind(), strict=True))

    def stop_agreed(self) -> bool:
        """Whether all processes stop after this step: true everywhere in the same step."""
        if not is_enabled():
            return self._alone_and_asked
        if len(self._requests) <= self._steps_behind:
            return False
        request, copied = self._requests.popleft()
        if copied is not None:
            copied.synchronize()
        return request.item() > 0

    def _remember(self, request: Tensor) -> None:
        if request.device.type != "cuda":
            self._requests.append((request.clone(), None))
            return
        on_host = torch.empty((), pin_memory=True)
        on_host.copy_(request, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._requests.append((on_host, copied))

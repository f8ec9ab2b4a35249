"""Where the time of a training step goes, by name, without waiting for the device."""

import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

MAX_MARKS = 100_000  # kept where nobody asks for the means


class StepClock:
    """Measures the stages of a loop's steps.

    On a CPU the time is the host's. On CUDA each stage ends with an event in the current stream, so a stage is the time
    that the device took for the work queued in it, or stood still. The stages of a step add up to its duration.

    Args:
        device: where the loop's work is done.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._is_cuda = torch.device(device).type == "cuda"
        self._marks: deque[tuple[str | None, Any]] = deque(maxlen=MAX_MARKS)  # seconds or CUDA events
        self.restart()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time since the stage before for `name`; in a profiler's trace the block is a range of this name."""
        with torch.profiler.record_function(name):
            yield
        self._mark(name)

    def restart(self) -> None:
        """Count the time since the stage before for nothing: an evaluation, a checkpoint."""
        self._mark(None)

    def means(self) -> dict[str, float]:
        """Return each stage's seconds a step since the last call; on CUDA this waits for the last stage.

        The steps are counted by the stages that come least often: once each.
        """
        marks, seconds, counts = list(self._marks), defaultdict[str, float](float), Counter[str]()
        self._marks.clear()
        self._marks.append(marks[-1])
        for (_, start), (name, end) in pairwise(marks):
            if name is not None:
                seconds[name] += self._between(start, end)
                counts[name] += 1
        return {name: total / min(counts.values()) for name, total in seconds.items()}

    def _mark(self, name: str | None) -> None:
        if not self._is_cuda:
            self._marks.append((name, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((name, event))

    def _between(self, start: Any, end: Any) -> float:
        if not self._is_cuda:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

"""Where the time of a training step goes, by name, without waiting for the device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepClock:
    """Cuts the steps of a loop into named laps.

    On a CPU the time is the host's. On CUDA each lap ends with an event in the current stream, and a lap is the time
    between two events: what the device took for the work that was queued in between, or how long it stood still for
    want of work. So the laps of a step add up to its duration, and a host that runs ahead of its device shows no
    waiting that cost nothing. A lap takes a microsecond of the host's time, with CUDA a few.

    Args:
        device: where the loop's work is done.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._clock: _HostClock | _CudaClock = _CudaClock() if torch.device(device).type == "cuda" else _HostClock()

    def lap(self, name: str) -> None:
        """The time since the lap before belongs to `name`; a name may come several times a step."""
        self._clock.mark(name)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What the block does is a lap, and a range of this name in a profiler's trace."""
        with torch.profiler.record_function(name):
            yield
        self.lap(name)

    def restart(self) -> None:
        """The time since the lap before belongs to nothing: an evaluation, a checkpoint."""
        self._clock.mark(None)

    def means(self) -> dict[str, float]:
        """Seconds a step of each name since this was last asked, in the order of the first step.

        The steps are counted by the names that come least often: once each. To be called between two steps where the
        host has just waited for the device: here it waits for the last lap's event.
        """
        laps = self._clock.take()
        n_steps = min((count for _, count in laps.values()), default=1)
        return {name: seconds / n_steps for name, (seconds, _) in laps.items()}


class _HostClock:
    def __init__(self) -> None:
        self._laps: dict[str, tuple[float, int]] = {}
        self._last = time.perf_counter()

    def mark(self, name: str | None) -> None:
        now = time.perf_counter()
        if name is not None:
            seconds, count = self._laps.get(name, (0.0, 0))
            self._laps[name] = seconds + now - self._last, count + 1
        self._last = now

    def take(self) -> dict[str, tuple[float, int]]:
        """{name: (seconds, number of laps)} since the call before."""
        laps, self._laps = self._laps, {}
        return laps


class _CudaClock:
    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []  # making one takes longer than recording it
        self._marks: list[tuple[str | None, torch.cuda.Event]] = []
        self.mark(None)

    def mark(self, name: str | None) -> None:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((name, event))

    def take(self) -> dict[str, tuple[float, int]]:
        """{name: (seconds, number of laps)} since the call before."""
        laps: dict[str, tuple[float, int]] = {}
        self._marks[-1][1].synchronize()
        for (_, before), (name, event) in zip(self._marks, self._marks[1:], strict=False):
            if name is not None:
                seconds, count = laps.get(name, (0.0, 0))
                laps[name] = seconds + before.elapsed_time(event) / 1000, count + 1
        self._free += [event for _, event in self._marks[:-1]]
        self._marks = self._marks[-1:]
        return laps

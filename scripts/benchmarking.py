"""What the benchmarks in this folder share: turns, ratios, and the name of the machine."""

import importlib.metadata
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def take_turns(ways: Mapping[str, Callable[[], object]], rounds: int, what: str = "") -> dict[str, list[float]]:
    """Seconds of each way in each round; every round runs them all, and every other one in reverse order.

    One more round comes first and does not count: it fills caches and compiles.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    started = time.monotonic()
    for number in range(-1, rounds):
        for name in list(ways) if number % 2 == 0 else reversed(list(ways)):
            begin = time.perf_counter()
            ways[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - begin)
        left = (time.monotonic() - started) / (number + 2) * (rounds - number - 1)
        print(f"{what}: round {max(number + 1, 0)} of {rounds}, {left:.0f} s to go", file=sys.stderr)
    return seconds


def ratio(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, float, float]:
    """How many times `slow` takes as long as `fast`: of the medians, and the least and largest of a round."""
    rounds = [a / b for a, b in zip(slow, fast, strict=True)]
    return statistics.median(slow) / statistics.median(fast), min(rounds), max(rounds)


def resident_mib() -> float:
    """Memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def machine(*packages: str) -> str:
    """Processor, cores and the versions of some packages."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].split(":")[1].strip() if names else "CPU"
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    return f"{name}, {os.cpu_count()} cores; {versions}"

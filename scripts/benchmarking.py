"""What the benchmarks in this folder share: turns, processes of their own, ratios, and the name of the machine."""

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


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


class ProcessOfItsOwn:
    """Does what it is asked for, by `answer_questions`: how one way treats memory is no other's concern."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "ProcessOfItsOwn":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # the end of its input ends it

    def ask(self, what: str) -> Any:
        """Its answer.

        Raises:
            RuntimeError: if it ended instead.
        """
        assert self.process.stdin is not None, "opened with pipes"
        assert self.process.stdout is not None, "opened with pipes"
        try:
            self.process.stdin.write(f"{what}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # nor will it answer
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a process ended with {self.process.wait()} when asked; its error stands above")
        return json.loads(answer)


def answer_questions(answers: Mapping[str, Callable[[], Any]]) -> None:
    """Answer each line of the input with a line of JSON, until the input ends."""
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


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

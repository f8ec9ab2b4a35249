"""Measure ways to do the same work in turns, each in a process of its own, and write tables of ratios."""

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


class Worker:
    """A process of its own for one way, so that its memory and threads are no other's concern.

    Args:
        task: for the process, which runs `script` with `--worker <task>`.
        script: whose main ends in `serve` there.
        command: what starts the script; default: this Python.
        environment: variables of the process beside those of this one; None removes one.
    """

    def __init__(
        self,
        script: str,
        task: Mapping[str, Any],
        command: Sequence[str] = (sys.executable,),
        environment: Mapping[str, str | None] | None = None,
    ) -> None:
        variables = {**os.environ, **(environment or {})}
        self.process = subprocess.Popen(
            [*command, script, "--worker", json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={name: value for name, value in variables.items() if value is not None},
        )

    def ask(self, question: str) -> Any:
        """Return the answer of the process.

        Raises:
            RuntimeError: if it ended instead.
        """
        assert self.process.stdin is not None, "opened with pipes"
        assert self.process.stdout is not None, "opened with pipes"
        try:
            self.process.stdin.write(f"{question}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # then there is no answer either
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a process ended with {self.process.wait()} when asked for {question}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.communicate()  # the end of its input ends it


def serve(answers: Mapping[str, Callable[[], Any]]) -> None:
    """Answer each line of the input with a line of JSON, until the input ends."""
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


def take_turns(ways: Mapping[str, Callable[[], Any]], rounds: int, title: str = "") -> dict[str, list[float]]:
    """Return the seconds of each way in each round; every other round runs them in reverse order.

    One more round comes first and does not count: it fills caches and compiles. A way that returns a number measures
    itself, for instance in a process of its own; for others the time of the call counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    started = time.monotonic()
    for number in range(-1, rounds):
        for name in list(ways) if number % 2 == 0 else reversed(list(ways)):
            begin = time.perf_counter()
            result = ways[name]()
            if number >= 0:
                seconds[name].append(result if isinstance(result, float) else time.perf_counter() - begin)
        left = (time.monotonic() - started) / (number + 2) * (rounds - number - 1)
        print(f"{title}: round {max(number + 1, 0)} of {rounds}, {left:.0f} s to go", file=sys.stderr)
    return seconds


def ratio(slow: Sequence[float] | None, fast: Sequence[float]) -> str:
    """Return how many times `slow` takes as long as `fast`, by the medians, with the range over rounds."""
    if slow is None:
        return ""
    rounds = [a / b for a, b in zip(slow, fast, strict=True)]
    return f"{statistics.median(slow) / statistics.median(fast):.2f} ({min(rounds):.2f} to {max(rounds):.2f})"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def finish(folder: Path, title: str, tables: Mapping[str, str], numbers: Any, *packages: str) -> None:
    """Print the tables with the machine's name, and write them with all numbers to <folder>/<title>.{md,json}."""
    parts = [f"{name}:\n\n{text}" for name, text in tables.items()]
    text = "\n\n".join([*parts, f"Machine: {machine(*packages)}."]) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{title}.md").write_text(text, encoding="utf-8")
    (folder / f"{title}.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    print(text)


def machine(*packages: str) -> str:
    """Return processor or GPU, cores, and the versions of packages."""
    torch = sys.modules.get("torch")
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].split(":")[1].strip() if names else "CPU"
    if torch is not None and torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}, {name}"
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("torch", *packages))
    return f"{name}, {os.cpu_count()} cores; {versions}"


def memory_mib(field: str = "VmRSS") -> float:
    """Return the memory of this process now (VmRSS) or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

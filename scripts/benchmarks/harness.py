"""Measure ways to do the same work in turns, each in a process of its own, and write tables of ratios."""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dinov2.data.datasets import find_images
from dinov2.data.sample_cells import write_sample_cells

_MADE: list[Any] = []  # in a worker: its object


class Worker:
    """An object `make(*arguments)` in a process of its own, so that memory and threads are not shared."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _make, (make, arguments))

    def call(self, method: str) -> Any:
        """Call a method of the object and return its result."""
        return self.pool.submit(_call, method).result()

    def close(self) -> None:
        self.pool.shutdown()


def _make(make: Callable[..., Any], arguments: Sequence[Any]) -> None:
    _MADE.append(make(*arguments))


def _call(method: str) -> Any:
    return getattr(_MADE[0], method)()


def seconds_of(work: Callable[[], Any]) -> float:
    """Return the seconds that `work` takes, with what it started on a GPU."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def take_turns(ways: Mapping[str, Callable[[], float]], rounds: int, title: str) -> dict[str, list[float]]:
    """Return the seconds of each way in each round; every other round runs them in reverse order.

    One more round comes first and does not count: it fills caches and compiles.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    started = time.monotonic()
    for number in range(rounds + 1):
        for name in list(ways) if number % 2 else reversed(list(ways)):
            seconds[name].append(ways[name]())
        left = (time.monotonic() - started) / (number + 1) * (rounds - number)
        print(f"{title}: round {number} of {rounds}, {left:.0f} s to go", file=sys.stderr)
    return {name: times[1:] for name, times in seconds.items()}


def measure_ways(
    make: Callable[..., Any], ways: Sequence[str], arguments: Sequence[Any], rounds: int, title: str, *methods: str
) -> list[dict[str, Any]]:
    """Make `make(way, *arguments)` in a process for each way; return seconds by way, and what each method returns."""
    workers = {way: Worker(make, way, *arguments) for way in ways}
    results: list[dict[str, Any]] = [time_workers(workers, rounds, title)]
    results += [{way: worker.call(method) for way, worker in workers.items()} for method in methods]
    for worker in workers.values():
        worker.close()
    return results


def time_workers(workers: Mapping[Any, Worker], rounds: int, title: str) -> dict[str, list[float]]:
    """Return the seconds of each worker's method `seconds` in each round."""
    return take_turns({name: partial(worker.call, "seconds") for name, worker in workers.items()}, rounds, title)


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


Measured = tuple[Any, dict[str, str]]  # all numbers, and tables by title
Part = Callable[[argparse.Namespace], Measured]


def make_parser(description: str | None, parts: Mapping[str, Part], default: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser of the flags that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench"), help="for images and tables (default: bench)")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(default), help=f"default: {' '.join(default)}")
    parser.add_argument("--rounds", type=int, default=7, help="which count (default: 7)")
    return parser


def run_parts(args: argparse.Namespace, parts: Mapping[str, Part], *packages: str) -> None:
    """Measure each part, print its tables, and write them with all numbers to <folder>/<part>.{md,json}."""
    args.folder.mkdir(parents=True, exist_ok=True)
    for part in args.only:
        numbers, tables = parts[part](args)
        sections = [f"{name}:\n\n{text}" for name, text in tables.items()]
        text = "\n\n".join([*sections, f"Machine: {machine(*packages)}."]) + "\n"
        (args.folder / f"{part}.md").write_text(text, encoding="utf-8")
        (args.folder / f"{part}.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
        print(text)


def choose_images(args: argparse.Namespace, n: int) -> list[Path]:
    """Return `n` files of the folder args.images, or drawn cells.

    Raises:
        SystemExit: if the folder has fewer images.
    """
    folder = args.images or args.folder / f"cells_{n}"
    if args.images is None:
        write_sample_cells(folder, n, 10, 10, 2, seed=0, size=360, n_workers=os.cpu_count() or 1)
    paths = find_images(folder)
    if len(paths) < n:
        raise SystemExit(f"--images: {folder} has {len(paths)} images; {n} are needed")
    return paths[:: len(paths) // n][:n]


def machine(*packages: str) -> str:
    """Return processor or GPU, cores, and the versions of packages."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].split(":")[1].strip() if names else "CPU"
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}, {name}"
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("torch", *packages))
    return f"{name}, {os.cpu_count()} cores; {versions}"


def memory_mib(field: str = "VmRSS") -> float:
    """Return the memory of this process now (VmRSS) or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

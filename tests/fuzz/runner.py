"""Read one damaged input after another, in forked processes with limits of time and memory."""

import hashlib
import importlib
import logging
import os
import random
import resource
import shutil
import signal
import stat
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import torch

from dinov2.utils.command import MOST_LINES, exit_code
from tests.fuzz.mutations import Format, odd_file

MODULES = ("images", "shards", "tables", "packed", "features", "weights", "settings")
CASES_PER_PROCESS = 50
SECONDS, MEMORY_BYTES = 20, 2 << 30
ODD_FILES = 0.03  # share of cases that are no regular file

# what may happen to a case; all but the first two are faults
READ, REFUSED = "read", "refused"
SIGNALS = {signal.SIGALRM: "took too long", signal.SIGKILL: "was killed"}


class Outcome(NamedTuple):
    """What happened to a case."""

    format: str
    number: int
    kind: str
    detail: str = ""

    @property
    def is_fault(self) -> bool:
        return self.kind not in (READ, REFUSED)


def formats() -> dict[str, Format]:
    """Return all formats by name."""
    modules = (importlib.import_module(f"tests.fuzz.{name}") for name in MODULES)
    return {name: each for module in modules for name, each in module.FORMATS.items()}


def fuzz(name: str, numbers: Sequence[int], folder: Path, seed: int = 0) -> Iterator[Outcome]:
    """Yield the outcomes of these cases of a format; a case depends on the seed, the format and its number alone."""
    torch.set_num_threads(1)  # a forked process has none of the threads of this one
    formats()[name].case(random.Random(seed))  # what all cases share is made before the first fork
    done = 0
    while done < len(numbers):
        batch = numbers[done : done + CASES_PER_PROCESS]
        end, lines = _run_process(name, batch, folder, seed)
        for number, line in zip(batch, lines, strict=False):
            kind, _, detail = line.partition("\t")
            yield Outcome(name, number, kind, detail)
        done += len(lines)
        if end:
            kind = SIGNALS.get(signal.Signals(end), f"died of {signal.Signals(end).name}") if end > 0 else "exited"
            yield Outcome(name, numbers[done], kind)
            done += 1


def _run_process(name: str, numbers: Sequence[int], folder: Path, seed: int) -> tuple[int, list[str]]:
    """Run cases in a forked process; return the signal that ended it, 0 for none, and a line for each case."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        with os.fdopen(writer, "w", encoding="utf-8", errors="backslashreplace") as pipe:
            try:
                _limit()
                for number in numbers:
                    print(_run_case(name, number, folder, seed).replace("\n", " | "), file=pipe, flush=True)
                os._exit(0)
            except BaseException:
                traceback.print_exc(file=sys.__stdout__)
            finally:
                os._exit(1)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as pipe:
        lines = pipe.read().splitlines()
    status = os.waitpid(process, 0)[1]
    _remove(folder)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status), lines
    return -os.WEXITSTATUS(status), lines


def _limit() -> None:
    """Limit this process's memory to 2 GiB more than it has, and let a signal end it after 20 s."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # warnings of libraries
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _run_case(name: str, number: int, folder: Path, seed: int) -> str:
    """Write and read a case; return the kind of its outcome, a tab and details."""
    rng = random.Random(f"{seed} {name} {number}")
    signal.alarm(SECONDS)
    path = write_case(name, rng, folder)
    before = snapshot(folder)
    messages = _Messages()
    logger = logging.getLogger("dinov2")
    logger.handlers, logger.propagate = [messages], False
    try:
        code = exit_code(lambda: _read(name, path))
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = next(
            (each for each in reversed(traceback.extract_tb(error.__traceback__)) if "/dinov2/" in each.filename), frame
        )
        return f"traceback\t{path.name}: {type(error).__name__}: {str(error)[:300]} ({place.filename}:{place.lineno})"
    finally:
        signal.alarm(0)
    changed = before ^ snapshot(folder)
    text = messages.errors[-1] if messages.errors else ""
    if changed:
        return f"files changed\t{path.name}: {sorted(changed)[:4]}"
    if code == 0:
        return READ
    if text.startswith("not enough memory"):
        return f"too much memory\t{path.name}: {text}"
    if not text or len(text.splitlines()) > MOST_LINES:
        return f"bad message\t{path.name}: {text[:300]!r}"
    if not any(each.name in text for each in (path, *path.rglob("*"))):
        return f"message without the file\t{path.name}: {text[:300]}"
    return f"{REFUSED}\t{path.name}: {text[:300]}"


def write_case(name: str, rng: random.Random, folder: Path) -> Path:
    """Write the input of a case to an empty folder; return its path."""
    _remove(folder)
    (folder / "output").mkdir(parents=True)
    (folder / "another_file.txt").write_text("kept")
    form = formats()[name]
    file, content = form.case(rng)
    path = folder / file
    if form.is_file and rng.random() < ODD_FILES:
        content = odd_file(rng)
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    return path


def _read(name: str, path: Path) -> None:
    formats()[name].read(path)


def snapshot(folder: Path) -> set[tuple[str, int, int, str]]:
    """Return name, mode, time and checksum of everything in a folder, but for the folder `output`."""
    entries = set()
    for path in folder.rglob("*"):
        status = path.lstat()
        is_small = stat.S_ISREG(status.st_mode) and status.st_size < 1 << 26
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if is_small else str(status.st_size)
        if "output" not in path.relative_to(folder).parts:
            entries.add((str(path.relative_to(folder)), status.st_mode, status.st_mtime_ns, digest))
    return entries


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


class _Messages(logging.Handler):
    """Keep the messages of errors."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.errors.append(record.getMessage())


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return a table: cases by format, read, refused, faults."""
    kinds = Counter((outcome.format, "fault" if outcome.is_fault else outcome.kind) for outcome in outcomes)
    names = dict.fromkeys(outcome.format for outcome in outcomes)
    rows = [(name, *(kinds[name, kind] for kind in (READ, REFUSED, "fault"))) for name in names]
    total = ("all", *(sum(row[column] for row in rows) for column in (1, 2, 3)))
    lines = [
        f"| {name} | {sum(counts):,} | {' | '.join(f'{n:,}' for n in counts)} |" for name, *counts in (*rows, total)
    ]
    return "\n".join(("| format | cases | read | refused | faults |", "|---|---|---|---|---|", *lines))

"""Is a run ever lost? Tiny runs of train.py are killed, stopped, starved of disk and damaged, and their ends compared.

    python scripts/fault_drill.py [--kills 30] [--processes 2] [--seed 0] [--only a,c] [--folder F] [key=value ...]

  a  ranks of a torchrun job are killed, half of them while a checkpoint is being written; once all, as in a power cut
  b  the disk fills up (a small tmpfs, which only root can mount; or --full-disk FOLDER on a small disk of yours)
  c  the newest checkpoint is cut short, or has a flipped bit, or lacks a file
  d  SIGTERM and SIGUSR1 come
  e  a rank stands still

After each fault: no complete checkpoint is lost or damaged, and the run goes on from the newest one. At the end: each
iteration is in training_metrics.json once, and losses and teacher are bit for bit those of an undisturbed run on as
many processes (where another number finished it: weights within 1e-4). `key=value` go to train.py: train.device=cuda
tries it on GPUs. Needs Linux. Ends with 0 if all of it held; report.json in the folder has every check.
"""

import argparse
import errno
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import torch

import dinov2.train.train as train_command
from dinov2.data.sample_cells import write_sample_cells
from dinov2.fsdp.checkpoint import Checkpointer
from dinov2.utils.command import REQUEUE_EXIT_CODE
from dinov2.utils.files import atomic_write

Found = TypeVar("Found")

TRAIN = str(Path(train_command.__file__))
KEEP = 4  # checkpoints
PERIOD = 4  # iterations between two of them
EVALUATION_PERIOD = 8  # iterations
ITERATIONS = 40  # of a run that meets one fault
ITERATIONS_PER_KILL = 6  # by which a run gets longer
# Where another number of processes finishes a run, sums round otherwise; Adam and KoLeo magnify that step by step
WEIGHT_TOLERANCE, LOSS_TOLERANCE = 1e-4, 5e-3
PATIENCE_SECONDS = 300.0  # for anything to happen
HANG_SECONDS = 8.0  # train.hang_timeout_seconds for a rank that stands still
LARGEST_DISK_BYTES = 1 << 30  # that is filled up: a larger one is hardly meant

TINY = [
    *("student.arch=vit_small", "student.embed_dim=32", "student.depth=2", "student.num_heads=2"),
    *("student.patch_size=14", "student.layerscale=1.0", "student.drop_path_rate=0"),
    *("crops.global_crops_size=28", "crops.local_crops_size=14", "crops.local_crops_number=0"),
    *("dino.head_n_prototypes=64", "dino.head_hidden_dim=32", "dino.head_bottleneck_dim=16"),
    *("train.global_batch_size=8", "train.num_workers=0", "train.log_period=1", "train.device=cpu"),
    *("train.OFFICIAL_EPOCH_LENGTH=10", "train.max_bad_fraction=0", "train.hang_timeout_seconds=120"),
    *(f"train.saveckp_freq={PERIOD / 10}", f"train.keep_checkpoints={KEEP}", "train.tensorboard=false"),
    *("optim.warmup_epochs=1", "optim.freeze_last_layer_epochs=1", "teacher.warmup_teacher_temp_epochs=2"),
    *(f"evaluation.eval_period_iterations={EVALUATION_PERIOD}", "evaluation.knn_k=[1,5]"),
]

ITERATION = re.compile(r"iteration (\d+)/\d+ ")
RESUMED = re.compile(r"resuming .* after iteration (\d+)")
COMMITTED = re.compile(r"checkpoint: .*iteration_(\d+)")
UNWRITTEN = re.compile(r"checkpoint after iteration (\d+) could not be written \((.*?)\); (.*?)\. Make room")
STOPPED = re.compile(r"stopped after iteration (\d+), as asked")
DAMAGED = re.compile(r"checkpoint \S*iteration_(\d+) is damaged \((.*?)\); trying the one before")
HANGS = re.compile(r"training hangs: rank (\d+) \(host .*?, pid (\d+)\)")

# What can be seen of a checkpoint that is being written, in the order in which it appears
STAGES = {
    "its folder is made": "",
    "tensors are being written": "__*.distcp",
    "the index is there": ".metadata",
    "the numbers are there": "run.json",
    "it is about to get its name": "checksums_all.json",
}


class Failed(Exception):
    """Something that a run must do did not happen."""


class Skipped(Exception):
    """This machine cannot show it."""


@dataclass
class Check:
    """One thing that must hold."""

    what: str
    held: bool
    detail: str = ""


@dataclass
class Part:
    """What came out of one of the parts a to e."""

    title: str
    checks: list[Check] = field(default_factory=list)
    skipped: str = ""
    seconds: float = 0.0
    note: str = ""

    @property
    def held(self) -> bool:
        return all(check.held for check in self.checks)


class Report:
    """Prints a line an event, with the time left, and keeps every check."""

    def __init__(self, parts: dict[str, Part], n_starts: int) -> None:
        self.parts, self.n_starts = parts, n_starts  # of training, restarts too: they take most of the time
        self.n_started = 0
        self._began = time.monotonic()
        self._lock = threading.Lock()

    def started(self) -> None:
        with self._lock:
            self.n_started += 1

    def say(self, letter: str, text: str) -> None:
        with self._lock:
            elapsed = time.monotonic() - self._began
            left = elapsed / max(1, self.n_started) * max(0, self.n_starts - self.n_started)
            print(f"[{_clock(elapsed)}, eta {_clock(left)}] {letter}  {text}", flush=True)

    def check(self, letter: str, what: str, held: bool, detail: str = "", *, quiet: bool = False) -> bool:
        """Keep a check; one that held can be left out of what is printed."""
        self.parts[letter].checks.append(Check(what, held, detail))
        if not held or not quiet:
            self.say(letter, f"{'ok     ' if held else 'FAILED '} {what}{f' ({detail})' if detail else ''}")
        return held

    def table(self) -> str:
        rows = [("", "what happened", "checks", "failed", "seconds", "")]
        for letter, part in self.parts.items():
            failed = [check for check in part.checks if not check.held]
            note = f"skipped: {part.skipped}" if part.skipped else part.note
            rows.append(
                (letter, part.title, str(len(part.checks)), str(len(failed)), f"{part.seconds:.0f}", note),
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)

    def write(self, path: Path) -> None:
        whole = {letter: {"held": part.held, **asdict(part)} for letter, part in self.parts.items()}
        with atomic_write(path, "w") as file:
            json.dump(whole, file, indent=1)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# --- processes ------------------------------------------------------------------------------------------------------


def children_of(pid: int) -> list[int]:
    """Running children of a process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            except OSError:  # it has ended
                continue
            if int(parent) == pid and state != "Z":
                found.append(int(entry.name))
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def rank_of(pid: int) -> int | None:
    """The rank that a launcher gave to a process; None for one that is no rank."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    ranks = [variable[5:] for variable in variables if variable.startswith(b"RANK=")]
    return int(ranks[0]) if ranks else None


def send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it was faster
        os.kill(pid, number)


class Run:
    """One start of the training command, and what it has said so far."""

    def __init__(self, command: Sequence[str], processes: int, folder: Path, log: Path) -> None:
        self.processes, self.folder = processes, folder
        self.lines: list[str] = []
        self.iteration = 0  # as last said
        self._log = open(log, "a+b")  # noqa: SIM115  # read as long as the run is looked at
        self._offset = self._log.seek(0, os.SEEK_END)
        self._unfinished = b""
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, env=environment
        )

    def read(self) -> None:
        """Take up what was said since the last time."""
        while said := os.pread(self._log.fileno(), 1 << 16, self._offset):
            self._offset += len(said)
            *lines, self._unfinished = (self._unfinished + said).split(b"\n")
            for line in lines:
                self.lines.append(line.decode(errors="replace"))
                if found := ITERATION.search(self.lines[-1]):
                    self.iteration = int(found[1])

    def find(self, pattern: re.Pattern[str], since: int = 0) -> list[re.Match[str]]:
        """Where it said so, from line `since` on."""
        return [found for found in map(pattern.search, self.lines[since:]) if found]

    def until(self, condition: Callable[[], Found], what: str, pause: float = 0.002) -> Found:
        """Wait until `condition` gives something; what it gives.

        Raises:
            Failed: the run ended before, or it took too long.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            has_ended = self.process.poll() is not None
            self.read()
            if found := condition():
                return found
            if has_ended:
                raise Failed(f"the run ended with code {self.process.returncode} before {what}; {self.last_words()}")
            if time.monotonic() > deadline:
                raise Failed(f"waited {PATIENCE_SECONDS:.0f} s for {what}; {self.last_words()}")
            time.sleep(pause)

    def until_iteration(self, iteration: int) -> None:
        self.until(lambda: self.iteration >= iteration, f"iteration {iteration}")

    def code(self) -> int:
        """Wait for its end; the exit code."""
        self.until(lambda: self.process.poll() is not None, "its end", pause=0.02)
        return self.process.returncode

    def ranks(self) -> dict[int, int]:
        """The process ids by rank, of those that run."""
        if self.processes == 1:
            return {0: self.process.pid} if self.process.poll() is None else {}
        found = {rank_of(pid): pid for pid in children_of(self.process.pid)}
        return {rank: pid for rank, pid in found.items() if rank is not None}

    def kill(self) -> None:
        """All of it at once: the launcher stands still first, so that it starts nothing again."""
        send(self.process.pid, signal.SIGSTOP)
        tree = [self.process.pid]
        for pid in tree:
            tree += children_of(pid)
        for pid in tree:
            send(pid, signal.SIGKILL)
        self.process.wait()
        while any(map(is_running, tree)):
            time.sleep(0.005)
        self.read()

    def last_words(self) -> str:
        said = [line for line in self.lines if line.strip()][-12:]
        return "it said last:\n    " + "\n    ".join(said)


# --- runs and what becomes of them ----------------------------------------------------------------------------------


class Checkpoints:
    """The complete checkpoints of a run, seen from outside."""

    def __init__(self, run_folder: Path) -> None:
        self.folder = run_folder / "checkpoints"
        self._checkpointer = Checkpointer(self.folder, KEEP)

    def iterations(self) -> list[int]:
        """What stands there under its final name, oldest first."""
        return [_number(path) for path in self._checkpointer.paths()]

    def damaged(self) -> list[int]:
        """Those that differ from what was written."""
        found = []
        for path in self._checkpointer.paths():
            try:
                newest = self._checkpointer.newest(before=_number(path))
            except ValueError:
                newest = None
            if newest is None or newest[0] != path:
                found.append(_number(path))
        return found

    def newest(self) -> Path:
        return self._checkpointer.paths()[-1]

    def being_written(self, since_ns: int = 0) -> list[Path]:
        """Hidden folders of checkpoints that are not complete, changed after `since_ns`."""
        found = []
        for path in self.folder.glob(".iteration_*.tmp"):
            try:
                if path.stat().st_mtime_ns > since_ns:
                    found.append(path)
            except FileNotFoundError:  # it has its final name now
                continue
        return found


def _number(path: Path) -> int:
    return int(path.name.rsplit("_", 1)[1])


class Drill:
    """Starts runs on the same pictures and compares their ends with those of undisturbed ones."""

    def __init__(
        self, folder: Path, report: Report, processes: int, kills: int, seed: int, short: bool, overrides: Sequence[str]
    ) -> None:
        self.folder, self.report, self.processes, self.kills, self.short = folder, report, processes, kills, short
        self.seed = seed
        self._runs: list[Run] = []
        self._is_over = False
        self._references: dict[tuple[int, int], Path] = {}
        self._stopped: dict[int, Run] = {}
        self._lock = threading.RLock()
        pictures = folder / "pictures"
        write_sample_cells(pictures, n_train=50, n_probe_train=24, n_probe_test=12, n_patients=0, seed=seed, size=28)
        probe = {"name": "drawn", **{split: str(pictures / "probe" / split) for split in ("train", "test")}}
        self._overrides = [
            f"train.dataset_path=HemaStandardDataset:root={pictures / 'lists'}:shuffle=1",
            f"evaluation.datasets={json.dumps([probe])}",
            *(f"train.seed={seed}", *TINY, *overrides),
        ]

    def random(self, letter: str) -> random.Random:
        """The same for a seed whichever parts are run."""
        return random.Random(f"{self.seed} {letter}")

    def start(
        self,
        name: str,
        processes: int,
        *overrides: str,
        iterations: int = ITERATIONS,
        restarts: int = 0,
        output_dir: Path | None = None,
    ) -> Run:
        """The training command; on several processes under torchrun, which starts all again up to `restarts` times."""
        output_dir = output_dir or self.folder / "runs"
        if self._is_over:
            raise Failed("the drill was stopped")
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            command += [f"--max-restarts={restarts}"]
        command += [TRAIN, "--output-dir", str(output_dir), "--name", name]
        command += [*self._overrides, f"optim.epochs={iterations / 10}", *overrides]
        logs = self.folder / "said"
        logs.mkdir(exist_ok=True)
        run = Run(command, processes, output_dir / name, logs / f"{name}.txt")
        self._runs.append(run)
        self.report.started()
        return run

    def reference(self, processes: int, iterations: int = ITERATIONS) -> Path:
        """The folder of an undisturbed run.

        Raises:
            Failed: it does not even end well when nothing disturbs it.
        """
        with self._lock:
            key = processes, iterations
            if key not in self._references:
                run = self.start(f"undisturbed_{processes}x{iterations}", processes, iterations=iterations)
                if run.code() != 0:
                    raise Failed(f"a run that nothing disturbs ended with code {run.code()}; {run.last_words()}")
                self._references[key] = run.folder
            return self._references[key]

    def check_end(self, letter: str, run: Run, reference: Path, *, same_number: bool = True) -> None:
        """The run must end well and as the undisturbed one did: bit for bit, where both had the same processes."""

        def check(what: str, held: bool, detail: str = "", quiet: bool = False) -> bool:
            return self.report.check(letter, f"{run.folder.name}: {what}", held, detail, quiet=quiet)

        code = run.code()
        if not check("ended with code 0", code == 0, "" if code == 0 else run.last_words(), quiet=True):
            return
        rows, expected = metrics_of(run.folder), metrics_of(reference)
        seen, due = [row["iteration"] for row in rows], [row["iteration"] for row in expected]
        if not check("each iteration is logged once", seen == due, "" if seen == due else f"{seen}", quiet=True):
            return
        weight_tolerance, loss_tolerance = (0.0, 0.0) if same_number else (WEIGHT_TOLERANCE, LOSS_TOLERANCE)
        losses = largest_difference(losses_of(rows, same_number), losses_of(expected, same_number))
        weights = largest_difference(teacher_of(run.folder, len(due)), teacher_of(reference, len(due)))
        check(
            f"{len(rows)} iterations, losses and weights as undisturbed",
            losses <= loss_tolerance and weights <= weight_tolerance,
            "bit for bit" if losses == weights == 0 else f"losses differ by {losses:.1g}, weights by {weights:.1g}",
        )
        torn = [path.name for path in run.folder.rglob(".*.tmp")]
        check("nothing half-written is left", not torn, ", ".join(torn), quiet=True)

    def stopped(self, processes: int) -> Run:
        """A run that was asked by SIGTERM to stop, as a batch system does; with several processes, the launcher was."""
        with self._lock:
            if processes not in self._stopped:
                run = self.start(f"stopped_{processes}", processes)
                moment = ITERATIONS // 2 + self.random(f"stopped {processes}").randrange(ITERATIONS // 4)
                run.until_iteration(moment)
                send(run.process.pid, signal.SIGTERM)
                run.code()
                self._stopped[processes] = run
            return self._stopped[processes]

    def copy(self, run: Run, name: str) -> None:
        shutil.copytree(run.folder, self.folder / "runs" / name)

    def end_all(self, within: Path | None = None) -> None:
        """End whatever still runs, for good; or only what writes to a folder `within`."""
        self._is_over = self._is_over or within is None
        for run in self._runs:
            if run.process.poll() is None and (within is None or within in run.folder.parents):
                run.kill()


def metrics_of(run_folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_folder / "training_metrics.json").read_text().splitlines()]


def losses_of(rows: Sequence[Mapping[str, float]], with_norms: bool) -> dict[str, torch.Tensor]:
    names = [name for name in rows[0] if name.endswith("_loss") or (with_norms and name.startswith("grad_norm"))]
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in names}


def teacher_of(run_folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    path = run_folder / "eval" / f"training_{iteration}" / "teacher_checkpoint.pth"
    return torch.load(path, map_location="cpu", weights_only=True)["teacher"]


def largest_difference(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """Of any two numbers; infinite where names differ. 0 means bit for bit."""
    if ours.keys() != theirs.keys():
        return math.inf
    return max(
        0.0 if torch.equal(ours[name], value) else float((ours[name].double() - value.double()).abs().max())
        for name, value in theirs.items()
    )


# --- a: ranks are killed --------------------------------------------------------------------------------------------


@dataclass
class _Moment:
    """When a process is to be killed."""

    kind: str  # step, checkpoint, restart or evaluation
    iteration: int  # not before
    fraction: float  # of how long such a thing takes; decides where inside it


class RanksKilled:
    """One run, killed again and again."""

    def __init__(self, drill: Drill) -> None:
        self.drill, self.report, self.kills = drill, drill.report, drill.kills
        self.rng = drill.random("a")
        self.iterations = ITERATIONS + ITERATIONS_PER_KILL * max(0, self.kills - 4)
        self.reference = drill.reference(drill.processes, self.iterations)
        self.torn = 0
        self.restart_seconds: list[float] = []
        self.run = self.start("killed", drill.processes)
        self.startup_seconds = 0.0
        self.killed_at = time.monotonic()
        self.quiet_ns = 0  # when the processes before had ended
        self.expected: int | None = None  # iteration to go on from
        self.mark = 0  # lines before it were said by processes that are gone
        self.is_up = False

    def go(self) -> str:
        drill, processes = self.drill, self.drill.processes
        power_cut = self.rng.randrange(self.kills)
        for number in range(self.kills):
            moment = self.next_moment(number)
            where = self.wait_for(moment)
            self.strike(number, where, everywhere=number == power_cut)
            if number == self.kills - 1:
                shutil.copytree(self.run.folder, self.run.folder.with_name("killed_then_another_number"))
        self.wait_until_up()
        drill.check_end("a", self.run, self.reference)
        self.report.check(
            "a", "kills hit checkpoints that were being written", self.torn > 0 or self.kills < 2, f"{self.torn}"
        )
        other = self.start("killed_then_another_number", 1 if processes > 1 else 2)
        drill.check_end("a", other, self.reference, same_number=False)
        return (
            f"{self.kills} kills, {self.torn} in a checkpoint; trains again after "
            f"{statistics.median(self.restart_seconds):.1f} s, {max(self.restart_seconds):.1f} at most"
        )

    def start(self, name: str, processes: int) -> Run:
        return self.drill.start(name, processes, iterations=self.iterations, restarts=self.kills + 1)

    def next_moment(self, number: int) -> _Moment:
        kind = "checkpoint" if 2 * self.torn <= number else self.rng.choice(["step", "restart", "evaluation"])
        last = self.iterations - 2 * EVALUATION_PERIOD
        iteration = round(last * (number + self.rng.random()) / self.kills)
        fraction = self.rng.random()
        if kind == "checkpoint" and number and not self.torn:
            fraction = 0.0  # those before came too late on a busy machine: strike as soon as one begins
        return _Moment(kind, iteration, fraction)

    def wait_until_up(self) -> None:
        """Until the processes that were started again train; they must have gone on where they should."""
        if self.is_up:
            return
        run = self.run

        def says_iteration() -> int | None:
            found = run.find(ITERATION, self.mark)
            return int(found[0][1]) if found else None

        first = run.until(says_iteration, "it trained again")
        self.is_up = True
        seconds = time.monotonic() - self.killed_at
        if not self.startup_seconds:
            self.startup_seconds = seconds
        if not self.quiet_ns:
            return
        self.restart_seconds.append(seconds)
        resumed = [int(found[1]) for found in run.find(RESUMED, self.mark)]
        wanted = [] if self.expected is None else [self.expected]
        self.report.check(
            "a",
            f"went on from the newest checkpoint, {self.expected}" if wanted else "began anew, without a checkpoint",
            resumed == wanted and first == (self.expected or 0) + 1,
            f"after {seconds:.1f} s" if resumed == wanted else f"went on from {resumed}, first iteration {first}",
            quiet=True,
        )

    def wait_for(self, moment: _Moment) -> str:
        """Until `moment` has come; where the run is then."""
        run = self.run
        if moment.kind == "restart":
            if not self.startup_seconds:
                self.wait_until_up()
            run.until(lambda: len(run.ranks()) == run.processes, "all ranks were started", pause=0.01)
            since = time.monotonic()
            # at times before they train and at times after
            run.until(
                lambda: time.monotonic() - since >= 1.2 * moment.fraction * self.startup_seconds, "a while", pause=0.005
            )
            run.read()
            return f"{time.monotonic() - since:.1f} s after its start"
        self.wait_until_up()
        run.until_iteration(moment.iteration)
        now_ns = time.time_ns()
        if moment.kind == "checkpoint":
            checkpoints = Checkpoints(run.folder)
            stage, pattern = list(STAGES.items())[int(moment.fraction * len(STAGES))]

            def is_written() -> bool:
                folders = checkpoints.being_written(now_ns)
                return any(not pattern or next(path.glob(pattern), None) for path in folders)

            run.until(is_written, f"a checkpoint was written ({stage})", pause=0.0003)
            return f"checkpoint: {stage}"
        if moment.kind == "evaluation":
            pattern = "*.tmp" if moment.fraction < 0.5 else "teacher_checkpoint.pth"

            def is_judged() -> bool:
                return any(_changed_after(path, now_ns) for path in run.folder.glob(f"eval/training_*/{pattern}"))

            run.until(is_judged, "an evaluation", pause=0.0005)
            return "evaluation: teacher being written" if moment.fraction < 0.5 else "evaluation: teacher written"
        time.sleep(0.1 * moment.fraction)
        return "step"

    def strike(self, number: int, where: str, *, everywhere: bool) -> None:
        """Kill a rank, or everything; nothing that was complete may be lost."""
        run, checkpoints = self.run, Checkpoints(self.run.folder)
        ranks = run.ranks()
        rank = self.rng.choice(sorted(ranks)) if ranks else 0
        before = checkpoints.iterations()
        self.killed_at = time.monotonic()
        if everywhere or run.processes == 1:
            run.kill()
            victim = "everything" if everywhere else "the process"
        else:
            send(ranks[rank], signal.SIGKILL)
            victim = f"rank {rank}"
            run.until(lambda: not any(map(is_running, ranks.values())), "the other ranks ended", pause=0.01)
        ended = time.monotonic() - self.killed_at
        run.read()
        iteration, torn = run.iteration, [_number_of_hidden(path) for path in checkpoints.being_written(self.quiet_ns)]
        self.torn += bool(torn)
        after, damaged = checkpoints.iterations(), checkpoints.damaged()
        kept = not damaged and len(after) >= min(KEEP, len(before)) and after[-1:] >= before[-1:]
        self.expected, self.is_up, self.quiet_ns = (after[-1] if after else None), False, time.time_ns()
        self.report.check(
            "a",
            f"kill {number + 1}/{self.kills}: {victim} at iteration {iteration}, {where}: checkpoints whole",
            kept,
            f"{' '.join(map(str, after)) or 'none yet'}{f', torn {torn[0]}' if torn else ''}"
            f"{f', before {before}, damaged {damaged}' if not kept else ''}; all had ended after {ended:.1f} s",
        )
        if everywhere or run.processes == 1:
            self.run = self.start("killed", run.processes)
        else:
            self.report.started()
        self.mark = len(self.run.lines)


def _changed_after(path: Path, time_ns: int) -> bool:
    try:
        return path.stat().st_mtime_ns > time_ns
    except FileNotFoundError:  # it has its final name now
        return False


def _number_of_hidden(path: Path) -> int:
    return int(path.name.split("_")[1].split(".")[0])


# --- b: the disk is full --------------------------------------------------------------------------------------------


class Ballast:
    """A file that takes all room on a disk."""

    def __init__(self, disk: Path) -> None:
        self.path = disk / "ballast"

    def fill(self) -> bool:
        size = 1 << 20
        with open(self.path, "ab", buffering=0) as file:
            while size:
                try:
                    file.write(bytes(size))
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    size //= 16
        return True

    def remove(self) -> None:
        self.path.unlink()


@contextmanager
def small_disk(drill: Drill, given: Path | None, n_bytes: int) -> Iterator[Path]:
    """A disk that can be filled up: an empty folder on `given`, or else on a tmpfs of `n_bytes`.

    Raises:
        Skipped: there is none, and none can be mounted.
    """
    if given is None:
        disk = drill.folder / "small_disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "fault_drill", str(disk)]
        try:
            mounted = subprocess.run(mount, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise Skipped("there is no `mount` here; give --full-disk FOLDER on a small disk") from error
        if mounted.returncode != 0:
            raise Skipped(f"{mounted.stderr.strip() or 'mount failed'}; give --full-disk FOLDER on a small disk")
    else:
        free = shutil.disk_usage(given).free
        if not n_bytes <= free <= LARGEST_DISK_BYTES:
            raise Skipped(
                f"--full-disk {given}: {free >> 20} MiB are free there; give one with {n_bytes >> 20} to "
                f"{LARGEST_DISK_BYTES >> 20} MiB, since it is filled up"
            )
        disk = Path(tempfile.mkdtemp(dir=given, prefix="fault_drill_"))
    try:
        yield disk
    finally:
        drill.end_all(within=disk)
        if given is None:
            subprocess.run(["umount", str(disk)], check=True)
            disk.rmdir()
        else:
            shutil.rmtree(disk)


def full_disk(drill: Drill, given: Path | None) -> str:
    """One run on a small disk that fills up, is cleared, and fills up again until the end."""
    report, rng, processes = drill.report, drill.random("b"), drill.processes
    reference = drill.reference(processes)
    size = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file())
    with small_disk(drill, given, 2 * size + (4 << 20)) as disk:
        run = drill.start("full_disk", processes, "train.tensorboard=true", output_dir=disk)
        checkpoints, ballast = Checkpoints(run.folder), Ballast(disk)

        def stands() -> bool:
            return bool(checkpoints.iterations()) and not checkpoints.damaged()

        moment = 2 * PERIOD + rng.randrange(PERIOD)
        run.until(lambda: run.iteration >= moment and checkpoints.iterations(), f"iteration {moment}")
        ballast.fill()
        report.say("b", f"no room is left on the disk at iteration {run.iteration}")
        run.until(
            lambda: ballast.fill() and len(run.find(UNWRITTEN)) >= 2,
            "it had said twice that a checkpoint could not be written",
            pause=0.01,
        )
        iteration, good, told = run.iteration, checkpoints.iterations(), run.find(UNWRITTEN)[-1]
        report.check("b", "the log says so", "No space left" in told[2] or "quota" in told[2], told[0])
        report.check("b", "and names the last good checkpoint", any(f"_{n:07d} is" in told[3] for n in good), told[3])
        report.check("b", "the checkpoints from before are whole", stands(), " ".join(map(str, good)))
        run.until(lambda: run.iteration > iteration, "training went on")
        report.check("b", "training goes on meanwhile", True, f"iteration {run.iteration}")
        ballast.remove()
        mark = len(run.lines)
        run.until(lambda: run.find(COMMITTED, mark), "a checkpoint was written, since there is room again")
        report.check("b", "there is room again, and the next checkpoint is written", stands())

        moment = run.iteration + rng.randrange(PERIOD)
        run.until_iteration(moment)
        ballast.fill()
        report.say("b", f"no room is left on the disk from iteration {run.iteration} to the end")
        run.until(lambda: ballast.fill() and run.process.poll() is not None, "its end", pause=0.01)
        said = run.find(re.compile("trained to the end, but its last files could not be written"))
        report.check("b", "its end: code 1 and a message", run.code() == 1 and len(said) == 1, f"code {run.code()}")
        report.check("b", "the last good checkpoint is whole", stands(), f"{checkpoints.newest().name}")
        if not drill.short:
            ballast.fill()
            run = drill.start("full_disk", processes, "train.tensorboard=true", output_dir=disk)
            code = run.code()
            said = run.find(re.compile(r"cannot write to .* \((No space left|.*quota).*"))
            report.check("b", "started while it is full: fails and says why", code != 0 and bool(said), f"code {code}")
            report.check("b", "the last good checkpoint is whole", stands(), f"{checkpoints.newest().name}")
        ballast.remove()
        newest = checkpoints.iterations()[-1]
        run = drill.start("full_disk", processes, "train.tensorboard=true", output_dir=disk)
        drill.check_end("b", run, reference)
        resumed = [int(found[1]) for found in run.find(RESUMED)]
        report.check("b", "with room, the same command goes on from there", resumed == [newest], f"{resumed}")
    return f"a disk of {(2 * size >> 20) + 4} MiB" if given is None else ""


# --- c: a checkpoint is damaged -------------------------------------------------------------------------------------


def cut_short(checkpoint: Path) -> None:
    file = max(checkpoint.glob("__*.distcp"))
    os.truncate(file, file.stat().st_size // 2)


def flip_bit(checkpoint: Path) -> None:
    file = min(checkpoint.glob("__*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose_index(checkpoint: Path) -> None:
    (checkpoint / ".metadata").unlink()


DAMAGES = {"cut_short": cut_short, "flipped_bit": flip_bit, "lost_index": lose_index}


def damaged_checkpoint(drill: Drill) -> str:
    """Copies of a stopped run, with damage done to its newest checkpoints."""
    processes = 1 if drill.short else drill.processes
    reference, stopped = drill.reference(processes), drill.stopped(processes)
    if drill.short:
        cases = {"_and_".join(DAMAGES): list(DAMAGES.values())}  # the newest, the one before, and the one before that
    else:
        cases = {name: [damage] for name, damage in DAMAGES.items()}
    for name, damages in cases.items():
        drill.copy(stopped, name)
        checkpoints = Checkpoints(drill.folder / "runs" / name)
        *_, good = whole = checkpoints.iterations()[: -len(damages)]
        bad = checkpoints.iterations()[len(whole) :]
        for iteration, damage in zip(reversed(bad), damages, strict=True):
            damage(checkpoints.folder / f"iteration_{iteration:07d}")
        run = drill.start(name, processes)
        run.until_iteration(good + 1)
        told = run.find(DAMAGED)
        drill.report.check(
            "c",
            f"{name}: says that {bad} cannot be used, and why",
            [int(found[1]) for found in told] == bad[::-1],
            "; ".join(found[2] for found in told),
        )
        resumed = [int(found[1]) for found in run.find(RESUMED)]
        drill.report.check("c", f"{name}: goes on from {good}, the one before", resumed == [good], f"{resumed}")
        drill.check_end("c", run, reference)
    return ""


# --- d: signals -----------------------------------------------------------------------------------------------------


def stop_signals(drill: Drill) -> str:
    """Runs that are asked to stop, first by SIGTERM, then by SIGUSR1."""
    for processes in sorted({1, drill.processes}):
        name, stopped = f"signalled_{processes}", drill.stopped(processes)
        _check_stop(drill, stopped, f"SIGTERM to {'the process' if processes == 1 else f'torchrun of {processes}'}")
        if drill.short:  # parts c and e go on from there
            continue
        drill.copy(stopped, name)
        run, rng = drill.start(name, processes), drill.random(f"d {processes}")
        moment = ITERATIONS * 3 // 4 + rng.randrange(ITERATIONS // 6)
        run.until_iteration(moment)
        rank = rng.randrange(processes)
        send(run.ranks()[rank], signal.SIGUSR1)
        _check_stop(drill, run, f"SIGUSR1 to rank {rank} of {processes}")
        drill.check_end("d", drill.start(name, processes), drill.reference(processes))
    return ""


def _check_stop(drill: Drill, run: Run, what: str) -> None:
    code, stopped = run.code(), [int(found[1]) for found in run.find(STOPPED)]
    checkpoints = Checkpoints(run.folder)
    written = checkpoints.iterations()
    if run.processes == 1:
        drill.report.check("d", f"{what}: ended with code {REQUEUE_EXIT_CODE}", code == REQUEUE_EXIT_CODE, f"{code}")
    else:  # torchrun has a code of its own for whatever its processes ended with
        drill.report.check("d", f"{what}: torchrun says that it is not done", code != 0, f"code {code}")
    drill.report.check(
        "d",
        f"{what}: stopped once, with a checkpoint of that step",
        len(stopped) == 1 and stopped == written[-1:] and not checkpoints.damaged(),
        f"stopped after {stopped}, checkpoints {written}",
    )


# --- e: a rank stands still -----------------------------------------------------------------------------------------


def standing_rank(drill: Drill) -> str:
    """A run goes on from where SIGTERM stopped it, and a rank gets SIGSTOP; the others name it, and torchrun starts all
    again."""
    processes = drill.processes
    if processes == 1:
        raise Skipped("needs --processes 2 or more")
    reference, rng = drill.reference(processes), drill.random("e")
    drill.copy(drill.stopped(processes), "standing")
    run = drill.start("standing", processes, f"train.hang_timeout_seconds={HANG_SECONDS}", restarts=1)
    moment = ITERATIONS * 3 // 4 + rng.randrange(ITERATIONS // 6)
    run.until_iteration(moment)
    rank, ranks = rng.randrange(processes), run.ranks()
    send(ranks[rank], signal.SIGSTOP)
    since = time.monotonic()
    drill.report.say("e", f"rank {rank} (pid {ranks[rank]}) stands still at iteration {run.iteration}")
    found = run.until(lambda: run.find(HANGS), "the others said that it hangs", pause=0.01)[0]
    seconds = time.monotonic() - since
    drill.report.check(
        "e",
        "the others name the rank that stands still",
        (int(found[1]), int(found[2])) == (rank, ranks[rank]),
        f"after {seconds:.1f} s with train.hang_timeout_seconds={HANG_SECONDS:g}: {found[0]}",
    )
    run.until(lambda: not any(map(is_running, ranks.values())), "torchrun ended all ranks", pause=0.02)
    newest = Checkpoints(run.folder).iterations()[-1]
    drill.report.started()
    drill.check_end("e", run, reference)
    resumed = [int(found[1]) for found in run.find(RESUMED)][1:]
    drill.report.check("e", "torchrun starts all again, from the newest checkpoint", resumed == [newest], f"{resumed}")
    return f"named after {seconds:.0f} s"


# --- the whole ------------------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[str, Callable[[Drill, argparse.Namespace], str]]] = {
    "a": ("ranks are killed", lambda drill, args: RanksKilled(drill).go()),
    "b": ("the disk is full", lambda drill, args: full_disk(drill, args.full_disk)),
    "c": ("checkpoints are damaged", lambda drill, args: damaged_checkpoint(drill)),
    "d": ("signals ask to stop", lambda drill, args: stop_signals(drill)),
    "e": ("a rank stands still", lambda drill, args: standing_rank(drill)),
}


def n_starts(letters: Sequence[str], kills: int, short: bool) -> int:
    """How often training is started, for the time left; near enough."""
    each = {"a": kills + 2, "b": 2 if short else 3, "c": 1 if short else 3, "d": 0 if short else 4, "e": 2}
    return 4 + sum(each[letter] for letter in letters)


def run_part(letter: str, drill: Drill, args: argparse.Namespace) -> None:
    """Run a part, and keep what came of it."""
    part, began = drill.report.parts[letter], time.monotonic()
    try:
        part.note = PARTS[letter][1](drill, args)
    except Skipped as reason:
        part.skipped = str(reason)
        drill.report.say(letter, f"skipped: {reason}")
    except Failed as error:
        drill.report.check(letter, "what had to happen did", False, str(error))
    part.seconds = time.monotonic() - began


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, metavar="N", help="of part a (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="of torchrun jobs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides when and whom faults hit (default: %(default)s)")
    parser.add_argument("--only", default="a,b,c,d,e", metavar="a,b", help="parts to run (default: %(default)s)")
    parser.add_argument("--folder", type=Path, metavar="F", help="new folder to keep the runs in (default: none)")
    parser.add_argument("--full-disk", type=Path, metavar="F", help="folder on a small disk, which is filled up")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="parts at a time (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="fewer variants of b, c and d")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for train.py, such as train.device=cuda")
    args = parser.parse_intermixed_args(argv)
    args.letters = [letter.strip() for letter in args.only.split(",") if letter.strip()]
    if unknown := sorted(set(args.letters) - set(PARTS)):
        parser.error(f"--only: there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if min(args.kills, args.processes, args.jobs) < 1:
        parser.error("--kills, --processes and --jobs must be 1 or more")
    if args.folder is not None and args.folder.is_dir() and any(args.folder.iterdir()):
        parser.error(f"--folder: {args.folder} is not empty; give a new one")
    if not Path("/proc/self/stat").is_file():
        parser.error("this needs Linux, whose /proc tells which processes are ranks")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; 0 if all held."""
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs are ended, too
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="fault_drill_"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    parts = {letter: Part(PARTS[letter][0]) for letter in args.letters}
    report = Report(parts, n_starts(args.letters, args.kills, args.short))
    drill = Drill(folder, report, args.processes, args.kills, args.seed, args.short, args.overrides)
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for done in [pool.submit(run_part, letter, drill, args) for letter in args.letters]:
                done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            drill.end_all()
    held = all(part.held for part in parts.values())
    report.write(folder / "report.json")
    print(f"\n{report.table()}\n")
    if held and args.folder is None:
        shutil.rmtree(folder)
    else:
        print(f"runs, what they said and report.json are in {folder}")
    print("all held" if held else "FAILED: see the lines above")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())

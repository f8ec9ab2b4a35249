"""Kill, stop and damage tiny training runs and fill their disk, and compare each with an undisturbed run.

    python scripts/fault_drill.py [--kills 30] [--processes 2] [--seed 0] [--only a,c] [--folder F] [key=value ...]

  a  ranks of a torchrun job are killed, half of them while a checkpoint is written; once all ranks, as in a power cut
  b  the disk fills up (a small tmpfs, which only root can mount; or --full-disk FOLDER on a small disk of yours)
  c  the newest checkpoint is cut short, has a flipped bit, or lacks a file
  d  SIGTERM and SIGUSR1 arrive
  e  a rank stands still

After each fault no complete checkpoint is lost or damaged, and the run continues from the newest one. At the end each
iteration is in training_metrics.json once, and losses and teacher equal those of an undisturbed run on as many
processes bit for bit (on another number of processes: weights within 1e-4). `key=value` go to train.py. Needs Linux.
Exit code 0: all checks held. report.json in the folder has every check.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import torch

import dinov2.train.train as train_command
from dinov2.data.sample_cells import write_sample_cells
from dinov2.fsdp.checkpoint import Checkpointer
from dinov2.utils.command import REQUEUE_EXIT_CODE

T = TypeVar("T")
KEEP, PERIOD, EVALUATION_PERIOD = 4, 4, 8  # checkpoints kept; iterations between checkpoints, between evaluations
ITERATIONS, ITERATIONS_PER_KILL = 40, 6
WEIGHT_TOLERANCE, LOSS_TOLERANCE = 1e-4, 5e-3  # sums round differently on another number of processes
PATIENCE_SECONDS, HANG_SECONDS = 300.0, 8.0
LARGEST_DISK_BYTES = 1 << 30  # a larger disk is hardly meant to be filled up

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
UNFINISHED = "checkpoints/.iteration_*.tmp"
FILES = {  # that appear in this order
    "checkpoint": [UNFINISHED, *(f"{UNFINISHED}/{name}" for name in ("__*.distcp", ".metadata", "run.json", "check*"))],
    "evaluation": ["eval/training_*/*.tmp", "eval/training_*/teacher_checkpoint.pth"],
}


class Failed(Exception):
    """A run did not do what it must."""


class Skipped(Exception):
    """This machine cannot run a part."""


def is_alive(pid: int) -> bool:
    """Return whether a process runs: it is there and not a zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def children_of(pid: int) -> list[int]:
    with suppress(OSError):  # it has ended
        return [
            int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()
        ]
    return []


def rank_of(pid: int) -> int | None:
    """Return the rank that torchrun gave to a process; None for another process."""
    with suppress(OSError):
        for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if variable.startswith(b"RANK="):
                return int(variable[5:])
    return None


def send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it has ended
        os.kill(pid, number)


class Run:
    """One start of train.py and its output so far."""

    def __init__(self, command: Sequence[str], processes: int, folder: Path, log: Path) -> None:
        self.processes, self.folder, self._log = processes, folder, log
        self._offset = log.stat().st_size if log.exists() else 0
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        with open(log, "ab") as output:
            self.process = subprocess.Popen(command, stdout=output, env=environment, **streams)

    @property
    def lines(self) -> list[str]:
        """The complete lines of output."""
        return self._log.read_bytes()[self._offset :].decode(errors="replace").split("\n")[:-1]

    def find(self, pattern: re.Pattern[str], since: int = 0) -> list[re.Match[str]]:
        """Return the matches in the lines from number `since` on."""
        return [match for match in map(pattern.search, self.lines[since:]) if match]

    @property
    def iteration(self) -> int:
        """The iteration that was logged last."""
        matches = self.find(ITERATION)
        return int(matches[-1][1]) if matches else 0

    def until(self, condition: Callable[[], T], what: str, pause: float = 0.005) -> T:
        """Wait until `condition` returns something true, and return it.

        Raises:
            Failed: the run ended before, or it took too long.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            has_ended = self.process.poll() is not None
            if result := condition():
                return result
            if has_ended or time.monotonic() > deadline:
                reason = f"ended with code {self.process.returncode}" if has_ended else "took too long"
                raise Failed(f"the run {reason} before {what}; {self.last_lines()}")
            time.sleep(pause)

    def until_iteration(self, iteration: int) -> None:
        self.until(lambda: self.iteration >= iteration, f"iteration {iteration}")

    def code(self) -> int:
        """Wait for the end; return the exit code."""
        self.until(lambda: self.process.poll() is not None, "its end", pause=0.02)
        return self.process.returncode

    def ranks(self) -> dict[int, int]:
        """Return {rank: process id} of the ranks that run."""
        if self.processes == 1:
            return {0: self.process.pid} if self.process.poll() is None else {}
        ranks = {rank_of(pid): pid for pid in children_of(self.process.pid)}
        return {rank: pid for rank, pid in ranks.items() if rank is not None}

    def kill(self) -> None:
        """Kill the launcher and all ranks. The launcher is stopped first, so that it restarts nothing."""
        send(self.process.pid, signal.SIGSTOP)
        tree = [self.process.pid]
        for pid in tree:
            tree += children_of(pid)
        for pid in tree:
            send(pid, signal.SIGKILL)
        self.process.wait()
        while any(map(is_alive, tree)):
            time.sleep(0.005)

    def last_lines(self) -> str:
        return "its last lines:\n    " + "\n    ".join([line for line in self.lines if line.strip()][-12:])


class Checkpoints:
    """The checkpoints of a run, read from outside."""

    def __init__(self, run_folder: Path) -> None:
        self.run_folder, self._checkpointer = run_folder, Checkpointer(run_folder / "checkpoints", KEEP)

    def iterations(self) -> list[int]:
        """Return the iterations of the complete checkpoints, ascending."""
        return [iteration_of(path) for path in self._checkpointer.paths()]

    def damaged(self) -> list[int]:
        """Return the iterations of complete checkpoints whose files differ from what was written."""
        whole = set()
        for iteration in self.iterations():
            with suppress(ValueError):  # none up to this one can be read
                newest = self._checkpointer.newest(before=iteration)
                whole |= {newest[0]} if newest else set()
        return [iteration_of(path) for path in self._checkpointer.paths() if path not in whole]

    def are_whole(self) -> bool:
        return bool(self.iterations()) and not self.damaged()

    def being_written(self, since_ns: int = 0) -> list[Path]:
        """Return the hidden folders of unfinished checkpoints that changed after `since_ns`."""
        return [path for path in self.run_folder.glob(UNFINISHED) if changed_after(path, since_ns)]


def iteration_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("_", 1)[1])


def changed_after(path: Path, time_ns: int) -> bool:
    try:
        return path.stat().st_mtime_ns > time_ns
    except FileNotFoundError:  # it has its final name now
        return False


def read_metrics(run_folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_folder / "training_metrics.json").read_text().splitlines()]


def numbers_of(run_folder: Path, with_norms: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the losses of all iterations, and the teacher's weights after the last."""
    rows = read_metrics(run_folder)
    names = [name for name in rows[0] if name.endswith("_loss") or (with_norms and name.startswith("grad_norm"))]
    losses = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in names}
    teacher = run_folder / "eval" / f"training_{len(rows)}" / "teacher_checkpoint.pth"
    return losses, torch.load(teacher, map_location="cpu", weights_only=True)["teacher"]


def largest_difference(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """Return the largest difference of two numbers: 0 is bit for bit, infinite is other names."""
    if ours.keys() != theirs.keys():
        return math.inf
    differences = [(ours[name].double() - value.double()).abs().max().item() for name, value in theirs.items()]
    return 0.0 if all(torch.equal(ours[name], value) for name, value in theirs.items()) else max(differences)


class Drill:
    """Starts runs on the same images, compares them with undisturbed ones and keeps the checks."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.processes, self.short = args, folder, args.processes, args.short
        self.checks: dict[str, list[dict[str, Any]]] = {letter: [] for letter in args.letters}
        self.skipped = dict.fromkeys(args.letters, "")
        self._began = time.monotonic()
        self._runs: list[Run] = []
        self._is_over = False
        self._references: dict[tuple[int, int], Path] = {}
        self._stopped: dict[int, Run] = {}
        self._lock = threading.RLock()
        cells = folder / "cells"
        write_sample_cells(cells, n_train=50, n_probe_train=24, n_probe_test=12, n_patients=0, seed=args.seed, size=28)
        probe = {"name": "drawn", **{split: str(cells / "probe" / split) for split in ("train", "test")}}
        self._overrides = [
            f"train.dataset_path=HemaStandardDataset:root={cells / 'lists'}:shuffle=1",
            *(f"evaluation.datasets={json.dumps([probe])}", f"train.seed={args.seed}", *TINY, *args.overrides),
        ]

    def random(self, letter: str) -> random.Random:
        """Return a generator that depends on the seed and the part alone."""
        return random.Random(f"{self.args.seed} {letter}")

    def say(self, letter: str, text: str) -> None:
        print(f"[{time.monotonic() - self._began:.0f} s] {letter}  {text}", flush=True)

    def check(self, letter: str, what: str, held: bool, detail: object = "") -> bool:
        self.checks[letter].append({"what": what, "held": bool(held), "detail": str(detail)})
        self.say(letter, f"{'ok    ' if held else 'FAILED'}  {what}  {detail}")
        return held

    def start(
        self, name: str, processes: int, *overrides: str, iterations: int = ITERATIONS, restarts: int = 0, within=None
    ) -> Run:
        """Start train.py; on several processes under torchrun, which restarts all ranks up to `restarts` times."""
        if self._is_over:
            raise Failed("the drill was stopped")
        output_dir = within or self.folder / "runs"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *([*torchrun, f"--max-restarts={restarts}"] if processes > 1 else [])]
        command += [train_command.__file__, "--output-dir", str(output_dir), "--name", name]
        command += [*self._overrides, f"optim.epochs={iterations / 10}", *overrides]
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        run = Run(command, processes, output_dir / name, logs / f"{name}.txt")
        self._runs.append(run)
        return run

    def reference(self, processes: int, iterations: int = ITERATIONS) -> Path:
        """Return the folder of an undisturbed run."""
        with self._lock:
            key = processes, iterations
            if key not in self._references:
                run = self.start(f"undisturbed_{processes}x{iterations}", processes, iterations=iterations)
                if run.code() != 0:
                    raise Failed(f"an undisturbed run ended with code {run.code()}; {run.last_lines()}")
                self._references[key] = run.folder
            return self._references[key]

    def stopped(self, processes: int) -> Run:
        """Return a run that stopped on SIGTERM to the process or the launcher, as a batch system sends it."""
        with self._lock:
            if processes not in self._stopped:
                run = self.start(f"stopped_{processes}", processes)
                moment = ITERATIONS // 2 + self.random(f"stopped {processes}").randrange(ITERATIONS // 4)
                run.until_iteration(moment)
                send(run.process.pid, signal.SIGTERM)
                run.code()
                self._stopped[processes] = run
            return self._stopped[processes]

    def check_end(self, letter: str, run: Run, reference: Path, *, same_number: bool = True) -> None:
        """Check that a run ended well and as the undisturbed run: bit for bit with the same number of processes."""
        name, code = run.folder.name, run.code()
        if not self.check(letter, f"{name}: ended with code 0", code == 0, "" if code == 0 else run.last_lines()):
            return
        logged, due = ([row["iteration"] for row in read_metrics(folder)] for folder in (run.folder, reference))
        if not self.check(letter, f"{name}: each iteration is logged once", logged == due, len(logged)):
            return
        pairs = zip(numbers_of(run.folder, same_number), numbers_of(reference, same_number), strict=True)
        losses, weights = (largest_difference(ours, theirs) for ours, theirs in pairs)
        is_equal = losses == weights == 0 if same_number else losses <= LOSS_TOLERANCE and weights <= WEIGHT_TOLERANCE
        detail = f"losses differ by {losses:.1g}, weights by {weights:.1g}"
        self.check(letter, f"{name}: losses and weights equal those of the undisturbed run", is_equal, detail)
        unfinished = [path.name for path in run.folder.rglob(".*.tmp")]
        self.check(letter, f"{name}: no unfinished file is left", not unfinished, ", ".join(unfinished))

    def check_resumed(self, letter: str, run: Run, iterations: list[int], since: int = 0) -> None:
        """Check that a run continued from the only one of `iterations`, or from the start if there is none."""
        resumed = [int(match[1]) for match in run.find(RESUMED, since)]
        self.check(letter, f"{run.folder.name}: continued from checkpoint {iterations}", resumed == iterations, resumed)

    def copy(self, run: Run, name: str) -> None:
        shutil.copytree(run.folder, self.folder / "runs" / name)

    def end_all(self, within: Path | None = None) -> None:
        """Kill all runs and allow no more; or only the runs in a folder."""
        self._is_over = self._is_over or within is None
        for run in self._runs:
            if run.process.poll() is None and (within is None or within in run.folder.parents):
                run.kill()


class RankKiller:
    """Kills ranks of one run again and again."""

    def __init__(self, drill: Drill) -> None:
        self.drill, self.kills, self.rng = drill, drill.args.kills, drill.random("a")
        self.iterations = ITERATIONS + ITERATIONS_PER_KILL * max(0, self.kills - 4)
        self.reference = drill.reference(drill.processes, self.iterations)
        self.n_unfinished = 0  # checkpoints that a kill hit while they were written
        self.since_line, self.since_ns = 0, 0  # of the ranks that run now
        self.newest: list[int] = []  # the checkpoint they must continue from, if there is one
        self.has_restarted = False
        self.run = self.start("killed", drill.processes)

    def start(self, name: str, processes: int) -> Run:
        return self.drill.start(name, processes, iterations=self.iterations, restarts=self.kills + 1)

    def go(self) -> None:
        power_cut = self.rng.randrange(self.kills)
        for number in range(self.kills):
            where = self.wait_for_moment(number)
            self.kill(number, where, everything=number == power_cut or self.run.processes == 1)
            if number == self.kills - 1:
                shutil.copytree(self.run.folder, self.run.folder.with_name("killed_then_another_number"))
        self.wait_until_training()
        self.drill.check_end("a", self.run, self.reference)
        is_enough = self.n_unfinished > 0 or self.kills < 2
        self.drill.check("a", "kills hit checkpoints that were being written", is_enough, self.n_unfinished)
        other = self.start("killed_then_another_number", 1 if self.drill.processes > 1 else 2)
        self.drill.check_end("a", other, self.reference, same_number=False)

    def wait_until_training(self) -> None:
        self.run.until(lambda: self.run.find(ITERATION, self.since_line), "it trained again")
        if self.has_restarted:
            self.has_restarted = False
            self.drill.check_resumed("a", self.run, self.newest, self.since_line)

    def wait_for_moment(self, number: int) -> str:
        """Wait until the next kill is due; return where the run is then."""
        is_behind = 2 * self.n_unfinished <= number
        kind = "checkpoint" if is_behind else self.rng.choice(["step", "restart", "evaluation"])
        run, fraction = self.run, self.rng.random()
        iteration = round((self.iterations - 2 * EVALUATION_PERIOD) * (number + self.rng.random()) / self.kills)
        if kind == "restart":
            run.until(lambda: len(run.ranks()) == run.processes, "all ranks were started", pause=0.01)
            time.sleep(8 * fraction)  # before the first step at times, and at times after it
            return f"{8 * fraction:.1f} s after the start"
        self.wait_until_training()
        run.until_iteration(iteration)
        now = time.time_ns()
        if kind == "step":
            time.sleep(0.1 * fraction)
            return "a step"
        files = FILES[kind]
        # if no kill has hit a checkpoint yet, the machine is busy: kill as soon as the next one begins
        pattern = files[0 if is_behind and number and not self.n_unfinished else int(fraction * len(files))]
        run.until(lambda: any(changed_after(path, now) for path in run.folder.glob(pattern)), pattern, pause=0.0003)
        return pattern

    def kill(self, number: int, where: str, *, everything: bool) -> None:
        run, checkpoints = self.run, Checkpoints(self.run.folder)
        ranks, before = run.ranks(), checkpoints.iterations()
        rank = self.rng.choice(sorted(ranks)) if ranks else 0
        if everything:
            run.kill()
        else:
            send(ranks[rank], signal.SIGKILL)
            run.until(lambda: not any(map(is_alive, ranks.values())), "the other ranks ended", pause=0.01)
        unfinished = [path.name for path in checkpoints.being_written(self.since_ns)]
        self.n_unfinished += bool(unfinished)
        after, damaged = checkpoints.iterations(), checkpoints.damaged()
        is_kept = not damaged and len(after) >= min(KEEP, len(before)) and after[-1:] >= before[-1:]
        victim = "everything" if everything else f"rank {rank}"
        detail = f"{before} before, {after} after, {damaged} damaged" + "".join(f", torn {n}" for n in unfinished[:1])
        what = f"kill {number + 1}/{self.kills}: {victim} at iteration {run.iteration}, {where}: checkpoints are whole"
        self.drill.check("a", what, is_kept, detail)
        self.newest, self.has_restarted, self.since_ns = after[-1:], True, time.time_ns()
        self.since_line = len(run.lines)
        if everything:
            self.run, self.since_line = self.start("killed", run.processes), 0


def fill(ballast: Path) -> bool:
    """Write a file until the disk has no room left."""
    with open(ballast, "ab", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 20)):
            pass
    return True


@contextmanager
def small_disk(drill: Drill, n_bytes: int) -> Iterator[Path]:
    """Yield an empty folder on --full-disk, or on a tmpfs of `n_bytes`.

    Raises:
        Skipped: neither is possible.
    """
    given = drill.args.full_disk
    if given is not None and not n_bytes <= shutil.disk_usage(given).free <= LARGEST_DISK_BYTES:
        limits = f"{n_bytes >> 20} to {LARGEST_DISK_BYTES >> 20} MiB"
        raise Skipped(
            f"--full-disk {given}: {shutil.disk_usage(given).free >> 20} MiB are free; give one with {limits}"
        )
    disk = Path(tempfile.mkdtemp(dir=given or drill.folder, prefix="small_disk_"))
    if given is None:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "fault_drill", str(disk)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
            raise Skipped("a tmpfs cannot be mounted here; give --full-disk FOLDER on a small disk")
    try:
        yield disk
    finally:
        drill.end_all(within=disk)
        if given is None:
            subprocess.run(["umount", str(disk)], check=True)
        shutil.rmtree(disk)


def fill_disk(drill: Drill) -> None:
    """Fill the disk of a run, clear it, and fill it again until the end."""
    rng, processes = drill.random("b"), drill.processes
    reference = drill.reference(processes)
    size = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file())
    with small_disk(drill, 2 * size + (4 << 20)) as disk:

        def start() -> Run:
            return drill.start("full_disk", processes, "train.tensorboard=true", within=disk)

        run, ballast = start(), disk / "ballast"
        checkpoints = Checkpoints(run.folder)
        moment = 2 * PERIOD + rng.randrange(PERIOD)
        run.until(lambda: run.iteration >= moment and checkpoints.iterations(), f"iteration {moment}")
        fill(ballast)
        drill.say("b", f"the disk is full at iteration {run.iteration}")
        run.until(lambda: fill(ballast) and len(run.find(UNWRITTEN)) >= 2, "two checkpoints could not be written")
        iteration, good, message = run.iteration, checkpoints.iterations(), run.find(UNWRITTEN)[-1]
        drill.check("b", "the log gives the reason", "No space left" in message[2] or "quota" in message[2], message[0])
        drill.check("b", "and names the last good checkpoint", any(f"_{n:07d} is" in message[3] for n in good))
        drill.check("b", "the checkpoints from before are whole", checkpoints.are_whole(), good)
        run.until(lambda: run.iteration > iteration, "training went on")
        drill.check("b", "training goes on meanwhile", True, f"iteration {run.iteration}")
        ballast.unlink()
        since = len(run.lines)
        run.until(lambda: run.find(COMMITTED, since), "a checkpoint was written, since there is room again")
        drill.check("b", "with room, the next checkpoint is written", checkpoints.are_whole())

        run.until_iteration(run.iteration + rng.randrange(PERIOD))
        drill.say("b", f"the disk is full from iteration {run.iteration} to the end")
        run.until(lambda: fill(ballast) and run.process.poll() is not None, "its end", pause=0.01)
        messages = run.find(re.compile("trained to the end, but its last files could not be written"))
        drill.check("b", "its end: code 1 and a message", run.code() == 1 and len(messages) == 1, f"code {run.code()}")
        drill.check("b", "the last good checkpoint is whole", checkpoints.are_whole(), checkpoints.iterations())
        if not drill.short:
            fill(ballast)
            run = start()
            code, messages = run.code(), run.find(re.compile(r"cannot write to .* \((No space left|.*quota).*"))
            drill.check("b", "started on a full disk: fails and says why", code != 0 and bool(messages), f"code {code}")
            drill.check("b", "the last good checkpoint is still whole", checkpoints.are_whole())
        ballast.unlink()
        newest, run = checkpoints.iterations()[-1:], start()
        drill.check_end("b", run, reference)
        drill.check_resumed("b", run, newest)


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


def damage_checkpoints(drill: Drill) -> None:
    """Damage the newest checkpoint in copies of a stopped run; the short form damages three in one copy."""
    processes = 1 if drill.short else drill.processes
    reference, stopped = drill.reference(processes), drill.stopped(processes)
    damages = (cut_short, flip_bit, lose_index)
    for case in [damages] if drill.short else [(damage,) for damage in damages]:
        name = "_and_".join(damage.__name__ for damage in case)
        drill.copy(stopped, name)
        checkpoints = Checkpoints(drill.folder / "runs" / name)
        iterations = checkpoints.iterations()
        good, bad = iterations[-len(case) - 1], iterations[-len(case) :][::-1]
        for iteration, damage in zip(bad, case, strict=True):
            damage(checkpoints.run_folder / "checkpoints" / f"iteration_{iteration:07d}")
        run = drill.start(name, processes)
        run.until_iteration(good + 1)
        messages = run.find(DAMAGED)
        is_named = [int(match[1]) for match in messages] == bad
        drill.check("c", f"{name}: names {bad} and the damage", is_named, "; ".join(match[2] for match in messages))
        drill.check_resumed("c", run, [good])
        drill.check_end("c", run, reference)


def send_signals(drill: Drill) -> None:
    """Ask runs to stop, first by SIGTERM, then by SIGUSR1."""
    for processes in sorted({1, drill.processes}):
        name, stopped = f"signalled_{processes}", drill.stopped(processes)
        check_stop(drill, stopped, f"SIGTERM to {'the process' if processes == 1 else f'torchrun of {processes}'}")
        if drill.short:  # parts c and e continue from there
            continue
        drill.copy(stopped, name)
        run, rng = drill.start(name, processes), drill.random(f"d {processes}")
        run.until_iteration(ITERATIONS * 3 // 4 + rng.randrange(ITERATIONS // 6))
        rank = rng.randrange(processes)
        send(run.ranks()[rank], signal.SIGUSR1)
        check_stop(drill, run, f"SIGUSR1 to rank {rank} of {processes}")
        drill.check_end("d", drill.start(name, processes), drill.reference(processes))


def check_stop(drill: Drill, run: Run, what: str) -> None:
    code, stopped = run.code(), [int(match[1]) for match in run.find(STOPPED)]
    checkpoints = Checkpoints(run.folder)
    # torchrun has an exit code of its own
    is_right = code == REQUEUE_EXIT_CODE if run.processes == 1 else code != 0
    drill.check("d", f"{what}: the exit code asks for a restart", is_right, code)
    written = checkpoints.iterations()
    is_saved = len(stopped) == 1 and stopped == written[-1:] and not checkpoints.damaged()
    drill.check("d", f"{what}: stopped once, with a checkpoint of that step", is_saved, f"{stopped}, {written}")


def stop_a_rank(drill: Drill) -> None:
    """Stop a rank with SIGSTOP: the others name it, and torchrun restarts all."""
    processes = drill.processes
    if processes == 1:
        raise Skipped("needs --processes 2 or more")
    reference, rng = drill.reference(processes), drill.random("e")
    drill.copy(drill.stopped(processes), "standing")
    run = drill.start("standing", processes, f"train.hang_timeout_seconds={HANG_SECONDS}", restarts=1)
    run.until_iteration(ITERATIONS * 3 // 4 + rng.randrange(ITERATIONS // 6))
    rank, ranks = rng.randrange(processes), run.ranks()
    send(ranks[rank], signal.SIGSTOP)
    drill.say("e", f"rank {rank} (pid {ranks[rank]}) stands still at iteration {run.iteration}")
    message = run.until(lambda: run.find(HANGS), "the others named the rank that hangs")[0]
    is_right = (int(message[1]), int(message[2])) == (rank, ranks[rank])
    drill.check("e", "the others name the rank that stands still", is_right, message[0])
    run.until(lambda: not any(map(is_alive, ranks.values())), "torchrun ended all ranks", pause=0.02)
    newest, since = Checkpoints(run.folder).iterations()[-1:], len(run.lines)
    drill.check_end("e", run, reference)
    drill.check_resumed("e", run, newest, since)


PARTS: dict[str, tuple[str, Callable[[Drill], None]]] = {
    "a": ("ranks are killed", lambda drill: RankKiller(drill).go()),
    "b": ("the disk is full", fill_disk),
    "c": ("checkpoints are damaged", damage_checkpoints),
    "d": ("signals ask to stop", send_signals),
    "e": ("a rank stands still", stop_a_rank),
}


def run_part(letter: str, drill: Drill) -> None:
    try:
        PARTS[letter][1](drill)
    except Skipped as reason:
        drill.skipped[letter] = str(reason)
        drill.say(letter, f"skipped: {reason}")
    except Failed as error:
        drill.check(letter, "the part ran to its end", False, error)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, metavar="N", help="of part a (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="of torchrun jobs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and ranks (default: %(default)s)")
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
        parser.error("this needs Linux, whose /proc lists processes")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs end, too
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="fault_drill_"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    drill = Drill(args, folder)
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for done in [pool.submit(run_part, letter, drill) for letter in args.letters]:
                done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            drill.end_all()
    report = {
        letter: {"held": all(check["held"] for check in checks), "skipped": drill.skipped[letter], "checks": checks}
        for letter, checks in drill.checks.items()
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    for letter, part in report.items():
        n_failed = sum(not check["held"] for check in part["checks"])
        outcome = part["skipped"] or f"{len(part['checks'])} checks, {n_failed} failed"
        print(f"{letter}  {PARTS[letter][0]}: {outcome}")
    is_held = all(part["held"] for part in report.values())
    if is_held and args.folder is None:
        shutil.rmtree(folder)
    else:
        print(f"runs, logs and report.json are in {folder}")
    print("all held" if is_held else "FAILED: see the lines above")
    return 0 if is_held else 1


if __name__ == "__main__":
    sys.exit(main())

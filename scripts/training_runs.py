"""Start tiny runs of train.py, read their output and checkpoints from outside, kill them, and compare two of them."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import pandas as pd
import torch

import dinov2.train.train as train_command
from dinov2.data.sample_cells import write_sample_cells
from dinov2.fsdp.checkpoint import Checkpointer

KEEP, PERIOD, EVALUATION_PERIOD = 4, 4, 8  # checkpoints kept; iterations between checkpoints, between evaluations
ITERATIONS = 40
WEIGHT_TOLERANCE, LOSS_TOLERANCE = 1e-4, 5e-3  # sums round differently on another number of processes
PATIENCE_SECONDS = 300.0

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

Checks = Iterator[tuple[str, bool, object]]  # what is checked, whether it held, details


class Failed(Exception):
    """A run did not do what it must."""


class Skipped(Exception):
    """This machine cannot run a drill."""


def iteration_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("_")[2])


def read_checkpoints(run_folder: Path) -> dict[int, bool]:
    """Return {iteration: True if its files are undamaged} of the complete checkpoints, ascending."""
    checkpointer, is_whole = Checkpointer(run_folder / "checkpoints", KEEP), {}
    for path in checkpointer.paths():
        iteration, newest = iteration_of(path), None
        with suppress(ValueError, FileNotFoundError):  # none up to this one can be read; the run removed it
            newest = checkpointer.newest(before=iteration)
        if path.exists():
            is_whole[iteration] = newest is not None and newest[0] == path
    return is_whole


class Run:
    """One start of train.py, and its output so far."""

    def __init__(self, command: Sequence[str], processes: int, folder: Path, log: Path) -> None:
        self.processes, self.folder, self._log, run_id = processes, folder, log, uuid.uuid4().hex
        self._mark = f"FAULT_DRILL_RUN={run_id}".encode()  # in the environment of all its processes
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "FAULT_DRILL_RUN": run_id}
        with open(log, "ab") as output:
            self.ignore_output()
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def ignore_output(self) -> None:
        """Ignore the output so far: it is of an earlier start, or of ranks that were restarted."""
        self._offset = self._log.stat().st_size

    @property
    def lines(self) -> list[str]:
        """The complete lines of output."""
        return self._log.read_bytes()[self._offset :].decode(errors="replace").split("\n")[:-1]

    def find(self, pattern: str) -> list[re.Match[str]]:
        """Return the matches of a pattern in the output, at most one a line."""
        return [match for line in self.lines if (match := re.search(pattern, line))]

    @property
    def iteration(self) -> int:
        """The iteration that was logged last; -1 before the first."""
        return max((int(match[1]) for match in self.find(r"iteration (\d+)/\d+ ")), default=-1)

    def until(self, condition: Callable[[], Any], what: str, pause: float = 0.005) -> Any:
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

    def until_gone(self, pids: Collection[int]) -> None:
        self.until(lambda: not self.pids().keys() & set(pids), "its ranks ended", pause=0.01)

    def code(self) -> int:
        """Wait for the end; return the exit code."""
        self.until(lambda: self.process.poll() is not None, "its end", pause=0.02)
        return self.process.returncode

    def pids(self) -> dict[int, int | None]:
        """Return {process id: rank} of the live processes; torchrun itself has no rank."""
        pids = {}
        for file in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it has ended, or is of another user
                variables = file.read_bytes().split(b"\0")  # a zombie has none
                if self._mark in variables:
                    ranks = [int(variable[5:]) for variable in variables if variable.startswith(b"RANK=")]
                    pids[int(file.parent.name)] = ranks[0] if ranks else None
        return pids

    def ranks(self) -> dict[int, int]:
        """Return {rank: process id} of the live ranks; without torchrun, the only process is rank 0."""
        return {rank or 0: pid for pid, rank in self.pids().items() if rank is not None or self.processes == 1}

    def kill(self) -> None:
        """Kill the launcher and all ranks; the launcher first, because it restarts ranks."""
        self.process.kill()
        while pids := self.pids():
            for pid in pids:
                with suppress(ProcessLookupError):  # it has ended
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def last_lines(self) -> str:
        return "its last lines:\n    " + "\n    ".join([line for line in self.lines if line.strip()][-12:])


def changed(folder: Path, pattern: str, since_ns: int) -> list[Path]:
    """Return the files and folders that changed after a time."""
    paths = []
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):  # it has its final name now
            paths += [path] if path.stat().st_mtime_ns > since_ns else []
    return paths


def difference(pair: Sequence[Any], tolerance: float) -> str:
    """Describe how two tensors, or mappings of them, differ by more than a tolerance; with 0, in any bit."""
    try:
        torch.testing.assert_close(*pair, rtol=0, atol=tolerance)
    except AssertionError as error:
        return str(error)
    return ""


class Lab:
    """Starts runs on the same images."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.processes, self.is_over = args, folder, args.processes, False
        self._runs: list[Run] = []
        self._undisturbed: dict[str, Run] = {}
        self._lock = threading.Lock()
        cells = folder / "cells"
        write_sample_cells(cells, n_train=50, n_probe_train=24, n_probe_test=12, n_patients=0, seed=args.seed, size=28)
        probe = {"name": "drawn", **{split: str(cells / "probe" / split) for split in ("train", "test")}}
        self._overrides = [
            f"train.dataset_path=HemaStandardDataset:root={cells / 'lists'}:shuffle=1",
            *(f"evaluation.datasets={json.dumps([probe])}", f"train.seed={args.seed}", *TINY, *args.overrides),
        ]
        (folder / "logs").mkdir()

    def start(
        self, name: str, *overrides: str, processes: int = 0, iterations: int = ITERATIONS, restarts: int = 0, disk=None
    ) -> Run:
        """Start train.py; on several processes under torchrun, which restarts all ranks up to `restarts` times."""
        if self.is_over:
            raise Failed("the drill was stopped")
        processes, output_dir = processes or self.processes, disk or self.folder / "runs"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *([*torchrun, f"--max-restarts={restarts}"] if processes > 1 else [])]
        command += [train_command.__file__, "--output-dir", str(output_dir), "--name", name]
        command += [*self._overrides, f"optim.epochs={iterations / 10}", *overrides]
        run = Run(command, processes, output_dir / name, self.folder / "logs" / f"{name}.txt")
        self._runs.append(run)
        return run

    def undisturbed(self, processes: int = 0, iterations: int = ITERATIONS) -> Run:
        """Return a run to compare with, which has ended; the drills share it."""
        name = f"undisturbed_{processes or self.processes}x{iterations}"
        with self._lock:
            if name not in self._undisturbed:
                run = self.start(name, processes=processes, iterations=iterations)
                if run.code() != 0:
                    raise Failed(f"an undisturbed run ended with code {run.code()}; {run.last_lines()}")
                self._undisturbed[name] = run
            return self._undisturbed[name]

    def kill_runs(self, within: Path) -> None:
        for run in self._runs:
            if within in run.folder.parents:
                run.kill()


def check_end(run: Run, undisturbed: Run, newest: list[int], *, same_number: bool = True) -> Checks:
    """Check that a run continued from the newest checkpoint, if any, and ended as the undisturbed run.

    With the same number of processes this means bit for bit.
    """
    name, code = run.folder.name, run.code()
    yield f"{name}: ended with code 0", code == 0, code
    if code != 0:
        raise Failed(run.last_lines())
    yield from check_resumed(run, newest)
    folders = run.folder, undisturbed.folder
    ours, theirs = (pd.read_json(f / "training_metrics.json", lines=True, precise_float=True) for f in folders)
    is_once = ours["iteration"].tolist() == theirs["iteration"].tolist()
    yield f"{name}: each iteration is logged once", is_once, f"{len(ours)} rows"
    names = r"_loss$|^grad_norm" if same_number else "_loss$"
    losses = [{name: torch.tensor(rows[name]) for name in rows.filter(regex=names)} for rows in (ours, theirs)]
    teacher = f"eval/training_{len(theirs)}/teacher_checkpoint.pth"
    weights = [torch.load(folder / teacher, weights_only=True)["teacher"] for folder in folders]
    text = difference(losses, 0 if same_number else LOSS_TOLERANCE)
    text += difference(weights, 0 if same_number else WEIGHT_TOLERANCE)
    yield f"{name}: losses and weights equal those of the undisturbed run", not text, text
    unfinished = [path.name for path in run.folder.rglob(".*.tmp")]
    yield f"{name}: no unfinished file is left", not unfinished, ", ".join(unfinished)


def check_resumed(run: Run, newest: list[int]) -> Checks:
    resumed = [int(match[1]) for match in run.find(r"resuming .* after iteration (\d+)")]
    yield f"{run.folder.name}: continued from checkpoint {newest}", resumed == newest, resumed


def check_whole(what: str, run: Run) -> Checks:
    is_whole = read_checkpoints(run.folder)
    yield what, bool(is_whole) and all(is_whole.values()), is_whole

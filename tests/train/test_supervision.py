"""Hangs, with real processes: a rank that stands still is named by the others, and a lone process ends itself."""

import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dinov2.train.setup import HANG_EXIT_CODE

TIMEOUT = 3.0  # seconds; a slow step takes less, a pause more
WORLD_SIZE = 3
START_SECONDS = 60.0  # for processes to start on a busy machine

# A loop with the calls that the training makes around a step. `fault` happens on rank `who` in step 5.
PROGRAM = """
import os, signal, time

import torch

from dinov2 import distributed
from dinov2.distributed import on_main_process
from dinov2.logging import MetricLogger, setup_logging
from dinov2.train import setup
from dinov2.train.setup import Supervision
from dinov2.utils.run_status import StatusFile
from dinov2.utils.command import StopSignals

torch.set_num_threads(1)
os.environ |= environment
if fault == "stopped early":
    setup.GROUP_FIRST_SECONDS = timeout
launch = distributed.read_launch()
if launch is not None:
    distributed.enable(launch, torch.device("cpu"), timeout)
rank = distributed.get_rank()


class Folder:
    path, status_file = folder, StatusFile(folder, 100, resumed=False)
    status = status_file.status

    def write_status(self, state, reason=""):
        if rank == 0:
            self.status_file.write(state, reason)


def read_image_from_a_dead_disk():
    time.sleep(600)


setup_logging(folder)
(folder / f"pid_{rank}").write_text(str(os.getpid()))
metrics = MetricLogger(folder / "metrics.json", 0, 100, 4, 1)
with Supervision(timeout, Folder(), metrics, StopSignals()) as supervision:
    for step in range(10):
        supervision.begin_step()
        if step == 5 and rank == who:
            if fault in ("stopped", "stopped early"):
                os.kill(os.getpid(), signal.SIGSTOP)
            if fault == "reads":
                read_image_from_a_dead_disk()
            if fault == "fails":
                raise OSError("disk full")
        if fault == "stopped early" and step == 5:
            time.sleep(600)  # as in a collective operation whose own time-out fails
        if fault == "none" and step == 5:
            with supervision.pause("evaluating"):
                on_main_process(lambda: time.sleep(1.5 * timeout))
        if fault == "none" and step >= 5:
            time.sleep(timeout / 4)  # the five steps take longer than the time-out
        if step % 2:  # ranks wait for each other here, and where they ask for requests to stop
            distributed.all_gather_rows(torch.ones(4, 4))
        assert not supervision.must_stop()
distributed.disable()
"""


class Run:
    """Ranks of one run, each a process of its own."""

    def __init__(self, forks, folder: Path, fault: str, who: int, world_size: int = WORLD_SIZE) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder, self.processes = folder, []
        for rank in range(world_size):
            own = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {name: str(value) for name, value in own.items()} if world_size > 1 else {}
            names = {"folder": folder, "timeout": TIMEOUT, "fault": fault, "who": who, "environment": environment}
            self.processes.append(forks.Process(target=exec, args=(PROGRAM, names)))
            self.processes[-1].start()

    def ends(self, *ranks: int) -> list[int | None]:
        for rank in ranks:
            self.processes[rank].join(START_SECONDS)
        return [self.processes[rank].exitcode for rank in ranks]

    def log(self, rank: int) -> str:
        return (self.folder / "logs" / ("log.txt" if rank == 0 else f"log.txt.rank{rank}")).read_text()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def start(tmp_path_factory, forks) -> Iterator[Callable[..., Run]]:
    runs = []

    def start(fault: str, who: int, **options) -> Run:
        runs.append(Run(forks, tmp_path_factory.mktemp("run"), fault, who, **options))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


FAULTS = [("stopped", 1), ("stopped", 0), ("stopped early", 1), ("reads", 1), ("fails", 2)]


@pytest.fixture(scope="module")
def faulty(start) -> dict[tuple[str, int], Run]:
    """A run for each of FAULTS; all wait at the same time."""
    return {fault: start(*fault) for fault in FAULTS}


@pytest.mark.parametrize("stopped", [1, 0])
def test_a_stopped_rank_is_named_and_the_others_end(faulty, stopped):
    run = faulty["stopped", stopped]
    others = [rank for rank in range(WORLD_SIZE) if rank != stopped]
    assert run.ends(*others) == [HANG_EXIT_CODE] * len(others)
    assert run.processes[stopped].exitcode is None
    pid = (run.folder / f"pid_{stopped}").read_text()
    first = min(others)  # of these, rank 0 knows best; without it each knows that rank 0 does not answer
    message = run.log(first)
    assert f"training hangs: rank {stopped} (host {socket.gethostname()}, pid {pid}) did not arrive" in message
    assert f"train.hang_timeout_seconds={TIMEOUT:g}" in message
    assert "start the same command again" in message
    assert "in all_gather_rows" in message  # the stack of the rank that waits
    assert not any(f"pid {(run.folder / f'pid_{rank}').read_text()})" in run.log(rank) for rank in others)
    if stopped != 0:
        assert f"rank {stopped} (host" in (run.folder / "status.json").read_text()


def test_a_stopped_rank_is_named_without_a_time_out_of_the_group(faulty):
    run = faulty["stopped early", 1]
    assert run.ends(0, 2) == [HANG_EXIT_CODE] * 2
    assert "training hangs: rank 1 (host" in run.log(0)
    assert "line" in run.log(0).split("Current thread")[1]  # the stacks of all threads


def test_a_rank_that_waits_for_data_is_named_and_shows_where(faulty):
    run = faulty["reads", 1]
    assert run.ends(0, 2) == [HANG_EXIT_CODE] * 2
    assert "training hangs: rank 1 (host" in run.log(0)


def test_a_rank_that_failed_does_not_keep_the_others(faulty):
    run = faulty["fails", 2]
    assert run.ends(2) == [1]
    assert run.ends(0, 1) == [HANG_EXIT_CODE] * 2
    # gloo may tell whose connection was closed, or not
    assert re.search(r"training hangs: (rank 2 \(host|a rank \(the log of rank 0 or the launcher says)", run.log(0))


def test_a_long_evaluation_and_slow_steps_are_no_hang(start):
    run, alone = start("none", -1), start("none", -1, world_size=1)
    assert run.ends(*range(WORLD_SIZE)) == [0] * WORLD_SIZE, run.log(0)
    assert "hangs" not in run.log(0)
    assert alone.ends(0) == [0], alone.log(0)


def test_a_lone_process_that_hangs_ends_with_its_stack_in_the_log(start):
    run = start("reads", 0, world_size=1)
    began = time.monotonic()
    assert run.ends(0) == [1]
    assert time.monotonic() - began > TIMEOUT
    assert re.search(r"Timeout \(0:00:03\)!\n", run.log(0))
    assert "in read_image_from_a_dead_disk" in run.log(0)

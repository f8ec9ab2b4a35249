"""The watchdog against processes that are really stopped, and its judgement against ranks that share one process."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from dinov2.distributed.watchdog import HANG_EXIT_CODE, Watchdog

TIMEOUT = 2.0  # seconds; what must not be reported gets twice that, for machines that are busy
WORLD_SIZE = 3
NOTHING_WRONG = ("patient", "rank_0_ends_first", "rank_0_ends_last", "suspended")

# One process imports torch and forks the ranks of every run, so that a test does not pay for three imports.
NURSERY = '''
import datetime, os, sys, time
from pathlib import Path

import torch.distributed as dist

from dinov2.distributed.watchdog import Watchdog


def turn(watchdog, folder, rank, seconds):
    """Steps that depend on no other rank."""
    end, step = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        watchdog.beat(step, "waiting for data")
        time.sleep(0.02)
        watchdog.beat(step, "step")
        time.sleep(0.02)
        step += 1
        if step == 20:
            (folder / f"turning_{rank}").touch()


def read_a_picture():
    time.sleep(60)


def wait_for_the_others():
    time.sleep(60)


def endless(watchdog, folder, rank, timeout):
    turn(watchdog, folder, rank, 60)


def slow_reader(watchdog, folder, rank, timeout):
    turn(watchdog, folder, rank, 0.5)
    watchdog.beat(1000, "waiting for data")
    if rank == 2:
        read_a_picture()
    watchdog.beat(1000, "step")
    wait_for_the_others()


def patient(watchdog, folder, rank, timeout):
    turn(watchdog, folder, rank, 0.5)
    watchdog.beat(1000, "evaluation" if rank == 0 else "step", patient=rank == 0)
    time.sleep(2.5 * timeout)
    watchdog.beat(1001, "waiting for data")


def rank_0_ends_first(watchdog, folder, rank, timeout):
    turn(watchdog, folder, rank, 0.5 + 0.8 * timeout * rank)


def rank_0_ends_last(watchdog, folder, rank, timeout):
    turn(watchdog, folder, rank, 0.5 + 0.8 * timeout * (2 - rank))


def suspended(watchdog, folder, rank, timeout):
    turn(watchdog, folder, rank, 3.5 * timeout)


def run(what, rank, world_size, port, timeout, folder):
    errors = os.open(folder / f"stderr_{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    (folder / f"pid_{rank}.part").write_text(str(os.getpid()))
    (folder / f"pid_{rank}.part").rename(folder / f"pid_{rank}")
    store = dist.TCPStore("127.0.0.1", port, world_size, rank == 0, datetime.timedelta(seconds=60))
    with Watchdog(store, rank, world_size, timeout) as watchdog:
        what(watchdog, folder, rank, timeout)


def fork(action, *arguments):
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = action(*arguments) or 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid


def launch(what, world_size, port, timeout, folder):
    ranks = {fork(run, what, rank, world_size, port, timeout, folder): rank for rank in range(world_size)}
    while ranks:
        pid, status = os.wait()
        part = folder / f"exit_{ranks[pid]}.part"
        part.write_text(str(os.waitstatus_to_exitcode(status)))
        part.rename(folder / f"exit_{ranks.pop(pid)}")


launchers = []
for line in sys.stdin:
    what, world_size, port, timeout, folder = line.split(maxsplit=4)
    arguments = (globals()[what], int(world_size), int(port), float(timeout), Path(folder.strip()))
    launchers.append(fork(launch, *arguments))
for pid in launchers:
    os.waitpid(pid, 0)
'''


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


class Run:
    """One run of three ranks, each a process of its own."""

    def __init__(self, nursery, what, timeout, folder):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        nursery.stdin.write(f"{what} {WORLD_SIZE} {port} {timeout} {folder}\n")
        nursery.stdin.flush()

    def pid(self, rank):
        return int((self.folder / f"pid_{rank}").read_text())

    def has_ended(self, *ranks):
        return all((self.folder / f"exit_{rank}").exists() for rank in ranks)

    def exit_code(self, rank):
        until(lambda: self.has_ended(rank))
        return int((self.folder / f"exit_{rank}").read_text())

    def stderr(self, rank):
        return (self.folder / f"stderr_{rank}").read_text(errors="replace")

    def finding(self, rank):
        """What the rank said of the hang, without the advice."""
        found = re.findall(r"training hangs: (.*?) Look at ", self.stderr(rank))
        assert len(found) == 1, self.stderr(rank)
        return found[0]

    def turns(self):
        until(lambda: all((self.folder / f"turning_{rank}").exists() for rank in range(WORLD_SIZE)))

    def end(self):
        for path in self.folder.glob("pid_?"):
            rank = path.name[-1]
            if not self.has_ended(rank):
                os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(what, timeout) -> Run"""
    # The store looks up the names of its peers; a name server that does not answer would stall it for 5 s
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RES_OPTIONS": "timeout:1 attempts:1"}
    root = Path(__file__).resolve().parents[2]
    nursery = subprocess.Popen([sys.executable, "-c", NURSERY], cwd=root, env=environment, text=True, stdin=-1)
    runs = []

    def start(what, timeout):
        runs.append(Run(nursery, what, timeout, tmp_path_factory.mktemp(what)))
        return runs[-1]

    yield start
    for run in runs:
        run.end()
    nursery.stdin.close()
    nursery.wait(20)


@pytest.fixture(scope="module", autouse=True)
def runs(start):
    """Runs that need nothing from their tests, under way while other tests go on: they mostly sleep."""
    runs = {what: start(what, 2 * TIMEOUT) for what in NOTHING_WRONG}
    runs["slow_reader"] = start("slow_reader", 2 * TIMEOUT)
    # What `scontrol suspend` and `scontrol resume` do to a job.
    job = runs["suspended"]
    job.turns()
    pids = [job.pid(rank) for rank in range(WORLD_SIZE)]
    resume = threading.Timer(3 * TIMEOUT, lambda: [os.kill(pid, signal.SIGCONT) for pid in pids])
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    resume.start()
    yield runs
    resume.join()


@pytest.mark.parametrize("stopped", [1, 0])  # rank 0 takes the store down with it
def test_stopped_process_is_named_by_all_others(start, stopped):
    run = start("endless", TIMEOUT)
    run.turns()
    os.kill(run.pid(stopped), signal.SIGSTOP)
    at = time.monotonic()
    others = [rank for rank in range(WORLD_SIZE) if rank != stopped]
    until(lambda: run.has_ended(*others))
    assert 0.5 * TIMEOUT < time.monotonic() - at < TIMEOUT + 8
    for rank in others:
        assert run.exit_code(rank) == HANG_EXIT_CODE
        finding = run.finding(rank)
        assert f"rank {stopped} (host {socket.gethostname()}, pid {run.pid(stopped)})" in finding
        assert not any(f"pid {run.pid(other)}" in finding for other in others)
        assert ("the store" in finding) == (stopped == 0)
        assert "in turn\n" in run.stderr(rank)  # the stack of the training loop
        assert "train.hang_timeout_seconds" in run.stderr(rank)
        assert "last checkpoint" in run.stderr(rank)
    run.end()


def test_rank_that_waits_for_data_is_named_and_shows_where(runs):
    run = runs["slow_reader"]
    for rank in range(WORLD_SIZE):
        assert run.exit_code(rank) == HANG_EXIT_CODE
        culprit = f'rank 2 (host {socket.gethostname()}, pid {run.pid(2)}) stands at step 1000 in "waiting for data"'
        assert run.finding(rank).startswith(culprit)
    assert "in read_a_picture" in run.stderr(2)
    assert "in wait_for_the_others" in run.stderr(0)


@pytest.fixture
def ranks():
    """ranks(n, timeout) -> (watchdogs, reports): the ranks of a run as threads of this process, not yet started."""
    made = []

    def ranks(n, timeout=0.5):
        store = dist.HashStore()
        reports = [[] for _ in range(n)]
        watchdogs = [Watchdog(store, rank, n, timeout, reports[rank].append) for rank in range(n)]
        made.extend(watchdogs)
        return watchdogs, reports

    yield ranks
    for watchdog in reversed(made):
        watchdog.close()


def stand(watchdogs, places):
    """Start, bring each rank to its step and through that step's activities, and stay at the last."""
    for watchdog in watchdogs:
        watchdog.start()
    for watchdog, (step, *activities) in zip(watchdogs, places, strict=True):
        for activity in activities:
            watchdog.beat(step, activity)


@pytest.mark.parametrize(
    ("places", "culprits"),
    [
        ([(7, "data", "step"), (6, "data", "step"), (7, "data", "step"), (7, "data")], [1]),
        ([(7, "data", "step"), (7, "data"), (7, "data")], [1, 2]),  # most wait for their data, one for them
        ([(7, "step"), (7, "checkpoint"), (7, "step"), (7, "step")], [1]),
        ([(7, "step"), (7, "checkpoint")], []),
        ([(7, "data", "log", "step"), (7, "data", "step"), (7, "data", "step")], []),
    ],
)
def test_all_ranks_name_those_that_the_others_wait_for(ranks, places, culprits):
    watchdogs, reports = ranks(len(places))
    stand(watchdogs, places)
    until(lambda: all(reports))
    for (message,) in reports:
        named, _, wait = message.partition("and the others wait")
        if culprits:
            assert sorted(re.findall(r"rank (\d+) \(", named)) == [str(rank) for rank in culprits]
        else:
            assert not wait
            same = len({place[-1] for place in places}) == 1
            where = "the same place" if same else "different places of one step"
            assert f"all {len(places)} ranks stand at {where}" in message


def test_patience_ends_with_the_activity(ranks):
    (first, second), reports = ranks(2)
    stand([first, second], [(7, "step"), (7, "step")])
    first.beat(7, "evaluation", patient=True)
    time.sleep(1.0)
    assert reports == [[], []]
    first.beat(8, "waiting for data")
    until(lambda: all(reports))
    assert "rank 1 " in reports[0][0].partition("and the others")[0]


def test_one_process_notices_its_own_standstill():
    reports = []
    with Watchdog(None, 0, 1, 0.3, reports.append) as watchdog:
        for step in range(20):
            watchdog.beat(step, "step")
            time.sleep(0.03)
        assert not reports
        until(lambda: reports)
    assert 'at step 19 in "step"' in reports[0]


def test_rank_that_failed_is_named(ranks):
    watchdogs, reports = ranks(3)
    stand(watchdogs[:2], [(7, "step"), (7, "step")])

    def save():
        with watchdogs[2]:
            watchdogs[2].beat(7, "checkpoint")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk"):
        save()
    until(lambda: all(reports[:2]))
    for (message,) in reports[:2]:
        assert "rank 2 (" in message
        assert "ended with an error" in message
        assert "rank 0 (" not in message


def test_rank_that_never_came_is_named(ranks):
    watchdogs, reports = ranks(3)
    for watchdog in watchdogs[:2]:
        watchdog.start()
    until(lambda: all(reports[:2]))
    assert "rank 2 has not started to report" in reports[0][0]


def test_ranks_that_had_finished_are_no_culprits(ranks):
    watchdogs, reports = ranks(3)
    stand(watchdogs, [(7, "data", "step"), (7, "data", "step"), (7, "data")])
    watchdogs[1].close()
    until(lambda: reports[0] and reports[2])
    assert reports[1] == []
    for (message,) in (reports[0], reports[2]):
        assert message.startswith("training hangs: rank 2 (")
        assert "Ranks that had finished: 1." in message


def test_second_watchdog_on_a_store_does_not_hear_the_first_ones(ranks):
    # Their last words, "rank 1 hangs", would end the next run at once.
    store = dist.HashStore()
    for step in range(2):
        reports = []
        both = [Watchdog(store, rank, 2, 0.4, reports.append) for rank in range(2)]
        for watchdog in both:
            watchdog.start()
        time.sleep(0.2)
        assert not reports
        if step == 0:
            until(lambda reports=reports: len(reports) == 2)
        for watchdog in reversed(both):
            watchdog.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((dist.HashStore(), 0, 2, 0.0), "hang_timeout_seconds must be above 0"),
        ((dist.HashStore(), 2, 2, 1.0), "rank must be from 0 to 1"),
        ((None, 0, 2, 1.0), "need a store"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Watchdog(*arguments)


def test_starts_once():
    watchdog = Watchdog(None, 0, 1, 5.0)
    watchdog.start()
    with pytest.raises(RuntimeError, match="starts once"):
        watchdog.start()
    watchdog.close()
    watchdog.close()


@pytest.mark.parametrize("what", NOTHING_WRONG)
def test_nothing_is_reported_when_nothing_is_wrong(runs, what):
    run = runs[what]
    for rank in range(WORLD_SIZE):
        assert run.exit_code(rank) == 0, run.stderr(rank)
        assert "hangs" not in run.stderr(rank)

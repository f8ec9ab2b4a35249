"""Notices that the training hangs, and says because of which rank.

A collective operation waits for its slowest rank. When one process is stopped, swapped out or stuck in a read from a
dead file system, all the others wait with it, without a word, until the job's time is over. Here each rank keeps two
threads beside the training loop:

- one publishes a sign of life in the process group's store (where the loop stands, and for how long) and reads the
  others' signs;
- one judges what was read. It touches no network: while the process that holds the store is stopped, calls to the
  store block for as long as that lasts, whatever time-out they were given.

Neither needs the training loop to run Python code: the loop only says where it is (`Watchdog.beat`).
"""

import faulthandler
import json
import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

logger = logging.getLogger("dinov2")

HANG_EXIT_CODE = 76  # differs from the 75 of a run that was interrupted after it had written its checkpoint
LONGEST_INTERVAL = 5.0  # seconds between two signs of life
LAST_WORDS_SECONDS = 10.0  # for the log, and again for the stacks: they may go to the file system that hangs
HURRY = 0.05  # seconds between two signs of life while others are to learn of an end
MOST_NAMED = 8  # ranks that a message describes one by one

DONE, FAILED = "done", "failed"


@dataclass(frozen=True)
class _Place:
    """Where a training loop is, and since when by this process's monotonic clock."""

    step: int
    activity: str
    patient: bool
    since: float
    nth: int = 1  # of the places that this step led it to


@dataclass(frozen=True)
class _Sign:
    """What a rank publishes. `standing` is a duration, so the hosts' clocks need not agree."""

    rank: int
    host: str
    pid: int
    pulse: int
    step: int
    activity: str
    nth: int
    patient: bool
    standing: float
    end: str = ""
    verdict: str = ""
    knows_rank_0_ended: bool = False

    @property
    def name(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def stand(self) -> str:
        where = f"at step {self.step}" if self.step >= 0 else "before its first step"
        return f'{where} in "{self.activity}" for {self.standing:.1f} s'


@dataclass(frozen=True)
class _View:
    """What the last answer of the store showed; replaced as a whole, so its reader needs no lock."""

    answered_at: float
    signs: dict[int, _Sign]
    pulse_at: dict[int, float]
    verdict_published: bool = False


def _listed(descriptions: Sequence[str]) -> str:
    more = len(descriptions) - MOST_NAMED
    return "; ".join(descriptions[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _those_behind(signs: Sequence[_Sign]) -> list[_Sign]:
    """The ranks that the others wait for; none when all stand at the same place."""
    lowest = min(sign.step for sign in signs)
    behind = [sign for sign in signs if sign.step == lowest]
    if len(behind) < len(signs):
        return behind
    ranks_at = Counter(sign.activity for sign in signs).most_common()
    if len(ranks_at) == 1:
        return []
    # How many places a rank passed in this step tells who waits for whom better than the durations, which are as
    # old as the last sign of life: a rank in "step" had its data, one still "waiting for data" is what it waits for.
    fewest = min(sign.nth for sign in signs)
    behind = [sign for sign in signs if sign.nth == fewest]
    if len(behind) < len(signs):
        return behind
    if ranks_at[0][1] > ranks_at[1][1]:
        return [sign for sign in signs if sign.activity != ranks_at[0][0]]
    return []


def _within(seconds: float, action: Callable[[], None]) -> bool:
    """Run `action` beside this thread; whether it was over in time."""
    thread = threading.Thread(target=action, name="watchdog-last-words", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def report_and_exit(message: str) -> None:
    """Log `message`, write the stacks of all threads to stderr, and end the process with HANG_EXIT_CODE.

    The process ends without cleaning up: whatever hangs would make the cleaning hang too.
    """
    # The thread that hangs may do so inside a logging handler, and then holds that handler's lock.
    logged = _within(LAST_WORDS_SECONDS, lambda: logger.error("%s", message))

    def write_stacks() -> None:
        if not logged:
            os.write(2, f"{message}\n".encode())
        faulthandler.dump_traceback(2, all_threads=True)

    _within(LAST_WORDS_SECONDS, write_stacks)
    os._exit(HANG_EXIT_CODE)


class Watchdog:
    """Calls `on_hang` once with a message when training hangs; a context manager from `start` to `close`.

    A hang is: for `timeout_seconds` no rank's step or activity has changed; or one rank's sign of life has not come
    for that long; or the store has not answered. As long as a rank is in an activity that it called `patient` and its
    signs of life go on, nobody has to move. The rank that notices tells the others, so all of them report the
    same culprit, and each shows its own stacks. Noticing takes at most two intervals of min(timeout_seconds / 4, 5 s)
    longer than `timeout_seconds`, provided that the process isn't kept from running.

    Arguments:
        store: the process group's store, or None for one process. It is used through a connection of its own. All
            ranks must create their watchdogs on one store in the same order.
        rank, world_size: of this process, and the number of processes. A single process notices its own standstill.
        timeout_seconds: > 0; math.inf never calls anything a hang. `train.hang_timeout_seconds` in the config.
        on_hang: called in a thread of the watchdog. As given, it reports and ends the process.
    """

    def __init__(
        self,
        store: dist.Store | None,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        on_hang: Callable[[str], None] = report_and_exit,
    ) -> None:
        if not timeout_seconds > 0:
            raise ValueError(f"train.hang_timeout_seconds must be above 0 s, found {timeout_seconds}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to {world_size - 1} with {world_size} processes, found {rank}")
        if store is None and world_size > 1:
            raise ValueError(f"{world_size} processes need a store to watch each other, found None")
        self.timeout_seconds = timeout_seconds
        self.interval = min(timeout_seconds / 4, LONGEST_INTERVAL)
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._on_hang = on_hang
        self._farewell_seconds = 2 * self.interval + 1  # every rank that runs has read the store by then
        self._host = socket.gethostname()
        self._place = _Place(-1, "starting", False, time.monotonic())
        self._closing = threading.Event()
        self._wake = threading.Event()  # the thread that talks to the store
        self._news = threading.Event()  # the thread that judges
        self._threads: list[threading.Thread] = []
        # Each of these is written by one thread only and read whole by the others.
        self._end = ""
        self._verdict = ""
        self._sharing = False
        self._pulse = 0
        self._attempt = 0
        self._watched_since = self._awake_at = time.monotonic()
        self._view = _View(self._watched_since, {}, {})

    def beat(self, step: int, activity: str, patient: bool = False) -> None:
        """Say where the training loop is: `step` >= 0 and what it does there, e.g. "waiting for data".

        `patient`: this may take longer than the time-out without being a hang. Saying the same again is no progress.
        Costs no more than setting a field; to be called from one thread.
        """
        now = self._place
        if (step, activity, patient) != (now.step, now.activity, now.patient):
            nth = now.nth + 1 if step == now.step else 1
            self._place = _Place(step, activity, patient, time.monotonic(), nth)

    def start(self) -> None:
        """Start to watch. Raises RuntimeError when it was started or closed before."""
        if self._threads or self._closing.is_set():
            raise RuntimeError("a Watchdog starts once; create another one to watch again")
        now = time.monotonic()
        self._place = replace(self._place, since=now)
        self._watched_since = self._awake_at = now
        self._view = _View(now, {}, {rank: now for rank in range(self._world_size) if rank != self._rank})
        if self._world_size > 1:
            self._threads.append(threading.Thread(target=self._talk, name="watchdog-store", daemon=True))
        self._threads.append(threading.Thread(target=self._watch, name="watchdog", daemon=True))
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Tell the others that this rank is done, and stop to watch.

        Rank 0, whose process may hold the store, waits until the others know or are done too, for 11 s at most.
        """
        self._leave(DONE)

    def __enter__(self) -> "Watchdog":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # sys.exit() is a way to end on purpose; after any other error the others wait in vain and should say for whom.
        self._leave(DONE if kind is None or issubclass(kind, SystemExit) else FAILED)

    def _leave(self, end: str) -> None:
        if self._closing.is_set():
            return
        self._end = end
        self._closing.set()
        self._wake.set()
        self._news.set()
        deadline = time.monotonic() + self._farewell_seconds
        for thread in self._threads:
            if thread is not threading.current_thread():  # on_hang may close
                thread.join(max(0.0, deadline - time.monotonic()))

    # The thread that talks to the store

    def _talk(self) -> None:
        client: dist.Store | None = None
        leave_by: float | None = None
        while True:
            closing = self._closing.is_set()
            if closing and leave_by is None:
                leave_by = time.monotonic() + self._farewell_seconds
            try:
                if client is None:
                    client = self._connect()
                self._exchange(client)
            except RuntimeError as error:  # torch's errors of the store are RuntimeErrors
                if closing or self._rank_0_ended():
                    return
                if not isinstance(error, dist.DistStoreError):  # more than a time-out: this connection is broken
                    client = None
            else:
                if leave_by is not None and (self._may_leave() or time.monotonic() > leave_by):
                    return
            self._news.set()
            self._wake.wait(HURRY if self._sharing or self._closing.is_set() else self.interval)
            self._wake.clear()

    def _connect(self) -> dist.Store:
        assert self._store is not None
        own_connection = self._store.clone()  # type: ignore[attr-defined,unused-ignore]  # torch 2.10's stubs lack it
        client = dist.PrefixStore("dinov2_watchdog", own_connection)
        client.set_timeout(timedelta(seconds=max(self.interval, 1.0)))
        if not self._attempt:
            self._attempt = client.add(f"watchdogs of rank {self._rank}", 1)
        return client

    def _key(self, rank: int) -> str:
        return f"{self._attempt}/{rank}"

    def _exchange(self, client: dist.Store) -> None:
        """Publish this rank's sign and read the others'."""
        self._pulse += 1
        own = self._own_sign()
        client.set(self._key(self._rank), json.dumps(asdict(own)))
        view = self._view
        ranks = [
            rank
            for rank in view.pulse_at
            if (view.signs[rank].end != DONE if rank in view.signs else client.check([self._key(rank)]))
        ]
        # Reading back the own sign last shows that it has arrived, also where nobody else is left to read.
        answers = client.multi_get([self._key(rank) for rank in (*ranks, self._rank)])
        now = time.monotonic()
        # While the store or this process did not answer, the others could not be heard: that is no silence of theirs.
        gap = now - view.answered_at
        unheard = gap if gap > 2 * self.interval else 0.0
        signs = dict(view.signs)
        pulse_at = {rank: min(now, at + unheard) for rank, at in view.pulse_at.items()}
        for rank, answer in zip(ranks, answers, strict=False):
            sign = _Sign(**json.loads(answer))
            if rank not in signs or sign.pulse != signs[rank].pulse:
                pulse_at[rank] = now
            signs[rank] = sign
        self._view = _View(now, signs, pulse_at, bool(own.verdict))

    def _may_leave(self) -> bool:
        """Whether this process, having published its end, can go without leaving the others in the dark."""
        if self._rank != 0 or self._end == FAILED:
            return True
        signs = self._view.signs
        return len(signs) == self._world_size - 1 and all(
            sign.end or sign.verdict or sign.knows_rank_0_ended for sign in signs.values()
        )

    def _rank_0_ended(self) -> bool:
        signs = self._view.signs
        return 0 in signs and signs[0].end == DONE

    def _own_sign(self) -> _Sign:
        now, place = time.monotonic(), self._place
        # When the judging thread has not run either, then not the loop stood still but the process, or its whole job.
        stopped = now - self._awake_at > 3 * self.interval
        standing = 0.0 if stopped else now - max(place.since, self._watched_since)
        return _Sign(
            rank=self._rank,
            host=self._host,
            pid=os.getpid(),
            pulse=self._pulse,
            step=place.step,
            activity=place.activity,
            nth=place.nth,
            patient=place.patient,
            standing=standing,
            end=self._end,
            verdict=self._verdict,
            knows_rank_0_ended=self._rank_0_ended(),
        )

    # The thread that judges

    def _watch(self) -> None:
        while True:
            self._news.wait(self.interval)
            self._news.clear()
            if self._closing.is_set():
                return
            now = time.monotonic()
            if now - self._awake_at > 3 * self.interval:
                # This process was stopped, as a scheduler does with a suspended job: what it last saw proves nothing.
                self._watched_since = now
            self._awake_at = now
            verdict = self._judge(now)
            if verdict:
                self._share(verdict)
                if not self._closing.is_set():
                    self._on_hang(verdict)
                return

    def _store_silence(self, now: float) -> float:
        """For how many seconds the store has not answered."""
        return now - max(self._view.answered_at, self._watched_since) if self._world_size > 1 else 0.0

    def _judge(self, now: float) -> str:
        """What is wrong, and with whom; nothing when all is well."""
        view = self._view
        for sign in view.signs.values():
            if sign.verdict:
                return sign.verdict
        own = self._own_sign()
        running = [own, *(sign for sign in view.signs.values() if sign.end != DONE)]
        store_silence = self._store_silence(now)
        if store_silence > self.timeout_seconds:
            if not self._rank_0_ended():
                return self._message_store(store_silence, own)
            running = [own]  # the store left with rank 0 when the run was over; nothing is known of the others any more
        else:
            until = max(view.answered_at, self._watched_since)
            silences = {
                rank: until - max(at, self._watched_since)
                for rank, at in view.pulse_at.items()
                if rank not in view.signs or view.signs[rank].end != DONE
            }
            lost = {rank: seconds for rank, seconds in silences.items() if seconds > self.timeout_seconds}
            if lost:
                return self._message_lost(lost)
            if len(view.signs) < len(view.pulse_at):
                return ""  # a rank that has not reported yet has not stood anywhere yet
        if any(sign.patient for sign in running) or any(sign.standing <= self.timeout_seconds for sign in running):
            return ""
        return self._message_standing(running)

    def _share(self, verdict: str) -> None:
        """Let the others know before this process ends, and with rank 0 perhaps the store."""
        self._verdict, self._sharing = verdict, True
        self._wake.set()
        deadline = time.monotonic() + self._farewell_seconds
        while not self._is_shared() and time.monotonic() < deadline and not self._closing.is_set():
            time.sleep(HURRY)
        self._sharing = False

    def _is_shared(self) -> bool:
        view, now = self._view, time.monotonic()
        if self._world_size == 1 or self._store_silence(now) > self.timeout_seconds:
            return True
        listening = [rank for rank, at in view.pulse_at.items() if now - at < self.timeout_seconds]
        return view.verdict_published and (
            self._rank != 0
            or all(view.signs[rank].verdict or view.signs[rank].end for rank in listening if rank in view.signs)
        )

    def _message_store(self, seconds: float, own: _Sign) -> str:
        holder = own if self._rank == 0 else self._view.signs.get(0)
        last = "rank 0 never reported"
        if holder:
            left = " and had ended with an error" if holder.end == FAILED else ""
            last = f"{holder.name} was last seen {holder.stand}{left}"
        return self._message(
            f"the store of the process group has not answered for {seconds:.1f} s. It lives in the process of rank 0 "
            f"or in that host's launcher, which is stopped, swapped out, dead or cut off; {last}",
            "that host and the network",
        )

    def _message_lost(self, lost: dict[int, float]) -> str:
        descriptions = []
        for rank, seconds in lost.items():
            sign = self._view.signs.get(rank)
            if sign is None:
                descriptions.append(f"rank {rank} has not started to report for {seconds:.1f} s")
            elif sign.end == FAILED:
                descriptions.append(f"{sign.name} ended with an error {seconds:.1f} s ago, at step {sign.step}")
            else:
                descriptions.append(
                    f"{sign.name} has given no sign of life for {seconds:.1f} s, when it had stood {sign.stand}"
                )
        return self._message(
            f"{_listed(descriptions)}. A process that gives no sign is stopped, swapped out, dead, or keeps Python's "
            "interpreter lock",
            "that host, its memory and that rank's log",
        )

    def _message_standing(self, running: Sequence[_Sign]) -> str:
        behind = _those_behind(running)
        if behind:
            others = [sign for sign in running if sign not in behind]
            return self._message(
                f"{_listed([f'{sign.name} stands {sign.stand}' for sign in behind])}, and the others wait for it "
                f"({len(others)} others; {others[0].name} {others[0].stand})",
                "that host and its data mount",
            )
        at = {sign.activity: f"{sign.name} {sign.stand}" for sign in running}
        if len(running) == 1:
            return self._message(
                f"{_listed([*at.values()])}. The file system, the data or the device may hang",
                "that host and its data mount",
            )
        where = "the same place" if len(at) == 1 else "different places of one step"
        return self._message(
            f"all {len(running)} ranks stand at {where}, {_listed([*at.values()])}. They called different collective "
            "operations, or the file system or the network hangs",
            "the data mount and the network",
        )

    def _message(self, finding: str, look_at: str) -> str:
        done = sorted(sign.rank for sign in self._view.signs.values() if sign.end == DONE)
        finished = f" Ranks that had finished: {', '.join(map(str, done[:MOST_NAMED]))}." if done else ""
        return (
            f"training hangs: {finding}.{finished} Look at {look_at}, and at the stacks below. "
            f"train.hang_timeout_seconds (now {self.timeout_seconds:g}) sets after how long this is a hang. "
            "The run can be resumed from its last checkpoint: start the same command again."
        )

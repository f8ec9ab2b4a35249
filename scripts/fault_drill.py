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
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import training_runs as runs

from dinov2.utils.command import REQUEUE_EXIT_CODE

ITERATIONS_PER_KILL, HANG_SECONDS = 6, 8.0
LARGEST_DISK_BYTES = 1 << 30  # a larger disk is hardly meant to be filled up
UNWRITTEN = r"checkpoint after iteration (\d+) could not be written \((.*?)\); (.*?)\. Make room"
UNFINISHED = "checkpoints/.iteration_*.tmp"
CHECKPOINT_FILES = [UNFINISHED]  # in the order in which they appear
CHECKPOINT_FILES += [f"{UNFINISHED}/{name}" for name in ("__*.distcp", ".metadata", "run.json", "check*")]


def kill_ranks(lab: runs.Lab, rng: random.Random) -> runs.Checks:
    """Kill ranks of one run again and again, half of the times while a checkpoint is written."""
    kills = lab.args.kills
    iterations = runs.ITERATIONS + ITERATIONS_PER_KILL * max(0, kills - 4)
    undisturbed = lab.undisturbed(iterations=iterations)
    run = lab.start("killed", iterations=iterations, restarts=kills + 1)
    power_cut, newest, last_kill_ns = rng.randrange(kills), list[int](), 0
    n_torn = 0  # checkpoints that a kill hit while they were written
    for number in range(kills):
        moment = round((iterations - 2 * runs.EVALUATION_PERIOD) * (number + rng.random()) / kills)
        if 2 * n_torn <= number:
            run.until_iteration(moment)
            # if no kill has hit a checkpoint yet, the machine is busy: kill as soon as the next one begins
            where = rng.choice(CHECKPOINT_FILES if n_torn or not number else CHECKPOINT_FILES[:1])
            wait_for_file(run, where)
        else:
            where = "any moment"  # from the first import to an evaluation
            wait_for_time(run, 8 * rng.random(), moment)
        if number and run.iteration >= 0:
            yield from runs.check_resumed(run, newest)
        before, ranks = list(runs.read_checkpoints(run.folder)), wait_for_ranks(run)
        rank, is_power_cut = rng.choice(sorted(ranks)), number == power_cut or run.processes == 1
        if is_power_cut:
            run.kill()
        else:
            os.kill(ranks[rank], signal.SIGKILL)
            run.until_gone(ranks.values())
        torn = runs.changed(run.folder, UNFINISHED, last_kill_ns)
        n_torn += bool(torn)
        is_whole = runs.read_checkpoints(run.folder)
        after = list(is_whole)
        is_kept = all(is_whole.values()) and len(after) >= min(runs.KEEP, len(before)) and after[-1:] >= before[-1:]
        victim = "all ranks" if is_power_cut else f"rank {rank}"
        what = (
            f"kill {number + 1}/{kills}: {victim} at iteration {max(0, run.iteration)}, {where}: checkpoints are whole"
        )
        yield what, is_kept, f"{before} before, {is_whole} after{f', torn {torn[0].name}' if torn else ''}"
        newest, last_kill_ns = after[-1:], time.time_ns()
        run.ignore_output()
        if number == kills - 1:
            shutil.copytree(run.folder, run.folder.with_name("killed_then_another_number"))
        if is_power_cut:
            run = lab.start("killed", iterations=iterations, restarts=kills + 1)
    yield from runs.check_end(run, undisturbed, newest)
    yield "kills hit checkpoints that were being written", n_torn > 0 or kills < 2, n_torn
    processes = 1 if lab.processes > 1 else 2
    other = lab.start("killed_then_another_number", processes=processes, iterations=iterations)
    yield from runs.check_end(other, undisturbed, newest, same_number=False)


def wait_for_file(run: runs.Run, pattern: str) -> None:
    now = time.time_ns()
    run.until(lambda: runs.changed(run.folder, pattern, now), pattern, pause=0.0003)


def wait_for_time(run: runs.Run, seconds: float, iteration: int) -> None:
    """Wait some seconds after the start of all ranks, or until an iteration."""
    wait_for_ranks(run)
    deadline = time.monotonic() + seconds
    run.until(lambda: time.monotonic() > deadline or run.iteration >= iteration, "a moment to kill")


def wait_for_ranks(run: runs.Run) -> dict[int, int]:
    run.until(lambda: len(run.ranks()) == run.processes, "all ranks were started", pause=0.01)
    return run.ranks()


def fill(ballast: Path) -> bool:
    """Write a file until the disk has no room left; return True."""
    with suppress(OSError), open(ballast, "ab", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    return True


@contextmanager
def small_disk(lab: runs.Lab, n_bytes: int) -> Iterator[Path]:
    """Yield an empty folder on --full-disk, or on a tmpfs of `n_bytes`.

    Raises:
        runs.Skipped: neither is possible.
    """
    given = lab.args.full_disk
    if given is not None and not n_bytes <= (free := shutil.disk_usage(given).free) <= LARGEST_DISK_BYTES:
        limits = f"{n_bytes >> 20} to {LARGEST_DISK_BYTES >> 20} MiB"
        raise runs.Skipped(f"--full-disk {given}: {free >> 20} MiB are free; give one with {limits}")
    disk = Path(tempfile.mkdtemp(dir=given or lab.folder, prefix="small_disk_"))
    if given is None:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "fault_drill", str(disk)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
            raise runs.Skipped("a tmpfs cannot be mounted here; give --full-disk FOLDER on a small disk")
    try:
        yield disk
    finally:
        lab.kill_runs(within=disk)
        if given is None:
            subprocess.run(["umount", str(disk)], check=True)
        shutil.rmtree(disk)


def fill_disk(lab: runs.Lab, rng: random.Random) -> runs.Checks:
    """Fill the disk of a run, clear it, and fill it again until the end."""
    undisturbed = lab.undisturbed()
    size = sum(path.stat().st_size for path in undisturbed.folder.rglob("*") if path.is_file())
    with small_disk(lab, 2 * size + (4 << 20)) as disk:
        run, ballast = lab.start("full_disk", disk=disk), disk / "ballast"
        run.until_iteration(2 * runs.PERIOD + rng.randrange(runs.PERIOD))
        run.until(lambda: runs.read_checkpoints(run.folder), "a checkpoint was written")
        run.until(lambda: fill(ballast) and len(run.find(UNWRITTEN)) >= 2, "two checkpoints could not be written")
        iteration, good, message = run.iteration, runs.read_checkpoints(run.folder), run.find(UNWRITTEN)[-1]
        yield "the log gives the reason", "No space left" in message[2] or "quota" in message[2], message[0]
        yield "and names the last good checkpoint", any(f"_{n:07d} is" in message[3] for n in good), message[3]
        yield from runs.check_whole("the checkpoints from before are whole", run)
        run.until(lambda: run.iteration > iteration, "training went on")
        ballast.unlink()
        run.ignore_output()
        run.until(lambda: run.find(r"checkpoint: .*iteration_\d+"), "a checkpoint was written, since there is room")
        yield from runs.check_whole("training went on, and with room the next checkpoint is written", run)

        run.until_iteration(run.iteration + rng.randrange(runs.PERIOD))
        run.until(lambda: fill(ballast) and run.process.poll() is not None, "its end", pause=0.01)
        is_reported = len(run.find("trained to the end, but its last files could not be written")) == 1
        yield "a disk that is full at the end: code 1 and a message", run.code() == 1 and is_reported, run.code()
        yield from runs.check_whole("the last good checkpoint is whole", run)
        if not lab.args.short:
            fill(ballast)
            run = lab.start("full_disk", disk=disk)
            is_refused = run.code() != 0 and bool(run.find(r"cannot write to .* \((No space left|.*quota)"))
            yield "started on a full disk: fails and says why", is_refused, f"code {run.code()}"
            yield from runs.check_whole("the last good checkpoint is still whole", run)
        ballast.unlink()
        newest = list(runs.read_checkpoints(run.folder))[-1:]
        yield from runs.check_end(lab.start("full_disk", disk=disk), undisturbed, newest)


def damage_checkpoints(lab: runs.Lab, rng: random.Random) -> runs.Checks:
    """Damage the newest three checkpoints, each in another way; the one before them is whole."""
    undisturbed, run = lab.undisturbed(), lab.start("damaged")
    run.until_iteration(runs.KEEP * runs.PERIOD + rng.randrange(runs.PERIOD))
    run.until(lambda: len(runs.read_checkpoints(run.folder)) == runs.KEEP, "four checkpoints were written")
    run.kill()
    *_, good, without_index, flipped, cut_short = sorted((run.folder / "checkpoints").glob("iteration_*"))
    (without_index / ".metadata").unlink()
    file = min(flipped.glob("__*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.truncate(max(cut_short.glob("__*.distcp")), 999)
    run = lab.start("damaged")
    yield from runs.check_end(run, undisturbed, [runs.iteration_of(good)])
    messages = run.find(r"checkpoint \S*(iteration_\d+) is damaged \((.*?)\); trying the one before")
    is_named = [message[1] for message in messages] == [path.name for path in (cut_short, flipped, without_index)]
    yield "names the damage", is_named, "; ".join(message[2] for message in messages)


def send_signals(lab: runs.Lab, rng: random.Random) -> runs.Checks:
    """Ask runs to stop: each writes a checkpoint of that step and asks for a restart."""
    for processes, number in ((1, signal.SIGUSR1), (lab.processes, signal.SIGTERM)):
        name = f"signalled_{number.name}"
        run = lab.start(name, processes=processes)
        run.until_iteration(rng.randrange(runs.ITERATIONS * 3 // 4))
        run.process.send_signal(number)  # to the process, or to torchrun, as a batch system does
        # torchrun has an exit code of its own
        is_right = run.code() == REQUEUE_EXIT_CODE if processes == 1 else run.code() != 0
        yield f"{name}: the exit code asks for a restart", is_right, run.code()
        stopped = [int(match[1]) for match in run.find(r"stopped after iteration (\d+), as asked")]
        is_whole = runs.read_checkpoints(run.folder)
        is_saved = len(stopped) == 1 and stopped == list(is_whole)[-1:] and all(is_whole.values())
        yield f"{name}: stopped once, with a checkpoint of that step", is_saved, f"{stopped}, {is_whole}"
        if number == signal.SIGTERM or not lab.args.short:
            yield from runs.check_end(lab.start(name, processes=processes), lab.undisturbed(processes), stopped)


def stop_a_rank(lab: runs.Lab, rng: random.Random) -> runs.Checks:
    """Stop a rank with SIGSTOP: the others name it, and torchrun restarts all."""
    if lab.processes == 1:
        raise runs.Skipped("needs --processes 2 or more")
    undisturbed = lab.undisturbed()
    run = lab.start("standing", f"train.hang_timeout_seconds={HANG_SECONDS}", restarts=1)
    run.until_iteration(rng.randrange(runs.PERIOD, runs.ITERATIONS * 3 // 4))
    rank, ranks = rng.randrange(lab.processes), run.ranks()
    os.kill(ranks[rank], signal.SIGSTOP)
    hangs = r"training hangs: rank (\d+) \(host .*?, pid (\d+)\)"
    message = run.until(lambda: run.find(hangs), "the others named the rank that hangs")[0]
    is_right = (int(message[1]), int(message[2])) == (rank, ranks[rank])
    yield "the others name the rank that stands still", is_right, message[0]
    run.until_gone(ranks.values())
    newest = list(runs.read_checkpoints(run.folder))[-1:]
    run.ignore_output()
    yield from runs.check_end(run, undisturbed, newest)


DRILLS: dict[str, tuple[str, Callable[[runs.Lab, random.Random], runs.Checks]]] = {
    "a": ("ranks are killed", kill_ranks),
    "b": ("the disk is full", fill_disk),
    "c": ("checkpoints are damaged", damage_checkpoints),
    "d": ("signals ask to stop", send_signals),
    "e": ("a rank stands still", stop_a_rank),
}


def run_drill(letter: str, lab: runs.Lab) -> dict[str, Any]:
    """Return the checks of a drill; its random numbers depend on the seed and its letter alone."""
    checks: list[dict[str, Any]] = []

    def note(what: str, held: bool, detail: object) -> None:
        checks.append({"what": what, "held": bool(held), "detail": str(detail)})
        print(f"[{time.strftime('%X')}] {letter}  {'ok    ' if held else 'FAILED'}  {what}  {detail}", flush=True)

    skipped = ""
    try:
        for check in DRILLS[letter][1](lab, random.Random(f"{lab.args.seed} {letter}")):
            note(*check)
    except runs.Skipped as reason:
        skipped = str(reason)
    except runs.Failed as error:
        note("the drill ran to its end", False, error)
    return {"held": all(check["held"] for check in checks), "skipped": skipped, "checks": checks}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, metavar="N", help="of drill a (default: 30, and 3 with --short)")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="of torchrun jobs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and ranks (default: %(default)s)")
    parser.add_argument("--only", default=",".join(DRILLS), metavar="a,b", help="drills to run (default: %(default)s)")
    parser.add_argument("--folder", type=Path, metavar="F", help="new folder to keep the runs in (default: none)")
    parser.add_argument("--full-disk", type=Path, metavar="F", help="folder on a small disk, which is filled up")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="drills at a time (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="three kills, and fewer variants of b and d")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for train.py, such as train.device=cuda")
    args = parser.parse_intermixed_args(argv)
    args.kills = args.kills if args.kills is not None else 3 if args.short else 30
    args.letters = [letter.strip() for letter in args.only.split(",") if letter.strip()]
    if unknown := sorted(set(args.letters) - set(DRILLS)):
        parser.error(f"--only: there is no drill {', '.join(unknown)}; there are {', '.join(DRILLS)}")
    if min(args.kills, args.processes, args.jobs) < 1:
        parser.error("--kills, --processes and --jobs must be 1 or more")
    if args.folder is not None and args.folder.is_dir() and any(args.folder.iterdir()):
        parser.error(f"--folder: {args.folder} is not empty; give a new one")
    if not Path("/proc/self/environ").is_file():
        parser.error("this needs Linux, whose /proc lists processes")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs end, too
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="fault_drill_"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lab = runs.Lab(args, folder)
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            report = dict(zip(args.letters, pool.map(partial(run_drill, lab=lab), args.letters), strict=True))
        finally:
            lab.is_over = True
            lab.kill_runs(within=Path("/"))
    for letter, drill in report.items():
        n_failed = sum(not check["held"] for check in drill["checks"])
        outcome = drill["skipped"] or f"{len(drill['checks'])} checks, {n_failed} failed"
        print(f"{letter}  {DRILLS[letter][0]}: {outcome}")
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    is_held = all(part["held"] for part in report.values())
    if is_held and args.folder is None:
        shutil.rmtree(folder)
    else:
        print(f"runs, logs and report.json are in {folder}")
    print("all held" if is_held else "FAILED: see the lines above")
    return 0 if is_held else 1


if __name__ == "__main__":
    sys.exit(main())

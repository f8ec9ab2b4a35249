"""Check this project on a GPU and measure its speed, in at most 12 minutes.

    python scripts/gpu_check.py --output gpu_report/
    python scripts/gpu_check.py --output gpu_report/ --checks environment,losses,speed_S
    python scripts/gpu_check.py --output gpu_report/ --device cpu --tiny        # tries the checks, without a GPU

  environment  GPU, driver, versions, and the attention kernel of each floating-point type
  tests        pytest -m gpu
  losses       losses and gradients of a step on the GPU in fp32, bf16 and fp16, against fp32 on the CPU
  sinkhorn     Sinkhorn-Knopp on the GPU against the CPU
  batches      images and masks of a training batch on the GPU against those on the CPU
  training     200 steps on sample cells, with kNN before and after
  resume       the second half of a run again, from its checkpoint
  extraction   images/s of a network, and of image files to features
  trace        a profile of DinoBloom's training
  speed_S ...  images/s, share of the GPU's peak, waits and memory of a step at DinoBloom's batch size, against plain.py

Each check has a process of its own. One that fails is reported, and the others follow. <output>/report.json has all
numbers, report.md has them as Markdown tables, and <check>.log has what the check printed. The exit code is 1 if
anything fell short. Goals for speed are for H100 and H200; on other GPUs the numbers are only reported.
"""

import argparse
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import gpu_checks  # noqa: E402
from gpu_checks import Outcome, Settings  # noqa: E402
from harness import table  # noqa: E402

from dinov2.utils.files import atomic_write  # noqa: E402

CHECKS: dict[str, Callable[[Settings], Outcome]] = {
    "environment": gpu_checks.check_environment,
    "tests": gpu_checks.check_tests,
    "losses": gpu_checks.check_losses,
    "sinkhorn": gpu_checks.check_sinkhorn,
    "batches": gpu_checks.check_batches,
    "training": gpu_checks.check_training,
    "resume": gpu_checks.check_resume,
    "extraction": gpu_checks.check_extraction,
    "trace": gpu_checks.check_trace,
    **{f"speed_{name}": partial(gpu_checks.check_speed, network=name) for name in gpu_checks.BATCH_SIZES},
}


def run_apart(check: Callable[[Any], Any], settings: Any, log: Path, seconds: float) -> Any:
    """Return a check's result from a process of its own, or the reason why it has none, as a string."""
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(writer, check, settings, log))
    process.start()
    writer.close()
    try:
        return reader.recv() if reader.poll(seconds) else f"it took more than {seconds:.0f} s"
    except EOFError:
        process.join()
        return f"its process ended with exit code {process.exitcode}; see {log}"
    finally:
        process.join(timeout=2)
        if process.is_alive():
            with suppress(ProcessLookupError):  # it has no group yet
                os.killpg(process.pid, signal.SIGKILL)  # data workers and pytest, too
            process.kill()
            process.join()


def _send_result(writer: Connection, check: Callable[[Any], Any], settings: Any, log: Path) -> None:
    os.setsid()
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        result = check(settings)
    except Exception as error:  # whatever it is, the report names it
        traceback.print_exc()
        result = f"{type(error).__name__}: {error}"
    writer.send(result)


def run_checks(settings: Settings, names: Sequence[str], minutes: float) -> dict[str, Outcome]:
    """Run the checks one after the other, and write the report after each; no check runs past `minutes`."""
    outcomes: dict[str, Outcome] = {}
    started = time.monotonic()
    for number, name in enumerate(names, start=1):
        begun = time.monotonic()
        left = started + 60 * minutes - begun
        log = settings.output / f"{name}.log"
        result = run_apart(CHECKS[name], settings, log, left) if left > 0 else "no time was left for it"
        outcomes[name] = result if isinstance(result, Outcome) else Outcome(problems=[result])
        outcomes[name].seconds = time.monotonic() - begun
        write_report(settings.output, outcomes)
        mean = (time.monotonic() - started) / number
        eta = max(0.0, min(mean * (len(names) - number), left - outcomes[name].seconds))
        state = "fell short" if outcomes[name].problems else "ok"
        print(f"{number}/{len(names)} {name}: {state}; about {eta:.0f} s to go", file=sys.stderr)
    return outcomes


def write_report(output: Path, outcomes: Mapping[str, Outcome]) -> None:
    """Write report.json and report.md; checks whose rows have the same columns share a table."""
    numbers = {name: asdict(outcome) for name, outcome in outcomes.items()}
    for row in (row for outcome in numbers.values() for row in outcome["rows"]):
        row |= {key: None for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    with atomic_write(output / "report.json", "w") as file:  # NaN is no JSON
        file.write(json.dumps(numbers, indent=1, allow_nan=False) + "\n")
    results = [[name, "; ".join(each.problems) or "ok", f"{each.seconds:.0f}"] for name, each in outcomes.items()]
    sections = ["# Check on a GPU", table(["check", "result", "seconds"], results)]
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for row in (row for outcome in outcomes.values() for row in outcome.rows):
        tables.setdefault(tuple(row), []).append([_text(value) for value in row.values()])
    sections += [table(header, rows) for header, rows in tables.items()]
    with atomic_write(output / "report.md", "w") as file:
        file.write("\n\n".join(sections) + "\n")


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the report, logs and sample cells")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:<n> or cpu (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, whose speed says nothing")
    parser.add_argument("--checks", default=",".join(CHECKS), metavar="A,B", help="default: all")
    parser.add_argument("--minutes", type=float, default=12, help="for all checks (default: %(default)s)")
    args = parser.parse_args(argv)
    args.checks = args.checks.split(",")
    if unknown := sorted({*args.checks} - {*CHECKS}):
        parser.error(f"--checks: {', '.join(unknown)} is unknown; choose from {', '.join(CHECKS)}")
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: PyTorch sees no GPU; --device cpu --tiny tries the checks on a CPU")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and return the exit code: 1 if anything fell short."""
    args = parse_arguments(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    outcomes = run_checks(Settings(args.output, args.device, args.tiny), args.checks, args.minutes)
    print(f"{args.output / 'report.md'} has all tables, report.json all numbers")
    problems = [f"  {name}: {problem}" for name, outcome in outcomes.items() for problem in outcome.problems]
    print("\n".join(["Fell short:", *problems]) if problems else "Nothing fell short.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

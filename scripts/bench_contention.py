"""Time training steps on a CPU beside busy processes, for several OpenMP spin counts, and write a table of images/s.

    python scripts/bench_contention.py --output docs/benchmarks/contention.md

Each spin count (GOMP_SPINCOUNT) has a process of its own. All processes take the same steps, in turns: in each round,
every process takes a step under each load, so a change of the machine's speed meets them all. A load of n is n
processes that compute without pause. Rates are those of the median step.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarking import ProcessOfItsOwn, answer_questions, machine

LIBGOMP_SPIN_COUNT = 300_000  # libgomp's own, where there are no more threads than cores
SPIN_COUNTS = (LIBGOMP_SPIN_COUNT, 100_000, 10_000, 1_000, 0)
LOADS = (0, 2, 4)
HEAD = """# Training beside other processes

Made by `{command}`:
steps of DinoBloom's recipe in fp32, changed as the command says. OpenMP threads spin for so many turns at a barrier
before they sleep. A load of n is n processes that compute without pause. Ratios are to the first row.

"""


@contextmanager
def busy_processes(n: int) -> Iterator[None]:
    """Run `n` processes that compute without pause, for the length of the block."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        time.sleep(0.5 * bool(n))  # until they have started
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def step_in_this_process(args: argparse.Namespace) -> None:
    """Answer each line `step` of the input with the seconds of a training step."""
    import torch
    from step_setup import OurStep, build_model, made_up_batch, recipe

    device = torch.device("cpu")
    cfg = recipe(device, "fp32", [f"train.batch_size_per_gpu={args.batch}", *args.overrides])
    step, batch = OurStep(build_model(cfg, device)), made_up_batch(cfg, device)

    def seconds() -> float:
        started = time.perf_counter()
        step(batch)
        return time.perf_counter() - started

    seconds()  # the first step allocates
    answer_questions({"step": seconds})


def measure(args: argparse.Namespace) -> dict[int, dict[int, list[float]]]:
    """Return the seconds of each step, by load and spin count."""
    found = {load: {count: [] for count in args.spin_counts} for load in args.loads}
    with ExitStack() as stack:
        processes = {}
        for count in args.spin_counts:
            command = ["env", "-u", "OMP_WAIT_POLICY", "-u", "KMP_BLOCKTIME", f"GOMP_SPINCOUNT={count}"]
            command += [sys.executable, __file__, "--worker", "--batch", str(args.batch), *args.overrides]
            processes[count] = stack.enter_context(ProcessOfItsOwn(command))
        for number in range(args.rounds):
            for load in args.loads:
                with busy_processes(load):
                    for count in args.spin_counts if number % 2 else reversed(args.spin_counts):
                        found[load][count].append(processes[count].ask("step"))
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    return found


def table(seconds: Mapping[int, Mapping[int, Sequence[float]]], batch: int) -> list[str]:
    """Return the lines of a Markdown table: images/s by spin count and load, and their ratio to the first count."""
    loads = list(seconds)
    lines = ["| spin count | " + " | ".join(f"load {load}: images/s" if load else "quiet: images/s" for load in loads)]
    lines = [lines[0] + " |", "|---|" + "---|" * len(loads)]
    counts = list(seconds[loads[0]])
    for count in counts:
        cells = []
        for load in loads:
            rate, first = (batch / statistics.median(seconds[load][each]) for each in (count, counts[0]))
            cells.append(f"{rate:.1f} ({rate / first:.2f}x)")
        name = f"{count:,}" + (", libgomp's own" if count == LIBGOMP_SPIN_COUNT else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="images a step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each count and load (default: %(default)s)")
    parser.add_argument("--loads", type=int, nargs="+", default=LOADS, help="busy processes (default: %(default)s)")
    parser.add_argument("--spin-counts", type=int, nargs="+", default=SPIN_COUNTS, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="Markdown file to write (default: the terminal)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse_arguments(argv)
    if args.worker:
        step_in_this_process(args)
        return
    lines = table(measure(args), args.batch)
    words = [f"--batch {args.batch} --rounds {args.rounds}", *args.overrides]
    head = HEAD.format(command=" ".join(["python scripts/bench_contention.py", *words]))
    text = "\n".join([*head.splitlines(), *lines, ""])
    text += f"\nMachine: {machine('torch')}.\n"
    if args.output is None:
        print(text)
    else:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Fuzz every format that the project reads.

    python -m tests.fuzz [--cases 20000] [--seed 0] [--only csv,parquet] [--first 0] [--keep FOLDER]

Each case is a damaged or odd input. It must be read, or refused in one sentence that names its file: without a
traceback, within 20 seconds and 2 GiB, and without changing a file outside the output folder. Exit code 0: no fault.
`--keep` writes the inputs of the faults to a folder. A case depends on the seed, its format and its number alone.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz import runner


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20000, help="of all formats together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="formats, separated by commas (default: all)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each format")
    parser.add_argument("--keep", type=Path, help="folder for the inputs of the faults")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(runner.formats())
    per_format, start, outcomes = -(-args.cases // len(names)), time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
        for name in names:
            for outcome in runner.fuzz(
                name, range(args.first, args.first + per_format), Path(folder) / "case", args.seed
            ):
                outcomes.append(outcome)
                if outcome.is_fault:
                    print(f"{name} {outcome.number}: {outcome.kind}: {outcome.detail}", flush=True)
                    if args.keep:
                        rng = random.Random(f"{args.seed} {name} {outcome.number}")
                        runner.write_case(name, rng, args.keep / f"{name}_{outcome.number}")
    print(runner.summary(outcomes))
    print(f"{time.monotonic() - start:.0f} s")
    return int(any(outcome.is_fault for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())

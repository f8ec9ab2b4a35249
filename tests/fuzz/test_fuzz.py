"""A short run of `python -m tests.fuzz`, and whether it would notice faults."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def fuzz(*options: str) -> tuple[int, str]:
    """Run the command; return its exit code and output."""
    command = [sys.executable, "-m", "tests.fuzz", *options]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    return done.returncode, done.stdout


def test_no_damaged_input_ends_in_a_traceback_or_a_hang():
    code, printed = fuzz("--cases", "1000")
    assert code == 0, printed

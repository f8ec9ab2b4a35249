"""A short run of `python -m tests.fuzz`, and whether it notices each kind of fault."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# readers with a fault each, and two without
PROGRAM = """
import os
import sys
import time
from pathlib import Path

from tests.fuzz import runner
from tests.fuzz.mutations import Format


def refuse(path):
    raise ValueError(f"{path} is odd")


def refuse_without_the_name(path):
    raise ValueError("odd")


def write_output(path):
    (path.parent / "output" / "result").write_text("done")


READERS = {
    "reads": Path.read_bytes,
    "writes output": write_output,
    "refuses": refuse,
    "no name": refuse_without_the_name,
    "wrong type": lambda path: path + 1,
    "hangs": lambda path: time.sleep(60),
    "takes memory": lambda path: bytearray(3 << 30),
    "removes a file": lambda path: (path.parent / "another_file.txt").unlink(),
    "changes the input": lambda path: path.write_text("another"),
    "is killed": lambda path: os.kill(os.getpid(), 9),
}
runner.formats = lambda: {name: Format(lambda rng: ("input.bin", b"x"), read) for name, read in READERS.items()}
runner.SECONDS, runner.ODD_FILES = 1, 0
for name in READERS:
    for outcome in runner.fuzz(name, range(2), Path(sys.argv[1])):
        print(f"{name}: {outcome.kind}, {outcome.is_fault}")
"""


def run(*arguments: str) -> tuple[int, str]:
    """Run Python in the project's folder; return its exit code and output."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500)
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def short_run():
    return run("-m", "tests.fuzz", "--cases", "800")


def test_damaged_inputs_are_read_or_refused_in_one_sentence(short_run):
    code, printed = short_run
    assert code == 0, printed


def test_each_format_has_inputs_that_are_read_and_some_that_are_refused(short_run):
    rows = [line.strip("| ").split(" | ") for line in short_run[1].splitlines() if line.startswith("| ")]
    numbers = {name: (int(n_read), int(n_refused)) for name, _, n_read, n_refused, _ in rows[1:]}
    assert len(numbers) > 15, short_run[1]
    assert all(n_read > 0 for n_read, _ in numbers.values()), numbers
    # the folder of a run is shown as far as it can be read, and what a cache has lost is packed again
    assert all(n_refused > 0 for name, (_, n_refused) in numbers.items() if name not in ("run", "cache")), numbers


def test_each_kind_of_fault_is_noticed(tmp_path):
    code, printed = run("-c", PROGRAM, str(tmp_path / "case"))
    assert code == 0, printed
    expected = {
        "reads": "read, False",
        "writes output": "read, False",
        "refuses": "refused, False",
        "no name": "message without the file, True",
        "wrong type": "traceback, True",
        "hangs": "took too long, True",
        "takes memory": "too much memory, True",
        "removes a file": "files changed, True",
        "changes the input": "files changed, True",
        "is killed": "was killed, True",
    }
    assert printed.splitlines() == [f"{name}: {kind}" for name, kind in expected.items() for _ in range(2)]

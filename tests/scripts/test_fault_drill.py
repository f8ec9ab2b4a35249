"""A short form of the fault drill, and whether it would notice a loss."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinov2.fsdp.checkpoint import Checkpointer

SCRIPTS = Path(__file__).parents[2] / "scripts"
STAGES = ("training", "training on two processes", "extraction", "fine-tuning", "packing", "preparing", "download")


@pytest.fixture
def fault_drill(monkeypatch, script):
    monkeypatch.syspath_prepend(SCRIPTS)
    return script("fault_drill")


def run_drill(folder, *options):
    """Run the command; return its report, exit code and output."""
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "fault_drill.py"), "--folder", str(folder), *options],
        env={**os.environ, "XFORMERS_DISABLED": "1"},  # it takes a second to import
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (folder / "report.json").is_file(), done.stdout[-4000:]
    return json.loads((folder / "report.json").read_text()), done.returncode, done.stdout


def failures(report):
    return [check for check in report["checks"] if not check["held"]]


@pytest.fixture(scope="module")
def short_drill(tmp_path_factory):
    return run_drill(tmp_path_factory.mktemp("drill") / "outputs", "--short", "--kills=6")


@pytest.mark.parametrize("drill", ["kills", "disks"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_loses_nothing(short_drill, stage, drill):
    report, code, _ = short_drill
    if drill == "disks" and (reason := report["no full disks because"]):
        pytest.skip(reason)
    checks = [check for check in report["checks"] if (check["stage"], check["drill"]) == (stage, drill)]
    assert not failures({"checks": checks})
    assert len(checks) >= {"kills": 5, "disks": 3}[drill]
    assert code == bool(failures(report))


def test_damaged_checkpoints_are_noticed(fault_drill, tmp_path):
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints", 3)
    for iteration in (5, 10, 15):
        checkpointer.save(iteration, {"weight": torch.ones(99)}, {})
    assert checkpointer.wait()
    assert fault_drill.read_checkpoints(tmp_path) == {5: True, 10: True, 15: True}
    file = min(checkpointer.path_of(10).glob("__*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (checkpointer.path_of(15) / ".metadata").unlink()
    assert fault_drill.read_checkpoints(tmp_path) == {5: True, 10: False, 15: False}


EXPECTED = {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("result", "codes", "is_final", "is_whole"),
    [
        (EXPECTED, [0], True, True),
        ({"a": 1}, [0], True, False),  # something is missing
        ({**EXPECTED, "a": 3}, [0], False, False),  # another content
        ({**EXPECTED, "c": 3}, [0], False, False),  # something more
        (EXPECTED, [None], False, False),  # still running
    ],
)
def test_other_results_and_processes_that_hang_are_noticed(fault_drill, result, codes, is_final, is_whole):
    assert all(held for _, held, _ in fault_drill.check_after_kill("", result, EXPECTED, codes)) == is_final
    assert all(held for _, held, _ in fault_drill.check_end("", codes, "", result, EXPECTED)) == is_whole


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_two_hundred_kills_lose_nothing(tmp_path):
    report, code, printed = run_drill(tmp_path / "outputs")
    assert code == 0, printed[-6000:]
    assert sum("all processes ended" in check["what"] for check in report["checks"]) >= 200

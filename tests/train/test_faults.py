"""Runs that are killed, stopped, starved of disk, damaged and poisoned: none is lost.

Faults from outside are those of scripts/fault_drill.py, in a short form here; its whole form is marked slow.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinov2.fsdp.checkpoint import Checkpointer
from dinov2.train.ssl_meta_arch import SSLMetaArch

DRILL = Path(__file__).parents[2] / "scripts" / "fault_drill.py"


def drill(folder: Path, *options: str) -> tuple[dict[str, dict], int, str]:
    """(report by part, exit code, what was printed)."""
    done = subprocess.run(
        [sys.executable, str(DRILL), "--folder", str(folder), *options],
        # xFormers takes a second to import, in each of some thirty processes
        env={**os.environ, "OMP_NUM_THREADS": "1", "XFORMERS_DISABLED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    report = folder / "report.json"
    assert report.is_file(), done.stdout[-4000:]
    return json.loads(report.read_text()), done.returncode, done.stdout


def failures(part: dict) -> list[str]:
    return [f"{check['what']}: {check['detail']}" for check in part["checks"] if not check["held"]]


@pytest.fixture(scope="module")
def short_drill(tmp_path_factory):
    # e first: torchrun waits half a minute for a rank that stands still before it ends it
    return drill(tmp_path_factory.mktemp("drill") / "runs", "--kills=3", "--jobs=2", "--short", "--only=e,a,b,c,d")


@pytest.mark.parametrize(
    ("part", "fewest_checks"), [("a", 12), ("b", 9), ("c", 5), ("d", 4), ("e", 5)], ids=lambda value: str(value)
)
def test_a_fault_loses_nothing(short_drill, part, fewest_checks):
    report, code, printed = short_drill
    if report[part]["skipped"]:
        pytest.skip(report[part]["skipped"])
    assert not failures(report[part]), printed[-6000:]
    assert len(report[part]["checks"]) >= fewest_checks
    assert (code == 0) == all(part["held"] for part in report.values())


def test_the_drill_would_notice_a_loss(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DRILL.parent)
    runs = importlib.import_module("training_runs")
    checkpointer = Checkpointer(tmp_path / "checkpoints", 3)
    for iteration in (5, 10, 15):
        checkpointer.save(iteration, {"weight": torch.ones(99)}, {})
    assert checkpointer.wait()
    assert runs.read_checkpoints(tmp_path) == {5: True, 10: True, 15: True}
    file = min(checkpointer.path_of(10).glob("__*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (checkpointer.path_of(15) / ".metadata").unlink()
    assert runs.read_checkpoints(tmp_path) == {5: True, 10: False, 15: False}
    ones = torch.ones(3)
    another = ones.nextafter(2 * ones)
    assert not runs.difference(({"a": ones}, {"a": ones.clone()}), 0)
    assert runs.difference(({"a": ones}, {"a": another}), 0)
    assert not runs.difference(({"a": ones}, {"a": another}), 1e-6)
    assert runs.difference(({"a": ones}, {"b": ones}), 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thirty_kills_lose_nothing(tmp_path):
    report, code, printed = drill(tmp_path / "runs", "--kills", "30")
    assert code == 0, printed[-6000:]
    kills = [check for check in report["a"]["checks"] if check["what"].startswith("kill ")]
    assert len(kills) == 30
    assert sum(", torn " in check["detail"] for check in kills) >= 10


# --- losses that are not finite, or spike ----------------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch):
    """Multiply the losses of some batches (counted from 0); returns the student's weights before each batch."""

    def do(batches: range, factor: float) -> list[torch.Tensor]:
        forward_backward, weights = SSLMetaArch.forward_backward, []

        def poisoned(self, images, teacher_temp):
            is_poisoned = len(weights) in batches
            weights.append(torch.cat([p.detach().flatten().clone() for p in self.student.parameters()]))
            losses = forward_backward(self, images, teacher_temp)
            return {name: value * factor for name, value in losses.items()} if is_poisoned else losses

        monkeypatch.setattr(SSLMetaArch, "forward_backward", poisoned)
        return weights

    return do


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training_metrics.json").read_text().splitlines()]


def log(folder: Path) -> str:
    return (folder / "logs" / "log.txt").read_text()


TWELVE_STEPS = ("optim.epochs=6", "train.saveckp_freq=1", "train.max_bad_steps_in_row=3")


def test_a_poisoned_stretch_is_passed_over(run, poison):
    weights = poison(range(6, 21), float("nan"))
    code, folder = run(*TWELVE_STEPS, "train.max_rollbacks=9")
    assert code == 0
    assert [row["iteration"] for row in rows(folder)] == list(range(12))
    assert all(row["total_loss"] is not None for row in rows(folder))
    assert log(folder).count("rolled back to iteration 6; 3 batches are skipped") == 5
    numbers = json.loads((folder / "checkpoints" / "iteration_0000012" / "run.json").read_text())
    assert (numbers["iteration"], numbers["batch_number"], numbers["rollbacks"]) == (12, 12 + 15, 5)
    assert all(torch.equal(weights[6], later) for later in weights[7:22])  # they have seen none of it
    assert not torch.equal(weights[21], weights[22])


def test_a_run_that_went_back_too_often_stops(run, poison):
    poison(range(6, 100), float("nan"))
    code, folder = run(*TWELVE_STEPS, "train.max_rollbacks=2")
    assert code == 1
    assert log(folder).count("rolled back to iteration 6") == 2
    assert "the run was rolled back 2 times. Lower optim.base_lr" in log(folder)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("train.max_rollbacks=0",), "the run was rolled back 0 times"),
        (("train.saveckp_freq=0",), "there is no earlier checkpoint to roll back to"),
    ],
)
def test_a_run_that_cannot_go_back_stops(run, poison, overrides, told):
    poison(range(6, 21), float("nan"))
    code, folder = run(*TWELVE_STEPS, *overrides)
    assert code == 1
    assert "the run stopped: iteration 8, rank 0: 3 steps in a row had losses or gradients that were not" in log(folder)
    assert told in log(folder)


def test_a_loss_that_spikes_is_skipped_and_then_gone_back_from(run, poison):
    weights = poison(range(52, 56), 20.0)
    code, folder = run("optim.epochs=30", "train.saveckp_freq=5", "train.max_bad_steps_in_row=4")
    assert code == 0
    assert [row["iteration"] for row in rows(folder)] == list(range(60))
    assert all(torch.equal(weights[52], weights[batch]) for batch in (53, 54, 55))
    assert torch.equal(weights[50], weights[56])  # of the checkpoint from before
    assert "rolled back to iteration 50; 6 batches are skipped" in log(folder)

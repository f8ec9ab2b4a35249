"""Runs that signals stop and that losses poison: none is lost. For kills see tests/scripts/test_fault_drill.py."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.command import REQUEUE_EXIT_CODE


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_ends_a_run_with_a_checkpoint_of_that_step(run, monkeypatch, number):
    forward_backward, batches = SSLMetaArch.forward_backward, []

    def signalled(self, images, teacher_temp):
        batches.append(images)
        if len(batches) == 3:
            os.kill(os.getpid(), number)
        return forward_backward(self, images, teacher_temp)

    monkeypatch.setattr(SSLMetaArch, "forward_backward", signalled)
    settings = ("optim.epochs=4", "train.saveckp_freq=4", "evaluation.eval_period_iterations=3")
    code, folder = run(*settings)
    assert code == REQUEUE_EXIT_CODE
    assert log(folder).count("stopped after iteration 3, as asked") == 1
    assert [path.name for path in (folder / "checkpoints").glob("iteration_*")] == ["iteration_0000003"]
    code, folder = run(*settings)
    assert code == 0
    assert [row["iteration"] for row in rows(folder)] == list(range(8))
    teachers = {path.parent.name for path in folder.glob("eval/training_*/teacher_checkpoint.pth")}
    assert teachers == {"training_3", "training_6", "training_8"}  # that of the third step was due when it was stopped


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

"""Checkpoints: the newest few, checked when read."""

import pytest
import torch

from dinov2.fsdp.checkpoint import Checkpointer


def fill(folder, *iterations, keep=2):
    checkpoints = Checkpointer(folder, keep)
    for iteration in iterations:
        checkpoints.save(iteration, {"weight": torch.full((3,), float(iteration))})
    return checkpoints


def test_the_newest_is_loaded_and_old_ones_go(tmp_path):
    checkpoints = fill(tmp_path, 5, 10, 100)
    assert [p.name for p in checkpoints.paths()] == ["iteration_0000010.pth", "iteration_0000100.pth"]
    assert checkpoints.load_latest()["iteration"] == 100


def test_what_a_killed_write_left_behind_is_removed(tmp_path):
    (tmp_path / ".iteration_0000005.pth.abc.tmp").write_bytes(b"half")
    fill(tmp_path, 10)
    assert [p.name for p in tmp_path.iterdir()] == ["iteration_0000010.pth"]


def test_none_in_an_empty_folder(tmp_path):
    assert Checkpointer(tmp_path / "none", 2).load_latest() is None


@pytest.mark.parametrize("damage", ["cut", "text", "other"])
def test_a_damaged_one_is_passed_over(tmp_path, damage):
    checkpoints = fill(tmp_path, 5, 10)
    newest = checkpoints.paths()[-1]
    if damage == "cut":
        newest.write_bytes(newest.read_bytes()[:100])
    elif damage == "text":
        newest.write_text("not a checkpoint")
    else:
        torch.save({"iteration": 3}, newest)
    assert checkpoints.load_latest()["iteration"] == 5


def test_nothing_readable_is_an_error_not_a_fresh_start(tmp_path):
    checkpoints = fill(tmp_path, 5)
    checkpoints.paths()[0].write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        checkpoints.load_latest()


def test_pickled_code_is_not_run(tmp_path):
    checkpoints = Checkpointer(tmp_path, 2)
    torch.save({"iteration": 1, "payload": Checkpointer}, tmp_path / "iteration_0000001.pth")
    with pytest.raises(ValueError, match="can be read"):
        checkpoints.load_latest()

"""Checkpoints: complete or not there, the newest few kept, checked when read."""

import errno
import json
import logging
import os
import pickle

import pytest
import torch

from dinov2.fsdp.checkpoint import Checkpointer, _CommittingWriter


def fill(folder, *iterations, keep=2, milestone_period=0):
    checkpoints = Checkpointer(folder, keep, milestone_period)
    for iteration in iterations:
        checkpoints.save(
            iteration, {"net": {"weight": torch.full((3,), float(iteration))}}, {"position": 4 * iteration}
        )
    assert checkpoints.wait()
    return checkpoints


def weight_of(checkpoints, path):
    tensors = {"net": {"weight": torch.zeros(3)}}
    checkpoints.load(path, tensors)
    return tensors["net"]["weight"].tolist()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_read_and_old_ones_go(tmp_path):
    checkpoints = fill(tmp_path, 5, 10, 100)
    assert names(tmp_path) == ["iteration_0000010", "iteration_0000100"]
    path, numbers = checkpoints.newest()
    assert numbers == {"iteration": 100, "position": 400}
    assert weight_of(checkpoints, path) == [100.0] * 3
    path, numbers = checkpoints.newest(before=99)
    assert numbers["iteration"] == 10


def test_milestones_stay(tmp_path):
    fill(tmp_path, *range(5, 55, 5), keep=1, milestone_period=20)
    assert names(tmp_path) == ["iteration_0000020", "iteration_0000040", "iteration_0000050"]


def test_what_is_saved_is_the_moment_of_saving(tmp_path):
    checkpoints, weight = Checkpointer(tmp_path, 2), torch.ones(100_000)
    checkpoints.save(1, {"weight": weight}, {})
    weight.zero_()  # training goes on while the file is written
    checkpoints.wait()
    restored = {"weight": torch.zeros(100_000)}
    checkpoints.load(checkpoints.path_of(1), restored)
    assert restored["weight"].min() == 1


@pytest.mark.gpu
def test_what_is_saved_on_a_gpu_loads_on_any_device(tmp_path):
    checkpoints, weight = Checkpointer(tmp_path, 2), torch.arange(100_000.0, device="cuda")
    checkpoints.save(1, {"weight": weight}, {})
    assert checkpoints.wait()
    for device in ("cpu", "cuda"):
        restored = {"weight": torch.zeros(100_000, device=device)}
        checkpoints.load(checkpoints.path_of(1), restored)
        assert restored["weight"].device.type == device
        assert torch.equal(restored["weight"].cpu(), weight.cpu())


def test_what_a_killed_write_left_behind_is_not_read_and_goes(tmp_path):
    torn = tmp_path / ".iteration_0000005.tmp"
    torn.mkdir(parents=True)
    (torn / "__0_0.distcp").write_bytes(b"half")
    assert Checkpointer(tmp_path, 2).newest() is None
    fill(tmp_path, 10)
    assert names(tmp_path) == ["iteration_0000010"]


def test_none_in_an_empty_folder(tmp_path):
    assert Checkpointer(tmp_path / "none", 2).newest() is None


def damage(path, kind):
    data = path / "__0_0.distcp"
    if kind == "cut":
        os.truncate(data, data.stat().st_size // 2)
    elif kind == "missing":
        data.unlink()
    elif kind == "one bit":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif kind == "numbers":
        (path / "run.json").write_text("{}")
    elif kind == "no checksums":
        for file in path.glob("checksums_*"):
            file.unlink()
    else:
        (path / "checksums_all.json").write_text("no json")


@pytest.mark.parametrize("kind", ["cut", "missing", "one bit", "numbers", "no checksums", "bad checksums"])
def test_a_damaged_one_is_passed_over_and_said(tmp_path, caplog, kind):
    checkpoints = fill(tmp_path, 5, 10)
    damage(tmp_path / "iteration_0000010", kind)
    with caplog.at_level(logging.WARNING, "dinov2"):
        path, numbers = checkpoints.newest()
    assert numbers["iteration"] == 5
    assert weight_of(checkpoints, path) == [5.0] * 3
    assert "iteration_0000010 is damaged" in caplog.text


@pytest.mark.parametrize(
    "text",
    ["{}", "[1]", "5", "[" * 100_000, '{"run.json": 5}', '{"run.json": {"bytes": "x", "crc32": 1}}', '{"\\u0000": 1}'],
)
def test_checksums_that_are_none_are_damage(text, tmp_path):
    checkpoints = fill(tmp_path, 5, 10)
    (tmp_path / "iteration_0000010" / "checksums_all.json").write_text(text)
    assert checkpoints.newest()[1]["iteration"] == 5


def test_what_is_no_file_is_damage_and_no_wait(tmp_path):
    checkpoints = fill(tmp_path, 5, 10)
    for name in ("checksums_all.json", "run.json"):
        file = tmp_path / "iteration_0000010" / name
        content = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        assert checkpoints.newest()[1]["iteration"] == 5
        file.unlink()
        file.write_bytes(content)
    assert checkpoints.newest()[1]["iteration"] == 10


def test_checksums_in_a_file_of_each_process_are_read(tmp_path):
    checkpoints = fill(tmp_path, 5, 10)
    newest = tmp_path / "iteration_0000010"
    sums = json.loads((newest / "checksums_all.json").read_text())
    (newest / "checksums_0.json").write_text(json.dumps({"__0_0.distcp": sums.pop("__0_0.distcp")}))
    (newest / "checksums_all.json").write_text(json.dumps(sums))
    assert checkpoints.newest()[1]["iteration"] == 10
    damage(newest, "one bit")
    assert checkpoints.newest()[1]["iteration"] == 5


def test_nothing_readable_is_an_error_not_a_fresh_start(tmp_path):
    checkpoints = fill(tmp_path, 5)
    damage(tmp_path / "iteration_0000005", "cut")
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        checkpoints.newest()


def test_those_after_the_one_gone_on_from_no_longer_count(tmp_path):
    checkpoints = fill(tmp_path, 5, 10)
    checkpoints.set_aside_after(5)
    assert [path.name for path in checkpoints.paths()] == ["iteration_0000005"]
    assert any(name.startswith("unused_iteration_0000010") for name in names(tmp_path))
    fill(tmp_path, 7, keep=1)
    assert [path.name for path in checkpoints.paths()] == ["iteration_0000007"]


def test_a_checkpoint_written_again_replaces_the_first(tmp_path):
    checkpoints = fill(tmp_path, 5)
    checkpoints.save(5, {"net": {"weight": torch.zeros(3)}}, {})
    checkpoints.wait()
    assert weight_of(checkpoints, checkpoints.path_of(5)) == [0.0] * 3
    assert names(tmp_path) == ["iteration_0000005"]


@pytest.mark.parametrize("step", ["write_data", "finish"])
def test_a_write_that_fails_leaves_the_last_good_one_and_says_so(tmp_path, monkeypatch, caplog, step):
    checkpoints = fill(tmp_path, 5)

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, "dinov2"):
        patch.setattr(_CommittingWriter, step, refuse)
        checkpoints.save(10, {"net": {"weight": torch.ones(3)}}, {})
        assert not checkpoints.wait()
    assert "could not be written" in caplog.text
    assert "No space left" in caplog.text
    assert "iteration_0000005 is the last good one" in caplog.text
    assert checkpoints.newest()[1]["iteration"] == 5
    checkpoints.save(15, {"net": {"weight": torch.ones(3)}}, {})
    assert checkpoints.wait()
    assert names(tmp_path) == ["iteration_0000005", "iteration_0000015"]


@pytest.mark.parametrize("tensors", [{"net": {"weight": torch.zeros(4)}}, {"net": {"bias": torch.zeros(3)}}])
def test_other_names_and_shapes_are_errors(tmp_path, tensors):
    checkpoints = fill(tmp_path, 5)
    with pytest.raises(ValueError, match=r"iteration_0000005: .*(weight|bias)"):
        checkpoints.load(checkpoints.path_of(5), tensors)


def test_a_changed_metadata_file_is_not_unpickled(tmp_path):
    checkpoints = fill(tmp_path, 5)
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    (tmp_path / "iteration_0000005" / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="can be read"):
        checkpoints.newest()
    assert not marker.exists()


def test_the_numbers_are_plain_json(tmp_path):
    fill(tmp_path, 5)
    assert json.loads((tmp_path / "iteration_0000005" / "run.json").read_text()) == {"iteration": 5, "position": 20}

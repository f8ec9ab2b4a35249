"""Two ranks of a process group: rank 0 packs, and both read."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from dinov2.data import cache as cache_module
from dinov2.data.cache import PackedCache
from dinov2.data.datasets.decode import UnreadableImageError, decode_image, resize_image
from dinov2.data.datasets.sources import ImageSource

SIZE = 16


def fail(*_) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def build(rank: int, folder: str, pipe, event: str) -> None:
    """Build on one rank; rank 1 is told to stop, or rank 0 finds the disk full, as `event` says."""
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
    cache_module.IMAGES_PER_ROUND = 4
    images = ImageSource.from_root(Path(folder) / "images")
    decoded, read = [], images.read
    images.read = lambda i: decoded.append(i) or read(i)
    cache = PackedCache(Path(folder) / "cache", images, SIZE)
    if event == "full" and rank == 0:
        os.fsync = fail
    try:
        summary = cache.build(n_workers=0, should_stop=lambda: event == "stop" and rank == 1)
        packed = []
        for i in range(len(images)):
            try:
                packed.append(cache.fetch(i).sum())
            except (UnreadableImageError, KeyError):
                packed.append(-1)
        pipe.send((summary, decoded, packed))
    except ValueError as error:
        pipe.send(error)
    dist.destroy_process_group()


@pytest.fixture
def run(tmp_path, make_image, forks):
    """Builds with two ranks; what each of them says."""
    for i in range(15):
        make_image(tmp_path / "images" / f"{i:02d}.png", i)
    (tmp_path / "images" / "15.png").write_bytes(b"no image")

    def start(event: str = "") -> list:
        (tmp_path / "group").unlink(missing_ok=True)
        pipes = [forks.Pipe() for _ in range(2)]
        ranks = [
            forks.Process(target=build, args=(rank, str(tmp_path), pipe, event)) for rank, (_, pipe) in enumerate(pipes)
        ]
        for rank in ranks:
            rank.start()
        said = [ours.recv() if ours.poll(120) else None for ours, _ in pipes]
        for rank in ranks:
            rank.join(5)
        return said

    return start


def test_one_rank_packs_and_both_read_the_same(run, tmp_path):
    (summary, first, packed), (also, second, same) = run()
    assert (summary, packed) == (also, same)
    assert (summary.n_packed, summary.n_unreadable, summary.is_complete) == (15, 1, True)
    assert (sorted(first), second) == (list(range(16)), [])  # each once
    expected = [resize_image(decode_image(tmp_path / "images" / f"{i:02d}.png"), SIZE).sum() for i in range(15)]
    np.testing.assert_array_equal(packed, [*expected, -1])


def test_a_signal_to_one_rank_stops_all_and_what_is_packed_stays(run):
    (summary, *_), (also, *_) = run("stop")
    assert not summary.is_complete
    assert not also.is_complete
    assert 0 < summary.n_packed < 15
    (again, first, _), (_, second, _) = run()
    assert (again.n_packed, again.is_complete) == (15 - summary.n_packed, True)
    assert len(first) == 16 - summary.n_packed
    assert second == []


def test_an_error_of_the_rank_that_packs_ends_all(run):
    assert all(isinstance(said, ValueError) and "No space left" in str(said) for said in run("full"))

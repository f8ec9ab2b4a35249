"""Builders that are killed, and several at once: in processes of their own, with real signals."""

import os
import signal
from collections import Counter

import numpy as np
import pytest

from dinov2.data.cache import PackedCache
from dinov2.data.datasets.decode import decode_image, resize_image

SIZE = 16
ROUND = 4


def check_whole(cache: PackedCache, images) -> None:
    """All pixels are right, all checksums too, and there is nothing to do."""
    for i in range(len(images)):
        expected = resize_image(decode_image(images.path(i)), SIZE)
        np.testing.assert_array_equal(cache.fetch(i), expected.permute(1, 2, 0))
    assert cache.verify() == (len(images), [])
    assert len(cache.plan().todo) == 0


def reads(log) -> list[int]:
    return [int(line.split()[1]) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.parametrize("n_read", [1, ROUND + 2, 2 * ROUND + 1])
def test_a_killed_build_loses_one_round_and_the_next_one_goes_on(tmp_path, folder, start_builder, until, n_read):
    images = folder(10)
    builder = start_builder(images, seconds=0.02)
    until(lambda: len(reads(builder.log)) >= n_read)
    os.kill(builder.pid, signal.SIGKILL)
    until(lambda: not builder.is_alive())
    n_finished = (len(reads(builder.log)) - 1) // ROUND * ROUND  # of which all images but the last were packed for sure

    cache = PackedCache(tmp_path / "cache", images, SIZE)
    n_bytes = cache.pixels_file.stat().st_size
    assert len(cache.plan().todo) <= len(images) - n_finished
    summary = cache.build(n_workers=0)
    assert summary.n_there >= n_finished
    assert summary.n_there + summary.n_packed == len(images)
    assert cache.pixels_file.stat().st_size == n_bytes  # the killed build's records are used
    check_whole(cache, images)


@pytest.mark.parametrize(
    ("die_in", "n_there"),
    [("fsync", 0), ("entries", 0), ("release", ROUND)],
    ids=["before the pixels are on the disk", "before the entries are written", "before the lock is given back"],
)
def test_a_build_killed_while_it_finishes_a_round_leaves_all_of_it_or_nothing(
    tmp_path, folder, start_builder, until, die_in, n_there
):
    images = folder(6)
    builder = start_builder(images, die_in=die_in)
    until(lambda: not builder.is_alive())
    cache = PackedCache(tmp_path / "cache", images, SIZE)
    assert cache.pixels_file.exists()  # it had begun
    summary = cache.build(n_workers=0)
    assert (summary.n_there, summary.n_packed) == (n_there, len(images) - n_there)
    check_whole(cache, images)


def test_builders_at_once_do_no_work_twice(tmp_path, folder, start_builder):
    images = folder(12)
    builders = [start_builder(images, seconds=0.02) for _ in range(3)]
    done = [builder.end() for builder in builders]
    assert sorted(done) == [[0, 12], [12, 0], [12, 0]]
    assert Counter(reads(builders[0].log)) == Counter(range(len(images)))  # each once
    check_whole(PackedCache(tmp_path / "cache", images, SIZE), images)


def test_a_builder_that_waits_takes_over_what_a_killed_one_leaves(tmp_path, folder, start_builder, until):
    images = folder(ROUND)
    slow = start_builder(images, seconds=30)
    until(lambda: reads(slow.log))
    waiting = start_builder(images)
    until(lambda: waiting.says("waiting for it"))
    os.kill(slow.pid, signal.SIGKILL)
    assert waiting.end() == [0, ROUND]
    check_whole(PackedCache(tmp_path / "cache", images, SIZE), images)


def test_a_builder_that_waits_can_be_stopped(tmp_path, folder, start_builder, until):
    images = folder(ROUND)
    slow = start_builder(images, seconds=30)
    until(lambda: reads(slow.log))
    asked = []
    cache = PackedCache(tmp_path / "cache", images, SIZE)
    summary = cache.build(n_workers=0, should_stop=lambda: asked.append(1) or len(asked) > 20)
    assert (summary.n_packed, summary.is_complete) == (0, False)
    os.kill(slow.pid, signal.SIGKILL)


def test_two_datasets_are_packed_into_one_folder_one_after_the_other(tmp_path, folder, start_builder):
    images = folder(9)
    first, second = (type(images)(images.paths[part]) for part in (slice(0, 6), slice(3, 9)))
    builders = [start_builder(part, seconds=0.02) for part in (first, second)]
    assert sum(builder.end()[1] for builder in builders) == 9  # those that both list are packed once
    for part in (first, second, images):
        cache = PackedCache(tmp_path / "cache", part, SIZE)
        for i in range(len(part)):
            expected = resize_image(decode_image(part.path(i)), SIZE)
            np.testing.assert_array_equal(cache.fetch(i), expected.permute(1, 2, 0))

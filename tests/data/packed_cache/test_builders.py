"""Builders that are killed, and several at once: in processes of their own, with real signals."""

import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dinov2.data.datasets.decode import decode_image, resize_image
from dinov2.data.packed_cache import PackedCache

SIZE = 16
ROWS = 4


def check_whole(cache: PackedCache, pictures) -> None:
    """All pixels are right, each picture is stored once, and nothing else is in the folder."""
    for i in range(len(pictures)):
        expected = resize_image(decode_image(pictures.path(i)), SIZE)
        np.testing.assert_array_equal(cache.fetch(i), expected.permute(1, 2, 0))
    keys = np.concatenate([shard.entries["key"] for shard in cache._store.shards])
    assert len(keys) == len(np.unique(keys)) == len(pictures)
    files = [name for name in os.listdir(cache.folder) if name not in ("locks", "in_use")]
    names = {shard.name for shard in cache._store.shards}
    assert sorted(files) == sorted(f"{name}.{ending}" for name in names for ending in ("index", "pixels"))


def reads(log) -> list[int]:
    return [int(line.split()[1]) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.parametrize("n_read", [1, ROWS + 2, 2 * ROWS + 1])
def test_a_killed_build_loses_what_it_had_in_work_and_the_next_one_goes_on(
    tmp_path, folder, start_builder, until, n_read
):
    pictures = folder(10)
    builder = start_builder(pictures, seconds=0.02)
    until(lambda: len(reads(builder.log)) >= n_read)
    os.kill(builder.pid, signal.SIGKILL)
    until(lambda: not builder.is_alive())
    n_finished = (len(reads(builder.log)) - 1) // ROWS * ROWS  # of which all pictures but the last were packed for sure

    cache = PackedCache(tmp_path / "cache", pictures, SIZE)
    assert len(cache.missing_or_stale()) <= len(pictures) - n_finished
    assert list(cache.folder.glob(".*.tmp"))  # what was in work
    summary = cache.build(n_workers=0)
    assert summary.n_there >= n_finished
    assert summary.n_there + summary.n_packed == len(pictures)
    check_whole(cache, pictures)


@pytest.mark.parametrize(
    ("die_in", "n_there"),
    [("fsync", 0), ("index", 0), ("release", ROWS)],
    ids=["before the pixels are renamed", "before the index is renamed", "before the lock is given back"],
)
def test_a_build_killed_while_it_finishes_a_shard_leaves_all_of_it_or_nothing(
    tmp_path, folder, start_builder, until, die_in, n_there
):
    pictures = folder(6)
    builder = start_builder(pictures, die_in=die_in)
    until(lambda: not builder.is_alive())
    cache = PackedCache(tmp_path / "cache", pictures, SIZE)
    assert os.listdir(cache.folder / "locks")  # it had begun
    summary = cache.build(n_workers=0)
    assert (summary.n_there, summary.n_packed) == (n_there, len(pictures) - n_there)
    check_whole(cache, pictures)


def test_builders_at_once_share_the_work(tmp_path, folder, start_builder):
    pictures = folder(24)
    builders = [start_builder(pictures, seconds=0.02) for _ in range(3)]
    packed = [builder.end()[1] for builder in builders]
    assert sum(packed) == len(pictures)
    assert sum(n > 0 for n in packed) > 1
    assert Counter(reads(builders[0].log)) == Counter(range(len(pictures)))  # each once
    cache = PackedCache(tmp_path / "cache", pictures, SIZE)
    assert len(cache.missing_or_stale()) == 0
    check_whole(cache, pictures)


def test_what_a_killed_builder_had_in_work_is_taken_over_by_one_that_waits_for_it(
    tmp_path, folder, start_builder, until
):
    pictures = folder(ROWS)  # one part
    slow = start_builder(pictures, seconds=30)
    until(lambda: reads(slow.log))
    waiting = start_builder(pictures)
    until(lambda: waiting.says("waiting for them"))
    os.kill(slow.pid, signal.SIGKILL)
    assert waiting.end() == [0, ROWS]
    check_whole(PackedCache(tmp_path / "cache", pictures, SIZE), pictures)


def test_what_another_builder_has_in_work_is_not_removed(tmp_path, folder, start_builder, until):
    pictures = folder(3 * ROWS)
    slow = start_builder(pictures, seconds=0.1)
    until(lambda: reads(slow.log))
    cache = PackedCache(tmp_path / "cache", pictures, SIZE)
    summary = cache.build(n_workers=0)  # which looks for what killed builders left
    assert summary.n_packed + slow.end()[1] == len(pictures)
    check_whole(cache, pictures)


@pytest.mark.skipif(not os.path.exists("/proc/locks"), reason="needs the list of locks that Linux shows")
def test_superseded_shards_stay_while_another_process_has_them_open(
    tmp_path, folder, start_builder, until, make_picture
):
    pictures = folder(2)
    cache = PackedCache(tmp_path / "cache", pictures, SIZE)
    cache.build(n_workers=0)
    (old,) = cache._store.shards
    reader = start_builder(pictures, die_in="hold")
    until(lambda: is_locked(reader.pid, cache.folder / "in_use"))
    for i, path in enumerate(pictures.paths):
        make_picture(Path(path), 100 + i, (31, 32))
    cache.build(n_workers=0)
    assert cache._store.pixels(old.name).is_file()
    os.kill(reader.pid, signal.SIGKILL)
    until(lambda: not reader.is_alive())
    cache.build(n_workers=0)
    assert not cache._store.pixels(old.name).exists()
    check_whole(cache, pictures)


def is_locked(pid: int, file) -> bool:
    inode = os.stat(file).st_ino
    with open("/proc/locks") as locks:
        return any(line.split()[4] == str(pid) and line.split()[5].endswith(f":{inode}") for line in locks)

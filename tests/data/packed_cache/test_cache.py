"""What `PackedCache` gives, when it packs again, and what it does where disk, files or memory fail."""

import errno
import logging
import os
import pickle
import subprocess
from collections import namedtuple
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from dinov2.data.datasets.decode import UnreadableImageError, decode_image, resize_image
from dinov2.data.datasets.pictures import Pictures
from dinov2.data.packed_cache import PackedCache, shards
from dinov2.data.packed_cache.worker import Workers

SIZE = 16
ROWS = 4


def uncached(path: str, size: int = SIZE, fit: str = "crop") -> np.ndarray:
    return resize_image(decode_image(path), size, fit).permute(1, 2, 0).numpy()


@pytest.fixture
def open_cache(tmp_path):
    return lambda pictures, size=SIZE, fit="crop": PackedCache(tmp_path / "cache", pictures, size, fit)


@pytest.fixture
def built(open_cache, folder):
    """A cache of ten pictures in three shards, and these pictures."""
    pictures = folder(10)
    cache = open_cache(pictures)
    cache.build(n_workers=0)
    return cache, pictures


def files_of(cache: PackedCache) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in cache.folder.iterdir() if file.is_file()}


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_pixels_are_those_without_a_cache(open_cache, folder, fit):
    pictures = folder(6)
    cache = open_cache(pictures, SIZE, fit)
    cache.build(n_workers=0)
    assert cache.folder.name.startswith(f"{SIZE}-{fit}-v")
    for i, path in enumerate(pictures.paths):
        np.testing.assert_array_equal(cache.fetch(i), uncached(path, SIZE, fit))


def test_what_is_fetched_is_a_view_of_the_file_that_nobody_can_write_to(built):
    cache, _ = built
    assert np.shares_memory(cache.fetch(3), cache.fetch(3))
    with pytest.raises(ValueError, match="read-only"):
        cache.fetch(3)[0, 0] = 0


def test_worker_processes_give_the_same_pixels(tmp_path, make_picture, open_cache):
    for i in range(9):
        make_picture(tmp_path / "pictures" / f"Zelle ß {i}.png", i)
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    pictures = Pictures.from_root(tmp_path / "pictures")
    cache = open_cache(pictures)
    summary = cache.build(n_workers=2)
    broken = str(tmp_path / "pictures" / "broken.png")
    assert (summary.n_packed, summary.examples) == (9, [(broken, "not a known picture format")])
    for i in range(len(pictures)):
        if pictures.path(i) == broken:
            with pytest.raises(UnreadableImageError):
                cache.fetch(i)
        else:
            np.testing.assert_array_equal(cache.fetch(i), uncached(pictures.path(i)))
    with ProcessPoolExecutor(
        1, get_context("forkserver")
    ) as pool:  # as a loader's worker that is not a fork of this one
        np.testing.assert_array_equal(pool.submit(cache.fetch, 4).result(), cache.fetch(4))


def test_a_copy_for_a_worker_is_small_and_reads_the_same(built):
    cache, pictures = built
    cache.fetch(0)
    data = pickle.dumps(cache)
    assert len(data) < 10_000
    copy = pickle.loads(data)
    np.testing.assert_array_equal(copy.fetch(7), uncached(pictures.paths[7]))
    # what is sent to workers moves to shared memory, and its old place is freed
    assert not np.shares_memory(cache.__getstate__()["location"].numpy(), cache._row_of)
    assert cache.__getstate__()["location"] is cache.__getstate__()["location"]  # one for all workers


def test_a_batch_is_copied_and_unreadable_pictures_are_named(open_cache, folder):
    pictures = folder(8)
    Path(pictures.paths[5]).write_bytes(b"")
    cache = open_cache(pictures)
    cache.build(n_workers=0)
    out = np.full((4, SIZE, SIZE, 3), 7, dtype=np.uint8)
    unreadable = cache.copy_into(np.array([6, 5, 0, 6]), out)
    for row, i in {0: 6, 2: 0, 3: 6}.items():
        np.testing.assert_array_equal(out[row], uncached(pictures.paths[i]))
    assert (out[1] == 7).all()
    assert {row: (error.path, error.reason) for row, error in unreadable.items()} == {
        1: (pictures.paths[5], "the file is empty")
    }


def test_what_is_not_packed_is_an_error_that_says_what_to_do(open_cache, folder):
    pictures = folder(2)
    cache = open_cache(pictures)
    with pytest.raises(KeyError, match=r"00\.png.*pack_dataset\.py"):
        cache.fetch(0)
    with pytest.raises(KeyError, match=r"01\.png"):
        cache.copy_into([1], np.empty((1, SIZE, SIZE, 3), np.uint8))
    assert not cache.folder.exists()


def test_building_again_reads_no_picture_and_writes_nothing(built, open_cache):
    cache, pictures = built
    before, pictures.n_reads = files_of(cache), 0
    again = open_cache(pictures)
    summary = again.build(n_workers=0)
    assert (summary.n_there, summary.n_packed, summary.is_complete) == (10, 0, True)
    assert pictures.n_reads == 0
    assert files_of(again) == before


def test_only_what_changed_is_packed_again(built, open_cache, make_picture):
    _, pictures = built
    make_picture(Path(pictures.paths[1]), 50, (33, 30))  # another picture
    Path(pictures.paths[4]).write_bytes(Path(pictures.paths[4]).read_bytes()[:200])  # truncated
    os.unlink(pictures.paths[8])
    time = os.stat(pictures.paths[9]).st_mtime_ns
    make_picture(Path(pictures.paths[9]), 51)
    os.utime(pictures.paths[9], ns=(time, time + 1))  # the same size, a little later
    pictures.paths.insert(0, str(make_picture(Path(pictures.paths[0]).with_name("new.png"), 52)))
    cache = open_cache(pictures)
    assert cache.missing_or_stale().tolist() == [0, 2, 5, 10]
    pictures.n_reads = 0
    summary = cache.build(n_workers=0)
    n_decoded = pictures.n_reads - 1  # one was asked why it is gone
    assert (summary.n_there, summary.n_packed, summary.n_unreadable, n_decoded) == (6, 3, 2, 4)
    for i in set(range(11)) - {5, 9}:
        np.testing.assert_array_equal(cache.fetch(i), uncached(pictures.paths[i]))
    for i in (5, 9):
        with pytest.raises(UnreadableImageError) as raised:
            cache.fetch(i)
        with pytest.raises(UnreadableImageError) as without_cache:
            decode_image(pictures.paths[i])
        assert (raised.value.path, raised.value.reason) == (without_cache.value.path, without_cache.value.reason)
    assert len(cache.missing_or_stale()) == 0  # what is on record as unreadable is not tried again

    make_picture(Path(pictures.paths[9]), 8)  # another with its name
    cache.build(n_workers=0)
    np.testing.assert_array_equal(cache.fetch(9), uncached(pictures.paths[9]))


def test_a_disk_that_was_not_there_for_a_while_costs_no_packing(built, open_cache):
    _, pictures = built
    folder = Path(pictures.paths[0]).parent
    pictures.paths.append(pictures.paths[2])  # listed twice
    away = folder.rename(folder.with_name("away"))
    cache = open_cache(pictures)
    summary = cache.build(n_workers=0)
    assert (summary.n_there, summary.n_packed, summary.n_unreadable) == (0, 0, 10)
    for i in (0, 10):
        with pytest.raises(UnreadableImageError, match="No such file"):
            cache.fetch(i)
        with pytest.raises(UnreadableImageError, match="No such file"):
            pickle.loads(pickle.dumps(cache)).fetch(i)
    away.rename(folder)
    with pytest.raises(UnreadableImageError, match="was not there when the packed cache was built"):
        cache.fetch(0)
    cache.build(n_workers=0)
    np.testing.assert_array_equal(cache.fetch(10), uncached(pictures.paths[2]))
    assert open_cache(pictures).build(n_workers=0).n_there == 10


def test_a_file_that_vanishes_during_the_build_is_unreadable(open_cache, folder, monkeypatch):
    pictures = folder(5)
    cache = open_cache(pictures)
    read = pictures.read

    def remove_another(i):
        Path(pictures.paths[3]).unlink(missing_ok=True)
        return read(i)

    monkeypatch.setattr(pictures, "read", remove_another)
    summary = cache.build(n_workers=0)
    assert (summary.n_packed, summary.n_unreadable, summary.is_complete) == (4, 1, True)
    with pytest.raises(UnreadableImageError, match="No such file"):
        cache.fetch(3)


def test_the_open_cache_gives_what_was_packed_until_it_is_built_again(built, make_picture):
    cache, pictures = built
    old = uncached(pictures.paths[0])
    make_picture(Path(pictures.paths[0]), 60, (40, 40))
    np.testing.assert_array_equal(cache.fetch(0), old)
    cache.build(n_workers=0)
    np.testing.assert_array_equal(cache.fetch(0), uncached(pictures.paths[0]))


def test_shards_without_a_picture_that_counts_are_removed(built, open_cache, make_picture):
    cache, pictures = built
    before = set(files_of(cache))
    for i in range(ROWS):  # all of the first shard
        make_picture(Path(pictures.paths[i]), 70 + i, (22, 21))
    make_picture(Path(pictures.paths[ROWS]), 80, (22, 21))  # one of the second
    cache.build(n_workers=0)
    assert len(before - set(files_of(cache))) == 2  # pixels and index of the first
    for i in range(10):
        np.testing.assert_array_equal(cache.fetch(i), uncached(pictures.paths[i]))


def test_a_failure_of_the_file_system_is_tried_again_by_the_next_build(open_cache, folder, monkeypatch):
    pictures = folder(3)
    read = pictures.read

    def fail(i):
        if i != 1:
            return read(i)
        raise UnreadableImageError(pictures.path(i), "Input/output error") from OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(pictures, "read", fail)
    cache = open_cache(pictures)
    assert cache.build(n_workers=0).n_unreadable == 1
    before = files_of(cache)
    assert cache.build(n_workers=0).n_unreadable == 1
    assert files_of(cache) == before  # nothing new to say
    monkeypatch.undo()
    cache = open_cache(pictures)
    assert cache.build(n_workers=0).n_unreadable == 0
    np.testing.assert_array_equal(cache.fetch(1), uncached(pictures.paths[1]))


def test_a_picture_that_is_listed_twice_is_packed_once(open_cache, folder):
    pictures = folder(3)
    pictures.paths += pictures.paths[::-1]
    cache = open_cache(pictures)
    assert cache.build(n_workers=0).n_packed == 3
    for i, path in enumerate(pictures.paths):
        np.testing.assert_array_equal(cache.fetch(i), uncached(path))


def test_sizes_and_fits_and_data_sets_lie_beside_one_another(built, open_cache, folder):
    cache, pictures = built
    larger, padded = open_cache(pictures, 20), open_cache(pictures, SIZE, "pad")
    assert larger.build(n_workers=0).n_packed == padded.build(n_workers=0).n_packed == 10
    pictures.paths = pictures.paths[7:2:-1]  # another data set with some of the same pictures
    part = open_cache(pictures)
    assert (part.build(n_workers=0).n_there, part._store.superseded()) == (5, set())
    np.testing.assert_array_equal(part.fetch(0), uncached(pictures.paths[0]))
    np.testing.assert_array_equal(cache.fetch(7), uncached(pictures.paths[0]))


def test_pixels_of_another_version_are_not_used(built, open_cache, monkeypatch):
    cache, pictures = built
    monkeypatch.setattr("dinov2.data.packed_cache.cache.PIXEL_VERSION", shards.PIXEL_VERSION + 1)
    after = open_cache(pictures)
    assert after.build(n_workers=0).n_packed == 10
    assert len(files_of(cache)) == len(files_of(after))


def test_paths_of_all_kinds(open_cache, tmp_path, make_picture, folder):
    names = ["Zelle ä.png", "細胞.png", "a b'c\".png", "new\nline.png", os.fsdecode(b"latin-\xe4.png")]
    paths = [make_picture(tmp_path / "pictures" / f"{i}.png", i) for i in range(len(names))]
    paths = [path.rename(path.with_name(name)) for path, name in zip(paths, names, strict=True)]

    pictures = folder(0)
    pictures.paths = [str(path) for path in paths]
    cache = open_cache(pictures)
    assert cache.build(n_workers=0).n_packed == len(names)
    for i, path in enumerate(paths):
        np.testing.assert_array_equal(cache.fetch(i), uncached(str(path)))


@pytest.mark.parametrize("damage", ["truncated pixels", "no pixels", "truncated index", "flipped index", "empty index"])
def test_a_damaged_shard_counts_as_missing_and_is_made_again(built, open_cache, caplog, damage):
    cache, pictures = built
    shard = cache._store.shards[1]
    pixels, index = cache._store.pixels(shard.name), cache.folder / f"{shard.name}.index"
    if damage == "truncated pixels":
        os.truncate(pixels, 100)
    elif damage == "no pixels":
        pixels.unlink()
    elif damage == "flipped index":
        flip(index, 70)
    else:
        os.truncate(index, 0 if damage == "empty index" else 60)
    with caplog.at_level(logging.WARNING):
        after = open_cache(pictures)
    assert shard.name in caplog.text
    assert len(after.missing_or_stale()) == len(shard.entries)
    after.build(n_workers=0)
    for i, path in enumerate(pictures.paths):
        np.testing.assert_array_equal(after.fetch(i), uncached(path))
    assert not index.exists()
    assert not pixels.exists()


def test_a_shard_that_is_truncated_after_it_was_opened_is_an_error(built):
    cache, _ = built
    name, _ = cache._shards[int(cache._shard_of[0])]
    os.truncate(cache._store.pixels(name), 50)
    with pytest.raises(FileNotFoundError, match="truncated while it was in use"):
        cache.fetch(0)
    cache._store.pixels(name).unlink()
    with pytest.raises(FileNotFoundError, match="removed while it was in use"):
        cache.fetch(0)


def test_verify_finds_a_flipped_byte_and_drops_the_shard(built, open_cache, caplog):
    cache, pictures = built
    assert (cache.verify().n_checked, cache.verify().damaged) == (10, [])
    shard = max(cache._store.shards, key=lambda shard: shard.n_rows)
    flip(cache._store.pixels(shard.name), 2 * SIZE * SIZE * 3 + 5)
    result = open_cache(pictures).verify()
    (damage,) = result.damaged
    assert (damage.shard, damage.n_pictures, result.are_removed) == (shard.name, 1, True)
    (picture,) = damage.examples
    assert shard.entries["key"][2] == cache._keys[pictures.paths.index(picture)]
    after = open_cache(pictures)
    assert len(after.missing_or_stale()) == len(shard.entries)
    after.build(n_workers=0)
    assert after.verify().damaged == []


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def test_too_little_room_is_seen_before_anything_is_written(open_cache, folder, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10000, 4000, 6000))
    cache = open_cache(folder(10))
    with pytest.raises(ValueError, match=r"10 pictures of 16 x 16.*need 0\.0 MiB.*cache.*0\.0 MiB are free.*make room"):
        cache.build(n_workers=0)
    assert not cache.folder.parent.exists()


@pytest.mark.parametrize("where", ["posix_fallocate", "pwrite"])
def test_a_disk_that_becomes_full_leaves_what_was_finished(open_cache, folder, monkeypatch, where):
    pictures = folder(10)
    cache = open_cache(pictures)
    real, calls = getattr(os, where), []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > (2 if where == "posix_fallocate" else 2 * ROWS + 1):  # in the third shard
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, where, full)
    with pytest.raises(ValueError, match=r"became full.*make room.*same command"):
        cache.build(n_workers=0)
    assert not list(cache.folder.glob(".*"))
    monkeypatch.undo()
    monkeypatch.setattr(shards, "ROWS_OF_A_SHARD", ROWS)
    again = open_cache(pictures)
    summary = again.build(n_workers=0)
    assert (summary.n_there, summary.n_packed) == (2 * ROWS, 10 - 2 * ROWS)
    assert again.verify().damaged == []


def test_a_really_full_disk(tmp_path, folder):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = 128  # 48 KiB a picture
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot make a small file system here")
    try:
        pictures = folder(10)
        cache = PackedCache(disk / "cache", pictures, size)
        (disk / "ballast").write_bytes(bytes(150_000))
        with pytest.raises(ValueError, match=r"need 0\.5 MiB"):
            cache.build(n_workers=0)
        cache._check_room = lambda plan: None  # as if others had filled it after the look
        with pytest.raises(ValueError, match="became full"):
            cache.build(n_workers=0)
        assert not list(cache.folder.glob(".*"))
        (disk / "ballast").unlink()
        again = PackedCache(disk / "cache", pictures, size)
        summary = again.build(n_workers=0)
        assert (summary.n_there, summary.n_packed) == (ROWS, 10 - ROWS)
        assert again.verify().damaged == []
        del cache, again
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_cache_of_somebody_else_can_be_read_and_not_completed(built, open_cache, make_picture, monkeypatch):
    cache, pictures = built
    real = os.open

    def read_only(path, flags, *arguments, **keywords):
        if flags & (os.O_RDWR | os.O_WRONLY) and str(path).startswith(str(cache.folder)):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, flags, *arguments, **keywords)

    monkeypatch.setattr(os, "open", read_only)
    again = open_cache(pictures)
    assert again.build(n_workers=0).n_there == 10
    make_picture(Path(pictures.paths[0]), 90, (25, 25))
    with pytest.raises(PermissionError, match="where pictures are missing"):
        again.build(n_workers=0)


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path, folder):
    (tmp_path / "taken").write_text("")
    with pytest.raises(NotADirectoryError, match="taken.* is a file"):
        PackedCache(tmp_path / "taken", folder(1), SIZE).build(n_workers=0)


def test_a_worker_that_dies_is_explained_and_leaves_nothing_in_work(open_cache, folder, monkeypatch):
    signals = []

    def die(_, batch):
        signals.extend(received)
        future = Future()
        future.set_exception(BrokenProcessPool())
        return future

    monkeypatch.setattr(Workers, "submit", die)
    cache = open_cache(folder(3))
    received = []
    with pytest.raises(ValueError, match=r"want of memory.*fewer --workers"):
        cache.build(n_workers=0)
    assert not list(cache.folder.glob(".*"))
    received = ["to all processes"]  # the signal that stops the build
    assert not cache.build(n_workers=0, should_stop=lambda: bool(signals)).is_complete


def test_a_build_that_is_told_to_stop_keeps_what_was_finished(open_cache, folder):
    pictures = folder(10)
    cache = open_cache(pictures)
    summary = cache.build(n_workers=0, should_stop=lambda: pictures.n_reads > ROWS)
    assert (summary.n_packed, summary.is_complete) == (ROWS, False)
    assert not list(cache.folder.glob(".*"))
    summary = open_cache(pictures).build(n_workers=0)
    assert (summary.n_there, summary.n_packed, summary.is_complete) == (ROWS, 10 - ROWS, True)


def test_without_locks_builders_still_finish(open_cache, folder, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    pictures = folder(6)
    cache = open_cache(pictures)
    cache.folder.mkdir(parents=True)
    in_work = cache.folder / ".0123.4567.pixels.tmp"
    in_work.touch()
    assert cache.build(n_workers=0).n_packed == 6
    assert in_work.exists()  # its builder may be alive


def test_processes_that_build_together_look_at_a_share_of_the_sources_each(open_cache, folder, monkeypatch):
    pictures = folder(5)
    cache = open_cache(pictures)
    looked = []
    stamp = pictures.stamp
    monkeypatch.setattr(pictures, "stamp", lambda i: looked.append(i) or stamp(i))
    shares = []
    monkeypatch.setattr("dinov2.data.packed_cache.cache.get_world_size", lambda: 2)
    monkeypatch.setattr("dinov2.data.packed_cache.cache.all_gather_objects", lambda own: shares.append(own) or shares)
    monkeypatch.setattr("dinov2.data.packed_cache.cache.get_rank", lambda: 0)
    with pytest.raises(ValueError, match="zip"):  # the other has not come yet
        cache.look_at_sources(together=True)
    monkeypatch.setattr("dinov2.data.packed_cache.cache.get_rank", lambda: 1)
    stamps = cache.look_at_sources(together=True)
    assert sorted(looked) == list(range(5))
    np.testing.assert_array_equal(stamps, [stamp(i) for i in range(5)])

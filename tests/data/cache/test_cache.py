"""What `PackedCache` gives, when it packs again, and what it does where disk, files or memory fail."""

import errno
import logging
import os
import pickle
import subprocess
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from dinov2.data import cache as cache_module
from dinov2.data.cache import ENTRY, UNREADABLE, PackedCache
from dinov2.data.datasets.decode import UnreadableImageError, decode_image, resize_image
from dinov2.data.datasets.sources import ImageSource

SIZE = 16
ROUND = 4


def uncached(path: str, size: int = SIZE, fit: str = "crop") -> np.ndarray:
    return resize_image(decode_image(path), size, fit).permute(1, 2, 0).numpy()


@pytest.fixture
def open_cache(tmp_path):
    return lambda images, size=SIZE, fit="crop": PackedCache(tmp_path / "cache", images, size, fit)


@pytest.fixture
def built(open_cache, folder):
    """A cache of ten images, and these images."""
    images = folder(10)
    cache = open_cache(images)
    cache.build(n_workers=0)
    return cache, images


def contents(cache: PackedCache) -> tuple[bytes, bytes]:
    return cache.entries_file.read_bytes(), cache.pixels_file.read_bytes()


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_pixels_are_those_without_a_cache(open_cache, folder, fit):
    images = folder(6)
    cache = open_cache(images, SIZE, fit)
    cache.build(n_workers=0)
    assert cache.folder.name.startswith(f"{SIZE}-{fit}-v")
    for i, path in enumerate(images.paths):
        np.testing.assert_array_equal(cache.fetch(i), uncached(path, SIZE, fit))


def test_what_is_fetched_is_a_view_of_the_file_that_nobody_can_write_to(built):
    cache, _ = built
    assert np.shares_memory(cache.fetch(3), cache.fetch(3))
    with pytest.raises(ValueError, match="read-only"):
        cache.fetch(3)[0, 0] = 0


def test_worker_processes_give_the_same_pixels(tmp_path, make_image, open_cache):
    for i in range(9):
        make_image(tmp_path / "images" / f"Zelle ß {i}.png", i)
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    images = ImageSource.from_root(tmp_path / "images")
    cache = open_cache(images)
    summary = cache.build(n_workers=2)
    broken = str(tmp_path / "images" / "broken.png")
    assert (summary.n_packed, summary.examples) == (9, [(broken, "not a known image format")])
    for i in range(len(images)):
        if images.path(i) == broken:
            with pytest.raises(UnreadableImageError):
                cache.fetch(i)
        else:
            np.testing.assert_array_equal(cache.fetch(i), uncached(images.path(i)))
    # as a loader's worker that is not a fork of this process
    with ProcessPoolExecutor(1, get_context("forkserver")) as pool:
        np.testing.assert_array_equal(pool.submit(cache.fetch, 4).result(), cache.fetch(4))


def test_a_copy_for_a_worker_is_small_and_reads_the_same(built):
    cache, images = built
    cache.fetch(0)
    data = pickle.dumps(cache)
    assert len(data) < 10_000
    np.testing.assert_array_equal(pickle.loads(data).fetch(7), uncached(images.paths[7]))


def test_what_is_not_packed_is_an_error_that_says_what_to_do(open_cache, folder):
    cache = open_cache(folder(2))
    with pytest.raises(KeyError, match=r"00\.png.*pack_dataset\.py"):
        cache.fetch(0)
    assert not cache.folder.exists()


def test_building_again_reads_no_image_and_writes_nothing(built, open_cache):
    cache, images = built
    before, images.n_reads = contents(cache), 0
    again = open_cache(images)
    summary = again.build(n_workers=0)
    assert (summary.n_there, summary.n_packed, summary.is_complete) == (10, 0, True)
    assert images.n_reads == 0
    assert contents(again) == before


def test_only_what_changed_is_packed_again(built, open_cache, make_image):
    _, images = built
    make_image(Path(images.paths[1]), 50, (33, 30))  # another image
    Path(images.paths[4]).write_bytes(Path(images.paths[4]).read_bytes()[:200])  # truncated
    os.unlink(images.paths[8])
    time = os.stat(images.paths[9]).st_mtime_ns
    make_image(Path(images.paths[9]), 51)
    os.utime(images.paths[9], ns=(time, time + 1))  # the same size, a little later
    images.paths.insert(0, str(make_image(Path(images.paths[0]).with_name("new.png"), 52)))
    cache = open_cache(images)
    assert cache.plan().todo.tolist() == [0, 2, 5, 10]
    images.n_reads = 0
    summary = cache.build(n_workers=0)
    assert (summary.n_there, summary.n_packed, summary.n_unreadable, images.n_reads) == (6, 3, 2, 4)
    for i in set(range(11)) - {5, 9}:
        np.testing.assert_array_equal(cache.fetch(i), uncached(images.paths[i]))
    for i in (5, 9):
        with pytest.raises(UnreadableImageError) as raised:
            cache.fetch(i)
        with pytest.raises(UnreadableImageError) as without_cache:
            decode_image(images.paths[i])
        assert (raised.value.path, raised.value.reason) == (without_cache.value.path, without_cache.value.reason)
    assert len(cache.plan().todo) == 0  # what is on record as unreadable is not tried again

    make_image(Path(images.paths[9]), 8)  # another with its name
    cache.build(n_workers=0)
    np.testing.assert_array_equal(cache.fetch(9), uncached(images.paths[9]))


def test_a_disk_that_was_not_there_for_a_while_costs_no_packing(built, open_cache):
    _, images = built
    folder = Path(images.paths[0]).parent
    images.paths.append(images.paths[2])  # listed twice
    away = folder.rename(folder.with_name("away"))
    cache = open_cache(images)
    summary = cache.build(n_workers=0)
    assert (summary.n_there, summary.n_packed, summary.n_unreadable) == (0, 0, 10)
    for copy in (cache, pickle.loads(pickle.dumps(cache))):
        for i in (0, 10):
            with pytest.raises(UnreadableImageError, match="No such file"):
                copy.fetch(i)
    away.rename(folder)
    cache.build(n_workers=0)
    np.testing.assert_array_equal(cache.fetch(10), uncached(images.paths[2]))
    assert open_cache(images).build(n_workers=0).n_there == 10


def test_a_file_that_vanishes_during_the_build_is_unreadable(open_cache, folder, monkeypatch):
    images = folder(5)
    cache = open_cache(images)
    read = images.read

    def remove_another(i):
        Path(images.paths[3]).unlink(missing_ok=True)
        return read(i)

    monkeypatch.setattr(images, "read", remove_another)
    summary = cache.build(n_workers=0)
    assert (summary.n_packed, summary.n_unreadable, summary.is_complete) == (4, 1, True)
    with pytest.raises(UnreadableImageError, match="No such file"):
        cache.fetch(3)


def test_an_open_cache_gives_what_was_packed_until_it_is_opened_again(built, open_cache, make_image):
    reader, images = built
    old = uncached(images.paths[0])
    make_image(Path(images.paths[0]), 60, (40, 40))
    cache = open_cache(images)
    cache.build(n_workers=0)
    np.testing.assert_array_equal(reader.fetch(0), old)
    np.testing.assert_array_equal(cache.fetch(0), uncached(images.paths[0]))


def test_the_latest_record_of_an_image_counts_whatever_is_damaged(built, open_cache, make_image):
    cache, images = built
    make_image(Path(images.paths[5]), 61, (22, 21))
    flip(cache.pixels_file, 5)  # of the first record
    assert cache.verify()[1] == [images.paths[0]]
    only = type(images)(images.paths[5:6])
    open_cache(only).build(n_workers=0)
    assert open_cache(images).build(n_workers=0).n_packed == 1
    for opened in (open_cache(images), open_cache(only)):
        assert len(opened.plan().todo) == 0
        for i, path in enumerate(opened.source.paths):
            np.testing.assert_array_equal(opened.fetch(i), uncached(path))


def test_a_failure_of_the_file_system_is_tried_again_by_the_next_build(built, open_cache, make_image, monkeypatch):
    _, images = built
    read = images.read
    make_image(Path(images.paths[1]), 62, (22, 21))

    def fail(i):
        if i != 1:
            return read(i)
        raise UnreadableImageError(images.path(i), "Input/output error") from OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(images, "read", fail)
    for _ in range(2):
        cache = open_cache(images)
        assert cache.build(n_workers=0).n_unreadable == 1
        with pytest.raises(UnreadableImageError, match="Input/output error"):  # and not the older pixels
            cache.fetch(1)
    monkeypatch.undo()
    cache = open_cache(images)
    assert cache.build(n_workers=0).n_unreadable == 0
    np.testing.assert_array_equal(cache.fetch(1), uncached(images.paths[1]))


def test_an_image_that_is_listed_twice_is_packed_once(open_cache, folder):
    images = folder(3)
    images.paths += images.paths[::-1]
    cache = open_cache(images)
    assert cache.build(n_workers=0).n_packed == 3
    for i, path in enumerate(images.paths):
        np.testing.assert_array_equal(cache.fetch(i), uncached(path))


def test_sizes_and_fits_and_datasets_lie_beside_one_another(built, open_cache):
    cache, images = built
    larger, padded = open_cache(images, 20), open_cache(images, SIZE, "pad")
    assert larger.build(n_workers=0).n_packed == padded.build(n_workers=0).n_packed == 10
    images.paths = images.paths[7:2:-1]  # another dataset with some of the same images
    part = open_cache(images)
    assert part.build(n_workers=0).n_there == 5
    np.testing.assert_array_equal(part.fetch(0), uncached(images.paths[0]))
    np.testing.assert_array_equal(cache.fetch(7), uncached(images.paths[0]))


def test_pixels_of_another_version_are_not_used(built, open_cache, monkeypatch):
    _, images = built
    monkeypatch.setattr(cache_module, "VERSION", cache_module.VERSION + 1)
    assert open_cache(images).build(n_workers=0).n_packed == 10


def test_paths_of_all_kinds(open_cache, tmp_path, make_image, folder):
    names = ["Zelle ä.png", "細胞.png", "a b'c\".png", "new\nline.png", os.fsdecode(b"latin-\xe4.png")]
    paths = [make_image(tmp_path / "images" / f"{i}.png", i) for i in range(len(names))]
    paths = [path.rename(path.with_name(name)) for path, name in zip(paths, names, strict=True)]

    images = folder(0)
    images.paths = [str(path) for path in paths]
    cache = open_cache(images)
    assert cache.build(n_workers=0).n_packed == len(names)
    for i, path in enumerate(paths):
        np.testing.assert_array_equal(cache.fetch(i), uncached(str(path)))


@pytest.mark.parametrize(
    ("damage", "n_lost"),
    [("cut pixels", 4), ("no pixels", 10), ("cut entries", 4), ("no entries", 10), ("empty entries", 10)],
)
def test_what_is_cut_off_counts_as_missing_and_is_packed_again(built, open_cache, caplog, damage, n_lost):
    cache, images = built
    file = cache.pixels_file if "pixels" in damage else cache.entries_file
    if damage.startswith("no"):
        file.unlink()
    else:
        record = SIZE * SIZE * 3 if "pixels" in damage else ENTRY.itemsize
        os.truncate(file, 0 if damage.startswith("empty") else 6 * record + 5)
    with caplog.at_level(logging.WARNING):
        after = open_cache(images)
    assert ("lacks 4 records" in caplog.text) == (damage == "cut pixels")
    assert len(after.plan().todo) == n_lost
    part = open_cache(type(images)(images.paths[:7]))
    part.build(n_workers=0)  # after which the files have some of their length again
    assert len(open_cache(images).plan().todo) == 3
    after.build(n_workers=0)
    for i, path in enumerate(images.paths):
        np.testing.assert_array_equal(after.fetch(i), uncached(path))
    assert after.verify() == (10, [])


def test_a_file_that_is_cut_after_it_was_opened_is_an_error(built):
    cache, _ = built
    os.truncate(cache.pixels_file, 50)
    with pytest.raises(FileNotFoundError, match="cut while in use"):
        cache.fetch(0)


@pytest.mark.parametrize("where", ["pixels", "key", "reason"])
def test_verify_finds_a_flipped_bit_and_drops_the_record(built, open_cache, caplog, where):
    cache, images = built
    Path(images.paths[2]).write_bytes(b"no image")
    cache.build(n_workers=0)
    assert cache.verify() == (11, [])
    row = int(cache._rows[2 if where == "reason" else 3])
    if where == "key":
        flip(cache.entries_file, row * ENTRY.itemsize + 3)
    else:
        flip(cache.pixels_file, row * SIZE * SIZE * 3 + 5)
    opened = open_cache(images)
    n_checked, damaged = opened.verify()
    assert n_checked == 11
    assert damaged == [f"record {row}" if where == "key" else images.paths[2 if where == "reason" else 3]]
    assert damaged[0] in caplog.text
    assert len(open_cache(images).plan().todo) == 1
    opened.build(n_workers=0)
    assert opened.verify() == (11, [])
    np.testing.assert_array_equal(opened.fetch(3), uncached(images.paths[3]))


def test_too_little_space_is_seen_before_anything_is_written(open_cache, folder, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10000, 4000, 6000))
    cache = open_cache(folder(10))
    with pytest.raises(ValueError, match=r"10 images of 16 x 16.*need 8\.1 KiB.*cache.*5\.9 KiB are free.*make room"):
        cache.build(n_workers=0)
    assert not cache.folder.parent.exists()


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_disk_that_becomes_full_leaves_what_was_packed(tmp_path, open_cache, folder, n_workers):
    images = folder(10)
    limit = 2 * ROUND * SIZE * SIZE * 3  # of the file, as a disk that is full in the third round
    with pytest.raises(ValueError, match=r"No space left.*what was packed stays.*make room.*same command"):
        FullDisk(tmp_path / "cache", images, SIZE, limit).build(n_workers=n_workers)
    again = open_cache(images)
    summary = again.build(n_workers=0)
    assert summary.n_there + summary.n_packed == 10
    assert summary.n_there == 2 * ROUND
    assert again.verify() == (10, [])


class FullDisk(PackedCache):
    def __init__(self, folder, images, size, limit):
        super().__init__(folder, images, size)
        self.limit = limit

    def _pack_image(self, job):
        if (job[1] + 1) * self.record_bytes > self.limit:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super()._pack_image(job)


def test_a_really_full_disk(tmp_path, folder, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = 128  # 48 KiB an image
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot make a small file system here")
    try:
        images = folder(10)
        cache = PackedCache(disk / "cache", images, size)
        (disk / "ballast").write_bytes(bytes(150_000))
        with pytest.raises(ValueError, match=r"need 0\.47 MiB"):
            cache.build(n_workers=0)
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 0, 10**9))  # others fill it after the look
        with pytest.raises(ValueError, match=r"No space left.*make room"):
            cache.build(n_workers=0)
        (disk / "ballast").unlink()
        again = PackedCache(disk / "cache", images, size)
        summary = again.build(n_workers=0)
        assert (summary.n_there, summary.n_packed) == (ROUND, 10 - ROUND)
        assert again.verify() == (10, [])
        del cache, again
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_cache_of_somebody_else_can_be_read_and_not_completed(built, open_cache, make_image, monkeypatch):
    cache, images = built
    real = os.open

    def read_only(path, flags, *arguments, **keywords):
        if flags & (os.O_RDWR | os.O_WRONLY) and str(path).startswith(str(cache.folder)):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, flags, *arguments, **keywords)

    monkeypatch.setattr(os, "open", read_only)
    again = open_cache(images)
    assert again.build(n_workers=0).n_there == 10
    make_image(Path(images.paths[0]), 90, (25, 25))
    with pytest.raises(ValueError, match=r"cannot write to .*Permission denied.*get write access"):
        again.build(n_workers=0)


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path, folder):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*taken.*Not a directory.*choose another folder"):
        PackedCache(tmp_path / "taken", folder(1), SIZE).build(n_workers=0)


class Deadly(PackedCache):
    def _pack_image(self, job):
        if job[0] == 5:
            os._exit(9)
        return super()._pack_image(job)


def test_a_worker_that_dies_is_explained_and_what_was_packed_stays(tmp_path, open_cache, folder):
    images = folder(8)
    with pytest.raises(ValueError, match=r"lack of memory.*same command.*fewer workers"):
        Deadly(tmp_path / "cache", images, SIZE).build(n_workers=2)
    again = open_cache(images)
    assert again.build(n_workers=0).n_there == ROUND
    assert again.verify() == (8, [])


def test_a_build_that_is_told_to_stop_keeps_what_was_packed(open_cache, folder):
    images = folder(10)
    summary = open_cache(images).build(n_workers=0, should_stop=lambda: images.n_reads > ROUND + 1)
    assert (summary.n_packed, summary.is_complete) == (ROUND + 1, False)
    summary = open_cache(images).build(n_workers=0)
    assert (summary.n_there, summary.n_packed, summary.is_complete) == (ROUND + 1, 9 - ROUND, True)


def test_unreadable_images_keep_their_reason_for_the_next_start(open_cache, folder):
    images = folder(3)
    Path(images.paths[1]).write_bytes(b"")
    open_cache(images).build(n_workers=0)
    images.n_reads = 0
    cache = open_cache(images)
    summary = cache.build(n_workers=0)
    assert (summary.n_unreadable, summary.examples) == (1, [(images.paths[1], "the file is empty")])
    assert images.n_reads == 0
    assert (cache._entries["status"] == UNREADABLE).sum() == 1
    with pytest.raises(UnreadableImageError, match="the file is empty"):
        pickle.loads(pickle.dumps(cache)).fetch(1)


def test_squares_of_another_centre_are_never_served(tmp_path, open_cache, folder):
    images = folder(3)
    open_cache(images).build(n_workers=0)
    smaller = PackedCache(tmp_path / "cache", images, SIZE, "crop", 0.65)
    assert (smaller.folder.name, len(smaller.plan().todo)) == (f"{SIZE}-crop-0.65-v{cache_module.VERSION}", 3)
    smaller.build(n_workers=0)
    assert len(PackedCache(tmp_path / "cache", images, SIZE, "crop", 0.66).plan().todo) == 3
    whole = PackedCache(tmp_path / "cache", images, SIZE, "crop", 1.0)
    assert len(whole.plan().todo) == 0
    for i, path in enumerate(images.paths):
        expected = resize_image(decode_image(path), SIZE, center_crop=0.65).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(smaller.fetch(i), expected)
        np.testing.assert_array_equal(whole.fetch(i), uncached(path))

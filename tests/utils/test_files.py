"""Files are whole or not there."""

import errno
import hashlib
import os
import socket
import stat

import pytest
import torch

from dinov2.utils.files import atomic_write, check_regular_file, file_sha256


def test_a_block_that_raises_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")

    def write_half():
        with atomic_write(path, "w") as file:
            file.write("half of the n")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_finished_block_replaces_the_file_with_usual_rights(tmp_path):
    path = tmp_path / "new" / "weights.pth"
    with atomic_write(path) as file:
        file.write(b"\x00\x01")
        assert not path.exists()
    assert path.read_bytes() == b"\x00\x01"
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_the_checksum_of_a_folder_is_that_of_its_files(tmp_path):
    for folder, name, content in (("a", "x", b"1"), ("b", "x", b"1"), ("c", "y", b"1"), ("d", "x", b"2")):
        (tmp_path / folder / "inner").mkdir(parents=True)
        (tmp_path / folder / "inner" / name).write_bytes(content)
    sums = [file_sha256(tmp_path / folder) for folder in "abcd"]
    assert sums[0] == sums[1]
    assert len(set(sums)) == 3


def test_file_sha256(tmp_path):
    content = bytes(range(256)) * 10_000  # more than one block
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_regular_file_passes(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "link.csv").symlink_to("a.csv")
    assert check_regular_file(str(tmp_path / "a.csv")) == tmp_path / "a.csv"
    assert check_regular_file(tmp_path / "link.csv") == tmp_path / "link.csv"


def test_what_is_no_regular_file_is_named_at_once_and_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    (tmp_path / "empty").touch()
    (tmp_path / "loop").symlink_to("loop")
    for path, kind in [
        (tmp_path / "pipe", "is a named pipe, not a file"),
        (tmp_path / "socket", "is a socket"),
        (tmp_path, "is a folder"),
        ("/dev/zero", "is a device"),
        (tmp_path / "empty", "is empty"),
        ("/proc/self/status", "is empty"),
        ("a\0b", "is no name of a file"),
    ]:
        with pytest.raises(ValueError, match=kind) as caught:
            check_regular_file(path, "--features")
        assert repr(path) in str(caught.value) if kind.startswith("is no") else str(path) in str(caught.value)
    with pytest.raises(FileNotFoundError, match="--features: .*gone: no such file"):
        check_regular_file(tmp_path / "gone", "--features")
    with pytest.raises(OSError, match="symbolic links"):
        check_regular_file(tmp_path / "loop")


def test_a_full_disk_under_torch_save_names_the_file(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(b"before")

    def save():
        with open("/dev/full", "wb") as full, atomic_write(path) as file:
            os.dup2(full.fileno(), file.fileno())
            torch.save({"a": torch.zeros(1_000_000)}, file)

    with pytest.raises(OSError, match="No space left on device") as raised:
        save()
    assert raised.value.filename == str(path)
    assert path.read_bytes() == b"before"
    assert [each.name for each in tmp_path.iterdir()] == ["a.pth"]


def test_a_folder_or_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="is a folder or a device"), atomic_write(path) as file:
            file.write(b"x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["pipe"]
    assert not (tmp_path / "pipe").is_file()


def test_an_error_of_the_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"a\.txt") as caught, atomic_write(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == []

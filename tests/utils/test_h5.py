"""HDF5 files: odd datasets are refused, none takes memory that its bytes cannot fill, and no lock is needed."""

import errno
import fcntl
import os

import h5py
import numpy as np
import pytest

from dinov2.utils.command import error_text
from dinov2.utils.h5 import open_h5, read_numbers, read_texts, write_attribute, write_texts

TEXTS = ["Größe", os.fsdecode(b"f\xfcr.png"), ""]


def read(path, name="x", dims=(2,), kinds="fiu"):
    with open_h5(path, "features") as file:
        return read_numbers(file, name, dims, kinds)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.h5"


def test_texts_keep_bytes_that_are_no_utf8(path):
    with h5py.File(path, "w") as file:
        write_texts(file, "names", TEXTS)
        write_texts(file, "none", [])
        write_attribute(file, "checkpoint", TEXTS[1])
        file["fixed"] = np.array([b"ab", b"c"])
    with open_h5(path, "features") as file:
        assert read_texts(file, "names") == TEXTS
        assert read_texts(file, "none") == []
        assert read_texts(file, "fixed") == ["ab", "c"]
        assert file.attrs["checkpoint"] == TEXTS[1]


def test_whole_datasets_of_all_layouts_are_read(path):
    values = np.zeros((3000, 50))
    with h5py.File(path, "w") as file:
        file["plain"] = values.astype(">f4")
        file.create_dataset("chunked", data=values, chunks=(999, 7))
        file.create_dataset("compressed", data=values, compression="gzip")
        file["empty"] = np.zeros((0, 5))
    for name, shape in (("plain", (3000, 50)), ("chunked", (3000, 50)), ("compressed", (3000, 50)), ("empty", (0, 5))):
        assert read(path, name).shape == shape


def a_group(file):
    file["x/y"] = [1]


def a_compound(file):
    file["x"] = np.zeros((2, 2), dtype=[("a", "f4")])


def a_reference(file):
    file.create_dataset("x", (2, 2), dtype=h5py.ref_dtype)[:] = file.ref


def complex_numbers(file):
    file["x"] = np.zeros((2, 2), dtype=complex)


def texts(file):
    file["x"] = np.full((2, 2), b"1.0")


def three_dimensions(file):
    file["x"] = np.zeros((2, 2, 2))


def one_number(file):
    file["x"] = 1.0


def no_shape(file):
    file["x"] = h5py.Empty("f4")


def never_written(file):
    file.create_dataset("x", (10**9, 10**6), dtype="f4")


def half_written(file):
    file.create_dataset("x", (10, 2), dtype="f4", chunks=(5, 2))[:5] = 1


def half_written_compressed(file):
    file.create_dataset("x", (10, 2), dtype="f4", chunks=(5, 2), compression="gzip")[:5] = 1


def compressed_zeros(file):
    file.create_dataset("x", data=np.zeros((10**7, 1)), compression="gzip", chunks=(10**6, 1))


def external_storage(file):
    file.create_dataset("x", (2, 2), dtype="f4", external=[("/dev/zero", 0, 16)])


def a_virtual_dataset(file):
    layout = h5py.VirtualLayout((2, 2), dtype="f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", (2, 2))
    file.create_virtual_dataset("x", layout)


def a_link_to_another_file(file):
    file["x"] = h5py.ExternalLink("/dev/zero", "x")


def a_link_to_itself(file):
    file["x"] = h5py.SoftLink("/x")


def nothing(file):
    file["y"] = [1]


ODD = [a_group, a_compound, a_reference, complex_numbers, texts, three_dimensions, one_number, no_shape, never_written]
ODD += [half_written, half_written_compressed, compressed_zeros, external_storage, a_virtual_dataset, nothing]
ODD += [a_link_to_another_file, a_link_to_itself]


@pytest.mark.parametrize("write", ODD)
def test_odd_datasets_are_refused_by_name(path, write):
    with h5py.File(path, "w") as file:
        write(file)
    with pytest.raises(ValueError, match=r"^features: .*a\.h5' (has|declares) .*\bx\b.*; extract again$") as caught:
        read(path)
    assert len(error_text(caught.value)) < 300


def test_types_are_checked(path):
    with h5py.File(path, "w") as file:
        file["x"] = np.zeros((2, 2))
        file["bits"] = np.zeros(3, dtype=bool)
    with pytest.raises(ValueError, match="x of type float64 instead of integers"):
        read(path, kinds="iu")
    with pytest.raises(ValueError, match="bits of type bool instead of numbers"):
        read(path, "bits", (1,))
    with pytest.raises(ValueError, match="bits of type bool instead of text"), open_h5(path, "features") as file:
        read_texts(file, "bits")


def test_a_file_is_read_without_a_lock(path):
    """A lock of another process stands for a file system that has none: HDF5 asks the system for one and is refused."""
    with h5py.File(path, "w") as file:
        file["x"] = np.zeros((2, 2))
    with open(path, "rb") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="unable to lock file"):
            h5py.File(path, "r", locking=True)
        assert read(path).shape == (2, 2)


def test_files_that_hdf5_cannot_read(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="features: .*no such file"):
        read(path)
    with pytest.raises(ValueError, match="is a folder"):
        read(tmp_path)
    os.mkfifo(tmp_path / "pipe.h5")
    with pytest.raises(ValueError, match="is a named pipe"):
        read(tmp_path / "pipe.h5")
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"a\.h5' is not an HDF5 file or is damaged .*; extract again"):
        read(path)


def test_a_failing_disk_is_not_called_a_damaged_file(path, monkeypatch):
    def fail(*args, **options):
        raise OSError(errno.EIO, "Unable to synchronously open file (file read failed)")

    path.write_bytes(b"any")
    monkeypatch.setattr(h5py, "File", fail)
    with pytest.raises(OSError, match=r"a\.h5") as caught:
        read(path)
    assert "Input/output error; the disk or the network share fails" in error_text(caught.value)

"""The features file: it gives back what went in, in all its kinds, and other files are refused."""

from dataclasses import replace

import h5py
import numpy as np
import pytest

from dinov2.eval.features import Features, read_features, stored_kinds, write_features


@pytest.fixture
def stored():
    return Features(
        features=np.arange(6, dtype=np.float32).reshape(3, 2),
        labels=np.array([0, 2, 0]),
        class_names=["Basophil", "leer", "Größe µ"],
        paths=["/a/1.png", "/a/2 b.png", "/ä/3.png"],
        patients=["p1", "p1", "p2"],
        unreadable=["/a/0.png"],
        attributes={"model": "ViT", "checkpoint_sha256": "ab"},
    )


@pytest.fixture
def of_several_kinds(stored):
    others = {"cls+mean": np.ones((3, 4), np.float32), "last2": np.arange(12, dtype=np.float32).reshape(3, 4)}
    return replace(stored, kind="mean", others=others)


def assert_same(found, expected):
    np.testing.assert_array_equal(found.features, expected.features)
    assert found.features.dtype == np.float32
    np.testing.assert_array_equal(found.labels, expected.labels)
    for name in ("class_names", "paths", "patients", "unreadable", "attributes", "kind"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.others.keys() == expected.others.keys()
    for kind, values in expected.others.items():
        np.testing.assert_array_equal(found.others[kind], values)


def test_what_is_written_is_read(stored, tmp_path):
    write_features(tmp_path / "new" / "features.h5", stored)
    assert_same(read_features(tmp_path / "new" / "features.h5"), stored)
    with h5py.File(tmp_path / "new" / "features.h5") as file:  # what other programs rely on
        assert set(file) == {"features", "labels", "class_names", "paths", "patients", "unreadable"}
        assert file["features"].dtype == np.float32
        assert file.attrs["model"] == "ViT"


def test_without_patients_and_with_half_precision(stored, tmp_path):
    whole = stored.select(np.array([True, False, True]))
    without = Features(whole.features, whole.labels, whole.class_names, whole.paths)
    write_features(tmp_path / "features.h5", without)
    with h5py.File(tmp_path / "features.h5", "a") as file:
        del file["features"], file["unreadable"]
        file["features"] = whole.features.astype(np.float16)
    assert_same(read_features(tmp_path / "features.h5"), without)


def test_a_failed_write_leaves_the_old_file(stored, tmp_path):
    write_features(tmp_path / "features.h5", stored)
    broken = stored.select(np.arange(3))
    broken.paths[1] = 7
    with pytest.raises((TypeError, ValueError)):
        write_features(tmp_path / "features.h5", broken)
    assert_same(read_features(tmp_path / "features.h5"), stored)
    assert [path.name for path in tmp_path.iterdir()] == ["features.h5"]


def test_other_files_are_refused(stored, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"extract_features\.py writes one"):
        read_features(tmp_path / "absent.h5")
    file = tmp_path / "features.h5"
    file.write_bytes(b"text")
    with pytest.raises(ValueError, match="not an HDF5 file or is damaged"):
        read_features(file)
    write_features(file, stored)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not an HDF5 file or is damaged"):
        read_features(file)
    write_features(file, stored)
    with h5py.File(file, "a") as h5:
        del h5["labels"]
    with pytest.raises(ValueError, match="no dataset labels"):
        read_features(file)
    with h5py.File(file, "a") as h5:
        h5["labels"] = np.zeros(2, dtype=np.int64)
    with pytest.raises(ValueError, match="different lengths"):
        read_features(file)
    with h5py.File(file, "a") as h5:
        del h5["labels"]
        h5["labels"] = np.array([0, 1, 3])
    with pytest.raises(ValueError, match="positions among 3 class names"):
        read_features(file)
    write_features(file, stored)
    with h5py.File(file, "a") as h5:
        h5["features_mean"] = np.zeros((2, 2))
    with pytest.raises(ValueError, match="different lengths"):
        read_features(file)


def test_kinds_are_kept_and_chosen(of_several_kinds, tmp_path):
    file = tmp_path / "features.h5"
    write_features(file, of_several_kinds)
    found = read_features(file)
    assert_same(found, of_several_kinds)
    assert found.kinds == stored_kinds(file) == ["mean", "cls+mean", "last2"]
    assert "kind" not in found.attributes
    with h5py.File(file) as h5:
        assert h5.attrs["kind"] == "mean"
    other = found.of_kind("last2")
    np.testing.assert_array_equal(other.features, of_several_kinds.others["last2"])
    assert (other.kind, other.kinds) == ("last2", ["last2", "mean", "cls+mean"])
    assert_same(other.of_kind("mean"), of_several_kinds)
    np.testing.assert_array_equal(found.select(np.array([2, 0])).others["last2"], other.features[[2, 0]])
    with pytest.raises(ValueError, match=r"none of kind 'cls', only mean, cls\+mean, last2; .* --kinds mean .* cls"):
        found.of_kind("cls")


def test_a_file_without_a_kind_holds_cls_tokens(stored, tmp_path):
    file = tmp_path / "features.h5"
    write_features(file, stored)
    with h5py.File(file, "a") as h5:
        del h5.attrs["kind"]
    assert read_features(file).kind == "cls"
    assert stored_kinds(file) == ["cls"]
    (tmp_path / "text.h5").write_text("text")
    with pytest.raises(ValueError, match="not an HDF5 file or is damaged"):
        stored_kinds(tmp_path / "text.h5")


def test_patch_grids_are_written_a_few_at_a_time_and_not_read(stored, tmp_path):
    file = tmp_path / "features.h5"
    grids = np.random.default_rng(0).normal(size=(3, 2, 2, 5)).astype(np.float16)
    write_features(file, stored, iter([grids[:2], grids[2:]]))
    with h5py.File(file) as h5:
        assert h5["patch_grid"].dtype == np.float16
        np.testing.assert_array_equal(h5["patch_grid"][:], grids)
    assert_same(read_features(file), stored)
    assert stored_kinds(file) == ["cls", "patches"]

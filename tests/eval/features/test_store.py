"""The features file: it gives back what went in, in all its kinds, other files are refused; and two sets are joined."""

import os
import resource
from dataclasses import replace

import h5py
import numpy as np
import pytest

from dinov2.data.datasets.labelled_cells import UNLABELLED
from dinov2.eval.features import Features, read_features, stored_kinds, write_features
from dinov2.eval.features.store import (
    align_classes,
    check_finite,
    check_labels,
    check_same_network,
    join,
)


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


@pytest.mark.parametrize("suffix", ["h5", "parquet"])
def test_all_but_the_vectors_is_read(suffix, of_several_kinds, tmp_path):
    file = tmp_path / f"features.{suffix}"
    write_features(file, of_several_kinds)
    assert_same(read_features(file), of_several_kinds)
    assert stored_kinds(file) == ["mean", "cls+mean", "last2"]
    none = np.zeros((3, 0), np.float32)
    expected = replace(of_several_kinds, features=none, others=dict.fromkeys(of_several_kinds.others, none))
    assert_same(read_features(file, with_vectors=False), expected)


def test_parquet_of_other_tools(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads and writes parquet")
    from pyarrow import parquet

    file = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"vector": [[1.0], [2.0]], "Label": ["b", "a"], "Image Path": ["1", "2"]}), file)
    found = read_features(file)
    assert (found.class_names, found.labels.tolist(), found.paths) == (["a", "b"], [1, 0], ["1", "2"])
    assert (found.patients, found.attributes, found.kind) == (None, {}, "cls")
    parquet.write_table(pyarrow.table({"vector": [[1.0], [2.0]]}), file)
    found = read_features(file)
    assert not found.has_labels
    assert found.paths == [f"{file}:0", f"{file}:1"]
    parquet.write_table(pyarrow.table({"label": ["a"]}), file)
    with pytest.raises(ValueError, match="features: .*x.parquet' has no column 'vector' with a list of numbers"):
        read_features(file)


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
    with pytest.raises(ValueError, match="features: .*features.h5' has no dataset labels; extract again"):
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


def with_class_twice(file):
    del file["class_names"]
    file["class_names"] = ["a", "a", "b"]


def with_fractions_as_labels(file):
    del file["labels"]
    file["labels"] = np.array([0.0, 0.5, np.nan])


def with_labels_in_two_dimensions(file):
    del file["labels"]
    file["labels"] = np.zeros((3, 1), dtype=np.int64)


def without_columns(file):
    del file["features"]
    file["features"] = np.zeros((3, 0))


def without_cells(file):
    for name in ("features", "labels", "paths", "patients"):
        values = file[name][:0]
        del file[name]
        file[name] = values


def with_numbers_as_patients(file):
    del file["patients"]
    file["patients"] = np.arange(3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_class_twice, "a class name twice"),
        (with_fractions_as_labels, "labels of type float64 instead of integers"),
        (with_labels_in_two_dimensions, r"labels of shape \[3, 1\]"),
        (without_columns, "no cells or no columns in features"),
        (without_cells, "no cells or no columns in features"),
        (with_numbers_as_patients, "patients of type int64 instead of text"),
    ],
)
def test_content_that_does_not_fit_is_named(stored, tmp_path, damage, message):
    file = tmp_path / "features.h5"
    write_features(file, stored)
    with h5py.File(file, "a") as h5:
        damage(h5)
    with pytest.raises(ValueError, match=f"features: .*features.h5' has .*{message}.*; extract again"):
        read_features(file)


def test_names_that_are_not_utf8_are_kept(stored, tmp_path):
    name = os.fsdecode(b"f\xfcr.png")
    odd = replace(stored, class_names=["a", name, "c"], paths=["/a", "/b", name], attributes={"checkpoint": name})
    write_features(tmp_path / name, odd)
    assert_same(read_features(tmp_path / name), odd)


def test_cells_without_labels(stored, tmp_path):
    unlabelled = replace(stored, labels=np.zeros(3, dtype=np.int64), class_names=[UNLABELLED])
    write_features(tmp_path / "features.h5", unlabelled)
    found = read_features(tmp_path / "features.h5")
    assert_same(found, unlabelled)
    assert (found.has_labels, stored.has_labels) == (False, True)
    check_labels(stored, "features.h5")
    with pytest.raises(ValueError, match=r"labels: the cells of 'features.h5' have none.*column Label"):
        check_labels(found, "features.h5")


def test_a_full_disk_is_named_and_leaves_nothing(stored, tmp_path):
    """A limit on the size of files stands for a full disk: the system refuses a write in the same way."""
    large = replace(stored, features=np.zeros((3, 100_000), dtype=np.float32))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 100, 3000, 100_000, 1_000_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(OSError, match=r"features\.h5"):
                write_features(tmp_path / "features.h5", large)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list(tmp_path.iterdir()) == []
    write_features(tmp_path / "features.h5", large)
    assert_same(read_features(tmp_path / "features.h5"), large)


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


def features_of(paths, patients=None, labels=None):
    n = len(paths)
    labels = np.zeros(n, dtype=np.int64) if labels is None else labels
    return Features(np.arange(n, dtype=np.float32)[:, None], labels, ["a", "b"], [str(p) for p in paths], patients)


def test_classes_are_matched_by_name():
    test = features_of(["1", "2", "3"], labels=np.array([1, 0, 1]))
    assert align_classes(test, ["b", "c", "a"]).labels.tolist() == [0, 2, 0]
    assert align_classes(test.select([0, 2]), ["b"]).labels.tolist() == [0, 0]  # no cell of class a: nothing is lost
    with pytest.raises(ValueError, match="'b' are not among the training set's 'a', 'c'"):
        align_classes(test, ["a", "c"])


def test_two_sets_become_one():
    train, test = features_of("ab", ["p", "q"]), features_of("c", ["r"])
    both = join(train, test)
    assert both.features.ravel().tolist() == [0, 1, 0]
    assert both.paths == ["a", "b", "c"]
    assert both.patients == ["p", "q", "r"]
    assert len(both.labels) == 3
    assert join(train, features_of("c")).patients is None


def test_kinds_of_features_stay_with_their_cells():
    train, test = features_of("ab"), features_of("cd", labels=np.array([1, 0]))
    train.others.update(mean=np.array([[1.0], [2.0]]), last4=np.zeros((2, 4)))
    test.others.update(mean=np.array([[3.0], [4.0]]))
    both = join(train, align_classes(test, ["a", "b"]))
    assert both.kinds == ["cls", "mean"]  # those that both have
    assert both.of_kind("mean").features.ravel().tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="kind of features differs, 'mean' and 'cls'"):
        check_same_network(train.of_kind("mean"), test)
    test.others["mean"][1] = np.nan
    with pytest.raises(ValueError, match="1 of 2 in 'f.h5' are infinite or NaN, for instance those of 'd'"):
        check_finite(test, "f.h5")


def test_features_of_two_networks_are_told_apart():
    train, test = features_of("ab"), features_of("cd")
    check_same_network(train, test)
    test.attributes["transform"] = "28 px"
    with pytest.raises(ValueError, match="transform differs, None and '28 px'"):
        check_same_network(train, test)
    wider = Features(np.zeros((2, 3), dtype=np.float32), test.labels, test.class_names, test.paths)
    with pytest.raises(ValueError, match="numbers a cell differs, 1 and 3"):
        check_same_network(train, wider)

"""Data sets side by side: common class names, a training and a test set; test_cross.py tests comparisons of many."""

import numpy as np
import pytest

from dinov2.eval.features import Features
from dinov2.eval.features.data_sets import align_classes, check_finite, check_same_network, join, read_classes_map

LABELS = {"pbc": ["basophil", "blast", "monocyte"], "ssl": ["blast"], "bm": ["BAS"]}


def test_a_map_is_read_and_an_empty_name_drops_the_cells(tmp_path):
    (tmp_path / "map.csv").write_text("label,dataset,common\nBAS,bm,basophil\nblast,ssl,\n", encoding="utf-8-sig")
    assert read_classes_map(tmp_path / "map.csv", LABELS) == {("bm", "BAS"): "basophil", ("ssl", "blast"): ""}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label,common\nx,y\n", r"has the columns \['label', 'common'\]; expected dataset,label,common"),
        ("dataset,label,common\nmll,blast,x\n", "line 2: no data set is called 'mll'; there are pbc, ssl, bm"),
        ("dataset,label,common\npbc,Blast,x\n", "line 2: pbc has no label 'Blast'; it has basophil, blast, monocyte"),
        ("dataset,label,common\npbc,blast,x\npbc,blast,y\n", "line 3: 'blast' of pbc has a row already"),
    ],
)
def test_maps_that_are_wrong(text, message, tmp_path):
    (tmp_path / "map.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_classes_map(tmp_path / "map.csv", LABELS)
    with pytest.raises(FileNotFoundError, match="--classes-map: no file"):
        read_classes_map(tmp_path / "absent.csv", LABELS)


# --- a training and a test set ---------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="kind differs, 'mean' and 'cls'"):
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

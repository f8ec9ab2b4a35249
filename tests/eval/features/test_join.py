"""Features of two sets: one network, classes by name, joined."""

import numpy as np
import pytest

from dinov2.eval.features import Features
from dinov2.eval.features.join import align_classes, check_finite, check_same_network, join


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
    with pytest.raises(ValueError, match="features are 'mean' in one and 'cls' in the other"):
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
    with pytest.raises(ValueError, match="1 and 3 numbers a cell"):
        check_same_network(train, wider)

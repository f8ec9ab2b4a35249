"""Folds: stratified, by whole patients, by data set; small classes are told of; files give back the split they keep."""

import logging
import re
import shutil

import numpy as np
import pytest

from dinov2.data.splits import (
    Split,
    check_no_patient_on_two_sides,
    describe_folds,
    few_shot_draws,
    leave_one_dataset_out,
    log_fold_problems,
    make_folds,
    read_split,
    split_cells,
    without_copies,
    write_split,
)

NAMES = ["basophil", "blast", "eosinophil"]


def same_folds(found, expected):
    return [[side.tolist() for side in fold] for fold in found] == [[side.tolist() for side in f] for f in expected]


def test_folds_are_stratified_shuffled_and_follow_the_seed():
    labels = np.repeat([0, 1], [60, 20])  # in order, as a listing of class folders is
    folds = make_folds(labels, n_folds=5, seed=0)
    for train, test in folds:
        assert np.bincount(labels[test]).tolist() == [12, 4]
        assert sorted([*train, *test]) == list(range(80))
        assert (np.diff(test[:12]) > 1).any()
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(80))
    assert same_folds(make_folds(labels, n_folds=5, seed=0), folds)
    assert not same_folds(make_folds(labels, n_folds=5, seed=1), folds)


@pytest.mark.parametrize("seed", range(3))
def test_folds_keep_patients_whole(seed):
    rng = np.random.default_rng(seed)
    labels, patients = rng.integers(0, 3, 300), [f"p{i}" for i in rng.integers(0, 30, 300)]
    folds = make_folds(labels, patients, n_folds=4, seed=seed)
    for train, test in folds:
        assert not {patients[i] for i in train} & {patients[i] for i in test}
        assert len(test) > 30
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(300))


def test_a_fold_without_a_test_cell_is_an_error():
    counts = [5, 50, 5, 1, 1, 50]
    labels, patients = np.repeat([0, 1, 2, 2, 1, 1], counts), list(map(str, np.repeat(range(6), counts)))

    def draw_all() -> None:
        for seed in range(50):  # whether all have one is a matter of the draw
            assert all(len(test) for _, test in make_folds(labels, patients, 6, seed))

    with pytest.raises(ValueError, match=r"folds: \d of 6 folds have no test cell; choose fewer folds"):
        draw_all()
    make_folds(labels, patients, 2)


def test_a_class_with_one_image_is_trained_on_and_reported():
    labels = np.repeat([0, 1, 2], [20, 3, 1])
    folds = make_folds(labels, n_folds=5)
    assert all(23 in train and 23 not in test for train, test in folds)
    found = describe_folds(labels, folds, NAMES)
    assert found["never_tested"] == {"eosinophil": 1}
    assert list(found["not_tested_in"]) == ["blast"]
    assert len(found["not_tested_in"]["blast"]) == 2
    assert found["not_learned_in"] == {}
    assert sum(found["test_sizes"]) == 23
    assert [a + b for a, b in zip(found["train_sizes"], found["test_sizes"], strict=True)] == [24] * 5


def test_bags_are_one_cell_each_and_their_patients_change_nothing():
    labels = np.repeat([0, 1, 2], [20, 8, 1])
    patients = [f"p{i}" for i in range(29)]
    assert same_folds(make_folds(labels, patients, 4, seed=3), make_folds(labels, None, 4, seed=3))


def test_a_class_of_one_patient_is_reported_where_nothing_learns_it(caplog):
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1])
    patients = ["a", "a", "b", "b", "c", "c", "d", "d"]
    folds = make_folds(labels, patients, n_folds=2)
    found = describe_folds(labels, folds, NAMES)
    (tested_in,) = (i for i, (_, test) in enumerate(folds) if 7 in test)
    assert found["not_learned_in"] == {"blast": [tested_in]}
    assert found["not_tested_in"] == {"blast": [1 - tested_in]}
    logger = logging.getLogger("dinov2")
    logger.addHandler(caplog.handler)
    log_fold_problems(found)
    logger.removeHandler(caplog.handler)
    assert f"blast (folds {tested_in})" in caplog.text


@pytest.mark.parametrize(
    ("labels", "patients", "n_folds", "message"),
    [
        ([0, 0, 1], None, 1, "folds: 1; choose 2 or more"),
        ([0, 0, 1, 1], None, 3, "2 cells in its largest class, fewer than the 3 parts"),
        ([0, 0, 0, 1], ["a", "a", "b", "b"], 3, "2 patients, fewer than the 3 parts"),
        ([0, 0, 1], ["a"], 2, "1 patients for 3 labels"),
    ],
)
def test_sets_too_small_for_folds_are_refused(labels, patients, n_folds, message):
    with pytest.raises(ValueError, match=message):
        make_folds(np.array(labels), patients, n_folds)


def test_splits_are_stratified_and_follow_the_seed():
    labels = np.repeat([0, 1, 2], [60, 20, 1])  # the class with one cell goes to one side, and is no error
    train, test = split_cells(labels, None, 0.25, seed=0)
    assert np.bincount(labels[test], minlength=2)[:2].tolist() == [15, 5]
    assert sorted([*train, *test]) == list(range(81))
    again, other = split_cells(labels, None, 0.25, seed=0)[1], split_cells(labels, None, 0.25, seed=1)[1]
    assert test.tolist() == again.tolist()
    assert test.tolist() != other.tolist()


def test_splits_keep_patients_whole():
    rng = np.random.default_rng(0)
    labels, patients = rng.integers(0, 3, 200), [f"p{i}" for i in rng.integers(0, 20, 200)]
    train, test = split_cells(labels, patients, 0.25, seed=0)
    assert not {patients[i] for i in train} & {patients[i] for i in test}
    assert 40 <= len(test) <= 60


def test_a_patient_with_most_of_the_cells_is_trained_on():
    labels, patients = np.zeros(60, dtype=np.int64), ["many"] * 40 + [f"p{i % 5}" for i in range(20)]
    for seed in range(4):
        _, test = split_cells(labels, patients, 0.25, seed)
        assert "many" not in {patients[i] for i in test}


@pytest.mark.parametrize(
    ("labels", "patients", "fraction", "message"),
    [
        ([0, 0, 0, 1], None, 0.75, "above 0 and up to 0.5"),
        ([0, 0, 0, 0, 1], ["a", "a", "b", "c", "c"], 0.25, "3 patients, fewer than the 4 parts"),
        ([0, 1, 2, 0], None, 0.25, "2 cells in its largest class, fewer than the 4 parts"),
    ],
)
def test_sets_too_small_to_split_are_refused(labels, patients, fraction, message):
    with pytest.raises(ValueError, match=message):
        split_cells(np.array(labels), patients, fraction, seed=0)


def test_each_data_set_is_tested_once_by_all_others():
    found = leave_one_dataset_out(["pbc", "ssl", "pbc", "bm"])
    assert list(found) == ["bm", "pbc", "ssl"]
    assert [side.tolist() for side in found["pbc"]] == [[1, 3], [0, 2]]
    with pytest.raises(ValueError, match="all 2 cells are of 'pbc'"):
        leave_one_dataset_out(["pbc", "pbc"])


def test_few_shot_draws_grow_and_differ():
    labels = np.repeat([0, 1, 2], [50, 30, 2])
    five, one = few_shot_draws(labels, 5, 3, seed=0), few_shot_draws(labels, 1, 2, seed=0)
    assert [np.bincount(labels[draw]).tolist() for draw in five] == [[5, 5, 2]] * 3
    assert all(set(small) < set(large) for small, large in zip(one, five, strict=False))
    assert five[0].tolist() != five[1].tolist()
    assert few_shot_draws(labels, 5, 1, seed=0)[0].tolist() == five[0].tolist()
    assert few_shot_draws(labels, 5, 1, seed=1)[0].tolist() != five[0].tolist()
    with pytest.raises(ValueError, match="51 cells a class asked, but the largest class has 50"):
        few_shot_draws(labels, 51, 1)
    with pytest.raises(ValueError, match="must be at least 1"):
        few_shot_draws(labels, 0, 1)


def test_patients_on_two_sides_are_named():
    patients = ["ann", "bob", "bob", "cem", "ann"]
    check_no_patient_on_two_sides(patients, np.array([0, 4]), np.array([1, 2]), np.array([3]))
    with pytest.raises(ValueError, match="1 of 2 patients have cells on two sides, for instance 'bob'"):
        check_no_patient_on_two_sides(patients, np.array([0, 1]), np.array([2]))
    with pytest.raises(ValueError, match="'ann'"):  # training and validation
        check_no_patient_on_two_sides(patients, np.array([0]), np.array([1]), np.array([4]))


def test_folds_come_back_from_their_file(tmp_path):
    labels = np.repeat([0, 1, 2], [12, 8, 1])
    paths = [f"/cells/ä, {i}.png" for i in range(21)]
    folds = make_folds(labels, n_folds=4)
    write_split(tmp_path / "new" / "split.csv", paths, Split(folds))
    found = read_split(tmp_path / "new" / "split.csv", paths)
    assert same_folds(found.folds, folds)
    assert found.validation is None
    order = np.random.default_rng(0).permutation(21)  # other cells around it, and in another order
    for (train, test), (old_train, old_test) in zip(
        read_split(tmp_path / "new" / "split.csv", [paths[i] for i in order]).folds, folds, strict=True
    ):
        assert set(order[train]) == set(old_train)
        assert set(order[test]) == set(old_test)


def test_parts_come_back_from_their_file(tmp_path):
    split = Split([(np.array([0, 3]), np.array([1]))], validation=np.array([4]))
    paths = list("abcde")
    write_split(tmp_path / "split.csv", paths, split)
    assert (tmp_path / "split.csv").read_text() == "path,part\na,train\nb,test\nc,unused\nd,train\ne,val\n"
    found = read_split(tmp_path / "split.csv", paths)
    assert same_folds(found.folds, split.folds)
    assert found.validation.tolist() == [4]


def test_official_files_name_images_relative_to_themselves(tmp_path):
    text = "\ufeffImage Path, Label, fold\nc/1.png, x, 0\nc/2.png, x, 1\nc/3.png,y,0\n,,\n"
    (tmp_path / "split.csv").write_text(text)
    paths = [str(tmp_path / "c" / "2.png"), str(tmp_path / "c" / "1.png")]  # 3.png is not at hand
    first, second = np.array([0]), np.array([1])
    assert same_folds(read_split(tmp_path / "split.csv", paths).folds, [(first, second), (second, first)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na,0\n", "has the columns ['path', 'label']; expected path,fold or path,part"),
        ("path,fold,part\na,0,test\n", "expected path,fold or path,part"),
        ("path,part\na,train\nb,dev\nc,test\n", "line 3: part 'dev' is unknown"),
        ("path,fold\na,0\nb,first\nc,1\n", "line 3: fold 'first' is no number"),
        ("path,fold\na,0\nb,1\na,1\n", "line 4: 'a' has a row already"),
        ("path,fold\na,0\nb,1\n", "no row for 1 of 3 cells, for instance 'c'"),
        ("path,part\na,train\nb,train\nc,val\n", "nothing to test"),
        ("path,fold\na,train\nb,train\nc,train\n", "nothing to test"),
        ("path,fold\na,0\nb,0\nc,0\n", "nothing to train on"),
    ],
)
def test_split_files_that_are_wrong(text, message, tmp_path):
    (tmp_path / "split.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_split(tmp_path / "split.csv", ["a", "b", "c"])


def test_splits_that_a_file_cannot_keep(tmp_path):
    file = tmp_path / "split.csv"
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_split(file, ["a"])
    zero, one, two = (np.array([i]) for i in range(3))
    with pytest.raises(ValueError, match="'a' stands twice"):
        write_split(file, ["a", "a"], Split([(zero, one)]))
    with pytest.raises(ValueError, match="in another part too"):
        write_split(file, ["a", "b"], Split([(zero, one)], validation=one))
    with pytest.raises(ValueError, match="fold 0 tests cells that another one tests, or does not train on all"):
        write_split(file, ["a", "b", "c"], Split([(zero, one), (one, two)]))
    assert not file.exists()


def test_one_file_on_both_sides_is_an_error(tmp_path):
    (tmp_path / "cell.png").write_bytes(b"x")
    (tmp_path / "link.png").symlink_to(tmp_path / "cell.png")
    shutil.copy(tmp_path / "cell.png", tmp_path / "copy.png")
    fold = np.array([0]), np.array([1])
    with pytest.raises(ValueError, match="share 1 image files, for instance .*cell.png"):
        without_copies([str(tmp_path / "cell.png"), str(tmp_path / "link.png")], [fold])
    with pytest.raises(ValueError, match="every image is a copy"):
        without_copies([str(tmp_path / "cell.png"), str(tmp_path / "copy.png")], [fold])


def test_copies_are_dropped_from_the_folds_that_test_them(tmp_path):
    for name, content in {"a": b"same", "b": b"same", "c": b"else", "d": b"othr", "e": b"longer"}.items():
        (tmp_path / name).write_bytes(content)
    folds = [(np.array([2, 3, 4, 1]), np.array([0])), (np.array([0, 1, 4]), np.array([2, 3]))]
    kept, counts = without_copies([str(tmp_path / name) for name in "abcde"], folds)
    assert [fold[0].tolist() for fold in kept] == [[2, 3, 4], [0, 1, 4]]  # in the second both copies are trained on
    assert [fold[1].tolist() for fold in kept] == [[0], [2, 3]]
    assert counts == {"dropped_identical_bytes": 1, "not_checked": 0}
    _, counts = without_copies(
        [str(tmp_path / name) for name in ("a", "gone", "b")], [(np.array([0, 1]), np.array([2]))]
    )
    assert counts == {"dropped_identical_bytes": 1, "not_checked": 1}

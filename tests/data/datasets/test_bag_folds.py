"""Folds of patients: what is drawn, what is refused, and what files hold."""

import numpy as np
import pytest

from dinov2.data.datasets.bag_folds import BagFold, check_folds, crossval_folds, dinobloom_folds, read_fold_files


def patients(n: int) -> list[str]:
    return [f"p{i:02d}" for i in range(n)]


def parts(fold: BagFold) -> tuple[list[int], ...]:
    return fold.train.tolist(), fold.val.tolist(), fold.test.tolist()


def assert_is_partition(fold: BagFold, n: int) -> None:
    assert sorted(sum(parts(fold), [])) == list(range(n))


def test_dinoblooms_folds_have_one_test_set_and_keep_the_classes_apart_evenly():
    labels = np.repeat([0, 1, 2], [40, 20, 10])
    folds = dinobloom_folds(labels, patients(70), n_folds=4, seed=0)
    assert len(folds) == 4
    assert len({tuple(fold.test) for fold in folds}) == 1
    assert np.bincount(labels[folds[0].test]).tolist() == [8, 4, 2]
    for fold in folds:
        assert_is_partition(fold, 70)
        assert np.bincount(labels[fold.val]).tolist() == [8, 4, 2]
    assert sorted(np.concatenate([fold.val for fold in folds])) == sorted([*folds[0].train, *folds[0].val])


def test_a_given_test_set_is_the_test_set():
    labels, test = np.arange(20) % 2, np.array([0, 1, 7, 12])
    for fold in dinobloom_folds(labels, patients(20), n_folds=4, seed=0, test=test):
        assert_is_partition(fold, 20)
        assert fold.test.tolist() == [0, 1, 7, 12]


def test_cross_validation_tests_every_patient_once():
    labels = np.repeat([0, 1], [20, 10])
    folds = crossval_folds(labels, patients(30), n_folds=5, seed=0)
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(30))
    for fold in folds:
        assert_is_partition(fold, 30)
        assert np.bincount(labels[fold.test]).tolist() == np.bincount(labels[fold.val]).tolist() == [4, 2]
    with pytest.raises(ValueError, match="--folds 2: protocol crossval needs"):
        crossval_folds(labels, patients(30), n_folds=2)


@pytest.mark.parametrize("make", [dinobloom_folds, crossval_folds])
def test_folds_follow_the_seed(make):
    labels = np.arange(40) % 2
    first, again, other = ([parts(fold) for fold in make(labels, patients(40), 4, seed)] for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        (([0, 1, 2], [3], []), "fold 0: its part test has no patient"),
        (([0, 1, 2], [2, 3], [4]), "1 patients are in it more than once"),
        (([0, 2], [1, 3], [4, 5]), "fold 0: no patient of b in its training part"),
    ],
)
def test_folds_that_would_leak_or_cannot_learn(fold, message):
    fold = BagFold(*(np.array(part, dtype=np.int64) for part in fold))
    with pytest.raises(ValueError, match=message):
        check_folds([fold], np.array([0, 1, 0, 1, 0, 1]), ["a", "b"])


def test_one_class_is_nothing_to_learn():
    with pytest.raises(ValueError, match="all patients are b, one class"):
        check_folds([], np.array([1, 1, 1]), ["a", "b"])


def test_a_test_part_without_a_class_is_told(caplog):
    check_folds([BagFold(np.array([0, 1]), np.array([2, 3]), np.array([4]))], np.array([0, 1, 0, 1, 0]), ["a", "b"])
    assert "fold 0: no patient of b in its part test" in caplog.text


# --- files


@pytest.fixture
def fold_folder(tmp_path):
    """Two folds in GenBloom's layout, in which labels are ids."""
    folds = {"data_fold_10": ("a,0\nb,1", "c,0", "d,1"), "data_fold_9": ("c,0\nb,1", "a,0", "d,1")}
    for name, parts in folds.items():
        (tmp_path / name).mkdir()
        for part, rows in zip(("train", "val", "test"), parts, strict=True):
            (tmp_path / name / f"{part}.csv").write_text(f"patient_name,labels\n{rows}\n")
    (tmp_path / "label_to_diagnose.csv").write_text("label_name,label_id\nNPM1,0\ncontrol,1\n")
    return tmp_path


def test_official_folds(fold_folder):
    found = read_fold_files(fold_folder)
    assert found.names == ["data_fold_9", "data_fold_10"]
    assert found.folds[0] == {"train": ["c", "b"], "val": ["a"], "test": ["d"]}
    assert found.labels == {"a": "NPM1", "b": "control", "c": "NPM1", "d": "control"}


def test_official_folds_may_share_a_test_set(fold_folder):
    (fold_folder / "data_fold_9" / "test.csv").rename(fold_folder / "test.csv")
    assert read_fold_files(fold_folder).folds[0]["test"] == ["d"]
    (fold_folder / "test.csv").unlink()
    with pytest.raises(FileNotFoundError, match="data_fold_9' has no test.csv"):
        read_fold_files(fold_folder)


def test_official_folds_that_leak_or_contradict_themselves(fold_folder):
    test = fold_folder / "data_fold_9" / "test.csv"
    test.write_text("patient,label\nb,1\n")
    with pytest.raises(ValueError, match="fold 'data_fold_9' of .* 'b' stand twice among train, val and test"):
        read_fold_files(fold_folder)
    test.write_text("patient,label\nd,0\n")
    with pytest.raises(ValueError, match="'d' 'NPM1' and 'control'"):
        read_fold_files(fold_folder)
    test.write_text("patient,label\nd,2\n")
    with pytest.raises(ValueError, match="the label '2', which label_to_diagnose.csv does not name"):
        read_fold_files(fold_folder)
    with pytest.raises(FileNotFoundError, match=r"no folder in .* has a train.csv"):
        read_fold_files(fold_folder / "data_fold_9")


def test_folds_are_written_and_read_back(tmp_path, fold_folder):
    found = read_fold_files(fold_folder)
    found.write(tmp_path / "folds.csv")
    assert read_fold_files(tmp_path / "folds.csv") == found


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0,train,a,x\n0,val,b,x\n0,tset,c,y\n", "has the part 'tset'; write train, val, test"),
        ("0,train,a,x\n0,val,b,x\n", "fold '0' of .* has no patient in test"),
        ("0,train,a,x\n0,val,b,x\n0,test,a,x\n", "'a' stand twice"),
    ],
)
def test_fold_tables_that_make_no_folds(tmp_path, rows, message):
    (tmp_path / "folds.csv").write_text("fold,part,patient,label\n" + rows)
    with pytest.raises(ValueError, match=message):
        read_fold_files(tmp_path / "folds.csv")

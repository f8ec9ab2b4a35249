"""Folds of patients: what is drawn, what is refused, and what files hold."""

import numpy as np
import pandas as pd
import pytest

from dinov2.data.datasets.bag_folds import BagFold, FoldedBags, draw_folds, folds_from_files
from dinov2.data.datasets.bags import PatientBags


def bags_of(labels, names=("a", "b", "c"), patients=None) -> PatientBags:
    """Bags of one cell each."""
    labels = np.asarray(labels)
    patients = [f"p{i:02d}" for i in range(len(labels))] if patients is None else patients
    cells = [np.full((1, 2), i, dtype=np.float32) for i in range(len(labels))]
    return PatientBags(patients, cells, [["cell"]] * len(labels), labels, list(names)[: labels.max() + 1])


def parts(fold: BagFold) -> tuple[list[int], ...]:
    return fold.train.tolist(), fold.val.tolist(), fold.test.tolist()


def assert_is_partition(fold: BagFold, n: int) -> None:
    assert sorted(sum(parts(fold), [])) == list(range(n))


def test_dinoblooms_folds_have_one_test_set_and_keep_the_classes_apart_evenly():
    labels = np.repeat([0, 1, 2], [40, 20, 10])
    data = draw_folds(bags_of(labels), "dinobloom")
    folds = data.folds
    assert data.fold_names == ["0", "1", "2", "3"]
    assert len({tuple(fold.test) for fold in folds}) == 1
    assert np.bincount(labels[folds[0].test]).tolist() == [8, 4, 2]
    for fold in folds:
        assert_is_partition(fold, 70)
        assert np.bincount(labels[fold.val]).tolist() == [8, 4, 2]
    learned = sorted([*folds[0].train, *folds[0].val])
    assert sorted(np.concatenate([fold.val for fold in folds])) == learned == data.learned.tolist()


def test_a_given_test_set_is_the_test_set():
    for fold in draw_folds(bags_of(np.arange(20) % 2), "dinobloom", test=np.array([0, 1, 7, 12])).folds:
        assert_is_partition(fold, 20)
        assert fold.test.tolist() == [0, 1, 7, 12]


def test_cross_validation_tests_every_patient_once():
    labels = np.repeat([0, 1], [20, 10])
    folds = draw_folds(bags_of(labels), "crossval").folds
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(30))
    for fold in folds:
        assert_is_partition(fold, 30)
        assert np.bincount(labels[fold.test]).tolist() == np.bincount(labels[fold.val]).tolist() == [4, 2]
    with pytest.raises(ValueError, match="--folds 2: protocol crossval needs"):
        draw_folds(bags_of(labels), "crossval", 2)


@pytest.mark.parametrize("protocol", ["dinobloom", "crossval"])
def test_folds_follow_the_seed(protocol):
    bags = bags_of(np.arange(40) % 2)
    first, again, other = ([parts(fold) for fold in draw_folds(bags, protocol, 4, seed).folds] for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        (([0, 1, 2], [3], []), "fold first: its part test has no patient"),
        (([0, 1, 2], [2, 3], [4]), "1 patients are in it more than once"),
        (([0, 2], [1, 3], [4, 5]), "fold first: no patient of b in its training part"),
    ],
)
def test_folds_that_would_leak_or_cannot_learn(fold, message):
    fold = BagFold(*(np.array(part, dtype=np.int64) for part in fold))
    with pytest.raises(ValueError, match=message):
        FoldedBags(bags_of([0, 1, 0, 1, 0, 1]), [fold], ["first"])


def test_one_class_is_nothing_to_learn():
    with pytest.raises(ValueError, match="all patients are b, one class"):
        FoldedBags(bags_of([1, 1, 1]), [], [])


def test_a_test_part_without_a_class_is_a_warning(caplog):
    fold = BagFold(np.array([0, 1]), np.array([2, 3]), np.array([4]))
    FoldedBags(bags_of([0, 1, 0, 1, 0]), [fold], ["first"])
    assert "fold first: no patient of b in its part test" in caplog.text


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


def unlabelled() -> PatientBags:
    bags = bags_of([0, 1, 0, 1, 0], patients=list("abcde"))
    return PatientBags(bags.patients, bags.features, bags.cells)


def test_official_folds(fold_folder, caplog):
    data = folds_from_files(unlabelled(), fold_folder)
    assert data.fold_names == ["data_fold_9", "data_fold_10"]
    assert parts(data.folds[0]) == ([1, 2], [0], [3])
    assert data.bags.label_of() == {"a": "NPM1", "b": "control", "c": "NPM1", "d": "control"}
    assert "1 of 5 bags are in no fold and left out" in caplog.text


def test_official_folds_may_share_a_test_set(fold_folder):
    (fold_folder / "data_fold_9" / "test.csv").rename(fold_folder / "test.csv")
    assert parts(folds_from_files(unlabelled(), fold_folder).folds[0]) == ([1, 2], [0], [3])
    (fold_folder / "test.csv").unlink()
    with pytest.raises(FileNotFoundError, match="data_fold_9/test.csv: no such file"):
        folds_from_files(unlabelled(), fold_folder)


def test_official_folds_that_leak_or_contradict_themselves(fold_folder):
    test = fold_folder / "data_fold_9" / "test.csv"
    test.write_text("patient,label\nb,1\n")
    with pytest.raises(ValueError, match="fold data_fold_9: 1 patients are in it more than once"):
        folds_from_files(unlabelled(), fold_folder)
    test.write_text("patient,label\nd,0\n")
    with pytest.raises(ValueError, match="'d' 'NPM1' and 'control'"):
        folds_from_files(unlabelled(), fold_folder)
    test.write_text("patient,label\nd,2\n")
    with pytest.raises(ValueError, match="the label '2', which label_to_diagnose.csv does not name"):
        folds_from_files(unlabelled(), fold_folder)
    with pytest.raises(FileNotFoundError, match=r"no folder in .* has a train.csv"):
        folds_from_files(unlabelled(), fold_folder / "data_fold_9")


def test_official_folds_of_files_that_name_patients_and_classes_otherwise(fold_folder):
    for file in fold_folder.glob("*/*.csv"):
        file.write_text(file.read_text().replace("patient_name", "patient_files"))
    (fold_folder / "label_to_diagnose.csv").write_text("label_name,label_id\n0,0\n1,1\n")
    data = folds_from_files(unlabelled(), fold_folder)
    assert data.bags.label_of() == {"a": "0", "b": "1", "c": "0", "d": "1"}


def labelled(**label_of: str) -> PatientBags:
    return unlabelled().with_labels({"e": "left out", **label_of})


def test_classes_of_bags_may_have_other_names_than_in_the_files(fold_folder, caplog):
    caplog.set_level("INFO")
    data = folds_from_files(labelled(a="AML-NPM1", b="SCD", c="AML-NPM1", d="SCD"), fold_folder)
    assert data.bags.label_of() == {"a": "AML-NPM1", "b": "SCD", "c": "AML-NPM1", "d": "SCD"}
    assert parts(data.folds[0]) == ([1, 2], [0], [3])
    assert "other names in the fold files: AML-NPM1 is NPM1, SCD is control" in caplog.text
    assert "different classes" not in caplog.text


def test_classes_of_bags_that_are_not_those_of_the_files_are_a_warning(fold_folder, caplog):
    data = folds_from_files(labelled(a="male", b="female", c="male", d="male"), fold_folder)
    assert data.bags.label_of()["c"] == "male"
    assert "those of the bags count: female is control, male is NPM1, male is control" in caplog.text


def test_labels_of_bags_and_files_that_contradict_each_other(fold_folder):
    with pytest.raises(ValueError, match="bags and --fold-files: 1 patients have two labels, for instance 'c'"):
        folds_from_files(labelled(a="NPM1", b="control", c="control", d="control"), fold_folder)


def test_official_patients_without_a_bag(fold_folder):
    (fold_folder / "data_fold_9" / "val.csv").write_text("patient_name,labels\na,0\nPatient_02,0\n")
    with pytest.raises(ValueError, match=r"1 of 5 patients have no bag \('Patient_02'\).* 5 bags are of 'a', .*drop"):
        folds_from_files(unlabelled(), fold_folder)


def test_folds_are_written_and_read_back(tmp_path, fold_folder):
    data = folds_from_files(unlabelled(), fold_folder)
    data.write(tmp_path / "folds.csv")
    again = folds_from_files(unlabelled(), tmp_path / "folds.csv")
    assert [parts(fold) for fold in again.folds] == [parts(fold) for fold in data.folds]
    assert (again.fold_names, again.bags.label_of()) == (data.fold_names, data.bags.label_of())
    columns = ["fold", "part", "patient", "label"]
    assert list(pd.read_csv(tmp_path / "folds.csv").columns) == columns


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0,train,a,x\n0,val,b,y\n0,tset,c,y\n", "has the part 'tset'; write train, val, test"),
        ("0,train,a,x\n0,val,b,y\n", "fold 0: its part test has no patient"),
        ("0,train,a,x\n0,train,b,y\n0,val,c,x\n0,test,a,x\n", "fold 0: 1 patients are in it more than once"),
    ],
)
def test_fold_tables_that_make_no_folds(tmp_path, rows, message):
    (tmp_path / "folds.csv").write_text("fold,part,patient,label\n" + rows)
    with pytest.raises(ValueError, match=message):
        folds_from_files(unlabelled(), tmp_path / "folds.csv")

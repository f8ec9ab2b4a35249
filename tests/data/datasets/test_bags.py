"""Bags of cells from arrays, folders and CSVs; official folds; and clear errors for wrong ones."""

import h5py
import numpy as np
import pytest

from dinov2.data.datasets.bags import PatientBags, read_patient_labels

DIM = 4


def bag(patient: str, n_cells: int = 3) -> np.ndarray:
    """Features that tell the patient."""
    return np.arange(n_cells * DIM, dtype=np.float32).reshape(n_cells, DIM) + sum(map(ord, patient))


def write_bag(path, features, paths=None, **attributes):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = features
        if paths is not None:
            file.create_dataset("paths", data=paths, dtype=h5py.string_dtype())
        file.attrs.update(attributes)


@pytest.fixture
def class_folders(tmp_path):
    """Written in an order that neither directory listings nor sorting would give."""
    folder = tmp_path / "bags"
    for label, patient, n_cells in (("NPM1", "p9", 2), ("control", "p2", 3), ("CBFB", "p5", 1), ("control", "p1", 4)):
        write_bag(folder / label / f"{patient}.h5", bag(patient, n_cells))
    return folder


def test_class_folders(class_folders):
    (class_folders / "empty").mkdir()
    (class_folders / ".hidden").mkdir()
    bags = PatientBags.from_path(class_folders)
    assert bags.patients == ["p1", "p2", "p5", "p9"]
    assert bags.class_names == ["CBFB", "NPM1", "control"]  # sorted, whatever order the file system has
    assert [bags.class_names[i] for i in bags.labels] == ["control", "control", "CBFB", "NPM1"]
    assert [len(cells) for cells in bags.features] == [4, 3, 1, 2]
    np.testing.assert_array_equal(bags.features[1], bag("p2", 3))
    assert bags.cells[2] == [str(class_folders / "CBFB" / "p5.h5")]
    assert bags.cells[3][1] == f"{class_folders / 'NPM1' / 'p9.h5'}:1"


def test_a_file_per_cell_and_float16(tmp_path):
    for i in (2, 0, 1):
        write_bag(tmp_path / "NPM1" / "p1" / f"cell_{i}.h5", bag("p1")[i].astype(np.float16))
    write_bag(tmp_path / "control" / "p2.h5", bag("p2"))
    bags = PatientBags.from_path(tmp_path)
    np.testing.assert_array_equal(bags.features[0], bag("p1"))
    assert bags.features[0].dtype == np.float32
    assert bags.cells[0][2] == str(tmp_path / "NPM1" / "p1" / "cell_2.h5")


def test_one_folder_with_labels_beside(tmp_path):
    for patient in ("p2", "p1"):
        write_bag(tmp_path / "bags" / f"{patient}.h5", bag(patient), paths=[f"{patient}_{i}.png" for i in range(3)])
    (tmp_path / "labels.csv").write_text("\ufeffpatient_name, labels\np1,a\np2,b\n,\n")
    bags = PatientBags.from_path(tmp_path / "bags")
    assert bags.labels is None
    assert bags.cells[1] == ["p2_0.png", "p2_1.png", "p2_2.png"]
    labelled = bags.with_labels(read_patient_labels(tmp_path / "labels.csv"))
    assert labelled.labels.tolist() == [0, 1]
    assert labelled.labels.dtype == np.int64


def test_a_csv_of_files(tmp_path):
    for name in ("one", "two", "other"):
        write_bag(tmp_path / "h5" / f"{name}.h5", bag(name))
    table = tmp_path / "bags.csv"
    table.write_text("patient,label,file\np2,b,h5/one.h5\np1,a,h5/other.h5\np2,b,h5/two.h5\n")
    bags = PatientBags.from_path(table)
    assert bags.patients == ["p1", "p2"]
    np.testing.assert_array_equal(bags.features[1], np.concatenate([bag("one"), bag("two")]))
    table.write_text("patient,file\np1,h5/other.h5\n")
    assert PatientBags.from_path(table).labels is None
    table.write_text("patient,label,file\np1,a,h5/no.h5\n")
    with pytest.raises(FileNotFoundError, match=r"1 of the 1 files .* do not exist, for instance .*no.h5"):
        PatientBags.from_path(table)


def test_cells_in_one_array():
    features = np.arange(24, dtype=np.float64).reshape(6, 4)
    bags = PatientBags.from_cells(
        features, list("bababb"), [f"{i}.png" for i in range(6)], list("yxyxyy"), {"model": "m"}
    )
    assert bags.patients == ["a", "b"]
    np.testing.assert_array_equal(bags.features[0], features[[1, 3]].astype(np.float32))
    assert bags.cells == [["1.png", "3.png"], ["0.png", "2.png", "4.png", "5.png"]]
    assert bags.labels.tolist() == [0, 1]
    assert bags.class_names == ["x", "y"]
    assert bags.attributes == {"model": "m"}


def test_selection_and_two_sets_as_one():
    train = PatientBags(["b", "d"], [bag("b"), bag("d")], [[""] * 3] * 2).with_labels({"b": "x", "d": "y"})
    test = PatientBags(["a", "c"], [bag("a"), bag("c")], [[""] * 3] * 2).with_labels({"a": "y", "c": "y"})
    joined, positions = train.joined(test)
    assert joined.patients == ["a", "b", "c", "d"]
    assert joined.labels.tolist() == [1, 0, 1, 1]
    assert positions.tolist() == [0, 2]
    np.testing.assert_array_equal(joined.features[3], bag("d"))
    part = joined.select(np.array([3, 1]))
    assert part.patients == ["b", "d"]
    assert part.labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"2 patients are in the training and in the test set \('b', 'd'\)"):
        train.joined(train)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"p1": np.zeros((0, DIM))}, "'p1' has features of shape .*a bag without cells"),
        ({"p1": bag("p1"), "p2": np.full((2, DIM), np.nan)}, "2 of the 2 cells of patient 'p2' have infinite or NaN"),
        ({"p1": bag("p1"), "p2": bag("p2"), "p3": np.zeros((2, 5))}, r"4, 5 dimensions are mixed.*\('p3' differ"),
        ({}, "there is no patient"),
    ],
)
def test_bags_that_cannot_be_learned_from(features, message):
    arrays = [np.asarray(array, dtype=np.float32) for array in features.values()]
    with pytest.raises(ValueError, match=message):
        PatientBags(list(features), arrays, [[""] * len(array) for array in arrays])


def test_a_patient_with_two_labels(tmp_path, class_folders):
    with pytest.raises(ValueError, match="1 patients have two labels, for instance 'p' 'x' and 'y'"):
        PatientBags.from_cells(np.zeros((2, DIM)), ["p", "p"], ["", ""], ["x", "y"])
    write_bag(class_folders / "NPM1" / "p1.h5", bag("p1"))
    with pytest.raises(ValueError, match="'p1' 'NPM1' and 'control'"):
        PatientBags.from_path(class_folders)
    (tmp_path / "labels.csv").write_text("patient,label\np1,a\np1,b\n")
    with pytest.raises(ValueError, match=r"labels .*labels.csv.*two labels"):
        read_patient_labels(tmp_path / "labels.csv")


def test_missing_patients_and_labels(tmp_path):
    bags = PatientBags(["p1", "p2"], [bag("p1"), bag("p2")], [[""] * 3] * 2)
    with pytest.raises(ValueError, match=r"1 of 2 bags have none \('p2'\)"):
        bags.with_labels({"p1": "a"})
    with pytest.raises(ValueError, match=r"labels: 2 of 4 patients have no bag \('p3', 'p4'\)"):
        bags.with_labels({"p1": "a", "p2": "b", "p3": "a", "p4": "a"})
    with pytest.raises(ValueError, match="folds: 1 of 2 patients have no bag"):
        bags.positions(["p1", "p7"], "folds")
    with pytest.raises(ValueError, match="the features name no patients"):
        PatientBags.from_cells(np.zeros((2, DIM)), None, ["", ""])


def test_features_of_two_networks(tmp_path):
    for i, checksum in enumerate(["aa", "bb"]):
        write_bag(tmp_path / f"p{i}.h5", bag("p"), checkpoint_sha256=checksum, transform="crop", date=str(i))
    with pytest.raises(ValueError, match="different networks are mixed, their checkpoint_sha256 is 'aa', 'bb'"):
        PatientBags.from_path(tmp_path)
    write_bag(tmp_path / "p1.h5", bag("p"), checkpoint_sha256="aa", transform="crop", date="1")
    assert PatientBags.from_path(tmp_path).attributes == {"checkpoint_sha256": "aa", "transform": "crop"}
    write_bag(tmp_path / "p1.h5", bag("p"))
    with pytest.raises(ValueError, match="different networks are mixed, their checkpoint_sha256 is 'aa', None"):
        PatientBags.from_path(tmp_path)


def test_folders_that_are_no_bags(tmp_path, class_folders):
    with pytest.raises(FileNotFoundError, match="does not exist; give a folder of .h5 files"):
        PatientBags.from_path(tmp_path / "no")
    (tmp_path / "bags.txt").touch()
    with pytest.raises(ValueError, match="neither a folder nor a .csv or .parquet file"):
        PatientBags.from_path(tmp_path / "bags.txt")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="no .h5 file in"):
        PatientBags.from_path(tmp_path / "nothing")
    (class_folders / "NPM1" / "p7").mkdir()
    with pytest.raises(ValueError, match="bags without cells: 'NPM1/p7'"):
        PatientBags.from_path(class_folders)
    (class_folders / "NPM1" / "p7").rmdir()
    write_bag(class_folders / "loose.h5", bag("p"))
    with pytest.raises(ValueError, match=r"has .h5 files \(loose.h5, ...\) beside folders"):
        PatientBags.from_path(class_folders)


def test_files_that_are_no_bags(tmp_path):
    (tmp_path / "p1.h5").write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match=r"p1.h5' is not an HDF5 file or is damaged"):
        PatientBags.from_path(tmp_path)
    with h5py.File(tmp_path / "p1.h5", "w") as file:
        file["other"] = [1.0]
    with pytest.raises(ValueError, match="p1.h5' has no dataset features"):
        PatientBags.from_path(tmp_path)
    write_bag(tmp_path / "p1.h5", np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match=r"features of shape \[2, 3, 4\]; 1 or 2 dimension"):
        PatientBags.from_path(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patient,diagnosis\np1,a\n", "lacks the column.s. 'label'"),
        ("patient,label\np1\n", "line 2: no value for 'label'"),
        ("patient,label\n", "has no rows"),
        (b"patient,label\np\xff,a\n", "is not UTF-8"),
    ],
)
def test_tables_with_gaps(tmp_path, text, message):
    file = tmp_path / "labels.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_patient_labels(file)

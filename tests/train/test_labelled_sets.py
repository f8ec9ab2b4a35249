"""evaluation.datasets: which cells are for training and testing, and the errors for mistakes before a run starts."""

import csv

import pytest
from omegaconf import OmegaConf
from PIL import Image

from dinov2.data.splits import make_folds
from dinov2.train.evaluation import read_labelled_sets, without_copied_images


def read(*datasets, linear=False, knn_k=(1,)):
    return read_labelled_sets(OmegaConf.create({"datasets": list(datasets), "linear": linear, "knn_k": list(knn_k)}))


@pytest.fixture
def folders(tmp_path):
    """train/ and test/ with three images of two classes each, and alone/ with one class."""
    for side, classes in {"train": "ab", "test": "ab", "alone": "a"}.items():
        for name in classes:
            (tmp_path / side / name).mkdir(parents=True)
            for i in range(3):
                (tmp_path / side / name / f"{i}.png").touch()
    return tmp_path


@pytest.fixture
def patients_csv(tmp_path):
    """40 cells of ten patients and two classes."""
    rows = []
    for i in range(40):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
        rows.append((f"{i}.png", "ab"[i // 4 % 2], f"patient {i // 4}"))
    with open(tmp_path / "cells.csv", "w", newline="") as file:
        csv.writer(file).writerows([("Image Path", "Label", "patient"), *rows])
    return tmp_path / "cells.csv"


def test_two_sets_are_taken_as_they_are(folders):
    (found,) = read({"name": "x", "train": str(folders / "train"), "test": str(folders / "test")}, knn_k=(4, 1, 4))
    assert {path.parents[1].name for path in found.train.paths} == {"train"}
    assert {path.parents[1].name for path in found.test.paths} == {"test"}
    assert (found.ks, found.with_linear) == ([1, 4], False)


def test_one_set_is_split_as_the_commands_do_and_patients_stay_whole(patients_csv):
    first, again = (read({"name": "x", "data": str(patients_csv)})[0] for _ in range(2))
    assert first.test.paths == again.test.paths
    assert not set(first.train.patients) & set(first.test.patients)
    assert set(first.test.labels) == {0, 1}
    labels = [i // 4 % 2 for i in range(40)]
    _, test = make_folds(labels, [f"patient {i // 4}" for i in range(40)])[0]
    assert [path.name for path in first.test.paths] == [f"{i}.png" for i in test]


def test_a_set_has_settings_of_its_own(folders):
    cells = {"train": str(folders / "train"), "test": str(folders / "test")}
    first, second = read({"name": "x", "linear": False, **cells}, {"name": "y", "knn_k": [3], **cells}, linear=True)
    assert (first.with_linear, first.ks) == (False, [1])
    assert (second.with_linear, second.ks) == (True, [3])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"name": None}, ValueError, "entry 1: name must be a text"),
        ({"name": ""}, ValueError, "entry 1: it has no name; add one"),
        ({"name": 3}, ValueError, "name must be a text .in quotes"),
        ({"tset": "x"}, KeyError, "x: unknown key tset; there are name, data, train, test"),
        ({"zzz": "x"}, KeyError, "there are name, data, train, test, linear, knn_k"),
        ({"data": "x"}, ValueError, "x: found data and train and test; give data .one set, split here., or train"),
        ({"test": ""}, ValueError, "x: found train; give"),
        ({"train": "", "test": ""}, ValueError, "x: found no cells; give"),
        ({"linear": "yes"}, ValueError, "linear must be true or false, found 'yes'"),
        ({"knn_k": []}, ValueError, "knn_k must be a list of whole numbers above 0"),
        ({"knn_k": [0]}, ValueError, "knn_k must be a list of whole numbers above 0"),
        ({"knn_k": 5}, ValueError, "knn_k must be a list of whole numbers above 0"),
        ({"knn_k": [7]}, ValueError, "x: knn_k asks for 7 neighbours of 6 training cells"),
        ({"test": "nowhere"}, FileNotFoundError, "x: labelled cells: 'nowhere' does not exist"),
        ({"test": "{}/train"}, ValueError, "x: training and test cells share 6 images, for instance .*0.png"),
        ({"train": "{}/alone", "test": "{}/train/a"}, ValueError, "x: .*expected one folder per class"),
        ({"train": "{}/test", "test": "{}"}, ValueError, "x: .*not among the known classes"),
    ],
)
def test_mistakes_name_the_set_and_what_to_do(folders, change, error, text):
    entry = {"name": "x", "train": "{}/train", "test": "{}/test", **change}
    entry = {key: value.format(folders) if isinstance(value, str) else value for key, value in entry.items()}
    with pytest.raises(error, match=text):
        read(entry)


def test_one_class_only(folders):
    (folders / "other" / "a").mkdir(parents=True)
    (folders / "other" / "a" / "0.png").touch()
    with pytest.raises(ValueError, match="x: all 3 training cells are of class 'a'; two classes or more"):
        read({"name": "x", "train": str(folders / "alone"), "test": str(folders / "other")})


def test_a_set_too_small_to_split(folders):
    with pytest.raises(ValueError, match="a fifth of its 6 cells cannot be set apart.*give train and test instead"):
        read({"name": "x", "data": str(folders / "train")})


def test_no_number_of_neighbours_at_all(folders):
    with pytest.raises(ValueError, match="x: knn_k must be a list of whole numbers"):
        read({"name": "x", "train": str(folders / "train"), "test": str(folders / "test")}, knn_k=())


def test_two_sets_of_one_name(folders):
    entry = {"name": "x", "train": str(folders / "train"), "test": str(folders / "test")}
    with pytest.raises(ValueError, match="two sets have the same name among x, x"):
        read(entry, entry)


def test_training_images_that_are_copies_of_test_images_are_left_out(folders):
    for i, path in enumerate(sorted(folders.rglob("*.png"))):
        path.write_bytes(bytes([i, i]))
    (folders / "train" / "a" / "1.png").write_bytes((folders / "test" / "b" / "2.png").read_bytes())
    (folders / "train" / "a" / "0.png").write_bytes((folders / "train" / "a" / "2.png").read_bytes())
    (found,) = read({"name": "x", "train": str(folders / "train"), "test": str(folders / "test")})
    clean = without_copied_images(found)
    left = [str(path.relative_to(folders / "train")) for path in clean.train.paths]
    assert left == ["a/0.png", "a/2.png", "b/0.png", "b/1.png", "b/2.png"]
    assert clean.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert clean.test is found.test


def test_classes_without_a_training_cell_are_named(tmp_path, caplog):
    rows = []
    for patient in range(10):  # each alone has a class of its own
        for i, label in enumerate(("common", "common", f"only {patient}")):
            (tmp_path / f"{patient}_{i}.png").touch()
            rows.append((f"{patient}_{i}.png", label, f"patient {patient}"))
    with open(tmp_path / "cells.csv", "w", newline="") as file:
        csv.writer(file).writerows([("Image Path", "Label", "patient"), *rows])
    (found,) = read({"name": "x", "data": str(tmp_path / "cells.csv")})
    names = ", ".join(f"only {patient.split()[1]}" for patient in sorted(set(found.test.patients)))
    assert f"x: test classes without a training cell, always predicted wrong: {names}" in caplog.text

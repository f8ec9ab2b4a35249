"""The ABMIL command on miniatures of published sets of bags: `<patient>.h5` files, and folders of official folds."""

import csv
import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from dinov2.eval.abmil import main
from dinov2.eval.results import read_predictions

HEHR = ["AML-CBFB-MYH11", "AML-NPM1", "AML-PML-RARA", "AML-RUNX1-RUNX1T1", "SCD"]
SETS = {  # the column of patients, classes, and ids of the four patients of each class
    "aml_hehr": ("patient_name", HEHR, [[f"{a}{b}X" for b in "QRST"] for a in "ABCDE"]),
    "apl_aml": ("patient_files", ["0", "1"], [[f"Patient_{4 * i + j:02d}" for j in range(4)] for i in range(2)]),
}
DIM = 8
FOLDS = [{"train": (0, 1), "val": (2,), "test": (3,)}, {"train": (0, 2), "val": (1,), "test": (3,)}]  # of each class


def write_table(file: Path, *rows: tuple) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="") as stream:
        csv.writer(stream).writerows(rows)


def write_set(folder: Path, name: str) -> dict[str, str]:
    """Write bags, in which some cells show the class, and the files of two folds; return {patient: class}."""
    column, classes, patients = SETS[name]
    rng = np.random.default_rng(0)
    (folder / "bags").mkdir()
    for label, of_class in enumerate(patients):
        for patient in of_class:
            cells = rng.normal(size=(rng.integers(5, 9), DIM))
            cells[:3, label] += 6
            with h5py.File(folder / "bags" / f"{patient}.h5", "w") as stream:
                stream["features"] = cells.astype(np.float32)
    for number, parts in enumerate(FOLDS):
        for part, places in parts.items():
            rows = [(of_class[place], label) for label, of_class in enumerate(patients) for place in places]
            write_table(folder / "folds" / f"data_fold_{number}" / f"{part}.csv", (column, "labels"), *rows)
    names = [(label, i) for i, label in enumerate(classes)]
    write_table(folder / "folds" / "label_to_diagnose.csv", ("label_name", "label_id"), *names)
    return {patient: label for label, of_class in zip(classes, patients, strict=True) for patient in of_class}


def run(folder: Path, *flags: str) -> dict:
    bags, folds, output = (str(folder / name) for name in ("bags", "folds", "out"))
    main(["--bags", bags, "--fold-files", folds, "--output-dir", output, "--epochs", "3", "--runs", "1", *flags])
    return json.loads((folder / "out" / "results.json").read_text())


@pytest.mark.parametrize("name", SETS)
def test_one_command_takes_published_bags_and_folds_as_they_are(tmp_path, name):
    label_of = write_set(tmp_path, name)
    _, classes, patients = SETS[name]
    report = run(tmp_path)
    n = len(classes)
    assert report["class_names"] == classes
    assert report["counts"]["folds"] == [{"train": 2 * n, "val": n, "test": n}] * 2
    predicted = read_predictions(tmp_path / "out" / "predictions.csv")
    assert predicted.keys == [of_class[3] for of_class in patients], "all folds have one test set"
    assert predicted.labels == [label_of[patient] for patient in predicted.keys]
    with open(tmp_path / "out" / "folds.csv", newline="") as stream:
        rows = [tuple(row.values()) for row in csv.DictReader(stream)]
    assert rows[0] == ("data_fold_0", "train", patients[0][0], classes[0])
    assert len(rows) == 2 * len(label_of)


def test_bags_keep_their_own_names_of_the_classes(tmp_path):
    """As the bags of a preparer and `extract_features.py --layout genbloom` have them."""
    label_of = write_set(tmp_path, "apl_aml")
    for patient, label in label_of.items():
        folder = tmp_path / "bags" / {"0": "APL", "1": "AML"}[label]
        folder.mkdir(exist_ok=True)
        (tmp_path / "bags" / f"{patient}.h5").rename(folder / f"{patient}.h5")
    assert run(tmp_path)["class_names"] == ["AML", "APL"]
    assert read_predictions(tmp_path / "out" / "predictions.csv").labels == ["APL", "AML"]


def test_a_patient_of_the_folds_without_a_bag(tmp_path):
    write_set(tmp_path, "aml_hehr")
    (tmp_path / "bags" / "ASX.h5").unlink()
    with pytest.raises(ValueError, match=r"1 of 20 patients have no bag \('ASX'\).*drop their rows from a copy"):
        run(tmp_path)
    assert not (tmp_path / "out").exists()
    # as docs/evaluation.md says: the other patients are enough
    for file in (tmp_path / "folds").glob("*/*.csv"):
        rows = file.read_text().splitlines(keepends=True)
        file.write_text("".join(row for row in rows if not row.startswith("ASX,")))
    assert run(tmp_path)["counts"]["patients"] == 19

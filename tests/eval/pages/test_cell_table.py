import numpy as np
import pytest

from dinov2.eval.features import Features
from dinov2.eval.pages.cell_table import cell_table

NAMES = ["x", "y", "z"]


def make_cells(n: int = 12, **changes) -> Features:
    parts = {
        "features": np.zeros((n, 6), np.float32),
        "labels": np.arange(n) % 3,
        "class_names": NAMES,
        "paths": [f"/images/{i}.png" for i in range(n)],
        "patients": [f"p{i % 4}" for i in range(n)],
    }
    return Features(**(parts | changes))


def write(file, *lines):
    file.write_text("\n".join(lines) + "\n")
    return file


def test_predictions_of_patients_go_to_their_cells(tmp_path):
    write(tmp_path / "predictions.csv", "patient,label,prediction,fold,p_x,p_y", "p0,x,x,0,0.9,0.1", "p3,x,y,0,0.2,0.8")
    table = cell_table({"s": make_cells()}, tmp_path)
    assert list(table) == ["label", "path", "patient", "prediction", "right", "probability"]
    assert table["prediction"].tolist() == ["x", "", "", "y"] * 3
    assert table["right"].tolist() == ["right", "", "", "wrong"] * 3
    assert table["probability"].tolist() == ["0.9", "", "", "0.8"] * 3


def test_predictions_of_images_go_to_their_cells(tmp_path):
    file = write(tmp_path / "p.csv", "path,prediction", "/images/1.png,y", "/images/2.png,x", "/other.png,z")
    table = cell_table({"s": make_cells(paths=["/images/1.png", "/images/2.png"] * 6)}, file)
    assert table["prediction"].tolist() == ["y", "x"] * 6
    assert "right" not in table  # the file has no labels, and those of a patient are not the classes of the cells


@pytest.mark.parametrize(
    ("name", "lines", "first"),
    [
        ("predictions", ["path,label,prediction", "/other.png,x,x", "/another.png,x,x"], "/other.png"),
        ("predictions", ["patient,prediction", "stranger,x"], "stranger"),
        ("columns", ["path,site", "/other.png,here"], "/other.png"),
        ("columns", ["path,site"], "begins with"),
        ("columns", [], "begins with"),
        ("columns", ["path", "/images/1.png"], "other columns beside"),
    ],
)
@pytest.mark.parametrize("patients", [None, ["p0"] * 12])
def test_a_file_that_fits_no_cell_is_an_error(tmp_path, name, lines, first, patients):
    file = write(tmp_path / "file.csv", *lines)
    with pytest.raises(ValueError, match=f"file.csv' has no row for a cell of the features.*{first}"):
        cell_table({"s": make_cells(patients=patients)}, **{name: file})


def test_more_columns_come_from_a_csv(tmp_path):
    cells = make_cells(20, paths=[str(tmp_path / "sub" / ".." / f"{i}.png") for i in range(20)])
    rows = [f"{i}.png,{i / 7},site {i % 2}" for i in range(19)]
    file = write(tmp_path / "more.csv", "path,age,site", *rows, "./0.png,99,a second row of the image")
    table = cell_table({"s": cells}, columns=file)
    assert table["age"].tolist() == [*(str(i / 7) for i in range(19)), ""]
    assert table["site"].tolist() == [*(f"site {i % 2}" for i in range(19)), ""]
    file = write(tmp_path / "absolute.csv", "path,site", f"{tmp_path / '3.png'},here")
    assert cell_table({"s": cells}, columns=file)["site"].tolist() == ["", "", "", "here", *[""] * 16]


def test_a_csv_stands_in_for_unknown_patients_only(tmp_path):
    file = write(tmp_path / "more.csv", "path,patient,label,site", *(f"/images/{i}.png,q,w,s" for i in range(12)))
    table = cell_table({"s": make_cells()}, columns=file)
    assert list(table) == ["label", "path", "patient", "site"]
    assert table.iloc[0].tolist() == ["x", "/images/0.png", "p0", "s"]
    assert cell_table({"s": make_cells(patients=None)}, columns=file)["patient"][0] == "q"


def test_sets_with_other_classes_are_joined_and_their_patients_kept_apart():
    second = make_cells(3, labels=np.array([0, 1, 1]), class_names=["new", "x"], patients=["p0", "q", ""])
    third = make_cells(1, patients=None)
    table = cell_table({"A": make_cells(6), "B": second, "C": third})
    assert table["data_set"].tolist() == ["A"] * 6 + ["B"] * 3 + ["C"]
    assert table["label"].tolist() == ["x", "y", "z"] * 2 + ["new", "x", "x", "x"]
    assert table["patient"].tolist() == ["p0 (A)", "p1", "p2", "p3", "p0 (A)", "p1", "p0 (B)", "q", "", ""]
    assert list(cell_table({"C": third})) == ["label", "path"]

import numpy as np
import pandas as pd
import pytest

from dinov2.eval.features import Features
from dinov2.eval.pages.cell_table import cell_table, join_sets, prediction_columns, read_columns
from dinov2.eval.results import read_predictions

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


def test_predictions_of_patients_go_to_their_cells(tmp_path):
    (tmp_path / "p.csv").write_text("patient,label,prediction,fold,p_x,p_y\np0,x,x,0,0.9,0.1\np3,x,y,0,0.2,0.8\n")
    table = prediction_columns(make_cells(), read_predictions(tmp_path / "p.csv"))
    assert table["prediction"].tolist() == ["x", "", "", "y"] * 3
    assert table["right"].tolist() == ["right", "", "", "wrong"] * 3
    np.testing.assert_allclose(table["probability"][:4], [0.9, np.nan, np.nan, 0.8])
    np.testing.assert_allclose(table["label_probability"][:4], [0.9, np.nan, np.nan, 0.2])
    np.testing.assert_allclose(table["p_y"][:4], [0.1, np.nan, np.nan, 0.8])


def test_a_patients_label_is_not_the_class_of_its_cells(tmp_path):
    (tmp_path / "p.csv").write_text("patient,prediction\np0,x\n")
    assert list(prediction_columns(make_cells(), read_predictions(tmp_path / "p.csv"))) == ["prediction"]
    (tmp_path / "p.csv").write_text("path,prediction\n/images/1.png,y\n/images/2.png,x\n")
    table = prediction_columns(make_cells(), read_predictions(tmp_path / "p.csv"))
    assert table["right"].tolist() == ["", "right", "wrong", *[""] * 9]


def test_predictions_that_fit_no_cell_are_an_error(tmp_path):
    (tmp_path / "p.csv").write_text("path,label,prediction\n/images/1.png,x,x\n/images/2.png,x,x\n")
    with pytest.raises(ValueError, match="none of the 2 is for a cell"):
        prediction_columns(make_cells(paths=[f"/other/{i}" for i in range(12)]), read_predictions(tmp_path / "p.csv"))
    (tmp_path / "p.csv").write_text("patient,prediction\nz,x\n")
    with pytest.raises(ValueError, match="by patient"):
        prediction_columns(make_cells(patients=None), read_predictions(tmp_path / "p.csv"))


def test_more_columns_come_from_a_csv(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(20)]
    rows = [f"{i}.png,{i / 7},{i % 3},site {i % 2}" for i in range(19)]
    (tmp_path / "more.csv").write_text("\n".join(["path,age,grade,site", *rows]) + "\n")
    table = read_columns(tmp_path / "more.csv", paths)
    np.testing.assert_allclose(table["age"], [*(i / 7 for i in range(19)), np.nan], rtol=1e-6)
    assert table["grade"].tolist() == [*(str(i % 3) for i in range(19)), ""]
    assert table["site"].tolist() == [*(f"site {i % 2}" for i in range(19)), ""]
    (tmp_path / "absolute.csv").write_text(f"path,site\n{paths[3]},here\n")
    assert read_columns(tmp_path / "absolute.csv", paths)["site"].tolist() == ["", "", "", "here", *[""] * 16]
    with pytest.raises(ValueError, match="no row for an image"):
        read_columns(tmp_path / "more.csv", ["/elsewhere.png"])


def test_a_csv_stands_in_for_unknown_patients_only():
    columns = pd.DataFrame({"patient": ["q"] * 12, "label": ["w"] * 12, "site": ["s"] * 12})
    table = cell_table(make_cells(), columns=columns)
    assert list(table) == ["label", "patient", "site"]
    assert table["patient"][0] == "p0"
    assert cell_table(make_cells(patients=None), columns=columns)["patient"][0] == "q"


def test_sets_with_other_classes_are_joined_and_their_patients_kept_apart():
    first = make_cells(6)
    second = make_cells(3, labels=np.array([0, 1, 1]), class_names=["new", "x"], patients=["p0", "q", ""])
    cells, sets = join_sets({"A": first, "B": second})
    assert sets == ["A"] * 6 + ["B"] * 3
    assert [cells.class_names[i] for i in cells.labels[6:]] == ["new", "x", "x"]
    assert cells.patients == ["p0 (A)", "p1", "p2", "p3", "p0 (A)", "p1", "p0 (B)", "q", ""]
    assert join_sets({"A": first}) == (first, None)
    with pytest.raises(ValueError, match="numbers a cell"):
        join_sets({"A": first, "B": make_cells(3, features=np.zeros((3, 2), np.float32))})

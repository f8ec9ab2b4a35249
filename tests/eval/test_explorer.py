import base64
import csv
import json
import re

import numpy as np
import pytest
from PIL import Image

from dinov2.eval import explorer
from dinov2.eval.explorer import ExplorerSettings, drawn_rows, explorer_section, main, parse_arguments
from dinov2.eval.explorer_columns import Numbers, join_sets, prediction_columns, read_columns, read_predictions_of_cells
from dinov2.eval.features import Features, write_features
from dinov2.eval.pages import page_html
from dinov2.eval.results import FoldPredictions, write_predictions

NAMES = ['a, "quoted"', "</script><b>ü</b>", "line\nbreak"]
NO_UMAP = ExplorerSettings(with_umap=False)


def make_cells(n: int = 12, seed: int = 0, **changes) -> Features:
    rng = np.random.default_rng(seed)
    parts = {
        "features": rng.normal(size=(n, 6)).astype(np.float32),
        "labels": np.arange(n) % 3,
        "class_names": NAMES,
        "paths": [f"/pictures/{i}.png" for i in range(n)],
        "patients": [f"p{i % 4}" for i in range(n)],
    }
    return Features(**(parts | changes))


def array(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


def column(data: dict, id: str) -> dict:
    return next(found for found in data["columns"] if found["id"] == id)


def names_of(found: dict) -> list:
    return [found["names"][code] if code != 0xFFFFFFFF else None for code in array(found["codes"], "<u4")]


def write_some_predictions(path, cells: Features, tested: list[int]) -> None:
    predictions = np.full(len(cells), -1)
    predictions[tested] = [(cells.labels[i] + (i == tested[0])) % 3 for i in tested]
    probabilities = np.random.default_rng(1).dirichlet(np.ones(3), len(cells))
    folds = [(np.arange(0), np.array(tested))]
    found = FoldPredictions(folds, predictions, probabilities, [{}])
    write_predictions(path, cells.paths, cells.labels, found, cells.class_names, cells.patients)


def test_what_the_page_holds_is_what_was_computed():
    cells = make_cells()
    data = explorer_section(cells, settings=NO_UMAP, data_sets=["s"] * 6 + ["t"] * 6).data
    points = array(data["projections"][0]["points"], "<f4").reshape(-1, 2)
    centred = cells.features.astype(np.float64) - cells.features.mean(axis=0, dtype=np.float64)
    singular = np.linalg.svd(centred, compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(points, axis=0), singular[:2], rtol=1e-5)
    assert data["neighbours"]["k"] == 11
    nearest = array(data["neighbours"]["positions"], "<u4").reshape(12, 11)
    distances = array(data["neighbours"]["distances"], "<f4").reshape(12, 11)
    for i in range(12):
        expected = np.linalg.norm(cells.features[nearest[i]] - cells.features[i], axis=1)
        np.testing.assert_allclose(distances[i], expected, rtol=1e-5)
        assert (np.diff(expected) >= 0).all()
    assert [data["paths"]["start"] + rest for rest in data["paths"]["rest"]] == cells.paths
    assert names_of(column(data, "label")) == [NAMES[i] for i in cells.labels]
    assert names_of(column(data, "patient")) == cells.patients
    assert names_of(column(data, "data_set")) == ["s"] * 6 + ["t"] * 6
    assert array(data["rows"], "<u4").tolist() == list(range(12))
    assert dict(data["thumbnails"]["missing"])[4] == "No such file or directory"


def test_cosine_distances_are_one_less_similarity():
    cells = make_cells()
    data = explorer_section(cells, settings=ExplorerSettings(with_umap=False, metric="cosine")).data
    nearest = array(data["neighbours"]["positions"], "<u4").reshape(12, 11)
    unit = cells.features / np.linalg.norm(cells.features, axis=1, keepdims=True)
    expected = 1 - np.sort(unit @ unit[0])[::-1][1:]
    np.testing.assert_allclose(array(data["neighbours"]["distances"], "<f4")[:11], expected, atol=1e-6)
    np.testing.assert_allclose(1 - unit[nearest[0]] @ unit[0], expected, atol=1e-6)


def test_names_cannot_end_their_script_block():
    html = page_html("x", [explorer_section(make_cells(), settings=NO_UMAP)])
    block = re.search(r'id="data-explorer">(.*?)</script>', html, re.DOTALL).group(1)
    assert json.loads(block)["columns"][0]["names"] == NAMES
    assert "<b>ü</b>" not in html


def test_predictions_are_matched_by_path(tmp_path):
    cells = make_cells()
    write_some_predictions(tmp_path / "predictions.csv", cells, [8, 2, 5])
    found = read_predictions_of_cells(tmp_path)
    assert found.class_names == NAMES
    data = explorer_section(cells, tmp_path, settings=NO_UMAP).data
    guesses = {i: NAMES[(cells.labels[i] + (i == 8)) % 3] for i in (2, 5, 8)}
    assert names_of(column(data, "prediction")) == [guesses.get(i) for i in range(12)]
    assert names_of(column(data, "right")) == [{2: "right", 5: "right", 8: "wrong"}.get(i) for i in range(12)]
    rows = {row["path"]: row for row in csv.DictReader((tmp_path / "predictions.csv").open(newline=""))}
    confidence = array(column(data, "probability")["values"], "<f4")
    assert np.isnan(np.delete(confidence, [2, 5, 8])).all()
    for i, guess in guesses.items():
        row = rows[cells.paths[i]]
        assert confidence[i] == pytest.approx(float(row[f"p_{guess}"]), rel=1e-6)
        of_label = array(column(data, "label_probability")["values"], "<f4")[i]
        assert of_label == pytest.approx(float(row[f"p_{row['label']}"]), rel=1e-6)


def test_predictions_of_patients_go_to_their_cells(tmp_path):
    (tmp_path / "p.csv").write_text("patient,label,prediction,fold,p_x,p_y\np0,x,x,0,0.9,0.1\np3,x,y,0,0.2,0.8\n")
    cells = make_cells()
    prediction, right, probability, *_ = prediction_columns(cells, read_predictions_of_cells(tmp_path / "p.csv"))
    assert [prediction.names[c] if c >= 0 else None for c in prediction.codes] == ["x", None, None, "y"] * 3
    assert [right.names[c] if c >= 0 else None for c in right.codes] == ["right", None, None, "wrong"] * 3
    np.testing.assert_allclose(probability.values[:4], [0.9, np.nan, np.nan, 0.8], rtol=1e-6)


def test_predictions_that_fit_no_cell_are_an_error(tmp_path):
    write_some_predictions(tmp_path / "predictions.csv", make_cells(), [1, 2])
    with pytest.raises(ValueError, match="none of the 2 is for a cell"):
        explorer_section(make_cells(paths=[f"/other/{i}" for i in range(12)]), tmp_path, settings=NO_UMAP)
    (tmp_path / "p.csv").write_text("patient,prediction\nz,x\n")
    with pytest.raises(ValueError, match="by patient"):
        explorer_section(make_cells(patients=None), tmp_path / "p.csv", settings=NO_UMAP)
    (tmp_path / "bad.csv").write_text("name,guess\nz,x\n")
    with pytest.raises(ValueError, match="expected `path` or `patient` first"):
        read_predictions_of_cells(tmp_path / "bad.csv")


def test_more_columns_come_from_a_csv(tmp_path):
    cells = make_cells(20, paths=[str(tmp_path / f"{i}.png") for i in range(20)])
    rows = [f"{i}.png,{i / 7},{i % 3},site {i % 2}" for i in range(19)]
    (tmp_path / "more.csv").write_text("\n".join(["path,age,grade,site", *rows]) + "\n")
    age, grade, site = read_columns(tmp_path / "more.csv", cells.paths)
    assert isinstance(age, Numbers)
    np.testing.assert_allclose(age.values, [*(i / 7 for i in range(19)), np.nan], rtol=1e-6)
    assert grade.names == ["0", "1", "2"]
    assert site.codes.tolist() == [i % 2 for i in range(19)] + [-1]
    with pytest.raises(ValueError, match="none for a picture"):
        read_columns(tmp_path / "more.csv", ["/elsewhere.png"])


def test_sets_with_other_classes_are_joined_and_their_patients_kept_apart():
    first = make_cells(6)
    second = make_cells(3, seed=1, labels=np.array([0, 1, 1]), class_names=["new", NAMES[0]], patients=["p0", "q", ""])
    cells, sets = join_sets({"A": first, "B": second})
    assert sets == ["A"] * 6 + ["B"] * 3
    assert [cells.class_names[i] for i in cells.labels[6:]] == ["new", NAMES[0], NAMES[0]]
    assert cells.patients == ["p0 (A)", "p1", "p2", "p3", "p0 (A)", "p1", "p0 (B)", "q", ""]
    assert join_sets({"A": first}) == (first, None)
    with pytest.raises(ValueError, match="numbers a cell"):
        join_sets({"A": first, "B": make_cells(3, features=np.zeros((3, 2), np.float32))})


def test_of_more_cells_each_class_keeps_its_share():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [900, 99, 1]))
    rows = drawn_rows(labels, 100)
    assert np.bincount(labels[rows]).tolist() == [90, 9, 1]
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, drawn_rows(labels, 100))
    assert not np.array_equal(rows, drawn_rows(labels, 100, seed=1))
    assert len(drawn_rows(np.arange(50), 10)) == 10
    assert drawn_rows(labels, 1000).tolist() == list(range(1000))
    section = explorer_section(make_cells(), settings=ExplorerSettings(max_cells=7, with_umap=False))
    assert section.data["n"] == 7
    assert "Drawn at random from 12 cells" in section.html
    rows = array(section.data["rows"], "<u4")
    assert names_of(column(section.data, "label")) == [NAMES[i % 3] for i in rows]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_cells_of_one_class_without_patients(n):
    cells = make_cells(n, labels=np.zeros(n, int), patients=None, paths=["/same.png"] * n)
    data = explorer_section(cells).data
    assert data["neighbours"]["k"] == n - 1
    assert [projection["id"] for projection in data["projections"]] == ["pca"]
    assert "at least 8 cells" in data["missingProjection"]
    assert [found["id"] for found in data["columns"]] == ["label"]


def test_infinite_features_are_refused():
    features = np.full((4, 2), np.nan, np.float32)
    with pytest.raises(ValueError, match="infinite or NaN"):
        explorer_section(make_cells(4, features=features), settings=NO_UMAP)


def test_without_umap_learn_the_page_says_so(monkeypatch, caplog):
    monkeypatch.setattr(explorer, "has_umap", lambda: False)
    section = explorer_section(make_cells(), settings=ExplorerSettings())
    assert "umap-learn was not installed" in section.html
    assert "pip install umap-learn" in caplog.text
    with pytest.raises(SystemExit):
        parse_arguments(["--features", "x.h5", "--umap", "--output", "x.html"])


def test_the_command_writes_one_page_of_several_files(tmp_path, capsys):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        cells = make_cells(9, paths=[str(tmp_path / "red.png")] * 9)
        others = {"mean": np.ones((9, 2), np.float32)}
        write_features(tmp_path / name / "features.h5", Features(**(vars(cells) | {"others": others})))
    files = [str(tmp_path / "first" / "features.h5"), f"Zweite={tmp_path / 'second' / 'features.h5'}"]
    output = tmp_path / "out" / "explorer.html"
    main(["--features", *files, "--kind", "mean", "--no-umap", "--output", str(output)])
    assert "18 cells" in capsys.readouterr().out
    html = output.read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data-explorer">(.*?)</script>', html, re.DOTALL).group(1))
    assert column(data, "data_set")["names"] == ["first", "Zweite"]  # the folder, as both files have one name
    assert "features of kind mean with 2 numbers" in html
    assert data["thumbnails"]["missing"] == []
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("flags", [["--thumbnail-size", "4"], ["--seed", "-1"], ["--max-cells", "0"]])
def test_wrong_flags_end_the_command(flags):
    with pytest.raises(SystemExit):
        parse_arguments(["--features", "x.h5", "--output", "x.html", *flags])

import csv
import html
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dinov2.eval.features import Features
from dinov2.eval.pages import projection
from dinov2.eval.pages.explorer import ExplorerSettings, explorer_section, page_column, sample_by_class
from dinov2.eval.pages.page import page_html
from dinov2.eval.results import FoldPredictions, write_predictions

NAMES = ['a, "quoted"', "</script><b>ü</b>", "line\nbreak"]
NO_UMAP = ExplorerSettings(with_umap=False)


def make_cells(n: int = 12, **changes) -> Features:
    parts = {
        "features": np.random.default_rng(0).normal(size=(n, 6)).astype(np.float32),
        "labels": np.arange(n) % 3,
        "class_names": NAMES,
        "paths": [f"/images/{i}.png" for i in range(n)],
        "patients": [f"p{i % 4}" for i in range(n)],
    }
    return Features(**(parts | changes))


def data_of(section) -> dict:
    """The data of the page's script, with the cells in the order of the features."""
    data = json.loads(re.search(r'data-part="data">(.*?)</script>', section.html, re.DOTALL).group(1))
    order = np.argsort(data["rows"]).tolist()
    for name in ("paths", "thumbnails", "distances"):
        data[name] = [data[name][i] for i in order]
    data["neighbours"] = [[data["rows"][j] for j in data["neighbours"][i]] for i in order]
    for column in data["columns"]:
        names = [column["groups"][column["codes"][i]]["name"] for i in order]
        column["texts"] = [column["values"][i] for i in order] if "values" in column else names
    for plane in data["projections"]:
        plane["points"] = np.stack([plane["x"], plane["y"]], axis=1)[order]
    return data


def column(data: dict, id: str) -> dict:
    return next(one for one in data["columns"] if one["id"] == id)


def test_the_page_holds_what_was_computed():
    cells = make_cells()
    data = data_of(explorer_section(cells, settings=NO_UMAP, data_sets=["s"] * 6 + ["t"] * 6))
    centred = cells.features.astype(np.float64) - cells.features.mean(axis=0, dtype=np.float64)
    singular = np.linalg.svd(centred, compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(data["projections"][0]["points"], axis=0), singular[:2], rtol=1e-5)
    for i in range(12):
        expected = np.linalg.norm(cells.features[data["neighbours"][i]] - cells.features[i], axis=1)
        assert sorted([i, *data["neighbours"][i]]) == list(range(12))
        np.testing.assert_allclose(data["distances"][i], expected, rtol=5e-3)
        assert (np.diff(expected) >= 0).all()
    assert sorted(data["rows"]) == list(range(12))
    assert data["paths"] == cells.paths
    assert column(data, "label")["texts"] == [NAMES[i] for i in cells.labels]
    assert column(data, "patient")["texts"] == cells.patients
    assert column(data, "data_set")["texts"] == ["s"] * 6 + ["t"] * 6
    assert set(data["missing"].values()) == {"No such file or directory"}
    assert len(data["missing"]) == 12


def test_cosine_distances_are_one_less_similarity():
    cells = make_cells()
    data = data_of(explorer_section(cells, settings=ExplorerSettings(with_umap=False, metric="cosine")))
    unit = cells.features / np.linalg.norm(cells.features, axis=1, keepdims=True)
    expected = 1 - np.sort(unit @ unit[0])[::-1][1:]
    np.testing.assert_allclose(data["distances"][0], expected, rtol=5e-3)
    np.testing.assert_allclose(1 - unit[data["neighbours"][0]] @ unit[0], expected, atol=1e-6)
    with pytest.raises(ValueError, match="no direction"):
        explorer_section(make_cells(features=np.zeros((12, 2), np.float32)), settings=ExplorerSettings(metric="cosine"))


def test_names_cannot_end_their_script_block():
    page = page_html("x", [explorer_section(make_cells(), settings=NO_UMAP)])
    block = re.search(r'data-part="data">(.*?)</script>', page, re.DOTALL).group(1)
    assert [group["name"] for group in json.loads(block)["columns"][0]["groups"]] == NAMES
    assert "<b>ü</b>" not in page


def test_predictions_are_matched_by_path(tmp_path):
    cells = make_cells()
    predictions = np.full(12, -1)
    predictions[[2, 5, 8]] = [(cells.labels[i] + (i == 8)) % 3 for i in (2, 5, 8)]
    probabilities = np.random.default_rng(1).dirichlet(np.ones(3), 12)
    folds = [(np.arange(0), np.array([2, 5, 8]))]
    file = tmp_path / "predictions.csv"
    tested = FoldPredictions(folds, predictions, probabilities, [{}])
    write_predictions(file, cells.paths, cells.labels, tested, NAMES, cells.patients)
    data = data_of(explorer_section(cells, tmp_path, settings=NO_UMAP))
    guesses = {i: NAMES[predictions[i]] for i in (2, 5, 8)}
    assert column(data, "prediction")["texts"] == [guesses.get(i, "") for i in range(12)]
    assert column(data, "right")["texts"] == [{2: "right", 5: "right", 8: "wrong"}.get(i, "") for i in range(12)]
    # a class looks the same as a label and as a prediction
    looks = [{group["name"]: group["colour"] for group in column(data, id)["groups"]} for id in ("label", "prediction")]
    assert all(looks[0][name] == looks[1][name] for name in guesses.values())
    rows = {row["path"]: row for row in csv.DictReader(file.open(newline=""))}
    for i in range(12):
        shown = [column(data, id)["texts"][i] for id in ("probability", "label_probability", f"p_{NAMES[0]}")]
        if i not in guesses:
            assert shown == ["", "", ""]
            continue
        row = rows[cells.paths[i]]
        expected = [float(row[f"p_{name}"]) for name in (guesses[i], row["label"], NAMES[0])]
        np.testing.assert_allclose(np.array(shown, dtype=float), expected, rtol=5e-3)


def test_numbers_become_ranges_with_a_scale_of_colours():
    values = pd.Series([0.0, 0.05, 0.95, 1.0, np.nan])
    ranges = page_column("probability", values, NAMES)
    assert [group["name"] for group in ranges["groups"]] == ["0 to 0.1", "0.9 to 1", ""]
    assert [group["count"] for group in ranges["groups"]] == [2, 2, 1]
    assert ranges["codes"] == [0, 0, 1, 1, 2]
    assert ranges["values"] == ["0", "0.05", "0.95", "1", ""]
    assert len({group["colour"] for group in ranges["groups"]}) == 3
    ranges = page_column("year", pd.Series([2020.01, 2020.25, 2020.98]), NAMES)
    assert [group["name"] for group in ranges["groups"]] == ["2020 to 2020.1", "2020.2 to 2020.3", "2020.9 to 2021"]
    assert ranges["values"] == ["2020", "2020", "2020"]


def test_of_many_names_the_largest_groups_have_a_look_of_their_own():
    names = [f"name {i}" for i in range(50)]
    values = pd.Series([*names, *names[-20:]])
    groups = {group["name"]: group for group in page_column("site", values, NAMES)["groups"]}
    looks = {(groups[name]["colour"], groups[name]["marker"]) for name in names[-20:]}
    assert len(looks) == 20
    assert len({(group["colour"], group["marker"]) for group in groups.values()}) == 36  # and one for the others


def test_of_more_cells_each_class_keeps_its_share():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [900, 99, 1]))
    rows = sample_by_class(labels, 100)
    np.testing.assert_allclose(np.bincount(labels[rows]), [90, 9.9, 1], atol=1)
    assert len(rows) == len(set(rows)) == 100
    np.testing.assert_array_equal(rows, sample_by_class(labels, 100))
    assert not np.array_equal(rows, sample_by_class(labels, 100, seed=1))
    assert len(sample_by_class(np.arange(50), 10)) == 10
    assert sorted(sample_by_class(labels, 1000)) == list(range(1000))
    # classes are mixed: points drawn later do not hide one class
    assert np.bincount(labels[sample_by_class(labels, 1000)][:500])[0] == pytest.approx(450, abs=2)
    section = explorer_section(make_cells(), settings=ExplorerSettings(max_cells=7, with_umap=False))
    data = data_of(section)
    assert len(data["rows"]) == 7
    assert "Sampled at random from 12 cells" in section.html
    assert column(data, "label")["texts"] == [NAMES[i % 3] for i in sorted(data["rows"])]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_cells_of_one_class_without_patients(n):
    cells = make_cells(n, labels=np.zeros(n, int), patients=None, paths=["/same.png"] * n)
    section = explorer_section(cells)
    data = data_of(section)
    assert [len(near) for near in data["neighbours"]] == [n - 1] * n
    assert [plane["title"] for plane in data["projections"]] == ["PCA"]
    assert "at least 8 cells" in section.html
    assert [one["id"] for one in data["columns"]] == ["label"]


def test_infinite_features_are_refused():
    features = np.full((4, 2), np.nan, np.float32)
    with pytest.raises(ValueError, match="infinite or NaN"):
        explorer_section(make_cells(4, features=features), settings=NO_UMAP)


def test_without_umap_learn_the_page_says_so(monkeypatch):
    monkeypatch.setattr(projection, "has_umap", lambda: False)
    assert "umap-learn was not installed" in explorer_section(make_cells()).html


def test_thumbnails_are_of_their_cells(tmp_path):
    for name in ("red", "blue"):
        Image.new("RGB", (20, 20), name).save(tmp_path / f"{name}.png")
    paths = [str(tmp_path / f"{'red' if i % 2 else 'blue'}.png") for i in range(12)]
    section = explorer_section(make_cells(paths=paths), settings=NO_UMAP)
    thumbnails = data_of(section)["thumbnails"]
    assert len(set(thumbnails)) == 2
    assert thumbnails == thumbnails[:2] * 6
    assert "cannot be read" not in html.unescape(section.html)

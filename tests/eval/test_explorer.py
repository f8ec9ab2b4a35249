"""The explorer: its page holds what was computed, columns find their cells, and the command reads several files."""

import csv
import html
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dinov2.eval.explorer import (
    cell_table,
    explorer_section,
    main,
    page_columns,
    parse_arguments,
    read_sets,
    sample_by_class,
)
from dinov2.eval.features import Features, write_features
from dinov2.eval.pages.page import page_html
from dinov2.eval.results import FoldPredictions, write_predictions

NAMES = ['a, "quoted"', "</script><b>ü</b>", "line\nbreak"]


def make_cells(n: int = 12, **changes) -> Features:
    parts = {
        "features": np.random.default_rng(0).normal(size=(n, 6)).astype(np.float32),
        "labels": np.arange(n) % 3,
        "class_names": NAMES,
        "paths": [f"/images/{i}.png" for i in range(n)],
        "patients": [f"p{i % 4}" for i in range(n)],
    }
    return Features(**(parts | changes))


def explore(*sets: Features, **options):
    """The section without UMAP, of sets named s, t, ..."""
    return explorer_section(dict(zip("stu", sets, strict=False)), **{"with_umap": False} | options)


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
        plane["points"] = points_of(plane)[order]
    return data


def points_of(plane: dict) -> np.ndarray:
    return np.stack([plane["x"], plane["y"]], axis=1)


def column(data: dict, id: str) -> dict:
    return next(one for one in data["columns"] if one["id"] == id)


def test_the_page_holds_what_was_computed():
    cells = make_cells()
    data = data_of(explore(cells.select(np.arange(6)), cells.select(np.arange(6, 12))))
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
    assert column(data, "patient")["texts"] == [f"p{i % 4} ({'st'[i >= 6]})" for i in range(12)]  # of both sets
    assert column(data, "data_set")["texts"] == ["s"] * 6 + ["t"] * 6
    assert set(data["missing"].values()) == {"No such file or directory"}
    assert len(data["missing"]) == 12


def test_cosine_distances_are_one_less_similarity():
    cells = make_cells()
    data = data_of(explore(cells, metric="cosine"))
    unit = cells.features / np.linalg.norm(cells.features, axis=1, keepdims=True)
    expected = 1 - np.sort(unit @ unit[0])[::-1][1:]
    np.testing.assert_allclose(data["distances"][0], expected, rtol=5e-3)
    np.testing.assert_allclose(1 - unit[data["neighbours"][0]] @ unit[0], expected, atol=1e-6)


def test_names_cannot_end_their_script_block():
    page = page_html("x", [explore(make_cells())])
    block = re.search(r'data-part="data">(.*?)</script>', page, re.DOTALL).group(1)
    assert [group["name"] for group in json.loads(block)["columns"][0]["groups"]] == sorted(NAMES)
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
    data = data_of(explore(cells, predictions=tmp_path))
    guesses = {i: NAMES[predictions[i]] for i in (2, 5, 8)}
    assert column(data, "prediction")["texts"] == [guesses.get(i, "") for i in range(12)]
    assert column(data, "right")["texts"] == [{2: "right", 5: "right", 8: "wrong"}.get(i, "") for i in range(12)]
    # a class looks the same as a label and as a prediction
    looks = [{group["name"]: group["colour"] for group in column(data, id)["groups"]} for id in ("label", "prediction")]
    assert all(looks[0][name] == looks[1][name] for name in guesses.values())
    rows = {row["path"]: row for row in csv.DictReader(file.open(newline=""))}
    for i in range(12):
        shown = column(data, "probability")["texts"][i]
        if i not in guesses:
            assert shown == ""
            continue
        expected = max(float(rows[cells.paths[i]][f"p_{name}"]) for name in NAMES[:3])
        np.testing.assert_allclose(float(shown), expected, rtol=5e-3)


def ranges_of(texts: list[str]) -> dict:
    return page_columns(pd.DataFrame({"label": "x", "number": texts}))[1]


def test_numbers_become_ranges_with_a_scale_of_colours():
    texts = [*(f"{i / 100}" for i in range(11)), "0.95", "1", ""]
    ranges = ranges_of(texts)
    assert [group["name"] for group in ranges["groups"]] == ["0 to 0.1", "0.9 to 1", ""]
    assert [group["count"] for group in ranges["groups"]] == [11, 2, 1]
    assert ranges["codes"] == [*[0] * 11, 1, 1, 2]
    assert ranges["values"] == texts
    assert len({group["colour"] for group in ranges["groups"]}) == 3
    ranges = ranges_of([*(f"{2020 + i / 100}" for i in range(1, 11)), "2020.25", "2020.26", "2020.98"])
    assert [group["name"] for group in ranges["groups"]] == ["2020 to 2020.1", "2020.2 to 2020.3", "2020.9 to 2021"]


@pytest.mark.parametrize("last", ["1", "word", "inf"])
def test_few_numbers_and_other_texts_are_names(last):
    texts = [*map(str, range(12)), last]
    assert "values" not in ranges_of(texts)
    assert "values" in ranges_of([*texts[:-1], "12"])
    assert {group["name"] for group in ranges_of(texts)["groups"]} == set(texts)


def test_of_many_names_the_largest_groups_have_a_look_of_their_own():
    names = [f"name {i}" for i in range(50)]
    table = pd.DataFrame({"label": "x", "site": [*names, *names[-20:]]})
    groups = {group["name"]: group for group in page_columns(table)[1]["groups"]}
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
    section = explore(make_cells(), max_cells=7)
    data = data_of(section)
    assert len(data["rows"]) == 7
    assert "Sampled at random from 12 cells" in section.html
    assert column(data, "label")["texts"] == [NAMES[i % 3] for i in sorted(data["rows"])]


@pytest.mark.parametrize("n", [2, 3])
def test_few_cells_of_one_class_without_patients(n):
    cells = make_cells(n, labels=np.zeros(n, int), patients=None, paths=["/same.png"] * n)
    data = data_of(explore(cells, with_umap=None))
    assert [len(near) for near in data["neighbours"]] == [n - 1] * n
    assert [plane["title"] for plane in data["projections"]] == ["PCA"]
    assert [one["id"] for one in data["columns"]] == ["label"]


def test_features_that_cannot_be_shown_are_refused():
    with pytest.raises(ValueError, match="infinite or NaN"):
        explore(make_cells(4, features=np.full((4, 2), np.nan, np.float32)))
    with pytest.raises(ValueError, match="2 cells"):
        explore(make_cells(1))
    with pytest.raises(ValueError, match="numbers a cell"):
        explore(make_cells(), make_cells(3, features=np.zeros((3, 2), np.float32)))


def test_a_cell_is_never_its_own_neighbour_among_copies():
    data = data_of(explore(make_cells(20, features=np.ones((20, 3), np.float32))))
    assert all(len(set(near)) == 12 and i not in near for i, near in enumerate(data["neighbours"]))


def test_thumbnails_are_of_their_cells(tmp_path):
    for name in ("red", "blue"):
        Image.new("RGB", (20, 20), name).save(tmp_path / f"{name}.png")
    paths = [str(tmp_path / f"{'red' if i % 2 else 'blue'}.png") for i in range(12)]
    section = explore(make_cells(paths=paths))
    thumbnails = data_of(section)["thumbnails"]
    assert len(set(thumbnails)) == 2
    assert thumbnails == thumbnails[:2] * 6
    assert "cannot be read" not in html.unescape(section.html)


def plain_cells(n: int = 12, **changes) -> Features:
    return make_cells(n, **{"class_names": ["x", "y", "z"]} | changes)


def write(file, *lines):
    file.write_text("\n".join(lines) + "\n")
    return file


def test_predictions_of_patients_go_to_their_cells(tmp_path):
    write(tmp_path / "predictions.csv", "patient,label,prediction,fold,p_x,p_y", "p0,x,x,0,0.9,0.1", "p3,x,y,0,0.2,0.8")
    table = cell_table({"s": plain_cells()}, tmp_path)
    assert list(table) == ["label", "path", "patient", "prediction", "right", "probability"]
    assert table["prediction"].tolist() == ["x", "", "", "y"] * 3
    assert table["right"].tolist() == ["right", "", "", "wrong"] * 3
    assert table["probability"].tolist() == ["0.9", "", "", "0.8"] * 3


def test_predictions_of_images_go_to_their_cells(tmp_path):
    file = write(tmp_path / "p.csv", "path,prediction", "/images/1.png,y", "/images/2.png,x", "/other.png,z")
    table = cell_table({"s": plain_cells(paths=["/images/1.png", "/images/2.png"] * 6)}, file)
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
        cell_table({"s": plain_cells(patients=patients)}, **{name: file})


def test_more_columns_come_from_a_csv(tmp_path):
    cells = plain_cells(20, paths=[str(tmp_path / "sub" / ".." / f"{i}.png") for i in range(20)])
    rows = [f"{i}.png,{i / 7},site {i % 2}" for i in range(19)]
    file = write(tmp_path / "more.csv", "path,age,site", *rows, "./0.png,99,a second row of the image")
    table = cell_table({"s": cells}, columns=file)
    assert table["age"].tolist() == [*(str(i / 7) for i in range(19)), ""]
    assert table["site"].tolist() == [*(f"site {i % 2}" for i in range(19)), ""]
    file = write(tmp_path / "absolute.csv", "path,site", f"{tmp_path / '3.png'},here")
    assert cell_table({"s": cells}, columns=file)["site"].tolist() == ["", "", "", "here", *[""] * 16]


def test_a_csv_stands_in_for_unknown_patients_only(tmp_path):
    file = write(tmp_path / "more.csv", "path,patient,label,site", *(f"/images/{i}.png,q,w,s" for i in range(12)))
    table = cell_table({"s": plain_cells()}, columns=file)
    assert list(table) == ["label", "path", "patient", "site"]
    assert table.iloc[0].tolist() == ["x", "/images/0.png", "p0", "s"]
    assert cell_table({"s": plain_cells(patients=None)}, columns=file)["patient"][0] == "q"


def test_sets_with_other_classes_are_joined_and_their_patients_kept_apart():
    second = plain_cells(3, labels=np.array([0, 1, 1]), class_names=["new", "x"], patients=["p0", "q", ""])
    third = plain_cells(1, patients=None)
    table = cell_table({"A": plain_cells(6), "B": second, "C": third})
    assert table["data_set"].tolist() == ["A"] * 6 + ["B"] * 3 + ["C"]
    assert table["label"].tolist() == ["x", "y", "z"] * 2 + ["new", "x", "x", "x"]
    assert table["patient"].tolist() == ["p0 (A)", "p1", "p2", "p3", "p0 (A)", "p1", "p0 (B)", "q", "", ""]
    assert list(cell_table({"C": third})) == ["label", "path"]


def test_the_command_writes_one_page_of_several_files(tmp_path, capsys):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        cells = Features(
            np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32),
            np.arange(9) % 3,
            ["a", "b", "c"],
            [str(tmp_path / "red.png")] * 9,
            others={"mean": np.ones((9, 2), np.float32)},
        )
        write_features(tmp_path / name / "features.h5", cells)
    files = [str(tmp_path / "first" / "features.h5"), f"Zweite={tmp_path / 'second' / 'features.h5'}"]
    output = tmp_path / "out" / "explorer.html"
    main(["--features", *files, "--kind", "mean", "--no-umap", "--title", "Two sets", "--output", str(output)])
    assert "18 cells" in capsys.readouterr().out
    html = output.read_text(encoding="utf-8")
    assert "<h1>Two sets</h1>" in html
    assert '"name": "first"' in html  # the folder, as both files have one name
    assert '"name": "Zweite"' in html
    assert "features of kind mean with 2 numbers" in html
    assert "cannot be read" not in html


@pytest.mark.parametrize("flags", [["--thumbnail-size", "4"], ["--seed", "-1"], ["--max-cells", "0"]])
def test_wrong_flags_end_the_command(flags):
    with pytest.raises(SystemExit):
        parse_arguments(["--features", "x.h5", "--output", "x.html", *flags])


def test_names_of_data_sets(tmp_path):
    cells = Features(np.ones((2, 2), np.float32), np.zeros(2, int), ["a"], ["a.png", "b.png"])
    files = [str(tmp_path / name) for name in ("a/f.h5", "b/f.h5", "b/name=g.h5")]
    for file in files:
        write_features(file, cells)
    assert list(read_sets(files[1:])) == ["f", "name=g"]
    assert list(read_sets([files[0], f"A={files[2]}"])) == ["f", "A"]
    assert list(read_sets(files[:2])) == ["a", "b"]
    with pytest.raises(ValueError, match="b, b; name each"):
        read_sets(files[1:2] * 2)
    with pytest.raises(FileNotFoundError, match="gone.h5"):
        read_sets(["gone.h5"])

"""Two predictions files against each other: matched by cell, by patient where known, refused where they differ."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dinov2.eval.compare import (
    cells_digest,
    comparable_settings,
    compare_rows,
    compare_tables,
    main,
    predictions_belong,
    split_digest,
)
from dinov2.eval.metrics import compare_paired
from dinov2.eval.results import PredictionTable, ResultRecord, Row
from dinov2.utils.files import file_sha256

NAMES = np.array(["blast", "eosinophil", "basophil"])


def table(seed, share_right, patients=None, n=120):
    labels = np.random.default_rng(0).integers(0, 3, n)
    rng = np.random.default_rng(seed)
    predictions = np.where(rng.random(n) < share_right, labels, rng.integers(0, 3, n))
    keys = [f"/cells/{i}.png" for i in range(n)]
    return PredictionTable(keys, NAMES[labels].tolist(), NAMES[predictions].tolist(), patients)


def rows_of(table, rows):
    columns = (table.keys, table.labels, table.predictions)
    return PredictionTable(*([column[i] for i in rows] for column in columns), table.patients)


def test_cells_are_matched_by_key():
    a, b = table(1, 0.6), table(2, 0.8)
    shuffled = rows_of(b, np.random.default_rng(3).permutation(120).tolist())
    comparison = compare_tables(a, shuffled)
    assert comparison == compare_tables(a, b)
    order = np.argsort(NAMES)  # classes count in the order of their names
    ids = {name: i for i, name in enumerate(NAMES[order])}
    columns = [np.array([ids[name] for name in column]) for column in (a.labels, a.predictions, b.predictions)]
    assert comparison == {"n": 120, "n_patients": None, **compare_paired(*columns, 3)}
    assert comparison["differences"]["accuracy"]["difference"] > 0


def test_patients_of_either_table_are_used():
    patients = [f"p{i % 7}" for i in range(120)]
    a, b = table(1, 0.6), table(2, 0.8, patients)
    assert compare_tables(a, b)["n_patients"] == 7
    assert compare_tables(b, a)["n_patients"] == 7
    other = table(1, 0.6, patients=["p9", *patients[1:]])
    with pytest.raises(ValueError, match=r"the patient of '/cells/0.png' is 'p9' in the first table and 'p0'"):
        compare_tables(other, b)


def test_tables_of_other_cells_or_labels_are_refused():
    a = table(1, 0.6)
    with pytest.raises(ValueError, match=r"20 cells are in the first table only and 0 in the second"):
        compare_tables(a, rows_of(a, range(100)))
    wrong = table(2, 0.8)
    wrong.labels[5] = "blast" if wrong.labels[5] != "blast" else "basophil"
    with pytest.raises(ValueError, match="the label of '/cells/5.png' is"):
        compare_tables(a, wrong)


def test_folders_in_numbers_out(tmp_path, capsys):
    for name, seed, share in (("a", 1, 0.6), ("b", 2, 0.8)):
        (tmp_path / name).mkdir()
        comparison = table(seed, share)
        rows = zip(comparison.keys, comparison.labels, comparison.predictions, strict=True)
        lines = ["path,label,prediction,fold", *(f"{key},{label},{guess},0" for key, label, guess in rows)]
        (tmp_path / name / "predictions.csv").write_text("\n".join(lines) + "\n")
    main([str(tmp_path / "a"), str(tmp_path / "b" / "predictions.csv"), "--output", str(tmp_path / "new" / "c.json")])
    output = capsys.readouterr().out
    report = json.loads((tmp_path / "new" / "c.json").read_text())
    assert report["n"] == 120
    assert [len(file["sha256"]) for file in report["files"]] == [64, 64]
    assert "McNemar's exact p = " in output
    difference = 100 * report["differences"]["accuracy"]["difference"]
    assert f"{difference:+.1f} (" in output


def test_tables_without_labels_are_refused():
    unlabelled = replace(table(1, 0.6), labels=None)
    with pytest.raises(ValueError, match="a table without labels cannot be compared"):
        compare_tables(unlabelled, table(2, 0.8))


@pytest.fixture
def make_row(tmp_path):
    """Write predictions and a split into a new folder, for cells in a folder of that name."""

    def make(name, labels="aab", parts=("train", "test", "test")):
        folder = tmp_path / name
        folder.mkdir()
        paths = [f"/data/{name}/{label}/{i}.png" for i, label in enumerate(labels)]
        lines = [f"{path},{label},a" for path, label in zip(paths, labels, strict=True)]
        (folder / "predictions.csv").write_text("\n".join(["path,label,prediction", *lines, ""]))
        lines = [f"{path},{part}" for path, part in zip(paths[::-1], parts[::-1], strict=True)]
        (folder / "split.csv").write_text("\n".join(["path,part", *lines, ""]))
        return Row("linear", "model", {}, folder / "predictions.csv")

    return make


def test_the_same_cells_in_another_folder_are_the_same(make_row):
    first, moved, relabelled = make_row("one"), make_row("two"), make_row("three", labels="aaa")
    resplit = make_row("four", parts=("test", "train", "test"))
    assert cells_digest(first) == cells_digest(moved) == cells_digest(resplit) != cells_digest(relabelled)
    assert split_digest(first) == split_digest(moved) != split_digest(resplit)
    assert compare_rows(first, moved) is None  # their keys differ
    assert compare_rows(first, first)["differences"]["accuracy"]["difference"] == 0
    absent = Row("linear", "model", {}, first.predictions.with_name("absent") / "predictions.csv")
    for row in (absent, Row("new", "model", {})):
        assert (cells_digest(row), split_digest(row), compare_rows(first, row)) == (None, None, None)


def test_settings_of_place_and_speed_do_not_count(tmp_path):
    settings = {"features": "f.h5", "batch_size": 3, "temperature": 0.07}
    record = ResultRecord("one", tmp_path / "results.json", {"settings": settings}, [], [])
    assert comparable_settings(record) == {"temperature": 0.07}


def test_predictions_belong_to_the_result_that_was_written_with_them(make_row, tmp_path):
    row = make_row("one")
    record = ResultRecord("one", tmp_path / "one" / "results.json", {}, [row], [])
    assert predictions_belong(record, row)  # results.json names no digest
    record = replace(record, report={"files": {"predictions.csv": file_sha256(row.predictions)}})
    assert predictions_belong(record, row)
    assert predictions_belong(ResultRecord("all", tmp_path / "results.json", {}, [], [], {"one": record}), row)
    row.predictions.write_text(row.predictions.read_text() + "x.png,a,a\n")
    assert not predictions_belong(record, row)
    assert not predictions_belong(record, Row("new", "model", {}))

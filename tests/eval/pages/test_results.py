"""Sections about results: their numbers are those of results.json, and only what compares is compared."""

import json
import math
import shutil

import numpy as np
import pytest

import dinov2
from dinov2.eval.pages.results import comparison_section, cross_section, results_section, results_table
from dinov2.eval.results import read_result

EVIL = "</script><img src=x onerror=alert(1)>"
NAMES = [EVIL, 'lymphocyte, "large"', "Zelle ü β"]


def read(folder):
    return json.loads((folder / "results.json").read_text())


def test_numbers_of_results_come_back_out_of_the_page(page, results):
    written = read(results)
    (embedded,) = page.json["results"]["results"]
    assert embedded["report"] == written
    table = {row["method"].text: row for row in page.table("knn: all protocols").values()}
    assert list(table) == ["knn_1", "knn_5"]
    columns = {"accuracy": "accuracy, %", "balanced_accuracy": "balanced acc., %", "weighted_f1": "weighted F1, %"}
    columns |= {"macro_f1": "macro F1, %", "kappa": "Cohen's kappa, %", "auroc": "AUROC, %"}
    for method, row in table.items():
        metrics = written["results"]["model"][method]
        for metric, column in columns.items():
            numbers = [metrics[metric], *metrics["intervals"][metric]]
            assert row[column].values == numbers
            assert row[column].shown == [f"{100 * number:.1f}" for number in numbers]
        assert row["log loss"].shown[0] == f"{metrics['log_loss']:.3f}"
        classes = page.table(f"Classes, knn: {method}")
        assert list(classes) == NAMES
        for name, of_class in metrics["per_class"].items():
            assert classes[name]["support"].values == [of_class["support"]]
            assert classes[name]["recall, %"].shown == [f"{100 * of_class['recall']:.1f}"]
        confusion = page.table(f"Confusion, knn: {method}")
        assert [[row[name].values[0] for name in NAMES] for row in confusion.values()] == metrics["confusion"]


def test_origins_are_listed(page, results):
    written = read(results)
    rows = page.tables["What each was made from and with"]
    values = {(row[1].text, row[2].text): row[3].text for row in rows if row[0].text == "knn"}
    assert values["settings", "seed"] == "0"
    assert values["versions", "dinov2"] == dinov2.__version__
    assert values["checkpoint", "checkpoint_sha256"] == "0abc"
    assert values["hashes", "features"] == written["hashes"]["features"]
    assert written["date"] in page.table("Results")["knn"]["date"].text


def test_results_of_the_same_cells_stand_side_by_side(write, make_results, results):
    other = make_results("better", seed=1, shift=3.0, data="/elsewhere")  # the same cells, in another place
    page = write(results, other, "--no-explorer")
    rows = page.table("knn_5: side by side")
    assert list(rows) == ["knn", "better"]
    for name, folder in (("knn", results), ("better", other)):
        metrics = read(folder)["results"]["model"]["knn_5"]
        assert rows[name]["balanced acc., %"].values == [
            metrics["balanced_accuracy"],
            *metrics["intervals"]["balanced_accuracy"],
        ]
    assert "do not compare" not in page.words
    assert "Not all of these compare" not in page.words
    assert [text for tag, text in page.headings if tag == "h3"][:2] == ["knn_1", "knn_5"]


def test_paired_difference_is_that_of_compare(write, make_results, results):
    other = make_results("paired", seed=2, shift=3.0)
    page = write(results, other, "--no-explorer")
    row = page.table("knn_5: difference to knn")["paired"]
    (difference,) = {row["balanced acc., points"].values[0]}
    metrics = [read(folder)["results"]["model"]["knn_5"]["balanced_accuracy"] for folder in (results, other)]
    assert math.isclose(difference, metrics[1] - metrics[0], abs_tol=1e-12)
    assert 0 <= row["p"].values[0] <= 1


@pytest.mark.parametrize("change", ["cells", "split", "predictions"])
def test_other_cells_or_splits_are_compared_only_with_a_warning(write, make_results, results, tmp_path, change):
    if change == "predictions":  # of which nobody knows whether they belong to results.json
        other = tmp_path / "other"
        shutil.copytree(results, other)
        for file in other.glob("predictions*.csv"):
            file.write_text(file.read_text() + "x.png,a,a,0,1,0,0\n")
    else:
        how = {"n": 48} if change == "cells" else {"flags": ("--folds", "3", "--seed", "4")}
        other = make_results("other", **how)
    page = write(results, other, "--no-explorer")
    assert "Not all of these compare." in page.words
    assert list(page.table("knn_5 (1 of 2): side by side")) == ["knn"]
    assert list(page.table("knn_5 (2 of 2): side by side")) == ["other"]


def test_different_settings_are_listed(write, results, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(results, other)
    content = read(other)
    content["settings"]["temperature"] = 0.5
    (other / "results.json").write_text(json.dumps(content))
    page = write(results, other, "--no-explorer")
    assert "temperature: knn 0.07; other 0.5" in page.words


def test_results_of_another_version_are_read_as_far_as_they_go(write, tmp_path):
    metrics = {"accuracy": 0.5, "new_score": 0.7, "intervals": {"accuracy": [0.4]}, "per_class": {"a": {"support": 3}}}
    content = {"protocol": "knn", "results": {"model": {"knn_3": metrics}}, "versions": {"dinov2": "99.0"}, "new": 1}
    (tmp_path / "results.json").write_text(json.dumps(content))
    page = write(tmp_path / "results.json")
    row = next(iter(page.table(f"{tmp_path.name}: all protocols").values()))
    assert row["accuracy, %"].text == "50.0"
    assert row["macro F1, %"].text == "–"
    assert row["AUROC, %"].text == "–"
    for note in ("version 99.0 wrote it", "do not know: new", "does not know are left out: new_score"):
        assert note.replace("do not know", "does not know are left out") in page.words
    assert page.table("Classes,")["a"]["recall, %"].text == "–"


def test_an_unknown_protocol_is_shown_as_found(write, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"protocol": "new", "results": {"deep": {"x": {"accuracy": 1}}}}))
    row = next(iter(write(tmp_path).table(f"{tmp_path.name}: all protocols").values()))
    assert row["method"].text == "deep x"
    assert row["accuracy, %"].text == "100.0"


def test_one_class_and_three_cells(write, tmp_path):
    metrics = {"accuracy": 1.0, "balanced_accuracy": 1.0, "weighted_f1": 1.0, "macro_f1": 1.0, "kappa": None}
    metrics |= {"per_class": {"only": {"support": 3, "recall": 1.0, "precision": 1.0, "f1": 1.0}}, "confusion": [[3]]}
    (tmp_path / "results.json").write_text(json.dumps({"protocol": "knn", "results": {"model": {"knn_1": metrics}}}))
    page = write(tmp_path)
    row = next(iter(page.table(f"{tmp_path.name}: all protocols").values()))
    assert row["Cohen's kappa, %"].text == "–"
    assert page.table("Confusion")["only"]["only"].values == [3]


SCORE = {"balanced_accuracy": 0.5, "intervals": {"balanced_accuracy": [0.4, 0.6]}, "n_train": 9, "n_test": 3}
CROSS = {
    "protocol": "cross",
    "class_names": ["a", "b"],
    "results": {
        "matrix": {"x": {"x": SCORE, "y": SCORE}, "y": {"x": SCORE, "y": {"reason": "too few"}}},
        "leave_one_out": {"x": SCORE},
        "batch_effect": {
            "mean_over_classes": {"linear": {"balanced_accuracy": 0.5, "chance": 0.5}},
            "overall": {"linear": {"balanced_accuracy": 0.5, "interval": [0.4, 0.6]}, "chance": 0.5},
            "per_class": {"a": {"linear": {"balanced_accuracy": 0.5, "interval": None}}},
        },
    },
}
CURVE = {"confidence": [0.3, 0.9], "accuracy": [0.2, 0.5], "n_cells": [4, 6]}
MOVED = {"macro_f1": 0.25, "calibration_error": 0.4, "reliability": CURVE, "n_train": 9, "n_test": 10}
CORRECTIONS = {"cbr": MOVED | {"macro_f1": 0.75}, "target-temperature-8": {"reliability": CURVE}}
CORRECTIONS |= {"target-temperature-32": {"calibration_error": 0.1, "reliability": CURVE}, EVIL: {"macro_f1": 0.5}}
TRANSFER = {
    "protocol": "cross",
    "settings": {"protocol": "transfer"},
    "results": {
        "matrix": {
            "x": {"x": MOVED, EVIL: MOVED | {"corrections": CORRECTIONS}},
            EVIL: {"x": {"reliability": None, "reason": "too few"}, EVIL: MOVED},
        },
        "batch_effect": None,
    },
}
ODD_VALUES = ["null", "3", "-1", "true", '"text"', "[]", "[[]]", "{}", '{"a": 1}', "NaN", "-Infinity", "1e999"]
ODD_VALUES += ["9" * 400, '{"a": {"b": []}}']
NO_RESULTS = ["[" * 100_000, '{"a":' * 100_000, "", "[]", '{"a": 1', "\x00", '{"a": ' + "9" * 5000 + "}"]


def nodes(value, path=()):
    """Yield the place of each part of a report."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from nodes(inner, (*path, key))


def test_a_report_with_any_wrong_value_is_shown_as_far_as_possible(results, tmp_path):
    of_knn = read(results)
    few_shot = {"model": {"knn_1": {"5": {"n_draws": 2, "balanced_accuracy": {"mean": 0.5, "sd": 0.1}}}}}
    rng = np.random.default_rng(0)
    for report, n_cases in ((of_knn | {"few_shot": few_shot}, 40), (CROSS, 60), (TRANSFER, 80)):
        places = [place for place in nodes(report) if place]
        for i in range(n_cases):
            *parents, last = places[rng.integers(len(places))]
            changed = json.loads(json.dumps(report))
            inner = changed
            for key in parents:
                inner = inner[key]
            inner[last] = "odd value"
            text = json.dumps(changed).replace('"odd value"', ODD_VALUES[i % len(ODD_VALUES)])
            (tmp_path / "results.json").write_text(text)
            record = read_result(tmp_path / "results.json", "r")
            sections = [show([record]) for show in (results_section, cross_section, comparison_section)]
            assert any(sections), (parents, last, text)
            results_table([record])
            json.dumps(record.report, allow_nan=False)


def test_transfer_shows_macro_f1_and_calibration_with_each_correction(write, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(TRANSFER))
    page = write(tmp_path)
    matrix = page.table(f"{tmp_path.name}: macro F1 in percent")
    assert matrix["x"][EVIL].values == [0.25]
    assert matrix[EVIL]["x"].text == "–"
    corrected = page.table(f"{tmp_path.name}, cbr: macro F1 in percent")
    assert corrected["x"][EVIL].values == [0.75]
    assert corrected["x"]["x"].text == "–"
    rows = page.tables[f"{tmp_path.name}: every pair of data sets"]
    assert [row[1].text for row in rows if row[0].text == f"x → {EVIL}"] == ["uncorrected", *CORRECTIONS]
    chart = str(cross_section([read_result(tmp_path / "results.json", "r")]).html)
    assert chart.count("<figure>") == 3  # the pair without numbers has none
    assert EVIL not in chart
    assert "uncorrected: from 0.2 to 0.5" in chart
    assert "target-temperature-32: from" in chart
    assert "target-temperature-8: from" not in chart


@pytest.mark.parametrize("text", NO_RESULTS)
def test_files_that_are_no_results_are_named(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json"):
        read_result(tmp_path / "results.json", "r")

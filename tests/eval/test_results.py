"""Predictions and results come back as they were written; results of other versions as far as possible."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest

from dinov2 import __version__
from dinov2.eval.metrics import classification_metrics
from dinov2.eval.results import (
    FoldPredictions,
    provenance,
    read_predictions,
    read_report,
    read_result,
    settings_of,
    summarize,
    write_predictions,
    write_report,
)

NAMES = ["basophil", "blast", "große, seltene"]


@pytest.fixture
def predicted():
    """Twelve cells, the last one never tested; two folds of unlike size."""
    labels = np.array([0, 1, 2] * 4)
    predictions = np.array([0, 1, 2, 0, 1, 1, 0, 0, 2, 0, 1, -1])
    probabilities = np.full((12, 3), 0.1)
    probabilities[np.arange(11), predictions[:11]] = 0.8
    probabilities[11] = np.nan
    everything = np.arange(12)
    folds = [(everything[7:], everything[:7]), (np.array([*range(7), 11]), everything[7:11])]
    settings = [{"lambda": 0.5}, {"lambda": 2.0}]
    return labels, FoldPredictions(folds, predictions, probabilities, settings)


def test_a_summary_has_all_folds_together_and_each(predicted):
    labels, by_folds = predicted
    assert by_folds.tested.tolist() == list(range(11))
    assert by_folds.fold_of.tolist() == [0] * 7 + [1] * 4 + [-1]
    summary = summarize(labels, by_folds, NAMES)
    together = classification_metrics(labels[:11], by_folds.predictions[:11], NAMES, by_folds.probabilities[:11])
    assert {name: summary[name] for name in together} == together
    first, second = summary["folds"]
    assert (first["train"], first["test"], first["lambda"]) == (5, 7, 0.5)
    of_second = classification_metrics(labels[7:11], by_folds.predictions[7:11], NAMES, by_folds.probabilities[7:11])
    assert second["log_loss"] == of_second["log_loss"]
    assert "confusion" not in second
    values = first["accuracy"], second["accuracy"]
    assert summary["mean_over_folds"]["accuracy"] == pytest.approx(np.mean(values))
    assert summary["sd_over_folds"]["accuracy"] == pytest.approx(np.std(values, ddof=1))
    low, high = summary["intervals"]["accuracy"]
    assert low < summary["accuracy"] < high
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_predictions_of_odd_class_names_come_back(predicted, tmp_path):
    labels, by_folds = predicted
    names = ["two\nlines", "a\u2028b", '"<b>", &']
    write_predictions(tmp_path / "predictions.csv", [f"{i}.png" for i in range(12)], labels, by_folds, names)
    table = read_predictions(tmp_path / "predictions.csv")
    assert table.labels == [names[i] for i in labels[:11]]
    assert table.predictions == [names[i] for i in by_folds.predictions[:11]]


def test_labels_of_other_classes_are_written(predicted, tmp_path):
    labels, by_folds = predicted
    write_predictions(tmp_path / "p.csv", range(12), labels, by_folds, NAMES, label_names=["x", "y", "z"])
    table = read_predictions(tmp_path / "p.csv")
    assert table.labels == [["x", "y", "z"][i] for i in labels[:11]]
    assert table.predictions == [NAMES[i] for i in by_folds.predictions[:11]]


def test_one_fold_has_no_spread_and_patients_decide_the_intervals(predicted):
    labels, by_folds = predicted
    one = FoldPredictions(by_folds.folds[:1], np.where(by_folds.fold_of == 0, by_folds.predictions, -1), None, [{}])
    summary = summarize(labels, one, NAMES)
    assert "mean_over_folds" not in summary
    assert "auroc" not in summary
    by_patient = summarize(labels, one, NAMES, patients=["p", "q", "q"] * 4)
    assert by_patient["intervals"] != summary["intervals"]
    assert summarize(labels, one, NAMES, patients=["p"] * 12)["intervals"] == {}


def test_predictions_come_back(predicted, tmp_path):
    labels, by_folds = predicted
    paths, patients = [f"/cells/ä {i}, left.png" for i in range(12)], [f"p{i % 4}" for i in range(12)]
    write_predictions(tmp_path / "predictions.csv", paths, labels, by_folds, NAMES, patients)
    table = read_predictions(tmp_path / "predictions.csv")
    assert table.keys == paths[:11]
    assert table.labels == [NAMES[i] for i in labels[:11]]
    assert table.predictions == [NAMES[i] for i in by_folds.predictions[:11]]
    assert table.patients == patients[:11]
    assert table.key_column == "path"
    assert table.class_names == NAMES
    np.testing.assert_allclose(table.probabilities, by_folds.probabilities[:11])
    header, first = (tmp_path / "predictions.csv").read_text(encoding="utf-8").splitlines()[:2]
    assert header == 'path,patient,label,prediction,fold,p_basophil,p_blast,"p_große, seltene"'
    assert first == '"/cells/ä 0, left.png",p0,basophil,basophil,0,0.8,0.1,0.1'

    without = FoldPredictions(by_folds.folds, by_folds.predictions, None, by_folds.settings)
    write_predictions(tmp_path / "bags.csv", patients[:4] + paths[4:], labels, without, NAMES, key_column="patient")
    assert (tmp_path / "bags.csv").read_text(encoding="utf-8").startswith("patient,label,prediction,fold\np0,basophil,")
    bags = read_predictions(tmp_path / "bags.csv")
    assert (bags.key_column, bags.patients, bags.probabilities) == ("patient", bags.keys, None)

    write_predictions(tmp_path / "unlabelled.csv", paths, None, by_folds, NAMES)
    unlabelled = read_predictions(tmp_path / "unlabelled.csv")
    assert unlabelled.labels is None
    assert unlabelled.predictions == table.predictions


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na,x\n", "has the columns ['path', 'label']; expected path or patient first"),
        ("label,prediction\nx,x\n", "expected path or patient first"),
        ("path,label,prediction\n", "has no rows"),
        ("path,label,prediction\na,x,x\na,x,y\n", "one path stands in several"),
        ("path,label,prediction,p_x\na,x,x,much\n", "has a probability that is no number"),
    ],
)
def test_files_that_are_no_predictions(text, message, tmp_path):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_predictions(tmp_path / "p.csv")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_predictions(tmp_path / "absent.csv")


def test_a_report_names_its_inputs_and_not_its_place(tmp_path):
    flags = {"features": Path("f.h5"), "seed": 3, "k": [1], "overwrite": True, "num_workers": 2}
    args = argparse.Namespace(**flags, output_dir=tmp_path / "a")
    attributes = {"model": "ViT", "checkpoint_sha256": "ab", "transform": "28 px", "date": "yesterday"}
    report = provenance(attributes, settings_of(args), {"features": "cd"})
    assert report["settings"] == {"features": "f.h5", "seed": 3, "k": [1]}
    assert report["checkpoint"] == {"checkpoint": None, "checkpoint_sha256": "ab", "model": "ViT"}
    assert report["features"] == {"checkpoint_sha256": "ab", "model": "ViT", "transform": "28 px"}
    assert set(report["versions"]) == {"dinov2", "python", "numpy", "torch", "scikit-learn"}
    assert list(report)[-1] == "date"
    write_report(tmp_path / "a", report)
    assert json.loads((tmp_path / "a" / "results.json").read_text()) == report


def test_a_report_with_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(tmp_path, {"accuracy": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_rows_of_each_protocol_know_their_predictions(predicted, tmp_path):
    labels, by_folds = predicted
    summary = summarize(labels, by_folds, NAMES)
    versions = {"dinov2": __version__}
    layouts = {
        "knn": ({"model": {"knn_5": summary}, "pixels": {"knn_5": summary}}, {"protocol": "dino"}),
        "linear": ({"model": {"linear_sweep": summary}}, {"protocol": "sweep"}),
        "abmil": ({"gated": {"together": summary, "mean": {"accuracy": 0.5}}}, {"protocol": "crossval"}),
        "all": ({"knn-dino_5": {"model": summary}, "linear": {"pixels": summary}, "abmil": {"model": summary}}, {}),
        "cross": ({"matrix": {"a": {"b": {"accuracy": 0.5}}}}, {}),
        "finetune, applied": ({"finetune_applied": summary}, {}),
    }
    rows = {}
    for protocol, (results, settings) in layouts.items():
        folder = tmp_path / protocol
        content = {"protocol": protocol, "results": results, "class_names": NAMES, "settings": settings}
        write_report(folder, {**content, "versions": versions})
        record = read_result(folder / "results.json", protocol)
        assert record.notes == []
        rows[protocol] = [(r.method, r.source, str(r.predictions.relative_to(folder))) for r in record.rows]
    assert rows == {
        "knn": [
            ("knn-dino_5", "model", "predictions_knn_5.csv"),
            ("knn-dino_5", "pixels", "predictions_pixels_knn_5.csv"),
        ],
        "linear": [("linear-sweep", "model", "predictions.csv")],
        "abmil": [("abmil gated", "model", "predictions.csv")],
        "all": [
            ("knn-dino_5", "model", "knn-dino/predictions_knn_5.csv"),
            ("linear", "pixels", "linear/predictions_pixels.csv"),
            ("abmil classwise", "model", "abmil/predictions.csv"),
        ],
        "cross": [],
        "finetune, applied": [("finetune_applied", "model", "predictions.csv")],
    }
    report = read_report(folder / "results.json")
    write_report(folder, {**report, "counts": {"seen_in_training": 2}})
    assert read_result(folder / "results.json", "applied").rows[0].predictions is None  # they are of more cells


def test_a_row_has_its_numbers_and_predictions(predicted, tmp_path):
    labels, by_folds = predicted
    results = {"model": {"linear_dinobloom": summarize(labels, by_folds, NAMES)}}
    write_report(tmp_path, {"protocol": "linear", "results": results})
    (row,) = read_result(tmp_path / "results.json", "mine").rows
    assert row.n_tested == 11
    assert list(row.classes) == NAMES
    assert row.interval("accuracy") == tuple(row.metrics["intervals"]["accuracy"])
    assert row.interval("calibration_error") is None
    assert row.table is None
    write_predictions(tmp_path / "predictions.csv", [f"{i}" for i in range(12)], labels, by_folds, NAMES)
    (row,) = read_result(tmp_path / "results.json", "mine").rows
    assert row.table.labels == [NAMES[i] for i in labels[:11]]


def test_the_result_of_all_protocols_has_those_beside_it(tmp_path):
    checkpoint = {"model": "ViT", "checkpoint": "a.pth", "checkpoint_sha256": "ab"}
    write_report(tmp_path, {"protocol": "all", "results": {}, "checkpoint": checkpoint})
    for protocol in ("abmil", "knn"):
        write_report(tmp_path / protocol, {"protocol": protocol, "results": {}})
    record = read_result(tmp_path / "results.json", "mine")
    assert [part.name for part in record.parts.values()] == ["mine, abmil", "mine, knn"]
    assert record.folders("abmil") == [tmp_path / "abmil"]
    assert record.encoder == "ViT, a.pth"


def test_results_of_another_version_are_read_as_far_as_possible(tmp_path):
    metrics = {"accuracy": 0.5, "new_score": 0.7, "intervals": {"accuracy": [0.4]}, "per_class": {"a": {"recall": 1}}}
    (tmp_path / "results.json").write_text(json.dumps({"protocol": "new", "results": {"x": {"y": metrics}}, "more": 1}))
    record = read_result(tmp_path / "results.json", "mine")
    (row,) = record.rows
    assert (row.method, row.predictions, row.n_tested, row.interval("accuracy")) == ("x y", None, None, None)
    assert record.notes == [
        "it does not say which version wrote it",
        "fields that this version does not know are left out: more",
        "missing: class_names",
        "metrics that this version does not know are left out: new_score",
    ]
    of_training = {"iteration": 4, "datasets": {"set": {"n_test": 10, "knn": {"knn_1": {"accuracy": 0.5}}}}}
    (tmp_path / "results.json").write_text(json.dumps({**of_training, "versions": {"dinov2": "99"}}))
    record = read_result(tmp_path / "results.json", "mine")
    assert [row.method for row in record.rows] == ["set knn knn_1"]
    assert record.notes == [f"version 99 wrote it, this report is made by {__version__}"]


@pytest.mark.parametrize(("text", "message"), [("{", "not readable as JSON"), ("[]", "holds a list, no JSON object")])
def test_files_that_are_no_results(text, message, tmp_path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_report(tmp_path / "results.json")

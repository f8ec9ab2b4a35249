"""Reports with the same bytes each time, predictions that come back, tables that show what is in them."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest

from dinov2.eval.metrics import classification_metrics
from dinov2.eval.results import (
    FoldPredictions,
    class_table,
    metrics_table,
    provenance,
    read_predictions,
    scores_table,
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
    everyone = np.arange(12)
    folds = [(everyone[7:], everyone[:7]), (np.array([*range(7), 11]), everyone[7:11])]
    settings = [{"lambda": 0.5}, {"lambda": 2.0}]
    return labels, FoldPredictions(folds, predictions, probabilities, settings)


def test_a_summary_has_all_folds_together_and_each(predicted):
    labels, found = predicted
    assert found.tested.tolist() == list(range(11))
    assert found.fold_of.tolist() == [0] * 7 + [1] * 4 + [-1]
    summary = summarize(labels, found, NAMES)
    together = classification_metrics(labels[:11], found.predictions[:11], NAMES, found.probabilities[:11])
    assert {name: summary[name] for name in together} == together
    first, second = summary["folds"]
    assert (first["train"], first["test"], first["lambda"]) == (5, 7, 0.5)
    of_second = classification_metrics(labels[7:11], found.predictions[7:11], NAMES, found.probabilities[7:11])
    assert second["log_loss"] == of_second["log_loss"]
    assert "confusion" not in second
    values = first["accuracy"], second["accuracy"]
    assert summary["mean_over_folds"]["accuracy"] == pytest.approx(np.mean(values))
    assert summary["sd_over_folds"]["accuracy"] == pytest.approx(np.std(values, ddof=1))
    low, high = summary["intervals"]["accuracy"]
    assert low < summary["accuracy"] < high
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_predictions_of_odd_class_names_come_back(predicted, tmp_path):
    labels, found = predicted
    names = ["two\nlines", "a\u2028b", '"<b>", &']
    write_predictions(tmp_path / "predictions.csv", [f"{i}.png" for i in range(12)], labels, found, names)
    table = read_predictions(tmp_path / "predictions.csv")
    assert table.labels == [names[i] for i in labels[:11]]
    assert table.predictions == [names[i] for i in found.predictions[:11]]


def test_one_fold_has_no_spread_and_patients_decide_the_intervals(predicted):
    labels, found = predicted
    one = FoldPredictions(found.folds[:1], np.where(found.fold_of == 0, found.predictions, -1), None, [{}])
    summary = summarize(labels, one, NAMES)
    assert "mean_over_folds" not in summary
    assert "auroc" not in summary
    by_patient = summarize(labels, one, NAMES, patients=["p", "q", "q"] * 4)
    assert by_patient["intervals"] != summary["intervals"]
    assert summarize(labels, one, NAMES, patients=["p"] * 12)["intervals"] == {}


def test_predictions_come_back(predicted, tmp_path):
    labels, found = predicted
    paths, patients = [f"/cells/ä {i}, left.png" for i in range(12)], [f"p{i % 4}" for i in range(12)]
    write_predictions(tmp_path / "predictions.csv", paths, labels, found, NAMES, patients)
    table = read_predictions(tmp_path / "predictions.csv")
    assert table.keys == paths[:11]
    assert table.labels == [NAMES[i] for i in labels[:11]]
    assert table.predictions == [NAMES[i] for i in found.predictions[:11]]
    assert table.patients == patients[:11]
    assert table.select([3, 0]).keys == [paths[3], paths[0]]
    header, first = (tmp_path / "predictions.csv").read_text(encoding="utf-8").splitlines()[:2]
    assert header == 'path,patient,label,prediction,fold,p_basophil,p_blast,"p_große, seltene"'
    assert first == '"/cells/ä 0, left.png",p0,basophil,basophil,0,0.8,0.1,0.1'

    without = FoldPredictions(found.folds, found.predictions, None, found.settings)
    write_predictions(tmp_path / "bags.csv", patients[:4] + paths[4:], labels, without, NAMES, key_column="patient")
    assert (tmp_path / "bags.csv").read_text(encoding="utf-8").startswith("patient,label,prediction,fold\np0,basophil,")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na,x\n", "has the columns ['path', 'label']; expected path or patient first"),
        ("label,prediction\nx,x\n", "expected path or patient first"),
        ("path,label,prediction\n", "has no rows"),
        ("path,label,prediction\na,x,x\na,x,y\n", "one path stands in several"),
    ],
)
def test_files_that_are_no_predictions(text, message, tmp_path):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_predictions(tmp_path / "p.csv")
    with pytest.raises(FileNotFoundError, match="no file"):
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


def test_tables_show_values_intervals_and_spread(predicted):
    labels, found = predicted
    summary = summarize(labels, found, NAMES)
    title, row, over_folds = metrics_table([("model", "sweep", summary)], "protocol")
    assert len(title) == len(row) == len(over_folds)
    low, high = (100 * end for end in summary["intervals"]["accuracy"])
    assert f"81.8 ({low:.1f}-{high:.1f})" in row
    assert "mean of 2 folds" in over_folds
    assert f"{100 * summary['mean_over_folds']['accuracy']:.1f} +- " in over_folds
    plain = classification_metrics(labels, labels, NAMES)
    assert metrics_table([("model", "20", plain)], "k")[1] == "model   20" + 4 * "          100.0"
    head, line = scores_table([("model", summary)])
    assert "AUROC" in head
    assert f"{summary['log_loss']:.3f}" in line
    assert "AUROC" not in scores_table([("model", plain)])[0]
    of_class = class_table("model", summary, dict.fromkeys(NAMES, 8))[1]
    assert re.fullmatch(r"basophil +8 +4 +100\.0 +80\.0 +88\.9", of_class)

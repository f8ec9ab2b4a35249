"""trust.py end to end on drawn cells and on features, its numbers against the other protocols, and its report."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.eval import linear, trust
from dinov2.eval.features.changed_images import CORRUPTIONS, keep_centre
from dinov2.eval.linear import LinearOptions
from dinov2.eval.protocol import EvaluationData
from dinov2.eval.results import read_result
from dinov2.models import architecture, build_backbone

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def run_trust(tmp_path, capsys):
    """Run trust.py; return what it prints, results.json and the output folder."""

    def run(*flags, folder="out"):
        out = tmp_path / folder
        trust.main([*map(str, flags), "--output-dir", str(out), "--num-workers", "0", "--device", "cpu"])
        return capsys.readouterr().out, json.loads((out / "results.json").read_text()), out

    return run


@pytest.fixture
def drawn(tmp_path):
    """Cells whose class is the colour of the central square, on a background that is the same for all."""
    rng = np.random.default_rng(0)
    for name, colour in {"violet": (150, 60, 160), "red": (220, 120, 90), EVIL.replace("/", ""): (90, 90, 200)}.items():
        (tmp_path / "cells" / name).mkdir(parents=True)
        for i in range(12):
            image = np.full((48, 48, 3), 230.0)
            image[16:32, 16:32] = colour
            image += rng.normal(scale=6, size=image.shape)
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(tmp_path / "cells" / name / f"{i:02d}.png")
    return tmp_path / "cells"


def test_drawn_cells_end_to_end(drawn, run_trust, write):
    """The centre alone tells the classes apart, the background does not, and a strong change of hue costs accuracy."""
    printed, report, out = run_trust("--encoder", "histogram", "--data", drawn, "--folds", "3", "--error", "0.1")
    assert report["protocol"] == "trust"
    assert report["left_out"] == {}
    accuracy = {source: rows["linear_dinobloom"]["accuracy"] for source, rows in report["results"].items()}
    assert accuracy["model"] > 0.9
    assert accuracy["centre"] > 0.9
    assert accuracy["background"] < 0.6
    assert set(accuracy) == {"model", "background", "centre"}
    curves = report["trust"]["corruptions"]["per_corruption"]
    assert set(curves) == set(CORRUPTIONS)
    for curve in curves.values():
        assert len(curve["values"]) == len(curve["accuracy"]) == len(curve["intervals"]["accuracy"]) == 5
        loss = np.mean([(accuracy["model"] - value) / accuracy["model"] for value in curve["accuracy"]])
        assert curve["mean_relative_loss"]["accuracy"] == pytest.approx(loss)
    assert curves["hue"]["accuracy"][-1] < accuracy["model"]
    files = {file.name for file in out.iterdir()}
    assert files == {
        *("results.json", "features.h5", "predictions.csv", "predictions_background.csv", "predictions_centre.csv"),
        *("split.csv", "label_errors.csv", "label_errors.html"),
        *("risk_coverage.png", "corruptions.png"),
    }
    for word in ("AURC", "knn, AUROC", "jpeg", "average precision", "background", "labels to review"):
        assert word in printed
    page = write(out, "--no-explorer")
    assert not any(tag == "img" and attributes.get("onerror") for tag, attributes in page.elements)
    hue = page.table("out: accuracy on corrupted images")["hue"]
    assert hue["5"].values == [curves["hue"]["accuracy"][-1]]
    assert page.table("out: Errors of the linear probe")["error of all cells"]["%"].values[0] == pytest.approx(
        1 - accuracy["model"]
    )
    assert EVIL in page.table("out: Cells of a class that training did not have")
    assert EVIL in page.table("out: Labels that the probe doubts")


def test_predictions_are_those_of_the_linear_probe(features_file, tmp_path, run_trust):
    file = features_file(tmp_path / "features.h5")
    _, report, out = run_trust("--features", file)
    linear.main(["--features", str(file), "--output-dir", str(tmp_path / "linear"), "--device", "cpu"])
    for name in ("predictions.csv", "split.csv"):
        assert (out / name).read_bytes() == (tmp_path / "linear" / name).read_bytes()
    expected = json.loads((tmp_path / "linear" / "results.json").read_text())["results"]["model"]["linear_dinobloom"]
    ours = report["results"]["model"]["linear_dinobloom"]
    assert {**ours, "folds": None} == {**expected, "folds": None}
    assert report["trust"]["risk_coverage"]["error"] == pytest.approx(1 - expected["accuracy"])
    assert "network" in report["left_out"]["corruptions, background, centre"]
    assert "corruptions" not in report["trust"]
    (row,) = read_result(out / "results.json", "trust").rows
    assert (row.method, row.source, row.n_tested) == ("linear", "model", 80)
    assert not read_result(out / "results.json", "trust").notes


def test_the_same_command_gives_the_same_bytes_but_for_the_date(features_file, tmp_path, run_trust):
    file = features_file(tmp_path / "features.h5", patients=[f"p{i // 4}" for i in range(80)])
    contents = []
    for folder in ("first", "second"):
        _, _, out = run_trust("--features", file, folder=folder)
        contents.append(re.sub(r'"date": .*', "", (out / "results.json").read_text()))
    assert contents[0] == contents[1]


def test_label_errors_are_listed_in_order_and_escaped(features_file, tmp_path, run_trust):
    rng = np.random.default_rng(0)
    truth = np.arange(120) % 2
    given = truth.copy()
    given[[7, 40, 91]] = 1 - given[[7, 40, 91]]
    features = (rng.normal(size=(120, 12)) + 4 * np.eye(2, 12)[truth]).astype(np.float32)
    names = [EVIL, "monocyte"]
    file = features_file(tmp_path / "f.h5", n=120, labels=given, features=features, class_names=names)
    _, report, out = run_trust("--features", file)
    with open(out / "label_errors.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["path", "label", "suggested", "score", "rank"]
    assert {row["path"] for row in rows[:3]} == {f"/cells/{i}.png" for i in (7, 40, 91)}
    assert [row["rank"] for row in rows] == [str(i) for i in range(1, len(rows) + 1)]
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores)
    for row in rows[:3]:
        i = int(row["path"].removeprefix("/cells/").removesuffix(".png"))
        assert (row["label"], row["suggested"]) == (names[given[i]], names[truth[i]])
    assert report["trust"]["label_errors"]["suspected"] == len(rows)
    page = (out / "label_errors.html").read_text()
    assert EVIL not in page
    assert "&lt;img" in page


def test_corrupted_images_are_classified_by_the_probe_of_clean_ones(tmp_path):
    """Features that swap the classes at severity 5 and stay otherwise: the accuracy is that of the probe, mirrored."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    features = (rng.normal(size=(60, 4)) + 3 * np.eye(2, 4)[labels]).astype(np.float32)
    folds = [(np.arange(30), np.arange(30, 60))]
    data = EvaluationData({"cls": features}, labels, ["a", "b"], folds)
    probes = trust.fit_probes(data)
    predicted = trust.classify(probes, data, features)
    expected = linear.evaluate(data, LinearOptions())["linear_dinobloom"]
    np.testing.assert_array_equal(predicted.probabilities, expected.probabilities)
    calls = []

    def embed(paths, change):
        calls.append((paths, change.keywords))
        clean = features[[int(path) for path in paths]]
        return clean[:, [1, 0, 2, 3]] if change.keywords["severity"] == 5 else clean

    curves = trust.corruption_curves(data, predicted, probes, [str(i) for i in range(60)], embed)
    assert len(calls) == 25
    assert all(paths == [str(i) for i in range(30, 60)] for paths, _ in calls)
    clean = (predicted.predictions[30:] == labels[30:]).mean()
    swapped = (probes[0].predict_proba(features[30:][:, [1, 0, 2, 3]]).argmax(axis=1) == labels[30:]).mean()
    assert curves["per_corruption"]["blur"]["accuracy"] == pytest.approx([clean] * 4 + [swapped])
    loss = (clean - swapped) / clean / 5
    assert curves["mean_relative_loss"]["accuracy"] == pytest.approx(loss)
    assert data.features["cls"] is features
    np.testing.assert_array_equal(predicted.probabilities, expected.probabilities)


def test_no_corruptions_leaves_the_slow_part_out(drawn, run_trust):
    _, report, out = run_trust(
        "--encoder", "histogram", "--data", drawn, "--test-fraction", "0.3", "--no-corruptions", "--centre", "0.3"
    )
    assert "corruptions" not in report["trust"]
    assert not (out / "corruptions.png").exists()
    assert set(report["results"]) == {"model", "background", "centre"}
    assert report["settings"]["centre"] == 0.3


def test_the_share_of_the_centre_reaches_the_images(drawn, tmp_path, run_trust):
    """The features of the source `centre` are those of images that were covered by hand, so its predictions agree."""
    flags = ("--encoder", "histogram", "--data")
    _, report, _ = run_trust(*flags, drawn, "--no-corruptions", "--centre", "0.2")
    for file in drawn.rglob("*.png"):
        Image.fromarray(keep_centre(np.asarray(Image.open(file)), 0.2)).save(file)
    _, by_hand, _ = run_trust(*flags, drawn, "--no-corruptions", folder="by_hand")
    metrics = [
        report["results"]["centre"]["linear_dinobloom"]["log_loss"],
        by_hand["results"]["model"]["linear_dinobloom"]["log_loss"],
    ]
    assert metrics[0] == pytest.approx(metrics[1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--few-shot", "1"], r"--few-shot \[1\].*give these to linear.py"),
        (["--baseline", "histogram"], "--baseline .*as --encoder here"),
    ],
)
def test_flags_of_other_protocols_are_errors(features_file, tmp_path, run_trust, flags, message):
    with pytest.raises(ValueError, match=message):
        run_trust("--features", features_file(tmp_path / "features.h5"), *flags)
    assert not (tmp_path / "out").exists()


def test_a_damaged_result_does_not_break_the_report(features_file, tmp_path, run_trust, write):
    _, report, out = run_trust("--features", features_file(tmp_path / "features.h5"))
    for damaged in (None, [], {"risk_coverage": 3, "corruptions": {"per_corruption": {"blur": 1}}, "retrieval": "x"}):
        (out / "results.json").write_text(json.dumps({**report, "trust": damaged}))
        assert write(out, "--no-explorer").headings


def test_a_network_of_the_centre_is_asked_about_the_background_that_it_sees(tmp_path, run_trust):
    """Its classes differ at the border of the part that it keeps; what lies outside of this part decides nothing."""
    rng = np.random.default_rng(0)
    places = {"seen": slice(12, 36), "unseen": slice(0, 48)}  # of 48 px; the network keeps the 24 in the centre
    for place, outer in places.items():
        for name, colour in {"a": (230, 120, 90), "b": (90, 120, 230)}.items():
            (tmp_path / place / name).mkdir(parents=True)
            for i in range(12):
                image = np.full((48, 48, 3), 160.0)
                image[outer, outer] = colour
                image[slice(outer.start + 3, outer.stop - 3), slice(outer.start + 3, outer.stop - 3)] = 160
                image += rng.normal(scale=6, size=image.shape)
                Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(tmp_path / place / name / f"{i:02d}.png")
    torch.manual_seed(0)
    model = build_backbone(
        {"embed_dim": 64, "depth": 1, "num_heads": 1, "patch_size": 14, "img_size": 28, "layerscale": 1.0}
        | {"block_chunks": 0, "center_crop": 0.5}
    )
    torch.save({"teacher": model.state_dict(), "architecture": architecture(model)}, tmp_path / "network.pth")
    accuracy = {}
    for place in places:
        flags = ("--checkpoint", tmp_path / "network.pth", "--data", tmp_path / place, "--folds", "3")
        _, report, _ = run_trust(*flags, "--no-corruptions", folder=f"{place}_trust")
        accuracy[place] = {source: rows["linear_dinobloom"]["accuracy"] for source, rows in report["results"].items()}
    assert accuracy["seen"]["background"] == 1
    assert accuracy["seen"]["centre"] > 0.9  # all but the centre is covered in the colour of the border
    assert max(accuracy["unseen"].values()) < 0.75

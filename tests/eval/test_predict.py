import json
import logging
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dinov2.eval import finetune, predict
from dinov2.eval.predict import AppliedNetworks, review_rows
from dinov2.eval.results import read_predictions
from dinov2.eval.solvers.image_classifier import load_classifier
from dinov2.models import architecture, build_backbone
from dinov2.utils.command import exit_code

CLASSES = ["basophil", "eosinophil", "lymphocyte"]
CPU = ["--num-workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def _messages_reach_caplog():
    with pytest.MonkeyPatch.context() as patch:
        for command in (finetune, predict):
            patch.setattr(command, "setup_logging", lambda rank=0: None)
        yield


@pytest.fixture(scope="module")
def cells(tmp_path_factory, draw_cells):
    """Sixty labelled images, and thirty new ones."""
    folder = tmp_path_factory.mktemp("cells")
    return draw_cells(folder / "known", 20, seed=0), draw_cells(folder / "new", 10, seed=1)


@pytest.fixture(scope="module")
def tune(tmp_path_factory, cells):
    """Fine-tune a tiny network for an epoch; return the output folder."""
    folder = tmp_path_factory.mktemp("networks")
    settings = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 14, "img_size": 28, "layerscale": 1.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_backbone({**settings, "block_chunks": 0})
    state = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    torch.save({"teacher": state, "architecture": architecture(model)}, folder / "cells.pth")

    def run(name, *flags):
        flags = ["--checkpoint", str(folder / "cells.pth"), "--data", str(cells[0]), "--epochs", "1", *flags]
        finetune.main([*flags, "--output-dir", str(folder / name), *CPU])
        return folder / name

    return run


@pytest.fixture(scope="module")
def tuned(tune):
    return tune("tuned", "--test-fraction", "0.25")


@pytest.fixture(scope="module")
def folds(tune):
    return tune("folds", "--folds", "2")


@pytest.fixture
def apply(tmp_path, caplog):
    """Run the command; return the tables, results.json and warnings."""

    def run(checkpoint, data, *flags):
        out = tmp_path / "out"
        caplog.clear()
        with caplog.at_level(logging.WARNING, "dinov2"):
            predict.main(["--checkpoint", str(checkpoint), "--data", str(data), "--output-dir", str(out), *CPU, *flags])
        return (
            pd.read_csv(out / "predictions.csv"),
            pd.read_csv(out / "review.csv", keep_default_na=False),
            json.loads((out / "results.json").read_text()),
            [record.message for record in caplog.records if record.levelno == logging.WARNING],
        )

    return run


def probabilities(table):
    return table[[f"p_{name}" for name in CLASSES]].to_numpy()


def test_cells_get_the_probabilities_that_finetune_computed_for_them(tuned, tmp_path, apply):
    expected = pd.read_csv(tuned / "predictions.csv")
    expected.rename(columns={"path": "Image Path", "label": "Label"}).to_csv(tmp_path / "test.csv", index=False)
    table, review, report, warnings = apply(tuned, tmp_path / "test.csv", "--review", "4")
    assert table["path"].tolist() == expected["path"].tolist()
    assert table["label"].tolist() == expected["label"].tolist()
    np.testing.assert_allclose(probabilities(table), probabilities(expected), atol=1e-6)
    before = json.loads((tuned / "results.json").read_text())["results"]["model"]["finetune_full"]
    metrics = report["results"]["finetune_applied"]
    assert metrics["confusion"] == before["confusion"]
    assert metrics["auroc"] == pytest.approx(before["auroc"])
    assert report["counts"] == {**report["counts"], "cells": 15, "tested": 15, "seen_in_training": 0, "unreadable": 0}
    assert report["checkpoint"]["checkpoint"] == str(tuned / "finetuned.pth")
    assert not warnings
    confidence = probabilities(table).max(axis=1)
    least = review[review["reason"].str.contains("low confidence")]
    assert least["path"].tolist() == table["path"][np.argsort(confidence)[:4]].tolist()
    assert set(review["neighbours"]) <= set(CLASSES)


def test_eight_views_are_averaged(tuned, cells, tmp_path):
    model = load_classifier(tuned / "finetuned.pth")
    with Image.open(next(cells[1].rglob("*.png"))) as image:
        square = image.resize((28, 28))  # the network's own size, so that turning and preparing it can be swapped
    for i, turned in enumerate(square.rotate(90 * n) for n in range(4)):
        turned.save(tmp_path / f"{i}.png")
        turned.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / f"{i}_flipped.png")
    views = predict.predict(model, sorted(tmp_path.glob("*.png"))).probabilities
    averaged = predict.predict(model, [tmp_path / "0.png"], tta=True).probabilities
    np.testing.assert_allclose(averaged[0], views.mean(axis=0), atol=1e-6)
    assert np.ptp(views, axis=0).max() > 1e-5


def test_networks_of_folds_are_averaged_in_any_order_of_classes(folds, cells, apply, tmp_path):
    paths = sorted(cells[1].rglob("*.png"))
    table, _, report, _ = apply(folds, cells[1])
    files = [folds / "finetuned_0.pth", folds / "finetuned_1.pth"]
    first, second = (predict.predict(load_classifier(file), paths).probabilities for file in files)
    np.testing.assert_allclose(probabilities(table), (first + second) / 2, atol=1e-6)
    assert np.abs(first - second).max() > 1e-3
    assert report["counts"]["tested"] == 30
    assert set(report["hashes"]) == {"finetuned_0.pth", "finetuned_1.pth"}

    content = torch.load(files[1])
    classifier, turned = content["classifier"], [2, 0, 1]
    rows = {name: classifier[name][turned] for name in ("weight", "bias")}
    content["classifier"] = {**classifier, **rows, "class_names": [CLASSES[i] for i in turned]}
    torch.save(content, tmp_path / "turned.pth")
    together = predict.predict([load_classifier(files[0]), load_classifier(tmp_path / "turned.pth")], paths)
    np.testing.assert_allclose(together.probabilities, (first + second) / 2, atol=1e-6)
    assert together.class_names == CLASSES


def test_cells_that_a_network_learned_from_are_not_in_the_metrics(tuned, folds, cells, tmp_path, apply):
    known = pd.read_csv(tuned / "predictions.csv")["path"].tolist()[:5]  # tested, not learned from
    learned = sorted(map(str, set(cells[0].rglob("*.png")) - set(map(type(cells[0]), known))))[:7]
    shutil.copy(learned[0], tmp_path / "copy.png")
    paths = [*known, *learned, str(tmp_path / "copy.png")]
    table = pd.DataFrame({"Image Path": paths, "Label": ["basophil"] * len(paths)})
    table.to_csv(tmp_path / "mixed.csv", index=False)
    predictions, _, report, warnings = apply(tuned, tmp_path / "mixed.csv")
    assert len(predictions) == 13
    assert report["counts"]["seen_in_training"] == 8
    assert report["counts"]["tested"] == 5
    assert report["results"]["finetune_applied"]["per_class"]["basophil"]["support"] == 5
    assert len(warnings) == 1
    assert "8 of these 13 images" in warnings[0]

    predictions, _, report, warnings = apply(folds, tmp_path / "mixed.csv")  # each by one of the two
    assert len(predictions) == 13
    assert report["results"] == {}
    assert report["counts"]["seen_in_training"] == 13
    assert "13 of these 13 images" in warnings[0]


def test_review_has_unsure_cells_and_those_whose_neighbours_disagree():
    applied = AppliedNetworks(
        kept=np.arange(5),
        unreadable={},
        class_names=["a", "b", "c"],
        probabilities=np.array([[0.9, 0.1, 0], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.6, 0.4, 0], [0, 0.2, 0.8]]),
        neighbours=np.array([[0.25, 0.75, 0], [0, 1, 0], [0, 0.25, 0.75], [0.25, 0.5, 0.25], [0.5, 0, 0.5]]),
    )
    assert review_rows(applied, 2) == [
        (1, ["b", 0.5, "b", 1.0, "low confidence"]),
        (3, ["a", 0.6, "b", 0.25, "low confidence, neighbours disagree"]),
        (4, ["c", 0.8, "a", 0.5, "neighbours disagree"]),  # of equal votes the first class wins, as in knn.py
        (0, ["a", 0.9, "b", 0.25, "neighbours disagree"]),
    ]
    assert [i for i, _ in review_rows(applied, 0)] == [3, 4, 0]
    without = AppliedNetworks(applied.kept, {}, applied.class_names, applied.probabilities, None)
    assert review_rows(without, 1) == [(1, ["b", 0.5, "", "", "low confidence"])]


def test_neighbours_are_the_nearest_training_images(tuned, cells):
    model = load_classifier(tuned / "finetuned.pth")
    (reference,) = predict.read_references([tuned / "finetuned.pth"], [model])
    some = [3, 30, 40]
    applied = predict.predict(model, [reference.paths[i] for i in some], references=[reference], n_neighbours=1)
    assert applied.neighbours.argmax(axis=1).tolist() == reference.labels[some].tolist()  # each is its own neighbour
    applied = predict.predict(model, [reference.paths[0]], references=[reference], n_neighbours=1000)
    np.testing.assert_allclose(applied.neighbours[0], np.bincount(reference.labels) / len(reference))


def test_cells_without_labels(tuned, cells, tmp_path, apply):
    rows = [{"Image Path": path, "patient": f"p{i % 3}"} for i, path in enumerate(sorted(cells[1].rglob("*.png")))]
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows.insert(2, {"Image Path": tmp_path / "broken.png", "patient": "broken"})
    pd.DataFrame(rows).to_csv(tmp_path / "cells.csv", index=False)
    table, review, report, warnings = apply(tuned, tmp_path / "cells.csv", "--review", "1000")
    assert list(table)[:3] == ["path", "patient", "prediction"]
    assert len(table) == 30
    assert table["patient"].tolist() == [row["patient"] for row in rows if row["patient"] != "broken"]
    assert report["results"] == {}
    assert report["counts"]["unreadable"] == 1
    assert len(warnings) == 1
    assert str(tmp_path / "broken.png") in warnings[0]
    assert len(review) == 30
    assert review["confidence"].is_monotonic_increasing
    assert read_predictions(tmp_path / "out" / "predictions.csv").labels is None


def test_labels_of_other_classes_are_kept_and_give_no_metrics(tuned, cells, tmp_path, apply):
    shutil.copytree(cells[1], tmp_path / "cells")
    (tmp_path / "cells" / "lymphocyte").rename(tmp_path / "cells" / "lymphocytes")
    table, _, report, warnings = apply(tuned, tmp_path / "cells")
    assert set(table["label"]) == {"basophil", "eosinophil", "lymphocytes"}
    assert report["results"] == {}
    assert len(warnings) == 1
    assert "'lymphocytes'; it knows 'basophil', 'eosinophil', 'lymphocyte'" in warnings[0]


@pytest.mark.parametrize("n", [1, 10])
def test_a_single_class_has_metrics(tuned, cells, tmp_path, apply, n):
    paths = sorted((cells[1] / "basophil").glob("*.png"))[:n]
    pd.DataFrame({"Image Path": paths, "Label": "basophil"}).to_csv(tmp_path / "cells.csv", index=False)
    _, _, report, _ = apply(tuned, tmp_path / "cells.csv")
    assert report["results"]["finetune_applied"]["per_class"]["basophil"]["support"] == n


def test_a_report_shows_applied_networks(tuned, cells, tmp_path, apply, write):
    apply(tuned, cells[1])
    page = write(tmp_path / "out", "--no-explorer")
    assert "finetune_applied" in page.text
    assert "finetune, applied" in page.text
    pd.DataFrame({"Image Path": sorted(cells[1].rglob("*.png"))}).to_csv(tmp_path / "cells.csv", index=False)
    apply(tuned, tmp_path / "cells.csv")  # without metrics
    assert "finetune, applied" in write(tmp_path / "out", "--no-explorer").text


def test_without_training_images_the_review_says_nothing_of_neighbours(tuned, cells, tmp_path, apply):
    shutil.copy(tuned / "finetuned.pth", tmp_path / "moved.pth")
    _, review, _, warnings = apply(tmp_path / "moved.pth", cells[1], "--review", "5")
    assert len(review) == 5
    assert set(review["neighbours"]) == set(review["agreement"]) == {""}
    assert len(warnings) == 1
    assert "moved.pth" in warnings[0]
    assert "neighbours" in warnings[0]
    _, review, _, warnings = apply(tuned, cells[1], "--image-size", "42", "--review", "5")
    assert set(review["neighbours"]) == {""}
    assert "--image-size 42" in warnings[0]


def test_the_folder_of_an_export_names_its_network(tuned, tmp_path):
    (tmp_path / "export").mkdir()
    shutil.copy(tuned / "finetuned.pth", tmp_path / "export" / "backbone.pth")
    assert predict.network_files(tmp_path / "export") == [tmp_path / "export" / "backbone.pth"]


def fails(checkpoint, data, tmp_path, caplog):
    """Run the command; check that it ends with code 2 and writes nothing, and return the message."""
    caplog.clear()
    flags = ["--checkpoint", str(checkpoint), "--data", str(data), "--output-dir", str(tmp_path / "out"), *CPU]
    assert exit_code(lambda: predict.main(flags)) == 2
    assert not list((tmp_path / "out").glob("*"))
    return caplog.records[-1].message


def test_what_cannot_be_applied_is_named(tuned, folds, cells, tmp_path, caplog):
    network = tuned / "finetuned.pth"
    content = torch.load(network)
    broken = tmp_path / "broken"
    shutil.copytree(tuned, broken)
    file = broken / "finetuned.pth"

    def message(checkpoint=file, data=cells[1], **changes):
        if changes:
            torch.save({name: value for name, value in {**content, **changes}.items() if value is not None}, file)
        return fails(checkpoint, data, tmp_path, caplog)

    assert "it has no classifier; finetune.py writes a file with one" in message(classifier=None)
    assert "list of seen images is damaged" in message(seen=torch.zeros(3, 4))
    assert "is of another training" in message(training="another")
    file.write_bytes(network.read_bytes()[:5000])
    assert "damaged or cut short" in message()
    assert "no finetuned.pth and no finetuned_<fold>.pth" in message(cells[0])
    assert "no file or folder" in message(tmp_path / "nothing.pth")
    (broken / "reference.h5").write_bytes(b"no features")
    assert "reference.h5" in message(training=content["training"])
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    assert "it has no classifier" in message(tmp_path / "model.safetensors")

    others = tmp_path / "others"
    shutil.copytree(folds, others)
    changed = torch.load(others / "finetuned_1.pth")
    changed["classifier"]["class_names"][0] = "blast"
    torch.save(changed, others / "finetuned_1.pth")
    (others / "reference_0.h5").unlink()
    assert "finetuned_1.pth have different classes, for instance 'basophil'" in message(others)

    (tmp_path / "empty").mkdir()
    assert "no images" in message(network, tmp_path / "empty")
    (tmp_path / "empty" / "1.png").write_bytes(b"no image")
    assert "none of the 1 could be read" in message(network, tmp_path / "empty")
    path = next(cells[1].rglob("*.png"))
    pd.DataFrame({"Image Path": [path, path]}).to_csv(tmp_path / "twice.csv", index=False)
    assert "is listed 2 times" in message(network, tmp_path / "twice.csv")

"""The report: it finds runs and results, stays one safe file, and names what it cannot read."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.eval import abmil, report
from dinov2.eval.features import Features, write_features
from dinov2.models.vision_transformer import vit_small
from dinov2.utils.command import exit_code

EVIL = "</script><img src=x onerror=alert(1)>"
NAMES = [EVIL, 'lymphocyte, "large"', "Zelle ü β"]


@pytest.fixture(autouse=True)
def short_trainings(monkeypatch):
    monkeypatch.setattr(abmil, "DEFAULTS", abmil.AbmilOptions(training=abmil.TrainingSettings(epochs=2)))


def read(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_page_is_whole_and_safe(page, run_folder, results):
    assert len(page.ids) == len(set(page.ids))
    levels = [int(tag[1]) for tag, _ in page.headings]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert [attrs for tag, attrs in page.elements if tag == "img"] == []
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    addresses = [attrs[key] for tag, attrs in page.elements for key in ("src", "href") if key in attrs]
    assert [address for address in addresses if not address.startswith(("#", "data:"))] == []
    tags = [tag for tag, _ in page.elements]
    assert tags.count("caption") == tags.count("table") > 10
    charts = [attrs for _, attrs in page.elements if attrs.get("class") == "chart"]
    assert len(charts) > 5
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in charts)
    for section in ("At a glance", "Results", "Training curves", "Teachers during training"):
        assert ("h2", section) in page.headings
    assert str(run_folder) in page.words
    assert len(page.text) < 2_000_000


def test_patients_and_data_sets_against_each_other(write, tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(12) % 2
    values = rng.normal(size=(48, 4)).astype(np.float32) + np.repeat(labels, 4)[:, None]
    patients = [f"p {i // 4}" for i in range(48)]
    paths = [f"/{i}.png" for i in range(48)]
    write_features(tmp_path / "f.h5", Features(values, np.repeat(labels, 4), NAMES[:2], paths, patients))
    flags = ["--features", str(tmp_path / "f.h5"), "--output-dir", str(tmp_path / "abmil"), "--protocol", "crossval"]
    abmil.main([*flags, "--folds", "3", "--runs", "1"])
    entry = {"n_train": 5, "n_test": 4, "accuracy": 0.5, "balanced_accuracy": 0.25, "weighted_f1": 0.5}
    entry |= {"macro_f1": 0.5, "intervals": {"balanced_accuracy": [0.1, 0.9]}, "reason": None}
    none = {"n_train": 0, "n_test": 0, "balanced_accuracy": None, "reason": "too few", "intervals": {}}
    crossed = {"matrix": {"a": {"a": entry, EVIL: none}}, "leave_one_out": {"a": entry}, "batch_effect": None}
    (tmp_path / "cross").mkdir()
    content = {"protocol": "cross", "results": crossed | {"batch_effect_reason": "one patient"}, "class_names": NAMES}
    (tmp_path / "cross" / "results.json").write_text(json.dumps(content))
    page = write(tmp_path, "--no-explorer")  # a folder of both
    row = page.table("abmil: all protocols")["abmil classwise"]
    metrics = read(tmp_path / "abmil")["results"]["classwise"]["together"]
    assert row["accuracy, %"].values[0] == metrics["accuracy"]
    assert ("h2", "Patients of abmil") in page.headings
    pairs = page.table("cross: every pair")
    assert pairs["a → a"]["balanced acc., %"].shown == ["25.0", "10.0", "90.0"]
    assert pairs[f"a → {EVIL}"]["why there is no number"].text == "too few"
    assert pairs["all others → a"]["accuracy, %"].values == [0.5]
    assert "one patient" in page.words


def test_the_same_folder_twice_is_reported_once(write, results, run_folder):
    page = write(results, results / "results.json", run_folder, run_folder / ".." / run_folder.name, "--no-explorer")
    assert len(page.json["results"]["results"]) == 1
    assert list(page.table("Training runs")) == ["run, first"]
    assert ("h2", "Comparison") not in page.headings


def test_folders_of_one_name_are_told_apart(tmp_path):
    folders = [tmp_path / "a" / "knn", tmp_path / "b" / "knn", tmp_path / "c"]
    assert report.short_names([*folders, tmp_path / "c"]) == ["a/knn", "b/knn", "c", "c"]


def test_wrong_arguments_say_what_was_looked_for(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(report, "setup_logging", lambda: None)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{")
    (tmp_path / "empty").mkdir()
    texts = {"empty": "training_metrics.json", "notes.txt": "results.json", "gone": "no file or folder"}
    texts["broken"] = "not readable as JSON"
    output = tmp_path / "out.html"
    for name, text in texts.items():
        caplog.clear()
        assert exit_code(lambda name=name: report.main([str(tmp_path / name), "--output", str(output)])) == 2
        assert text in caplog.text
        assert name in caplog.text
        assert not output.exists()


def test_cells_are_shown_as_the_first_network_sees_them(write, make_run, tmp_path):
    folder = make_run("with teacher")
    network = vit_small(patch_size=14, img_size=28, embed_dim=64, depth=1, num_heads=1)  # 64 a head, as usual
    weights = {f"backbone.{name}": value for name, value in network.state_dict().items()}
    (folder / "eval" / "training_8").mkdir(parents=True)
    torch.save({"teacher": weights}, folder / "eval" / "training_8" / "teacher_checkpoint.pth")
    (tmp_path / "cells" / "a").mkdir(parents=True)
    Image.new("RGB", (30, 30), "red").save(tmp_path / "cells" / "a" / "1.png")
    page = write(folder, "--cells", tmp_path / "cells")
    assert "cells" in page.ids
    assert any(attrs["src"].startswith("data:image/") for tag, attrs in page.elements if tag == "img")


def test_cells_without_a_network_say_what_to_add(write, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="add --checkpoint WEIGHTS"):
        write(tmp_path, "--cells", tmp_path)


def test_features_beside_results_are_shown_in_an_explorer(write, results, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)  # which takes long to import
    page = write(results, "--max-cells", "20")
    assert ("h2", "Embedding explorer") in page.headings
    assert "20" in page.words

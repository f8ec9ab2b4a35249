"""The command of a protocol: from images or features to results.json, predictions and tables."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from dinov2.eval import linear
from dinov2.eval.features import read_features
from dinov2.eval.knn import main
from dinov2.utils.command import exit_code

REPOSITORY = Path(__file__).parents[3]
CLASSES = ["basophil", "eosinophil", "lymphocyte"]


def test_one_set_from_images_to_results(checkpoint, tmp_path, draw_cells, run_knn):
    data = draw_cells(tmp_path / "cells", n=12, seed=0)
    blind = torch.load(checkpoint, weights_only=True)
    blind["teacher"]["backbone.patch_embed.proj.weight"].zero_()
    torch.save(blind, checkpoint)
    flags = ("--checkpoint", checkpoint, "--data", data, "--image-size", 28, "--k", 20, 1, "--folds", 4)
    table, report = run_knn(*flags, "--baseline", "untrained", "histogram", "pixels")
    assert list(report["results"]) == ["model", "untrained", "histogram", "pixels"]
    assert list(report["results"]["model"]) == ["knn_1", "knn_20"]
    assert report["results"]["histogram"]["knn_20"]["accuracy"] == 1.0  # the classes are colours
    assert report["results"]["model"]["knn_1"]["accuracy"] == pytest.approx(1 / 3)  # all its features are equal
    assert report["results"]["untrained"]["knn_1"]["accuracy"] > 0.5
    assert report["class_names"] == CLASSES
    assert report["counts"]["cells"] == report["counts"]["tested"] == 36
    assert report["split"]["train_sizes"] == [27] * 4
    assert report["counts"]["train_per_class"] == dict.fromkeys(CLASSES, 9)
    assert len(report["checkpoint"]["checkpoint_sha256"]) == 64
    assert report["settings"]["seed"] == 0
    assert report["settings"]["image_size"] == 28
    for part in (
        "36 of 36 cells tested, 4 fold(s)",
        "balanced acc.",
        "model, k = 20",
        "AUROC",
    ):
        assert part in table
    assert re.search(r"histogram +20 +100\.0 \(100\.0-100\.0\)", table)
    assert {path.name for path in (tmp_path / "out").glob("predictions*")} == {
        f"predictions_{name}knn_{k}.csv" for name in ("", "untrained_", "histogram_", "pixels_") for k in (1, 20)
    }

    time = (tmp_path / "out" / "features.h5").stat().st_mtime_ns
    _, again = run_knn(*flags)
    assert again["results"]["model"] == report["results"]["model"]
    assert (tmp_path / "out" / "features.h5").stat().st_mtime_ns == time


@pytest.mark.parametrize("protocol", ["dinobloom", "dino"])
def test_the_same_inputs_give_the_same_bytes_but_for_the_date(tmp_path, protocol, features_file):
    file = features_file(tmp_path / "f.h5", patients=[f"p{i % 20}" for i in range(80)])
    flags = ("--features", file, "--protocol", protocol, "--few-shot", 2, "--repeats", 2, "--folds", 2)
    texts = []
    for name in ("a", "b"):
        main([*map(str, flags), "--output-dir", str(tmp_path / name), "--device", "cpu"])
        text = (tmp_path / name / "results.json").read_text()
        texts.append(re.sub(r'"date": "[^"]+"', "", text))
        assert text != texts[-1]
    assert texts[0] == texts[1]
    assert (
        list(json.loads(text)["results"]["model"])
        == {"dinobloom": ["knn_1", "knn_20"], "dino": ["knn_10", "knn_20"]}[protocol]
    )
    for file in (tmp_path / "a").glob("*.csv"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_knn_and_the_linear_probe_use_the_same_split(tmp_path, features_file, rows_of):
    file = features_file(tmp_path / "f.h5", patients=[f"p{i % 20}" for i in range(80)])
    for flags in ((), ("--seed", "3"), ("--folds", "4"), ("--test-fraction", "0.25")):
        splits = []
        for name, command in {"knn": main, "linear": linear.main}.items():
            command(["--features", str(file), *flags, "--output-dir", str(tmp_path / name), "--device", "cpu"])
            splits.append((tmp_path / name / "split.csv").read_bytes())
        assert splits[0] == splits[1], flags
    assert len(rows_of(tmp_path / "knn" / "predictions_knn_1.csv")) == 20  # one split


def test_two_sets_with_a_copy_between_them(checkpoint, tmp_path, draw_cells, run_knn):
    train, test = draw_cells(tmp_path / "train", n=8, seed=0), draw_cells(tmp_path / "test", n=3, seed=1)
    shutil.copy(train / "basophil" / "00.png", test / "eosinophil" / "copy.png")
    (test / "lymphocyte" / "00.png").write_bytes(b"")
    flags = ("--checkpoint", checkpoint, "--train", train, "--test", test, "--image-size", 28, "--k", 3)
    _, report = run_knn(*flags)
    assert report["counts"]["dropped_identical_bytes"] == 1
    assert (report["split"]["train_sizes"], report["split"]["test_sizes"]) == ([23], [9])
    assert report["counts"]["unreadable"] == 1
    assert report["patients_kept_apart"] is None  # unknown
    stored = {name: tmp_path / "out" / f"features_{name}.h5" for name in ("train", "test")}
    assert len(read_features(stored["train"])) == 24
    _, from_files = run_knn("--features", stored["train"], "--test-features", stored["test"], "--k", 3)
    assert from_files["results"] == report["results"]
    assert from_files["checkpoint"] == report["checkpoint"]


def test_patients_of_a_csv_stay_on_one_side(checkpoint, tmp_path, rows_of, draw_cells, run_knn):
    data = draw_cells(tmp_path / "cells", n=8, seed=0)
    with open(tmp_path / "cells.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Image Path", "Label", "patient"])
        for i, path in enumerate(sorted(data.rglob("*.png"))):
            writer.writerow([path.relative_to(tmp_path), path.parent.name, f"p{i % 6}"])
    flags = ("--checkpoint", checkpoint, "--data", tmp_path / "cells.csv", "--image-size", 28, "--k", 1, "--folds", 3)
    _, report = run_knn(*flags)
    assert report["patients_kept_apart"] is True
    fold_of = {}
    for row in rows_of(tmp_path / "out" / "predictions_knn_1.csv"):
        assert fold_of.setdefault(row["patient"], row["fold"]) == row["fold"]
    assert sorted(Counter(fold_of.values()).values()) == [2, 2, 2]


def test_runs_as_a_script_from_any_folder(tmp_path, features_file):
    """A script's own folder comes first on the module path: none of its files may hide a module of that name."""
    features_file(tmp_path / "features.h5", n=12)
    script = [
        sys.executable,
        str(REPOSITORY / "dinov2" / "eval" / "knn.py"),
        "--features",
        "features.h5",
        "--folds",
        "3",
    ]
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(REPOSITORY)}, "text": True}
    done = subprocess.run([*script, "--output-dir", "out", "--k", "1"], capture_output=True, **options)
    assert done.returncode == 0, done.stderr
    assert "12 of 12 cells tested, 3 fold(s), 2 classes" in done.stdout
    assert json.loads((tmp_path / "out" / "results.json").read_text())["protocol"] == "knn"


def test_a_mistake_ends_with_code_2(tmp_path, features_file):
    file = features_file(tmp_path / "f.h5", n=12)
    flags = ["--features", str(file), "--k", "99", "--output-dir", str(tmp_path / "out")]
    assert exit_code(lambda: main(flags)) == 2
    assert not (tmp_path / "out").exists()

"""kNN against scikit-learn, and the command from pictures to results.json."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from dinov2.eval.features import Features, read_features, write_features
from dinov2.eval.knn import evaluate_knn, knn_predict, main
from dinov2.eval.metrics import classification_metrics
from dinov2.models import architecture, build_backbone

REPOSITORY = Path(__file__).parents[2]
COLOURS = {"basophil": (150, 60, 160), "eosinophil": (220, 120, 90), "lymphocyte": (90, 90, 200)}


def random_cells(n_train=300, n_test=100, dim=16, n_classes=5, seed=0):
    rng = np.random.default_rng(seed)
    train, test = (rng.normal(size=(n, dim)).astype(np.float32) for n in (n_train, n_test))
    return train, rng.integers(0, n_classes, n_train), test


@pytest.mark.parametrize("k", [1, 2, 6, 20, 300])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_agrees_with_scikit_learn(k, mean):
    """Even k, few classes and labels at random: most votes are ties. A mean of 1e4 leaves float32 three digits."""
    train, labels, test = random_cells(n_classes=3)
    train, test = train + np.float32(mean), test + np.float32(mean)
    reference = KNeighborsClassifier(k, algorithm="brute").fit(train.astype(np.float64) - mean, labels)
    expected = reference.predict(test.astype(np.float64) - mean)
    np.testing.assert_array_equal(knn_predict(train, labels, test, k, 3), expected)


def test_votes_tie_to_the_smallest_class():
    train = np.array([[0.0], [1.0], [2.0], [3.0]], dtype=np.float32)
    test = np.array([[-1.0]], dtype=np.float32)
    assert knn_predict(train, np.array([3, 1, 1, 3]), test, 4, 4).tolist() == [1]
    assert knn_predict(train, np.array([3, 1, 2, 0]), test, 3, 4).tolist() == [1]


@pytest.mark.parametrize("k", [1, 3, 10])
def test_equal_distances_go_to_the_earlier_cell_in_any_chunks(k):
    rng = np.random.default_rng(0)
    train = rng.normal(size=(40, 33)).astype(np.float32)[rng.integers(0, 40, 200)] + 50  # each some five times
    labels = rng.integers(0, 4, 200)
    test = np.concatenate([train[:30], rng.normal(size=(30, 33)).astype(np.float32) + 50])
    squared = np.square(train[None].astype(np.float64) - test[:, None]).sum(axis=2)  # [60, 200]
    nearest = np.argsort(squared, axis=1, kind="stable")[:, :k]
    expected = [np.bincount(labels[row], minlength=4).argmax() for row in nearest]
    for chunk_size in (1, 7, 60, None):
        assert knn_predict(train, labels, test, k, 4, chunk_size).tolist() == expected, chunk_size


def test_tensors_do_as_well_as_arrays():
    train, labels, test = random_cells()
    from_tensors = knn_predict(*map(torch.from_numpy, (train, labels, test)), 5, 5)
    assert from_tensors.dtype == np.int64
    np.testing.assert_array_equal(from_tensors, knn_predict(train, labels, test, 5, 5))


def test_evaluation_is_the_metrics_of_the_predictions():
    train, labels, test = random_cells()
    truth = np.random.default_rng(1).integers(0, 5, len(test))
    names = list("abcde")
    results = evaluate_knn(train, labels, test, truth, names, ks=(1, 7))
    assert list(results) == ["knn_1", "knn_7"]
    for k in (1, 7):
        assert results[f"knn_{k}"] == classification_metrics(truth, knn_predict(train, labels, test, k, 5), names)


def test_what_makes_no_sense_is_refused():
    train, labels, test = random_cells(n_train=10)
    with pytest.raises(ValueError, match="11 neighbours asked of 10 training cells"):
        knn_predict(train, labels, test, 11, 5)
    with pytest.raises(ValueError, match=r"expected \[N, D\], \[M, D\] and \[N\]"):
        knn_predict(train, labels, test[:, :3], 1, 5)
    test[0, 0] = np.inf
    with pytest.raises(ValueError, match="infinite or NaN"):
        knn_predict(train, labels, test, 1, 5)


def features_of(paths, patients=None, labels=None):
    n = len(paths)
    labels = np.zeros(n, dtype=np.int64) if labels is None else labels
    return Features(np.arange(n, dtype=np.float32)[:, None], labels, ["a", "b"], [str(p) for p in paths], patients)


@pytest.fixture
def checkpoint(tmp_path):
    settings = {"embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 14, "img_size": 28, "layerscale": 1.0}
    torch.manual_seed(0)
    model = build_backbone({**settings, "block_chunks": 0})
    file = tmp_path / "teacher_checkpoint.pth"
    state = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    torch.save({"teacher": state, "architecture": architecture(model)}, file)
    return file


def draw_cells(folder, n, seed):
    """n noisy 30-px pictures a class, coloured by class."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(n):
            noisy = np.array(colour) + rng.integers(-15, 15, (30, 30, 3))
            Image.fromarray(noisy.astype(np.uint8)).save(folder / name / f"{i:02d}.png")
    return folder


def run(capsys, tmp_path, *flags):
    main([*map(str, flags), "--output-dir", str(tmp_path / "out"), "--num-workers", "0", "--device", "cpu"])
    return capsys.readouterr().out, json.loads((tmp_path / "out" / "results.json").read_text())


def test_one_set_from_pictures_to_results(checkpoint, tmp_path, capsys):
    data = draw_cells(tmp_path / "cells", n=12, seed=0)
    blind = torch.load(checkpoint, weights_only=True)
    blind["teacher"]["backbone.patch_embed.proj.weight"].zero_()
    torch.save(blind, checkpoint)
    flags = ("--checkpoint", checkpoint, "--data", data, "--image-size", 28, "--k", 20, 1)
    table, report = run(capsys, tmp_path, *flags, "--baseline", "untrained", "histogram", "pixels")
    assert list(report["results"]) == ["model", "untrained", "histogram", "pixels"]
    assert list(report["results"]["model"]) == ["knn_1", "knn_20"]
    assert report["results"]["histogram"]["knn_20"]["accuracy"] == 1.0  # the classes are colours
    assert report["results"]["model"]["knn_1"]["accuracy"] == pytest.approx(1 / 3)  # all its features are equal
    assert report["results"]["untrained"]["knn_1"]["accuracy"] > 0.5
    assert report["class_names"] == sorted(COLOURS)
    assert report["counts"]["train"] == 27
    assert report["counts"]["test"] == 9
    assert report["counts"]["train_per_class"] == dict.fromkeys(sorted(COLOURS), 9)
    assert len(report["checkpoint"]["checkpoint_sha256"]) == 64
    assert report["settings"]["seed"] == 0
    assert report["settings"]["image_size"] == 28
    for part in ("27 training and 9 test cells", "histogram   20          100.0", "balanced acc.", "eosinophil"):
        assert part in table

    time = (tmp_path / "out" / "features.h5").stat().st_mtime_ns
    _, again = run(capsys, tmp_path, *flags)
    assert again["results"]["model"] == report["results"]["model"]
    assert (tmp_path / "out" / "features.h5").stat().st_mtime_ns == time


def test_two_sets_with_a_copy_between_them(checkpoint, tmp_path, capsys):
    train, test = draw_cells(tmp_path / "train", n=8, seed=0), draw_cells(tmp_path / "test", n=3, seed=1)
    shutil.copy(train / "basophil" / "00.png", test / "eosinophil" / "copy.png")
    (test / "lymphocyte" / "00.png").write_bytes(b"")
    flags = ("--checkpoint", checkpoint, "--train", train, "--test", test, "--image-size", 28, "--k", 3)
    _, report = run(capsys, tmp_path, *flags)
    assert report["counts"]["dropped_identical_bytes"] == 1
    assert report["counts"]["train"] == 23
    assert report["counts"]["test"] == 9
    assert report["counts"]["unreadable"] == 1
    assert report["patients_kept_apart"] is None  # unknown
    stored = {name: tmp_path / "out" / f"features_{name}.h5" for name in ("train", "test")}
    assert len(read_features(stored["train"])) == 24
    _, from_files = run(capsys, tmp_path, "--features", stored["train"], "--test-features", stored["test"], "--k", 3)
    assert from_files["results"] == report["results"]
    assert from_files["checkpoint"] == report["checkpoint"]


def test_patients_of_a_csv_stay_on_one_side(checkpoint, tmp_path, capsys):
    data = draw_cells(tmp_path / "cells", n=8, seed=0)
    with open(tmp_path / "cells.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Image Path", "Label", "patient"])
        for i, path in enumerate(sorted(data.rglob("*.png"))):
            writer.writerow([path.relative_to(tmp_path), path.parent.name, f"p{i % 6}"])
    flags = ("--checkpoint", checkpoint, "--data", tmp_path / "cells.csv", "--image-size", 28, "--k", 1)
    _, report = run(capsys, tmp_path, *flags)
    assert report["patients_kept_apart"] is True
    assert report["counts"]["patients_in_both"] == 0
    assert report["counts"]["train"] + report["counts"]["test"] == 24


def test_features_of_two_networks_are_not_compared(tmp_path, capsys):
    for name, sha in {"train": "aa", "test": "bb"}.items():
        cells = features_of([f"/{name}/{i}.png" for i in range(4)])
        cells.attributes["checkpoint_sha256"] = sha
        write_features(tmp_path / f"{name}.h5", cells)
    with pytest.raises(ValueError, match="checkpoint_sha256 differs, 'aa' and 'bb'"):
        run(capsys, tmp_path, "--features", tmp_path / "train.h5", "--test-features", tmp_path / "test.h5")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "got no cells"),
        (["--checkpoint", "c", "--train", "t"], "got --checkpoint --train; give"),
        (["--checkpoint", "c", "--features", "f"], "got --checkpoint --features; give"),
        (["--features", "f", "--baseline", "untrained"], "untrained needs --checkpoint"),
        (["--features", "f", "--k", "0"], "0 is not at least 1"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*flags, "--output-dir", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_runs_as_a_script_from_any_folder(tmp_path):
    """A script's own folder comes first on the module path: none of its files may hide a module of that name."""
    labels = np.repeat([0, 1], 6)
    write_features(tmp_path / "features.h5", features_of([f"/{i}.png" for i in range(12)], labels=labels))
    command = [sys.executable, str(REPOSITORY / "dinov2" / "eval" / "knn.py"), "--features", "features.h5"]
    done = subprocess.run(
        [*command, "--output-dir", "out", "--k", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "9 training and 3 test cells, 2 classes" in done.stdout
    assert json.loads((tmp_path / "out" / "results.json").read_text())["protocol"] == "knn"

"""kNN against scikit-learn, and the command from pictures to results.json."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from dinov2.data.splits import Split, leave_one_dataset_out, make_folds, write_split
from dinov2.eval import linear
from dinov2.eval.cell_sets import baseline_features
from dinov2.eval.features import Features, read_features, write_features
from dinov2.eval.features.extract import Embedder
from dinov2.eval.knn import evaluate_knn, evaluate_knn_folds, knn_predict, knn_probabilities, main, usable_ks
from dinov2.eval.metrics import classification_metrics
from dinov2.models import architecture, build_backbone
from dinov2.utils.command import exit_code

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


@pytest.mark.parametrize("k", [1, 4, 20])
def test_probabilities_are_scikit_learns_shares_of_the_votes(k):
    train, labels, test = random_cells()
    reference = KNeighborsClassifier(k, algorithm="brute").fit(train.astype(np.float64), labels)
    np.testing.assert_allclose(knn_probabilities(train, labels, test, k, 5), reference.predict_proba(test), atol=1e-12)


def dino_by_brute_force(train, labels, test, k, n_classes, temperature):
    """Each test cell by itself: cosines, the k largest, votes of exp(cosine / T)."""
    shares = np.zeros((len(test), n_classes))
    train = train.astype(np.float64)
    for i, cell in enumerate(test.astype(np.float64)):
        cosines = (train * cell).sum(axis=1) / np.sqrt(np.square(train).sum(axis=1)) / np.sqrt(np.square(cell).sum())
        for j in np.argsort(-cosines, kind="stable")[:k]:
            shares[i, labels[j]] += np.exp(cosines[j] / temperature)
    return shares / shares.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (10, 0.07), (20, 1.0), (100, 0.07)])
@pytest.mark.parametrize("n_train", [300, 8000])
def test_dinos_protocol_is_cosines_and_weights(k, temperature, n_train):
    train, labels, test = random_cells(n_train=n_train, n_test=20)
    train, test = train + np.float32(0.5), test * np.float32(3) + 1  # lengths differ, and must not matter
    expected = dino_by_brute_force(train, labels, test, k, 5, temperature)
    settings = {"protocol": "dino", "temperature": temperature}
    np.testing.assert_allclose(knn_probabilities(train, labels, test, k, 5, **settings), expected, atol=1e-9)
    np.testing.assert_array_equal(knn_predict(train, labels, test, k, 5, **settings), expected.argmax(axis=1))
    np.testing.assert_array_equal(knn_predict(train, labels, test * 7, k, 5, **settings), expected.argmax(axis=1))


def test_weights_outvote_numbers_and_equal_weights_do_not():
    """One near cell against two far ones; mirror images, whose weights differ by rounding alone."""
    train = np.array([[1, 0.05], [1, 1], [1, -1]], dtype=np.float32)
    labels, test = np.array([2, 1, 1]), np.array([[1, 0]], dtype=np.float32)
    assert knn_predict(train, labels, test, 3, 3).tolist() == [1]
    assert knn_predict(train, labels, test, 3, 3, protocol="dino").tolist() == [2]
    angles = np.array([0.3, -0.3, 0.7, -0.7]) + 1.1
    mirrored = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    middle = np.array([[np.cos(1.1), np.sin(1.1)]])
    for labels in ([0, 1, 0, 1], [1, 0, 1, 0]):
        assert knn_predict(mirrored, np.array(labels), middle, 4, 2, protocol="dino").tolist() == [0]


def test_small_temperatures_do_not_overflow():
    train, labels, test = random_cells(n_train=50)
    nearest = knn_predict(train, labels, test, 1, 5, protocol="dino")
    found = knn_probabilities(train, labels, test, 20, 5, protocol="dino", temperature=1e-4)
    np.testing.assert_array_equal(found.argmax(axis=1), nearest)
    assert np.isfinite(found).all()


def test_folds_predict_their_own_test_cells():
    features, labels, _ = random_cells()
    folds = make_folds(labels, n_folds=3)
    found = evaluate_knn_folds(features, labels, 5, folds, (1, 6))
    for k in (1, 6):
        for train, test in folds:
            expected = knn_probabilities(features[train], labels[train], features[test], k, 5)
            np.testing.assert_array_equal(found[k].probabilities[test], expected)
            np.testing.assert_array_equal(found[k].predictions[test], expected.argmax(axis=1))


def test_numbers_of_neighbours_are_the_protocols_or_those_asked_for(caplog):
    assert usable_ks(None, "dinobloom", 20) == [1, 20]
    assert usable_ks(None, "dino", 150) == [10, 20, 100]
    assert "k = 200 left out: there are 150 training cells" in caplog.text
    assert usable_ks([7, 1, 7], "dino", 7) == [1, 7]
    with pytest.raises(ValueError, match="8 neighbours asked of 7 training cells"):
        usable_ks([8], "dino", 7)
    with pytest.raises(ValueError, match="protocol dino asks for 10, 20, 100, 200 neighbours of 7 training cells"):
        usable_ks(None, "dino", 7)


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
    with pytest.raises(ValueError, match=r"expected \[N, D\] and \[M, D\]"):
        knn_predict(train, labels, test[:, :3], 1, 5)
    with pytest.raises(ValueError, match=r"\[9\] labels for 10 training cells"):
        knn_predict(train, labels[1:], test, 1, 5)
    with pytest.raises(ValueError, match="labels: from 0 to 4, but there are 2 classes"):
        knn_predict(train, np.arange(10) % 5, test, 1, 2)
    with pytest.raises(ValueError, match="protocol: 'cosine' is unknown; choose one of dinobloom, dino"):
        knn_predict(train, labels, test, 1, 5, protocol="cosine")
    with pytest.raises(ValueError, match="temperature: 0; choose one above 0"):
        knn_predict(train, labels, test, 1, 5, protocol="dino", temperature=0)
    test[0, 0] = np.inf
    with pytest.raises(ValueError, match="infinite or NaN"):
        knn_predict(train, labels, test, 1, 5)


# --- the command ----------------------------------------------------------------------------------------------------


def features_file(file, n=80, patients=None, prefix="/cells", **changes):
    """Cells of two classes, a dozen numbers each; far enough apart to be told from each other most of the time."""
    rng = np.random.default_rng(0)
    labels = changes.pop("labels", np.arange(n) % 2)
    cells = {
        "features": (rng.normal(size=(n, 12)) + labels[:, None]).astype(np.float32),
        "labels": labels,
        "class_names": ["blast", "monocyte"],
        "paths": [f"{prefix}/{i}.png" for i in range(n)],
        "patients": patients,
        "attributes": {"checkpoint_sha256": "ab", "transform": "28 px"},
    }
    write_features(file, Features(**{**cells, **changes}))
    return file


def rows_of(file):
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


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
    flags = ("--checkpoint", checkpoint, "--data", data, "--image-size", 28, "--k", 20, 1, "--folds", 4)
    table, report = run(capsys, tmp_path, *flags, "--baseline", "untrained", "histogram", "pixels")
    assert list(report["results"]) == ["model", "untrained", "histogram", "pixels"]
    assert list(report["results"]["model"]) == ["knn_1", "knn_20"]
    assert report["results"]["histogram"]["knn_20"]["accuracy"] == 1.0  # the classes are colours
    assert report["results"]["model"]["knn_1"]["accuracy"] == pytest.approx(1 / 3)  # all its features are equal
    assert report["results"]["untrained"]["knn_1"]["accuracy"] > 0.5
    assert report["class_names"] == sorted(COLOURS)
    assert report["counts"]["cells"] == report["counts"]["tested"] == 36
    assert report["split"]["train_sizes"] == [27] * 4
    assert report["counts"]["train_per_class"] == dict.fromkeys(sorted(COLOURS), 9)
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
    _, again = run(capsys, tmp_path, *flags)
    assert again["results"]["model"] == report["results"]["model"]
    assert (tmp_path / "out" / "features.h5").stat().st_mtime_ns == time


def test_from_features_to_results(tmp_path, capsys):
    file = features_file(tmp_path / "f.h5", labels=np.array([0, 0, 1, 0] * 20))
    flags = ("--features", file, "--few-shot", 8, 2, "--repeats", 3)
    table, report = run(capsys, tmp_path, *flags)
    written = {"results.json", "predictions_knn_1.csv", "predictions_knn_20.csv", "split.csv"}
    assert written <= {path.name for path in (tmp_path / "out").iterdir()} <= written | {"confusion.png", "curves.png"}
    for k in (1, 20):
        found, rows = report["results"]["model"][f"knn_{k}"], rows_of(tmp_path / "out" / f"predictions_knn_{k}.csv")
        assert [row["path"] for row in rows] == [f"/cells/{i}.png" for i in range(80)]
        labels, predictions = ([row[name] == "monocyte" for row in rows] for name in ("label", "prediction"))
        shares = np.array([[float(row["p_blast"]), float(row["p_monocyte"])] for row in rows])
        np.testing.assert_allclose(shares * k, (shares * k).round(), atol=1e-6)
        metrics = classification_metrics(np.array(labels) + 0, np.array(predictions) + 0, ["blast", "monocyte"], shares)
        for name in ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "log_loss", "calibration_error"):
            assert found[name] == pytest.approx(metrics[name], abs=1e-6), name
        assert found["confusion"] == metrics["confusion"]
        assert set(found["intervals"]) >= {"accuracy", "balanced_accuracy", "auroc"}
        assert len(found["folds"]) == 5
        assert found["sd_over_folds"]["accuracy"] > 0
        assert len(report["files"][f"predictions_knn_{k}.csv"]) == 64
    assert report["protocol"] == "knn"
    assert report["kinds"] == ["cls"]
    # four cells have no 20 neighbours
    assert {row: list(found) for row, found in report["few_shot"]["model"].items()} == {"knn_1": ["2", "8"]}
    assert report["few_shot"]["model"]["knn_1"]["8"]["n_draws"] == 15
    assert "model, k = 1, 8 cells a class: balanced accuracy" in table


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["dinobloom", "dino"])
def test_a_large_set_fits_in_four_gib(tmp_path, protocol):
    """The whole command, with 200,000 training cells of 1536 numbers; 300 are judged."""
    rng = np.random.default_rng(0)
    n_train, n_test = 200_000, 300
    paths = [f"/cells/{i}.png" for i in range(n_train + n_test)]
    cells = Features(
        features=rng.standard_normal((len(paths), 1536), dtype=np.float32),
        labels=rng.integers(0, 10, len(paths)),
        class_names=[str(i) for i in range(10)],
        paths=paths,
    )
    write_features(tmp_path / "large.h5", cells)
    write_split(tmp_path / "split.csv", paths, Split([(np.arange(n_train), np.arange(n_train, len(paths)))]))
    program = "import resource, sys; from dinov2.eval.knn import main; main(sys.argv[1:]); "
    program += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    flags = ["--features", "large.h5", "--split", "split.csv", "--protocol", protocol, "--output-dir", "out"]
    done = subprocess.run(
        [sys.executable, "-c", program, *flags],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) / 2**20 < 4


@pytest.mark.parametrize("protocol", ["dinobloom", "dino"])
def test_the_same_inputs_give_the_same_bytes_but_for_the_date(tmp_path, capsys, protocol):
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


def test_knn_and_the_linear_probe_judge_the_same_split(tmp_path, capsys):
    file = features_file(tmp_path / "f.h5", patients=[f"p{i % 20}" for i in range(80)])
    for flags in ((), ("--seed", "3"), ("--folds", "4"), ("--test-fraction", "0.25")):
        splits = []
        for name, command in {"knn": main, "linear": linear.main}.items():
            command(["--features", str(file), *flags, "--output-dir", str(tmp_path / name), "--device", "cpu"])
            splits.append((tmp_path / name / "split.csv").read_bytes())
        assert splits[0] == splits[1], flags
    assert len(rows_of(tmp_path / "knn" / "predictions_knn_1.csv")) == 20  # one split


def test_a_written_split_can_be_used_again(tmp_path, capsys):
    file = features_file(tmp_path / "f.h5", patients=[f"p{i % 20}" for i in range(80)])
    _, report = run(capsys, tmp_path, "--features", file, "--folds", 4, "--seed", 3)
    split = (tmp_path / "out" / "split.csv").rename(tmp_path / "split.csv")
    _, again = run(capsys, tmp_path, "--features", file, "--split", split, "--seed", 3)
    assert again["results"] == report["results"]
    assert len(again["hashes"]["split"]) == 64
    assert (tmp_path / "out" / "split.csv").read_bytes() == split.read_bytes()


def test_whole_data_sets_can_be_left_out(tmp_path, capsys):
    datasets = np.repeat(["acevedo", "matek", "own"], [30, 30, 20])
    paths = [f"/{name}/{i}.png" for i, name in enumerate(datasets)]
    file = features_file(tmp_path / "f.h5", paths=paths)
    folds = leave_one_dataset_out(datasets)
    write_split(tmp_path / "split.csv", paths, Split(list(folds.values())))
    _, report = run(capsys, tmp_path, "--features", file, "--split", tmp_path / "split.csv", "--k", 5)
    assert report["split"]["test_sizes"] == [30, 30, 20]
    rows = rows_of(tmp_path / "out" / "predictions_knn_5.csv")
    assert {(row["path"].split("/")[1], row["fold"]) for row in rows} == {
        ("acevedo", "0"),
        ("matek", "1"),
        ("own", "2"),
    }


def test_the_kind_of_features_can_be_chosen(tmp_path, capsys):
    labels = np.arange(80) % 2
    mean = np.stack([labels, labels], axis=1).astype(np.float32)
    file = features_file(tmp_path / "f.h5", others={"mean": mean})
    _, report = run(capsys, tmp_path, "--features", file, "--k", 1, "--kind", "mean")
    assert report["results"]["model"]["knn_1"]["accuracy"] == 1.0
    assert report["kinds"] == ["mean"]
    _, report = run(capsys, tmp_path, "--features", file, "--k", 1)
    assert report["results"]["model"]["knn_1"]["accuracy"] < 1.0
    with pytest.raises(ValueError, match="none of kind 'last4', only cls, mean"):
        run(capsys, tmp_path, "--features", file, "--kind", "last4")


def test_a_network_is_asked_for_the_kind_to_judge(checkpoint, tmp_path, capsys):
    data = draw_cells(tmp_path / "cells", n=6, seed=0)
    flags = ("--checkpoint", checkpoint, "--data", data, "--image-size", 28, "--k", 1, "--folds", 2)
    _, alone = run(capsys, tmp_path, *flags, "--kind", "mean", "--baseline", "untrained")
    assert alone["kinds"] == ["mean"]
    assert read_features(tmp_path / "out" / "features.h5").kinds == ["mean"]
    both = ("--kinds", "cls", "mean", "--overwrite", "--baseline", "untrained")
    _, among = run(capsys, tmp_path, *flags, *both, "--kind", "mean")
    assert among["results"] == alone["results"]
    embedder = Embedder(checkpoint, image_size=28, kinds=("cls", "mean"))
    paths = read_features(tmp_path / "out" / "features.h5").paths
    alone, among = (baseline_features("untrained", paths, embedder, 1, kinds) for kinds in (["mean"], ["mean", "cls"]))
    assert (list(alone), list(among)) == (["mean"], ["mean", "cls"])
    np.testing.assert_array_equal(alone["mean"], among["mean"])
    assert not np.allclose(among["mean"], among["cls"])


def test_two_sets_with_a_copy_between_them(checkpoint, tmp_path, capsys):
    train, test = draw_cells(tmp_path / "train", n=8, seed=0), draw_cells(tmp_path / "test", n=3, seed=1)
    shutil.copy(train / "basophil" / "00.png", test / "eosinophil" / "copy.png")
    (test / "lymphocyte" / "00.png").write_bytes(b"")
    flags = ("--checkpoint", checkpoint, "--train", train, "--test", test, "--image-size", 28, "--k", 3)
    _, report = run(capsys, tmp_path, *flags)
    assert report["counts"]["dropped_identical_bytes"] == 1
    assert (report["split"]["train_sizes"], report["split"]["test_sizes"]) == ([23], [9])
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
    flags = ("--checkpoint", checkpoint, "--data", tmp_path / "cells.csv", "--image-size", 28, "--k", 1, "--folds", 3)
    _, report = run(capsys, tmp_path, *flags)
    assert report["patients_kept_apart"] is True
    fold_of = {}
    for row in rows_of(tmp_path / "out" / "predictions_knn_1.csv"):
        assert fold_of.setdefault(row["patient"], row["fold"]) == row["fold"]
    assert sorted(Counter(fold_of.values()).values()) == [2, 2, 2]


def expect_nothing(tmp_path, capsys, message, *flags, error=ValueError):
    with pytest.raises(error, match=message):
        run(capsys, tmp_path, *flags)
    assert not (tmp_path / "out").exists()


def test_sets_that_make_no_sense_are_refused_and_leave_nothing(tmp_path, capsys):
    good = features_file(tmp_path / "good.h5")
    other = features_file(tmp_path / "other.h5", prefix="/o", attributes={"checkpoint_sha256": "cd"})
    flags = ("--features", good, "--test-features", other)
    expect_nothing(tmp_path, capsys, "checkpoint_sha256 differs, 'ab' and 'cd'", *flags)
    mean = features_file(tmp_path / "mean.h5", prefix="/o", kind="mean")
    flags = ("--features", good, "--test-features", mean)
    expect_nothing(tmp_path, capsys, "features are 'cls' in one and 'mean' in the other", *flags)
    one = features_file(tmp_path / "one.h5", labels=np.ones(80, dtype=np.int64))
    expect_nothing(tmp_path, capsys, "all 80 cells are of class 'monocyte'", "--features", one)
    broken = features_file(tmp_path / "broken.h5", features=np.full((80, 12), np.nan, dtype=np.float32))
    expect_nothing(tmp_path, capsys, "80 of 80 in '.*broken.h5' are infinite or NaN", "--features", broken)
    broken = features_file(tmp_path / "broken.h5", others={"mean": np.full((80, 2), np.inf, dtype=np.float32)})
    flags = ("--features", broken, "--kind", "mean")
    expect_nothing(tmp_path, capsys, "80 of 80 in '.*broken.h5' are infinite or NaN", *flags)
    twice = features_file(tmp_path / "twice.h5", paths=["/cells/a.png"] * 80)
    expect_nothing(tmp_path, capsys, "'/cells/a.png' is listed twice", "--features", twice)
    message = "65 neighbours asked of 64 training cells; choose k between 1 and 64"
    expect_nothing(tmp_path, capsys, message, "--features", good, "--k", 1, 65)
    expect_nothing(
        tmp_path, capsys, "40 cells in its largest class, fewer than the 41", "--features", good, "--folds", 41
    )
    expect_nothing(tmp_path, capsys, "--test-fraction 0.7: choose a share", "--features", good, "--test-fraction", 0.7)
    expect_nothing(tmp_path, capsys, "33 cells a class asked", "--features", good, "--few-shot", 33)
    expect_nothing(tmp_path, capsys, "no file '.*gone.csv'", "--features", good, "--split", "gone.csv", error=OSError)


def test_features_without_labels_are_refused(tmp_path, capsys):
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["features"] = np.zeros((4, 3), dtype=np.float32)
    message = "has no dataset labels, class_names, paths; dinov2/eval/extract_features.py writes a file that has"
    expect_nothing(tmp_path, capsys, message, "--features", tmp_path / "f.h5")


def test_splits_that_make_no_sense_are_refused_and_leave_nothing(tmp_path, capsys):
    file = features_file(tmp_path / "f.h5", patients=[f"p{i // 2}" for i in range(80)])

    def split(parts):
        lines = [f"/cells/{i}.png,{part}" for i, part in enumerate(parts)]
        (tmp_path / "split.csv").write_text("\n".join(["path,part", *lines]) + "\n")
        return "--features", file, "--split", tmp_path / "split.csv"

    expect_nothing(tmp_path, capsys, "40 of 40 patients have cells on two sides", *split(["train", "test"] * 40))
    without = ["train" if i < 40 and i % 2 else "unused" if i < 40 else "test" for i in range(80)]
    message = "1 classes are tested without a training cell, for instance 'blast' in fold 0"
    expect_nothing(tmp_path, capsys, message, *split(without))


def test_mistakes_in_lists_show_before_anything_is_embedded(checkpoint, tmp_path, capsys):
    data = draw_cells(tmp_path / "cells", n=2, seed=0)
    network = ("--checkpoint", checkpoint, "--image-size", 28)

    def listed(*lines):
        (tmp_path / "cells.csv").write_text("\n".join(lines) + "\n")
        return *network, "--data", tmp_path / "cells.csv"

    message = r"lacks the column\(s\) 'Label'; its first line has \['Image Path', 'Class'\]"
    expect_nothing(tmp_path, capsys, message, *listed("Image Path,Class", "cells/basophil/00.png,basophil"))
    flags = listed("Image Path,Label", "cells/basophil/00.png,basophil", "gone.png,eosinophil")
    expect_nothing(tmp_path, capsys, "1 of the 2 images in .* do not exist", *flags, error=FileNotFoundError)
    flags = listed("Image Path,Label", "cells/basophil/00.png,basophil", "cells/basophil/01.png,")
    expect_nothing(tmp_path, capsys, "line 3: no value for 'Label'", *flags)
    flags = listed("Image Path,Label", *(f"cells/basophil/{i:02d}.png,basophil" for i in range(2)))
    expect_nothing(tmp_path, capsys, "all 2 cells are of class 'basophil'", *flags)
    message = "2 cells in its largest class, fewer than the 5 parts"
    expect_nothing(tmp_path, capsys, message, *network, "--data", data)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "got no cells"),
        (["--checkpoint", "c", "--train", "t"], "got --checkpoint --train; give"),
        (["--checkpoint", "c", "--features", "f"], "got --checkpoint --features; give"),
        (["--features", "f", "--baseline", "untrained"], "untrained needs --checkpoint"),
        (["--features", "f", "--k", "0"], "0 is not at least 1"),
        (["--features", "f", "--temperature", "0"], "--temperature 0.0: choose one above 0"),
        (["--features", "f", "--folds", "3", "--split", "s"], "not allowed with argument --folds"),
        (["--features", "f", "--test-features", "g", "--split", "s"], "--split divides one set"),
        (["--features", "f", "--test-features", "g", "--test-fraction", "0.2"], "--test-fraction divides one set"),
        (["--checkpoint", "c", "--data", "d", "--kinds", "cls", "--kind", "mean"], "mean is not among --kinds cls"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*flags, "--output-dir", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_runs_as_a_script_from_any_folder(tmp_path):
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


def test_a_mistake_ends_with_code_2(tmp_path):
    file = features_file(tmp_path / "f.h5", n=12)
    flags = ["--features", str(file), "--k", "99", "--output-dir", str(tmp_path / "out")]
    assert exit_code(lambda: main(flags)) == 2
    assert not (tmp_path / "out").exists()

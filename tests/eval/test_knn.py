"""kNN against scikit-learn, its search against brute force in little memory, and the command."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from dinov2.data.splits import Split, make_folds, write_split
from dinov2.eval import knn
from dinov2.eval.features import Features, write_features
from dinov2.eval.knn import (
    KnnOptions,
    evaluate,
    evaluate_knn,
    knn_predict,
    nearest_neighbours,
    usable_ks,
    vote_shares,
)
from dinov2.eval.metrics import classification_metrics
from dinov2.eval.protocol import EvaluationData

REPOSITORY = Path(__file__).parents[2]


def shares_of(train, labels, test, k, n_classes, **options):
    return vote_shares(train, labels, test, n_classes, KnnOptions(k=[k], **options))[k]


def predict(train, labels, test, k, n_classes, **options):
    """Predict the test cells through `evaluate`."""
    features, n = np.concatenate([train, test]), len(train)
    fold = np.arange(n), np.arange(n, len(features))
    labels = np.concatenate([labels, np.zeros(len(test), dtype=np.int64)])
    data = EvaluationData({"cls": features}, labels, list("abcdefgh"[:n_classes]), [fold])
    return evaluate(data, KnnOptions(k=[k], **options))[f"knn_{k}"].predictions[n:]


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
    np.testing.assert_allclose(shares_of(train, labels, test, k, 5), reference.predict_proba(test), atol=1e-12)


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
    np.testing.assert_allclose(shares_of(train, labels, test, k, 5, **settings), expected, atol=1e-9)
    np.testing.assert_array_equal(predict(train, labels, test, k, 5, **settings), expected.argmax(axis=1))
    np.testing.assert_array_equal(predict(train, labels, test * 7, k, 5, **settings), expected.argmax(axis=1))


def test_weights_outvote_numbers_and_equal_weights_do_not():
    """One near cell against two far ones; mirror images, whose weights differ by rounding alone."""
    train = np.array([[1, 0.05], [1, 1], [1, -1]], dtype=np.float32)
    labels, test = np.array([2, 1, 1]), np.array([[1, 0]], dtype=np.float32)
    assert knn_predict(train, labels, test, 3, 3).tolist() == [1]
    assert predict(train, labels, test, 3, 3, protocol="dino").tolist() == [2]
    angles = np.array([0.3, -0.3, 0.7, -0.7]) + 1.1
    mirrored = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    middle = np.array([[np.cos(1.1), np.sin(1.1)]])
    for labels in ([0, 1, 0, 1], [1, 0, 1, 0]):
        assert predict(mirrored, np.array(labels), middle, 4, 2, protocol="dino").tolist() == [0]


def test_small_temperatures_do_not_overflow():
    train, labels, test = random_cells(n_train=50)
    nearest = predict(train, labels, test, 1, 5, protocol="dino")
    found = shares_of(train, labels, test, 20, 5, protocol="dino", temperature=1e-4)
    np.testing.assert_array_equal(found.argmax(axis=1), nearest)
    assert np.isfinite(found).all()


def test_folds_predict_their_own_test_cells():
    features, labels, _ = random_cells()
    folds = make_folds(labels, n_folds=3)
    rows = evaluate(EvaluationData({"cls": features}, labels, list("abcde"), folds), KnnOptions(k=(1, 6)))
    assert list(rows) == ["knn_1", "knn_6"]
    for k in (1, 6):
        for train, test in folds:
            expected = shares_of(features[train], labels[train], features[test], k, 5)
            np.testing.assert_array_equal(rows[f"knn_{k}"].probabilities[test], expected)
            np.testing.assert_array_equal(rows[f"knn_{k}"].predictions[test], expected.argmax(axis=1))


def test_numbers_of_neighbours_are_the_protocols_or_those_asked_for(caplog):
    assert usable_ks(KnnOptions("dinobloom"), 20) == [1, 20]
    assert usable_ks(KnnOptions("dino"), 150) == [10, 20, 100]
    assert "k = 200 left out: there are 150 training cells" in caplog.text
    assert usable_ks(KnnOptions("dino", [7, 1, 7]), 7) == [1, 7]
    with pytest.raises(ValueError, match="8 neighbours asked of 7 training cells"):
        usable_ks(KnnOptions("dino", [8]), 7)
    with pytest.raises(ValueError, match="protocol dino asks for 10, 20, 100, 200 neighbours of 7 training cells"):
        usable_ks(KnnOptions("dino"), 7)


def test_votes_tie_to_the_smallest_class():
    train = np.array([[0.0], [1.0], [2.0], [3.0]], dtype=np.float32)
    test = np.array([[-1.0]], dtype=np.float32)
    assert knn_predict(train, np.array([3, 1, 1, 3]), test, 4, 4).tolist() == [1]
    assert knn_predict(train, np.array([3, 1, 2, 0]), test, 3, 4).tolist() == [1]


@pytest.mark.parametrize("k", [1, 3, 10])
def test_equal_distances_go_to_the_earlier_cell_in_any_chunks(k, monkeypatch):
    rng = np.random.default_rng(0)
    train = rng.normal(size=(40, 33)).astype(np.float32)[rng.integers(0, 40, 200)] + 50  # each some five times
    labels = rng.integers(0, 4, 200)
    test = np.concatenate([train[:30], rng.normal(size=(30, 33)).astype(np.float32) + 50])
    squared = np.square(train[None].astype(np.float64) - test[:, None]).sum(axis=2)  # [60, 200]
    nearest = np.argsort(squared, axis=1, kind="stable")[:, :k]
    expected = [np.bincount(labels[row], minlength=4).argmax() for row in nearest]
    for size in (1, 7, 60, 200):
        monkeypatch.setattr(knn, "CHUNK", size)
        assert knn_predict(train, labels, test, k, 4).tolist() == expected, size


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
        KnnOptions("cosine")
    with pytest.raises(ValueError, match="temperature: 0; choose one above 0"):
        KnnOptions("dino", temperature=0)
    test[0, 0] = np.inf
    with pytest.raises(ValueError, match="infinite or NaN"):
        knn_predict(train, labels, test, 1, 5)


def test_from_features_to_results(tmp_path, features_file, rows_of, run_knn):
    file = features_file(tmp_path / "f.h5", labels=np.array([0, 0, 1, 0] * 20))
    flags = ("--features", file, "--few-shot", 8, 2, "--repeats", 3)
    table, report = run_knn(*flags)
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
    """The whole command, with 200,000 training cells of 1536 numbers; 300 are tested."""
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


# --- search ------------------------------------------------------------------------------------------------------


def brute_force(train, test, k, is_cosine=False):
    train, test = (x.astype(np.float64) for x in (train, test))
    if is_cosine:
        train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    squared = np.stack([np.square(train - cell).sum(axis=1) for cell in test])  # [M, N]
    nearest = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return nearest, np.take_along_axis(squared, nearest, axis=1)


def draw(n=3000, dim=24, offset=0.0, n_test=40, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(size, dim)) + offset).astype(np.float32) for size in (n, n_test)]


@pytest.mark.parametrize("is_cosine", [False, True])
@pytest.mark.parametrize(
    ("k", "settings"),
    [
        (1, {}),
        (20, {"offset": 50}),  # float32 keeps five digits of what differs
        (5, {"offset": 1e3, "dim": 8, "n": 6000}),
        (7, {"n": 50}),
        (50, {"n": 50}),
    ],
)
def test_it_is_what_brute_force_finds(k, settings, is_cosine):
    train, test = draw(**settings)
    found = nearest_neighbours(train, test, k, is_cosine)
    positions, distances = brute_force(train, test, k, is_cosine)
    np.testing.assert_array_equal(found.positions, positions)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-9)


@pytest.mark.parametrize("n_distinct", [1, 40, 400])
def test_copies_are_found_in_order_in_any_chunks(n_distinct, monkeypatch):
    pool, others = draw(n=n_distinct, dim=33, offset=50, n_test=10)
    train = pool[np.random.default_rng(1).integers(0, n_distinct, 3000)]
    test = np.concatenate([train[:20], others])
    expected = brute_force(train, test, 20)[0]
    for size in (7, 500, 4000):
        monkeypatch.setattr(knn, "CHUNK", size)
        np.testing.assert_array_equal(nearest_neighbours(train, test, 20).positions, expected, str(size))


@pytest.mark.parametrize("exponent", [-18, 0, 18])
def test_scale_and_an_outlier_do_not_matter(exponent):
    train, test = draw()
    expected = brute_force(train, test, 5)[0]
    train, test = (x * np.float32(10.0**exponent) for x in (train, test))
    train[-1] = train[-1] * 1e6
    np.testing.assert_array_equal(nearest_neighbours(train, test, 5).positions, expected)


def test_inputs_are_left_as_they_are():
    for dtype in (np.float16, np.float32, np.float64):
        train, test = (x.astype(dtype) for x in draw(n=100))
        before = train.copy(), test.copy()
        nearest_neighbours(train, test, 3, is_cosine=True)
        np.testing.assert_array_equal(train, before[0])
        np.testing.assert_array_equal(test, before[1])


def test_no_test_cell_has_no_neighbours():
    train, test = draw(n=100)
    assert nearest_neighbours(train, test[:0], 3).positions.shape == (0, 3)


def test_features_that_cannot_be_compared_are_refused():
    train, test = draw(n=10)
    with pytest.raises(ValueError, match="11 neighbours asked of 10 training cells; choose k between 1 and 10"):
        nearest_neighbours(train, test, 11)
    with pytest.raises(
        ValueError, match=r"\[10, 24\] \(train\) and \[40, 3\] \(test\): expected \[N, D\] and \[M, D\]"
    ):
        nearest_neighbours(train, test[:, :3], 1)
    test[3] = 0
    nearest_neighbours(train, test, 1)
    with pytest.raises(ValueError, match="all numbers of 1 cells are 0"):
        nearest_neighbours(train, test, 1, is_cosine=True)
    for value in (np.nan, np.inf):
        test[3, 2] = value
        with pytest.raises(ValueError, match="some are infinite or NaN"):
            nearest_neighbours(train, test, 1)


def test_no_copy_of_the_training_features_is_made():
    """400 MiB of float32: a float64 copy, or one of all distances, would show."""
    program = """
        import resource, torch
        from dinov2.eval.knn import nearest_neighbours
        torch.set_num_threads(1)
        train, test = torch.rand(400_000, 256), torch.rand(400, 256)
        nearest_neighbours(train[:4000], test[:40], 20)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        nearest_neighbours(train, test, 20, is_cosine=True)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    lines = "\n".join(line.strip() for line in program.splitlines())
    done = subprocess.run([sys.executable, "-c", lines], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300


@pytest.mark.gpu
@pytest.mark.parametrize("is_cosine", [False, True])
def test_a_gpu_finds_the_same(is_cosine):
    train, test = draw(n=20_000, dim=64, offset=3)
    here = nearest_neighbours(train, test, 20, is_cosine)
    there = nearest_neighbours(torch.from_numpy(train).cuda(), test, 20, is_cosine)
    np.testing.assert_array_equal(there.positions, here.positions)

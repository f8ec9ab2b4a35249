"""Linear probes: scikit-learn's probabilities, choices that never see a test cell, and the command from features on."""

import csv
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from dinov2.data.splits import make_folds
from dinov2.eval.features import Features, write_features
from dinov2.eval.linear import (
    LAMBDAS,
    LinearOptions,
    choose_lambda,
    dinobloom_lambda,
    evaluate,
    fit_linear_probe,
    main,
    protocol,
)
from dinov2.eval.metrics import classification_metrics, log_losses
from dinov2.eval.protocol import EvaluationData

REPOSITORY = Path(__file__).parents[2]
NAMES = ["basophil", "blast", "eosinophil", "monocyte"]


def draw(n=160, dim=8, n_classes=4, apart=1.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % n_classes)
    return (rng.normal(size=(n, dim)) + apart * 2 * np.eye(n_classes, dim)[labels]).astype(np.float32), labels


def run_protocol(features, labels, folds, name="dinobloom", patients=None, validation=None, **options):
    """Return the predictions of `evaluate`; features are an array or {kind: array}."""
    kinds = features if isinstance(features, dict) else {"cls": features}
    data = EvaluationData(kinds, labels, NAMES, folds, patients, validation)
    return evaluate(data, LinearOptions(name, **options))[f"linear_{name}"]


def reference(features, labels, lam):
    model = LogisticRegression(C=1 / lam, tol=1e-10, max_iter=500, solver="newton-cholesky")
    return model.fit(features.astype(np.float64), labels)


# --- functions of arrays --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [2, 4])
def test_the_protocol_is_scikit_learns_optimum_with_dinoblooms_penalty(n_classes):
    """The penalty follows from the data: with nine classes assumed, as upstream does, it would be another one."""
    features, labels = draw(n_classes=n_classes, dim=8, apart=0.5)
    others = draw(n_classes=n_classes, seed=1)[0]
    probe = fit_linear_probe(features, labels, n_classes)
    lam = 100 / (8 * n_classes)
    assert dinobloom_lambda(8, n_classes) == lam
    expected = reference(features, labels, lam).predict_proba(others)
    np.testing.assert_allclose(probe.predict_proba(others), expected, rtol=0, atol=1e-4)
    other_penalty = reference(features, labels, 100 / (8 * 9)).predict_proba(others)
    assert np.abs(expected - other_penalty).max() > 1e-3
    assert probe.has_converged


def test_the_sklearn_backend_is_what_its_defaults_give():
    features, labels = draw(apart=0.5)
    probe = fit_linear_probe(features, labels, 4, backend="sklearn")
    model = LogisticRegression(C=1 / dinobloom_lambda(8, 4), max_iter=1000).fit(features, labels)
    np.testing.assert_allclose(probe.predict_proba(features), model.predict_proba(features), atol=1e-6)
    two = labels % 2
    probe, model = (
        fit_linear_probe(features, two, 2, lam=1.0, backend="sklearn"),
        LogisticRegression().fit(features, two),
    )
    np.testing.assert_allclose(probe.predict_proba(features), model.predict_proba(features), atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "sklearn"])
def test_a_class_without_a_training_cell_has_probability_zero(backend):
    features, labels = draw()
    seen = labels != 1
    probe = fit_linear_probe(features[seen], labels[seen], 4, lam=1.0, backend=backend)
    probabilities = probe.predict_proba(features)
    assert (probabilities[:, 1] == 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    expected = reference(features[seen], labels[seen], 1.0).predict_proba(features)
    tolerance = {"torch": 1e-4, "sklearn": 1e-2}[backend]  # its defaults stop before the optimum
    np.testing.assert_allclose(probabilities[:, [0, 2, 3]], expected, atol=tolerance)


def test_what_cannot_be_fitted_is_refused():
    features, labels = draw()
    with pytest.raises(ValueError, match=r"all 160 training cells are of one class \(number 2\)"):
        fit_linear_probe(features, np.full(160, 2), 4)
    with pytest.raises(ValueError, match="lambda: 0; choose a penalty above 0"):
        fit_linear_probe(features, labels, 4, lam=0)
    with pytest.raises(KeyError, match="cuml"):
        fit_linear_probe(features, labels, 4, backend="cuml")
    with pytest.raises(KeyError, match="knn"):
        run_protocol(features, labels, [], "knn")
    features[3, 2] = np.nan
    with pytest.raises(ValueError, match="1 of 160 cells have infinite or NaN ones"):
        fit_linear_probe(features, labels, 4)


def test_lambda_has_the_least_validation_loss():
    features, labels = draw(n=120, dim=30, apart=0.4)
    folds = make_folds(labels, n_folds=3)
    lam, losses = choose_lambda(features, labels, 4, folds)
    assert list(losses) == list(LAMBDAS)
    expected = {}
    for tried in LAMBDAS[2:7]:
        models = [(reference(features[train], labels[train], tried), test) for train, test in folds]
        of_cells = [log_losses(labels[test], model.predict_proba(features[test])) for model, test in models]
        expected[tried] = np.concatenate(of_cells).mean()
        assert losses[tried] == pytest.approx(expected[tried], rel=1e-3)
    assert lam == min(expected, key=expected.get)
    assert LAMBDAS[0] > lam > LAMBDAS[-1]


@pytest.mark.parametrize("name", ["dinobloom", "sweep", "sgd"])
def test_test_cells_choose_nothing(name):
    """Other test features and labels change neither what is chosen nor any other cell's probabilities."""
    features, labels = draw(apart=0.5)
    patients = [f"p{i % 40}" for i in range(160)]
    (train, test), *_ = make_folds(labels, patients, 4)
    settings = {"folds": [(train, test)], "name": name, "patients": patients, "sgd_iterations": 30}
    found = run_protocol(features, labels, **settings)
    changed, relabelled = features.copy(), labels.copy()
    changed[test[1:]] += 5
    relabelled[test] = (labels[test] + 1) % 4
    again = run_protocol(changed, relabelled, **settings)
    assert again.settings == found.settings
    np.testing.assert_array_equal(again.probabilities[test[0]], found.probabilities[test[0]])
    assert np.isnan(found.probabilities[train]).all()
    assert (found.predictions[train] == -1).all()


@pytest.mark.parametrize("name", ["sweep", "sgd"])
def test_validation_folds_keep_patients_whole(name, monkeypatch):
    features, labels = draw()
    patients = [f"p{i % 20}" for i in range(160)]
    seen = []

    def spy(of_labels, of_patients, n_folds, seed):
        folds = make_folds(of_labels, of_patients, n_folds, seed)
        seen.extend((of_patients, fold) for fold in folds)
        return folds

    monkeypatch.setattr("dinov2.eval.linear.make_folds", spy)
    run_protocol(features, labels, make_folds(labels, patients, 2), name, patients, sgd_iterations=5)
    assert len(seen) == 2 * 5
    for of_patients, (fitted, validated) in seen:
        assert not {of_patients[i] for i in fitted} & {of_patients[i] for i in validated}


def test_each_fold_predicts_its_own_test_cells():
    """Probabilities are those of the test rows, from a probe that never saw them."""
    features, labels = draw(apart=0.5)
    folds = make_folds(labels, n_folds=4)
    found = run_protocol(features, labels, folds)
    for train, test in folds:
        expected = fit_linear_probe(features[train], labels[train], 4).predict_proba(features[test])
        np.testing.assert_array_equal(found.probabilities[test], expected)
        np.testing.assert_array_equal(found.predictions[test], expected.argmax(axis=1))
    assert found.tested.tolist() == list(range(160))
    assert [chosen["lambda"] for chosen in found.settings] == [dinobloom_lambda(8, 4)] * 4


def test_given_validation_cells_are_used():
    features, labels = draw()
    train, validation, test = np.arange(80), np.arange(80, 120), np.arange(120, 160)
    lam, losses = choose_lambda(features, labels, 4, [(train, validation)])
    found = run_protocol(features, labels, [(train, test)], "sweep", validation=validation)
    assert found.settings[0]["lambda"] == lam
    assert list(found.settings[0]["validation_log_loss"].values()) == list(losses.values())


def test_sgd_chooses_among_kinds_of_features():
    features, labels = draw(apart=2)
    noise = np.random.default_rng(4).normal(size=features.shape).astype(np.float32)
    kinds = {"noise": noise, "cls_1": features}
    found = run_protocol(kinds, labels, make_folds(labels, n_folds=2), "sgd", sgd_iterations=60)
    assert [chosen["features"] for chosen in found.settings] == ["cls_1", "cls_1"]
    assert (found.predictions == labels).mean() > 0.8
    first = run_protocol(kinds, labels, make_folds(labels, n_folds=2))
    alone = run_protocol(noise, labels, make_folds(labels, n_folds=2))
    np.testing.assert_array_equal(first.probabilities, alone.probabilities)  # the others take the first kind


def test_shuffled_labels_stay_at_chance():
    features, labels = draw(n=400, apart=2)
    shuffled = np.random.default_rng(1).permutation(labels)
    found = run_protocol(features, shuffled, make_folds(shuffled))
    assert 0.15 < (found.predictions == shuffled).mean() < 0.35


def test_only_sgd_takes_several_kinds_of_features():
    assert protocol(LinearOptions("sgd")).kinds == ("cls", "cls+mean", "last4", "last4+mean")
    assert protocol(LinearOptions("sweep")).kinds == ("cls",)


# --- the command ----------------------------------------------------------------------------------------------------


def features_file(file, n=120, patients=None, attributes=None, apart=0.6, paths=None, seed=0, **changes):
    features, labels = draw(n=n, apart=apart, seed=seed)
    cells = {
        "features": features,
        "labels": labels,
        "class_names": NAMES,
        "paths": paths or [f"/cells/{name}/{i // 2}.png" for i, name in enumerate(["a", "b"] * (n // 2))],
        "patients": patients,
        "attributes": {"checkpoint_sha256": "ab", "model": "ViT", "transform": "28 px", **(attributes or {})},
    }
    write_features(file, Features(**{**cells, **changes}))
    return file


def run(capsys, output, *flags):
    main([*map(str, flags), "--output-dir", str(output), "--device", "cpu"])
    return capsys.readouterr().out, json.loads((output / "results.json").read_text())


def rows_of(file):
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def test_from_features_to_results(tmp_path, capsys):
    file = features_file(tmp_path / "f.h5")
    table, report = run(capsys, tmp_path / "out", "--features", file, "--few-shot", 5, 1, "--repeats", 2)
    written = {"results.json", "predictions.csv", "split.csv"}
    assert written <= {path.name for path in (tmp_path / "out").iterdir()} <= written | {"confusion.png", "curves.png"}
    found = report["results"]["model"]["linear_dinobloom"]
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    # images of one name in two folders keep their own rows, and no fold overwrites another's
    assert Counter(row["path"] for row in rows).most_common(1)[0][1] == 1
    assert len(rows) == 120
    assert Counter(row["fold"] for row in rows) == dict.fromkeys("01234", 24)
    labels, predictions = ([NAMES.index(row[name]) for row in rows] for name in ("label", "prediction"))
    probabilities = np.array([[float(row[f"p_{name}"]) for name in NAMES] for row in rows])
    metrics = classification_metrics(np.array(labels), np.array(predictions), NAMES, probabilities)
    for name in ("accuracy", "balanced_accuracy", "weighted_f1", "kappa", "auroc", "log_loss", "calibration_error"):
        assert found[name] == pytest.approx(metrics[name], abs=1e-6), name
    assert found["confusion"] == metrics["confusion"]
    assert {name: row["support"] for name, row in found["per_class"].items()} == dict.fromkeys(NAMES, 30)
    assert set(found["intervals"]) >= {"accuracy", "balanced_accuracy", "weighted_f1", "macro_f1", "auroc"}
    assert found["sd_over_folds"]["accuracy"] > 0
    assert len(found["folds"]) == 5
    assert report["counts"]["cells"] == report["counts"]["tested"] == 120
    assert report["split"]["test_sizes"] == [24] * 5
    assert report["checkpoint"]["checkpoint_sha256"] == "ab"
    assert len(report["hashes"]["features"]) == len(report["files"]["predictions.csv"]) == 64
    assert report["patients_kept_apart"] is None
    assert list(report["few_shot"]["model"]["linear_dinobloom"]) == ["1", "5"]
    assert report["few_shot"]["model"]["linear_dinobloom"]["5"]["n_draws"] == 10
    assert report["kinds"] == ["cls"]
    for part in ("120 of 120 cells tested, 5 fold(s), 4 classes", "mean of 5 folds", "AUROC", "5 cells a class"):
        assert part in table


@pytest.mark.parametrize("name_of_protocol", ["dinobloom", "sweep", "sgd"])
def test_the_same_inputs_give_the_same_bytes_but_for_the_date(tmp_path, capsys, name_of_protocol):
    file = features_file(tmp_path / "f.h5", n=80, patients=[f"p{i % 20}" for i in range(80)])
    flags = ("--features", file, "--protocol", name_of_protocol, "--folds", 2, "--sgd-iterations", 20, "--few-shot", 2)
    texts = []
    for name in ("a", "b"):
        run(capsys, tmp_path / name, *flags)
        text = (tmp_path / name / "results.json").read_text()
        texts.append(re.sub(r'"date": "[^"]+"', "", text))
        assert text != texts[-1]
    assert texts[0] == texts[1]
    for name in ("predictions.csv", "split.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_patients_stay_whole_and_the_split_can_be_used_again(tmp_path, capsys):
    file = features_file(tmp_path / "f.h5", patients=[f"p{i % 24}" for i in range(120)])
    _, report = run(capsys, tmp_path / "a", "--features", file, "--folds", 4, "--seed", 3)
    assert report["patients_kept_apart"] is True
    fold_of = {}
    for row in rows_of(tmp_path / "a" / "predictions.csv"):
        assert fold_of.setdefault(row["patient"], row["fold"]) == row["fold"]
    again = run(capsys, tmp_path / "b", "--features", file, "--split", tmp_path / "a" / "split.csv", "--seed", 3)[1]
    assert again["results"] == report["results"]
    assert len(again["hashes"]["split"]) == 64
    assert (tmp_path / "b" / "split.csv").read_bytes() == (tmp_path / "a" / "split.csv").read_bytes()


def test_a_class_with_one_image_is_reported(tmp_path, capsys):
    labels = np.array([3, *([0, 1, 2] * 40)])[:120]
    file = features_file(tmp_path / "f.h5", labels=labels)
    table, report = run(capsys, tmp_path / "out", "--features", file)
    assert report["split"]["never_tested"] == {"monocyte": 1}
    assert report["counts"]["tested"] == 119
    monocyte = report["results"]["model"]["linear_dinobloom"]["per_class"]["monocyte"]
    assert (monocyte["support"], monocyte["recall"], monocyte["auroc"]) == (0, None, None)
    assert re.search(r"monocyte +1 +0 +- ", table)


def test_sgd_chooses_among_the_kinds_of_a_file_and_the_others_take_one(tmp_path, capsys):
    features, labels = draw(n=120, apart=2)
    noise = np.random.default_rng(4).normal(size=(120, 5)).astype(np.float32)
    file = features_file(tmp_path / "f.h5", features=noise, labels=labels, others={"last4": features})
    flags = ("--features", file, "--folds", 2, "--sgd-iterations", 60)
    _, report = run(capsys, tmp_path / "sgd", *flags, "--protocol", "sgd")
    found = report["results"]["model"]["linear_sgd"]
    assert report["kinds"] == ["cls", "last4"]
    assert [fold["features"] for fold in found["folds"]] == ["last4", "last4"]
    for name, kind, is_right in (("sweep", "last4", True), ("sgd", "cls", False), ("dinobloom", None, False)):
        chosen = () if kind is None else ("--kind", kind)
        _, report = run(capsys, tmp_path / name, *flags, "--protocol", name, *chosen)
        accuracy = report["results"]["model"][f"linear_{name}"]["accuracy"]
        assert report["kinds"] == [kind or "cls"]
        assert (accuracy > 0.8) == is_right


def test_two_sets_and_a_baseline(tmp_path, capsys):
    rng = np.random.default_rng(0)
    paths = [tmp_path / "images" / f"{i:03d}.png" for i in range(60)]
    paths[0].parent.mkdir()
    labels = np.arange(60) % 4
    for path, label in zip(paths, labels, strict=True):
        noisy = np.array([60, 120, 180]) * (label + 1) / 4 + rng.integers(-15, 15, (24, 24, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path)
    paths[59].write_bytes(paths[0].read_bytes())
    features = rng.normal(size=(60, 8)).astype(np.float32)  # without information
    for name, part in (("train", slice(0, 40)), ("test", slice(40, 60))):
        names = [str(path) for path in paths[part]]
        features_file(tmp_path / f"{name}.h5", features=features[part], labels=labels[part], paths=names)
    flags = ("--features", tmp_path / "train.h5", "--test-features", tmp_path / "test.h5", "--baseline", "histogram")
    _, report = run(capsys, tmp_path / "out", *flags)
    assert report["counts"]["dropped_identical_bytes"] == 1
    model, histogram = (report["results"][name]["linear_dinobloom"] for name in ("model", "histogram"))
    assert (model["folds"][0]["train"], model["folds"][0]["test"]) == (39, 20)
    assert histogram["accuracy"] > 0.9 > 0.6 > model["accuracy"]
    assert len(rows_of(tmp_path / "out" / "predictions_histogram.csv")) == 20
    parts = Counter(row["part"] for row in rows_of(tmp_path / "out" / "split.csv"))
    assert parts == {"train": 40, "test": 20}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--features", "f", "--protocol", "knn"], "invalid choice: 'knn'"),
        (["--features", "f", "--sgd-iterations", "0"], "'0' is not a whole number from 1"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*flags, "--output-dir", str(tmp_path)])
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_a_gpu_gives_the_same_probabilities():
    features, labels = draw()
    here, there = (fit_linear_probe(features, labels, 4, device=device) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(there.predict_proba(features), here.predict_proba(features), atol=1e-4)
    assert torch.cuda.is_available()

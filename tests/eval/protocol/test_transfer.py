"""Probes trained in one hospital and tested in others: splits, the matrix against scikit-learn, corrections."""

import logging

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from dinov2.eval.features import Features
from dinov2.eval.features.data_sets import join_sets
from dinov2.eval.protocol import transfer
from dinov2.eval.protocol.transfer import (
    CORRECTIONS,
    Pair,
    TransferOptions,
    draw_splits,
    evaluate,
    evaluate_pair,
    fit_source,
    resample,
    source_splits,
    target_priors,
)

NAMES = ["lymphocyte", "monocyte", "neutrophil"]
DIM = 6
CENTRES = 3.5 * np.eye(DIM)[:3]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Intervals are tested where they are counted; a hundred draws are enough elsewhere."""
    monkeypatch.setattr(transfer, "intervals_of", lambda *args, **kw: intervals_of(*args, **{**kw, "n_resamples": 100}))


intervals_of = transfer.intervals_of


def cells_of(folder, counts, seed=0, shift=0.0, scale=1.0, noise=1.0, class_names=NAMES, patients=None, **changes):
    """Cells around their class's centre, all moved by `shift` and scaled by `scale`."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    noise = noise * np.random.default_rng(seed + 1).normal(size=(len(labels), DIM))
    features = ((CENTRES[labels] + noise) * scale + shift).astype(np.float32)
    paths = [f"/{folder}/{i}.png" for i in range(len(labels))]
    own = {"features": features, "labels": labels, "class_names": list(class_names), "paths": paths}
    return Features(**{**own, "patients": patients, **changes})


def results_of(sets, corrections=(), n_splits=2, **options):
    data, paths = join_sets(list(sets), list(sets.values()), {})
    options = TransferOptions(tuple(corrections), n_splits=n_splits, **options)
    splits, reasons, _ = source_splits(data, paths, options)
    return evaluate(data, splits, reasons, options)


def pair_of(sets, n_splits=1):
    data, paths = join_sets(list(sets), list(sets.values()), {})
    splits, _, _ = source_splits(data, paths, TransferOptions(n_splits=n_splits))
    classes = np.arange(len(data.class_names))
    source, target = sets
    return Pair(data, source, target, classes, fit_source(data, splits[source], classes, "cpu"))


# --- splits


def test_splits_hold_out_thirty_percent_of_each_class_and_differ():
    labels = np.repeat([0, 1, 2], [100, 50, 1])
    splits = draw_splits(labels, [str(i) for i in range(151)], 3, seed=4)
    for train, test in splits:
        assert np.bincount(labels[test], minlength=3).tolist() == [30, 15, 0]
        assert np.bincount(labels[train]).tolist() == [70, 35, 1]
        assert sorted([*train, *test]) == list(range(151))
    assert len({tuple(test) for _, test in splits}) == 3
    later = draw_splits(labels, [str(i) for i in range(151)], 1, seed=5)
    np.testing.assert_array_equal(later[0][1], splits[1][1])  # split k has the seed + k


def test_splits_keep_patients_whole():
    labels, patients = np.arange(200) % 2, [f"p{i // 10}" for i in range(200)]
    for train, test in draw_splits(labels, patients, 3, seed=0):
        assert not {patients[i] for i in train} & {patients[i] for i in test}
        assert 40 <= len(test) <= 80
    ((_, test),) = draw_splits(np.arange(20) % 2, [f"p{i // 10}" for i in range(20)], 1, seed=0)
    assert len(test) == 10  # one of two patients


@pytest.mark.parametrize(
    ("labels", "patients", "message"),
    [
        ([0, 1] * 10, ["p"] * 20, "all 20 cells are of one patient"),
        ([0, 0, 1, 1, 2, 2], list("abcdef"), "6 cells, too few to hold out 30 %"),
        ([0, 1, 2], list("abc"), "3 cells, too few"),
    ],
)
def test_sets_that_cannot_be_split(labels, patients, message):
    with pytest.raises(ValueError, match=message):
        draw_splits(np.array(labels), patients, 1, seed=0)


def test_a_set_that_cannot_be_split_is_still_a_target():
    few = cells_of("few", [2, 2, 2], seed=5)
    matrix = results_of({"a": cells_of("a", [40, 40, 40]), "few": few})["matrix"]
    assert matrix["few"]["a"]["reason"] == "few: 6 cells, too few to hold out 30 % with a cell of each class"
    assert (matrix["few"]["a"]["macro_f1"], matrix["a"]["few"]["reason"]) == (None, None)
    assert matrix["a"]["few"]["n_test"] == 6


def test_a_class_of_one_patient_may_leave_one_class_to_train_on():
    labels = np.array([0] * 20 + [1] * 20)
    one_each = cells_of("a", [20, 20, 0], labels=labels, patients=["p"] * 20 + ["q"] * 20)
    matrix = results_of({"a": one_each, "b": cells_of("b", [30, 30, 0], seed=5)})["matrix"]
    assert matrix["a"]["b"]["reason"].startswith("a: split 0 trains on one class only")
    assert matrix["b"]["a"]["reason"] is None


# --- the matrix


def test_the_protocol_equals_scikit_learn():
    """StandardScaler and LogisticRegression(C=1) on the same split; the targets' classes differ in part."""
    sets = {"a": cells_of("a", [60, 40, 50], noise=2.0), "b": cells_of("b", [30, 60, 20], seed=3, shift=0.7, noise=2.0)}
    names = [*NAMES, "blast"]
    sets["c"] = cells_of("c", [40, 0, 30], seed=7, shift=-0.5, scale=1.3, noise=2.0, class_names=names)
    matrix = results_of(sets, n_splits=3, seed=11)["matrix"]
    classes = {"a": [0, 1, 2], "b": [0, 1, 2], "c": [0, 2]}
    for source, target in (("a", "a"), ("a", "b"), ("a", "c"), ("b", "a"), ("c", "b"), ("c", "c")):
        shared = sorted(set(classes[source]) & set(classes[target]))
        (x, y), (x_target, y_target) = ((sets[n].features.astype(float), sets[n].labels) for n in (source, target))
        entry, expected = matrix[source][target], []
        for number in range(3):
            train, test = train_test_split(np.arange(len(y)), test_size=0.3, stratify=y, random_state=11 + number)
            train, test = (side[np.isin(y[side], shared)] for side in (train, test))
            scaler = StandardScaler().fit(x[train])
            model = LogisticRegression(C=1.0, tol=1e-12, max_iter=10_000).fit(scaler.transform(x[train]), y[train])
            cells = test if source == target else np.flatnonzero(np.isin(y_target, shared))
            probabilities = model.predict_proba(scaler.transform(x_target[cells]))
            predicted = np.array(shared)[probabilities.argmax(axis=1)]
            row = entry["splits"][number]
            assert row["macro_f1"] == pytest.approx(f1_score(y_target[cells], predicted, average="macro"), abs=1e-9)
            assert row["accuracy"] == pytest.approx((y_target[cells] == predicted).mean(), abs=1e-9)
            assert row["log_loss"] == pytest.approx(log_loss(y_target[cells], probabilities), abs=1e-6)
            expected.append(row["macro_f1"])
        assert entry["macro_f1"] == pytest.approx(np.mean(expected))
        assert entry["sd_over_splits"]["macro_f1"] == pytest.approx(np.std(expected, ddof=1))
        low, high = entry["intervals"]["macro_f1"]
        assert low <= entry["macro_f1"] <= high
        assert entry["classes"] == [NAMES[i] for i in shared]
    assert matrix["a"]["c"]["left_out"] == {}
    assert matrix["c"]["a"]["left_out"] == {"monocyte": 40}


def test_probabilities_equal_those_of_scikit_learn():
    sets = {"a": cells_of("a", [60, 40, 50], noise=2.0), "b": cells_of("b", [30, 60, 20], seed=3, shift=0.7)}
    pair = pair_of(sets)
    x, y = sets["a"].features.astype(float), sets["a"].labels
    train, _ = train_test_split(np.arange(len(y)), test_size=0.3, stratify=y, random_state=0)
    scaler = StandardScaler().fit(x[train])
    model = LogisticRegression(C=1.0, tol=1e-12, max_iter=10_000).fit(scaler.transform(x[train]), y[train])
    expected = model.predict_proba(scaler.transform(sets["b"].features.astype(float)))
    np.testing.assert_allclose(softmax(pair.logits[0], axis=1), expected, atol=1e-6)


def test_intervals_draw_the_targets_patients():
    labels_only = {"a": cells_of("a", [50, 50, 50])}
    b = [50, 50, 50]
    patients = [f"p{i // 30}" for i in range(150)]
    by_cell = results_of({**labels_only, "b": cells_of("b", b, seed=3, noise=2.5)})["matrix"]["a"]["b"]
    known = cells_of("b", b, seed=3, noise=2.5, patients=patients)
    by_patient = results_of({**labels_only, "b": known})["matrix"]["a"]["b"]
    assert by_cell["macro_f1"] == by_patient["macro_f1"]
    assert by_cell["intervals"] != by_patient["intervals"]
    assert "log_loss" in by_cell["intervals"]


def test_sets_that_share_one_class_say_why():
    other = cells_of("b", [30, 30, 0], seed=2, class_names=["lymphocyte", "blast", "smudge"])
    results = results_of({"a": cells_of("a", [40, 40, 40]), "b": other}, CORRECTIONS)
    entry = results["matrix"]["a"]["b"]
    assert entry["reason"].startswith("classes in both sets: lymphocyte;")
    assert (entry["macro_f1"], entry["corrections"], results["stress_test"]) == (None, {}, None)


def test_copies_of_tested_images_are_not_trained_on(tmp_path):
    sets = {}
    for name in "ab":
        (tmp_path / name).mkdir()
        paths = [tmp_path / name / f"{i}.png" for i in range(60)]
        for i, path in enumerate(paths):
            path.write_bytes(b"both" if i == 0 else f"{name}{i:03d}".encode())
        sets[name] = cells_of(name, [20, 20, 20], seed=ord(name), paths=[str(path) for path in paths])
    data, paths = join_sets(list(sets), list(sets.values()), {})
    splits, _, counts = source_splits(data, paths, TransferOptions(n_splits=3))
    assert counts["dropped_identical_bytes"] == 2
    for train, _ in [*splits["a"], *splits["b"]]:
        assert not {0, 60} & set(train.tolist())


# --- corrections


def scores_of(sets, metric="accuracy"):
    matrix = results_of(sets, CORRECTIONS)["matrix"]
    entry = matrix["a"]["b"]
    rows = {"own": matrix["a"]["a"], "uncorrected": entry, **entry["corrections"]}
    return {name: row[metric] for name, row in rows.items() if metric in row}


def test_a_shift_of_all_features_is_undone():
    """Moved and scaled cells of the same shares: re-standardised, they are classified as well as the source's."""
    shift = np.array([2.0, -2.0, 1.0, 3.0, -1.0, 2.0])
    scores = scores_of({"a": cells_of("a", [150] * 3), "b": cells_of("b", [150] * 3, seed=3, shift=shift, scale=0.6)})
    assert scores["uncorrected"] < 0.75 < 0.95 < scores["own"]
    for name in ("cbr", "cbr-matched", "target-standardisation"):
        assert scores[name] > scores["own"] - 0.03, name
    assert scores["source-temperature"] == scores["uncorrected"]


def test_other_shares_of_classes_hurt_plain_standardisation_alone():
    """Nine of ten cells are of one class: the target's own mean lies in it, the class-balanced mean does not."""
    scores = scores_of(
        {"a": cells_of("a", [150] * 3), "b": cells_of("b", [18, 18, 324], seed=3)}, metric="balanced_accuracy"
    )
    assert scores["uncorrected"] > 0.95
    for name in ("cbr", "cbr-matched"):
        assert scores[name] > scores["uncorrected"] - 0.03, name
    assert scores["target-standardisation"] < scores["uncorrected"] - 0.05


def test_cbr_matched_changes_nothing_without_a_shift():
    """The source's classes are unequal: its mean is not its class-balanced mean, which plain CBR overlooks."""
    pair = pair_of({"a": cells_of("a", [400, 40, 40]), "b": cells_of("b", [400, 40, 40], seed=3)})
    (model,), (logits,) = pair.models, pair.logits
    distance = {
        name: np.abs(model.corrected(name, pair.features, logits) - logits).mean() for name in ("cbr", "cbr-matched")
    }
    assert distance["cbr-matched"] < 0.5 < 3 * distance["cbr-matched"] < distance["cbr"]


def test_temperatures_calibrate_and_leave_predictions():
    noisy = {"a": cells_of("a", [200] * 3, noise=1.0), "b": cells_of("b", [200] * 3, seed=3, noise=3.0)}
    matrix = results_of(noisy, ["target-temperature", "source-temperature"])["matrix"]
    entry, corrections = matrix["a"]["b"], matrix["a"]["b"]["corrections"]
    assert list(corrections)[:-1] == [f"target-temperature-{k}" for k in (8, 16, 32, 64, 128)]
    of_128 = corrections["target-temperature-128"]
    assert of_128["temperature"] > 2
    assert of_128["log_loss"] < entry["log_loss"] / 2
    assert of_128["calibration_error"] < entry["calibration_error"] / 2
    for metric in ("accuracy", "macro_f1"):
        assert corrections["source-temperature"][metric] == entry[metric]
    assert matrix["a"]["a"]["corrections"] == {}


def test_the_sources_temperature_is_that_of_its_held_out_cells():
    """Labels of the held-out cells are drawn at a known temperature: it, not the target's, divides the logits."""
    pair = pair_of({"a": cells_of("a", [3000] * 3, noise=2.0), "b": cells_of("b", [20] * 3, seed=3)})
    (model,) = pair.models
    cumulative = softmax(model.logits(model.held_out_features) / 2.5, axis=1).cumsum(axis=1)
    rng = np.random.default_rng(0)
    model.held_out_labels[:] = (rng.random((len(cumulative), 1)) > cumulative).sum(axis=1).clip(max=2)
    assert model.temperature == pytest.approx(2.5, rel=0.1)
    after = model.corrected("source-temperature", pair.features, pair.logits[0])
    np.testing.assert_allclose(after, pair.logits[0] / model.temperature)


def test_labelled_cells_of_the_target_are_not_tested(monkeypatch):
    pair = pair_of({"a": cells_of("a", [30] * 3), "b": cells_of("b", [14] * 3, seed=3)})
    fitted, tested = [], []
    monkeypatch.setattr(transfer, "fit_temperature", lambda logits, labels: fitted.append(logits) or 2.0)
    monkeypatch.setattr(
        transfer,
        "_quick_metrics",
        lambda labels, logits: tested.append(2 * logits) or dict.fromkeys(transfer.STRESS_METRICS, 0.0),
    )
    rows = transfer._target_temperatures(pair, seed=0)
    assert list(rows) == [f"target-temperature-{k}" for k in (8, 16, 32)]  # of 42 cells
    assert len(fitted) == len(tested) == 3 * transfer.N_DRAWS
    for drawn, others in zip(fitted, tested, strict=True):
        assert len(drawn) + len(others) == 42
        assert not {row.tobytes() for row in drawn} & {row.tobytes() for row in others}


def test_few_cells_are_warned_about(caplog):
    sets = {"a": cells_of("a", [40] * 3), "b": cells_of("b", [10] * 3, seed=3)}
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        results_of(sets, ["cbr"])
    assert "--correct cbr: b has 30 cells of shared classes; below 32 it is unreliable" in caplog.text
    assert "a has" not in caplog.text


# --- other mixtures of classes


def test_priors_by_scenario():
    priors = target_priors(NAMES, np.array([9, 1, 1]))
    assert list(priors) == ["balanced", "neutrophil heavy", "clinical"]
    np.testing.assert_allclose(priors["neutrophil heavy"], [0.1, 0.1, 0.8])
    np.testing.assert_allclose(priors["clinical"], np.array([0.3, 0.06, 0.6]) / 0.96)
    priors = target_priors(["blast", "other"], np.array([9, 1]))
    assert list(priors) == ["balanced", "blast heavy"]
    np.testing.assert_allclose(priors["blast heavy"], [0.8, 0.2])


def test_a_resampled_target_has_the_shares_asked_for():
    labels = np.repeat([0, 1, 2], [5, 100, 50])
    cells = resample(labels, np.array([0.5, 0.499, 0.001]), 100, seed=0)
    assert np.bincount(labels[cells]).tolist() == [50, 50, 1]
    assert not np.array_equal(cells, resample(labels, np.array([0.5, 0.499, 0.001]), 100, seed=1))


def test_the_stress_test_counts_the_scenarios_that_a_correction_helps():
    shift = np.array([2.0, -2.0, 1.0, 3.0, -1.0, 2.0])
    moved = {"a": cells_of("a", [120] * 3), "b": cells_of("b", [120] * 3, seed=3, shift=shift)}
    stress = results_of(moved, CORRECTIONS)["stress_test"]
    assert [(row["source"], row["target"], row["prior"]) for row in stress["scenarios"]] == [
        (*pair, prior) for pair in ("ab", "ba") for prior in ("balanced", "neutrophil heavy", "clinical")
    ]
    rows = stress["corrections"]
    assert set(rows) == {*CORRECTIONS, "target-temperature-32"} - {"target-temperature"}
    assert rows["cbr"]["n_scenarios"] == 6
    balanced = [
        row["differences"]["target-standardisation"] for row in stress["scenarios"] if row["prior"] == "balanced"
    ]
    assert all(row["macro_f1"] > 0.1 for row in balanced)
    assert rows["target-temperature-32"]["calibration_error"]["share_helped"] > 0.5
    assert rows["target-temperature-32"]["calibration_error"]["mean_difference"] < 0
    assert rows["source-temperature"]["macro_f1"] == {"share_helped": 0.0, "mean_difference": 0.0}
    of_cbr = [row["differences"]["cbr"]["macro_f1"] for row in stress["scenarios"]]
    assert rows["cbr"]["macro_f1"]["share_helped"] == pytest.approx(np.mean(np.array(of_cbr) > 0))


def test_bins_of_confidence_give_the_calibration_error():
    pair = pair_of({"a": cells_of("a", (40, 40, 40)), "b": cells_of("b", (30, 40, 50), seed=5, shift=1.0)})
    entry = evaluate_pair(pair, TransferOptions(("cbr", "target-temperature"), n_splits=1))
    for name, row in {"": entry, **entry["corrections"]}.items():
        confidence, accuracy, n = (np.array(row["reliability"][k]) for k in ("confidence", "accuracy", "n_cells"))
        n_labelled = int(name.rpartition("-")[2]) if name.startswith("target") else 0
        assert n.sum() == 120 - n_labelled
        if not n_labelled:  # of those, the calibration error is a mean over draws
            error = (np.abs(confidence - accuracy) * n).sum() / n.sum()
            assert row["calibration_error"] == pytest.approx(error)

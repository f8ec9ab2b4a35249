"""Data sets against each other: which cells train and test, what is left out and reported, a planted batch effect."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dinov2.eval import cross
from dinov2.eval.cross import CrossOptions, batch_effect, evaluate, evaluate_comparison, main
from dinov2.eval.features import Features, write_features
from dinov2.eval.features.data_sets import ALL_OTHERS, prepare
from dinov2.eval.linear import fit_linear_probe
from dinov2.eval.report import main as report_main

REPOSITORY = Path(__file__).parents[2]
NAMES = ["basophil", "blast", "monocyte"]
DIM = 8
CLASS_CENTRES = 5 * np.eye(DIM)
BATCH_AXIS = np.eye(DIM)[-1]
NEAREST = CrossOptions("knn", 1)


def cells_of(folder, labels, seed=0, offset=0.0, class_names=NAMES, patients=None, **changes):
    """Cells around their class's centre, all of them moved by `offset` along an axis that no class has."""
    labels = np.asarray(labels)
    rng = np.random.default_rng(seed)
    features = CLASS_CENTRES[labels] + rng.normal(size=(len(labels), DIM)) + offset * BATCH_AXIS
    result = {
        "features": features.astype(np.float32),
        "labels": labels,
        "class_names": list(class_names),
        "paths": [f"/{folder}/{i}.png" for i in range(len(labels))],
        "patients": patients,
        "attributes": {"checkpoint_sha256": "ab", "model": "ViT", "transform": "28 px"},
    }
    return Features(**{**result, **changes})


def data_of(common=None, **sets):
    return prepare(list(sets), list(sets.values()), common or {})[0]


def entry(data, train, test, options=NEAREST):
    (wanted,) = [one for one in data.comparisons if (one.train, one.test) == (train, test)]
    return evaluate_comparison(data, wanted, options)


# --- which data set is it?


def effect_of(data):
    assert data.batch.reason == ""
    return batch_effect(data, CrossOptions())


@pytest.mark.parametrize(("offset", "low", "high"), [(8.0, 0.99, 1.0), (0.0, 0.4, 0.6)])
def test_a_planted_offset_is_found_and_none_where_there_is_none(offset, low, high):
    labels = np.arange(360) % 3
    result = effect_of(data_of(a=cells_of("a", labels), b=cells_of("b", labels, seed=1, offset=offset)))
    assert list(result["per_class"]) == NAMES
    for row in (result["overall"], *result["per_class"].values()):
        assert row["data_sets"] == ["a", "b"]
        assert row["chance"] == 0.5
    for method in ("linear", "knn_1", "knn_20"):
        mean = result["mean_over_classes"][method]
        assert low <= mean["balanced_accuracy"] <= high, method
        assert (mean["chance"], mean["n_classes"]) == (0.5, 3)
        assert low <= result["overall"][method]["balanced_accuracy"] <= high, method
        below, above = result["per_class"]["blast"][method]["interval"]
        assert below <= result["per_class"]["blast"][method]["balanced_accuracy"] <= above


def test_another_mixture_of_classes_is_no_batch_effect_within_them():
    """A set of blasts differs from one of basophils in its cells: the number over all cells misleads."""
    a, b = np.repeat([0, 1], [180, 40]), np.repeat([0, 1], [40, 180])
    result = effect_of(data_of(a=cells_of("a", a), b=cells_of("b", b, seed=1)))
    assert result["overall"]["linear"]["balanced_accuracy"] > 0.75
    assert 0.35 < result["mean_over_classes"]["linear"]["balanced_accuracy"] < 0.65


def test_a_large_set_does_not_hide_the_effect_on_a_small_one():
    """Two standard deviations apart, the best answer is right in 84 %; most neighbours are of the large set anyway."""
    a = cells_of("a", np.zeros(600, dtype=np.int64))
    b = cells_of("b", np.zeros(60, dtype=np.int64), seed=1, offset=2.0)
    result = effect_of(data_of(a=a, b=b))["per_class"]["basophil"]
    for method in ("linear", "knn_20"):
        assert 0.75 < result[method]["balanced_accuracy"] < 0.92, method


def test_folds_have_each_set_and_class_in_equal_parts():
    data = data_of(a=cells_of("a", np.repeat([0, 1], [50, 10])), b=cells_of("b", np.repeat([1, 2], [20, 40]), seed=1))
    for _, test in data.batch.folds:
        assert np.bincount(data.sets[test] * 3 + data.labels[test]).tolist() == [10, 2, 0, 0, 4, 8]


def test_classes_that_too_few_sets_have_enough_of_are_not_compared():
    a = np.repeat([0, 1, 2], [60, 12, 4])
    b = np.repeat([0, 1, 2], [60, 12, 60])
    result = effect_of(data_of(a=cells_of("a", a), b=cells_of("b", b, seed=1)))
    assert list(result["per_class"]) == ["basophil", "blast"]
    blast = result["per_class"]["blast"]
    assert blast["knn_20"] == {"balanced_accuracy": None, "interval": None}  # 20 neighbours of some 10 cells a set
    assert blast["knn_1"]["balanced_accuracy"] is not None
    assert result["mean_over_classes"]["knn_20"]["n_classes"] == 1


def test_a_set_of_one_patient_cannot_be_told_from_others():
    """What a fold would learn of it is what it tests: the patient, not the place."""
    labels = np.zeros(60, dtype=np.int64)
    many = [f"p{i % 10}" for i in range(60)]
    sets = {name: cells_of(name, labels, patients=many, seed=ord(name)) for name in "ab"}
    single = cells_of("c", labels, patients=["p0"] * 60, seed=9, offset=9.0)
    result = effect_of(data_of(**sets, c=single))
    assert result["overall"]["data_sets"] == ["a", "b"]
    assert effect_of(data_of(a=sets["a"], c=single))["overall"] is None


def test_folds_keep_patients_whole_and_equal_ids_in_two_sets_are_two_patients():
    labels = np.arange(120) % 3
    sets = {name: cells_of(name, labels, patients=[f"p{i // 6}" for i in range(120)]) for name in "ab"}
    data = data_of(**sets)
    assert len(set(data.patients)) == 40
    pairs = [comparison for comparison in data.comparisons if comparison.train != ALL_OTHERS]
    folds = [fold for comparison in (data.batch, *pairs) for fold in comparison.folds]
    assert len(folds) == 5 + 2 + 2 * 5
    for train, test in folds:
        assert not {data.patients[i] for i in train} & {data.patients[i] for i in test}


def test_intervals_are_by_patient_where_patients_are_known():
    labels, patients = np.arange(120) % 3, [f"p{i // 12}" for i in range(120)]
    features = (0.3 * CLASS_CENTRES[labels] + np.random.default_rng(1).normal(size=(120, DIM))).astype(np.float32)
    a, b = (cells_of(name, labels, patients=patients, features=features) for name in "ab")
    unknown = cells_of("b", labels, features=features)
    by_patient, by_cell = (entry(data_of(a=a, b=tested), "a", "b", CrossOptions("knn", 50)) for tested in (b, unknown))
    assert by_patient["accuracy"] == by_cell["accuracy"] < 1
    assert by_patient["intervals"] != by_cell["intervals"]
    batch = data_of(a=a, b=b).batch
    with_same_folds = (replace(data_of(a=a, b=tested), batch=batch) for tested in (b, unknown))
    known, cells = (effect_of(data)["overall"]["knn_1"] for data in with_same_folds)
    assert known["balanced_accuracy"] == cells["balanced_accuracy"]
    assert known["interval"] != cells["interval"]


# --- the matrix


def test_a_set_with_more_kinds_of_cells_is_better_to_train_on():
    """A has each class in two places, B in one: A knows B's, B does not know A's other one."""
    labels, far = np.arange(200) % 2, np.arange(200) // 2 % 2 == 1
    a, b = cells_of("a", labels), cells_of("b", labels, seed=1)
    rng = np.random.default_rng(2)
    a.features[far] = rng.normal(size=(100, DIM)) + 10 * np.eye(DIM)[4 + labels[far]]
    data = data_of(a=a, b=b)
    for method in (CrossOptions("knn", 5), CrossOptions("linear")):
        there, back = entry(data, "a", "b", method), entry(data, "b", "a", method)
        assert there["balanced_accuracy"] > 0.95 > 0.85 > back["balanced_accuracy"], method
        low, high = there["intervals"]["balanced_accuracy"]
        assert low <= there["balanced_accuracy"] <= high
        assert set(there["intervals"]) == {"accuracy", "balanced_accuracy", "weighted_f1", "macro_f1"}


def test_a_set_is_not_tested_on_its_training_cells():
    labels = np.arange(150) % 3
    noise = np.random.default_rng(3).normal(size=(150, DIM)).astype(np.float32)
    data = data_of(a=cells_of("a", labels, features=noise), b=cells_of("b", labels))
    result = entry(data, "a", "a")
    assert 0.2 < result["accuracy"] < 0.5  # each cell is its own nearest neighbour
    assert (result["n_train"], result["n_test"]) == (150, 150)


def test_classes_are_matched_by_name_and_others_counted():
    a = cells_of("a", np.repeat([0, 1, 2], [30, 30, 5]))
    b = cells_of("b", np.repeat([0, 1, 2], [20, 10, 7]), class_names=["monocyte", "smudge", "basophil"], seed=1)
    data = data_of(a=a, b=b)
    assert data.class_names == ["basophil", "blast", "monocyte", "smudge"]
    result = entry(data, "a", "b")
    assert result["classes"] == ["basophil", "monocyte"]
    assert result["left_out"] == {"smudge": 10}
    assert (result["n_train"], result["n_test"]) == (65, 27)
    assert {name: row["support"] for name, row in result["per_class"].items()} == {"basophil": 7, "monocyte": 20}
    assert result["balanced_accuracy"] == 0.0  # b's monocytes lie where a's basophils do
    assert entry(data, "b", "a")["left_out"] == {"blast": 30}


def test_a_map_renames_and_drops_labels():
    a = cells_of("a", np.repeat([0, 1, 2], [30, 30, 5]))
    b = cells_of("b", np.repeat([0, 1, 2, 3], [20, 9, 7, 8]), class_names=["BAS", "blast cell", "?", "LYB"], seed=1)
    common = {("b", "BAS"): "basophil", ("b", "blast cell"): "blast", ("b", "LYB"): "blast", ("b", "?"): ""}
    data = data_of(common, a=a, b=b)
    assert data.class_names == NAMES
    assert data.per_class(data.positions("b")) == {"basophil": 20, "blast": 17}
    result = entry(data, "a", "b")
    assert result["left_out"] == {}
    assert result["per_class"]["basophil"]["recall"] == 1.0
    with pytest.raises(ValueError, match="drops all 30 cells of 'a'"):
        data_of({("a", "basophil"): ""}, a=a.select(np.arange(30)), b=b)


def test_an_entry_that_cannot_be_says_why():
    labels = np.arange(30) % 2
    a = cells_of("a", labels)
    b = cells_of("b", labels, class_names=["basophil", "smudge"], seed=1)
    c = cells_of("c", np.zeros(30, dtype=np.int64))
    data = data_of(a=a, b=b, c=c, d=cells_of("d", np.array([0, 1, 0])))
    assert entry(data, "a", "b")["reason"].startswith("1 classes to test (basophil on both sides)")
    assert entry(data, "c", "a")["reason"].startswith("0 classes to test")
    assert entry(data, "c", "c")["reason"].startswith("0 classes to test")
    assert "fewer than the 5 parts" in entry(data, "d", "d")["reason"]
    result = entry(data, "d", "a", CrossOptions("knn", 4))
    assert result["reason"] == "3 training cells, fewer than the k = 4 neighbours asked for"
    for name in ("accuracy", "balanced_accuracy", "weighted_f1", "macro_f1"):
        assert result[name] is None
    assert (result["n_test"], result["intervals"]) == (30, {})
    assert entry(data, "d", "a", CrossOptions("knn", 3))["reason"] is None


def test_a_class_with_one_cell_is_not_tested_in_its_own_set():
    data = data_of(a=cells_of("a", [2, *[0, 1] * 20]), b=cells_of("b", np.arange(40) % 3))
    result = entry(data, "a", "a")
    assert result["left_out"] == {"monocyte": 1}
    assert result["n_test"] == 40


def test_leave_one_out_learns_on_all_others():
    labels = np.arange(60) % 2
    sets = {"a": cells_of("a", labels), "b": cells_of("b", labels + 1, seed=1), "c": cells_of("c", labels * 2, seed=2)}
    result = entry(data_of(**sets), ALL_OTHERS, "c")
    assert result["classes"] == ["basophil", "monocyte"]  # one from each of the others
    assert (result["n_train"], result["n_test"], result["left_out"]) == (120, 60, {})
    assert result["accuracy"] > 0.95


def test_the_probe_counts_the_classes_that_it_learns(monkeypatch):
    """lambda is 100 / (D C): the classes of a data set that takes no part must not change it."""
    seen = []

    def fit(features, labels, n_classes, **options):
        seen.append((n_classes, int(labels.max()), len(features)))
        return fit_linear_probe(features, labels, n_classes, **options)

    monkeypatch.setattr(cross, "fit_linear_probe", fit)
    sets = {name: cells_of(name, np.arange(40) % 2 + 1, seed=ord(name)) for name in "ab"}
    third = cells_of("c", np.arange(40) % 8, class_names=[f"class {i}" for i in range(8)])
    assert entry(data_of(**sets, c=third), "a", "b", CrossOptions("linear"))["accuracy"] > 0.9
    assert seen == [(2, 1, 40)]


def test_copies_in_two_sets_are_dropped_from_training_and_counted(tmp_path):
    sets = {}
    for name in "ab":
        (tmp_path / name).mkdir()
        paths = [tmp_path / name / f"{i}.png" for i in range(40)]
        for i, path in enumerate(paths):
            path.write_bytes(b"both" if i == 0 else f"{name}{i:03d}".encode())
        sets[name] = cells_of(name, np.arange(40) % 2, seed=ord(name), paths=[str(path) for path in paths])
    data, counts = prepare(list(sets), list(sets.values()), {})
    assert counts == {"dropped_identical_bytes": 2, "not_checked": 0}
    for comparison in data.comparisons:
        result = evaluate_comparison(data, comparison, NEAREST)
        n_copies = int(comparison.train != comparison.test)
        assert result["dropped_identical_bytes"] == comparison.n_copies == n_copies
        assert result["n_train"] == 40 - n_copies
        assert result["n_test"] == 40
    copies = {0, 40}
    assert all(len(copies & {*train, *test}) < 2 or copies <= {*train} for train, test in data.batch.folds)


def test_the_function_needs_no_files():
    labels = np.arange(60) % 3
    data = data_of(a=cells_of("a", labels), b=cells_of("b", labels, seed=1))
    results = evaluate(data, CrossOptions(k=5))
    assert results["matrix"]["a"]["b"] == entry(data, "a", "b", CrossOptions(k=5))
    assert results["leave_one_out"]["b"] == entry(data, ALL_OTHERS, "b", CrossOptions(k=5))
    assert results["batch_effect"] == batch_effect(data, CrossOptions(k=5))
    assert results["batch_effect_reason"] is None


# --- the command


@pytest.fixture
def files(tmp_path):
    """Three data sets; the last one calls its classes otherwise and lies in a folder of its own."""
    labels = np.arange(60) % 3
    patients = [f"p{i % 12}" for i in range(60)]
    write_features(tmp_path / "pbc.h5", cells_of("pbc", labels, patients=patients))
    write_features(tmp_path / "ssl.h5", cells_of("ssl", labels[:40], seed=1, offset=2.0))
    other = cells_of("bm", labels, seed=2, class_names=["BAS", "BLA", "artefact"], patients=patients)
    write_features(tmp_path / "bm" / "features.h5", other)
    (tmp_path / "map.csv").write_text(
        "dataset,label,common\nbm,BAS,basophil\nbm,BLA,blast\nbm,artefact,\n", encoding="utf-8-sig"
    )
    return [tmp_path / name for name in ("pbc.h5", "ssl.h5", "bm/features.h5")]


def run(output, *flags):
    main([*map(str, flags), "--output-dir", str(output), "--device", "cpu"])
    return json.loads((output / "results.json").read_text())


def rows_of(file):
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def test_from_files_to_results(files, tmp_path, capsys):
    output = tmp_path / "out"
    report = run(output, "--features", *files, "--classes-map", tmp_path / "map.csv", "--k", 5)
    written = {"results.json", "matrix.csv", "leave_one_out.csv", "batch_effect.csv"}
    assert written <= {path.name for path in output.iterdir()} <= written | {"matrix.png"}
    results = report["results"]
    names = ["pbc", "ssl", "bm"]  # a file called features.h5 is named by its folder
    assert {name: list(row) for name, row in results["matrix"].items()} == dict.fromkeys(names, names)
    assert results["matrix"]["bm"]["pbc"]["left_out"] == {"monocyte": 20}
    assert results["leave_one_out"]["bm"]["n_train"] == 100
    assert results["batch_effect"]["overall"]["chance"] == pytest.approx(1 / 3)
    of_bm = report["counts"]["data_sets"]["bm"]
    assert (of_bm["cells"], of_bm["patients"], of_bm["dropped_by_map"]) == (40, 12 - 4, 20)
    assert report["counts"]["data_sets"]["ssl"]["patients"] is None
    assert report["counts"]["not_checked"] == 140
    assert report["class_names"] == NAMES
    assert set(report["hashes"]) == {*(f"features:{name}" for name in names), "classes_map"}
    assert report["checkpoint"]["checkpoint_sha256"] == "ab"
    assert report["settings"]["features"] == [str(file) for file in files]

    rows = rows_of(output / "matrix.csv")
    assert [(row["train"], row["test"]) for row in rows] == [(a, b) for a in names for b in names]
    for row in rows:
        result = results["matrix"][row["train"]][row["test"]]
        assert float(row["balanced_accuracy"]) == pytest.approx(result["balanced_accuracy"], abs=1e-7)
        low, high = result["intervals"]["macro_f1"]
        assert [float(row[f"macro_f1_{end}"]) for end in ("low", "high")] == pytest.approx([low, high], abs=1e-7)
        assert int(row["n_left_out"]) == sum(result["left_out"].values())
        assert row["reason"] == ""
    assert [row["test"] for row in rows_of(output / "leave_one_out.csv")] == names
    effect = rows_of(output / "batch_effect.csv")
    assert {row["cells"] for row in effect} == {"all", "mean over classes", *(f"class {name}" for name in NAMES)}
    table = capsys.readouterr().out
    for part in (
        "kNN, k = 5",
        "all others",
        "bm -> pbc: 20 cells are not tested, their classes are not trained: monocyte",
    ):
        assert part in table
    assert re.search(r"within a class, mean of 3 +\d", table)


@pytest.mark.parametrize("method", ["knn", "linear"])
def test_the_same_inputs_give_the_same_bytes_but_for_the_date(files, tmp_path, method):
    flags = ("--features", *files, "--method", method, "--k", 3, "--names", "one", "two", "three")
    texts = []
    for name in ("a", "b"):
        run(tmp_path / name, *flags)
        text = (tmp_path / name / "results.json").read_text()
        texts.append(re.sub(r'"date": "[^"]+"', "", text))
        assert text != texts[-1]
    assert texts[0] == texts[1]
    for file in (tmp_path / "a").iterdir():
        assert file.name == "results.json" or file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_sets_without_common_classes_are_reported_and_no_crash(files, tmp_path, capsys):
    report = run(tmp_path / "out", "--features", *files, "--k", 5, "--folds", 2)
    result = report["results"]["matrix"]["pbc"]["bm"]
    assert (result["n_test"], result["balanced_accuracy"]) == (0, None)
    assert result["left_out"] == {"BAS": 20, "BLA": 20, "artefact": 20}
    (row,) = [row for row in rows_of(tmp_path / "out" / "matrix.csv") if (row["train"], row["test"]) == ("pbc", "bm")]
    assert row["accuracy"] == ""
    assert row["reason"] == result["reason"]
    assert "pbc -> bm: 0 classes to test (none on both sides)" in capsys.readouterr().out


def test_another_kind_of_features(tmp_path):
    """The first kind knows nothing."""
    for name in "ab":
        cells = cells_of(name, np.arange(60) % 3, seed=ord(name))
        noise = np.random.default_rng(ord(name)).normal(size=(60, 4)).astype(np.float32)
        write_features(tmp_path / f"{name}.h5", replace(cells, features=noise, others={"mean": cells.features}))
    flags = ("--features", tmp_path / "a.h5", tmp_path / "b.h5", "--k", 5)
    first, mean = (run(tmp_path / "out", *flags, *kind) for kind in ((), ("--kind", "mean")))
    assert (first["kind"], mean["kind"]) == ("cls", "mean")
    accuracies = [report["results"]["matrix"]["a"]["b"]["accuracy"] for report in (first, mean)]
    assert accuracies[1] > 0.95 > 0.6 > accuracies[0]
    with pytest.raises(ValueError, match="none of kind 'last4'"):
        run(tmp_path / "no", *flags, "--kind", "last4")
    assert not (tmp_path / "no").exists()


def test_too_few_cells_for_a_batch_effect(tmp_path, capsys):
    for name in "ab":
        write_features(tmp_path / f"{name}.h5", cells_of(name, [0, 0, 1, 1], seed=ord(name)))
    report = run(tmp_path / "out", "--features", tmp_path / "a.h5", tmp_path / "b.h5", "--k", 1)
    assert report["results"]["batch_effect"] is None
    assert "fewer than the 5 parts" in report["results"]["batch_effect_reason"]
    assert report["results"]["matrix"]["a"]["b"]["reason"] is None
    assert "batch effect: folds: 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["a.h5"], "one file; give those of two or more data sets"),
        (["a.h5", "x/a.h5"], "--names: 'a' stands twice"),
        (["a.h5", "b.h5", "--names", "one"], "1 names for 2 files"),
        (["a.h5", "b.h5", "--names", "one", "all others"], "'all others' are not names"),
        (["a.h5", "b.h5", "--folds", "1"], "--folds 1: choose 2 or more"),
        (["a.h5", "b.h5", "--method", "svm"], "invalid choice: 'svm'"),
        (["a.h5", "b.h5", "--correct", "cbr"], "--correct belongs to --protocol transfer"),
        (["a.h5", "b.h5", "--compare", "c"], "--compare: not allowed with argument --features"),
    ],
)
def test_flags_that_make_no_sense(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--features", *flags, "--output-dir", str(tmp_path / "out")])
    assert message in capsys.readouterr().err


def expect_nothing(tmp_path, message, *flags):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_files_that_do_not_go_together_are_refused_and_leave_nothing(files, tmp_path):
    labels = np.arange(30) % 3
    other = cells_of("x", labels, attributes={"checkpoint_sha256": "cd", "transform": "28 px"})
    write_features(tmp_path / "other.h5", other)
    message = "'pbc' and 'other' do not compare: .*checkpoint_sha256 differs, 'ab' and 'cd'"
    expect_nothing(tmp_path, message, "--features", files[0], tmp_path / "other.h5")
    broken = cells_of("x", labels, features=np.full((30, DIM), np.nan, dtype=np.float32))
    write_features(tmp_path / "broken.h5", broken)
    message = r"30 of 30 in '.*broken.h5' are infinite or NaN"
    expect_nothing(tmp_path, message, "--features", files[0], tmp_path / "broken.h5")
    write_features(tmp_path / "again.h5", cells_of("pbc", labels))
    expect_nothing(tmp_path, "train and test share", "--features", files[0], tmp_path / "again.h5")


def test_transfer_from_files_to_results_and_a_page(tmp_path, capsys):
    for number, name in enumerate(("acevedo", "raabin_wbc")):
        labels = np.arange(180) % 3
        attributes = {"checkpoint_sha256": "ab", "checkpoint": "/weights/DinoBloom-S.pth", "transform": "28 px"}
        names = ["lymphocyte", "monocyte", "ig" if name == "acevedo" else "neutrophil"]
        cells = cells_of(name, labels, seed=number, offset=number, class_names=names, attributes=attributes)
        write_features(tmp_path / f"{name}.h5", cells)
    files = [tmp_path / "acevedo.h5", tmp_path / "raabin_wbc.h5"]
    flags = ("--protocol", "transfer", "--features", *files, "--classes-map", "white-cells", "--splits", 2, "--correct")
    output = tmp_path / "out"
    report = run(output, *flags, "cbr", "target-temperature")
    assert {path.name for path in output.iterdir()} == {"results.json", "matrix.csv", "matrix.png"}
    assert report["class_names"] == ["lymphocyte", "monocyte", "neutrophil"]
    assert report["counts"]["data_sets"]["acevedo"]["dropped_by_map"] == 60
    assert "classes_map" in report["hashes"]
    settings = report["settings"]
    assert (settings["protocol"], settings["splits"]) == ("transfer", 2)
    assert settings["correct"] == ["cbr", "target-temperature"]
    assert not {"method", "k", "folds", "compare"} & set(settings)
    entry = report["results"]["matrix"]["acevedo"]["raabin_wbc"]
    assert (entry["classes"], entry["left_out"]) == (["lymphocyte", "monocyte"], {"neutrophil": 60})
    rows = rows_of(output / "matrix.csv")
    (row,) = [r for r in rows if (r["train"], r["test"], r["correction"]) == ("acevedo", "raabin_wbc", "cbr")]
    of_cbr = entry["corrections"]["cbr"]
    low, high = of_cbr["intervals"]["macro_f1"]
    assert [float(row[f"macro_f1{end}"]) for end in ("", "_low", "_high")] == pytest.approx(
        [of_cbr["macro_f1"], low, high], abs=1e-7
    )
    assert {(row["source"], row["target"], row["value"]) for row in report["results"]["published"]} == {
        ("acevedo", "acevedo", 0.995),
        ("acevedo", "raabin_wbc", 0.341),
    }
    table = capsys.readouterr().out
    for part in ("numbers that others published", "arXiv 2608.25148", "target-temperature-32", "scenarios"):
        assert part in table
    report_main([str(output), "--output", str(tmp_path / "page.html"), "--no-explorer"])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "acevedo → raabin_wbc" in page
    assert "the protocol transfer does not measure it" in page


def test_encoders_are_compared_by_their_results(files, tmp_path, capsys):
    outputs = []
    for seed in range(3):
        outputs.append(tmp_path / f"encoder{seed}")
        run(outputs[-1], "--features", *files[:2], "--k", 2, "--seed", seed)
    main(["--compare", *map(str, outputs), "--output-dir", str(tmp_path / "compared")])
    rows = rows_of(tmp_path / "compared" / "rank_correlations.csv")
    assert [(row["train"], row["first_test"], row["second_test"]) for row in rows] == [
        (train, first, second) for train in ("pbc", "ssl") for first in ("pbc", "ssl") for second in ("pbc", "ssl")
    ]
    assert "rank correlation of the encoders' macro F1" in capsys.readouterr().out
    run(tmp_path / "other", "--features", *files[:2], "--k", 3)
    with pytest.raises(ValueError, match="--compare: results are of matrix knn 2 and matrix knn 3"):
        main(["--compare", *map(str, [*outputs, tmp_path / "other"]), "--output-dir", str(tmp_path / "no")])


def test_runs_as_a_script_from_any_folder(files, tmp_path):
    script = [sys.executable, str(REPOSITORY / "dinov2" / "eval" / "cross.py"), "--features", "pbc.h5", "ssl.h5"]
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(REPOSITORY)}, "text": True}
    done = subprocess.run([*script, "--output-dir", "out"], capture_output=True, **options)
    assert done.returncode == 0, done.stderr
    assert "which data set is it?" in done.stdout

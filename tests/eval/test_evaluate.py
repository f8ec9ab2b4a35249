"""All protocols in one command: the same numbers as by their own commands, patients where they have one label each."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from dinov2.eval import (
    abmil,
    cell_maps,
    compare,
    cross,
    evaluate,
    explorer,
    extract_features,
    knn,
    linear,
    report,
)
from dinov2.eval.features import Features, write_features
from dinov2.eval.linear import LinearOptions

NAMES = ["control", "NPM1"]


@pytest.fixture(autouse=True)
def short_trainings(monkeypatch):
    short = abmil.TrainingSettings(epochs=6, learning_rate=0.05)
    monkeypatch.setattr(abmil, "DEFAULTS", abmil.AbmilOptions(training=short))


@pytest.fixture
def features(tmp_path):
    """A features file of 20 patients with six cells each, whose class two of the cells tell."""

    def write(name="features.h5", label_of_cell=None, patients=True, seed=0, others=()):
        rng = np.random.default_rng(seed)
        of_patient = np.arange(20) % 2
        labels = np.repeat(of_patient, 6)
        values = rng.normal(size=(120, 8)).astype(np.float32)
        values[::6, 0] += 5 * (2 * of_patient - 1)
        values[1::6, 0] += 5 * (2 * of_patient - 1)
        cells = Features(
            features=values,
            labels=labels if label_of_cell is None else label_of_cell,
            class_names=NAMES,
            paths=[f"/{name}/{i}.png" for i in range(120)],
            patients=[f"{name} {i // 6}" for i in range(120)] if patients else None,
            attributes={"checkpoint_sha256": "ab", "transform": "none", "kind": "cls"},
            others={kind: rng.normal(size=(120, 4)).astype(np.float32) for kind in others},
        )
        write_features(tmp_path / name, cells)
        return tmp_path / name

    return write


def run(output, *flags):
    evaluate.main([*map(str, flags), "--output-dir", str(output)])
    return json.loads((output / "results.json").read_text())


def read(folder):
    return json.loads((folder / "results.json").read_text())


def test_each_protocol_gives_what_its_own_command_gives(features, tmp_path, capsys):
    flags = ["--features", str(features()), "--seed", "3"]
    names = ("knn", "knn-dino", "linear", "linear-sweep", "abmil")
    report = run(tmp_path / "all", *flags, "--protocols", *names)
    rows = ["knn_1", "knn_20", "knn-dino_10", "knn-dino_20", "linear", "linear-sweep", "abmil"]
    assert list(report["results"]) == rows
    table = capsys.readouterr().out
    assert all(f" {row} " in table for row in rows)
    alone = {
        "knn-dino": (knn, ["--protocol", "dino"]),
        "linear-sweep": (linear, ["--protocol", "sweep"]),
        "abmil": (abmil, ["--protocol", "crossval"]),
    }
    for name, (command, own) in alone.items():
        command.main([*flags, *own, "--output-dir", str(tmp_path / name)])
        assert read(tmp_path / "all" / name)["results"] == read(tmp_path / name)["results"]
        assert (tmp_path / "all" / name / "predictions.csv").exists() == (tmp_path / name / "predictions.csv").exists()
    assert report["results"]["knn-dino_20"]["model"] == read(tmp_path / "knn-dino")["results"]["model"]["knn_20"]
    assert (
        report["results"]["linear-sweep"]["model"]
        == read(tmp_path / "linear-sweep")["results"]["model"]["linear_sweep"]
    )
    assert report["results"]["abmil"]["model"] == read(tmp_path / "abmil")["results"]["classwise"]["together"]
    assert report["split"] == read(tmp_path / "linear-sweep")["split"]
    assert report["results"]["abmil"]["model"]["accuracy"] > 0.8


def test_the_same_inputs_give_the_same_bytes_but_for_the_date(features, tmp_path):
    flags = ["--features", features(), "--protocols", "knn", "linear"]
    texts = []
    for folder in ("a", "b"):
        run(tmp_path / folder, *flags)
        texts.append((tmp_path / folder / "results.json").read_text().splitlines())
    differing = [i for i, (a, b) in enumerate(zip(*texts, strict=True)) if a != b]
    assert differing in ([], [len(texts[0]) - 2])
    assert '"date"' in texts[0][-2]


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"patients": False}, "the cells have no patients"),
        ({"label_of_cell": np.arange(120) % 2}, "have several labels; give the patients' own with --patient-labels"),
    ],
)
def test_patients_without_one_label_are_left_out_with_the_reason(features, tmp_path, capsys, cells, reason):
    file = features(**cells)
    report = run(tmp_path / "out", "--features", file)
    assert list(report["left_out"]) == ["abmil"]
    assert reason in report["left_out"]["abmil"]
    assert "abmil is left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--protocols abmil: .*patients"):
        run(tmp_path / "asked", "--features", file, "--protocols", "abmil")
    assert not (tmp_path / "asked").exists()


def test_labels_of_patients_from_a_file(features, tmp_path):
    file = features(label_of_cell=np.arange(120) % 2)
    with open(tmp_path / "patients.csv", "w", newline="") as stream:
        rows = [(f"features.h5 {i}", NAMES[i % 2]) for i in range(20)]
        csv.writer(stream).writerows([("patient", "label"), *rows])
    report = run(
        *(tmp_path / "out", "--features", file, "--protocols", "knn", "abmil"),
        *("--patient-labels", tmp_path / "patients.csv"),
    )
    assert report["results"]["abmil"]["model"]["accuracy"] > 0.8
    assert report["results"]["knn_1"]["model"]["accuracy"] < 0.7  # the cells' own labels are noise
    assert set(report["hashes"]) == {"features", "patient_labels"}


def test_two_sets_and_the_choice_among_kinds(features, tmp_path, monkeypatch):
    short = linear.protocol(LinearOptions("sgd", sgd_iterations=20))
    monkeypatch.setitem(evaluate.PROTOCOLS, "linear-sgd", short)
    train, test = features("train.h5", others=["mean"]), features("test.h5", seed=1, others=["mean"])
    report = run(
        *(tmp_path / "out", "--features", train, "--test-features", test),
        *("--protocols", "knn", "linear", "linear-sgd", "abmil"),
    )
    assert read(tmp_path / "out" / "linear-sgd")["kinds"] == ["cls", "mean"]
    assert read(tmp_path / "out" / "linear")["kinds"] == ["cls"]
    assert {row["model"]["folds"][0]["test"] for name, row in report["results"].items() if name != "abmil"} == {120}


def test_wrong_flags_end_the_command(features, tmp_path, capsys):
    file = str(features())
    for flags in (
        ["--features", file, "--protocols", "svm"],
        ["--protocols", "knn"],
        ["--features", file, "--fold", "3"],
    ):
        with pytest.raises(SystemExit, match="2"):
            run(tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


COMMANDS = [
    (extract_features, "--encoder pixels --data={} --output-dir={}"),
    (knn, "--features={} --test-features={} --output-dir={}"),
    (linear, "--encoder pixels --data={} --split={} --output-dir={}"),
    (abmil, "--features={} --labels={} --fold-files={} --output-dir={}"),
    (abmil, "--bags={} --apply={} --output-dir={}"),
    (cross, "--features {} {} --names a b --classes-map={} --output-dir={}"),
    (compare, "{} {} --output={}"),
    (report, "{} --features={} --cells={} --output={}"),
    (explorer, "--features f.h5 --predictions={} --columns={} --output={}"),
    (cell_maps, "--encoder pixels --data={} --output-dir={}"),
    (cell_maps, "--encoder pixels --pictures {} --output-dir={}"),
]


@pytest.mark.parametrize(("command", "flags"), COMMANDS)
def test_a_tilde_is_the_home_folder_in_every_path(command, flags, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = command.parse_arguments(flags.replace("{}", "~/x").split())
    paths = [path for value in vars(args).values() for path in (value if isinstance(value, list) else [value])]
    assert sum(path == Path("/home/me/x") for path in paths) == flags.count("{}")
    assert not [path for path in paths if str(path).startswith("~")]


def test_a_tilde_in_a_named_set_of_the_explorer(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    with pytest.raises(FileNotFoundError, match="/home/me/x.h5: no such file"):
        explorer.read_sets(["cells=~/x.h5"])

"""Mistakes that evaluations of this kind have made: each has a test that fails if it comes back.

Here is what no other file tests. Where the rest is:

- released weights that no command looks at: here; every layout of a file: tests/hub/test_backbones.py
- training rows passed off as predictions of the test set, a penalty for another number of classes: here; cells that are
  predicted by a fold that learned them: test_linear.py, test_knn.py
- flags that cannot be switched off: here; config keys likewise: tests/utils/test_config.py; a protocol that needs the
  other one to run: tests/train/test_evaluation.py; options that newer scikit-learn refuses: test_linear.py (backends)
- cells of equal file stems that overwrite each other, files of an older run that mix in: here and
  test_extract_features.py; predictions of one fold or k over another's: test_linear.py, test_knn.py
- folds in the order of a listing, cut by image and not by patient: tests/data/test_splits.py; means without a spread:
  test_results.py; figures that stay open: here and test_results.py
- files that run code when they are read: here, tests/hub/test_backbones.py, test_abmil.py (aggregators)
- classes of a few images whose numbers look as sure as others: here; how intervals are made: test_uncertainty.py
- bags: learning from the test part, weights of the last epoch in place of the best, folds without strata or seed, a
  schedule that steps a bag at a time: solvers/test_mil_training.py, test_abmil_predictions.py; softmax over the wrong
  axis: tests/models/test_abmil.py; class ids in the order of a
  listing: here
"""

import argparse
import ast
import csv
import importlib
import json
import os
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.datasets.bags import PatientBags
from dinov2.data.datasets.decode import load_image, resize_image
from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.data.transforms import normalize_images
from dinov2.eval import abmil, cross, extract_features, knn, linear
from dinov2.eval.features import Features, read_features, write_features
from dinov2.eval.linear import fit_linear_probe
from dinov2.models import build_backbone
from dinov2.utils.files import file_sha256

ROOT = Path(__file__).parents[2]
MODULES = [*sorted((ROOT / "dinov2").rglob("*.py")), *sorted((ROOT / "scripts").glob("*.py"))]
COMMANDS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in MODULES
    if path.is_relative_to(ROOT / "dinov2")
    and re.search(r'^if __name__ == "__main__":', path.read_text(), re.MULTILINE)
]
COLOURS = {"NPM1": (150, 60, 160), "control": (220, 150, 90)}


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def rows_of(file):
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def write_cells(file, labels, class_names, name, seed=0, apart=1.0, dim=8):
    """A features file of cells around their class's centre."""
    labels = np.asarray(labels)
    rng = np.random.default_rng(seed)
    features = (apart * np.eye(len(class_names), dim)[labels] + rng.normal(size=(len(labels), dim))).astype(np.float32)
    paths = [f"/{name}/{i}.png" for i in range(len(labels))]
    write_features(file, Features(features, labels, list(class_names), paths, attributes={"checkpoint_sha256": "ab"}))
    return file


def no_figure_is_open():
    pyplot = sys.modules.get("matplotlib.pyplot")
    return pyplot is None or pyplot.get_fignums() == []


# --- released weights ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A folder with DinoBloom-S.pth, as it is downloaded, and cells.csv with two cells of each of twelve patients; and
    the network."""
    folder = tmp_path_factory.mktemp("release")
    torch.manual_seed(0)
    settings = {"embed_dim": 64, "depth": 1, "num_heads": 1, "patch_size": 14, "img_size": 28, "layerscale": 1.0}
    model = build_backbone({**settings, "block_chunks": 0}).eval()
    state = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    heads = {"dino_head.mlp.0.weight": torch.ones(2, 2), "ibot_head.last_layer.weight_g": torch.ones(2, 1)}
    torch.save({"teacher": {**state, **heads}}, folder / "DinoBloom-S.pth")
    rows, rng = ["Image Path,Label,patient"], np.random.default_rng(0)
    for patient in range(12):
        label = list(COLOURS)[patient % 2]
        (folder / f"p{patient:02d}").mkdir()
        for cell in range(2):
            noisy = np.array(COLOURS[label]) + rng.integers(-20, 20, (30, 30, 3))
            Image.fromarray(noisy.astype(np.uint8)).save(folder / f"p{patient:02d}" / f"{cell}.png")
            rows.append(f"p{patient:02d}/{cell}.png,{label},p{patient:02d}")
    (folder / "cells.csv").write_text("\n".join(rows) + "\n")
    return folder, model


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (extract_features, []),
        (knn, ["--k", "1"]),
        (linear, ["--folds", "2"]),
        (abmil, ["--folds", "2", "--runs", "1", "--epochs", "2"]),
    ],
    ids=lambda value: value.__name__.rpartition(".")[2] if hasattr(value, "__name__") else "",
)
def test_every_command_takes_a_downloaded_file_and_uses_it(release, tmp_path, command, flags, capsys):
    folder, model = release
    weights = folder / "DinoBloom-S.pth"
    source = ["--checkpoint", str(weights), "--data", str(folder / "cells.csv"), "--image-size", "28"]
    command.main([*source, "--output-dir", str(tmp_path), "--num-workers", "0", "--device", "cpu", *flags])
    found = read_features(tmp_path / "features.h5")
    assert found.attributes["checkpoint_sha256"] == file_sha256(weights)
    # equal stems, "0" and "1" in each of twelve folders, are cells of their own
    assert len(set(found.paths)) == len(found) == 24
    assert len(np.unique(found.features, axis=0)) == 24
    image = resize_image(load_image(found.paths[5]), 28)
    with torch.no_grad():
        expected = model(normalize_images(image[None]))[0]
    torch.testing.assert_close(torch.from_numpy(found.features[5]), expected, rtol=0, atol=1e-5)
    if command is not extract_features:
        report = results_of(tmp_path)
        assert report["checkpoint"]["checkpoint_sha256"] == file_sha256(weights)
        assert report["results"]
        assert "balanced acc." in capsys.readouterr().out
    assert no_figure_is_open()


def test_a_folder_with_a_downloaded_file_is_not_passed_over(release, tmp_path):
    folder, _ = release
    source = ["--checkpoint", str(folder), "--data", str(folder / "cells.csv"), "--image-size", "28"]
    for command in (extract_features, knn, linear, abmil):
        with pytest.raises(FileNotFoundError, match="pass a run's folder or a file with weights"):
            command.main([*source, "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# --- whose predictions, and which penalty ----------------------------------------------------------------------------


def test_predictions_are_those_of_the_test_set(tmp_path):
    names = ["basophil", "blast", "monocyte"]
    train = write_cells(tmp_path / "train.h5", np.arange(60) % 3, names, "train")
    test = write_cells(tmp_path / "test.h5", np.arange(24) % 3, names, "test", seed=1)
    linear.main(["--features", str(train), "--test-features", str(test), "--output-dir", str(tmp_path / "out")])
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    learned, judged = read_features(train), read_features(test)
    assert [row["path"] for row in rows] == judged.paths
    assert [row["label"] for row in rows] == [names[i] for i in judged.labels]
    probabilities = fit_linear_probe(learned.features, learned.labels, 3).predict_proba(judged.features)
    written = [[float(row[f"p_{name}"]) for name in names] for row in rows]
    np.testing.assert_allclose(written, probabilities, atol=1e-6)
    assert [row["prediction"] for row in rows] == [names[i] for i in probabilities.argmax(axis=1)]
    found = results_of(tmp_path / "out")["results"]["model"]["linear_dinobloom"]
    assert found["accuracy"] == np.mean([row["prediction"] == row["label"] for row in rows])


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_the_penalty_counts_the_classes_of_the_set(tmp_path, n_classes):
    file = write_cells(tmp_path / "f.h5", np.arange(40) % n_classes, [f"class {i}" for i in range(n_classes)], "cells")
    linear.main(["--features", str(file), "--folds", "2", "--output-dir", str(tmp_path / "out")])
    report = results_of(tmp_path / "out")
    folds = report["results"]["model"]["linear_dinobloom"]["folds"]
    assert [fold["lambda"] for fold in folds] == [100 / (8 * n_classes)] * 2


# --- flags -----------------------------------------------------------------------------------------------------------


def test_no_flag_makes_a_truth_value_of_its_text():
    """bool("False") is True."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "type" and isinstance(keyword.value, ast.Name) and keyword.value.id == "bool"
    ]
    assert not found, "use action='store_true' or argparse.BooleanOptionalAction"


class ParserFoundError(Exception):
    """Carries a command's parser out of the command."""


@pytest.fixture
def parser_of(monkeypatch):
    """Returns the parser that a command's `main` makes."""

    def leave(self, *args, **kwargs):
        raise ParserFoundError(self)

    def find(command):
        with monkeypatch.context() as patched:
            for method in ("parse_known_args", "parse_known_intermixed_args"):
                patched.setattr(argparse.ArgumentParser, method, leave)
            with pytest.raises(ParserFoundError) as found:
                importlib.import_module(command).main([])
        return found.value.args[0]

    return find


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_and_flags_that_say_what_they_do(command, parser_of):
    parser = parser_of(command)
    assert "--help" in parser.format_help()  # a lone % in a help text would raise
    assert parser.description
    for action in parser._actions:
        if not action.option_strings or isinstance(action, argparse._HelpAction):
            continue
        is_switch = action.nargs == 0
        assert action.type is not bool
        assert is_switch or not isinstance(action.default, bool), f"{action.option_strings}: text for a truth value"
        if is_switch:
            switch = isinstance(action, argparse.BooleanOptionalAction)
            assert switch or action.const is not action.default, f"{action.option_strings} changes nothing"


@pytest.mark.parametrize("text", ["False", "false", "0", "no"])
def test_a_switch_does_not_take_a_word_for_off(text, tmp_path, capsys):
    """`--overwrite False` must not overwrite: it is refused."""
    flags = ["--checkpoint", "w.pth", "--data", "cells", "--output-dir", str(tmp_path), "--overwrite"]
    assert extract_features.parse_arguments(flags).overwrite is True
    assert extract_features.parse_arguments(flags[:-1]).overwrite is False
    with pytest.raises(SystemExit):
        extract_features.parse_arguments([*flags, text])
    assert f"unrecognized arguments: {text}" in capsys.readouterr().err


# --- files of older runs ---------------------------------------------------------------------------------------------


def test_what_an_older_run_left_is_no_part_of_a_newer_one(tmp_path):
    names = ["basophil", "blast"]
    old = write_cells(tmp_path / "old.h5", np.arange(80) % 2, names, "old")
    new = write_cells(tmp_path / "new.h5", np.arange(40) % 2, names, "new", seed=1)
    other = write_cells(tmp_path / "other.h5", np.arange(40) % 2, names, "other", seed=2)
    for flags in (["linear", "--features", new, "--folds", "4"], ["cross", "--features", new, other, "--k", "3"]):
        command = {"linear": linear, "cross": cross}[flags[0]]
        before = [flags[1], old, *flags[3:]]
        for folder, runs in (("used", [before, flags[1:]]), ("fresh", [flags[1:]])):
            for arguments in runs:
                command.main([*map(str, arguments), "--output-dir", str(tmp_path / flags[0] / folder)])
        used, fresh = tmp_path / flags[0] / "used", tmp_path / flags[0] / "fresh"
        assert {path.name for path in used.iterdir()} == {path.name for path in fresh.iterdir()}
        first, second = results_of(used), results_of(fresh)
        assert first.pop("date")
        assert second.pop("date")
        assert first == second
        for path in fresh.iterdir():
            assert path.name == "results.json" or (used / path.name).read_bytes() == path.read_bytes(), path.name
    assert no_figure_is_open()


# --- files that run code ---------------------------------------------------------------------------------------------


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_no_command_runs_what_is_in_a_checkpoint(release, tmp_path):
    """Also where the file is only asked for the size of its images."""
    folder, model = release
    torch.save({"teacher": model.state_dict(), "args": Trap(tmp_path / "caught")}, tmp_path / "trap.pth")
    for command in (extract_features, knn, linear, abmil):
        source = ["--checkpoint", str(tmp_path / "trap.pth"), "--data", str(folder / "cells.csv")]
        with pytest.raises(ValueError, match="would run code"):
            command.main([*source, "--output-dir", str(tmp_path / "out"), "--num-workers", "0", "--device", "cpu"])
    assert not (tmp_path / "caught").exists()
    assert not (tmp_path / "out").exists()


def test_features_are_read_without_running_what_is_in_them(tmp_path):
    (tmp_path / "bags" / "NPM1").mkdir(parents=True)
    for file in (tmp_path / "features.h5", tmp_path / "bags" / "NPM1" / "p1.h5"):
        file.write_bytes(pickle.dumps(Trap(tmp_path / "caught")))
    with pytest.raises(ValueError, match="not an HDF5 file or is damaged"):
        read_features(tmp_path / "features.h5")
    with pytest.raises(ValueError, match=r"p1\.h5"):
        PatientBags.from_path(tmp_path / "bags")
    torch.save({"features": Trap(tmp_path / "caught")}, tmp_path / "features.h5")
    for command in (knn, linear, abmil):
        with pytest.raises(ValueError, match="not an HDF5 file or is damaged"):
            command.main(["--features", str(tmp_path / "features.h5"), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "caught").exists()
    assert not (tmp_path / "out").exists()


# --- classes of a few images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [knn, linear], ids=["knn", "linear"])
def test_small_classes_show_their_size_and_widen_the_interval(tmp_path, command, capsys):
    """DinoBloom's bone-marrow test set has classes of 1, 8, 9 and 13 images."""
    sizes = {"basophil": 60, "blast": 60, "hairy cell": 1, "smudge cell": 8, "abnormal eosinophil": 9, "other": 13}
    names = sorted(sizes)
    labels = np.repeat(np.arange(6), [sizes[name] for name in names])
    train = write_cells(tmp_path / "train.h5", np.arange(120) % 6, names, "train", apart=1.5)
    test = write_cells(tmp_path / "test.h5", labels, names, "test", seed=1, apart=1.5)
    command.main(["--features", str(train), "--test-features", str(test), "--output-dir", str(tmp_path / "out")])
    for metrics in results_of(tmp_path / "out")["results"]["model"].values():
        assert {name: row["support"] for name, row in metrics["per_class"].items()} == sizes
        low, high = metrics["intervals"]["balanced_accuracy"]
        assert low < metrics["balanced_accuracy"] < high
        accuracy_low, accuracy_high = metrics["intervals"]["accuracy"]
        assert high - low > accuracy_high - accuracy_low  # the accuracy does not hang on a few images
    table = capsys.readouterr().out
    for name, size in sizes.items():
        assert re.search(rf"{name} +20 +{size} ", table)


# --- class ids -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["ascending", "descending"])
def listing(request, monkeypatch):
    """Folders are listed in this order, as some file system might."""
    iterdir, walk = Path.iterdir, os.walk

    def ordered(folder):
        return iter(sorted(iterdir(folder), reverse=request.param))

    def walked(top, *args, **kwargs):
        for parent, folders, files in walk(top, *args, **kwargs):
            folders.sort(reverse=request.param)
            yield parent, folders, sorted(files, reverse=request.param)

    monkeypatch.setattr(Path, "iterdir", ordered)
    monkeypatch.setattr(os, "walk", walked)


def test_class_ids_come_from_names_whatever_order_a_folder_is_listed_in(listing, release, tmp_path):
    for name in ("control", "NPM1", "CBFB"):
        for i in range(2):
            (tmp_path / "cells" / name / "deep").mkdir(parents=True, exist_ok=True)
            (tmp_path / "cells" / name / "deep" / f"{i}.png").touch()
            write_cells(tmp_path / "bags" / name / f"{name}_{i}.h5", [0, 0], [name], name)
    cells, bags = LabelledCells.from_path(tmp_path / "cells"), PatientBags.from_path(tmp_path / "bags")
    assert cells.class_names == bags.class_names == ["CBFB", "NPM1", "control"]
    assert [path.relative_to(tmp_path / "cells").parts[0] for path in cells.paths] == ["CBFB"] * 2 + ["NPM1"] * 2 + [
        "control"
    ] * 2
    assert cells.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [path.name for path in cells.paths] == ["0.png", "1.png"] * 3
    assert dict(zip(bags.patients, bags.labels.tolist(), strict=True)) == {
        f"{name}_{i}": number for number, name in enumerate(bags.class_names) for i in range(2)
    }

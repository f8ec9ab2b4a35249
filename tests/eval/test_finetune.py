"""finetune.py: its files, stopped and started again, leaks between sides, and inputs that cannot work."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.data.splits import make_folds, without_copies
from dinov2.eval import compare, finetune, report
from dinov2.eval.features import read_features
from dinov2.eval.features.encoders import DinoEncoder
from dinov2.eval.features.extract import extract
from dinov2.eval.finetune import FinetuneOptions, Start, split_validation
from dinov2.eval.protocol import IMAGES, EvaluationData
from dinov2.eval.solvers import finetuning
from dinov2.eval.solvers.image_classifier import load_classifier, predict_images
from dinov2.hub.backbones import load_backbone
from dinov2.models import architecture, build_backbone
from dinov2.utils.command import exit_code
from dinov2.utils.files import file_sha256

ROOT = Path(__file__).parents[2]
QUICK = ("--epochs", "2", "--batch-size", "8", "--num-workers", "0", "--device", "cpu")


@pytest.fixture
def cells(tmp_path, draw_cells):
    return draw_cells(tmp_path / "cells", 8, seed=0)


@pytest.fixture
def run(tmp_path, checkpoint, capsys):
    """Run finetune.py; return its exit code, what it prints, and results.json."""

    def start(*flags, output="out", weights=checkpoint):
        folder = tmp_path / output
        argv = ["--checkpoint", weights, *flags, "--output-dir", folder, *QUICK]
        code = exit_code(lambda: finetune.main(list(map(str, argv))))
        results = json.loads((folder / "results.json").read_text()) if (folder / "results.json").exists() else None
        return code, capsys.readouterr(), results

    return start


@pytest.fixture
def refused(run, tmp_path):
    """Check that finetune.py ends with code 2 and one sentence that holds these words, and writes nothing."""

    def check(*words, flags, **options):
        code, printed, results = run(*flags, output="refused", **options)
        text = printed.err.splitlines()[-1]
        assert code == 2
        assert all(word in text for word in words), text
        assert results is None
        assert not (tmp_path / "refused" / "finetuned.pth").exists()

    return check


def write_rows(file, header, rows):
    with open(file, "w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return file


def images_of(cells):
    return sorted(cells.rglob("*.png"))


def test_what_a_run_leaves(run, cells, tmp_path, checkpoint, rows_of):
    flags = ("--data", cells, "--test-fraction", "0.25", "--lr", "2e-3", "--balance", "loss", "--mix", "cutmix")
    code, printed, results = run(*flags)
    assert code == 0
    assert "fine-tuning (full), 6 of 24 cells tested, 1 fold(s), 3 classes" in printed.out
    files = "confusion.png curves.png finetuned.pth history.csv predictions.csv reference.h5 results.json split.csv"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*files.split(), ".finetune"}
    metrics = results["results"]["model"]["finetune_full"]
    assert {"accuracy", "macro_f1", "auroc", "log_loss", "calibration_error", "intervals"} <= metrics.keys()
    (fold,) = metrics["folds"]
    assert (fold["train"], fold["test"], fold["validation"], fold["epochs"], fold["best_epoch"]) == (18, 6, 0, 2, 1)
    assert results["settings"]["training"]["mix"] == "cutmix"
    assert results["checkpoint"]["checkpoint"] == str(checkpoint)
    # the network is a checkpoint like any other
    file = tmp_path / "out" / "finetuned.pth"
    network, start = load_backbone(file), load_backbone(checkpoint)
    assert network.transform.image_size == 28
    assert not torch.equal(network.norm.weight, start.norm.weight)
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    probabilities = predict_images(load_classifier(file), [row["path"] for row in rows], progress=False)
    written = [[float(row[f"p_{name}"]) for name in results["class_names"]] for row in rows]
    np.testing.assert_allclose(probabilities, written, atol=1e-6)
    # the features of its training images, and their bytes
    reference = read_features(tmp_path / "out" / "reference.h5")
    assert len(reference) == 18
    assert not {row["path"] for row in rows} & set(reference.paths)
    again = extract(DinoEncoder(network, 28), list(map(Path, reference.paths)), progress=False)
    np.testing.assert_allclose(reference.features, again.features, atol=1e-5)
    assert torch.load(file, weights_only=True)["seen"].shape == (18, 16)
    # the results are read by the other commands
    report.main([str(tmp_path / "out"), "--output", str(tmp_path / "report.html"), "--no-explorer"])
    assert "finetune-full" in (tmp_path / "report.html").read_text(encoding="utf-8")
    compare.main([str(tmp_path / "out"), str(tmp_path / "out"), "--output", str(tmp_path / "compared.json")])
    assert json.loads((tmp_path / "compared.json").read_text())["n"] == 6


def test_a_finished_run_is_not_repeated_and_another_one_does_not_replace_it(run, cells, tmp_path, monkeypatch):
    flags = ("--data", cells, "--test-fraction", "0.25")
    _, first, results = run(*flags)
    before = (tmp_path / "out" / "finetuned.pth").read_bytes()
    monkeypatch.setattr(finetune, "fine_tune", None)
    code, second, again = run(*flags)
    assert code == 0
    assert {**again, "date": ""} == {**results, "date": ""}
    assert second.out == first.out
    code, printed, _ = run(*flags, "--seed", "1")
    assert code == 2
    assert "finetuned.pth was fine-tuned with other images or settings; pass --overwrite" in printed.err
    assert (tmp_path / "out" / "finetuned.pth").read_bytes() == before
    monkeypatch.undo()
    code, _, other = run(*flags, "--seed", "1", "--overwrite")
    assert code == 0
    assert (tmp_path / "out" / "finetuned.pth").read_bytes() != before
    assert other["settings"]["seed"] == 1


def test_a_stopped_run_continues(run, cells, tmp_path, monkeypatch):
    flags = ("--data", cells, "--folds", "3", "--mode", "lora", "--lora-rank", "2", "--tta")
    code, _, results = run(*flags, output="whole")
    assert code == 0
    train_step, n_steps = finetuning._Training._train_step, [0]

    def step(training, *batch):
        train_step(training, *batch)
        n_steps[0] += 1
        if n_steps[0] == 7:  # of the four steps of each fold
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(finetuning._Training, "_train_step", step)
    code, printed, nothing = run(*flags)
    assert (code, nothing, n_steps) == (75, None, [7])
    assert "fine-tuning fold 1: stopped after step 3 of 4; the same command continues" in printed.err
    code, _, again = run(*flags)
    assert (code, n_steps) == (0, [12])
    assert again["results"] == results["results"]
    assert again["files"] == results["files"]  # their checksums
    for number in range(3):
        ours, others = (torch.load(tmp_path / name / f"finetuned_{number}.pth") for name in ("out", "whole"))
        assert all(torch.equal(value, others["model"][name]) for name, value in ours["model"].items())


def test_a_run_killed_after_its_training_does_not_train_again(run, cells, tmp_path, monkeypatch):
    flags = ("--data", cells, "--test-fraction", "0.25")
    _, _, whole = run(*flags, output="whole")

    def ends(*arguments, **options):
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "predict_images", ends)
        assert run(*flags)[0] == 2
    monkeypatch.setattr(finetuning._Training, "_train_step", None)
    code, _, results = run(*flags)
    assert code == 0
    assert results["results"] == whole["results"]
    assert [file.suffix for file in (tmp_path / "out" / ".finetune").iterdir()] == [".done"]


def test_few_shot_draws_write_no_networks(run, cells, tmp_path):
    flags = ("--data", cells, "--test-fraction", "0.25", "--mode", "head", "--few-shot", "2", "--repeats", "2")
    _, _, results = run(*flags)
    assert results["few_shot"]["model"]["finetune_head"]["2"]["n_draws"] == 2
    assert [file.name for file in (tmp_path / "out").glob("finetuned*")] == ["finetuned.pth"]


def test_a_start_from_a_classifier(run, cells, tmp_path, refused):
    flags = ("--data", cells, "--test-fraction", "0.25", "--lr", "3e-3", "--epochs", "4")
    _, _, first = run(*flags)
    tuned = tmp_path / "out" / "finetuned.pth"
    few = ("--data", cells, "--test-fraction", "0.25", "--mode", "head", "--lr", "1e-9")
    losses = {}
    for name, extra in (("again", ()), ("new", ("--new-head", "--head", "random"))):
        code, _, results = run(*few, *extra, output=name, weights=tuned)
        assert code == 0
        losses[name] = results["results"]["model"]["finetune_head"]["log_loss"]
    assert losses["again"] == pytest.approx(first["results"]["model"]["finetune_full"]["log_loss"], abs=1e-3)
    assert losses["new"] == pytest.approx(np.log(3), abs=0.1)
    shutil.copytree(cells / "basophil", cells / "blast")
    for file in images_of(cells / "blast"):
        Image.effect_noise((30, 30), 90).save(file)
    refused("its classifier has 3 classes and lacks 'blast'; pass --new-head", flags=few, weights=tuned)


def test_a_new_classifier_starts_from_a_linear_probe(run, cells, tmp_path, checkpoint):
    flags = ("--data", cells, "--test-fraction", "0.25")
    _, _, tuned = run(*flags, "--mode", "head", "--lr", "1e-9")
    split = pd.read_csv(tmp_path / "out" / "split.csv")
    names = split["path"].map(lambda path: Path(path).parent.name)
    labels = np.array([("basophil", "eosinophil", "lymphocyte").index(name) for name in names])
    features = extract(load_backbone(checkpoint), list(map(Path, split["path"])), progress=False).features
    train, test = (np.flatnonzero(split["part"] == part) for part in ("train", "test"))
    probe = LogisticRegression(C=1, tol=1e-8, max_iter=10_000).fit(features[train], labels[train])
    expected = log_loss(labels[test], probe.predict_proba(features[test]))
    assert tuned["results"]["model"]["finetune_head"]["log_loss"] == pytest.approx(expected, abs=1e-4)


# --- leaks -----------------------------------------------------------------------------------------------------------


def test_a_patient_on_two_sides_is_refused(refused, cells, tmp_path):
    files = images_of(cells)
    rows = [[file, file.parent.name, f"p{i // 2}"] for i, file in enumerate(files)]
    table = write_rows(tmp_path / "cells.csv", ["Image Path", "Label", "patient"], rows)
    parts = [[file, ("train", "test", "val", "train")[i % 4]] for i, file in enumerate(files)]
    split = write_rows(tmp_path / "split.csv", ["path", "part"], parts)
    refused("12 of 12 patients have cells on two sides, for instance 'p0'", flags=("--data", table, "--split", split))


def test_patients_in_two_lists_are_named(run, cells, tmp_path):
    files = images_of(cells)
    rows = [[file, file.parent.name, f"p{i // 2}"] for i, file in enumerate(files)]
    for side in (0, 1):
        write_rows(tmp_path / f"{side}.csv", ["Image Path", "Label", "patient"], rows[side::2])
    code, printed, results = run("--train", tmp_path / "0.csv", "--test", tmp_path / "1.csv")
    assert code == 0
    assert results["patients_kept_apart"] is False
    warning = "12 patients have cells in both train and test, for instance 'p0', 'p1', 'p10'"
    assert printed.err.count(warning) == 1
    assert printed.err.index(warning) < printed.err.index("fine-tuning:")  # before hours of training


def test_copies_of_test_images_are_dropped_from_training_and_validation(run, cells, tmp_path):
    for name, copy in (("00", "06"), ("01", "07")):
        shutil.copy(cells / "basophil" / f"{name}.png", cells / "basophil" / f"{copy}.png")
    part_of = {"00": "test", "01": "test", "02": "test", "06": "train", "07": "val"}
    rows = [[file, part_of.get(file.stem, "val" if file.stem == "05" else "train")] for file in images_of(cells)]
    split = write_rows(tmp_path / "split.csv", ["path", "part"], rows)
    code, printed, results = run("--data", cells, "--split", split)
    assert code == 0
    assert f"train: 1 images are byte-equal to test images and dropped, for instance {cells}/basophil/06" in printed.err
    assert f"validation: 1 images are byte-equal to test images and dropped, for instance {cells}/basophil/07" in (
        printed.err
    )
    (fold,) = results["results"]["model"]["finetune_full"]["folds"]
    assert fold["validation"] == 5  # of 3 x 05 and 3 x 07
    learned = torch.load(tmp_path / "out" / "finetuned.pth")["seen"]
    assert len(learned) == 24 - 9 - 2


def test_a_test_image_under_another_name_in_the_validation_part_is_refused(refused, cells, tmp_path):
    (cells / "basophil" / "link.png").symlink_to(cells / "basophil" / "00.png")
    part_of = {"00": "test", "link": "val"}
    rows = [[file, part_of.get(file.stem, "train")] for file in images_of(cells)]
    split = write_rows(tmp_path / "split.csv", ["path", "part"], rows)
    words = ("validation and test share 1 image files", "basophil/00.png")
    refused(*words, flags=("--data", cells, "--split", split))


def test_copies_never_lie_in_training_and_validation(cells, caplog):
    files = images_of(cells)
    labels = np.array([("basophil", "eosinophil", "lymphocyte").index(file.parent.name) for file in files])
    shutil.copy(files[0], files[1])
    paths = np.array([str(file) for file in files])
    train, validation = np.arange(1, 20), np.array([0, 23])
    data = EvaluationData({IMAGES: paths}, labels, ["a", "b", "c"], [(train, np.array([20]))], validation=validation)
    kept, same = split_validation(data, train)
    assert kept.tolist() == list(range(2, 20))
    assert same.tolist() == [0, 23]
    assert f"train: 1 images are byte-equal to validation images and dropped, for instance {files[1]}" in caplog.text


def test_copies_among_real_images_lie_on_one_side(shared_data, caplog):
    """17 groups of the PBC images here are byte-identical; folds that are drawn by cell divide some of them."""
    cells = LabelledCells.from_path(shared_data / "acevedo_pbc" / "PBC_dataset_normal_DIB")
    paths = np.array([str(path) for path in cells.paths])
    contents = np.array([file_sha256(path) for path in paths])
    drawn = make_folds(cells.labels, None, 5, seed=0)
    assert any(np.isin(contents[train], contents[test]).any() for train, test in drawn)
    folds, _ = without_copies(paths.tolist(), drawn)
    assert "images are byte-equal to test images and dropped, for instance" in caplog.text
    data = EvaluationData({IMAGES: paths}, cells.labels, cells.class_names, folds)
    for train, test in folds:
        sides = [test, *split_validation(data, train)]
        for i, side in enumerate(sides):
            others = np.concatenate(sides[:i] + sides[i + 1 :])
            assert not np.isin(contents[side], contents[others]).any()


def test_validation_keeps_patients_whole_and_never_has_a_test_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "LEAST_VALIDATION", 8)
    paths, labels = np.array([f"/cells/{i}.png" for i in range(60)]), np.arange(60) % 3
    patients = [f"p{i // 3}" for i in range(60)]
    train, test = np.arange(45), np.arange(45, 60)
    data = EvaluationData({IMAGES: paths}, labels, ["a", "b", "c"], [(train, test)], patients)
    kept, validation = split_validation(data, train)
    assert sorted([*kept, *validation]) == train.tolist()
    assert 0 < len(validation) <= 12
    assert not {patients[i] for i in kept} & {patients[i] for i in validation}
    few = EvaluationData({IMAGES: paths}, labels, ["a", "b", "c"], [(train[:30], test)], patients)
    assert len(split_validation(few, train[:30])[1]) == 0


# --- inputs that cannot work -----------------------------------------------------------------------------------------


def test_lists_that_cannot_be_learned_from(refused, cells, tmp_path, draw_cells):
    files = images_of(cells)
    one_class = write_rows(tmp_path / "one.csv", ["Image Path", "Label"], [[file, "basophil"] for file in files])
    refused("all 24 cells are of class 'basophil'; two classes or more", flags=("--data", one_class))
    no_labels = write_rows(tmp_path / "none.csv", ["Image Path"], [[file] for file in files])
    refused("none.csv", "Label", flags=("--data", no_labels))
    three = write_rows(tmp_path / "three.csv", ["Image Path", "Label"], [[f, f.parent.name] for f in files[6:9]])
    refused("folds: 5: the set has 2 cells in its largest class", "choose fewer folds", flags=("--data", three))
    unknown = draw_cells(tmp_path / "more", 1, seed=1)
    (unknown / "basophil").rename(unknown / "blast")
    refused("'blast', which are not among the known classes", flags=("--train", cells, "--test", unknown))


def test_three_images_train_and_a_class_with_one_cell_stays_in_training(run, cells, tmp_path):
    files = images_of(cells)
    rows = [[file, file.parent.name] for file in files]
    for name, chosen in (("three", rows[6:9]), ("rest", rows[9:16])):
        write_rows(tmp_path / f"{name}.csv", ["Image Path", "Label"], chosen)
    code, _, results = run("--train", tmp_path / "three.csv", "--test", tmp_path / "rest.csv")
    assert code == 0
    assert results["counts"]["train_per_class"] == {"basophil": 2, "eosinophil": 1}
    single = write_rows(tmp_path / "single.csv", ["Image Path", "Label"], rows[:17])  # one lymphocyte
    code, _, results = run("--data", single, "--folds", "2", output="single")
    assert code == 0
    assert results["split"]["never_tested"] == {"lymphocyte": 1}


def test_unreadable_images_are_left_out_and_named(run, refused, cells):
    (cells / "basophil" / "00.png").write_bytes(b"no image")
    code, printed, results = run("--data", cells, "--folds", "2")
    assert code == 0
    assert results["counts"]["unreadable"] == 1
    assert f"1 of 24 images are unreadable and left out: {cells}/basophil/00.png" in printed.err
    for file in images_of(cells):
        file.write_bytes(b"no image")
    refused("none of the 24 could be read", flags=("--data", cells, "--folds", "2"))


def test_networks_that_do_not_fit(refused, cells, tmp_path):
    network = build_backbone({"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 16, "img_size": 32})
    torch.save({"model": network.state_dict(), "architecture": architecture(network)}, tmp_path / "patch16.pth")
    flags = ("--data", cells, "--image-size", "28")
    refused("28 x 28 px", "patches of 16 x 16 px", flags=flags, weights=tmp_path / "patch16.pth")
    refused("no file or folder", flags=("--data", cells), weights=tmp_path / "absent.pth")
    refused("--last-blocks 9: the network has 2", flags=("--data", cells, "--mode", "last-n", "--last-blocks", "9"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--train", "a"), "got --train; give --train and --test, or --data"),
        (("--data", "a", "--kinds", "cls", "mean"), "a classifier takes one kind of features"),
        (("--train", "a", "--test", "b", "--split", "c"), "--split divides one set"),
        (("--data", "a", "--compile"), "--compile: fine-tuning runs the network as it is"),
        (("--data", "a", "--epochs", "-1"), "'-1' is not a whole number from 0 to 100,000"),
        (("--data", "a", "--ema", "1"), "is not a number from 0.0 to 0.99999"),
    ],
)
def test_flags_that_do_not_go_together(run, flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_encoder_of_a_library_and_one_that_cannot_learn(cells, tmp_path, capsys):
    argv = ["--data", cells, "--test-fraction", "0.25", "--output-dir", tmp_path / "out", *QUICK]
    timm = ["--encoder", "timm:resnet18", "--encoder-weights", "untrained", "--image-size", "32"]
    finetune.main(list(map(str, [*timm, *argv])))
    assert load_classifier(tmp_path / "out" / "finetuned.pth").encoder.description == "timm:resnet18"
    with pytest.raises(
        ValueError, match="a fine-tuned timm:resnet18, which only predict.py reads; for its features give"
    ):
        load_backbone(tmp_path / "out" / "finetuned.pth")
    assert exit_code(lambda: finetune.main(list(map(str, ["--encoder", "pixels", *argv])))) == 2
    assert "only a --checkpoint or a timm:<model> can learn" in capsys.readouterr().err


def test_two_processes_learn_what_one_learns(run, cells, tmp_path, checkpoint):
    flags = ["--data", cells, "--test-fraction", "0.25", "--drop-path", "0", "--accumulate", "2", "--lr", "1e-3"]
    _, _, alone = run(*flags)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [ROOT / "dinov2/eval/finetune.py", "--checkpoint", checkpoint, *flags, "--output-dir", tmp_path / "two"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, [*torchrun, *command, *QUICK])), check=True, env=environment, capture_output=True)
    ours, theirs = (torch.load(tmp_path / name / "finetuned.pth")["model"] for name in ("out", "two"))
    ours, theirs = (torch.cat([each[name].flatten() for name in ours]) for each in (ours, theirs))
    # all weights together: AdamW makes a whole step of a gradient near 0, whose sign rounding decides
    assert (theirs - ours).norm() < 1e-5 * ours.norm()
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    (of_two,), (of_one,) = (each["results"]["model"].values() for each in (two, alone))
    assert of_two["log_loss"] == pytest.approx(of_one["log_loss"], abs=1e-4)


def test_the_function_takes_arrays(cells, checkpoint):
    files = images_of(cells)
    labels = np.array([("basophil", "eosinophil", "lymphocyte").index(file.parent.name) for file in files])
    folds = [(np.arange(0, 24, 2), np.arange(1, 24, 2))]
    data = EvaluationData({IMAGES: np.array([str(file) for file in files])}, labels, ["a", "b", "c"], folds)
    settings = finetuning.TrainingSettings(epochs=25, batch_size=12, lr=3e-3, ema=0.0, drop_path=0.0)
    options, start = FinetuneOptions(settings), Start(lambda: DinoEncoder(load_backbone(checkpoint), 28))
    ((row, predicted),) = finetune.evaluate(data, options, start).items()
    assert row == "finetune_full"
    assert (predicted.predictions[::2] == -1).all()
    assert (predicted.predictions[1::2] == labels[1::2]).mean() > 0.8  # three colours

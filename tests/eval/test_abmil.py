"""The ABMIL command: what it writes, that its aggregator can be used again, and what it says of wrong input."""

import csv
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.eval.abmil import TrainedAggregator, main
from dinov2.eval.features import Features, write_features
from dinov2.eval.protocol.abmil_report import format_report
from dinov2.eval.results import read_predictions
from dinov2.eval.solvers.robust_mil import INNER_FOLDS
from dinov2.models import architecture, build_backbone
from dinov2.models.abmil import MODELS

REPOSITORY = Path(__file__).parents[2]
NAMES = ["NPM1", "control"]
QUICK = ["--epochs", "3", "--learning-rate", "0.02", "--folds", "2", "--runs", "2"]
FILES = {
    "aggregator.pth",
    "attention.csv",
    "deletion.csv",
    "folds.csv",
    "history.csv",
    "predictions.csv",
    "predictions_of_networks.csv",
    "results.json",
    "top_cells.csv",
    *(
        f"predictions_{pooling}_{classifier}.csv"
        for pooling in ("mean", "mean_sd")
        for classifier in ("knn_1", "knn_5", "knn_10", "logistic")
    ),
}
NETWORK = {"checkpoint_sha256": "aa", "transform": "crop", "model": "vit"}


def cells_of(patient: int, dim: int = 6) -> np.ndarray:
    """Features of a patient's cells; the label is patient % 2 and stands in the first of them."""
    rng = np.random.default_rng(patient)
    cells = rng.normal(size=(3 + patient % 4, dim)).astype(np.float32)
    cells[0, 0] = 3 * (patient % 2) - 1.5
    return cells


def write_bags(folder: Path, numbers=range(18), attributes=NETWORK, flat: bool = False) -> Path:
    for i in numbers:
        file = folder / ("" if flat else NAMES[i % 2]) / f"p{i:02d}.h5"
        file.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(file, "w") as stream:
            stream["features"] = cells_of(i)
            stream.attrs.update(attributes)
    return folder


def write_labels(file: Path, numbers=range(18)) -> Path:
    file.write_text("patient,label\n" + "".join(f"p{i:02d},{NAMES[i % 2]}\n" for i in numbers))
    return file


def features_of(numbers=range(18), cell_labels=None, with_patients=True, **attributes) -> Features:
    arrays = [cells_of(i) for i in numbers]
    rows = [(i, cell) for i, cells in zip(numbers, arrays, strict=True) for cell in range(len(cells))]
    return Features(
        np.concatenate(arrays),
        np.array([i % 2 for i, _ in rows] if cell_labels is None else [cell_labels[c % 2] for _, c in rows]),
        NAMES,
        [f"/images/p{i:02d}_{cell}.png" for i, cell in rows],
        [f"p{i:02d}" for i, _ in rows] if with_patients else None,
        attributes={**NETWORK, **attributes},
    )


def run(output: Path, *arguments) -> dict:
    main([*map(str, arguments), "--output-dir", str(output)])
    return json.loads((output / "results.json").read_text())


def rows_of(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def patients_in_test(output: Path) -> list[str]:
    return sorted({row["patient"] for row in rows_of(output / "folds.csv") if row["part"] == "test"})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of bags, the folder of a training on it, and its results."""
    folder = tmp_path_factory.mktemp("abmil")
    bags = write_bags(folder / "bags")
    return bags, folder / "out", run(folder / "out", "--bags", bags, *QUICK)


def test_what_a_training_leaves(trained, capsys):
    bags, output, report = trained
    assert {path.name for path in output.iterdir()} - {"confusion.png", "curves.png", "losses.png"} == FILES
    results = report["results"]["classwise"]
    assert len(results["networks"]) == 2 * 2
    assert {"accuracy", "balanced_accuracy", "weighted_f1", "auroc"} <= set(results["mean"])
    assert set(results["together"]["intervals"]) >= {"accuracy", "auroc"}
    assert report["class_names"] == NAMES
    assert report["counts"]["patients_per_class"] == {"NPM1": 9, "control": 9}
    assert report["counts"]["learned_per_class"] == {"NPM1": 6, "control": 6}
    assert report["counts"]["folds"] == [{"train": 6, "val": 6, "test": 6}] * 2
    assert report["features"]["checkpoint_sha256"] == "aa"
    assert set(report["hashes"]) == {"bags"}
    table = format_report(report)
    assert "ABMIL, 6 test patients of 18, 2 classes" in table
    assert "mean of 4 networks" in table


def test_each_epoch_of_each_network_is_in_the_history(trained):
    _, output, report = trained
    epochs = rows_of(output / "history.csv")
    assert len(epochs) == sum(network["epochs"] for network in report["results"]["classwise"]["networks"])
    first = report["results"]["classwise"]["networks"][0]
    assert float(epochs[first["best_epoch"]]["val_loss"]) == first["val_loss"]
    assert float(epochs[0]["learning_rate"]) == 0.02


def test_predictions_are_of_test_patients_and_agree_with_the_metrics(trained):
    _, output, report = trained
    table = read_predictions(output / "predictions.csv")
    assert table.keys == patients_in_test(output)
    accuracy = np.mean([label == guess for label, guess in zip(table.labels, table.predictions, strict=True)])
    assert report["results"]["classwise"]["together"]["accuracy"] == accuracy
    of_networks = rows_of(output / "predictions_of_networks.csv")
    assert len(of_networks) == 6 * 4
    for row in rows_of(output / "predictions.csv"):
        mean = np.mean([float(other["p_NPM1"]) for other in of_networks if other["patient"] == row["patient"]])
        assert float(row["p_NPM1"]) == pytest.approx(mean, abs=1e-6)
        assert float(row["p_NPM1"]) + float(row["p_control"]) == pytest.approx(1, abs=1e-6)


def test_attention_is_written_for_each_cell_and_the_top_cells_are_its_highest(trained):
    bags, output, _ = trained
    attention, top = rows_of(output / "attention.csv"), rows_of(output / "top_cells.csv")
    for prediction in rows_of(output / "predictions.csv"):
        patient, guess = prediction["patient"], prediction["prediction"]
        cells = [row for row in attention if row["patient"] == patient]
        assert [int(row["cell"]) for row in cells] == list(range(len(cells_of(int(patient[1:])))))
        for column in ("attention", "attention_NPM1", "attention_control"):
            assert sum(float(row[column]) for row in cells) == pytest.approx(1, abs=1e-4)
        assert all(row["attention"] == row[f"attention_{guess}"] for row in cells)
        best = max(cells, key=lambda row: float(row["attention"]))
        first = next(row for row in top if row["patient"] == patient)
        assert (first["rank"], first["cell"], first["source"]) == ("1", best["cell"], best["source"])
        assert first["source"] == f"{bags / prediction['label'] / patient}.h5:{best['cell']}"


def test_the_same_inputs_give_the_same_bytes_but_for_the_date(trained, tmp_path):
    bags, output, _ = trained
    run(tmp_path, "--bags", bags, *QUICK)
    for name in FILES:
        first, second = (folder / name for folder in (output, tmp_path))
        if name == "results.json":
            first, second = (path.read_text().splitlines() for path in (first, second))
            assert [a for a, b in zip(first, second, strict=True) if a != b and '"date"' not in a] == []
        else:
            assert first.read_bytes() == second.read_bytes(), name


def test_a_saved_aggregator_says_the_same_again(trained, tmp_path, caplog):
    bags, output, _ = trained
    new = tmp_path / "new"
    for patient in patients_in_test(output):
        label = NAMES[int(patient[1:]) % 2]
        (new / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(bags / label / f"{patient}.h5", new / label)
    report = run(tmp_path / "applied", "--bags", new, "--apply", output / "aggregator.pth")
    keys = ("patient", "label", "prediction", "p_NPM1", "p_control")
    first, second = (
        [[row[key] for key in keys] for row in rows_of(folder / "predictions.csv")]
        for folder in (output, tmp_path / "applied")
    )
    assert first == second
    for name in ("attention.csv", "top_cells.csv"):
        columns = [{k: v for k, v in row.items() if k != "source"} for row in rows_of(output / name)]
        assert columns == [
            {k: v for k, v in row.items() if k != "source"} for row in rows_of(tmp_path / "applied" / name)
        ]
    of_each, of_each_again = (
        sorted([row["patient"], row["p_NPM1"]] for row in rows_of(folder / "predictions_of_networks.csv"))
        for folder in (output, tmp_path / "applied")
    )
    assert of_each == of_each_again
    assert report["aggregator"] == {"model": "classwise", "dim": 6, "n_classes": 2, "networks": 4}
    assert report["counts"]["seen_in_training"] == 0


def test_patients_without_labels_are_predicted(trained, tmp_path, capsys):
    _, output, _ = trained
    bags = write_bags(tmp_path / "bags", range(20, 23), flat=True)
    report = run(tmp_path / "applied", "--bags", bags, "--apply", output / "aggregator.pth")
    assert report["results"] == {}
    rows = rows_of(tmp_path / "applied" / "predictions.csv")
    assert [row["patient"] for row in rows] == ["p20", "p21", "p22"]
    assert list(rows[0]) == ["patient", "prediction", "p_NPM1", "p_control"]
    assert "predictions for 3 patients" in capsys.readouterr().out
    labels = write_labels(tmp_path / "labels.csv", range(20, 23))
    report = run(tmp_path / "again", "--bags", bags, "--labels", labels, "--apply", output / "aggregator.pth")
    assert report["results"]["classwise"]["together"]["per_class"]["NPM1"]["support"] == 2


def test_patients_of_the_training_are_counted(trained, tmp_path):
    bags, output, _ = trained
    report = run(tmp_path, "--bags", bags, "--apply", output / "aggregator.pth")
    assert report["counts"]["seen_in_training"] == 12


def test_an_aggregator_for_other_features_is_refused(trained, tmp_path):
    _, output, _ = trained
    aggregator = output / "aggregator.pth"
    bags = write_bags(tmp_path / "bags", range(2), attributes={**NETWORK, "checkpoint_sha256": "bb"})
    with pytest.raises(ValueError, match="checkpoint_sha256 of the aggregator is 'aa' and of these bags 'bb'"):
        run(tmp_path / "out", "--bags", bags, "--apply", aggregator)
    (tmp_path / "wide").mkdir()
    with h5py.File(tmp_path / "wide" / "p0.h5", "w") as file:
        file["features"] = np.zeros((2, 9), dtype=np.float32)
    with pytest.raises(ValueError, match="trained on features of 6 dimensions, these have 9"):
        run(tmp_path / "out", "--bags", tmp_path / "wide", "--apply", aggregator)
    assert not (tmp_path / "out").exists()


class Trap:
    """Pickled, it would make a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_files_that_are_no_aggregators(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="--apply: .*no such file"):
        TrainedAggregator.load(tmp_path / "no.pth")
    with open(tmp_path / "trap.pth", "wb") as file:
        pickle.dump(Trap(tmp_path / "caught"), file, protocol=2)
    with pytest.raises(ValueError, match="--apply: .*is no aggregator, or it is damaged"):
        TrainedAggregator.load(tmp_path / "trap.pth")
    assert not (tmp_path / "caught").exists()
    whole = (trained[1] / "aggregator.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        TrainedAggregator.load(tmp_path / "half.pth")


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"members": []},
        {"members": [{}]},
        {"members": 3},
        {"class_names": ["a", "a"]},
        {"class_names": None},
        {"architecture": {"model": "classwise", "dim": 10**12, "n_classes": 10**6}},
        {"architecture": {"model": "classwise", "dim": "wide", "n_classes": 2}},
        {"architecture": [1]},
        {"more": 1},
    ],
)
def test_an_aggregator_of_wrong_content_is_named(trained, tmp_path, change):
    content = torch.load(trained[1] / "aggregator.pth", weights_only=True)
    torch.save({**content, **change}, tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match=r"--apply: .*a\.pth' is no aggregator, or it is damaged or of another version"
    ):
        TrainedAggregator.load(tmp_path / "a.pth")


def test_features_with_patients_are_bags(trained, tmp_path):
    """The same cells from one file give the same networks; sources are image files then."""
    write_features(tmp_path / "features.h5", features_of())
    report = run(tmp_path / "out", "--features", tmp_path / "features.h5", *QUICK)
    assert report["results"] == trained[2]["results"]
    assert set(report["hashes"]) == {"bags", "features"}
    assert rows_of(tmp_path / "out" / "top_cells.csv")[0]["source"].startswith("/images/p")


def test_from_images_and_a_checkpoint(tmp_path):
    """The features are kept, and the aggregator knows the network it belongs to."""
    model = build_backbone({"embed_dim": 64, "depth": 1, "num_heads": 1, "patch_size": 14, "img_size": 28})
    state = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    torch.save({"teacher": state, "architecture": architecture(model)}, tmp_path / "teacher_checkpoint.pth")
    rows, rng = ["Image Path,Label,patient"], np.random.default_rng(0)
    for patient in range(12):
        for cell in range(2):
            pixels = rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"p{patient}_{cell}.png")
            rows.append(f"p{patient}_{cell}.png,{NAMES[patient % 2]},p{patient:02d}")
    (tmp_path / "patients.csv").write_text("\n".join(rows))
    source = ["--checkpoint", tmp_path / "teacher_checkpoint.pth", "--data", tmp_path / "patients.csv"]
    report = run(tmp_path / "out", *source, "--num-workers", 0, *QUICK, "--model", "gated")
    assert report["counts"]["cells"] == 24
    sha256 = report["checkpoint"]["checkpoint_sha256"]
    assert TrainedAggregator.load(tmp_path / "out" / "aggregator.pth").features["checkpoint_sha256"] == sha256
    again = run(tmp_path / "again", "--features", tmp_path / "out" / "features.h5", *QUICK, "--model", "gated")
    assert again["results"] == report["results"]
    other = run(
        tmp_path / "other", "--encoder", "histogram", *source[2:], *QUICK, "--model", "mean", "--num-workers", 0
    )
    assert (other["features"]["model"], other["features"]["kind"]) == ("histogram", "cls")


def test_labels_of_patients_go_before_classes_of_cells(trained, tmp_path):
    write_features(tmp_path / "features.h5", features_of(cell_labels=[0, 1]))
    with pytest.raises(ValueError, match=r"18 patients have two labels.*give the patients' with --labels"):
        run(tmp_path / "out", "--features", tmp_path / "features.h5", *QUICK)
    labels = write_labels(tmp_path / "labels.csv")
    report = run(tmp_path / "out", "--features", tmp_path / "features.h5", "--labels", labels, *QUICK)
    assert report["results"] == trained[2]["results"]


def test_a_test_set_of_its_own(tmp_path):
    bags, test = write_bags(tmp_path / "bags"), write_bags(tmp_path / "test", range(20, 26))
    report = run(tmp_path / "out", "--bags", bags, "--test-bags", test, *QUICK, "--model", "mean")
    assert report["counts"]["folds"] == [{"train": 9, "val": 9, "test": 6}] * 2
    assert read_predictions(tmp_path / "out" / "predictions.csv").keys == [f"p{i}" for i in range(20, 26)]
    with pytest.raises(ValueError, match="18 patients are in the training and in the test set"):
        run(tmp_path / "out2", "--bags", bags, "--test-bags", bags, *QUICK)


def test_cross_validation_tests_all_patients(tmp_path):
    bags = write_bags(tmp_path / "bags")
    report = run(tmp_path / "out", "--bags", bags, "--protocol", "crossval", *QUICK, "--folds", "3", "--runs", "1")
    assert report["counts"]["tested"] == 18
    assert [fold["test"] for fold in report["results"]["classwise"]["together"]["folds"]] == [6, 6, 6]
    assert len(read_predictions(tmp_path / "out" / "predictions.csv").keys) == 18


def test_pooled_vectors_stand_beside_the_networks(trained):
    _, output, report = trained
    rows = [name for name in report["results"] if name != "classwise"]
    assert len(rows) == 8
    for row in rows:
        found = report["results"][row]
        assert len(found["fits"]) == 2  # the two folds of one test set
        assert found["mean"]["accuracy"] == pytest.approx(np.mean([fit["accuracy"] for fit in found["fits"]]))
        assert found["together"]["folds"][0]["train"] == 12  # each patient trains in one of two folds
        table = read_predictions(output / f"predictions_{row}.csv")
        right = [label == guess for label, guess in zip(table.labels, table.predictions, strict=True)]
        assert found["together"]["accuracy"] == np.mean(right)
    assert set(report["retrieval"]["mean"]) == {"map_at_3", "interval", "queries"}
    printed = format_report(report)
    assert "mean_sd_knn_10" in printed
    assert "retrieval by mean, mAP@3: " in printed


def test_deletion_curves_are_of_each_tested_patient(trained):
    _, output, report = trained
    rows = rows_of(output / "deletion.csv")
    full = {row["patient"]: float(row["most_attended"]) for row in rows if row["share"] == "0"}
    predicted = {row["patient"]: float(row[f"p_{row['prediction']}"]) for row in rows_of(output / "predictions.csv")}
    assert full == {patient: pytest.approx(value, abs=1e-5) for patient, value in predicted.items()}
    gaps = [float(row["random"]) - float(row["most_attended"]) for row in rows if row["share"] != "0"]
    assert report["deletion"]["gap"] == pytest.approx(np.mean(gaps), abs=1e-5)


def test_the_robust_recipe_learns_from_all_patients_who_are_not_tested(tmp_path):
    bags = write_bags(tmp_path / "bags")
    flags = ["--protocol", "robust", "--epochs", "2", "--folds", "3", "--runs", "1"]
    report = run(tmp_path / "out", "--bags", bags, *flags)
    together = report["results"]["classwise"]["together"]
    assert [(fold["train"], fold["test"]) for fold in together["folds"]] == [(12, 6)] * 3
    assert len(report["results"]["classwise"]["networks"]) == 3 * INNER_FOLDS
    assert report["training"]["optimizer"] == "adamw"
    folds = tmp_path / "out" / "folds.csv"
    again = run(tmp_path / "again", "--bags", bags, *flags[:4], "--runs", "1", "--fold-files", folds)
    assert again["results"] == report["results"]
    applied = run(tmp_path / "new", "--bags", bags, "--apply", tmp_path / "out" / "aggregator.pth")
    assert applied["aggregator"]["standardised"] is True


def test_the_robust_recipe_takes_folds_of_one_test_set_together(tmp_path):
    bags = write_bags(tmp_path / "bags")
    report = run(tmp_path / "first", "--bags", bags, *QUICK)
    flags = ["--protocol", "robust", "--epochs", "2", "--runs", "1", "--fold-files", tmp_path / "first" / "folds.csv"]
    robust = run(tmp_path / "out", "--bags", bags, *flags)
    assert [(fold["train"], fold["test"]) for fold in robust["results"]["classwise"]["together"]["folds"]] == [(12, 6)]
    assert robust["results"]["mean_knn_1"] == report["results"]["mean_knn_1"]


def test_results_do_not_depend_on_the_number_of_threads(tmp_path):
    bags = tmp_path / "bags"
    for number in range(18):
        cells = np.random.default_rng(number).normal(size=(600, 384)).astype(np.float32) + 0.1 * (number % 2)
        file = bags / NAMES[number % 2] / f"p{number:02d}.h5"
        file.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(file, "w") as stream:
            stream["features"] = cells
    texts = []
    for n_threads in ("1", "2"):
        output = tmp_path / n_threads
        command = [sys.executable, "dinov2/eval/abmil.py", "--bags", bags, *QUICK, "--output-dir", output]
        environment = {**os.environ, "OMP_NUM_THREADS": n_threads, "OPENBLAS_NUM_THREADS": n_threads}
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, env=environment)
        lines = (output / "results.json").read_text().splitlines()
        texts.append([line for line in lines if '"date"' not in line])
    assert texts[0] == texts[1]
    for name in FILES - {"results.json"}:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_folds_of_files_give_the_run_again(trained, tmp_path):
    bags, output, report = trained
    settings = [*QUICK[:4], "--runs", "2", "--fold-files", output / "folds.csv"]
    assert run(tmp_path / "out", "--bags", bags, *settings)["results"] == report["results"]


def test_official_folds_bring_labels_and_choose_patients(tmp_path, caplog):
    bags = write_bags(tmp_path / "bags", flat=True)
    for fold in range(2):
        (tmp_path / "folds" / f"data_fold_{fold}").mkdir(parents=True)
        for part, numbers in (("train", range(8)), ("val", (8, 9)), ("test", (10 + 2 * fold, 11 + 2 * fold))):
            rows = "".join(f"p{i:02d},{i % 2}\n" for i in numbers)
            (tmp_path / "folds" / f"data_fold_{fold}" / f"{part}.csv").write_text(f"patient_name,labels\n{rows}")
    (tmp_path / "folds" / "label_to_diagnose.csv").write_text("label_name,label_id\nNPM1,0\ncontrol,1\n")
    report = run(tmp_path / "out", "--bags", bags, "--fold-files", tmp_path / "folds", *QUICK[:4], "--runs", "1")
    assert report["class_names"] == NAMES
    assert report["counts"]["patients"] == 14
    assert read_predictions(tmp_path / "out" / "predictions.csv").keys == ["p10", "p11", "p12", "p13"]
    wrong = write_bags(tmp_path / "wrong")
    (wrong / "NPM1" / "p00.h5").rename(wrong / "control" / "p00.h5")
    with pytest.raises(ValueError, match="bags and --fold-files: 1 patients have two labels, for instance 'p00'"):
        run(tmp_path / "out2", "--bags", wrong, "--fold-files", tmp_path / "folds", *QUICK[:4])


def copy_bag(bags: Path) -> None:
    """p00 once more under another name, its cells in another order."""
    with h5py.File(bags / "NPM1" / "p99.h5", "w") as file:
        file["features"] = cells_of(0)[::-1]
        file.attrs.update(NETWORK)


def fill_with_nan(bags: Path) -> None:
    with h5py.File(bags / "NPM1" / "p00.h5", "r+") as file:
        file["features"][1] = np.nan


def empty(bags: Path) -> None:
    with h5py.File(bags / "NPM1" / "p00.h5", "w") as file:
        file["features"] = np.zeros((0, 6), dtype=np.float32)
        file.attrs.update(NETWORK)


def mix_networks(bags: Path) -> None:
    with h5py.File(bags / "NPM1" / "p00.h5", "r+") as file:
        file.attrs["checkpoint_sha256"] = "bb"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (copy_bag, "'p00', 'p99' have the same cells"),
        (fill_with_nan, "1 of the 3 cells of patient 'p00' have infinite or NaN features"),
        (empty, r"'p00' has features of shape \[0, 6\]; expected .*, not a bag without cells"),
        (mix_networks, "files of different networks are mixed"),
        (lambda bags: shutil.copy(bags / "control/p01.h5", bags / "NPM1/p01.h5"), "'p01' 'NPM1' and 'control'"),
        (lambda bags: shutil.rmtree(bags / "control"), "all patients are NPM1, one class"),
    ],
)
def test_bad_bags_are_named_and_nothing_is_written(tmp_path, spoil, message):
    bags = write_bags(tmp_path / "bags")
    spoil(bags)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", "--bags", bags, *QUICK)
    assert not (tmp_path / "out").exists()


def test_a_training_part_without_a_class(tmp_path):
    bags, folds = write_bags(tmp_path / "bags"), tmp_path / "folds.csv"
    rows = ["0,train,p00,NPM1", "0,train,p02,NPM1", "0,val,p04,NPM1", "0,test,p01,control"]
    folds.write_text("\n".join(["fold,part,patient,label", *rows]))
    with pytest.raises(ValueError, match="fold 0: no patient of control in its training part"):
        run(tmp_path / "out", "--bags", bags, "--fold-files", folds)
    folds.write_text("\n".join(["fold,part,patient,label", *rows, "0,train,p99,control"]))
    with pytest.raises(ValueError, match=r"--fold-files .*: 1 of 5 patients have no bag \('p99'\)"):
        run(tmp_path / "out", "--bags", bags, "--fold-files", folds)
    assert not (tmp_path / "out").exists()


def test_features_without_patients_and_bags_without_labels(tmp_path):
    write_features(tmp_path / "features.h5", features_of(with_patients=False))
    with pytest.raises(ValueError, match="the features name no patients"):
        run(tmp_path / "out", "--features", tmp_path / "features.h5", *QUICK)
    bags = write_bags(tmp_path / "bags", flat=True)
    with pytest.raises(ValueError, match="the bags have no labels; give a CSV"):
        run(tmp_path / "out", "--bags", bags, *QUICK)
    with pytest.raises(ValueError, match=r"labels: 2 of 18 bags have none \('p16', 'p17'\)"):
        run(tmp_path / "out", "--bags", bags, "--labels", write_labels(tmp_path / "labels.csv", range(16)), *QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "got no cells; give --features"),
        (["--features", "f.h5", "--bags", "b"], "got --bags --features; give --features"),
        (["--checkpoint", "c.pth"], "got --checkpoint; give"),
        (["--encoder", "pixels", "--bags", "b"], "got --bags --encoder; give"),
        (["--bags", "b", "--apply", "a.pth", "--fold-files", "f"], "it takes no test set and no fold files"),
        (["--bags", "b", "--fold-files", "f", "--folds", "3"], "drop --folds"),
        (["--bags", "b", "--test-bags", "t", "--protocol", "crossval"], "goes with the other protocols"),
        (["--bags", "b", "--protocol", "robust", "--learning-rate", "1"], "drop --learning-rate"),
        (["--bags", "b", "--runs", "0"], "'0' is not a whole number from 1"),
        (["--bags", "b", "--model", "abmil"], "invalid choice: 'abmil'"),
    ],
)
def test_flags_that_contradict_each_other(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--output-dir", "out"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains_and_is_applied(model, tmp_path, monkeypatch):
    if model in ("transmil", "clam", "dsmil"):
        pytest.importorskip("torchmil")
        monkeypatch.setattr("dinov2.models.abmil.TRANSMIL_DIM", 8)
    bags = write_bags(tmp_path / "bags")
    run(tmp_path / "out", "--bags", bags, "--epochs", 2, "--folds", 2, "--runs", 1, "--model", model)
    report = run(tmp_path / "applied", "--bags", bags, "--apply", tmp_path / "out" / "aggregator.pth")
    assert report["results"][model]["together"]["per_class"]["control"]["support"] == 9


def test_the_file_runs_as_a_command(tmp_path):
    """From any folder, with one line and status 2 for a mistake of the user's."""
    command = [sys.executable, REPOSITORY / "dinov2" / "eval" / "abmil.py", "--output-dir", "out"]
    missing = subprocess.run([*command, "--bags", "no"], cwd=tmp_path, capture_output=True, text=True)
    assert missing.returncode == 2
    assert "bags: 'no' does not exist" in missing.stderr
    assert "Traceback" not in missing.stderr

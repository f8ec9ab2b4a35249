"""Protocols on fixed features give the numbers that were recorded before evaluation was simplified (commit 7b054c3).

The commands run as a user starts them, and results.json and predictions.csv are compared: exactly where nothing is
fitted (kNN), to 1e-3 in probability where a solver decides (linear probes), within the noise of threads for ABMIL.
`python tests/eval/test_recorded_numbers.py` writes recorded_numbers.json again; a change of it is a change of results.
"""

import csv
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from dinov2.eval import abmil, cross, knn, linear
from dinov2.eval.features import Features, write_features

RECORDED = Path(__file__).with_name("recorded_numbers.json")
CLASSES = ["basophil", "blast", "lymphocyte", "monocyte"]
DIM = 24
N_ROWS = 25  # of each predictions file
FEW_SHOT = ["--few-shot", "1", "5", "--repeats", "3"]
ABMIL = ["--epochs", "12", "--runs", "2", "--learning-rate", "0.01"]
COMMANDS = {
    "knn": (knn, ["--features", "cells.h5", *FEW_SHOT]),
    "knn, DINO": (knn, ["--features", "cells.h5", "--protocol", "dino", "--k", "10", "20", "50"]),
    "knn, two sets": (knn, ["--features", "cells.h5", "--test-features", "others.h5"]),
    "linear": (linear, ["--features", "cells.h5", *FEW_SHOT]),
    "linear, sweep": (linear, ["--features", "cells.h5", "--protocol", "sweep", "--test-fraction", "0.3"]),
    "linear, SGD": (linear, ["--features", "cells.h5", "--protocol", "sgd", "--sgd-iterations", "60"]),
    "abmil": (abmil, ["--features", "patients.h5", *ABMIL]),
    "abmil, crossval": (abmil, ["--features", "patients.h5", "--protocol", "crossval", "--model", "gated", *ABMIL]),
    "cross": (cross, ["--features", "cells.h5", "others.h5", "--names", "pbc", "bmc"]),
    "cross, linear": (cross, ["--features", "cells.h5", "others.h5", "--names", "pbc", "bmc", "--method", "linear"]),
}


def write_sets(folder):
    """Cells of 30 patients with two kinds of features, cells of another place, and patients with one label each."""
    rng = np.random.default_rng(7)
    centres = rng.normal(size=(len(CLASSES), DIM))

    def cells(n, n_patients, shift, label_of_patient=None):
        patients = rng.integers(n_patients, size=n)
        labels = rng.integers(len(CLASSES), size=n) if label_of_patient is None else label_of_patient[patients]
        scale = np.linspace(0.2, 3.0, DIM)
        features = centres[labels] * 0.8 + shift + rng.normal(size=(n, DIM)) * scale
        return Features(
            features=features.astype(np.float32),
            labels=labels,
            class_names=CLASSES,
            paths=[f"/cells/{shift}/{n}/{i}.png" for i in range(n)],
            patients=[f"patient {i}" for i in patients],
            attributes={"checkpoint_sha256": "0" * 64, "transform": "fixed", "model": "fixed"},
            others={"cls+mean": np.concatenate([features, np.abs(features)], axis=1).astype(np.float32)},
        )

    write_features(folder / "cells.h5", cells(400, 30, 0.0))
    write_features(folder / "others.h5", cells(200, 15, 0.5))
    write_features(folder / "patients.h5", cells(600, 40, 0.0, np.arange(40) % len(CLASSES)))


def run(name, folder):
    """Run a command on the files of `write_sets` in `folder`; return the numbers to compare."""
    module, flags = COMMANDS[name]
    output = folder / name.replace(", ", "_").replace(" ", "_")
    flags = [str(folder / flag) if flag.endswith(".h5") else flag for flag in flags]
    module.main([*flags, "--device", "cpu", "--output-dir", str(output)])
    report = json.loads((output / "results.json").read_text())
    # pooled vectors of patients came later; test_patient_vectors.py holds them
    files = {file.name: _rows(file) for file in sorted(output.glob("predictions*.csv")) if "_mean_" not in file.name}
    results = {row: found for row, found in report["results"].items() if "fits" not in (found or ())}
    return {"results": _numbers(results), "few_shot": report.get("few_shot"), "predictions": files}


def _rows(file):
    """The first rows, probabilities as numbers."""
    with open(file, newline="") as stream:
        rows = list(csv.DictReader(stream))[:N_ROWS]
    return [[float(value) if key.startswith("p_") else value for key, value in row.items()] for row in rows]


def _numbers(content):
    """All metrics, chosen settings, counts and intervals in a results.json."""
    if isinstance(content, dict):
        left_out = ["per_class", "confusion", "date"]
        left_out += ["learning_rate"] if "best_epoch" in content else []  # of a network of ABMIL, not recorded
        return {key: _numbers(value) for key, value in content.items() if key not in left_out}
    return [_numbers(value) for value in content] if isinstance(content, list) else content


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("recorded")
    write_sets(path)
    return path


def assert_close(found, recorded, tolerance, where=""):
    """Equal but for rounding; the ends of intervals (tolerance None) to 15 % of the width: draws differ."""
    if isinstance(recorded, dict):
        assert set(found) == set(recorded), where
        for key, value in recorded.items():
            if key in ("iterations", "converged"):  # of the solver
                continue
            is_interval = key in ("intervals", "interval")
            assert_close(found[key], value, None if is_interval else tolerance, f"{where}/{key}")
    elif isinstance(recorded, list) and tolerance is None:
        assert found == pytest.approx(recorded, abs=0.15 * (recorded[1] - recorded[0])), where
    elif isinstance(recorded, list):
        assert len(found) == len(recorded), where
        for i, (one, other) in enumerate(zip(found, recorded, strict=True)):
            assert_close(one, other, tolerance, f"{where}/{i}")
    elif isinstance(recorded, float):
        assert found == pytest.approx(recorded, abs=tolerance), where
    else:
        assert found == recorded, where


@pytest.mark.parametrize("name", COMMANDS)
def test_a_protocol_gives_the_recorded_numbers(name, folder):
    tolerance = 1e-6 if name.startswith(("knn", "cross")) else 1e-3
    assert_close(run(name, folder), json.loads(RECORDED.read_text())[name], tolerance)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        write_sets(Path(temporary))
        numbers = {name: run(name, Path(temporary)) for name in COMMANDS}
    RECORDED.write_text(json.dumps(numbers) + "\n")
    sys.exit(0)

"""Files of cells and commands on them, for the tests of evaluation."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.eval import knn
from dinov2.eval.features import Features, write_features
from dinov2.models import architecture, build_backbone

COLOURS = {"basophil": (150, 60, 160), "eosinophil": (220, 120, 90), "lymphocyte": (90, 90, 200)}


@pytest.fixture
def features_file():
    """Write a features file of cells of two classes, a dozen numbers each, which mostly can be told apart."""

    def write(file, n=80, patients=None, prefix="/cells", **changes):
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

    return write


@pytest.fixture
def rows_of():
    def read(file):
        with open(file, newline="") as stream:
            return list(csv.DictReader(stream))

    return read


@pytest.fixture
def checkpoint(tmp_path):
    settings = {"embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 14, "img_size": 28, "layerscale": 1.0}
    torch.manual_seed(0)
    model = build_backbone({**settings, "block_chunks": 0})
    file = tmp_path / "teacher_checkpoint.pth"
    state = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    torch.save({"teacher": state, "architecture": architecture(model)}, file)
    return file


@pytest.fixture
def draw_cells():
    def draw(folder, n, seed):
        """n noisy 30-px images of each class, coloured by class."""
        rng = np.random.default_rng(seed)
        for name, colour in COLOURS.items():
            (folder / name).mkdir(parents=True)
            for i in range(n):
                noisy = np.array(colour) + rng.integers(-15, 15, (30, 30, 3))
                Image.fromarray(noisy.astype(np.uint8)).save(folder / name / f"{i:02d}.png")
        return folder

    return draw


@pytest.fixture
def run_knn(tmp_path, capsys):
    """Run knn.py; return what it prints and results.json."""

    def run(*flags):
        knn.main([*map(str, flags), "--output-dir", str(tmp_path / "out"), "--num-workers", "0", "--device", "cpu"])
        return capsys.readouterr().out, json.loads((tmp_path / "out" / "results.json").read_text())

    return run


@pytest.fixture
def expect_nothing(tmp_path, run_knn):
    """Check that knn.py fails with a message and leaves no output folder."""

    def expect(message, *flags, error=ValueError):
        with pytest.raises(error, match=message):
            run_knn(*flags)
        assert not (tmp_path / "out").exists()

    return expect

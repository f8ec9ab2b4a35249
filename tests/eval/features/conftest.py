"""A small backbone and a few images, for the tests of features."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.datasets import LabelledCells
from dinov2.eval.features import loop
from dinov2.models import architecture, build_backbone


@pytest.fixture
def backbone(formulas):
    settings = {"embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 14, "img_size": 28, "block_chunks": 0}
    return formulas.fill_(build_backbone(settings), "features").eval()


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for i, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def log(caplog):
    """The package's log, at all levels."""
    logger = logging.getLogger("dinov2")
    logger.addHandler(caplog.handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield caplog
    logger.setLevel(level)
    logger.removeHandler(caplog.handler)


@pytest.fixture
def checkpoint(backbone, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save({"model": backbone.state_dict(), "architecture": architecture(backbone)}, file)
    return file


@pytest.fixture
def cells(images):
    return LabelledCells(images, np.array([0, 1, 0, 1, 0, 1, 0]), ["a", "b"], [f"p{i // 3}" for i in range(7)])


@pytest.fixture
def parts_of_two(monkeypatch):
    """Parts are small enough for seven images to make four."""
    monkeypatch.setattr(loop, "PART_SIZE", 2)
    monkeypatch.setattr(loop, "PATCH_PART_SIZE", 2)

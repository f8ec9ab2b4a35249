"""Fixtures of the tests of scripts."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    """Import a module of scripts/benchmarks or scripts/experiments by its name."""
    monkeypatch.setattr(sys, "path", [str(SCRIPTS / "benchmarks"), str(SCRIPTS / "experiments"), *sys.path])
    return importlib.import_module


@pytest.fixture
def write_images():
    """Write images of noise; one number gives one content."""

    def write(paths: dict[Path, int], size: int = 40) -> None:
        for path, number in paths.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(number).integers(0, 255, (size, size, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)

    return write


@pytest.fixture
def rows_of():
    """Return the rows of a Markdown file's tables, as lists of cells."""

    def read(file: Path) -> list[list[str]]:
        lines = [line for line in file.read_text().splitlines() if line.startswith("| ") and "---" not in line]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    return read

"""Pictures show what is in the numbers, have the same bytes each time, and are left out without matplotlib."""

import sys

import numpy as np
import pytest
from PIL import Image

from dinov2.eval.figures import draw_confusion, draw_curves, draw_losses

LABELS = np.array([0, 0, 1, 1, 1])
PROBABILITIES = np.array([[0.9, 0.1, 0], [0.4, 0.6, 0], [0.3, 0.7, 0], [0.2, 0.8, 0], [0.1, 0.9, 0]])
DRAWINGS = {
    "confusion.png": lambda file: draw_confusion(file, [[9, 0], [1, 0]], ["a", "b"], "kNN"),
    "curves.png": lambda file: draw_curves(file, LABELS, PROBABILITIES, ["a", "b", "nobody"], "kNN"),  # no curve for c
    "losses.png": lambda file: draw_losses(file, {"fold 0, run 0": [(1, 2), (0.5, 1)], "fold 1, run 0": [(1, 1)]}, "t"),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_picture_is_drawn(tmp_path, name):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    file = tmp_path / "new" / name
    assert DRAWINGS[name](file)
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        colours = {picture.getpixel((x, y)) for x in range(0, picture.width, 3) for y in range(0, picture.height, 3)}
    assert len(colours) > 5
    first = file.read_bytes()
    DRAWINGS[name](file)
    assert file.read_bytes() == first
    assert pyplot.get_fignums() == []  # none stays open


def test_curves_are_of_classes_that_have_one(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    shown = []
    monkeypatch.setattr("dinov2.eval.figures._save", lambda figure, file: shown.append(figure))
    draw_curves(tmp_path / "curves.png", LABELS, PROBABILITIES, ["a", "b", "nobody"], "kNN")
    of_roc, of_confidence = shown[0].axes
    assert [text.get_text() for text in of_roc.get_legend().get_texts()] == ["a (1.000)", "b (1.000)"]
    line = of_confidence.get_lines()[1]
    assert line.get_xdata().tolist() == pytest.approx([0.6, 0.7, 0.8, 0.9])
    assert line.get_ydata().tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("name", DRAWINGS)
def test_without_matplotlib_a_line_says_so(tmp_path, monkeypatch, caplog, name):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level("INFO", logger="dinov2"):
        assert not DRAWINGS[name](tmp_path / name)
    assert f"{name} is not drawn: matplotlib is missing" in caplog.text
    assert list(tmp_path.iterdir()) == []

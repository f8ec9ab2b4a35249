"""Figures show the numbers they were given, and have the same bytes each time."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from dinov2.eval.metrics.figures import draw_confusion, draw_curves, draw_losses

LABELS = np.array([0, 0, 1, 1, 1])
PROBABILITIES = np.array([[0.9, 0.1, 0], [0.4, 0.6, 0], [0.3, 0.7, 0], [0.2, 0.8, 0], [0.1, 0.9, 0]])
DRAWINGS = {
    "confusion.png": lambda file: draw_confusion(file, [[9, 0], [1, 0]], ["a", "b"], "kNN"),
    "curves.png": lambda file: draw_curves(file, LABELS, PROBABILITIES, ["a", "b", "c"], "kNN"),  # no curve for c
    "losses.png": lambda file: draw_losses(file, {"fold 0, run 0": [(1, 2), (0.5, 1)], "fold 1, run 0": [(1, 1)]}, "t"),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_figure_is_drawn(tmp_path, name):
    file = tmp_path / "new" / name
    DRAWINGS[name](file)
    with Image.open(file) as image:
        assert image.format == "PNG"
        colours = {image.getpixel((x, y)) for x in range(0, image.width, 3) for y in range(0, image.height, 3)}
    assert len(colours) > 5
    first = file.read_bytes()
    DRAWINGS[name](file)
    assert file.read_bytes() == first
    assert plt.get_fignums() == []  # no figure stays open


def test_curves_are_of_classes_that_have_one(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr("dinov2.eval.metrics.figures._save", lambda figure, file: saved.append(figure))
    draw_curves(tmp_path / "curves.png", LABELS, PROBABILITIES, ["a", "b", "c"], "kNN")
    of_roc, of_confidence = saved[0].axes
    assert [text.get_text() for text in of_roc.get_legend().get_texts()] == ["a (1.000)", "b (1.000)"]
    line = of_confidence.get_lines()[0]
    assert line.get_xdata().tolist() == pytest.approx([0.6, 0.7, 0.8, 0.9])
    assert line.get_ydata().tolist() == [0, 1, 1, 1]

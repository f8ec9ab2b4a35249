"""Tables and figures show the numbers they were given; figures have the same bytes each time."""

import os

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dinov2.eval.metrics.summaries import (
    class_table,
    draw_confusion,
    draw_curves,
    draw_losses,
    figure_text,
    metrics_table,
    scores_table,
)

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
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **options: saved.append(figure))
    draw_curves(tmp_path / "curves.png", LABELS, PROBABILITIES, ["a", "b", "c"], "kNN")
    of_roc, of_confidence = saved[0].axes
    assert [text.get_text() for text in of_roc.get_legend().get_texts()] == ["1.000  a", "1.000  b"]
    line = of_confidence.get_lines()[0]
    assert line.get_xdata().tolist() == pytest.approx([0.6, 0.7, 0.8, 0.9])
    assert line.get_ydata().tolist() == [0, 1, 1, 1]


ODD_NAMES = ["_gran", "$\\frac{", "粒细胞", os.fsdecode(b"f\xfcr"), "two\nlines", "x" * 10_000, "\u202eabc", ""]


def test_odd_names_are_drawn_as_they_are(tmp_path, monkeypatch, caplog):
    labels, n = np.repeat(np.arange(len(ODD_NAMES)), 2), len(ODD_NAMES)
    draw_confusion(tmp_path / "confusion.png", np.eye(n, dtype=int), ODD_NAMES, "kNN")
    draw_losses(tmp_path / "losses.png", {name: [(1, 2), (0.5, 1)] for name in ODD_NAMES}, "t")
    saved, save = [], Figure.savefig

    def save_and_keep(figure, stream, **options):
        saved.append(figure)
        save(figure, stream, **options)

    monkeypatch.setattr(Figure, "savefig", save_and_keep)
    draw_curves(tmp_path / "curves.png", labels, np.eye(n)[labels], ODD_NAMES, "kNN")
    for name in ("confusion", "losses", "curves"):
        assert Image.open(tmp_path / f"{name}.png").size < (3000, 3000)
    legend = [text.get_text() for text in saved[0].axes[0].get_legend().get_texts()]
    assert legend[:2] == ["1.000  _gran", "1.000  $\\frac{"]  # a figure of its own for each class, also with _ or $
    assert len(legend) == n
    assert figure_text(ODD_NAMES[3]) == "f?r"
    assert figure_text(ODD_NAMES[4]) == "two lines"
    assert figure_text(ODD_NAMES[5]) == "x" * 37 + "..."


def test_a_figure_of_many_classes_fits_into_memory(tmp_path, monkeypatch):
    sizes, names = [], [str(i) for i in range(100)]
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **options: sizes.append(self.get_size_inches().tolist()))
    draw_confusion(tmp_path / "confusion.png", np.eye(100, dtype=int), names, "kNN")
    assert sizes == [[40, 40]]


METRICS = {
    **{"accuracy": 0.818, "balanced_accuracy": 0.75, "weighted_f1": 0.8, "macro_f1": 1.0},
    **{"kappa": 0.5, "auroc": None, "log_loss": 0.12345},
}


def titles(line):
    return [text.strip() for text in line.split("  ") if text.strip()]


def test_metrics_are_in_percent_with_intervals_and_spread():
    of_folds = {"mean_over_folds": dict.fromkeys(METRICS, 0.7), "sd_over_folds": dict.fromkeys(METRICS, 0.02)}
    with_all = {**METRICS, "intervals": {"accuracy": [0.7, 0.9]}, **of_folds, "folds": [{}, {}]}
    title, row, over_folds, plain = metrics_table([("model", "sweep", with_all), ("pixels", "20", METRICS)], "protocol")
    assert titles(title) == ["protocol", "accuracy", "balanced acc.", "weighted F1", "macro F1"]
    assert row.split() == ["model", "sweep", "81.8", "(70.0-90.0)", "75.0", "80.0", "100.0"]
    assert over_folds.startswith("mean of 2 folds ")
    assert over_folds.split()[4:] == 4 * ["70.0", "+-", "2.0"]
    assert plain.split() == ["pixels", "20", "81.8", "75.0", "80.0", "100.0"]
    assert len({len(line) for line in (title, row, over_folds, plain)}) == 1


def test_scores_are_as_they_are():
    title, row = scores_table([("model", METRICS)])
    assert titles(title) == ["Cohen's kappa", "AUROC", "log loss"]
    assert row.split() == ["model", "0.500", "-", "0.123"]


def test_classes_have_counts_and_shares():
    per_class = {
        "blast": {"support": 4, "recall": 1.0, "precision": 0.8, "f1": 0.889},
        "large, rare": {"support": 0, "recall": None, "precision": 0.0, "f1": 0.0},
    }
    lines = class_table("model", {"per_class": per_class}, {"blast": 8, "large, rare": 12})
    assert lines == [
        "model        train  test  recall  precision    F1",
        "blast            8     4   100.0       80.0  88.9",
        "large, rare     12     0       -        0.0   0.0",
    ]
    assert class_table("model", {"per_class": per_class}, {})[:2] == [
        "model        test  recall  precision    F1",
        "blast           4   100.0       80.0  88.9",
    ]

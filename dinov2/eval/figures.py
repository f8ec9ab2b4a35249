"""Pictures of results: confusion and other matrices, ROC and reliability curves, losses over epochs.

matplotlib is optional: without it every function here draws nothing, says so in the log and returns False.

Letters: N samples, C classes
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_curve

from dinov2.eval.metrics import auroc_per_class, reliability
from dinov2.utils.files import atomic_write

logger = logging.getLogger("dinov2")


def draw_confusion(file: Path, confusion: Sequence[Sequence[int]], class_names: Sequence[str], title: str) -> bool:
    """A PNG of counts, coloured by the share of the label's row; False, with a line in the log, without matplotlib.

    Args:
        file: the PNG.
        confusion: [C, C] counts; rows are labels, columns predictions.
        class_names: C names.
        title: over it.
    """
    counts = np.asarray(confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    texts = [[str(count) if count else "" for count in row] for row in counts.tolist()]
    return draw_matrix(
        file,
        shares,
        texts,
        class_names,
        class_names,
        xlabel="prediction",
        ylabel="label",
        title=title,
        scale="share of the label's cells",
    )


def draw_matrix(
    file: Path,
    values: np.ndarray,
    texts: Sequence[Sequence[str]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    scale: str,
) -> bool:
    """A PNG of a matrix, coloured by value; False, with a line in the log, without matplotlib.

    Args:
        file: the PNG.
        values: [rows, columns], 0-1; NaN stays white.
        texts: what stands in each field.
        row_names, column_names: beside and under it.
        xlabel, ylabel, title, scale: what columns, rows, all of it and the colours are.
    """
    height, width = (2.5 + 0.45 * len(names) for names in (row_names, column_names))  # inches
    figure = _new_figure(file, width + 1, height)
    if figure is None:
        return False
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label=scale)
    for row, of_row in enumerate(texts):
        for column, text in enumerate(of_row):
            if text:
                colour = "white" if values[row, column] > 0.5 else "black"
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(column_names)), labels=column_names, rotation=45, ha="right")
    axes.set_yticks(range(len(row_names)), labels=row_names)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    _save(figure, file)
    return True


def draw_curves(
    file: Path, labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str], title: str
) -> bool:
    """A PNG with the ROC curve of each class against all others, and how often predictions of a confidence are right.

    Args:
        file: the PNG.
        labels: int64 [N], 0 to C - 1.
        probabilities: float64 [N, C].
        class_names: C names.
        title: over it.
    """
    figure = _new_figure(file, 11, 5)
    if figure is None:
        return False
    of_roc, of_confidence = figure.subplots(1, 2)
    areas = auroc_per_class(labels, probabilities)
    for i, (name, area) in enumerate(zip(class_names, areas, strict=True)):
        if area is not None:  # a class that all or none of the cells have has no curve
            false_rate, true_rate, _ = roc_curve(labels == i, probabilities[:, i])
            of_roc.plot(false_rate, true_rate, label=f"{name} ({area:.3f})", linewidth=1)
    of_roc.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
    of_roc.set(xlabel="false positive rate", ylabel="true positive rate", title=f"{title}: ROC, one against the rest")
    if of_roc.get_legend_handles_labels()[0]:
        of_roc.legend(title="class (AUROC)", fontsize=7, title_fontsize=7, loc="lower right")
    confidences, accuracies, counts = reliability(labels, probabilities.argmax(axis=1), probabilities)
    of_confidence.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
    of_confidence.plot(confidences, accuracies, linewidth=1)
    of_confidence.scatter(confidences, accuracies, s=10 + 200 * counts / max(counts.sum(), 1))
    of_confidence.set(xlabel="confidence", ylabel="accuracy", title="reliability (area: number of samples)")
    for axes in (of_roc, of_confidence):
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    _save(figure, file)
    return True


def draw_losses(file: Path, histories: Mapping[str, Sequence[tuple[float, float]]], title: str) -> bool:
    """A PNG of training (dashed) and validation losses over epochs.

    Args:
        file: the PNG.
        histories: {name: (training loss, validation loss) of each epoch}; names that begin alike share a colour.
        title: over it.
    """
    figure = _new_figure(file, 8, 5)
    if figure is None:
        return False
    axes = figure.add_subplot()
    colours: dict[str, str] = {}
    for name, history in histories.items():
        group = name.split(",")[0]
        is_new = group not in colours
        colour = colours.setdefault(group, f"C{len(colours) % 10}")
        of_training, of_validation = np.array(history).T
        axes.plot(of_validation, color=colour, linewidth=1, label=group if is_new else None)
        axes.plot(of_training, color=colour, linewidth=0.6, linestyle="--")
    axes.set(xlabel="epoch", ylabel="loss (validation; dashed: training)", title=title)
    axes.legend(fontsize=7)
    _save(figure, file)
    return True


def _new_figure(file: Path, width: float, height: float) -> Any:
    """A figure of this size in inches; None without matplotlib."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which keeps every figure it ever made
    except ImportError:
        logger.info("%s is not drawn: matplotlib is missing (pip install matplotlib)", file.name)
        return None
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, file: Path) -> None:
    with atomic_write(file) as stream:
        figure.savefig(stream, format="png", dpi=150)

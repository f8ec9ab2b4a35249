"""PNG figures of results: confusion and other matrices, ROC and reliability curves, losses over epochs.

Letters: N samples, C classes
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # not pyplot, which keeps every figure in memory until it is closed
from sklearn.metrics import roc_curve

from dinov2.eval.metrics.classification import auroc_per_class, reliability
from dinov2.utils.files import atomic_write


def draw_confusion(file: Path, confusion: Sequence[Sequence[int]], class_names: Sequence[str], title: str) -> None:
    """Draw counts [C, C], coloured by their share of the label's row, into a PNG."""
    counts = np.asarray(confusion)
    draw_matrix(
        file,
        counts / np.maximum(counts.sum(axis=1, keepdims=True), 1),
        [[str(count) if count else "" for count in row] for row in counts.tolist()],
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
) -> None:
    """Draw a matrix of values from 0 to 1 with a text in each field, coloured by value; NaN stays white.

    `xlabel`, `ylabel`, `title` and `scale` are titles of the columns, the rows, the figure and the colours.
    """
    figure = Figure(figsize=(3.5 + 0.45 * len(column_names), 2.5 + 0.45 * len(row_names)), layout="constrained")
    axes = figure.add_subplot()
    figure.colorbar(axes.imshow(values, cmap="Blues", vmin=0, vmax=1), label=scale)
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value > 0.5 else "black"
        axes.text(column, row, texts[row][column], ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(column_names)), labels=column_names, rotation=45, ha="right")
    axes.set_yticks(range(len(row_names)), labels=row_names)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    _save(figure, file)


def draw_curves(
    file: Path, labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str], title: str
) -> None:
    """Draw the ROC curve of each class against the rest, and accuracy over confidence."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    areas = auroc_per_class(labels, probabilities)
    for i, (name, area) in enumerate(zip(class_names, areas, strict=True)):
        if area is not None:
            false_rate, true_rate, _ = roc_curve(labels == i, probabilities[:, i])
            left.plot(false_rate, true_rate, label=f"{name} ({area:.3f})", linewidth=1)
    left.set(xlabel="false positive rate", ylabel="true positive rate", title=f"{title}: ROC, one against the rest")
    if left.get_legend_handles_labels()[0]:
        left.legend(title="class (AUROC)", fontsize=7, title_fontsize=7, loc="lower right")
    confidences, accuracies, counts = reliability(labels, probabilities.argmax(axis=1), probabilities)
    right.plot(confidences, accuracies, linewidth=1)
    right.scatter(confidences, accuracies, s=10 + 200 * counts / counts.sum())
    right.set(xlabel="confidence", ylabel="accuracy", title="reliability (area: number of samples)")
    for axes in (left, right):
        axes.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    _save(figure, file)


def draw_losses(file: Path, histories: Mapping[str, Sequence[tuple[float, float]]], title: str) -> None:
    """Draw training (dashed) and validation losses, {name: (training, validation) of each epoch}.

    Names that are equal up to a comma share a colour.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    colours: dict[str, str] = {}
    for name, history in histories.items():
        group = name.split(",")[0]
        label = None if group in colours else group
        colour = colours.setdefault(group, f"C{len(colours) % 10}")
        train_losses, val_losses = np.array(history).T
        axes.plot(val_losses, color=colour, linewidth=1, label=label)
        axes.plot(train_losses, color=colour, linewidth=0.6, linestyle="--")
    axes.legend(fontsize=7)
    axes.set(xlabel="epoch", ylabel="loss (validation; dashed: training)", title=title)
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    with atomic_write(file) as stream:
        figure.savefig(stream, format="png", dpi=150)

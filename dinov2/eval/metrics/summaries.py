"""Summaries of metrics: tables for the terminal as lines of text, and PNG figures.

Letters: N samples, C classes
"""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager, rc_context, rcParams
from matplotlib.figure import Figure  # not pyplot, which keeps every figure in memory until it is closed
from sklearn.metrics import roc_curve

from dinov2.eval.metrics.classification import auroc_per_class, reliability
from dinov2.utils.files import atomic_write

logger = logging.getLogger("dinov2")

MOST_LETTERS = 40  # of a name in a figure
MOST_INCHES = 40.0  # of a side of a figure
CJK_FONTS = {"Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Microsoft YaHei", "SimHei", "Hiragino Sans"}
TABLE_METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced acc.",
    "weighted_f1": "weighted F1",
    "macro_f1": "macro F1",
}
SCORES = {
    "kappa": "Cohen's kappa",
    "auroc": "AUROC",
    "log_loss": "log loss",
    "calibration_error": "calibration error",
}


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the columns of a table: the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(n) for text, n in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def percent(value: float | None, interval: Sequence[float] | None = None) -> str:
    """Format a fraction as percent, "87.3", or "87.3 (85.0-89.1)" with an interval; "-" for None."""
    if value is None:
        return "-"
    text = f"{100 * value:.1f}"
    return text + " ({:.1f}-{:.1f})".format(*(100 * end for end in interval)) if interval else text


def metrics_table(rows: Sequence[tuple[str, str, Mapping[str, Any]]], setting: str) -> list[str]:
    """Return a table in percent, with intervals and mean and spread over folds if known.

    A row is the source of features, the value of the setting and the metrics; `setting` titles the second column.
    """
    lines = [["", setting, *TABLE_METRICS.values()]]
    for source, value, metrics in rows:
        intervals = metrics.get("intervals", {})
        lines.append([source, value, *(percent(metrics[name], intervals.get(name)) for name in TABLE_METRICS)])
        if "mean_over_folds" in metrics:
            means, spreads = metrics["mean_over_folds"], metrics["sd_over_folds"]
            texts = [f"{percent(means[name])} +- {percent(spreads[name])}" for name in TABLE_METRICS]
            lines.append([f"mean of {len(metrics['folds'])} folds", "", *texts])
    return text_table(lines)


def scores_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Return a table of kappa and of the metrics of probabilities, not in percent, of rows (source, metrics)."""
    names = [name for name in SCORES if any(name in metrics for _, metrics in rows)]
    lines = [["", *(SCORES[name] for name in names)]]
    for source, metrics in rows:
        values = [metrics.get(name) for name in names]
        lines.append([source, *("-" if value is None else f"{value:.3f}" for value in values)])
    return text_table(lines)


def class_table(title: str, metrics: Mapping[str, Any], n_train: Mapping[str, int]) -> list[str]:
    """Return a table of the classes, in percent, with the number of training samples of each, if they are known."""
    lines = [[title, *(["train"] if n_train else []), "test", "recall", "precision", "F1"]]
    for name, row in metrics["per_class"].items():
        shares = [percent(row[metric]) for metric in ("recall", "precision", "f1")]
        lines.append([name, *([str(n_train[name])] if n_train else []), str(row["support"]), *shares])
    return text_table(lines)


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
    rows, columns = ([figure_text(name) for name in names] for names in (row_names, column_names))
    with _figure(file, 3.5 + 0.45 * len(columns), 2.5 + 0.45 * len(rows)) as figure:
        axes = figure.add_subplot()
        figure.colorbar(axes.imshow(values, cmap="Blues", vmin=0, vmax=1), label=scale)
        for (row, column), value in np.ndenumerate(values):
            if text := texts[row][column]:
                colour = "white" if value > 0.5 else "black"
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(len(columns)), labels=columns, rotation=45, ha="right")
        axes.set_yticks(range(len(rows)), labels=rows)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)


def draw_curves(
    file: Path, labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str], title: str
) -> None:
    """Draw the ROC curve of each class against the rest, and accuracy over confidence."""
    areas = auroc_per_class(labels, probabilities)
    with _figure(file, 11, 5) as figure:
        left, right = figure.subplots(1, 2)
        for i, (name, area) in enumerate(zip(class_names, areas, strict=True)):
            if area is not None:
                false_rate, true_rate, _ = roc_curve(labels == i, probabilities[:, i])
                left.plot(false_rate, true_rate, label=f"{area:.3f}  {figure_text(name)}", linewidth=1)
        left.set(xlabel="false positive rate", ylabel="true positive rate", title=f"{title}: ROC, one against the rest")
        if left.get_legend_handles_labels()[0]:
            left.legend(title="AUROC, class", fontsize=7, title_fontsize=7, loc="lower right")
        confidences, accuracies, counts = reliability(labels, probabilities.argmax(axis=1), probabilities)
        right.plot(confidences, accuracies, linewidth=1)
        right.scatter(confidences, accuracies, s=10 + 200 * counts / counts.sum())
        right.set(xlabel="confidence", ylabel="accuracy", title="reliability (area: number of samples)")
        for axes in (left, right):
            axes.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
            axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")


def draw_losses(file: Path, histories: Mapping[str, Sequence[tuple[float, float]]], title: str) -> None:
    """Draw training (dashed) and validation losses, {name: (training, validation) of each epoch}.

    Names that are equal up to a comma share a colour.
    """
    colours: dict[str, str] = {}
    with _figure(file, 8, 5) as figure:
        axes = figure.add_subplot()
        for name, history in histories.items():
            group = figure_text(name.split(",")[0])
            label = None if group in colours else group
            colour = colours.setdefault(group, f"C{len(colours) % 10}")
            train_losses, val_losses = np.array(history).T
            axes.plot(val_losses, color=colour, linewidth=1, label=label)
            axes.plot(train_losses, color=colour, linewidth=0.6, linestyle="--")
        axes.legend(fontsize=7)
        axes.set(xlabel="epoch", ylabel="loss (validation; dashed: training)", title=title)


def draw_risk_coverage(file: Path, measured: Mapping[str, Any], title: str) -> None:
    """Draw error over coverage, of the result of `selective_metrics`, and the error of the threshold."""
    with _figure(file, 7, 5) as figure:
        axes = figure.add_subplot()
        axes.plot(measured["curve"]["coverage"], measured["curve"]["error"], label="all tested cells")
        threshold = measured["threshold"]
        axes.axhline(threshold["wanted_error"], color="grey", linestyle=":", linewidth=1, label="wanted error")
        if threshold["error"] is not None:
            label = f"confidence {threshold['confidence']:.3f}, on the half that did not choose it"
            axes.scatter([threshold["coverage"]], [threshold["error"]], color="C1", label=label, zorder=3)
        axes.legend(fontsize=8)
        axes.set(xlabel="coverage", ylabel="error of the accepted cells", title=title, xlim=(0, 1.02), ylim=(0, None))


def draw_corruptions(file: Path, clean: float, lines: Mapping[str, Sequence[float]], title: str, ylabel: str) -> None:
    """Draw a metric over the severity of each corruption, {name: values of the severities from 1}; `clean` is at 0."""
    with _figure(file, 7, 5) as figure:
        axes = figure.add_subplot()
        for name, values in lines.items():
            axes.plot(range(len(values) + 1), [clean, *values], marker="o", markersize=3, label=name)
        axes.legend(fontsize=8)
        axes.set(xlabel="severity", ylabel=ylabel, title=title, ylim=(0, 1.02))


def figure_text(name: str) -> str:
    """Return a name as figures show it: one line of at most 40 letters, with ? for bytes that are not UTF-8."""
    text = " ".join(name.encode(errors="replace").decode().split())
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 3]}..."


@contextmanager
def _figure(file: Path, width: float, height: float) -> Iterator[Figure]:
    """Make a figure of this size in inches, and save it as a PNG after the block; `$` in names begins no formula."""
    fonts = [*rcParams["font.family"], *sorted(CJK_FONTS & set(font_manager.get_font_names()))]
    settings: Any = {"text.parse_math": False, "font.family": fonts}
    with rc_context(settings), warnings.catch_warnings(record=True) as caught, atomic_write(file) as stream:
        figure = Figure(figsize=(min(width, MOST_INCHES), min(height, MOST_INCHES)), layout="constrained")
        yield figure
        figure.savefig(stream, format="png", dpi=150)
    if any("missing from font" in str(warning.message) for warning in caught):
        logger.warning("%s: no font here has all letters of its names; install one, such as fonts-noto-cjk", file)

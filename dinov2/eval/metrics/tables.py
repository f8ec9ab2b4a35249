"""Tables of metrics for the terminal, as lines of text."""

from collections.abc import Mapping, Sequence
from typing import Any

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
    """Return a table of the classes, in percent, with the number of training samples of each."""
    lines = [[title, "train", "test", "recall", "precision", "F1"]]
    for name, row in metrics["per_class"].items():
        shares = [percent(row[metric]) for metric in ("recall", "precision", "f1")]
        lines.append([name, str(n_train[name]), str(row["support"]), *shares])
    return text_table(lines)

"""Metrics as rows of a page's tables, in percent, each number with all its digits in the page; confusion as a chart."""

from collections.abc import Mapping, Sequence
from typing import Any

from dinov2.eval.charts import matrix_chart
from dinov2.eval.pages import Markup, escape, table, valued
from dinov2.eval.results import SCORES, TABLE_METRICS, Row, mapping, number

NONE, MISSING = "–", "missing"
AS_THEY_ARE = ("log_loss",)  # no shares, hence not in percent
MOST_CLASSES = 60  # of a confusion matrix that is drawn
_CLASS_COLUMNS = {"recall": "recall", "precision": "precision", "f1": "F1", "auroc": "AUROC"}


def shown(value: Any, in_percent: bool = True) -> str:
    """A number, in percent with one decimal or with three; `NONE` for what is none."""
    if number(value) is None:
        return NONE
    return valued(value, f"{100 * value:.1f}" if in_percent else f"{value:.3f}")


def metric_cell(metrics: Mapping[str, Any], name: str) -> str:
    """A metric with its interval; `MISSING` if it is one that every result has."""
    if name not in metrics:
        return MISSING if name in TABLE_METRICS else NONE
    in_percent = name not in AS_THEY_ARE
    text = shown(metrics[name], in_percent)
    ends = Row("", "", metrics).interval(name)
    if ends is None or text == NONE:
        return text
    low, high = (shown(end, in_percent) for end in ends)
    return Markup(f"{text} ({low} to {high})")


def metric_headers() -> list[str]:
    """Of the columns of `metric_cells`."""
    return [*(f"{title}, %" for title in TABLE_METRICS.values()), *(_score_title(name) for name in SCORES)]


def metric_cells(metrics: Mapping[str, Any]) -> list[str]:
    """All metrics with their intervals."""
    return [metric_cell(metrics, metric) for metric in (*TABLE_METRICS, *SCORES)]


def _score_title(name: str) -> str:
    return SCORES[name] + ("" if name in AS_THEY_ARE else ", %")


def class_table(metrics: Mapping[str, Any], caption: str, n_train: Mapping[str, Any] | None = None) -> Markup:
    """Support, recall, precision, F1 and AUROC of each class.

    Args:
        metrics: with `per_class`.
        caption: of the table.
        n_train: {class: cells to learn from}; a column if it is given.
    """
    of_classes = {name: mapping(row) for name, row in mapping(metrics.get("per_class")).items()}
    if not of_classes:
        return Markup(f'<p class="note">{escape(caption)}: the numbers of the classes are missing.</p>')
    columns = [key for key in _CLASS_COLUMNS if key != "auroc" or any(key in row for row in of_classes.values())]
    rows = []
    for name, row in of_classes.items():
        support = number(row.get("support"))
        counts = [MISSING if support is None else valued(row["support"], f"{support:,.0f}")]
        if n_train:
            learned = number(n_train.get(name))
            counts.insert(0, NONE if learned is None else valued(n_train[name], f"{learned:,.0f}"))
        rows.append([name, *counts, *(shown(row[key]) if key in row else MISSING for key in columns)])
    headers = ["class", *(["cells to learn from"] if n_train else []), "support"]
    return table([*headers, *(f"{_CLASS_COLUMNS[key]}, %" for key in columns)], rows, caption)


def confusion_figure(confusion: Any, class_names: Sequence[str], title: str) -> str:
    """Counts [C, C] (rows are labels) as a matrix coloured by the share of the label, and as a folded table."""
    is_matrix = isinstance(confusion, list) and all(
        isinstance(row, list) and len(row) == len(confusion) and all(number(count) is not None for count in row)
        for row in confusion
    )
    if not is_matrix or len(confusion) != len(class_names) or not confusion:
        return f'<p class="note">{escape(title)}: the matrix is missing, or does not fit the classes.</p>'
    numbers = table(
        ["label", *class_names],
        [[name, *(valued(n, f"{n:,}") for n in row)] for name, row in zip(class_names, confusion, strict=True)],
        f"{title} (rows: labels; columns: predictions)",
        folded_under="Confusion in numbers",
    )
    if len(class_names) > MOST_CLASSES:
        return numbers
    shares = [[count / max(sum(row), 1) for count in row] for row in confusion]
    texts = [[str(count) if count else "" for count in row] for row in confusion]
    return matrix_chart(shares, texts, class_names, class_names, title, "prediction", "label") + numbers

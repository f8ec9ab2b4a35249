"""What an evaluation leaves behind: results.json, predictions as CSV, tables for the terminal.

The same inputs give the same bytes of results.json but for its last entry, the date: settings that only say where
results go or how fast they come are left out, and so are times.

Letters: N samples (cells, or patients), C classes
"""

import argparse
import csv
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch

import dinov2
from dinov2.data.datasets.tables import open_table
from dinov2.data.splits import Fold
from dinov2.eval.metrics import classification_metrics
from dinov2.eval.uncertainty import bootstrap_intervals
from dinov2.utils.files import atomic_write
from dinov2.utils.paths import local_path

logger = logging.getLogger("dinov2")

NOT_INPUTS = ("output_dir", "overwrite", "num_workers")
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
AVERAGED_METRICS = (*TABLE_METRICS, *SCORES)
PROBABILITY_PREFIX = "p_"
LABEL_COLUMNS = ("label", "prediction", "fold")


@dataclass(frozen=True)
class FoldPredictions:
    """What a protocol predicted, every tested sample once.

    Attributes:
        folds: training and test positions each.
        predictions: int64 [N], -1 for samples that no fold tests.
        probabilities: float64 [N, C], NaN likewise; None where the method has none.
        settings: of each fold, what was chosen and how it went, ready for JSON.
    """

    folds: list[Fold]
    predictions: np.ndarray
    probabilities: np.ndarray | None
    settings: list[dict[str, Any]]

    @property
    def tested(self) -> np.ndarray:
        """Positions of the samples that some fold tests, ascending."""
        return np.flatnonzero(self.predictions >= 0)

    @property
    def fold_of(self) -> np.ndarray:
        """Which fold tests each sample: int64 [N], -1 for none."""
        numbers = np.full(len(self.predictions), -1, dtype=np.int64)
        for number, (_, test) in enumerate(self.folds):
            numbers[test] = number
        return numbers


def summarize(
    labels: np.ndarray,
    predicted: FoldPredictions,
    class_names: Sequence[str],
    patients: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics of all tested samples together, with 95 % intervals, and of each fold.

    Args:
        labels: int64 [N].
        predicted: of the same samples.
        class_names: C names.
        patients: N patient ids, by which the intervals then go.
        seed: of the intervals.

    Returns:
        `classification_metrics` of all folds' predictions together, `intervals` (`bootstrap_intervals`) and `folds`,
        one entry each: sizes, settings, and metrics. With several folds also `mean_over_folds` and `sd_over_folds`
        (with n - 1) of each metric that all of them have.
    """
    tested = predicted.tested
    probabilities = predicted.probabilities
    of_tested = None if probabilities is None else probabilities[tested]
    together = classification_metrics(labels[tested], predicted.predictions[tested], class_names, of_tested)
    intervals = bootstrap_intervals(
        labels[tested],
        predicted.predictions[tested],
        len(class_names),
        of_tested,
        None if patients is None else [patients[i] for i in tested],
        seed=seed,
    )
    folds = []
    for (train, test), settings in zip(predicted.folds, predicted.settings, strict=True):
        metrics = classification_metrics(
            labels[test],
            predicted.predictions[test],
            class_names,
            None if probabilities is None else probabilities[test],
        )
        of_fold = {name: metrics[name] for name in AVERAGED_METRICS if name in metrics}
        folds.append({"train": len(train), "test": len(test), **settings, **of_fold})
    over_folds = {}
    if len(folds) > 1:
        known = {
            name: np.array([fold[name] for fold in folds])
            for name in AVERAGED_METRICS
            if all(fold.get(name) is not None for fold in folds)
        }
        over_folds = {
            "mean_over_folds": {name: float(values.mean()) for name, values in known.items()},
            "sd_over_folds": {name: float(values.std(ddof=1)) for name, values in known.items()},
        }
    return {**together, "intervals": intervals, **over_folds, "folds": folds}


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that results depend on, paths as text."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in NOT_INPUTS
    }


def provenance(attributes: Mapping[str, str], settings: Mapping[str, Any], hashes: Mapping[str, str]) -> dict[str, Any]:
    """The end of a report: what made it.

    Args:
        attributes: of the features file.
        settings: `settings_of`.
        hashes: {flag: sha256} of the input files.

    Returns:
        `checkpoint`, `features`, `settings`, `hashes`, `versions` and `date`.
    """
    return {
        "checkpoint": {name: attributes.get(name) for name in ("checkpoint", "checkpoint_sha256", "model")},
        "features": {name: attributes[name] for name in sorted(attributes) if name != "date"},
        "settings": dict(settings),
        "hashes": dict(hashes),
        "versions": {
            "dinov2": dinov2.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "scikit-learn": sklearn.__version__,
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_report(output_dir: Path, report: Mapping[str, Any]) -> None:
    """<output_dir>/results.json: keys in the order given; numbers that JSON does not know are an error."""
    text = json.dumps(report, indent=2, allow_nan=False)
    with atomic_write(output_dir / "results.json", "w") as file:
        file.write(text)


@dataclass(frozen=True)
class PredictionTable:
    """What `read_predictions` found: N rows of a predictions file.

    Attributes:
        keys: what each row is about: a picture's path, or a patient.
        labels, predictions: names of classes.
        patients: N patient ids, or None.
    """

    keys: list[str]
    labels: list[str]
    predictions: list[str]
    patients: list[str] | None

    def select(self, rows: Sequence[int]) -> "PredictionTable":
        """Some rows, in the order given."""
        columns = (self.keys, self.labels, self.predictions)
        keys, labels, predictions = ([column[i] for i in rows] for column in columns)
        patients = None if self.patients is None else [self.patients[i] for i in rows]
        return PredictionTable(keys, labels, predictions, patients)


def write_predictions(
    file: Path,
    keys: Sequence[str],
    labels: np.ndarray,
    predicted: FoldPredictions,
    class_names: Sequence[str],
    patients: Sequence[str] | None = None,
    key_column: str = "path",
) -> None:
    """A CSV with a row for each tested sample: key, patient (where known), label, prediction, fold and p_<class>.

    Args:
        file: the CSV.
        keys: N, what each sample is.
        labels: int64 [N], positions in `class_names`.
        predicted: of the same samples.
        class_names: C names.
        patients: N patient ids, or None.
        key_column: its name.
    """
    fold_of = predicted.fold_of
    probabilities = predicted.probabilities
    header = [key_column, *([] if patients is None else ["patient"]), *LABEL_COLUMNS]
    if probabilities is not None:
        header += [f"{PROBABILITY_PREFIX}{name}" for name in class_names]
    with atomic_write(file, "w") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        for i in predicted.tested.tolist():
            names = class_names[int(labels[i])], class_names[int(predicted.predictions[i])]
            row = [str(keys[i]), *([] if patients is None else [patients[i]]), *names, int(fold_of[i])]
            writer.writerow(row if probabilities is None else row + [f"{p:.8g}" for p in probabilities[i]])


def read_predictions(file: Path) -> PredictionTable:
    """Read what `write_predictions` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it lacks columns or rows, or a key stands twice.
    """
    file = local_path(file)
    if not file.is_file():
        raise FileNotFoundError(f"predictions: no file {str(file)!r}; linear.py and abmil.py write predictions.csv")
    table = open_table(file, "predictions")
    header = table.columns
    missing = [name for name in LABEL_COLUMNS[:2] if name not in header]
    if missing or header[0] in LABEL_COLUMNS:
        raise ValueError(
            f"predictions: {str(file)!r} has the columns {header or 'none'}; expected path or patient first, then "
            f"{', '.join(LABEL_COLUMNS)}"
        )
    rows = [row for _, row in table.records()]
    keys = [row[header[0]] for row in rows]
    if not rows or len(set(keys)) < len(keys):
        raise ValueError(f"predictions: {str(file)!r} has no rows, or one {header[0]} stands in several; give one each")
    patients = [row["patient"] for row in rows] if "patient" in header else None
    return PredictionTable(keys, [row["label"] for row in rows], [row["prediction"] for row in rows], patients)


def metrics_table(rows: Sequence[tuple[str, str, Mapping[str, Any]]], setting: str) -> list[str]:
    """Lines of a table in percent, with 95 % intervals where the metrics have them.

    Args:
        rows: source of features, value of the setting, and metrics of each row.
        setting: its title.
    """
    over_folds = {
        i: f"mean of {len(row[2]['folds'])} folds" for i, row in enumerate(rows) if "mean_over_folds" in row[2]
    }
    second = max(4, len(setting), *(len(value) for _, value, _ in rows))
    first = max([len(name) for name, _, _ in rows] + [len(title) - second - 1 for title in over_folds.values()])
    with_intervals = any("intervals" in metrics for _, _, metrics in rows)
    column = 22 if with_intervals else 15
    lines = [f"{'':{first}} {setting:>{second}}" + "".join(f"{t:>{column}}" for t in TABLE_METRICS.values())]
    for i, (name, value, metrics) in enumerate(rows):
        line = f"{name:{first}} {value:>{second}}"
        for metric in TABLE_METRICS:
            text = f"{100 * metrics[metric]:.1f}"
            if with_intervals and (interval := metrics.get("intervals", {}).get(metric)):
                text += " ({:.1f}-{:.1f})".format(*(100 * end for end in interval))
            line += f"{text:>{column}}"
        lines.append(line)
        if i in over_folds:
            means, spreads = metrics["mean_over_folds"], metrics["sd_over_folds"]
            values = [f"{100 * means[metric]:.1f} +- {100 * spreads[metric]:.1f}" for metric in TABLE_METRICS]
            lines.append(f"{over_folds[i]:>{first + 1 + second}}" + "".join(f"{text:>{column}}" for text in values))
    return lines


def scores_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Lines of a table of kappa and of the metrics of probabilities, as they are.

    Args:
        rows: source of features, and metrics of each row.
    """
    names = [name for name in SCORES if any(name in metrics for _, metrics in rows)]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':{width}}" + "".join(f"{SCORES[name]:>19}" for name in names)]
    for source, metrics in rows:
        values = [metrics.get(name) for name in names]
        lines.append(f"{source:{width}}" + "".join(f"{'-' if v is None else f'{v:.3f}':>19}" for v in values))
    return lines


def class_table(title: str, metrics: Mapping[str, Any], n_train: Mapping[str, int]) -> list[str]:
    """Lines of a table of the classes, in percent.

    Args:
        title: over the names of the classes.
        metrics: with `per_class`.
        n_train: {class: number of training cells}.
    """
    width = max(map(len, [title, *metrics["per_class"]]))
    lines = [f"{title:{width}}   train    test  recall  precision      F1"]
    for name, row in metrics["per_class"].items():
        recall = "-" if row["recall"] is None else f"{100 * row['recall']:.1f}"
        lines.append(
            f"{name:{width}} {n_train[name]:7} {row['support']:7} {recall:>7} {100 * row['precision']:10.1f} "
            f"{100 * row['f1']:7.1f}"
        )
    return lines

"""Results of evaluations: results.json and predictions.csv are written and read here.

Equal inputs give equal bytes of results.json except for its last entry, the date. A results.json of another version
is read as far as possible: a note names what is unknown, and what is missing stays missing.

Letters: N samples (cells or patients), C classes
"""

import argparse
import csv
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import sklearn
import torch

import dinov2
from dinov2.data.datasets.tables import open_table
from dinov2.data.splits import Fold
from dinov2.eval.metrics import bootstrap_intervals, classification_metrics
from dinov2.eval.metrics.summaries import SCORES, TABLE_METRICS
from dinov2.utils.files import atomic_write, check_regular_file, local_path

RESULTS_NAME = "results.json"
MODEL = "model"  # the source of features that a results.json is about; other sources are baselines
AVERAGED_METRICS = (*TABLE_METRICS, *SCORES)
PROBABILITY_PREFIX = "p_"
LARGEST = 1e150  # number in a results.json, so that products are finite
LABEL_COLUMNS = ("label", "prediction", "fold")
NOT_INPUTS = ("output_dir", "overwrite", "num_workers")

_KNOWN_FIELDS = {
    *("protocol", "results", "few_shot", "class_names", "counts", "split", "patients_kept_apart", "kinds", "kind"),
    *("files", "checkpoint", "features", "settings", "hashes", "versions", "date", "left_out", "training"),
    *("aggregator", "iteration", "datasets", "teacher", "trust", "retrieval", "deletion"),
}
_KNOWN_METRICS = {*AVERAGED_METRICS, "per_class", "confusion", "intervals", "mean_over_folds", "sd_over_folds", "folds"}


@dataclass(frozen=True)
class FoldPredictions:
    """Predictions of a protocol, one for each tested sample."""

    folds: list[Fold]
    predictions: np.ndarray  # int64 [N], -1 for samples that no fold tests
    probabilities: np.ndarray | None  # float64 [N, C], NaN for samples that no fold tests
    settings: list[dict[str, Any]]  # of each fold's training: what was chosen and how it ended, ready for JSON

    @property
    def tested(self) -> np.ndarray:
        """Positions of the samples that some fold tests, ascending."""
        return np.flatnonzero(self.predictions >= 0)

    @property
    def fold_of(self) -> np.ndarray:
        """Number of the fold that tests each sample, int64 [N]; -1 for none."""
        numbers = np.full(len(self.predictions), -1, dtype=np.int64)
        for number, (_, test) in enumerate(self.folds):
            numbers[test] = number
        return numbers

    def metrics(self, labels: np.ndarray, class_names: Sequence[str], positions: np.ndarray) -> dict[str, Any]:
        """Compute `classification_metrics` of the samples at some positions."""
        probabilities = None if self.probabilities is None else self.probabilities[positions]
        return classification_metrics(labels[positions], self.predictions[positions], class_names, probabilities)


def summarize(
    labels: np.ndarray,
    predicted: FoldPredictions,
    class_names: Sequence[str],
    patients: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute metrics of all tested samples, with 95 % intervals, and of each fold.

    Returns:
        `classification_metrics` of the predictions of all folds, `intervals` (`bootstrap_intervals`, which draws
        patients if they are given) and `folds`: the sizes, settings and metrics of each. With several folds also
        `mean_over_folds` and `sd_over_folds` (with n - 1) of each metric that all of them have.
    """
    tested = predicted.tested
    intervals = bootstrap_intervals(
        labels[tested],
        predicted.predictions[tested],
        len(class_names),
        None if predicted.probabilities is None else predicted.probabilities[tested],
        None if patients is None else [patients[i] for i in tested],
        seed=seed,
    )
    folds = []
    for (train, test), settings in zip(predicted.folds, predicted.settings, strict=True):
        metrics = predicted.metrics(labels, class_names, test)
        averages = {name: metrics[name] for name in AVERAGED_METRICS if name in metrics}
        folds.append({"train": len(train), "test": len(test), **settings, **averages})
    over_folds = {}
    if len(folds) > 1:
        known = pd.DataFrame(folds, columns=AVERAGED_METRICS).dropna(axis="columns")  # metrics that all folds have
        over_folds = {"mean_over_folds": known.mean().to_dict(), "sd_over_folds": known.std().to_dict()}
    return {**predicted.metrics(labels, class_names, tested), "intervals": intervals, **over_folds, "folds": folds}


@dataclass(frozen=True)
class PredictionTable:
    """The N rows of a predictions.csv; labels and predictions are names of classes."""

    keys: list[str]
    labels: list[str] | None
    predictions: list[str]
    patients: list[str] | None
    key_column: str = "path"  # or "patient"
    class_names: Sequence[str] = ()
    probabilities: np.ndarray | None = None  # float64 [N, C]


def write_csv(file: Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV; floats get eight significant digits."""
    with atomic_write(file, "w") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([f"{value:.8g}" if isinstance(value, float) else value for value in row] for row in rows)


def write_predictions(
    file: Path,
    keys: Sequence[str],
    labels: np.ndarray | None,
    predicted: FoldPredictions,
    class_names: Sequence[str],
    patients: Sequence[str] | None = None,
    key_column: str = "path",
    label_names: Sequence[str] | None = None,
) -> None:
    """Write a CSV with a row for each tested sample: key, patient and label (if known), prediction, fold, p_<class>.

    Labels are positions in `label_names`, if these are given, else in `class_names`.
    """
    tested = predicted.tested.tolist()
    columns: dict[str, list[Any]] = {key_column: [str(keys[i]) for i in tested]}
    if patients is not None:
        columns["patient"] = [patients[i] for i in tested]
    if labels is not None:
        names = class_names if label_names is None else label_names
        columns["label"] = [names[labels[i]] for i in tested]
    columns["prediction"] = [class_names[predicted.predictions[i]] for i in tested]
    columns["fold"] = predicted.fold_of[tested].tolist()
    if predicted.probabilities is not None:
        for name, of_class in zip(class_names, predicted.probabilities[tested].T.tolist(), strict=True):
            columns[f"{PROBABILITY_PREFIX}{name}"] = of_class
    write_csv(file, list(columns), zip(*columns.values(), strict=True))


def read_predictions(file: Path) -> PredictionTable:
    """Read what `write_predictions` wrote; ValueError for another table, FileNotFoundError without a file."""
    file = local_path(file)
    table = open_table(file, "predictions")
    header = table.columns
    if "prediction" not in header or header[0] in LABEL_COLUMNS:
        raise ValueError(
            f"predictions: {str(file)!r} has the columns {header or 'none'}; expected path or patient first, then "
            f"{', '.join(LABEL_COLUMNS)}"
        )
    columns = pd.DataFrame([values for _, values in table.rows()], columns=header)
    keys = columns[header[0]]
    if keys.empty or keys.duplicated().any():
        raise ValueError(f"predictions: {str(file)!r} has no rows, or one {header[0]} stands in several; give one each")
    of_classes = [name for name in header if name.startswith(PROBABILITY_PREFIX)]
    try:
        probabilities = columns[of_classes].replace("", "nan").to_numpy(dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"predictions: {str(file)!r} has a probability that is no number ({error})") from error
    return PredictionTable(
        keys.tolist(),
        columns["label"].tolist() if "label" in columns else None,
        columns["prediction"].tolist(),
        columns["patient"].tolist() if "patient" in columns else None,
        header[0],
        [name.removeprefix(PROBABILITY_PREFIX) for name in of_classes],
        probabilities if of_classes else None,
    )


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that results depend on, paths as text."""
    settings = {name: value for name, value in vars(args).items() if name not in NOT_INPUTS}
    return {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}


def provenance(attributes: Mapping[str, str], settings: Mapping[str, Any], hashes: Mapping[str, str]) -> dict[str, Any]:
    """Return the last entries of a report, from the features' attributes, the settings and {flag: sha256} of files."""
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
    """Write <output_dir>/results.json, keys in the order given; NaN and infinity are errors, as JSON lacks them."""
    text = json.dumps(report, indent=2, allow_nan=False)
    with atomic_write(output_dir / RESULTS_NAME, "w") as file:
        file.write(text)


def read_report(file: Path) -> dict[str, Any]:
    """Read the content of a results.json; ValueError if it holds no JSON object. NaN and infinity become None."""
    try:
        text = check_regular_file(file, "results").read_text(encoding="utf-8")
        report = json.loads(text, parse_constant=number, parse_float=lambda digits: number(float(digits)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is not readable as JSON ({error}); run its evaluation again") from error
    if not isinstance(report, dict):
        raise ValueError(f"{str(file)!r} holds a {type(report).__name__}, no JSON object; give a results.json")
    return report


@dataclass(frozen=True)
class Row:
    """Metrics of one method on one source of features, as results.json has them."""

    method: str  # its name in evaluate.py: `knn_20`, `knn-dino_20`, `linear-sweep`, `abmil classwise`
    source: str  # `model`, or a baseline's name
    metrics: Mapping[str, Any]
    predictions: Path | None = None  # the CSV, if the protocol writes one

    @property
    def classes(self) -> dict[str, Mapping[str, Any]]:
        """{class: its metrics}."""
        per_class = mapping(self.metrics.get("per_class"))
        return {name: metrics for name, metrics in per_class.items() if isinstance(metrics, Mapping)}

    @property
    def n_tested(self) -> int | None:
        """Number of tested cells (or patients)."""
        supports = [support for row in self.classes.values() if (support := number(row.get("support"))) is not None]
        return round(sum(supports)) if supports and len(supports) == len(self.classes) else None

    def interval(self, metric: str) -> tuple[float, float] | None:
        """Return the ends of a metric's 95 % interval."""
        return interval_ends(mapping(self.metrics.get("intervals")).get(metric))

    @cached_property
    def table(self) -> PredictionTable | None:
        """The predictions, if their file exists and is readable."""
        try:
            return None if self.predictions is None else read_predictions(self.predictions)
        except (FileNotFoundError, ValueError):
            return None


@dataclass(frozen=True)
class ResultRecord:
    """One results.json."""

    name: str
    path: Path
    report: Mapping[str, Any]  # the file's content
    rows: list[Row]  # everything that has metrics
    notes: list[str]  # unknown and missing parts, in words
    parts: dict[str, "ResultRecord"] = field(default_factory=dict)  # {folder: result of one of all protocols}

    @property
    def protocol(self) -> str:
        return str(self.report.get("protocol", "unknown"))

    @property
    def encoder(self) -> str:
        """Model and file that made the features."""
        settings, checkpoint = mapping(self.report.get("settings")), mapping(self.report.get("checkpoint"))
        model = checkpoint.get("model") or settings.get("encoder")
        source = checkpoint.get("checkpoint") or settings.get("checkpoint")
        digest = checkpoint.get("checkpoint_sha256")
        known = [str(part) for part in (model, source) if part]
        return ", ".join(known) or (f"checkpoint {str(digest)[:12]}" if digest else "not stated")

    def folders(self, protocol: str) -> list[Path]:
        """Return the folders with results of a protocol, of this record or its parts."""
        own = [self.path.parent] if self.protocol.partition(",")[0] == protocol else []
        return own + [folder for part in self.parts.values() for folder in part.folders(protocol)]


def mapping(value: Any) -> Mapping[str, Any]:
    """Return the value if it is a mapping, otherwise an empty one."""
    return value if isinstance(value, Mapping) else {}


def mappings(value: Any) -> Mapping[str, Mapping[str, Any]]:
    """Return a mapping of mappings; what is none becomes an empty one."""
    return {key: mapping(inner) for key, inner in mapping(value).items()}


def sequence(value: Any) -> Sequence[Any]:
    """Return the value if it is a list, otherwise an empty one."""
    return value if isinstance(value, list) else []


def number(value: Any) -> float | None:
    """Return the value if it is a finite number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < LARGEST else None  # false for NaN


def interval_ends(value: Any) -> tuple[float, float] | None:
    """Return the value if it is a list of two numbers."""
    known = [end for end in map(number, sequence(value)) if end is not None]
    return (known[0], known[1]) if len(known) == 2 else None


def read_result(file: Path, name: str) -> ResultRecord:
    """Read a results.json; for the result of all protocols, read also those in the folders beside it."""
    report = read_report(file)
    parts = {}
    if report.get("protocol") == "all":
        for below in sorted(file.parent.glob(f"*/{RESULTS_NAME}")):
            parts[below.parent.name] = read_result(below, f"{name}, {below.parent.name}")
    rows = list(_rows_of(report, file.parent))
    return ResultRecord(name, file, report, rows, _notes_of(report, rows), parts)


def _notes_of(report: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    notes = []
    written_by = mapping(report.get("versions")).get("dinov2")
    if written_by is None:
        notes.append("it does not say which version wrote it")
    elif written_by != dinov2.__version__:
        notes.append(f"version {written_by} wrote it, this report is made by {dinov2.__version__}")
    if unknown := sorted(set(report) - _KNOWN_FIELDS):
        notes.append(f"fields that this version does not know are left out: {', '.join(unknown)}")
    needed = () if "datasets" in report else ("protocol", "results", "class_names")  # training writes `datasets` alone
    if missing := [key for key in needed if key not in report]:
        notes.append(f"missing: {', '.join(missing)}")
    if unknown := sorted({key for row in rows for key in row.metrics} - _KNOWN_METRICS):
        notes.append(f"metrics that this version does not know are left out: {', '.join(unknown)}")
    return notes


def _rows_of(report: Mapping[str, Any], folder: Path) -> Iterator[Row]:
    """Yield everything with metrics but the matrix of data sets, which is no list of methods."""
    protocol = str(report.get("protocol"))
    variant = mapping(report.get("settings")).get("protocol", "dinobloom")
    name = protocol if variant == "dinobloom" else f"{protocol}-{variant}"
    results = mapping(report.get("results")) or mapping(report.get("datasets"))
    for path, metrics in _metrics_below(results):
        match [protocol, *path]:
            case ["all", method, source]:
                part, _, k = method.partition("_")
                title = "abmil classwise" if method == "abmil" else method
                yield Row(title, source, metrics, predictions_file(folder / part, source, f"knn_{k}" if k else ""))
            case ["knn", source, row]:
                yield Row(f"{name}_{row.rpartition('_')[2]}", source, metrics, predictions_file(folder, source, row))
            case ["trust", source, _]:
                yield Row("linear", source, metrics, predictions_file(folder, source))
            case ["finetune", source, row]:
                yield Row(row.replace("_", "-"), source, metrics, predictions_file(folder, source))
            case ["linear", source, _]:
                yield Row(name, source, metrics, predictions_file(folder, source))
            case ["abmil", row, "together"] if "fits" in results[row]:  # pooled vectors of patients
                yield Row(row, MODEL, metrics, predictions_file(folder, row))
            case ["abmil" | "abmil, applied", model, "together"]:
                method = f"abmil {model}" + ("" if protocol == "abmil" else " applied")
                yield Row(method, MODEL, metrics, predictions_file(folder, MODEL))
            case ["abmil" | "abmil, applied" | "cross", *_]:
                continue
            case ["finetune, applied", method]:
                # with cells that the network has seen, the metrics are of fewer cells than the predictions
                has_seen = mapping(report.get("counts")).get("seen_in_training")
                yield Row(method, MODEL, metrics, None if has_seen else predictions_file(folder, MODEL))
            case _:
                yield Row(" ".join(path), MODEL, metrics)


def _metrics_below(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield (keys, metrics) of each mapping that has a metric, from the outside inwards."""
    if any(metric in mapping(value) for metric in AVERAGED_METRICS):
        yield path, value
        return
    for key, inner in mapping(value).items():
        yield from _metrics_below(inner, (*path, key))


def predictions_file(folder: Path, source: str, row: str = "") -> Path:
    """Return the file with the predictions of a source of features, and of a row if a protocol has several."""
    words = ["predictions", "" if source == MODEL else source, row]
    return folder / f"{'_'.join(filter(None, words))}.csv"

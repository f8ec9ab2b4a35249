"""Results of evaluations, read for a report: every protocol's results.json as rows of metrics, and what they stand on.

A results.json of another version is read as far as it is understood: what is unknown is named in a note, and what is
missing stays missing.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import dinov2
from dinov2.eval.compare import compare_tables
from dinov2.eval.results import AVERAGED_METRICS, PredictionTable, read_predictions
from dinov2.hub.backbones import file_sha256

RESULTS_NAME = "results.json"
MODEL = "model"  # the source of features that a results.json is about; others are baselines
_KNOWN_FIELDS = {
    *("protocol", "results", "few_shot", "class_names", "counts", "split", "patients_kept_apart", "kinds", "kind"),
    *("files", "checkpoint", "features", "settings", "hashes", "versions", "date", "left_out", "training"),
    *("aggregator", "iteration", "datasets", "teacher"),
}
_KNOWN_METRICS = {
    *AVERAGED_METRICS,
    *("per_class", "confusion", "intervals", "mean_over_folds", "sd_over_folds", "folds"),
}
# What a setting may differ in without another way to judge: where cells, features and networks come from, and how fast
_INPUTS = {
    *("checkpoint", "encoder", "encoder_weights", "data", "train", "test", "features", "test_features", "bags"),
    *("test_bags", "labels", "batch_size", "device", "protocols", "patient_labels", "split", "fold_files", "baseline"),
    *("few_shot", "repeats", "top_cells", "kinds", "apply"),
}
_ALL_PROTOCOLS = {  # protocol and its `--protocol` -> what evaluate.py calls it
    ("knn", "dinobloom"): "knn",
    ("knn", "dino"): "knn-dino",
    ("linear", "dinobloom"): "linear",
    ("linear", "sweep"): "linear-sweep",
    ("linear", "sgd"): "linear-sgd",
}


@dataclass(frozen=True)
class Row:
    """Metrics of one method on one source of features.

    Attributes:
        method: as evaluate.py names it: `knn_20`, `knn-dino_20`, `linear-sweep`, `abmil classwise`.
        source: of the features: `model`, or a baseline's name.
        metrics: as they stand in results.json.
        predictions: the CSV with what was predicted; None where there is none of its own.
    """

    method: str
    source: str
    metrics: Mapping[str, Any]
    predictions: Path | None = None

    @property
    def classes(self) -> dict[str, Mapping[str, Any]]:
        """{class: its metrics}."""
        of_classes = mapping(self.metrics.get("per_class"))
        return {name: row for name, row in of_classes.items() if isinstance(row, Mapping)}

    @property
    def n_tested(self) -> int | None:
        """Cells (or patients) that were judged."""
        supports = [number(row.get("support")) for row in self.classes.values()]
        return None if not supports or None in supports else round(sum(value or 0 for value in supports))

    def interval(self, metric: str) -> tuple[float, float] | None:
        """Ends of a metric's 95 % interval."""
        ends = mapping(self.metrics.get("intervals")).get(metric)
        if not isinstance(ends, (list, tuple)) or len(ends) != 2:
            return None
        low, high = (number(end) for end in ends)
        return None if low is None or high is None else (low, high)

    @cached_property
    def table(self) -> PredictionTable | None:
        """The predictions, if their file is there and readable."""
        if self.predictions is None or not self.predictions.is_file():
            return None
        try:
            return read_predictions(self.predictions)
        except ValueError:
            return None

    @cached_property
    def cells(self) -> str | None:
        """A digest of what was judged: keys, counted from their common folder, and labels; None if unknown."""
        if self.table is None:
            return None
        return _digest(list(zip(_below_common(self.table.keys), self.table.labels, strict=True)))

    @cached_property
    def split(self) -> str | None:
        """A digest of the split; None if unknown."""
        return None if self.predictions is None else _split_digest(self.predictions.parent)


@dataclass(frozen=True)
class ResultRecord:
    """One results.json.

    Attributes:
        name: for the report.
        path: the file.
        report: its content.
        rows: all that has metrics.
        notes: what is unknown or missing, in words.
        parts: results of the single protocols below, where this is that of all.
    """

    name: str
    path: Path
    report: Mapping[str, Any]
    rows: list[Row]
    notes: list[str]
    parts: dict[str, "ResultRecord"] = field(default_factory=dict)

    @property
    def protocol(self) -> str:
        return str(self.report.get("protocol", "unknown"))

    @property
    def encoder(self) -> str:
        """What made the features, in few words."""
        settings, checkpoint = mapping(self.report.get("settings")), mapping(self.report.get("checkpoint"))
        model = checkpoint.get("model") or settings.get("encoder")
        source = checkpoint.get("checkpoint") or settings.get("checkpoint")
        known = [str(part) for part in (model, source) if part]
        digest = checkpoint.get("checkpoint_sha256")
        return ", ".join(known) or (f"checkpoint {str(digest)[:12]}" if digest else "not stated")

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that decide how cells are judged."""
        return {name: value for name, value in mapping(self.report.get("settings")).items() if name not in _INPUTS}

    def folders(self, protocol: str) -> list[Path]:
        """Folders of results of a protocol, of this record or its parts."""
        own = [self.path.parent] if self.protocol.partition(",")[0] == protocol else []
        return own + [folder for part in self.parts.values() for folder in part.folders(protocol)]


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a mapping, otherwise an empty one."""
    return value if isinstance(value, Mapping) else {}


def number(value: Any) -> float | None:
    """The value if it is a finite number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def read_result(file: Path, name: str) -> ResultRecord:
    """Read a results.json, and those of single protocols in the folders beside it if it is that of all.

    Raises:
        ValueError: if it is no JSON object.
    """
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is not readable as JSON ({error}); run its evaluation again") from error
    if not isinstance(report, dict):
        raise ValueError(f"{str(file)!r} holds a {type(report).__name__}, no JSON object; give a results.json")
    parts = {}
    if report.get("protocol") == "all":
        for below in sorted(file.parent.glob(f"*/{RESULTS_NAME}")):
            parts[below.parent.name] = read_result(below, f"{name}, {below.parent.name}")
    rows, notes = list(_rows_of(report, file.parent)), _notes_of(report)
    unknown = sorted({key for row in rows for key in row.metrics} - _KNOWN_METRICS)
    if unknown:
        notes.append(f"metrics that this version does not know are left out: {', '.join(unknown)}")
    return ResultRecord(name, file, report, rows, notes, parts)


def _notes_of(report: Mapping[str, Any]) -> list[str]:
    notes = []
    written_by = mapping(report.get("versions")).get("dinov2")
    if written_by is None:
        notes.append("it does not say which version wrote it")
    elif written_by != dinov2.__version__:
        notes.append(f"version {written_by} wrote it, this report is made by {dinov2.__version__}")
    unknown = sorted(set(report) - _KNOWN_FIELDS)
    if unknown:
        notes.append(f"fields that this version does not know are left out: {', '.join(unknown)}")
    is_of_training = "datasets" in report
    missing = [key for key in ("protocol", "results", "class_names") if key not in report and not is_of_training]
    if missing:
        notes.append(f"missing: {', '.join(missing)}")
    return notes


def _rows_of(report: Mapping[str, Any], folder: Path) -> Iterator[Row]:
    protocol, results = report.get("protocol"), mapping(report.get("results"))
    if protocol == "all":
        for method, by_source in results.items():
            part, _, k = method.partition("_")
            own = {"knn": f"knn_{k}", "knn-dino": f"knn_{k}"}.get(part)
            shown = "abmil classwise" if method == "abmil" else method
            for source, metrics in mapping(by_source).items():
                yield from _row(shown, source, metrics, folder / part, own)
    elif protocol in ("knn", "linear"):
        name = _ALL_PROTOCOLS.get((protocol, mapping(report.get("settings")).get("protocol", "dinobloom")), protocol)
        for source, by_row in results.items():
            for row, metrics in mapping(by_row).items():
                method = f"{name}_{row.rpartition('_')[2]}" if protocol == "knn" else name
                yield from _row(method, source, metrics, folder, row if protocol == "knn" else None)
    elif isinstance(protocol, str) and protocol.startswith("abmil"):
        for model, of_model in results.items():
            method = f"abmil {model}" + (" applied" if protocol != "abmil" else "")
            yield from _row(method, MODEL, mapping(of_model).get("together"), folder, None)
    elif protocol != "cross":
        yield from _found_rows(results or mapping(report.get("datasets")), "")


def _row(method: str, source: str, metrics: Any, folder: Path, own: str | None) -> Iterator[Row]:
    if isinstance(metrics, Mapping):
        words = ["predictions", *([] if source == MODEL else [source]), *([own] if own else [])]
        yield Row(method, source, metrics, folder / f"{'_'.join(words)}.csv")


def _found_rows(results: Mapping[str, Any], name: str) -> Iterator[Row]:
    """Rows of a protocol that is unknown here: whatever has metrics."""
    for key, value in results.items():
        if not isinstance(value, Mapping):
            continue
        own = f"{name} {key}".strip()
        if any(metric in value for metric in AVERAGED_METRICS):
            yield Row(own, MODEL, value)
        else:
            yield from _found_rows(value, own)


def compare_rows(first: Row, second: Row) -> dict[str, Any] | None:
    """`compare_tables` of their predictions; None where there are none, or of other cells."""
    if first.table is None or second.table is None:
        return None
    try:
        return compare_tables(first.table, second.table)
    except ValueError:
        return None


def _below_common(keys: list[str]) -> list[str]:
    """Paths as they go on from their common folder, so that data may lie elsewhere; other keys as they are."""
    if len(keys) < 2 or not all(os.path.isabs(key) for key in keys):
        return keys
    common = os.path.commonpath(keys)
    return [os.path.relpath(key, common) for key in keys]


def _digest(rows: list[tuple[str, ...]]) -> str:
    text = "\n".join("\0".join(row) for row in sorted(rows))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _split_digest(folder: Path) -> str | None:
    for name in ("split.csv", "folds.csv"):
        file = folder / name
        if file.is_file():
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
            if name == "folds.csv":
                return _digest([(line,) for line in lines])
            paths, sides = zip(*(line.rpartition(",")[::2] for line in lines), strict=True) if lines else ((), ())
            keys = [path.strip('"').replace('""', '"') for path in paths]
            return _digest(list(zip(_below_common(keys), sides, strict=True)))
    return None


def predictions_belong(record: ResultRecord, row: Row) -> bool:
    """Whether a row's predictions are those that its results.json was written with, as far as it tells."""
    if row.predictions is None or not row.predictions.is_file():
        return False
    owner = record.parts.get(row.predictions.parent.name, record)
    digest = mapping(owner.report.get("files")).get(row.predictions.name)
    return digest is None or digest == file_sha256(row.predictions)

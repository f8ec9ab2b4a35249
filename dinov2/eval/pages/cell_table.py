"""The table of what is known of each cell beside its features, by which the explorer colours, filters and exports.

Text columns hold "" and number columns NaN where a value is not known.

Letters: N cells, C classes
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dinov2.data.datasets.tables import open_table
from dinov2.eval.features import Features
from dinov2.eval.features.join import check_same_network
from dinov2.eval.results import PROBABILITY_PREFIX, PredictionTable

MAX_PROBABILITIES = 32  # classes whose probabilities are columns of their own
MAX_NUMBERS_AS_NAMES = 12  # a column with as few different numbers is one of names, such as grades


def cell_table(
    features: Features,
    data_sets: Sequence[str] | None = None,
    predictions: PredictionTable | None = None,
    columns: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Collect the columns of N cells: class, patient, data set, predictions and further ones.

    A further column whose name another source has already is left out.
    """
    table = pd.DataFrame({"label": np.array(features.class_names, dtype=object)[features.labels]})
    if features.patients is not None:
        table["patient"] = features.patients
    if data_sets is not None:
        table["data_set"] = list(data_sets)
    if predictions is not None:
        table = table.join(prediction_columns(features, predictions))
    return table if columns is None else table.join(columns.drop(columns=table.columns, errors="ignore"))


def prediction_columns(features: Features, predictions: PredictionTable) -> pd.DataFrame:
    """Return predicted class, right or wrong, and probabilities (of the predicted class, of the label, of each class).

    Raises:
        ValueError: if no cell has a prediction.
    """
    is_by_path = predictions.key_column == "path"
    keys = features.paths if is_by_path else features.patients or [""] * len(features)
    rows = pd.Index(predictions.keys).get_indexer(keys)  # [N], -1 for cells without a prediction
    is_known = rows >= 0
    if not is_known.any():
        raise ValueError(
            f"predictions: none of the {len(predictions.keys)} is for a cell of the features (by "
            f"{predictions.key_column}, for instance {predictions.keys[0]!r}); give the predictions of these features"
        )

    def of_cells(values: Any, unknown: Any) -> np.ndarray:
        return np.where(is_known, np.asarray(values)[rows], unknown)

    table = pd.DataFrame({"prediction": of_cells(np.array(predictions.predictions, dtype=object), "")})
    labels = None
    if predictions.labels is not None:
        labels = of_cells(np.array(predictions.labels, dtype=object), "")
    elif is_by_path:  # a patient's label is not the class of the cell
        labels = np.array(features.class_names, dtype=object)[features.labels]
    if labels is not None:
        table["right"] = np.where(is_known, np.where(table["prediction"] == labels, "right", "wrong"), "")
    if predictions.probabilities is None:
        return table
    names = pd.Index(predictions.class_names)
    for column, classes in (("probability", table["prediction"]), ("label_probability", labels)):
        at = np.full(len(rows), -1) if classes is None else names.get_indexer(classes)
        if (at >= 0).any():
            table[column] = np.where(is_known & (at >= 0), predictions.probabilities[rows, at], np.nan)
    if len(names) <= MAX_PROBABILITIES:
        for name, of_class in zip(names, predictions.probabilities.T, strict=True):
            table[PROBABILITY_PREFIX + name] = of_cells(of_class, np.nan)
    return table


def read_columns(file: Path, paths: Sequence[str]) -> pd.DataFrame:
    """Read further columns from a CSV whose first column is the image's path, absolute or from the CSV's folder.

    A column with more than 12 different numbers is a number column, every other a text column. Columns called
    `patient`, `data_set` and `prediction` stand for what the cells are not otherwise known to have.

    Args:
        file: the CSV.
        paths: N images.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file, or names none of the images.
    """
    source = open_table(file, "columns")
    table = pd.DataFrame([values for _, values in source.rows()], columns=source.columns, dtype=object)
    table = table.set_index(source.columns[0])
    absolute = table.set_axis([os.path.abspath(file.parent / path) for path in table.index])
    table = pd.concat([table, absolute])
    table = table[~table.index.duplicated()].reindex(paths).reset_index(drop=True)
    if table.isna().all(axis=None):  # also without any column
        raise ValueError(
            f"columns: {str(file)!r} has the columns {', '.join(source.columns)}, and no row for an image of the "
            f"features; expected image paths in the first column, and others beside it"
        )
    return table.fillna("").apply(_as_numbers)


def _as_numbers(values: "pd.Series[Any]") -> "pd.Series[Any]":
    """Convert a text column to numbers if it holds more than a few different ones, and nothing else."""
    try:
        numbers = values.replace("", "nan").astype(float)
    except ValueError:
        return values
    is_scale = np.isfinite(numbers.dropna()).all() and numbers.nunique() > MAX_NUMBERS_AS_NAMES
    return numbers if is_scale else values


def join_sets(sets: Mapping[str, Features]) -> tuple[Features, list[str] | None]:
    """Join {name: features} of one network and kind; return also the name of each cell's set (None for one set alone).

    A patient id that several sets use gets the set's name behind it: these are different people.

    Raises:
        ValueError: if they are of different networks.
    """
    first, *others = sets.values()
    if not others:
        return first, None
    for other in others:
        check_same_network(first, other)
    class_names = list(dict.fromkeys(name for cells in sets.values() for name in cells.class_names))
    labels = [class_names.index(cells.class_names[i]) for cells in sets.values() for i in cells.labels]
    n_sets = Counter(patient for cells in sets.values() for patient in set(cells.patients or []))
    patients = [
        f"{patient} ({name})" if patient and n_sets[patient] > 1 else patient
        for name, cells in sets.items()
        for patient in cells.patients or [""] * len(cells)
    ]
    joined = replace(
        first,
        features=np.concatenate([cells.features for cells in sets.values()]),
        labels=np.array(labels, dtype=np.int64),
        class_names=class_names,
        paths=[path for cells in sets.values() for path in cells.paths],
        patients=patients if any(patients) else None,
        others={},
    )
    return joined, [name for name, cells in sets.items() for _ in cells.paths]

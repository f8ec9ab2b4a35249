"""The table of what is known of each cell beside its features, by which the explorer colours, filters and exports.

Text columns hold "" and number columns NaN where a value is not known.

Letters: N cells, C classes
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from dinov2.data.datasets.tables import open_table
from dinov2.eval.cell_sets import check_same_network
from dinov2.eval.features import Features
from dinov2.eval.results import PROBABILITY_PREFIX

PathLike = str | os.PathLike[str]

MAX_PROBABILITIES = 32  # classes whose probabilities are columns of their own
MAX_NUMBERS_AS_NAMES = 12  # a column with as few different numbers is one of names, such as grades


def cell_table(
    features: Features,
    data_sets: Sequence[str] | None = None,
    predictions: pd.DataFrame | None = None,
    columns: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Collect the columns of N cells: class, patient, data set, predictions and further ones.

    Args:
        features: N cells.
        data_sets: N names.
        predictions: as `read_cell_predictions` returns them.
        columns: N rows; a column whose name another source has already is left out.
    """
    table = pd.DataFrame({"label": np.array(features.class_names, dtype=object)[features.labels]})
    if features.patients is not None:
        table["patient"] = features.patients
    if data_sets is not None:
        table["data_set"] = list(data_sets)
    if predictions is not None:
        table = table.join(prediction_columns(features, predictions))
    return table if columns is None else table.join(columns.drop(columns=table.columns, errors="ignore"))


def read_cell_predictions(path: PathLike) -> pd.DataFrame:
    """Read the predictions.csv that knn.py, linear.py or abmil.py wrote: one row per image path or per patient.

    Args:
        path: of the file, or of its folder.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file.
    """
    file = Path(path)
    file = file / "predictions.csv" if file.is_dir() else file
    table = _read_table(file, "predictions")
    if table.index.name not in ("path", "patient") or "prediction" not in table:
        raise ValueError(
            f"predictions: {str(file)!r} has the columns {', '.join([str(table.index.name), *table])}; expected "
            f"`path` or `patient` first, and `prediction`"
        )
    probabilities = [name for name in table if name.startswith(PROBABILITY_PREFIX)]
    try:
        return table.astype(dict.fromkeys(probabilities, float))
    except ValueError as error:
        raise ValueError(f"predictions: {str(file)!r} has a probability that is no number ({error})") from error


def prediction_columns(features: Features, predictions: pd.DataFrame) -> pd.DataFrame:
    """Return predicted class, right or wrong, and probabilities (of the predicted class, of the label, of each class).

    Raises:
        ValueError: if no cell has a prediction.
    """
    is_by_path = predictions.index.name == "path"
    keys = features.paths if is_by_path else features.patients or [""] * len(features)
    of_cells = predictions[~predictions.index.duplicated(keep="last")].reindex(keys).reset_index(drop=True)
    is_known = of_cells["prediction"].notna()
    if not is_known.any():
        raise ValueError(
            f"predictions: none of the {len(predictions)} is for a cell of the features (by {predictions.index.name}, "
            f"for instance {predictions.index[0]!r}); give the predictions made from these features"
        )
    predicted = of_cells["prediction"].fillna("")
    labels = of_cells.get("label", pd.Series("", of_cells.index)).fillna("")
    if is_by_path:  # a patient's label is not the class of the cell
        labels = labels.where(labels != "", [features.class_names[i] for i in features.labels])
    columns = {"prediction": predicted}
    if (labels != "").any():
        right = pd.Series(np.where(predicted == labels, "right", "wrong"))
        columns["right"] = right.where(is_known & (labels != ""), "")
    probabilities = of_cells.filter(regex=f"^{PROBABILITY_PREFIX}")  # [N, C]
    for name, classes in (("probability", predicted), ("label_probability", labels)):
        at = probabilities.columns.get_indexer(PROBABILITY_PREFIX + classes)
        if (at >= 0).any():
            columns[name] = pd.Series(np.where(at >= 0, probabilities.to_numpy()[np.arange(len(at)), at], np.nan))
    table = pd.DataFrame(columns)
    return table.join(probabilities) if probabilities.shape[1] <= MAX_PROBABILITIES else table


def read_columns(path: PathLike, paths: Sequence[str]) -> pd.DataFrame:
    """Read further columns from a CSV whose first column is the image's path, absolute or from the CSV's folder.

    A column with more than 12 different numbers is a number column, every other a text column. Columns called
    `patient`, `data_set` and `prediction` stand for what the cells are not otherwise known to have.

    Args:
        path: of the CSV.
        paths: N images.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file, or names none of the images.
    """
    file = Path(path)
    table = _read_table(file, "columns")
    absolute = table.set_axis([os.path.abspath(file.parent / name) for name in table.index])
    table = pd.concat([table, absolute])
    table = table[~table.index.duplicated()].reindex(paths)
    if not len(table.columns) or table.isna().all(axis=None):
        raise ValueError(
            f"columns: {str(file)!r} has the columns {', '.join([str(table.index.name), *table])}, and no row for an "
            f"image of the features; expected image paths in the first column, and others beside it"
        )
    return table.reset_index(drop=True).fillna("").apply(_as_numbers)


def join_sets(sets: Mapping[str, Features]) -> tuple[Features, list[str] | None]:
    """Join data sets: the classes of all, and the name of each cell's set (None for one set alone).

    A patient id that several sets use gets the set's name behind it: these are different people.

    Args:
        sets: {name: features} of one network and kind.

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
    return joined, [name for name, cells in sets.items() for _ in range(len(cells))]


def _read_table(file: Path, setting: str) -> pd.DataFrame:
    """Read a CSV or parquet file as text, its first column as the index."""
    table = open_table(file, setting)
    rows = [row for _, row in table.records()]
    if not rows:
        raise ValueError(f"{setting}: {str(file)!r} has no header or no rows; give a CSV with both")
    return pd.DataFrame(rows, dtype=object).set_index(table.columns[0])


def _as_numbers(values: "pd.Series[str]") -> "pd.Series[float] | pd.Series[str]":
    """Convert a text column to numbers if it holds more than a few different ones, and nothing else."""
    try:
        numbers = values.replace("", "nan").astype(float)
    except ValueError:
        return values
    is_scale = np.isfinite(numbers.dropna()).all() and numbers.nunique() > MAX_NUMBERS_AS_NAMES
    return numbers if is_scale else values

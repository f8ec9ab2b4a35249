"""Collect what is known of each cell, by which the explorer colours, filters and exports.

All values are text, "" where they are not known.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from dinov2.data.datasets.tables import open_table
from dinov2.eval.features import Features
from dinov2.eval.results import read_predictions


def cell_table(
    sets: Mapping[str, Features], predictions: Path | None = None, columns: Path | None = None
) -> pd.DataFrame:
    """Return path, label, patient, data_set, prediction, right, probability and further columns of each cell.

    A column is missing if no source has it, and `data_set` is missing for one set alone. A patient id that several sets
    use gets the set's name behind it, because these are different people.

    Args:
        sets: {name of the data set: features}.
        predictions: a predictions.csv, or its folder.
        columns: a CSV whose first column is the image's path, absolute or from the CSV's folder. Of its columns, those
            that the cells already have are left out.

    Raises:
        FileNotFoundError: if a CSV does not exist.
        ValueError: if a CSV is not as expected or names none of the cells.
    """
    tables = []
    for name, cells in sets.items():
        known = {"path": cells.paths, "patient": cells.patients or "", "data_set": name}
        labels = np.array(cells.class_names, dtype=object)[cells.labels]
        tables.append(pd.DataFrame({"label": labels, **known}))
    table = pd.concat(tables, ignore_index=True)
    patients, is_known = table["patient"], table["patient"] != ""
    is_shared = table.groupby("patient")["data_set"].transform("nunique") > 1
    table["patient"] = patients.mask(is_shared & is_known, patients + " (" + table["data_set"] + ")")
    table = table.drop(columns=["patient"] * (not is_known.any()) + ["data_set"] * (len(sets) == 1))
    if predictions is not None:
        table = _join_predictions(table, predictions)
    if columns is not None:
        source = open_table(columns, "columns")
        values = [row for _, row in source.rows()]
        paths = [os.path.abspath(columns.parent / row[0]) for row in values]
        rows = pd.DataFrame(values, paths, source.columns, dtype=object).iloc[:, 1:]
        table = _join(table, rows[~rows.index.duplicated()], table["path"].map(os.path.abspath), columns)
    return table.fillna("")


def _join_predictions(table: pd.DataFrame, file: Path) -> pd.DataFrame:
    """Add the predicted class, and whether it is right and its probability if the file has labels and probabilities."""
    file = file / "predictions.csv" if file.is_dir() else file
    predicted = read_predictions(file)
    rows = pd.DataFrame({"prediction": predicted.predictions}, index=predicted.keys)
    if predicted.labels is not None:
        rows["right"] = np.where(rows["prediction"] == predicted.labels, "right", "wrong")
    if predicted.probabilities is not None:
        rows["probability"] = [f"{value:.3g}" for value in predicted.probabilities.max(axis=1)]
    keys = "path" if predicted.key_column == "path" else "patient"
    return _join(table, rows, table.get(keys, pd.Series("", table.index)), file)


def _join(table: pd.DataFrame, rows: pd.DataFrame, keys: "pd.Series[str]", file: Path) -> pd.DataFrame:
    """Add the columns that the table lacks; `keys` say which row belongs to which cell."""
    if rows.empty or not keys.isin(rows.index).any():
        raise ValueError(
            f"{str(file)!r} has no row for a cell of the features: its first column begins with "
            f"{rows.index[:1].tolist()}, that of the cells with {keys[:1].tolist()}; give a file of these cells, with "
            f"image paths (or patients, for predictions) first and other columns beside them"
        )
    added = rows.drop(columns=table.columns, errors="ignore").reindex(keys)
    return pd.concat([table, added.set_axis(table.index)], axis="columns")

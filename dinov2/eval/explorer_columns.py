"""What is known of each cell beside its features: the columns that the explorer colours, filters and exports by.

Letters: N cells, C classes
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from dinov2.data.datasets.tables import open_table
from dinov2.eval.features import Features
from dinov2.eval.features.join import check_same_network
from dinov2.eval.results import PROBABILITY_PREFIX

PathLike = str | os.PathLike[str]

MAX_PROBABILITIES = 32  # classes whose probabilities are columns of their own
MAX_NUMBERS_AS_NAMES = 12  # a column with as few different numbers is one of groups, such as grades
RIGHT, WRONG = "right", "wrong"


@dataclass(frozen=True)
class Groups:
    """A name for each cell, or "" where it is not known.

    Attributes:
        id: of the column; of columns with one id the first one counts.
        title: what readers see.
        codes: int64 [N], positions in `names`; -1 where it is not known.
        names: different ones.
    """

    id: str
    title: str
    codes: np.ndarray
    names: list[str]

    @classmethod
    def of(cls, id: str, title: str, values: Sequence[str | None], names: Sequence[str] | None = None) -> "Groups":
        """From N values, None where one is not known.

        Args:
            id, title: as the attributes.
            values: one for each cell.
            names: in the order to show them; as they come unless given.
        """
        found = dict.fromkeys(value for value in values if value is not None)
        names = list(found) if names is None else [name for name in names if name in found]
        codes = {name: i for i, name in enumerate(names)}
        return cls(id, title, np.array([-1 if v is None else codes[v] for v in values], dtype=np.int64), names)


@dataclass(frozen=True)
class Numbers:
    """A number for each cell: float32 [N], NaN where it is not known."""

    id: str
    title: str
    values: np.ndarray


Column = Groups | Numbers


@dataclass(frozen=True)
class Predictions:
    """A predictions.csv, by picture or by patient.

    Attributes:
        key_column: "path" or "patient".
        labels: {key: class}, empty where the file has none.
        predictions: {key: predicted class}.
        probabilities: {key: float64 [C]}, empty where the file has none.
        class_names: C names of the probabilities.
    """

    key_column: str
    labels: dict[str, str]
    predictions: dict[str, str]
    probabilities: dict[str, np.ndarray]
    class_names: list[str]


def read_predictions_of_cells(path: PathLike) -> Predictions:
    """Read the predictions.csv that knn.py, linear.py or abmil.py wrote.

    Args:
        path: of the file, or of its folder.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file.
    """
    file = Path(path)
    file = file / "predictions.csv" if file.is_dir() else file
    header, rows = _read_csv(file, "predictions")
    if header[0] not in ("path", "patient") or "prediction" not in header:
        raise ValueError(
            f"predictions: {str(file)!r} has the columns {', '.join(header)}; expected `path` or `patient` first, and "
            f"`prediction`"
        )
    chances = [name for name in header if name.startswith(PROBABILITY_PREFIX)]
    try:
        probabilities = {
            row[header[0]]: np.array([float(row[name] or "nan") for name in chances]) for row in rows if chances
        }
    except ValueError as error:
        raise ValueError(f"predictions: {str(file)!r} has a probability that is no number ({error})") from error
    return Predictions(
        key_column=header[0],
        labels={row[header[0]]: row["label"] for row in rows} if "label" in header else {},
        predictions={row[header[0]]: row["prediction"] for row in rows},
        probabilities=probabilities,
        class_names=[name.removeprefix(PROBABILITY_PREFIX) for name in chances],
    )


def prediction_columns(cells: Features, found: Predictions) -> list[Column]:
    """Predicted class, right or wrong, and probabilities (of the predicted class, of the label and of each class).

    Args:
        cells: N cells; several with one path, or of one patient, share their prediction.
        found: for some of them at least.

    Raises:
        ValueError: if no cell has a prediction.
    """
    keys: Sequence[str] = cells.paths if found.key_column == "path" else cells.patients or []
    if not any(key in found.predictions for key in keys):
        raise ValueError(
            f"predictions: none of the {len(found.predictions)} is for a cell of the features (by {found.key_column}, "
            f"for instance {next(iter(found.predictions))!r}); give the predictions made from these features"
        )
    predicted = [found.predictions.get(key) for key in keys]
    # a patient's label is not the class of the cell
    own = [cells.class_names[i] for i in cells.labels] if found.key_column == "path" else [None] * len(cells)
    labels = [found.labels.get(key, label) for key, label in zip(keys, own, strict=True)]
    names = sorted({*found.predictions.values()}, key=_order(cells.class_names))
    columns: list[Column] = [Groups.of("prediction", "Predicted class", predicted, names)]
    if any(label is not None for label in labels):
        is_right = [
            None if guess is None or label is None else RIGHT if guess == label else WRONG
            for guess, label in zip(predicted, labels, strict=True)
        ]
        columns.append(Groups.of("right", "Right or wrong", is_right, (RIGHT, WRONG)))
    if not found.probabilities:
        return columns
    n_classes = len(found.class_names)
    unknown = np.full(n_classes, np.nan)
    of_cells = np.stack([found.probabilities.get(key, unknown) for key in keys])  # [N, C]
    position = {name: i for i, name in enumerate(found.class_names)}
    for id, title, of in (
        ("probability", "Probability of the predicted class", predicted),
        ("label_probability", "Probability of the label", labels),
    ):
        at = np.array([position.get(name, -1) if name is not None else -1 for name in of])
        values = np.where(at >= 0, of_cells[np.arange(len(at)), at], np.nan)
        if np.isfinite(values).any():
            columns.append(Numbers(id, title, values.astype(np.float32)))
    if n_classes <= MAX_PROBABILITIES:
        columns += [
            Numbers(f"{PROBABILITY_PREFIX}{name}", f"Probability of {name}", of_cells[:, i].astype(np.float32))
            for name, i in position.items()
        ]
    return columns


def own_columns(cells: Features, data_sets: Sequence[str] | None = None) -> list[Column]:
    """Class, patient (where known) and data set (where there are several)."""
    labels = [cells.class_names[i] for i in cells.labels]
    columns: list[Column] = [Groups.of("label", "Class", labels, list(dict.fromkeys(cells.class_names)))]
    if cells.patients is not None:
        columns.append(Groups.of("patient", "Patient", [patient or None for patient in cells.patients]))
    if data_sets is not None:
        columns.append(Groups.of("data_set", "Data set", data_sets))
    return columns


def read_columns(path: PathLike, paths: Sequence[str]) -> list[Column]:
    """Further columns from a CSV whose first one is the picture's path, as features name it or from the CSV's folder.

    A column of more than 12 different numbers is coloured by a scale, every other by its names. Columns called
    `patient`, `data_set` and `prediction` stand for what the cells are not otherwise known to have.

    Args:
        path: of the CSV.
        paths: N pictures.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file, or names none of the pictures.
    """
    file = Path(path)
    header, rows = _read_csv(file, "columns")
    of_path = {os.path.abspath(file.parent / row[header[0]]): row for row in rows}
    of_path |= {row[header[0]]: row for row in rows}
    found = [of_path.get(path) for path in paths]
    if len(header) < 2 or not any(found):
        raise ValueError(
            f"columns: {str(file)!r} has the columns {', '.join(header)} and {len(rows)} rows, none for a picture of "
            f"the features; expected their paths in the first column, and others beside it"
        )
    columns: list[Column] = []
    for name in header[1:]:
        values = [None if row is None else row[name] or None for row in found]
        numbers = _as_numbers(values)
        columns.append(Groups.of(name, name, values) if numbers is None else Numbers(name, name, numbers))
    return columns


def join_sets(sets: Mapping[str, Features]) -> tuple[Features, list[str] | None]:
    """Several data sets as one: the classes of all, and the name of each cell's set (None for one set alone).

    A patient's id that stands in several sets gets the set's name behind it: these are different people.

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
    class_names = list(dict.fromkeys(chain.from_iterable(cells.class_names for cells in sets.values())))
    position = {name: i for i, name in enumerate(class_names)}
    in_sets = Counter(chain.from_iterable({*(cells.patients or [])} for cells in sets.values()))
    patients = [
        f"{patient} ({name})" if patient and in_sets[patient] > 1 else patient
        for name, cells in sets.items()
        for patient in cells.patients or [""] * len(cells)
    ]
    together = replace(
        first,
        features=np.concatenate([cells.features for cells in sets.values()]),
        labels=np.concatenate(
            [np.array([position[name] for name in c.class_names], dtype=np.int64)[c.labels] for c in sets.values()]
        ),
        class_names=class_names,
        paths=list(chain.from_iterable(cells.paths for cells in sets.values())),
        patients=patients if any(patients) else None,
        unreadable=list(chain.from_iterable(cells.unreadable for cells in sets.values())),
        others={},
    )
    return together, [name for name, cells in sets.items() for _ in range(len(cells))]


def _read_csv(file: Path, what: str) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows; a row that is too short has "" where nothing stands."""
    table = open_table(file, what)
    rows = [row for _, row in table.records()]
    if not rows:
        raise ValueError(f"{what}: {str(file)!r} has no header or no rows; give a CSV with both")
    return table.columns, rows


def _as_numbers(values: Sequence[str | None]) -> np.ndarray | None:
    """float32 [N], or None where a value is no number or there are few different ones."""
    try:
        numbers = np.array([math.nan if value is None else float(value) for value in values])
    except ValueError:
        return None
    known = numbers[~np.isnan(numbers)]
    if not np.isfinite(known).all() or len(np.unique(known)) <= MAX_NUMBERS_AS_NAMES:
        return None
    return numbers.astype(np.float32)


def _order(class_names: Sequence[str]) -> Callable[[str], tuple[int, str]]:
    """Known classes as they stand, then others by name."""
    position = {name: i for i, name in enumerate(class_names)}
    return lambda name: (position.get(name, len(position)), name)

"""Write a report's section about the patients of an ABMIL result: predictions, their ranges, and attended cells.

A patient's prediction is the mean probability of the networks that predicted it. Its range goes from the lowest to the
highest probability that one of these networks gives the predicted class: how far the answer moves when the training is
repeated from other random weights and on other patients (an ensemble as in Lakshminarayanan et al. 2017, arXiv
1612.01474). It is no confidence interval, and says nothing about how the cells were sampled.

Attention is the weight of a whole cell's feature and sums to 1 over a patient's cells. It says what a prediction was
made from, not that it was right.

Letters: N cells of a patient, C classes
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from dinov2.data.datasets.decode import UnreadableImageError, decode_image, resize_image
from dinov2.data.datasets.tables import open_table
from dinov2.eval.pages.page import Section, data_value, image_uri, render
from dinov2.eval.results import PROBABILITY_PREFIX

MOST_PATIENTS = 500
MOST_THUMBNAILS = 6000  # of all patients together: some 10 MB of the page
THUMBNAIL_PX = 56
DEFAULT_N_CELLS = 6


class Cell(NamedTuple):
    """A cell of a patient: its position, where it is from, and its attention."""

    position: int
    source: str
    attention: float


@dataclass(frozen=True, eq=False)
class Patient:
    """One predicted patient.

    Attributes:
        id: as in the predictions.
        label: the true class; None where it is unknown.
        prediction: the predicted class.
        probabilities: float64 [C].
        of_networks: float64 [networks, C]; empty where the result does not have them.
        sources: where each of N cells is from; empty without attention.
        attention: float64 [N, 1 or C]; a column per class where classes have their own.
        class_names: C names.
    """

    id: str
    label: str | None
    prediction: str
    probabilities: np.ndarray
    of_networks: np.ndarray
    sources: Sequence[str]
    attention: np.ndarray
    class_names: Sequence[str]

    @property
    def is_wrong(self) -> bool:
        """Whether the label is known and another class."""
        return self.label is not None and self.label != self.prediction

    @property
    def predicted(self) -> int:
        """The position of the predicted class."""
        return self.class_names.index(self.prediction)

    @property
    def n_agreeing(self) -> int:
        """Networks whose highest probability is that of the predicted class."""
        return int((self.of_networks.argmax(axis=1) == self.predicted).sum())

    @property
    def weights(self) -> np.ndarray:
        """Attention [N] of the predicted class."""
        return self.attention[:, self.predicted if self.attention.shape[1] > 1 else 0]

    @property
    def n_effective(self) -> float:
        """Cells that the attention is spread over: 1 / the sum of squared weights."""
        return 1 / float(np.square(self.weights).sum()) if self.weights.any() else 0.0

    def range_of(self, column: int) -> tuple[float, float] | None:
        """Return the lowest and highest probability of a class among several networks."""
        values = self.of_networks[:, column]
        return (float(values.min()), float(values.max())) if len(values) > 1 else None

    def cell_groups(self, n_cells: int) -> dict[str, list[Cell]]:
        """Return the most and the least attended cells, no cell in both, and the most attended of each class."""
        order = np.argsort(-self.weights, kind="stable")
        groups = {
            "Most attended": self._cells(order[:n_cells], self.weights),
            "Least attended": self._cells(order[n_cells:][::-1][:n_cells], self.weights),
        }
        if self.attention.shape[1] > 1:
            for name, weights in zip(self.class_names, self.attention.T, strict=True):
                most = np.argsort(-weights, kind="stable")[:n_cells]
                groups[f"Most attended for {name}"] = self._cells(most, weights)
        return {title: cells for title, cells in groups.items() if cells}

    def _cells(self, positions: np.ndarray, weights: np.ndarray) -> list[Cell]:
        return [Cell(i, self.sources[i], float(weights[i])) for i in positions.tolist()]


def read_patients(folder: Path) -> list[Patient]:
    """Read what `abmil.py` wrote into a folder, with --apply or without.

    Raises:
        FileNotFoundError: if there are no predictions of patients.
        ValueError: if files lack columns, hold no numbers, or are from different runs.
    """
    _check_protocol(folder / "results.json")
    file = folder / "predictions.csv"
    if not file.is_file():
        raise FileNotFoundError(
            f"patients: no predictions.csv in {str(folder)!r}; give the --output-dir of dinov2/eval/abmil.py"
        )
    predictions = _read(file, ["patient", "prediction"], PROBABILITY_PREFIX)
    columns = [name for name in predictions if name.startswith(PROBABILITY_PREFIX)]
    class_names = [name.removeprefix(PROBABILITY_PREFIX) for name in columns]
    if not class_names or predictions.empty:
        what = f"has no columns {PROBABILITY_PREFIX}<class>" if not class_names else "names no patient"
        raise ValueError(f"patients: {str(file)!r} {what}; run abmil.py again")
    ids = set(predictions["patient"])
    unknown = set(predictions["prediction"]) - set(class_names)
    if len(ids) < len(predictions) or unknown:
        raise ValueError(
            f"patients: {str(file)!r} has {len(predictions)} rows for {len(ids)} patients, and {len(unknown)} "
            f"predictions that are no class of its columns; it was edited: run abmil.py again"
        )
    networks = _of_patients(folder / "predictions_of_networks.csv", ["patient", *columns], PROBABILITY_PREFIX, ids)
    attention = _of_patients(folder / "attention.csv", ["patient", "source", "attention"], "attention", ids)
    of_classes = [f"attention_{name}" for name in class_names]
    patients = []
    for row in predictions.to_dict("records"):
        of_networks = networks[row["patient"]][columns].to_numpy() if networks else np.empty((0, len(columns)))
        cells = attention.get(row["patient"], pd.DataFrame({"source": [], "attention": []}, dtype=object))
        own = cells[of_classes if set(of_classes) <= set(cells) else ["attention"]].to_numpy(dtype=np.float64)
        probabilities = np.array([row[column] for column in columns])
        sources = cells["source"].tolist()
        label, prediction = row.get("label"), row["prediction"]
        patients.append(
            Patient(row["patient"], label, prediction, probabilities, of_networks, sources, own, class_names)
        )
    return patients


def _check_protocol(file: Path) -> None:
    if not file.is_file():
        return
    try:
        protocol = str(json.loads(file.read_text(encoding="utf-8")).get("protocol", ""))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"patients: {str(file)!r} is no results.json ({error}); run abmil.py again") from error
    if not protocol.startswith("abmil"):
        raise ValueError(f"patients: {str(file)!r} is of protocol {protocol!r}; give the folder of an ABMIL result")


def _read(file: Path, required: Sequence[str], numbers: str) -> pd.DataFrame:
    """Read a CSV file whose columns that begin with `numbers` are numbers."""
    table = open_table(file, "patients")
    if missing := [name for name in required if name not in table.columns]:
        raise ValueError(
            f"patients: {str(file)!r} has no column {', '.join(missing)}; it is of another command or version: run "
            f"dinov2/eval/abmil.py again"
        )
    frame = pd.DataFrame([row for _, row in table.records()], columns=table.columns, dtype=object)
    for column in (name for name in frame if name.startswith(numbers)):
        try:
            frame[column] = frame[column].astype(np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"patients: {str(file)!r} has no number in the column {column} ({error}); the file is cut or was "
                f"edited: run abmil.py again"
            ) from error
    return frame


def _of_patients(file: Path, required: Sequence[str], numbers: str, ids: set[str]) -> dict[str, pd.DataFrame]:
    """Read the rows of each patient; empty without the file."""
    groups = dict(iter(_read(file, required, numbers).groupby("patient", sort=False))) if file.is_file() else {}
    if groups and set(groups) != ids:
        raise ValueError(
            f"patients: {file.name} and predictions.csv in {str(file.parent)!r} name different patients, so they are "
            f"from different runs; run abmil.py again into an empty folder"
        )
    return groups


def patients_section(folder: Path, n_cells: int = DEFAULT_N_CELLS) -> Section:
    """Return the patients of an ABMIL result, wrong ones first.

    The page stays small however many patients there are: of more than `MOST_PATIENTS` the first in that order are
    shown, and with many of them fewer cells of each.

    Args:
        folder: --output-dir of abmil.py, with --apply or without.
        n_cells: most and least attended cells to show of each patient, at most.

    Raises:
        FileNotFoundError, ValueError: as `read_patients`.
    """
    patients = read_patients(folder)
    shown = sorted(patients, key=lambda patient: (not patient.is_wrong, patient.probabilities.max()))[:MOST_PATIENTS]
    n_columns = shown[0].attention.shape[1]
    n_groups = 2 + (n_columns if n_columns > 1 else 0)
    html = render(
        "patients.html",
        patients=shown,
        class_names=shown[0].class_names,
        n_patients=len(patients),
        n_labelled=sum(patient.label is not None for patient in patients),
        n_wrong=sum(patient.is_wrong for patient in patients),
        n_cells=max(1, min(n_cells, MOST_THUMBNAILS // (len(shown) * n_groups))),
        percent=lambda value: data_value(float(value), f"{100 * value:.1f} %"),
        thumbnail=cache(_thumbnail),
        size=THUMBNAIL_PX,
    )
    return Section("patients", "Patients", html)


def _thumbnail(source: str) -> tuple[str, str]:
    """Return a small image as the `src` of an `<img>`, or "" and why there is none."""
    try:
        image = resize_image(decode_image(source), THUMBNAIL_PX).permute(1, 2, 0).numpy()
    except UnreadableImageError as error:
        return "", error.reason
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=78)
    return image_uri(stream.getvalue(), "jpeg"), ""

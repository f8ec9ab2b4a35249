"""Write a report's section about the patients of an ABMIL result: predictions, their ranges, and attended cells.

A patient's prediction is the mean probability of the networks that predicted it (an ensemble as in Lakshminarayanan et
al. 2017, arXiv 1612.01474). Its range goes from the lowest to the highest probability that one of these networks gives
the predicted class. It is no confidence interval, and says nothing about how the cells were sampled.

A deletion curve (after RISE, Petsiuk et al. 2018, arXiv 1806.07421) is the probability of the predicted class without a
share of the patient's cells: without the most attended ones, and without as many random ones.

Letters: N cells of a patient, C classes, S shares of removed cells
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dinov2.data.datasets.tables import open_table
from dinov2.eval.pages.page import COLOURS, Section, make_thumbnails, percent, render
from dinov2.eval.results import PROBABILITY_PREFIX, RESULTS_NAME, read_predictions, read_report

MOST_PATIENTS = 500
MOST_THUMBNAILS = 6000  # of all patients together: some 10 MB of the page
THUMBNAIL_PX = 56
DELETION = ("share", "most_attended", "random")  # columns of deletion.csv, all from 0 to 1
ROUNDING = 1e-4  # by which a mean of float32 probabilities may be outside 0 to 1
N_CELLS = 6  # most and least attended ones of each patient, at most


@dataclass(frozen=True, eq=False)
class Patient:
    """One predicted patient."""

    id: str
    label: str | None  # the true class; None where it is unknown
    prediction: str  # the predicted class
    probabilities: np.ndarray  # float64 [C]
    of_networks: np.ndarray  # float64 [networks, C]; no rows where the result does not have them
    sources: Sequence[str]  # where each of N cells is from; empty without attention
    attention: np.ndarray  # float64 [N, 1 or C]; a column per class where classes have their own
    class_names: Sequence[str]
    deletion: np.ndarray  # float64 [S, 3], columns `DELETION`, by share; no rows where the result does not have them

    @property
    def verdict(self) -> str:
        """`right`, `wrong` or, without a label, `unknown`."""
        return "unknown" if self.label is None else "right" if self.label == self.prediction else "wrong"

    @property
    def predicted(self) -> int:
        """The position of the predicted class."""
        return self.class_names.index(self.prediction)

    @property
    def weights(self) -> np.ndarray:
        """Attention [N] of the predicted class."""
        return self.attention[:, self.predicted if self.attention.shape[1] > 1 else 0]

    def range_of(self, column: int) -> tuple[float, float] | None:
        """Return the lowest and highest probability of a class among several networks."""
        values = self.of_networks[:, column]
        return (float(values.min()), float(values.max())) if len(values) > 1 else None

    @property
    def rows(self) -> list[list[str]]:
        """Each class with its probability and its range, in percent."""
        return [
            [name, percent(self.probabilities[i]), *map(percent, self.range_of(i) or (None, None))]
            for i, name in enumerate(self.class_names)
        ]

    def cell_groups(self, n_cells: int) -> dict[str, list[tuple[int, str, float]]]:
        """Return (position, source, attention) of the most and least attended cells, and of each class's most."""
        order = np.argsort(-self.weights, kind="stable")
        groups = {"Most attended": (order[:n_cells], self.weights)}
        if len(order) > n_cells:
            groups["Least attended"] = (order[n_cells:][::-1][:n_cells], self.weights)
        if self.attention.shape[1] > 1:
            for name, weights in zip(self.class_names, self.attention.T, strict=True):
                groups[f"Most attended for {name}"] = (np.argsort(-weights, kind="stable")[:n_cells], weights)
        return {
            title: [(i, self.sources[i], float(weights[i])) for i in positions.tolist()]
            for title, (positions, weights) in groups.items()
        }


def read_patients(folder: Path) -> list[Patient]:
    """Read what `abmil.py` wrote into a folder, with --apply or without."""
    file, report = folder / "predictions.csv", folder / RESULTS_NAME
    if report.is_file() and not str(protocol := read_report(report).get("protocol")).startswith("abmil"):
        raise ValueError(f"patients: {str(report)!r} is of protocol {protocol!r}; give the folder of an ABMIL result")
    predicted = read_predictions(file)
    names, probabilities = list(predicted.class_names), predicted.probabilities
    is_known = predicted.key_column == "patient" and set(predicted.predictions) <= set(names)
    if not is_known or probabilities is None or not np.isfinite(probabilities).all():
        raise ValueError(
            f"patients: {str(file)!r} needs the column patient, and a probability of each predicted class for each "
            f"patient; run dinov2/eval/abmil.py again"
        )
    columns = [PROBABILITY_PREFIX + name for name in names]
    of_networks = _read(folder / "predictions_of_networks.csv", columns, predicted.keys)
    attention = _read(folder / "attention.csv", ["attention"], predicted.keys)
    deletion = _read(folder / "deletion.csv", DELETION, predicted.keys)
    patients = []
    for i, patient in enumerate(predicted.keys):
        cells = attention[patient]
        of_classes = [f"attention_{name}" for name in names]
        weights = cells[of_classes if set(of_classes) <= set(cells) else ["attention"]]
        patients.append(
            Patient(
                id=patient,
                label=None if predicted.labels is None else predicted.labels[i],
                prediction=predicted.predictions[i],
                probabilities=probabilities[i],
                of_networks=of_networks[patient][columns].to_numpy(np.float64),
                sources=cells["source"].tolist() if "source" in cells else [],
                attention=weights.to_numpy(np.float64),
                class_names=names,
                deletion=_shares(deletion[patient], folder / "deletion.csv"),
            )
        )
    return patients


def _read(file: Path, numbers: Sequence[str], patients: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Read the rows of each patient, with these columns of numbers; without the file, a patient has no rows."""
    if not file.is_file():
        return dict.fromkeys(patients, pd.DataFrame(columns=numbers, dtype=np.float64))
    frame = pd.DataFrame([row for _, row in open_table(file, "patients").records()])
    if missing := {"patient", *numbers} - set(frame):
        raise ValueError(f"patients: {str(file)!r} has no column {', '.join(sorted(missing))}; run abmil.py again")
    for column in (name for name in frame if name in numbers or name.startswith("attention")):
        try:
            frame[column] = frame[column].map(float)
        except (TypeError, ValueError) as error:
            message = f"patients: {str(file)!r} has no number in the column {column} ({error}); run abmil.py again"
            raise ValueError(message) from error
    groups = dict(iter(frame.groupby("patient", sort=False)))
    if set(groups) != set(patients):
        raise ValueError(
            f"patients: {file.name} and predictions.csv in {str(file.parent)!r} name different patients, so they are "
            f"from different runs; run abmil.py again into an empty folder"
        )
    return groups


def _shares(rows: pd.DataFrame, file: Path) -> np.ndarray:
    """Return the deletion curve of a patient, float64 [S, 3], by share of removed cells."""
    values = rows.sort_values("share")[list(DELETION)].to_numpy(np.float64)
    if not (np.abs(values - 0.5) <= 0.5 + ROUNDING).all():  # NaN is outside, too
        what = f"has values outside 0 to 1 in the columns {', '.join(DELETION)}"
        raise ValueError(f"patients: {str(file)!r} {what}; run abmil.py again")
    return values


def patients_section(folder: Path) -> Section:
    """Return the patients of an ABMIL result, wrong ones first.

    The page stays small however many patients there are: of more than `MOST_PATIENTS` the first in that order are
    shown, and with many of them fewer cells of each.
    """
    patients = read_patients(folder)
    verdicts = [patient.verdict for patient in patients]
    patients.sort(key=lambda patient: (patient.verdict != "wrong", patient.probabilities.max()))
    shown = patients[:MOST_PATIENTS]
    n_columns = shown[0].attention.shape[1]
    n_groups = 2 + (n_columns if n_columns > 1 else 0)
    n_cells = max(1, min(N_CELLS, MOST_THUMBNAILS // (len(shown) * n_groups)))
    groups = {patient.id: patient.cell_groups(n_cells) for patient in shown}
    cells = [cell for of_patient in groups.values() for of_group in of_patient.values() for cell in of_group]
    sources = list(dict.fromkeys(source for _, source, _ in cells))
    uris, missing = make_thumbnails(sources, THUMBNAIL_PX)
    content = render(
        "patients.html",
        patients=shown,
        n_patients=len(patients),
        n_labelled=len(patients) - verdicts.count("unknown"),
        n_wrong=verdicts.count("wrong"),
        groups=groups,
        percent=percent,
        thumbnails=dict(zip(sources, uris, strict=True)),
        missing={sources[position]: reason for position, reason in missing.items()},
        size=THUMBNAIL_PX,
        curves=[
            ("without the most attended cells", COLOURS[0], "solid"),
            ("without random cells", COLOURS[1], "dashed"),
        ],
    )
    return Section("patients", "Patients", content)

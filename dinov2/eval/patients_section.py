"""Patients of an ABMIL result as a part of a page: what each was called, how sure, and which cells that rests on.

A patient's prediction is the mean probability of the networks that judged them. Its range goes from the lowest to the
highest probability that one of these networks alone gives the predicted class: how far the answer moves when the
training is repeated from other random weights and on other patients (Lakshminarayanan et al. 2017, arXiv 1612.01474,
judge uncertainty by such an ensemble). It is no confidence interval, and says nothing of how the cells were sampled.

Attention is that of a whole cell's feature and sums to 1 over a patient's cells. It says what a prediction was made
from, not that it was right.

Letters: P patients, N cells of one, C classes
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datasets.tables import open_table
from dinov2.eval.features import Features
from dinov2.eval.pages import Markup, Section, escape, image_uri, table, valued
from dinov2.eval.results import PROBABILITY_PREFIX
from dinov2.eval.thumbnails import N_COLUMNS, PER_SHEET, ThumbnailSheets, make_thumbnails

ATTENTION_PREFIX = "attention_"
MOST_PATIENTS = 500
MOST_THUMBNAILS = 6000  # of all patients together: some 10 MB of the page
THUMBNAIL_PX = 56
DEFAULT_N_CELLS = 6
HOW_TO_GET_ATTENTION = (
    "There is no attention.csv with this result: it was written by an older version, or the file was moved. Run "
    "dinov2/eval/abmil.py again with the same flags, or with --apply and this result's aggregator.pth."
)


@dataclass(frozen=True, eq=False)
class Patient:
    """One judged patient.

    Attributes:
        id: as in the predictions.
        label: the true class, or None where it is unknown.
        prediction: the predicted class.
        probabilities: float64 [C].
        of_networks: float64 [networks, C]; empty where the result does not tell.
        sources: N texts, where each cell is from; empty without attention.
        attention: float64 [N, 1 or C]; a column a class where classes have their own.
    """

    id: str
    label: str | None
    prediction: str
    probabilities: np.ndarray
    of_networks: np.ndarray
    sources: list[str] = field(default_factory=list)
    attention: np.ndarray = field(default_factory=lambda: np.empty((0, 1)))

    @property
    def is_wrong(self) -> bool:
        """Whether the label is known and another one."""
        return self.label is not None and self.label != self.prediction


@dataclass(frozen=True, eq=False)
class PatientResults:
    """What `read_patient_results` found.

    Attributes:
        class_names: C names.
        patients: P of them, as in the file.
        has_attention: whether the result has any.
        is_of_classes: whether each class has its own attention.
    """

    class_names: list[str]
    patients: list[Patient]
    has_attention: bool
    is_of_classes: bool


def read_patient_results(folder: Path) -> PatientResults:
    """Read what `abmil.py` left in a folder, with --apply or without.

    Raises:
        FileNotFoundError: if there are no predictions of patients.
        ValueError: if files lack columns, hold no numbers, or are from different runs.
    """
    predictions_file, attention_file = folder / "predictions.csv", folder / "attention.csv"
    if not predictions_file.is_file():
        raise FileNotFoundError(
            f"patients: no predictions.csv in {str(folder)!r}; give the --output-dir of dinov2/eval/abmil.py"
        )
    rows = list(_rows(predictions_file, ("patient", "prediction")))
    if not rows:
        raise ValueError(f"patients: {str(predictions_file)!r} names no patient; judge some again with abmil.py")
    class_names = _class_names(folder, list(rows[0]))
    ids = {row["patient"] for row in rows}
    unknown = {row["prediction"] for row in rows} - set(class_names)
    if len(ids) < len(rows) or unknown:
        raise ValueError(
            f"patients: {str(predictions_file)!r} has {len(rows)} rows for {len(ids)} patients, and "
            f"{len(unknown)} predictions that are no class of its columns; it was edited: run abmil.py again"
        )
    columns = [PROBABILITY_PREFIX + name for name in class_names]
    of_networks: dict[str, list[list[float]]] = defaultdict(list)
    networks_file = folder / "predictions_of_networks.csv"
    if networks_file.is_file():
        for row in _rows(networks_file, ("patient", *columns)):
            of_networks[row["patient"]].append([_number(row, column, networks_file) for column in columns])
    attention = _read_attention(attention_file, class_names) if attention_file.is_file() else {}
    for file, found in ((attention_file, attention), (networks_file, of_networks)):
        if found and set(found) != ids:
            raise ValueError(
                f"patients: {file.name} and predictions.csv in {str(folder)!r} name different patients, so they are "
                f"from different runs; run abmil.py again into an empty folder"
            )
    patients = [
        Patient(
            row["patient"],
            row.get("label"),
            row["prediction"],
            np.array([_number(row, column, predictions_file) for column in columns]),
            np.array(of_networks.get(row["patient"], []), dtype=np.float64).reshape(-1, len(columns)),
            *attention.get(row["patient"], ()),
        )
        for row in rows
    ]
    widths = {patient.attention.shape[1] for patient in patients}
    return PatientResults(class_names, patients, bool(attention), bool(attention) and widths == {len(class_names)})


def _rows(file: Path, required: Sequence[str]) -> Iterator[dict[str, str]]:
    table = open_table(file, "patients")
    missing = [name for name in required if name not in table.columns]
    if missing:
        raise ValueError(
            f"patients: {str(file)!r} has no column {', '.join(missing)}; it is of another command or version: run "
            f"dinov2/eval/abmil.py again"
        )
    for _, row in table.records():
        yield row


def _class_names(folder: Path, header: Sequence[str]) -> list[str]:
    """Those of results.json, or what the columns of predictions are called."""
    of_columns = [name.removeprefix(PROBABILITY_PREFIX) for name in header if name.startswith(PROBABILITY_PREFIX)]
    file = folder / "results.json"
    if file.is_file():
        try:
            protocol = str(json.loads(file.read_text(encoding="utf-8")).get("protocol", ""))
        except (ValueError, AttributeError) as error:
            raise ValueError(f"patients: {str(file)!r} is no results.json ({error}); run abmil.py again") from error
        if not protocol.startswith("abmil"):
            raise ValueError(f"patients: {str(file)!r} is of protocol {protocol!r}; give the folder of an ABMIL result")
    if not of_columns:
        raise ValueError(
            f"patients: predictions.csv in {str(folder)!r} has no columns {PROBABILITY_PREFIX}<class>; run abmil.py "
            f"again"
        )
    return of_columns


def _number(row: Mapping[str, Any], column: str, file: Path) -> float:
    try:
        return float(row[column])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"patients: {str(file)!r} has {row[column]!r} in the column {column}, where a number should be; the file "
            f"is cut or was edited: run abmil.py again"
        ) from error


def _read_attention(file: Path, class_names: Sequence[str]) -> dict[str, tuple[list[str], np.ndarray]]:
    """{patient: (sources, attention [N, 1 or C])}."""
    sources: dict[str, list[str]] = defaultdict(list)
    values: dict[str, list[list[float]]] = defaultdict(list)
    of_classes = [ATTENTION_PREFIX + name for name in class_names]
    for row in _rows(file, ("patient", "source", "attention")):
        columns = of_classes if of_classes[0] in row else ["attention"]
        sources[row["patient"]].append(row["source"])
        values[row["patient"]].append([_number(row, column, file) for column in columns])
    return {patient: (sources[patient], np.array(values[patient])) for patient in sources}


def patients_section(
    folder: Path, features: Features | None = None, *, n_cells: int = DEFAULT_N_CELLS, n_workers: int = 1
) -> Section:
    """The patients of an ABMIL result, wrong ones first.

    The page stays small however many patients there are: of more than `MOST_PATIENTS` the first in that order are
    shown, and with many of them fewer cells of each.

    Args:
        folder: --output-dir of abmil.py, with --apply or without.
        features: with the pictures of the cells, in the order of each patient's cells, where the result itself names
            none (bags from .h5 files without `paths`).
        n_cells: most and least attended cells to show of each patient, at most.
        n_workers: threads that read pictures.

    Raises:
        FileNotFoundError, ValueError: as `read_patient_results`, or if the features are of other cells.
    """
    results = read_patient_results(folder)
    pictures = _pictures_of(results, features)
    ordered = sorted(results.patients, key=lambda patient: (not patient.is_wrong, patient.probabilities.max()))
    shown = ordered[:MOST_PATIENTS]
    n_columns = len(results.class_names) if results.is_of_classes else 0
    n_cells = max(1, min(n_cells, MOST_THUMBNAILS // max(1, len(shown) * (2 + n_columns))))
    views = [_View.of(patient, results, n_cells) for patient in shown]
    wanted = dict.fromkeys(
        picture
        for view in views
        for cell in view.cells
        if (picture := pictures.get(view.patient.id, view.patient.sources)[cell])
    )
    thumbnails = _Thumbnails(list(wanted), make_thumbnails(list(wanted), THUMBNAIL_PX, n_workers))
    cards = [_card(view, results, pictures.get(view.patient.id, view.patient.sources), thumbnails) for view in views]
    parts = [
        thumbnails.style(),
        _introduction(results, len(shown)),
        _controls(results),
        '<div id="patients-list">',
        *cards,
        "</div>",
    ]
    data = {"classes": results.class_names, "patients": [_plain(view, results.class_names) for view in views]}
    return Section("patients", "Patients", "\n".join(parts), data, scripts=("patients.js",), styles=("patients.css",))


def _pictures_of(results: PatientResults, features: Features | None) -> dict[str, list[str]]:
    """{patient: N picture files} from features; empty without them, as sources may be the pictures."""
    if features is None or not results.has_attention:
        return {}
    found: dict[str, list[str]] = defaultdict(list)
    for name, path in zip(features.patients or [], features.paths, strict=features.patients is not None):
        found[name].append(path)
    for patient in results.patients:
        if len(found.get(patient.id, ())) != len(patient.sources):
            raise ValueError(
                f"patients: the features have {len(found.get(patient.id, ()))} cells of patient {patient.id!r}, the "
                f"result {len(patient.sources)}; give the features that it was made from"
            )
    return found


@dataclass(frozen=True, eq=False)
class _View:
    """A patient, and which cells of theirs are shown: positions, most (or least) attended first."""

    patient: Patient
    attention: np.ndarray  # [N], of the predicted class
    most: list[int]
    least: list[int]
    of_classes: list[list[int]]  # a list a class, empty where there is one attention for all

    @property
    def cells(self) -> list[int]:
        return [*self.most, *self.least, *(cell for cells in self.of_classes for cell in cells)]

    @classmethod
    def of(cls, patient: Patient, results: PatientResults, n_cells: int) -> "_View":
        columns = patient.attention.T  # [1 or C, N]
        predicted = results.class_names.index(patient.prediction) if results.is_of_classes else 0
        order = np.argsort(-columns[predicted], kind="stable").tolist()
        return cls(
            patient,
            columns[predicted],
            most=order[:n_cells],
            least=order[n_cells:][::-1][:n_cells],  # no cell is among both
            of_classes=[np.argsort(-column, kind="stable")[:n_cells].tolist() for column in columns]
            if results.is_of_classes
            else [],
        )


class _Thumbnails:
    """Pictures as parts of sheets, each sheet once in the page."""

    def __init__(self, paths: Sequence[str], sheets: ThumbnailSheets) -> None:
        self.positions = {path: i for i, path in enumerate(paths)}
        self.sheets = sheets

    def style(self) -> str:
        rules = [
            f".patients-sheet-{i}{{background-image:url({image_uri(sheet, 'jpeg')})}}"
            for i, sheet in enumerate(self.sheets.sheets)
        ]
        return f"<style>{''.join(rules)}</style>" if rules else ""

    def html(self, path: str, text: str) -> str:
        """The thumbnail, or a frame that says there is none."""
        i = self.positions[path]
        if i in self.sheets.missing:
            reason = escape(f"{text}; no picture: {self.sheets.missing[i]}")
            return (
                f'<span class="patients-thumb patients-none" role="img" aria-label="{reason}" title="{reason}"></span>'
            )
        place, size = i % PER_SHEET, self.sheets.size
        x, y = -(place % N_COLUMNS) * size, -(place // N_COLUMNS) * size
        return (
            f'<span class="patients-thumb patients-sheet-{i // PER_SHEET}" role="img" aria-label="{escape(text)}" '
            f'title="{escape(text)}" style="background-position:{x}px {y}px"></span>'
        )


def _introduction(results: PatientResults, n_shown: int) -> str:
    n_wrong = sum(patient.is_wrong for patient in results.patients)
    n_labelled = sum(patient.label is not None for patient in results.patients)
    right = f", {n_labelled - n_wrong} of {n_labelled} with a known label called right" if n_labelled else ""
    parts = [f"<p>{len(results.patients)} patients{right}.</p>"]
    if n_shown < len(results.patients):
        parts.append(
            f'<p class="note">Shown are {n_shown}: those called wrong, then those with the lowest probabilities. '
            "predictions.csv has all.</p>"
        )
    if any(len(patient.of_networks) > 1 for patient in results.patients):
        parts.append(
            "<p>The number is the mean probability of the networks that judged a patient. The range after it goes from "
            "the lowest to the highest that one of these networks gives the predicted class: it shows how far the "
            "answer depends on chance in training, is no confidence interval, and does not tell how it depends on "
            "which cells were photographed.</p>"
        )
    else:
        parts.append(
            '<p class="note">No ranges: a single network judged the patients, or the result is of an older version. '
            "With several networks (--folds, --runs) abmil.py writes predictions_of_networks.csv, which has them.</p>"
        )
    if results.has_attention:
        parts.append(
            "<p>A cell's attention is its weight in the prediction; the weights of a patient's cells sum to 100 %. "
            "Behind it stands how many times that is an even share. It says what the prediction was made from, not "
            "that it is right.</p>"
        )
    else:
        parts.append(f'<p class="warning">{escape(HOW_TO_GET_ATTENTION)}</p>')
    return "".join(parts)


def _controls(results: PatientResults) -> str:
    classes = "".join(f'<option value="{i}">{escape(name)}</option>' for i, name in enumerate(results.class_names))
    return (
        '<form id="patients-controls" class="patients-controls only-with-script no-print">'
        '<label>Order <select id="patients-order"><option value="wrong">wrong ones first</option>'
        '<option value="unsure">lowest probability first</option>'
        '<option value="sure">highest probability first</option>'
        '<option value="range">widest range first</option><option value="name">name</option></select></label>'
        '<label>Class <select id="patients-class"><option value="">all, as label or prediction</option>'
        f"{classes}</select></label>"
        '<label>Search <input type="search" id="patients-search" placeholder="patient"></label>'
        '<label><input type="checkbox" id="patients-wrong"> wrong ones only</label>'
        '<output id="patients-count" aria-live="polite"></output></form>'
    )


def _percent(value: float) -> Markup:
    return valued(value, f"{100 * value:.1f} %")


def _range_of(patient: Patient, column: int) -> Markup:
    if len(patient.of_networks) < 2:
        return Markup("-")
    low, high = patient.of_networks[:, column].min(), patient.of_networks[:, column].max()
    return Markup(f"{_percent(float(low))} to {_percent(float(high))}")


def _card(view: _View, results: PatientResults, pictures: Sequence[str], thumbnails: _Thumbnails) -> str:
    patient, names = view.patient, results.class_names
    predicted = names.index(patient.prediction)
    verdict = "" if patient.label is None else "wrong" if patient.is_wrong else "right"
    label = f"label {escape(patient.label)}" if patient.label is not None else "label unknown"
    spread = f" ({_range_of(patient, predicted)})" if len(patient.of_networks) > 1 else ""
    agreeing = int((patient.of_networks.argmax(axis=1) == predicted).sum()) if len(patient.of_networks) else 0
    summary = (
        f'<summary><span class="patients-name">{escape(patient.id)}</span> '
        f'<span class="patients-verdict patients-{verdict or "unknown"}">{verdict}</span> {label}, called '
        f"{escape(patient.prediction)} {_percent(float(patient.probabilities[predicted]))}{spread}</summary>"
    )
    rows = [(name, _percent(float(patient.probabilities[i])), _range_of(patient, i)) for i, name in enumerate(names)]
    votes = f", {agreeing} of {len(patient.of_networks)} networks agree" if len(patient.of_networks) > 1 else ""
    body: list[str] = [
        table(("class", "probability", "of single networks"), rows, f"Called {patient.prediction}{votes}")
    ]
    if patient.sources:
        n_effective = 1 / float(np.square(view.attention).sum()) if view.attention.any() else 0.0
        of_class = f" for {escape(patient.prediction)}" if results.is_of_classes else ""
        body.append(
            f"<p>{len(patient.sources)} cells; the attention{of_class} is spread as over "
            f"{valued(n_effective, f'{n_effective:.1f}')} cells that share it evenly (1 / the sum of squared weights)."
            "</p>"
        )
        groups = [("Most attended", view.most, view.attention), ("Least attended", view.least, view.attention)]
        for i, cells in enumerate(view.of_classes):
            groups.append((f"Most attended for {names[i]}", cells, patient.attention[:, i]))
        body += [
            _figure(title, cells, weights, patient, pictures, thumbnails) for title, cells, weights in groups if cells
        ]
    width = float(np.ptp(patient.of_networks[:, predicted])) if len(patient.of_networks) else 0.0
    classes = sorted({predicted, *([names.index(patient.label)] if patient.label in names else [])})
    return (
        f'<details class="card patients-card" data-name="{escape(patient.id)}" data-wrong="{int(patient.is_wrong)}" '
        f'data-probability="{float(patient.probabilities[predicted])!r}" data-range="{width!r}" '
        f'data-classes="{" ".join(map(str, classes))}">{summary}{"".join(body)}</details>'
    )


def _figure(
    title: str,
    cells: Sequence[int],
    weights: np.ndarray,
    patient: Patient,
    pictures: Sequence[str],
    thumbnails: _Thumbnails,
) -> str:
    items = []
    for cell in cells:
        times = float(weights[cell]) * len(weights)
        text = f"cell {cell} of {patient.id}: {pictures[cell]}"
        items.append(
            f'<li data-cell="{cell}">{thumbnails.html(pictures[cell], text)}'
            f"<span>{_percent(float(weights[cell]))}<br>{times:.1f} x</span></li>"
        )
    return f'<h4>{escape(title)}</h4><ol class="patients-cells">{"".join(items)}</ol>'


def _plain(view: _View, class_names: Sequence[str]) -> dict[str, Any]:
    """For other programs; the page's script reads the cards."""
    patient = view.patient
    predicted = class_names.index(patient.prediction)
    spread = patient.of_networks[:, predicted] if len(patient.of_networks) > 1 else None
    return {
        "patient": patient.id,
        "label": patient.label,
        "prediction": patient.prediction,
        "probabilities": patient.probabilities,
        "range": None if spread is None else [spread.min(), spread.max()],
        "networks": len(patient.of_networks),
        "cells": len(patient.sources),
        "most_attended": view.most,
        "least_attended": view.least,
    }

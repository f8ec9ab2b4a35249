"""Patients as bags of cell features: from arrays, from folders of any layout, or from a table.

Layouts of a folder of bags (a .h5 file has the dataset `features` or `feats`, [N, D], or [D] for a single cell):
`<patient>.h5`, the labels in a table with the columns `patient,label`; `<class>/<patient>.h5`; or
`<class>/<patient>/*.h5`, a file per cell (DinoBloom's) or per slide; and those of `bag_layouts`. A table of bags (CSV
or parquet) has the columns `patient,label,file`, a row per .h5, .npy or .pt file; files of one patient make one bag. A
parquet file with the column `vector` has a row per cell, and the columns `patient` and perhaps `label` and `path`.

Letters: P patients, N cells of a patient, D feature dim, C classes
"""

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dinov2.data.datasets.bag_layouts import OTHER_NAMES, find_bags, list_names, read_bag, read_cells_file
from dinov2.data.datasets.tables import read_table
from dinov2.data.datasets.vectors import VECTOR_COLUMN, has_vectors, read_vectors
from dinov2.utils.files import PathLike, local_path

logger = logging.getLogger("dinov2")

# bags whose files differ in one of these are from different networks
IDENTITY = ("checkpoint_sha256", "transform", "kind")


@dataclass(frozen=True, eq=False)
class PatientBags:
    """P patients with the features of their cells."""

    patients: list[str]  # different ids, sorted
    features: list[np.ndarray]  # P times float32 [N, D] with the same D; every N is at least 1, every number finite
    cells: list[list[str]]  # P times N texts, where each cell is from: its image where that is known, else file and row
    labels: np.ndarray | None = None  # int64 [P], positions in `class_names`
    class_names: list[str] = field(default_factory=list)  # empty without labels
    attributes: dict[str, str] = field(default_factory=dict)  # of the network: `checkpoint_sha256`, `transform`, ...

    def __post_init__(self) -> None:
        if not self.patients:
            raise ValueError("bags: there is no patient; give at least one bag of cells")
        for patient, cells in zip(self.patients, self.features, strict=True):
            if cells.ndim != 2 or not len(cells):
                what = f"patient {patient!r} has features of shape {list(cells.shape)}; expected [cells, dim]"
                raise ValueError(f"bags: {what}, not a bag without cells: drop the patient or extract again")
            if n_bad := int((~np.isfinite(cells).all(axis=1)).sum()):
                what = f"{n_bad} of the {len(cells)} cells of patient {patient!r} have infinite or NaN features"
                raise ValueError(f"bags: {what}; extract again, or drop these cells")
        _check_dims(self.patients, self.features)

    def __len__(self) -> int:
        return len(self.patients)

    def known_labels(self) -> np.ndarray:
        """Return the labels; raise a ValueError if there are none."""
        if self.labels is None:
            raise ValueError("--bags: the bags have no labels; give a CSV with the columns patient,label as --labels")
        return self.labels

    def label_of(self) -> dict[str, str]:
        """Return {patient: class}; empty without labels."""
        if self.labels is None:
            return {}
        return {patient: self.class_names[i] for patient, i in zip(self.patients, self.labels, strict=True)}

    def per_class(self, positions: np.ndarray) -> dict[str, int]:
        """Return {class: number} of the labelled bags at these positions."""
        counts = np.bincount(self.known_labels()[positions], minlength=len(self.class_names))
        return dict(zip(self.class_names, counts.tolist(), strict=True))

    def counts(self) -> dict[str, Any]:
        """Return the numbers of patients and cells, and of patients of each class where there are labels."""
        sizes = [len(cells) for cells in self.features]
        counts: dict[str, Any] = {
            "patients": len(self),
            "cells": sum(sizes),
            "cells_of_a_patient": {"min": min(sizes), "median": float(np.median(sizes)), "max": max(sizes)},
        }
        if self.labels is not None:
            counts["patients_per_class"] = self.per_class(np.arange(len(self)))
        return counts

    @classmethod
    def from_cells(
        cls,
        features: np.ndarray,
        patients: Sequence[str] | None,
        cells: Sequence[str],
        cell_labels: Sequence[str] | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> "PatientBags":
        """Group cells in one array, [N_all, D], by patient; `cell_labels` are the labels of each cell's patient."""
        if patients is None:
            raise ValueError(
                "bags: the features name no patients; extract them from a CSV with the columns "
                "`Image Path,Label,patient`, where Label is the patient's class"
            )
        rows = rows_by_patient(patients)
        bags = cls(
            patients=sorted(rows),
            features=[np.asarray(features[rows[name]], dtype=np.float32) for name in sorted(rows)],
            cells=[[cells[row] for row in rows[name]] for name in sorted(rows)],
            attributes=dict(attributes or {}),
        )
        if cell_labels is None:
            return bags
        return bags.with_labels(one_label_each(zip(patients, cell_labels, strict=True), "bags"))

    @classmethod
    def from_path(cls, path: PathLike) -> "PatientBags":
        """Read one of the layouts in the module's docstring; a table's relative files count from its own folder."""
        path = local_path(path)
        if has_vectors(path, "bags"):
            return cls._from_vectors(path)
        rows = find_bags(path)
        parts = defaultdict(list)
        for patient, _, file in sorted(rows, key=itemgetter(0)):  # the order of a patient's files stays
            parts[patient].append(read_bag(file))
        attributes = [attributes for files in parts.values() for _, _, attributes in files]
        for name in IDENTITY:
            values = {of_file.get(name) for of_file in attributes}
            if len(values) > 1:
                raise ValueError(
                    f"bags: files of different networks are mixed, their {name} is "
                    f"{', '.join(sorted(map(repr, values)))}; extract all bags with one checkpoint and one image size"
                )
        for patient, files in parts.items():
            _check_dims([patient] * len(files), [features for features, _, _ in files])
        bags = cls(
            list(parts),
            [np.concatenate([features for features, _, _ in files]) for files in parts.values()],
            [[cell for _, cells, _ in files for cell in cells] for files in parts.values()],
            attributes=dict(sorted(set.intersection(*(set(of_file.items()) for of_file in attributes)))),
        )
        if not any(file.suffix.lower() == ".h5" for _, _, file in rows):
            bags = bags._described(path if path.is_dir() else path.parent)
        labels = [(patient, label) for patient, label, _ in rows if label is not None]
        return bags.with_labels(one_label_each(labels, f"bags {str(path)!r}")) if labels else bags

    @classmethod
    def _from_vectors(cls, file: Path) -> "PatientBags":
        """Read a parquet file with the vector of each cell."""
        table = read_vectors(file, "bags", OTHER_NAMES)
        vectors, texts = table.vectors[VECTOR_COLUMN], table.texts
        if "patient" not in texts:
            raise ValueError(f"bags: {str(file)!r} has no column 'patient' with the patient of each cell; add it")
        cells = texts.get("path", [f"{file}:{row}" for row in range(len(vectors))])
        return cls.from_cells(vectors, texts["patient"], cells, texts.get("label"), table.attributes)

    def _described(self, folder: Path) -> "PatientBags":
        """Return the same bags with the cells and attributes of `CELLS_FILE`, where it has as many of a patient."""
        cells, attributes = read_cells_file(folder)
        known = [cells.get(patient, []) for patient in self.patients]
        cells_of = [new if len(new) == len(old) else old for new, old in zip(known, self.cells, strict=True)]
        return replace(self, cells=cells_of, attributes=attributes)

    def with_labels(self, labels: Mapping[str, str]) -> "PatientBags":
        """Return the same bags with labels, {patient: class}, one for each bag; classes are sorted."""
        unlabelled = [patient for patient in self.patients if patient not in labels]
        if unlabelled:
            what = f"{len(unlabelled)} of {len(self)} bags have none ({list_names(unlabelled)})"
            raise ValueError(f"labels: {what}; add them to the labels, or leave these bags out")
        self.positions(labels, "labels")
        names, ids = np.unique([labels[patient] for patient in self.patients], return_inverse=True)
        return replace(self, labels=ids.astype(np.int64), class_names=names.tolist())

    def select(self, positions: np.ndarray) -> "PatientBags":
        """Return the bags at these positions, sorted by patient; classes keep their ids."""
        chosen = sorted(positions.tolist(), key=self.patients.__getitem__)
        return replace(
            self,
            patients=[self.patients[i] for i in chosen],
            features=[self.features[i] for i in chosen],
            cells=[self.cells[i] for i in chosen],
            labels=None if self.labels is None else self.labels[chosen],
        )

    def joined(self, other: "PatientBags") -> tuple["PatientBags", np.ndarray]:
        """Join the bags of another set; return all of them, and the ascending positions of the other set's."""
        both = sorted(set(self.patients) & set(other.patients))
        if both:
            what = f"{len(both)} patients are in the training and in the test set ({list_names(both)})"
            raise ValueError(f"bags: {what}; remove them from one, or rename them if they are different people")
        check_same_attributes(self.attributes, other.attributes, "the training set", "the test set")
        patients, features = self.patients + other.patients, self.features + other.features
        bags = PatientBags(patients, features, self.cells + other.cells, attributes=self.attributes)
        bags = bags.select(np.arange(len(bags)))
        labels = self.label_of() | other.label_of()
        bags = bags.with_labels(labels) if labels else bags
        return bags, bags.positions(other.patients, "test set")

    def bag_hashes(self) -> list[str]:
        """Return the sha256 of each bag's features, whatever the order of its cells."""
        return [
            hashlib.sha256(b"".join(sorted(np.ascontiguousarray(cell).tobytes() for cell in cells))).hexdigest()
            for cells in self.features
        ]

    def sha256(self) -> str:
        """Hash patients, labels and features; equal bags have equal hashes, however they are stored."""
        content = [self.patients, self.label_of(), self.bag_hashes()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def positions(self, patients: Iterable[str], source: str) -> np.ndarray:
        """Return the positions of these patients, int64, ascending; each must have a bag."""
        wanted = list(patients)
        missing = sorted(set(wanted) - set(self.patients))
        if missing:
            what = f"{len(missing)} of {len(wanted)} patients have no bag ({list_names(missing)})"
            raise ValueError(
                f"{source}: {what}, and the {len(self)} bags are of {list_names(self.patients)}; add the bags of these "
                f"patients, or drop their rows from a copy of the file"
            )
        return np.flatnonzero(pd.Index(self.patients).isin(wanted))


def _check_dims(patients: Sequence[str], features: Sequence[np.ndarray]) -> None:
    dims = pd.Series([cells.shape[1] for cells in features], index=list(patients))
    odd = dims[dims != dims.mode()[0]]
    if len(odd):
        raise ValueError(
            f"bags: features of {', '.join(map(str, sorted(set(dims))))} dimensions are mixed, so they are from "
            f"different networks ({list_names(odd.index)} differ from most); extract all with one checkpoint"
        )


def check_same_attributes(a: Mapping[str, str], b: Mapping[str, str], name_a: str, name_b: str) -> None:
    """Check that two sets' attributes name the same network; an attribute that one lacks is only warned of."""
    for name in IDENTITY:
        if a.get(name) is None or b.get(name) is None:
            logger.warning("cannot check that %s and %s have features of one network: no %s", name_a, name_b, name)
        elif a[name] != b[name]:
            raise ValueError(
                f"features: {name} of {name_a} is {a[name]!r} and of {name_b} {b[name]!r}; extract both with one "
                f"checkpoint and one image size"
            )


def rows_by_patient(patients: Sequence[str]) -> dict[str, np.ndarray]:
    """Return {patient: positions of their cells}."""
    return pd.Series(range(len(patients))).groupby(list(patients)).indices


def read_patient_labels(file: PathLike) -> dict[str, str]:
    """Read {patient: class} from a table with the columns `patient,label`."""
    rows = read_table(Path(file), "labels", ("patient", "label"), other_names=OTHER_NAMES)
    return one_label_each(((row["patient"], row["label"]) for row in rows), f"labels {str(file)!r}")


def one_label_each(pairs: Iterable[tuple[str, str]], source: str) -> dict[str, str]:
    """Return {patient: label} of pairs in which a patient may be several times, but not with two labels."""
    labels_of: dict[str, set[str]] = defaultdict(set)
    for patient, label in pairs:
        labels_of[patient].add(label)
    wrong = sorted(patient for patient, labels in labels_of.items() if len(labels) > 1)
    if wrong:
        raise ValueError(
            f"{source}: {len(wrong)} patients have two labels, for instance {wrong[0]!r} "
            f"{' and '.join(map(repr, sorted(labels_of[wrong[0]])))}; a bag has one: correct it, or, if these are "
            f"classes of cells, give the patients' with --labels"
        )
    return {patient: labels.pop() for patient, labels in labels_of.items()}

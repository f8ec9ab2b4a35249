"""Patients as bags of cell features: from a features file's arrays, from folders of .h5 files, or from a table.

Layouts of a folder, GenBloom's first (a .h5 file has the dataset `features`, [N, D], or [D] for a single cell):

- `<patient>.h5`, the labels in a table with the columns `patient,label`;
- `<class>/<patient>.h5`;
- `<class>/<patient>/*.h5`, a file per cell (DinoBloom's) or per slide.

A table of bags (CSV or parquet) has the columns `patient,label,file`, a row per .h5 file; files of one patient make one
bag.

Letters: P patients, N cells of a patient, D feature dim.
"""

import hashlib
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from dinov2.data.datasets.tables import check_files_exist, is_folder, read_table
from dinov2.utils.paths import local_path

logger = logging.getLogger("dinov2")

PathLike = str | os.PathLike[str]

SUFFIX = ".h5"
# names that other projects' files have for our columns
OTHER_NAMES = {"patient": ("patient_name", "patient_id"), "label": ("Label", "labels")}
# bags whose files differ in one of these are from different networks
IDENTITY = ("checkpoint_sha256", "transform", "kind")
N_EXAMPLES = 5


@dataclass(frozen=True, eq=False)
class PatientBags:
    """P patients with the features of their cells.

    Attributes:
        patients: P different ids, sorted.
        features: P arrays, float32 [N, D] with the same D; every N is at least 1 and every number finite.
        cells: P lists of N texts, where each cell is from: its image where that is known, else file and row.
        labels: int64 [P], positions in `class_names`, or None where the source has no labels.
        class_names: C names; empty without labels.
        attributes: what is known of the network that made the features: `checkpoint_sha256`, `transform`, ...
    """

    patients: list[str]
    features: list[np.ndarray]
    cells: list[list[str]]
    labels: np.ndarray | None = None
    class_names: list[str] = field(default_factory=list)
    attributes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.patients:
            raise ValueError("bags: there is no patient; give at least one bag of cells")
        for patient, cells in zip(self.patients, self.features, strict=True):
            if cells.ndim != 2 or not len(cells):
                raise ValueError(
                    f"bags: patient {patient!r} has features of shape {list(cells.shape)}, so a bag without cells or "
                    f"no bag; expected [cells, dim] with at least one cell: drop the patient or extract again"
                )
            n_bad = int((~np.isfinite(cells).all(axis=1)).sum())
            if n_bad:
                raise ValueError(
                    f"bags: {n_bad} of the {len(cells)} cells of patient {patient!r} have infinite or NaN features; "
                    f"extract again, or drop these cells"
                )
        _check_dims(self.patients, self.features)

    def __len__(self) -> int:
        return len(self.patients)

    @property
    def dim(self) -> int:
        """D."""
        return int(self.features[0].shape[1])

    def known_labels(self) -> np.ndarray:
        """Return the labels; raise a ValueError if there are none."""
        if self.labels is None:
            raise ValueError("--bags: the bags have no labels; give a CSV with the columns patient,label as --labels")
        return self.labels

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
        """Group cells in one array, [N_all, D], by patient; `cell_labels` are the labels of each cell's patient.

        Raises:
            ValueError: if there are no patients, a patient has two labels, or features are not finite.
        """
        if patients is None:
            raise ValueError(
                "bags: the features name no patients; extract them from a CSV with the columns "
                "`Image Path,Label,patient`, where Label is the patient's class"
            )
        rows = pd.Series(range(len(patients))).groupby(list(patients)).indices  # {patient: rows}
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
        """Read one of the layouts in the module's docstring; hidden files and other suffixes are ignored.

        Relative files in a table count from the table's own folder.
        """
        path = local_path(path)
        layouts = (
            "a folder of .h5 files, <patient>.h5 or <class>/<patient>.h5, or a table with the columns "
            "patient,label,file"
        )
        rows = _rows_of_folder(path) if is_folder(path, "bags", layouts) else _rows_of_table(path)
        files: dict[str, list[Path]] = defaultdict(list)
        for patient, _, file in rows:
            files[patient].append(file)
        bags = cls._from_files(files)
        labels = [(patient, label) for patient, label, _ in rows if label is not None]
        return bags.with_labels(one_label_each(labels, f"bags {str(path)!r}")) if labels else bags

    @classmethod
    def _from_files(cls, files: Mapping[str, Sequence[Path]]) -> "PatientBags":
        contents = {patient: [_read_file(path) for path in files[patient]] for patient in sorted(files)}
        attributes = [attributes for parts in contents.values() for _, _, attributes in parts]
        for name in IDENTITY:
            values = {of_file.get(name) for of_file in attributes}
            if len(values) > 1:
                raise ValueError(
                    f"bags: files of different networks are mixed, their {name} is "
                    f"{', '.join(sorted(map(repr, values)))}; extract all bags with one checkpoint and one image size"
                )
        for patient, parts in contents.items():
            _check_dims([patient] * len(parts), [features for features, _, _ in parts])
        return cls(
            list(contents),
            [np.concatenate([features for features, _, _ in parts]) for parts in contents.values()],
            [[cell for _, cells, _ in parts for cell in cells] for parts in contents.values()],
            attributes=dict(sorted(set.intersection(*(set(of_file.items()) for of_file in attributes)))),
        )

    def with_labels(self, labels: Mapping[str, str]) -> "PatientBags":
        """Return the same bags with labels, {patient: class}; classes are sorted.

        Raises:
            ValueError: if a bag has no label, or a label has no bag.
        """
        unlabelled = [patient for patient in self.patients if patient not in labels]
        if unlabelled:
            raise ValueError(
                f"labels: {len(unlabelled)} of {len(self)} bags have none ({list_names(unlabelled)}); add them to the "
                f"labels, or leave these bags out"
            )
        without_bag = sorted(set(labels) - set(self.patients))
        if without_bag:
            raise ValueError(
                f"labels: {len(without_bag)} of {len(labels)} labelled patients have no bag "
                f"({list_names(without_bag)}); extract their cells, or drop them from the labels"
            )
        names, ids = np.unique([labels[patient] for patient in self.patients], return_inverse=True)
        return replace(self, labels=ids.astype(np.int64), class_names=names.tolist())

    def select(self, positions: np.ndarray) -> "PatientBags":
        """Return the bags at these positions, in ascending order; classes keep their ids."""
        chosen = sorted(positions.tolist())
        return replace(
            self,
            patients=[self.patients[i] for i in chosen],
            features=[self.features[i] for i in chosen],
            cells=[self.cells[i] for i in chosen],
            labels=None if self.labels is None else self.labels[chosen],
        )

    def joined(self, other: "PatientBags") -> tuple["PatientBags", np.ndarray]:
        """Join the bags of another set; return all of them, and the ascending positions of the other set's.

        Raises:
            ValueError: if only one has labels, they are from different networks, or they share a patient.
        """
        if (self.labels is None) != (other.labels is None):
            raise ValueError("bags: the training or the test set has no labels; give those of both with --labels")
        both = sorted(set(self.patients) & set(other.patients))
        if both:
            raise ValueError(
                f"bags: {len(both)} patients are in the training and in the test set ({list_names(both)}); remove them "
                f"from one, or rename them if they are different people"
            )
        check_same_attributes(self.attributes, other.attributes, "the training set", "the test set")
        sets = zip(
            self.patients + other.patients, self.features + other.features, self.cells + other.cells, strict=True
        )
        patients, features, cells = map(list, zip(*sorted(sets, key=itemgetter(0)), strict=True))
        bags = PatientBags(patients, features, cells, attributes=self.attributes)
        if self.labels is not None:
            bags = bags.with_labels(self.label_of() | other.label_of())
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

    def label_of(self) -> dict[str, str]:
        """Return {patient: class}; empty without labels."""
        if self.labels is None:
            return {}
        return {patient: self.class_names[i] for patient, i in zip(self.patients, self.labels, strict=True)}

    def positions(self, patients: Iterable[str], source: str) -> np.ndarray:
        """Find the positions of these patients, int64, ascending.

        Raises:
            ValueError: if one of them has no bag.
        """
        where = {patient: i for i, patient in enumerate(self.patients)}
        patients = list(patients)
        missing = [patient for patient in patients if patient not in where]
        if missing:
            raise ValueError(
                f"{source}: {len(missing)} of {len(patients)} patients have no bag ({list_names(missing)}); extract "
                f"their cells, or take them out of the file"
            )
        return np.array(sorted(where[patient] for patient in patients), dtype=np.int64)


def _check_dims(patients: Sequence[str], features: Sequence[np.ndarray]) -> None:
    dims = Counter(cells.shape[1] for cells in features)
    if len(dims) > 1:
        usual = dims.most_common(1)[0][0]
        odd = [patient for patient, cells in zip(patients, features, strict=True) if cells.shape[1] != usual]
        raise ValueError(
            f"bags: features of {', '.join(map(str, sorted(dims)))} dimensions are mixed, so they are from "
            f"different networks ({list_names(odd)} differ from most); extract all with one checkpoint"
        )


def check_no_bag_twice(bags: PatientBags) -> None:
    """Refuse one bag under two names: such a patient could be in train and in test.

    Raises:
        ValueError: if two patients have the same cells, in whatever order.
    """
    names: dict[str, list[str]] = defaultdict(list)
    for patient, digest in zip(bags.patients, bags.bag_hashes(), strict=True):
        names[digest].append(patient)
    repeated = [patients for patients in names.values() if len(patients) > 1]
    if repeated:
        raise ValueError(
            f"bags: {list_names(repeated[0])} have the same cells, so one patient has several names; keep one"
        )


def check_same_attributes(a: Mapping[str, str], b: Mapping[str, str], name_a: str, name_b: str) -> None:
    """Check that two sets' attributes name the same network; an attribute that one lacks is only warned of.

    Raises:
        ValueError: if the checkpoints or the transforms differ.
    """
    for name in IDENTITY:
        if a.get(name) is None or b.get(name) is None:
            logger.warning("cannot check that %s and %s have features of one network: no %s", name_a, name_b, name)
        elif a[name] != b[name]:
            raise ValueError(
                f"features: {name} of {name_a} is {a[name]!r} and of {name_b} {b[name]!r}; extract both with one "
                f"checkpoint and one image size"
            )


def read_patient_labels(file: PathLike) -> dict[str, str]:
    """Read {patient: class} from a table with the columns `patient,label`."""
    rows = read_table(Path(file), "labels", ("patient", "label"), other_names=OTHER_NAMES)
    return one_label_each(((row["patient"], row["label"]) for row in rows), f"labels {str(file)!r}")


def one_label_each(pairs: Iterable[tuple[str, str]], source: str) -> dict[str, str]:
    """Return {patient: label} of (patient, label) pairs, in which a patient may be several times.

    Raises:
        ValueError: if a patient has two labels.
    """
    labels_of: dict[str, set[str]] = defaultdict(set)
    for patient, label in pairs:
        labels_of[patient].add(label)
    wrong = {patient: sorted(labels) for patient, labels in labels_of.items() if len(labels) > 1}
    if wrong:
        patient, labels = next(iter(sorted(wrong.items())))
        raise ValueError(
            f"{source}: {len(wrong)} patients have two labels, for instance {patient!r} "
            f"{' and '.join(map(repr, labels))}; a bag has one: correct it, or, if these are classes of cells, give "
            f"the patients' with --labels"
        )
    return {patient: next(iter(labels)) for patient, labels in labels_of.items()}


# patient, label or None, file
Row = tuple[str, str | None, Path]


def _rows_of_table(file: Path) -> list[Row]:
    rows = read_table(file, "bags", ("patient", "file"), ("label",), OTHER_NAMES)
    check_files_exist([file.parent / row["file"] for row in rows], file, "bags", "files")
    return [(row["patient"], row.get("label"), file.parent / row["file"]) for row in rows]


def _rows_of_folder(folder: Path) -> list[Row]:
    """Find <patient>.h5, <class>/<patient>.h5 and <class>/<patient>/*.h5; patients of the first have no label."""
    flat: list[Row] = [(file.stem, None, file) for file in _visible(folder, "*.[hH]5")]
    whole: list[Row] = [(file.stem, file.parent.name, file) for file in _visible(folder, "*/*.[hH]5")]
    parts: list[Row] = [(file.parent.name, file.parent.parent.name, file) for file in _visible(folder, "*/*/*.[hH]5")]
    if not flat + whole + parts:
        raise ValueError(
            f"bags: no .h5 file in {str(folder)!r} and the folders inside; expected <patient>.h5, "
            f"<class>/<patient>.h5 or <class>/<patient>/*.h5"
        )
    bags = {(label, patient) for patient, label, _ in whole + parts}
    classes = {str(label) for label, _ in bags}
    if flat and bags:
        raise ValueError(
            f"bags: {str(folder)!r} has .h5 files ({flat[0][2].name}, ...) beside folders with .h5 files "
            f"({list_names(sorted(classes))}); keep either one file per patient or one folder per class"
        )
    both = {row[:2] for row in whole} & {row[:2] for row in parts}
    if both:
        names = list_names(sorted(patient for patient, _ in both))
        raise ValueError(f"bags: {str(folder)!r} has both a file and a folder of {names}; keep one")
    folders = [entry for entry in _visible(folder, "*/*") if entry.is_dir() and entry.parent.name in classes]
    empty = [f"{entry.parent.name}/{entry.name}" for entry in folders if (entry.parent.name, entry.name) not in bags]
    if empty:
        raise ValueError(
            f"bags: folders without an .h5 file are bags without cells: {list_names(empty)}; extract these patients' "
            f"cells, or remove the folders"
        )
    others = [entry.name for entry in _visible(folder, "*") if entry.is_dir() and entry.name not in classes]
    if others and bags:
        logger.warning("%s: folders without .h5 files are not classes: %s", folder, ", ".join(others))
    return flat + whole + parts


def _read_file(path: Path) -> tuple[np.ndarray, list[str], dict[str, str]]:
    """Read features, float32 [N, D], where the N cells are from, and the attributes."""
    try:
        with h5py.File(path, "r") as file:
            if "features" not in file:
                raise ValueError(f"bags: {str(path)!r} has no dataset `features`; extract it again")
            features = np.atleast_2d(file["features"][()].astype(np.float32))
            cells = file["paths"].asstr()[:].tolist() if "paths" in file else []
            attributes = {name: str(value) for name, value in file.attrs.items()}
    except (OSError, RuntimeError) as error:  # h5py's, for files of another kind and for broken parts
        raise ValueError(
            f"bags: {str(path)!r} is not an HDF5 file or is damaged ({error}); extract it again"
        ) from error
    if features.ndim != 2:
        raise ValueError(f"bags: {str(path)!r} has features of shape {list(features.shape)}; expected [cells, dim]")
    if len(cells) != len(features):
        cells = [str(path)] if len(features) == 1 else [f"{path}:{row}" for row in range(len(features))]
    return features, cells, attributes


def _visible(folder: Path, pattern: str) -> list[Path]:
    """Find what matches a pattern in `folder`, sorted; hidden names, also of a folder on the way, are left out."""
    return [
        path
        for path in sorted(folder.glob(pattern))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def list_names(names: Iterable[str]) -> str:
    """Write the first names, for an error message."""
    names = list(names)
    return ", ".join(map(repr, names[:N_EXAMPLES])) + (", ..." if len(names) > N_EXAMPLES else "")

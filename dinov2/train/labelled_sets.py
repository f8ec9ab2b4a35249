"""Read the labelled sets of evaluation.datasets, on which a training evaluates its teachers."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.data.splits import make_folds, without_copies

logger = logging.getLogger("dinov2")

# a set is split into the first of the evaluation commands' default folds
N_FOLDS, SPLIT_SEED = 5, 0


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Training and test cells of one entry of evaluation.datasets."""

    name: str
    train: LabelledCells
    test: LabelledCells  # none of these images is in `train`
    ks: list[int]  # numbers of neighbours for kNN, ascending
    with_linear: bool


def read_labelled_sets(evaluation: Any) -> list[LabelledSet]:
    """Read and check the sets of a configuration's section `evaluation`, in its order.

    `{name, train, test}` names two sets. `{name, data}` names one set; a fifth of it is the test set: stratified, of
    whole patients if they are known, the same cells in every run.
    """
    given: Any = OmegaConf.to_container(evaluation.datasets, resolve=True)
    entries = [{"linear": evaluation.linear, "knn_k": list(evaluation.knn_k), **entry} for entry in given]
    for number, entry in enumerate(entries, start=1):
        _check_entry(entry, f"evaluation.datasets, {entry.get('name') or f'entry {number}'}")
    names = [entry["name"] for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError(f"evaluation.datasets: two sets have the same name among {', '.join(names)}; rename one")
    sets = []
    for entry in entries:
        try:
            sets.append(_read(entry))
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"evaluation.datasets, {entry['name']}: {error}") from error
    return sets


def without_copied_images(labelled: LabelledSet) -> LabelledSet:
    """Drop training images that are byte-equal to a test image; reads all files of equal size."""
    n_train = len(labelled.train)
    paths = [str(path) for path in (*labelled.train.paths, *labelled.test.paths)]
    ((kept, _),), _ = without_copies(paths, [(np.arange(n_train), np.arange(n_train, len(paths)))])
    return replace(labelled, train=_select(labelled.train, kept))


def _check_entry(entry: Mapping[str, Any], where: str) -> None:
    for key in entry.keys() - {"name", "data", "train", "test", "linear", "knn_k"}:
        raise KeyError(f"{where}: unknown key {key}; there are name, data, train, test, linear, knn_k")
    for key in entry.keys() & {"name", "data", "train", "test"}:
        if not isinstance(entry[key], str):
            raise ValueError(f"{where}: {key} must be a text (in quotes, if it is a number), found {entry[key]!r}")
    if not isinstance(entry["linear"], bool):
        raise ValueError(f"{where}: linear must be true or false, found {entry['linear']!r}")
    ks = entry["knn_k"]
    if not isinstance(ks, list) or not ks or not all(type(k) is int and k >= 1 for k in ks):
        raise ValueError(f"{where}: knn_k must be a list of whole numbers above 0, like [1, 20], found {ks!r}")
    if not entry.get("name"):
        raise ValueError(f"{where}: it has no name; add one, for its results")
    given = [key for key in ("data", "train", "test") if entry.get(key)]
    if given not in (["data"], ["train", "test"]):
        raise ValueError(
            f"{where}: found {' and '.join(given) or 'no cells'}; give data (one set, split here), or train and test"
        )


def _read(entry: Mapping[str, Any]) -> LabelledSet:
    if entry.get("data"):
        train, test = _split(LabelledCells.from_path(entry["data"]))
    else:
        train = LabelledCells.from_path(entry["train"])
        test = LabelledCells.from_path(entry["test"], train.class_names)
    labelled = LabelledSet(entry["name"], train, test, sorted(set(entry["knn_k"])), entry["linear"])
    _check_sides(labelled)
    return labelled


def _split(cells: LabelledCells) -> tuple[LabelledCells, LabelledCells]:
    try:
        train, test = make_folds(cells.labels, cells.patients, N_FOLDS, SPLIT_SEED)[0]
    except ValueError as error:
        n_patients = "" if cells.patients is None else f" of {len(set(cells.patients))} patients"
        raise ValueError(
            f"a fifth of its {len(cells)} cells{n_patients} cannot be set apart, by class and by whole patients; give "
            f"train and test instead of data"
        ) from error
    return _select(cells, train), _select(cells, test)


def _select(cells: LabelledCells, positions: np.ndarray) -> LabelledCells:
    patients = None if cells.patients is None else [cells.patients[i] for i in positions]
    return LabelledCells([cells.paths[i] for i in positions], cells.labels[positions], cells.class_names, patients)


def _check_sides(labelled: LabelledSet) -> None:
    train, test = labelled.train, labelled.test
    train_files, test_files = ({os.path.realpath(path) for path in cells.paths} for cells in (train, test))
    if shared := train_files & test_files:
        raise ValueError(
            f"training and test cells share {len(shared)} images, for instance {min(shared)}; an image may be in only "
            f"one of them: remove it from the other, or list it once"
        )
    train_labels = set(train.labels.tolist())
    if len(train_labels) < 2:
        raise ValueError(
            f"all {len(train)} training cells are of class {train.class_names[train.labels[0]]!r}; two classes or more "
            f"are needed"
        )
    if labelled.ks[-1] > len(train):
        raise ValueError(
            f"knn_k asks for {labelled.ks[-1]} neighbours of {len(train)} training cells; choose numbers up to that"
        )
    if unseen := sorted(set(test.labels.tolist()) - train_labels):
        names = ", ".join(test.class_names[i] for i in unseen)
        logger.warning("%s: test classes without a training cell, always predicted wrong: %s", labelled.name, names)
    if shared_patients := set(train.patients or ()) & set(test.patients or ()):
        logger.warning("%s: %d patients have cells in both train and test", labelled.name, len(shared_patients))

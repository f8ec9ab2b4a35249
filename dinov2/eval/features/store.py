"""Features of labelled cells, their file (.h5 or .parquet), and two sets of features: compared and joined.

A file has one main kind of features, which protocols take by default, and perhaps further kinds of the same cells
(`encoders` names the kinds).

Dimension key:  N images, D embedding dim, h x w patches of one image
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dinov2.data.datasets.labelled_cells import UNLABELLED
from dinov2.data.datasets.tables import LABEL_COLUMN, PATH_COLUMN, is_parquet
from dinov2.data.datasets.vectors import VECTOR_COLUMN, VectorTable, read_vectors, write_vectors
from dinov2.utils.files import PathLike, atomic_write, local_path
from dinov2.utils.h5 import checked_dataset, open_h5, read_numbers, read_texts, write_attribute, write_texts

logger = logging.getLogger("dinov2")

DEFAULT_KIND = "cls"  # of files without the attribute `kind`
PATCHES = "patches"
PATCH_GRID = "patch_grid"
OTHER_PREFIX = "features_"
TEXTS = ("class_names", "paths", "patients", "unreadable")
REQUIRED_TEXTS = TEXTS[:2]
COLUMN_NAMES = {"label": (LABEL_COLUMN,), "path": (PATH_COLUMN,)}  # further names of parquet's columns
NETWORK_ATTRIBUTES = ("checkpoint_sha256", "transform")  # two sets must share them, or distances mean nothing


@dataclass(frozen=True)
class Features:
    """Features of labelled cells: the content of a features file.

    The attributes state the origin of the features: `model`, `checkpoint`, `checkpoint_sha256`, `transform`,
    `precision`, `image_size` and `date`.
    """

    features: np.ndarray  # float32 [N, D]
    labels: np.ndarray  # int64 [N], positions in `class_names`
    class_names: list[str]  # all classes, also those without a cell here; cells without labels are `UNLABELLED`
    paths: list[str]  # absolute
    patients: list[str] | None = None  # of each cell, if the source names them
    unreadable: list[str] = field(default_factory=list)  # images of the source without features
    attributes: dict[str, str] = field(default_factory=dict)
    kind: str = DEFAULT_KIND  # of `features`
    others: dict[str, np.ndarray] = field(default_factory=dict)  # {kind: float32 [N, D of that kind]}, the same cells

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def has_labels(self) -> bool:
        """Return whether the cells have labels."""
        return self.class_names != [UNLABELLED]

    @property
    def kinds(self) -> list[str]:
        """Return all kinds, that of `features` first."""
        return [self.kind, *self.others]

    def of_kind(self, kind: str) -> "Features":
        """Return the same cells with `features` of this kind, and the former kind among the others."""
        if kind == self.kind:
            return self
        if kind not in self.others:
            raise ValueError(
                f"features: there are none of kind {kind!r}, only {', '.join(self.kinds)}; extract again with "
                f"--kinds {' '.join([*self.kinds, kind])}"
            )
        by_kind = {self.kind: self.features, **self.others}
        return replace(self, features=by_kind.pop(kind), kind=kind, others=by_kind)

    def select(self, rows: np.ndarray) -> "Features":
        """Return the cells at integer positions, or where a mask [N] is True."""
        positions = np.arange(len(self))[rows].tolist()
        return replace(
            self,
            features=self.features[positions],
            labels=self.labels[positions],
            paths=[self.paths[i] for i in positions],
            patients=[self.patients[i] for i in positions] if self.patients is not None else None,
            others={kind: values[positions] for kind, values in self.others.items()},
        )


def write_features(
    path: PathLike,
    features: Features,
    patch_grids: Iterable[np.ndarray] = (),
    add: Callable[[h5py.File], None] = lambda _: None,
) -> None:
    """Write a features file, which appears at `path` when it is complete: .parquet by this suffix, else .h5.

    The datasets of .h5 are `features`, `features_<kind>` for each other kind, `labels`, `class_names`, `paths`,
    `patients` (if there are any), `unreadable` and perhaps `patch_grid`; its attributes are those of `features`, and
    `kind`. Patch grids are float16 [n, h, w, D] of consecutive cells; together they have N, and may be larger than
    memory. `add` adds to the open file what other tools read. Parquet has the columns of
    `dinov2.data.datasets.vectors`, and no patch grids.
    """
    if is_parquet(Path(path)):
        write_vectors(path, _to_table(features))
        return
    with atomic_write(path, "w+b") as stream, h5py.File(stream, "w") as file:
        file["features"] = features.features.astype(np.float32, copy=False)
        for kind, values in features.others.items():
            file[OTHER_PREFIX + kind] = values.astype(np.float32, copy=False)
        file["labels"] = features.labels.astype(np.int64)
        for name in TEXTS:
            if (texts := getattr(features, name)) is not None:
                write_texts(file, name, texts)
        done = 0
        for grids in patch_grids:
            if PATCH_GRID not in file:
                file.create_dataset(PATCH_GRID, (len(features), *grids.shape[1:]), dtype=np.float16)
            file[PATCH_GRID][done : done + len(grids)] = grids
            done += len(grids)
        assert done in (0, len(features)), "as many patch grids as cells"
        for name, value in {**features.attributes, "kind": features.kind}.items():
            write_attribute(file, name, value)
        add(file)


def read_features(path: PathLike, with_vectors: bool = True) -> Features:
    """Read a features file, without patch grids; ValueError if it is no features file, damaged or inconsistent.

    Without vectors, everything else is read, and `features` and `others` are [N, 0].
    """
    if is_parquet(local_path(path)):
        return _from_table(local_path(path), with_vectors)
    read = _read_vectors if with_vectors else _read_no_vectors
    with _opened(path) as file:
        attributes = {name: str(value) for name, value in file.attrs.items()}
        kind = attributes.pop("kind", DEFAULT_KIND)
        by_kind = {kind: read(file, "features")}
        for other in _other_kinds(file):
            by_kind[other] = read(file, OTHER_PREFIX + other)
        features = Features(
            features=by_kind.pop(kind),
            labels=read_numbers(file, "labels", (1,), "iu").astype(np.int64),
            kind=kind,
            others=by_kind,
            attributes=attributes,
            **{name: read_texts(file, name) for name in TEXTS if name in file or name in REQUIRED_TEXTS},
        )
        _check_consistent(features, with_vectors)
    return features


def _read_vectors(file: h5py.File, name: str) -> np.ndarray:
    return read_numbers(file, name, (2,)).astype(np.float32, copy=False)


def _read_no_vectors(file: h5py.File, name: str) -> np.ndarray:
    return np.zeros((len(checked_dataset(file, name, (2,))), 0), dtype=np.float32)


def _check_consistent(features: Features, with_vectors: bool) -> None:
    vectors = {"features": features.features, **{OTHER_PREFIX + kind: v for kind, v in features.others.items()}}
    columns = {**vectors, "labels": features.labels, "paths": features.paths, "patients": features.patients}
    lengths = {name: len(values) for name, values in columns.items() if values is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"has parts of different lengths {lengths}")
    if empty := [name for name, values in vectors.items() if with_vectors and not values.size]:
        raise ValueError(f"has no cells or no columns in {', '.join(empty)}")
    n_classes = len(features.class_names)
    if len(set(features.class_names)) < n_classes:
        raise ValueError("has a class name twice")
    if not 0 <= features.labels.min() <= features.labels.max() < n_classes:
        raise ValueError(
            f"has labels from {features.labels.min()} to {features.labels.max()}, which should be positions among "
            f"{n_classes} class names"
        )


def stored_kinds(path: PathLike) -> list[str]:
    """Return the kinds of features in a file, that of `features` first, "patches" last if it has patch grids."""
    if is_parquet(local_path(path)):
        return read_features(path, with_vectors=False).kinds
    with _opened(path) as file:
        kind = str(file.attrs.get("kind", DEFAULT_KIND))
        return [kind, *_other_kinds(file), *([PATCHES] if PATCH_GRID in file else [])]


def _other_kinds(file: h5py.File) -> list[str]:
    return [name.removeprefix(OTHER_PREFIX) for name in file if name.startswith(OTHER_PREFIX)]


def _to_table(features: Features) -> VectorTable:
    texts = {"label": [features.class_names[i] for i in features.labels]} if features.has_labels else {}
    if features.patients is not None:
        texts["patient"] = features.patients
    vectors = {VECTOR_COLUMN: features.features}
    vectors |= {f"{VECTOR_COLUMN}_{kind}": values for kind, values in features.others.items()}
    lists = {"class_names": features.class_names, "unreadable": features.unreadable}
    metadata = {**features.attributes, "kind": features.kind, **lists}
    return VectorTable(vectors, {**texts, "path": features.paths}, metadata)


def _from_table(file: Path, with_vectors: bool) -> Features:
    """Read the parquet file of `_to_table`, or of another tool, which has no metadata of ours and perhaps no paths."""
    table = read_vectors(file, "features", COLUMN_NAMES, with_vectors)
    by_kind = {name.removeprefix(f"{VECTOR_COLUMN}_"): values for name, values in table.vectors.items()}
    features = by_kind.pop(VECTOR_COLUMN)
    names = table.texts.get("label", [UNLABELLED] * len(features))
    class_names = _texts(table, "class_names")
    if not set(names) <= set(class_names):
        class_names = sorted(set(names))
    positions = {name: i for i, name in enumerate(class_names)}
    attributes = table.attributes
    return Features(
        features=features,
        labels=np.array([positions[name] for name in names], dtype=np.int64),
        class_names=class_names,
        paths=table.texts.get("path", [f"{file}:{row}" for row in range(len(features))]),
        patients=table.texts.get("patient"),
        unreadable=_texts(table, "unreadable"),
        kind=attributes.pop("kind", DEFAULT_KIND),
        others=by_kind,
        attributes=attributes,
    )


def _texts(table: VectorTable, name: str) -> list[str]:
    values = table.metadata.get(name)
    return list(map(str, values)) if isinstance(values, list) else []


@contextmanager
def _opened(path: PathLike) -> Iterator[h5py.File]:
    try:
        with open_h5(path, "features") as file:
            yield file
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; dinov2/eval/extract_features.py writes one") from error


def check_labels(features: Features, source: object) -> None:
    """Raise ValueError if cells have no labels."""
    if not features.has_labels:
        raise ValueError(
            f"labels: the cells of {str(source)!r} have none, and there is nothing to learn or to compare with; "
            f"extract them from a folder with one folder per class, or from a CSV with the column Label"
        )


def check_finite(features: Features, source: Path) -> None:
    """Raise ValueError with the name of the file if features are infinite or NaN."""
    for values in (features.features, *features.others.values()):
        is_finite = np.isfinite(values).all(axis=1)
        if not is_finite.all():
            example = features.paths[int(np.argmin(is_finite))]
            raise ValueError(
                f"features: {int((~is_finite).sum())} of {len(features)} in {str(source)!r} are infinite or NaN, for "
                f"instance those of {example!r}; extract again, with weights that did not diverge"
            )


def check_same_network(train: Features, test: Features) -> None:
    """Raise ValueError if features are of two networks, kinds, sizes or image transforms."""
    pairs: dict[str, tuple[Any, Any]]
    pairs = {name: (train.attributes.get(name), test.attributes.get(name)) for name in NETWORK_ATTRIBUTES}
    pairs["kind of features"] = train.kind, test.kind
    pairs["count of numbers a cell"] = train.features.shape[1], test.features.shape[1]
    for name, (of_train, of_test) in pairs.items():
        if of_train != of_test:
            raise ValueError(
                f"--features and --test-features: {name} differs, {of_train!r} and {of_test!r}; extract both with one "
                f"checkpoint, image size and --kinds, or choose a --kind that both have"
            )


def align_classes(features: Features, class_names: list[str]) -> Features:
    """Return the features with labels that are positions in `class_names`; ValueError for a cell of another class."""
    unknown = sorted({features.class_names[i] for i in features.labels} - set(class_names))
    if unknown:
        raise ValueError(
            f"test features: classes {', '.join(map(repr, unknown))} are not among the training set's "
            f"{', '.join(map(repr, class_names))}; extract both from sets with the same class names"
        )
    new_ids = np.array([class_names.index(name) if name in class_names else -1 for name in features.class_names])
    return replace(features, labels=new_ids[features.labels], class_names=class_names)


def join(train: Features, test: Features) -> Features:
    """Join two sets of one network and the same classes, the training set first, with the attributes of the first.

    Patients and further kinds of features are kept if both sets have them.
    """
    patients = None if train.patients is None or test.patients is None else train.patients + test.patients
    if patients is None and (train.patients is not None or test.patients is not None):
        logger.warning("patients are known of one of the two sets only and not used")
    common = [kind for kind in train.others if kind in test.others]
    return replace(
        train,
        features=np.concatenate([train.features, test.features]),
        labels=np.concatenate([train.labels, test.labels]),
        paths=train.paths + test.paths,
        patients=patients,
        unreadable=list(dict.fromkeys(train.unreadable + test.unreadable)),
        others={kind: np.concatenate([train.others[kind], test.others[kind]]) for kind in common},
    )

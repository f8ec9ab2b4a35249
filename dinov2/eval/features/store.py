"""The features file (.h5): features of labelled cells, written by `extract_features` and read by every protocol.

A file has one main kind of features, which protocols take by default, and perhaps further kinds of the same cells
(`encoders` names the kinds).

Dimension key:  N images, D embedding dim, h x w patches of one image
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import h5py
import numpy as np

from dinov2.utils.files import atomic_write
from dinov2.utils.paths import local_path

PathLike = str | os.PathLike[str]

DEFAULT_KIND = "cls"  # of files without the attribute `kind`
PATCHES = "patches"
PATCH_GRID = "patch_grid"
OTHER_PREFIX = "features_"
TEXTS = ("class_names", "paths", "patients", "unreadable")


@dataclass(frozen=True)
class Features:
    """Features of labelled cells: the content of a features file.

    Attributes:
        features: float32 [N, D].
        labels: int64 [N], positions in `class_names`.
        class_names: of all classes, also those without a cell here.
        paths: N image files, absolute.
        patients: N patient ids, or None if the source names none.
        unreadable: images of the source without features.
        attributes: the origin of the features: `model`, `checkpoint`, `checkpoint_sha256`, `transform`, `precision`,
            `image_size`, `date`.
        kind: of `features`.
        others: {kind: float32 [N, D of that kind]} of the same cells.
    """

    features: np.ndarray
    labels: np.ndarray
    class_names: list[str]
    paths: list[str]
    patients: list[str] | None = None
    unreadable: list[str] = field(default_factory=list)
    attributes: dict[str, str] = field(default_factory=dict)
    kind: str = DEFAULT_KIND
    others: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def kinds(self) -> list[str]:
        """Return all kinds, that of `features` first."""
        return [self.kind, *self.others]

    def of_kind(self, kind: str) -> "Features":
        """Return the same cells with `features` of this kind, and the former kind among the others.

        Raises:
            ValueError: if the kind is missing.
        """
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


def write_features(path: PathLike, features: Features, patch_grids: Iterable[np.ndarray] = ()) -> None:
    """Write a features file, which appears at `path` when it is complete.

    Its datasets are `features`, `features_<kind>` for each other kind, `labels`, `class_names`, `paths`, `patients` (if
    there are any), `unreadable` and perhaps `patch_grid`; its attributes are those of `features`, and `kind`.

    Args:
        path: of the file; its folder is made if missing.
        features: N cells.
        patch_grids: float16 [n, h, w, D] of consecutive cells; together they have N, and may be larger than memory.
    """
    with atomic_write(path, "w+b") as stream, h5py.File(stream, "w") as file:
        file["features"] = features.features.astype(np.float32, copy=False)
        for kind, values in features.others.items():
            file[OTHER_PREFIX + kind] = values.astype(np.float32, copy=False)
        file["labels"] = features.labels.astype(np.int64)
        for name in TEXTS:
            values = getattr(features, name)
            if values is not None:
                file.create_dataset(name, data=np.array(values, dtype=object), dtype=h5py.string_dtype())
        done = 0
        for grids in patch_grids:
            if PATCH_GRID not in file:
                file.create_dataset(PATCH_GRID, (len(features), *grids.shape[1:]), dtype=np.float16)
            file[PATCH_GRID][done : done + len(grids)] = grids
            done += len(grids)
        assert done in (0, len(features)), "as many patch grids as cells"
        file.attrs.update({**features.attributes, "kind": features.kind})


def read_features(path: PathLike) -> Features:
    """Read a features file, without patch grids.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is no features file, damaged, or inconsistent.
    """
    path = _existing_file(path)
    try:
        with h5py.File(path, "r") as file:
            missing = [name for name in ("features", "labels", "class_names", "paths") if name not in file]
            if missing:
                raise ValueError(
                    f"features: {str(path)!r} has no dataset {', '.join(missing)}; "
                    f"dinov2/eval/extract_features.py writes a file that has"
                )
            attributes = {name: str(value) for name, value in file.attrs.items()}
            features = Features(
                features=_read_vectors(file, "features"),
                labels=file["labels"][:].astype(np.int64),
                kind=attributes.pop("kind", DEFAULT_KIND),
                others={kind: _read_vectors(file, OTHER_PREFIX + kind) for kind in _other_kinds(file)},
                attributes=attributes,
                **{name: file[name].asstr()[:].tolist() for name in TEXTS if name in file},
            )
    except (OSError, RuntimeError) as error:  # h5py's, for other and for damaged files
        raise _damaged(path, error) from error
    _check_consistent(features, path)
    return features


def _read_vectors(file: h5py.File, name: str) -> np.ndarray:
    return file[name][:].astype(np.float32, copy=False)


def _check_consistent(features: Features, path: Path) -> None:
    lengths = {name: len(getattr(features, name)) for name in ("features", "labels", "paths")}
    lengths |= {OTHER_PREFIX + kind: len(values) for kind, values in features.others.items()}
    if features.patients is not None:
        lengths["patients"] = len(features.patients)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"features: {str(path)!r} has parts of different lengths {lengths}; extract again")
    n_classes = len(features.class_names)
    shapes = [list(values.shape) for values in (features.features, *features.others.values())]
    are_vectors = len(features) > 0 and all(len(shape) == 2 for shape in shapes)
    if not are_vectors or not 0 <= features.labels.min() <= features.labels.max() < n_classes:
        raise ValueError(
            f"features: {str(path)!r} has features of shape {', '.join(map(str, shapes))} and labels that should be "
            f"positions among {n_classes} class names; extract again"
        )


def stored_kinds(path: PathLike) -> list[str]:
    """Return the kinds of features in a file, that of `features` first, "patches" last if it has patch grids.

    Raises:
        FileNotFoundError, ValueError: as `read_features`.
    """
    path = _existing_file(path)
    try:
        with h5py.File(path, "r") as file:
            kind = str(file.attrs.get("kind", DEFAULT_KIND))
            return [kind, *_other_kinds(file), *([PATCHES] if PATCH_GRID in file else [])]
    except (OSError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _other_kinds(file: h5py.File) -> list[str]:
    return [name.removeprefix(OTHER_PREFIX) for name in file if name.startswith(OTHER_PREFIX)]


def _existing_file(path: PathLike) -> Path:
    """Return the file on this machine; `path` may be a URL."""
    file = local_path(path)
    if not file.is_file():
        raise FileNotFoundError(f"features: no file {str(path)!r}; dinov2/eval/extract_features.py writes one")
    return file


def _damaged(path: PathLike, error: Exception) -> ValueError:
    return ValueError(f"features: {str(path)!r} is not an HDF5 file or is damaged ({error}); extract again")

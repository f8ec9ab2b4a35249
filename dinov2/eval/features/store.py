"""Features of labelled cells in one file: what `extract_features` writes and every protocol reads.

A file has one kind of features that protocols take unless told otherwise, and may have more of the same cells. Kinds
are named in `embedding`.

Dimension key:  N pictures, D embedding dim, h x w patches of one picture
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

DEFAULT_KIND = "cls"  # what files without the attribute `kind` hold
PATCHES = "patches"
OTHER_PREFIX = "features_"
PATCH_GRID = "patch_grid"


@dataclass(frozen=True)
class Features:
    """Features of labelled cells, as they stand in a features file.

    Attributes:
        features: float32 [N, D].
        labels: int64 [N], positions in `class_names`.
        class_names: of all classes, also of those without a cell here.
        paths: N picture files, absolute.
        patients: N patient ids, or None where the source names none.
        unreadable: pictures of the source that have no features here.
        attributes: where the features are from: `model`, `checkpoint`, `checkpoint_sha256`, `transform`, `precision`,
            `image_size`, `date`.
        kind: what of the network `features` are.
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
        """Those of `of_kind`, that of `features` first."""
        return [self.kind, *self.others]

    def of_kind(self, kind: str) -> "Features":
        """The same cells with `features` of this kind; the kind that was there is among the others.

        Raises:
            ValueError: if there are none.
        """
        if kind == self.kind:
            return self
        if kind not in self.others:
            raise ValueError(
                f"features: there are none of kind {kind!r}, only {', '.join(self.kinds)}; extract again with "
                f"--kinds {' '.join([*self.kinds, kind])}"
            )
        all_kinds = {self.kind: self.features, **self.others}
        return replace(self, features=all_kinds.pop(kind), kind=kind, others=all_kinds)

    def select(self, rows: np.ndarray) -> "Features":
        """The features of some cells: integer positions or a mask [N]."""
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
    """Write an .h5 file; `path` appears when it is complete.

    It has the datasets `features`, `features_<kind>` for each other kind, `labels`, `class_names`, `paths`, `patients`
    (if there are any), `unreadable` and perhaps `patch_grid`, and the attributes with `kind` among them.

    Args:
        path: of the file; its folder is made if missing.
        features: N cells.
        patch_grids: float16 [n, h, w, D] each, of the N cells in their order, n at a time: the whole may be larger than
            memory.
    """
    text = h5py.string_dtype()
    with atomic_write(path, "w+b") as stream, h5py.File(stream, "w") as file:
        file["features"] = features.features.astype(np.float32, copy=False)
        for kind, values in features.others.items():
            file[OTHER_PREFIX + kind] = values.astype(np.float32, copy=False)
        file["labels"] = features.labels.astype(np.int64)
        for name in ("class_names", "paths", "patients", "unreadable"):
            values = getattr(features, name)
            if values is not None:
                file.create_dataset(name, data=np.array(values, dtype=object), dtype=text)
        done = 0
        for grids in patch_grids:
            if PATCH_GRID not in file:
                file.create_dataset(PATCH_GRID, (len(features), *grids.shape[1:]), dtype=np.float16)
            file[PATCH_GRID][done : done + len(grids)] = grids
            done += len(grids)
        assert done in (0, len(features)), "as many patch grids as cells"
        file.attrs.update({**features.attributes, "kind": features.kind})


def read_features(path: PathLike) -> Features:
    """Read what `write_features` wrote, without the patch grids.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file, is damaged, or its parts do not fit together.
    """
    path = _existing(path)
    try:
        with h5py.File(path, "r") as file:
            missing = [name for name in ("features", "labels", "class_names", "paths") if name not in file]
            if missing:
                raise ValueError(
                    f"features: {str(path)!r} has no dataset {', '.join(missing)}; "
                    f"dinov2/eval/extract_features.py writes a file that has"
                )
            texts = {
                name: file[name].asstr()[:].tolist()
                for name in ("class_names", "paths", "patients", "unreadable")
                if name in file
            }
            attributes = {name: str(value) for name, value in file.attrs.items()}
            kind = attributes.pop("kind", DEFAULT_KIND)
            found = Features(
                features=file["features"][:].astype(np.float32, copy=False),
                labels=file["labels"][:].astype(np.int64),
                class_names=texts["class_names"],
                paths=texts["paths"],
                patients=texts.get("patients"),
                unreadable=texts.get("unreadable", []),
                attributes=attributes,
                kind=kind,
                others={
                    other: file[OTHER_PREFIX + other][:].astype(np.float32, copy=False) for other in _other_kinds(file)
                },
            )
    except (OSError, RuntimeError) as error:  # h5py's, for files of another kind and for broken parts
        raise _damaged(path, error) from error
    lengths = {name: len(getattr(found, name)) for name in ("features", "labels", "paths")}
    lengths |= {OTHER_PREFIX + other: len(values) for other, values in found.others.items()}
    if found.patients is not None:
        lengths["patients"] = len(found.patients)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"features: {str(path)!r} has parts of different lengths {lengths}; extract again")
    n_classes = len(found.class_names)
    shapes = [list(values.shape) for values in (found.features, *found.others.values())]
    if (
        any(len(shape) != 2 for shape in shapes)
        or not len(found)
        or not 0 <= found.labels.min() <= found.labels.max() < n_classes
    ):
        raise ValueError(
            f"features: {str(path)!r} has features of shape {', '.join(map(str, shapes))} and labels that should be "
            f"positions among {n_classes} class names; extract again"
        )
    return found


def stored_kinds(path: PathLike) -> list[str]:
    """The kinds of features in a file, that of `features` first; with "patches" where it has patch grids.

    Raises:
        FileNotFoundError, ValueError: as `read_features`.
    """
    path = _existing(path)
    try:
        with h5py.File(path, "r") as file:
            kind = str(file.attrs.get("kind", DEFAULT_KIND))
            return [kind, *_other_kinds(file), *([PATCHES] if PATCH_GRID in file else [])]
    except (OSError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _other_kinds(file: h5py.File) -> list[str]:
    return [name.removeprefix(OTHER_PREFIX) for name in file if name.startswith(OTHER_PREFIX)]


def _existing(path: PathLike) -> Path:
    """Return the file on this machine; `path` may be a URL."""
    file = local_path(path)
    if not file.is_file():
        raise FileNotFoundError(f"features: no file {str(path)!r}; dinov2/eval/extract_features.py writes one")
    return file


def _damaged(path: PathLike, error: Exception) -> ValueError:
    return ValueError(f"features: {str(path)!r} is not an HDF5 file or is damaged ({error}); extract again")

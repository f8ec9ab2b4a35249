"""Layouts of patients' features, of this project and of other tools: one table, and the reader of their files.

The features of a patient, [N, D], are in a file of their own: `features` or `feats` in .h5, or an array in .npy or .pt.
`LAYOUTS` says how the file is called and what lies beside it; `dinov2.eval.features.layouts` writes by it. No code in a
file is run, and what a file declares is compared with its size before memory is taken.

Letters: N cells of a patient, D feature dim
"""

import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datasets.tables import check_files_exist, is_folder, read_table
from dinov2.utils.command import ADVICE
from dinov2.utils.files import check_regular_file
from dinov2.utils.h5 import open_h5, read_numbers, read_texts

# names that other projects' files have for our columns
OTHER_NAMES = {
    "patient": ("patient_name", "patient_id", "PATIENT", "patient_files", "case_id", "wsi_id"),
    "label": ("Label", "labels", "target"),
    "file": ("FILENAME", "embeddings"),
}
BAG_SUFFIXES = (".h5", ".npy", ".pt")
# a features file without vectors, beside .npy and .pt files: their cells and network, for this project's own commands
CELLS_FILE = "cells.h5"
DATASETS = ("features", "feats")  # of .h5: the names that the features may have
LARGEST_COMPRESSION = 4  # bytes that a .pt file unpacks to, for each of its bytes; torch.save does not compress
SETTING = "bags"  # the first words of errors
EXPECTED = (
    "a folder of .h5 files, <patient>.h5 or <class>/<patient>.h5, or one that extract_features.py --layout or another "
    "tool wrote, or a table: patient,label,file"
)
N_EXAMPLES = 5


def list_names(names: Iterable[str]) -> str:
    """Join the first `N_EXAMPLES` names for an error message, with "..." if there are more."""
    names = list(names)
    return ", ".join(map(repr, names[:N_EXAMPLES])) + (", ..." if len(names) > N_EXAMPLES else "")


# --- the table of layouts -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout of features: paths in the output folder, in which {patient} and {label} stand for `file_name` of these.

    A file without {patient} has all cells. A .h5 file is a whole features file of this project, which other tools may
    read, too: `dataset`, `coords` and `attributes` are what it has for them on top.
    """

    file: str  # features [N, D]: .h5, .npy or .pt; features of all cells: .h5 or .parquet
    label_file: str = ""  # .npy: int64 [1], the position of the patient's label among the classes
    tensor_file: str = ""  # .pt: the features once more
    dataset: str = DATASETS[0]  # further name of the features
    coords: str = ""  # type of the dataset `coords`, [N, 2], all 0: a cell has no place on a slide; "": there is none
    attributes: Callable[[Mapping[str, str]], dict[str, Any]] = lambda _: {}  # from those of the features
    table: str = ""  # CSV with a row for each patient; "": there is none
    columns: Mapping[str, str] = field(default_factory=dict)  # of the table: {name: key of `table_row`, or ""}

    @property
    def is_one_file(self) -> bool:
        """Return whether one file has all cells."""
        return "{patient}" not in self.file

    @property
    def files(self) -> list[str]:
        """Return the templates of all files of a patient; the last one has the features."""
        return [template for template in (self.label_file, self.tensor_file, self.file) if template]


def _stamp_attributes(of_features: Mapping[str, str]) -> dict[str, Any]:
    return {
        "stamp_version": "2.1.0",  # the first version that reads tile_size_um; an older one asks for an update
        "extractor": of_features["model"],
        "unit": "um",
        "tile_size_um": math.nan,  # unknown; STAMP refuses 0 and a file without it
        "tile_size_px": int(of_features["image_size"]),
        "feat_type": "tile",  # STAMP's word for a bag
    }


_TABLE = {"patient": "patient", "label": "label", "file": "file"}
LAYOUTS = {
    "file": Layout(file="features.h5"),
    "parquet": Layout(file="features.parquet"),
    "genbloom": Layout(file="{label}/{patient}.h5"),
    "stamp": Layout(
        file="{patient}.h5",
        dataset="feats",
        coords="float32",
        attributes=_stamp_attributes,
        table="bags.csv",  # STAMP's clini_table and its slide_table
        columns={"PATIENT": "patient", "FILENAME": "file", "label": "label"},
    ),
    "clam": Layout(
        file="h5_files/{patient}.h5",
        tensor_file="pt_files/{patient}.pt",
        coords="int32",
        table="bags.csv",
        columns={"case_id": "patient", "slide_id": "slide", "label": "label", "file": "file"},
    ),
    "trident": Layout(file="{patient}.h5", coords="int64", table="bags.csv", columns=_TABLE),
    "torchmil": Layout(
        file="features/{patient}.npy",
        label_file="labels/{patient}.npy",
        table="bags.csv",
        columns={**_TABLE, "label_id": "label_id"},
    ),
    "eva": Layout(
        file="embeddings/{patient}.pt",
        table="manifest.csv",
        # wsi_id groups rows; a file's name does, too, and pandas takes none for a number
        columns={
            **{"origin": "patient", "embeddings": "file", "target": "label_id", "split": "", "wsi_id": "file_name"},
            **{"patient": "patient", "label": "label"},
        },
    ),
}
TABLES = tuple(dict.fromkeys(layout.table for layout in LAYOUTS.values() if layout.table))


def table_row(patient: str, label: str, label_id: int, file: str) -> dict[str, str]:
    """Return what the columns of a layout's table may hold; `file` is the path of the patient's features."""
    name = Path(file).name
    values = {"patient": patient, "label": label, "label_id": str(label_id), "file": file}
    return {**values, "file_name": name, "slide": name.rpartition(".")[0], "": ""}


def file_name(text: str) -> str:
    """Return a patient's id or a class as the name of a file, as in a URL: "A/1" is "A%2F1", ".x" is "%2Ex".

    Only slashes, "%", control characters and a dot at the beginning change; `original_name` is the reverse.
    """
    return re.sub(r"^\.|[/\\%\x00-\x1f\x7f]", lambda match: f"%{ord(match[0]):02X}", text)


def original_name(name: str) -> str:
    """Return the text for which `file_name` gives this name, or the name itself if it is of another origin."""
    text = re.sub(r"%([0-9A-F]{2})", lambda match: chr(int(match[1], 16)), name)
    return text if file_name(text) == name else name


# --- finding bags ---------------------------------------------------------------------------------------------------

# patient, label or None, file
Row = tuple[str, str | None, Path]


def find_bags(path: Path) -> list[Row]:
    """Find the files of all bags that a table names, or that are in a folder of any layout."""
    if not is_folder(path, SETTING, EXPECTED):
        return _rows_of_table(path)
    for name in TABLES:
        if (path / name).is_file():
            return _rows_of_table(path / name)
    return _rows_of_fixed_folder(path) or _rows_of_folder(path)


def _rows_of_table(file: Path) -> list[Row]:
    rows = read_table(file, SETTING, ("patient", "file"), ("label",), OTHER_NAMES)
    check_files_exist([file.parent / row["file"] for row in rows], file, SETTING, "files")
    return [(row["patient"], row.get("label"), file.parent / row["file"]) for row in rows]


def _rows_of_fixed_folder(folder: Path) -> list[Row]:
    """Find the files of the first layout whose files are in a folder of a fixed name, as in h5_files/<patient>.h5."""
    for layout in LAYOUTS.values():
        for template in (layout.file, layout.tensor_file):
            parent, _, name = template.rpartition("/{patient}")
            files = sorted((folder / parent).glob(f"[!.]*{name}")) if name and "{" not in parent else []
            if files:
                label_of = {file: _read_label(folder, layout.label_file, file.stem) for file in files}
                return [(original_name(file.stem), label_of[file], file) for file in files]
    return []


def _read_label(folder: Path, template: str, name: str) -> str | None:
    file = folder / template.format(patient=name)
    if not template or not file.is_file():
        return None
    label = _read_npy(file)
    if label.size != 1 or label.dtype.kind not in "iu":
        raise ValueError(
            f"{SETTING}: {str(file)!r} has labels of shape {list(label.shape)} and type {label.dtype}; expected one "
            f"integer: give the patients' classes as --labels, and move the folder {file.parent.name} away"
        )
    return str(label.item())


def _rows_of_folder(folder: Path) -> list[Row]:
    """Find the .h5 files of the other layouts; hidden files and folders and other suffixes are ignored."""
    flat, in_classes, in_patients = (sorted(folder.glob(f"{'[!.]*/' * depth}[!.]*.[hH]5")) for depth in range(3))
    paths = [(file.stem, file.parent.name, file) for file in in_classes]
    paths += [(file.parent.name, file.parent.parent.name, file) for file in in_patients]
    if not flat and not paths:
        raise ValueError(f"{SETTING}: no .h5 file in {str(folder)!r} and the folders inside; expected {EXPECTED}")
    bags = {f"{label}/{patient}" for patient, label, _ in paths}
    classes = {label for _, label, _ in paths}
    if flat and paths:
        raise ValueError(
            f"{SETTING}: {str(folder)!r} has .h5 files ({flat[0].name}, ...) beside folders with .h5 files "
            f"({list_names(sorted(classes))}); keep either one file per patient or one folder per class"
        )
    folders = {f"{entry.parent.name}/{entry.name}" for entry in folder.glob("[!.]*/[!.]*") if entry.is_dir()}
    folders = {name for name in folders if name.partition("/")[0] in classes}
    empty = sorted(folders - bags)
    if empty:
        what = f"folders without an .h5 file are bags without cells: {list_names(empty)}"
        raise ValueError(f"{SETTING}: {what}; extract these patients' cells, or remove the folders")
    twice = sorted(folders & {f"{file.parent.name}/{file.stem}" for file in in_classes})
    if twice:
        raise ValueError(f"{SETTING}: {str(folder)!r} has both a file and a folder of {list_names(twice)}; keep one")
    if [file.name for file in flat] == [LAYOUTS["file"].file]:
        raise ValueError(
            f"{SETTING}: {str(folder)!r} has one {flat[0].name}, which holds the cells of all patients; give this file "
            f"as --features"
        )
    if flat:
        return [(original_name(file.stem), None, file) for file in flat]
    return [(original_name(patient), original_name(label), file) for patient, label, file in paths]


# --- reading files --------------------------------------------------------------------------------------------------


def read_bag(path: Path) -> tuple[np.ndarray, list[str], dict[str, str]]:
    """Read the features of one file, float32 [N, D], where the N cells are from, and the attributes."""
    suffix = path.suffix.lower()
    cells, attributes = [], {}
    if suffix == ".h5":
        with open_h5(path, SETTING) as file:
            name = next((name for name in DATASETS if name in file), DATASETS[0])
            features = read_numbers(file, name, (1, 2))
            cells = read_texts(file, "paths") if "paths" in file else []
            attributes = {name: str(value) for name, value in file.attrs.items()}
    elif suffix in BAG_SUFFIXES:
        features = _read_npy(path) if suffix == ".npy" else _read_pt(path)
        if features.ndim not in (1, 2) or features.dtype.kind not in "fiu":
            what = f"has an array of shape {list(features.shape)} and type {features.dtype}"
            raise ValueError(f"{SETTING}: {str(path)!r} {what}; expected numbers [cells, dim]: write it again")
    else:
        raise ValueError(f"{SETTING}: {str(path)!r} is none of {', '.join(BAG_SUFFIXES)}; name such files")
    features = np.atleast_2d(features.astype(np.float32))
    if len(cells) != len(features):
        cells = [str(path)] if len(features) == 1 else [f"{path}:{row}" for row in range(len(features))]
    return features, cells, attributes


def read_cells_file(folder: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Read {patient: paths of the cells} and the attributes from `CELLS_FILE`; both are empty if there is none."""
    if not (folder / CELLS_FILE).is_file():
        return {}, {}
    with open_h5(folder / CELLS_FILE, SETTING) as file:
        paths, patients = read_texts(file, "paths"), read_texts(file, "patients")
        attributes = {name: str(value) for name, value in file.attrs.items()}
    cells: dict[str, list[str]] = {}
    for patient, path in zip(patients, paths, strict=False):
        cells.setdefault(patient, []).append(path)
    return cells, attributes


def _read_npy(path: Path) -> np.ndarray:
    """Read an array of one .npy file; mapped, since its header may declare any size."""
    with _named(path, "array of numpy.save"):
        return np.lib.format.open_memmap(path, mode="r")


def _read_pt(path: Path) -> np.ndarray:
    """Read the tensor, or the list of tensors of one shape, of a file that torch.save wrote."""
    import torch

    with _named(path, "tensor of torch.save"):
        with zipfile.ZipFile(path) as archive:  # files before torch 1.6 are none
            n_bytes = sum(member.file_size for member in archive.infolist())
        if n_bytes > LARGEST_COMPRESSION * path.stat().st_size:
            raise ValueError(f"it unpacks to {n_bytes:,} bytes")
        content = torch.load(path, map_location="cpu", weights_only=True)
        tensors = content if isinstance(content, list) else [content]
        if not tensors or not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
            raise ValueError(f"it holds a {type(content).__name__}")
        # a view may repeat few stored numbers any number of times
        if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > n_bytes:
            raise ValueError("it declares more numbers than it stores")
        rows = [tensor.detach()[None] if tensor.ndim == 1 else tensor.detach() for tensor in tensors]
        cells = torch.cat(rows)
        return (cells.float() if cells.is_floating_point() else cells).numpy()  # numpy has no bfloat16


@contextmanager
def _named(path: Path, what: str) -> Iterator[None]:
    """Name the file in any error of this block but a full memory."""
    check_regular_file(path, SETTING)
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # numpy and torch raise errors of many kinds for bytes that they did not write
        if isinstance(error, OSError) and error.errno in ADVICE:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(f"{SETTING}: {str(path)!r} is no {what} or is damaged ({reason}); write it again") from error

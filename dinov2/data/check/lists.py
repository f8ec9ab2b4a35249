"""Read the lists to check into one table, diagnose their faults, and decide what the cleaned lists leave out."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from dinov2.data.check.scan import READABLE, UNREADABLE
from dinov2.data.datasets.decode import IMAGE_SUFFIXES
from dinov2.data.datasets.tables import (
    LABEL_COLUMN,
    PATH_COLUMN,
    PATH_COLUMNS,
    PATIENT_COLUMN,
    SET_COLUMN,
    TABLE_SUFFIXES,
    open_table,
    read_list,
)
from dinov2.data.splits import PART_COLUMN
from dinov2.utils.files import PathLike, local_path

TRAINING, LABELS, EVALUATION = "training", "labels", "evaluation"
SETTINGS = {TRAINING: "check lists", LABELS: "--labels", EVALUATION: "--eval-splits"}
VALUE_COLUMNS = (LABEL_COLUMN, PATIENT_COLUMN, SET_COLUMN)
HIDDEN = "hidden"
Finding = tuple[str, str, str, str]  # kind, path, other path, detail

# kind: title, whether it is a fault, what to do; a fault makes the command end with exit code 1
KINDS = {
    "missing": ("missing files", True, "correct the paths; relative ones count from the list's own folder"),
    "unreadable": ("damaged images", True, "get them again from their origin, or use the cleaned lists"),
    "empty_value": ("rows without a path, label or patient", True, "fill them in, or use the cleaned tables"),
    "same_path": ("images named twice", True, "they count double in training; use the cleaned lists"),
    "same_bytes": ("byte-identical images", True, "keep one of each; the cleaned lists do"),
    "two_labels": ("one image under two labels", True, "ask who labelled them; the cleaned lists have neither"),
    "leak_path": ("evaluation images in training", True, "use the cleaned lists"),
    "leak_bytes": ("copies of evaluation images in training", True, "use the cleaned lists"),
    "leak_patient": ("evaluation patients in training", True, "use the cleaned lists"),
    "leak_near": ("near-duplicates of evaluation images in training", True, "--drop-near-duplicates drops them"),
    "two_labels_near": ("near-duplicates under two labels", True, "--drop-near-duplicates drops both"),
    "near_duplicate": ("near-duplicates", False, "look at them; --drop-near-duplicates keeps one of each"),
    "blank": ("images without contrast", False, "look at them; no near-duplicates of them are searched"),
    HIDDEN: ("hidden images", False, "readers of folders leave them out, and so do the cleaned lists"),
}


class Source(NamedTuple):
    """A list, table or folder that names images."""

    file: Path
    kind: str  # "list", "table" or "folder"
    role: str  # TRAINING, LABELS or EVALUATION
    rows: pd.DataFrame  # its rows and columns by line number, with absolute paths
    gaps: Sequence[str] = ()  # the rows that lack a value, in words


def read_inputs(
    training: Sequence[PathLike], labels: Sequence[PathLike], evaluation: Sequence[PathLike]
) -> tuple[list[Source], pd.DataFrame, list[str]]:
    """Read all sources, without opening the images.

    A source is a .txt list, a table with the columns `Image Path[,Label][,patient][,dataset]`, a folder with .txt lists
    (each becomes a source), or a folder of images, searched with all folders in it. In a folder of images given for
    labels or evaluation, the folders at the first level are the labels.

    Return the sources; the entries, one for each time that a source names an image, with the columns source (its
    position), role, line, place, image (position in the paths), label, patient, dataset ("" for none) and is_hidden (a
    folder contains the image and its name begins with a dot); and the absolute path of each image.
    """
    sources = []
    for role, paths in ((TRAINING, training), (LABELS, labels), (EVALUATION, evaluation)):
        for path in map(local_path, paths):
            lists = [] if role == LABELS else sorted(path.glob("[!.]*.[tT][xX][tT]"))
            sources += [_read_source(file, role) for file in lists or [path]]
    entries = pd.concat([_entries(source).assign(source=i) for i, source in enumerate(sources)], ignore_index=True)
    if entries.empty:
        files = ", ".join(str(source.file) for source in sources)
        raise ValueError(f"check lists: {files} name no image; write one image path per line")
    entries["image"], unique = pd.factorize(entries.pop("path"))
    return sources, entries, list(unique)


def _read_source(file: Path, role: str) -> Source:
    setting, suffix = SETTINGS[role], file.suffix.lower()
    if file.is_dir():
        return Source(file, "folder", role, _read_folder(file, setting, has_labels=role != TRAINING))
    if not file.is_file():
        raise FileNotFoundError(f"{setting}: {str(file)!r} does not exist; give a .txt list, a CSV or a folder")
    if suffix == ".txt" and role != LABELS:
        paths = [os.path.abspath(file.parent / path) for path in read_list(file, setting)]
        return Source(file, "list", role, pd.DataFrame({PATH_COLUMN: paths}))
    if suffix not in TABLE_SUFFIXES:
        kinds = "a CSV or a folder with a folder per class" if role == LABELS else "a .txt list, a CSV or a folder"
        raise ValueError(f"{setting}: {str(file)!r} is of an unknown kind; give {kinds}")
    table = open_table(file, setting)
    columns = [name for name in (*PATH_COLUMNS, *VALUE_COLUMNS) if name in table.columns]
    if not set(PATH_COLUMNS) & set(columns) or (role == LABELS and LABEL_COLUMN not in columns):
        raise ValueError(
            f"{setting}: {str(file)!r} has the columns {table.columns}; expected "
            f"{PATH_COLUMN},{LABEL_COLUMN}[,{PATIENT_COLUMN}][,{SET_COLUMN}]"
        )
    rows = pd.DataFrame.from_dict(dict(table.rows()), orient="index", columns=table.columns)
    is_empty = rows[columns] == ""
    has_gap = is_empty.any(axis=1)
    gaps = [
        f"{file}, line {row.Index}: no value for {', '.join(is_empty.columns[list(row[1:])])}"
        for row in is_empty[has_gap].itertuples()
    ]
    rows = rows[~has_gap].copy()
    rows[columns[0]] = [os.path.abspath(file.parent / path) for path in rows[columns[0]]]
    return Source(file, "table", role, rows, gaps)


def _read_folder(folder: Path, setting: str, has_labels: bool) -> pd.DataFrame:
    folder = folder.absolute()
    entries = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    files = sorted(file for file in entries if file.suffix.lower() in IMAGE_SUFFIXES)  # with the hidden ones
    if not files:
        raise FileNotFoundError(
            f"{setting}: no .txt list and no image ({', '.join(IMAGE_SUFFIXES)}) in {str(folder)!r}; give the "
            f"folder that has them"
        )
    paths = list(map(os.path.abspath, files))
    rows = pd.DataFrame({PATH_COLUMN: paths}, dtype=object)  # pandas' text columns refuse names that are not UTF-8
    if has_labels:
        below = (file.relative_to(folder).parts for file in files)
        rows[LABEL_COLUMN] = [parts[0] if len(parts) > 1 else "" for parts in below]
    return rows


def _entries(source: Source) -> pd.DataFrame:
    rows = source.rows
    if source.role == EVALUATION and PART_COLUMN in rows:
        rows = rows[rows[PART_COLUMN].isin(("val", "test"))]
    path_column = next(name for name in PATH_COLUMNS if name in rows)
    columns = {"path": path_column, "label": LABEL_COLUMN, "patient": PATIENT_COLUMN, "dataset": SET_COLUMN}
    entries = pd.DataFrame({name: rows.get(column, "") for name, column in columns.items()}, rows.index)
    entries = entries.assign(line=rows.index, role=source.role, place=source.file.name, is_hidden=False)
    if source.kind == "table":
        entries["place"] += [f" line {line}" for line in rows.index]
    elif source.kind == "folder":
        below = entries["path"].str.slice(len(os.path.abspath(source.file)))
        entries["is_hidden"] = below.str.contains(f"{os.sep}.", regex=False)
        entries.loc[entries["is_hidden"], "label"] = ""
    return entries


def describe_images(entries: pd.DataFrame, paths: list[str], scanned: pd.DataFrame) -> pd.DataFrame:
    """Add what the lists say to the facts of each image; `paths` has one path for each row of `scanned`.

    The new columns: path (printable); content (the first readable image with the same bytes); trained, evaluated (a
    source of this role names it); patient, dataset ("" for none); has_leaking_patient (trained on, and the patient is
    evaluated too). Equal patient ids in two different named data sets are two patients.

    The status becomes `UNREADABLE` if the name has a line break or is not UTF-8. It becomes `HIDDEN` if a readable
    image is found only by listing folders and its name or folder begins with a dot.
    """
    printable = [path.encode("utf-8", "backslashreplace").decode() for path in paths]
    images = scanned.assign(path=printable)
    has_bad_name = [name != path or "\n" in name or "\r" in name for name, path in zip(printable, paths, strict=True)]
    images.loc[has_bad_name, ["status", "reason"]] = UNREADABLE, "its name has a line break or is not UTF-8: rename it"
    is_hidden = entries.groupby("image")["is_hidden"].all() & (images["status"] == READABLE)
    images.loc[is_hidden, ["status", "reason"]] = HIDDEN, "its name or a folder's begins with a dot"
    key = images["digest"].where(images["status"] == READABLE, images["path"])
    images["content"] = pd.Series(images.index, images.index).groupby(key).transform("first")
    images["trained"] = images.index.isin(entries.loc[entries["role"] == TRAINING, "image"])
    images["evaluated"] = images.index.isin(entries.loc[entries["role"] == EVALUATION, "image"])
    for column in ("patient", "dataset"):
        given = entries[entries[column] != ""].drop_duplicates("image").set_index("image")[column]
        images[column] = given.reindex(images.index).fillna("")
    # equal patient ids are the same patient within one data set, or where one side names no data set
    datasets = images[images["evaluated"] & (images["patient"] != "")].groupby("patient")["dataset"].agg(set)
    images["has_leaking_patient"] = [
        row.trained
        and row.patient in datasets
        and (row.dataset == "" or bool({row.dataset, ""} & datasets[row.patient]))
        for row in images.itertuples()
    ]
    return images


def diagnose(
    sources: list[Source], entries: pd.DataFrame, images: pd.DataFrame, near: pd.DataFrame, drop_near: bool
) -> tuple[pd.DataFrame, pd.Series]:
    """Collect all problems in the lists, and decide what the cleaned lists leave out.

    `near` has the columns a and b: positions of near-duplicates with different bytes; `drop_near` leaves these out.
    Return the findings (kind, path, other path, detail) in the order of `KINDS`, and for each entry the reason to leave
    it out of a cleaned list, "" to keep it.
    """
    entries = entries.assign(content=images["content"].loc[entries["image"]].to_numpy())
    # an image may be named once by all training sources, once by all evaluation sources, and once by each label table
    scope = entries["role"].where(entries["role"] != LABELS, entries["source"])
    entries["is_repeated"] = entries[["image"]].assign(scope=scope).duplicated()
    contents = entries["content"].drop_duplicates()
    conflicts = _label_conflicts(entries, pd.concat([pd.DataFrame({"a": contents, "b": contents}), near]))
    rows = [*_damage(sources, images), *_repeats(entries, images, conflicts), *_copies_and_leaks(images, near)]
    rows.sort(key=lambda row: list(KINDS).index(row[0]))
    findings = pd.DataFrame(rows, columns=["kind", "path", "other path", "detail"])
    return findings, _drops(entries, images, conflicts, near, drop_near)


def _damage(sources: list[Source], images: pd.DataFrame) -> Iterator[Finding]:
    for row in images[images["status"] != READABLE].itertuples():
        yield row.status, row.path, "", row.reason
    for source in sources:
        yield from (("empty_value", "", "", gap) for gap in source.gaps)
    for path in images.loc[(images["status"] == READABLE) & (images["width"] > 0) & (images["hash"] == ""), "path"]:
        yield "blank", path, "", "hardly any contrast"


def _repeats(entries: pd.DataFrame, images: pd.DataFrame, conflicts: pd.DataFrame) -> Iterator[Finding]:
    paths = images["path"]
    for entry in entries[entries["is_repeated"]].itertuples():
        yield "same_path", paths[entry.image], "", entry.place
    for row in conflicts.itertuples():
        kind = "two_labels" if row.a == row.b else "two_labels_near"
        detail = f"{row.label} in {row.place} and {row.label_other} in {row.place_other}"
        yield kind, paths[row.image], paths[row.image_other], detail
    for row in images[images["content"] != images.index].itertuples():
        yield "same_bytes", row.path, paths[row.content], f"{row.size} bytes"


def _copies_and_leaks(images: pd.DataFrame, near: pd.DataFrame) -> Iterator[Finding]:
    """Yield near-duplicates, and evaluation images, copies of them and their patients in training."""
    paths, trained, evaluated = images["path"], images["trained"], images["evaluated"]
    for path in paths[trained & evaluated]:
        yield "leak_path", path, "", "in both"
    example = images[evaluated].drop_duplicates("content").set_index("content")["path"]
    for row in images[trained & ~evaluated & images["content"].isin(example.index)].itertuples():
        yield "leak_bytes", row.path, example[row.content], "same bytes"
    trained_contents = set(images.loc[trained, "content"])
    for a, b in near.itertuples(index=False):
        yield "near_duplicate", paths[a], paths[b], "similar hashes"
        for x, y in ((a, b), (b, a)):
            if x in trained_contents and y in example and x not in example:
                yield "leak_near", paths[x], example[y], "similar hashes"
    for patient, group in images[images["has_leaking_patient"]].groupby("patient"):
        held_out = paths[evaluated & (images["patient"] == patient)]
        detail = f"patient {patient}: {len(group)} images in training, {len(held_out)} in evaluation"
        yield "leak_patient", group["path"].iloc[0], held_out.iloc[0], detail


def _label_conflicts(entries: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """Find pairs of contents (a, b) that two comparable sources label differently, with the columns of both entries."""
    labelled = entries[entries["label"] != ""].drop_duplicates(["content", "source", "label"])
    classes = labelled.groupby("source")["label"].agg(set)
    both = pairs.merge(labelled, left_on="a", right_on="content")
    both = both.merge(labelled, left_on="b", right_on="content", suffixes=("", "_other"))
    both = both[both["label"] != both["label_other"]]
    sources = zip(both["source"], both["source_other"], strict=True)
    # one must have all classes of the other: coarse and fine classes do not contradict each other
    is_comparable = [classes[s] <= classes[t] or classes[t] <= classes[s] for s, t in sources]
    return both[np.array(is_comparable, dtype=bool)].drop_duplicates(["a", "b"])


def _drops(
    entries: pd.DataFrame, images: pd.DataFrame, conflicts: pd.DataFrame, near: pd.DataFrame, drop_near: bool
) -> pd.Series:
    """Decide why a cleaned list leaves an entry out; the first reason counts."""
    image, content = entries["image"], entries["content"]
    of_entry = images.loc[image].set_index(entries.index)
    evaluated = images.loc[images["evaluated"], "content"]
    is_same = conflicts["a"] == conflicts["b"]
    # drop the later one of a near pair, or the one that is not evaluated; both if their labels differ
    later = near["b"].where(near["a"].isin(evaluated) | ~near["b"].isin(evaluated), near["a"])
    near_drops = pd.concat([later, conflicts.loc[~is_same, "a"], conflicts.loc[~is_same, "b"]])
    # of byte-identical images keep an evaluated one, else a labelled one, else the first
    is_labelled = images.index.isin(image[entries["label"] != ""])
    rank = np.select([images["evaluated"], images["trained"] & is_labelled, images["trained"]], [0, 1, 2], 3)
    best = images.assign(rank=rank).sort_values("rank", kind="stable").drop_duplicates("content")
    reasons = {
        "hidden": of_entry["status"] == HIDDEN,
        "unreadable": of_entry["status"] != READABLE,
        "two labels": content.isin(conflicts.loc[is_same, "a"]),
        "in an evaluation split": (entries["role"] == TRAINING)
        & (content.isin(evaluated) | of_entry["has_leaking_patient"]),
        "near-duplicate": drop_near & content.isin(near_drops),
        "same bytes": ~image.isin(best.index),
        "named twice": entries["is_repeated"],
    }
    return pd.Series(np.select(list(reasons.values()), list(reasons), ""), entries.index)

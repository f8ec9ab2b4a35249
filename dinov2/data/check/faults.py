"""What is wrong with a set of image lists, and what the cleaned lists leave out."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from dinov2.data.check.inputs import EVALUATION, LABELS, TRAINING, Inputs
from dinov2.data.check.scan import READABLE, UNREADABLE

HIDDEN = "hidden"
Finding = tuple[str, str, str, str]  # kind, path, other path, detail


class Kind(NamedTuple):
    """A kind of finding; a fault makes the command end with 1."""

    title: str
    is_fault: bool
    advice: str


KINDS = {
    "missing": Kind("missing files", True, "correct the paths; relative ones count from the list's own folder"),
    "unreadable": Kind("damaged images", True, "get them again from their origin, or use the cleaned lists"),
    "empty_value": Kind("rows without a path, label or patient", True, "fill them in, or use the cleaned tables"),
    "same_path": Kind("images named twice", True, "they count double in training; use the cleaned lists"),
    "same_bytes": Kind("byte-identical images", True, "keep one of each; the cleaned lists do"),
    "two_labels": Kind("one image under two labels", True, "ask who labelled them; the cleaned lists have neither"),
    "leak_path": Kind("evaluation images in training", True, "use the cleaned lists"),
    "leak_bytes": Kind("copies of evaluation images in training", True, "use the cleaned lists"),
    "leak_patient": Kind("evaluation patients in training", True, "use the cleaned lists"),
    "leak_near": Kind("near-duplicates of evaluation images in training", True, "--drop-near-duplicates drops them"),
    "two_labels_near": Kind("near-duplicates under two labels", True, "--drop-near-duplicates drops both"),
    "near_duplicate": Kind("near-duplicates", False, "look at them; --drop-near-duplicates keeps one of each"),
    "blank": Kind("images without contrast", False, "look at them; no near-duplicates of them are searched"),
    HIDDEN: Kind("hidden images", False, "readers of folders leave them out, and so do the cleaned lists"),
}


def describe_images(inputs: Inputs, scanned: pd.DataFrame) -> pd.DataFrame:
    """Add to the facts of each image what the entries say of it.

    The new columns: path, printable; content (the first readable image with the same bytes); trained, evaluated (a
    source of this role names it); patient; named_dataset; dataset (the name of the first source where no table names
    one); has_leaking_patient. An image that only folders name, as a hidden file, has the status `HIDDEN`.
    """
    entries = inputs.entries
    images = scanned.assign(path=[path.encode("utf-8", "backslashreplace").decode() for path in inputs.paths])
    has_bad_name = (images["path"] != inputs.paths) | images["path"].str.contains("[\r\n]")
    images.loc[has_bad_name, ["status", "reason"]] = UNREADABLE, "its name has a line break or is not UTF-8: rename it"
    is_hidden = entries.groupby("image")["is_hidden"].all() & (images["status"] == READABLE)
    images.loc[is_hidden, ["status", "reason"]] = HIDDEN, "its name or a folder's begins with a dot"
    key = images["digest"].where(images["status"] == READABLE, images["path"])
    images["content"] = pd.Series(images.index, images.index).groupby(key).transform("first")
    images["trained"] = images.index.isin(entries.loc[entries["role"] == TRAINING, "image"])
    images["evaluated"] = images.index.isin(entries.loc[entries["role"] == EVALUATION, "image"])
    for column, name in (("patient", "patient"), ("dataset", "named_dataset")):
        given = entries[entries[column] != ""].drop_duplicates("image").set_index("image")[column]
        images[name] = given.reindex(images.index).fillna("")
    first_source = [inputs.sources[i].file.stem for i in entries.drop_duplicates("image")["source"]]
    images["dataset"] = images["named_dataset"].where(images["named_dataset"] != "", first_source)
    images["has_leaking_patient"] = _has_leaking_patient(images)
    return images


def _has_leaking_patient(images: pd.DataFrame) -> pd.Series:
    """Find images that are trained on and whose patient is in an evaluation split too.

    A patient's id counts within its data set; where one side names no data set, the id alone decides.
    """
    key = ["patient", "named_dataset"]
    trained, evaluated = (
        images.loc[images[side] & (images["patient"] != ""), key].drop_duplicates() for side in ("trained", "evaluated")
    )
    both = trained.merge(evaluated, on="patient", suffixes=("", "_evaluated"))
    one, other = both["named_dataset"], both["named_dataset_evaluated"]
    leaks = both.loc[(one == other) | (one == "") | (other == ""), key]
    return images["trained"] & pd.MultiIndex.from_frame(images[key]).isin(pd.MultiIndex.from_frame(leaks))


def diagnose(
    inputs: Inputs, images: pd.DataFrame, near: pd.DataFrame, drop_near: bool = False
) -> tuple[pd.DataFrame, pd.Series]:
    """Collect all problems found, and decide what the cleaned lists leave out.

    Args:
        inputs: the entries.
        images: as `describe_images` returns them.
        near: pairs of near-duplicates of different bytes: a, b (positions).
        drop_near: leave near-duplicates out.

    Returns:
        the findings (kind, path, other path, detail), in the order of `KINDS`; and for each entry why a cleaned list
        leaves it out, "" to keep it.
    """
    entries = inputs.entries.assign(content=images["content"].loc[inputs.entries["image"]].to_numpy())
    # all training sources are one list, and so are all evaluation sources; each label table stands alone
    scope = entries["role"].where(entries["role"] != LABELS, entries["source"])
    entries["is_repeated"] = entries[["image"]].assign(scope=scope).duplicated()
    contents = entries["content"].drop_duplicates()
    conflicts = _label_conflicts(entries, pd.DataFrame({"a": contents, "b": contents}))
    near_conflicts = _label_conflicts(entries, near)
    rows = [
        *_damage(inputs.gaps, images),
        *_repeats(entries, images["path"], conflicts, near_conflicts),
        *_copies_and_leaks(images, near),
    ]
    rows.sort(key=lambda row: list(KINDS).index(row[0]))
    evaluated = set(images.loc[images["evaluated"], "content"])
    near_drops = _near_drops(near, near_conflicts, evaluated) if drop_near else set()
    findings = pd.DataFrame(rows, columns=["kind", "path", "other path", "detail"])
    return findings, _drops(entries, images, set(conflicts["a"]), near_drops)


def _damage(gaps: pd.DataFrame, images: pd.DataFrame) -> Iterator[Finding]:
    """Yield what is wrong with single files and rows."""
    for row in images[images["status"] != READABLE].itertuples():
        yield row.status, row.path, "", row.reason
    for row in gaps.itertuples():
        yield "empty_value", "", "", f"{row.place}: no value for {row.gap}"
    for path in images.loc[(images["status"] == READABLE) & (images["width"] > 0) & (images["hash"] == ""), "path"]:
        yield "blank", path, "", "hardly any contrast"


def _repeats(
    entries: pd.DataFrame, paths: pd.Series, conflicts: pd.DataFrame, near_conflicts: pd.DataFrame
) -> Iterator[Finding]:
    """Yield images that are named twice or have two labels."""
    for entry in entries[entries["is_repeated"]].itertuples():
        yield "same_path", paths[entry.image], "", entry.place
    for row in conflicts.itertuples():
        detail = f"{row.label} in {row.place} and {row.label_other} in {row.place_other}"
        yield "two_labels", paths[row.image], paths[row.image_other], detail
    for row in near_conflicts.itertuples():
        yield "two_labels_near", paths[row.a], paths[row.b], f"{row.label}, {row.label_other}"


def _copies_and_leaks(images: pd.DataFrame, near: pd.DataFrame) -> Iterator[Finding]:
    """Yield copies of an image, and evaluation images, copies of them and their patients in training."""
    paths, trained, evaluated = images["path"], images["trained"], images["evaluated"]
    for row in images[images["content"] != images.index].itertuples():
        yield "same_bytes", row.path, paths[row.content], f"{row.size} bytes"
    for path in paths[trained & evaluated]:
        yield "leak_path", path, "", "in both"
    example = images[evaluated].drop_duplicates("content").set_index("content")["path"]
    for row in images[trained & ~evaluated & images["content"].isin(example.index)].itertuples():
        yield "leak_bytes", row.path, example[row.content], "same bytes"
    trained_contents = set(images.loc[trained, "content"])
    for pair in near.itertuples():
        yield "near_duplicate", paths[pair.a], paths[pair.b], "similar hashes"
        for x, y in ((pair.a, pair.b), (pair.b, pair.a)):
            if x in trained_contents and y in example and x not in example:
                yield "leak_near", paths[x], example[y], "similar hashes"
    for patient, group in images[images["has_leaking_patient"]].groupby("patient"):
        there = paths[evaluated & (images["patient"] == patient)]
        detail = f"patient {patient}: {len(group)} images in training, {len(there)} in evaluation"
        yield "leak_patient", group["path"].iloc[0], there.iloc[0], detail


def _label_conflicts(entries: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """Find pairs of contents (a, b) that two comparable sources label differently.

    Sources are comparable if the classes of one are all among the other's: a test split may lack some, while eight
    coarse and ten fine classes of the same cells do not contradict each other.

    Returns:
        a row for each such pair, with the columns of one entry and, with the suffix `_other`, of the other one.
    """
    labelled = entries[entries["label"] != ""].drop_duplicates(["content", "source", "label"])
    classes = {source: set(labels) for source, labels in labelled.groupby("source")["label"]}
    both = pairs.merge(labelled, left_on="a", right_on="content")
    both = both.merge(labelled, left_on="b", right_on="content", suffixes=("", "_other"))
    both = both[both["label"] != both["label_other"]]
    sources = zip(both["source"], both["source_other"], strict=True)
    is_comparable = [classes[s] <= classes[t] or classes[t] <= classes[s] for s, t in sources]
    return both[np.array(is_comparable, dtype=bool)].drop_duplicates(["a", "b"])


def _near_drops(near: pd.DataFrame, conflicts: pd.DataFrame, evaluated: set[int]) -> set[int]:
    """Choose of each pair the later image, or the one that is not evaluated; both if their labels differ."""
    dropped = {*conflicts["a"], *conflicts["b"]}
    for a, b in near[["a", "b"]].itertuples(index=False):
        if not {a, b} & dropped:
            dropped.add(a if b in evaluated and a not in evaluated else b)
    return dropped


def _drops(entries: pd.DataFrame, images: pd.DataFrame, conflicts: set[int], near_drops: set[int]) -> pd.Series:
    """Decide why a cleaned list leaves an entry out; the first reason counts."""
    image, content = entries["image"], entries["content"]
    status = images["status"].loc[image].to_numpy()
    leaks = (
        content.isin(images.loc[images["evaluated"], "content"]) | images["has_leaking_patient"].loc[image].to_numpy()
    )
    # of byte-identical images, an evaluated one stays before a labelled one, and that before the first
    is_labelled = images.index.isin(image[entries["label"] != ""])
    rank = np.select([images["evaluated"], images["trained"] & is_labelled, images["trained"]], [0, 1, 2], 3)
    best = images.assign(rank=rank).sort_values("rank", kind="stable").drop_duplicates("content")
    reasons = {
        "hidden": status == HIDDEN,
        "unreadable": status != READABLE,
        "two labels": content.isin(conflicts),
        "in an evaluation split": (entries["role"] == TRAINING) & leaks,
        "near-duplicate": content.isin(near_drops),
        "same bytes": ~image.isin(best.index),
        "named twice": entries["is_repeated"],
    }
    return pd.Series(np.select(list(reasons.values()), list(reasons), ""), entries.index)

"""What is wrong with a set of image lists, and what the cleaned lists leave out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from dinov2.data.check.inputs import EVALUATION, LABELS, TRAINING, Inputs
from dinov2.data.check.scan import READABLE

TINY_PX, ODD_FACTOR, LONG_ASPECT = 16, 3.0, 3.0
FORMAT_OF_SUFFIX = Image.registered_extensions()


class Kind(NamedTuple):
    """A kind of finding; a fault makes the command end with 1."""

    title: str
    is_fault: bool
    advice: str


KINDS = {
    "missing": Kind("missing files", True, "correct the paths; relative ones count from the list's own folder"),
    "unreadable": Kind("unreadable images", True, "get them again from their origin, or use the cleaned lists"),
    "truncated": Kind("truncated images", True, "copy or download them again, or use the cleaned lists"),
    "empty_value": Kind("rows without a path, label or patient", True, "fill them in, or use the cleaned tables"),
    "bad_name": Kind("names that no list can hold", True, "rename the files: UTF-8, no line break"),
    "same_path": Kind("images named twice", True, "they count double in training; use the cleaned lists"),
    "same_bytes": Kind("byte-identical images", True, "keep one of each; the cleaned lists do"),
    "two_labels": Kind("one image under two labels", True, "ask who labelled them; the cleaned lists have neither"),
    "leak_path": Kind("evaluation images in training", True, "use the cleaned lists"),
    "leak_bytes": Kind("copies of evaluation images in training", True, "use the cleaned lists"),
    "leak_patient": Kind("evaluation patients in training", True, "use the cleaned lists"),
    "leak_near": Kind("near-duplicates of evaluation images in training", True, "--drop-near-duplicates drops them"),
    "two_labels_near": Kind("near-duplicates under two labels", True, "--drop-near-duplicates drops both"),
    "near_duplicate": Kind("near-duplicates", False, "look at them; --drop-near-duplicates keeps one of each"),
    "wrong_format": Kind("images of another format than their suffix", False, "rename them; they are readable"),
    "odd_size": Kind("odd sizes", False, f"look at them: under {TINY_PX} px, long and thin, or far from the median"),
    "blank": Kind("images without contrast", False, "look at them; no near-duplicates of them are searched"),
    "mode": Kind("images that are not plain RGB", False, "nothing needs doing: all are read as RGB"),
    "hidden": Kind("hidden images", False, "readers of folders leave them out, and so do the cleaned lists"),
}


class Finding(NamedTuple):
    """One thing that is odd; images are positions, -1 for none."""

    kind: str
    image: int
    other: int = -1
    detail: str = ""


def describe_images(inputs: Inputs, scanned: pd.DataFrame) -> pd.DataFrame:
    """Add to the facts of each image what the entries say of it.

    The new columns: path; content (the first image with the same bytes); is_hidden (only folders name it, as a hidden
    file); trained, evaluated (a source of this role names it); patient; named_dataset; dataset (the name of the first
    source where no table names one); has_bad_name; has_leaking_patient.
    """
    entries, images = inputs.entries, scanned.assign(path=inputs.paths)
    position = pd.Series(images.index, index=images.index)
    same = position.groupby([images["size"], images["digest"]]).transform("first")
    images["content"] = same.where(images["digest"] != "", position)
    images["is_hidden"] = entries.groupby("image")["is_hidden"].all()
    images["trained"] = images.index.isin(entries.loc[entries["role"] == TRAINING, "image"])
    images["evaluated"] = images.index.isin(entries.loc[entries["role"] == EVALUATION, "image"])
    for column, name in (("patient", "patient"), ("dataset", "named_dataset")):
        given = entries[entries[column] != ""].drop_duplicates("image").set_index("image")[column]
        images[name] = given.reindex(images.index).fillna("")
    first_source = [inputs.sources[i].name for i in entries.drop_duplicates("image")["source"]]
    images["dataset"] = images["named_dataset"].where(images["named_dataset"] != "", first_source)
    images["has_bad_name"] = [
        not p.isprintable() and any(c in "\r\n" or "\ud800" <= c <= "\udfff" for c in p) for p in inputs.paths
    ]
    images["has_leaking_patient"] = _has_leaking_patient(images)
    return images


def _has_leaking_patient(images: pd.DataFrame) -> pd.Series:
    """Whether an image is trained on and its patient is in an evaluation split too.

    A patient's id counts within its data set; where one side names no data set, the id alone decides.
    """
    named = images.loc[images["patient"] != "", ["patient", "named_dataset", "trained", "evaluated"]]
    trained, evaluated = (named.loc[named[side], ["patient", "named_dataset"]] for side in ("trained", "evaluated"))
    both = trained.drop_duplicates().merge(evaluated.drop_duplicates(), on="patient", suffixes=("", "_evaluated"))
    one, other = both["named_dataset"], both["named_dataset_evaluated"]
    leaks = both[(one == other) | (one == "") | (other == "")]
    key = ["patient", "named_dataset"]
    return images["trained"] & pd.MultiIndex.from_frame(images[key]).isin(pd.MultiIndex.from_frame(leaks[key]))


def diagnose(
    inputs: Inputs, images: pd.DataFrame, near: pd.DataFrame, drop_near: bool = False
) -> tuple[list[Finding], pd.Series]:
    """Collect all problems found, and decide what the cleaned lists leave out.

    Args:
        inputs: the entries.
        images: as `describe_images` returns them.
        near: pairs of near-duplicates of different bytes: a, b (positions) and correlation.
        drop_near: leave near-duplicates out.

    Returns:
        the findings, in the order of `KINDS`; and for each entry why a cleaned list leaves it out, "" to keep it.
    """
    entries = inputs.entries.assign(content=images["content"].loc[inputs.entries["image"]].to_numpy())
    # all training sources are one list, and so are all evaluation sources; each label table stands alone
    scope = entries["role"].where(entries["role"] != LABELS, entries["source"])
    is_repeated = entries[["image"]].assign(scope=scope).duplicated()
    names = [inputs.sources[source].file.name for source in entries["source"]]
    entries["place"] = [f"{name} line {n}" if n else name for name, n in zip(names, entries["line"], strict=True)]
    contents = entries["content"].drop_duplicates()
    conflicts = _label_conflicts(entries, pd.DataFrame({"a": contents, "b": contents}))
    near_conflicts = _label_conflicts(entries, near)
    findings = [
        *_file_findings(images),
        *(
            Finding("empty_value", -1, -1, f"{inputs.sources[r.source].file}, line {r.line}: no value for {r.gap}")
            for r in inputs.gaps.itertuples()
        ),
        *(Finding("same_path", e.image, -1, e.place) for e in entries[is_repeated].itertuples()),
        *(
            Finding(
                "two_labels", c.image, c.image_other, f"{c.label} in {c.place} and {c.label_other} in {c.place_other}"
            )
            for c in conflicts.itertuples()
        ),
        *(Finding("two_labels_near", c.a, c.b, f"{c.label}, {c.label_other}") for c in near_conflicts.itertuples()),
        *_copies_and_leaks(images, near),
    ]
    findings.sort(key=lambda finding: list(KINDS).index(finding.kind))

    drops = pd.Series("", index=entries.index)

    def drop(which: pd.Series, reason: str) -> None:
        drops[which & (drops == "")] = reason

    image, content = entries["image"], entries["content"]
    evaluated = set(images.loc[images["evaluated"], "content"])
    drop(image.isin(images.index[(images["status"] != READABLE) | images["has_bad_name"]]), "unreadable")
    drop(entries["is_hidden"], "hidden")
    drop(content.isin(conflicts["a"]), "two labels")
    leaks = content.isin(evaluated) | image.isin(images.index[images["has_leaking_patient"]])
    drop((entries["role"] == TRAINING) & leaks, "in an evaluation split")
    if drop_near:
        drop(content.isin(_near_drops(near, near_conflicts, evaluated)), "near-duplicate")
    # of byte-identical images, an evaluated one stays before a labelled one, and that before the first
    is_labelled = images.index.isin(image[entries["label"] != ""])
    rank = np.select([images["evaluated"], images["trained"] & is_labelled, images["trained"]], [0, 1, 2], 3)
    best = images.assign(rank=rank).sort_values(["is_hidden", "rank"], kind="stable").drop_duplicates("content")
    drop(~image.isin(best.index), "same bytes")
    drop(is_repeated, "named twice")
    return findings, drops


def _file_findings(images: pd.DataFrame) -> Iterator[Finding]:
    """Yield what is wrong with single files."""
    decoded = images[(images["status"] == READABLE) & ~images["is_hidden"] & (images["width"] > 0)]
    sides = decoded[["width", "height"]]
    side, shape = np.sqrt(sides.prod(axis=1)), sides.max(axis=1) / sides.min(axis=1)
    median = side.groupby(decoded["dataset"]).transform("median")
    is_far = (side > ODD_FACTOR * median) | (side < median / ODD_FACTOR)
    odd = np.select(
        [sides.min(axis=1) < TINY_PX, shape > LONG_ASPECT, is_far], ["tiny", "long and thin", "far from the median"], ""
    )
    for row in images[images["status"] != READABLE].itertuples():
        yield Finding(row.status, row.Index, -1, row.reason + ("; a hidden file" if row.is_hidden else ""))
    for row in images[images["has_bad_name"]].itertuples():
        yield Finding("bad_name", row.Index, -1, "a line break, or not UTF-8")
    for row in images[images["is_hidden"] & (images["status"] == READABLE)].itertuples():
        yield Finding("hidden", row.Index, -1, "its name or a folder's begins with a dot")
    for row, why, typical in zip(decoded.itertuples(), odd, median, strict=True):
        suffix = Path(row.path).suffix.lower()
        if FORMAT_OF_SUFFIX.get(suffix, row.format) != row.format:
            yield Finding("wrong_format", row.Index, -1, f"{suffix}, but its bytes are {row.format}")
        if why:
            detail = f"{row.width}x{row.height}: {why} (median side {typical:.0f} px)"
            yield Finding("odd_size", row.Index, -1, detail)
        if row.is_flat:
            yield Finding("blank", row.Index, -1, "hardly any contrast")
        if row.mode != "RGB":
            yield Finding("mode", row.Index, -1, row.mode)


def _copies_and_leaks(images: pd.DataFrame, near: pd.DataFrame) -> Iterator[Finding]:
    """Yield copies of an image, and evaluation images, copies of them and their patients in training."""
    trained, evaluated, hidden = images["trained"], images["evaluated"], images["is_hidden"]
    is_copy = (images["content"] != images.index) & ~hidden & ~hidden.loc[images["content"]].to_numpy()
    yield from (
        Finding("same_bytes", i, images["content"][i], f"{images['size'][i]} bytes") for i in images.index[is_copy]
    )
    yield from (Finding("near_duplicate", p.a, p.b, f"correlation {p.correlation:.4f}") for p in near.itertuples())
    yield from (Finding("leak_path", i, -1, "in both") for i in images.index[trained & evaluated])
    example = {row.content: row.Index for row in images[evaluated][::-1].itertuples()}  # the first of each content
    for row in images[trained & ~evaluated & images["content"].isin(example)].itertuples():
        yield Finding("leak_bytes", row.Index, example[row.content], "same bytes")
    trained_contents = set(images.loc[trained, "content"])
    for pair in near.itertuples():
        for x, y in ((pair.a, pair.b), (pair.b, pair.a)):
            if x in trained_contents and y in example and x not in example:
                yield Finding("leak_near", x, example[y], f"correlation {pair.correlation:.4f}")
    for patient, group in images[images["has_leaking_patient"]].groupby("patient"):
        there = images.index[evaluated & (images["patient"] == patient)]
        detail = f"patient {patient}: {len(group)} images in training, {len(there)} in evaluation"
        yield Finding("leak_patient", group.index[0], there[0], detail)


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


def _near_drops(near: pd.DataFrame, conflicts: pd.DataFrame, evaluated: set[Any]) -> set[Any]:
    """Choose of each pair the later image, or the one that is not evaluated; both if their labels differ."""
    dropped = {*conflicts["a"], *conflicts["b"]}
    for a, b in near[["a", "b"]].itertuples(index=False):
        if not {a, b} & dropped:
            dropped.add(a if b in evaluated and a not in evaluated else b)
    return dropped

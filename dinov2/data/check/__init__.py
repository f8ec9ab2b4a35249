"""Find broken, duplicate and leaking images in image lists before a network is trained on them."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dinov2.data.check.scan import (
    EVALUATION,
    LABELS,
    READABLE,
    TRAINING,
    UNREADABLE,
    Source,
    read_inputs,
    scan_images,
    similar_hashes,
)
from dinov2.utils.files import PathLike, atomic_write
from dinov2.utils.resources import available_cores

logger = logging.getLogger("dinov2")

NEAR_CHOICES = ("off", "on", "turned")
N_EXAMPLES = 10  # of each kind of finding, in report.md
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
    "dark": ("16-bit images with values of 12 bits or fewer", False, "scale them up: they come out nearly black"),
    "pages": ("images with several pages", False, "the first is used; if they are channels, save one RGB image"),
    HIDDEN: ("hidden images", False, "readers of folders leave them out, and so do the cleaned lists"),
}


def check_lists(
    training: Sequence[PathLike],
    output: PathLike,
    labels: Sequence[PathLike] = (),
    evaluation: Sequence[PathLike] = (),
    *,
    pixels: bool = True,
    near_duplicates: str = "on",
    drop_near_duplicates: bool = False,
    n_workers: int | None = None,
) -> dict[str, Any]:
    """Check lists, write report.json, report.md, findings.csv and `cleaned/` into `output`, and return the summary.

    The facts of each image are kept in `scan/` there, so that a stopped check continues.

    Args:
        training, labels, evaluation: see `read_inputs`.
        output: the folder for the report.
        pixels: decode every image; without, only its bytes are compared.
        near_duplicates: one of `NEAR_CHOICES`; "turned" also finds mirrored and turned images.
        drop_near_duplicates: leave near-duplicates out of the cleaned lists.
        n_workers: processes; None for all cores.
    """
    n_workers = available_cores() if n_workers is None else n_workers
    if n_workers < 1:
        raise ValueError(f"--workers {n_workers}: give 1 or more")
    searches_near = pixels and near_duplicates != "off"
    if drop_near_duplicates and not searches_near:
        raise ValueError("--drop-near-duplicates: none are searched with --no-pixels or --near-duplicates off")
    output = Path(output).absolute()
    sources, entries, paths = read_inputs(training, labels, evaluation)
    if any((output / "cleaned").resolve() in source.file.resolve().parents for source in sources):
        raise ValueError(f"--output-dir: {str(output)!r} holds a list to check in cleaned/; choose another folder")
    logger.info("%d images, named by %d sources", len(paths), len(sources))
    images = describe_images(entries, paths, scan_images(paths, output / "scan", pixels, n_workers))
    near, remarks = pd.DataFrame(columns=["a", "b"]), ["Near-duplicates were not searched."]
    if searches_near:
        near = _near_pairs(images, with_turns=near_duplicates == "turned")
        remarks = ["Near-duplicates: re-encoded, scaled, slightly brighter or darker copies."]
        if near_duplicates != "turned":
            remarks.append("Mirrored and turned copies were not searched (--near-duplicates turned).")
    if not pixels:
        remarks.append("Images were not decoded (--no-pixels): only missing, empty and equal files are found.")
    findings, reasons = diagnose(sources, entries, images, near, drop_near_duplicates)
    counts = findings["kind"].value_counts()
    summary = {
        "format": 1,
        "pictures": len(paths),
        "entries": len(entries),
        "faults": sum(KINDS[kind][1] for kind in findings["kind"]),
        "counts": {kind: int(counts.get(kind, 0)) for kind in KINDS},
        "kinds": {kind: {"title": title, "is_fault": is_fault} for kind, (title, is_fault, _) in KINDS.items()},
        "pixels": pixels,
        "near_duplicates": near_duplicates if pixels else "off",
        "remarks": remarks,
        "sources": [{"file": str(s.file), "kind": s.kind, "role": s.role} for s in sources],
        "cleaned": _write_cleaned(sources, entries.assign(reason=reasons), output / "cleaned"),
    }
    records = findings.rename(columns={"other path": "other_path"}).to_dict("records")
    for name, text in (
        ("findings.csv", findings.to_csv(index=False, lineterminator="\n")),
        ("report.json", json.dumps({**summary, "findings": records}, indent=1)),
        ("report.md", _markdown(summary, findings, output)),
    ):
        with atomic_write(output / name, "w") as stream:
            stream.write(text)
    return summary


def _near_pairs(images: pd.DataFrame, with_turns: bool) -> pd.DataFrame:
    """Find pairs of near-duplicates among the images of different bytes: columns a and b, positions."""
    is_first = (images["content"] == images.index) & (images["status"] == READABLE) & (images["hash"] != "")
    first = images[is_first]
    hashes = np.frombuffer(bytes.fromhex("".join(first["hash"])), dtype="<u8").reshape(-1, 4)
    return pd.DataFrame(first.index.to_numpy()[similar_hashes(hashes, with_turns)], columns=["a", "b"])


def describe_images(entries: pd.DataFrame, paths: list[str], scanned: pd.DataFrame) -> pd.DataFrame:
    """Add what the lists say to the facts of each image; `paths` has one path for each row of `scanned`.

    The new columns: path (printable); content (the first readable image with the same bytes); trained, evaluated (a
    source of this role names it); patient, dataset ("" for none); has_leaking_patient (trained on, and the patient is
    evaluated too). Equal patient ids in two different named data sets are two patients.

    The status becomes `UNREADABLE` if the name has a line break. It becomes `HIDDEN` if a readable image
    is found only by listing folders and its name or folder begins with a dot.
    """
    printable = [path.encode("utf-8", "backslashreplace").decode() for path in paths]
    images = scanned.assign(path=printable)
    has_bad_name = ["\n" in path or "\r" in path for path in paths]
    images.loc[has_bad_name, ["status", "reason"]] = UNREADABLE, "its name has a line break: rename it"
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
    for row in images[images["largest_16_bit"].between(0, 2**12 - 1)].itertuples():
        yield "dark", row.path, "", f"the largest value is {row.largest_16_bit} of 65535"
    for row in images[images["n_pages"] > 1].itertuples():
        yield "pages", row.path, "", f"{row.n_pages} pages, the first is used"


def _repeats(entries: pd.DataFrame, images: pd.DataFrame, conflicts: pd.DataFrame) -> Iterator[Finding]:
    paths = images["path"]
    for entry in entries[entries["is_repeated"]].itertuples():
        yield "same_path", paths[entry.image], "", entry.place
    for row in conflicts.itertuples():
        kind = "two_labels" if row.a == row.b else "two_labels_near"
        detail = f"{row.label!r} in {row.place} and {row.label_other!r} in {row.place_other}"
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


def _write_cleaned(sources: list[Source], entries: pd.DataFrame, folder: Path) -> list[dict[str, Any]]:
    """Write each source without the entries that have a reason to leave them out; return a summary of each."""
    for file in [*folder.glob("*.txt"), *folder.glob("*.csv")]:
        file.unlink()
    summaries: list[dict[str, Any]] = []
    for number, source in enumerate(sources):
        own = entries[entries["source"] == number]
        dropped = own[own["reason"] != ""]
        rows = source.rows.drop(dropped["line"])
        is_list = source.kind == "list" or (source.kind == "folder" and source.role == TRAINING)  # else a CSV
        stem = source.file.absolute().name if source.kind == "folder" else source.file.stem
        stem += f"_{number + 1}" if stem in [Path(one["file"]).stem for one in summaries] else ""
        file = folder / f"{stem}{'.txt' if is_list else '.csv'}"
        text = "".join(f"{path}\n" for path in rows.iloc[:, 0])
        with atomic_write(file, "w") as stream:
            stream.write(text if is_list else rows.to_csv(index=False, lineterminator="\n"))
        names = {"source": str(source.file), "role": source.role, "file": str(file)}
        left_out = dropped["reason"].value_counts().sort_index().to_dict()
        summaries.append({**names, "entries": len(own), "kept": len(own) - len(dropped), "left_out": left_out})
    return summaries


def describe(summary: dict[str, Any], output: PathLike) -> str:
    """Format a summary for the terminal."""
    lines = [f"{summary['pictures']} images, {summary['faults']} faults"]
    for kind, (title, is_fault, _) in KINDS.items():
        if count := summary["counts"][kind]:
            lines.append(f"  {count:>8} {title}{'' if is_fault else ' (not a fault)'}")
    lines += [f"  {remark}" for remark in summary["remarks"]]
    lines += [f"  {one['file']}: {one['kept']} of {one['entries']} entries kept" for one in summary["cleaned"]]
    return "\n".join([*lines, f"  report: {Path(output) / 'report.md'}"])


def _markdown(summary: dict[str, Any], findings: pd.DataFrame, output: Path) -> str:
    """Format a summary and the first findings of each kind as report.md."""
    blocks = ["# List check", f"```\n{describe(summary, output)}\n```"]
    for kind, rows in findings.groupby("kind", sort=False):
        title, _, advice = KINDS[str(kind)]
        blocks += [f"## {title[0].upper()}{title[1:]} (`{kind}`): {len(rows)}", f"What to do: {advice}."]
        examples = rows.head(N_EXAMPLES).itertuples(index=False)
        blocks.append("\n".join("- " + " | ".join(filter(None, texts)) for _, *texts in examples))
    return "\n\n".join([*blocks, f"At most {N_EXAMPLES} of each kind are here, all are in findings.csv."]) + "\n"

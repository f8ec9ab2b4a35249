"""Check image lists: read them, look at each image, compare, write the report and the cleaned lists."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dinov2.data.check.faults import KINDS, describe_images, diagnose
from dinov2.data.check.inputs import read_inputs
from dinov2.data.check.near_duplicates import similar_hashes
from dinov2.data.check.report import markdown, write_cleaned
from dinov2.data.check.scan import READABLE, scan
from dinov2.utils.files import PathLike, atomic_write
from dinov2.utils.parallel import available_cores

logger = logging.getLogger("dinov2")

NEAR_CHOICES = ("off", "on", "turned")


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
    """Check lists, and write report.json, report.md, findings.csv and `cleaned/` into `output`.

    The facts of each image are kept in `scan/` there, so that a stopped check goes on.

    Args:
        training: lists, folders and tables to train on, see `read_inputs`.
        output: the folder for the report.
        labels: tables or folders that give labels, patients and data sets.
        evaluation: splits to evaluate on.
        pixels: decode every image; without, only its bytes are compared.
        near_duplicates: one of `NEAR_CHOICES`; "turned" finds mirrored and turned images too.
        drop_near_duplicates: leave near-duplicates out of the cleaned lists.
        n_workers: processes; None for all cores.

    Returns:
        The summary, as it stands in report.json; `faults` is their number.

    Raises:
        FileNotFoundError, ValueError, PermissionError: an option, a source or the output folder cannot be used.
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
    images = describe_images(entries, paths, scan(paths, output / "scan", pixels, n_workers))
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
        "cleaned": write_cleaned(sources, entries.assign(reason=reasons), output / "cleaned"),
    }
    records = findings.rename(columns={"other path": "other_path"}).to_dict("records")
    for name, text in (
        ("findings.csv", findings.to_csv(index=False, lineterminator="\n")),
        ("report.json", json.dumps({**summary, "findings": records}, indent=1)),
        ("report.md", markdown(summary, findings, output)),
    ):
        with atomic_write(output / name, "w") as stream:
            stream.write(text)
    return summary


def _near_pairs(images: pd.DataFrame, with_turns: bool) -> pd.DataFrame:
    is_first = (images["content"] == images.index) & (images["status"] == READABLE) & (images["hash"] != "")
    first = images[is_first]
    hashes = np.frombuffer(bytes.fromhex("".join(first["hash"])), dtype="<u8").reshape(-1, 4)
    return pd.DataFrame(first.index.to_numpy()[similar_hashes(hashes, with_turns)], columns=["a", "b"])

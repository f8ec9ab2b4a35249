"""Check image lists: read them, look at each image, compare, write the report and the cleaned lists."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dinov2.data.check.faults import describe_images, diagnose
from dinov2.data.check.inputs import read_inputs
from dinov2.data.check.near_duplicates import similar_hashes
from dinov2.data.check.report import write_report
from dinov2.data.check.scan import READABLE, scan
from dinov2.utils.cores import available_cores
from dinov2.utils.files import PathLike

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
        near_duplicates: "off", "on", or "turned" to find mirrored and turned images too.
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
    inputs = read_inputs(training, labels, evaluation)
    for source in inputs.sources:
        if (output / "cleaned").resolve() in source.file.resolve().parents:
            raise ValueError(
                f"--output-dir: {str(source.file)!r} is to be read and lies where the cleaned lists go; choose another "
                f"folder"
            )
    logger.info("%d images, named by %d sources", len(inputs.paths), len(inputs.sources))
    images = describe_images(inputs, scan(inputs.paths, output / "scan", pixels, n_workers))
    near, remarks = pd.DataFrame(columns=["a", "b"]), ["Near-duplicates were not searched."]
    if searches_near:
        with_turns = near_duplicates == "turned"
        is_first = (images["content"] == images.index) & (images["status"] == READABLE)
        first = images[is_first & (images["hash"] != "")]
        hashes = np.frombuffer(bytes.fromhex("".join(first["hash"])), dtype="<u8").reshape(-1, 4)
        pairs, n_crowded = similar_hashes(hashes, with_turns)
        near = pd.DataFrame(first.index.to_numpy()[pairs], columns=["a", "b"])
        turned_too = "mirrored and turned ones too" if with_turns else "mirrored and turned ones were not searched"
        remarks = [f"Near-duplicates: re-encoded, scaled, slightly brighter or darker copies; {turned_too}."]
        if n_crowded:
            remarks.append(f"{n_crowded} images look like so many others that some near-duplicates may be missing.")
    if not pixels:
        remarks.append("Images were not decoded (--no-pixels): only missing, empty and equal files are found.")
    findings, drops = diagnose(inputs, images, near, drop_near_duplicates)
    settings = {"pixels": pixels, "near_duplicates": near_duplicates if pixels else "off", "remarks": remarks}
    return write_report(inputs, findings, drops, settings, output)

"""The whole examination: read lists, look at pictures, compare, write the report."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.doctor.duplicates import MAX_PAIRS, near_pairs
from dinov2.data.doctor.fingerprint import shows_the_same
from dinov2.data.doctor.inputs import Inputs, PathLike, read_inputs
from dinov2.data.doctor.leaks import KINDS, contents, diagnose, to_compare
from dinov2.data.doctor.report import set_table, write_cleaned, write_reports
from dinov2.data.doctor.scan import Scan, compare_pictures, scan
from dinov2.utils.cores import available_cores
from dinov2.utils.files import atomic_write

logger = logging.getLogger("dinov2")

NEAR_CHOICES = ("off", "on", "turned")


@dataclass(frozen=True)
class Options:
    """How thoroughly to look.

    Attributes:
        pixels: decode every picture; without, only its bytes are compared.
        near_duplicates: "off", "on", or "turned" to find mirrored and turned pictures too.
        drop_near_duplicates: leave near-duplicates out of the cleaned lists.
        n_workers: processes.
    """

    pixels: bool = True
    near_duplicates: str = "on"
    drop_near_duplicates: bool = False
    n_workers: int = available_cores()

    def __post_init__(self) -> None:
        if self.n_workers < 1:
            raise ValueError(f"--workers {self.n_workers}: give 1 or more")
        if self.near_duplicates not in NEAR_CHOICES:
            raise ValueError(f"--near-duplicates {self.near_duplicates}: choose {', '.join(NEAR_CHOICES)}")
        if self.drop_near_duplicates and not (self.pixels and self.near_duplicates != "off"):
            raise ValueError("--drop-near-duplicates: none are searched with --no-pixels or --near-duplicates off")


def check_lists(
    training: Sequence[PathLike],
    output: PathLike,
    labels: Sequence[PathLike] = (),
    evaluation: Sequence[PathLike] = (),
    options: Options | None = None,
) -> dict[str, Any]:
    """Examine lists, and write report.json, report.md, findings.csv and `cleaned/` into `output`.

    What was seen of each picture is kept in `scan/` there: the same call goes on where an earlier one was killed, and
    looks again only at pictures that have changed.

    Args:
        training: lists, folders and tables to learn from, see `read_inputs`.
        output: the folder for the report.
        labels: tables or folders that tell labels, patients and data sets.
        evaluation: splits to judge by.
        options: how thoroughly to look.

    Returns:
        The summary, as it stands in report.json; `faults` is their number.

    Raises:
        FileNotFoundError, ValueError, PermissionError: a source or the output folder cannot be used.
    """
    options = options or Options()
    output = Path(output).absolute()
    inputs = read_inputs(training, labels, evaluation)
    _check_output(inputs, output)
    logger.info("%d pictures, named by %d sources", inputs.n_pictures, len(inputs.sources))
    seen = scan(inputs.n_pictures, inputs.path, output / "scan", options.pixels, options.n_workers)
    near, similarities, remarks = _near_duplicates(inputs, seen, options)
    diagnosis = diagnose(inputs, seen, near, similarities, options.drop_near_duplicates)
    summary = {
        "format": 1,
        "pictures": inputs.n_pictures,
        "entries": len(inputs.picture),
        "faults": diagnosis.n_faults,
        "counts": {kind: len(found) for kind, found in diagnosis.findings.items()},
        "kinds": {kind: {"title": title, "is_fault": fault} for kind, (title, fault, _) in KINDS.items()},
        "pixels": options.pixels,
        "near_duplicates": options.near_duplicates if options.pixels else "off",
        "remarks": remarks,
        "blank_lines": inputs.n_blank_lines,
        "sources": [{"file": str(s.file), "kind": s.kind, "role": s.role} for s in inputs.sources],
        "datasets": set_table(inputs, seen, diagnosis),
        "cleaned": write_cleaned(inputs, diagnosis, output / "cleaned"),
    }
    write_reports(inputs, diagnosis, summary, output)
    return summary


def _check_output(inputs: Inputs, output: Path) -> None:
    cleaned = os.path.realpath(output / "cleaned")
    inside = [s.file for s in inputs.sources if os.path.realpath(s.file).startswith(cleaned + os.sep)]
    if inside:
        raise ValueError(
            f"--output-dir: {str(inside[0])!r} is to be read and lies in {cleaned!r}, where the cleaned lists go; "
            f"choose another folder"
        )
    with atomic_write(output / ".can_write"):
        pass
    (output / ".can_write").unlink()


def _near_duplicates(inputs: Inputs, seen: Scan, options: Options) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Pairs of pictures [K, 2] that show the same, their correlations [K], and what should be said about the search."""
    nothing = np.zeros((0, 2), dtype=np.int64), np.zeros(0, dtype=np.float32)
    if not options.pixels:
        return *nothing, ["Pictures were not decoded (--no-pixels): only missing, empty and equal files are found."]
    if options.near_duplicates == "off":
        return *nothing, ["Near-duplicates were not searched (--near-duplicates off)."]
    with_turns = options.near_duplicates == "turned"
    candidates = to_compare(inputs, seen, contents(seen))
    found = near_pairs(seen.rows["hash"][candidates], with_turns)
    pairs = candidates[found.pairs]
    values = compare_pictures(pairs, found.turns, inputs.path, options.n_workers)
    same = np.array([shows_the_same(*value) for value in values.tolist()], dtype=bool)
    logger.info("%d pairs have similar hashes, %d of them show the same", len(pairs), int(same.sum()))
    remarks = [
        "Near-duplicates: re-encoded, scaled, slightly brighter or darker copies"
        + (", mirrored and turned ones too." if with_turns else "; mirrored and turned ones were not searched.")
    ]
    if found.n_crowded:
        remarks.append(
            f"{found.n_crowded} pictures look so much like many others that not all near-duplicates of theirs may be "
            f"found."
        )
    if found.is_cut:
        remarks.append(f"More than {MAX_PAIRS} pairs have similar hashes: the rest was not compared.")
    return pairs[same], values[same, 0], remarks


def describe(summary: dict[str, Any], output: PathLike) -> str:
    """A summary for the terminal."""
    lines = [f"{summary['pictures']} pictures, {summary['faults']} faults"]
    for kind, count in summary["counts"].items():
        if count:
            about = summary["kinds"][kind]
            lines.append(f"  {count:>8} {about['title']}{'' if about['is_fault'] else ' (not a fault)'}")
    lines += [f"  {remark}" for remark in summary["remarks"]]
    lines += [f"  {one['file']}: {one['kept']} of {one['entries']} entries kept" for one in summary["cleaned"]]
    lines.append(f"  report: {Path(output) / 'report.md'}")
    return "\n".join(lines)

"""Find broken, duplicate and leaking images in image lists before a network is trained on them."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dinov2.data.check.lists import KINDS, TRAINING, Source, describe_images, diagnose, read_inputs
from dinov2.data.check.scan import READABLE, scan_images, similar_hashes
from dinov2.utils.files import PathLike, atomic_write
from dinov2.utils.parallel import available_cores

logger = logging.getLogger("dinov2")

NEAR_CHOICES = ("off", "on", "turned")
N_EXAMPLES = 10  # of each kind of finding, in report.md


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

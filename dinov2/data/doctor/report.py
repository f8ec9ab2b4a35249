"""The doctor's files: report.json, report.md, findings.csv, cleaned lists and tables. The inputs stay as they are."""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datasets.tables import LABEL_COLUMN, PATH_COLUMN
from dinov2.data.doctor.inputs import Inputs, Source, list_lines, path_column, table_rows
from dinov2.data.doctor.leaks import DROPS, KINDS, Diagnosis
from dinov2.data.doctor.scan import MODES, READABLE, Scan
from dinov2.utils.files import atomic_write

N_EXAMPLES = 10


def printable(path: str) -> str:
    """A path as UTF-8 can have it."""
    return path.encode("utf-8", "backslashreplace").decode()


def set_table(inputs: Inputs, scan: Scan, diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """Counts and sizes of each data set, ready for JSON."""
    table = []
    labelled = inputs.label >= 0
    for i in np.unique(diagnosis.dataset):
        pictures = np.flatnonzero(diagnosis.dataset == i)
        rows = scan.rows[pictures]
        entries = diagnosis.dataset[inputs.picture] == i
        seen = rows[rows["width"] > 0]
        modes = Counter(MODES[m] for m in seen["mode"])
        sizes = {}
        if len(seen):
            for name in ("width", "height"):
                sizes[name] = {
                    "median": float(np.median(seen[name])),
                    "min": int(seen[name].min()),
                    "max": int(seen[name].max()),
                }
        table.append(
            {
                "dataset": diagnosis.dataset_names[i],
                "pictures": len(pictures),
                "readable": int((rows["status"] == READABLE).sum()),
                "different": len(np.unique(diagnosis.content[pictures])),
                "classes": _counts(inputs.labels, inputs.label[entries & labelled], inputs.picture[entries & labelled]),
                "patients": len(np.unique(inputs.patient[entries & (inputs.patient >= 0)])),
                "megabytes": round(float(rows["size"].sum()) / 1e6, 1),
                "modes": dict(sorted(modes.items())),
                **sizes,
            }
        )
    return table


def _counts(names: list[str], ids: np.ndarray, pictures: np.ndarray) -> dict[str, int]:
    pairs = np.unique(np.stack([ids, pictures]), axis=1)  # a picture that two tables name counts once
    found, counts = np.unique(pairs[0], return_counts=True)
    return {names[i]: int(n) for i, n in zip(found, counts, strict=True)}


def write_cleaned(inputs: Inputs, diagnosis: Diagnosis, folder: Path) -> list[dict[str, Any]]:
    """Write what is left of each source into `folder`, and tell for each what it lost.

    Lists and tables keep their lines, comments and columns, with absolute paths; a folder of training pictures becomes
    a list, one of labelled pictures a CSV. Files of an earlier run are removed.
    """
    told: list[dict[str, Any]] = []
    for number, source in enumerate(inputs.sources):
        entries = np.flatnonzero(inputs.source == number)
        is_list = source.kind == "list" or (source.kind == "folder" and source.role == "training")
        file = folder / f"{source.name}{'.txt' if is_list else '.csv'}"
        drops = diagnosis.drops[entries]
        if source.kind == "list":
            _write_list(inputs, source, entries, drops, file)
        elif source.kind == "table":
            lines = {empty.line for empty in inputs.empty_values if empty.source == number}
            _write_table(inputs, source, entries, drops, lines, file)
        else:
            _write_folder(inputs, entries[drops == 0], is_list, file)
        lost = Counter(DROPS[d] for d in drops if d)
        told.append(
            {
                "source": str(source.file),
                "role": source.role,
                "file": str(file),
                "entries": len(entries),
                "kept": int((drops == 0).sum()),
                "left_out": dict(sorted(lost.items())),
            }
        )
    written = {Path(one["file"]) for one in told}
    for file in folder.iterdir():
        if file.suffix in (".txt", ".csv") and file not in written:
            file.unlink()
    return told


def _write_list(inputs: Inputs, source: Source, entries: np.ndarray, drops: np.ndarray, file: Path) -> None:
    kept = dict(
        zip(inputs.line[entries[drops == 0]].tolist(), inputs.picture[entries[drops == 0]].tolist(), strict=True)
    )
    with atomic_write(file, "w") as stream:
        for number, text in list_lines(source.file, "check lists"):
            if number in kept:
                stream.write(inputs.path(kept[number]) + "\n")
            elif not text or text.startswith("#"):
                stream.write(text + "\n")


def _write_table(
    inputs: Inputs, source: Source, entries: np.ndarray, drops: np.ndarray, empty: set[int], file: Path
) -> None:
    picture_at = dict(zip(inputs.line[entries].tolist(), inputs.picture[entries].tolist(), strict=True))
    left_out = set(inputs.line[entries[drops > 0]].tolist()) | empty
    folder = os.path.abspath(source.file.parent)
    with atomic_write(file, "w") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        rows = table_rows(source.file, "check lists")
        header = next(rows)
        writer.writerow(header)
        where = path_column(header)
        assert where is not None, "read_inputs refuses tables without a path"
        for number, row in enumerate(rows, 2):
            if not any(row) or number in left_out:
                continue
            # rows of parts that are not evaluated have no entry and stay
            picture = picture_at.get(number)
            row[where] = os.path.join(folder, row[where]) if picture is None else inputs.path(picture)
            writer.writerow(row)


def _write_folder(inputs: Inputs, entries: np.ndarray, is_list: bool, file: Path) -> None:
    with atomic_write(file, "w") as stream:
        if is_list:
            stream.writelines(inputs.path(int(picture)) + "\n" for picture in inputs.picture[entries])
            return
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([PATH_COLUMN, LABEL_COLUMN])
        for entry in entries:
            label = inputs.label[entry]
            writer.writerow([inputs.path(int(inputs.picture[entry])), inputs.labels[label] if label >= 0 else ""])


def _rows(inputs: Inputs, diagnosis: Diagnosis) -> Iterator[tuple[str, str, str, str]]:
    """Kind, path, other path and detail of every finding."""
    for kind, found in diagnosis.findings.items():
        for picture, other, detail in zip(found.pictures.tolist(), found.others.tolist(), found.details, strict=True):
            path, other_path = (printable(inputs.path(p)) if p >= 0 else "" for p in (picture, other))
            yield kind, path, other_path, printable(detail)


def write_reports(inputs: Inputs, diagnosis: Diagnosis, summary: dict[str, Any], folder: Path) -> None:
    """Write findings.csv, report.json (the summary and all findings) and report.md."""
    columns = ("kind", "path", "other path", "detail")
    with atomic_write(folder / "findings.csv", "w") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(_rows(inputs, diagnosis))
    with atomic_write(folder / "report.json", "w") as stream:
        head = json.dumps(summary, indent=2, ensure_ascii=True)
        stream.write(head[: head.rindex("}")].rstrip() + ',\n  "findings": [')
        separator = "\n    "
        for kind, path, other, detail in _rows(inputs, diagnosis):  # one at a time: there may be a million
            one = {"kind": kind, "path": path, "other_path": other, "detail": detail}
            stream.write(separator + json.dumps(one))
            separator = ",\n    "
        stream.write("\n  ]\n}\n")
    with atomic_write(folder / "report.md", "w") as stream:
        stream.write(_markdown(inputs, diagnosis, summary))


def _markdown(inputs: Inputs, diagnosis: Diagnosis, summary: dict[str, Any]) -> str:
    lines = ["# What the doctor found", ""]
    n_faults = diagnosis.n_faults
    lines += [
        f"{summary['pictures']} pictures in {len(inputs.sources)} sources: "
        + (f"{n_faults} faults." if n_faults else "no faults."),
        "",
        *summary["remarks"],
        "",
        "| finding | how many | fault? | what to do |",
        "| --- | --- | --- | --- |",
    ]
    for kind, (title, is_fault, advice) in KINDS.items():
        if count := len(diagnosis.findings[kind]):
            lines.append(f"| {title} (`{kind}`) | {count} | {'yes' if is_fault else 'no'} | {advice} |")
    head = "| data set | pictures | readable | different | classes | patients | width | height | MB |"
    lines += ["", "## Data sets", "", head, "|" + " --- |" * 9]
    for one in summary["datasets"]:
        sizes = [
            f"{s['median']:g} ({s['min']} to {s['max']})" if (s := one.get(n)) else "" for n in ("width", "height")
        ]
        counts = [one["pictures"], one["readable"], one["different"], len(one["classes"]), one["patients"]]
        lines.append(f"| {_cell(one['dataset'])} | " + " | ".join(map(str, [*counts, *sizes, one["megabytes"]])) + " |")
    lines += ["", "Width and height are medians (smallest to largest), in pixels.", "", "## Cleaned lists", ""]
    lines += ["| file | of | kept | left out |", "| --- | --- | --- | --- |"]
    for one in summary["cleaned"]:
        lost = ", ".join(f"{reason} {count}" for reason, count in one["left_out"].items())
        lines.append(f"| {_cell(Path(one['file']).name)} | {one['entries']} | {one['kept']} | {lost} |")
    for kind, (title, _, advice) in KINDS.items():
        found = diagnosis.findings[kind]
        if not len(found):
            continue
        lines += ["", f"## {title[0].upper()}{title[1:]}: {len(found)}", "", f"What to do: {advice}.", ""]
        for i in range(min(len(found), N_EXAMPLES)):
            picture, other = int(found.pictures[i]), int(found.others[i])
            paths = [f"`{printable(inputs.path(p))}`" for p in (picture, other) if p >= 0]
            detail = printable(found.details[i])
            lines.append("- " + " and ".join(paths) + (": " if paths and detail else "") + detail)
        if len(found) > N_EXAMPLES:
            lines.append(f"- and {len(found) - N_EXAMPLES} more, in findings.csv")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")

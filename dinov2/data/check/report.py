"""Write the report of a check: report.json, report.md, findings.csv, and cleaned lists and tables."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dinov2.data.check.faults import KINDS, Finding
from dinov2.data.check.inputs import TRAINING, Inputs, absolute_path, read_lines, read_table
from dinov2.data.check.scan import READABLE
from dinov2.data.datasets.tables import LABEL_COLUMN, PATH_COLUMN
from dinov2.utils.files import atomic_write

N_EXAMPLES = 10


def write_report(
    inputs: Inputs,
    images: pd.DataFrame,
    findings: Sequence[Finding],
    drops: pd.Series,
    settings: dict[str, Any],
    output: Path,
) -> dict[str, Any]:
    """Write all files of a report into `output`, and return what report.json holds, without the findings."""
    paths = [path.encode("utf-8", "backslashreplace").decode() for path in inputs.paths] + [""]  # -1: no image
    rows = [(f.kind, paths[f.image], paths[f.other], f.detail) for f in findings]
    table = pd.DataFrame(rows, columns=["kind", "path", "other path", "detail"])
    counts = table["kind"].value_counts()
    summary = {
        "format": 1,
        "pictures": len(inputs.paths),
        "entries": len(inputs.entries),
        "faults": sum(KINDS[finding.kind].is_fault for finding in findings),
        "counts": {kind: int(counts.get(kind, 0)) for kind in KINDS},
        "kinds": {kind: {"title": title, "is_fault": is_fault} for kind, (title, is_fault, _) in KINDS.items()},
        **settings,
        "sources": [{"file": str(s.file), "kind": s.kind, "role": s.role} for s in inputs.sources],
        "datasets": _dataset_table(inputs, images),
        "cleaned": _write_cleaned(inputs, drops, output / "cleaned"),
    }
    _write_csv(output / "findings.csv", table)
    records = table.rename(columns={"other path": "other_path"}).to_dict("records")
    with atomic_write(output / "report.json", "w") as stream:
        json.dump({**summary, "findings": records}, stream, indent=1)
    _write_lines(output / "report.md", _markdown(summary, table, output))
    return summary


def _dataset_table(inputs: Inputs, images: pd.DataFrame) -> list[dict[str, Any]]:
    """Count images, classes, patients and sizes of each data set, ready for JSON."""
    table = []
    for name, group in images.groupby("dataset"):
        entries = inputs.entries[inputs.entries["image"].isin(group.index)]
        labelled = entries[entries["label"] != ""].drop_duplicates(["label", "image"])
        decoded = group[group["width"] > 0]
        table.append(
            {
                "dataset": name,
                "pictures": len(group),
                "readable": int((group["status"] == READABLE).sum()),
                "different": int(group["content"].nunique()),
                "classes": labelled["label"].value_counts().sort_index().to_dict(),
                "patients": len(set(entries["patient"]) - {""}),
                "megabytes": round(float(group["size"].sum()) / 1e6, 1),
                "modes": decoded["mode"].value_counts().sort_index().to_dict(),
                **(decoded[["width", "height"]].agg(["median", "min", "max"]).to_dict() if len(decoded) else {}),
            }
        )
    return table


def _write_cleaned(inputs: Inputs, drops: pd.Series, folder: Path) -> list[dict[str, Any]]:
    """Write what is left of each source, and describe what was left out.

    Lists and tables keep their lines, comments and columns, with absolute paths; a folder of training images becomes a
    list, one of labelled images a CSV. Files of an earlier check are removed.
    """
    summaries = []
    for file in [*folder.glob("*.txt"), *folder.glob("*.csv")]:
        file.unlink()
    for number, source in enumerate(inputs.sources):
        entries = inputs.entries[inputs.entries["source"] == number]
        reasons = drops[entries.index]
        kept, lost = entries[reasons == ""], reasons[reasons != ""]
        paths = [inputs.paths[image] for image in kept["image"]]
        is_list = source.kind == "list" or (source.kind == "folder" and source.role == TRAINING)
        file = folder / f"{source.name}{'.txt' if is_list else '.csv'}"
        if source.kind == "list":
            path_of = dict(zip(kept["line"], paths, strict=True))
            lines = enumerate(read_lines(source.file, source.role), 1)
            _write_lines(file, [path_of.get(n, line) for n, line in lines if n in path_of or line[:1] in ("", "#")])
        elif is_list:
            _write_lines(file, paths)
        elif source.kind == "table":
            table, column = read_table(source.file, source.role)
            gaps = inputs.gaps.loc[inputs.gaps["source"] == number, "line"]
            table = table.drop([*entries.loc[lost.index, "line"], *gaps])  # rows of other parts stay
            table[column] = [absolute_path(source.file, path) for path in table[column]]
            _write_csv(file, table)
        else:
            _write_csv(file, pd.DataFrame({PATH_COLUMN: paths, LABEL_COLUMN: kept["label"].to_numpy()}))
        about = {"source": str(source.file), "role": source.role, "file": str(file)}
        counts = {"entries": len(entries), "kept": len(kept), "left_out": lost.value_counts().sort_index().to_dict()}
        summaries.append({**about, **counts})
    return summaries


def _write_lines(file: Path, lines: Iterable[str]) -> None:
    with atomic_write(file, "w") as stream:
        stream.writelines(f"{line}\n" for line in lines)


def _write_csv(file: Path, table: pd.DataFrame) -> None:
    with atomic_write(file, "w") as stream:
        table.to_csv(stream, index=False, lineterminator="\n")


def describe(summary: dict[str, Any], output: str | Path) -> str:
    """Format a summary for the terminal."""
    lines = [f"{summary['pictures']} images, {summary['faults']} faults"]
    for kind, (title, is_fault, _) in KINDS.items():
        if count := summary["counts"][kind]:
            lines.append(f"  {count:>8} {title}{'' if is_fault else ' (not a fault)'}")
    lines += [f"  {remark}" for remark in summary["remarks"]]
    lines += [f"  {one['file']}: {one['kept']} of {one['entries']} entries kept" for one in summary["cleaned"]]
    return "\n".join([*lines, f"  report: {Path(output) / 'report.md'}"])


def _markdown(summary: dict[str, Any], findings: pd.DataFrame, output: Path) -> list[str]:
    lines = ["# List check", "", "```", *describe(summary, output).split("\n"), "```", ""]
    columns = ["dataset", "pictures", "readable", "different", "patients", "megabytes"]
    table = pd.DataFrame(summary["datasets"])
    for side in ("width", "height"):
        sizes = [one.get(side, {"median": 0, "min": 0, "max": 0}) for one in summary["datasets"]]
        table[side] = [f"{size['median']:g} ({size['min']:g} to {size['max']:g})" for size in sizes]
    table["classes"] = table["classes"].map(len)
    lines += ["```", *table[[*columns, "classes", "width", "height"]].to_string(index=False).split("\n"), "```"]
    for kind, rows in findings.groupby("kind", sort=False):
        title, _, advice = KINDS[str(kind)]
        lines += ["", f"## {title[0].upper()}{title[1:]} (`{kind}`): {len(rows)}", "", f"What to do: {advice}.", ""]
        for _, path, other, detail in rows.head(N_EXAMPLES).itertuples(index=False):
            names = " and ".join(f"`{name}`" for name in (path, other) if name)
            lines.append("- " + ": ".join(text for text in (names, detail) if text))
        if len(rows) > N_EXAMPLES:
            lines.append(f"- and {len(rows) - N_EXAMPLES} more, in findings.csv")
    return lines

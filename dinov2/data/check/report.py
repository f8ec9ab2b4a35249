"""Write the report of a check: report.json, report.md, findings.csv, and cleaned lists and tables."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from dinov2.data.check.faults import KINDS
from dinov2.data.check.inputs import TRAINING, Inputs
from dinov2.utils.files import atomic_write

N_EXAMPLES = 10


def write_report(
    inputs: Inputs,
    findings: pd.DataFrame,
    drops: pd.Series,
    settings: dict[str, Any],
    output: Path,
) -> dict[str, Any]:
    """Write all files of a report into `output`, and return what report.json holds, without the findings."""
    counts = findings["kind"].value_counts()
    summary = {
        "format": 1,
        "pictures": len(inputs.paths),
        "entries": len(inputs.entries),
        "faults": sum(KINDS[kind].is_fault for kind in findings["kind"]),
        "counts": {kind: int(counts.get(kind, 0)) for kind in KINDS},
        "kinds": {kind: {"title": title, "is_fault": is_fault} for kind, (title, is_fault, _) in KINDS.items()},
        **settings,
        "sources": [{"file": str(s.file), "kind": s.kind, "role": s.role} for s in inputs.sources],
        "cleaned": _write_cleaned(inputs, drops, output / "cleaned"),
    }
    _write_text(output / "findings.csv", findings.to_csv(index=False, lineterminator="\n"))
    records = findings.rename(columns={"other path": "other_path"}).to_dict("records")
    _write_text(output / "report.json", json.dumps({**summary, "findings": records}, indent=1))
    _write_text(output / "report.md", _markdown(summary, findings, output))
    return summary


def _write_cleaned(inputs: Inputs, drops: pd.Series, folder: Path) -> list[dict[str, Any]]:
    """Write what is left of each source, and describe what was left out.

    Tables keep their columns and rows of other parts, with absolute paths; a folder of training images becomes a list,
    one of labelled images a CSV. Files of an earlier check are removed.
    """
    for file in [*folder.glob("*.txt"), *folder.glob("*.csv")]:
        file.unlink()
    summaries = []
    for number, source in enumerate(inputs.sources):
        entries = inputs.entries[inputs.entries["source"] == number]
        reasons = drops[entries.index]
        lost = reasons[reasons != ""]
        gaps = inputs.gaps.loc[inputs.gaps["source"] == number, "line"]
        rows = source.rows.drop([*entries.loc[lost.index, "line"], *gaps])
        is_list = source.kind == "list" or (source.kind == "folder" and source.role == TRAINING)
        suffix = ".txt" if is_list else ".csv"
        n_same, file = 1, folder / f"{source.name}{suffix}"
        while file.exists():
            n_same, file = n_same + 1, folder / f"{source.name}_{n_same + 1}{suffix}"
        text = "".join(f"{path}\n" for path in rows.iloc[:, 0])
        _write_text(file, text if is_list else rows.to_csv(index=False, lineterminator="\n"))
        about = {"source": str(source.file), "role": source.role, "file": str(file)}
        counts = {"entries": len(entries), "kept": len(entries) - len(lost)}
        summaries.append({**about, **counts, "left_out": lost.value_counts().sort_index().to_dict()})
    return summaries


def _write_text(file: Path, text: str) -> None:
    with atomic_write(file, "w") as stream:
        stream.write(text)


def describe(summary: dict[str, Any], output: str | Path) -> str:
    """Format a summary for the terminal."""
    lines = [f"{summary['pictures']} images, {summary['faults']} faults"]
    for kind, (title, is_fault, _) in KINDS.items():
        if count := summary["counts"][kind]:
            lines.append(f"  {count:>8} {title}{'' if is_fault else ' (not a fault)'}")
    lines += [f"  {remark}" for remark in summary["remarks"]]
    lines += [f"  {one['file']}: {one['kept']} of {one['entries']} entries kept" for one in summary["cleaned"]]
    return "\n".join([*lines, f"  report: {Path(output) / 'report.md'}"])


def _markdown(summary: dict[str, Any], findings: pd.DataFrame, output: Path) -> str:
    blocks = ["# List check", f"```\n{describe(summary, output)}\n```"]
    for kind, rows in findings.groupby("kind", sort=False):
        title, _, advice = KINDS[str(kind)]
        blocks += [f"## {title[0].upper()}{title[1:]} (`{kind}`): {len(rows)}", f"What to do: {advice}."]
        examples = rows.head(N_EXAMPLES).itertuples(index=False)
        blocks.append("\n".join("- " + " | ".join(filter(None, texts)) for _, *texts in examples))
    return "\n\n".join([*blocks, f"At most {N_EXAMPLES} of each kind are here, all are in findings.csv."]) + "\n"

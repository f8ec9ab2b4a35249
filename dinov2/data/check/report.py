"""The cleaned lists and tables of a check, and its report in words."""

from pathlib import Path
from typing import Any

import pandas as pd

from dinov2.data.check.faults import KINDS
from dinov2.data.check.inputs import TRAINING, Source
from dinov2.utils.files import atomic_write

N_EXAMPLES = 10


def write_cleaned(sources: list[Source], drops: pd.DataFrame, folder: Path) -> list[dict[str, Any]]:
    """Write what is left of each source, and describe what was left out; files of an earlier check are removed.

    A folder of training images becomes a list, one of labelled images a CSV. `drops` has the source and line of each
    entry, and the reason to leave it out, "" to keep it.
    """
    for file in [*folder.glob("*.txt"), *folder.glob("*.csv")]:
        file.unlink()
    summaries: list[dict[str, Any]] = []
    for number, source in enumerate(sources):
        entries = drops[drops["source"] == number]
        lost = entries[entries["reason"] != ""]
        rows = source.rows.drop(lost["line"])
        is_list = source.kind == "list" or (source.kind == "folder" and source.role == TRAINING)
        stem = source.file.absolute().name if source.kind == "folder" else source.file.stem
        stem += f"_{number + 1}" if stem in [Path(one["file"]).stem for one in summaries] else ""
        file = folder / f"{stem}{'.txt' if is_list else '.csv'}"
        text = "".join(f"{path}\n" for path in rows.iloc[:, 0])
        with atomic_write(file, "w") as stream:
            stream.write(text if is_list else rows.to_csv(index=False, lineterminator="\n"))
        counts = {"entries": len(entries), "kept": len(entries) - len(lost)}
        left_out = lost["reason"].value_counts().sort_index().to_dict()
        summaries.append(
            {"source": str(source.file), "role": source.role, "file": str(file), **counts, "left_out": left_out}
        )
    return summaries


def describe(summary: dict[str, Any], output: str | Path) -> str:
    """Format a summary for the terminal."""
    lines = [f"{summary['pictures']} images, {summary['faults']} faults"]
    for kind, (title, is_fault, _) in KINDS.items():
        if count := summary["counts"][kind]:
            lines.append(f"  {count:>8} {title}{'' if is_fault else ' (not a fault)'}")
    lines += [f"  {remark}" for remark in summary["remarks"]]
    lines += [f"  {one['file']}: {one['kept']} of {one['entries']} entries kept" for one in summary["cleaned"]]
    return "\n".join([*lines, f"  report: {Path(output) / 'report.md'}"])


def markdown(summary: dict[str, Any], findings: pd.DataFrame, output: Path) -> str:
    """Format a summary and the first findings of each kind as report.md."""
    blocks = ["# List check", f"```\n{describe(summary, output)}\n```"]
    for kind, rows in findings.groupby("kind", sort=False):
        title, _, advice = KINDS[str(kind)]
        blocks += [f"## {title[0].upper()}{title[1:]} (`{kind}`): {len(rows)}", f"What to do: {advice}."]
        examples = rows.head(N_EXAMPLES).itertuples(index=False)
        blocks.append("\n".join("- " + " | ".join(filter(None, texts)) for _, *texts in examples))
    return "\n\n".join([*blocks, f"At most {N_EXAMPLES} of each kind are here, all are in findings.csv."]) + "\n"

"""Write one page about training runs and evaluations: curves, results, comparison, settings, origins.

    python dinov2/eval/report.py runs/first results/ --output report.html

Each argument is the folder of a training run, the folder of results that an evaluation wrote, a results.json, or a
folder of such folders. The page is one file that needs no network; all but its charts and the explorer needs no
JavaScript. Numbers are rounded, and keep all their digits in the page (`<data value="...">`); the content of each
results.json stands in `<script type="application/json" id="data-results">`. Curves of long runs are thinned so that
spikes stay. What is missing or not readable is named at the top.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import dinov2
from dinov2.eval.cell_maps import cells_section, choose_images
from dinov2.eval.compare import predictions_belong
from dinov2.eval.explorer import explorer_section
from dinov2.eval.features import read_features
from dinov2.eval.features.extract import Embedder
from dinov2.eval.pages import results as result_pages
from dinov2.eval.pages import runs as run_pages
from dinov2.eval.pages.page import Section, html, section, write_page
from dinov2.eval.pages.patients import patients_section
from dinov2.eval.results import MODEL, RESULTS_NAME, ResultRecord, mapping, read_result
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code, positive_int
from dinov2.utils.files import user_path
from dinov2.utils.run_status import CONFIG_NAME, METRICS_NAME, is_run

logger = logging.getLogger("dinov2")

FEATURES_NAME = "features.h5"
MAX_CELLS = 5_000  # of the explorer: a page stays a few megabytes
SOURCES = (
    f"a run ({METRICS_NAME}, or {CONFIG_NAME} beside checkpoints/, logs/ or eval/) or results ({RESULTS_NAME}), there "
    "or one folder below"
)


def find_sources(paths: Sequence[Path]) -> list[Path]:
    """Return folders of runs and files of results, each once and in order."""
    sources: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no file or folder {str(path)!r}; give {SOURCES}")
        below = sorted(filter(Path.is_dir, path.iterdir())) if path.is_dir() else []
        here = _sources_at(path) or [source for folder in below for source in _sources_at(folder)]
        if not here:
            raise ValueError(f"nothing to report on in {str(path)!r}; looked for {SOURCES}")
        for source in here:
            sources.setdefault(source.resolve(), source)
    return list(sources.values())


def _sources_at(path: Path) -> list[Path]:
    """Return the folder of a run and the file of results that a path itself is or holds."""
    if path.name == METRICS_NAME:
        return [path.parent]
    file = path / RESULTS_NAME if path.is_dir() else path
    return ([path] if is_run(path) else []) + ([file] if file.is_file() and file.suffix == ".json" else [])


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each folder: its own, or below the folder that all share where two have the same name."""
    folders = [path.resolve() for path in paths]
    if len({folder.name for folder in folders}) == len(set(folders)):
        return [folder.name for folder in folders]
    common = os.path.commonpath([folder.parent for folder in folders])
    return [os.path.relpath(folder, common) for folder in folders]


def summary_section(runs: Sequence[run_pages.RunRecord], records: Sequence[ResultRecord]) -> Section | None:
    """Return the most important numbers, what is missing, and the content of each results.json for programs."""
    notes = [note for run in runs for note in run.notes]
    notes += [f"{record.name}: {note}" for record in records for note in record.notes]
    paths = [str(run.path) for run in runs] + [str(record.path) for record in records]
    data = [{"name": record.name, "file": str(record.path), "report": record.report} for record in records]
    parts = [
        html.listing("Not everything could be read:", notes),
        run_pages.runs_table(runs),
        result_pages.results_table(records),
        html.folded("Where this is from", html.listing("Folders and files:", paths)),
        html.data("results", {"results": data}),
    ]
    return section("summary", "At a glance", parts)


def explorer_of(records: Sequence[ResultRecord], max_cells: int) -> Section | None:
    """Return the explorer of the first result whose features are there, with its predictions; None without any."""
    for record in records:
        named = mapping(record.report.get("settings")).get("features")
        candidates = [record.path.parent / FEATURES_NAME, *([Path(named)] if isinstance(named, str) else [])]
        if file := next((file for file in candidates if file.is_file()), None):
            rows = [row for row in record.rows if row.source == MODEL and predictions_belong(record, row)]
            predictions = rows[-1].predictions if rows else None
            try:
                return explorer_section({"": read_features(file)}, predictions, max_cells=max_cells)
            except (OSError, ValueError) as error:
                logger.warning("%s: no explorer (%s)", file, error)
    return None


def patients_of(records: Sequence[ResultRecord]) -> Section | None:
    """Return the patients of the first ABMIL result that has predictions; None without any."""
    for record in records:
        for folder in record.folders("abmil"):
            try:
                return replace(patients_section(folder), title=f"Patients of {record.name}")
            except (OSError, ValueError) as error:
                logger.warning("%s: no section of patients (%s)", folder, error)
    return None


def weights_of(runs: Sequence[run_pages.RunRecord], records: Sequence[ResultRecord]) -> str:
    """Return the weights for maps of cells: those of the first run, or else of the first result that names any."""
    named = [mapping(record.report.get("checkpoint")).get("checkpoint") for record in records]
    known = [*(str(run.path) for run in runs), *(name for name in named if isinstance(name, str))]
    if not known:
        raise ValueError("--cells: no run and no result here names a network; add --checkpoint WEIGHTS")
    return known[0]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write one HTML page about training runs and evaluations, to open in a browser from disk.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("sources", type=user_path, nargs="+", metavar="RUN_OR_RESULTS", help=f"a folder or {RESULTS_NAME}: {SOURCES}")
    add("--output", type=user_path, default=Path("report.html"), help="the page")
    add("--title", help="over the page; without it the names of what it is about")
    add(
        "--features",
        type=user_path,
        help=f"for the explorer; without it {FEATURES_NAME} of the first results with one",
    )
    add("--explorer", action=argparse.BooleanOptionalAction, default=True, help="show features, with images of cells")
    add("--max-cells", type=positive_int, default=MAX_CELLS, help="in the explorer; explorer.py shows more")
    add(
        "--cells",
        type=user_path,
        help="labelled cells (a folder or a CSV) to show maps of: PCA, attention, similarity",
    )
    add("--n-cells", type=positive_int, default=8, help="of --cells")
    add("--checkpoint", metavar="WEIGHTS", help="for --cells; without it those of the first run, or the first result")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    setup_logging()
    sources = find_sources(args.sources)
    names = short_names([source.parent if source.name == RESULTS_NAME else source for source in sources])
    runs = [run_pages.read_run(source, name) for source, name in zip(sources, names, strict=True) if source.is_dir()]
    records = [read_result(source, name) for source, name in zip(sources, names, strict=True) if source.is_file()]
    explorer = cells = None
    if args.features is not None:
        explorer = explorer_section({"": read_features(args.features)}, max_cells=args.max_cells)
    elif args.explorer:
        explorer = explorer_of(records, args.max_cells)
    if args.cells is not None:
        embedder = Embedder(args.checkpoint or weights_of(runs, records))
        cells = cells_section(embedder, *choose_images(args.cells, args.n_cells))
    sections = [
        summary_section(runs, records),
        result_pages.comparison_section(records),
        result_pages.results_section(records),
        result_pages.cross_section(records),
        result_pages.trust_section(records),
        run_pages.curves_section(runs),
        run_pages.teachers_section(runs),
        run_pages.health_section(runs),
        patients_of(records),
        explorer,
        cells,
        run_pages.config_section(runs),
        result_pages.origins_section({run.name: run.status.starts for run in runs}, records),
    ]
    title = "Report: " + ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    made = f"Made {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC by dinov2 {dinov2.__version__}"
    write_page(args.output, args.title or title, [section for section in sections if section], made)
    size = args.output.stat().st_size / 1e6
    logger.info("%d runs and %d results: %s (%.1f MB)", len(runs), len(records), args.output, size)


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""Write one page about training runs and evaluations: curves, results, comparison, settings, origins.

    python dinov2/eval/report.py runs/first results/ --output report.html

Each argument is the folder of a training run, the folder of results that an evaluation wrote, a results.json, or a
folder of such folders. The page is one file that needs no network; all but its charts and the explorer needs no
JavaScript. Numbers are rounded, and keep all their digits in the page (`<data value="...">`); the content of each
results.json stands in `<script type="application/json" id="data-results">`. Curves of long runs are thinned so that
spikes stay.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from markupsafe import Markup

import dinov2
from dinov2.eval.compare import predictions_belong
from dinov2.eval.extract_features import positive_int
from dinov2.eval.features import read_features
from dinov2.eval.features.extract import Embedder
from dinov2.eval.maps.cells import choose_images
from dinov2.eval.pages import results as result_pages
from dinov2.eval.pages import runs as run_pages
from dinov2.eval.pages.cells import cells_section
from dinov2.eval.pages.explorer import ExplorerSettings, explorer_section
from dinov2.eval.pages.page import Section, data_value, macros, table, write_page
from dinov2.eval.pages.patients import patients_section
from dinov2.eval.pages.results import COMPARED, METRIC_HEADERS, NONE, count, percent
from dinov2.eval.pages.runs import RunRecord, read_run
from dinov2.eval.results import MODEL, RESULTS_NAME, ResultRecord, mapping, number, read_result
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code
from dinov2.utils.run_status import CONFIG_NAME, METRICS_NAME, is_run

logger = logging.getLogger("dinov2")

FEATURES_NAME = "features.h5"
MAX_CELLS = 5_000  # of the explorer: a page stays a few megabytes
SOURCES = (
    f"a run ({METRICS_NAME}, or {CONFIG_NAME} beside checkpoints/, logs/ or eval/) or results ({RESULTS_NAME}), there "
    "or one folder below"
)


def find_sources(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Find folders of runs and files of results, each once and in order.

    Args:
        paths: folders, results.json files, or a run's training_metrics.json.

    Raises:
        FileNotFoundError: if one of them does not exist.
        ValueError: if one of them has neither.
    """
    runs: dict[Path, Path] = {}
    results: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no file or folder {str(path)!r}; give {SOURCES}")
        below = sorted(folder for folder in path.iterdir() if folder.is_dir()) if path.is_dir() else []
        places = [path] if _is_run(path) or _result_file(path) else below
        found_runs = [place if place.is_dir() else place.parent for place in places if _is_run(place)]
        found_results = [file for place in places if (file := _result_file(place))]
        if not found_runs + found_results:
            raise ValueError(f"nothing to report on in {str(path)!r}; looked for {SOURCES}")
        runs |= {folder.resolve(): folder for folder in found_runs if folder.resolve() not in runs}
        results |= {file.resolve(): file for file in found_results if file.resolve() not in results}
    return list(runs.values()), list(results.values())


def _is_run(path: Path) -> bool:
    return path.name == METRICS_NAME or is_run(path)


def _result_file(path: Path) -> Path | None:
    file = path / RESULTS_NAME if path.is_dir() else path
    return file if file.is_file() and file.suffix == ".json" and file.name != METRICS_NAME else None


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each folder: its own, with as many folders above it as tell the names apart."""
    parts = [path.resolve().parts for path in paths]
    names = []
    for own in parts:
        n = 1
        while n < len(own) and any(own[-n:] == other[-n:] for other in parts if other != own):
            n += 1
        names.append("/".join(own[-n:]))
    return names


def summary_section(runs: Sequence[RunRecord], records: Sequence[ResultRecord]) -> Section:
    """Return what the report is about, and the most important number of each run and result."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        loss, speed = run.newest("total_loss"), run.newest("images_per_second")
        rows.append(
            {
                "run": run.name,
                "state": run_pages.run_state(run),
                "newest loss": NONE if loss is None else data_value(loss, f"{loss:.4f}"),
                "images per second": NONE if speed is None else data_value(speed, f"{speed:,.1f}"),
                "best teacher, %": percent(run.best.get("score")),
                "metric": run.best.get("metric", NONE),
            }
        )
    parts = [table(rows, "Training runs", numbers_from=2)]
    rows = []
    for record in records:
        scores = {row.method: number(row.metrics.get(COMPARED)) for row in record.rows if row.source == MODEL}
        method, best = max(scores.items(), key=lambda item: item[1] or -1.0, default=("", None))
        tested = record.rows[-1].n_tested if record.rows else None
        rows.append(
            {
                "result": record.name,
                "protocol": record.protocol,
                "features of": record.encoder,
                "tested": NONE if tested is None else count(tested),
                f"highest {METRIC_HEADERS[COMPARED]}": NONE if best is None else percent(best) + f" ({method})",
            }
        )
    parts.append(table(rows, "Results", numbers_from=3))
    paths = [str(run.path) for run in runs] + [str(record.path) for record in records]
    parts.append(macros().folded("Where this is from", macros().listing("Folders and files:", paths)))
    return Section("summary", "At a glance", Markup().join(parts))


def explorer_of(records: Sequence[ResultRecord], max_cells: int) -> Section | None:
    """Return the explorer of the first result whose features are there, with its predictions; None without any."""
    for record in records:
        named = mapping(record.report.get("settings")).get("features")
        candidates = [record.path.parent / FEATURES_NAME, *([Path(named)] if isinstance(named, str) else [])]
        if file := next((file for file in candidates if file.is_file()), None):
            rows = [row for row in record.rows if row.source == MODEL and predictions_belong(record, row)]
            try:
                return explore(file, rows[-1].predictions if rows else None, max_cells)
            except (OSError, ValueError) as error:
                logger.warning("%s: no explorer (%s)", file, error)
    return None


def explore(file: Path, predictions: Path | None, max_cells: int) -> Section:
    """Return the explorer of a features file."""
    return explorer_section(read_features(file), predictions, settings=ExplorerSettings(max_cells=max_cells))


def patients_of(records: Sequence[ResultRecord]) -> Section | None:
    """Return the patients of the first ABMIL result that has predictions; None without any."""
    for record in records:
        for folder in record.folders("abmil"):
            try:
                return replace(patients_section(folder), title=f"Patients of {record.name}")
            except (OSError, ValueError) as error:
                logger.warning("%s: no section of patients (%s)", folder, error)
    return None


def cells_of(
    cells: Path, checkpoint: str | None, n: int, runs: Sequence[Path], records: Sequence[ResultRecord]
) -> Section:
    """Return maps of some cells.

    Args:
        cells: labelled cells.
        checkpoint: weights; None for those of the first run, or else of the first result.
        n: how many cells.
        runs, records: what the report is about.

    Raises:
        ValueError: if no run or result names weights.
    """
    if checkpoint is None:
        named = [mapping(record.report.get("checkpoint")).get("checkpoint") for record in records]
        known = [*map(str, runs), *(name for name in named if isinstance(name, str))]
        if not known:
            raise ValueError("--cells: no run and no result here names a network; add --checkpoint WEIGHTS")
        checkpoint = known[0]
    paths, names = choose_images(cells, n)
    return cells_section(Embedder(checkpoint), paths, names)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write one HTML page about training runs and evaluations, to open in a browser from disk.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "sources", type=Path, nargs="+", metavar="RUN_OR_RESULTS", help=f"a folder or {RESULTS_NAME}: {SOURCES}"
    )
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page")
    parser.add_argument("--title", help="over the page; without it the names of what it is about")
    parser.add_argument(
        "--features",
        type=Path,
        help=f"a features file for the explorer; without it the {FEATURES_NAME} of the first results that have one",
    )
    parser.add_argument(
        "--explorer",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the page has an explorer of features, with an image of each cell",
    )
    parser.add_argument(
        "--max-cells", type=positive_int, default=MAX_CELLS, help="in the explorer; explorer.py shows more"
    )
    parser.add_argument(
        "--cells",
        type=Path,
        help="labelled cells (a folder or a CSV) of which the page shows maps: PCA, attention, similarity",
    )
    parser.add_argument("--n-cells", type=positive_int, default=8, help="of --cells")
    parser.add_argument(
        "--checkpoint",
        metavar="WEIGHTS",
        help="for --cells; without it the first run's newest teacher, or the first result's",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    setup_logging()
    run_folders, result_files = find_sources(args.sources)
    names = short_names([*run_folders, *(file.parent if file.name == RESULTS_NAME else file for file in result_files)])
    runs = [read_run(folder, name) for folder, name in zip(run_folders, names, strict=False)]
    records = [read_result(file, name) for file, name in zip(result_files, names[len(runs) :], strict=True)]
    explorer = None
    if args.features is not None:
        explorer = explore(args.features, None, args.max_cells)
    elif args.explorer:
        explorer = explorer_of(records, args.max_cells)
    sections = [
        summary_section(runs, records),
        result_pages.comparison_section(records),
        result_pages.results_section(records),
        result_pages.cross_section(records),
        run_pages.curves_section(runs) if runs else None,
        run_pages.teachers_section(runs),
        run_pages.views_section(runs),
        run_pages.health_section(runs) if runs else None,
        patients_of(records),
        explorer,
        None if args.cells is None else cells_of(args.cells, args.checkpoint, args.n_cells, run_folders, records),
        run_pages.config_section(runs),
        result_pages.origins_section(records, {run.name: run.status.starts for run in runs}),
    ]
    title = "Report: " + ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    made = f"Made {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC by dinov2 {dinov2.__version__}"
    write_page(args.output, args.title or title, [section for section in sections if section], made)
    size = args.output.stat().st_size / 1e6
    logger.info("%d runs and %d results: %s (%.1f MB)", len(runs), len(records), args.output, size)


if __name__ == "__main__":
    sys.exit(exit_code(main))

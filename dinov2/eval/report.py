"""One page about training runs and evaluations: curves, results, comparison, settings, origins.

    python dinov2/eval/report.py runs/first results/ --output report.html

Each argument is the folder of a training run, the folder of results that an evaluation wrote, a results.json, or a
folder of such folders. The page is one file that needs no network; its static parts need no JavaScript. The numbers in
it are those of `results.json` and `training_metrics.json`: they stand in it in full (`<script type="application/json"
id="data-...">`, `<data value="...">`), and what is shown is rounded from them. Curves of long runs are thinned so that
spikes stay.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import dinov2
from dinov2.eval.cell_maps import cells_section, choose_pictures
from dinov2.eval.compare import predictions_belong
from dinov2.eval.explorer import ExplorerSettings, explorer_section
from dinov2.eval.extract_features import positive_int
from dinov2.eval.features import read_features
from dinov2.eval.features.extract import Embedder
from dinov2.eval.metric_tables import NONE, shown
from dinov2.eval.pages import Markup, Section, escape, table, valued, write_page
from dinov2.eval.patients_section import patients_section
from dinov2.eval.result_sections import COMPARED, comparison_section, cross_section, origins_section, results_section
from dinov2.eval.results import MODEL, RESULTS_NAME, TABLE_METRICS, ResultRecord, mapping, number, read_result
from dinov2.eval.run_records import RunRecord, read_run
from dinov2.eval.run_sections import (
    config_section,
    curves_section,
    health_section,
    run_state,
    teachers_section,
    views_section,
)
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code
from dinov2.utils.run_status import CONFIG_NAME, METRICS_NAME, is_run

logger = logging.getLogger("dinov2")

FEATURES_NAME = "features.h5"
MAX_CELLS = 5_000  # of the explorer: a page stays a few megabytes
LOOKED_FOR = (
    f"a run ({METRICS_NAME}, or {CONFIG_NAME} beside checkpoints/, logs/ or eval/) or results ({RESULTS_NAME}), there "
    "or one folder below"
)


@dataclass(frozen=True)
class Sources:
    """What the arguments name: folders of runs, and files of results, each once and in order."""

    runs: list[Path]
    results: list[Path]


def find_sources(paths: Sequence[Path]) -> Sources:
    """Look for runs and results.

    Args:
        paths: folders, results.json files, or a run's training_metrics.json.

    Raises:
        FileNotFoundError: if one of them is not there.
        ValueError: if there is neither in one of them.
    """
    runs: dict[Path, Path] = {}
    results: dict[Path, Path] = {}

    def add(path: Path) -> bool:
        """Whether this folder or file is something to report on."""
        if path.is_file():
            is_of_run, is_result = path.name == METRICS_NAME, path.suffix == ".json" and path.name != METRICS_NAME
            folder, file = path.parent, path
        else:
            is_of_run, is_result = is_run(path), (path / RESULTS_NAME).is_file()
            folder, file = path, path / RESULTS_NAME
        for is_it, found, place in ((is_of_run, runs, folder), (is_result, results, file)):
            if is_it and place.resolve() in found:
                logger.info("%s is given more than once and reported once", place)
            elif is_it:
                found[place.resolve()] = place
        return is_of_run or is_result

    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no file or folder {str(path)!r}; give {LOOKED_FOR}")
        if add(path):
            continue
        below = [add(folder) for folder in sorted(path.iterdir()) if folder.is_dir()] if path.is_dir() else []
        if not any(below):
            raise ValueError(f"nothing to report on in {str(path)!r}; looked for {LOOKED_FOR}")
    return Sources(list(runs.values()), list(results.values()))


def short_names(paths: Sequence[Path]) -> list[str]:
    """A name for each folder, as short as tells them apart: its own, or with folders above it."""
    parts = [path.resolve().parts for path in paths]
    names = []
    for own in parts:
        n = 1
        while n < len(own) and any(own[-n:] == other[-n:] for other in parts if other != own):
            n += 1
        names.append("/".join(own[-n:]))
    return names


def read_sources(sources: Sources) -> tuple[list[RunRecord], list[ResultRecord]]:
    """Read all of it.

    Raises:
        ValueError: if a results.json is no JSON object.
    """
    folders = [*sources.runs, *(file.parent if file.name == RESULTS_NAME else file for file in sources.results)]
    names = short_names(folders)
    runs = [read_run(path, name) for path, name in zip(sources.runs, names, strict=False)]
    records = [read_result(file, name) for file, name in zip(sources.results, names[len(runs) :], strict=True)]
    return runs, records


def report_sections(
    runs: Sequence[RunRecord], records: Sequence[ResultRecord], more: Sequence[Section] = ()
) -> list[Section]:
    """All sections that there is something for; `more` come before settings and origins."""
    found = [
        summary_section(runs, records),
        comparison_section(records),
        results_section(records),
        cross_section(records),
        *([curves_section(runs)] if runs else []),
        teachers_section(runs),
        views_section(runs),
        *([health_section(runs)] if runs else []),
        *more,
        config_section(runs),
        origins_section(records, {run.name: run.status.starts for run in runs}),
    ]
    return [section for section in found if section is not None]


def explorer_of(records: Sequence[ResultRecord], max_cells: int) -> Section | None:
    """The explorer of the first result whose features file is there, with its predictions; None if there is none."""
    for record in records:
        named = mapping(record.report.get("settings")).get("features")
        candidates = [record.path.parent / FEATURES_NAME, *([Path(named)] if isinstance(named, str) else [])]
        file = next((file for file in candidates if file.is_file()), None)
        if file is None:
            continue
        rows = [row for row in record.rows if row.source == MODEL and predictions_belong(record, row)]
        try:
            return explore(file, rows[-1].predictions if rows else None, max_cells)
        except (OSError, ValueError) as error:
            logger.warning("%s: no explorer (%s)", file, error)
    return None


def explore(file: Path, predictions: Path | None, max_cells: int) -> Section:
    """The explorer of a features file.

    Raises:
        FileNotFoundError, ValueError: as `read_features` and `explorer_section`.
    """
    return explorer_section(read_features(file), predictions, settings=ExplorerSettings(max_cells=max_cells))


def patients_of(records: Sequence[ResultRecord]) -> Section | None:
    """The patients of the first ABMIL result that has its predictions; None if there is none."""
    for record in records:
        for folder in record.folders("abmil"):
            try:
                return replace(patients_section(folder), title=f"Patients of {record.name}")
            except (OSError, ValueError) as error:
                logger.warning("%s: no section of patients (%s)", folder, error)
    return None


def cells_of(cells: Path, checkpoint: str | None, n: int, sources: Sources, records: Sequence[ResultRecord]) -> Section:
    """What a network sees in some cells.

    Args:
        cells: as `choose_pictures` takes it.
        checkpoint: weights; None for those of the first run, or else of the first result.
        n: how many cells.
        sources, records: what the report is about.

    Raises:
        FileNotFoundError, ValueError: if there is no network, or as `choose_pictures` and `cells_section`.
    """
    if checkpoint is None:
        named = [mapping(record.report.get("checkpoint")).get("checkpoint") for record in records]
        known = [str(run) for run in sources.runs] + [name for name in named if isinstance(name, str)]
        if not known:
            raise ValueError("--cells: no run and no result here names a network; add --checkpoint WEIGHTS")
        checkpoint = known[0]
    paths, names = choose_pictures(cells, n)
    return cells_section(Embedder(checkpoint), paths, names)


def summary_section(runs: Sequence[RunRecord], records: Sequence[ResultRecord]) -> Section:
    """What the report is about, and the number that matters most of each."""
    parts: list[str] = []
    if runs:
        rows = []
        for run in runs:
            loss, speed = run.metrics.last("total_loss"), run.metrics.last("images_per_second")
            score = mapping(run.best).get("score")
            rows.append(
                [
                    run.name,
                    run_state(run),
                    NONE if loss is None else valued(loss, f"{loss:.4f}"),
                    NONE if speed is None else valued(speed, f"{speed:,.1f}"),
                    shown(score),
                    NONE if number(score) is None else str(mapping(run.best).get("metric", NONE)),
                ]
            )
        headers = ["run", "state", "newest loss", "pictures a second", "best teacher, %", "which is"]
        parts.append(table(headers, rows, "Training runs", numbers_from=2))
    if records:
        rows = []
        for record in records:
            best = [row for row in record.rows if row.source == MODEL and number(row.metrics.get(COMPARED)) is not None]
            top = max(best, key=lambda row: row.metrics[COMPARED], default=None)
            tested = record.rows[-1].n_tested if record.rows else None
            rows.append(
                [
                    record.name,
                    record.protocol,
                    record.encoder,
                    NONE if tested is None else valued(tested, f"{tested:,}"),
                    NONE if top is None else Markup(f"{shown(top.metrics[COMPARED])} ({escape(top.method)})"),
                ]
            )
        headers = ["result", "protocol", "features of", "judged", f"highest {TABLE_METRICS[COMPARED]}, %"]
        parts.append(table(headers, rows, "Results", numbers_from=3))
    paths = [str(run.path) for run in runs] + [str(record.path) for record in records]
    items = "".join(f"<li><code>{escape(path)}</code></li>" for path in paths)
    parts.append(f"<details><summary>Where this is from</summary><ul>{items}</ul></details>")
    return Section("summary", "At a glance", "".join(parts))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write one HTML page about training runs and evaluations, to open in a browser from disk.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "sources", type=Path, nargs="+", metavar="RUN_OR_RESULTS", help=f"a folder or {RESULTS_NAME}: {LOOKED_FOR}"
    )
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page")
    parser.add_argument("--title", help="over the page; without it the names of what it is about")
    parser.add_argument(
        "--features",
        type=Path,
        help=f"a features file to look around in; without it the {FEATURES_NAME} of the first results that have one",
    )
    parser.add_argument(
        "--explorer",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the page lets you look around in features, with a picture of each cell",
    )
    parser.add_argument(
        "--max-cells", type=positive_int, default=MAX_CELLS, help="in the explorer; explorer.py shows more"
    )
    parser.add_argument(
        "--cells", type=Path, help="labelled cells (a folder or a CSV), of which the page shows what the network sees"
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
    sources = find_sources(args.sources)
    runs, records = read_sources(sources)
    more = [patients_of(records)]
    if args.features is not None:
        more.append(explore(args.features, None, args.max_cells))
    elif args.explorer:
        more.append(explorer_of(records, args.max_cells))
    if args.cells is not None:
        more.append(cells_of(args.cells, args.checkpoint, args.n_cells, sources, records))
    sections = report_sections(runs, records, [section for section in more if section is not None])
    names = short_names([*sources.runs, *(file.parent for file in sources.results)])
    shown_names = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    made = datetime.now(timezone.utc)
    write_page(
        args.output,
        args.title or f"Report: {shown_names}",
        sections,
        f"Made {made:%Y-%m-%d %H:%M} UTC by dinov2 {dinov2.__version__}",
    )
    size = args.output.stat().st_size
    logger.info(
        "%d runs and %d results: %s (%.1f MB)", *(len(sources.runs), len(sources.results)), args.output, size / 1e6
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""A page to look around in features: cells as points of a plane, with their pictures, neighbours, filters and a lasso.

    python dinov2/eval/explorer.py --features features.h5 --predictions predictions.csv --output explorer.html

The page is one file and needs no network. Projections and neighbours are computed here, exactly and without chance; the
page only draws. It is drawn on a plain 2D canvas, as hospital computers often have no graphics acceleration.

What the page exports is CSV as RFC 4180 has it, in UTF-8 with a byte order mark (Excel needs one, and pandas and this
project's readers take it). Text that a spreadsheet would take for a formula gets an apostrophe before it.

Letters: N cells, D numbers each, k neighbours
"""

import argparse
import base64
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from dinov2.eval.explorer_columns import (
    Column,
    Groups,
    Predictions,
    join_sets,
    own_columns,
    prediction_columns,
    read_columns,
    read_predictions_of_cells,
)
from dinov2.eval.extract_features import positive_int
from dinov2.eval.features import Features, read_features
from dinov2.eval.features.join import check_finite
from dinov2.eval.pages import Section, escape, write_page
from dinov2.eval.projection import (
    MIN_CELLS_FOR_UMAP,
    UMAP_MISSING,
    has_umap,
    neighbours_of_each,
    pca_projection,
    umap_projection,
)
from dinov2.eval.thumbnails import N_COLUMNS, PER_SHEET, ThumbnailSheets, make_thumbnails
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code
from dinov2.utils.parallel import available_cores

logger = logging.getLogger("dinov2")

Metric = Literal["euclidean", "cosine"]
METRIC_TITLES: dict[Metric, str] = {"euclidean": "Euclidean distance", "cosine": "cosine distance, 1 - similarity"}
THUMBNAIL_SIZES = (8, 256)
UNKNOWN_GROUP = 0xFFFFFFFF


@dataclass(frozen=True)
class ExplorerSettings:
    """What the explorer shows.

    Attributes:
        max_cells: of more, as many are drawn at random, each class with its share and at least one cell.
        thumbnail_size: side in pixels.
        n_neighbours: k.
        metric: of neighbours and UMAP; Euclidean as the kNN protocol `dinobloom`, cosine as `dino`.
        with_umap: None for: where umap-learn is installed and there are cells enough.
        seed: of the drawing and UMAP.
        n_workers: threads that read pictures.
    """

    max_cells: int = 20_000
    thumbnail_size: int = 40
    n_neighbours: int = 12
    metric: Metric = "euclidean"
    with_umap: bool | None = None
    seed: int = 0
    n_workers: int = 1


def explorer_section(
    features: Features,
    predictions: Predictions | str | os.PathLike[str] | None = None,
    data_sets: Sequence[str] | None = None,
    columns: Sequence[Column] = (),
    settings: ExplorerSettings | None = None,
    id: str = "explorer",
    title: str = "Embedding explorer",
) -> Section:
    """The explorer as a part of a page.

    Args:
        features: N cells; pictures that are not there (any more) get a placeholder.
        predictions: for some of the cells at least, or the file or folder they are in.
        data_sets: N names, where cells are of several.
        columns: further ones, of N cells.
        settings: the defaults unless given.
        id, title: of the section.

    Raises:
        ValueError: for features that are infinite or NaN, or predictions that fit no cell; with the cosine metric also
            for features that are all 0.
        ModuleNotFoundError: if `with_umap` is set and umap-learn is missing.
    """
    settings = settings or ExplorerSettings()
    every_column = own_columns(features, data_sets)
    if predictions is not None:
        found = predictions if isinstance(predictions, Predictions) else read_predictions_of_cells(predictions)
        every_column += prediction_columns(features, found)
    every_column += columns
    rows = drawn_rows(features.labels, settings.max_cells, settings.seed)
    shown = features.select(rows)
    thumbnails = make_thumbnails(shown.paths, settings.thumbnail_size, settings.n_workers)
    data = {
        "n": len(rows),
        "rows": _base64(rows, "<u4"),
        "paths": _shared_start(shown.paths),
        "columns": [_column_data(column, rows) for column in every_column],
        **_geometry(shown, settings),
        "thumbnails": {
            "size": thumbnails.size,
            "columns": N_COLUMNS,
            "perSheet": PER_SHEET,
            "missing": [[i, reason] for i, reason in thumbnails.missing.items()],
        },
    }
    html = _markup(id, _note(features, shown, settings, data), thumbnails)
    return Section(id, title, html, data, scripts=("explorer.js",), styles=("explorer.css",))


def drawn_rows(labels: np.ndarray, max_cells: int, seed: int = 0) -> np.ndarray:
    """Positions of the cells to show, ascending: all, or a draw in which each class keeps its share.

    Each class keeps at least one cell, as long as `max_cells` suffices.

    Args:
        labels: int64 [N].
        max_cells: the most to show.
        seed: of the draw.

    Returns:
        int64 [min(N, max_cells)].
    """
    n = len(labels)
    if n <= max_cells:
        return np.arange(n)
    classes, of_cells, counts = np.unique(labels, return_inverse=True, return_counts=True)
    wanted = counts * (max_cells / n)
    fewest = 1 if max_cells >= len(classes) else 0
    quotas = np.maximum(np.floor(wanted).astype(int), fewest)
    while quotas.sum() < max_cells:  # who is furthest below its share gets the next cell
        quotas[np.argmax(np.where(quotas < counts, wanted - quotas, -np.inf))] += 1
    while quotas.sum() > max_cells:  # rare classes got more than their share
        quotas[np.argmax(np.where(quotas > fewest, quotas - wanted, -np.inf))] -= 1
    order = np.random.default_rng(seed).permutation(n)
    chosen = [order[of_cells[order] == i][: quotas[i]] for i in range(len(classes))]
    return np.sort(np.concatenate(chosen))


def _geometry(cells: Features, settings: ExplorerSettings) -> dict[str, Any]:
    """Projections and neighbours of the N cells shown, as the page reads them."""
    is_cosine = settings.metric == "cosine"
    k = min(settings.n_neighbours, len(cells) - 1)
    logger.info("explorer: %d neighbours of each of %s cells", k, f"{len(cells):,}")
    neighbours = neighbours_of_each(cells.features, k, is_cosine)
    squared = neighbours.distances
    # of features scaled to length 1, the squared distance is 2 - 2 cosine
    distances = squared / 2 if is_cosine else np.sqrt(squared)
    logger.info("explorer: PCA")
    points, shares = pca_projection(cells.features)
    projections = [
        {
            "id": "pca",
            "title": "PCA",
            "axes": [f"Component {i + 1} ({share:.1%} of the variance)" for i, share in enumerate(shares)],
            "points": _base64(points, "<f4"),
        }
    ]
    is_enough = len(cells) >= MIN_CELLS_FOR_UMAP
    missing_umap = ""
    if settings.with_umap is not False:
        if not is_enough:
            missing_umap = f"UMAP needs at least {MIN_CELLS_FOR_UMAP} cells."
        elif settings.with_umap is None and not has_umap():
            missing_umap = "UMAP is not here, as umap-learn was not installed where this page was made."
            logger.warning("explorer: %s", UMAP_MISSING)
        else:
            logger.info("explorer: UMAP, which may take minutes")
            points = umap_projection(cells.features, is_cosine, settings.seed)
            axes = ["UMAP 1", "UMAP 2"]
            projections.insert(0, {"id": "umap", "title": "UMAP", "axes": axes, "points": _base64(points, "<f4")})
    return {
        "projections": projections,
        "missingProjection": missing_umap,
        "neighbours": {
            "k": k,
            "metric": METRIC_TITLES[settings.metric],
            "positions": _base64(neighbours.positions, "<u4"),
            "distances": _base64(distances, "<f4"),
        },
    }


def _column_data(column: Column, rows: np.ndarray) -> dict[str, Any]:
    if isinstance(column, Groups):
        codes = np.where(column.codes < 0, UNKNOWN_GROUP, column.codes)[rows]
        return {"id": column.id, "title": column.title, "names": column.names, "codes": _base64(codes, "<u4")}
    return {"id": column.id, "title": column.title, "values": _base64(column.values[rows], "<f4")}


def _base64(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=dtype).tobytes()).decode("ascii")


def _shared_start(paths: Sequence[str]) -> dict[str, Any]:
    """Paths without the folders that all share, which would be most of the page's text."""
    start = os.path.commonprefix([os.path.dirname(path) for path in dict.fromkeys(paths)])
    return {"start": start, "rest": [path[len(start) :] for path in paths]}


def _note(features: Features, shown: Features, settings: ExplorerSettings, data: dict[str, Any]) -> str:
    """What is shown, as a paragraph."""
    network = features.attributes.get("model", "")
    dim = features.features.shape[1]
    text = [f"{len(shown):,} cells, features of kind {features.kind} with {dim:,} numbers"]
    text[0] += f" from {network}." if network else "."
    if len(shown) < len(features):
        text.append(
            f"Drawn at random from {len(features):,} cells, each class with its share (seed {settings.seed}); "
            f"projections and neighbours are of these cells alone."
        )
    text += [data["missingProjection"]]
    text.append(f"Neighbours are nearest in all {dim:,} numbers ({data['neighbours']['metric']}), not in the picture.")
    if data["thumbnails"]["missing"]:
        text.append(f"{len(data['thumbnails']['missing']):,} pictures cannot be read and are grey.")
    return " ".join(filter(None, text))


def _markup(id: str, note: str, thumbnails: ThumbnailSheets) -> str:
    """The elements that explorer.js fills; sheets of pictures stand in blocks that are read when they are needed."""
    sheets = "".join(
        f'<script type="text/plain" class="explorer-sheet">{base64.b64encode(sheet).decode("ascii")}</script>\n'
        for sheet in thumbnails.sheets
    )
    return (
        f'<p class="muted">{escape(note)}</p>\n'
        f'<noscript><p class="warning">The explorer needs JavaScript.</p></noscript>\n'
        f'<div class="explorer only-with-script" data-explorer="{escape(id)}"></div>\n{sheets}'
    )


def _named_features(text: str) -> tuple[str, Path]:
    """A data set's name and its file from NAME=FILE or FILE."""
    name, sign, file = text.partition("=")
    if not sign or Path(text).is_file():
        return "", Path(text)
    return name, Path(file)


def _data_set_names(given: Sequence[tuple[str, Path]]) -> list[str]:
    """The names given, else of the files, or of their folders where files are called the same."""
    stems = [path.stem for _, path in given]
    folders = [path.resolve().parent.name for _, path in given]
    found = stems if len(set(stems)) == len(stems) else folders
    names = [name or other for (name, _), other in zip(given, found, strict=True)]
    if len(set(names)) < len(names):
        raise ValueError(f"--features: data sets would be called {', '.join(names)}; name each, as NAME=FILE")
    return names


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    defaults = ExplorerSettings()
    parser = argparse.ArgumentParser(
        description="Write a page to look around in features: PCA and UMAP of the cells, their pictures, neighbours, "
        "filters, and a lasso whose cells can be exported.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--features",
        type=_named_features,
        nargs="+",
        required=True,
        metavar="[NAME=]FILE",
        help="features.h5 files of one network; each is a data set, called as its file unless NAME is given",
    )
    parser.add_argument(
        "--predictions", type=Path, help="a predictions.csv of knn.py, linear.py or abmil.py, or its folder"
    )
    parser.add_argument(
        "--columns", type=Path, help="a CSV of more to colour by: the picture's path first, other columns beside it"
    )
    parser.add_argument("--kind", help="of the features; without it the file's first one")
    parser.add_argument("--metric", choices=get_args(Metric), default=defaults.metric, help="of neighbours and UMAP")
    parser.add_argument(
        "--max-cells", type=positive_int, default=defaults.max_cells, help="of more, as many are drawn by class"
    )
    parser.add_argument("--thumbnail-size", type=int, default=defaults.thumbnail_size, help="side in pixels")
    parser.add_argument(
        "--umap", action=argparse.BooleanOptionalAction, help="UMAP beside PCA (default: where umap-learn is installed)"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of UMAP and of drawing cells")
    parser.add_argument(
        "--num-workers", type=positive_int, default=min(available_cores(), 16), help="threads that read pictures"
    )
    parser.add_argument("--title", default="Embedding explorer", help="of the page")
    parser.add_argument("--output", type=Path, required=True, help="the .html file")
    args = parser.parse_args(argv)
    smallest, largest = THUMBNAIL_SIZES
    if not smallest <= args.thumbnail_size <= largest:
        parser.error(f"--thumbnail-size {args.thumbnail_size} is not between {smallest} and {largest}")
    if args.seed < 0:
        parser.error(f"--seed {args.seed} is negative; give 0 or more")
    if args.umap and not has_umap():
        parser.error(f"--umap: {UMAP_MISSING}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    setup_logging()
    sets = {}
    for name, (_, file) in zip(_data_set_names(args.features), args.features, strict=True):
        found = read_features(file)
        sets[name] = found if args.kind is None else found.of_kind(args.kind)
        check_finite(sets[name], file)
    features, data_sets = join_sets(sets)
    settings = ExplorerSettings(
        max_cells=args.max_cells,
        thumbnail_size=args.thumbnail_size,
        metric=args.metric,
        with_umap=args.umap,
        seed=args.seed,
        n_workers=args.num_workers,
    )
    columns = read_columns(args.columns, features.paths) if args.columns else []
    section = explorer_section(features, args.predictions, data_sets, columns, settings)
    write_page(args.output, args.title, [section], ", ".join(sets))
    n_megabytes = args.output.stat().st_size / 1e6
    print(f"{args.output}: {section.data['n']:,} cells, {n_megabytes:.1f} MB")


if __name__ == "__main__":
    sys.exit(exit_code(main))

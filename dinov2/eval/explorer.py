"""Write a page to look around in features: cells as points of a plane, with images, neighbours, filters and a lasso.

    python dinov2/eval/explorer.py --features features.h5 --predictions predictions.csv --output explorer.html

The page is one file and needs no network. What it exports is CSV (RFC 4180) in UTF-8 with a byte order mark, which
Excel needs. Text that a spreadsheet would take for a formula gets an apostrophe before it.

The plot is a 2D canvas, because hospital computers often have no graphics acceleration. `templates/explorer.js` runs in
the browser.

Letters: N cells, D numbers each
"""

import argparse
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import pandas as pd
from bokeh import models
from bokeh.palettes import viridis
from bokeh.plotting import figure
from matplotlib.ticker import MaxNLocator
from sklearn.neighbors import NearestNeighbors

from dinov2.data.datasets.tables import open_table
from dinov2.eval.features import Features, read_features
from dinov2.eval.features.projections import projections, rounded
from dinov2.eval.features.store import check_same_network
from dinov2.eval.pages.page import COLOURS, GREY, Section, embed, make_thumbnails, render, write_page
from dinov2.eval.results import read_predictions
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code, number_between, positive_int, seed_number
from dinov2.utils.files import user_path
from dinov2.utils.resources import available_cores

logger = logging.getLogger("dinov2")

METRICS = {"euclidean": "Euclidean distance", "cosine": "cosine distance, 1 - similarity"}
MAX_CELLS = 20_000
N_NEIGHBOURS = 12
MAX_NUMBERS_AS_NAMES = 12  # a column with as few different numbers is one of names, such as grades
COLUMN_TITLES = {
    "label": "Class",
    "patient": "Patient",
    "data_set": "Data set",
    "prediction": "Predicted class",
    "right": "Right or wrong",
    "probability": "Highest probability",
}
MARKERS = {"circle": "●", "square": "■", "triangle": "▲", "diamond": "◆", "plus": "✚"}
LOOKS = [{"colour": colour, "marker": marker, "sign": MARKERS[marker]} for marker in MARKERS for colour in COLOURS[:7]]
OTHER = LOOKS[0] | {"colour": GREY}  # of cells without a value, and of groups beyond the number of looks
TOOLTIP = """<div style="display: flex; gap: 8px; max-width: 360px; overflow-wrap: anywhere">
<img src="@thumbnail" width="96" height="96" alt=""><div style="white-space: pre-line">@facts</div></div>"""


def explorer_section(
    sets: Mapping[str, Features],
    predictions: Path | None = None,
    columns: Path | None = None,
    *,
    max_cells: int = MAX_CELLS,
    thumbnail_size: int = 40,
    metric: str = "euclidean",
    with_umap: bool | None = None,
    seed: int = 0,
    n_workers: int = 1,
) -> Section:
    """Build the explorer as a section of a page.

    Args:
        sets: {name of a data set: its features}, all of one network and kind.
        predictions, columns: CSV files about cells, see `cell_table`.
        max_cells: of more cells, this many are sampled (`sample_by_class`).
        thumbnail_size: side in pixels.
        metric: of neighbours and UMAP, one of `METRICS`; the kNN protocol `dino` has cosine.
        with_umap: None for: if umap-learn is installed.
    """
    first, *others = sets.values()
    for other in others:
        check_same_network(first, other)
    features = np.concatenate([cells.features for cells in sets.values()])
    if not np.isfinite(features).all():
        raise ValueError("features: some are infinite or NaN; extract again, with weights that did not diverge")
    table = cell_table(sets, predictions, columns)
    rows = sample_by_class(table["label"].to_numpy(), max_cells, seed)
    n_cells, features, table = len(table), features[rows], table.iloc[rows]
    if min(features.shape) < 2:
        raise ValueError(f"features: a plot needs 2 cells with 2 numbers, not {features.shape}; give more cells")
    planes = projections(features, with_umap, metric, seed)
    search = NearestNeighbors(n_neighbors=min(N_NEIGHBOURS, len(rows) - 1), metric=metric, algorithm="brute")
    distances, neighbours = search.fit(features).kneighbors()  # of the fitted cells, each without itself
    uris, missing = make_thumbnails(table["path"].tolist(), thumbnail_size, n_workers)
    data = {
        "rows": rows.tolist(),
        "paths": table["path"].tolist(),
        "thumbnails": uris,
        "missing": missing,
        "columns": page_columns(table.drop(columns="path")),
        "projections": planes,
        "neighbours": neighbours.tolist(),
        "distances": [rounded(row, 3) for row in distances],
        "metric": METRICS[metric],
    }
    plot = embed(_figure(len(rows)))
    html = render("explorer.html", plot=plot, data=data, features=first, n_cells=n_cells, seed=seed)
    return Section("explorer", "Embedding explorer", html)


def cell_table(
    sets: Mapping[str, Features], predictions: Path | None = None, columns: Path | None = None
) -> pd.DataFrame:
    """Return path, label, patient, data_set, prediction, right, probability and further columns of each cell.

    All values are text, "" where they are not known. A column is missing if no source has it, and `data_set` is missing
    for one set alone. A patient id that several sets use gets the set's name behind it: these are different people.

    Args:
        sets: {name of the data set: features}.
        predictions: a predictions.csv, or its folder.
        columns: a CSV whose first column is the image's path, absolute or from the CSV's folder. Of its columns, those
            that the cells already have are left out.
    """
    tables = []
    for name, cells in sets.items():
        known = {"path": cells.paths, "patient": cells.patients or "", "data_set": name}
        labels = np.array(cells.class_names, dtype=object)[cells.labels]
        tables.append(pd.DataFrame({"label": labels, **known}))
    table = pd.concat(tables, ignore_index=True)
    patients, is_known = table["patient"], table["patient"] != ""
    is_shared = table.groupby("patient")["data_set"].transform("nunique") > 1
    table["patient"] = patients.mask(is_shared & is_known, patients + " (" + table["data_set"] + ")")
    table = table.drop(columns=["patient"] * (not is_known.any()) + ["data_set"] * (len(sets) == 1))
    if predictions is not None:
        file = predictions / "predictions.csv" if predictions.is_dir() else predictions
        predicted = read_predictions(file)
        rows = pd.DataFrame({"prediction": predicted.predictions}, index=predicted.keys)
        if predicted.labels is not None:
            rows["right"] = np.where(rows["prediction"] == predicted.labels, "right", "wrong")
        if predicted.probabilities is not None:
            rows["probability"] = [f"{value:.3g}" for value in predicted.probabilities.max(axis=1)]
        keys = "path" if predicted.key_column == "path" else "patient"
        table = _join(table, rows, table.get(keys, pd.Series("", table.index)), file)
    if columns is not None:
        source = open_table(columns, "columns")
        values = [row for _, row in source.rows()]
        paths = [os.path.abspath(columns.parent / row[0]) for row in values]
        rows = pd.DataFrame(values, paths, source.columns, dtype=object).iloc[:, 1:]
        table = _join(table, rows[~rows.index.duplicated()], table["path"].map(os.path.abspath), columns)
    return table.fillna("")


def _join(table: pd.DataFrame, rows: pd.DataFrame, keys: "pd.Series[str]", file: Path) -> pd.DataFrame:
    """Add the columns that the table lacks; `keys` say which row belongs to which cell."""
    if rows.empty or not keys.isin(rows.index).any():
        raise ValueError(
            f"{str(file)!r} has no row for a cell of the features: its first column begins with "
            f"{rows.index[:1].tolist()}, that of the cells with {keys[:1].tolist()}; give a file of these cells, with "
            f"image paths (or patients, for predictions) first and other columns beside them"
        )
    added = rows.drop(columns=table.columns, errors="ignore").reindex(keys)
    return pd.concat([table, added.set_axis(table.index)], axis="columns")


def sample_by_class(labels: np.ndarray, max_cells: int, seed: int = 0) -> np.ndarray:
    """Return positions of at most `max_cells` cells, int64, in a random order that mixes the classes.

    Each class keeps its share (up to rounding), and at least one cell if `max_cells` suffices.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    in_class = pd.Series(order).groupby(labels[order])
    depth = in_class.cumcount() / in_class.transform("size")  # 0 for the first cell of a class, 1 after the last
    return order[np.argsort(depth.to_numpy(), kind="stable")[:max_cells]]


def page_columns(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Convert text columns for the page: groups with their looks, the group of each cell, and the texts of numbers."""
    columns = []
    classes = pd.concat([table["label"], table.get("prediction")])  # a class looks the same in both
    for name, values in table.items():
        column = {"id": name, "title": COLUMN_TITLES.get(str(name), name)}
        ranges = None if name in ("label", "patient", "data_set", "prediction") else _ranges(values)
        if ranges is not None:
            column["values"] = values.tolist()
            values, names = ranges.astype(object).fillna(""), ranges.cat.categories
            looks = [OTHER | {"colour": colour} for colour in viridis(len(names))]
        else:
            counted = (classes if name in ("label", "prediction") else values).value_counts().drop("", errors="ignore")
            names, looks = counted.index if len(counted) > len(LOOKS) else sorted(counted.index), LOOKS
        look_of = dict(zip(names, looks, strict=False))  # of many names, the most frequent have a look
        counts = values.value_counts()
        present = list(dict.fromkeys([*(name for name in names if name in counts), *counts.index]))
        column["groups"] = [{"name": name, "count": int(counts[name]), **look_of.get(name, OTHER)} for name in present]
        column["codes"] = pd.Index(present).get_indexer(values).tolist()
        columns.append(column)
    return columns


def _ranges(values: "pd.Series[str]") -> "pd.Series[Any] | None":
    """Return the range of each number as a categorical; None unless there are many numbers and nothing else."""
    numbers = pd.to_numeric(values, errors="coerce")
    if numbers.nunique() <= MAX_NUMBERS_AS_NAMES or not np.isfinite(numbers[~values.isin(["", "nan"])]).all():
        return None
    edges = MaxNLocator(10, steps=[1, 2, 5, 10]).tick_values(numbers.min(), numbers.max())
    names = [f"{low:.12g} to {high:.12g}" for low, high in zip(edges, edges[1:], strict=False)]
    return pd.cut(numbers, edges, labels=names, include_lowest=True)


def _figure(n_cells: int) -> figure:
    """Build the scatter plot; `explorer.js` finds its parts by their names."""
    points = models.ColumnDataSource({name: [] for name in ("x", "y", "colour", "marker", "thumbnail", "facts")})
    links = models.ColumnDataSource({name: [] for name in ("x0", "y0", "x1", "y1")}, name="links")
    lasso = models.LassoSelectTool(name="lasso", continuous=False)
    tools = [models.PanTool(name="pan"), models.WheelZoomTool(name="wheel"), lasso]
    layout: Any = {"sizing_mode": "stretch_width", "height": 620, "x_range": (0, 1), "y_range": (0, 1)}
    layout["min_border_left"] = 80  # px; the labels of the axis don't change the width of the plot
    plot = figure(name="explorer", tools=tools, toolbar_location="above", **layout)
    plot.toolbar.logo = None
    plot.toolbar.active_scroll = None  # a page that scrolls must not get stuck on the plot
    plot.grid.visible = False
    plot.segment("x0", "y0", "x1", "y1", source=links, line_color=GREY)
    view = models.CDSView(filter=models.IndexFilter(indices=[]))
    style: Any = {"marker": "marker", "fill_color": "colour", "line_color": "#80808080"}
    style |= {"nonselection_fill_color": GREY, "nonselection_fill_alpha": 0.2, "nonselection_line_alpha": 0}
    style["size"] = 6 if n_cells > 5000 else 8 if n_cells > 800 else 11
    cells = plot.scatter("x", "y", source=points, view=view, name="cells", **style)
    plot.scatter("x1", "y1", source=links, size=16, fill_color=None, line_color="#1f8fe5", line_width=2)
    plot.scatter("x0", "y0", source=links, size=20, fill_color=None, line_color="#e5391f", line_width=3)
    plot.add_tools(models.HoverTool(renderers=[cells], tooltips=TOOLTIP, limit=1))
    return plot


def read_sets(given: Sequence[str]) -> dict[str, Features]:
    """Read features from FILE or NAME=FILE; without NAME it is the file's, or the folder's if files share a name."""
    pairs = [("", text) if Path(text).is_file() else re.findall("(?:([^=]*)=)?(.*)", text)[0] for text in given]
    paths = [user_path(file) for _, file in pairs]
    has_file_names = len({path.stem for path in paths}) == len(paths)
    defaults = [path.stem if has_file_names else path.resolve().parent.name for path in paths]
    names = [name or default for (name, _), default in zip(pairs, defaults, strict=True)]
    if len(set(names)) < len(names):
        raise ValueError(f"--features: data sets would be called {', '.join(names)}; name each, as NAME=FILE")
    return {name: read_features(path) for name, path in zip(names, paths, strict=True)}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write a page to look around in features: PCA and UMAP of the cells, their images, neighbours, "
        "filters, and a lasso whose cells can be exported.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = parser.add_argument
    flag("--features", nargs="+", required=True, metavar="[NAME=]FILE", help="data sets: features.h5 of one network")
    flag("--predictions", type=user_path, help="a predictions.csv of knn.py, linear.py or abmil.py, or its folder")
    flag("--columns", type=user_path, help="a CSV of more to colour by: image paths first, other columns beside them")
    flag("--kind", help="kind of features (default: the file's first one)")
    flag("--metric", choices=METRICS, default="euclidean", help="of neighbours and UMAP")
    flag("--max-cells", type=positive_int, default=MAX_CELLS, help="the most cells to show, sampled by class")
    flag("--thumbnail-size", type=number_between(8, 256), default=40, help="side in pixels, 8 to 256")
    flag("--umap", action=argparse.BooleanOptionalAction, help="UMAP too (default: where umap-learn is installed)")
    flag("--seed", type=seed_number, default=0, help="of UMAP and of the sampling")
    flag("--num-workers", type=positive_int, default=min(available_cores(), 16), help="threads that read images")
    flag("--title", default="Embedding explorer", help="title of the page")
    flag("--output", type=user_path, required=True, help="the .html file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    setup_logging()
    sets = read_sets(args.features)
    if args.kind is not None:
        sets = {name: features.of_kind(args.kind) for name, features in sets.items()}
    section = explorer_section(
        sets,
        args.predictions,
        args.columns,
        max_cells=args.max_cells,
        thumbnail_size=args.thumbnail_size,
        metric=args.metric,
        with_umap=args.umap,
        seed=args.seed,
        n_workers=args.num_workers,
    )
    write_page(args.output, args.title, [section], ", ".join(sets))
    print(f"{args.output}: {sum(map(len, sets.values())):,} cells, {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(exit_code(main))

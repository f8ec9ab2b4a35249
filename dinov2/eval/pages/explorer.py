"""The embedding explorer: cells as points of a plane, with their images, neighbours, filters and a lasso.

Projections and neighbours are computed here; `templates/explorer.js` filters, colours and exports in the browser. The
plot is a 2D canvas, because hospital computers often have no graphics acceleration.

Letters: N cells, D numbers each, k neighbours
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from bokeh import models
from bokeh.palettes import viridis
from bokeh.plotting import figure
from matplotlib.ticker import MaxNLocator

from dinov2.eval.features import Features
from dinov2.eval.pages.cell_table import cell_table
from dinov2.eval.pages.charts import COLOURS
from dinov2.eval.pages.page import GREY, Section, embed, render
from dinov2.eval.pages.projection import nearest_cells, projections
from dinov2.eval.pages.thumbnails import make_thumbnails
from dinov2.eval.results import PROBABILITY_PREFIX, PredictionTable, read_predictions

Metric = Literal["euclidean", "cosine"]
METRIC_TITLES: dict[Metric, str] = {"euclidean": "Euclidean distance", "cosine": "cosine distance, 1 - similarity"}
COLUMN_TITLES = {
    "label": "Class",
    "patient": "Patient",
    "data_set": "Data set",
    "prediction": "Predicted class",
    "right": "Right or wrong",
    "probability": "Probability of the predicted class",
    "label_probability": "Probability of the label",
}
MARKERS = {"circle": "●", "square": "■", "triangle": "▲", "diamond": "◆", "plus": "✚"}
LOOKS = [{"colour": colour, "marker": marker, "sign": MARKERS[marker]} for marker in MARKERS for colour in COLOURS[:7]]
OTHER = LOOKS[0] | {"colour": GREY}  # of cells without a value, and of groups beyond the number of looks
TOOLTIP = """<div style="display: flex; gap: 8px; max-width: 360px; overflow-wrap: anywhere">
<img src="@thumbnail" width="96" height="96" alt=""><div style="white-space: pre-line">@facts</div></div>"""


@dataclass(frozen=True)
class ExplorerSettings:
    """Settings of the explorer.

    Attributes:
        max_cells: of more cells, this many are sampled; each class keeps its share and at least one cell.
        thumbnail_size: side in pixels.
        n_neighbours: k.
        metric: of neighbours and UMAP; Euclidean as the kNN protocol `dinobloom`, cosine as `dino`.
        with_umap: None for: if umap-learn is installed and there are enough cells.
        seed: of the sampling and of UMAP.
        n_workers: threads that read images.
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
    predictions: PredictionTable | Path | None = None,
    data_sets: Sequence[str] | None = None,
    columns: pd.DataFrame | None = None,
    settings: ExplorerSettings | None = None,
) -> Section:
    """Build the explorer as a section of a page.

    Args:
        features: N cells; images that cannot be read get a grey placeholder.
        predictions: for at least some of the cells: a table, or the file or folder to read it from.
        data_sets: N names, if the cells are from several sets.
        columns: further columns, N rows.
        settings: defaults if None.

    Raises:
        ValueError: for features that are infinite or NaN, or predictions that fit no cell; with the cosine metric also
            for features that are all 0.
        ModuleNotFoundError: if `with_umap` is set and umap-learn is missing.
    """
    settings = settings or ExplorerSettings()
    if not np.isfinite(features.features).all():
        raise ValueError("features: some are infinite or NaN; extract again, with weights that did not diverge")
    if settings.metric == "cosine" and not features.features.any(axis=1).all():
        raise ValueError("features: some cells have only zeros and no direction; use the metric euclidean")
    if isinstance(predictions, Path):
        predictions = read_predictions(predictions / "predictions.csv" if predictions.is_dir() else predictions)
    table = cell_table(features, data_sets, predictions, columns)
    rows = sample_by_class(features.labels, settings.max_cells, settings.seed)
    cells, table = features.select(rows), table.iloc[rows].dropna(axis="columns", how="all")
    planes, missing_umap = projections(cells.features, settings.with_umap, settings.metric, settings.seed)
    neighbours, distances = nearest_cells(cells.features, min(settings.n_neighbours, len(cells) - 1), settings.metric)
    thumbnails = make_thumbnails(cells.paths, settings.thumbnail_size, settings.n_workers)
    data = {
        "rows": rows.tolist(),
        "paths": cells.paths,
        "thumbnails": thumbnails.uris,
        "missing": thumbnails.missing,
        "columns": [page_column(str(name), values, features.class_names) for name, values in table.items()],
        "projections": [
            {"title": plane.title, "axes": plane.axes} | dict(zip("xy", map(_rounded, plane.points.T), strict=True))
            for plane in planes
        ],
        "neighbours": neighbours.tolist(),
        "distances": [_rounded(row, 3) for row in distances],
        "metric": METRIC_TITLES[settings.metric],
    }
    notes = [_note(features, len(cells), settings), missing_umap]
    if thumbnails.missing:
        notes.append(f"{len(thumbnails.missing):,} images cannot be read and are grey.")
    html = render("explorer.html", note=" ".join(filter(None, notes)), plot=embed(_figure(len(cells))), data=data)
    return Section("explorer", "Embedding explorer", html)


def sample_by_class(labels: np.ndarray, max_cells: int, seed: int = 0) -> np.ndarray:
    """Return positions of at most `max_cells` cells, in an order that mixes the classes.

    Each class keeps its share (up to rounding), and at least one cell if `max_cells` suffices.

    Args:
        labels: int64 [N].
        max_cells: the largest number of cells.
        seed: of the random order within the classes.

    Returns:
        int64 [min(N, max_cells)].
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    in_class = pd.Series(order).groupby(labels[order])
    depth = in_class.cumcount() / in_class.transform("size")  # 0 for the first cell of a class, 1 after the last
    return order[np.argsort(depth.to_numpy(), kind="stable")[:max_cells]]


def _rounded(values: np.ndarray, digits: int = 6) -> list[float]:
    """Round to significant digits, which keeps the page small."""
    return [float(f"{value:.{digits}g}") for value in values.tolist()]


def page_column(name: str, values: "pd.Series[Any]", class_names: Sequence[str]) -> dict[str, Any]:
    """Convert a column for the page: groups with their looks, the group of each cell, and the texts of numbers."""
    probability_of = name.removeprefix(PROBABILITY_PREFIX)
    title = COLUMN_TITLES.get(name, name if probability_of == name else f"Probability of {probability_of}")
    column: dict[str, Any] = {"id": name, "title": title}
    if pd.api.types.is_float_dtype(values):
        column["values"] = ["" if math.isnan(value) else f"{value:g}" for value in _rounded(values.to_numpy(), 3)]
        edges = MaxNLocator(10, steps=[1, 2, 5, 10]).tick_values(values.min(), values.max())
        names = [f"{low:.12g} to {high:.12g}" for low, high in zip(edges, edges[1:], strict=False)]
        looks = [OTHER | {"colour": colour} for colour in viridis(len(names))]
        values = pd.cut(values, edges, labels=names, include_lowest=True).astype(object).fillna("")
        counts = values.value_counts()
    else:
        counts, looks = values.value_counts(), LOOKS
        first = class_names if name in ("label", "prediction") else ()  # a class looks the same in both
        names = list(dict.fromkeys([*first, *sorted(counts.index)]))
        if len(names) > len(looks):
            names = list(counts.index)  # the largest groups get a look
    look_of = dict(zip(filter(None, names), looks, strict=False))
    present = [*(name for name in names if name and name in counts), *([""] if "" in counts else [])]
    column["groups"] = [{"name": name, "count": int(counts[name]), **look_of.get(name, OTHER)} for name in present]
    column["codes"] = pd.Index(present).get_indexer(values).tolist()
    return column


def _figure(n: int) -> figure:
    """Build the scatter plot; `explorer.js` finds its parts by their names."""
    points = models.ColumnDataSource({name: [] for name in ("x", "y", "colour", "marker", "thumbnail", "facts")})
    links = models.ColumnDataSource({name: [] for name in ("x0", "y0", "x1", "y1")}, name="links")
    images = models.ColumnDataSource({name: [] for name in ("x", "y", "url", "colour")}, name="images")
    plot = figure(
        name="explorer",
        tools=[
            models.PanTool(name="pan"),
            models.WheelZoomTool(name="wheel"),
            models.LassoSelectTool(name="lasso", continuous=False),
        ],
        toolbar_location="above",
        x_range=models.Range1d(start=0, end=1),
        y_range=models.Range1d(start=0, end=1),
        height=620,
        min_border_left=80,  # the labels of the axis don't change the width of the plot
        sizing_mode="stretch_width",
    )
    plot.toolbar.logo = None
    plot.toolbar.active_scroll = None  # a page that scrolls must not get stuck on the plot
    plot.grid.visible = False
    plot.segment("x0", "y0", "x1", "y1", source=links, line_color=GREY)
    cells = plot.scatter(
        "x",
        "y",
        source=points,
        name="cells",
        view=models.CDSView(filter=models.IndexFilter(indices=[])),
        marker="marker",
        size=6 if n > 5000 else 8 if n > 800 else 11,
        fill_color="colour",
        line_color="#80808080",
        nonselection_fill_color=GREY,
        nonselection_fill_alpha=0.2,
        nonselection_line_alpha=0,
    )
    plot.image_url("url", "x", "y", 44, 44, source=images, anchor="center", w_units="screen", h_units="screen")
    plot.scatter("x", "y", source=images, marker="square", size=47, fill_color=None, line_color="colour", line_width=3)
    plot.scatter("x1", "y1", source=links, size=16, fill_color=None, line_color="#1f8fe5", line_width=2)
    plot.scatter("x0", "y0", source=links, size=20, fill_color=None, line_color="#e5391f", line_width=3)
    plot.add_tools(models.HoverTool(renderers=[cells], tooltips=TOOLTIP, limit=1))
    return plot


def _note(features: Features, n_shown: int, settings: ExplorerSettings) -> str:
    """Describe what is shown."""
    n, dim = features.features.shape
    network = f" of {features.attributes['model']}" if features.attributes.get("model") else ""
    note = f"{n_shown:,} cells, features of kind {features.kind} with {dim:,} numbers{network}."
    if n_shown < n:
        note += (
            f" Sampled at random from {n:,} cells, each class with its share (seed {settings.seed}); projections and "
            f"neighbours are of these cells alone."
        )
    return f"{note} Neighbours are nearest in all {dim:,} numbers ({METRIC_TITLES[settings.metric]}), not in the plot."

"""Draw charts with bokeh: lines over iterations and values with intervals.

Each chart is a `<figure>` with a title, and to a screen reader one image that is named by its title and most important
numbers; a table beside it has all of them. Lines differ in dashes as well as in colour, and both read on light and dark
backgrounds. Values that are not finite leave a gap.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from bokeh.models import ColumnDataSource, HoverTool
from bokeh.plotting import figure
from markupsafe import Markup

from dinov2.eval.pages.page import GREY, embed, macros

N_COLUMNS = 300  # a line is thinned to at most three points in each of these parts of the axis
COLOURS = ("#2f86d6", "#c8661a", "#2e9a5f", "#a45cc0", "#d94f57", "#16929a", "#9a6f45", "#77838f")
DASHES = ("solid", "dashed", "dotted")
MOST_MARKERS = 40  # points of a line that are few enough to be marked
MOST_DESCRIBED = 8  # lines in the text for screen readers
TOO_LARGE = 1e150  # an axis cannot hold such values
NOTHING = Markup('<p class="muted">No number to draw.</p>')

Series = Mapping[str, tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]]


def thinned(xs: np.ndarray, ys: np.ndarray, n_columns: int = N_COLUMNS) -> np.ndarray:
    """Return the positions that a line needs: the first, the lowest and the highest of each part of the axis.

    Args:
        xs: [n] finite, ascending.
        ys: [n]; where a part has no finite value, its first position keeps the gap.
        n_columns: parts of the axis.

    Returns:
        ascending, at most 3 `n_columns` + 1; all positions if they are that few.
    """
    if len(xs) <= 3 * n_columns:
        return np.arange(len(xs))
    columns = np.minimum((xs - xs[0]) / (xs[-1] - xs[0]) * n_columns, n_columns - 1).astype(np.int64)
    is_finite = np.isfinite(ys)
    groups = pd.Series(ys)[is_finite].groupby(columns[is_finite])
    firsts = np.unique(columns, return_index=True)[1]
    return np.unique(np.concatenate([firsts, [len(xs) - 1], groups.idxmin(), groups.idxmax()])).astype(np.int64)


def line_chart(series: Series, title: str, x_label: str, y_label: str, log_y: bool = False) -> Markup:
    """Return lines over a common axis.

    Args:
        series: {name: (xs ascending, ys)}; with `log_y`, values that are not above 0 leave a gap, too.
        title: over the chart.
        x_label, y_label: of the axes.
        log_y: whether the vertical axis is logarithmic.
    """
    plot = _plot(x_label, y_label, height=240, y_axis_type="log" if log_y else "linear")
    has_number = False
    words, legend = [title], []
    for number, (name, (xs, ys)) in enumerate(series.items()):
        x, y = np.asarray(xs), np.asarray(ys, dtype=np.float64)
        y = np.where((np.abs(y) < TOO_LARGE) & ((y > 0) | (not log_y)), y, np.nan)
        kept = thinned(x, y)
        source = ColumnDataSource({"x": x[kept].tolist(), "y": y[kept].tolist()})
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        plot.line("x", "y", source=source, name=name, color=colour, line_dash=dash, line_width=1.5)
        finite = y[np.isfinite(y)]
        if len(finite) <= MOST_MARKERS:
            plot.scatter("x", "y", source=source, name=name, color=colour, size=5)
        has_number |= len(finite) > 0
        legend.append((name, colour, dash))
        if number < MOST_DESCRIBED:
            words.append(f"{name}: {_summary(finite)}")
    if not has_number:
        return macros().chart(NOTHING, title)
    tooltips = [("", "$name"), (x_label, "@x"), (y_label or "value", "@y{%.5g}")]
    plot.add_tools(HoverTool(tooltips=tooltips, formatters={"@y": "printf"}))
    return macros().chart(embed(plot, ". ".join(words)), title, legend if len(legend) > 1 else ())


def interval_chart(
    rows: Sequence[tuple[str, float | None, float | None, float | None]], title: str, x_label: str
) -> Markup:
    """Return a dot with its interval for each row.

    Args:
        rows: name, value, and the ends of its interval; None for what there is not.
        title: over the chart.
        x_label: what the values are.
    """
    numbers = np.array([row[1:] for row in rows], dtype=np.float64).reshape(-1, 3)  # [rows, 3], NaN for None
    if not np.isfinite(numbers).any():
        return macros().chart(NOTHING, title)
    plot = _plot(x_label, "", height=60 + 34 * len(rows), y_range=(len(rows) - 0.4, -0.8))
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(rows))]
    value, low, high = (column.tolist() for column in numbers.T)
    source: dict[str, Any] = {"name": [row[0] for row in rows], "y": list(range(len(rows))), "colour": colours}
    source |= {"value": value, "low": low, "high": high}
    plot.segment("low", "y", "high", "y", source=source, color="colour", line_width=3)
    plot.scatter("value", "y", source=source, color="colour", size=9)
    plot.text(
        float(np.nanmin(numbers)), "y", "name", source=source, y_offset=-6, text_color=GREY, text_font_size="12px"
    )
    plot.yaxis.visible = False
    plot.ygrid.visible = False
    plot.add_tools(HoverTool(tooltips=[("", "@name"), (x_label, "@value{0.0} (@low{0.0} to @high{0.0})")]))
    words = [f"{name}: {_short(value)} ({_short(low)} to {_short(high)})" for name, value, low, high in rows]
    return macros().chart(embed(plot, ". ".join([title, *words])), title)


def _plot(x_label: str, y_label: str, height: int, **options: Any) -> figure:
    return figure(
        x_axis_label=x_label,
        y_axis_label=y_label,
        height=height,
        sizing_mode="stretch_width",
        min_width=200,
        toolbar_location=None,
        tools="",
        **options,
    )


def _summary(values: np.ndarray) -> str:
    if not len(values):
        return "no number"
    first, last, low, high = map(_short, (values[0], values[-1], values.min(), values.max()))
    return f"from {first} to {last}, lowest {low}, highest {high}"


def _short(value: float | None) -> str:
    return "none" if value is None or not math.isfinite(value) else f"{value:.4g}"

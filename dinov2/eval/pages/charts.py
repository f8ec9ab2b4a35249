"""Draw charts with bokeh: lines over iterations and values with intervals.

Each chart is a `<figure>` with a title, and to a screen reader one image that is named by its title and most important
numbers. Lines differ in dashes as well as in colour, and both read on light and dark backgrounds. Values that are not
finite leave a gap.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from bokeh.models import ColumnDataSource, HoverTool, Range1d
from bokeh.plotting import figure
from markupsafe import Markup

from dinov2.eval.pages.page import GREY, embed, html

N_BUCKETS = 400  # of a long line, the lowest and the highest value of each of these parts are drawn
COLOURS = ("#2f86d6", "#c8661a", "#2e9a5f", "#a45cc0", "#d94f57", "#16929a", "#9a6f45", "#77838f")
DASHES = ("solid", "dashed", "dotted")
MOST_MARKERS = 40  # points of a line that are few enough to be marked
TOO_LARGE = 1e150  # an axis cannot hold such values
NOTHING = Markup('<p class="muted">No number to draw.</p>')
LAYOUT: dict[str, Any] = {"sizing_mode": "stretch_width", "min_width": 200, "toolbar_location": None, "tools": ""}


def thinned(ys: np.ndarray, n_buckets: int = N_BUCKETS) -> np.ndarray:
    """Return the positions of both ends and of each bucket's lowest and highest value; all if there are few.

    A bucket without any finite value keeps its first position, and with it the gap in the line.
    """
    if len(ys) <= 2 * n_buckets:
        return np.arange(len(ys))
    low, high = (np.where(np.isfinite(ys), ys, fill) for fill in (np.inf, -np.inf))
    kept = {0, len(ys) - 1}
    for bucket in np.array_split(np.arange(len(ys)), n_buckets):
        kept |= {bucket[low[bucket].argmin()], bucket[high[bucket].argmax()]}
    return np.array(sorted(kept))


def line_chart(lines: Mapping[str, "pd.Series[float]"], title: str, x_label: str, log_y: bool = False) -> Markup:
    """Return lines {name: values by place on the axis, ascending}; with `log_y`, values up to 0 leave a gap, too."""
    plot = figure(x_axis_label=x_label, height=240, y_axis_type="log" if log_y else "linear", **LAYOUT)
    words, legend = [title], []
    for i, (name, series) in enumerate(lines.items()):
        y = series.to_numpy(np.float64)
        y = np.where((np.abs(y) < TOO_LARGE) & ((y > 0) | (not log_y)), y, np.nan)
        kept = thinned(y)
        source = ColumnDataSource({"x": series.index.to_numpy()[kept].tolist(), "y": y[kept].tolist()})
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        plot.line("x", "y", source=source, name=name, color=colour, line_dash=dash, line_width=1.5)
        finite = y[np.isfinite(y)]
        if len(finite) <= MOST_MARKERS:
            plot.scatter("x", "y", source=source, name=name, color=colour, size=5)
        legend.append((name, colour, dash))
        if len(finite):
            ends = f"from {finite[0]:.4g} to {finite[-1]:.4g}"
            words.append(f"{name}: {ends}, lowest {finite.min():.4g}, highest {finite.max():.4g}")
    if len(words) == 1:
        return html.chart(NOTHING, title)
    tooltips = [("", "$name"), (x_label, "@x"), ("value", "@y{%.5g}")]
    plot.add_tools(HoverTool(tooltips=tooltips, formatters={"@y": "printf"}))
    return html.chart(embed(plot, ". ".join(words)), title, legend if len(legend) > 1 else ())


def interval_chart(intervals: Mapping[str, Sequence[float | None]], title: str) -> Markup:
    """Return a chart in percent of {name: share, and the ends of its interval}; None for what there is not."""
    numbers = 100 * np.array(list(intervals.values()), dtype=np.float64).reshape(-1, 3)  # NaN for None
    if not np.isfinite(numbers).any():
        return html.chart(NOTHING, title)
    n = len(numbers)
    plot = figure(x_axis_label="%", height=60 + 34 * n, y_range=Range1d(start=n - 0.4, end=-0.8), **LAYOUT)
    source: dict[str, Any] = dict(zip(("value", "low", "high"), numbers.T.tolist(), strict=True))
    source |= {"name": list(intervals), "y": list(range(n)), "colour": [COLOURS[i % len(COLOURS)] for i in range(n)]}
    plot.segment("low", "y", "high", "y", source=source, color="colour", line_width=3)
    plot.scatter("value", "y", source=source, color="colour", size=9)
    left = float(np.nanmin(numbers))
    plot.text(left, "y", "name", source=source, y_offset=-6, text_color=GREY, text_font_size="12px")
    plot.yaxis.visible = plot.ygrid.visible = False
    plot.add_tools(HoverTool(tooltips=[("", "@name"), ("%", "@value{0.0} (@low{0.0} to @high{0.0})")]))
    words = ["{}: {:.4g} ({:.4g} to {:.4g})".format(name, *row) for name, row in zip(intervals, numbers, strict=True)]
    return html.chart(embed(plot, ". ".join([title, *words])), title)

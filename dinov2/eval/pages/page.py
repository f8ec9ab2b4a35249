"""Write pages that open in a browser from disk: one HTML file with its styles, scripts, images and numbers inside.

A page is a list of `Section`s under one heading, with a table of contents. jinja2 escapes every value. The content
policy of a page forbids all requests, and all scripts without its nonce: a template writes its own script as
`<script nonce="{{ nonce }}">`, and its styles as `<style>`.

Sections can use `html`, the macros of `templates/macros.html`, and the CSS variables and classes of `page.css`. Event
`chartsready` of `document` comes after all bokeh figures were drawn; then `Bokeh.documents` has them.
"""

import base64
import io
import logging
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from bokeh.core.types import ID
from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, HoverTool, Plot, Range1d
from bokeh.plotting import figure
from bokeh.resources import Resources
from bokeh.themes import Theme
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from dinov2.data.datasets.decode import UnreadableImageError, decode_image, resize_image
from dinov2.eval.results import number
from dinov2.utils.command import progress_bar
from dinov2.utils.files import atomic_write

logger = logging.getLogger("dinov2")

QUALITY = 75  # WebP: about 450 bytes for a cell at 40 px, half of a JPEG
PLACEHOLDER = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 10 10'%3E"
    "%3Crect width='10' height='10' fill='%23808080'/%3E%3C/svg%3E"
)
NONE = "–"  # in place of a number that is not there
GREY = "#7b7b7b"  # contrast 4.2 on both backgrounds, as a chart's colours don't change with the scheme
N_BUCKETS = 400  # of a long line, the lowest and the highest value of each of these parts are drawn
COLOURS = ("#2f86d6", "#c8661a", "#2e9a5f", "#a45cc0", "#d94f57", "#16929a", "#9a6f45", "#77838f")
DASHES = ("solid", "dashed", "dotted")
MOST_MARKERS = 40  # points of a line that are few enough to be marked
TOO_LARGE = 1e150  # an axis cannot hold such values
NO_NUMBER = Markup('<p class="muted">No number to draw.</p>')
LAYOUT: dict[str, Any] = {"sizing_mode": "stretch_width", "min_width": 200, "toolbar_location": None, "tools": ""}
_CLEAR = {"background_fill_color": None, "border_fill_color": None, "outline_line_color": None}
_AXIS = {f"{part}_line_color": GREY for part in ("axis", "major_tick", "minor_tick")}
_TEXT = {f"{part}_text_color": GREY for part in ("axis_label", "major_label")}
_GRID = {"grid_line_color": GREY, "grid_line_alpha": 0.3}
THEME = Theme(json={"attrs": {"Plot": _CLEAR, "Axis": _AXIS | _TEXT, "Grid": _GRID}})

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.policies["json.dumps_kwargs"] = {}  # no sorting: bokeh defines an object where it stands first
_TEMPLATES.globals["nonce"] = secrets.token_urlsafe(16)
html: Any = _TEMPLATES.get_template("macros.html").module


@dataclass(frozen=True)
class Section:
    """One part of a page."""

    id: str  # lower-case letters, digits and hyphens; unique in the page
    title: str
    html: Markup  # its headings begin at <h3>, and its ids begin with the section's id


def section(name: str, title: str, parts: Sequence[Markup]) -> Section | None:
    """Return a section of these parts; None if all of them are empty."""
    content = Markup("\n").join(filter(None, parts))
    return Section(name, title, content) if content else None


def render(template: str, **values: Any) -> Markup:
    """Return the HTML of a file in `templates/`; values that are not `Markup` are escaped."""
    return Markup(_TEMPLATES.get_template(template).render(values))


def embed(plot: Plot, label: str = "") -> Markup:
    """Return a bokeh figure as HTML in the colours of pages, drawn when the page is opened.

    With a label, the figure is one image to screen readers; leave it out where readers work in the figure.
    """
    target = f"chart-{plot.id}"
    return html.figure(target, label, json_item(plot, ID(target), THEME))


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
        return html.chart(NO_NUMBER, title)
    tooltips = [("", "$name"), (x_label, "@x"), ("value", "@y{%.5g}")]
    plot.add_tools(HoverTool(tooltips=tooltips, formatters={"@y": "printf"}))
    return html.chart(embed(plot, ". ".join(words)), title, legend if len(legend) > 1 else ())


def interval_chart(intervals: Mapping[str, Sequence[float | None]], title: str) -> Markup:
    """Return a chart in percent of {name: share, and the ends of its interval}; None for what there is not."""
    numbers = 100 * np.array(list(intervals.values()), dtype=np.float64).reshape(-1, 3)  # NaN for None
    if not np.isfinite(numbers).any():
        return html.chart(NO_NUMBER, title)
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


def image_uri(image: Image.Image, kind: Literal["png", "jpeg", "webp"] = "png", quality: int = QUALITY) -> str:
    """Encode an image as the `src` of an `<img>`; `quality` is not for PNG."""
    stream = io.BytesIO()
    image.save(stream, kind, quality=quality)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def make_thumbnails(
    paths: Sequence[str | os.PathLike[str]], size: int, n_workers: int = 1
) -> tuple[list[str], dict[int, str]]:
    """Read images with `n_workers` threads, crop the centre square and scale it to `size` x `size` pixels.

    Returns:
        data URIs, and {position: reason} of the images that cannot be read and are grey, `PLACEHOLDER`.
    """
    missing: dict[int, str] = {}

    def thumbnail(position: int) -> str:
        try:
            pixels = resize_image(decode_image(paths[position]), size).permute(1, 2, 0).numpy()
        except UnreadableImageError as error:
            missing[position] = error.reason
            return PLACEHOLDER
        return image_uri(Image.fromarray(pixels), "webp")

    with ThreadPoolExecutor(n_workers) as pool:
        uris = list(progress_bar(pool.map(thumbnail, range(len(paths))), "thumbnails", len(paths)))
    if missing:
        first = min(missing)
        message = "thumbnails: %d of %d images cannot be read, for example %s: %s"
        logger.warning(message, len(missing), len(paths), paths[first], missing[first])
    return uris, dict(sorted(missing.items()))


def rounded(value: Any, form: str = ",.0f", scale: float = 1) -> str:
    """Return a rounded number that keeps all its digits, `<data value="0.8712">87.1</data>`; `NONE` if it is none."""
    if number(value) is None:
        return NONE
    return Markup('<data value="{}">{}</data>').format(repr(float(value)), format(scale * value, form))


def percent(value: Any) -> str:
    """Return a share in percent with one decimal, as `rounded` does."""
    return rounded(value, ".1f", 100)


def table(rows: Sequence[Mapping[str, Any]], caption: str, *, is_folded: bool = False) -> Markup:
    """Return a table of rows {header: text or `Markup`}, whose first column names them; nothing without rows."""
    headers = list(dict.fromkeys(header for row in rows for header in row))
    content = html.table(headers, [[row.get(header, "") for header in headers] for row in rows], caption)
    return html.folded(caption, content) if is_folded and rows else content


def page_html(title: str, sections: Sequence[Section], subtitle: str = "") -> str:
    """Return the whole page, with a line (`subtitle`) below its title."""
    ids = [section.id for section in sections]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-z][a-z0-9-]*", name) for name in ids), ids
    has_figures = any('class="chart-data"' in section.html for section in sections)
    bokeh = Resources(mode="inline", components=["bokeh"], log_level="error").js_raw if has_figures else []
    return render("page.html", title=title, subtitle=subtitle, sections=sections, bokeh=Markup("\n".join(bokeh)))


def write_page(path: Path, title: str, sections: Sequence[Section], subtitle: str = "") -> None:
    """Write `page_html`, whole or not at all."""
    text = page_html(title, sections, subtitle)
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", errors="replace"))  # odd bytes of file names are no UTF-8

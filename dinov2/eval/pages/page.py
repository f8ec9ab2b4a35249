"""Write pages that open in a browser from disk: one HTML file with its styles, scripts, images and numbers inside.

A page is a list of `Section`s under one heading, with a table of contents. jinja2 escapes every value. A page requests
nothing, because its content policy forbids that, and runs no script without the policy's nonce. A template with a
script of its own therefore writes `<script nonce="{{ nonce }}">`; data for scripts is
`<script type="application/json" id="...">{{ value | tojson }}</script>`. A template's styles are a `<style>` element.

What sections can use:
- CSS variables that follow the colour scheme: `--background`, `--surface`, `--ink`, `--muted`, `--line`, `--accent`,
  `--good`, `--bad`, `--warning`, `--scale` (the strong end of a colour scale that begins at `--surface`);
- classes: `grid` (cards beside each other), `card`, `controls` (a row of form fields), `note`, `warning`, `muted`,
  `number` (a column of numbers), `scroll` (a wide part that scrolls by itself), `pixels` (an image whose pixels stay
  sharp), `only-with-script` (hidden without JavaScript), `no-print`;
- events of `document`: `themechange` after the colours changed, `chartsready` after all bokeh figures were drawn
  (then `Bokeh.documents` has them);
- the macros of `templates/macros.html`.
"""

import base64
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from bokeh.core.types import ID
from bokeh.embed import json_item
from bokeh.models import Plot
from bokeh.resources import Resources
from bokeh.themes import Theme
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dinov2.utils.files import atomic_write

GREY = "#7b7b7b"  # contrast 4.2 on both backgrounds, as a chart's colours don't change with the scheme
_CLEAR = {"background_fill_color": None, "border_fill_color": None, "outline_line_color": None}
_AXIS = {f"{part}_line_color": GREY for part in ("axis", "major_tick", "minor_tick")}
_TEXT = {f"{part}_text_color": GREY for part in ("axis_label", "major_label")}
_GRID = {"grid_line_color": GREY, "grid_line_alpha": 0.3}
THEME = Theme(json={"attrs": {"Plot": _CLEAR, "Axis": _AXIS | _TEXT, "Grid": _GRID}})


@dataclass(frozen=True)
class Section:
    """One part of a page.

    Attributes:
        id: of its element: lower-case letters, digits and hyphens; unique in the page.
        title: its heading (`<h2>`).
        html: the content, usually from `render`. Its headings begin at `<h3>`, and its ids begin with the section's id.
    """

    id: str
    title: str
    html: Markup


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {}  # no sorting: bokeh defines an object where it stands first
    environment.globals["nonce"] = secrets.token_urlsafe(16)
    return environment


def render(template: str, **values: Any) -> Markup:
    """Return the HTML of a file in `templates/`; values that are not `Markup` are escaped."""
    return Markup(_environment().get_template(template).render(values))


@cache
def macros() -> Any:
    """Return the macros of `templates/macros.html`, for example `macros().heading(3, title)`."""
    return _environment().get_template("macros.html").module


def embed(figure: Plot, label: str = "") -> Markup:
    """Return a bokeh figure as HTML in the colours of pages, drawn when the page is opened.

    Args:
        figure: a bokeh figure or layout.
        label: text for screen readers, to which the figure then is one image; leave it out where readers work in it.
    """
    target = f"chart-{figure.id}"
    return macros().figure(target, label, json_item(figure, ID(target), THEME))


def image_uri(content: bytes, kind: Literal["png", "jpeg"]) -> str:
    """Return an encoded image as the `src` of an `<img>`."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def data_value(value: float, text: str) -> Markup:
    """Return a rounded number that keeps all its digits: `<data value="0.8712345">87.1</data>`."""
    return Markup('<data value="{}">{}</data>').format(repr(value), text)


def table(rows: Sequence[Mapping[str, Any]], caption: str, *, numbers_from: int = 1, folded: str = "") -> Markup:
    """Return a table with a column for each key, whose first column names the rows; nothing without rows.

    Args:
        rows: {header: text or `Markup`}.
        caption: what the table shows.
        numbers_from: the column from which cells are aligned right.
        folded: a line that unfolds the table; without it the table is open.
    """
    headers = list(dict.fromkeys(header for row in rows for header in row))
    cells = [[row.get(header, "") for header in headers] for row in rows]
    return macros().table(headers, cells, caption, numbers_from, folded) if rows else Markup()


def page_html(title: str, sections: Sequence[Section], subtitle: str = "") -> str:
    """Return the whole page.

    Args:
        title: its heading, and the title of the window.
        sections: in the order shown.
        subtitle: a line below the title.
    """
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

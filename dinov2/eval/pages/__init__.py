"""Pages to open in a browser from disk: one HTML file with its styles, scripts, pictures and numbers inside.

A page is a list of `Section`s. `page_html` puts them under one heading with a table of contents, adds the styles and
scripts that they name (files in `assets/`, each once), and writes their data as JSON where scripts and tests find it:
`<script type="application/json" id="data-<id of the section>">`. A page fetches nothing: its content security policy
forbids it, and runs no script but those that were put in here.

What sections can count on in a page:
- CSS variables for both colour schemes: `--background`, `--surface`, `--ink`, `--muted`, `--line`, `--accent`,
  `--good`, `--bad`, `--series-1` to `--series-8`, `--scale` (the strong end of a colour scale that begins at
  `--surface`);
- classes: `grid` (cards beside each other as far as there is room), `card`, `note`, `warning`, `muted`, `number` (a
  column of numbers), `pixels` (a picture whose pixels stay sharp), `only-with-script` (hidden without JavaScript),
  `no-print`;
- the event `themechange` of `document`, after a reader has changed the colour scheme or the system has.
"""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dinov2.utils.files import atomic_write

ASSETS = Path(__file__).parents[1] / "assets"
PAGE_STYLES = ("report.css",)
PAGE_SCRIPTS = ("report.js",)
NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # as JavaScript's Number() reads them
# HTML has no such characters, and UTF-8 no halves of surrogate pairs, which Python puts for a path's odd bytes
_NOT_IN_HTML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_SECTION_ID = re.compile(r"[a-z][a-z0-9-]*")


class Markup(str):
    """Text that is HTML already, which `escape` leaves as it is."""

    __slots__ = ()


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        id: of its element: lower-case letters, digits and hyphens; unique in a page.
        title: its heading (`<h2>`), plain text.
        html: what comes below, trusted: built with `escape` and the functions here. Its headings begin at `<h3>`, and
            ids in it begin with the section's own.
        data: for its scripts and for other programs, anything that `json_text` takes.
        scripts, styles: names of files in `assets/`.
    """

    id: str
    title: str
    html: str
    data: Any = None
    scripts: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()


def escape(value: Any) -> Markup:
    """Any text as HTML, in an element or in a quoted attribute; what HTML cannot hold becomes U+FFFD."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(_NOT_IN_HTML.sub("\ufffd", str(value)), quote=True))


def image_uri(content: bytes, kind: Literal["png", "jpeg"]) -> str:
    """An encoded picture as the `src` of an `<img>`."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def json_text(data: Any) -> str:
    """JSON that can stand in a `<script>` element: what is not finite becomes one of `NOT_FINITE`, as text.

    Args:
        data: mappings with text as keys, sequences, text, numbers, None, and NumPy's scalars and arrays.
    """
    text = json.dumps(_plain(data), allow_nan=False, separators=(",", ":"))  # ASCII: U+2028 and the like are escaped
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(data: Any) -> Any:
    """As json.dumps takes it."""
    if hasattr(data, "tolist"):  # NumPy's arrays and scalars, tensors
        data = data.tolist()
    if isinstance(data, float) and not math.isfinite(data):
        return NOT_FINITE[0] if math.isnan(data) else NOT_FINITE[1 if data > 0 else 2]
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple, set, frozenset)):
        return [_plain(value) for value in data]
    return data if data is None or isinstance(data, (bool, int, float, str)) else str(data)


def valued(value: float | int, text: str) -> Markup:
    """A number as `text`, with all its digits in the page: `<data value="0.8712345">87.1</data>`."""
    return Markup(f'<data value="{escape(repr(value))}">{escape(text)}</data>')


def table(
    headers: Sequence[Any],
    rows: Iterable[Sequence[Any]],
    caption: Any,
    *,
    numbers_from: int = 1,
    folded_under: Any = None,
) -> Markup:
    """A table with a caption, whose first column names the rows; it scrolls by itself where it is too wide.

    Args:
        headers: of the columns.
        rows: text (or `Markup`) of the cells, as many as there are headers.
        caption: what the table shows.
        numbers_from: the column from which cells are numbers and stand at the right.
        folded_under: a line under which the table is folded away; None leaves it open.
    """
    caption = escape(caption)

    def attribute(column: int) -> str:
        return ' class="number"' if column >= numbers_from else ""

    head = "".join(f'<th scope="col"{attribute(i)}>{escape(text)}</th>' for i, text in enumerate(headers))
    body = []
    for row in rows:
        first, *others = row
        cells = "".join(f"<td{attribute(i)}>{escape(text)}</td>" for i, text in enumerate(others, start=1))
        body.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    # a region that scrolls must be reachable by keyboard, and then needs a name
    name = re.sub(r"<[^>]*>", "", caption)
    inner = (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{name}"><table><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )
    if folded_under is None:
        return Markup(inner)
    return Markup(f"<details><summary>{escape(folded_under)}</summary>{inner}</details>")


def page_html(title: str, sections: Sequence[Section], subtitle: str = "") -> str:
    """The whole page.

    Args:
        title: its heading and the window's title, plain text.
        sections: in the order shown.
        subtitle: a line below, plain text or `Markup`.

    Raises:
        FileNotFoundError: if a section names an asset that is not there.
    """
    ids = [section.id for section in sections]
    assert len(set(ids)) == len(ids) and all(map(_SECTION_ID.fullmatch, ids)), f"ids of sections: {ids}"
    styles = dict.fromkeys([*PAGE_STYLES, *(name for section in sections for name in section.styles)])
    scripts = dict.fromkeys([*PAGE_SCRIPTS, *(name for section in sections for name in section.scripts)])
    css = "\n".join(_asset(name) for name in styles)
    programs = [f"\n{_asset(name)}\n" for name in scripts]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in programs
    )
    policy = (
        f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {hashes}; base-uri 'none'; "
        "form-action 'none'"
    )
    contents = "".join(f'<li><a href="#{section.id}">{escape(section.title)}</a></li>' for section in sections)
    below = f'<p class="muted">{escape(subtitle)}</p>' if subtitle else ""
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',  # otherwise a server is asked for one
        f"<title>{escape(title)}</title>",
        f"<style>\n{css}\n</style>",
        "</head>",
        "<body>",
        '<a class="skip no-print" href="#content">Skip to the content</a>',
        f'<header><div><h1>{escape(title)}</h1>{below}</div><button type="button" id="theme" class="no-print" hidden>'
        "Dark colours</button></header>",
        f'<nav aria-label="Contents" class="no-print"><ul>{contents}</ul></nav>',
        '<main id="content">',
        *(_section_html(section) for section in sections),
        "</main>",
        *(
            f'<script type="application/json" id="data-{section.id}">{json_text(section.data)}</script>'
            for section in sections
            if section.data is not None
        ),
        *(f"<script>{text}</script>" for text in programs),
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def write_page(path: Path, title: str, sections: Sequence[Section], subtitle: str = "") -> None:
    """Write `page_html`, whole or not at all."""
    text = page_html(title, sections, subtitle)
    with atomic_write(path, "w") as file:
        file.write(text)


def _section_html(section: Section) -> str:
    return (
        f'<section id="{section.id}" aria-labelledby="{section.id}-title">'
        f'<h2 id="{section.id}-title">{escape(section.title)}</h2>\n{section.html}\n</section>'
    )


def _asset(name: str) -> str:
    text = (ASSETS / name).read_text(encoding="utf-8")
    assert not re.search(r"</(script|style)|<!--", text, re.IGNORECASE), f"{name} would end the element that it is in"
    return text

"""Pages: well-formed, self-contained, and no text of a file becomes markup or a script.

In charts spikes and gaps stay, and what cannot be drawn is left out.
"""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bokeh.document import Document
from bokeh.models import Line, Scatter, Segment
from bokeh.plotting import figure
from markupsafe import Markup, escape
from PIL import Image

from dinov2.data.datasets.decode import load_image, resize_image
from dinov2.eval.pages import page as module
from dinov2.eval.pages.page import (
    COLOURS,
    N_BUCKETS,
    NONE,
    PLACEHOLDER,
    Section,
    embed,
    html,
    image_uri,
    interval_chart,
    line_chart,
    make_thumbnails,
    page_html,
    percent,
    render,
    rounded,
    section,
    table,
    thinned,
    write_page,
)

CSS = Path(module.__file__).parent / "templates" / "page.css"
EVIL = "</script><img src=x onerror=alert(1)> \"quoted\", \u2028 'ü' & <b>"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Elements in order, and whether all of them are closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def contents(page: str) -> list[tuple[dict, str]]:
    """Attributes and content of each script."""
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", page, re.DOTALL)
    return [(dict(re.findall(r'([\w-]+)="([^"]*)"', attributes)), text) for attributes, text in scripts]


def test_a_page_is_well_formed_and_says_where_things_are():
    sections = [Section("first", EVIL, Markup("<p>text</p>")), Section("second-2", "Second", Markup("<h3>below</h3>"))]
    page = Page(page_html(EVIL, sections, subtitle=EVIL))
    assert page.open == []
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert [tag for tag, _ in page.elements if tag in ("header", "nav", "main")] == ["header", "nav", "main"]
    assert [tag for tag, _ in page.elements if re.fullmatch(r"h\d", tag)] == ["h1", "h2", "h2", "h3"]
    assert page.of("html") == [{"lang": "en"}]
    targets = {attrs["href"].removeprefix("#") for attrs in page.of("a")}
    assert targets == {"content", "first", "second-2"}
    assert targets <= set(ids)
    assert all(attrs["aria-labelledby"] in ids for attrs in page.of("section"))
    assert {"h1", "h2", "title"} <= {tag for tag, text in page.texts if EVIL in text}
    assert page.of("img") == []


def test_a_page_loads_nothing_and_runs_only_its_own_scripts():
    text = page_html("t", [Section("s", "S", embed(figure(name="chart"), "a chart"))])
    page = Page(re.sub(r"(<script nonce[^>]*>).*?</script>", r"\1</script>", text, flags=re.S))
    loaded = [attrs.get("src") or attrs.get("href") for tag in ("link", "script", "img") for attrs in page.of(tag)]
    assert [address for address in loaded if address and not address.startswith("data:")] == []
    (policy,) = [attrs["content"] for attrs in page.of("meta") if "http-equiv" in attrs]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert {name for name, value in rules.items() if "data:" in value} == {"img-src", "font-src"}
    programs = [attributes for attributes, _ in contents(text) if attributes.get("type") != "application/json"]
    assert len(programs) == 2, "bokeh's and the page's"
    assert {f"'nonce-{attributes['nonce']}'" for attributes in programs} == {rules["script-src"]}


def test_bokeh_is_inside_only_where_a_figure_is():
    assert len(page_html("t", [Section("s", "S", Markup("<p>text</p>"))])) < 50_000
    assert len(page_html("t", [Section("s", "S", embed(figure(), "a chart"))])) > 1_000_000


def test_a_figure_has_a_name_and_its_data():
    plot = figure()
    plot.line([1, 2], [0.1 + 0.2, float("nan")], name=EVIL)
    text = embed(plot, EVIL)
    assert Page(text).of("div")[0] == {"class": "chart", "role": "img", "aria-label": EVIL}
    ((_, item),) = contents(text)
    assert json.loads(item)["target_id"] == Page(text).of("div")[1]["id"]
    assert "0.30000000000000004" in item
    assert not re.search("[<>&]", item)
    assert "role" not in Page(embed(figure())).of("div")[0]


def test_data_comes_back_with_all_digits():
    data = {"b": [0.1 + 0.2, 1e-300, 3, True, None, "</script>", "\u2029", "\udcff"], "a": EVIL}
    ((attributes, text),) = contents(html.data("s", data))
    assert attributes["id"] == "data-s"
    assert json.loads(text) == data
    assert not re.search("[<>&\u2028\u2029]", text)


def test_values_are_escaped_and_markup_stays():
    page = Page(html.folded(EVIL, Markup("<b>bold</b>")) + html.listing(EVIL, [EVIL], EVIL))
    assert page.of("div")[0] == {"class": EVIL}
    assert {("p", EVIL), ("li", EVIL)} <= set(page.texts)
    assert len(page.of("b")) == 1
    assert EVIL not in render("page.html", title=EVIL, subtitle=EVIL, sections=[], bokeh="")


def test_numbers_are_rounded_and_keep_their_digits():
    assert rounded(1234.56) == '<data value="1234.56">1,235</data>'
    assert percent(0.87654) == '<data value="0.87654">87.7</data>'
    assert rounded(np.float32(0.5), ".3f") == NONE == percent(None) == percent("<b>") == percent(float("nan"))


def test_a_section_without_content_is_none():
    assert section("s", "S", [Markup(), Markup()]) is None
    assert section("s", "S", [Markup("<p>a</p>"), Markup()]) == Section("s", "S", Markup("<p>a</p>"))


def test_a_table_names_rows_columns_and_itself():
    rows = [{"what": "row <1>", "a": percent(0.25)}, {"what": "row 2", "a": "x", "b": "y"}]
    page = Page(table(rows, EVIL))
    assert [attrs["scope"] for attrs in page.of("th")] == ["col"] * 3 + ["row"] * 2
    assert len(page.of("td")) == 4
    assert page.of("data") == [{"value": "0.25"}]
    assert [text for tag, text in page.texts if tag == "caption"] == [EVIL]
    (region,) = page.of("div")
    assert region["aria-label"] == EVIL
    assert region["tabindex"] == "0"
    assert table([], "nothing") == ""
    folded = Page(table(rows, EVIL, is_folded=True))
    assert [text for tag, text in folded.texts if tag == "summary"] == [EVIL]


def test_fields_of_a_matrix_are_coloured_by_share():
    rows = [["a", ("3", 1.0), ("1", 0.25)], [EVIL, ("", None), ("", 0.0)]]
    page = Page(html.table(["", "a", "b"], rows, EVIL, is_matrix=True))
    shares = [attrs["style"] for attrs in page.of("td") if "style" in attrs]
    assert shares == ["--share: 100.0%", "--share: 25.0%", "--share: 0.0%", "--share: 0.0%"]
    assert [attrs["scope"] for attrs in page.of("th")] == ["col"] * 3 + ["row"] * 2
    assert page.of("div")[0]["aria-label"] == EVIL


def test_images_are_inside():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    kind, _, content = image_uri(Image.fromarray(pixels)).partition(",")
    assert kind == "data:image/png;base64"
    np.testing.assert_array_equal(Image.open(io.BytesIO(base64.b64decode(content))), pixels)


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    write_page(tmp_path / "new" / "page.html", "t", [Section("s", "\udcff", Markup())])
    before = (tmp_path / "new" / "page.html").read_bytes()
    assert before.decode("utf-8").startswith("<!DOCTYPE html>")
    with pytest.raises(AssertionError):
        write_page(tmp_path / "new" / "page.html", "other", [Section("not an id", "S", Markup())])
    assert (tmp_path / "new" / "page.html").read_bytes() == before


def variables(side: int) -> dict[str, str]:
    """Colours of the light (0) or dark (1) scheme."""
    pairs = re.findall(r"--([\w-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\);", CSS.read_text())
    return {name: colours[side] for name, *colours in pairs}


def luminance(colour: str) -> float:
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(a: str, b: str) -> float:
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("side", [0, 1])
def test_text_stands_out_in_each_colour_scheme(side):
    colours = variables(side)
    grounds = [colours[name] for name in ("background", "surface", "warning")]
    for name in ("ink", "muted", "accent", "bad"):
        assert min(contrast(colours[name], ground) for ground in grounds) >= 4.5, name
    assert contrast(colours["ink"], colours["scale"]) >= 4.5  # counts on coloured fields
    assert min(contrast(colour, colours["background"]) for colour in COLOURS) >= 3
    assert contrast(module.GREY, colours["background"]) >= 4  # axes of charts, which don't change with the scheme


def test_thumbnails_are_the_scaled_images_and_missing_ones_have_a_reason(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for i in range(7):
        colours = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((64, 48), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
        paths.append(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    paths[3:3] = [tmp_path / "gone.png", tmp_path / "broken.png"]
    uris, missing = make_thumbnails(paths, 24, n_workers=2)
    assert missing == {3: "No such file or directory", 4: "not a known image format"}
    for i, (path, uri) in enumerate(zip(paths, uris, strict=True)):
        if i in missing:
            assert uri == PLACEHOLDER
            continue
        kind, _, content = uri.partition(",")
        assert kind == "data:image/webp;base64"
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"), dtype=float)
        expected = resize_image(load_image(path), 24).permute(1, 2, 0).numpy()
        assert np.abs(pixels - expected).mean() < 10  # lossy
    assert make_thumbnails(paths, 24) == (uris, missing)


def glyphs(chart, kind):
    """Each glyph of a kind in the bokeh figure, with its data."""
    text = re.search(r'class="chart-data">(.*?)</script>', chart, re.S)[1]
    (plot,) = Document.from_json(json.loads(text)["doc"]).roots
    return [
        (each.glyph, {"name": each.name} | each.data_source.data)
        for each in plot.renderers
        if isinstance(each.glyph, kind)
    ]


def series(values, start=0):
    return pd.Series(values, range(start, start + len(values)), dtype=np.float64)


def test_short_series_are_kept_whole():
    assert thinned(np.full(5, np.nan)).tolist() == [0, 1, 2, 3, 4]
    assert thinned(np.empty(0)).tolist() == []


def test_of_long_series_ends_spikes_and_gaps_stay():
    n = 1_000_000
    ys = np.random.default_rng(0).normal(size=n)
    ys[[345_678, 700_001]] = 99, -99
    ys[500_000:520_000] = np.nan
    ys[7] = np.inf
    kept = thinned(ys)
    assert {0, n - 1, 345_678, 700_001} <= set(kept.tolist())
    assert len(kept) <= 2 * N_BUCKETS + 2
    assert (np.diff(kept) > 0).all()
    assert np.isnan(ys[kept]).any()
    assert 7 not in kept
    chart = line_chart({"loss": series(ys)}, "Loss", "iteration")
    assert np.isnan(glyphs(chart, Line)[0][1]["y"]).any()
    assert len(chart) < 50_000
    assert "lowest -99, highest 99" in chart


def test_a_series_without_a_number_is_thinned_too():
    assert len(thinned(np.full(10_000, np.nan))) <= N_BUCKETS + 1


def test_lines_have_their_numbers_names_and_dashes():
    both = {"a": pd.Series([1.0, 2.0], [0, 10]), "b": pd.Series([2.0, 1.0], [0, 10])}
    chart = line_chart(both, "T", "x")
    lines = glyphs(chart, Line)
    for (line, data), (name, values), colour in zip(lines, both.items(), COLOURS, strict=False):
        assert (data["x"], data["y"], data["name"]) == ([0, 10], values.tolist(), name)
        assert line.line_color == colour
    assert lines[0][0].line_dash != lines[1][0].line_dash
    assert re.findall(r"</span>(\w)</li>", chart) == ["a", "b"]
    assert "legend" not in line_chart({"a": both["a"]}, "T", "x")


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize(
    "values",
    [[3.0], [0.0, 0.0], [1e-320, 1e308], [1.0, float("nan"), 3.0], [float("inf"), 2.0], [5.0, 5.0, 5.0], [-1.0, 1.0]],
)
def test_odd_values_are_drawn_or_left_out(values, log_y):
    chart = line_chart({"a": series(values)}, "T", "x", log_y)
    drawn = [abs(value) < 1e150 and (value > 0 or not log_y) for value in values]
    if any(drawn):
        assert np.isfinite(glyphs(chart, Line)[0][1]["y"]).tolist() == drawn
    else:
        assert "No number to draw" in chart


def test_single_points_are_marked_and_empty_charts_say_so():
    ((_, data),) = glyphs(line_chart({"a": series([2.0])}, "T", "x"), Scatter)
    assert data["y"] == [2.0]
    for nothing in (line_chart({"a": series([])}, "T", "x"), line_chart({}, "T", "x"), interval_chart({}, "T")):
        assert "No number to draw" in nothing
    assert "No number to draw" in line_chart({"a": series([-1.0])}, "T", "x", log_y=True)
    assert "No number to draw" in interval_chart({"a": (None, None, None)}, "T")


def test_charts_have_a_name_and_their_texts_are_safe():
    charts = [
        line_chart({EVIL: series([0, 1]), "b": series([1])}, EVIL, EVIL),
        interval_chart({EVIL * 3: (0.5, 0.1, 0.9)}, EVIL),
    ]
    for chart in charts:
        assert f"<figcaption>{escape(EVIL)}</figcaption>" in chart
        assert f'role="img" aria-label="{escape(EVIL)}' in chart
        assert "<img" not in chart


def test_intervals_are_around_their_values():
    chart = interval_chart({"a": (0.5, 0.4, 0.65), "b": (0.2, None, None)}, "T")
    ((_, data),) = glyphs(chart, Segment)
    assert (data["name"], data["value"]) == (["a", "b"], [50, 20])
    assert (data["low"][0], data["high"][0]) == (40, 65)
    assert np.isnan([data["low"][1], data["high"][1]]).all()
    assert "a: 50 (40 to 65). b: 20" in chart

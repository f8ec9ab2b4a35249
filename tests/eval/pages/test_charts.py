"""Charts: spikes stay, gaps stay, what cannot be drawn is left out, and names and texts are there."""

import json
import re

import numpy as np
import pytest
from bokeh.document import Document
from bokeh.models import Line, Scatter, Segment
from markupsafe import escape

from dinov2.eval.pages.charts import COLOURS, N_COLUMNS, interval_chart, line_chart, thinned

EVIL = '</script><img src=x onerror=alert(1)> "a", ü'
BACKGROUNDS = ("#ffffff", "#12181f")


def glyphs(chart, kind):
    """Each glyph of a kind in the bokeh figure, with its data."""
    text = re.search(r'class="chart-data">(.*?)</script>', chart, re.S)[1]
    (plot,) = Document.from_json(json.loads(text)["doc"]).roots
    return [
        (each.glyph, {"name": each.name} | each.data_source.data)
        for each in plot.renderers
        if isinstance(each.glyph, kind)
    ]


def luminance(colour):
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(a, b):
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def test_short_series_are_kept_whole():
    assert thinned(np.arange(5), np.full(5, np.nan)).tolist() == [0, 1, 2, 3, 4]
    assert thinned(np.arange(0), np.arange(0)).tolist() == []


def test_of_long_series_ends_spikes_and_gaps_stay():
    n = 1_000_000
    xs, ys = np.arange(n), np.random.default_rng(0).normal(size=n)
    ys[[345_678, 700_001]] = 99, -99
    ys[500_000:520_000] = np.nan
    ys[7] = np.inf
    kept = thinned(xs, ys)
    assert {0, n - 1, 345_678, 700_001} <= set(kept.tolist())
    assert len(kept) <= 3 * N_COLUMNS + 1
    assert (np.diff(kept) > 0).all()
    assert np.isnan(ys[kept]).any()
    assert 7 not in kept
    chart = line_chart({"loss": (xs, ys)}, "Loss", "iteration", "nats")
    assert np.isnan(glyphs(chart, Line)[0][1]["y"]).any()
    assert len(chart) < 50_000
    assert "lowest -99, highest 99" in chart


def test_a_series_without_a_number_is_thinned_too():
    assert len(thinned(np.arange(10_000), np.full(10_000, np.nan))) <= N_COLUMNS + 1


def test_lines_have_their_numbers_names_and_dashes():
    series = {"a": ([0, 10], [1.0, 2.0]), "b": ([0, 10], [2.0, 1.0])}
    chart = line_chart(series, "T", "x", "y")
    lines = glyphs(chart, Line)
    for (line, data), (name, (xs, ys)), colour in zip(lines, series.items(), COLOURS, strict=False):
        assert (data["x"], data["y"], data["name"]) == (xs, ys, name)
        assert line.line_color == colour
    assert lines[0][0].line_dash != lines[1][0].line_dash
    assert re.findall(r"</span>(\w)</li>", chart) == ["a", "b"]
    assert "legend" not in line_chart({"a": ([0, 10], [1.0, 2.0])}, "T", "x", "y")


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize(
    "values",
    [[3.0], [0.0, 0.0], [1e-320, 1e308], [1.0, float("nan"), 3.0], [float("inf"), 2.0], [5.0, 5.0, 5.0], [-1.0, 1.0]],
)
def test_odd_values_are_drawn_or_left_out(values, log_y):
    chart = line_chart({"a": (range(len(values)), values)}, "T", "x", "y", log_y)
    drawn = [abs(value) < 1e150 and (value > 0 or not log_y) for value in values]
    if any(drawn):
        assert np.isfinite(glyphs(chart, Line)[0][1]["y"]).tolist() == drawn
    else:
        assert "No number to draw" in chart


def test_single_points_are_marked_and_empty_charts_say_so():
    ((_, data),) = glyphs(line_chart({"a": ([1], [2.0])}, "T", "x", "y"), Scatter)
    assert data["y"] == [2.0]
    for nothing in (line_chart({"a": ([], [])}, "T", "x", "y"), line_chart({}, "T", "x", "y")):
        assert "No number to draw" in nothing
    assert "No number to draw" in line_chart({"a": ([0], [-1.0])}, "T", "x", "y", log_y=True)
    assert "No number to draw" in interval_chart([("a", None, None, None)], "T", "x")


def test_charts_have_a_name_and_their_texts_are_safe():
    charts = [
        line_chart({EVIL: ([0, 1], [0, 1]), "b": ([0], [1])}, EVIL, EVIL, EVIL),
        interval_chart([(EVIL * 3, 0.5, 0.1, 0.9)], EVIL, EVIL),
    ]
    for chart in charts:
        assert f"<figcaption>{escape(EVIL)}</figcaption>" in chart
        assert f'role="img" aria-label="{escape(EVIL)}' in chart
        assert "<img" not in chart


def test_intervals_are_around_their_values():
    chart = interval_chart([("a", 50.0, 40.0, 65.0), ("b", 20.0, None, None)], "T", "%")
    ((_, data),) = glyphs(chart, Segment)
    assert (data["name"], data["value"]) == (["a", "b"], [50, 20])
    assert (data["low"][0], data["high"][0]) == (40, 65)
    assert np.isnan([data["low"][1], data["high"][1]]).all()
    assert "a: 50 (40 to 65). b: 20" in chart


def test_colours_stand_out_in_both_schemes():
    for background in BACKGROUNDS:
        assert min(contrast(colour, background) for colour in COLOURS) >= 3

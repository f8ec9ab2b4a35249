"""Charts: spikes stay, gaps stay, what cannot be drawn is said, and texts are safe."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from dinov2.eval.charts import N_COLUMNS, interval_chart, line_chart, matrix_chart, thinned

EVIL = '</script><img src=x onerror=alert(1)> "a", ü'


def parsed(chart):
    """The figure as XML, which is stricter than HTML."""
    return ElementTree.fromstring(f"<root>{chart}</root>")


def numbers(chart):
    return [float(text) for path in parsed(chart).iter("path") for text in re.findall(r"-?\d+\.?\d*", path.get("d"))]


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
    assert len(kept) <= 2 * N_COLUMNS + 2
    assert (np.diff(kept) > 0).all()
    assert np.isnan(ys[kept]).any()
    assert 7 not in kept
    chart = line_chart({"loss": (xs, ys)}, "Loss", "iteration", "nats")
    assert chart.count("M") >= 2  # two pieces, with the gap between
    assert len(chart) < 20_000
    assert "highest 99" in chart
    assert "lowest -99" in chart


def test_lines_are_where_their_numbers_are():
    chart = line_chart({"a": ([0, 10], [1.0, 2.0]), "b": ([0, 10], [2.0, 1.0])}, "T", "x", "y")
    lines = [path for path in parsed(chart).iter("path") if "stroke-linejoin" in path.attrib]
    up, down = ([float(v) for v in re.findall(r"[\d.]+", path.get("d"))] for path in lines)
    assert up[0] == down[0] < up[2] == down[2]
    assert up[1] == down[3] > up[3] == down[1]  # SVG counts downwards
    assert lines[0].get("stroke-dasharray") != lines[1].get("stroke-dasharray")
    assert [item.text or "".join(item.itertext()) for item in parsed(chart).iter("li")] == ["a", "b"]


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize(
    "values",
    [[3.0], [0.0, 0.0], [1e-320, 1e308], [1.0, float("nan"), 3.0], [float("inf"), 2.0], [5.0, 5.0, 5.0], [-1.0, 1.0]],
)
def test_odd_values_are_drawn_or_left_out(values, log_y):
    chart = line_chart({"a": (range(len(values)), values)}, "T", "x", "y", log_y)
    found = numbers(chart)
    assert np.isfinite(found).all()
    assert "nan" not in "".join(path.get("d") for path in parsed(chart).iter("path"))
    assert all(-1 <= number <= 401 for number in found)


def test_a_point_alone_is_a_dot_and_nothing_is_said():
    chart = line_chart({"a": ([1], [2.0])}, "T", "x", "y")
    assert len(list(parsed(chart).iter("circle"))) == 1
    for nothing in (line_chart({"a": ([], [])}, "T", "x", "y"), line_chart({}, "T", "x", "y")):
        assert "No number to draw" in nothing
    assert "No number to draw" in line_chart({"a": ([0], [-1.0])}, "T", "x", "y", log_y=True)
    assert "No number to draw" in interval_chart([("a", None, None, None)], "T", "x")


def test_charts_have_a_name_and_their_texts_are_safe():
    charts = [
        line_chart({EVIL: ([0, 1], [0, 1]), "b": ([0], [1])}, EVIL, EVIL, EVIL),
        interval_chart([(EVIL * 3, 0.5, 0.1, 0.9)], EVIL, EVIL),
        matrix_chart([[1.0]], [[EVIL]], [EVIL * 2], [EVIL * 2], EVIL, EVIL, EVIL),
    ]
    for chart in charts:
        root = parsed(chart)
        assert root.find(".//figcaption").text == EVIL
        (picture,) = [svg for svg in root.iter("svg") if svg.get("role") == "img"]
        assert picture.get("aria-label").startswith(EVIL)
        assert not list(root.iter("img"))


def test_intervals_are_around_their_values():
    chart = interval_chart([("a", 50.0, 40.0, 65.0), ("b", 20.0, None, None)], "T", "%", 0, 100)
    root = parsed(chart)
    dots = [float(dot.get("cx")) for dot in root.iter("circle")]
    assert len(dots) == 2
    assert dots[1] < dots[0]
    (path,) = root.iter("path")
    start, end = re.match(r"M([\d.]+) [\d.]+H([\d.]+)", path.get("d")).groups()
    assert float(start) < dots[0] < float(end)
    assert "a: 50 (40 to 65); b: 20" in chart


def test_fields_of_a_matrix_are_coloured_by_value():
    chart = matrix_chart([[1.0, 0.25], [None, float("nan")]], [["3", "1"], ["", ""]], "ab", "ab", "T", "x", "y")
    fields = [rect.get("style") for rect in parsed(chart).iter("rect")]
    assert [re.search(r"opacity:([\d.]+)", style)[1] for style in fields] == ["1.000", "0.250", "0.000", "0.000"]

"""Charts as SVG in the page itself: lines, intervals and matrices, in the page's colours, with words for each.

Every function gives a `<figure>` of `Markup` whose SVG is one picture to a screen reader, named by its title and the
numbers that matter most; whoever shows it puts all numbers beside it as a table. Series differ in dashes as well as in
colour. Nothing is drawn of a value that is not finite.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from dinov2.eval.pages import Markup, escape

WIDTH = 400  # of a line chart, in the units of its text, which is 12 high
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 22, 38  # margins around the lines
N_COLUMNS = WIDTH - LEFT - RIGHT  # a line is thinned to two points a column
N_COLOURS = 8
DASHES = ("none", "6 3", "2 2", "9 3 2 3")
MOST_MARKERS = 40  # points of a series that are few enough to stand out each
MOST_LETTERS = 28  # of a name in a chart; longer ones are cut, and whole in its table
MOST_DECADES = 6
TOO_LARGE = 1e150  # beyond it an axis cannot be computed

Series = Mapping[str, tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]]


def thinned(xs: np.ndarray, ys: np.ndarray, n_columns: int = N_COLUMNS) -> np.ndarray:
    """Positions that a line of `n_columns` pixels needs: the ends, and the smallest and largest value in each column.

    Args:
        xs: [n] finite, ascending.
        ys: [n]; a column without a finite value keeps one of its positions, for the gap in the line.
        n_columns: width of the line.

    Returns:
        int64, ascending, at most 2 `n_columns` + 2; all positions if they are that few.
    """
    n = len(xs)
    if n <= 2 * n_columns + 2:
        return np.arange(n)
    edges = np.searchsorted(xs, np.linspace(xs[0], xs[-1], n_columns + 1)[1:-1], side="left")
    kept = {0, n - 1}
    for start, stop in zip([0, *edges.tolist()], [*edges.tolist(), n], strict=True):
        if start == stop:
            continue
        column = ys[start:stop]
        finite = np.isfinite(column)
        if not finite.any():
            kept.add(start)
            continue
        kept.add(start + int(np.where(finite, column, np.inf).argmin()))
        kept.add(start + int(np.where(finite, column, -np.inf).argmax()))
    return np.array(sorted(kept), dtype=np.int64)


def line_chart(
    series: Series, title: str, x_label: str, y_label: str, log_y: bool = False, height: int = 240
) -> Markup:
    """Lines over a common axis.

    Args:
        series: {name: (xs ascending, ys)}; a value that is not finite, or with `log_y` not above 0, leaves a gap.
        title: over the chart.
        x_label, y_label: of the axes.
        log_y: whether the vertical axis is logarithmic.
        height: of the picture, for a width of `WIDTH`.
    """
    arrays = {}
    for name, (xs, ys) in series.items():
        x, y = np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64)
        is_shown = (np.abs(y) < TOO_LARGE) & ((y > 0) | (not log_y))  # False for NaN
        arrays[name] = x, np.where(is_shown, y, np.nan)
    shown = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in arrays.values()]
    if not any(len(y) for _, y in shown):
        return _figure(title, Markup('<p class="muted">No number to draw.</p>'))
    x_low, x_high = _range(np.concatenate([x for x, _ in shown]))
    values = np.concatenate([y for _, y in shown])
    y_low, y_high = _range(np.log10(values) if log_y else values)
    ticks = _log_ticks(y_low, y_high) if log_y else [(tick, tick) for tick in _ticks(y_low, y_high)]
    bottom = height - BOTTOM

    def at_x(x: np.ndarray) -> np.ndarray:
        return LEFT + (x - x_low) / (x_high - x_low) * N_COLUMNS

    def at_y(y: np.ndarray) -> np.ndarray:
        return bottom - (y - y_low) / (y_high - y_low) * (bottom - TOP)

    parts = []
    for position, value in ticks:
        down = float(at_y(np.array(position)))
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    for tick in _ticks(x_low, x_high, 4):
        along = float(at_x(np.array(tick)))
        parts.append(f'<line class="axis" x1="{along:.1f}" x2="{along:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{along:.1f}" y="{bottom + 17}" text-anchor="middle">{_short(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="soft" x="2" y="12">{escape(y_label)}</text>')
    parts.append(f'<text class="soft" x="{WIDTH - RIGHT}" y="{height - 4}" text-anchor="end">{escape(x_label)}</text>')
    for number, (x, y) in enumerate(arrays.values()):
        parts.append(_line(number, at_x(x), at_y(np.log10(y) if log_y else y)))
    drawing = _svg(WIDTH, height, f"{title}. {_in_words(arrays)}", parts)
    return _figure(title, Markup(drawing + (_legend(list(arrays)) if len(arrays) > 1 else "")))


def interval_chart(
    rows: Sequence[tuple[str, float | None, float | None, float | None]],
    title: str,
    x_label: str,
    low: float | None = None,
    high: float | None = None,
) -> Markup:
    """A dot and an interval for each row, under its name.

    Args:
        rows: name, value, and the ends of its interval; None for what there is not.
        title: over the chart.
        x_label: what the values are.
        low, high: ends of the axis; without them those of the numbers.
    """
    drawn = [(name, _finite(value), _finite(start), _finite(end)) for name, value, start, end in rows]
    finite = np.array([n for _, *numbers in drawn for n in numbers if isinstance(n, float)], dtype=np.float64)
    if not len(finite):
        return _figure(title, Markup('<p class="muted">No number to draw.</p>'))
    first, last = _range(finite)
    room = (last - first) / 25  # for the ends of intervals, which are dots and bars with a width
    first, last = first - room if low is None else min(low, first), last + room if high is None else max(high, last)
    row_height, left = 34, 8
    height = 10 + row_height * len(drawn) + BOTTOM
    bottom = height - BOTTOM

    def at(value: float) -> str:
        return f"{left + (value - first) / (last - first) * (WIDTH - left - 16):.1f}"

    parts = []
    for tick in _ticks(first, last, 5):
        parts.append(f'<line class="rule" x1="{at(tick)}" x2="{at(tick)}" y1="6" y2="{bottom}"/>')
        parts.append(f'<text x="{at(tick)}" y="{bottom + 15}" text-anchor="middle">{_short(tick)}</text>')
    parts.append(f'<text class="soft" x="{WIDTH - 8}" y="{height - 4}" text-anchor="end">{escape(x_label)}</text>')
    words = []
    for number, (name, value, start, end) in enumerate(drawn):
        y, colour = 10 + row_height * number, f"var(--series-{number % N_COLOURS + 1})"
        parts.append(f'<text x="{left}" y="{y + 12}">{_cut(name, 60)}</text>')
        word = f"{name}: {'none' if value is None else _short(value, 3)}"
        if start is not None and end is not None:
            word += f" ({_short(start, 3)} to {_short(end, 3)})"
            parts.append(
                f'<path d="M{at(start)} {y + 22}H{at(end)}M{at(start)} {y + 18}v8M{at(end)} {y + 18}v8" fill="none" '
                f'stroke-width="2" style="stroke:{colour}"/>'
            )
        if value is not None:
            parts.append(f'<circle cx="{at(value)}" cy="{y + 22}" r="4" style="fill:{colour}"/>')
        words.append(word)
    return _figure(title, Markup(_svg(WIDTH, height, f"{title}. {'; '.join(words)}", parts)))


def matrix_chart(
    values: Sequence[Sequence[float | None]] | np.ndarray,
    texts: Sequence[Sequence[str]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    title: str,
    x_label: str,
    y_label: str,
) -> Markup:
    """Fields coloured by value, with a text in each; it scrolls where it is too wide.

    Args:
        values: [rows, columns], 0 to 1; None and what is not finite stay without colour.
        texts: what stands in each field.
        row_names, column_names: beside and above it.
        title: over the chart.
        x_label, y_label: what columns and rows are.
    """
    longest = max([1, *(len(text) for row in texts for text in row)])
    side = max(26, 7 * longest + 8)
    names = [_cut(name) for name in row_names]
    left = 20 + 7 * min(MOST_LETTERS, max([1, *map(len, row_names)]))
    top = 26 + round(5 * min(MOST_LETTERS, max([1, *map(len, column_names)])))  # names lean by 45 degrees
    width = left + side * len(column_names) + top
    height = top + 26 * len(row_names) + 8
    parts = [
        f'<text class="soft" x="4" y="{top - 8}">{escape(y_label)}</text>',
        f'<text class="soft" x="{left}" y="12">{escape(x_label)}</text>',
    ]
    for column, name in enumerate(column_names):
        x = left + side * (column + 0.5)
        parts.append(f'<text x="{x}" y="{top - 6}" transform="rotate(-45 {x} {top - 6})">{_cut(name)}</text>')
    for row, name in enumerate(names):
        y = top + 26 * row
        parts.append(f'<text x="{left - 6}" y="{y + 17}" text-anchor="end">{name}</text>')
        for column, text in enumerate(texts[row]):
            value, x = values[row][column], left + side * column
            share = min(max(_finite(value) or 0.0, 0.0), 1.0)
            parts.append(
                f'<rect x="{x}" y="{y}" width="{side}" height="26" class="rule" '
                f'style="fill:var(--scale);fill-opacity:{share:.3f}"/>'
            )
            if text:
                parts.append(f'<text x="{x + side / 2}" y="{y + 17}" text-anchor="middle">{escape(text)}</text>')
    label = f"{title}. Rows: {y_label}; columns: {x_label}"
    svg = _svg(width, height, label, parts, f' style="width:{width}px;max-width:none"')
    scrolls = f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(title)}">{svg}</div>'
    return _figure(title, Markup(scrolls))


def _figure(title: str, content: Markup) -> Markup:
    return Markup(f"<figure><figcaption>{escape(title)}</figcaption>{content}</figure>")


def _svg(width: float, height: float, label: str, parts: Sequence[str], attributes: str = "") -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}"{attributes}>'
        f"{''.join(parts)}</svg>"
    )


def _line(number: int, xs: np.ndarray, ys: np.ndarray) -> str:
    """A series as a path: thinned, in pieces between gaps; a point without neighbours is a dot."""
    kept = thinned(xs, ys)
    xs, ys = xs[kept], ys[kept]
    commands, is_open = [], False
    for i, (x, y) in enumerate(zip(xs.tolist(), ys.tolist(), strict=True)):
        if math.isfinite(y):
            has_next = i + 1 < len(ys) and math.isfinite(ys[i + 1])
            commands.append(f"{'L' if is_open else 'M'}{x:.1f} {y:.1f}" + ("" if is_open or has_next else "h0"))
        is_open = math.isfinite(y)
    colour, dash = f"var(--series-{number % N_COLOURS + 1})", DASHES[number % len(DASHES)]
    path = (
        f'<path d="{"".join(commands)}" fill="none" stroke-width="1.6" stroke-linejoin="round" stroke-linecap="round" '
        f'stroke-dasharray="{dash}" style="stroke:{colour}"/>'
    )
    if np.isfinite(ys).sum() > MOST_MARKERS:
        return path
    dots = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'
        for x, y in zip(xs.tolist(), ys.tolist(), strict=True)
        if math.isfinite(y)
    )
    return f'{path}<g style="fill:{colour}">{"".join(dots)}</g>'


def _legend(names: Sequence[str]) -> str:
    items = []
    for number, name in enumerate(names):
        colour, dash = f"var(--series-{number % N_COLOURS + 1})", DASHES[number % len(DASHES)]
        items.append(
            '<li><svg viewBox="0 0 30 10" aria-hidden="true"><path d="M0 5H30" stroke-width="3" '
            f'stroke-dasharray="{dash}" style="stroke:{colour}"/></svg>{escape(name)}</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _in_words(arrays: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """What a reader who cannot see the lines should know of each."""
    words = []
    for name, (_, y) in list(arrays.items())[:N_COLOURS]:
        finite = y[np.isfinite(y)]
        if len(finite):
            numbers = (finite[0], finite[-1], finite.min(), finite.max())
            words.append("{}: from {} to {}, lowest {}, highest {}".format(name, *(_short(n, 3) for n in numbers)))
        else:
            words.append(f"{name}: no number")
    n_more = len(arrays) - len(words)
    return "; ".join(words) + (f"; and {n_more} more" if n_more else "")


def _range(values: np.ndarray) -> tuple[float, float]:
    """Ends of an axis; values that are all alike get room on both sides."""
    low, high = float(values.min()), float(values.max())
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    if low == 0:
        return 0.0, 1.0
    return low - abs(low) / 10, high + abs(high) / 10


def _ticks(low: float, high: float, n: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`, about `n`."""
    rough = (high - low) / n
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[tuple[float, float]]:
    """(position, value) of powers of ten between two exponents; over less than a decade, of round numbers."""
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    if last - first >= 1:
        stride = 1 + (last - first) // MOST_DECADES
        return [(float(exponent), 10.0**exponent) for exponent in range(first, last + 1, stride)]
    return [(math.log10(value), value) for value in _ticks(10**low, 10**high, 4) if value > 0]


def _short(value: float, digits: int = 4) -> str:
    """A number for an axis or a sentence: 0.25, 1.5e-05, 20k, 3M."""
    value = float(value)
    if abs(value) < 1e-12:
        return "0"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (10 if letter == "k" else 1) and abs(value) < 1e12:
            return f"{value / size:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


def _cut(name: str, most: int = MOST_LETTERS) -> Markup:
    """A name that fits, with the whole of it for the pointer."""
    if len(name) <= most:
        return escape(name)
    return Markup(f"{escape(name[: most - 1])}…<title>{escape(name)}</title>")


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)

"""Shapes, noise and stamps that cells are drawn with. Letters: S image side in pixels.

Distances are signed, in micrometres, and negative inside a shape.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np
from PIL import Image

# (x [S, S], y [S, S], radius of the cell, nucleus_size, rng) -> signed distance [S, S] to the edge, negative inside
NucleusShape = Callable[[np.ndarray, np.ndarray, float, float, np.random.Generator], np.ndarray]


def turned(x: np.ndarray, y: np.ndarray, angle: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cosine, sine = np.cos(angle), np.sin(angle)
    return cosine * x + sine * y, cosine * y - sine * x


def ellipse(x: np.ndarray, y: np.ndarray, a: float, b: float) -> np.ndarray:
    """About the signed distance to an ellipse's edge, negative inside; right at the edge and for a = b."""
    return (np.hypot(x / a, y / b) - 1) * np.sqrt(a * b)


def segment(x: np.ndarray, y: np.ndarray, end_x: np.ndarray, end_y: np.ndarray) -> np.ndarray:
    """Distance to the straight line between two points."""
    dx, dy = end_x[1] - end_x[0], end_y[1] - end_y[0]
    along = np.clip(((x - end_x[0]) * dx + (y - end_y[0]) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - end_x[0] - along * dx, y - end_y[0] - along * dy)


def smooth_min(a: np.ndarray, b: np.ndarray, width: float) -> np.ndarray:
    """Minimum of two distances whose corner is rounded over `width`."""
    overlap = np.maximum(width - np.abs(a - b), 0)
    return np.minimum(a, b) - overlap * overlap / (4 * width)


def inside(distance: np.ndarray, px_per_um: float) -> np.ndarray:
    """Share of each pixel inside a shape, from the signed distance to its edge."""
    return np.clip(0.5 - distance * px_per_um, 0, 1).astype(np.float32)


def smooth_noise(rng: np.random.Generator, size: int, grain_px: float) -> np.ndarray:
    """Noise [S, S] with blobs about `grain_px` wide, mean 0 and standard deviation 1."""
    n = min(size, max(3, round(1.5 * size / grain_px)))
    coarse = Image.fromarray(rng.standard_normal((n, n), dtype=np.float32))
    noise = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    return noise / np.float32(noise.std() + 1e-6)


def stamp(
    centres_px: np.ndarray, reach_px: float, draw: Callable[[np.ndarray, np.ndarray], np.ndarray], size: int
) -> np.ndarray:
    """Sum [S, S] of small patches around [n, 2] centres (row, column), which may lie outside the image.

    `draw` takes [n, w, w] rows and columns relative to the centres and gives [n, w, w], empty beyond `reach_px`.
    """
    if len(centres_px) == 0:
        return np.zeros((size, size), dtype=np.float32)
    half = int(np.ceil(reach_px))
    offsets = np.arange(-half, half + 1)
    corner = np.floor(centres_px).astype(np.int64)
    rows = corner[:, :1] + offsets  # [n, w]
    columns = corner[:, 1:] + offsets
    patches = draw(
        np.repeat((rows + 0.5 - centres_px[:, :1])[:, :, None], len(offsets), axis=2).astype(np.float32),
        np.repeat((columns + 0.5 - centres_px[:, 1:])[:, None, :], len(offsets), axis=1).astype(np.float32),
    )
    is_within = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
    pixels = (rows[:, :, None] * size + columns[:, None, :])[is_within]
    return np.bincount(pixels, patches[is_within], size * size).reshape(size, size).astype(np.float32)


def discs(
    centres_px: np.ndarray, radii_px: np.ndarray, edge_px: float, size: int, weights: float | np.ndarray = 1.0
) -> np.ndarray:
    """Sum [S, S] of n round spots, the edges of which are `edge_px` wide."""
    shape = (-1, 1, 1)

    def disc(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        distance = np.hypot(rows, columns) - radii_px.reshape(shape)
        return np.reshape(weights, shape) * np.clip(0.5 - distance / edge_px, 0, 1)

    return stamp(centres_px, radii_px.max(initial=0) + edge_px, disc, size)


def blurred(image: np.ndarray, sigma_px: float) -> np.ndarray:
    """Gaussian blur of [3, S, S] along both sides, with the border repeated."""
    half = max(1, int(np.ceil(2.5 * sigma_px)))
    taps = np.exp(-0.5 * (np.arange(-half, half + 1) / max(sigma_px, 1e-3)) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    size = image.shape[-1]
    padded = np.pad(image, ((0, 0), (half, half), (half, half)), mode="edge")
    rows = sum(tap * padded[:, i : i + size] for i, tap in enumerate(taps))
    return sum(tap * rows[:, :, i : i + size] for i, tap in enumerate(taps))


# --- nuclei ---------------------------------------------------------------------------------------------------------


def round_nucleus(x: np.ndarray, y: np.ndarray, cell: float, size: float, rng: np.random.Generator) -> np.ndarray:
    """An ellipse of radius `size` x the cell's, off the centre, now and then with a shallow dent."""
    radius = size * cell
    axis = rng.uniform(1.0, 1.14)
    off = min(rng.uniform(0.1, 0.9) * (cell - radius), 0.3 * cell)
    distance = ellipse(x - off, y, radius * axis, radius / axis)
    if rng.random() < 0.25:
        depth = rng.uniform(0.1, 0.28) * radius
        turn = rng.uniform(-2, 2)
        reach = radius * 1.5 - depth
        dent = np.hypot(x - off - reach * np.cos(turn), y - reach * np.sin(turn)) - 0.5 * radius
        distance = -smooth_min(-distance, dent, 0.5)
    return distance


def lobed_nucleus(
    n_lobes: Sequence[int], x: np.ndarray, y: np.ndarray, cell: float, size: float, rng: np.random.Generator
) -> np.ndarray:
    """Round lobes strung along an arc by thin threads; `size` is the lobes' radius for three of them."""
    n = int(rng.choice(n_lobes))
    radius = size * cell * (3 / n) ** 0.45
    arc = max(0.5 * cell, 1.05 * radius) * rng.uniform(0.85, 1.05)
    step = min(2 * np.arcsin(min(1.0, radius * rng.uniform(1.0, 1.2) / arc)), 5.2 / n)
    angles = step * (np.arange(n) - (n - 1) / 2) + rng.normal(0, 0.12, n)
    reach = arc * rng.uniform(0.8, 1.1, n)
    lobe_x, lobe_y = reach * np.cos(angles), reach * np.sin(angles)
    lobe_x -= lobe_x.mean() * rng.uniform(0.5, 1.0)
    lobes = []
    for i in range(n):
        long, turn = rng.uniform(1.0, 1.35) ** 0.5, rng.uniform(0, np.pi)
        mean_radius = radius * rng.uniform(0.85, 1.12)
        along, across = turned(x - lobe_x[i], y - lobe_y[i], turn)
        lobes.append(ellipse(along, across, mean_radius * long, mean_radius / long))
    distance = reduce(lambda a, b: smooth_min(a, b, 0.12), lobes)
    for i in range(n - 1):
        thread = segment(x, y, lobe_x[i : i + 2], lobe_y[i : i + 2]) - rng.uniform(0.2, 0.45)
        distance = smooth_min(distance, thread, 0.3)
    return distance


def curved_nucleus(
    aperture: tuple[float, float], x: np.ndarray, y: np.ndarray, cell: float, size: float, rng: np.random.Generator
) -> np.ndarray:
    """A thick arc, `size` half its thickness: a horseshoe for a wide `aperture` (half of its angle), else a kidney."""
    half_angle = rng.uniform(*aperture)
    half = size * cell
    arc = max((cell - half) * rng.uniform(0.6, 0.78), half * 0.55)
    x = x + arc * np.sin(half_angle) / half_angle * 0.8  # the arc's centre of mass near the cell's centre
    side = np.abs(y)
    end_x, end_y = arc * np.cos(half_angle), arc * np.sin(half_angle)
    beside_arc = end_x * side < end_y * x  # the angle from the x axis is below half_angle
    distance = np.where(beside_arc, np.abs(np.hypot(x, y) - arc), np.hypot(x - end_x, side - end_y))
    uneven = 1 + rng.uniform(-0.12, 0.12) * y / arc + rng.uniform(-0.1, 0.14) * (x / arc)
    return distance - half * uneven

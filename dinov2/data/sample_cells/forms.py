"""Describe the classes of cells and the slides.

The classes differ as real ones do: in the form of the nucleus, its chromatin, its share of the cell, and the granules.
Stain, light, magnification, sharpness and crowding belong to the slide. They vary more between slides than the classes
differ in colour, so a colour histogram cannot solve the task.

Letters: S image side in pixels. Lengths are in micrometres; distances are signed, negative inside a shape.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import TypeAlias

import numpy as np

# absorbance (natural logarithm) of red, green and blue at unit amount of azure, eosin and haemoglobin, chosen so that
# nuclei, granules and erythrocytes come out as in May-Gruenwald-Giemsa smears
DYES = np.array([[0.84, 0.64, 0.14], [0.05, 0.84, 0.36], [0.10, 0.22, 0.42]])

Amounts: TypeAlias = tuple[float, float, float]  # of azure, eosin and haemoglobin
# (x [S, S], y [S, S], radius of the cell, nucleus_size, rng) -> signed distance [S, S] to the nucleus
NucleusShape: TypeAlias = Callable[[np.ndarray, np.ndarray, float, float, np.random.Generator], np.ndarray]


def turned(x: np.ndarray, y: np.ndarray, angle: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotate the coordinates by an angle in radians."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return cosine * x + sine * y, cosine * y - sine * x


def ellipse(x: np.ndarray, y: np.ndarray, a: float, b: float) -> np.ndarray:
    """Return about the signed distance to an ellipse; it is exact at the edge and for a = b."""
    return (np.hypot(x / a, y / b) - 1) * np.sqrt(a * b)


def segment(x: np.ndarray, y: np.ndarray, end_x: np.ndarray, end_y: np.ndarray) -> np.ndarray:
    """Return the distance to the straight line between two points."""
    dx, dy = end_x[1] - end_x[0], end_y[1] - end_y[0]
    along = np.clip(((x - end_x[0]) * dx + (y - end_y[0]) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - end_x[0] - along * dx, y - end_y[0] - along * dy)


def smooth_min(a: np.ndarray, b: np.ndarray, width: float) -> np.ndarray:
    """Return the minimum of two distances, with a corner that is rounded over `width`."""
    overlap = np.maximum(width - np.abs(a - b), 0)
    return np.minimum(a, b) - overlap * overlap / (4 * width)


def round_nucleus(x: np.ndarray, y: np.ndarray, cell: float, size: float, rng: np.random.Generator) -> np.ndarray:
    """Return an ellipse with `size` times the cell's radius, off the centre, in a quarter of the cells with a dent."""
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
    """Draw a nucleus of round lobes along an arc, joined by thin threads; return its distance field, shaped as `x`.

    The number of lobes is drawn from `n_lobes`. If it is 3, each has a radius of about `size` * `cell`.
    """
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
    """Return an arc of half thickness `size`: a horseshoe for a wide `aperture` (half of its angle), else a kidney."""
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


@dataclass(frozen=True)
class Granules:
    """Round grains in the cytoplasm."""

    dyes: Amounts
    radius: tuple[float, float]
    per_um2: tuple[float, float]  # number per square micrometre of cytoplasm
    over_nucleus: float = 0.0  # share of the density that also lies over the nucleus


@dataclass(frozen=True)
class CellForm:
    """The properties of one class of cells; pairs are the ends of a range."""

    radius: tuple[float, float]  # of the whole cell
    cytoplasm: Amounts
    nucleus: NucleusShape | None = None  # platelets have none
    nucleus_size: tuple[float, float] = (0.0, 0.0)  # relative to the cell's radius, see the nucleus's function
    clumps: tuple[float, float] = (1.0, 0.0)  # diameter and contrast of the chromatin's clumps
    nucleus_dyes: Amounts = (1.5, 1.05, 0.0)  # where the chromatin has its mean density
    nucleoli: int = 0  # at most
    rim: float = 0.0  # how much bluer the cytoplasm is at the cell's edge than inside
    pale_zone: float = 0.0  # strength of the pale region beside the nucleus
    ragged: float = 0.15  # distance of the outline from an ellipse
    nucleus_ragged: float = 0.14  # distance of the nucleus's outline from its plain form
    vacuoles: int = 0  # at most
    granules: tuple[Granules, ...] = ()


_NEUTROPHIL = (Granules((0.25, 0.35, 0.0), (0.10, 0.17), (1.2, 3.0)),)
_EOSINOPHIL = (Granules((0.05, 0.46, 0.52), (0.30, 0.42), (2.0, 3.2), over_nucleus=0.05),)
_BASOPHIL = (Granules((0.85, 0.62, 0.0), (0.2, 0.5), (1.4, 2.8), over_nucleus=0.5),)
_MONOCYTE = (Granules((0.12, 0.18, 0.0), (0.08, 0.13), (0.8, 2.0)),)
_PROMYELOCYTE = (Granules((0.45, 0.65, 0.0), (0.17, 0.28), (0.5, 1.4), over_nucleus=0.35),)
_PLATELET = (Granules((0.40, 0.50, 0.0), (0.14, 0.24), (2.0, 4.5)),)

# fmt: off
FORMS: dict[str, CellForm] = {
    # radius, cytoplasm, nucleus, nucleus_size; the rest by name
    "neutrophil_segmented": CellForm((5.7, 7.0), (0.16, 0.20, 0.02), partial(lobed_nucleus, (3, 3, 4, 4, 5)),
        (0.29, 0.34), clumps=(1.1, 0.24), granules=_NEUTROPHIL),
    "neutrophil_band": CellForm((5.7, 7.0), (0.17, 0.20, 0.02), partial(curved_nucleus, (1.7, 2.45)), (0.21, 0.27),
        clumps=(1.1, 0.24), granules=_NEUTROPHIL),
    "eosinophil": CellForm((5.9, 7.2), (0.16, 0.22, 0.10), partial(lobed_nucleus, (2, 2, 2, 3)), (0.31, 0.36),
        clumps=(1.1, 0.22), granules=_EOSINOPHIL),
    "basophil": CellForm((5.2, 6.5), (0.18, 0.26, 0.0), partial(lobed_nucleus, (2, 3, 3)), (0.36, 0.42),
        clumps=(1.4, 0.15), nucleus_dyes=(1.05, 0.9, 0.0), granules=_BASOPHIL),
    "lymphocyte": CellForm((4.3, 5.7), (0.46, 0.16, 0.0), round_nucleus, (0.80, 0.90),
        clumps=(1.25, 0.17), rim=0.5, ragged=0.2),
    "monocyte": CellForm((6.8, 8.8), (0.36, 0.22, 0.02), partial(curved_nucleus, (0.95, 1.5)), (0.31, 0.39),
        clumps=(0.8, 0.24), nucleus_dyes=(1.2, 0.95, 0.0), ragged=0.5, nucleus_ragged=0.22, vacuoles=7,
        granules=_MONOCYTE),
    "erythroblast": CellForm((4.0, 5.6), (0.34, 0.28, 0.30), round_nucleus, (0.50, 0.64),
        clumps=(1.0, 0.24), nucleus_dyes=(1.75, 1.2, 0.0), ragged=0.2, nucleus_ragged=0.07),
    "myeloblast": CellForm((6.2, 8.2), (0.44, 0.16, 0.0), round_nucleus, (0.76, 0.86),
        clumps=(0.55, 0.15), nucleus_dyes=(1.1, 0.95, 0.0), nucleoli=4, rim=0.35, ragged=0.25),
    "promyelocyte": CellForm((7.4, 9.4), (0.42, 0.22, 0.0), round_nucleus, (0.56, 0.68),
        clumps=(0.65, 0.18), nucleus_dyes=(1.15, 0.95, 0.0), nucleoli=2, rim=0.2, pale_zone=0.6, ragged=0.25,
        granules=_PROMYELOCYTE),
    "platelet": CellForm((1.3, 2.3), (0.26, 0.28, 0.0), ragged=0.25, granules=_PLATELET),
}
# fmt: on
CELL_CLASSES = tuple(FORMS)


class Slide:
    """The properties that all images of one glass slide share: its stain, and its microscope and camera."""

    def __init__(self, rng: np.random.Generator) -> None:
        """Draw a slide."""
        ph = rng.normal(0, 0.22)  # acid buffers favour eosin, alkaline ones azure
        strength = np.exp(rng.normal(0, 0.2))
        amounts = strength * np.exp([-ph, ph, rng.normal(0, 0.3)])  # [3]
        # [3 dyes, 3 colours] absorbance at unit amount
        self.dyes = DYES * amounts[:, None] * np.exp(rng.normal(0, 0.12, (3, 3))) + rng.uniform(0, 0.06, (3, 3))
        warmth, tint = rng.uniform(-0.05, 0.11), rng.uniform(-0.025, 0.02)
        light = rng.uniform(0.8, 0.99) * np.array([1 + warmth * 0.3, 1 + tint, 1 - warmth * 1.6])
        self.light = np.minimum(light, 0.99)  # [3] transmitted intensity without any dye, 0-1
        self.field = rng.uniform(25, 33)  # width of an image
        self.plasma: Amounts = (rng.uniform(0, 0.05), rng.uniform(0, 0.08), 0.0)  # between the cells
        self.light_slope = rng.normal(0, 0.03, 2)  # relative change from the centre to the right and lower edge
        self.crowding = rng.uniform(0.001, 0.028)  # erythrocytes per square micrometre
        self.pallor = rng.uniform(0.15, 0.95)  # depth of the erythrocytes' pale centre, 0-1
        self.erythrocyte_radius = rng.uniform(3.3, 3.9)  # their mean
        self.crenated = max(0.0, rng.uniform(-0.5, 0.4))  # share of erythrocytes with a scalloped outline
        self.blur = rng.uniform(0.08, 0.22)  # standard deviation of the optics' spread
        self.sharpening = rng.uniform(0.0, 0.7)  # strength of the camera's edge enhancement
        self.noise = rng.uniform(0.003, 0.012)  # standard deviation of the camera's noise, 0-1
        self.contrast = rng.uniform(0.9, 1.15)  # exponent of the camera's tone curve
        self.spread = rng.uniform(0.93, 1.08)  # size of the cells relative to the usual one; a smear flattens them

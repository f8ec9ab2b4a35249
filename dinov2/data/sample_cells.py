"""Drawn blood cells, for demonstrations and tests: no patient's picture, no download, and every label is known.

`draw_cell` paints one field of a smear: erythrocytes, and in the middle a cell of one of ten classes. Three dyes are
laid down as optical densities (azure, eosin, and the haemoglobin's own colour), and light passes through their sum, as
under a microscope. What tells the classes apart is what tells real ones apart: the form of the nucleus, its chromatin,
how much of the cell it fills, and the granules. Stain, light, magnification, sharpness and crowding belong to the slide
and vary more between slides than the classes differ in colour, so a colour histogram cannot solve the task.

`write_sample_cells` writes a whole set: pictures to train on with their lists, labelled cells to probe features with
(train and test from different slides), and patients, each a bag of cells whose mixture depends on the subtype.

Letters: S picture side in pixels. Lengths are in micrometres unless a name ends in `_px`.
"""

import csv
import json
import logging
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dinov2.data.datasets.cells import LABEL_COLUMN, PATH_COLUMN, PATIENT_COLUMN
from dinov2.utils.files import atomic_write

logger = logging.getLogger("dinov2")

DEFAULT_SIZE_PX = 144

# absorbance (natural logarithm) of red, green and blue at unit amount of azure, eosin and haemoglobin, chosen so that
# nuclei, granules and erythrocytes come out as in May-Gruenwald-Giemsa smears
DYES = np.array([[0.84, 0.64, 0.14], [0.05, 0.84, 0.36], [0.10, 0.22, 0.42]])

Amounts = tuple[float, float, float]  # of azure, eosin and haemoglobin
# (x [S, S], y [S, S], radius of the cell, nucleus_size, rng) -> signed distance [S, S] to the edge, negative inside
NucleusShape = Callable[[np.ndarray, np.ndarray, float, float, np.random.Generator], np.ndarray]


# --- what the classes look like -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Granules:
    """Round grains in the cytoplasm; `per_um2` is their number per square micrometre of cytoplasm."""

    dyes: Amounts
    radius: tuple[float, float]
    per_um2: tuple[float, float]
    over_nucleus: float = 0.0  # share of the density that also lies over the nucleus


@dataclass(frozen=True)
class CellForm:
    """How the cells of one class differ from the others; pairs are the ends of a range.

    Attributes:
        radius: of the whole cell.
        cytoplasm: amounts of the dyes.
        nucleus: draws the nucleus, see `_round_nucleus` and the functions after it; None for platelets.
        nucleus_size: a length relative to the cell's radius, whose meaning the drawing function gives.
        clumps: diameter of the chromatin's clumps, and how much they stand out.
        nucleus_dyes: amounts of the dyes where the chromatin has its mean density.
        nucleoli: how many at most.
        rim: how much bluer the cytoplasm is at the cell's edge than inside.
        pale_zone: strength of the pale region beside the nucleus.
        ragged: how far the outline strays from an ellipse.
        nucleus_ragged: how far the nucleus's outline strays from its plain form, in micrometres.
        vacuoles: how many at most.
        granules: kinds of grains, if any.
    """

    radius: tuple[float, float]
    cytoplasm: Amounts
    nucleus: NucleusShape | None = None
    nucleus_size: tuple[float, float] = (0.0, 0.0)
    clumps: tuple[float, float] = (1.0, 0.0)
    nucleus_dyes: Amounts = (1.5, 1.05, 0.0)
    nucleoli: int = 0
    rim: float = 0.0
    pale_zone: float = 0.0
    ragged: float = 0.15
    nucleus_ragged: float = 0.14
    vacuoles: int = 0
    granules: tuple[Granules, ...] = ()


def _round_nucleus(x: np.ndarray, y: np.ndarray, cell: float, size: float, rng: np.random.Generator) -> np.ndarray:
    """An ellipse of radius `size` x the cell's, off the centre, now and then with a shallow dent."""
    radius = size * cell
    axis = rng.uniform(1.0, 1.14)
    off = min(rng.uniform(0.1, 0.9) * (cell - radius), 0.3 * cell)
    distance = _ellipse(x - off, y, radius * axis, radius / axis)
    if rng.random() < 0.25:
        depth = rng.uniform(0.1, 0.28) * radius
        turn = rng.uniform(-2, 2)
        reach = radius * 1.5 - depth
        dent = np.hypot(x - off - reach * np.cos(turn), y - reach * np.sin(turn)) - 0.5 * radius
        distance = -_smooth_min(-distance, dent, 0.5)
    return distance


def _lobed_nucleus(n_lobes: Sequence[int]) -> NucleusShape:
    """Round lobes strung along an arc by thin threads; `size` is the lobes' radius for three of them."""

    def shape(x: np.ndarray, y: np.ndarray, cell: float, size: float, rng: np.random.Generator) -> np.ndarray:
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
            along, across = _turned(x - lobe_x[i], y - lobe_y[i], turn)
            lobes.append(_ellipse(along, across, mean_radius * long, mean_radius / long))
        distance = reduce(lambda a, b: _smooth_min(a, b, 0.12), lobes)
        for i in range(n - 1):
            thread = _segment(x, y, lobe_x[i : i + 2], lobe_y[i : i + 2]) - rng.uniform(0.2, 0.45)
            distance = _smooth_min(distance, thread, 0.3)
        return distance

    return shape


def _curved_nucleus(aperture: tuple[float, float]) -> NucleusShape:
    """A thick arc: a horseshoe for a wide `aperture` (half of its angle), a kidney for a narrow one.

    `size` is half its thickness.
    """

    def shape(x: np.ndarray, y: np.ndarray, cell: float, size: float, rng: np.random.Generator) -> np.ndarray:
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

    return shape


FORMS: dict[str, CellForm] = {
    "neutrophil_segmented": CellForm(
        radius=(5.7, 7.0),
        nucleus=_lobed_nucleus((3, 3, 4, 4, 5)),
        nucleus_size=(0.29, 0.34),
        clumps=(1.1, 0.24),
        cytoplasm=(0.16, 0.20, 0.02),
        granules=(Granules((0.25, 0.35, 0.0), (0.10, 0.17), (1.2, 3.0)),),
    ),
    "neutrophil_band": CellForm(
        radius=(5.7, 7.0),
        nucleus=_curved_nucleus((1.7, 2.45)),
        nucleus_size=(0.21, 0.27),
        clumps=(1.1, 0.24),
        cytoplasm=(0.17, 0.20, 0.02),
        granules=(Granules((0.25, 0.35, 0.0), (0.10, 0.17), (1.2, 3.0)),),
    ),
    "eosinophil": CellForm(
        radius=(5.9, 7.2),
        nucleus=_lobed_nucleus((2, 2, 2, 3)),
        nucleus_size=(0.31, 0.36),
        clumps=(1.1, 0.22),
        cytoplasm=(0.16, 0.22, 0.10),
        granules=(Granules((0.05, 0.46, 0.52), (0.30, 0.42), (2.0, 3.2), 0.05),),
    ),
    "basophil": CellForm(
        radius=(5.2, 6.5),
        nucleus=_lobed_nucleus((2, 3, 3)),
        nucleus_size=(0.36, 0.42),
        clumps=(1.4, 0.15),
        cytoplasm=(0.18, 0.26, 0.0),
        nucleus_dyes=(1.05, 0.9, 0.0),
        granules=(Granules((0.85, 0.62, 0.0), (0.2, 0.5), (1.4, 2.8), 0.5),),
    ),
    "lymphocyte": CellForm(
        radius=(4.3, 5.7),
        nucleus=_round_nucleus,
        nucleus_size=(0.80, 0.90),
        clumps=(1.25, 0.17),
        cytoplasm=(0.46, 0.16, 0.0),
        rim=0.5,
        ragged=0.2,
    ),
    "monocyte": CellForm(
        radius=(6.8, 8.8),
        nucleus=_curved_nucleus((0.95, 1.5)),
        nucleus_size=(0.31, 0.39),
        clumps=(0.8, 0.24),
        cytoplasm=(0.36, 0.22, 0.02),
        nucleus_dyes=(1.2, 0.95, 0.0),
        ragged=0.5,
        nucleus_ragged=0.22,
        vacuoles=7,
        granules=(Granules((0.12, 0.18, 0.0), (0.08, 0.13), (0.8, 2.0)),),
    ),
    "erythroblast": CellForm(
        radius=(4.0, 5.6),
        nucleus=_round_nucleus,
        nucleus_size=(0.50, 0.64),
        clumps=(1.0, 0.24),
        cytoplasm=(0.34, 0.28, 0.30),
        nucleus_dyes=(1.75, 1.2, 0.0),
        ragged=0.2,
        nucleus_ragged=0.07,
    ),
    "myeloblast": CellForm(
        radius=(6.2, 8.2),
        nucleus=_round_nucleus,
        nucleus_size=(0.76, 0.86),
        clumps=(0.55, 0.15),
        cytoplasm=(0.44, 0.16, 0.0),
        nucleus_dyes=(1.1, 0.95, 0.0),
        nucleoli=4,
        rim=0.35,
        ragged=0.25,
    ),
    "promyelocyte": CellForm(
        radius=(7.4, 9.4),
        nucleus=_round_nucleus,
        nucleus_size=(0.56, 0.68),
        clumps=(0.65, 0.18),
        cytoplasm=(0.42, 0.22, 0.0),
        nucleus_dyes=(1.15, 0.95, 0.0),
        nucleoli=2,
        rim=0.2,
        pale_zone=0.6,
        ragged=0.25,
        granules=(Granules((0.45, 0.65, 0.0), (0.17, 0.28), (0.5, 1.4), 0.35),),
    ),
    "platelet": CellForm(
        radius=(1.3, 2.3),
        cytoplasm=(0.26, 0.28, 0.0),
        ragged=0.25,
        granules=(Granules((0.40, 0.50, 0.0), (0.14, 0.24), (2.0, 4.5)),),
    ),
}
CELL_CLASSES = tuple(FORMS)

# The mean mixture of a patient's cells. Every subtype has every class, and what marks it is a minority of the bag.
_USUAL = {
    "neutrophil_segmented": 0.26,
    "neutrophil_band": 0.12,
    "eosinophil": 0.05,
    "basophil": 0.03,
    "lymphocyte": 0.18,
    "monocyte": 0.08,
    "erythroblast": 0.12,
    "myeloblast": 0.04,
    "promyelocyte": 0.04,
    "platelet": 0.08,
}
_MARKS: dict[str, dict[str, float]] = {
    "control": {},
    "PML::RARA": {"promyelocyte": 0.30},
    "NPM1": {"myeloblast": 0.14, "monocyte": 0.18},
    "CBFB::MYH11": {"eosinophil": 0.18, "monocyte": 0.10, "myeloblast": 0.04},
    "RUNX1::RUNX1T1": {"myeloblast": 0.26, "neutrophil_band": 0.06},
}
SUBTYPES: dict[str, dict[str, float]] = {
    subtype: {name: share * (1 - sum(mark.values())) + mark.get(name, 0.0) for name, share in _USUAL.items()}
    for subtype, mark in _MARKS.items()
}


# --- slides ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Slide:
    """What all pictures of one glass slide share, drawn anew for each slide.

    Attributes:
        field: width of a picture, in micrometres.
        dyes: [3 dyes, 3 colours] absorbance at unit amount.
        plasma: amounts of the dyes between the cells.
        light: [3] transmitted intensity without any dye, 0-1.
        light_slope: [2] relative change of the light from the centre to the right and lower edge.
        crowding: erythrocytes per square micrometre.
        pallor: depth of the erythrocytes' pale centre, 0-1.
        erythrocyte_radius: their mean.
        crenated: share of erythrocytes with a scalloped outline.
        blur: standard deviation of the optics' spread, in micrometres.
        sharpening: strength of the camera's edge enhancement.
        noise: standard deviation of the camera's noise, 0-1.
        contrast: exponent of the camera's tone curve.
        spread: size of the cells relative to the usual, as flattened by the smear.
    """

    field: float
    dyes: np.ndarray
    plasma: Amounts
    light: np.ndarray
    light_slope: np.ndarray
    crowding: float
    pallor: float
    erythrocyte_radius: float
    crenated: float
    blur: float
    sharpening: float
    noise: float
    contrast: float
    spread: float

    @classmethod
    def sample(cls, rng: np.random.Generator) -> "Slide":
        """Draw a slide: who stained it for how long, at what pH, and which microscope looked at it."""
        ph = rng.normal(0, 0.22)  # acid buffers favour eosin, alkaline ones azure
        strength = np.exp(rng.normal(0, 0.2))
        amounts = strength * np.exp([-ph, ph, rng.normal(0, 0.3)])  # [3]
        dyes = DYES * amounts[:, None] * np.exp(rng.normal(0, 0.12, (3, 3))) + rng.uniform(0, 0.06, (3, 3))
        warmth, tint = rng.uniform(-0.05, 0.11), rng.uniform(-0.025, 0.02)
        light = rng.uniform(0.8, 0.99) * np.array([1 + warmth * 0.3, 1 + tint, 1 - warmth * 1.6])
        return cls(
            field=rng.uniform(25, 33),
            dyes=dyes,
            plasma=(rng.uniform(0, 0.05), rng.uniform(0, 0.08), 0.0),
            light=np.minimum(light, 0.99),
            light_slope=rng.normal(0, 0.03, 2),
            crowding=rng.uniform(0.001, 0.028),
            pallor=rng.uniform(0.15, 0.95),
            erythrocyte_radius=rng.uniform(3.3, 3.9),
            crenated=max(0.0, rng.uniform(-0.5, 0.4)),
            blur=rng.uniform(0.08, 0.22),
            sharpening=rng.uniform(0.0, 0.7),
            noise=rng.uniform(0.003, 0.012),
            contrast=rng.uniform(0.9, 1.15),
            spread=rng.uniform(0.93, 1.08),
        )


# --- one picture ----------------------------------------------------------------------------------------------------


def draw_cell(cell_class: str, slide: Slide, rng: np.random.Generator, size: int = DEFAULT_SIZE_PX) -> np.ndarray:
    """Draw one cell near the middle of a field of erythrocytes.

    Args:
        cell_class: one of `CELL_CLASSES`.
        slide: stain and optics.
        rng: source of everything else; equal generators give equal pictures.
        size: S; the field stays the same, so a larger picture shows more detail.

    Returns:
        uint8 [S, S, 3], RGB.

    Raises:
        ValueError: for an unknown class.
    """
    if cell_class not in FORMS:
        raise ValueError(f"cell_class: unknown class {cell_class!r}; the classes are {', '.join(CELL_CLASSES)}")
    form = FORMS[cell_class]
    px_per_um = size / slide.field
    radius = rng.uniform(*form.radius) * slide.spread
    centre = slide.field / 2 + rng.normal(0, 1.0, 2)

    amounts = np.empty((3, size, size), dtype=np.float32)
    amounts[:] = np.array(slide.plasma, dtype=np.float32)[:, None, None] * rng.uniform(0.6, 1.4)
    amounts += _erythrocytes(slide, centre, radius, rng, size)
    amounts += _stray_platelets(slide, centre, radius, rng, size)
    cover, cell = _white_cell(form, radius, centre, px_per_um, rng, size)
    amounts *= 1 - cover  # the white cell lies on top, and what is under it was pushed aside
    amounts += cell
    return _photograph(amounts, slide, rng)


def _white_cell(
    form: CellForm, radius: float, centre: np.ndarray, px_per_um: float, rng: np.random.Generator, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cover [S, S], 0-1, of the central cell and its dyes' amounts [3, S, S]."""
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / px_per_um).astype(np.float32)
    x, y = np.meshgrid(axis - np.float32(centre[0]), axis - np.float32(centre[1]))
    x, y = _turned(x, y, rng.uniform(0, 2 * np.pi))

    def bend(grain: float, amplitude: float) -> tuple[np.ndarray, np.ndarray]:
        shift_x, shift_y = (amplitude * _smooth_noise(rng, size, grain * px_per_um) for _ in range(2))
        return x + shift_x, y + shift_y

    ratio = rng.uniform(1.0, 1.08 + 0.2 * form.ragged)
    outline = _ellipse(*bend(0.8 * radius, form.ragged * radius * 0.16), radius * ratio, radius / ratio)
    cover = _inside(outline, px_per_um)

    strength = rng.lognormal(0, 0.12, 3)  # of the three dyes, in this cell
    cytoplasm = 1 + 0.16 * _smooth_noise(rng, size, 1.1 * px_per_um) + 0.10 * _smooth_noise(rng, size, 0.4 * px_per_um)
    cytoplasm *= 1 + form.rim * np.exp(np.minimum(outline, 0) / 0.9)
    azure, eosin, haemoglobin = (np.float32(a) for a in np.multiply(form.cytoplasm, strength))

    inside_nucleus = np.zeros_like(cover)
    if form.nucleus is not None:
        shape = form.nucleus(*bend(2.0, form.nucleus_ragged), radius, rng.uniform(*form.nucleus_size), rng)
        inside_nucleus = _inside(-_smooth_min(-shape, -(outline + 0.25), 0.3), px_per_um)  # it never leaves the cell
        cytoplasm *= 1 - 0.25 * np.exp(-np.maximum(shape, 0) / 0.5)
    if form.pale_zone:
        beside = np.hypot(x + 0.25 * radius, y) / (0.32 * radius)
        cytoplasm *= 1 - form.pale_zone * np.exp(-(beside**2))
    amounts = np.stack([azure * cytoplasm, eosin * (0.5 + 0.5 * cytoplasm), haemoglobin * np.ones_like(cover)])

    if form.nucleus is not None:
        chromatin = _chromatin(form, shape, px_per_um, rng, size)
        dyes = np.multiply(form.nucleus_dyes, strength * rng.uniform(0.85, 1.15)).astype(np.float32)
        amounts += inside_nucleus * (dyes[:, None, None] * chromatin - 0.8 * amounts)
    for granules in form.granules:
        amounts += _granule_amounts(granules, cover, inside_nucleus, strength, px_per_um, rng)
    if form.vacuoles:
        amounts *= 1 - 0.85 * _vacuoles(form.vacuoles, cover, inside_nucleus, px_per_um, rng)
    return cover, amounts * cover


def _chromatin(form: CellForm, shape: np.ndarray, px_per_um: float, rng: np.random.Generator, size: int) -> np.ndarray:
    """Relative density of the nucleus [S, S] around 1: clumps, a darker membrane, thick middle, pale nucleoli."""
    grain, contrast = form.clumps
    clumps = np.tanh(1.6 * _smooth_noise(rng, size, grain * px_per_um))
    fine = _smooth_noise(rng, size, 0.4 * px_per_um)
    depth = np.maximum(-shape, 0)
    density = 1 + contrast * clumps + 0.08 * fine
    density += 0.12 * np.exp(-((depth / 0.25) ** 2)) - 0.22 * np.exp(-depth / 0.45)
    for _ in range(rng.integers(1, form.nucleoli + 1) if form.nucleoli else 0):
        deep = np.argwhere(shape < -1.2)
        if len(deep) == 0:
            break
        row, column = deep[rng.integers(len(deep))]
        rows, columns = np.ogrid[:size, :size]
        distance = np.hypot(rows - row, columns - column) / px_per_um - rng.uniform(0.5, 1.0)
        density *= 1 - rng.uniform(0.3, 0.42) * _inside(distance, 0.5 * px_per_um)
        density += 0.08 * np.exp(-((distance / 0.25) ** 2))
    return np.maximum(density, 0.2).astype(np.float32)


def _granule_amounts(
    granules: Granules,
    cover: np.ndarray,
    inside_nucleus: np.ndarray,
    strength: np.ndarray,
    px_per_um: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Dyes' amounts [3, S, S] of grains thrown at random over the cytoplasm (and thinner over the nucleus)."""
    chance = np.where(inside_nucleus > 0.3, granules.over_nucleus, 1.0) * (cover > 0.75)
    chance *= rng.uniform(*granules.per_um2) / px_per_um**2  # mean number of grains in each pixel
    thrown = np.argwhere(rng.random(chance.shape, dtype=np.float32) < chance)
    centres = thrown + rng.uniform(0, 1, thrown.shape)
    radii = rng.uniform(*granules.radius, len(centres)) * px_per_um
    weights = rng.uniform(0.55, 1.2, len(centres))

    def grain(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        distance = np.hypot(rows, columns) - radii[:, None, None]
        # the edge is 1.2 px wide: grains finer than a pixel still show, as faint dots
        return weights[:, None, None] * np.clip(0.6 - distance / 1.2, 0, 1)

    field = _stamp(centres, granules.radius[1] * px_per_um + 1.0, grain, cover.shape[0])
    field = 1.6 * np.tanh(field / 1.6)
    return np.multiply(granules.dyes, strength).astype(np.float32)[:, None, None] * field


def _vacuoles(
    most: int, cover: np.ndarray, inside_nucleus: np.ndarray, px_per_um: float, rng: np.random.Generator
) -> np.ndarray:
    """Cover [S, S] of clear bubbles in the cytoplasm."""
    free = np.argwhere((cover > 0.95) & (inside_nucleus < 0.05))
    n = rng.integers(0, most + 1)
    if n == 0 or len(free) == 0:
        return np.zeros_like(cover)
    centres = free[rng.integers(len(free), size=n)].astype(np.float64)
    radii = rng.uniform(0.25, 0.75, n)[:, None, None] * px_per_um
    bubbles = _stamp(
        centres,
        0.75 * px_per_um + 2,
        lambda rows, columns: np.clip(0.5 - (np.hypot(rows, columns) - radii) / 1.5, 0, 1),
        cover.shape[0],
    )
    return np.minimum(bubbles, 1)


def _erythrocytes(
    slide: Slide, cell_centre: np.ndarray, cell_radius: float, rng: np.random.Generator, size: int
) -> np.ndarray:
    """Dyes' amounts [3, S, S] of the red cells, which keep clear of the central cell and may overlap each other."""
    px_per_um = size / slide.field
    margin = 1.2 * slide.erythrocyte_radius
    crowding = slide.crowding * rng.uniform(0.4, 1.5)
    n = rng.poisson(crowding * (slide.field + 2 * margin) ** 2)
    places = rng.uniform(-margin, slide.field + margin, (4 * n, 2))  # row, column
    radii = slide.erythrocyte_radius * rng.normal(1, 0.07, 4 * n)
    closeness = rng.uniform(0.7, 1.04, 4 * n)
    kept: list[int] = []
    from_cell = np.hypot(*(places - cell_centre[::-1]).T) - radii * 0.96 - cell_radius
    for i in np.flatnonzero(from_cell > 0):
        gaps = np.hypot(*(places[kept] - places[i]).T) - closeness[i] * (radii[kept] + radii[i])
        if len(kept) < n and (gaps > 0).all():
            kept.append(int(i))
    if not kept:
        return np.zeros((3, size, size), dtype=np.float32)

    n = len(kept)
    radius = radii[kept][:, None, None]
    turn, stretch, tilt = (rng.uniform(low, high, (n, 1, 1)) for low, high in ((0, np.pi), (1.0, 1.14), (-0.25, 0.25)))
    is_crenated = rng.random((n, 1, 1)) < slide.crenated
    waves, phase = rng.integers(9, 14, (n, 1, 1)), rng.uniform(0, 6, (n, 1, 1))
    pallor = np.clip(slide.pallor + rng.normal(0, 0.12, (n, 1, 1)), 0, 1)
    pale_radius = rng.uniform(0.36, 0.58, (n, 1, 1))
    sharpness = rng.uniform(3.0, 10.0, (n, 1, 1))
    density = rng.normal(1, 0.08, (n, 1, 1))

    def red_cell(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        along, across = _turned(columns / px_per_um, rows / px_per_um, turn)
        along, across = along / (radius * stretch), across * stretch / radius
        q = np.sqrt(along**2 + across**2)  # 0 at the centre, 1 at the edge
        edge = 1 + is_crenated * 0.045 * np.cos(waves * np.arctan2(across, along) + phase)
        inside = np.clip(0.5 + (edge - q) * radius * px_per_um, 0, 1)
        pale = 1 / (1 + (np.hypot(along - tilt * 0.5, across) / pale_radius) ** sharpness)
        rim = 0.86 + 0.14 * np.exp(-(((q - 0.8) / 0.18) ** 2))
        return inside * density * rim * (1 - 0.8 * pallor * pale)

    thickness = _stamp(places[kept] * px_per_um, 1.25 * slide.erythrocyte_radius * px_per_um, red_cell, size)
    thickness *= 1 + 0.05 * _smooth_noise(rng, size, 1.2 * px_per_um)
    per_thickness = np.array([0.16, 0.28, 0.34]) * rng.lognormal(0, 0.08, 3)
    return per_thickness.astype(np.float32)[:, None, None] * thickness


def _stray_platelets(
    slide: Slide, cell_centre: np.ndarray, cell_radius: float, rng: np.random.Generator, size: int
) -> np.ndarray:
    """Dyes' amounts [3, S, S] of a few platelets away from the central cell."""
    px_per_um = size / slide.field
    places = rng.uniform(0, slide.field, (rng.poisson(0.7), 2))
    places = places[np.hypot(*(places - cell_centre[::-1]).T) > cell_radius + 1.5]
    radii = rng.uniform(0.6, 1.2, (len(places), 1, 1)) * px_per_um
    spots = _stamp(
        places * px_per_um,
        2.4 * px_per_um,
        lambda rows, columns: np.clip(0.5 + (radii - np.hypot(rows, columns)) / (0.5 * px_per_um), 0, 1),
        size,
    )
    spots *= np.maximum(0.2, 1 + 0.45 * _smooth_noise(rng, size, 0.5 * px_per_um))
    return np.array([0.5, 0.55, 0.0], dtype=np.float32)[:, None, None] * spots


def _photograph(amounts: np.ndarray, slide: Slide, rng: np.random.Generator) -> np.ndarray:
    """Dyes' amounts [3, S, S] -> picture uint8 [S, S, 3]: absorption, optics, camera."""
    size = amounts.shape[-1]
    absorbance = np.einsum("dhw,dc->chw", amounts, slide.dyes.astype(np.float32))
    slope = np.linspace(-1, 1, size, dtype=np.float32)
    light = 1 + np.float32(slide.light_slope[0]) * slope + np.float32(slide.light_slope[1]) * slope[:, None]
    picture = np.exp(-absorbance) * (light * np.float32(rng.uniform(0.96, 1.02)))
    picture *= slide.light.astype(np.float32)[:, None, None]  # [3, S, S]
    px_per_um = size / slide.field
    picture = _blurred(picture, slide.blur * px_per_um * rng.uniform(0.8, 1.5))
    if slide.sharpening > 0.05:
        picture += np.float32(slide.sharpening) * (picture - _blurred(picture, 0.3 * px_per_um))
    picture = np.clip(picture, 0.01, 1) ** np.float32(slide.contrast)
    grain = rng.standard_normal((3, size, size), dtype=np.float32)
    picture += np.float32(slide.noise) * (0.5 + 0.5 * picture) * grain
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)


# --- drawing tools --------------------------------------------------------------------------------------------------


def _turned(x: np.ndarray, y: np.ndarray, angle: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cosine, sine = np.cos(angle), np.sin(angle)
    return cosine * x + sine * y, cosine * y - sine * x


def _ellipse(x: np.ndarray, y: np.ndarray, a: float, b: float) -> np.ndarray:
    """About the signed distance to an ellipse's edge, negative inside; right at the edge and for a = b."""
    return (np.hypot(x / a, y / b) - 1) * np.sqrt(a * b)


def _segment(x: np.ndarray, y: np.ndarray, end_x: np.ndarray, end_y: np.ndarray) -> np.ndarray:
    """Distance to the straight line between two points."""
    dx, dy = end_x[1] - end_x[0], end_y[1] - end_y[0]
    along = np.clip(((x - end_x[0]) * dx + (y - end_y[0]) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - end_x[0] - along * dx, y - end_y[0] - along * dy)


def _smooth_min(a: np.ndarray, b: np.ndarray, width: float) -> np.ndarray:
    """Minimum of two distances whose corner is rounded over `width`."""
    overlap = np.maximum(width - np.abs(a - b), 0)
    return np.minimum(a, b) - overlap * overlap / (4 * width)


def _inside(distance: np.ndarray, px_per_um: float) -> np.ndarray:
    """Share of each pixel inside a shape, from the signed distance to its edge."""
    return np.clip(0.5 - distance * px_per_um, 0, 1).astype(np.float32)


def _smooth_noise(rng: np.random.Generator, size: int, grain_px: float) -> np.ndarray:
    """Noise [S, S] with blobs about `grain_px` wide, mean 0 and standard deviation 1."""
    n = min(size, max(3, round(1.5 * size / grain_px)))
    coarse = Image.fromarray(rng.standard_normal((n, n), dtype=np.float32))
    noise = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    return noise / np.float32(noise.std() + 1e-6)


def _stamp(
    centres_px: np.ndarray, reach_px: float, draw: Callable[[np.ndarray, np.ndarray], np.ndarray], size: int
) -> np.ndarray:
    """Sum [S, S] of small patches, all drawn at once.

    Args:
        centres_px: [n, 2] row and column of each patch's centre; it may lie outside the picture.
        reach_px: beyond it the patches are empty.
        draw: takes [n, w, w] rows and columns relative to the centres, gives [n, w, w].
        size: S.
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


def _blurred(picture: np.ndarray, sigma_px: float) -> np.ndarray:
    """Gaussian blur of [3, S, S] along both sides, with the border repeated."""
    half = max(1, int(np.ceil(2.5 * sigma_px)))
    taps = np.exp(-0.5 * (np.arange(-half, half + 1) / max(sigma_px, 1e-3)) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    for axis in (1, 2):
        width = [(0, 0)] * 3
        width[axis] = (half, half)
        padded = np.pad(picture, width, mode="edge")
        n = picture.shape[axis]
        picture = sum(tap * padded.take(range(i, i + n), axis) for i, tap in enumerate(taps))
    return picture


# --- a contact sheet ------------------------------------------------------------------------------------------------


def contact_sheet(n_slides: int = 5, seed: int = 0, size: int = 96) -> np.ndarray:
    """All classes side by side, named above, a slide in each row.

    Args:
        n_slides: rows.
        seed: decides all that is random.
        size: side of each picture in pixels.

    Returns:
        uint8 [height, width, 3] with one picture of side `size` per class and slide.
    """
    header = 30
    sheet = Image.new("RGB", (len(CELL_CLASSES) * size, header + n_slides * size), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for column, name in enumerate(CELL_CLASSES):
        middle = (column + 0.5) * size
        for line, word in enumerate(name.split("_")):
            pen.text((middle - pen.textlength(word, font) / 2, 2 + 12 * line), word, fill="black", font=font)
        for row in range(n_slides):
            slide = _slide(seed, "contact_sheet", row)
            picture = draw_cell(name, slide, _picture_rng(seed, "contact_sheet", row, column), size)
            sheet.paste(Image.fromarray(picture), (column * size, header + row * size))
    return np.asarray(sheet)


# --- a whole set on disk --------------------------------------------------------------------------------------------

SET_VERSION = 1  # raise it whenever the same settings would give other files
SUMMARY, UNFINISHED = "summary.json", ".unfinished.json"
# slides of each split; how many pictures there are doesn't change them, and no slide is in two splits
N_SLIDES = {"train": 16, "probe_train": 10, "probe_test": 8}
# position = first number of a random stream's key after the seed, so appending is safe and reordering is not
_STREAMS = ("train", "probe_train", "probe_test", "patients", "mixtures", "contact_sheet")
_SECONDS_BETWEEN_REPORTS = 5.0
_MIXTURE_CONCENTRATION = 25.0  # patients of a subtype scatter around its mixture as if it were known from 25 cells


@dataclass(frozen=True)
class _Settings:
    """What decides every byte of a set; stands in its summary."""

    n_train: int
    n_probe_train: int
    n_probe_test: int
    n_patients: int
    cells_per_patient: tuple[int, int]
    size: int
    seed: int

    def check(self) -> None:
        for name in ("n_train", "n_probe_train", "n_probe_test", "n_patients", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative; give 0 or more")
        if self.size < 16:
            raise ValueError(f"size: {self.size} px is too small to show a cell; give at least 16")
        fewest, most = self.cells_per_patient
        if not 1 <= fewest <= most:
            raise ValueError(
                f"cells_per_patient: {fewest} to {most} is no range; give two numbers from 1 up, ascending"
            )


@dataclass(frozen=True)
class _SlidePlan:
    """The pictures of one slide: where they go (relative to the set's folder) and their classes."""

    stream: str
    index: int
    files: list[str]
    cell_classes: list[str]
    label: str = ""  # the subtype, for a patient's slide

    @property
    def name(self) -> str:
        return f"patient_{self.index:03d}" if self.stream == "patients" else f"{self.stream}_slide_{self.index:02d}"


def write_sample_cells(
    output: str | os.PathLike[str],
    n_train: int = 1600,
    n_probe_train: int = 400,
    n_probe_test: int = 400,
    n_patients: int = 30,
    seed: int = 0,
    *,
    size: int = DEFAULT_SIZE_PX,
    cells_per_patient: tuple[int, int] = (24, 40),
    n_workers: int = 1,
) -> dict[str, Any]:
    """Draw a set of pictures into a folder, unless that very set is there already.

    Equal arguments give equal bytes, whatever `n_workers` is. Written are

    - `train/<slide>/*.png` and `lists/<slide>.txt`, unlabelled, for `HemaStandardDataset:root=<output>/lists`;
    - `probe/{train,test}/<class>/*.png` and `probe/{train,test}.csv`, labelled with the cell's class. A slide stands
      for a patient there, and train and test share none;
    - `patients/<patient>/*.png` and `patients.csv`, labelled with the patient's subtype (`SUBTYPES`); what no clinic
      would know, each of these cells' class, is in `patients_cell_classes.csv`, to hold attention against;
    - `summary.json`, last: without it the set is unfinished, and the next call draws it again.

    All CSVs have the columns `Image Path,Label,patient`; paths count from the CSV's (or list's) own folder.

    Args:
        output: an empty or missing folder, or one that an earlier call wrote.
        n_train: unlabelled pictures; classes are balanced up to one picture, here and in the two probe splits.
        n_probe_train: labelled pictures to fit probes on.
        n_probe_test: labelled pictures to test probes on.
        n_patients: bags of cells; subtypes are balanced up to one patient.
        seed: decides all that is random.
        size: side of the pictures in pixels.
        cells_per_patient: fewest and most cells of a patient.
        n_workers: processes. With more than one, call this under `if __name__ == "__main__":`.

    Returns:
        what `summary.json` holds: version, settings, and counts of pictures, slides, classes and subtypes.

    Raises:
        FileExistsError: `output` holds something else, or a set of other settings.
        ValueError: for a negative count or an empty range.
    """
    output = Path(output)
    settings = _Settings(n_train, n_probe_train, n_probe_test, n_patients, cells_per_patient, size, seed)
    settings.check()
    plans = _plan(settings)
    summary = _summary(settings, plans)
    if _is_finished(output, plans, summary):
        logger.info("sample cells: %s already holds this set of %d pictures", output, summary["pictures"])
        return summary

    with atomic_write(output / UNFINISHED, "w") as file:
        json.dump(_identity(summary), file)
    _draw_all(output, plans, settings, n_workers)
    _write_tables(output, plans)
    with atomic_write(output / SUMMARY, "w") as file:
        json.dump(summary, file, indent=2)
        file.write("\n")
    (output / UNFINISHED).unlink()
    return summary


def _plan(settings: _Settings) -> list[_SlidePlan]:
    """Every slide of the set with its pictures, in the order of the tables."""
    counts = {
        "train": settings.n_train,
        "probe_train": settings.n_probe_train,
        "probe_test": settings.n_probe_test,
    }
    plans = []
    for stream, count in counts.items():
        # a class after the other, and the next slide after a round of them: no slide lacks a class
        rounds = [(i // len(CELL_CLASSES), CELL_CLASSES[i % len(CELL_CLASSES)]) for i in range(count)]
        for index in range(N_SLIDES[stream]):
            cell_classes = [name for turn, name in rounds if turn % N_SLIDES[stream] == index]
            if cell_classes:
                plans.append(_SlidePlan(stream, index, _split_files(stream, index, cell_classes), cell_classes))
    return plans + [_patient_plan(settings, index) for index in range(settings.n_patients)]


def _split_files(stream: str, slide: int, cell_classes: list[str]) -> list[str]:
    stems = [f"{stream}_{slide:02d}_{i:04d}.png" for i in range(len(cell_classes))]
    if stream == "train":
        return [f"train/slide_{slide:02d}/{stem}" for stem in stems]
    folder = stream.replace("_", "/")
    return [f"{folder}/{name}/{stem}" for name, stem in zip(cell_classes, stems, strict=True)]


def _patient_plan(settings: _Settings, index: int) -> _SlidePlan:
    subtype = list(SUBTYPES)[index % len(SUBTYPES)]
    rng = _rng(settings.seed, "mixtures", index)
    n_cells = int(rng.integers(settings.cells_per_patient[0], settings.cells_per_patient[1] + 1))
    mean_mixture = np.array([SUBTYPES[subtype][name] for name in CELL_CLASSES])
    mixture = rng.dirichlet(_MIXTURE_CONCENTRATION * mean_mixture)
    cell_classes = [CELL_CLASSES[i] for i in rng.choice(len(CELL_CLASSES), n_cells, p=mixture)]
    files = [f"patients/patient_{index:03d}/patient_{index:03d}_{i:03d}.png" for i in range(n_cells)]
    return _SlidePlan("patients", index, files, cell_classes, subtype)


def _summary(settings: _Settings, plans: list[_SlidePlan]) -> dict[str, Any]:
    streams = ("train", "probe_train", "probe_test", "patients")
    classes = {s: Counter(chain.from_iterable(p.cell_classes for p in plans if p.stream == s)) for s in streams}
    subtypes = Counter(plan.label for plan in plans if plan.stream == "patients")
    return {
        "version": SET_VERSION,
        "settings": {**asdict(settings), "cells_per_patient": list(settings.cells_per_patient)},
        "pictures": sum(len(plan.files) for plan in plans),
        "slides": {s: sum(plan.stream == s for plan in plans) for s in streams},
        "classes": {s: {name: counts[name] for name in CELL_CLASSES} for s, counts in classes.items()},
        "subtypes": {name: subtypes[name] for name in SUBTYPES},
    }


def _identity(summary: dict[str, Any]) -> dict[str, Any]:
    return {"version": summary["version"], "settings": summary["settings"]}


def _is_finished(output: Path, plans: list[_SlidePlan], summary: dict[str, Any]) -> bool:
    """Whether `output` holds the whole of this set; False also for a free folder and for a part of this set."""
    if not output.exists() or (output.is_dir() and all(entry.name.startswith(".") for entry in output.iterdir())):
        return False
    for name in (UNFINISHED, SUMMARY):
        found = _read_identity(output / name)
        if found is None:
            continue
        if found != _identity(summary):
            raise FileExistsError(
                f"output: {str(output)!r} holds another set of sample cells, {_difference(found, _identity(summary))}; "
                f"give another folder, or delete this one to have it drawn anew"
            )
        return name == SUMMARY and all((output / path).is_file() for plan in plans for path in plan.files)
    raise FileExistsError(
        f"output: {str(output)!r} is not empty and holds no sample cells ({SUMMARY} is missing or not theirs); "
        f"give an empty or new folder"
    )


def _read_identity(file: Path) -> dict[str, Any] | None:
    """Version and settings of the set whose summary or mark this is; None if it is not there or something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    if not (isinstance(found, dict) and "version" in found and isinstance(found.get("settings"), dict)):
        return None
    return _identity(found)


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    pairs = [("version", found["version"], wanted["version"])]
    pairs += [(key, found["settings"].get(key), value) for key, value in wanted["settings"].items()]
    return ", ".join(f"{key} {there} where {here} is asked for" for key, there, here in pairs if there != here)


def _draw_all(output: Path, plans: list[_SlidePlan], settings: _Settings, n_workers: int) -> None:
    n_all = sum(len(plan.files) for plan in plans)
    n_done, start = 0, time.monotonic()
    reported = start
    logger.info("sample cells: drawing %d pictures of %d slides into %s", n_all, len(plans), output)
    for n in _draw_slides(output, plans, settings, n_workers):
        n_done += n
        now = time.monotonic()
        if now - reported >= _SECONDS_BETWEEN_REPORTS:
            reported, rate = now, n_done / (now - start)
            message = "sample cells: %d of %d pictures, %.0f a second, %.0f s left"
            logger.info(message, n_done, n_all, rate, (n_all - n_done) / rate)
    logger.info("sample cells: %d pictures in %.0f s", n_all, time.monotonic() - start)


def _draw_slides(output: Path, plans: list[_SlidePlan], settings: _Settings, n_workers: int) -> Iterator[int]:
    """Draw slide after slide; yields the number of pictures whenever one is done."""
    jobs = [(output, plan, settings.seed, settings.size) for plan in plans]
    if n_workers <= 1 or len(jobs) <= 1:
        yield from map(_draw_slide, jobs)
        return
    # a forked child may hang on locks that the parent's other threads (PyTorch's, for one) held at that moment
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(n_workers, len(jobs)), mp_context=context) as pool:
        yield from pool.map(_draw_slide, jobs)


def _draw_slide(job: tuple[Path, _SlidePlan, int, int]) -> int:
    """Draw and write the pictures of one slide; returns their number."""
    output, plan, seed, size = job
    slide = _slide(seed, plan.stream, plan.index)
    for folder in {os.path.dirname(file) for file in plan.files}:
        (output / folder).mkdir(parents=True, exist_ok=True)
    for i, (file, cell_class) in enumerate(zip(plan.files, plan.cell_classes, strict=True)):
        picture = draw_cell(cell_class, slide, _picture_rng(seed, plan.stream, plan.index, i), size)
        # neither atomic nor synced, which costs more than drawing: until the summary is there, all are drawn again
        Image.fromarray(picture).save(output / file, compress_level=2)
    return len(plan.files)


def _write_tables(output: Path, plans: list[_SlidePlan]) -> None:
    """The path lists of the unlabelled pictures, and the CSVs."""
    for plan in plans:
        if plan.stream == "train":
            with atomic_write(output / "lists" / f"slide_{plan.index:02d}.txt", "w") as file:
                file.writelines(f"../{path}\n" for path in plan.files)
    by_stream = {stream: [plan for plan in plans if plan.stream == stream] for stream in _STREAMS}
    _write_csv(output / "probe" / "train.csv", by_stream["probe_train"])
    _write_csv(output / "probe" / "test.csv", by_stream["probe_test"])
    _write_csv(output / "patients.csv", by_stream["patients"])
    _write_csv(output / "patients_cell_classes.csv", [replace(plan, label="") for plan in by_stream["patients"]])


def _write_csv(table: Path, plans: list[_SlidePlan]) -> None:
    """A row per picture with its slide's label or else its own class; no file if there are no pictures."""
    if not plans:
        return
    with atomic_write(table, "w") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow([PATH_COLUMN, LABEL_COLUMN, PATIENT_COLUMN])
        for plan in plans:
            for path, cell_class in zip(plan.files, plan.cell_classes, strict=True):
                # the probe's tables lie in the folder probe/, and paths count from there
                rows.writerow([path.removeprefix("probe/"), plan.label or cell_class, plan.name])


def _rng(seed: int, stream: str, *key: int) -> np.random.Generator:
    return np.random.default_rng([seed, _STREAMS.index(stream), *key])


def _slide(seed: int, stream: str, index: int) -> Slide:
    return Slide.sample(_rng(seed, stream, index))


def _picture_rng(seed: int, stream: str, slide: int, picture: int) -> np.random.Generator:
    # NumPy pads a key with zeros, so picture 0's would be the slide's own: counted from 1
    return _rng(seed, stream, slide, picture + 1)

"""Drawn blood cells, one picture at a time: no patient's picture, no download, and every label is known.

`draw_cell` paints one field of a smear: erythrocytes, and in the middle a cell of one of ten classes. Three dyes are
laid down as optical densities (azure, eosin, and the haemoglobin's own colour), and light passes through their sum, as
under a microscope. What tells the classes apart is what tells real ones apart: the form of the nucleus, its chromatin,
how much of the cell it fills, and the granules. Stain, light, magnification, sharpness and crowding belong to the slide
and vary more between slides than the classes differ in colour, so a colour histogram cannot solve the task.

Whole sets of such pictures are written by `dinov2.data.sample_cells`.

Letters: S picture side in pixels. Lengths are in micrometres unless a name ends in `_px`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from PIL import Image

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

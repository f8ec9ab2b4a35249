"""Draw one cell. Letters: S image side in pixels; lengths are in micrometres unless a name ends in `_px`.

`draw_cell` paints one field of a smear: erythrocytes, and in the middle a cell of one of ten classes. Three dyes are
laid down as optical densities (azure, eosin, and the haemoglobin's own colour), and light passes through their sum, as
under a microscope.
"""

import numpy as np

from dinov2.data.sample_cells.forms import CELL_CLASSES, FORMS, CellForm, Granules, Slide
from dinov2.data.sample_cells.geometry import blurred, discs, ellipse, inside, smooth_min, smooth_noise, stamp, turned

DEFAULT_SIZE_PX = 144


def draw_cell(cell_class: str, slide: Slide, rng: np.random.Generator, size: int = DEFAULT_SIZE_PX) -> np.ndarray:
    """Draw one cell near the middle of a field of erythrocytes: RGB, uint8 [S, S, 3].

    Equal generators give equal images. The field stays the same, so a larger image shows more detail.

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
    x, y = turned(x, y, rng.uniform(0, 2 * np.pi))

    def bend(grain: float, amplitude: float) -> tuple[np.ndarray, np.ndarray]:
        shift_x, shift_y = (amplitude * smooth_noise(rng, size, grain * px_per_um) for _ in range(2))
        return x + shift_x, y + shift_y

    ratio = rng.uniform(1.0, 1.08 + 0.2 * form.ragged)
    outline = ellipse(*bend(0.8 * radius, form.ragged * radius * 0.16), radius * ratio, radius / ratio)
    cover = inside(outline, px_per_um)

    strength = rng.lognormal(0, 0.12, 3)  # of the three dyes, in this cell
    cytoplasm = 1 + 0.16 * smooth_noise(rng, size, 1.1 * px_per_um) + 0.10 * smooth_noise(rng, size, 0.4 * px_per_um)
    cytoplasm *= 1 + form.rim * np.exp(np.minimum(outline, 0) / 0.9)
    azure, eosin, haemoglobin = (np.float32(a) for a in np.multiply(form.cytoplasm, strength))

    inside_nucleus = np.zeros_like(cover)
    if form.nucleus is not None:
        shape = form.nucleus(*bend(2.0, form.nucleus_ragged), radius, rng.uniform(*form.nucleus_size), rng)
        inside_nucleus = inside(-smooth_min(-shape, -(outline + 0.25), 0.3), px_per_um)  # it never leaves the cell
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
    clumps = np.tanh(1.6 * smooth_noise(rng, size, grain * px_per_um))
    fine = smooth_noise(rng, size, 0.4 * px_per_um)
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
        density *= 1 - rng.uniform(0.3, 0.42) * inside(distance, 0.5 * px_per_um)
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
    field = discs(centres, radii + 0.12, 1.2, cover.shape[0], weights)  # finer than a pixel they show as faint dots
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
    radii = rng.uniform(0.25, 0.75, n) * px_per_um
    return np.minimum(discs(centres, radii, 1.5, cover.shape[0]), 1)


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
        along, across = turned(columns / px_per_um, rows / px_per_um, turn)
        along, across = along / (radius * stretch), across * stretch / radius
        q = np.sqrt(along**2 + across**2)  # 0 at the centre, 1 at the edge
        edge = 1 + is_crenated * 0.045 * np.cos(waves * np.arctan2(across, along) + phase)
        cover = np.clip(0.5 + (edge - q) * radius * px_per_um, 0, 1)
        pale = 1 / (1 + (np.hypot(along - tilt * 0.5, across) / pale_radius) ** sharpness)
        rim = 0.86 + 0.14 * np.exp(-(((q - 0.8) / 0.18) ** 2))
        return cover * density * rim * (1 - 0.8 * pallor * pale)

    thickness = stamp(places[kept] * px_per_um, 1.25 * slide.erythrocyte_radius * px_per_um, red_cell, size)
    thickness *= 1 + 0.05 * smooth_noise(rng, size, 1.2 * px_per_um)
    per_thickness = np.array([0.16, 0.28, 0.34]) * rng.lognormal(0, 0.08, 3)
    return per_thickness.astype(np.float32)[:, None, None] * thickness


def _stray_platelets(
    slide: Slide, cell_centre: np.ndarray, cell_radius: float, rng: np.random.Generator, size: int
) -> np.ndarray:
    """Dyes' amounts [3, S, S] of a few platelets away from the central cell."""
    px_per_um = size / slide.field
    places = rng.uniform(0, slide.field, (rng.poisson(0.7), 2))
    places = places[np.hypot(*(places - cell_centre[::-1]).T) > cell_radius + 1.5]
    radii = rng.uniform(0.6, 1.2, len(places)) * px_per_um
    spots = discs(places * px_per_um, radii, 0.5 * px_per_um, size)
    spots *= np.maximum(0.2, 1 + 0.45 * smooth_noise(rng, size, 0.5 * px_per_um))
    return np.array([0.5, 0.55, 0.0], dtype=np.float32)[:, None, None] * spots


def _photograph(amounts: np.ndarray, slide: Slide, rng: np.random.Generator) -> np.ndarray:
    """Dyes' amounts [3, S, S] -> image uint8 [S, S, 3]: absorption, optics, camera."""
    size = amounts.shape[-1]
    absorbance = np.einsum("dhw,dc->chw", amounts, slide.dyes.astype(np.float32))
    slope = np.linspace(-1, 1, size, dtype=np.float32)
    light = 1 + np.float32(slide.light_slope[0]) * slope + np.float32(slide.light_slope[1]) * slope[:, None]
    image = np.exp(-absorbance) * (light * np.float32(rng.uniform(0.96, 1.02)))
    image *= slide.light.astype(np.float32)[:, None, None]  # [3, S, S]
    px_per_um = size / slide.field
    image = blurred(image, slide.blur * px_per_um * rng.uniform(0.8, 1.5))
    if slide.sharpening > 0.05:
        image += np.float32(slide.sharpening) * (image - blurred(image, 0.3 * px_per_um))
    image = np.clip(image, 0.01, 1) ** np.float32(slide.contrast)
    grain = rng.standard_normal((3, size, size), dtype=np.float32)
    image += np.float32(slide.noise) * (0.5 + 0.5 * image) * grain
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)

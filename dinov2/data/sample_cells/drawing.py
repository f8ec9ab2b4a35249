"""Draw one cell: a field of erythrocytes of a smear with a cell of one of ten classes in the middle.

Three dyes are laid down as optical densities (azure, eosin, and haemoglobin's own colour), and light passes through
their sum, as under a microscope.

Letters: S image side in pixels, n objects, w side of a stamp in pixels. Lengths are in micrometres unless a name ends
in `_px`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dinov2.data.sample_cells.forms import CELL_CLASSES, FORMS, CellForm, Granules, Slide, ellipse, smooth_min, turned

DEFAULT_SIZE_PX = 144


def draw_cell(cell_class: str, slide: Slide, rng: np.random.Generator, size: int = DEFAULT_SIZE_PX) -> np.ndarray:
    """Draw one cell near the middle of a field of erythrocytes: RGB, uint8 [S, S, 3].

    Equal generators give equal images. A larger `size` shows the same field with more detail.
    """
    if cell_class not in FORMS:
        raise ValueError(f"cell_class: unknown class {cell_class!r}; the classes are {', '.join(CELL_CLASSES)}")
    form = FORMS[cell_class]
    canvas = Canvas(size, size / slide.field, rng)
    radius = rng.uniform(*form.radius) * slide.spread
    centre = slide.field / 2 + rng.normal(0, 1.0, 2)

    amounts = np.empty((3, size, size), dtype=np.float32)  # of each dye
    amounts[:] = np.array(slide.plasma, dtype=np.float32)[:, None, None] * rng.uniform(0.6, 1.4)
    amounts += _erythrocytes(slide, centre, radius, canvas)
    amounts += _stray_platelets(slide, centre, radius, canvas)
    cover, cell = _white_cell(form, radius, centre, canvas)
    amounts *= 1 - cover  # the white cell pushes everything else aside
    amounts += cell
    return _photograph(amounts, slide, canvas)


@dataclass(frozen=True)
class Canvas:
    """The grid of pixels to draw on, and the source of randomness."""

    size: int
    px_per_um: float
    rng: np.random.Generator

    def noise(self, grain: float) -> np.ndarray:
        """Draw noise [S, S] with blobs about `grain` wide, mean 0 and standard deviation 1."""
        n = min(self.size, max(3, round(1.5 * self.size / (grain * self.px_per_um))))
        coarse = Image.fromarray(self.rng.standard_normal((n, n), dtype=np.float32))
        noise = np.asarray(coarse.resize((self.size, self.size), Image.Resampling.BICUBIC))
        return noise / np.float32(noise.std() + 1e-6)

    def inside(self, distance: np.ndarray) -> np.ndarray:
        """Return the share of each pixel inside a shape, from the signed distance to its edge."""
        return np.clip(0.5 - distance * self.px_per_um, 0, 1).astype(np.float32)

    def stamp(
        self, centres_px: np.ndarray, reach_px: float, draw: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Add up small patches around n centres, [n, 2] (row, column), which may lie outside the image: [S, S].

        `draw` gets rows [n, w, 1] and columns [n, 1, w] relative to the centres, and returns [n, w, w], 0 beyond
        `reach_px`.
        """
        size, half = self.size, int(np.ceil(reach_px))
        row, column = centres_px.T.reshape(2, -1, 1, 1)
        rows = np.floor(row).astype(np.int64) + np.arange(-half, half + 1)[:, None]
        columns = np.floor(column).astype(np.int64) + np.arange(-half, half + 1)
        patches = draw((rows + 0.5 - row).astype(np.float32), (columns + 0.5 - column).astype(np.float32))
        is_within = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)  # [n, w, w]
        pixels = (rows * size + columns)[is_within]
        return np.bincount(pixels, patches[is_within], size * size).reshape(size, size).astype(np.float32)

    def discs(
        self, centres_px: np.ndarray, radii_px: np.ndarray, edge_px: float, weights: float | np.ndarray = 1.0
    ) -> np.ndarray:
        """Add up n round spots with edges `edge_px` wide: [S, S]."""
        shape = (-1, 1, 1)

        def disc(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
            distance = np.hypot(rows, columns) - radii_px.reshape(shape)
            return np.reshape(weights, shape) * np.clip(0.5 - distance / edge_px, 0, 1)

        return self.stamp(centres_px, radii_px.max(initial=0) + edge_px, disc)


def _white_cell(form: CellForm, radius: float, centre: np.ndarray, canvas: Canvas) -> tuple[np.ndarray, np.ndarray]:
    """Draw the central cell: its cover [S, S], 0-1, and the amounts of its dyes [3, S, S]."""
    rng = canvas.rng
    axis = ((np.arange(canvas.size, dtype=np.float32) + 0.5) / canvas.px_per_um).astype(np.float32)
    x, y = np.meshgrid(axis - np.float32(centre[0]), axis - np.float32(centre[1]))
    x, y = turned(x, y, rng.uniform(0, 2 * np.pi))

    def bend(grain: float, amplitude: float) -> tuple[np.ndarray, np.ndarray]:
        shift_x, shift_y = (amplitude * canvas.noise(grain) for _ in range(2))
        return x + shift_x, y + shift_y

    ratio = rng.uniform(1.0, 1.08 + 0.2 * form.ragged)
    outline = ellipse(*bend(0.8 * radius, form.ragged * radius * 0.16), radius * ratio, radius / ratio)
    cover = canvas.inside(outline)

    strength = rng.lognormal(0, 0.12, 3)  # of the three dyes, in this cell
    cytoplasm = 1 + 0.16 * canvas.noise(1.1) + 0.10 * canvas.noise(0.4)
    cytoplasm *= 1 + form.rim * np.exp(np.minimum(outline, 0) / 0.9)
    azure, eosin, haemoglobin = (np.float32(a) for a in np.multiply(form.cytoplasm, strength))

    in_nucleus = np.zeros_like(cover)
    if form.nucleus is not None:
        shape = form.nucleus(*bend(2.0, form.nucleus_ragged), radius, rng.uniform(*form.nucleus_size), rng)
        in_nucleus = canvas.inside(-smooth_min(-shape, -(outline + 0.25), 0.3))  # it never leaves the cell
        cytoplasm *= 1 - 0.25 * np.exp(-np.maximum(shape, 0) / 0.5)
    if form.pale_zone:
        beside = np.hypot(x + 0.25 * radius, y) / (0.32 * radius)
        cytoplasm *= 1 - form.pale_zone * np.exp(-(beside**2))
    amounts = np.stack([azure * cytoplasm, eosin * (0.5 + 0.5 * cytoplasm), haemoglobin * np.ones_like(cover)])

    if form.nucleus is not None:
        chromatin = _chromatin(form, shape, canvas)
        dyes = np.multiply(form.nucleus_dyes, strength * rng.uniform(0.85, 1.15)).astype(np.float32)
        amounts += in_nucleus * (dyes[:, None, None] * chromatin - 0.8 * amounts)
    for granules in form.granules:
        amounts += _granule_amounts(granules, cover, in_nucleus, strength, canvas)
    if form.vacuoles:
        amounts *= 1 - 0.85 * _vacuoles(form.vacuoles, cover, in_nucleus, canvas)
    return cover, amounts * cover


def _chromatin(form: CellForm, shape: np.ndarray, canvas: Canvas) -> np.ndarray:
    """Draw the density of the nucleus [S, S], around 1: clumps, a darker membrane, pale nucleoli."""
    grain, contrast = form.clumps
    clumps = np.tanh(1.6 * canvas.noise(grain))
    fine = canvas.noise(0.4)
    depth = np.maximum(-shape, 0)
    density = 1 + contrast * clumps + 0.08 * fine
    density += 0.12 * np.exp(-((depth / 0.25) ** 2)) - 0.22 * np.exp(-depth / 0.45)
    rng, size = canvas.rng, canvas.size
    for _ in range(rng.integers(1, form.nucleoli + 1) if form.nucleoli else 0):
        deep = np.argwhere(shape < -1.2)
        if len(deep) == 0:
            break
        row, column = deep[rng.integers(len(deep))]
        rows, columns = np.ogrid[:size, :size]
        distance = np.hypot(rows - row, columns - column) / canvas.px_per_um - rng.uniform(0.5, 1.0)
        density *= 1 - rng.uniform(0.3, 0.42) * canvas.inside(0.5 * distance)
        density += 0.08 * np.exp(-((distance / 0.25) ** 2))
    return np.maximum(density, 0.2).astype(np.float32)


def _granule_amounts(
    granules: Granules, cover: np.ndarray, in_nucleus: np.ndarray, strength: np.ndarray, canvas: Canvas
) -> np.ndarray:
    """Draw grains at random over the cytoplasm, fewer over the nucleus: the amounts of their dyes [3, S, S]."""
    rng, px_per_um = canvas.rng, canvas.px_per_um
    chance = np.where(in_nucleus > 0.3, granules.over_nucleus, 1.0) * (cover > 0.75)
    chance *= rng.uniform(*granules.per_um2) / px_per_um**2  # mean number of grains in each pixel
    pixels = np.argwhere(rng.random(chance.shape, dtype=np.float32) < chance)
    centres = pixels + rng.uniform(0, 1, pixels.shape)
    radii = rng.uniform(*granules.radius, len(centres)) * px_per_um
    weights = rng.uniform(0.55, 1.2, len(centres))
    field = canvas.discs(centres, radii + 0.12, 1.2, weights)  # grains finer than a pixel become faint dots
    field = 1.6 * np.tanh(field / 1.6)
    return np.multiply(granules.dyes, strength).astype(np.float32)[:, None, None] * field


def _vacuoles(most: int, cover: np.ndarray, in_nucleus: np.ndarray, canvas: Canvas) -> np.ndarray:
    """Draw the cover [S, S] of at most `most` clear bubbles in the cytoplasm."""
    rng = canvas.rng
    free = np.argwhere((cover > 0.95) & (in_nucleus < 0.05))
    n = rng.integers(0, most + 1)
    if n == 0 or len(free) == 0:
        return np.zeros_like(cover)
    centres = free[rng.integers(len(free), size=n)].astype(np.float64)
    radii = rng.uniform(0.25, 0.75, n) * canvas.px_per_um
    return np.minimum(canvas.discs(centres, radii, 1.5), 1)


def _erythrocytes(slide: Slide, cell_centre: np.ndarray, cell_radius: float, canvas: Canvas) -> np.ndarray:
    """Draw red cells around the central cell, some of them overlapping: the amounts of their dyes [3, S, S]."""
    rng, size, px_per_um = canvas.rng, canvas.size, canvas.px_per_um
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

    thickness = canvas.stamp(places[kept] * px_per_um, 1.25 * slide.erythrocyte_radius * px_per_um, red_cell)
    thickness *= 1 + 0.05 * canvas.noise(1.2)
    per_thickness = np.array([0.16, 0.28, 0.34]) * rng.lognormal(0, 0.08, 3)
    return per_thickness.astype(np.float32)[:, None, None] * thickness


def _stray_platelets(slide: Slide, cell_centre: np.ndarray, cell_radius: float, canvas: Canvas) -> np.ndarray:
    """Draw a few platelets outside the central cell: the amounts of their dyes [3, S, S]."""
    rng, px_per_um = canvas.rng, canvas.px_per_um
    places = rng.uniform(0, slide.field, (rng.poisson(0.7), 2))
    places = places[np.hypot(*(places - cell_centre[::-1]).T) > cell_radius + 1.5]
    radii = rng.uniform(0.6, 1.2, len(places)) * px_per_um
    spots = canvas.discs(places * px_per_um, radii, 0.5 * px_per_um)
    spots *= np.maximum(0.2, 1 + 0.45 * canvas.noise(0.5))
    return np.array([0.5, 0.55, 0.0], dtype=np.float32)[:, None, None] * spots


def _photograph(amounts: np.ndarray, slide: Slide, canvas: Canvas) -> np.ndarray:
    """Turn the amounts of the dyes [3, S, S] into an image, uint8 [S, S, 3]: absorption, optics, camera."""
    rng, px_per_um = canvas.rng, canvas.px_per_um
    absorbance = np.einsum("dhw,dc->chw", amounts, slide.dyes.astype(np.float32))
    slope = np.linspace(-1, 1, canvas.size, dtype=np.float32)
    light = 1 + np.float32(slide.light_slope[0]) * slope + np.float32(slide.light_slope[1]) * slope[:, None]
    image = np.exp(-absorbance) * (light * np.float32(rng.uniform(0.96, 1.02)))
    image *= slide.light.astype(np.float32)[:, None, None]  # [3, S, S]
    image = _blurred(image, slide.blur * px_per_um * rng.uniform(0.8, 1.5))
    if slide.sharpening > 0.05:
        image += np.float32(slide.sharpening) * (image - _blurred(image, 0.3 * px_per_um))
    image = np.clip(image, 0.01, 1) ** np.float32(slide.contrast)
    grain = rng.standard_normal((3, canvas.size, canvas.size), dtype=np.float32)
    image += np.float32(slide.noise) * (0.5 + 0.5 * image) * grain
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)


def _blurred(image: np.ndarray, sigma_px: float) -> np.ndarray:
    """Blur [3, S, S] with a Gaussian along both sides; the border is repeated."""
    half = max(1, int(np.ceil(2.5 * sigma_px)))
    taps = np.exp(-0.5 * (np.arange(-half, half + 1) / max(sigma_px, 1e-3)) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    size = image.shape[-1]
    padded = np.pad(image, ((0, 0), (half, half), (half, half)), mode="edge")
    rows = sum(tap * padded[:, i : i + size] for i, tap in enumerate(taps))
    return sum(tap * rows[:, :, i : i + size] for i, tap in enumerate(taps))

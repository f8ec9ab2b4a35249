"""Show what a network sees in single cells: PCA of patch tokens, attention, rollout, occlusion and similarity.

    python dinov2/eval/cell_maps.py --checkpoint DinoBloom-S.pth --data cells/ --output-dir maps/

writes a PNG per kind, `cells.png` with all kinds, and the page `cells.html`, in which a click on a patch shows similar
patches. `dinov2.eval.maps.patch_maps` has the formulas.

Dimension key:  N images, h x w patches of each, P = h * w
"""

import argparse
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
from PIL import Image, ImageDraw

from dinov2.eval.extract_features import CELLS_HELP, add_embedder_arguments, embedder_from, positive_int
from dinov2.eval.features.extract import Embedder
from dinov2.eval.maps.patch_maps import (
    PALETTE,
    TITLES,
    CellMaps,
    backbone_of,
    border_share,
    choose_images,
    colour_map,
    levels,
    make_cell_maps,
)
from dinov2.eval.pages.page import Section, html, image_uri, render, write_page
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code
from dinov2.utils.files import atomic_write

DEFAULT_N = 12
TILE_PX, TITLE_PX, HEADER_PX, GAP_PX = 140, 150, 34, 4
IMAGE_PX = 280  # on the page
LETTERS = 22  # of a line of text, about the width of a tile


def sheet(rows: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Return one image, uint8 [height, width, 3], of titled rows, with the images of a cell below each other.

    The images are uint8 [N, any, any, 3]; patches are enlarged without smoothing. The first slash divides a name.
    """
    step = TILE_PX + GAP_PX
    canvas = Image.new("RGB", (TITLE_PX + len(names) * step, HEADER_PX + len(rows) * step), "white")
    for column, name in enumerate(names):
        half = LETTERS // 2 - 2
        parts = name.split("/", 1)
        lines = "\n".join(part if len(part) <= LETTERS else f"{part[:half]}...{part[-half:]}" for part in parts)
        canvas.paste(_text(lines, TILE_PX, HEADER_PX), (TITLE_PX + column * step, 0))
    for row, (title, images) in enumerate(rows.items()):
        top = HEADER_PX + row * step
        canvas.paste(_text(textwrap.fill(title, LETTERS), TITLE_PX - 4, TILE_PX // 2), (4, top + TILE_PX // 3))
        for column, image in enumerate(images):
            resampling = Image.Resampling.NEAREST if len(image) < TILE_PX else Image.Resampling.LANCZOS
            tile = Image.fromarray(image).resize((TILE_PX, TILE_PX), resampling)
            canvas.paste(tile, (TITLE_PX + column * step, top))
    return np.asarray(canvas)


def _text(text: str, width: int, height: int) -> Image.Image:
    """Draw text on white, cut off at the edges."""
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text((0, 2), text, fill="black", font_size=12)
    return image


def sheets(maps: CellMaps) -> dict[str, np.ndarray]:
    """Return the images that the command writes: {file name without ending: uint8 [height, width, 3]}."""
    row, column = (n // 2 for n in maps.grid)
    to_middle = maps.similarity[:, row * maps.grid[1] + column].reshape(-1, *maps.grid)
    similarity = {f"similarity to row {row + 1}, column {column + 1}": colour_map(to_middle.astype(np.float64))}
    kinds = {kind: {TITLES[kind]: colours} for kind, colours in maps.colours().items()}
    every_kind = {title: colours for rows in kinds.values() for title, colours in rows.items()}
    content = {**kinds, "similarity": similarity, "cells": every_kind | similarity}
    content["attention"] |= {f"head {i + 1}": colour_map(head) for i, head in enumerate(maps.attention.swapaxes(0, 1))}
    return {name: sheet({"image": maps.images, **rows}, maps.names) for name, rows in content.items()}


def cells_section(embedder: Embedder, paths: Sequence[Path], names: Sequence[str] | None = None) -> Section:
    """Return the `maps_section` of image files by a network; for the arguments and errors see `make_cell_maps`."""
    network = backbone_of(embedder)
    return maps_section(make_cell_maps(network, paths, embedder.image_size, names=names, device=embedder.device))


def maps_section(maps: CellMaps) -> Section:
    """Return maps as a section; without JavaScript it shows all but single heads and similarities."""
    rows, columns = maps.grid
    colours = maps.colours()
    cards = []
    for i, name in enumerate(maps.names):
        image = Image.fromarray(maps.images[i])
        image.thumbnail((IMAGE_PX, IMAGE_PX), Image.Resampling.LANCZOS)  # never enlarges
        images = [("image", "image", image_uri(image, "jpeg", 88))]
        images += [(kind, TITLES[kind], image_uri(Image.fromarray(of_kind[i]))) for kind, of_kind in colours.items()]
        attention = np.stack([maps.attention[i].mean(axis=0), *maps.attention[i]])  # [1 + heads, h, w]
        heads = [image_uri(Image.fromarray(head)) for head in colour_map(attention)]
        similarity = image_uri(similarity_sheet(maps.similarity[i], rows, columns))
        cards.append({"name": name, "images": images, "heads": heads, "similarity": similarity})
    unreadable = [f"{path}: {reason}" for path, reason in maps.unreadable.items()]
    content = render(
        "cells.html",
        maps=maps,
        rows=rows,
        columns=columns,
        heads=["mean of heads", *(f"head {head + 1}" for head in range(maps.attention.shape[1]))],
        cards=cards,
        border=f"{border_share(maps.attention.mean(axis=1)).mean():.0%}",
        even=f"{border_share(np.ones(maps.grid)):.0%}",
        unreadable=html.listing("Left out, because they cannot be read:", unreadable, "warning"),
    )
    return Section("cells", "Cells", content)


def similarity_sheet(similarity: np.ndarray, rows: int, columns: int) -> Image.Image:
    """Return one image [h * h, w * w] with the map of similarities (uint8 [P, P]) to each patch, at its place."""
    maps = levels(similarity.reshape(rows, columns, rows, columns).astype(np.float32))  # [h, w, h, w]
    sheet = Image.fromarray(maps.transpose(0, 2, 1, 3).reshape(rows * rows, columns * columns))
    sheet.putpalette(PALETTE.tobytes())
    return sheet


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Show what a network sees in cells: PCA of patch tokens, attention, rollout, occlusion and "
        "similarity, as PNG files and as a page <output-dir>/cells.html.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_embedder_arguments(parser, checkpoint_required=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help=f"{CELLS_HELP}; classes are taken in turn")
    source.add_argument("--pictures", type=Path, nargs="+", metavar="FILE", help="image files, instead of --data")
    flag = parser.add_argument
    flag("--n", type=positive_int, default=DEFAULT_N, help="number of images of --data")
    flag("--output-dir", type=Path, required=True, help="folder of the results; made if missing")
    occlusion_help = "cover parts of each image in turn, the slow part"
    flag("--occlusion", action=argparse.BooleanOptionalAction, default=True, help=occlusion_help)
    flag("--pca-per-picture", action="store_true", help="fit the PCA to each image alone")
    foreground_help = "show the background white, by the sign of the first component"
    flag("--pca-foreground", action="store_true", help=foreground_help)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    setup_logging()
    paths, names = choose_images(args.data, args.n) if args.data else (args.pictures, None)
    embedder = embedder_from(args)
    maps = make_cell_maps(
        backbone_of(embedder),
        paths,
        embedder.image_size,
        names=names,
        device=embedder.device,
        with_occlusion=args.occlusion,
        per_image=args.pca_per_picture,
        foreground=args.pca_foreground,
    )
    for name, image in sheets(maps).items():
        with atomic_write(args.output_dir / f"{name}.png") as file:
            Image.fromarray(image).save(file, "PNG", optimize=True)
    page = args.output_dir / "cells.html"
    write_page(page, "Cells as a network sees them", [maps_section(maps)], subtitle=embedder.encoder.description)
    print(f"{page}: {len(maps)} cells, {maps.grid[0]} x {maps.grid[1]} patches each")


if __name__ == "__main__":
    sys.exit(exit_code(main))

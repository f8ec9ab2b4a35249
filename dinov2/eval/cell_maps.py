"""Show what a network sees in single cells: PCA of patch tokens, attention, rollout, occlusion and similarity.

    python dinov2/eval/cell_maps.py --checkpoint DinoBloom-S.pth --data cells/ --output-dir maps/

writes a PNG per kind, `cells.png` with all kinds, and the page `cells.html`, in which a click on a patch shows similar
patches. `dinov2.eval.features.patch_maps` has the formulas.

Dimension key:  N images, S pixels a side, h x w patches of each, P = h * w
"""

import argparse
import logging
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import torch
from bokeh.palettes import Viridis256
from PIL import Image, ImageDraw

from dinov2.data.datasets import LabelledCells, find_images
from dinov2.data.datasets.decode import UnreadableImageError, decode_image
from dinov2.data.transforms import normalize_images
from dinov2.eval.extract_features import CELLS_HELP, add_embedder_arguments, embedder_from
from dinov2.eval.features import patch_maps
from dinov2.eval.features.encoders import check_divisible
from dinov2.eval.features.extract import Embedder
from dinov2.eval.pages.page import Section, html, image_uri, render, write_page
from dinov2.hub.backbones import ImageTransform
from dinov2.logging import setup_logging
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.command import exit_code, positive_int, progress_bar
from dinov2.utils.files import atomic_write, user_path

logger = logging.getLogger("dinov2")

DEFAULT_N = 12
# The similarities of a cell take up to P * P bytes of the page before compression: 3.4 MB of text for this many patches
MAX_PATCHES = 1600
TITLES = {
    "pca": "PCA of patch tokens",
    "attention": "CLS attention, mean of heads",
    "rollout": "attention rollout",
    "occlusion": "occlusion",
}
PALETTE = np.array([list(bytes.fromhex(colour[1:])) for colour in Viridis256], dtype=np.uint8)  # [256, 3]
TILE_PX, TITLE_PX, HEADER_PX, GAP_PX = 140, 150, 34, 4
IMAGE_PX = 280  # on the page
LETTERS = 22  # of a line of text, about the width of a tile


@dataclass(frozen=True, eq=False)
class CellMaps:
    """Maps of N images; `colours` gives them as images."""

    names: list[str]
    images: np.ndarray  # uint8 [N, S, S, 3], before normalisation
    pca: np.ndarray  # uint8 [N, h, w, 3]
    attention: np.ndarray  # float32 [N, heads, h, w], of the last block's CLS token
    rollout: np.ndarray  # float32 [N, h, w]
    similarity: np.ndarray  # uint8 [N, P, P]; round((c + 1) * 127.5) of cosine c
    occlusion: np.ndarray | None = None  # float32 [N, h, w], 1 - cosine of the CLS token
    unreadable: dict[str, str] = field(default_factory=dict)  # {path: reason} of images that were left out
    pca_per_image: bool = False  # then `pca` cannot be compared between images

    def __len__(self) -> int:
        return len(self.names)

    @property
    def grid(self) -> tuple[int, int]:
        """Return h and w."""
        return self.rollout.shape[1], self.rollout.shape[2]

    def colours(self) -> dict[str, np.ndarray]:
        """Return {kind: uint8 [N, h, w, 3]} for each computed kind of `TITLES`."""
        numbers = {"attention": self.attention.mean(axis=1), "rollout": self.rollout, "occlusion": self.occlusion}
        return {"pca": self.pca, **{kind: colour_map(maps) for kind, maps in numbers.items() if maps is not None}}


def levels(maps: np.ndarray) -> np.ndarray:
    """Scale each map [..., h, w] from its lowest (0) to its highest value (255), uint8; a uniform map is 0."""
    low, high = (edge(maps, axis=(-2, -1), keepdims=True) for edge in (np.min, np.max))
    return np.rint(255 * (maps - low) / np.where(high > low, high - low, 1)).astype(np.uint8)


def colour_map(maps: np.ndarray) -> np.ndarray:
    """Return the colours of the `levels` of maps [..., h, w]: uint8 [..., h, w, 3], dark to bright."""
    return PALETTE[levels(maps)]


def make_cell_maps(
    model: DinoVisionTransformer,
    paths: Sequence[Path],
    image_size: int,
    *,
    names: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    with_occlusion: bool = True,
    per_image: bool = False,
    foreground: bool = False,
) -> CellMaps:
    """Compute all maps of image files; unreadable files are left out and logged.

    Args:
        image_size: S; more patches than in training show finer detail, by interpolated position embeddings.
        names: N texts to show; None for folder and file name.
        with_occlusion: also compute occlusion, which is slow: about a hundred forward passes per image.
        per_image, foreground: see `patch_maps.pca_colours`.
    """
    check_divisible(image_size, model.patch_size)
    largest = int(MAX_PATCHES**0.5) * model.patch_size
    if image_size > largest:
        raise ValueError(
            f"--image-size {image_size}: the similarities of {(image_size // model.patch_size) ** 2} patches to each "
            f"other are too many for a page; choose {largest} or less"
        )
    model.to(device).eval()
    transform = ImageTransform(image_size, model.center_crop)
    names = names or [f"{path.parent.name}/{path.name}" for path in paths]
    kept_names: list[str] = []
    maps: dict[str, list[Any]] = defaultdict(list)
    unreadable: dict[str, str] = {}
    for path, name in zip(progress_bar(paths, "cell maps"), names, strict=True):
        try:
            image = transform.resize(decode_image(path))  # uint8 [3, S, S]
        except UnreadableImageError as error:
            unreadable[str(path)] = error.reason
            logger.warning("left out: %s: %s", path, error.reason)
            continue
        batch = normalize_images(image[None]).to(device)  # [1, 3, S, S]
        tokens = patch_maps.patch_tokens(model, batch)  # [1, h, w, D]
        kept_names.append(name)
        maps["images"].append(image.permute(1, 2, 0))
        maps["tokens"].append(tokens[0].cpu())
        maps["attention"].append(patch_maps.cls_attention(model, batch)[0].cpu())
        maps["rollout"].append(patch_maps.attention_rollout(model, batch)[0].cpu())
        maps["similarity"].append(((patch_maps.similarity_maps(tokens)[0].cpu() + 1) * 127.5).round().to(torch.uint8))
        if with_occlusion:
            likeness = patch_maps.likeness_to(model, batch[0])
            maps["occlusion"].append(patch_maps.occlusion_map(likeness, batch[0], model.patch_size))
    if not kept_names:
        raise ValueError(f"images: none of the {len(paths)} could be read; the log gives reasons")
    arrays = {kind: torch.stack(values).numpy() for kind, values in maps.items()}
    pca = patch_maps.pca_colours(arrays.pop("tokens"), per_image=per_image, foreground=foreground)
    return CellMaps(names=kept_names, pca=pca, unreadable=unreadable, pca_per_image=per_image, **arrays)


def backbone_of(embedder: Embedder) -> DinoVisionTransformer:
    """Return the backbone of an embedder; ValueError if cell maps cannot be made of it."""
    network = embedder.encoder.network
    if not isinstance(network, DinoVisionTransformer):
        raise ValueError(
            f"--encoder {embedder.encoder_name}: cell maps need a backbone of this project or of DINOv2's kind; "
            f"give --checkpoint"
        )
    return network


def choose_images(data: Path, n: int) -> tuple[list[Path], list[str]]:
    """Choose up to n images of all classes in turn, evenly spread within each class; return paths and names to show.

    `data` is a folder, where the class of an image is its parent folder, or a CSV of labelled cells.
    """
    classes: dict[str, list[Path]] = defaultdict(list)
    if data.is_dir():
        for path in find_images(data):
            classes[path.parent.name].append(path)
    else:
        cells = LabelledCells.from_path(data, needs_labels=False)
        for path, label in zip(cells.paths, cells.labels.tolist(), strict=True):
            classes[cells.class_names[label]].append(path)
    if not classes:
        raise ValueError(f"--data: no image in {str(data)!r}; give {CELLS_HELP}")
    turns = zip_longest(*([name] * len(paths) for name, paths in classes.items()))
    counts = Counter([name for turn in turns for name in turn if name is not None][:n])
    chosen = [
        paths[int((i + 0.5) * len(paths) / counts[name])]
        for name, paths in classes.items()
        for i in range(counts[name])
    ]
    return chosen, [f"{name}/{path.name}" for name, path in zip(counts.elements(), chosen, strict=True)]


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
    """Return maps as a section; without JavaScript it shows all but similarities."""
    rows, columns = maps.grid
    colours = maps.colours()
    cards = []
    for i, name in enumerate(maps.names):
        image = Image.fromarray(maps.images[i])
        image.thumbnail((IMAGE_PX, IMAGE_PX), Image.Resampling.LANCZOS)  # never enlarges
        images = [("image", image_uri(image, "jpeg", 88))]
        images += [(TITLES[kind], image_uri(Image.fromarray(of_kind[i]))) for kind, of_kind in colours.items()]
        attention = enumerate(colour_map(maps.attention[i]), start=1)
        heads = [(f"CLS attention, head {head}", image_uri(Image.fromarray(pixels))) for head, pixels in attention]
        similarity = image_uri(similarity_sheet(maps.similarity[i], rows, columns))
        cards.append({"name": name, "images": images, "heads": heads, "similarity": similarity})
    unreadable = [f"{path}: {reason}" for path, reason in maps.unreadable.items()]
    content = render(
        "cells.html",
        maps=maps,
        rows=rows,
        columns=columns,
        cards=cards,
        border=f"{patch_maps.border_share(maps.attention.mean(axis=1)).mean():.0%}",
        even=f"{patch_maps.border_share(np.ones(maps.grid)):.0%}",
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
    source.add_argument("--data", type=user_path, help=f"{CELLS_HELP}; classes are taken in turn")
    source.add_argument("--pictures", type=user_path, nargs="+", metavar="FILE", help="image files, instead of --data")
    flag = parser.add_argument
    flag("--n", type=positive_int, default=DEFAULT_N, help="number of images of --data")
    flag("--output-dir", type=user_path, required=True, help="folder of the results; made if missing")
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

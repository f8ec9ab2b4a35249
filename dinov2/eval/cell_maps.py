"""What a network sees in single cells: PCA of patch tokens, attention, rollout, occlusion and similarity, as pictures.

    python dinov2/eval/cell_maps.py --checkpoint DinoBloom-S.pth --data cells/ --output-dir maps/

writes a PNG of each kind, `cells.png` with all of them, and the page `cells.html`, in which a click on a patch shows
which others are like it. `patch_maps` has the formulas, as functions of tensors. Nothing is random.

Dimension key:  N pictures, S side in pixels, h x w patches, P = h * w
"""

import argparse
import base64
import io
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dinov2.data.datasets import LabelledCells, find_images
from dinov2.data.datasets.decode import UnreadableImageError, decode_image
from dinov2.data.transforms import normalize_images
from dinov2.eval.extract_features import CELLS_HELP, add_embedder_arguments, embedder_from, positive_int
from dinov2.eval.features.encoders import check_divisible
from dinov2.eval.features.extract import Embedder
from dinov2.eval.pages import Markup, Section, escape, image_uri, write_page
from dinov2.eval.patch_maps import (
    attention_rollout,
    border_share,
    cls_attention,
    likeness_to,
    occlusion_map,
    patch_tokens,
    pca_colours,
    similarity_maps,
)
from dinov2.hub.transform import ImageTransform
from dinov2.logging import setup_logging
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.command import exit_code
from dinov2.utils.files import atomic_write

logger = logging.getLogger("dinov2")

DEFAULT_N = 12
# a cell's similarities take P * (P + 1) / 2 bytes of the page: 1.7 MB of text at this many patches
MAX_PATCHES = 1600
SECONDS_BETWEEN_REPORTS = 10.0
TILE_PX, TITLE_PX, GAP_PX = 140, 150, 4
PAGE_PICTURE_PX = 280
# dark violet to yellow, ever lighter, so that it can be read without colours too
PALETTE_STOPS = ((16, 12, 48), (66, 40, 128), (38, 98, 148), (28, 150, 130), (140, 198, 80), (252, 236, 120))
KINDS = {
    "pca": "PCA of patch tokens",
    "attention": "CLS attention, mean of heads",
    "rollout": "attention rollout",
    "occlusion": "occlusion",
}


@dataclass(frozen=True, eq=False)
class CellMaps:
    """Maps of N pictures.

    Attributes:
        names: N texts to show.
        pictures: uint8 [N, S, S, 3], as the network got them.
        pca: uint8 [N, h, w, 3].
        attention: float32 [N, heads, h, w], of the last layer's CLS token.
        rollout: float32 [N, h, w].
        similarity: uint8 [N, P, P]; cosine c is stored as round((c + 1) * 127.5).
        occlusion: float32 [N, h, w], 1 - cosine of the CLS token; None where it was not asked for.
        unreadable: {path: reason} of pictures that were left out.
        pca_per_picture: whether `pca` was fitted to each picture alone, so that colours of two cannot be compared.
    """

    names: list[str]
    pictures: np.ndarray
    pca: np.ndarray
    attention: np.ndarray
    rollout: np.ndarray
    similarity: np.ndarray
    occlusion: np.ndarray | None = None
    unreadable: dict[str, str] = field(default_factory=dict)
    pca_per_picture: bool = False

    def __len__(self) -> int:
        return len(self.names)

    @property
    def grid(self) -> tuple[int, int]:
        """h, w."""
        return self.rollout.shape[1], self.rollout.shape[2]

    def scalars(self) -> dict[str, np.ndarray]:
        """{kind: [N, h, w]} of those of `KINDS` that are one number a patch and are there."""
        found = {"attention": self.attention.mean(axis=1), "rollout": self.rollout}
        return found if self.occlusion is None else {**found, "occlusion": self.occlusion}

    def colours(self) -> dict[str, np.ndarray]:
        """{kind: uint8 [N, h, w, 3]} of those of `KINDS` that are there."""
        return {"pca": self.pca, **{kind: colour_map(values) for kind, values in self.scalars().items()}}


def make_cell_maps(
    model: DinoVisionTransformer,
    paths: Sequence[Path],
    image_size: int,
    *,
    names: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    with_occlusion: bool = True,
    per_picture: bool = False,
    foreground: bool = False,
) -> CellMaps:
    """All maps of picture files; unreadable ones are left out and named in the log.

    Args:
        model: the backbone; it is moved to `device` and put in eval mode.
        paths: picture files, at least one.
        image_size: S; more patches than in training show finer detail, by interpolated position embeddings.
        names: what to call each picture; None for its folder and file.
        device: where the network runs.
        with_occlusion: the slow part, some hundred forwards a picture.
        per_picture, foreground: as for `pca_colours`.

    Raises:
        ValueError: if no picture can be read, the patch size does not divide S, or there are more than `MAX_PATCHES`.
    """
    check_divisible(image_size, model.patch_size)
    most = int(MAX_PATCHES**0.5) * model.patch_size
    if image_size > most:
        raise ValueError(
            f"--image-size {image_size}: the similarities of {(image_size // model.patch_size) ** 2} patches to each "
            f"other are too many for a page; choose {most} or less"
        )
    model.to(device).eval()
    transform = ImageTransform(image_size)
    titles = [f"{path.parent.name}/{path.name}" for path in paths] if names is None else list(names)
    found: dict[str, list[Any]] = defaultdict(list)
    unreadable: dict[str, str] = {}
    start = reported = time.monotonic()
    for number, (path, title) in enumerate(zip(paths, titles, strict=True), start=1):
        try:
            picture = transform.resize(decode_image(path))  # uint8 [3, S, S]
        except UnreadableImageError as error:
            unreadable[str(path)] = error.reason
            continue
        batch = normalize_images(picture[None]).to(device)  # [1, 3, S, S]
        tokens = patch_tokens(model, batch)  # [1, h, w, D]
        found["names"].append(title)
        found["pictures"].append(picture.permute(1, 2, 0).numpy())
        found["tokens"].append(tokens[0].cpu().numpy())
        found["attention"].append(cls_attention(model, batch)[0].cpu().numpy())
        found["rollout"].append(attention_rollout(model, batch)[0].cpu().numpy())
        cosines = similarity_maps(tokens)[0].cpu()
        found["similarity"].append(((cosines + 1) * 127.5).round().to(torch.uint8).numpy())
        if with_occlusion:
            found["occlusion"].append(occlusion_map(likeness_to(model, batch[0]), batch[0], model.patch_size).numpy())
        now = time.monotonic()
        if now - reported >= SECONDS_BETWEEN_REPORTS or number == len(paths):
            reported = now
            to_go = (now - start) / number * (len(paths) - number)
            logger.info("cell maps: %d of %d pictures, %.0f s to go", number, len(paths), to_go)
    for left_out, reason in unreadable.items():
        logger.warning("left out: %s: %s", left_out, reason)
    if not found["names"]:
        raise ValueError(f"pictures: none of the {len(paths)} could be read; the log gives reasons")
    arrays = {name: np.stack(values) for name, values in found.items() if name != "names"}
    colours = pca_colours(arrays.pop("tokens"), per_picture=per_picture, foreground=foreground)
    return CellMaps(
        names=found["names"], pca=colours.colours, unreadable=unreadable, pca_per_picture=per_picture, **arrays
    )


def backbone_of(embedder: Embedder) -> DinoVisionTransformer:
    """The network, if it is one that these maps can be made of; ValueError otherwise."""
    network = embedder.encoder.network
    if not isinstance(network, DinoVisionTransformer):
        raise ValueError(
            f"--encoder {embedder.encoder_name}: cell maps need a backbone of this project or of DINOv2's kind; "
            f"give --checkpoint"
        )
    return network


def choose_pictures(data: Path, n: int) -> tuple[list[Path], list[str]]:
    """Some pictures of a set, of its classes in turn, evenly spread within each; and what to call them.

    Args:
        data: a folder, in which a picture's class is the folder that it lies in, or a CSV of labelled cells.
        n: how many at most.

    Raises:
        FileNotFoundError, ValueError: if there is nothing at `data`, or no picture in it.
    """
    of_classes: dict[str, list[Path]] = defaultdict(list)
    if data.is_dir():
        for path in find_images(data):
            of_classes[path.parent.name].append(path)
    else:
        cells = LabelledCells.from_path(data)
        for path, label in zip(cells.paths, cells.labels.tolist(), strict=True):
            of_classes[cells.class_names[label]].append(path)
    if not of_classes:
        raise ValueError(f"--data: no picture in {str(data)!r}; give {CELLS_HELP}")
    n = min(n, sum(map(len, of_classes.values())))
    counts = dict.fromkeys(of_classes, 0)
    while sum(counts.values()) < n:
        for name, paths in of_classes.items():
            if counts[name] < len(paths) and sum(counts.values()) < n:
                counts[name] += 1
    chosen = [
        (path, f"{name}/{path.name}")
        for name, paths in of_classes.items()
        for path in (paths[int((i + 0.5) * len(paths) / counts[name])] for i in range(counts[name]))
    ]
    return [path for path, _ in chosen], [title for _, title in chosen]


# --- numbers as colours -----------------------------------------------------------------------------------------------


def palette() -> np.ndarray:
    """Colours of 0 to 255: uint8 [256, 3]."""
    stops = np.array(PALETTE_STOPS, dtype=np.float64)
    places = np.linspace(0, len(stops) - 1, 256)
    channels = [np.interp(places, np.arange(len(stops)), channel) for channel in stops.T]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8)


def levels(maps: np.ndarray) -> np.ndarray:
    """Each map [..., h, w] from its lowest (0) to its highest value (255), uint8; an even map is 0."""
    low, high = (edge(maps, axis=(-2, -1), keepdims=True) for edge in (np.min, np.max))
    return np.rint(255 * (maps - low) / np.where(high > low, high - low, 1)).astype(np.uint8)


def colour_map(maps: np.ndarray) -> np.ndarray:
    """`levels` of maps [..., h, w] in colours, uint8 [..., h, w, 3]."""
    return palette()[levels(maps)]


# --- pictures on disk -------------------------------------------------------------------------------------------------


def sheet(rows: Mapping[str, np.ndarray], column_names: Sequence[str] = (), tile: int = TILE_PX) -> np.ndarray:
    """Pictures in rows with titles, those of a cell below each other.

    Args:
        rows: {title: uint8 [N, any, any, 3]}; patches are enlarged without smoothing.
        column_names: N, or none.
        tile: side of a picture on the sheet, in pixels.

    Returns:
        uint8 [height, width, 3].
    """
    n = len(next(iter(rows.values())))
    font = ImageFont.load_default(size=12)
    header = 34 if column_names else 0
    step = tile + GAP_PX
    canvas = Image.new("RGB", (TITLE_PX + n * step, header + len(rows) * step), "white")
    pen = ImageDraw.Draw(canvas)
    for column, name in enumerate(column_names):
        lines = name.split("/", 1)
        for line, text in enumerate(lines):
            pen.text((TITLE_PX + column * step, 2 + 15 * line), _shortened(text, tile, font), fill="black", font=font)
    for row, (title, pictures) in enumerate(rows.items()):
        top = header + row * step
        for line, text in enumerate(_wrapped(title, TITLE_PX - 10, font)):
            pen.text((4, top + tile // 2 - 15 + 15 * line), text, fill="black", font=font)
        for column, picture in enumerate(pictures):
            is_enlarged = picture.shape[0] < tile
            how = Image.Resampling.NEAREST if is_enlarged else Image.Resampling.LANCZOS
            canvas.paste(Image.fromarray(picture).resize((tile, tile), how), (TITLE_PX + column * step, top))
    return np.asarray(canvas)


def _shortened(text: str, width: float, font: Any) -> str:
    """`text` without its middle letters, as far as needed to fit."""
    shown = text
    while len(text) > 4 and font.getlength(shown) > width:
        half = (len(text) - 1) // 2
        text = text[:half] + text[-half:]
        shown = text[:half] + "..." + text[-half:]
    return shown


def _wrapped(text: str, width: float, font: Any) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if not lines[-1] or font.getlength(longer) <= width else [*lines, word]
    return lines


def sheets(maps: CellMaps, patch: tuple[int, int] | None = None) -> dict[str, np.ndarray]:
    """The pictures that the command writes: {name: uint8 [height, width, 3]}.

    Args:
        maps: of N pictures.
        patch: row and column that `similarity` is about; None for the one in the middle.
    """
    rows, columns = maps.grid
    row, column = patch or (rows // 2, columns // 2)
    picture = {"picture": maps.pictures}
    colours = {KINDS[kind]: values for kind, values in maps.colours().items()}
    like = maps.similarity[:, row * columns + column].reshape(len(maps), rows, columns)
    likeness = {f"similarity to row {row + 1}, column {column + 1}": colour_map(like.astype(np.float64))}
    heads = {f"head {i + 1}": colour_map(maps.attention[:, i]) for i in range(maps.attention.shape[1])}
    of_kinds = {kind: {**picture, KINDS[kind]: colours[KINDS[kind]]} for kind in maps.colours()}
    of_kinds["attention"] |= heads
    everything = {
        "similarity": {**picture, **likeness},
        **of_kinds,
        "cells": {**picture, **colours, **likeness},
    }
    return {name: sheet(content, maps.names) for name, content in everything.items()}


def _png(picture: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _jpeg(picture: np.ndarray, side: int) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(picture)
    if max(image.size) > side:
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    image.save(stream, "JPEG", quality=88)
    return stream.getvalue()


# --- the page ---------------------------------------------------------------------------------------------------------


def cells_section(
    embedder: Embedder, paths: Sequence[Path], names: Sequence[str] | None = None, *, with_occlusion: bool = True
) -> Section:
    """`maps_section` of these pictures by this network; arguments and errors as for `make_cell_maps`."""
    maps = make_cell_maps(
        backbone_of(embedder),
        paths,
        embedder.image_size,
        names=names,
        device=embedder.device,
        with_occlusion=with_occlusion,
    )
    return maps_section(maps)


def maps_section(maps: CellMaps) -> Section:
    """Maps as a part of a page: a card a cell, with heads to choose from and a patch to point at.

    Without JavaScript it shows everything but single heads and similarities.
    """
    rows, columns = maps.grid
    n_heads = maps.attention.shape[1]
    share, even = border_share(maps.attention.mean(axis=1)).mean(), float(border_share(np.ones((rows, columns))))
    left_out = "".join(f"<li>{escape(path)}: {escape(reason)}</li>" for path, reason in maps.unreadable.items())
    options = "".join(f'<option value="{i}">head {i + 1}</option>' for i in range(n_heads))
    parts = [
        "<p>One card for each cell. In <b>PCA</b>, the three strongest components of the patches of "
        + ("each picture alone" if maps.pca_per_picture else "all pictures together")
        + " are red, green and blue: equal colours "
        + ("in a picture" if maps.pca_per_picture else "here and there")
        + " are parts that the network finds alike. <b>Attention</b> is that of the last layer's CLS "
        "token, <b>rollout</b> that through all layers (Abnar and Zuidema 2020)"
        + (
            ", and <b>occlusion</b> how far the feature turns when a square over the patch is covered."
            if maps.occlusion is not None
            else "."
        )
        + " All but the PCA go from their own lowest value (dark) to their highest (bright).</p>",
        f"<p>On average, {100 * share:.0f} % of the attention to patches lies on the outermost ring of patches, which "
        f"is {100 * even:.0f} % of all.</p>",
        '<p class="only-with-script no-print"><label>Attention of <select id="cells-head"><option value="-1">all '
        f"heads, their mean</option>{options}</select></label></p>",
        '<p class="only-with-script no-print note">Similarity: click a patch of the last picture, or move with the '
        "arrow keys. Bright patches have tokens like that of the marked one. Where the marked one lies, and the cosine "
        "of the patch under the pointer, stand below.</p>",
        f'<div class="warning"><p>Left out, as they cannot be read:</p><ul>{left_out}</ul></div>' if left_out else "",
        '<div class="cells-list">',
        *(_card(maps, i) for i in range(len(maps))),
        "</div>",
    ]
    upper = np.triu_indices(rows * columns)
    data = {
        "rows": rows,
        "columns": columns,
        "heads": n_heads,
        "palette": _base64(palette()),
        "cells": [
            {
                "name": maps.names[i],
                "attention": _base64(levels(np.stack([maps.attention[i].mean(axis=0), *maps.attention[i]]))),
                "similarity": _base64(maps.similarity[i][upper]),
            }
            for i in range(len(maps))
        ],
    }
    return Section("cells", "Cells", "\n".join(parts), data, scripts=("cells.js",), styles=("cells.css",))


def _card(maps: CellMaps, i: int) -> Markup:
    name = maps.names[i]
    picture = image_uri(_jpeg(maps.pictures[i], PAGE_PICTURE_PX), "jpeg")
    figures = [
        f'<figure><img src="{picture}" alt="{escape(f"the cell {name}")}"><figcaption>picture</figcaption></figure>'
    ]
    for kind, colours in maps.colours().items():
        uri = image_uri(_png(colours[i]), "png")
        text = escape(f"{KINDS[kind]} of {name}")
        figures.append(
            f'<figure><img class="pixels cells-{kind}" src="{uri}" alt="{text}"><figcaption>{KINDS[kind]}</figcaption>'
            f"</figure>"
        )
    figures.append(
        f'<figure class="only-with-script"><canvas tabindex="0" role="application" class="cells-similarity" '
        f'aria-label="{escape(f"similarity within {name}: arrow keys move the marked patch")}" '
        f'aria-describedby="cells-told-{i}" width="{PAGE_PICTURE_PX}" height="{PAGE_PICTURE_PX}"></canvas><figcaption>'
        f'similarity <output id="cells-told-{i}" aria-live="polite"></output></figcaption></figure>'
    )
    return Markup(
        f'<article class="card cells-card" data-cell="{i}" aria-label="{escape(name)}"><h3>{escape(name)}</h3>'
        f'<div class="cells-figures">{"".join(figures)}</div></article>'
    )


def _base64(values: np.ndarray) -> str:
    assert values.dtype == np.uint8, "the page reads bytes"
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")


# --- the command ------------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Show what a network sees in cells: PCA of patch tokens, attention, rollout, occlusion and "
        "similarity, as PNG files and as a page <output-dir>/cells.html.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_embedder_arguments(parser, checkpoint_required=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help=f"{CELLS_HELP}; classes are taken in turn")
    source.add_argument("--pictures", type=Path, nargs="+", metavar="FILE", help="these pictures instead")
    parser.add_argument("--n", type=positive_int, default=DEFAULT_N, help="how many pictures of --data")
    parser.add_argument("--output-dir", type=Path, required=True, help="where the files go; made if missing")
    parser.add_argument(
        "--occlusion",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="cover parts of each picture in turn, the slow part",
    )
    parser.add_argument("--pca-per-picture", action="store_true", help="fit the PCA to each picture alone")
    parser.add_argument(
        "--pca-foreground", action="store_true", help="leave the background white, by the first component's sign"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    setup_logging()
    paths, names = choose_pictures(args.data, args.n) if args.data else (args.pictures, None)
    embedder = embedder_from(args)
    maps = make_cell_maps(
        backbone_of(embedder),
        paths,
        embedder.image_size,
        names=names,
        device=embedder.device,
        with_occlusion=args.occlusion,
        per_picture=args.pca_per_picture,
        foreground=args.pca_foreground,
    )
    for name, picture in sheets(maps).items():
        with atomic_write(args.output_dir / f"{name}.png") as file:
            file.write(_png(picture))
    page = args.output_dir / "cells.html"
    write_page(page, "Cells as a network sees them", [maps_section(maps)], subtitle=embedder.encoder.description)
    print(f"{page}: {len(maps)} cells, {maps.grid[0]} x {maps.grid[1]} patches each")


if __name__ == "__main__":
    sys.exit(exit_code(main))

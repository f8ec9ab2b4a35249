"""The section of a page with maps of cells: attention of a chosen head, and similarity to a chosen patch.

Dimension key:  h x w patches, P = h * w
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from dinov2.eval.features.extract import Embedder
from dinov2.eval.maps.patch_maps import (
    PALETTE,
    TITLES,
    CellMaps,
    backbone_of,
    border_share,
    colour_map,
    levels,
    make_cell_maps,
)
from dinov2.eval.pages.page import Section, html, image_uri, render

IMAGE_PX = 280


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
        images = [("image", "image", _uri(image, "jpeg"))]
        images += [(kind, TITLES[kind], _uri(Image.fromarray(of_kind[i]))) for kind, of_kind in colours.items()]
        attention = np.stack([maps.attention[i].mean(axis=0), *maps.attention[i]])  # [1 + heads, h, w]
        heads = [_uri(Image.fromarray(head)) for head in colour_map(attention)]
        similarity = _uri(similarity_sheet(maps.similarity[i], rows, columns))
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
    """Return one image [h * h, w * w] with the map of similarities to each patch, at the place of the patch.

    Args:
        similarity: uint8 [P, P].
        rows, columns: h and w.
    """
    maps = levels(similarity.reshape(rows, columns, rows, columns).astype(np.float32))  # [h, w, h, w]
    sheet = Image.fromarray(maps.transpose(0, 2, 1, 3).reshape(rows * rows, columns * columns))
    sheet.putpalette(PALETTE.tobytes())
    return sheet


def _uri(image: Image.Image, kind: Literal["png", "jpeg"] = "png") -> str:
    stream = io.BytesIO()
    image.save(stream, kind, quality=88)  # of JPEG
    return image_uri(stream.getvalue(), kind)

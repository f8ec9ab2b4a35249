"""The section of a page with maps of cells: attention of a chosen head, and similarity to a chosen patch.

Dimension key:  h x w patches, P = h * w
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from bokeh.palettes import Viridis256
from PIL import Image

from dinov2.eval.features.extract import Embedder
from dinov2.eval.maps.cells import TITLES, CellMaps, backbone_of, colour_map, make_cell_maps
from dinov2.eval.maps.patch_maps import border_share
from dinov2.eval.pages.page import Section, image_uri, render

IMAGE_PX = 280


def cells_section(embedder: Embedder, paths: Sequence[Path], names: Sequence[str] | None = None) -> Section:
    """Return the `maps_section` of image files by a network; for the arguments and errors see `make_cell_maps`."""
    network = backbone_of(embedder)
    return maps_section(make_cell_maps(network, paths, embedder.image_size, names=names, device=embedder.device))


def maps_section(maps: CellMaps) -> Section:
    """Return maps as a section: one card per cell, with a choice of heads and a patch to click.

    Without JavaScript it shows everything except single heads and similarities.
    """
    rows, columns = maps.grid
    pairs = np.triu_indices(rows * columns)
    colours = maps.colours()
    cards, cells = [], []
    for i, name in enumerate(maps.names):
        images = [(kind, TITLES[kind], _uri(values[i], "png")) for kind, values in colours.items()]
        cards.append({"name": name, "images": [("image", "image", _uri(maps.images[i], "jpeg", quality=88)), *images]})
        attention = np.stack([maps.attention[i].mean(axis=0), *maps.attention[i]])  # [1 + heads, h, w]
        similarity = base64.b64encode(maps.similarity[i][pairs].tobytes()).decode("ascii")
        attention_uris = [_uri(image, "png") for image in colour_map(attention)]
        cells.append({"name": name, "attention": attention_uris, "similarity": similarity})
    html = render(
        "cells.html",
        maps=maps,
        n_heads=maps.attention.shape[1],
        cards=cards,
        border=f"{border_share(maps.attention.mean(axis=1)).mean():.0%}",
        even=f"{border_share(np.ones(maps.grid)):.0%}",
        data={"rows": rows, "columns": columns, "palette": Viridis256, "cells": cells},
    )
    return Section("cells", "Cells", html)


def _uri(array: np.ndarray, kind: Literal["png", "jpeg"], **options: Any) -> str:
    stream = io.BytesIO()
    image = Image.fromarray(array)
    image.thumbnail((IMAGE_PX, IMAGE_PX), Image.Resampling.LANCZOS)  # never enlarges
    image.save(stream, kind, **options)
    return image_uri(stream.getvalue(), kind)

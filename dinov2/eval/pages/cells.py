"""The section of a page with maps of cells: attention of a chosen head, and similarity to a chosen patch.

Dimension key:  h x w patches, P = h * w
"""

import base64
import io

import numpy as np
from bokeh.palettes import Viridis256
from PIL import Image

from dinov2.eval.maps.cells import TITLES, CellMaps, colour_map
from dinov2.eval.maps.patch_maps import border_share
from dinov2.eval.pages.page import Section, image_uri, render

IMAGE_PX = 280


def cells_section(maps: CellMaps) -> Section:
    """Return maps as a section: one card per cell, with a choice of heads and a patch to click.

    Without JavaScript it shows everything except single heads and similarities.
    """
    heads = [np.concatenate([cell.mean(axis=0, keepdims=True), cell]) for cell in maps.attention]  # [1 + heads, h, w]
    pairs = np.triu_indices(maps.similarity.shape[-1])
    colours = maps.colours()
    cards = [
        {
            "name": name,
            "images": [
                ("image", "image", _jpeg_uri(maps.images[i])),
                *((kind, TITLES[kind], _png_uri(values[i])) for kind, values in colours.items()),
            ],
        }
        for i, name in enumerate(maps.names)
    ]
    cells = [
        {
            "name": name,
            "attention": [_png_uri(head) for head in colour_map(heads[i])],  # the mean first
            "similarity": base64.b64encode(maps.similarity[i][pairs].tobytes()).decode("ascii"),
        }
        for i, name in enumerate(maps.names)
    ]
    rows, columns = maps.grid
    html = render(
        "cells.html",
        maps=maps,
        n_heads=maps.attention.shape[1],
        cards=cards,
        border=f"{border_share(maps.attention.mean(axis=1)).mean():.0%}",
        even=f"{float(border_share(np.ones(maps.grid))):.0%}",
        data={"rows": rows, "columns": columns, "palette": Viridis256, "cells": cells},
    )
    return Section("cells", "Cells", html)


def _png_uri(image: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", optimize=True)
    return image_uri(stream.getvalue(), "png")


def _jpeg_uri(array: np.ndarray) -> str:
    stream = io.BytesIO()
    image = Image.fromarray(array)
    if max(image.size) > IMAGE_PX:
        image = image.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.LANCZOS)
    image.save(stream, "JPEG", quality=88)
    return image_uri(stream.getvalue(), "jpeg")

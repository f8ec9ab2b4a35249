"""The section with maps of cells: the page holds the numbers, and names cannot add HTML."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.eval.features.extract import Embedder
from dinov2.eval.maps.cells import PALETTE, CellMaps, colour_map, make_cell_maps
from dinov2.eval.pages.cells import cells_section, maps_section
from dinov2.eval.pages.page import page_html
from dinov2.models import architecture, build_backbone

NASTY = '</script><img src=x onerror="alert(1)">&'


def page_data(page):
    return json.loads(re.search(r'<script type="application/json" id="data-cells">(.*?)</script>', page, re.S)[1])


def decode(text):
    return base64.b64decode(text.removeprefix("data:image/png;base64,"))


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (64, 60, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return [tmp_path / "0.png", tmp_path / "1.png"]


@pytest.fixture
def maps():
    rng = np.random.default_rng(0)
    return CellMaps(
        names=[NASTY],
        images=rng.integers(0, 256, (1, 20, 20, 3), dtype=np.uint8),
        pca=rng.integers(0, 256, (1, 2, 2, 3), dtype=np.uint8),
        attention=rng.random((1, 3, 2, 2)),
        rollout=rng.random((1, 2, 2)),
        similarity=rng.integers(0, 256, (1, 4, 4), dtype=np.uint8),
        unreadable={"b<a>d.png": "not a known image format"},
    )


def test_the_page_holds_the_numbers_that_its_script_shows(formulas, files, tmp_path):
    settings = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 14, "img_size": 56, "layerscale": 1.0}
    model = formulas.fill_(build_backbone(settings), "cells")
    teacher = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    torch.save({"teacher": teacher, "architecture": architecture(model)}, tmp_path / "teacher_checkpoint.pth")
    names = ["blast/0.png", "blast/1.png"]
    section = cells_section(Embedder(tmp_path / "teacher_checkpoint.pth"), files, names)
    data = page_data(page_html("cells", [section]))
    maps = make_cell_maps(model, files, 56, names=names)
    assert (data["rows"], data["columns"]) == (4, 4)
    assert [bytes.fromhex(colour[1:]) for colour in data["palette"]] == [bytes(colour) for colour in PALETTE]
    for i, cell in enumerate(data["cells"]):
        assert cell["name"] == names[i]
        attention = [np.asarray(Image.open(io.BytesIO(decode(uri)))) for uri in cell["attention"]]
        np.testing.assert_array_equal(attention[1:], colour_map(maps.attention[i]))
        np.testing.assert_array_equal(attention[0], colour_map(maps.attention[i].mean(axis=0)))
        similarity = decode(cell["similarity"])
        # as the script looks up a pair
        for a, b in ((0, 0), (3, 9), (9, 3), (15, 15), (0, 15)):
            low, high = sorted((a, b))
            assert similarity[low * 16 - low * (low - 1) // 2 + high - low] == maps.similarity[i, a, b]


def test_names_cannot_bring_scripts_into_the_page(maps):
    page = page_html("cells", [maps_section(maps)])
    assert "<img src=x" not in page
    assert page_data(page)["cells"][0]["name"] == NASTY


def test_the_text_tells_what_the_maps_are(maps):
    html = maps_section(maps).html
    assert "b&lt;a&gt;d.png: not a known image format" in html
    assert "Occlusion" not in html
    assert "all images together" in html
    assert "on the outermost ring, which has 100% of all patches" in html

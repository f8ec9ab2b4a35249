"""The command: its files, flags and sheets; its page holds the numbers, and names cannot add HTML."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from markupsafe import escape
from PIL import Image

from dinov2.data.sample_cells import write_sample_cells
from dinov2.eval.cell_maps import cells_section, main, maps_section, sheet
from dinov2.eval.features.extract import Embedder
from dinov2.eval.maps.patch_maps import TITLES, CellMaps, colour_map, make_cell_maps
from dinov2.eval.pages.page import page_html
from dinov2.models import architecture, build_backbone

SIZE, PATCH = 56, 14
NASTY = '</script><img src=x onerror="alert(1)">&'


@pytest.fixture(scope="module")
def checkpoint(formulas, tmp_path_factory):
    settings = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": PATCH, "img_size": SIZE, "layerscale": 1.0}
    model = formulas.fill_(build_backbone({**settings, "num_register_tokens": 2}), "cells")
    file = tmp_path_factory.mktemp("weights") / "teacher_checkpoint.pth"
    teacher = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    torch.save({"teacher": teacher, "architecture": architecture(model)}, file)
    return file


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Drawn cells, a folder for each class."""
    folder = tmp_path_factory.mktemp("cells")
    write_sample_cells(folder, n_train=0, n_probe_train=20, n_probe_test=0, n_patients=0, size=64)
    return folder / "probe" / "train"


def test_what_the_command_writes(checkpoint, cells, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(checkpoint), "--output-dir", str(out), "--device", "cpu"]
    main([*arguments, "--data", str(cells), "--n", "2", "--image-size", "42"])
    assert "2 cells, 3 x 3 patches" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "cells.html",
        "cells.png",
        "similarity.png",
        *(f"{kind}.png" for kind in TITLES),
    }
    sizes = {path.stem: Image.open(path).size for path in out.glob("*.png")}
    assert sizes["attention"][1] > sizes["pca"][1], "a row for each head"
    page = (out / "cells.html").read_bytes()
    main([*arguments, "--data", str(cells), "--n", "2", "--image-size", "42"])
    assert (out / "cells.html").read_bytes() == page
    chosen = sorted(cells.rglob("*.png"))[:2]
    main([*arguments, "--pictures", *map(str, chosen), "--no-occlusion"])
    assert all(path.name in (out / "cells.html").read_text() for path in chosen)
    assert "4 x 4 patches" in capsys.readouterr().out, "the size that the network was trained on"


def test_networks_without_patches_are_refused(cells, tmp_path):
    image = next(cells.rglob("*.png"))
    with pytest.raises(ValueError, match="--encoder pixels: cell maps need a backbone"):
        main(["--encoder", "pixels", "--pictures", str(image), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_sheet_shortens_names_that_are_too_long():
    images = np.full((2, 8, 8, 3), 99, dtype=np.uint8)
    written = sheet({"a rather long title of this row": images, "b": images}, [f"class/{'W' * 90}.png", "y"])
    header, right_edge = written[:34], written[:34, -4:]
    assert (right_edge == 255).all()
    assert (header[:, 150:290] < 255).any()
    assert (header[:, 290:294] == 255).all(), "the gap to the next name"
    assert (written[34:174, 150:290] == 99).all()


def pixels(uri):
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


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
    maps = make_cell_maps(model, files, 56, names=names)
    assert re.findall(r'<article class="card cells-card" aria-label="(.*?)"', section.html) == names
    heads = re.findall(r'data-heads="(.*?)"', section.html)
    similarities = re.findall(r"background-image: url\((.*?)\)", section.html)
    for i in range(2):
        attention = [pixels(uri) for uri in heads[i].split(" ")]
        np.testing.assert_array_equal(attention[1:], colour_map(maps.attention[i]))
        np.testing.assert_array_equal(attention[0], colour_map(maps.attention[i].mean(axis=0)))
        sheet = pixels(similarities[i])
        assert sheet.shape == (16, 16, 3)
        for row, column in np.ndindex(4, 4):
            shown = sheet[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            to_patch = maps.similarity[i, 4 * row + column].reshape(4, 4)
            np.testing.assert_array_equal(shown, colour_map(to_patch.astype(np.float64)))


def test_names_cannot_bring_scripts_into_the_page(maps):
    page = page_html("cells", [maps_section(maps)])
    assert "<img src=x" not in page
    assert f'aria-label="{escape(NASTY)}"' in page


def test_the_text_tells_what_the_maps_are(maps):
    html = maps_section(maps).html
    assert "b&lt;a&gt;d.png: not a known image format" in html
    assert "Occlusion" not in html
    assert "all images together" in html
    assert "on the outermost ring, which has 100% of all patches" in html

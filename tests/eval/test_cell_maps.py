"""Maps of picture files: what command and page hold, which pictures are taken, what is said of wrong input."""

import base64
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from dinov2.data.sample_cells import write_sample_cells
from dinov2.eval.cell_maps import (
    KINDS,
    cells_section,
    choose_pictures,
    levels,
    main,
    make_cell_maps,
    maps_section,
    palette,
    sheet,
)
from dinov2.eval.features.extract import Embedder
from dinov2.eval.pages import page_html
from dinov2.eval.patch_maps import similarity_maps
from dinov2.hub.transform import ImageTransform
from dinov2.models import architecture, build_backbone

SIZE, PATCH = 56, 14
NASTY = '</script><img src=x onerror="alert(1)">&'


@pytest.fixture(scope="module")
def model(formulas):
    settings = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": PATCH, "img_size": SIZE, "layerscale": 1.0}
    return formulas.fill_(build_backbone({**settings, "num_register_tokens": 2}), "cells").eval()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
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


def test_maps_of_pictures(model, cells):
    paths, names = choose_pictures(cells, 3)
    maps = make_cell_maps(model, paths, SIZE, names=names)
    assert maps.names == names
    assert maps.grid == (4, 4)
    assert maps.pictures.shape == (3, SIZE, SIZE, 3)
    assert maps.pca.shape == (3, 4, 4, 3)
    assert maps.attention.shape == (3, 3, 4, 4)
    assert maps.rollout.shape == maps.occlusion.shape == (3, 4, 4)
    assert maps.similarity.shape == (3, 16, 16)
    assert (np.diagonal(maps.similarity, axis1=1, axis2=2) == 255).all()
    again = make_cell_maps(model, paths, SIZE, names=names, with_occlusion=False)
    np.testing.assert_array_equal(again.pca, maps.pca)
    assert again.occlusion is None
    assert "occlusion" not in again.colours()


def test_classes_are_taken_in_turn_and_pictures_spread(tmp_path):
    for name, n in (("a", 10), ("b", 1), ("c", 4)):
        (tmp_path / name).mkdir()
        for i in range(n):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"{i}.png")
    _, names = choose_pictures(tmp_path, 5)
    assert names == ["a/2.png", "a/7.png", "b/0.png", "c/1.png", "c/3.png"]
    assert len(choose_pictures(tmp_path, 100)[0]) == 15
    table = tmp_path / "cells.csv"
    table.write_text("Image Path,Label\n" + "".join(f"{tmp_path}/a/{i}.png,{'xy'[i % 2]}\n" for i in range(4)))
    assert choose_pictures(table, 2)[1] == ["x/2.png", "y/3.png"]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="--data: no picture in"):
        choose_pictures(tmp_path / "none", 3)


def test_what_the_command_writes(checkpoint, cells, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(checkpoint), "--output-dir", str(out), "--device", "cpu"]
    main([*arguments, "--data", str(cells), "--n", "2", "--image-size", "42"])
    assert "2 cells, 3 x 3 patches" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "cells.html",
        "cells.png",
        "similarity.png",
        *(f"{kind}.png" for kind in KINDS),
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


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data-cells">(.*?)</script>', page, re.S)[1])


def bytes_of(text):
    return np.frombuffer(base64.b64decode(text), dtype=np.uint8)


def test_the_page_holds_the_numbers_that_its_script_shows(checkpoint, cells):
    paths, names = choose_pictures(cells, 2)
    embedder = Embedder(checkpoint)
    data = data_of(page_html("cells", [cells_section(embedder, paths, names)]))
    maps = make_cell_maps(embedder.encoder.network, paths, SIZE, names=names)
    assert (data["rows"], data["columns"], data["heads"]) == (4, 4, 3)
    np.testing.assert_array_equal(bytes_of(data["palette"]).reshape(256, 3), palette())
    for i, cell in enumerate(data["cells"]):
        assert cell["name"] == names[i]
        stored, attention = bytes_of(cell["similarity"]), bytes_of(cell["attention"]).reshape(4, 4, 4)
        np.testing.assert_array_equal(attention[1:], levels(maps.attention[i]))
        np.testing.assert_array_equal(attention[0], levels(maps.attention[i].mean(axis=0)))
        # as cells.js looks a pair up
        for a, b in ((0, 0), (3, 9), (9, 3), (15, 15), (0, 15)):
            low, high = sorted((a, b))
            assert stored[low * 16 - low * (low - 1) // 2 + high - low] == maps.similarity[i, a, b]


def test_cosines_come_back_from_their_bytes(model, cells):
    maps = make_cell_maps(model, choose_pictures(cells, 1)[0], SIZE, with_occlusion=False)
    tokens = torch.randn(1, 2, 2, 8, generator=torch.Generator().manual_seed(0))
    cosines = similarity_maps(tokens)
    stored = ((cosines + 1) * 127.5).round()
    assert (stored / 127.5 - 1 - cosines).abs().max() <= 1 / 255
    assert maps.similarity.dtype == np.uint8


def test_names_cannot_bring_scripts_into_the_page(model, cells):
    maps = make_cell_maps(model, choose_pictures(cells, 1)[0], SIZE, names=[NASTY], with_occlusion=False)
    page = page_html("cells", [maps_section(maps)])
    assert "<img src=x" not in page
    assert data_of(page)["cells"][0]["name"] == NASTY


def test_unreadable_pictures_are_left_out_and_named(model, cells, tmp_path, caplog):
    bad = tmp_path / "b<a>d.png"
    bad.write_bytes(b"no picture")
    good = choose_pictures(cells, 1)[0]
    maps = make_cell_maps(model, [bad, *good, tmp_path / "gone.png"], SIZE, with_occlusion=False)
    assert len(maps) == 1
    assert list(maps.unreadable) == [str(bad), str(tmp_path / "gone.png")]
    assert "left out" in caplog.text
    assert "b&lt;a&gt;d.png: not a known image format" in maps_section(maps).html
    with pytest.raises(ValueError, match="none of the 1 could be read"):
        make_cell_maps(model, [bad], SIZE)


def test_sizes_and_networks_that_cannot_be_shown(model, checkpoint, cells, tmp_path):
    paths = choose_pictures(cells, 1)[0]
    with pytest.raises(ValueError, match="--image-size 50: the network's patches of 14 px do not fill it"):
        make_cell_maps(model, paths, 50)
    with pytest.raises(ValueError, match="--image-size 700.*choose 560 or less"):
        make_cell_maps(model, paths, 700)
    with pytest.raises(ValueError, match="--encoder pixels: cell maps need a backbone"):
        main(["--encoder", "pixels", "--pictures", str(paths[0]), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_levels_go_from_lowest_to_highest_and_even_maps_are_dark():
    maps = np.array([[[1.0, 3.0], [2.0, 1.0]], [[5.0, 5.0], [5.0, 5.0]]])
    np.testing.assert_array_equal(levels(maps), [[[0, 255], [128, 0]], [[0, 0], [0, 0]]])
    brightness = palette().astype(int) @ [2, 5, 1]
    assert (np.diff(brightness) >= 0).all(), "lighter is more, also without colours"


def test_a_sheet_shortens_names_that_are_too_long():
    pictures = np.full((2, 8, 8, 3), 99, dtype=np.uint8)
    found = sheet({"a rather long title of this row": pictures, "b": pictures}, [f"class/{'x' * 90}.png", "y"])
    columns_beyond = found[:30, -1]
    assert (columns_beyond == 255).all()
    assert (found[34:174, 150:290] == 99).all()


# --- real cells


def test_on_real_cells_the_first_component_is_higher_on_the_nucleus(shared_data, model):
    """Colour alone does that, so any weights do: pictures, sign, grid and orientation fit together."""
    folder = shared_data / "segmentation_WBC" / "Dataset 1"
    paths = sorted(folder.glob("*.bmp"))[:6]
    maps = make_cell_maps(model, paths, 112, with_occlusion=False, per_picture=True)
    transform = ImageTransform(112)
    for path, colours in zip(paths, maps.pca, strict=True):
        mask = transform.resize(np.asarray(Image.open(path.with_suffix(".png")).convert("RGB")))[0]
        is_nucleus = mask.reshape(8, PATCH, 8, PATCH).float().mean(dim=(1, 3)).numpy() > 230
        assert 0 < is_nucleus.sum() < 40
        assert roc_auc_score(is_nucleus.ravel(), colours[..., 0].ravel()) > 0.8

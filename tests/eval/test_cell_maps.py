"""The command: its files, flags and sheets; its page holds the numbers, and names cannot add HTML."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from markupsafe import escape
from PIL import Image
from sklearn.metrics import roc_auc_score

from dinov2.data.sample_cells import write_sample_cells
from dinov2.eval.cell_maps import (
    PALETTE,
    TITLES,
    CellMaps,
    cells_section,
    choose_images,
    colour_map,
    levels,
    main,
    make_cell_maps,
    maps_section,
    sheet,
)
from dinov2.eval.features.extract import Embedder
from dinov2.eval.features.patch_maps import patch_tokens, similarity_maps
from dinov2.eval.pages.page import page_html
from dinov2.hub.backbones import ImageTransform
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


def test_the_page_holds_the_numbers_that_its_script_shows(model, checkpoint, files):
    names = ["blast/0.png", "blast/1.png"]
    section = cells_section(Embedder(checkpoint), files, names)
    maps = make_cell_maps(model, files, 56, names=names)
    assert re.findall(r'<article class="card" aria-label="(.*?)"', section.html) == names
    images = {alt: pixels(uri) for uri, alt in re.findall(r'<img src="(data:image/png.*?)" alt="(.*?)"', section.html)}
    colours = maps.colours()
    similarities = re.findall(r"background-image: url\((.*?)\)", section.html)
    for i in range(2):
        of_heads = [images[f"CLS attention, head {head} of {names[i]}"] for head in (1, 2, 3)]
        np.testing.assert_array_equal(of_heads, colour_map(maps.attention[i]))
        np.testing.assert_array_equal(images[f"{TITLES['attention']} of {names[i]}"], colours["attention"][i])
        np.testing.assert_array_equal(images[f"{TITLES['rollout']} of {names[i]}"], colours["rollout"][i])
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


def test_maps_of_image_files(model, cells):
    paths, names = choose_images(cells, 3)
    maps = make_cell_maps(model, paths, SIZE, names=names)
    assert maps.names == names
    assert maps.grid == (4, 4)
    assert maps.images.shape == (3, SIZE, SIZE, 3)
    assert maps.pca.shape == (3, 4, 4, 3)
    assert maps.attention.shape == (3, 3, 4, 4)
    assert maps.rollout.shape == maps.occlusion.shape == (3, 4, 4)
    assert maps.similarity.shape == (3, 16, 16)
    assert (np.diagonal(maps.similarity, axis1=1, axis2=2) == 255).all()
    again = make_cell_maps(model, paths, SIZE, names=names, with_occlusion=False)
    np.testing.assert_array_equal(again.pca, maps.pca)
    assert again.occlusion is None
    assert "occlusion" not in again.colours()


def test_classes_are_taken_in_turn_and_images_are_spread(tmp_path):
    for name, n in (("a", 10), ("b", 1), ("c", 4)):
        (tmp_path / name).mkdir()
        for i in range(n):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"{i}.png")
    _, names = choose_images(tmp_path, 5)
    assert names == ["a/2.png", "a/7.png", "b/0.png", "c/1.png", "c/3.png"]
    assert len(choose_images(tmp_path, 100)[0]) == 15
    table = tmp_path / "cells.csv"
    table.write_text("Image Path,Label\n" + "".join(f"{tmp_path}/a/{i}.png,{'xy'[i % 2]}\n" for i in range(4)))
    assert choose_images(table, 2)[1] == ["x/2.png", "y/3.png"]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="--data: no image in"):
        choose_images(tmp_path / "none", 3)


def test_cosines_come_back_from_their_bytes(model, cells):
    paths, _ = choose_images(cells, 1)
    maps = make_cell_maps(model, paths, SIZE, with_occlusion=False)
    cosines = similarity_maps(patch_tokens(model, ImageTransform(SIZE)(paths[0])[None]))
    assert maps.similarity.dtype == np.uint8
    np.testing.assert_allclose(maps.similarity / 127.5 - 1, cosines, atol=1 / 254)


def test_unreadable_images_are_left_out_and_named(model, cells, tmp_path, caplog):
    bad = tmp_path / "b<a>d.png"
    bad.write_bytes(b"no image")
    good = choose_images(cells, 1)[0]
    maps = make_cell_maps(model, [bad, *good, tmp_path / "gone.png"], SIZE, with_occlusion=False)
    assert len(maps) == 1
    assert list(maps.unreadable) == [str(bad), str(tmp_path / "gone.png")]
    assert "left out" in caplog.text
    assert maps.unreadable[str(bad)].startswith("not a known image format")
    with pytest.raises(ValueError, match="none of the 1 could be read"):
        make_cell_maps(model, [bad], SIZE)


def test_sizes_that_do_not_fit_are_refused(model, cells):
    paths = choose_images(cells, 1)[0]
    with pytest.raises(ValueError, match="--image-size 50: the network's patches of 14 px do not fill it"):
        make_cell_maps(model, paths, 50)
    with pytest.raises(ValueError, match="--image-size 700.*choose 560 or less"):
        make_cell_maps(model, paths, 700)


def test_levels_go_from_lowest_to_highest_and_even_maps_are_dark():
    maps = np.array([[[1.0, 3.0], [2.0, 1.0]], [[5.0, 5.0], [5.0, 5.0]]])
    np.testing.assert_array_equal(levels(maps), [[[0, 255], [128, 0]], [[0, 0], [0, 0]]])
    brightness = (PALETTE / 255) ** 2.2 @ [0.2126, 0.7152, 0.0722]  # relative luminance
    assert (np.diff(brightness) > -2e-4).all(), "higher is lighter, also without colours, up to rounding"


def test_on_real_cells_the_first_component_is_higher_on_the_nucleus(shared_data, model):
    """Colour alone does that, so any weights do: images, sign, grid and orientation fit together."""
    folder = shared_data / "segmentation_WBC" / "Dataset 1"
    paths = sorted(folder.glob("*.bmp"))[:6]
    maps = make_cell_maps(model, paths, 112, with_occlusion=False, per_image=True)
    transform = ImageTransform(112)
    for path, colours in zip(paths, maps.pca, strict=True):
        mask = transform.resize(np.asarray(Image.open(path.with_suffix(".png")).convert("RGB")))[0]
        is_nucleus = mask.reshape(8, PATCH, 8, PATCH).float().mean(dim=(1, 3)).numpy() > 230
        assert 0 < is_nucleus.sum() < 40
        assert roc_auc_score(is_nucleus.ravel(), colours[..., 0].ravel()) > 0.8

"""Maps of image files: contents, chosen images, and wrong input."""

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from dinov2.data.sample_cells import write_sample_cells
from dinov2.eval.maps.cells import PALETTE, choose_images, levels, make_cell_maps
from dinov2.eval.maps.patch_maps import patch_tokens, similarity_maps
from dinov2.hub.transform import ImageTransform
from dinov2.models import build_backbone

SIZE, PATCH = 56, 14


@pytest.fixture(scope="module")
def model(formulas):
    settings = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": PATCH, "img_size": SIZE, "layerscale": 1.0}
    return formulas.fill_(build_backbone({**settings, "num_register_tokens": 2}), "cells").eval()


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Drawn cells, a folder for each class."""
    folder = tmp_path_factory.mktemp("cells")
    write_sample_cells(folder, n_train=0, n_probe_train=20, n_probe_test=0, n_patients=0, size=64)
    return folder / "probe" / "train"


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

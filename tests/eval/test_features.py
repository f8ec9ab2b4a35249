"""Features: the backbone's CLS tokens in the pictures' order, and a file that gives back what went in."""

import logging

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.datasets import load_image, resize_image
from dinov2.data.transforms import normalize_images
from dinov2.eval.features import Features, embed_images, extract, read_features, write_features
from dinov2.models import build_backbone


@pytest.fixture
def backbone(formulas):
    settings = {"embed_dim": 64, "depth": 1, "num_heads": 1, "patch_size": 14, "img_size": 28, "block_chunks": 0}
    return formulas.fill_(build_backbone(settings), "features").eval()


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for i, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def stored():
    return Features(
        features=np.arange(6, dtype=np.float32).reshape(3, 2),
        labels=np.array([0, 2, 0]),
        class_names=["Basophil", "leer", "Größe µ"],
        paths=["/a/1.png", "/a/2 b.png", "/ä/3.png"],
        patients=["p1", "p1", "p2"],
        unreadable=["/a/0.png"],
        attributes={"model": "ViT", "checkpoint_sha256": "ab"},
    )


def assert_same(found, expected):
    np.testing.assert_array_equal(found.features, expected.features)
    assert found.features.dtype == np.float32
    np.testing.assert_array_equal(found.labels, expected.labels)
    for name in ("class_names", "paths", "patients", "unreadable", "attributes"):
        assert getattr(found, name) == getattr(expected, name), name


def test_extract_gives_each_pictures_cls_token(backbone, pictures):
    found = extract(backbone, pictures, image_size=28, batch_size=3, progress=False)
    for path, feature in zip(pictures, found.features, strict=True):
        image = resize_image(load_image(path), 28, fit="crop")
        alone = backbone.forward_features(normalize_images(image[None]))["x_norm_clstoken"][0].detach()
        torch.testing.assert_close(torch.from_numpy(feature), alone, rtol=0, atol=1e-5)
    assert found.features.dtype == np.float32
    assert found.kept.tolist() == list(range(7))
    assert found.unreadable == {}


def test_workers_change_nothing(backbone, pictures):
    alone = extract(backbone, pictures, image_size=28, batch_size=3)
    shared = extract(backbone, pictures, image_size=28, batch_size=3, num_workers=2)
    np.testing.assert_array_equal(alone.features, shared.features)


def test_unreadable_pictures_are_left_out_and_reported(backbone, pictures, caplog):
    for path in (pictures[0], pictures[4]):
        path.write_bytes(b"no picture")
    logger = logging.getLogger("dinov2")
    logger.addHandler(caplog.handler)
    try:
        found = extract(backbone, pictures, image_size=28, batch_size=1, progress=False)
    finally:
        logger.removeHandler(caplog.handler)
    rest = extract(backbone, [pictures[i] for i in (1, 2, 3, 5, 6)], image_size=28, batch_size=1, progress=False)
    assert found.kept.tolist() == [1, 2, 3, 5, 6]
    assert list(found.unreadable) == [str(pictures[0]), str(pictures[4])]
    np.testing.assert_array_equal(found.features, rest.features)
    assert "2 of 7 pictures are unreadable" in caplog.text
    assert str(pictures[4]) in caplog.text


def test_nothing_readable_and_broken_weights_are_errors(backbone, pictures, tmp_path):
    with pytest.raises(ValueError, match="none of the 1 could be read"):
        extract(backbone, [tmp_path / "absent.png"], image_size=28)
    with torch.no_grad():
        backbone.norm.bias[0] = float("nan")
    with pytest.raises(ValueError, match="7 of 7 are infinite or NaN"):
        extract(backbone, pictures, image_size=28)


def test_bf16_is_close_and_fp32_comes_out(backbone):
    images = torch.randint(0, 256, (4, 3, 28, 28), dtype=torch.uint8)
    exact, fast = embed_images(backbone, images), embed_images(backbone, images, "bf16")
    assert exact.dtype == fast.dtype == torch.float32
    assert not exact.requires_grad
    assert not torch.equal(exact, fast)
    torch.testing.assert_close(fast, exact, rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match="'fp16' is unknown; choose one of fp32, bf16"):
        embed_images(backbone, images, "fp16")


def test_what_is_written_is_read(stored, tmp_path):
    write_features(tmp_path / "new" / "features.h5", stored)
    assert_same(read_features(tmp_path / "new" / "features.h5"), stored)
    with h5py.File(tmp_path / "new" / "features.h5") as file:  # what other programs rely on
        assert set(file) == {"features", "labels", "class_names", "paths", "patients", "unreadable"}
        assert file["features"].dtype == np.float32
        assert file.attrs["model"] == "ViT"


def test_without_patients_and_with_half_precision(stored, tmp_path):
    whole = stored.select(np.array([True, False, True]))
    without = Features(whole.features, whole.labels, whole.class_names, whole.paths)
    write_features(tmp_path / "features.h5", without)
    with h5py.File(tmp_path / "features.h5", "a") as file:
        del file["features"], file["unreadable"]
        file["features"] = whole.features.astype(np.float16)
    assert_same(read_features(tmp_path / "features.h5"), without)


def test_a_failed_write_leaves_the_old_file(stored, tmp_path):
    write_features(tmp_path / "features.h5", stored)
    broken = stored.select(np.arange(3))
    broken.paths[1] = 7
    with pytest.raises((TypeError, ValueError)):
        write_features(tmp_path / "features.h5", broken)
    assert_same(read_features(tmp_path / "features.h5"), stored)
    assert [path.name for path in tmp_path.iterdir()] == ["features.h5"]


def test_other_files_are_refused(stored, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"extract_features\.py writes one"):
        read_features(tmp_path / "absent.h5")
    file = tmp_path / "features.h5"
    file.write_bytes(b"text")
    with pytest.raises(ValueError, match="not an HDF5 file or is damaged"):
        read_features(file)
    write_features(file, stored)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not an HDF5 file or is damaged"):
        read_features(file)
    write_features(file, stored)
    with h5py.File(file, "a") as h5:
        del h5["labels"]
    with pytest.raises(ValueError, match="no dataset labels"):
        read_features(file)
    with h5py.File(file, "a") as h5:
        h5["labels"] = np.zeros(2, dtype=np.int64)
    with pytest.raises(ValueError, match="different lengths"):
        read_features(file)
    with h5py.File(file, "a") as h5:
        del h5["labels"]
        h5["labels"] = np.array([0, 1, 3])
    with pytest.raises(ValueError, match="positions among 3 class names"):
        read_features(file)

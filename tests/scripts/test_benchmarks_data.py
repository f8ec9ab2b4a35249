"""The benchmark of the data path: each part writes its table."""

import re

import pytest


@pytest.mark.slow
def test_files_and_augmentation_have_tables(script, tmp_path, rows_of, write_images, monkeypatch):
    data = script("data")
    monkeypatch.setattr(data, "N_IMAGES", 2)
    write_images({tmp_path / "images" / f"{number}.png": number for number in range(3)}, size=360)
    flags = ["--images", str(tmp_path / "images"), "--rounds", "1"]
    data.main(["--folder", str(tmp_path / "bench"), *flags])
    header, *rows = rows_of(tmp_path / "bench" / "files.md")
    assert header[1:] == ["upstream: images/s", "no cache", "cache"]
    assert [row[0] for row in rows] == [f"{recipe} {kind}" for recipe in data.RECIPES for kind in data.FORMATS]
    _, *more = rows_of(tmp_path / "bench" / "augmentation.md")
    assert len(more) == 4
    assert all(re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\)x", cell) for row in rows + more for cell in row[2:])


def test_ways_make_the_same_crops(script, write_images, tmp_path):
    data = script("data")
    write_images({tmp_path / "0.png": 0}, size=224)
    square = data.resize_image(data.decode_image(tmp_path / "0.png"), data.SIZE, "crop")
    image = data.Image.fromarray(square.permute(1, 2, 0).numpy())
    for recipe in data.RECIPES:
        ours = data.our_batch(recipe, 8, [square])
        upstream = data.upstream_batch(data.upstream_transforms(recipe, 8), [image])
        assert [crop.shape for crop in ours] == [crop.shape for crop in upstream]
        for crop in (*ours, *upstream):  # 0 to 255, normalised by ImageNet's mean and deviation
            assert -2.2 < crop.min() < crop.max() < 2.7

"""The benchmark of embedding: its plain network is ours, and each part writes its table."""

import pytest
import torch

from dinov2.models import build_backbone


@pytest.mark.parametrize("settings", [{}, {"block_chunks": 2, "layerscale": None}, {"interpolate_offset": 0.0}])
def test_the_plain_network_computes_what_ours_does(settings, script, formulas):
    small = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 14, "img_size": 42, "block_chunks": 0}
    ours = formulas.fill_(build_backbone({**small, "layerscale": 0.5, **settings}), "plain").eval()
    sizes = (42, 70) if settings.get("interpolate_offset") is None else (42,)
    for size in sizes:
        images = torch.randn(2, 3, size, size)
        masks = torch.arange(2 * (size // 14) ** 2).view(2, -1) % 3 == 0
        expected = ours.forward_features(images, masks)
        ((cls_token, patches),) = script("plain").embed(ours, [images], [masks])
        torch.testing.assert_close(cls_token, expected["x_norm_clstoken"])
        torch.testing.assert_close(patches, expected["x_norm_patchtokens"])


@pytest.mark.slow
def test_each_part_has_a_table(script, tmp_path, rows_of, write_images):
    write_images({tmp_path / "images" / f"{number}.png": number for number in range(4)})
    flags = [
        "--archs",
        "Ti",
        "--batch",
        "2",
        "--image-size",
        "28",
        "--rounds",
        "1",
        "--n-cells",
        "300",
        "--n-images",
        "4",
    ]
    ways = ["ours fp32", "plain fp32"]
    flags += ["--images", str(tmp_path / "images"), "--n-images", "4", "--device", "cpu", "--ways", *ways]
    script("features").main(["--folder", str(tmp_path), *flags])
    for part in ("network", "files"):
        header, *rows = rows_of(tmp_path / f"{part}.md")
        assert [row[0] for row in rows] == ways
        rates, cosines, differences = ([float(row[i]) for row in rows] for i in (1, 4, 5))
        assert min(rates) > 0
        assert differences[0] < 1e-4
        assert cosines[0] > 0.99999
    _, knn, _, linear = rows_of(tmp_path / "protocols.md")
    assert knn[2] == "100.00%"
    assert float(linear[2].strip("%")) > 95

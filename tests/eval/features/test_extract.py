"""Features of a batch, of a list and of labelled cells, in one file."""

import h5py
import numpy as np
import pytest
import torch

from dinov2.data.datasets import LabelledCells, load_image, resize_image
from dinov2.data.transforms import normalize_images
from dinov2.eval.features import stored_kinds
from dinov2.eval.features.extract import Embedder, embed_images, extract

KINDS = ["cls", "mean", "cls+mean", "last1", "last2", "last2+mean", "patches"]


def test_bf16_is_close_and_fp32_comes_out(backbone):
    images = torch.randint(0, 256, (4, 3, 28, 28), dtype=torch.uint8)
    exact, fast = embed_images(backbone, images), embed_images(backbone, images, "bf16")
    assert exact.dtype == fast.dtype == torch.float32
    assert not exact.requires_grad
    assert not torch.equal(exact, fast)
    torch.testing.assert_close(fast, exact, rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match="'fp16' is unknown; choose one of fp32, bf16"):
        embed_images(backbone, images, "fp16")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cpu_takes_large_batches_in_pieces(precision, backbone, monkeypatch):
    images = torch.randint(0, 256, (21, 3, 28, 28), dtype=torch.uint8)
    seen = []
    backbone.patch_embed.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for kind in ("cls", "patches"):
        found = embed_images(backbone, images, precision, kind)
        alone = torch.cat([embed_images(backbone, image[None], precision, kind) for image in images])
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-2 if precision == "bf16" else 1e-3)
    assert seen == [8, 8, 5, *[1] * 21] * 2
    seen.clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    embed_images(backbone, images, precision)
    assert seen == [16, 5]


def test_kinds_are_the_backbones_tokens(backbone, images):
    found = extract(backbone, images, image_size=28, batch_size=3, progress=False, kinds=KINDS).by_kind
    batch = torch.stack([resize_image(load_image(path), 28, fit="crop") for path in images])
    tokens = backbone.forward_features(normalize_images(batch))
    cls_token, patches = tokens["x_norm_clstoken"].detach(), tokens["x_norm_patchtokens"].detach()
    mean = patches.mean(dim=1)
    # the first block's CLS token, after the norm of the whole network
    first = backbone.norm(backbone.blocks[0](backbone.prepare_tokens_with_masks(normalize_images(batch))))[:, 0]
    expected = {
        "cls": cls_token,
        "mean": mean,
        "cls+mean": torch.cat([cls_token, mean], dim=1),
        "last1": cls_token,
        "last2": torch.cat([first.detach(), cls_token], dim=1),
        "last2+mean": torch.cat([first.detach(), cls_token, mean], dim=1),
    }
    assert list(found) == KINDS
    for kind, values in expected.items():
        torch.testing.assert_close(torch.from_numpy(found[kind]), values, rtol=0, atol=1e-5)
    assert found["patches"].dtype == np.float16
    assert found["patches"].shape == (7, 2, 2, 64)
    grid = torch.from_numpy(found["patches"]).float()
    torch.testing.assert_close(grid[:, 1, 0], patches[:, 2], rtol=1e-2, atol=1e-3)  # row by row
    torch.testing.assert_close(embed_images(backbone, batch, kind="last2"), expected["last2"], rtol=0, atol=1e-5)


def test_one_forward_gives_all_kinds(backbone, images):
    calls = []
    backbone.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    extract(backbone, images, image_size=28, batch_size=7, progress=False, kinds=KINDS)
    assert len(calls) == 1


def test_any_size_that_the_patches_fill(backbone, checkpoint, images):
    found = extract(backbone, images[:2], image_size=42, progress=False, kinds=["patches"])
    assert found.features.shape == (2, 3, 3, 64)
    with pytest.raises(ValueError, match="--image-size 30: .* patches of 14 px do not fill it; take 28 or 42"):
        extract(backbone, images, image_size=30)
    with pytest.raises(ValueError, match="30 px .* multiple of the patch size|--image-size 30"):
        Embedder(checkpoint, image_size=30).extract(images)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["last3"], "--kinds last3: ViT with dim 64.* with n up to 2"),
        (["last0"], "'last0' is unknown; there are cls, mean"),
        (["CLS"], "'CLS' is unknown"),
        (["cls", "cls"], "--kinds: one is repeated"),
        (["patches"], "--kinds: protocols take the first one, which must be a vector"),
    ],
)
def test_unknown_kinds_are_refused(kinds, message, checkpoint, cells, tmp_path):
    with pytest.raises(ValueError, match=message):
        Embedder(checkpoint, image_size=28, kinds=kinds).features_of(cells, tmp_path / "out" / "features.h5")
    assert not (tmp_path / "out").exists()


def test_an_embedder_has_one_network(checkpoint):
    for settings in ({}, {"checkpoint": checkpoint, "encoder_name": "pixels"}):
        with pytest.raises(ValueError, match="either --checkpoint or --encoder"):
            Embedder(**settings)
    with pytest.raises(ValueError, match="--encoder-weights belongs to --encoder"):
        Embedder(checkpoint, encoder_weights="untrained")
    with pytest.raises(ValueError, match="it is no checkpoint of this project"):
        _ = Embedder(encoder_name="pixels").file


def test_parts_make_a_file_with_all_kinds(checkpoint, cells, tmp_path, parts_of_two):
    cells.paths[2].write_bytes(b"no image")
    cells.paths[3].write_bytes(b"")  # a part without any readable image
    embedder = Embedder(checkpoint, image_size=28, kinds=["mean", "last2", "patches"], batch_size=8)
    found = embedder.features_of(cells, tmp_path / "features.h5")
    whole = extract(embedder.encoder, cells.paths, batch_size=1, kinds=embedder.kinds, progress=False)
    assert found.kinds == ["mean", "last2"]
    np.testing.assert_allclose(found.features, whole.by_kind["mean"], atol=1e-5)
    np.testing.assert_allclose(found.others["last2"], whole.by_kind["last2"], atol=1e-5)
    with h5py.File(tmp_path / "features.h5") as file:
        np.testing.assert_allclose(file["patch_grid"][:], whole.by_kind["patches"], atol=1e-2)
    assert found.labels.tolist() == [0, 1, 0, 1, 0]
    assert found.patients == ["p0", "p0", "p1", "p1", "p2"]
    assert found.unreadable == [str(path) for path in cells.paths[2:4]]
    assert found.attributes["image_size"] == "28"
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".png") == ["features.h5", "weights.pth"]


def test_a_file_with_more_kinds_is_kept_and_one_with_fewer_is_refused(checkpoint, cells, tmp_path):
    file = tmp_path / "features.h5"
    several = Embedder(checkpoint, image_size=28, kinds=["cls", "mean", "patches"]).features_of(cells, file)
    time = file.stat().st_mtime_ns
    found = Embedder(checkpoint, image_size=28, kinds=["mean", "patches"]).features_of(cells, file)
    assert found.kinds == ["mean", "cls"]
    np.testing.assert_array_equal(found.features, several.others["mean"])
    assert file.stat().st_mtime_ns == time
    with pytest.raises(ValueError, match=r"it has no features of kind last2\); pass --overwrite"):
        Embedder(checkpoint, image_size=28, kinds=["cls", "last2"]).features_of(cells, file)
    Embedder(checkpoint, image_size=28, kinds=["cls", "last2"]).features_of(cells, file, overwrite=True)
    assert stored_kinds(file) == ["cls", "last2"]


@pytest.mark.parametrize(
    ("name", "sets", "warning"),
    [
        ("DinoBloom-B.pth", ["bmc", "acevedo", "aml_matek"], "dinobloom_b saw aml_matek, bmc in its pretraining"),
        ("DinoBloom-B.pth", ["acevedo", "", "mine"], None),
        ("DinoBloom-S.pth", ["bmc", "bmc", "bmc"], None),  # its published checksum is another one
        ("weights.pth", ["bmc", "bmc", "bmc"], None),
    ],
)
def test_a_release_that_saw_the_set_in_its_pretraining_is_told(
    name, sets, warning, checkpoint, images, tmp_path, caplog
):
    checkpoint.rename(tmp_path / name)
    rows = [f"{i}.png,APL,{dataset}" for i, dataset in enumerate(sets)]  # as prepare_dataset.py writes
    (tmp_path / "cells.csv").write_text("\n".join(["Image Path,Label,dataset", *rows]) + "\n")
    cells = LabelledCells.from_path(tmp_path / "cells.csv")
    Embedder(tmp_path / name, image_size=28).features_of(cells, tmp_path / "features.h5")
    if warning is None:
        assert "pretraining" not in caplog.text
    else:
        assert warning in caplog.text

"""The loop over images: order, unreadable files, prefetching, precision, devices."""

import logging
import threading

import numpy as np
import pytest
import torch

from dinov2.data.datasets import load_image, resize_image
from dinov2.data.transforms import normalize_images
from dinov2.eval.features import loop
from dinov2.eval.features.encoders import DinoEncoder
from dinov2.eval.features.extract import ExtractOptions, extract


def test_extract_gives_each_images_cls_token(backbone, images):
    found = extract(backbone, images, image_size=28, batch_size=3, progress=False)
    for path, feature in zip(images, found.features, strict=True):
        image = resize_image(load_image(path), 28, fit="crop")
        alone = backbone.forward_features(normalize_images(image[None]))["x_norm_clstoken"][0].detach()
        torch.testing.assert_close(torch.from_numpy(feature), alone, rtol=0, atol=1e-5)
    assert found.features.dtype == np.float32
    assert found.kept.tolist() == list(range(7))
    assert found.unreadable == {}


def test_workers_change_nothing(backbone, images):
    alone = extract(backbone, images, image_size=28, batch_size=3)
    shared = extract(backbone, images, image_size=28, batch_size=3, num_workers=2)
    np.testing.assert_array_equal(alone.features, shared.features)


def test_a_bar_shows_the_progress(backbone, images, capsys):
    extract(backbone, images, image_size=28, progress=False)
    assert capsys.readouterr().err == ""
    images[2].write_bytes(b"no image")
    extract(backbone, images, image_size=28)
    assert "7/7" in capsys.readouterr().err


def test_unreadable_images_are_left_out_and_reported(backbone, images, caplog):
    for path in (images[0], images[4]):
        path.write_bytes(b"no image")
    logger = logging.getLogger("dinov2")
    logger.addHandler(caplog.handler)
    try:
        found = extract(backbone, images, image_size=28, batch_size=1, progress=False)
    finally:
        logger.removeHandler(caplog.handler)
    rest = extract(backbone, [images[i] for i in (1, 2, 3, 5, 6)], image_size=28, batch_size=1, progress=False)
    assert found.kept.tolist() == [1, 2, 3, 5, 6]
    assert list(found.unreadable) == [str(images[0]), str(images[4])]
    np.testing.assert_array_equal(found.features, rest.features)
    assert "2 of 7 images are unreadable" in caplog.text
    assert str(images[4]) in caplog.text


def test_nothing_readable_and_broken_weights_are_errors(backbone, images, tmp_path):
    with pytest.raises(ValueError, match="none of the 1 could be read"):
        extract(backbone, [tmp_path / "absent.png"], image_size=28)
    with torch.no_grad():
        backbone.norm.bias[0] = float("nan")
    with pytest.raises(ValueError, match="7 of 7 are infinite or NaN"):
        extract(backbone, images, image_size=28)


def test_prefetching_changes_nothing(backbone, images, monkeypatch):
    images[2].write_bytes(b"no image")
    ranges = [range(3), range(3, 7)]

    def parts():
        options = ExtractOptions(kinds=["cls", "mean"], batch_size=2, progress=False)
        return list(loop.extract_ranges(DinoEncoder(backbone, 28), images, ranges, options))

    ahead = parts()
    monkeypatch.setattr(loop, "prefetch", lambda items, _: (item for item in items))
    for one, other in zip(ahead, parts(), strict=True):
        assert one.unreadable == other.unreadable
        np.testing.assert_array_equal(one.kept, other.kept)
        for kind, values in other.by_kind.items():
            np.testing.assert_array_equal(one.by_kind[kind], values)
    assert [list(part.unreadable) for part in ahead] == [[str(images[2])], []]


def test_the_next_batches_are_made_while_one_is_used():
    made = [threading.Event() for _ in range(6)]

    def numbers():
        for number, event in enumerate(made):
            event.set()
            yield number

    ahead = loop.prefetch(numbers(), 2)
    assert next(ahead) == 0
    assert made[2].wait(10)  # without being asked for
    assert not made[3].wait(0.05)
    assert list(ahead) == [1, 2, 3, 4, 5]


def test_the_thread_ends_with_the_loop_and_passes_errors_on():
    def threads():
        return [thread for thread in threading.enumerate() if thread.name.startswith("images")]

    def broken():
        yield 0
        raise OSError("the disk is gone")

    ahead = loop.prefetch(broken(), 2)
    assert next(ahead) == 0
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)
    stopped = loop.prefetch(iter(range(100)), 2)
    assert next(stopped) == 0
    stopped.close()
    assert threads() == []


def test_bf16_is_compared_with_fp32(backbone, images, log, monkeypatch):
    settings = {"image_size": 28, "batch_size": 3, "progress": False, "kinds": ["cls", "mean", "patches"]}
    exact = extract(backbone, images, **settings)
    assert "bf16" not in log.text
    fast = extract(backbone, images, precision="bf16", **settings)
    for kind in ("cls", "mean"):
        one, other = (torch.from_numpy(found.by_kind[kind]) for found in (exact, fast))
        assert torch.cosine_similarity(one, other).min() > 0.999
        assert not torch.equal(one, other)
    assert "precision bf16: least cosine to fp32 features" in log.text
    assert not [record for record in log.records if record.levelno >= logging.WARNING]
    monkeypatch.setattr(loop, "BF16_COSINE", 0.9999999)
    extract(backbone, images, precision="bf16", **settings)
    assert "use --precision fp32" in log.text


@pytest.mark.parametrize(("fp32_matmul", "during"), [("fast", {"medium", "highest"}), ("exact", {"highest"})])
def test_float32_products_are_set_for_the_network_only(fp32_matmul, during, backbone, images):
    seen = set()
    backbone.norm.register_forward_hook(lambda *_: seen.add(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = extract(backbone, images, image_size=28, progress=False, fp32_matmul=fp32_matmul)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen
    assert seen <= during
    exact = extract(backbone, images, image_size=28, progress=False, fp32_matmul="exact")
    np.testing.assert_allclose(found.features, exact.features, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="fp32_matmul: 'tf32' is unknown; choose one of fast, exact"):
        extract(backbone, images, image_size=28, progress=False, fp32_matmul="tf32")


def test_a_cpu_does_not_compile(backbone, images, log, monkeypatch):
    monkeypatch.setattr(DinoEncoder, "compile", lambda *_: pytest.fail("compiled"))
    extract(backbone, images[:1], image_size=28, progress=False, compiled=True)
    assert "--compile: a CPU gains nothing" in log.text


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_gives_the_same_features(precision, backbone, images):
    settings = {"image_size": 28, "batch_size": 1, "progress": False, "kinds": ["cls", "mean", "patches"]}
    expected = extract(backbone, images, **settings).by_kind
    for compiled in (False, True):
        found = extract(backbone, images, device="cuda", precision=precision, compiled=compiled, **settings).by_kind
        for kind, values in expected.items():
            np.testing.assert_allclose(found[kind], values, rtol=0, atol=1e-3 if precision == "fp32" else 0.1)

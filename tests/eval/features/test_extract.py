"""Pictures to features: kinds, order, unreadable files; several processes; an extraction that was killed."""

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.datasets import LabelledCells, load_image, resize_image
from dinov2.data.transforms import normalize_images
from dinov2.eval import extract_features
from dinov2.eval.features import loop, stored_kinds
from dinov2.eval.features.encoders import DinoEncoder
from dinov2.eval.features.extract import Embedder, ExtractOptions, embed_images, extract
from dinov2.models import architecture, build_backbone

REPOSITORY = Path(__file__).parents[3]
KINDS = ["cls", "mean", "cls+mean", "last1", "last2", "last2+mean", "patches"]


@pytest.fixture
def backbone(formulas):
    settings = {"embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 14, "img_size": 28, "block_chunks": 0}
    return formulas.fill_(build_backbone(settings), "features").eval()


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for i, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)).save(path)
    return paths


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
    assert "2 of 7 images are unreadable" in caplog.text
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


@pytest.fixture
def log(caplog):
    """The package's log, at all levels."""
    logger = logging.getLogger("dinov2")
    logger.addHandler(caplog.handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield caplog
    logger.setLevel(level)
    logger.removeHandler(caplog.handler)


def test_decoding_ahead_changes_nothing(backbone, pictures, monkeypatch):
    pictures[2].write_bytes(b"no picture")
    ranges = [range(3), range(3, 7)]

    def parts():
        options = ExtractOptions(kinds=["cls", "mean"], batch_size=2, progress=False)
        return list(loop.extract_ranges(DinoEncoder(backbone, 28), pictures, ranges, options))

    ahead = parts()
    monkeypatch.setattr(loop, "prefetch", lambda items, _: (item for item in items))
    for one, other in zip(ahead, parts(), strict=True):
        assert one.unreadable == other.unreadable
        np.testing.assert_array_equal(one.kept, other.kept)
        for kind, values in other.by_kind.items():
            np.testing.assert_array_equal(one.by_kind[kind], values)
    assert [list(part.unreadable) for part in ahead] == [[str(pictures[2])], []]


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
        return [thread for thread in threading.enumerate() if thread.name.startswith("pictures")]

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


def test_bf16_is_compared_with_fp32(backbone, pictures, log, monkeypatch):
    settings = {"image_size": 28, "batch_size": 3, "progress": False, "kinds": ["cls", "mean", "patches"]}
    exact = extract(backbone, pictures, **settings)
    assert "bf16" not in log.text
    fast = extract(backbone, pictures, precision="bf16", **settings)
    for kind in ("cls", "mean"):
        one, other = (torch.from_numpy(found.by_kind[kind]) for found in (exact, fast))
        assert torch.cosine_similarity(one, other).min() > 0.999
        assert not torch.equal(one, other)
    assert "precision bf16: least cosine to fp32 features" in log.text
    assert not [record for record in log.records if record.levelno >= logging.WARNING]
    monkeypatch.setattr(loop, "BF16_COSINE", 0.9999999)
    extract(backbone, pictures, precision="bf16", **settings)
    assert "use --precision fp32" in log.text


@pytest.mark.parametrize(("fp32_matmul", "during"), [("fast", {"medium", "highest"}), ("exact", {"highest"})])
def test_how_products_are_computed_is_set_for_the_network_alone(fp32_matmul, during, backbone, pictures):
    seen = set()
    backbone.norm.register_forward_hook(lambda *_: seen.add(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = extract(backbone, pictures, image_size=28, progress=False, fp32_matmul=fp32_matmul)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen
    assert seen <= during
    exact = extract(backbone, pictures, image_size=28, progress=False, fp32_matmul="exact")
    np.testing.assert_allclose(found.features, exact.features, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="fp32_matmul: 'tf32' is unknown; choose one of fast, exact"):
        extract(backbone, pictures, image_size=28, progress=False, fp32_matmul="tf32")


def test_a_cpu_does_not_compile(backbone, pictures, log, monkeypatch):
    monkeypatch.setattr(DinoEncoder, "compile", lambda *_: pytest.fail("compiled"))
    extract(backbone, pictures[:1], image_size=28, progress=False, compiled=True)
    assert "--compile: a CPU gains nothing" in log.text


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_gives_the_same_features(precision, backbone, pictures):
    settings = {"image_size": 28, "batch_size": 1, "progress": False, "kinds": ["cls", "mean", "patches"]}
    expected = extract(backbone, pictures, **settings).by_kind
    for compiled in (False, True):
        found = extract(backbone, pictures, device="cuda", precision=precision, compiled=compiled, **settings).by_kind
        for kind, values in expected.items():
            np.testing.assert_allclose(found[kind], values, rtol=0, atol=1e-3 if precision == "fp32" else 0.1)


@pytest.fixture
def checkpoint(backbone, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save({"model": backbone.state_dict(), "architecture": architecture(backbone)}, file)
    return file


@pytest.fixture
def cells(pictures):
    return LabelledCells(pictures, np.array([0, 1, 0, 1, 0, 1, 0]), ["a", "b"], [f"p{i // 3}" for i in range(7)])


@pytest.fixture
def parts_of_two(monkeypatch):
    """Parts are small enough for seven pictures to make four."""
    monkeypatch.setattr(loop, "PART_SIZE", 2)
    monkeypatch.setattr(loop, "PATCH_PART_SIZE", 2)


def test_kinds_are_the_backbones_tokens(backbone, pictures):
    found = extract(backbone, pictures, image_size=28, batch_size=3, progress=False, kinds=KINDS).by_kind
    images = torch.stack([resize_image(load_image(path), 28, fit="crop") for path in pictures])
    tokens = backbone.forward_features(normalize_images(images))
    cls_token, patches = tokens["x_norm_clstoken"].detach(), tokens["x_norm_patchtokens"].detach()
    mean = patches.mean(dim=1)
    # the first block's CLS token, after the norm of the whole network
    first = backbone.norm(backbone.blocks[0](backbone.prepare_tokens_with_masks(normalize_images(images))))[:, 0]
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
    torch.testing.assert_close(embed_images(backbone, images, kind="last2"), expected["last2"], rtol=0, atol=1e-5)


def test_one_forward_gives_all_kinds(backbone, pictures):
    calls = []
    backbone.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    extract(backbone, pictures, image_size=28, batch_size=7, progress=False, kinds=KINDS)
    assert len(calls) == 1


def test_any_size_that_the_patches_fill(backbone, checkpoint, pictures):
    found = extract(backbone, pictures[:2], image_size=42, progress=False, kinds=["patches"])
    assert found.features.shape == (2, 3, 3, 64)
    with pytest.raises(ValueError, match="--image-size 30: .* patches of 14 px do not fill it; take 28 or 42"):
        extract(backbone, pictures, image_size=30)
    with pytest.raises(ValueError, match="30 px .* multiple of the patch size|--image-size 30"):
        Embedder(checkpoint, image_size=30).extract(pictures)


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
def test_kinds_that_there_are_not(kinds, message, checkpoint, cells, tmp_path):
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


def test_the_file_has_all_kinds_in_parts_too(checkpoint, cells, tmp_path, parts_of_two):
    cells.paths[2].write_bytes(b"no picture")
    cells.paths[3].write_bytes(b"")  # a part without any readable picture
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


def test_a_file_with_more_kinds_will_do_and_one_with_fewer_will_not(checkpoint, cells, tmp_path):
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


class Killed(BaseException):
    """Not an error that anybody handles."""


def kill_in_batch(embedder, n, monkeypatch):
    """The embedder's network fails in its n-th batch; returns the list of batch sizes that it saw."""
    seen, embed = [], embedder.encoder.embed

    def counting(images, kinds):
        if len(seen) + 1 == n:
            raise Killed
        seen.append(len(images))
        return embed(images, kinds)

    monkeypatch.setattr(embedder.encoder, "embed", counting)
    return seen


def test_a_killed_extraction_goes_on(checkpoint, cells, tmp_path, parts_of_two, monkeypatch):
    def embedder():
        return Embedder(checkpoint, image_size=28, batch_size=2)

    file = tmp_path / "out" / "features.h5"
    expected = embedder().features_of(cells, tmp_path / "whole.h5")
    first = embedder()
    seen = kill_in_batch(first, 4, monkeypatch)
    with pytest.raises(Killed):
        first.features_of(cells, file)
    assert seen == [2, 2, 2]
    assert not file.exists()
    assert [path.name for path in file.parent.iterdir()] == [".features.h5.parts"]
    second = embedder()
    seen = kill_in_batch(second, None, monkeypatch)
    found = second.features_of(cells, file)
    assert seen == [1]  # the seventh picture
    np.testing.assert_array_equal(found.features, expected.features)
    assert found.paths == expected.paths
    assert [path.name for path in file.parent.iterdir()] == ["features.h5"]


def other_weights(checkpoint, cells):
    content = torch.load(checkpoint, weights_only=True)
    content["model"]["norm.bias"] += 1
    torch.save(content, checkpoint)


def other_picture(checkpoint, cells):
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(cells.paths[1])


def other_order(checkpoint, cells):
    cells.paths.reverse()


@pytest.mark.parametrize(
    ("change", "settings", "n_again"),
    [
        (None, {}, 1),
        (None, {"precision": "bf16"}, 7 + 2 * 2),  # the first batch is compared with fp32
        (None, {"image_size": 42}, 7),
        (None, {"kinds": ["mean"]}, 7),
        (other_weights, {}, 7),
        (other_order, {}, 7),
        (other_picture, {}, 3),  # its part of two, and the one that was missing
    ],
)
def test_parts_of_something_else_are_not_used(
    change, settings, n_again, checkpoint, cells, tmp_path, parts_of_two, monkeypatch
):
    first = Embedder(checkpoint, image_size=28, batch_size=2)
    kill_in_batch(first, 4, monkeypatch)
    with pytest.raises(Killed):
        first.features_of(cells, tmp_path / "features.h5")
    if change:
        change(checkpoint, cells)
    second = Embedder(checkpoint, **{"image_size": 28, **settings})
    seen = kill_in_batch(second, None, monkeypatch)
    found = second.features_of(cells, tmp_path / "features.h5")
    assert sum(seen) == n_again
    fresh = second.extract(cells.paths)
    np.testing.assert_allclose(found.features, fresh.features, atol=1e-1 if "precision" in settings else 1e-5)


def test_a_damaged_part_is_named(checkpoint, cells, tmp_path, parts_of_two, monkeypatch):
    embedder = Embedder(checkpoint, image_size=28)
    kill_in_batch(embedder, 3, monkeypatch)
    with pytest.raises(Killed):
        embedder.features_of(cells, tmp_path / "features.h5")
    part = next((tmp_path / ".features.h5.parts").iterdir())
    part.write_bytes(b"")
    with pytest.raises(ValueError, match="is missing or damaged .* remove the folder and start again"):
        Embedder(checkpoint, image_size=28).features_of(cells, tmp_path / "features.h5")
    assert not (tmp_path / "features.h5").exists()


WORKER = """
import json, sys
from dinov2 import distributed
from dinov2.eval import extract_features
from dinov2.eval.features import encoders, loop
from dinov2.utils.command import exit_code

loop.PART_SIZE = 2
enable, disable, embed = distributed.enable, distributed.disable, encoders.DinoEncoder.embed
distributed.disable = lambda: None  # one group serves both commands

def counting(self, images, kinds):
    if len(seen) == stop_after:
        raise ValueError("out of luck")
    seen.append(len(images))
    return embed(self, images, kinds)

encoders.DinoEncoder.embed = counting
results = []
for arguments, stop_after in json.loads(sys.argv[1]):
    seen = []
    results.append((exit_code(lambda: extract_features.main(arguments)), sum(seen)))
    distributed.enable = lambda *_: None
with open(f"results.{distributed.get_rank()}.json", "w") as file:
    json.dump(results, file)
disable()
"""


def test_two_processes_write_what_one_writes(checkpoint, pictures, tmp_path, parts_of_two, monkeypatch):
    """Up to rounding, which depends on the number of threads; what they had finished is not embedded again."""
    monkeypatch.chdir(tmp_path)
    rows = "\n".join(f"{path},{path.stem > '3'},p{i % 3}" for i, path in enumerate(pictures))
    Path("cells.csv").write_text(f"Image Path,Label,patient\n{rows}\n")
    pictures[3].write_bytes(b"no picture")
    common = ["--checkpoint", str(checkpoint), "--data", "cells.csv", "--image-size", "28", "--device", "cpu"]
    common += ["--num-workers", "1", "--batch-size", "2", "--kinds", "cls", "last2+mean"]
    extract_features.main([*common, "--output-dir", "alone"])

    Path("worker.py").write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    commands = [([*common, "--output-dir", "shared"], stop_after) for stop_after in (1, None)]
    done = subprocess.run(
        [*torchrun, "worker.py", json.dumps(commands)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(Path(f"results.{rank}.json").read_text()) for rank in range(2)]
    assert [first for first, _ in results] == [[2, 2], [2, 1]]  # both failed, after a part each
    assert "out of luck" in done.stderr
    # parts 2 and 3 were left, with two pictures and one
    assert [code for _, (code, _) in results] == [0, 0]
    assert sorted(n for _, (_, n) in results) == [1, 2]
    assert done.stdout.count("6 cells, 2 classes") == 1  # said by one of them
    with h5py.File("alone/features.h5") as alone, h5py.File("shared/features.h5") as shared:
        assert set(alone) == set(shared)
        for name in alone:
            if alone[name].dtype.kind == "f":
                np.testing.assert_allclose(alone[name][:], shared[name][:], atol=1e-5)
            else:
                np.testing.assert_array_equal(alone[name][:], shared[name][:])
        described = [{name: value for name, value in f.attrs.items() if name != "date"} for f in (alone, shared)]
        assert described[0] == described[1]
    assert os.listdir("shared") == ["features.h5"]

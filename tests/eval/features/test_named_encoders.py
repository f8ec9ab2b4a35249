"""Encoders by name: their features are those of the libraries, after the transforms of the libraries."""

import json
import pickle
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from dinov2.data.datasets import LabelledCells
from dinov2.data.datasets.decode import decode_image
from dinov2.eval.features.encoders import state_sha256
from dinov2.eval.features.extract import Embedder, extract
from dinov2.eval.features.named_encoders import build_encoder, colour_histogram, raw_pixels


@pytest.fixture
def timm():
    timm = pytest.importorskip("timm")
    pytest.importorskip("timm.data")
    return timm


@pytest.fixture
def models():
    return pytest.importorskip("torchvision.models")


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8))


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(1)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 256, (50, 40 + i, 3), dtype=np.uint8)).save(path)
    return paths


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return build().eval()


def embed(encoder, image, kinds):
    encoder.check(kinds)
    with torch.no_grad():
        return encoder.embed(encoder.preparation(np.asarray(image))[None], kinds)


def timm_input(timm, network, image, size):
    config = {**timm.data.resolve_model_data_config(network), "input_size": (3, size, size)}
    return timm.data.create_transform(**config, is_training=False)(image)[None]


@pytest.mark.parametrize("size", [160, 96])
def test_a_timm_vit_gives_its_own_tokens(size, timm, image, tmp_path):
    network = seeded(lambda: timm.create_model("test_vit", pretrained=False, img_size=size))
    torch.save({"state_dict": network.state_dict()}, tmp_path / "vit.pth")
    encoder = build_encoder("timm:test_vit", image_size=size, weights=str(tmp_path / "vit.pth"))
    found = embed(encoder, image, ["cls", "mean", "cls+mean", "last1", "last2", "last3+mean", "patches"])
    with torch.no_grad():
        inputs = timm_input(timm, network, image, size)
        tokens = network.forward_features(inputs)  # [1, 1 + P, D]
        cls_token, mean = network.forward_head(tokens, pre_logits=True), tokens[:, 1:].mean(dim=1)
        layers = network.get_intermediate_layers(inputs, n=3, return_prefix_tokens=True, norm=True)
    cls_tokens = [prefix[:, 0] for _, prefix in layers]
    expected = {
        "cls": cls_token,
        "mean": mean,
        "cls+mean": torch.cat([cls_token, mean], dim=1),
        "last1": cls_token,
        "last2": torch.cat(cls_tokens[1:], dim=1),
        "last3+mean": torch.cat([*cls_tokens, mean], dim=1),
    }
    assert set(found) == {*expected, "patches"}
    for kind, values in expected.items():
        torch.testing.assert_close(found[kind], values, rtol=1e-5, atol=1e-5)
    assert found["patches"].shape == (1, size // 16, size // 16, 64)
    torch.testing.assert_close(found["patches"][0, 1, 2].float(), tokens[0, 1 + size // 16 + 2], rtol=1e-2, atol=1e-2)
    assert f"crop {size} px" in encoder.transform
    assert "bicubic" in encoder.transform


def test_a_timm_resnet_gives_its_pooled_feature(timm, image, tmp_path):
    from safetensors.torch import save_file

    network = seeded(lambda: timm.create_model("test_resnet", pretrained=False))
    save_file(network.state_dict(), tmp_path / "resnet.safetensors")
    encoder = build_encoder("timm:test_resnet", weights=str(tmp_path / "resnet.safetensors"))
    with torch.no_grad():
        inputs = timm_input(timm, network, image, 160)
        expected = network.forward_head(network.forward_features(inputs), pre_logits=True)
    torch.testing.assert_close(embed(encoder, image, ["cls"])["cls"], expected, rtol=1e-5, atol=1e-5)
    assert encoder.origin == str(tmp_path / "resnet.safetensors")
    for kind in ("mean", "last2", "patches", "cls+mean"):
        with pytest.raises(ValueError, match="timm:test_resnet has only cls"):
            encoder.check(["cls", kind])


def test_a_timm_vit_that_pools_its_patches(timm, image):
    """`cls` is what the classifier takes, `last1` the CLS token itself."""
    encoder = build_encoder("timm:test_vit", weights="untrained")
    encoder.network.global_pool = "avg"
    found = embed(encoder, image, ["cls", "last1", "mean"])
    with torch.no_grad():
        tokens = encoder.network.forward_features(timm_input(timm, encoder.network, image, 160))
        pooled = encoder.network.forward_head(tokens, pre_logits=True)
    assert not torch.allclose(pooled, tokens[:, 0], atol=1e-3)
    torch.testing.assert_close(found["cls"], pooled, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["last1"], tokens[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["mean"], tokens[:, 1:].mean(dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "layer", "size"), [("resnet18", "fc", 0), ("mobilenet_v3_small", "classifier.3", 64)])
def test_a_torchvision_network_gives_what_its_classifier_takes(name, layer, size, models, image, tmp_path):
    network = seeded(lambda: models.get_model(name, weights=None))
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    encoder = build_encoder(f"torchvision:{name}", image_size=size, weights=str(tmp_path / "weights.pth"))
    taken = []
    network.get_submodule(layer).register_forward_hook(lambda _, inputs, __: taken.append(inputs[0].detach()))
    preset = models.get_model_weights(name).DEFAULT.transforms()
    if size:
        preset.resize_size, preset.crop_size = [round(preset.resize_size[0] * size / 224)], [size]
    with torch.no_grad():
        network(preset(image)[None])
    torch.testing.assert_close(embed(encoder, image, ["cls"])["cls"], taken[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="has only cls"):
        encoder.check(["patches"])


def test_old_releases_of_torchvision_load(models, image, tmp_path):
    """As torchvision's ResNets and DenseNets are on its server."""
    network = seeded(lambda: models.densenet121())
    old_name = re.compile(r"(denselayer\d+\.(?:norm|conv))(\d\.)")
    state = {old_name.sub(r"\1.\2", k): v for k, v in network.state_dict().items() if "num_batches" not in k}
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    torch.save(state, tmp_path / "densenet.pth")
    encoder = build_encoder("torchvision:densenet121", image_size=64, weights=str(tmp_path / "densenet.pth"))
    network.classifier = nn.Identity()
    assert state_sha256(network) == encoder.sha256


def test_baselines_are_those_of_the_protocols(files):
    for name, compute in (("pixels", raw_pixels), ("histogram", colour_histogram)):
        embedder = Embedder(encoder_name=name, batch_size=2)
        expected = np.stack([compute(decode_image(file)) for file in files])
        np.testing.assert_array_equal(embedder.extract(files).features, expected)
    assert Embedder(encoder_name="pixels").identity != Embedder(encoder_name="histogram").identity


def test_ports_of_dinobloom_get_the_size_of_its_training(timm, tmp_path, caplog):
    """Their config.json may state the 518 px of DINOv2's networks, for which timm would resize position embeddings."""
    folder = tmp_path / "vit_tiny_patch14_224.dinobloom"
    arguments = {"patch_size": 14, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 0, "init_values": 1e-5}
    network = seeded(lambda: timm.create_model("vit_small_patch14_dinov2", img_size=224, **arguments))
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_small_patch14_dinov2", "num_classes": 0, "model_args": arguments}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {"input_size": [3, 518, 518]}}))
    with caplog.at_level("INFO", logger="dinov2"):
        encoder = build_encoder(f"timm:local-dir:{folder}")
    assert encoder.image_size == 224
    assert "crop 224 px" in encoder.transform
    torch.testing.assert_close(encoder.network.pos_embed, network.pos_embed)
    assert "images of 224 px, at which DinoBloom was trained" in caplog.text
    assert build_encoder(f"timm:local-dir:{folder}", image_size=112).network.pos_embed.shape[1] == 1 + 8 * 8


@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:resnet18", "pixels", "histogram"])
def test_preparations_can_go_to_other_processes(name, image, timm, models):
    encoder = build_encoder(name, weights="" if name in ("pixels", "histogram") else "untrained")
    copy = pickle.loads(pickle.dumps(encoder.preparation))
    torch.testing.assert_close(copy(np.asarray(image)), encoder.preparation(np.asarray(image)), rtol=0, atol=0)


def test_untrained_weights_are_seeded_and_leave_the_random_state_alone(timm):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, second = (build_encoder("timm:test_vit", weights="untrained") for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.sha256 == second.sha256 == state_sha256(second.network)
    assert first.origin == "untrained, seed 0"
    with torch.no_grad():
        second.network.norm.bias[0] += 1
    assert state_sha256(second.network) != first.sha256


def test_features_of_a_named_encoder_say_where_they_are_from(files, tmp_path, timm):
    cells = LabelledCells(files, np.array([0, 1, 0]), ["a", "b"])
    embedder = Embedder(encoder_name="timm:test_vit", encoder_weights="untrained", image_size=64, kinds=["mean"])
    found = embedder.features_of(cells, tmp_path / "features.h5")
    assert found.attributes["model"] == "timm:test_vit"
    assert found.attributes["checkpoint"] == "untrained, seed 0"
    assert found.attributes["checkpoint_sha256"] == state_sha256(embedder.encoder.network)
    assert found.attributes["image_size"] == "64"
    assert found.kind == "mean"
    again = Embedder(encoder_name="timm:test_vit", encoder_weights="untrained", image_size=64, kinds=["mean"])
    assert again.features_of(cells, tmp_path / "features.h5").attributes == found.attributes
    with pytest.raises(ValueError, match="model is 'timm:test_vit' there and 'pixels' here; checkpoint_sha256 is"):
        Embedder(encoder_name="pixels").features_of(cells, tmp_path / "features.h5")


def refuse(error):
    def build(*_, **__):
        raise error

    return build


@pytest.mark.parametrize("name", ["test_vit", "hf-hub:owner/name"])
def test_an_unreachable_hub_names_the_way_out(name, timm, monkeypatch):
    monkeypatch.setattr(timm, "create_model", refuse(OSError("no route to host\nand more")))
    with pytest.raises(ConnectionError) as caught:
        build_encoder(f"timm:{name}")
    assert "cannot be downloaded (no route to host); on a machine with access fetch " in str(caught.value)
    if name == "test_vit":
        assert "model.safetensors from https://huggingface.co/timm/test_vit.r160_in1k, and" in str(caught.value)
        assert "--encoder-weights" in str(caught.value)
    else:
        assert "timm:local-dir:<folder>" in str(caught.value)


def test_an_unreachable_torchvision_server_is_named(models, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse(OSError("no route to host")))
    with pytest.raises(ConnectionError, match=r"fetch https://.*resnet18-\w+\.pth .*--encoder-weights"):
        build_encoder("torchvision:resnet18")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet18", {}, "'resnet18' is unknown; there are timm:<model>, torchvision:<model>, histogram, pixels"),
        ("timm:", {}, "'timm:' is unknown"),
        ("timm:test_vitt", {}, "no such model; perhaps test_vit"),
        ("timm:test_vit.nosuch", {"weights": "untrained"}, "timm does not build it"),
        ("torchvision:resnet19", {}, "no such model; perhaps resnet18"),
        ("torchvision:fasterrcnn_resnet50_fpn", {}, "no such model"),
        ("torchvision:squeezenet1_1", {"weights": "untrained"}, "no linear classifier"),
        (
            "timm:test_vit",
            {"image_size": 100, "weights": "untrained"},
            "patches of 16 px do not fill it; take 96 or 112",
        ),
        ("torchvision:maxvit_t", {"image_size": 100, "weights": "untrained"}, "--image-size 100: .* cannot take it"),
        ("pixels", {"image_size": 64}, "it has no weights and one image size"),
        ("histogram", {"weights": "untrained"}, "it has no weights and one image size"),
    ],
)
def test_unknown_encoders_and_sizes_are_refused(name, settings, message, timm, models):
    with pytest.raises(ValueError, match=message):
        build_encoder(name, **settings)


def test_weights_of_another_network_are_refused(timm, models, tmp_path):
    with pytest.raises(FileNotFoundError, match="--encoder-weights: no file 'absent.pth'"):
        build_encoder("timm:test_vit", weights="absent.pth")
    other = tmp_path / "other.pth"
    torch.save(seeded(lambda: timm.create_model("test_resnet", pretrained=False)).state_dict(), other)
    for name in ("timm:test_vit", "torchvision:resnet18"):
        with pytest.raises(ValueError, match=r"other.pth: .* missing: .* unexpected: "):
            build_encoder(name, weights=str(other))
    torch.save({"module": nn.Identity()}, other)
    with pytest.raises(ValueError, match="would run code"):
        build_encoder("timm:test_vit", weights=str(other))


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="run `pip install timm`"):
        build_encoder("timm:test_vit")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_the_modules_to_compile_of_a_timm_network_are_called(name, image, timm):
    encoder = build_encoder(f"timm:{name}", 32, "untrained")
    images = encoder.preparation(np.asarray(image))[None]
    called = []
    for part in encoder.modules_to_compile():
        part.register_forward_hook(lambda module, *_: called.append(module))
    with torch.no_grad():
        encoder.embed(images, ["cls"])
    assert len(called) > 3


def image_with_centre(height, width, centre, border):
    array = np.empty((height, width, 3), dtype=np.uint8)
    array[:] = border
    array[height // 5 : -(height // 5), width // 5 : -(width // 5)] = centre
    return array


def test_the_histogram_sees_the_centre_only():
    red, blue = (200, 20, 20), (20, 20, 200)
    on_blue, on_red, blue_cell = (
        image_with_centre(100, 60, *colours) for colours in ((red, blue), (red, red), (blue, red))
    )
    features = np.stack([colour_histogram(image) for image in (on_blue, on_red, blue_cell)])
    assert features.shape == (3, 512)
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features[0], features[1])
    assert np.abs(features[0] - features[2]).max() == 1
    np.testing.assert_allclose((features**2).sum(axis=1), 1, rtol=1e-6)


def test_the_histogram_does_not_depend_on_size_or_place():
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    tile = np.tile(colours, (25, 25, 1))
    small, large = colour_histogram(tile[:80, :80]), colour_histogram(tile)
    np.testing.assert_allclose(small, large, atol=0.02)


def test_pixels_and_files(tmp_path):
    array = image_with_centre(64, 64, (0, 0, 0), (255, 255, 255))
    Image.fromarray(array).save(tmp_path / "cell.png")
    from_array = raw_pixels(array).numpy()
    from_file = extract(build_encoder("pixels"), [tmp_path / "cell.png"]).features[0]
    assert from_array.shape == (32 * 32 * 3,)
    np.testing.assert_array_equal(from_array, from_file)
    assert from_array.min() == 0
    assert from_array.max() == 1
    assert from_array.reshape(3, 32, 32)[:, 16, 16].max() == 0

"""Encoders: kinds, hashes, compilation."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dinov2.eval.features.encoders import DinoEncoder, Kind, state_sha256
from dinov2.eval.features.extract import embed_images
from dinov2.models import build_backbone


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8))


def test_the_hash_knows_names_types_and_shapes():
    networks = [nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 3, dtype=torch.float64), nn.Sequential(nn.Linear(2, 3))]
    for network in networks:
        nn.init.zeros_(network.get_parameter("0.weight" if isinstance(network, nn.Sequential) else "weight"))
        nn.init.zeros_(network.get_parameter("0.bias" if isinstance(network, nn.Sequential) else "bias"))
    assert len({state_sha256(network) for network in networks}) == 4
    assert len(state_sha256(networks[0])) == len(hashlib.sha256().hexdigest())


@pytest.mark.parametrize("name", ["", "last", "last0", "last01", "mean+cls", "patches+mean", "last2+"])
def test_names_of_kinds(name):
    with pytest.raises(ValueError, match="is unknown; there are cls, mean, cls"):
        Kind.parse(name)


def test_a_backbone_in_memory_has_the_hash_of_its_tensors():
    settings = {"embed_dim": 64, "depth": 1, "num_heads": 1, "patch_size": 14, "img_size": 28, "block_chunks": 0}
    encoder = DinoEncoder(build_backbone(settings), 28)
    assert encoder.sha256 == state_sha256(encoder.network)
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    torch.testing.assert_close(embed_images(encoder, images), embed_images(encoder.network, images), rtol=0, atol=0)


def test_compiled_blocks_give_the_same_features(image):
    settings = {"embed_dim": 64, "depth": 3, "num_heads": 1, "patch_size": 14, "img_size": 28, "block_chunks": 2}
    encoder = DinoEncoder(build_backbone(settings).eval(), 28)
    images = encoder.preparation(np.asarray(image))[None]
    kinds = ["cls", "last2", "patches"]
    with torch.no_grad():
        expected = [encoder.embed(images, ["cls"]), encoder.embed(images, kinds)]
        encoder.compile(backend="eager")
        found = [encoder.embed(images, ["cls"]), encoder.embed(images, kinds)]
    assert all(block._compiled_call_impl is not None for block in encoder.network.each_block())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)  # float16 among them

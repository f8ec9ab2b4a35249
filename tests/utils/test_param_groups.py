"""Parameter groups against upstream's."""

import pytest
import torch

from dinov2.layers import DINOHead
from dinov2.models.vision_transformer import vit_small
from dinov2.utils.param_groups import fuse_params_groups, get_params_groups_with_decay

BACKBONES = {
    "vit_small_d0.9": (0.9, {"num_register_tokens": 4, "block_chunks": 0}),
    "vit_small_d1.0": (1.0, {"block_chunks": 0}),
    "vit_small_chunk4_d0.9": (0.9, {"block_chunks": 4}),
}


def check(model, decay, golden, fused):
    groups = get_params_groups_with_decay(model, decay, patch_embed_lr_mult=0.2)
    ours = {g["name"]: [g["lr_multiplier"], g["wd_multiplier"], g["is_last_layer"]] for g in groups}
    assert ours.keys() == golden.keys()
    for name, expected in golden.items():
        assert ours[name] == pytest.approx(expected, rel=1e-12), name
    merged = fuse_params_groups(groups)
    shapes = [[g["lr_multiplier"], g["wd_multiplier"], g["is_last_layer"], len(g["params"])] for g in merged]
    assert len(shapes) == len(fused)
    for shape, expected in zip(shapes, fused, strict=True):
        assert shape == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_groups_are_upstreams(name, golden_json):
    decay, settings = BACKBONES[name]
    with torch.device("meta"):
        model = vit_small(patch_size=14, img_size=224, init_values=1e-5, **settings)
    golden = golden_json["param_groups"]
    check(model, decay, golden[name], golden[f"{name}/fused"])


def test_heads_do_not_decay(golden_json):
    golden = golden_json["param_groups"]
    check(DINOHead(64, 128), 0.9, golden["dino_head_d0.9"], golden["dino_head_d0.9/fused"])


def test_frozen_parameters_get_no_group():
    head = DINOHead(8, 16, hidden_dim=8, bottleneck_dim=4)
    head.mlp.requires_grad_(False)
    assert {g["name"] for g in get_params_groups_with_decay(head)} == {"last_layer.weight_g", "last_layer.weight_v"}

"""build_model, build_model_from_cfg, architecture and build_backbone of dinov2/models/__init__.py."""

import json
from types import SimpleNamespace

import pytest
import torch

from dinov2.models import architecture, build_backbone, build_model, build_model_from_cfg
from dinov2.models.vision_transformer import DinoVisionTransformer


def student_section(**changes) -> SimpleNamespace:
    section = {
        "arch": "vit_small",
        "patch_size": 14,
        "drop_path_rate": 0.3,
        "drop_path_uniform": True,
        "layerscale": 1e-5,
        "ffn_layer": "mlp",
        "block_chunks": 0,
        "qkv_bias": True,
        "proj_bias": True,
        "ffn_bias": True,
        "num_register_tokens": 0,
        "interpolate_antialias": False,
        "interpolate_offset": 0.1,
        "embed_dim": None,
        "depth": None,
        "num_heads": None,
    }
    return SimpleNamespace(**{**section, **changes})


@pytest.fixture(autouse=True)
def on_meta():
    """Shapes and settings are all that these tests look at; no memory is needed for the weights."""
    with torch.device("meta"):
        yield


def drop_rates(model) -> set[float]:
    return {block.sample_drop_ratio for block in model.blocks}


def shapes(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_student_and_teacher_are_the_same_but_for_stochastic_depth():
    cfg = SimpleNamespace(student=student_section(), crops=SimpleNamespace(global_crops_size=98))
    student, teacher, embed_dim = build_model_from_cfg(cfg)
    assert embed_dim == 384
    assert shapes(student) == shapes(teacher)
    assert student.pos_embed.shape == (1, 1 + 7 * 7, 384)
    assert drop_rates(student) == {0.3}
    assert drop_rates(teacher) == {0}


def test_only_the_teacher():
    cfg = SimpleNamespace(student=student_section(), crops=SimpleNamespace(global_crops_size=98))
    teacher, embed_dim = build_model_from_cfg(cfg, only_teacher=True)
    assert drop_rates(teacher) == {0}
    assert embed_dim == 384


def test_upstreams_suffix_is_dropped_and_the_config_left_as_it_is():
    section = student_section(arch="vit_base_memeff")
    teacher, embed_dim = build_model(section, only_teacher=True)
    assert embed_dim == 768
    assert section.arch == "vit_base_memeff"


def test_own_dimensions_replace_those_of_arch():
    section = student_section(embed_dim=96, depth=3, num_heads=2, layerscale=None)
    teacher, embed_dim = build_model(section, only_teacher=True, img_size=28)
    assert (embed_dim, teacher.n_blocks, teacher.num_heads) == (96, 3, 2)
    assert not any("gamma" in name for name in teacher.state_dict())


@pytest.mark.parametrize(
    ("arch", "embed_dim", "n_registers", "ffn_layer"),
    [
        ("dinov2_vits14", 384, 0, "mlp"),
        ("dinov2_vitb14_reg", 768, 4, "mlp"),
        ("dinov2_vitl14", 1024, 0, "mlp"),
        ("dinov2_vitg14", 1536, 0, "swiglufused"),
        ("dinov2_vitg14_reg", 1536, 4, "swiglufused"),
    ],
)
def test_names_of_released_networks_fix_what_their_weights_need(arch, embed_dim, n_registers, ffn_layer):
    teacher, _ = build_model(student_section(arch=arch, patch_size=16), only_teacher=True)
    assert (teacher.embed_dim, teacher.patch_size, teacher.ffn_layer) == (embed_dim, 14, ffn_layer)
    assert teacher.num_register_tokens == n_registers
    assert (teacher.interpolate_antialias, teacher.interpolate_offset) == ((True, 0.0) if n_registers else (False, 0.1))


def test_a_plain_giant_keeps_the_ffn_that_is_asked_for():
    teacher, _ = build_model(student_section(arch="vit_giant2", depth=1), only_teacher=True)
    assert teacher.ffn_layer == "mlp"


def test_fields_that_older_configs_lack_have_defaults():
    section = student_section()
    for name in (
        "num_register_tokens",
        "interpolate_antialias",
        "interpolate_offset",
        "embed_dim",
        "depth",
        "num_heads",
    ):
        delattr(section, name)
    teacher, _ = build_model(section, only_teacher=True)
    assert (teacher.num_register_tokens, teacher.interpolate_antialias, teacher.interpolate_offset) == (0, False, 0.1)


def test_an_interpolation_offset_of_zero_is_not_taken_for_missing():
    teacher, _ = build_model(student_section(interpolate_offset=0.0), only_teacher=True)
    assert teacher.interpolate_offset == 0.0


@pytest.mark.parametrize("arch", ["resnet50", "vit_huge", "DinoVisionTransformer"])
def test_an_unknown_arch_names_the_choices(arch):
    with pytest.raises(ValueError, match=f"arch: '{arch}' is unknown.*vit_small.*dinov2_vitg14_reg"):
        build_model(student_section(arch=arch))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ffn_layer": "swiglu", "num_register_tokens": 2, "interpolate_antialias": True, "interpolate_offset": 0.0},
        {"init_values": 0.1, "block_chunks": 2, "qkv_bias": False, "ffn_bias": False, "proj_bias": False},
        {"img_size": (28, 56), "in_chans": 1, "mlp_ratio": 2.5},
    ],
)
def test_a_description_rebuilds_the_network(settings):
    model = DinoVisionTransformer(
        **{"img_size": 56, "patch_size": 14, "embed_dim": 32, "depth": 4, "num_heads": 2, **settings}
    )
    description = json.loads(json.dumps(architecture(model)))  # plain Python survives any file format
    assert description["arch"] == "custom"
    twin = build_backbone(description)
    assert shapes(twin) == shapes(model)
    assert json.loads(json.dumps(architecture(twin))) == description


def test_a_description_names_known_sizes_and_may_rely_on_the_name():
    teacher, _ = build_model(student_section(), only_teacher=True)
    description = architecture(teacher)
    assert description["arch"] == "vit_small"
    assert description["layerscale"] == 1e-5
    short = {"arch": "vit_small", "patch_size": 14, "layerscale": 1e-5, "block_chunks": 0, "img_size": 224}
    assert shapes(build_backbone(short)) == shapes(teacher)
    assert build_backbone({"arch": "dinov2_vits14_reg"}).num_register_tokens == 4


def test_a_description_that_cannot_be_built_is_an_error():
    with pytest.raises(ValueError, match="unknown fields embed_dims; fields are arch, patch_size"):
        build_backbone({"arch": "vit_small", "embed_dims": 3})
    with pytest.raises(ValueError, match="size is unknown; give embed_dim, depth and num_heads"):
        build_backbone({"arch": "custom", "embed_dim": 32})

"""Against upstream's recorded numbers, and by properties.

tests/golden/README.md gives the formulas behind inputs and weights, and the reason for the tolerances.
"""

import numpy as np
import pytest
import torch

from dinov2.layers import block as block_module
from dinov2.layers.drop_path import n_kept_samples
from dinov2.models.vision_transformer import (
    DinoVisionTransformer,
    resize_pos_embed,
    vit_base,
    vit_giant2,
    vit_large,
    vit_small,
    vit_tiny,
)
from dinov2.utils.numerics import autocast, fast_matmul_within

VARIANTS = ["base", "swiglu", "reg4", "nols", "base98", "reg4_98", "base_224x98", "chunk2"]


def tiny(img_size=224, **settings) -> DinoVisionTransformer:
    settings = {"init_values": 1e-5, "block_chunks": 0, **settings}
    return DinoVisionTransformer(img_size=img_size, patch_size=14, embed_dim=64, depth=2, num_heads=4, **settings)


@pytest.fixture
def variant(formulas, golden_json):
    """(network, images, masks) of a recorded variant."""

    def make(name):
        config = golden_json["backbone_configs"][name]
        model = formulas.fill_(tiny(config["img_size"], **config["kw"]).eval(), f"golden/{name}")
        height, width = config["input"]
        n_patches = height * width // 14**2
        masks = torch.from_numpy(formulas.u01(f"golden/{name}/mask", 2 * n_patches).reshape(2, n_patches) < 0.4)
        return model, formulas.sym(f"golden/{name}/x", (2, 3, height, width), 2), masks

    with torch.no_grad():
        yield make


@pytest.fixture
def small(formulas):
    """A network for 56-px images (4 x 4 patches) with the formulas' weights."""

    def make(prefix="test/vit", **settings):
        return formulas.fill_(tiny(56, **settings), prefix)

    return make


def assert_close(actual: torch.Tensor, recorded: np.ndarray) -> None:
    assert actual.shape == recorded.shape
    np.testing.assert_allclose(actual.detach().numpy(), recorded, rtol=0, atol=2e-5)


def assert_checksum(actual: list[float], recorded: list[float]) -> None:
    _, absolute, squares = recorded
    for difference, scale in zip(np.subtract(actual, recorded), (absolute, absolute, squares), strict=True):
        assert abs(difference) <= 1e-5 * scale


# --- recorded numbers


@pytest.mark.parametrize("name", VARIANTS)
def test_state_dict_is_upstreams(variant, golden_json, name):
    model, _, _ = variant(name)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == golden_json["backbone_params"][name]


@pytest.mark.parametrize("name", VARIANTS)
def test_recorded_features(variant, formulas, golden_arrays, golden_json, name):
    model, x, masks = variant(name)
    assert masks.sum(1).tolist() == golden_json["backbone_mask_counts"][name]
    for case, mask in (("nomask", None), ("mask", masks)):
        out = model(x, masks=mask, is_training=True)
        assert out["masks"] is mask
        assert_close(out["x_norm_clstoken"], golden_arrays[f"bb/{name}/{case}/cls"])
        assert_close(out["x_norm_patchtokens"][:, ::4], golden_arrays[f"bb/{name}/{case}/patch"])
        if model.num_register_tokens:
            assert_close(out["x_norm_regtokens"], golden_arrays[f"bb/{name}/{case}/reg"])
        recorded = golden_json["backbone_checksum"][f"{name}/{case}"]
        assert_checksum(formulas.checksum(out["x_norm_patchtokens"]), recorded["patch"])
        assert_checksum(formulas.checksum(out["x_prenorm"]), recorded["prenorm"])
    assert_close(model(x), golden_arrays[f"bb/{name}/head"])


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.15), ("fp16", 0.03)])
@pytest.mark.parametrize("name", VARIANTS)
def test_recorded_features_on_a_gpu(variant, golden_arrays, name, precision, tolerance):
    """Normalised tokens are of order 1, so tolerances are a few roundings of the type."""
    model, x, masks = variant(name)
    with fast_matmul_within(False, "cuda"), autocast(precision, "cuda"):
        out = model.cuda()(x.cuda(), masks=masks.cuda(), is_training=True)
    for key, recorded in (("x_norm_clstoken", "cls"), ("x_norm_patchtokens", "patch")):
        tokens = out[key] if recorded == "cls" else out[key][:, ::4]
        expected = golden_arrays[f"bb/{name}/mask/{recorded}"]
        np.testing.assert_allclose(tokens.float().cpu().numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("n", [2, [0]])
@pytest.mark.parametrize("name", ["base", "reg4", "chunk2"])
def test_recorded_intermediate_layers(variant, formulas, golden_arrays, golden_json, name, n, norm):
    model, x, _ = variant(name)
    layers = model.get_intermediate_layers(x, n, return_class_token=True, norm=norm)
    assert len(layers) == (n if isinstance(n, int) else len(n))
    n_registers = model.num_register_tokens
    for i, (patches, cls) in enumerate(layers):
        key = f"il/{name}/n={n}/norm={int(norm)}/{i}"
        assert_close(cls, golden_arrays[f"{key}/cls"])
        # upstream's first tokens are the registers, which are left out here
        assert_close(patches[:, : 8 - n_registers], golden_arrays[f"{key}/patch_head8"][:, n_registers:])
        if not n_registers:
            assert_checksum(formulas.checksum(patches), golden_json["il"][key]["checksum"])


@pytest.mark.parametrize("name", ["base", "chunk2"])
def test_recorded_reshaped_layer(variant, formulas, golden_json, name):
    model, x, _ = variant(name)
    (reshaped,) = model.get_intermediate_layers(x, reshape=True)
    recorded = golden_json["il"][f"il/{name}/reshape"]
    assert list(reshaped.shape) == recorded["shape"]
    assert_checksum(formulas.checksum(reshaped), recorded["checksum"])


def test_recorded_list_forward(formulas, golden_arrays, golden_json):
    model = formulas.fill_(tiny(), "golden/base").train()
    x = [formulas.sym("golden/nest/g", (2, 3, 224, 224), 2), formulas.sym("golden/nest/l", (3, 3, 98, 98), 2)]
    masks = torch.from_numpy(formulas.u01("golden/nest/mask", 512).reshape(2, 256) < 0.4)
    large, little = model(x, masks=[masks, None], is_training=True)
    assert_close(large["x_norm_clstoken"], golden_arrays["nest/g_cls"])
    assert_close(little["x_norm_clstoken"], golden_arrays["nest/l_cls"])
    assert_checksum(formulas.checksum(large["x_prenorm"]), golden_json["nest"]["g"])
    assert_checksum(formulas.checksum(little["x_prenorm"]), golden_json["nest"]["l"])


def test_recorded_stochastic_depth(formulas, golden_arrays, golden_json, monkeypatch):
    calls = []

    def choose(n_samples, drop_rate, device):
        order = np.argsort(formulas.u01(f"perm/{len(calls)}", n_samples), kind="stable")
        calls.append(n_samples)
        n_kept = n_kept_samples(n_samples, drop_rate)
        return torch.from_numpy(order[:n_kept])

    monkeypatch.setattr(block_module, "choose_samples", choose)
    model = formulas.fill_(tiny(drop_path_rate=0.5, drop_path_uniform=True), "golden/base").train()
    x = [formulas.sym("golden/dp/g", (4, 3, 98, 98), 2), formulas.sym("golden/dp/l", (6, 3, 98, 98), 2)]
    large, little = model(x, masks=[None, None], is_training=True)
    assert calls == golden_json["droppath"]["perm_calls"]
    assert_close(large["x_norm_clstoken"], golden_arrays["droppath/g_cls"])
    assert_close(little["x_norm_clstoken"], golden_arrays["droppath/l_cls"])
    assert_checksum(formulas.checksum(large["x_prenorm"]), golden_json["droppath"]["g"])
    assert_checksum(formulas.checksum(little["x_prenorm"]), golden_json["droppath"]["l"])


@pytest.mark.parametrize("offset", [0.1, 0.0])
@pytest.mark.parametrize("antialias", [0, 1])
@pytest.mark.parametrize(("img_size", "size"), [(518, (224, 224)), (518, (98, 98)), (224, (98, 98)), (224, (224, 98))])
def test_recorded_position_embeddings(formulas, golden_arrays, golden_json, img_size, size, antialias, offset):
    model = tiny(img_size, interpolate_antialias=bool(antialias), interpolate_offset=offset)
    with torch.no_grad():
        model.pos_embed.copy_(formulas.sym(f"golden/pe{img_size}", model.pos_embed.shape, 0.2))
    key = f"{img_size}->{size[0]}x{size[1]}/aa={antialias}/off={offset}"
    tokens = torch.zeros(1, 1 + size[0] * size[1] // 14**2, 64)
    out = model.interpolate_pos_encoding(tokens, *size)
    assert_close(out[0, :, :16], golden_arrays[f"pe/{key}"])
    assert list(out.shape) == golden_json["posembed"][key]["shape"]
    assert_checksum(formulas.checksum(out), golden_json["posembed"][key]["checksum"])


def test_recorded_conversion_of_518_px_weights(formulas, golden_arrays):
    pos_embed = formulas.sym("golden/pe518", (1, 1 + 37 * 37, 64), 0.2)
    resized = resize_pos_embed(pos_embed, 16)
    assert_close(resized[0, :, :16], golden_arrays["pe/get_downloaded_dino_vit_interpolated(37->16)"])
    assert torch.equal(resized[:, 0], pos_embed[:, 0])


# --- position embeddings


def test_resize_pos_embed_takes_any_grid_and_keeps_the_dtype():
    pos_embed = torch.randn(1, 1 + 37 * 37, 8)
    for side in range(1, 40):
        assert resize_pos_embed(pos_embed, side).shape == (1, 1 + side * side, 8)
    resized = resize_pos_embed(pos_embed.bfloat16(), (7, 16))
    assert resized.shape == (1, 1 + 7 * 16, 8)
    assert resized.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 1370 + 4, 8), (1370, 8), (1, 1, 8)])
def test_resize_pos_embed_names_a_shape_it_cannot_use(shape):
    with pytest.raises(ValueError, match="pos_embed: shape.*square grid"):
        resize_pos_embed(torch.zeros(shape), 16)


@pytest.mark.parametrize("antialias", [False, True])
def test_interpolation_works_in_bfloat16(small, formulas, antialias):
    model = small(interpolate_antialias=antialias)
    x = formulas.sym("test/x", (2, 3, 84, 84), 1)
    with torch.no_grad():
        exact = model(x)
        half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=0.1, rtol=0.05)


def test_interpolation_trains_the_embedding(small, formulas):
    model = small()
    model(formulas.sym("test/x", (1, 3, 28, 84), 1)).sum().backward()
    assert model.pos_embed.grad.abs().sum() > 0


def test_a_network_for_oblong_images_uses_its_own_grid(formulas):
    model = formulas.fill_(tiny((28, 56)), "test/oblong")
    tokens = torch.zeros(1, 9, 64)
    assert model.interpolate_pos_encoding(tokens, 28, 56) is model.pos_embed
    turned = model.interpolate_pos_encoding(tokens, 56, 28)  # as many patches, another grid
    assert turned.shape == model.pos_embed.shape
    assert not torch.allclose(turned, model.pos_embed)


# --- forward


def test_a_list_gives_what_its_batches_give_alone(small, formulas):
    model = small(num_register_tokens=4, block_chunks=2)
    x = [formulas.sym("test/g", (2, 3, 56, 56), 1), formulas.sym("test/l", (3, 3, 28, 42), 1)]
    masks = [torch.arange(32).reshape(2, 16) % 3 == 0, None]
    with torch.no_grad():
        together = model(x, masks=masks, is_training=True)
        alone = [model(image, masks=mask, is_training=True) for image, mask in zip(x, masks, strict=True)]
        unmasked = model.forward_features(x)
    for a, b in zip(together, alone, strict=True):
        assert a.keys() == b.keys()
        for key in ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm"):
            torch.testing.assert_close(a[key], b[key], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(unmasked[1]["x_prenorm"], together[1]["x_prenorm"])


def test_what_lies_under_a_mask_has_no_influence(small, formulas):
    model = small()
    x = formulas.sym("test/x", (1, 3, 56, 56), 1)
    masks = torch.zeros(1, 16, dtype=torch.bool)
    masks[0, 5] = True  # second row, second column
    changed = x.clone()
    changed[:, :, 14:28, 14:28] = 7.0
    with torch.no_grad():
        assert torch.equal(model(x, masks=masks), model(changed, masks=masks))
        assert not torch.allclose(model(x), model(x, masks=masks), atol=1e-3)
        tokens = model.prepare_tokens_with_masks(x, masks)
    torch.testing.assert_close(tokens[0, 6], model.mask_token[0] + model.pos_embed[0, 6])


def test_registers_stand_between_cls_and_patches_without_a_position(small, formulas):
    model = small(num_register_tokens=3)
    tokens = model.prepare_tokens_with_masks(formulas.sym("test/x", (2, 3, 56, 56), 1))
    assert tokens.shape == (2, 1 + 3 + 16, 64)
    assert torch.equal(tokens[1, 1:4], model.register_tokens[0])
    torch.testing.assert_close(tokens[1, 0], model.cls_token[0, 0] + model.pos_embed[0, 0])


@pytest.mark.parametrize("depth_and_chunks", [(4, 2), (4, 4), (5, 2), (4, 1)])
def test_chunks_change_names_and_nothing_else(formulas, depth_and_chunks):
    depth, chunks = depth_and_chunks
    settings = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": depth, "num_heads": 2}
    flat = formulas.fill_(DinoVisionTransformer(**settings, block_chunks=0), "test/chunks")
    chunked = DinoVisionTransformer(**settings, block_chunks=chunks)
    size = depth // chunks
    renamed = {}
    for key, value in flat.state_dict().items():
        number = int(key.split(".")[1]) if key.startswith("blocks.") else 0
        renamed[key.replace("blocks.", f"blocks.{number // size}.")] = value
    chunked.load_state_dict(renamed, strict=True)
    x = formulas.sym("test/x", (2, 3, 28, 28), 1)
    with torch.no_grad():
        assert torch.equal(chunked(x), flat(x))
        for n in (2, [0, depth - 1]):
            for a, b in zip(chunked.get_intermediate_layers(x, n), flat.get_intermediate_layers(x, n), strict=True):
                assert torch.equal(a, b)


def test_intermediate_layers_leave_registers_out(small, formulas):
    model = small(num_register_tokens=4).eval()
    x = formulas.sym("test/x", (2, 3, 28, 56), 1)
    with torch.no_grad():
        full = model(x, is_training=True)
        ((patches, cls),) = model.get_intermediate_layers(x, 1, return_class_token=True)
        (grid,) = model.get_intermediate_layers(x, 1, reshape=True)
    assert torch.equal(patches, full["x_norm_patchtokens"])
    assert torch.equal(cls, full["x_norm_clstoken"])
    assert grid.shape == (2, 64, 2, 4)
    assert torch.equal(grid[:, :, 1, 3], patches[:, 7])


def test_intermediate_layers_stop_at_the_last_one_asked_for(small, formulas):
    model = small()
    model.blocks[1].register_forward_pre_hook(lambda *_: pytest.fail("block 1 isn't needed for layer 0"))
    model.get_intermediate_layers(formulas.sym("test/x", (1, 3, 28, 28), 1), [0])


@pytest.mark.parametrize("n", [0, 3, [2], [-1], []])
def test_asking_for_blocks_that_are_not_there_is_an_error(small, n):
    with pytest.raises(ValueError, match="network of 2 lacks"):
        small().get_intermediate_layers(torch.zeros(1, 3, 28, 28), n)


def test_stochastic_depth_acts_in_training_only(small, formulas):
    x = formulas.sym("test/x", (8, 3, 28, 28), 1)
    plain, dropping = small(), small(drop_path_rate=0.5, drop_path_uniform=True)
    torch.manual_seed(0)
    with torch.no_grad():
        assert not torch.allclose(dropping.train()(x), plain(x))
        assert torch.equal(dropping.eval()(x), plain(x))


def test_stochastic_depth_grows_with_depth_unless_uniform():
    settings = {"img_size": 28, "patch_size": 14, "embed_dim": 8, "depth": 5, "num_heads": 1, "block_chunks": 0}
    growing = DinoVisionTransformer(**settings, drop_path_rate=0.4)
    assert [block.sample_drop_ratio for block in growing.blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    uniform = DinoVisionTransformer(**settings, drop_path_rate=0.4, drop_path_uniform=True)
    assert [block.sample_drop_ratio for block in uniform.blocks] == [0.4] * 5


def test_the_student_forward_compiles_without_breaks(small, formulas):
    model = small(drop_path_rate=0.5, drop_path_uniform=True, num_register_tokens=1).train()
    x = [formulas.sym("test/g", (4, 3, 56, 56), 1), formulas.sym("test/l", (6, 3, 28, 28), 1)]
    masks = [torch.arange(64).reshape(4, 16) % 3 == 0, None]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.manual_seed(0)
    expected = model(x, masks=masks, is_training=True)
    torch.manual_seed(0)
    for a, b in zip(compiled(x, masks=masks, is_training=True), expected, strict=True):
        torch.testing.assert_close(a["x_norm_clstoken"], b["x_norm_clstoken"])


def test_identity_ffn_has_no_parameters(small, formulas):
    model = small(ffn_layer="identity")
    assert not any("mlp" in name for name in model.state_dict())
    assert model(formulas.sym("test/x", (1, 3, 28, 28), 1)).shape == (1, 64)


@pytest.mark.parametrize("size", [(57, 56), (56, 50), (13, 14)])
def test_a_image_that_patches_do_not_fill_is_an_error(small, size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} px.*multiple of the patch size"):
        small()(torch.zeros(1, 3, *size))


def test_constructor_errors_name_the_setting():
    with pytest.raises(ValueError, match="ffn_layer: 'moe' is unknown.*mlp, swiglu, swiglufused, identity"):
        tiny(ffn_layer="moe")
    with pytest.raises(ValueError, match="block_chunks: 3 of 2 blocks"):
        tiny(block_chunks=3)


# --- sizes and start values


@pytest.mark.parametrize(
    ("build", "n_parameters", "shape"),
    [
        (vit_tiny, 5_719_872, (192, 12, 3)),
        (vit_small, 22_056_576, (384, 12, 6)),
        (vit_base, 86_580_480, (768, 12, 12)),
        (vit_large, 304_368_640, (1024, 24, 16)),
        (vit_giant2, 1_136_480_768, (1536, 40, 24)),
    ],
)
def test_released_sizes(build, n_parameters, shape):
    ffn_layer = "swiglufused" if build is vit_giant2 else "mlp"
    with torch.device("meta"):
        model = build(patch_size=14, img_size=518, init_values=1.0, ffn_layer=ffn_layer, block_chunks=0)
    assert (model.embed_dim, model.n_blocks, model.num_heads) == shape
    assert model.num_features == model.embed_dim
    assert sum(p.numel() for p in model.parameters()) == n_parameters


def test_start_values():
    torch.manual_seed(0)
    model = DinoVisionTransformer(
        img_size=112, patch_size=14, embed_dim=128, depth=2, num_heads=2, init_values=0.1, num_register_tokens=4
    )
    for name, value in model.state_dict().items():
        if name == "patch_embed.proj.weight":
            assert value.abs().max() <= (3 * 14 * 14) ** -0.5  # torch's own
        elif name == "patch_embed.proj.bias":
            continue
        elif name in ("cls_token", "register_tokens"):
            assert 0 < value.abs().max() < 1e-5
        elif name == "pos_embed" or name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")):
            assert abs(value.std().item() - 0.02) < 1e-3
        elif name.endswith("gamma"):
            assert (value == 0.1).all()
        elif name.endswith("norm.weight") or "norm1.weight" in name or "norm2.weight" in name:
            assert (value == 1).all()
        else:
            assert name == "mask_token" or name.endswith("bias"), name
            assert not value.any()
    assert {module.eps for module in model.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-6}

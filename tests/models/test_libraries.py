"""The same weights in timm's and transformers' DINOv2: key names, parameter counts and features agree."""

import re

import pytest
import torch

from dinov2.models.vision_transformer import DinoVisionTransformer, vit_base, vit_giant2, vit_large, vit_small

REGISTERS = {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0}


@pytest.fixture
def small(formulas):
    def make(**settings):
        settings = {"img_size": 56, "init_values": 1e-5, "block_chunks": 0, **settings}
        model = DinoVisionTransformer(patch_size=14, embed_dim=64, depth=2, num_heads=4, **settings)
        return formulas.fill_(model.eval(), "test/libraries")

    with torch.no_grad():
        yield make


def to_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names to those of the released Hugging Face files."""
    renamed = {}
    for key, value in state.items():
        attention = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", key)
        if attention:
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                target = f"encoder.layer.{attention[1]}.attention.attention.{name}.{attention[2]}"
                renamed[target] = part.contiguous()
            continue
        key = key.replace("pos_embed", "position_embeddings").replace("patch_embed.proj", "patch_embeddings.projection")
        if not key.startswith(("blocks.", "norm.")):
            key = f"embeddings.{key}"
        key = key.replace("blocks.", "encoder.layer.").replace("attn.proj", "attention.output.dense")
        key = re.sub(r"ls(\d)\.gamma", r"layer_scale\1.lambda1", key)
        key = key.replace("mlp.w12", "mlp.weights_in").replace("mlp.w3", "mlp.weights_out")
        renamed[re.sub(r"^norm\.", "layernorm.", key)] = value
    return renamed


@pytest.mark.parametrize("settings", [{}, {"ffn_layer": "swiglufused"}, REGISTERS])
def test_transformers_gives_the_same_features(small, formulas, tmp_path, settings):
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    # transformers interpolates to the exact size: offset 0
    ours = small(**{"interpolate_offset": 0.0, **settings})
    has_registers = ours.num_register_tokens > 0
    config_class = transformers.Dinov2WithRegistersConfig if has_registers else transformers.Dinov2Config
    model_class = transformers.Dinov2WithRegistersModel if has_registers else transformers.Dinov2Model
    config = config_class(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_ratio=4,
        image_size=56,
        patch_size=14,
        use_swiglu_ffn="ffn_layer" in settings,
        **({"num_register_tokens": 4} if has_registers else {}),
    )
    config.save_pretrained(tmp_path)
    safetensors.save_file(to_transformers(ours.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    theirs.eval()

    masks = torch.arange(32).reshape(2, 16) % 3 == 0
    for size, mask in (((56, 56), None), ((56, 56), masks), ((28, 70), None)):
        x = formulas.sym("test/x", (2, 3, *size), 2)
        out = ours(x, masks=mask, is_training=True)
        tokens = theirs(x, bool_masked_pos=mask).last_hidden_state
        torch.testing.assert_close(tokens[:, 0], out["x_norm_clstoken"], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(
            tokens[:, 1 + ours.num_register_tokens :], out["x_norm_patchtokens"], atol=2e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_small_patch14_dinov2", {}),
        ("vit_small_patch14_reg4_dinov2", REGISTERS),
        ("vit_giant_patch14_dinov2", {"ffn_layer": "swiglufused"}),
    ],
)
def test_timm_gives_the_same_features(small, formulas, name, settings):
    timm = pytest.importorskip("timm")
    from timm.models.vision_transformer import checkpoint_filter_fn

    ours = small(**settings)
    mlp_ratio = {"mlp_ratio": 2 * 176 / 64} if "ffn_layer" in settings else {}
    theirs = timm.create_model(name, depth=2, embed_dim=64, num_heads=4, img_size=56, num_classes=0, **mlp_ratio).eval()
    theirs.load_state_dict(checkpoint_filter_fn(dict(ours.state_dict()), theirs), strict=True)
    x = formulas.sym("test/x", (2, 3, 56, 56), 2)
    out = ours(x, is_training=True)
    tokens = theirs.forward_features(x)
    torch.testing.assert_close(tokens[:, 0], out["x_norm_clstoken"], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(
        tokens[:, 1 + ours.num_register_tokens :], out["x_norm_patchtokens"], atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("has_registers", [False, True])
@pytest.mark.parametrize(
    ("build", "size"), [(vit_small, "small"), (vit_base, "base"), (vit_large, "large"), (vit_giant2, "giant")]
)
def test_timm_has_the_same_weights_in_full_size(build, size, has_registers):
    """On the meta device: timm's own conversion of released files fits our state dict, name by name."""
    timm = pytest.importorskip("timm")
    from timm.models.vision_transformer import checkpoint_filter_fn

    settings = {"ffn_layer": "swiglufused" if size == "giant" else "mlp", **(REGISTERS if has_registers else {})}
    with torch.device("meta"):
        ours = build(patch_size=14, img_size=518, init_values=1.0, block_chunks=0, **settings)
        theirs = timm.create_model(f"vit_{size}_patch14_{'reg4_' if has_registers else ''}dinov2", num_classes=0)
    converted = {key: value.shape for key, value in checkpoint_filter_fn(dict(ours.state_dict()), theirs).items()}
    assert converted == {key: value.shape for key, value in theirs.state_dict().items()}


def test_transformers_has_the_same_weights_in_full_size():
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=1536,
        num_hidden_layers=40,
        num_attention_heads=24,
        image_size=518,
        patch_size=14,
        use_swiglu_ffn=True,
    )
    with torch.device("meta"):
        ours = vit_giant2(14, img_size=518, init_values=1.0, ffn_layer="swiglufused", block_chunks=0)
        theirs = transformers.Dinov2Model(config)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())

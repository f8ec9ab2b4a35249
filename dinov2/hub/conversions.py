"""Convert a backbone's tensors to and from the names of transformers' Dinov2 and of timm.

The network is the same in all three libraries; these things differ:

- transformers (`Dinov2Model`, `Dinov2WithRegistersModel`): queries, keys and values are three maps, ours is one. Files
  have one set of names; since release 5, networks in memory have another one, which also splits the gated network's
  first map. Both are read, and that of files is written.
- timm (`vit_*_patch14_dinov2`, `vit_*_patch14_reg4_dinov2`): there is no mask token; the gated network's maps are `fc1`
  and `fc2`; with registers, the CLS token includes its position.

Both always have layer scale and biases: ones and zeros are written for a network without them.

Dimension key:  D embedding dim, P patches, R register tokens, S side of the images in pixels
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov2.models.vision_transformer import SIZES

LAYER_NORM_EPS = 1e-6  # of all DINOv2 networks
THIRDS = ("query", "key", "value")

# ours -> transformers', outside the blocks
_HF_OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
# within a block, except attn.qkv; other names are the same
_HF_INSIDE = {
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}
# transformers' names in memory, since release 5 -> those of its files
_HF_IN_MEMORY = {
    **{f"attention.{third[0]}_proj": f"attention.attention.{third}" for third in THIRDS},
    "attention.o_proj": "attention.output.dense",
    "mlp.down_proj": "mlp.weights_out",
}
# our matrices -> their parts in transformers' files or memory, in this order
_HF_PARTS = {
    "attn.qkv": tuple(f"attention.attention.{third}" for third in THIRDS),
    "mlp.w12": ("mlp.gate_proj", "mlp.up_proj"),
}

_TIMM_GATED = {"mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"}
_TIMM_SIZES = {False: {"small": "vit_small", "base": "vit_base", "large": "vit_large"}, True: {"giant": "vit_giant2"}}
_TIMM_PATCH_SIZE, _TIMM_N_REGISTERS, _TIMM_MLP_RATIO = 14, 4, {False: 4.0, True: 2 * 2.66667}


def to_own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of any of the three libraries to our names."""
    is_hugging_face = any(name.endswith("embeddings.cls_token") for name in state)
    return from_hugging_face(state) if is_hugging_face else from_timm(state)


# --- transformers ---------------------------------------------------------------------------------------------------


def to_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a backbone's tensors, without block chunks, for `from_pretrained` of transformers' two classes."""
    renamed = {}
    for name, value in _add_missing_tensors(state).items():
        block, inner = _split_block(name)
        if block is None:
            renamed[_replace_module(name, _HF_OUTSIDE)] = value
        elif inner.startswith("attn.qkv."):
            for third, part in zip(_HF_PARTS["attn.qkv"], value.chunk(3), strict=True):
                # a copy: safetensors refuses views of one tensor
                renamed[f"encoder.layer.{block}.{third}{inner.removeprefix('attn.qkv')}"] = part.clone()
        else:
            renamed[f"encoder.layer.{block}.{_replace_module(inner, _HF_INSIDE)}"] = value
    return renamed


def from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of transformers' Dinov2 and Dinov2WithRegisters to ours, without a classifier."""
    outside = {theirs: ours for ours, theirs in _HF_OUTSIDE.items()}
    inside = {theirs: ours for ours, theirs in _HF_INSIDE.items()}
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        name = re.sub(r"^dinov2(_with_registers)?\.", "", name)  # in a network with a classifier
        if name.startswith("classifier."):
            continue
        match = re.match(r"encoder\.layer\.(\d+)\.(.+)", name)
        if match is None:
            renamed[_replace_module(name, outside)] = value
        else:
            renamed[f"blocks.{match[1]}.{_replace_module(_replace_module(match[2], _HF_IN_MEMORY), inside)}"] = value
    return _join_parts(renamed)


def _join_parts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the matrices that transformers splits, if all of their parts exist."""
    joined = dict(state)
    for name in state:
        block, inner = _split_block(name)
        for whole, parts in _HF_PARTS.items():
            if block is None or not inner.startswith(f"{parts[0]}."):
                continue
            suffix = inner.removeprefix(parts[0])
            names = [f"blocks.{block}.{part}{suffix}" for part in parts]
            if all(part in state for part in names):
                joined[f"blocks.{block}.{whole}{suffix}"] = torch.cat([joined.pop(part) for part in names])
    return joined


def hugging_face_config(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of transformers' `Dinov2Config`, or of `Dinov2WithRegistersConfig` for registers.

    For other image sizes than `image_size`, transformers interpolates position embeddings in its own way (bicubic,
    without offset and antialiasing). ValueError for an architecture that these classes do not support.
    """
    if architecture["mlp_ratio"] != int(architecture["mlp_ratio"]):
        raise ValueError(
            f"transformers' Dinov2 allows only whole multiples of the width in feed-forward networks; this one has "
            f"mlp_ratio {architecture['mlp_ratio']:g}"
        )
    config = {
        "hidden_size": architecture["embed_dim"],
        "num_hidden_layers": architecture["depth"],
        "num_attention_heads": architecture["num_heads"],
        "mlp_ratio": int(architecture["mlp_ratio"]),
        "use_swiglu_ffn": _is_gated(architecture),
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": architecture["img_size"],
        "patch_size": architecture["patch_size"],
        "num_channels": architecture["in_chans"],
        "qkv_bias": True,
    }
    if architecture["num_register_tokens"]:
        config["num_register_tokens"] = architecture["num_register_tokens"]
    return config


# --- timm -----------------------------------------------------------------------------------------------------------


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a backbone's tensors, without block chunks, for the timm model of `timm_arguments`."""
    renamed = {}
    for name, value in _add_missing_tensors(state).items():
        block, inner = _split_block(name)
        renamed[name if block is None else f"blocks.{block}.{_replace_module(inner, _TIMM_GATED)}"] = value
    del renamed["mask_token"]
    if "register_tokens" in renamed:
        renamed["reg_token"] = renamed.pop("register_tokens")  # [1, R, D]
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]  # [1, 1, D]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:].clone()  # [1, P, D]
    return renamed


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of timm's DINOv2 models to ours; timm keeps no mask token."""
    renamed = {}
    gated_names = {theirs: ours for ours, theirs in _TIMM_GATED.items()}
    first, second = (state.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    is_gated = first is not None and second is not None and first.shape[0] == 2 * second.shape[1]
    for name, value in state.items():
        block, inner = _split_block(name)
        if block is not None and is_gated:
            name = f"blocks.{block}.{_replace_module(inner, gated_names)}"
        renamed[name] = value
    if {"reg_token", "pos_embed"} <= renamed.keys():
        renamed["register_tokens"] = renamed.pop("reg_token")
        # timm's CLS token includes its position
        pos_embed = renamed["pos_embed"]
        renamed["pos_embed"] = torch.cat([torch.zeros_like(pos_embed[:, :1]), pos_embed], dim=1)  # [1, 1 + P, D]
    return renamed


def timm_arguments(architecture: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and further arguments of `timm.create_model` for a backbone.

    For instance ("vit_small_patch14_dinov2", {"img_size": 224, "num_classes": 0}). A network without a name in timm
    gets the name of a similar one and its dimensions as arguments. timm then accepts only images of side `img_size`,
    unless `dynamic_img_size=True` turns on its interpolation of position embeddings (bicubic with antialiasing).
    """
    is_gated, n_registers = _is_gated(architecture), architecture["num_register_tokens"]
    sizes = _TIMM_SIZES[is_gated]
    dimensions = {name: architecture[name] for name in ("embed_dim", "depth", "num_heads")}
    size = next((size for size, own_name in sizes.items() if SIZES[own_name] == dimensions), next(iter(sizes)))
    model_name = f"vit_{size}_patch{_TIMM_PATCH_SIZE}{f'_reg{_TIMM_N_REGISTERS}' if n_registers else ''}_dinov2"

    arguments = {name: value for name, value in dimensions.items() if SIZES[sizes[size]][name] != value}
    if architecture["patch_size"] != _TIMM_PATCH_SIZE:
        arguments["patch_size"] = architecture["patch_size"]
    if n_registers not in (0, _TIMM_N_REGISTERS):
        arguments["reg_tokens"] = n_registers
    embed_dim = architecture["embed_dim"]
    width = int(embed_dim * architecture["mlp_ratio"])
    if is_gated:
        width = 2 * ((int(width * 2 / 3) + 7) // 8 * 8)  # both halves of the gated map, as SwiGLUFFNFused has them
    if int(embed_dim * _TIMM_MLP_RATIO[is_gated]) != width:
        arguments["mlp_ratio"] = (width + 0.5) / embed_dim  # timm rounds down: + 0.5 against float errors
    return model_name, {"img_size": architecture["img_size"], "num_classes": 0, **arguments}


# --- for both -------------------------------------------------------------------------------------------------------


def _add_missing_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add layer scale of ones and biases of zeros to blocks without them."""
    completed = dict(state)
    n_blocks = 1 + max(int(block) for name in state if (block := _split_block(name)[0]) is not None)
    for prefix in (f"blocks.{i}." for i in range(n_blocks)):
        norm = state[f"{prefix}norm1.weight"]  # [D], has dtype and device
        for layer_scale in ("ls1.gamma", "ls2.gamma"):
            completed.setdefault(prefix + layer_scale, torch.ones_like(norm))
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "mlp.w12", "mlp.w3"):
            weight = state.get(f"{prefix}{layer}.weight")
            if weight is not None:
                completed.setdefault(f"{prefix}{layer}.bias", norm.new_zeros(weight.shape[0]))
    return completed


def _split_block(name: str) -> tuple[str | None, str]:
    """Split "blocks.3.attn.qkv.weight" into ("3", "attn.qkv.weight"); a name outside the blocks into (None, name)."""
    match = re.match(r"blocks\.(\d+)\.(.+)", name)
    return (match[1], match[2]) if match else (None, name)


def _replace_module(name: str, renamed: Mapping[str, str]) -> str:
    """Rename the module that `name` begins with: the first key of `renamed` that is all of `name` or ends at a dot.

    A name that matches no key stays the same.
    """
    old = next((old for old in renamed if name == old or name.startswith(f"{old}.")), "")
    return renamed[old] + name.removeprefix(old) if old else name


def _is_gated(architecture: Mapping[str, Any]) -> bool:
    return architecture["ffn_layer"] != "mlp"

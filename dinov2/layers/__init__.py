"""Modules of a vision transformer and its projection heads; none of them depends on how it is trained."""

from .attention import Attention, MemEffAttention
from .block import Block, LayerNorm, NestedTensorBlock
from .dino_head import DINOHead, WeightNormLinear
from .drop_path import DropPath
from .layer_scale import LayerScale
from .mlp import Mlp
from .patch_embed import PatchEmbed
from .projection_head import projection_head
from .swiglu_ffn import SwiGLUFFN, SwiGLUFFNFused

__all__ = [
    "Attention",
    "Block",
    "DINOHead",
    "DropPath",
    "LayerNorm",
    "LayerScale",
    "MemEffAttention",
    "Mlp",
    "NestedTensorBlock",
    "PatchEmbed",
    "SwiGLUFFN",
    "SwiGLUFFNFused",
    "WeightNormLinear",
    "projection_head",
]

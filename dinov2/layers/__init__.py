"""Modules of a vision transformer and its projection heads; none of them depends on how it is trained."""

from .attention import Attention, MemEffAttention
from .block import Block, DropPath, LayerNorm, LayerScale, NestedTensorBlock
from .dino_head import DINOHead, WeightNormLinear
from .mlp import Mlp, SwiGLUFFN, SwiGLUFFNFused
from .patch_embed import PatchEmbed

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
]

"""A plain PyTorch ViT that the benchmarks measure against: what upstream's backbone computes, the way it computes it.

Every token passes through every block, blocks run one by one without compilation, and attention on a CPU writes its
weights out, as upstream does where xFormers does not work; on CUDA it is torch's fused attention, in xFormers' place.
Stochastic depth is left out. Weights are this project's, so both compute the same numbers up to rounding.

Dimension key:  B pictures, P patches, R register tokens, N = 1 + R + P tokens, D embedding dim, H heads, d = D / H
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.models.vision_transformer import DinoVisionTransformer


class PlainPatches(nn.Module):
    """One linear map of each patch, as a convolution."""

    def __init__(self, n_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(n_channels, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, S, S] to [B, P, D], row by row."""
        return self.proj(x).flatten(2).transpose(1, 2)


class PlainAttention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V, then a linear map."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.scale = (dim // n_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to the same shape."""
        n_samples, n_tokens, dim = x.shape
        qkv = self.qkv(x).reshape(n_samples, n_tokens, 3, self.n_heads, dim // self.n_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, N, d]
        if x.is_cuda:
            attended = F.scaled_dot_product_attention(query, key, value)
        else:
            weights = ((query * self.scale) @ key.transpose(-2, -1)).softmax(dim=-1)  # [B, H, N, N]
            attended = weights @ value
        return self.proj(attended.transpose(1, 2).reshape(n_samples, n_tokens, dim))


class PlainMlp(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class PlainScale(nn.Module):
    """gamma * x."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to the same shape."""
        return x * self.gamma


class PlainBlock(nn.Module):
    """x <- x + ls1(attn(norm1(x)));  x <- x + ls2(mlp(norm2(x)))."""

    def __init__(self, dim: int, n_heads: int, hidden_dim: int, has_layer_scale: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = PlainAttention(dim, n_heads)
        self.ls1 = PlainScale(dim) if has_layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = PlainMlp(dim, hidden_dim)
        self.ls2 = PlainScale(dim) if has_layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to the same shape."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PlainViT(nn.Module):
    """The network of `like`, with its weights, on its device.

    Args:
        like: what to copy; its feed-forward networks are "mlp", as those of S, B and L.

    Raises:
        ValueError: for other feed-forward networks.
    """

    def __init__(self, like: DinoVisionTransformer) -> None:
        super().__init__()
        if like.ffn_layer != "mlp":
            raise ValueError(f"the plain ViT has the feed-forward network 'mlp' alone, not {like.ffn_layer!r}")
        dim = like.embed_dim
        self.patch_size = like.patch_size
        self.interpolate_offset = like.interpolate_offset
        self.grid = like.patch_embed.patches_resolution  # that pos_embed is made for
        self.patch_embed = PlainPatches(like.in_chans, dim, self.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros_like(like.pos_embed))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        n_registers = like.num_register_tokens
        self.register_tokens = nn.Parameter(torch.zeros(1, n_registers, dim)) if n_registers else None
        self.blocks = nn.ModuleList(
            PlainBlock(dim, like.num_heads, int(dim * like.mlp_ratio), bool(like.init_values))
            for _ in range(like.n_blocks)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.load_state_dict(like.state_dict())
        self.to(like.pos_embed.device)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As any module's, from a network of this project, whose blocks may stand in chunks (`blocks.0.7.` for 7)."""
        flat = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): value for name, value in state_dict.items()}
        return super().load_state_dict(flat, *args, **kwargs)

    def forward(self, x: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """CLS token [B, D] and patch tokens [B, P, D] after the last norm.

        Args:
            x: [B, 3, S, S] normalised pictures.
            masks: [B, P] bool, True where the mask token stands in for the patch.
        """
        grid = (x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size)
        patches = self.patch_embed(x)  # [B, P, D]
        if masks is not None:
            patches = torch.where(masks.unsqueeze(-1), self.mask_token.to(patches.dtype).unsqueeze(0), patches)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1) + self._positions(grid)
        first_patch = 1
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(len(x), -1, -1)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
            first_patch += registers.shape[1]
        for block in self.blocks:
            tokens = block(tokens)  # [B, N, D]
        normed = self.norm(tokens)
        return normed[:, 0], normed[:, first_patch:]

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """[1, 1 + P, D]: `pos_embed`, resized where the pictures are of another size than it is made for."""
        if grid == self.grid:
            return self.pos_embed
        scale = [(new + self.interpolate_offset) / old for new, old in zip(grid, self.grid, strict=True)]
        square = self.pos_embed[:, 1:].unflatten(1, self.grid).permute(0, 3, 1, 2)  # [1, D, rows, columns]
        resized = F.interpolate(square, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)

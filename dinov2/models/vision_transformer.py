"""Vision transformer of DINOv2 (Oquab et al. 2023, arXiv 2304.07193), with registers (Darcet et al. 2023, 2309.16588).

Dimension key:  B images, C channels, H x W pixels, P patches, R register tokens, N = 1 + R + P tokens, D embedding dim

State-dict names and the keys that `forward_features` returns are upstream's: released weights and users' scripts depend
on them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers import Block, LayerNorm, Mlp, NestedTensorBlock, PatchEmbed, SwiGLUFFNFused


def _no_ffn(**_: Any) -> nn.Module:
    return nn.Identity()


# "swiglu" is the same network as "swiglufused": upstream's two names differ only in the kernel
FFN_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "swiglu": SwiGLUFFNFused,
    "swiglufused": SwiGLUFFNFused,
    "identity": _no_ffn,
}


class BlockChunk(nn.ModuleList):
    """Consecutive blocks as one module; identities before them keep each block's number within the whole network."""

    def forward(self, x: Any) -> Any:
        """Apply the blocks in order to one tensor, or to a list of tensors."""
        for block in self:
            x = block(x)
        return x


class DinoVisionTransformer(nn.Module):
    """Vision transformer whose CLS token and patch tokens are both features.

    Args:
        img_size: size in pixels of the images that `pos_embed` is for, one number or (height, width); for other
            sizes it is interpolated.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first block.
        drop_path_uniform: use the same rate in all blocks instead.
        init_values: initial value of layer scale; None or 0 for no layer scale.
        ffn_layer: "mlp", "swiglu", "swiglufused" or "identity".
        block_chunks: number of BlockChunks that hold the blocks, visible in their state-dict names; 0 for none.
        interpolate_antialias: smooth `pos_embed` when it is reduced.
        interpolate_offset: added to the wanted number of rows and columns before the ratio is computed; networks
            without registers were trained with 0.1. 0.0 interpolates to the exact size.
        center_crop: side of the central square of an image that the network is made for, as a share of the shorter
            side. It is only recorded, for the preparation of images.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        ffn_bias: bool = True,
        proj_bias: bool = True,
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = False,
        init_values: float | None = None,
        embed_layer: Callable[..., PatchEmbed] = PatchEmbed,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        block_fn: Callable[..., nn.Module] = NestedTensorBlock,
        ffn_layer: str = "mlp",
        block_chunks: int = 1,
        num_register_tokens: int = 0,
        interpolate_antialias: bool = False,
        interpolate_offset: float = 0.1,
        center_crop: float = 1.0,
    ) -> None:
        super().__init__()
        if ffn_layer not in FFN_LAYERS:
            raise ValueError(f"ffn_layer: {ffn_layer!r} is unknown; choose one of {', '.join(FFN_LAYERS)}")
        if not 0 <= block_chunks <= depth:
            raise ValueError(f"block_chunks: {block_chunks} of {depth} blocks; choose 0 (no chunks) to {depth}")
        norm_layer = partial(LayerNorm, eps=1e-6)

        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.center_crop = center_crop
        self.num_features = self.embed_dim = embed_dim
        self.n_blocks, self.num_heads, self.mlp_ratio = depth, num_heads, mlp_ratio
        self.qkv_bias, self.ffn_bias, self.proj_bias = qkv_bias, ffn_bias, proj_bias
        self.init_values, self.ffn_layer, self.block_chunks = init_values, ffn_layer, block_chunks
        self.chunked_blocks = block_chunks > 0
        self.num_register_tokens = num_register_tokens
        self.interpolate_antialias = interpolate_antialias
        self.interpolate_offset = interpolate_offset

        self.patch_embed = embed_layer(img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        )
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))

        blocks = [
            block_fn(
                dim=embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                ffn_bias=ffn_bias,
                drop_path=drop_rate,
                norm_layer=norm_layer,
                act_layer=act_layer,
                ffn_layer=FFN_LAYERS[ffn_layer],
                init_values=init_values,
            )
            for drop_rate in _drop_rates(drop_path_rate, depth, drop_path_uniform)
        ]
        self.blocks = nn.ModuleList(_chunk(blocks, block_chunks) if self.chunked_blocks else blocks)
        self.norm = norm_layer(embed_dim)
        self.head = nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Set upstream's initial values; the patch embedding's convolution keeps torch's."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        nn.init.zeros_(self.mask_token)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def interpolate_pos_encoding(self, x: Tensor, w: int, h: int) -> Tensor:
        """Return the position embedding [1, 1 + P, D] of images of `w` x `h` pixels, in the dtype of `x`.

        It is interpolated (bicubic, in float32) if the size is not `img_size`. By upstream's names, w is the height.
        """
        return self._pos_embed_at(self._grid_of(w, h), x.dtype)

    def _grid_of(self, height: int, width: int) -> tuple[int, int]:
        return height // self.patch_size, width // self.patch_size

    def _pos_embed_at(self, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
        own_grid = self.patch_embed.patches_resolution
        if grid == own_grid:
            return self.pos_embed
        antialias = self.interpolate_antialias
        return _resize(self.pos_embed, own_grid, grid, offset=self.interpolate_offset, antialias=antialias).to(dtype)

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Compute the first block's input from images [B, C, H, W]: CLS token, registers and patches, [B, N, D].

        The mask token replaces the patches that are True in `masks` [B, P].
        """
        grid = self._grid_of(x.shape[-2], x.shape[-1])
        patches = self.patch_embed(x)  # [B, P, D]
        if masks is not None:
            patches = torch.where(masks.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        pos_embed = self._pos_embed_at(grid, self.pos_embed.dtype)  # [1, 1 + P, D]
        tokens = [(self.cls_token + pos_embed[:, :1]).expand(patches.shape[0], -1, -1)]
        if self.register_tokens is not None:  # they have no position
            tokens.append(self.register_tokens.expand(patches.shape[0], -1, -1))
        tokens.append(patches + pos_embed[:, 1:])
        return torch.cat(tokens, dim=1)  # [B, N, D]

    def forward_features_list(
        self, x_list: list[Tensor], masks_list: Sequence[Tensor | None] | None = None
    ) -> list[dict[str, Any]]:
        """Compute the features of several batches whose images may differ in size; each block is called once."""
        masks_list = masks_list or [None] * len(x_list)
        tokens = [self.prepare_tokens_with_masks(x, masks) for x, masks in zip(x_list, masks_list, strict=True)]
        for block in self.blocks:
            tokens = block(tokens)
        return [self._features(x, masks) for x, masks in zip(tokens, masks_list, strict=True)]

    def forward_features(self, x: Any, masks: Any = None) -> Any:
        """Compute the features of normalised images [B, C, H, W] with masks [B, P] or None, or of lists of both.

        Returns:
            x_norm_clstoken [B, D], x_norm_regtokens [B, R, D], x_norm_patchtokens [B, P, D], all after the last norm,
            x_prenorm [B, N, D] and masks; a list of such dictionaries for a list of images.
        """
        if isinstance(x, list):
            return self.forward_features_list(x, masks)
        return self.forward_features_list([x], [masks])[0]

    def _features(self, x: Tensor, masks: Tensor | None) -> dict[str, Any]:
        normed = self.norm(x)
        first_patch = 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:first_patch],
            "x_norm_patchtokens": normed[:, first_patch:],
            "x_prenorm": x,
            "masks": masks,
        }

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], ...]:
        """Return the patch tokens after chosen blocks, without registers.

        Args:
            n: number of last blocks, or the numbers of the blocks from 0; results are in the order of the blocks.
            reshape: return [B, D, H / patch, W / patch] instead of [B, P, D].
            return_class_token: return (patch tokens, CLS token [B, D]) for each block.
            norm: apply the network's last norm to each.
        """
        wanted = set(range(self.n_blocks - n, self.n_blocks)) if isinstance(n, int) else set(n)
        if not wanted or not wanted <= set(range(self.n_blocks)):
            raise ValueError(
                f"n: {n!r} asks for blocks that a network of {self.n_blocks} lacks; give 1 to {self.n_blocks} for the "
                f"last ones, or numbers between 0 and {self.n_blocks - 1}"
            )
        grid = self._grid_of(x.shape[-2], x.shape[-1])
        tokens = self.prepare_tokens_with_masks(x)
        layers: list[Tensor | tuple[Tensor, Tensor]] = []
        for number, block in enumerate(self.each_block()):
            tokens = block(tokens)
            if number in wanted:
                out = self.norm(tokens) if norm else tokens
                patches = out[:, 1 + self.num_register_tokens :]
                if reshape:
                    patches = patches.unflatten(1, grid).permute(0, 3, 1, 2).contiguous()  # [B, D, rows, cols]
                layers.append((patches, out[:, 0]) if return_class_token else patches)
            if number == max(wanted):
                break
        return tuple(layers)

    def each_block(self) -> Iterator[Block]:
        """Iterate over the transformer blocks in order, in chunks or not."""
        return (module for module in self.blocks.modules() if isinstance(module, Block))

    def forward(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """Return forward_features' dictionary if `is_training`, else `head` (identity) of the CLS tokens [B, D]."""
        features = self.forward_features(*args, **kwargs)
        return features if is_training else self.head(features["x_norm_clstoken"])


def _drop_rates(rate: float, depth: int, uniform: bool) -> list[float]:
    if uniform:
        return [rate] * depth
    # upstream's float32 steps: the rounding can decide how many samples a block keeps; on the CPU, so that networks
    # can be built on "meta"
    return torch.linspace(0, rate, depth, device="cpu").tolist()


def _chunk(blocks: list[nn.Module], n_chunks: int) -> list[nn.Module]:
    size = len(blocks) // n_chunks
    return [
        BlockChunk([nn.Identity() for _ in range(start)] + blocks[start : start + size])
        for start in range(0, len(blocks), size)
    ]


def _resize(
    pos_embed: Tensor, source: tuple[int, int], grid: tuple[int, int], *, offset: float, antialias: bool
) -> Tensor:
    """Resize [1, 1 + rows * cols, D] from grid `source` to `grid`, bicubic, in float32; the CLS token's entry stays."""
    pos_embed = pos_embed.float()  # some low-precision types and devices lack bicubic interpolation
    patches = pos_embed[:, 1:].unflatten(1, source).permute(0, 3, 1, 2)  # [1, D, rows, cols]
    if offset:
        # released networks were trained with this shift: the ratio, not the size, sets the sampling points
        scale = ((grid[0] + offset) / source[0], (grid[1] + offset) / source[1])
        patches = F.interpolate(patches, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=antialias)
    assert patches.shape[-2:] == grid, f"pos_embed came out as {tuple(patches.shape[-2:])} instead of {grid}"
    return torch.cat([pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def resize_pos_embed(pos_embed: Tensor, grid: int | tuple[int, int]) -> Tensor:
    """Resize the `pos_embed` of a weight file to another grid of patches: bicubic, without offset or antialiasing.

    DinoBloom starts its 224-px networks (16 x 16 patches) in this way from DINOv2's 518-px weights (37 x 37).
    `pos_embed` [1, 1 + S * S, D] has the CLS token's entry first, then a square grid row by row. The result is
    [1, 1 + rows * cols, D].
    """
    rows, cols = (grid, grid) if isinstance(grid, int) else grid
    n_patches = pos_embed.shape[1] - 1 if pos_embed.ndim == 3 else 0
    side = math.isqrt(max(n_patches, 0))
    if side == 0 or side * side != n_patches:
        raise ValueError(
            f"pos_embed: shape {tuple(pos_embed.shape)} isn't [1, 1 + S * S, D]; give the embedding of a CLS token "
            f"and a square grid of patches, without entries for registers"
        )
    return _resize(pos_embed, (side, side), (rows, cols), offset=0.0, antialias=False).to(pos_embed.dtype)


# dimensions of the networks that the functions below build
SIZES: dict[str, dict[str, int]] = {
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vit_giant2": {"embed_dim": 1536, "depth": 40, "num_heads": 24},
}


def _build(size: str, settings: dict[str, Any]) -> DinoVisionTransformer:
    return DinoVisionTransformer(**{**SIZES[size], **settings})


def vit_tiny(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """Build ViT-Ti: D 192, 12 blocks, 3 heads (6 M parameters); for demos and quick runs, upstream has none."""
    return _build("vit_tiny", {"patch_size": patch_size, "num_register_tokens": num_register_tokens, **kwargs})


def vit_small(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """Build ViT-S: D 384, 12 blocks, 6 heads (22 M parameters)."""
    return _build("vit_small", {"patch_size": patch_size, "num_register_tokens": num_register_tokens, **kwargs})


def vit_base(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """Build ViT-B: D 768, 12 blocks, 12 heads (86 M parameters)."""
    return _build("vit_base", {"patch_size": patch_size, "num_register_tokens": num_register_tokens, **kwargs})


def vit_large(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """Build ViT-L: D 1024, 24 blocks, 16 heads (304 M parameters)."""
    return _build("vit_large", {"patch_size": patch_size, "num_register_tokens": num_register_tokens, **kwargs})


def vit_giant2(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """Build ViT-g with 64 channels a head: D 1536, 40 blocks, 24 heads (1.1 B parameters)."""
    return _build("vit_giant2", {"patch_size": patch_size, "num_register_tokens": num_register_tokens, **kwargs})

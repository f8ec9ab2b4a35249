"""One transformer layer, over one batch of token sequences or over several of different lengths at once.

Dimension key:  B samples, N tokens of a sample, T all tokens of all batches, D embedding dim
"""

from collections.abc import Callable, Sequence
from typing import overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Attention
from .drop_path import choose_samples
from .layer_scale import LayerScale
from .mlp import Mlp

Shapes = Sequence[tuple[int, int]]
Branch = Callable[[Tensor, Shapes | None], Tensor]


class Block(nn.Module):
    """Pre-norm transformer layer with layer scale and stochastic depth.

    x <- x + ls1(attn(norm1(x)));   x <- x + ls2(mlp(norm2(x)))

    While training with `drop_path` > 0, each of the two branches is computed for a random
    max(int(B * (1 - drop_path)), 1) of the samples only, and what it adds to them is multiplied by B over that number.

    Args:
        dim: D.
        num_heads: attention heads.
        mlp_ratio: width of the feed-forward network over D.
        qkv_bias, proj_bias, ffn_bias: which linear maps have a bias.
        drop, attn_drop: dropout probabilities, see Attention and Mlp.
        init_values: where layer scale starts; None or 0 for no layer scale.
        drop_path: share of the samples that skip a branch.
        act_layer, norm_layer, attn_class, ffn_layer: what the parts are built with.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        attn_class: Callable[..., nn.Module] = Attention,
        ffn_layer: Callable[..., nn.Module] = Mlp,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attn_class(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=drop,
        )
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = ffn_layer(
            in_features=dim, hidden_features=int(dim * mlp_ratio), act_layer=act_layer, drop=drop, bias=ffn_bias
        )
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.sample_drop_ratio = drop_path
        self.checkpoint_activations = False  # compute the inner values again in backward instead of keeping them

    @overload
    def forward(self, x_or_x_list: Tensor) -> Tensor: ...

    @overload
    def forward(self, x_or_x_list: list[Tensor]) -> list[Tensor]: ...

    def forward(self, x_or_x_list: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """One tensor [B, N, D], or a list of such with B and N of their own; gives back the same shapes."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(self._forward, x_or_x_list, use_reentrant=False)
        return self._forward(x_or_x_list)

    def _forward(self, x_or_x_list: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        x_list = [x_or_x_list] if isinstance(x_or_x_list, Tensor) else x_or_x_list
        if self.training and self.sample_drop_ratio > 0:
            x_list = self._add_for_some_samples(x_list, self._attention_branch)
            x_list = self._add_for_some_samples(x_list, self._ffn_branch)
        else:
            x, shapes = _pack(x_list)
            x = x + self._attention_branch(x, shapes)
            x = x + self._ffn_branch(x, shapes)
            x_list = _unpack(x, shapes)
        return x_list[0] if isinstance(x_or_x_list, Tensor) else x_list

    def _attention_branch(self, x: Tensor, shapes: Shapes | None) -> Tensor:
        x = self.norm1(x)
        return self.ls1(self.attn(x) if shapes is None else self.attn(x, shapes))

    def _ffn_branch(self, x: Tensor, shapes: Shapes | None) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x)))

    def _add_for_some_samples(self, x_list: list[Tensor], branch: Branch) -> list[Tensor]:
        chosen = [choose_samples(x.shape[0], self.sample_drop_ratio, x.device) for x in x_list]
        kept = [x if index is None else x.index_select(0, index) for x, (index, _) in zip(x_list, chosen, strict=True)]
        packed, shapes = _pack(kept)
        residuals = _unpack(branch(packed, shapes), shapes)
        added = []
        for x, (index, scale), residual in zip(x_list, chosen, residuals, strict=True):
            if index is None:
                added.append(x + residual)
            else:
                added.append(x.index_add(0, index, residual.to(x.dtype), alpha=scale))
        return added


NestedTensorBlock = Block  # upstream's name for the variant that takes lists; one class does both here


def _pack(x_list: list[Tensor]) -> tuple[Tensor, Shapes | None]:
    """All tokens as one [T, D] with the (B, N) they came from; a single tensor stays [B, N, D], uncopied."""
    if len(x_list) == 1:
        return x_list[0], None
    return torch.cat([x.flatten(0, 1) for x in x_list]), [(x.shape[0], x.shape[1]) for x in x_list]


def _unpack(x: Tensor, shapes: Shapes | None) -> list[Tensor]:
    """Undo _pack, as views."""
    if shapes is None:
        return [x]
    batches = x.split([n_samples * n_tokens for n_samples, n_tokens in shapes])
    return [batch.unflatten(0, shape) for batch, shape in zip(batches, shapes, strict=True)]

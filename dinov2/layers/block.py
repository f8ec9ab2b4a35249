"""One transformer layer.

Dimension key:  B samples, N tokens of a sample, D embedding dim
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Attention
from .drop_path import choose_samples
from .layer_scale import LayerScale
from .mlp import Mlp


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that accepts float32 input when sharding has gathered its weights in half precision.

    On CUDA, autocast converts the types. On a CPU it does not, and torch's kernel refuses mixed types.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., D] over its last dimension."""
        if x.dtype != torch.float32 or self.weight.dtype == torch.float32:
            return super().forward(x)
        return F.layer_norm(x, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class Block(nn.Module):
    """Pre-norm transformer layer with layer scale and stochastic depth.

    x <- x + ls1(attn(norm1(x)));   x <- x + ls2(mlp(norm2(x)))

    During training with `drop_path` > 0, each branch is computed for n = max(int(B * (1 - drop_path)), 1) random
    samples only, and its result is multiplied by B / n.

    Args:
        dim: D.
        num_heads: attention heads.
        mlp_ratio: width of the feed-forward network divided by D.
        qkv_bias, proj_bias, ffn_bias: use a bias in these linear maps.
        drop, attn_drop: dropout probabilities, see Attention and Mlp.
        init_values: initial value of layer scale; None or 0 for no layer scale.
        drop_path: share of the samples that skip a branch.
        act_layer, norm_layer, attn_class, ffn_layer: classes of the layer's modules.
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
        self.checkpoint_activations = False  # True: backward computes the inner values again instead of keeping them

    def forward(self, x: Any) -> Any:
        """Apply the layer to tokens [B, N, D], or to a list of such tensors, whose B and N may differ."""
        crops = x if isinstance(x, list) else [x]
        if self.checkpoint_activations and torch.is_grad_enabled():
            crops = checkpoint(self._add_branches, crops, use_reentrant=False)
        else:
            crops = self._add_branches(crops)
        return crops if isinstance(x, list) else crops[0]

    def _add_branches(self, crops: list[Tensor]) -> list[Tensor]:
        for branch in (self.attention_branch, self.ffn_branch):
            crops = [self._add(branch, x) for x in crops]
        return crops

    def _add(self, branch: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        kept = choose_samples(len(x), self.sample_drop_ratio, x.device) if self.training else None
        if kept is None:
            return x + branch(x)
        residual = branch(x.index_select(0, kept)).to(x.dtype)
        return x.index_add(0, kept, residual, alpha=len(x) / len(kept))

    def attention_branch(self, x: Tensor) -> Tensor:
        """Compute what attention adds to the tokens [B, N, D]."""
        return self.ls1(self.attn(self.norm1(x)))

    def ffn_branch(self, x: Tensor) -> Tensor:
        """Compute what the feed-forward network adds to the tokens [B, N, D]."""
        return self.ls2(self.mlp(self.norm2(x)))

    def compile_branches(self) -> None:
        """Compile both branches with torch.compile; blocks of one kind share the compiled code.

        Stochastic depth, which draws random numbers on the host, and activation checkpointing are not compiled.
        """
        self.attention_branch = torch.compile(self.attention_branch)  # type: ignore[method-assign]
        self.ffn_branch = torch.compile(self.ffn_branch)  # type: ignore[method-assign]


NestedTensorBlock = Block  # upstream's name for its variant that takes lists; here one class does both

"""Multi-head self-attention (Vaswani et al. 2017, arXiv 1706.03762) by whichever kernel the machine offers.

Dimension key:  B samples, N tokens of a sample, T all tokens of several batches, D embedding dim, H heads, d = D / H
"""

import os
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BACKENDS = ("auto", "xformers", "sdpa")


@lru_cache(maxsize=1)
def xformers_attention() -> Callable[..., Tensor] | None:
    """xFormers' attention function, or None where it isn't installed, doesn't load, or XFORMERS_DISABLED is set."""
    if os.environ.get("XFORMERS_DISABLED") is not None:
        return None
    try:
        from xformers.ops import memory_efficient_attention
    except (ImportError, OSError):  # OSError: its binaries were linked against another torch or CUDA
        return None
    return memory_efficient_attention


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V in H heads, then a linear map.

    The backends agree up to rounding, so weights and results carry over between machines:
    "sdpa" is torch's scaled_dot_product_attention, "xformers" works on CUDA tensors only, and "auto" takes xFormers
    for CUDA tensors if it loads and sdpa for the rest.

    Args:
        dim: D.
        num_heads: H.
        qkv_bias, proj_bias: whether the map to queries, keys and values, and the last one, have a bias.
        attn_drop, proj_drop: dropout probabilities of the attention weights and of the output, while training.
        backend: "auto", "xformers" or "sdpa".

    Raises:
        ValueError: for an unknown backend, or heads that don't divide D.
        ImportError: for backend "xformers" where it doesn't load.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: {num_heads} heads don't divide embed_dim {dim}; choose a divisor of it")
        if backend not in BACKENDS:
            raise ValueError(f"attention backend: {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
        kernel = None if backend == "sdpa" else xformers_attention()
        if backend == "xformers" and kernel is None:
            raise ImportError(
                "attention backend: 'xformers' was asked for and doesn't load (or XFORMERS_DISABLED is set); "
                "install xformers for this torch, or use 'auto' or 'sdpa'"
            )
        self.num_heads = num_heads
        self.backend = backend
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)
        self._xformers = kernel

    def forward(self, x: Tensor, shapes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Attend within each sample.

        Args:
            x: [B, N, D], or, with `shapes`, the tokens of several batches one after the other, [T, D].
            shapes: (B, N) of each of those batches.

        Returns:
            a tensor of x's shape.
        """
        qkv = self.qkv(x)
        if shapes is None:
            return self.proj_drop(self.proj(self._attend(qkv)))
        batches = qkv.split([n_samples * n_tokens for n_samples, n_tokens in shapes])
        attended = [self._attend(b.unflatten(0, shape)).flatten(0, 1) for b, shape in zip(batches, shapes, strict=True)]
        return self.proj_drop(self.proj(torch.cat(attended)))  # [T, D]

    def _attend(self, qkv: Tensor) -> Tensor:
        """[B, N, 3 D] to [B, N, D]."""
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # each [B, N, H, d]
        dropout = self.attn_drop if self.training else 0.0
        if self._xformers is not None and (qkv.is_cuda or self.backend == "xformers"):
            return self._xformers(query, key, value, p=dropout).flatten(2)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # [B, H, N, d]
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout).transpose(1, 2).flatten(2)


MemEffAttention = Attention  # upstream's name for the xFormers variant; one module does both here

"""Multi-head self-attention (Vaswani et al. 2017, arXiv 1706.03762).

Dimension key:  B samples, N tokens of a sample, D embedding dim, H heads, d = D / H
"""

import os
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BACKENDS = ("auto", "sdpa", "xformers", "explicit")

# Number of tokens up to which "auto" is "explicit" on a CPU: there, two matrix products and a softmax are faster than
# torch's kernel (docs/benchmarks/step.md), but they keep [B, H, N, N] for backward.
EXPLICIT_UP_TO = {torch.float32: 512, torch.bfloat16: 1024}


@lru_cache(maxsize=1)
def xformers_attention() -> Callable[..., Tensor] | None:
    """Return xFormers' attention function, or None if it does not load or XFORMERS_DISABLED is set."""
    if os.environ.get("XFORMERS_DISABLED") is not None:
        return None
    try:
        from xformers.ops import memory_efficient_attention
    except (ImportError, OSError):  # OSError: its binaries were linked against another torch or CUDA
        return None
    return memory_efficient_attention


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V in H heads, then a linear map.

    Args:
        attn_drop, proj_drop: dropout probabilities of the attention weights and of the output during training.
        backend: "sdpa" is torch's scaled_dot_product_attention, "explicit" is two matrix products around a softmax,
            "xformers" works on CUDA tensors only. "auto" is "sdpa", or "explicit" for short sequences on a CPU. It is
            never xFormers, which lacks fp32 kernels for sm_100 and sm_120 and bf16 kernels for older GPUs (0.0.35).
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
            raise ValueError(f"num_heads: {num_heads} heads do not divide embed_dim {dim}; choose a divisor of it")
        if backend not in BACKENDS:
            raise ValueError(f"attention backend: {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
        self._xformers = xformers_attention() if backend == "xformers" else None
        if backend == "xformers" and self._xformers is None:
            raise ImportError(
                "attention backend: 'xformers' was asked for and does not load (or XFORMERS_DISABLED is set); "
                "install xformers for this torch, or use 'auto' or 'sdpa'"
            )
        self.num_heads = num_heads
        self.backend = backend
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the tokens [B, N, D] of each sample; the shape stays the same."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, d]
        dropout = self.attn_drop if self.training else 0.0
        if self._xformers is not None:
            return self.proj_drop(self.proj(self._xformers(*qkv.unbind(2), p=dropout).flatten(2)))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, N, d]
        if self._is_explicit(query):
            weights = (query * query.shape[-1] ** -0.5 @ key.transpose(2, 3)).softmax(dim=-1)  # [B, H, N, N]
            attended = F.dropout(weights, dropout) @ value
        else:
            attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2)))

    def _is_explicit(self, query: Tensor) -> bool:
        if self.backend != "auto":
            return self.backend == "explicit"
        return query.device.type == "cpu" and query.shape[2] <= EXPLICIT_UP_TO.get(query.dtype, 0)


MemEffAttention = Attention  # upstream's name for the xFormers variant

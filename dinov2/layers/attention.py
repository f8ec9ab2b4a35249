"""Multi-head self-attention (Vaswani et al. 2017, arXiv 1706.03762) by whichever kernel the machine offers.

Dimension key:  B samples, N tokens of a sample, T all tokens of several batches, R kept tokens, D embedding dim,
                H heads, d = D / H
"""

import os
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lean_branches import has_hooks

BACKENDS = ("auto", "xformers", "sdpa", "explicit")

# Which kernel "auto" takes on a CPU, by type: "explicit" up to so many tokens, sdpa beyond, whose memory does not grow
# with their square. Measured: docs/benchmarks/step.md, `python scripts/bench_step.py --only attention`.
EXPLICIT_UP_TO = {torch.float32: 1024, torch.bfloat16: 2049}


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
    "sdpa" is torch's scaled_dot_product_attention, "explicit" two matrix products around a softmax, "xformers" works on
    CUDA tensors only, and "auto" takes xFormers for CUDA tensors if it loads, for the rest what EXPLICIT_UP_TO says.

    Args:
        dim: D.
        num_heads: H.
        qkv_bias, proj_bias: whether the map to queries, keys and values, and the last one, have a bias.
        attn_drop, proj_drop: dropout probabilities of the attention weights and of the output, while training.
        backend: "auto", "xformers", "sdpa" or "explicit".

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
        kernel = xformers_attention() if backend in ("auto", "xformers") else None
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

    def forward(self, x: Tensor, shapes: Sequence[tuple[int, int]] | None = None, rows: Tensor | None = None) -> Tensor:
        """Attend within each sample.

        Args:
            x: [B, N, D], or, with `shapes`, the tokens of several batches one after the other, [T, D].
            shapes: (B, N) of each of those batches.
            rows: int64 [R] into the T tokens whose results are wanted; None for all.

        Returns:
            a tensor of x's shape, or [R, D].
        """
        qkv = self.qkv(x)
        if shapes is None:
            attended = self._attend(qkv)
        else:
            batches = qkv.split([n_samples * n_tokens for n_samples, n_tokens in shapes])
            attended = torch.cat(
                [self._attend(b.unflatten(0, shape)).flatten(0, 1) for b, shape in zip(batches, shapes, strict=True)]
            )  # [T, D]
        if rows is not None:
            attended = attended.reshape(-1, attended.shape[-1]).index_select(0, rows)
        return self.proj_drop(self.proj(attended))

    def _attend(self, qkv: Tensor) -> Tensor:
        """[B, N, 3 D] to [B, N, D]."""
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # each [B, N, H, d]
        dropout = self.attn_drop if self.training else 0.0
        if self._xformers is not None and (qkv.is_cuda or self.backend == "xformers"):
            return self._xformers(query, key, value, p=dropout).flatten(2)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # [B, H, N, d]
        if self._is_explicit(qkv):
            weights = (query * query.shape[-1] ** -0.5 @ key.transpose(2, 3)).softmax(dim=-1)  # [B, H, N, N]
            return (F.dropout(weights, dropout) @ value).transpose(1, 2).flatten(2)
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout).transpose(1, 2).flatten(2)

    def _is_explicit(self, qkv: Tensor) -> bool:
        if self.backend != "auto":
            return self.backend == "explicit"
        return qkv.device.type == "cpu" and qkv.shape[1] <= EXPLICIT_UP_TO.get(qkv.dtype, 0)

    @property
    def is_plain(self) -> bool:
        """Whether this is qkv and proj around an attention of our choice, with nothing that listens or drops."""
        drops = self.training and (self.attn_drop > 0 or self.proj_drop.p > 0)
        return (
            type(self.qkv) is nn.Linear
            and type(self.proj) is nn.Linear
            and self.backend == "auto"
            and not drops
            and not any(has_hooks(module) for module in (self.qkv, self.proj))
        )


MemEffAttention = Attention  # upstream's name for the xFormers variant; one module does both here

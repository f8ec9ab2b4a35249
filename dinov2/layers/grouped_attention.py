"""Attention on a CPU, forward and backward, for a few samples at a time.

The [H, N, N] weights of a few samples lie in the processor's cache, where those of a batch do not. Backward makes them
again for the price of reading them, so memory does not grow with N^2.

Dimension key:  T all tokens of several batches, G samples of a group, N tokens of a sample, D embedding dim, H heads,
                d = D / H
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .scratch import scratch_like

Shapes = Sequence[tuple[int, int]]

# Weights at a time: those of two samples of six heads and 257 tokens, 1.5 MiB in bfloat16
CACHED_WEIGHTS = 2**20


class _Room:
    """Memory for the attention of one group of samples after the other, whose weights stay in the processor's cache.

    What a product reads and writes is contiguous here, as the library would copy it otherwise, each time anew.
    """

    def __init__(self, like: Tensor, n_samples: int, n_heads: int, n_tokens: int, head_dim: int) -> None:
        self.scale = head_dim**-0.5
        self.n_heads, self.n_tokens, self.head_dim = n_heads, n_tokens, head_dim
        self.parts = like.new_empty(3, n_samples * n_heads, n_tokens, head_dim)
        self.output = like.new_empty(n_samples * n_heads, n_tokens, head_dim)
        self.scores, self.weights = like.new_empty(2, n_samples * n_heads, n_tokens, n_tokens)

    def attend(self, qkv: Tensor) -> "_Group":
        """From tokens of whole samples [G N, 3 D]: softmax(Q K^T / sqrt(d)), and what it was made of."""
        n = len(qkv) // self.n_tokens * self.n_heads
        parts, scores, weights = self.parts[:, :n], self.scores[:n], self.weights[:n]
        query, key, value = parts
        self.by_head(qkv, 3, out=parts)
        torch.baddbmm(scores, query, key.transpose(1, 2), beta=0, alpha=self.scale, out=scores)
        torch.softmax(scores, dim=-1, out=weights)
        return _Group(query, key, value, scores, weights, self.output[:n])

    def by_head(self, tokens: Tensor, n_parts: int, out: Tensor) -> None:
        """[G N, n_parts D] into [n_parts, G H, N, d]."""
        out.view(n_parts, -1, self.n_heads, self.n_tokens, self.head_dim).copy_(self._as_heads(tokens, n_parts))

    def by_token(self, heads: Tensor, n_parts: int, out: Tensor) -> None:
        """[n_parts, G H, N, d] into [G N, n_parts D]."""
        self._as_heads(out, n_parts).copy_(heads.view(n_parts, -1, self.n_heads, self.n_tokens, self.head_dim))

    def _as_heads(self, tokens: Tensor, n_parts: int) -> Tensor:
        """[G N, n_parts D] as [n_parts, G, H, N, d], a view."""
        return tokens.view(-1, self.n_tokens, n_parts, self.n_heads, self.head_dim).permute(2, 0, 3, 1, 4)


class _Group(NamedTuple):
    """Of the samples of a group and their heads."""

    query: Tensor  # [G H, N, d]
    key: Tensor
    value: Tensor
    scores: Tensor  # [G H, N, N]
    weights: Tensor
    output: Tensor  # [G H, N, d]


def _groups(qkv: Tensor, shapes: Shapes, n_heads: int) -> Iterator[tuple[_Room, Iterator[slice]]]:
    """For each batch, memory for groups of its samples, and the rows of qkv that belong to each group."""
    head_dim = qkv.shape[1] // 3 // n_heads
    start = 0
    for n_samples, n_tokens in shapes:
        at_once = min(n_samples, max(1, CACHED_WEIGHTS // (n_heads * n_tokens**2)))
        stop = start + n_samples * n_tokens
        starts = range(start, stop, max(1, at_once) * n_tokens)
        groups = (slice(first, min(first + at_once * n_tokens, stop)) for first in starts)
        yield _Room(qkv, at_once, n_heads, n_tokens, head_dim), groups
        start = stop


def attend(qkv: Tensor, shapes: Shapes, n_heads: int) -> Tensor:
    """[T, 3 D] to [T, D]."""
    attended = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    for room, groups in _groups(qkv, shapes, n_heads):
        for rows in groups:
            group = room.attend(qkv[rows])
            torch.bmm(group.weights, group.value, out=group.output)
            room.by_token(group.output, 1, out=attended[rows])
    return attended


def attend_backward(qkv: Tensor, d_attended: Tensor, shapes: Shapes, n_heads: int) -> Tensor:
    """Gradient [T, 3 D] of queries, keys and values from that of what `attend` gives, whose weights are made again.

    It lies in memory that the next branch takes over.
    """
    d_qkv = scratch_like(qkv)
    for room, groups in _groups(qkv, shapes, n_heads):
        d_parts, d_weights = torch.empty_like(room.parts), torch.empty_like(room.weights)
        for rows in groups:
            query, key, value, scores, weights, d_output = room.attend(qkv[rows])
            d_query, d_key, d_value = of_group = d_parts[:, : len(query)]
            room.by_head(d_attended[rows], 1, out=d_output)
            torch.bmm(weights.transpose(1, 2), d_output, out=d_value)
            d_scores, d_softmax = scores, d_weights[: len(query)]  # the scores are needed no more
            torch.bmm(d_output, value.transpose(1, 2), out=d_softmax)
            torch.ops.aten._softmax_backward_data.out(d_softmax, weights, -1, weights.dtype, grad_input=d_scores)
            torch.baddbmm(d_query, d_scores, key, beta=0, alpha=room.scale, out=d_query)
            torch.baddbmm(d_key, d_scores.transpose(1, 2), query, beta=0, alpha=room.scale, out=d_key)
            room.by_token(of_group, 3, out=d_qkv[rows])
    return d_qkv

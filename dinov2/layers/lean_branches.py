"""A block's two residual branches as one autograd node each, with backward passes written by hand.

They compute what the modules compute, up to rounding, and keep less of it: a norm's output, the GELU's output and what
layer scale multiplies are made again in backward (cheap beside a matrix product), or not needed at all:

- Layer scale is taken into the last matrix: gamma * (W h + b) = (diag(gamma) W) h + gamma b. With W' = diag(gamma) W
  and b' = gamma b, dW = diag(gamma) dW', and dgamma = rowsum(dW' * W) + db' * b: products the size of a weight instead
  of the size of all tokens.
- Attention goes from sample to sample: the [H, N, N] weights of one lie in the processor's cache, where those of a
  batch do not. Backward makes them again for the price of reading them, so memory does not grow with N^2.

Made for CPUs, where each pass over all tokens goes through main memory; on a GPU compiled blocks and fused attention
kernels do as much.

Dimension key:  T all tokens of several batches, B samples, N tokens of a sample, R kept tokens, D embedding dim,
                H heads, d = D / H
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Shapes = Sequence[tuple[int, int]]


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to this very module, who would hear nothing if it were passed by."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def attention_branch(
    x: Tensor,
    shapes: Shapes,
    rows: Tensor | None,
    n_heads: int,
    norm: tuple[Tensor, Tensor],
    qkv: tuple[Tensor, Tensor | None],
    proj: tuple[Tensor, Tensor | None],
    gamma: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """x + gamma * proj(attention(qkv(norm(x)))), within each sample.

    Args:
        x: [T, D], the tokens of several batches one after the other.
        shapes: (B, N) of each of those batches.
        rows: int64 [R], which tokens' results are wanted; None for all. All tokens are attended to.
        n_heads: H.
        norm, qkv, proj: weight and bias of each.
        gamma: [D] of layer scale, or None.
        eps: of the norm.
        dtype: what the matrix products compute in.

    Returns:
        [T, D], or [R, D], in x's dtype.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _AttentionBranch.apply(x, *norm, *qkv, *proj, gamma, rows, shapes, n_heads, eps, dtype)


def ffn_branch(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    fc1: tuple[Tensor, Tensor | None],
    fc2: tuple[Tensor, Tensor | None],
    gamma: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """x + gamma * fc2(gelu(fc1(norm(x)))) of tokens [T, D], in x's dtype; arguments as of `attention_branch`."""
    with torch.autocast(x.device.type, enabled=False):
        return _FfnBranch.apply(x, *norm, *fc1, *fc2, gamma, eps, dtype)


class _AttentionBranch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        proj_weight: Tensor,
        proj_bias: Tensor | None,
        gamma: Tensor | None,
        rows: Tensor | None,
        shapes: Shapes,
        n_heads: int,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        normed, mean, rstd = _norm(x, norm_weight, norm_bias, eps, dtype)
        w_qkv = qkv_weight.to(dtype)
        qkv = F.linear(normed, w_qkv, _to(qkv_bias, dtype))  # [T, 3 D]
        del normed
        attended = _attend(qkv, shapes, n_heads)  # [T, D]
        w_proj, b_proj = _scaled(proj_weight, proj_bias, gamma, dtype)
        if rows is not None:
            attended = attended.index_select(0, rows)  # [R, D]
        out = F.linear(attended, w_proj, b_proj).to(x.dtype)
        out += x if rows is None else x.index_select(0, rows)
        ctx.save_for_backward(
            *(x, norm_weight, norm_bias, mean, rstd, w_qkv, qkv, attended, w_proj, proj_weight, proj_bias, gamma, rows)
        )
        ctx.shapes, ctx.n_heads, ctx.eps, ctx.dtype = shapes, n_heads, eps, dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once: activation checkpointing gives them out once
        x, norm_weight, norm_bias, mean, rstd, w_qkv, qkv, attended, w_proj, *of_proj, rows = saved
        proj_weight, proj_bias, gamma = of_proj
        needs = ctx.needs_input_grad
        g = gradient.to(ctx.dtype)
        d_proj = _scaled_gradients(g, attended, proj_weight, proj_bias, gamma, needs[5:8])
        if rows is None:
            d_attended, d_stream = g @ w_proj, gradient
        else:
            d_attended = g.new_zeros(x.shape).index_add_(0, rows, g @ w_proj)
            d_stream = gradient.new_zeros(x.shape).index_add_(0, rows, gradient)
        d_qkv = _attend_backward(qkv, d_attended, ctx.shapes, ctx.n_heads)  # [T, 3 D]
        d_weight = d_bias = None
        if needs[3]:
            d_weight = (d_qkv.T @ _norm(x, norm_weight, norm_bias, ctx.eps, ctx.dtype)[0]).to(norm_weight.dtype)
        if needs[4]:
            d_bias = d_qkv.sum(dim=0, dtype=torch.float32)
        d_norm = _norm_backward(d_qkv @ w_qkv, x, mean, rstd, norm_weight, norm_bias, d_stream, needs[:3])
        return (*d_norm, d_weight, d_bias, *d_proj, None, None, None, None, None)


class _FfnBranch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor | None,
        fc2_weight: Tensor,
        fc2_bias: Tensor | None,
        gamma: Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        normed, mean, rstd = _norm(x, norm_weight, norm_bias, eps, dtype)
        w1 = fc1_weight.to(dtype)
        hidden = F.linear(normed, w1, _to(fc1_bias, dtype))  # [T, 4 D]
        del normed
        w2, b2 = _scaled(fc2_weight, fc2_bias, gamma, dtype)
        out = F.linear(F.gelu(hidden), w2, b2).to(x.dtype)
        out += x
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, rstd, w1, hidden, w2, fc2_weight, fc2_bias, gamma)
        ctx.eps, ctx.dtype = eps, dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, mean, rstd, w1, hidden, w2, fc2_weight, fc2_bias, gamma = ctx.saved_tensors
        needs = ctx.needs_input_grad
        g = gradient.to(ctx.dtype)
        d_fc2 = _scaled_gradients(g, F.gelu(hidden), fc2_weight, fc2_bias, gamma, needs[5:8])
        d_hidden = torch.ops.aten.gelu_backward(g @ w2, hidden)  # [T, 4 D]
        d_weight = d_bias = None
        if needs[3]:
            d_weight = (d_hidden.T @ _norm(x, norm_weight, norm_bias, ctx.eps, ctx.dtype)[0]).to(norm_weight.dtype)
        if needs[4]:
            d_bias = d_hidden.sum(dim=0, dtype=torch.float32)
        d_norm = _norm_backward(d_hidden @ w1, x, mean, rstd, norm_weight, norm_bias, gradient, needs[:3])
        return (*d_norm, d_weight, d_bias, *d_fc2, None, None)


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm of x in its own precision, given in `dtype`, with each token's mean and 1 / standard deviation."""
    normed, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
    return normed.to(dtype), mean, rstd


def _norm_backward(
    d_normed: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    d_stream: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, the norm's weight and bias; `d_stream` reaches x past the branch."""
    d_x, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
        d_normed.to(x.dtype), x, weight.shape, mean, rstd, weight, bias, list(needs)
    )
    return (d_x.add_(d_stream) if needs[0] else None), d_weight, d_bias


def _scaled(
    weight: Tensor, bias: Tensor | None, gamma: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The linear map with layer scale in it: diag(gamma) W and gamma b."""
    if gamma is None:
        return weight.to(dtype), _to(bias, dtype)
    return (gamma.unsqueeze(1) * weight).to(dtype), None if bias is None else (gamma * bias).to(dtype)


def _scaled_gradients(
    g: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of weight, bias and gamma from those of the outputs [T, D] of the map that `_scaled` gives."""
    if not any(needs):
        return None, None, None
    d_weight = (g.T @ inputs).to(weight.dtype)  # of diag(gamma) W
    d_bias = None if bias is None else g.sum(dim=0, dtype=torch.float32)
    if gamma is None:
        return d_weight, d_bias, None
    d_gamma = None
    if needs[2]:
        d_gamma = (d_weight * weight).sum(dim=1)
        if bias is not None and d_bias is not None:
            d_gamma = d_gamma + d_bias * bias
    return d_weight.mul_(gamma.unsqueeze(1)), None if d_bias is None else d_bias * gamma, d_gamma


class _Sample:
    """Room for the attention of one sample after the other: [H, N, N] numbers that stay in the processor's cache.

    What a product reads and writes is contiguous here, as the library would copy it otherwise, each time anew.
    """

    def __init__(self, like: Tensor, n_heads: int, n_tokens: int, head_dim: int) -> None:
        self.scale = head_dim**-0.5
        self.parts = like.new_empty(3, n_heads, n_tokens, head_dim)
        self.output = like.new_empty(n_heads, n_tokens, head_dim)
        self.scores, self.weights = like.new_empty(2, n_heads, n_tokens, n_tokens)

    def attend(self, qkv: Tensor) -> None:
        """From the sample's [N, 3 D]: `weights` = softmax(Q K^T / sqrt(d))."""
        self.parts.copy_(_by_head(qkv, self.parts))
        query, key, _ = self.parts
        torch.baddbmm(self.scores, query, key.transpose(1, 2), beta=0, alpha=self.scale, out=self.scores)
        torch.softmax(self.scores, dim=-1, out=self.weights)


def _by_head(tokens: Tensor, like: Tensor) -> Tensor:
    """A sample's [N, D], or [N, 3 D], as a view of the shape [(3,) H, N, d] that `like` has."""
    *parts, n_heads, n_tokens, head_dim = like.shape
    return tokens.view(n_tokens, *parts, n_heads, head_dim).movedim(0, -2)


def _attend(qkv: Tensor, shapes: Shapes, n_heads: int) -> Tensor:
    """[T, 3 D] to [T, D]."""
    dim = qkv.shape[1] // 3
    attended = qkv.new_empty(qkv.shape[0], dim)
    start = 0
    for n_samples, n_tokens in shapes:
        sample = _Sample(qkv, n_heads, n_tokens, dim // n_heads)
        for _ in range(n_samples):
            rows = slice(start, start + n_tokens)
            start += n_tokens
            sample.attend(qkv[rows])
            torch.bmm(sample.weights, sample.parts[2], out=sample.output)
            _by_head(attended[rows], sample.output).copy_(sample.output)
    return attended


def _attend_backward(qkv: Tensor, d_attended: Tensor, shapes: Shapes, n_heads: int) -> Tensor:
    """Gradient [T, 3 D] of queries, keys and values from that of what `_attend` gives, whose weights are made again."""
    dim = qkv.shape[1] // 3
    d_qkv = torch.empty_like(qkv)
    start = 0
    for n_samples, n_tokens in shapes:
        sample = _Sample(qkv, n_heads, n_tokens, dim // n_heads)
        query, key, value = sample.parts
        d_parts, d_output, d_weights = map(torch.empty_like, (sample.parts, sample.output, sample.weights))
        d_query, d_key, d_value = d_parts
        for _ in range(n_samples):
            rows = slice(start, start + n_tokens)
            start += n_tokens
            sample.attend(qkv[rows])
            d_output.copy_(_by_head(d_attended[rows], d_output))
            torch.bmm(sample.weights.transpose(1, 2), d_output, out=d_value)
            torch.bmm(d_output, value.transpose(1, 2), out=d_weights)
            d_scores = sample.scores  # needed no more
            torch.ops.aten._softmax_backward_data.out(
                d_weights, sample.weights, -1, d_weights.dtype, grad_input=d_scores
            )
            torch.baddbmm(d_query, d_scores, key, beta=0, alpha=sample.scale, out=d_query)
            torch.baddbmm(d_key, d_scores.transpose(1, 2), query, beta=0, alpha=sample.scale, out=d_key)
            _by_head(d_qkv[rows], d_parts).copy_(d_parts)
    return d_qkv

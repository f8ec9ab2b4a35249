"""A block's two residual branches as one autograd node each, with backward passes written by hand.

They compute what the modules compute, up to rounding, and keep less of it: a norm's output, the GELU's output and what
layer scale multiplies are made again in backward (cheap beside a matrix product), or not needed at all:

- Layer scale is taken into the last matrix: gamma * (W h + b) = (diag(gamma) W) h + gamma b. With W' = diag(gamma) W
  and b' = gamma b, dW = diag(gamma) dW', and dgamma = rowsum(dW' * W) + db' * b: products the size of a weight instead
  of the size of all tokens.
- Attention is that of `grouped_attention`: it takes a few samples at a time and keeps nothing that grows with N^2.

Made for CPUs, where each pass over all tokens goes through main memory; on a GPU compiled blocks and fused attention
kernels do as much.

Dimension key:  T all tokens of several batches, B samples, N tokens of a sample, R kept tokens, D embedding dim,
                H heads, d = D / H
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .grouped_attention import Shapes, attend, attend_backward
from .scratch import scratch_like


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
        qkv = _linear(normed, w_qkv, _to(qkv_bias, dtype))  # [T, 3 D]
        attended = attend(qkv, shapes, n_heads)  # [T, D]
        w_proj, b_proj = _scaled(proj_weight, proj_bias, gamma, dtype)
        if rows is not None:
            attended = attended.index_select(0, rows)  # [R, D]
        out = _linear(attended, w_proj, b_proj).to(x.dtype)
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
        d_qkv = attend_backward(qkv, d_attended, ctx.shapes, ctx.n_heads)  # [T, 3 D]
        d_weight = d_bias = None
        if needs[3]:
            d_weight = (d_qkv.T @ _norm(x, norm_weight, norm_bias, ctx.eps, ctx.dtype)[0]).to(norm_weight.dtype)
        if needs[4]:
            d_bias = _sum_of_tokens(d_qkv)
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
        hidden = _linear(normed, w1, _to(fc1_bias, dtype))  # [T, 4 D]
        w2, b2 = _scaled(fc2_weight, fc2_bias, gamma, dtype)
        activated = torch.ops.aten.gelu.out(hidden, out=scratch_like(hidden))
        out = _linear(activated, w2, b2).to(x.dtype)
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
        # One [T, 4 D] for what three steps make of each other
        d_hidden = torch.ops.aten.gelu.out(hidden, out=scratch_like(hidden))
        d_fc2 = _scaled_gradients(g, d_hidden, fc2_weight, fc2_bias, gamma, needs[5:8])
        torch.mm(g, w2, out=d_hidden)
        torch.ops.aten.gelu_backward.grad_input(d_hidden, hidden, grad_input=d_hidden)
        d_weight = d_bias = None
        if needs[3]:
            d_weight = (d_hidden.T @ _norm(x, norm_weight, norm_bias, ctx.eps, ctx.dtype)[0]).to(norm_weight.dtype)
        if needs[4]:
            d_bias = _sum_of_tokens(d_hidden)
        d_norm = _norm_backward(d_hidden @ w1, x, mean, rstd, norm_weight, norm_bias, gradient, needs[:3])
        return (*d_norm, d_weight, d_bias, *d_fc2, None, None)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, where it is faster by oneDNN's own linear map: that adds the bias as a product leaves the registers,
    while F.linear writes it to all tokens first and reads it again."""
    if x.dtype == torch.float32:
        is_exact = torch.get_float32_matmul_precision() == "highest"
        narrows = weight.shape[0] < weight.shape[1]  # where it was up to a sixth slower
        if is_exact or narrows:
            return F.linear(x, weight, bias)
    if not _has_own_linear(x.dtype):
        return F.linear(x, weight, bias)
    mapped: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)
    return mapped


@cache
def _has_own_linear(dtype: torch.dtype) -> bool:
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


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


def _sum_of_tokens(tensor: Tensor) -> Tensor:
    """[T, C] to [C] float32, some rows at a time: `sum` would make a float32 copy of all of them first."""
    return torch.stack([rows.sum(dim=0, dtype=torch.float32) for rows in tensor.split(512)]).sum(dim=0)


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
    d_bias = None if bias is None else _sum_of_tokens(g)
    if gamma is None:
        return d_weight, d_bias, None
    d_gamma = None
    if needs[2]:
        d_gamma = (d_weight * weight).sum(dim=1)
        if bias is not None and d_bias is not None:
            d_gamma = d_gamma + d_bias * bias
    return d_weight.mul_(gamma.unsqueeze(1)), None if d_bias is None else d_bias * gamma, d_gamma

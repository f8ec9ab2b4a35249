"""Prototype layer and cross-entropy in one: logits over K prototypes exist for some rows at a time, and are not kept.

With student logits s = x W^T / temp and targets t that the teacher gave, the loss of a row is

    l = -sum_k t_k log softmax(s)_k,     dl/ds = (sum_k t_k) softmax(s) - t,

so a chunk of rows needs its logits once: what they owe to x and W is worked out beside the loss itself and waits for
backward, [R, d] and [K, d] instead of [R, K]. Targets of Sinkhorn-Knopp stay what that algorithm makes of them, two
scaling vectors around exp(teacher logits / temp). Prototypes have a direction and a length of their own, W_k = g_k v_k
/ ||v_k|| (weight normalisation, arXiv 1602.07868): W is made where it is multiplied, in the type of the products, and
its gradient becomes that of v in place.

Dimension key:  R rows (CLS tokens or masked patches), K prototypes, d bottleneck dim
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov2.loss import triton_kernels

# Logits at a time: enough rows for the matrix products, which read all K prototypes for each chunk
CHUNK_ELEMENTS = 2**24
# and as many of these as a CPU's cache holds, for what is done to them element by element
CACHED_ELEMENTS = 2**20


@dataclass(frozen=True)
class Targets:
    """Assignments of rows to prototypes: t_rk = mass_rk * row_scale_r * column_scale_k."""

    mass: Tensor  # [R, K]
    row_scale: Tensor | None = None  # [R]
    column_scale: Tensor | None = None  # [K]

    def __len__(self) -> int:
        return len(self.mass)

    def __getitem__(self, rows: slice) -> "Targets":
        return Targets(self.mass[rows], None if self.row_scale is None else self.row_scale[rows], self.column_scale)

    def dense(self) -> Tensor:
        """The assignments themselves, float32 [R, K]: a new tensor unless they are just the mass."""
        dense = self.mass.float()
        if self.column_scale is not None:
            dense = dense * self.column_scale
        return dense if self.row_scale is None else dense * self.row_scale.unsqueeze(1)

    def choices(self) -> Tensor:
        """The prototype that each row is assigned to most, int64 [R]."""
        if not len(self):
            return torch.empty(0, dtype=torch.int64, device=self.mass.device)
        scale = self.column_scale
        chosen, room = [], None
        for rows in chunks(len(self), self.mass.shape[1], elements_at_a_time(self.mass.device)):
            some = self.mass[rows]
            if scale is not None:
                room = torch.empty_like(some, dtype=torch.float32) if room is None else room[: len(some)]
                some = room.copy_(some).mul_(scale)
            chosen.append(some.argmax(dim=1))
        return torch.cat(chosen)


def prototype_cross_entropy(
    embedding: Tensor,
    direction: Tensor,
    length: Tensor,
    targets: Sequence[Targets],
    weights: Tensor,
    student_temp: float,
) -> tuple[Tensor, Tensor]:
    """sum_r weights_r l_r, l_r the cross-entropy of row r's prediction and target.

    Args:
        embedding: [R, d], in the type that the products compute in.
        direction: [K, d] of the prototypes, v, in any floating-point type.
        length: [K, 1] of the prototypes, g.
        targets: of consecutive rows, R in all.
        weights: [R], float32.
        student_temp: temperature of the predictions.

    Returns:
        the sum, 0-d float32, and l [R] float32 without gradient.
    """
    with torch.autocast(embedding.device.type, enabled=False):
        total, losses = _PrototypeCrossEntropy.apply(
            embedding, direction, length, targets, weights, student_temp, torch.is_grad_enabled()
        )
    return total, losses


class _PrototypeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        embedding: Tensor,
        direction: Tensor,
        length: Tensor,
        targets: Sequence[Targets],
        weights: Tensor,
        student_temp: float,
        keeps: bool,
    ) -> tuple[Tensor, Tensor]:
        # The temperature is taken into the smaller factor. Weights go into the gradients relative to the largest, so
        # that float16 holds them, and are made up for in float32
        x = embedding / student_temp
        w, norms = _prototypes(direction, length, embedding.dtype)
        largest = weights.amax() if len(weights) else weights.new_ones(())
        relative = weights / largest
        d_x = torch.empty(x.shape, dtype=torch.float32, device=x.device) if keeps else None
        d_w = None
        if keeps and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            d_w = torch.empty(w.shape, dtype=torch.float32, device=w.device)
        losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
        pieces = [(segment, list(chunks(len(segment), len(w), CHUNK_ELEMENTS))) for segment in targets]
        room = x.new_empty(
            max((rows.stop - rows.start for _, of_segment in pieces for rows in of_segment), default=0), len(w)
        )
        start = 0
        for segment, of_segment in pieces:
            for rows in of_segment:
                here = slice(start + rows.start, start + rows.stop)
                logits = torch.mm(x[here], w.T, out=room[: rows.stop - rows.start])
                losses[here] = _cross_entropy_and_gradient_(logits, segment[rows], relative[here], keeps)
                if d_x is not None:
                    d_x[here] = logits @ w
                if d_w is not None:
                    _add_product(d_w, logits.T, x[here], is_first=here.start == 0)
            start += len(segment)
        assert start == len(x), f"targets for {start} of {len(x)} rows"
        if d_w is not None and not len(x):
            d_w.zero_()
        if d_x is not None:
            d_x.mul_(largest / student_temp)
            ctx.save_for_backward(d_x, largest, direction, length, norms)
            ctx.d_w, ctx.dtype = d_w, embedding.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_x, largest, direction, length, norms = ctx.saved_tensors
        d_w, ctx.d_w = ctx.d_w, None  # changed in place, so of use once
        d_embedding = (d_x * gradient).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        if d_w is None:
            return (d_embedding, *[None] * 6)
        d_length = _unnormalise_(d_w, direction, length, norms, gradient * largest)
        return d_embedding, d_w.to(direction.dtype), d_length.to(length.dtype), None, None, None, None


def _prototypes(direction: Tensor, length: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W = g v / ||v|| in `dtype`, and ||v||: [K, d] and float32 [K, 1]. Worked out in float32: a rounded length shifts
    a whole prototype, and the temperature magnifies it."""
    w = torch.empty(direction.shape, dtype=dtype, device=direction.device)
    norms = torch.empty(length.shape, dtype=torch.float32, device=direction.device)
    for some in _pieces(w):
        w[some], norms[some] = torch._weight_norm_interface(direction[some].float(), length[some].float(), 0)
    return w, norms


def _unnormalise_(d_w: Tensor, direction: Tensor, length: Tensor, norms: Tensor, factor: Tensor) -> Tensor:
    """`d_w` [K, d], the gradient of W over `factor`, becomes that of v; returns that of g: float32 [K, 1]."""
    d_length = torch.empty_like(norms)
    for some in _pieces(d_w):
        d_w[some], d_length[some] = torch.ops.aten._weight_norm_interface_backward(
            d_w[some].mul_(factor), direction[some].float(), length[some].float(), norms[some], 0
        )
    return d_length


def _add_product(total: Tensor, a: Tensor, b: Tensor, is_first: bool) -> None:
    """total += a b in float32, or total = a b, some rows of it at a time where these stay in a cache."""
    room = None
    for some in _pieces(total):
        if a.dtype == torch.float32:
            total[some].addmm_(a[some], b, beta=0 if is_first else 1)
            continue
        room = total.new_empty(total[some].shape, dtype=a.dtype) if room is None else room[: len(total[some])]
        product = torch.mm(a[some], b, out=room)
        if is_first:
            total[some] = product
        else:
            total[some] += product


def _pieces(matrix: Tensor) -> Iterator[slice]:
    """Rows of a [K, d] matrix to take at a time."""
    return chunks(matrix.shape[0], matrix.shape[1], elements_at_a_time(matrix.device))


def chunks(n_rows: int, n_columns: int, n_elements: int) -> Iterator[slice]:
    """Consecutive slices of 0 .. n_rows, of about `n_elements` each and even sizes."""
    if not n_rows:
        return
    n_chunks = -(-n_rows * n_columns // n_elements)
    size = -(-n_rows // n_chunks)
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def elements_at_a_time(device: torch.device) -> int:
    """How many to work on at a time where a pass follows the other."""
    return CACHED_ELEMENTS if device.type == "cpu" else CHUNK_ELEMENTS


def _cross_entropy_and_gradient_(logits: Tensor, targets: Targets, weights: Tensor, keeps: bool) -> Tensor:
    """The loss [R] of logits [R, K], which, if `keeps`, become the gradient of sum_r weights_r l_r."""
    if keeps and triton_kernels.available(logits.device):
        return triton_kernels.cross_entropy_and_gradient_(
            logits, targets.mass, targets.row_scale, targets.column_scale, weights, inverse_temp=1.0
        )
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    room: tuple[Tensor, ...] = ()  # taken once: new memory costs more than what is done to it here
    for rows in chunks(len(logits), logits.shape[1], elements_at_a_time(logits.device)):
        some, target = logits[rows], targets[rows]
        room = room or tuple(torch.empty_like(some, dtype=torch.float32) for _ in range(3))
        shares, probabilities, scores = (of_all[: len(some)] for of_all in room)
        # Of the two scaling vectors, that of the rows waits for sums over the prototypes: fewer passes over all of it
        shares.copy_(target.mass)
        if target.column_scale is not None:
            shares.mul_(target.column_scale)
        total = shares.sum(dim=1)
        scores.copy_(some)
        torch.softmax(scores, dim=1, out=probabilities)
        # from the largest of a row, whose probability is at least 1/K
        log_normaliser = scores.amax(dim=1) - probabilities.amax(dim=1).log()
        cross_entropy = total * log_normaliser - scores.mul_(shares).sum(dim=1)
        losses[rows] = cross_entropy if target.row_scale is None else cross_entropy * target.row_scale
        if keeps:
            factor = weights[rows] if target.row_scale is None else weights[rows] * target.row_scale
            probabilities.mul_((factor * total).unsqueeze(1)).addcmul_(shares, factor.unsqueeze(1), value=-1)
            some.copy_(probabilities)
    return losses

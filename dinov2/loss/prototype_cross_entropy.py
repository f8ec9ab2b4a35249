"""Cross-entropy over K prototypes in chunks of rows, so that the logits [R, K] are never in memory at once.

With student logits s = x W^T / temp and teacher targets t, the loss of a row and its gradient are

    l = -sum_k t_k log softmax(s)_k,     dl/ds = (sum_k t_k) softmax(s) - t.

One pass over the logits of a chunk gives its losses and its part of the gradients of x [R, d] and W [K, d]. Then the
chunk is freed: no logits are stored for backward.

Dimension key:  R rows (CLS tokens or masked patches), K prototypes, d bottleneck dim
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits of a chunk: enough rows for fast matrix products, which read all K prototypes for each chunk
CHUNK_ELEMENTS = 2**22


def prototype_cross_entropy(
    student: Tensor,
    targets: Tensor,
    weights: Tensor,
    student_temp: float,
    prototypes: Tensor | None = None,
    compiled: bool = False,
) -> Tensor:
    """Sum the weighted cross-entropies of student rows against target rows.

    Args:
        student: [n * R, d] embeddings, in the type of the matrix products; or, without `prototypes`, logits [n * R, K].
            Rows r, R + r, 2R + r, ... share the target of row r.
        targets: [R, K], rows of any sum.
        weights: [n * R] float32, not negative.
        student_temp: temperature of the predictions.
        prototypes: [K, d] float32, rows of W.
        compiled: fuse the passes over a chunk with torch.compile.

    Returns:
        sum_r weights_r l_r, 0-d float32.
    """
    with torch.autocast(student.device.type, enabled=False):
        total: Tensor = _PrototypeCrossEntropy.apply(student, prototypes, targets, weights, student_temp, compiled)
    return total


class _PrototypeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        prototypes: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        student_temp: float,
        compiled: bool,
    ) -> Tensor:
        score = _compiled_cross_entropy() if compiled else cross_entropy_and_gradient
        w = None if prototypes is None else prototypes.to(student.dtype)
        needs_student, needs_prototypes = ctx.needs_input_grad[:2]
        d_student = torch.zeros_like(student, dtype=torch.float32) if needs_student else None
        d_prototypes = torch.zeros_like(prototypes) if prototypes is not None and needs_prototypes else None
        total = weights.new_zeros(())
        # Gradients are stored relative to the largest weight, so that float16 can represent those of a chunk
        largest = weights.max() if len(weights) else weights.new_ones(())
        chunk_rows = max(1, CHUNK_ELEMENTS // targets.shape[1])
        for repeat in range(0, len(student), max(1, len(targets))):
            for start in range(0, len(targets), chunk_rows):
                target = targets[start : start + chunk_rows]
                rows = slice(repeat + start, repeat + start + len(target))
                x = student[rows] / student_temp
                logits = x if w is None else x @ w.T  # [chunk, K]
                loss, d_logits = score(logits, target, weights[rows] / largest)
                total += loss * largest
                d_logits = d_logits.to(student.dtype)
                if d_student is not None:
                    d_student[rows] = d_logits if w is None else d_logits @ w
                if d_prototypes is not None:
                    d_prototypes += d_logits.T @ x
        ctx.save_for_backward(d_student, d_prototypes, largest)
        ctx.dtype, ctx.student_temp = student.dtype, student_temp
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        d_student, d_prototypes, largest = ctx.saved_tensors
        scale = gradient * largest
        return (
            None if d_student is None else (d_student * (scale / ctx.student_temp)).to(ctx.dtype),
            None if d_prototypes is None else d_prototypes * scale,
            *[None] * 4,
        )


def cross_entropy_and_gradient(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Compute sum_r weights_r l_r, 0-d, and its gradient [R, K] with respect to the logits, in float32.

    Args:
        logits, targets: [R, K]; the logits divided by their temperature.
        weights: [R].
    """
    targets, weights = targets.float(), weights.unsqueeze(1)
    log_probabilities = logits.float().log_softmax(dim=1)
    losses = -torch.linalg.vecdot(targets, log_probabilities)  # [R]
    mass = targets.sum(dim=1, keepdim=True)  # [R, 1]
    gradient = log_probabilities.exp_().mul_(mass * weights).addcmul_(targets, weights, value=-1)
    return losses @ weights.squeeze(1), gradient


@cache
def _compiled_cross_entropy() -> Any:
    return torch.compile(cross_entropy_and_gradient)

"""The passes of Sinkhorn-Knopp over its matrix, in plain PyTorch; `triton_kernels` has the same ones for a GPU.

Rows are taken as many at a time as the processor's cache holds, so that what follows on a pass finds them there.

Dimension key:  R rows (tokens), K prototypes
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dinov2.loss.prototype_loss import chunks, elements_at_a_time


def exponentiate_(logits: Tensor, inverse_temp: float) -> Tensor:
    """Each row of teacher logits [R, K] becomes exp(inverse_temp * logits - its maximum), which is returned: [R]."""
    row_max = torch.empty(len(logits), device=logits.device)
    for rows, some in _float_rows(logits):
        row_max[rows] = some.amax(dim=1) * inverse_temp
        torch.add(-row_max[rows].unsqueeze(1), some, alpha=inverse_temp, out=some).exp_()
        if some.dtype != logits.dtype:
            logits[rows] = some
    return row_max


def row_sums(mass: Tensor, column_scale: Tensor) -> Tensor:
    """sum_k mass_rk * column_scale_k: [R, K] and [K] to [R] float32."""
    sums = torch.empty(len(mass), device=mass.device)
    for rows, some in _float_rows(mass):
        sums[rows] = some @ column_scale
    return sums


def column_sums(mass: Tensor, row_scale: Tensor) -> Tensor:
    """sum_r mass_rk * row_scale_r: [R, K] and [R] to [K] float32."""
    sums = torch.zeros(mass.shape[1], device=mass.device)
    for rows, some in _float_rows(mass):
        sums += row_scale[rows] @ some
    return sums


def row_and_column_sums(mass: Tensor, column_scale: Tensor, n_rows_global: int | Tensor) -> tuple[Tensor, Tensor]:
    """v_r = 1 / (n_rows_global * sum_k mass_rk u_k) and sum_r v_r mass_rk, reading each row once: [R] and [K]."""
    row_scale = torch.empty(len(mass), device=mass.device)
    sums = torch.zeros_like(column_scale)
    for rows, some in _float_rows(mass):
        row_scale[rows] = 1.0 / (n_rows_global * (some @ column_scale))
        sums += row_scale[rows] @ some
    return row_scale, sums


def _float_rows(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows after the other in float32: themselves, or a copy whose memory the next ones take."""
    room = None
    for rows in chunks(len(matrix), matrix.shape[1], elements_at_a_time(matrix.device)):
        some = matrix[rows]
        if some.dtype != torch.float32:
            room = torch.empty_like(some, dtype=torch.float32) if room is None else room[: len(some)]
            some = room.copy_(some)
        yield rows, some

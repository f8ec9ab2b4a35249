"""The passes of Sinkhorn-Knopp over its matrix, in plain PyTorch; `triton_kernels` has the same ones for a GPU.

Rows are taken as many at a time as the processor's cache holds, so that what follows on a pass finds them there.

Dimension key:  R rows (tokens), K prototypes
"""

import torch
from torch import Tensor

from dinov2.loss.prototype_loss import chunks, elements_at_a_time


def exponentiate_(logits: Tensor, inverse_temp: float) -> Tensor:
    """Each row of teacher logits [R, K] becomes exp(inverse_temp * logits - its maximum), which is returned: [R]."""
    row_max = torch.empty(len(logits), device=logits.device)
    for rows in _rows_of(logits):
        scaled = logits[rows].float().mul_(inverse_temp)
        row_max[rows] = scaled.amax(dim=1)
        logits[rows] = scaled.sub_(row_max[rows].unsqueeze(1)).exp_()
    return row_max


def row_sums(mass: Tensor, column_scale: Tensor) -> Tensor:
    """sum_k mass_rk * column_scale_k: [R, K] and [K] to [R] float32."""
    sums = torch.empty(len(mass), device=mass.device)
    for rows in _rows_of(mass):
        sums[rows] = mass[rows].float() @ column_scale
    return sums


def column_sums(mass: Tensor, row_scale: Tensor) -> Tensor:
    """sum_r mass_rk * row_scale_r: [R, K] and [R] to [K] float32."""
    sums = torch.zeros(mass.shape[1], device=mass.device)
    for rows in _rows_of(mass):
        sums += row_scale[rows] @ mass[rows].float()
    return sums


def row_and_column_sums(mass: Tensor, column_scale: Tensor, n_rows_global: int | Tensor) -> tuple[Tensor, Tensor]:
    """v_r = 1 / (n_rows_global * sum_k mass_rk u_k) and sum_r v_r mass_rk, reading each row once: [R] and [K]."""
    row_scale = torch.empty(len(mass), device=mass.device)
    sums = torch.zeros_like(column_scale)
    for rows in _rows_of(mass):
        some = mass[rows].float()
        row_scale[rows] = 1.0 / (n_rows_global * (some @ column_scale))
        sums += row_scale[rows] @ some
    return row_scale, sums


def _rows_of(matrix: Tensor) -> list[slice]:
    return list(chunks(len(matrix), matrix.shape[1], elements_at_a_time(matrix.device)))

"""The loss side on a GPU, in Triton: cross-entropy with its gradient in place, and the passes of Sinkhorn-Knopp.

Each is bound by memory, so what counts is how often a [R, K] matrix is read. All arithmetic is in float32, whatever the
matrices are kept in; sums are taken in one order, so that the same numbers come out each time.

A row is up to 131,072 logits long, which is more than registers hold beside the sums. Where a row is needed twice, its
program walks over it twice, the second time from the end to the start: what it read last is nearest in the caches.

Importing this works everywhere; `available` tells whether a device can run it. TRITON_INTERPRET=1, set before torch is
imported, runs the kernels on CPU tensors, slowly: for tests.

Dimension key:  R rows (tokens), K prototypes
"""

import functools
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dinov2.utils.compilers import has_c_compiler

try:
    import triton
    import triton.language as tl
except (ImportError, OSError):  # none for this system, or one whose binaries do not load
    triton = None

logger = logging.getLogger("dinov2")

OLDEST_CAPABILITY = (8, 0)  # Triton's own limit, and the first GPUs with bfloat16
MAX_BLOCK = 4096  # logits of a row that a program holds at a time
MAX_WARPS = 32
TILE_ROWS, TILE_COLUMNS = 16, 256  # what a program that sums columns holds at a time: 512 bytes of bf16 from each row
GROUP_ROWS = 256  # whose sums meet in one program: enough programs for any GPU, and 1/128 of a bf16 matrix written


def available(device: torch.device) -> bool:
    """Whether the kernels run on `device`; on a GPU where they do not, a warning says once what is missing."""
    if _is_interpreted():
        return triton is not None and device.type == "cpu"
    return device.type == "cuda" and _runs_on_gpu(device)


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _runs_on_gpu(device: torch.device) -> bool:
    missing = None
    if triton is None:
        missing = "the package triton does not load; `pip install triton` brings it"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        missing = f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    elif not has_c_compiler():
        missing = "Triton needs a C compiler and found none; install gcc, or name one in the variable CC"
    if missing is not None:
        logger.warning("the loss runs without its GPU kernels, slower and with the same result: %s", missing)
    return missing is None


@torch.no_grad()
def cross_entropy_and_gradient_(
    logits: Tensor,
    mass: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    weights: Tensor,
    inverse_temp: float,
) -> Tensor:
    """Cross-entropy of each row against targets that are formed on the way; its gradient replaces the logits.

    t_rk = mass_rk * row_scale_r * column_scale_k,   p_r = softmax(inverse_temp * logits_r)
    ce_r = sum_k t_rk * -log p_rk
    logits_rk <- weights_r * inverse_temp * (p_rk * sum_j t_rj - t_rk), the gradient of sum_r weights_r ce_r

    Args:
        logits: [R, K] float32, bfloat16 or float16, rows in one piece. In float16 a gradient below 6e-8 becomes 0:
            let `weights` carry the loss scale.
        mass: [R, K] of any of these types, rows in one piece.
        row_scale: [R] float32, or None for ones.
        column_scale: [K] float32, or None for ones.
        weights: [R] float32.
        inverse_temp: 1 / temperature of the student.

    Returns:
        ce: [R] float32, without the weights.
    """
    _require_triton()
    n_rows, n_columns = logits.shape
    assert mass.shape == logits.shape, f"mass {tuple(mass.shape)} for logits {tuple(logits.shape)}"
    assert logits.stride(1) == 1 and mass.stride(1) == 1, "rows of logits and mass must lie in one piece"
    cross_entropy = weights.new_empty(n_rows, dtype=torch.float32)
    if n_rows:
        block, n_warps = _block_of_row(n_columns)
        with _on(logits.device):
            _cross_entropy_kernel[(n_rows,)](
                logits,
                mass,
                None if row_scale is None else _vector(row_scale, n_rows),
                None if column_scale is None else _vector(column_scale, n_columns),
                _vector(weights, n_rows),
                cross_entropy,
                inverse_temp,
                logits.stride(0),
                mass.stride(0),
                N_COLUMNS=n_columns,
                BLOCK=block,
                num_warps=n_warps,
            )
    return cross_entropy


@torch.no_grad()
def exponentiate_(logits: Tensor, inverse_temp: float) -> Tensor:
    """Teacher logits to Sinkhorn-Knopp's mass, in place: row r becomes exp(inverse_temp * logits_r - row_max_r).

    Args:
        logits: [R, K] float32, bfloat16 or float16, rows in one piece; K at least 1.
        inverse_temp: 1 / temperature of the teacher.

    Returns:
        row_max: [R] float32, the largest of each row of inverse_temp * logits.
    """
    _require_triton()
    n_rows, n_columns = logits.shape
    assert logits.stride(1) == 1, "rows of logits must lie in one piece"
    row_max = logits.new_empty(n_rows, dtype=torch.float32)
    if n_rows:
        block, n_warps = _block_of_row(n_columns)
        with _on(logits.device):
            _exponentiate_kernel[(n_rows,)](
                logits, row_max, inverse_temp, logits.stride(0), N_COLUMNS=n_columns, BLOCK=block, num_warps=n_warps
            )
    return row_max


@torch.no_grad()
def row_sums(mass: Tensor, column_scale: Tensor) -> Tensor:
    """sum_k mass_rk * column_scale_k: [R, K] and [K] to [R] float32."""
    _require_triton()
    n_rows, n_columns = mass.shape
    assert mass.stride(1) == 1, "rows of mass must lie in one piece"
    sums = mass.new_empty(n_rows, dtype=torch.float32)
    if n_rows:
        block, n_warps = _block_of_row(n_columns)
        with _on(mass.device):
            _row_sums_kernel[(n_rows,)](
                mass,
                _vector(column_scale, n_columns),
                sums,
                mass.stride(0),
                N_COLUMNS=n_columns,
                BLOCK=block,
                num_warps=n_warps,
            )
    return sums


@torch.no_grad()
def column_sums(mass: Tensor, row_scale: Tensor) -> Tensor:
    """sum_r mass_rk * row_scale_r of this process's rows: [R, K] and [R] to [K] float32."""
    _require_triton()
    n_rows, n_columns = mass.shape
    assert mass.stride(1) == 1, "rows of mass must lie in one piece"
    n_groups = -(-n_rows // GROUP_ROWS)
    of_groups = mass.new_empty((n_groups, n_columns), dtype=torch.float32)
    if n_rows:
        with _on(mass.device):
            _column_sums_kernel[(-(-n_columns // TILE_COLUMNS), n_groups)](
                mass,
                _vector(row_scale, n_rows),
                of_groups,
                n_rows,
                mass.stride(0),
                N_COLUMNS=n_columns,
                GROUP_ROWS=GROUP_ROWS,
                ROWS=TILE_ROWS,
                COLUMNS=TILE_COLUMNS,
                num_warps=4,
            )
    return of_groups.sum(dim=0)


@torch.no_grad()
def row_and_column_sums(mass: Tensor, column_scale: Tensor, n_rows_global: int | Tensor) -> tuple[Tensor, Tensor]:
    """What of Sinkhorn-Knopp lies between two sums over processes: rows get their share, prototypes add up theirs.

    v_r = 1 / (n_rows_global * sum_k mass_rk u_k),   m_k = sum_r v_r mass_rk

    Reads `mass` twice. One kernel that keeps a group of g rows in the L2 cache between its two sweeps would have to
    write and read a float32 partial m for each group, 8 / g bytes a logit, to save one reading of 2 (bf16): it pays
    only from g = 8 on, and 8 rows of 65,536 logits for each of an H100's 132 processors are 138 MB, its cache holds 50.

    Args:
        mass: [R, K], rows in one piece.
        column_scale: u, [K] float32.
        n_rows_global: R summed over all processes; a tensor stays on its device.

    Returns:
        v [R] and m [K] of this process's rows, float32; m is still to be summed over processes.
    """
    row_scale = 1.0 / (n_rows_global * row_sums(mass, column_scale))
    return row_scale, column_sums(mass, row_scale)


def _require_triton() -> None:
    if triton is None:
        raise ImportError(
            "dinov2.loss.triton_kernels: the package triton does not load; `pip install triton` (Linux), or ask "
            "available(device) first and compute in plain PyTorch"
        )


def _block_of_row(n_columns: int) -> tuple[int, int]:
    """Logits that a program of one row holds at a time, and its warps.

    4 logits a thread keep the running sums of the cross-entropy in registers, and 32 warps keep the number of rows in
    work near that of processors, so that the second walk over a row finds it in the L2 cache: 132 rows of 65,536 pairs
    of bf16 are 34 MB.
    """
    block = min(max(1 << (n_columns - 1).bit_length(), 128), MAX_BLOCK)
    return block, min(max(block // 128, 1), MAX_WARPS)


def _vector(values: Tensor, length: int) -> Tensor:
    assert values.shape == (length,), f"found {tuple(values.shape)} where {length} numbers belong"
    return values.float().contiguous()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    # Triton launches on the current device, not on that of its arguments
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


if triton is not None:

    @triton.jit
    def _cross_entropy_kernel(  # type: ignore[no-untyped-def]  # Triton gives the arguments their types
        logits,
        mass,
        row_scale,
        column_scale,
        weights,
        cross_entropy,
        inverse_temp,
        logits_stride,
        mass_stride,
        N_COLUMNS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)  # R * K may pass 2^31
        logits += row * logits_stride
        mass += row * mass_stride
        lanes = tl.arange(0, BLOCK)

        # Each lane keeps sums of its own, so that lanes wait for each other once a row and not once a block. The
        # running maximum starts at a finite number: the difference of two infinities is NaN.
        highest = tl.full([BLOCK], -3.4028234e38, tl.float32)
        exp_sum = tl.zeros([BLOCK], tl.float32)  # sum of exp(s - highest)
        target_sum = tl.zeros([BLOCK], tl.float32)
        agreement = tl.zeros([BLOCK], tl.float32)  # sum of t * s
        for start in range(0, N_COLUMNS, BLOCK):
            columns = start + lanes
            inside = columns < N_COLUMNS
            s = tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32) * inverse_temp
            target = tl.load(mass + columns, mask=inside, other=0.0).to(tl.float32)
            if column_scale is not None:
                target *= tl.load(column_scale + columns, mask=inside, other=0.0)
            target_sum += target
            agreement += target * s
            s = tl.where(inside, s, float("-inf"))
            # one exponential does for both cases: of the sum so far, or of the new logit
            shrink = tl.exp(-tl.abs(s - highest))
            exp_sum = tl.where(s > highest, exp_sum * shrink + 1.0, exp_sum + shrink)
            highest = tl.maximum(highest, s)
        row_highest = tl.max(highest, axis=0)
        logsumexp = row_highest + tl.log(tl.sum(exp_sum * tl.exp(highest - row_highest), axis=0))
        row_target_sum = tl.sum(target_sum, axis=0)
        of_row = 1.0
        if row_scale is not None:
            of_row = tl.load(row_scale + row)
        loss = of_row * (row_target_sum * logsumexp - tl.sum(agreement, axis=0))
        tl.store(cross_entropy + row, loss)

        factor = tl.load(weights + row) * inverse_temp * of_row
        for start in range(0, N_COLUMNS, BLOCK):
            columns = (N_COLUMNS - 1) // BLOCK * BLOCK - start + lanes  # backwards
            inside = columns < N_COLUMNS
            s = tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32) * inverse_temp
            target = tl.load(mass + columns, mask=inside, other=0.0).to(tl.float32)
            if column_scale is not None:
                target *= tl.load(column_scale + columns, mask=inside, other=0.0)
            gradient = factor * (row_target_sum * tl.exp(s - logsumexp) - target)
            tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=inside)

    @triton.jit
    def _exponentiate_kernel(  # type: ignore[no-untyped-def]
        logits, row_max, inverse_temp, stride, N_COLUMNS: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        logits += row * stride
        lanes = tl.arange(0, BLOCK)
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, N_COLUMNS, BLOCK):
            columns = start + lanes
            s = tl.load(logits + columns, mask=columns < N_COLUMNS, other=float("-inf")).to(tl.float32) * inverse_temp
            highest = tl.maximum(highest, s)
        row_highest = tl.max(highest, axis=0)
        tl.store(row_max + row, row_highest)

        for start in range(0, N_COLUMNS, BLOCK):
            columns = (N_COLUMNS - 1) // BLOCK * BLOCK - start + lanes  # backwards
            inside = columns < N_COLUMNS
            s = tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32) * inverse_temp
            tl.store(logits + columns, tl.exp(s - row_highest).to(logits.dtype.element_ty), mask=inside)

    @triton.jit
    def _row_sums_kernel(  # type: ignore[no-untyped-def]
        mass, column_scale, sums, stride, N_COLUMNS: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        mass += row * stride
        lanes = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, N_COLUMNS, BLOCK):
            columns = start + lanes
            inside = columns < N_COLUMNS
            m = tl.load(mass + columns, mask=inside, other=0.0).to(tl.float32)
            total += m * tl.load(column_scale + columns, mask=inside, other=0.0)
        tl.store(sums + row, tl.sum(total, axis=0))

    @triton.jit(do_not_specialize=["n_rows"])  # changes from step to step: not a reason to compile again
    def _column_sums_kernel(  # type: ignore[no-untyped-def]
        mass,
        row_scale,
        of_groups,
        n_rows,
        stride,
        N_COLUMNS: tl.constexpr,
        GROUP_ROWS: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < N_COLUMNS
        group = tl.program_id(1)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, GROUP_ROWS, ROWS):
            rows = group * GROUP_ROWS + start + tl.arange(0, ROWS)
            exists = rows < n_rows
            v = tl.load(row_scale + rows, mask=exists, other=0.0)
            places = mass + rows.to(tl.int64)[:, None] * stride + columns[None, :]
            m = tl.load(places, mask=exists[:, None] & inside[None, :], other=0.0).to(tl.float32)
            total += v[:, None] * m
        tl.store(of_groups + group.to(tl.int64) * N_COLUMNS + columns, tl.sum(total, axis=0), mask=inside)

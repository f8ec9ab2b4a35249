"""Matrix products of float32 on a CPU: by the fast library path where it is as accurate as the default one.

torch has one switch for the whole process, `torch.set_float32_matmul_precision`. At "highest", its default, products of
float32 matrices go to MKL, which does not use its best kernels on AMD processors. "medium" sends them to oneDNN, and
allows it to round inputs to bfloat16 on processors where that is faster (AMX on x86, BF16 on Arm); others compute in
float32 as before, only faster. The setting does not tell which of the two happens, so products of known result are
checked: where one is off by more than `TOLERANCE`, "highest" stays. Convolutions are not affected.

On CUDA the same switch means TF32, which is never this accurate: it stays off there.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger("dinov2")

FAST, EXACT = "medium", "highest"
# of the largest entry of a product over 256 numbers: float32 is below 1e-6, bfloat16 inputs are above 1e-4
TOLERANCE = 1e-5


def fast_matmul(is_wanted: bool, device: torch.device | str = "cpu") -> bool:
    """Turn the fast path on where it is wanted and as accurate as float32, else off; returns whether it is on.

    Only the device "cpu" has one.
    """
    is_fast = is_wanted and torch.device(device).type == "cpu" and _is_fast_path_accurate()
    torch.set_float32_matmul_precision(FAST if is_fast else EXACT)
    return is_fast


@contextmanager
def matmul_setting_kept() -> Iterator[None]:
    """Restore the setting after a `with` block."""
    before = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def fast_matmul_within(is_wanted: bool, device: torch.device | str = "cpu") -> Iterator[bool]:
    """Apply `fast_matmul` within a `with` block."""
    with matmul_setting_kept():
        yield fast_matmul(is_wanted, device)


def largest_error() -> float:
    """Measure the error of float32 products on the CPU with the present setting, as a share of their largest entry.

    The products are those of a transformer: a linear map with bias, its two gradients, and a batch of small ones.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(256, 256, generator=generator) for _ in range(3))
    bias = torch.randn(256, generator=generator)
    many = torch.randn(8, 64, 64, generator=generator)
    products: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (torch.nn.functional.linear, (x, weight, bias)),
        (torch.matmul, (grad, weight)),
        (torch.matmul, (grad.T, x)),
        (torch.bmm, (many, many.transpose(1, 2))),
    ]
    errors = []
    for product, factors in products:
        wanted = product(*(factor.double() for factor in factors))
        errors.append(((product(*factors) - wanted).abs().max() / wanted.abs().max()).item())
    return max(errors)


@cache
def _is_fast_path_accurate() -> bool:
    """Check the fast path once in a process; takes milliseconds."""
    with matmul_setting_kept(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        torch.set_float32_matmul_precision(FAST)
        error = largest_error()
    if error > TOLERANCE:
        logger.info("float32 matrix products: the fast path rounds (error %.0e), so the exact one is used", error)
    return error <= TOLERANCE

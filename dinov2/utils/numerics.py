"""Seeds of random streams, floating-point types of the networks, and fast float32 matrix products on a CPU.

torch has one switch for float32 products in the whole process, `torch.set_float32_matmul_precision`. "highest", its
default, sends them to MKL, which does not use its best kernels on AMD processors. "medium" sends them to oneDNN, which
may also round inputs to bfloat16 where that is faster (AMX on x86, BF16 on Arm). So products of known result are
checked first: if one is off by more than `TOLERANCE`, "highest" stays. Convolutions are not affected. On CUDA the same
switch means TF32, which is never this accurate: it stays off there, and so does cuDNN's own switch for convolutions.
"""

import functools
import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("dinov2")

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAST, EXACT = "medium", "highest"
# of the largest entry of a product over 256 numbers: float32 is below 1e-6, bfloat16 inputs are above 1e-4
TOLERANCE = 1e-5


def derive_seed(seed: int, *names: int | str) -> int:
    """Return the 63-bit seed of the stream `names` of a run with `seed`.

    Streams with different names are independent. A step's random numbers depend on its number, not on earlier draws,
    so a resumed run is exact.
    """
    text = "/".join(str(name) for name in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


# --- floating-point types -------------------------------------------------------------------------------------------


@functools.cache
def resolve_dtype(name: str, device_type: str) -> torch.dtype:
    """Return the type of `param_dtype: name` on a device; auto is bf16 on CUDA (else fp16) and fp32 on a CPU."""
    if name == "auto":
        if device_type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name == "fp16" and device_type == "cpu":
        logger.warning("compute_precision: fp16 is not computed on a CPU; fp32 is used instead")
        return torch.float32
    return _DTYPES[name]


def resolve_precision(compute_precision: Any, device_type: str) -> None:
    """Replace `auto`, and types that the device does not support, by the type to use."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    for role in ("student", "teacher"):
        for name, part in compute_precision[role].items():
            mixed = part.mixed_precision
            mixed.param_dtype = names[resolve_dtype(mixed.param_dtype, device_type)]
            if mixed.reduce_dtype == "auto":
                sums_in_param_dtype = name == "backbone" and part.sharding_strategy != "NO_SHARD"
                mixed.reduce_dtype = mixed.param_dtype if sums_in_param_dtype else "fp32"
            mixed.reduce_dtype = names[resolve_dtype(mixed.reduce_dtype, device_type)]


def computes_in_fp16(compute_precision: Any, device_type: str) -> bool:
    """Return True if a network of the student computes in fp16, whose gradients need a scaled loss."""
    parts = compute_precision.student.values()
    return any(resolve_dtype(part.mixed_precision.param_dtype, device_type) == torch.float16 for part in parts)


def autocast(name: str, device_type: str) -> torch.autocast:
    """Return an autocast context for `param_dtype: name`; weights and sensitive operations stay fp32."""
    dtype = resolve_dtype(name, device_type)
    # autocast warns of unsupported types even if it is disabled, so it gets a type that every device supports
    enabled = dtype != torch.float32
    return torch.autocast(device_type, dtype=dtype if enabled else torch.bfloat16, enabled=enabled)


# --- float32 products on a CPU ------------------------------------------------------------------------------------


def fast_matmul(is_wanted: bool, device: torch.device | str = "cpu") -> bool:
    """Turn the CPU's fast path on if it is wanted and as accurate as float32, else off; return whether it is on."""
    is_fast = is_wanted and torch.device(device).type == "cpu" and _is_fast_path_accurate()
    torch.set_float32_matmul_precision(FAST if is_fast else EXACT)
    torch.backends.cudnn.allow_tf32 = False
    return is_fast


@contextmanager
def fast_matmul_within(is_wanted: bool, device: torch.device | str = "cpu") -> Iterator[bool]:
    """Apply `fast_matmul` within a `with` block, and restore the settings after it."""
    before, allow_tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        yield fast_matmul(is_wanted, device)
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = allow_tf32


def largest_error() -> float:
    """Measure the largest error of float32 products on the CPU, as a share of a product's largest entry.

    The products are those of a transformer: a linear map with bias, its two gradients, and a batch of small products.
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


@functools.cache
def _is_fast_path_accurate() -> bool:
    """Check the fast path, which stays on, once per process; it takes milliseconds."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        torch.set_float32_matmul_precision(FAST)
        error = largest_error()
    if error > TOLERANCE:
        logger.info("float32 matrix products: the fast path rounds (error %.0e), so the exact one is used", error)
    return error <= TOLERANCE

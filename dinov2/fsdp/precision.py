"""The floating-point type of each network's computations."""

import functools
import logging
from typing import Any

import torch

logger = logging.getLogger("dinov2")

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@functools.cache
def resolve_dtype(name: str, device_type: str) -> torch.dtype:
    """Return the type of `param_dtype: name` on a device.

    Args:
        name: auto, fp32, bf16 or fp16. auto is bf16 on CUDA (fp16 on GPUs without it) and fp32 on a CPU.
        device_type: "cpu", "cuda", ...
    """
    if name == "auto":
        if device_type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name == "fp16" and device_type == "cpu":
        logger.warning("compute_precision: fp16 is not computed on a CPU; fp32 is used instead")
        return torch.float32
    return _DTYPES[name]


def resolve_precision(compute_precision: Any, device_type: str) -> None:
    """Replace `auto` and types that the device does not support by the type that is used."""
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
    # autocast warns about a type it would not use, so a disabled one gets a type that every device knows
    enabled = dtype != torch.float32
    return torch.autocast(device_type, dtype=dtype if enabled else torch.bfloat16, enabled=enabled)

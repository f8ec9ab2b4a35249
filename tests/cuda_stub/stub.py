"""Read the counters of the pretend GPU, in a process that run.sh started.

import stub
stub.reset()
step()
stub.report({"matmul_flops": stub.matmul_flops(), **stub.counters()})  # to the test, by the fixture run_on_stub
"""

import collections
import contextlib
import ctypes
import json
import os
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

torch.backends.cudnn.enabled = False  # the pretend GPU has no cuDNN
_runtime, _driver = ctypes.CDLL("libcudart_stub.so"), ctypes.CDLL("libcuda.so.1")
_runtime.stub_kernel_name.restype = _driver.stub_function_name.restype = ctypes.c_char_p
_runtime.stub_kernel_count.restype = _driver.stub_function_count.restype = ctypes.c_longlong
NAMES = [
    *("launch", "stream_sync", "device_sync", "event_sync", "memcpy_sync"),
    *("h2d_pinned", "h2d_pageable", "d2h_pinned", "d2h_pageable", "d2d"),
    *("malloc", "free", "host_alloc", "host_free", "memset", "gemm"),
]
COLLECTIVES = ["all_reduce", "all_gather", "reduce_scatter", "broadcast", "other", "communicator"]
TYPES = {0: "fp32", 1: "fp64", 2: "fp16", 14: "bf16"}  # by cudaDataType


def reset() -> None:
    """Set all counters to 0."""
    _runtime.stub_reset()
    _driver.stub_function_reset()
    _runtime.stub_nccl_reset()


def counters() -> dict[str, int]:
    """Return the numbers of launches, waits, copies by kind, allocations and matrix products since `reset()`."""
    values = (ctypes.c_longlong * 32).in_dll(_runtime, "stub_counters")
    return {name: values[i] for i, name in enumerate(NAMES)}


def collectives() -> dict[str, int]:
    """Return the numbers of NCCL's collectives since `reset()`."""
    values = (ctypes.c_longlong * 8).in_dll(_runtime, "stub_nccl_calls")
    return {name: values[i] for i, name in enumerate(COLLECTIVES)}


def matmul_flops() -> dict[str, float]:
    """Return the FLOP of cuBLAS's matrix products since `reset()`, by type."""
    values = (ctypes.c_double * 64).in_dll(_runtime, "stub_gemm_flops")
    return {name: values[i] for i, name in TYPES.items()}


def kernels() -> dict[str, int]:
    """Return {mangled name: launches since `reset()`} of PyTorch's kernels and Triton's."""
    launches: dict[str, int] = collections.Counter()
    for i in range(_runtime.stub_n_kernels()):
        launches[_runtime.stub_kernel_name(i).decode()] += _runtime.stub_kernel_count(i)
    for i in range(_driver.stub_n_functions()):
        launches[_driver.stub_function_name(i).decode()] += _driver.stub_function_count(i)
    return {name: n for name, n in launches.items() if n}


@contextlib.contextmanager
def host_waits(package: str = "dinov2") -> Iterator[dict[str, int]]:
    """Count where `package` waits for the device within a `with` block: {"file:line < file:line ...": times}."""
    waits: dict[str, int] = collections.Counter()
    show = warnings.showwarning

    def count(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            files = [frame for frame in traceback.extract_stack() if f"/{package}/" in frame.filename]
            if files:
                waits[" < ".join(f"{os.path.relpath(each.filename)}:{each.lineno}" for each in files[:-5:-1])] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = show


def report(value: Any) -> None:
    """Write `value` as JSON for the test that started this process; of several ranks, each writes its own."""
    Path(os.environ["STUB_REPORT"], os.environ.get("RANK", "0")).write_text(json.dumps(value))

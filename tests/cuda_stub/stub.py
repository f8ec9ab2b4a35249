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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

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
aten = torch.ops.aten
CPU_ONLY = {
    aten.nonzero,
    aten.index,
    aten._linalg_svd,
    aten._linalg_eigh,
}  # shapes depend on values; there is no cuSOLVER


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
        if "called a synchronizing CUDA operation" in str(message):
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


class RealValues(TorchDispatchMode):
    """Fill the results on the pretend GPU with the values that the CPU computes, for code that depends on them.

    Operations that a CPU lacks give zeros.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = args, kwargs or {}
        if not any(_on_gpu(leaf) for leaf in tree_leaves(given)):
            return func(*given[0], **given[1])
        result = None if func.overloadpacket in CPU_ONLY else func(*given[0], **given[1])
        if func.is_view:
            return result
        sync_debug_mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")  # the copies here are not waits of the code
        on_cpu = tree_map(_to_cpu, given)
        try:
            values = func(*on_cpu[0], **on_cpu[1])
        except NotImplementedError:
            values = tree_map(lambda leaf: torch.zeros_like(leaf, device="cpu") if _is_tensor(leaf) else leaf, result)
        if result is None:
            result = tree_map(lambda leaf: leaf.cuda() if _is_tensor(leaf) else leaf, values)
        pairs = [(result, values), (given, on_cpu)] if func._schema.is_mutable else [(result, values)]
        for target, source in zip(*(tree_leaves(side) for side in zip(*pairs, strict=True)), strict=True):
            if _on_gpu(target) and _is_tensor(target):
                memory = _to_cpu(target)
                memory.copy_(source)
                target.untyped_storage().copy_(memory.untyped_storage())
            elif _is_tensor(target) and target is not source:
                target.copy_(source)
        torch.cuda.set_sync_debug_mode(sync_debug_mode)
        return result


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _on_gpu(leaf: Any) -> bool:
    return (_is_tensor(leaf) and leaf.is_cuda) or (isinstance(leaf, torch.device) and leaf.type == "cuda")


def _to_cpu(leaf: Any) -> Any:
    if not _on_gpu(leaf):
        return leaf
    if not _is_tensor(leaf):
        return torch.device("cpu")
    memory = leaf.untyped_storage().cpu()  # a copy of the strided tensor would need a kernel
    return torch.empty(0, dtype=leaf.dtype).set_(memory, leaf.storage_offset(), leaf.shape, leaf.stride())


def report(value: Any) -> None:
    """Write `value` as JSON for the test that started this process; of several ranks, each writes its own."""
    Path(os.environ["STUB_REPORT"], os.environ.get("RANK", "0")).write_text(json.dumps(value))

"""Check that the machine can run torch.compile: Triton, and a compiler for C or C++."""

import importlib.util
import os
import shutil
import sys

import torch

OLDEST_CAPABILITY = (7, 0)  # of a GPU that torch.compile writes kernels for


def has_c_compiler() -> bool:
    """Return True if a compiler for Triton's C wrappers is found."""
    return "CC" in os.environ or shutil.which("gcc") is not None or shutil.which("clang") is not None


def has_cpp_compiler() -> bool:
    """Return True if a compiler for torch.compile's C++ code is found."""
    default = "clang++" if sys.platform == "darwin" else "g++"
    return shutil.which(os.environ.get("CXX", default)) is not None


def obstacle_to_compiling(device: torch.device) -> str | None:
    """Return why torch.compile does not work on `device` and what would help, or None if it should work."""
    if not torch._dynamo.is_dynamo_supported():
        version = sys.version.split()[0]
        return f"torch.compile of PyTorch {torch.__version__} does not run on Python {version}; take an older one"
    if device.type == "cpu":
        return None if has_cpp_compiler() else "no C++ compiler was found; install g++, or name one in the variable CXX"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing; `pip install triton` brings it"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 7.0, which torch.compile needs"
    return None if has_c_compiler() else "no C compiler was found; install gcc, or name one in the variable CC"

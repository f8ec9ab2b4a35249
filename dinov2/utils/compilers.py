"""Check that the machine can run torch.compile: Triton, and a compiler for C or C++."""

import importlib.util
import os
import shutil
import sys

import torch


def obstacle_to_compiling(device: torch.device) -> str | None:
    """Return what torch.compile lacks on `device` and what would help, or None."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is missing; `pip install triton` brings it"
        if "CC" in os.environ or shutil.which("gcc") or shutil.which("clang"):
            return None
        return "no C compiler was found; install gcc, or name one in the variable CC"
    if shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")):
        return None
    return "no C++ compiler was found; install g++, or name one in the variable CXX"

"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) in state dicts, under the names that peft gives them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_BASE, _A, _B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def is_adapter(name: str) -> bool:
    """Return True for the two parameters of an adapter."""
    return name.endswith((_A, _B))


def lora_scaling(student: Any) -> float:
    """alpha / rank of a configuration's section `student`; 0 without adapters."""
    lora = getattr(student, "lora", None)  # a run from before there were any has no such section
    return float(lora.alpha / lora.rank) if lora is not None and lora.rank else 0.0


def merged(state: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """Tensors of a backbone with adapters as those of the plain one that gives the same features.

    W <- W + scaling B A, under the plain names; what has no adapter is passed on. Names may have a prefix.
    """
    plain = {}
    for name, value in state.items():
        if is_adapter(name):
            continue
        layer, base, parameter = name.partition(_BASE)
        if base and parameter == "weight":
            change = state[layer + _B].double() @ state[layer + _A].double()  # [out, in]
            value = (value.double() + scaling * change).to(value.dtype)
        plain[f"{layer}.{parameter}" if base else name] = value
    return plain

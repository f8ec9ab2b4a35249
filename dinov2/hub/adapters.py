"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): add them to a network, and merge them into its weights.

A linear layer with an adapter computes

    y = W x + b + (alpha / rank) B A x,   A [rank, in] random at the start, B [out, rank] zero

Parameters have the names that peft gives them.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

_BASE, _A, _B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def add_adapters(
    network: nn.Module, layers: Iterable[str], rank: int, alpha: float, dropout: float = 0.0, setting: str = "LoRA"
) -> None:
    """Add adapters to the linear layers of these names; `setting` begins the error if peft is missing.

    Injected layers keep their own parameters, under other names, and only the adapters require gradients.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise ValueError(f"{setting} needs the package peft; run `pip install peft`, or do without adapters") from error
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides it, whole or not
        lora_dropout=dropout,
        target_modules="|".join(re.escape(layer) for layer in layers),  # a pattern for whole names
        bias="none",
    )
    # without peft's wrapper, which would change names, signatures and types
    inject_adapter_in_model(settings, network)
    for module in network.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # autocast decides, as for all layers


def is_adapter(name: str) -> bool:
    """Return whether a name is one of the two parameters of an adapter."""
    return name.endswith((_A, _B))


def lora_scaling(student: Any) -> float:
    """Return alpha / rank of a configuration's section `student`; 0 without adapters."""
    lora = getattr(student, "lora", None)  # old runs have no such section
    return float(lora.alpha / lora.rank) if lora is not None and lora.rank else 0.0


def merge_adapters(state: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """Merge adapters into a backbone's weights: W <- W + scaling B A, under the names without adapters.

    Other tensors stay as they are. Names may have a prefix.
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

"""Parameter groups of an optimizer: layer-wise learning rates, and no weight decay for biases and norms."""

from collections.abc import Iterable
from typing import Any

from torch import nn


def get_params_groups_with_decay(
    model: nn.Module, lr_decay_rate: float = 1.0, patch_embed_lr_mult: float = 1.0
) -> list[dict[str, Any]]:
    """Return a group for each trainable parameter: `name`, `lr_multiplier`, `wd_multiplier`, `is_last_layer`.

    Biases, norms and layer scale have no weight decay. The learning rates of a backbone (a module with `n_blocks`)
    decay by lr_decay_rate ** (n_blocks + 1 - layer); those of a head do not.
    """
    n_blocks = getattr(model, "n_blocks", None)
    groups = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth_from_end = 0 if n_blocks is None else n_blocks + 1 - layer_of(name, n_blocks)
        has_decay = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
        group = {
            "name": name,
            "params": parameter,
            "is_last_layer": "last_layer" in name,
            "lr_multiplier": lr_decay_rate**depth_from_end * (patch_embed_lr_mult if "patch_embed" in name else 1.0),
            "wd_multiplier": 1.0 if has_decay else 0.0,
        }
        groups.append(group)
    return groups


def fuse_params_groups(
    groups: Iterable[dict[str, Any]], keys: tuple[str, ...] = ("lr_multiplier", "wd_multiplier", "is_last_layer")
) -> list[dict[str, Any]]:
    """Merge groups that agree in `keys`, in order of first appearance; `params` becomes a list."""
    fused: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in groups:
        identity = tuple(group[key] for key in keys)
        merged = fused.setdefault(identity, {"params": [], **{key: group[key] for key in keys}})
        merged["params"].append(group["params"])
    return list(fused.values())


def layer_of(name: str, n_blocks: int) -> int:
    """Return the depth of a backbone parameter: 0 for embeddings, i + 1 for block i, n_blocks + 1 after the blocks."""
    parts = name.split(".")
    if {"pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens"}.intersection(parts):
        return 0
    if "blocks" in parts:  # `blocks.<i>.norm1...` or, chunked, `blocks.<chunk>.<i>.norm1...`
        first, second = parts[parts.index("blocks") + 1 :][:2]
        return int(second if second.isdigit() else first) + 1
    return n_blocks + 1

"""Parameter groups: layer-wise learning-rate decay, slower patch embedding, no weight decay on biases and norms."""

from collections.abc import Iterable
from typing import Any

from torch import nn

# Parameters in front of the first block share layer 0 of the decay.
_EMBEDDING_NAMES = ("pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens")


def layer_of(name: str, n_blocks: int) -> int:
    """Depth of a backbone parameter: 0 for the embeddings, i + 1 for block i, n_blocks + 1 behind the blocks."""
    parts = name.split(".")
    if any(embedding in parts for embedding in _EMBEDDING_NAMES):
        return 0
    if "blocks" in parts:
        # `blocks.<i>.norm1...` or, chunked, `blocks.<chunk>.<i>.norm1...`: the block's number is the last one
        first = parts.index("blocks") + 1
        return int(parts[first + 1] if parts[first + 1].isdigit() else parts[first]) + 1
    return n_blocks + 1


def get_params_groups_with_decay(
    model: nn.Module, lr_decay_rate: float = 1.0, patch_embed_lr_mult: float = 1.0
) -> list[dict[str, Any]]:
    """One group a trainable parameter, with `name`, `lr_multiplier`, `wd_multiplier` and `is_last_layer`.

    A module with `n_blocks` is a backbone and decays by lr_decay_rate ** (n_blocks + 1 - layer); a head does not decay.
    """
    n_blocks = getattr(model, "n_blocks", None)
    groups = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth_from_end = 0 if n_blocks is None else n_blocks + 1 - layer_of(name, n_blocks)
        group: dict[str, Any] = {
            "name": name,
            "params": parameter,
            "is_last_layer": "last_layer" in name,
            "lr_multiplier": lr_decay_rate**depth_from_end,
            "wd_multiplier": 0.0 if name.endswith(".bias") or "norm" in name or "gamma" in name else 1.0,
        }
        if "patch_embed" in name:
            group["lr_multiplier"] *= patch_embed_lr_mult
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

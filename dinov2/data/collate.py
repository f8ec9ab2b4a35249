"""Crops and iBOT masks to the batch dict that training reads; its keys are upstream's.

Dimension key:  B pictures, G global crops, L local crops, S and s their sides in pixels, P patches per global crop,
                M masked patches in the batch
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2.data.masking import MaskingGenerator


def draw_masks(
    n_crops: int,
    mask_ratio_tuple: tuple[float, float],
    mask_probability: float,
    mask_generator: MaskingGenerator,
    rng: np.random.Generator | None = None,
) -> tuple[Tensor, int]:
    """Masks for a batch of global crops.

    int(n_crops * mask_probability) crops get a mask. The range of ratios is cut into as many equal parts, and each of
    these crops draws its ratio from a part of its own, so that every batch has the whole range. Which crop gets which
    part is random.

    Args:
        n_crops: G * B.
        mask_ratio_tuple: lowest and highest share of a crop's patches to mask.
        mask_probability: share of the crops that get a mask.
        mask_generator: draws one mask; knows P.
        rng: where the randomness comes from; if None, Python's `random` seeds it.

    Returns:
        masks: bool [n_crops, P] on the CPU.
        upperbound: a number of masked patches that no draw with these settings exceeds.
    """
    if rng is None:
        rng = np.random.default_rng(random.getrandbits(64))
    height, width = mask_generator.get_shape()
    n_tokens = height * width
    n_masked_crops = int(n_crops * mask_probability)
    # float32 as in upstream: 0.25 * 256 must be 64 and not a hair less, or upperbound would differ
    edges = torch.linspace(*mask_ratio_tuple, n_masked_crops + 1)
    upperbound = sum(int(n) for n in n_tokens * edges[1:])
    ratios = rng.uniform(edges[:-1].numpy(), edges[1:].numpy())
    masks = np.zeros((n_crops, height, width), dtype=bool)
    for crop, ratio in zip(rng.permutation(n_crops), ratios, strict=False):
        masks[crop] = mask_generator(int(n_tokens * ratio), rng)
    return torch.from_numpy(masks).flatten(1), upperbound  # [G * B, P]


def assemble_batch(
    crops: Mapping[str, Any], masks: Tensor, upperbound: int, dtype: torch.dtype
) -> dict[str, Tensor | int]:
    """The batch dict from batched crops and their masks.

    Args:
        crops: `global_crops`, a list of G tensors [B, 3, S, S], and `local_crops`, a list of L tensors [B, 3, s, s].
        masks: bool [G * B, P] on the CPU, in the order of the collated crops.
        upperbound: as `draw_masks` gives it.
        dtype: what the crops are cast to.

    Returns:
        tensors on the crops' device, without waiting for it:
        collated_global_crops: dtype [G * B, 3, S, S], all first crops before all second.
        collated_local_crops: dtype [L * B, 3, s, s]; left out when L is 0.
        collated_masks: bool [G * B, P].
        mask_indices_list: int64 [M], where the flattened masks are True.
        masks_weight: float32 [M], 1 / (masked patches of the crop that the patch belongs to).
        upperbound: int.
        n_masked_patches: int64 [1], M.
    """
    global_crops = torch.cat(list(crops["global_crops"])).to(dtype)  # [G * B, 3, S, S]
    counts = masks.sum(dim=1)  # [G * B]
    indices = masks.flatten().nonzero().flatten()  # [M]
    device = global_crops.device
    batch: dict[str, Tensor | int] = {
        "collated_global_crops": global_crops,
        "collated_masks": _move(masks, device),
        "mask_indices_list": _move(indices, device),
        "masks_weight": _move((1 / counts.clamp(min=1)).repeat_interleave(counts), device),  # [M]
        "upperbound": upperbound,
        "n_masked_patches": _move(torch.tensor([len(indices)]), device),
    }
    if crops["local_crops"]:
        batch["collated_local_crops"] = torch.cat(list(crops["local_crops"])).to(dtype)  # [L * B, 3, s, s]
    return batch


def collate_data_and_cast(
    samples_list: Sequence[Sequence[Any]],
    mask_ratio_tuple: tuple[float, float],
    mask_probability: float,
    dtype: torch.dtype,
    n_tokens: int | None = None,
    mask_generator: MaskingGenerator | None = None,
) -> dict[str, Tensor | int]:
    """The batch dict from pictures that were augmented one by one, as a loader's `collate_fn`.

    Args:
        samples_list: B of (crops, ...), where crops is an augmentation's dict for one picture: lists of G tensors
            [3, S, S] and L tensors [3, s, s].
        mask_ratio_tuple: see `draw_masks`.
        mask_probability: see `draw_masks`.
        dtype: what the crops are cast to.
        n_tokens: P; that of `mask_generator` if None, and equal to it otherwise.
        mask_generator: required; its default exists because it follows `n_tokens` in upstream's signature.

    Returns:
        what `assemble_batch` returns.
    """
    if mask_generator is None:
        raise ValueError(
            "mask_generator: None; pass MaskingGenerator((h, w), ...), h and w in patches of a global crop"
        )
    height, width = mask_generator.get_shape()
    if n_tokens not in (None, height * width):
        raise ValueError(f"n_tokens: {n_tokens}, but mask_generator draws {height} x {width} patches; make them agree")
    by_picture = [sample[0] for sample in samples_list]
    crops = {
        key: [torch.stack(views) for views in zip(*(picture[key] for picture in by_picture), strict=True)]
        for key in ("global_crops", "local_crops")
    }
    n_crops = len(crops["global_crops"]) * len(by_picture)
    masks, upperbound = draw_masks(n_crops, mask_ratio_tuple, mask_probability, mask_generator)
    return assemble_batch(crops, masks, upperbound, dtype)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    # a copy from pageable memory makes the host wait for the stream; one from pinned memory does not
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

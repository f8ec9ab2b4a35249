"""Collate crops and iBOT masks to the batch dict that training reads; its keys are upstream's.

Dimension key:  B images, G global crops, L local crops, S and s their sides in pixels, P patches per global crop,
                M masked patches in the batch
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2.data.masking import MaskingGenerator
from dinov2.utils.numerics import derive_seed


class MicroBatch(NamedTuple):
    """The images of a global batch that are collated together."""

    images: Sequence[int]  # B positions in the global batch
    global_batch_size: int
    mask_seed: int  # of all masks of the global batch


def draw_masks(
    n_crops: int,
    mask_ratio_tuple: tuple[float, float],
    mask_probability: float,
    mask_generator: MaskingGenerator,
    seed: int,
    crops: Sequence[int] | None = None,
) -> tuple[Tensor, int]:
    """Draw the masks of all global crops of a batch, or of those at the positions `crops`: bool [len(crops), P].

    int(n_crops * mask_probability) crops of the batch get a mask. The range of ratios (shares of a crop's patches) is
    divided into as many equal strata, and a permutation gives each of these crops one of them, so every batch covers
    the whole range. Each mask has its own seed: it does not depend on which other masks are drawn.

    Also return the largest possible number of masked patches in so many crops.
    """
    crops = range(n_crops) if crops is None else crops
    height, width = mask_generator.get_shape()
    n_tokens = height * width
    n_masked_crops = int(n_crops * mask_probability)
    # float32 as in upstream, where 0.25 * 256 is exactly 64; otherwise upperbound would differ
    edges = torch.linspace(*mask_ratio_tuple, n_masked_crops + 1)
    upperbound = int((n_tokens * edges[1:]).long()[-len(crops) :].sum())
    strata = np.random.default_rng(derive_seed(seed, "strata")).permutation(n_crops)
    masks = np.zeros((len(crops), height, width), dtype=bool)
    for mask, crop in zip(masks, crops, strict=True):
        stratum = strata[crop]
        if stratum < n_masked_crops:
            rng = np.random.default_rng(derive_seed(seed, "crop", crop))
            ratio = rng.uniform(*edges[stratum : stratum + 2].tolist())
            mask[:] = mask_generator(int(n_tokens * ratio), rng)
    return torch.from_numpy(masks).flatten(1), upperbound  # [len(crops), P]


def assemble_batch(
    crops: Mapping[str, Any], masks: Tensor, upperbound: int, dtype: torch.dtype
) -> dict[str, Tensor | int]:
    """Build the batch dict from batched crops and their masks, bool [G * B, P], in the order of the collated crops.

    `crops` has `global_crops`, a list of G tensors [B, 3, S, S], and `local_crops`, a list of L tensors [B, 3, s, s].
    `upperbound` is that of `draw_masks`. Without local crops the batch has no `collated_local_crops`.
    """
    global_crops = torch.cat(list(crops["global_crops"])).to(dtype)  # [G * B, 3, S, S]
    counts = masks.sum(dim=1)  # [G * B]
    indices = masks.flatten().nonzero().flatten()  # [M]
    batch: dict[str, Tensor | int] = {
        "collated_global_crops": global_crops,  # all first crops before all second
        "collated_masks": masks,
        "mask_indices_list": indices,  # positions of the masked patches in the flattened masks
        "masks_weight": (1 / counts.clamp(min=1)).repeat_interleave(counts),  # [M] 1 / masked patches in the crop
        "upperbound": upperbound,
        "n_masked_patches": torch.tensor([len(indices)]),  # [1]
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
    micro_batch: MicroBatch | None = None,
) -> dict[str, Tensor | int]:
    """Build the batch dict from augmented images, as a loader's `collate_fn`.

    Each of the B samples begins with an augmentation's dict: lists of G tensors [3, S, S] and L tensors [3, s, s].
    `mask_generator` is required; it follows `n_tokens` (P) in upstream's signature. Without a `micro_batch` the images
    are a global batch, whose masks have a seed drawn by Python's `random`.
    """
    if mask_generator is None:
        raise ValueError("mask_generator: None; pass MaskingGenerator((h, w)), h and w in patches of a global crop")
    height, width = mask_generator.get_shape()
    if n_tokens not in (None, height * width):
        raise ValueError(f"n_tokens: {n_tokens}, but mask_generator draws {height} x {width} patches; make them agree")
    crops = {
        key: [torch.stack(views) for views in zip(*(sample[0][key] for sample in samples_list), strict=True)]
        for key in ("global_crops", "local_crops")
    }
    if micro_batch is None:
        micro_batch = MicroBatch(range(len(samples_list)), len(samples_list), random.getrandbits(63))
    images, n_images, seed = micro_batch
    n_crops = len(crops["global_crops"]) * n_images
    numbers = [first + image for first in range(0, n_crops, n_images) for image in images]
    masks, upperbound = draw_masks(n_crops, mask_ratio_tuple, mask_probability, mask_generator, seed, numbers)
    return assemble_batch(crops, masks, upperbound, dtype)

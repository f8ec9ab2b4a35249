"""Draw block-wise random masks of patches for iBOT (BEiT, Bao et al. 2021, arXiv 2106.08254, "Blockwise Masking").

Letters: h, w patches along the height and the width of a crop.
"""

import math
import random

import numpy as np

N_TRIES_PER_BLOCK = 10
N_NUMBERS_PER_TRY = 4  # area, aspect, row, column


class MaskingGenerator:
    """Mask rectangles of a crop until the wanted number of patches is masked, or no further rectangle fits.

    A rectangle's area is uniform between `min_num_patches` and the number of missing patches (at most
    `max_num_patches`); the logarithm of its aspect is uniform between those of `min_aspect` and `max_aspect`. A
    rectangle is taken if it adds at least one patch and at most the missing ones. So a mask never has too many patches,
    and sometimes a few too few.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int],
        num_masking_patches: int | None = None,
        min_num_patches: int = 4,
        max_num_patches: float | None = None,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
    ) -> None:
        """
        Args:
            input_size: (h, w) in patches, or one number for a square.
            num_masking_patches: the default of `max_num_patches`, as in upstream; no limit if both are None.
            min_num_patches, max_num_patches: smallest and largest area of a block.
            min_aspect, max_aspect: smallest and largest height / width; `max_aspect` is 1 / min_aspect by default.
        """
        self.height, self.width = (input_size, input_size) if isinstance(input_size, int) else input_size
        self.num_patches = self.height * self.width
        self.num_masking_patches = num_masking_patches
        self.min_num_patches = min_num_patches
        limits = (max_num_patches, num_masking_patches, self.num_patches)
        self.max_num_patches = next(limit for limit in limits if limit is not None)
        self.log_aspect_ratio = (math.log(min_aspect), math.log(max_aspect or 1 / min_aspect))

    def get_shape(self) -> tuple[int, int]:
        """Return (h, w)."""
        return self.height, self.width

    def __call__(self, num_masking_patches: int = 0, rng: np.random.Generator | None = None) -> np.ndarray:
        """Draw one mask, bool [h, w]; without `rng`, Python's `random` seeds it, which upstream's users seed."""
        if rng is None:
            rng = np.random.default_rng(random.getrandbits(64))
        mask = np.zeros((self.height, self.width), dtype=bool)
        n_masked = 0
        while n_masked < num_masking_patches:
            most = min(num_masking_patches - n_masked, self.max_num_patches)
            block = self._draw_block(mask, most, rng)
            if block is None:
                break
            mask[block] = True
            n_masked = int(np.count_nonzero(mask))
        return mask

    def _draw_block(self, mask: np.ndarray, most: float, rng: np.random.Generator) -> tuple[slice, slice] | None:
        """Draw rows and columns that add 1 to `most` patches to `mask`; None if no try succeeds."""
        log_low, log_high = self.log_aspect_ratio
        numbers = rng.random((N_TRIES_PER_BLOCK, N_NUMBERS_PER_TRY)).tolist()
        for u_area, u_aspect, u_row, u_column in numbers:
            area = self.min_num_patches + u_area * (most - self.min_num_patches)
            aspect = math.exp(log_low + u_aspect * (log_high - log_low))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= self.height or width >= self.width:
                continue
            row, column = int(u_row * (self.height - height + 1)), int(u_column * (self.width - width + 1))
            block = slice(row, row + height), slice(column, column + width)
            if 0 < height * width - np.count_nonzero(mask[block]) <= most:
                return block
        return None

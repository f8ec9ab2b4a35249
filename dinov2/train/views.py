"""Draw sheets of a training batch's crops and masks, to look at during the run.

<run>/views/crops_<n>.png   one image per row: both global crops, then local ones, without the normalisation
            masks_<n>.png   the global crops of the same images, with masked patches in green; absent if none is masked

n is 0 for the run's first batch, else the number of the evaluation training_<n> after the batch. The first sheets and
the newest `N_KEPT` are kept. Drawing them changes no number of the run.

Letters: B images of a micro-batch, G global crops (2), L local crops, S side of a crop in pixels, P patches per global
crop, R rows and C columns of a sheet
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dinov2.data.augmentations import N_GLOBAL_CROPS
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from dinov2.distributed import is_main_process
from dinov2.logging import MetricLogger
from dinov2.utils.files import atomic_write

logger = logging.getLogger("dinov2")

FOLDER_NAME = "views"
N_KEPT = 4  # newest sheets, besides the first
MOST_PIXELS = 900_000  # of a sheet: its PNG then stays below 3 MB
LARGEST_TILE, SMALLEST_TILE = 160, 84  # px, side of a crop on a sheet
MOST_LOCAL_CROPS = 8  # of an image
GAP = 4  # px between crops
MASK_COLOUR, MASK_OPACITY = (0, 150, 70), 0.65  # a green that no stain has, half transparent


class TrainingViews:
    """Writes the sheets of a run on the main process, with `train.views` images each; 0 for no sheets."""

    def __init__(self, cfg: Any, run_folder: Path) -> None:
        self.n_images = int(cfg.train.views)
        self.folder = run_folder / FOLDER_NAME

    def write(self, micro_batches: list[dict[str, Any]], done: int, metrics: MetricLogger) -> None:
        """Write the sheets of a batch after `done` iterations, and send them to the trackers.

        If a sheet cannot be written, a warning says so and the run continues.
        """
        if self.n_images <= 0 or not is_main_process():
            return
        sheets = draw_sheets(micro_batches[0], self.n_images)
        try:
            for kind, sheet in sheets.items():
                with atomic_write(self.folder / f"{kind}_{done}.png") as file:
                    Image.fromarray(sheet).save(file, "PNG")
            self._remove_old(done)
        except OSError as error:
            logger.warning(
                "the crops and masks after iteration %d are not in %s (%s); the run goes on",
                *(done, self.folder, error.strerror or error),
            )
        metrics.log_images(done, sheets)

    def _remove_old(self, done: int) -> None:
        iterations = {path: int(path.stem.rpartition("_")[2]) for path in self.folder.glob("[cm]*_*.png")}
        present = sorted({n for n in iterations.values() if n <= done})  # later ones were rolled back
        for path, n in iterations.items():
            if n not in (present[0], *present[-N_KEPT:]):
                path.unlink()


def draw_sheets(batch: Mapping[str, Any], n_images: int) -> dict[str, np.ndarray]:
    """Draw sheets (uint8 [H, W, 3]) of a batch's first images: "crops" and, if a patch is masked, "masks"."""
    crops = batch["collated_global_crops"].unflatten(0, (N_GLOBAL_CROPS, -1))[:, :n_images]  # [G, R, 3, S, S]
    masks = batch["collated_masks"].unflatten(0, (N_GLOBAL_CROPS, -1))[:, :n_images].cpu()  # [G, R, P]
    n_rows, batch_size = crops.shape[1], len(batch["collated_global_crops"]) // N_GLOBAL_CROPS
    side = math.isqrt(masks.shape[2])  # patches along an edge
    local_crops = batch.get("collated_local_crops", crops[:0])
    n_local = min(len(local_crops) // batch_size, MOST_LOCAL_CROPS)

    n_tiles = n_rows * (N_GLOBAL_CROPS + n_local)
    most = min(max(crops.shape[-1], SMALLEST_TILE), LARGEST_TILE, math.isqrt(MOST_PIXELS // n_tiles) - GAP)
    size = max(most // side, 1) * side  # whole pixels for each patch
    tiles = global_tiles = _resize_crops(crops, size)  # [G, R, 3, size, size]
    if n_local:
        local_crops = local_crops.unflatten(0, (-1, batch_size))[:n_local, :n_rows]
        tiles = torch.cat([global_tiles, _resize_crops(local_crops, size)])  # [C, R, 3, size, size]
    sheets = {"crops": _arrange_tiles(tiles)}
    if bool(batch["collated_masks"].any()):
        grids = masks.unflatten(2, (side, side)).float()
        is_masked = F.interpolate(grids, size=(size, size), mode="nearest").bool().unsqueeze(2)
        colour = torch.tensor(MASK_COLOUR).view(3, 1, 1) / 255
        covered = (1 - MASK_OPACITY) * global_tiles + MASK_OPACITY * colour
        sheets["masks"] = _arrange_tiles(torch.where(is_masked, covered, global_tiles))
    return sheets


def _resize_crops(crops: Tensor, size: int) -> Tensor:
    """Resize crops [C, R, 3, S, S], as pixels from 0 to 1 on the CPU; NaN becomes white."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = (crops.detach().cpu().float() * std + mean).nan_to_num(1.0).clamp(0, 1)
    resized = F.interpolate(pixels.flatten(0, 1), size=(size, size), mode="bilinear", antialias=True)
    return resized.unflatten(0, crops.shape[:2])


def _arrange_tiles(tiles: Tensor) -> np.ndarray:
    """Arrange tiles [C, R, 3, size, size] in one image, uint8 [height, width, 3]."""
    rows = F.pad(tiles, (0, GAP, 0, GAP), value=1.0).permute(1, 3, 0, 4, 2)  # [R, size + GAP, C, size + GAP, 3]
    return (rows.flatten(2, 3).flatten(0, 1) * 255).round().byte().numpy()

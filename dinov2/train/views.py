"""Pictures of a training batch as the networks got it, for people to look at while the run goes on.

<run>/views/crops_<n>.png   a picture a row: both global crops, then local ones; normalisation is undone
            masks_<n>.png   the global crops of the same pictures, patches that the student did not see in green;
                            not there where nothing was masked
            views.json      what these show

n is 0 for the run's first batch, and otherwise that of the evaluation training_<n>: the last batch before it. The first
and the newest `N_KEPT` of them stay. Looking draws no number and changes none.

Letters: B pictures of a batch, G global crops (2), L local crops, S and s their sides in pixels, P patches per global
crop, R rows of a sheet
"""

import io
import json
import logging
import math
import re
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

FOLDER_NAME, INDEX_NAME = "views", "views.json"
N_KEPT = 4  # newest ones, beside the first
# A sheet has at most so many pixels: as a PNG it then stays below the 3 MB that a report takes in
MOST_PIXELS = 900_000
LARGEST_TILE, SMALLEST_TILE = 160, 84  # px, sides of a global crop on a sheet
MOST_LOCAL_CROPS = 8  # of a picture; they stand in two lines
GAP = 4  # px between pictures and between their local crops
PAPER = 255  # grey level around the crops
MASK_COLOUR, MASK_OPACITY = (0, 150, 70), 0.65  # a green that stains have not; what is below shines through


class TrainingViews:
    """Writes the sheets of a run, on the main process; `train.views` pictures on each, 0 for no sheets."""

    def __init__(self, cfg: Any, run_folder: Path) -> None:
        self.n_pictures = int(cfg.train.views)
        self.folder = run_folder / FOLDER_NAME

    def write(self, parts: list[dict[str, Any]], done: int, metrics: MetricLogger) -> None:
        """Show the batch `parts` after `done` iterations, in files and in the trackers that take pictures.

        A sheet that cannot be written is missed, and the log says so: the run needs none.
        """
        if self.n_pictures <= 0 or not is_main_process():
            return
        sheets, told = draw_sheets(parts[0], self.n_pictures)
        try:
            self._write(sheets, {"iteration": done, **told})
        except OSError as error:
            logger.warning(
                "the crops and masks after iteration %d are not in %s (%s); the run goes on",
                *(done, self.folder, error.strerror or error),
            )
        metrics.log_images(done, sheets)

    def _write(self, sheets: Mapping[str, np.ndarray], told: Mapping[str, Any]) -> None:
        done = told["iteration"]
        entry = {**told, **{kind: f"{kind}_{done}.png" for kind in sheets}}
        for kind, sheet in sheets.items():
            content = io.BytesIO()
            Image.fromarray(sheet).save(content, "PNG")
            with atomic_write(self.folder / entry[kind]) as file:
                file.write(content.getvalue())
        files: dict[int, list[Path]] = {}
        for path in self.folder.glob("*_*.png"):
            if match := re.fullmatch(r"(?:crops|masks)_(\d+)", path.stem):
                files.setdefault(int(match[1]), []).append(path)
        # Later ones are of a part of the run that was lost, and come again
        present = sorted(n for n in files if n <= done)
        kept = {present[0], *present[-N_KEPT:]}
        earlier = [e for e in self._earlier_entries() if e["iteration"] in kept - {done}]
        with atomic_write(self.folder / INDEX_NAME, "w") as index:
            json.dump({"views": [*earlier, entry]}, index, indent=1)
        for n in files.keys() - kept:
            for path in files[n]:
                path.unlink()

    def _earlier_entries(self) -> list[dict[str, Any]]:
        path = self.folder / INDEX_NAME
        if not path.is_file():
            return []
        try:
            entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["views"]
            return [entry for entry in entries if isinstance(entry["iteration"], int)]
        except (KeyError, TypeError, ValueError):
            logger.warning("%s cannot be read and is begun anew; the pictures it named are still there", path)
            return []


def draw_sheets(part: Mapping[str, Any], n_pictures: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Sheets of the first `n_pictures` of a batch; waits for its device.

    Args:
        part: batch dict of `dinov2.data.collate`.
        n_pictures: the most rows a sheet has.

    Returns:
        sheets: uint8 [height, width, 3] by `crops` and, where a patch of the batch is masked, `masks`.
        told: of the sheets, `pictures` (R), `local_crops` (shown of each picture), `local_crops_of_each` (L),
            `global_crop_px` (S), `local_crop_px` (s), `shown_px` (side of a global crop on the sheet) and
            `masked_share`, [R, G] numbers in 0 to 1.
    """
    crops = part["collated_global_crops"].unflatten(0, (N_GLOBAL_CROPS, -1))  # [G, B, 3, S, S]
    masks = part["collated_masks"].unflatten(0, (N_GLOBAL_CROPS, -1))  # [G, B, P]
    n_rows, size = min(n_pictures, crops.shape[1]), crops.shape[-1]
    local = part.get("collated_local_crops")
    n_local = 0 if local is None else len(local) // crops.shape[1]
    n_shown = min(n_local, MOST_LOCAL_CROPS)

    side = math.isqrt(masks.shape[2])  # patches along an edge
    tile = _tile_size(n_rows, n_shown, size, side)
    global_tiles = _resized(_as_pixels(crops[:, :n_rows]), tile)  # [G, R, tile, tile, 3]
    shown_masks = masks[:, :n_rows].cpu()  # [G, R, P]
    columns = [global_tiles]
    if local is not None and n_shown:
        chosen = local.unflatten(0, (n_local, -1))[:n_shown, :n_rows]  # [L shown, R, 3, s, s]
        columns.append(_paired(_resized(_as_pixels(chosen), (tile - GAP) // 2), tile))
    sheets = {"crops": _sheet([tiles for column in columns for tiles in column])}
    if bool(masks.any()):
        grids = shown_masks.unflatten(2, (side, side)).float()
        over = F.interpolate(grids, size=(tile, tile), mode="nearest").bool().numpy()  # [G, R, tile, tile]
        sheets["masks"] = _sheet(list(_with_masks(global_tiles, over)))
    return sheets, {
        "pictures": n_rows,
        "local_crops": n_shown,
        "local_crops_of_each": n_local,
        "global_crop_px": size,
        "local_crop_px": None if local is None else local.shape[-1],
        "shown_px": tile,
        "masked_share": shown_masks.float().mean(dim=2).T.tolist(),
    }


def _tile_size(n_rows: int, n_local: int, size: int, side: int) -> int:
    """Side of a global crop on the sheet: the crop's own between bounds, and whole pixels for each patch."""
    n_tiles = n_rows * (N_GLOBAL_CROPS + math.ceil(n_local / 2) / 2)
    wished = min(max(size, SMALLEST_TILE), LARGEST_TILE, math.isqrt(round(MOST_PIXELS / n_tiles)) - GAP)
    return max(wished // side, 1) * side


def _as_pixels(crops: Tensor) -> Tensor:
    """float [..., 3, S, S] in 0 to 255 on the CPU, of normalised crops."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = crops.detach().cpu().float() * std + mean
    return pixels.mul_(255).nan_to_num_(PAPER).clamp_(0, 255)


def _resized(pixels: Tensor, size: int) -> np.ndarray:
    """uint8 [..., size, size, 3] of [..., 3, S, S]; made larger, each pixel stays a square."""
    flat = pixels.flatten(0, 1)
    if size < flat.shape[-1]:
        scaled = F.interpolate(flat, size=(size, size), mode="bilinear", antialias=True)
    else:
        scaled = F.interpolate(flat, size=(size, size), mode="nearest")
    return scaled.round_().byte().permute(0, 2, 3, 1).unflatten(0, pixels.shape[:2]).numpy()


def _paired(tiles: np.ndarray, height: int) -> np.ndarray:
    """[ceil(L / 2), R, height, s, 3] of L local crops [L, R, s, s, 3]: two, one above the other."""
    n, n_rows, size = tiles.shape[:3]
    pairs = np.full((math.ceil(n / 2), n_rows, height, size, 3), PAPER, dtype=np.uint8)
    pairs[:, :, :size] = tiles[::2]
    pairs[: n // 2, :, -size:] = tiles[1::2]
    return pairs


def _with_masks(tiles: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """The tiles [G, R, h, w, 3] with MASK_COLOUR over them where `masks` [G, R, h, w]."""
    covered = (1 - MASK_OPACITY) * tiles + MASK_OPACITY * np.array(MASK_COLOUR)
    return np.where(masks[..., None], covered.round().astype(np.uint8), tiles)


def _sheet(columns: list[np.ndarray]) -> np.ndarray:
    """One picture [height, width, 3] of columns, each R tiles [R, h, its own w, 3]."""
    n_rows, height = columns[0].shape[:2]
    width = sum(column.shape[2] + GAP for column in columns) - GAP
    sheet = np.full((n_rows, height + GAP, width, 3), PAPER, dtype=np.uint8)
    left = 0
    for column in columns:
        sheet[:, :height, left : left + column.shape[2]] = column
        left += column.shape[2] + GAP
    return sheet.reshape(-1, width, 3)[:-GAP]

"""Cells in mask images: which pixels belong together, and the box around them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from dinov2.data.datasets.decode import UnreadableImageError, load_image
from dinov2.data.prepare.base import Box, Notes, image_size, images_in

MIN_SIDE_PX = 4  # smaller specks come from hand-drawn and lossy masks


def with_masks(
    images: Path, masks: Path, mask_name: Callable[[str], str], top: Path, notes: Notes
) -> Iterator[tuple[Path, Path]]:
    """Yield each image of a folder with the mask that `mask_name` gives for its stem; note masks without an image."""
    unused = set(images_in(masks))
    notes.annotations |= unused
    for image in images_in(images):
        mask = masks / mask_name(image.stem)
        unused.discard(mask)
        yield image, mask
    for mask in sorted(unused):
        notes.add("masks of images that are not there", mask.relative_to(top))


def boxes_of_mask(
    image: Path, mask: Path, notes: Notes, gap: int = 0, threshold: int = 127, single: bool = False
) -> Iterator[Box]:
    """Yield the boxes around a mask's cells; what is odd about mask and image is noted.

    Args:
        image: the image that the mask belongs to; only its size is read.
        mask: bright where a cell is. A missing, unreadable or empty one, or one of another size, has no boxes.
        notes: takes the oddities, and image and mask as known files.
        gap: pixels of background that two parts of one cell may lie apart, as the lobes of a nucleus do.
        threshold: grey value above which a pixel counts; between the two greys of a lossy mask.
        single: the whole mask is one cell, however many parts it has.
    """
    notes.annotations.add(image)
    if not mask.is_file():
        notes.add("masks that are missing", mask)
        return
    notes.annotations.add(mask)
    size = image_size(image, notes)
    try:
        grey = np.asarray(load_image(mask)).max(axis=2)
    except UnreadableImageError as error:
        notes.add("unreadable images and masks", f"{mask}: {error}")
        return
    if size is None:
        return
    is_cell = grey > (0 if grey.max() == 1 else threshold)  # some masks are zeros and ones
    if not is_cell.any():
        notes.add("masks without a cell", mask)
        return
    if is_cell.shape[::-1] != size:
        notes.add("masks of another size than their image", f"{mask}: {is_cell.shape[::-1]}, image {size}")
        return
    found = 0
    for box in components(is_cell, max(size) if single else gap):
        width, height = box.right - box.left, box.bottom - box.top
        if min(width, height) < MIN_SIDE_PX:
            notes.add(f"specks in masks, smaller than {MIN_SIDE_PX} px", mask)
            continue
        if (width, height) == size:
            notes.add("masks whose cell fills the whole image; is the mask what it should be?", mask)
        found += 1
        yield box
    if found > 1:
        notes.add("images with several cells", image)


def components(is_cell: np.ndarray, gap: int = 0) -> list[Box]:
    """Find boxes around the parts of a bool [H, W] mask, from top to bottom; parts also hang together diagonally.

    Parts with at most `gap` pixels (rounded up to an even number) of background between them are one.
    """
    reach = (gap + 1) // 2
    grown = cv2.dilate(np.pad(is_cell.astype(np.uint8), reach), np.ones((2 * reach + 1, 2 * reach + 1), np.uint8))
    _, part_of, stats, _ = cv2.connectedComponentsWithStats(grown, connectivity=8)
    parts, first_pixel = np.unique(part_of, return_index=True)
    ordered = [part for part in parts[np.argsort(first_pixel)] if part > 0]  # 0 is the background
    # growing moved every edge outwards by `reach`, and padding the image's corner as well
    return [
        Box(left, top, left + width - 2 * reach, top + height - 2 * reach)
        for left, top, width, height, _ in stats[ordered].tolist()
    ]

"""Cells in mask pictures: which pixels belong together, and the box around them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2.data.datasets.decode import UnreadableImageError, load_image
from dinov2.data.prepare.base import Box, Cell, Notes

MIN_SIDE_PX = 4  # smaller specks come from hand-drawn and lossy masks


def cells_of_mask(
    picture: Path,
    mask: Path,
    notes: Notes,
    label: str | None = None,
    part: str | None = None,
    gap: int = 0,
    threshold: int = 127,
) -> Iterator[Cell]:
    """The cells of a smear with a mask, see `boxes_of_mask`. Without a usable mask there are none."""
    notes.annotations.add(picture)
    yield from (Cell(picture, label, part=part, box=box) for box in boxes_of_mask(picture, mask, notes, gap, threshold))


def boxes_of_mask(
    picture: Path, mask: Path, notes: Notes, gap: int = 0, threshold: int = 127, single: bool = False
) -> Iterator[Box]:
    """The boxes around a mask's cells; what is odd about mask and picture is noted.

    Args:
        picture: the picture that the mask belongs to; only its size is read.
        mask: bright where a cell is. A missing, unreadable or empty one, or one of another size, has no boxes.
        notes: takes the oddities, and the mask as a known file.
        gap: pixels of background that two parts of one cell may lie apart, as the lobes of a nucleus do.
        threshold: grey value above which a pixel counts; between the two greys of a lossy mask.
        single: the whole mask is one cell, however many parts it has.
    """
    if not mask.is_file():
        notes.add("masks that are missing", mask)
        return
    notes.annotations.add(mask)
    try:
        grey = np.asarray(load_image(mask)).max(axis=2)
        with Image.open(picture) as image:
            size = image.size
    except (UnreadableImageError, OSError) as error:
        notes.add("unreadable pictures and masks", f"{mask}: {error}")
        return
    is_cell = grey > (0 if grey.max() == 1 else threshold)  # some masks are zeros and ones
    if not is_cell.any():
        notes.add("masks without a cell", mask)
        return
    if (is_cell.shape[1], is_cell.shape[0]) != size:
        notes.add("masks of another size than their picture", f"{mask}: {is_cell.shape[1::-1]}, picture {size}")
        return
    found = 0
    for box in [_around(*np.nonzero(is_cell))] if single else components(is_cell, gap):
        if min(box.right - box.left, box.bottom - box.top) < MIN_SIDE_PX:
            notes.add(f"specks in masks, smaller than {MIN_SIDE_PX} px", mask)
            continue
        if (box.right - box.left, box.bottom - box.top) == size:
            notes.add("masks whose cell fills the whole picture; is the mask what it should be?", mask)
        found += 1
        yield box
    if found > 1:
        notes.add("pictures with several cells", picture)


def components(is_cell: np.ndarray, gap: int = 0) -> list[Box]:
    """Boxes around the parts of a bool [H, W] mask, from top to bottom; parts also hang together diagonally.

    Parts with at most `gap` pixels (rounded up to an even number) of background between them are one.
    """
    reach = (gap + 1) // 2
    grown = _grown(_grown(is_cell, reach).T, reach).T  # [H + 2 reach, W + 2 reach]
    boxes: dict[int, list[int]] = {}  # left, top, right, bottom of a part, by the number of its first run
    part_of: list[int] = []  # a run's part, or a run that leads to it
    above: list[tuple[int, int, int]] = []
    for row, line in enumerate(grown):
        edges = np.flatnonzero(np.diff(np.pad(line.astype(np.int8), 1)))
        here = []
        for start, end in edges.reshape(-1, 2).tolist():
            run = len(part_of)
            part_of.append(run)
            boxes[run] = [start, row, end, row + 1]
            here.append((start, end, run))
            for other_start, other_end, other in above:
                if start <= other_end and other_start <= end:
                    _join(_root(part_of, run), _root(part_of, other), part_of, boxes)
        above = here
    # growing moved every edge outwards by `reach`, and the picture's corner as well
    return [Box(left, top, right - 2 * reach, bottom - 2 * reach) for left, top, right, bottom in boxes.values()]


def _grown(is_cell: np.ndarray, reach: int) -> np.ndarray:
    """[H + 2 reach, W]: which pixels have one of the mask within `reach` above or below."""
    if not reach:
        return is_cell
    total = np.cumsum(np.pad(is_cell, [(2 * reach + 1, 2 * reach), (0, 0)]), axis=0)
    window = 2 * reach + 1
    return total[window:] > total[:-window]


def _root(part_of: list[int], run: int) -> int:
    while part_of[run] != run:
        run = part_of[run]
    return run


def _join(one: int, other: int, part_of: list[int], boxes: dict[int, list[int]]) -> None:
    first, second = sorted((one, other))
    if first != second:
        part_of[second] = first
        box, more = boxes[first], boxes.pop(second)
        boxes[first] = [min(box[0], more[0]), min(box[1], more[1]), max(box[2], more[2]), max(box[3], more[3])]


def _around(rows: np.ndarray, columns: np.ndarray) -> Box:
    return Box(int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)

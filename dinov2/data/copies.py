"""Drop training images that are byte for byte copies of test images.

Letters: N images
"""

import logging
import os
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from dinov2.data.splits import Fold
from dinov2.utils.files import file_sha256

logger = logging.getLogger("dinov2")


def without_copies(paths: Sequence[str], folds: Sequence[Fold]) -> tuple[list[Fold], dict[str, int]]:
    """Drop the training images of each fold that have the bytes of one of its test images.

    Args:
        paths: N image files.
        folds: training and test positions each.

    Returns:
        the folds, and two counts: `dropped_identical_bytes` (images dropped from at least one fold) and `not_checked`
        (images that are not on this disk).

    Raises:
        ValueError: if an image file is on both sides of a fold, or none is left to train on.
    """
    files = [os.path.realpath(path) for path in paths]
    for train, test in folds:
        shared = {files[i] for i in train} & {files[i] for i in test}
        if shared:
            raise ValueError(
                f"train and test share {len(shared)} image files, for instance {', '.join(sorted(shared)[:3])}; "
                f"remove them from one of the two (an image listed twice can also fall on both sides of a split)"
            )
    contents, n_unchecked = _content_numbers(paths, folds)
    dropped: set[int] = set()
    kept_folds = []
    for train, test in folds:
        is_copy = np.isin(contents[train], contents[test])
        dropped |= set(train[is_copy].tolist())
        if is_copy.all():
            raise ValueError("train: every image is a copy of a test image; give a test set of other cells")
        kept_folds.append((train[~is_copy], test))
    if dropped:
        logger.warning("%d training images are byte-equal to test images and dropped from training", len(dropped))
    if n_unchecked:
        logger.warning("%d images are not on this disk: whether train and test share copies is unknown", n_unchecked)
    return kept_folds, {"dropped_identical_bytes": len(dropped), "not_checked": n_unchecked}


def _content_numbers(paths: Sequence[str], folds: Sequence[Fold]) -> tuple[np.ndarray, int]:
    """Return int64 [N], equal for images with equal bytes, and the number of images that are not on this disk.

    Only files that can matter are read: those with the size of a file on the other side of a fold.
    """
    sides = np.zeros((2, len(folds), len(paths)), dtype=bool)
    for number, fold in enumerate(folds):
        for side, positions in enumerate(fold):
            sides[side, number, positions] = True
    by_size: dict[int, list[int]] = defaultdict(list)
    n_unchecked = 0
    for i, path in enumerate(paths):
        try:
            by_size[os.path.getsize(path)].append(i)
        except OSError:
            n_unchecked += 1
    contents = np.arange(len(paths))
    for same_size in by_size.values():
        if sides[:, :, same_size].any(axis=2).all(axis=0).any():
            first: dict[str, int] = {}
            for i in same_size:
                contents[i] = first.setdefault(file_sha256(paths[i]), i)
    return contents, n_unchecked

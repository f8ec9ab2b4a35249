"""Labelled cells as TensorBoard's projector shows them: features of an evaluation, classes and small pictures.

Letters: N cells, D embedding dim
"""

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2.eval.thumbnails import make_thumbnails
from dinov2.logging.projector import EmbeddedCells
from dinov2.train.labelled_sets import LabelledSet

logger = logging.getLogger("dinov2")

MOST_CELLS = 2000  # of a set; the projector grows slow beyond some thousands, and its files large
THUMBNAIL_SIZE = 40  # px
N_WORKERS = 4  # threads that decode


class ShownCells:
    """Which cells of each set are shown, always the same; their small pictures are made at the first evaluation."""

    def __init__(self) -> None:
        self._pictures: dict[Path, np.ndarray] = {}

    def of_sets(self, sets: Sequence[LabelledSet], embedded: Mapping[Path, np.ndarray]) -> list[EmbeddedCells]:
        """Up to MOST_CELLS cells of each set, evenly from its list: class by class as a rule, so of every class.

        Args:
            sets: as they are judged.
            embedded: features [D] by picture; cells without any are left out.
        """
        return [self._of_set(labelled, embedded) for labelled in sets]

    def _of_set(self, labelled: LabelledSet, embedded: Mapping[Path, np.ndarray]) -> EmbeddedCells:
        found = [
            (path, cells.class_names[label], side, cells.patients[i] if cells.patients is not None else "")
            for side, cells in (("learned from", labelled.train), ("judged", labelled.test))
            for i, (path, label) in enumerate(zip(cells.paths, cells.labels, strict=True))
            if path in embedded
        ]
        chosen = np.linspace(0, len(found) - 1, min(len(found), MOST_CELLS)).round().astype(int)
        rows = [found[i] for i in chosen]
        described: dict[str, Sequence[str]] = {
            "class": [row[1] for row in rows],
            "side": [row[2] for row in rows],
            "picture": [str(row[0]) for row in rows],
        }
        if any(row[3] for row in rows):
            described["patient"] = [row[3] for row in rows]
        paths = [row[0] for row in rows]
        features = np.stack([embedded[path] for path in paths])
        return EmbeddedCells(labelled.name, features, described, self._pictures_of(paths))

    def _pictures_of(self, paths: Sequence[Path]) -> np.ndarray:
        """uint8 [N, S, S, 3]."""
        new = [path for path in dict.fromkeys(paths) if path not in self._pictures]
        if new:
            sheets = [
                np.asarray(Image.open(io.BytesIO(sheet)))
                for sheet in make_thumbnails(new, THUMBNAIL_SIZE, N_WORKERS).sheets
            ]
            size = THUMBNAIL_SIZE
            single = [
                sheet.reshape(-1, size, sheet.shape[1] // size, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
                for sheet in sheets
            ]
            self._pictures.update(zip(new, np.concatenate(single), strict=False))  # the last sheet may have empty ends
        return np.stack([self._pictures[path] for path in paths])

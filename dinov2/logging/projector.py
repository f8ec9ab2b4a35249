"""Cells for TensorBoard's projector: features, columns that describe them, and small images.

Letters: N cells, D embedding dim, S side of a small image in pixels
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class EmbeddedCells:
    """N cells of a data set and what is known of them.

    Attributes:
        name: of the data set.
        features: float32 [N, D].
        columns: {heading: N texts}; at least two headings.
        images: uint8 [N, 3, S, S].
    """

    name: str
    features: np.ndarray
    columns: dict[str, Sequence[str]]
    images: np.ndarray


def write_projector(writer: Any, sets: Sequence[EmbeddedCells], iteration: int) -> None:
    """Add the sets to those that TensorBoard's projector offers, under their names and the iteration.

    Args:
        writer: a SummaryWriter of torch.utils.tensorboard.
    """
    for cells in sets:
        columns = [[re.sub(r"\s+", " ", text).strip() or "-" for text in column] for column in cells.columns.values()]
        writer.add_embedding(
            cells.features,
            metadata=[*zip(*columns, strict=True)],
            metadata_header=list(cells.columns),
            label_img=torch.from_numpy(cells.images) / 255,
            global_step=iteration,
            tag=re.sub(r"[^\w.-]+", "_", cells.name),  # it becomes a folder
        )

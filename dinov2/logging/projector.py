"""Features of cells as files that TensorBoard's projector shows: points, what they are, and small pictures of them.

<folder>/projector_config.pbtxt      which sets there are
         projector/<i>/tensors.tsv   N lines of D numbers
                       metadata.tsv  a heading, then N lines
                       sprite.png    N pictures, row by row

The files of an evaluation replace those of the one before. Letters: N cells, D embedding dim, S side of a small picture
in pixels
"""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2.utils.files import atomic_write

logger = logging.getLogger("dinov2")

CONFIG_NAME, FOLDER_NAME = "projector_config.pbtxt", "projector"


@dataclass(frozen=True, eq=False)
class EmbeddedCells:
    """N cells of a data set and what is known of them.

    Attributes:
        name: of the data set.
        features: float32 [N, D].
        described: {heading: N texts}; one heading at least.
        pictures: uint8 [N, S, S, 3].
    """

    name: str
    features: np.ndarray
    described: dict[str, Sequence[str]]
    pictures: np.ndarray


def write_projector(folder: Path, sets: Sequence[EmbeddedCells], iteration: int) -> None:
    """Put the sets in place of those that the projector showed so far.

    Args:
        folder: where TensorBoard's event files lie.
        sets: what is to be shown; several are chosen from by name.
        iteration: after which the features were computed; it is shown with the names.
    """
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig  # type: ignore[import-untyped]

    config = ProjectorConfig()
    for number, cells in enumerate(sets):
        target = folder / FOLDER_NAME / str(number)
        with atomic_write(target / "tensors.tsv", "w") as file:
            np.savetxt(file, cells.features, fmt="%.4g", delimiter="\t")
        with atomic_write(target / "metadata.tsv", "w") as file:
            file.writelines(f"{line}\n" for line in _table(cells.described))
        sprite = _sprite(cells.pictures)
        with atomic_write(target / "sprite.png") as file:
            Image.fromarray(sprite).save(file, "PNG")
        paths = {part: f"{FOLDER_NAME}/{number}/{part}" for part in ("tensors.tsv", "metadata.tsv", "sprite.png")}
        shown = config.embeddings.add(
            tensor_name=f"{cells.name} after {iteration}",
            tensor_shape=cells.features.shape,
            tensor_path=paths["tensors.tsv"],
            metadata_path=paths["metadata.tsv"],
        )
        shown.sprite.image_path = paths["sprite.png"]
        shown.sprite.single_image_dim.extend([cells.pictures.shape[2], cells.pictures.shape[1]])
    with atomic_write(folder / CONFIG_NAME, "w") as file:
        file.write(str(config))


def _table(described: dict[str, Sequence[str]]) -> list[str]:
    """Lines of the metadata; one column alone has no heading, as the projector wants it."""
    rows = [*zip(*described.values(), strict=True)]
    if len(described) > 1:
        rows.insert(0, tuple(described))
    return ["\t".join(re.sub(r"\s+", " ", value).strip() or "-" for value in row) for row in rows]


def _sprite(pictures: np.ndarray) -> np.ndarray:
    """uint8 [n*S, n*S, 3], n the smallest with n*n >= N; places without a picture are black."""
    n_cells, size = pictures.shape[:2]
    n = math.ceil(math.sqrt(n_cells))
    square = np.zeros((n * n, size, size, 3), dtype=np.uint8)
    square[:n_cells] = pictures
    return square.reshape(n, n, size, size, 3).swapaxes(1, 2).reshape(n * size, n * size, 3)

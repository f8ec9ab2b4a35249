"""Trees of files after the layouts of public sets, and a short call of the preparer."""

import numpy as np
import pytest
from PIL import Image

from dinov2.data.prepare import get_dataset
from dinov2.data.prepare.write import Options, prepare


@pytest.fixture
def tree(tmp_path):
    """Writes files below `tmp_path/source`: a random image, a mask with these boxes, or text."""
    rng = np.random.default_rng(0)

    def make(
        path: str,
        boxes: list[tuple[int, int, int, int]] | None = None,
        text: str | bytes | None = None,
        mode: str = "RGB",
        size: tuple[int, int] = (80, 60),
        numbers: list[int] | None = None,
    ):
        file = tmp_path / "source" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        width, height = size
        if text is not None:
            file.write_bytes(text if isinstance(text, bytes) else text.encode())
        elif boxes is not None:
            mask = np.zeros((height, width), np.uint16 if max(numbers or [0]) > 255 else np.uint8)
            for (left, top, right, bottom), number in zip(boxes, numbers or [255] * len(boxes), strict=True):
                mask[top:bottom, left:right] = number
            Image.fromarray(mask).save(file, quality=80)
        else:
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode).save(file)
        return file

    return make


@pytest.fixture
def run(tmp_path):
    def prepared(name: str, **options) -> dict:
        return prepare(get_dataset(name), tmp_path / "source", tmp_path / "out", Options(n_workers=1, **options))

    return prepared

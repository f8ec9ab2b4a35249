import io

import numpy as np
from PIL import Image

from dinov2.data.datasets.decode import load_image, resize_image
from dinov2.eval.thumbnails import EMPTY, N_COLUMNS, PER_SHEET, make_thumbnails


def place(sheets: list[bytes], i: int, size: int) -> np.ndarray:
    sheet = np.asarray(Image.open(io.BytesIO(sheets[i // PER_SHEET])), dtype=float)
    row, column = divmod(i % PER_SHEET, N_COLUMNS)
    return sheet[row * size : (row + 1) * size, column * size : (column + 1) * size]


def test_each_picture_is_at_its_place_and_missing_ones_are_grey_with_a_reason(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for i in range(7):
        colours = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((64, 48), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
        paths.append(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    listed = [paths[i % 7] for i in range(PER_SHEET + 20)]
    listed[3], listed[PER_SHEET + 1] = tmp_path / "gone.png", tmp_path / "broken.png"
    found = make_thumbnails(listed, 24, n_workers=2)
    assert len(found.sheets) == 2
    assert Image.open(io.BytesIO(found.sheets[1])).size == (24 * N_COLUMNS, 24 * 2)
    assert found.missing == {3: "No such file or directory", PER_SHEET + 1: "not a known image format"}
    for i, path in enumerate(listed):
        seen = place(found.sheets, i, 24)
        if i in found.missing:
            assert np.abs(seen - EMPTY).mean() < 12
        else:
            expected = resize_image(load_image(path), 24).permute(1, 2, 0).numpy()
            assert np.abs(seen - expected).mean() < 8  # JPEG
    assert make_thumbnails(listed, 24, n_workers=1) == found

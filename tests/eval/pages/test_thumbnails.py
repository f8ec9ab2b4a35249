import base64
import io

import numpy as np
from PIL import Image

from dinov2.data.datasets.decode import load_image, resize_image
from dinov2.eval.pages.thumbnails import PLACEHOLDER, make_thumbnails


def test_thumbnails_are_the_scaled_images_and_missing_ones_have_a_reason(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for i in range(7):
        colours = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((64, 48), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
        paths.append(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    paths[3:3] = [tmp_path / "gone.png", tmp_path / "broken.png"]
    thumbnails = make_thumbnails(paths, 24, n_workers=2)
    assert thumbnails.missing == {3: "No such file or directory", 4: "not a known image format"}
    for i, (path, uri) in enumerate(zip(paths, thumbnails.uris, strict=True)):
        if i in thumbnails.missing:
            assert uri == PLACEHOLDER
            continue
        kind, _, content = uri.partition(",")
        assert kind == "data:image/webp;base64"
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"), dtype=float)
        expected = resize_image(load_image(path), 24).permute(1, 2, 0).numpy()
        assert np.abs(pixels - expected).mean() < 10  # lossy
    assert make_thumbnails(paths, 24) == thumbnails

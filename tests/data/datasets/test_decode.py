"""What each kind of image file becomes, and that no damaged file gets past UnreadableImageError."""

import errno
import io
import os
import pickle
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from dinov2.data.datasets import decode
from dinov2.data.datasets.decode import UnreadableImageError, decode_image, find_images, load_image, resize_image


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / 7 + c) * np.cos(y / 9 - c) for c in range(3)]
    return Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))


def saved(image: Image.Image, path, **settings):
    image.save(path, **settings)
    return path


def as_array(path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_rgb_comes_as_stored(tmp_path, pixels, suffix):
    settings = {"lossless": True} if suffix == "webp" else {}
    path = saved(Image.fromarray(pixels), tmp_path / f"cell.{suffix}", **settings)
    np.testing.assert_array_equal(as_array(path), pixels)


def test_a_str_path_and_a_jpeg(tmp_path):
    image = smooth(64, 60)
    path = saved(image, tmp_path / "cell.jpg", quality=95)
    assert np.abs(as_array(str(path)).astype(int) - np.asarray(image)).mean() < 3


def test_an_opaque_alpha_channel_is_dropped(tmp_path, pixels):
    alpha = np.full((40, 52, 1), 255, dtype=np.uint8)
    path = saved(Image.fromarray(np.concatenate([pixels, alpha], axis=2)), tmp_path / "cell.png")
    np.testing.assert_array_equal(as_array(path), pixels)


def test_transparent_pixels_lie_over_white(tmp_path, pixels):
    alpha = np.full((40, 52, 1), 255, dtype=np.uint8)
    alpha[:10], alpha[10:20] = 0, 51
    out = as_array(saved(Image.fromarray(np.concatenate([pixels, alpha], axis=2)), tmp_path / "cell.png"))
    assert (out[:10] == 255).all()
    np.testing.assert_allclose(out[10:20], 0.2 * pixels[10:20] + 0.8 * 255, atol=1.01)
    np.testing.assert_array_equal(out[20:], pixels[20:])


def test_grey_with_and_without_alpha(tmp_path, pixels):
    grey = pixels[..., 0]
    alpha = np.full_like(grey, 255)
    alpha[:10] = 0
    np.testing.assert_array_equal(
        as_array(saved(Image.fromarray(grey), tmp_path / "l.png")), grey[..., None].repeat(3, 2)
    )
    la = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    out = as_array(saved(la, tmp_path / "la.png"))
    assert (out[:10] == 255).all()
    np.testing.assert_array_equal(out[10:], grey[10:, :, None].repeat(3, 2))


def test_palettes_with_and_without_transparency(tmp_path):
    image = Image.fromarray(np.arange(40, dtype=np.uint8).repeat(10).reshape(20, 20) % 3, mode=None).convert("P")
    image.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    colours = np.array([[200, 10, 10], [10, 200, 10], [10, 10, 200]])
    expected = colours[np.asarray(image)]
    np.testing.assert_array_equal(as_array(saved(image, tmp_path / "plain.png")), expected)
    expected[np.asarray(image) == 1] = 255
    np.testing.assert_array_equal(as_array(saved(image, tmp_path / "hole.png", transparency=1)), expected)
    table = bytes([255, 0, 255])  # an alpha for each colour, the other way PNG stores it
    np.testing.assert_array_equal(as_array(saved(image, tmp_path / "table.png", transparency=table)), expected)


def test_one_colour_of_an_rgb_png_may_be_transparent(tmp_path, pixels):
    pixels[:5] = (1, 2, 3)
    out = as_array(saved(Image.fromarray(pixels), tmp_path / "cell.png", transparency=(1, 2, 3)))
    assert (out[:5] == 255).all()
    np.testing.assert_array_equal(out[5:], pixels[5:])


def test_cmyk(tmp_path):
    red = Image.new("CMYK", (20, 20), (0, 255, 255, 0))
    assert (as_array(saved(red, tmp_path / "red.tif")) == (255, 0, 0)).all()
    assert np.abs(as_array(saved(red, tmp_path / "red.jpg", quality=95)).astype(int) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_and_rounded(tmp_path, suffix):
    grey = np.array([[0, 128, 129, 257, 40000, 65535]], dtype=np.uint16)
    out = as_array(saved(Image.fromarray(grey), tmp_path / f"cell.{suffix}"))
    np.testing.assert_array_equal(out[0, :, 0], [0, 0, 1, 1, 156, 255])
    assert (out == out[..., :1]).all()


def test_mode_i_counts_as_16_bit_and_no_further(tmp_path):
    within = Image.fromarray(np.array([[0, 40000, 65535]], dtype=np.int32))
    np.testing.assert_array_equal(as_array(saved(within, tmp_path / "within.tif"))[0, :, 0], [0, 156, 255])
    for name, value in [("above", 65536), ("below", -1)]:
        path = saved(Image.fromarray(np.array([[0, value]], dtype=np.int32)), tmp_path / f"{name}.tif")
        with pytest.raises(UnreadableImageError, match="beyond 16 bits"):
            load_image(path)


def test_floats_have_no_brightness(tmp_path):
    path = saved(Image.fromarray(np.ones((4, 4), dtype=np.float32)), tmp_path / "cell.tif")
    with pytest.raises(UnreadableImageError, match="floats"):
        load_image(path)


def test_one_bit(tmp_path):
    bits = np.eye(16, dtype=bool)
    np.testing.assert_array_equal(as_array(saved(Image.fromarray(bits), tmp_path / "cell.png"))[..., 1], bits * 255)


def test_the_first_of_several_frames(tmp_path, pixels):
    first, second = Image.fromarray(pixels), Image.fromarray(255 - pixels)
    path = saved(first, tmp_path / "stack.tif", save_all=True, append_images=[second])
    np.testing.assert_array_equal(as_array(path), pixels)


def test_missing_empty_and_foreign_files(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "huge.png").touch()
    os.truncate(tmp_path / "huge.png", 2**33)  # sparse: it takes no room
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    cases = [
        ("gone.png", "No such file"),
        ("empty.png", "is empty"),
        ("huge.png", "its 8,589,934,592 bytes are more"),
        ("text.jpg", "not a known image format"),
        (".", "is a folder, not a file"),
        ("pipe.png", "is a named pipe, not a file"),
        ("nul\0.png", "null"),
    ]
    for name, reason in cases:
        path = f"{tmp_path}/{name}"
        with pytest.raises(UnreadableImageError, match=reason) as caught:
            load_image(path)
        assert caught.value.path == path
        assert path.split("\0")[0] in str(caught.value)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "bmp", "webp"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File")
def test_truncated_at_any_place(tmp_path, pixels, suffix):
    whole = saved(Image.fromarray(pixels), tmp_path / f"whole.{suffix}").read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    # the last 20 bytes of a PNG are two checksums and the end mark: without them the pixels are still complete
    for n in {*range(0, 60), *range(60, len(whole) - 24, 97), len(whole) - 24}:
        cut.write_bytes(whole[:n])
        with pytest.raises(UnreadableImageError):
            load_image(cut)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGB", "jpg"), ("P", "png"), ("RGB", "png"), ("LAB", "tif"), ("1", "tif"), ("RGB", "bmp")]
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_never_raise_anything_else(tmp_path, pixels, mode, suffix, capfd):
    source = Image.fromarray(pixels)
    source = source.quantize(16) if mode == "P" else source.convert("RGB").convert(mode)
    whole = saved(source, tmp_path / f"whole.{suffix}").read_bytes()
    rng = np.random.default_rng(1)
    reasons = []
    damaged = tmp_path / f"damaged.{suffix}"
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, min(len(data), 250), size=3):
            data[place] = rng.integers(256)
        damaged.write_bytes(data)
        try:
            assert load_image(damaged).mode == "RGB"
        except UnreadableImageError as error:
            reasons.append(error.reason)
    assert len(reasons) > 10
    assert all(reasons)
    capfd.readouterr()  # libtiff writes its own complaints to stderr


def by_pillow(data: bytes) -> np.ndarray | None:
    """What Pillow alone makes of a file, None if it finds fault with it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return np.asarray(decode.to_rgb(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def ours(data: bytes) -> np.ndarray | None:
    try:
        return decode_image(data)
    except UnreadableImageError:
        return None


def encoded(image: Image.Image, file_format: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **settings)
    return file.getvalue()


TURNED = Image.Exif()
TURNED[0x0112] = 6

# mode, format, settings of Pillow's save
FILES = {
    "jpeg": ("RGB", "JPEG", {}),
    "jpeg 4:4:4": ("RGB", "JPEG", {"subsampling": 0, "quality": 95}),
    "jpeg 4:2:2": ("RGB", "JPEG", {"subsampling": 1}),
    "jpeg progressive": ("RGB", "JPEG", {"progressive": True}),
    "jpeg with restarts": ("RGB", "JPEG", {"restart_marker_rows": 1}),
    "jpeg in rgb": ("RGB", "JPEG", {"keep_rgb": True}),
    "jpeg turned": ("RGB", "JPEG", {"exif": TURNED}),
    "jpeg grey": ("L", "JPEG", {}),
    "jpeg cmyk": ("CMYK", "JPEG", {}),
    "png": ("RGB", "PNG", {}),
    "png rgba": ("RGBA", "PNG", {}),
    "png grey": ("L", "PNG", {}),
    "png palette": ("P", "PNG", {}),
    "bmp": ("RGB", "BMP", {}),
    "bmp palette": ("P", "BMP", {}),
    "bmp 32": ("RGBA", "BMP", {}),
    "tiff": ("RGB", "TIFF", {}),
    "tiff in strips": ("RGB", "TIFF", {"tiffinfo": {278: 7}}),
    "tiff turned": ("RGB", "TIFF", {"tiffinfo": {274: 6}}),
    "tiff opaque": ("RGBA", "TIFF", {}),
    "tiff grey": ("L", "TIFF", {}),
    "tiff lzw": ("RGB", "TIFF", {"compression": "tiff_lzw"}),
    "tiff deflate": ("RGB", "TIFF", {"compression": "tiff_adobe_deflate"}),
    "webp": ("RGB", "WEBP", {}),
    "gif": ("P", "GIF", {}),
}


def file_of(name: str) -> bytes:
    mode, file_format, settings = FILES[name]
    image = np.asarray(smooth(41, 37)).astype(int) + np.random.default_rng(2).integers(-20, 21, (41, 37, 3))
    return encoded(Image.fromarray(image.clip(0, 255).astype(np.uint8)).convert(mode), file_format, **settings)


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_pillows_from_a_path_and_from_bytes(tmp_path, name):
    data = file_of(name)
    found = decode_image(data)
    assert (found.dtype, found.ndim) == (np.uint8, 3)
    np.testing.assert_array_equal(found, by_pillow(data))
    path = tmp_path / "Zellen, größere 細胞.jpg"
    path.write_bytes(data)
    np.testing.assert_array_equal(decode_image(path), found)
    np.testing.assert_array_equal(np.asarray(load_image(str(path))), found)


@pytest.mark.parametrize(
    "name", ["jpeg", "jpeg progressive", "jpeg grey", "png", "png rgba", "bmp", "tiff", "tiff opaque"]
)
@pytest.mark.filterwarnings("ignore")
def test_a_file_cut_short_anywhere_is_what_it_is_to_pillow(name, capfd):
    data = file_of(name)
    n_good = 0
    for n in {*range(0, len(data), 7), *range(len(data) - 60, len(data))}:
        expected, found = by_pillow(data[:n]), ours(data[:n])
        assert (found is None) == (expected is None), n
        if expected is not None:
            np.testing.assert_array_equal(found, expected)
            n_good += 1
    assert n_good <= 30  # PNGs without their last checksums


@pytest.mark.parametrize("name", ["jpeg", "jpeg progressive", "bmp", "tiff", "tiff opaque"])
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_what_it_is_to_pillow(name, capfd):
    data = file_of(name)
    rng = np.random.default_rng(3)
    header = 600 if name.startswith("jpeg") else 150
    verdicts = set()
    for trial in range(150):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data) if trial % 2 else header, size=rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        expected, found = by_pillow(bytes(damaged)), ours(bytes(damaged))
        assert (found is None) == (expected is None), trial
        if expected is not None:
            np.testing.assert_array_equal(found, expected)
        verdicts.add(found is None)
    assert verdicts == {False, True}


def test_a_tiff_whose_alpha_is_in_use_lies_over_white(pixels):
    alpha = np.full((40, 52, 1), 255, dtype=np.uint8)
    alpha[:10] = 0
    found = decode_image(encoded(Image.fromarray(np.concatenate([pixels, alpha], axis=2)), "TIFF"))
    assert (found[:10] == 255).all()
    np.testing.assert_array_equal(found[10:], pixels[10:])


def test_a_damaged_marker_behind_the_pixels_of_a_jpeg(capfd):
    data = file_of("jpeg grey")
    damaged = data[:-2] + b"\xff\xc0\x00\x03\x08" + data[-2:]  # a second header of a frame
    assert by_pillow(damaged) is None
    assert ours(damaged) is None


def test_the_name_in_errors_and_without_one_the_path(tmp_path):
    with pytest.raises(UnreadableImageError, match=r"shard\.tar::7\.jpg.*the file is empty"):
        decode_image(b"", "shard.tar::7.jpg")
    path = tmp_path / "größer.png"
    path.write_bytes(b"text")
    for name in ("", "cell 7"):
        with pytest.raises(UnreadableImageError) as caught:
            decode_image(path, name)
        assert caught.value.path == (name or str(path))


def test_a_decompression_bomb(tmp_path, pixels, monkeypatch):
    path = saved(Image.fromarray(pixels), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImageError, match="exceeds limit"):
        load_image(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_size_that_the_bytes_cannot_hold_takes_no_memory(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG")
    header = struct.pack(">II", 13_000, 13_000) + buffer.getvalue()[24:29]
    data = buffer.getvalue()[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + buffer.getvalue()[33:]
    tracemalloc.start()
    with pytest.raises(UnreadableImageError, match=r"its \d+ bytes cannot hold 13000 x 13000 pixels"):
        decode_image(data)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    blank = Image.new("L", (4000, 4000))  # compresses well, and is an image all the same
    assert load_image(saved(blank, tmp_path / "blank.png")).size == (4000, 4000)


@pytest.mark.parametrize("suffix", ["jp2", "ppm", "jfif", "avif", "gif", "tga", "jpe", "J2K", "dib"])
def test_images_of_rarer_suffixes_are_listed_and_read(tmp_path, pixels, suffix):
    saved(Image.fromarray(pixels), tmp_path / f"1.{suffix}")
    (path,) = find_images(tmp_path)
    difference = np.abs(np.asarray(load_image(path)).astype(int) - pixels).mean()
    assert difference < 60  # of noise, which JPEG and AVIF blur


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("suffix", ["avif", "jp2", "gif", "ppm", "tga", "jfif", "qoi", "pcx"])
def test_damage_in_rarer_formats_is_an_unreadable_image(tmp_path, pixels, suffix, capfd):
    data = saved(Image.fromarray(pixels), tmp_path / f"1.{suffix}").read_bytes()
    rng = np.random.default_rng(len(data))
    n_unreadable = 0
    for _ in range(60):
        damaged = bytearray(data[: rng.integers(1, len(data) + 1)])
        for place in rng.integers(0, min(len(damaged), 200), 3):
            damaged[place] = rng.integers(256)
        try:
            assert decode_image(bytes(damaged), "1").dtype == np.uint8
        except UnreadableImageError:
            n_unreadable += 1
    assert n_unreadable


def test_programs_are_not_started_for_an_image():
    with pytest.raises(UnreadableImageError, match="not a known image format"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")


def test_linked_folders_are_read_once_and_other_files_are_counted(tmp_path, caplog):
    root, other = tmp_path / "cells", tmp_path / "other"
    for name in ("cells/a/1.png", "cells/a/b/2.png", "other/3.png", "cells/a/x.svs", "cells/y.SVS", "cells/notes"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (root / "a" / "deep").symlink_to(other)
    (root / "a" / "loop").symlink_to(root)
    (root / "z").symlink_to(root / "a")
    with caplog.at_level("INFO", "dinov2"):
        images = find_images(root)
    assert images == [root / name for name in ("a/1.png", "a/b/2.png", "a/deep/3.png")]
    assert f"{root / 'z'} leads to a folder that was read already" in caplog.text
    assert "passed over: 2 .svs, 1 without a suffix" in caplog.text


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "secret").mkdir()
    scandir = os.scandir

    def refuse(path):
        if "secret" in os.fspath(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root, who runs tests in containers, may read all
    with pytest.raises(PermissionError, match="secret"):
        find_images(tmp_path)


def test_the_error_survives_a_trip_between_processes():
    error = pickle.loads(pickle.dumps(UnreadableImageError("/a/b.png", "the file is empty")))
    assert (error.path, error.reason) == ("/a/b.png", "the file is empty")
    assert str(error) == "cannot read the image '/a/b.png': the file is empty"


@pytest.mark.parametrize(("height", "width"), [(363, 360), (120, 104), (97, 300), (28, 29), (31, 30), (224, 448)])
def test_crop_is_torchvisions_resize_and_centre_crop(height, width):
    image = smooth(height, width)
    ours = resize_image(image, 224)
    theirs = TF.center_crop(TF.resize(image, [224], InterpolationMode.LANCZOS), [224, 224])
    assert ours.shape == (3, 224, 224)
    assert ours.dtype == torch.uint8
    assert ours.permute(1, 2, 0).is_contiguous()
    difference = (ours.int() - TF.pil_to_tensor(theirs).int()).abs()
    assert difference.max() <= 1


def test_squash_is_upstreams_resize(pixels):
    image = Image.fromarray(pixels)
    expected = np.asarray(image.resize((28, 28), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    np.testing.assert_array_equal(resize_image(image, 28, "squash").numpy(), expected)


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_arrays_and_images_give_the_same_in_rows_of_pixels(pixels, fit):
    found = resize_image(pixels, 28, fit)
    assert (found.shape, found.dtype) == ((3, 28, 28), torch.uint8)
    assert found.permute(1, 2, 0).is_contiguous()
    assert torch.equal(found, resize_image(Image.fromarray(pixels), 28, fit))


def test_the_result_is_no_view_of_the_image(pixels):
    square = pixels[:, :40].copy()
    resize_image(square, 40).zero_()
    np.testing.assert_array_equal(square, pixels[:, :40])


@pytest.mark.parametrize("array", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_arrays_of_another_kind_are_refused(array):
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\] is needed, not"):
        resize_image(array, 28)


def test_pad_keeps_all_and_repeats_the_border(pixels):
    for image in (Image.fromarray(pixels), Image.fromarray(pixels.transpose(1, 0, 2))):
        out = resize_image(image, 52, "pad")
        out = out if image.width > image.height else out.transpose(1, 2)
        np.testing.assert_array_equal(out[:, 6:46].numpy(), pixels.transpose(2, 0, 1))
        assert (out[:, :6] == out[:, 6:7]).all()
        assert (out[:, 46:] == out[:, 45:46]).all()


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_extreme_shapes(fit):
    for size in [(1, 1), (1, 20000), (20000, 1), (3, 2)]:
        out = resize_image(Image.new("RGB", size, (9, 8, 7)), 28, fit)
        assert out.flatten(1).unique(dim=1).tolist() == [[9], [8], [7]]


def test_the_right_size_is_left_alone(pixels):
    square = Image.fromarray(pixels[:, :40])
    for fit in ("crop", "pad", "squash"):
        np.testing.assert_array_equal(resize_image(square, 40, fit).numpy(), pixels[:, :40].transpose(2, 0, 1))


def test_an_unknown_fit_names_the_known_ones(pixels):
    with pytest.raises(ValueError, match="fit: 'stretch'.*crop, pad, squash"):
        resize_image(Image.fromarray(pixels), 28, "stretch")


def test_real_rgba_pngs_and_bmps(shared_data):
    pngs = sorted((shared_data / "blood-cell-detection-dataset" / "images").glob("*.png"))
    bmps = sorted((shared_data / "segmentation_WBC" / "Dataset 1").glob("*.bmp"))
    assert (len(pngs), len(bmps)) == (24, 164)
    for path in [*pngs[:3], *bmps[:10]]:
        assert resize_image(load_image(path), 56).float().std() > 5
    with Image.open(pngs[0]) as stored:
        assert stored.mode == "RGBA"
        np.testing.assert_array_equal(as_array(pngs[0]), np.asarray(stored)[..., :3])


def test_real_files_are_what_they_are_to_pillow(shared_data):
    files = [path for suffix in ("jpg", "bmp", "png") for path in sorted(shared_data.rglob(f"*.{suffix}"))[::20]]
    assert len(files) > 100
    for path in files:
        data = path.read_bytes()
        np.testing.assert_array_equal(decode_image(data), by_pillow(data), err_msg=path.name)

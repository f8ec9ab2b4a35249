"""Faster ways to the pixels that Pillow gives: OpenCV's JPEG decoder, and a look at the bytes of uncompressed files.

Pillow has read the header before and so decided whether it is sound. Where anything about a file is unusual, or its
data is damaged, the answer is None: Pillow then decodes it, so that the verdict is its own too.
"""

import io
import re
from functools import cache

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageFile

# In a JPEG's compressed data: any marker but those that only say where decoding can start again
JPEG_MARKER = re.compile(rb"\xff+[\x01-\xcf\xd8-\xfe]")
JPEG_END = b"\xff\xd9"

# Pillow's names of pixel layouts without compression: bytes of a pixel and how OpenCV brings them to RGB.
RAW_LAYOUTS: dict[str, tuple[int, int | None]] = {
    "RGB": (3, None),
    "RGBX": (4, cv2.COLOR_RGBA2RGB),
    "RGBA": (4, cv2.COLOR_RGBA2RGB),
    "BGR": (3, cv2.COLOR_BGR2RGB),
    "BGRX": (4, cv2.COLOR_BGRA2RGB),
}


def decode_faster(image: ImageFile.ImageFile, data: bytes) -> np.ndarray | None:
    """The pixels of a picture in RGB.

    Args:
        image: opened by Pillow, not loaded.
        data: the whole file.

    Returns:
        uint8 [H, W, 3], maybe a read-only view of `data`; None if Pillow has to decode.
    """
    if image.format == "JPEG":
        return _decode_jpeg(image, data)
    if image.format == "BMP" or (image.format == "TIFF" and _is_plain_tiff(image)):
        return _decode_raw(image, data)
    return None


def is_opaque(pixels: np.ndarray) -> bool:
    """Whether the alpha of contiguous uint8 [H, W, 4] is 255 throughout."""
    together = np.bitwise_and.reduce(pixels.view(np.uint32), axis=None)  # several times as fast as the alphas' minimum
    return bool(together.reshape(1).view(np.uint8)[3] == 255)


def _decode_jpeg(image: ImageFile.ImageFile, data: bytes) -> np.ndarray | None:
    if image.mode not in ("RGB", "L") or not data.endswith(JPEG_END) or not _opencv_agrees():
        return None
    if "progressive" not in image.info:
        # Pillow reads all markers up to the end, OpenCV only as far as it needs pixels, so it may miss damage
        assert image.fp is not None, "a picture that is open has a file"
        marker = JPEG_MARKER.search(data, image.fp.tell())  # Pillow stopped where the compressed data begin
        if marker is None or marker.end() != len(data):
            return None
    pixels = _opencv_jpeg(data)
    return pixels if pixels is not None and pixels.shape[1::-1] == image.size else None


def _opencv_jpeg(data: bytes) -> np.ndarray | None:
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        return cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
    except cv2.error:
        return None


@cache
def _opencv_agrees() -> bool:
    """Whether the JPEG libraries of OpenCV and Pillow, whichever these were built with, give the same pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (45, 37, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(cv2.GaussianBlur(noise, (5, 5), 1)).save(file, "JPEG")  # with halved chroma, as is usual
    found = _opencv_jpeg(file.getvalue())
    return found is not None and np.array_equal(found, np.asarray(Image.open(file)))


def _is_plain_tiff(image: ImageFile.ImageFile) -> bool:
    """Whether the file has one frame as it is to be seen, and no further directories, which Pillow checks."""
    exif = image.getexif()
    has_directories = any(tag in exif for tag in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo, ExifTags.IFD.Interop))
    is_animated = getattr(image, "is_animated", True)
    return not has_directories and not is_animated and exif.get(ExifTags.Base.Orientation, 1) == 1


def _decode_raw(image: ImageFile.ImageFile, data: bytes) -> np.ndarray | None:
    """Rows of pixels one after the other, as one piece or in strips without gaps."""
    codec, _, start, layout = image.tile[0]
    if codec != "raw" or not isinstance(layout, tuple) or len(layout) != 3 or layout[0] not in RAW_LAYOUTS:
        return None
    depth, conversion = RAW_LAYOUTS[layout[0]]
    width, height = image.size
    stride = layout[1] or width * depth
    top, end = 0, start
    for strip in image.tile:
        if strip.extents is None or (strip.codec_name, strip.offset, strip.args) != ("raw", end, layout):
            return None
        left, first, right, bottom = strip.extents
        if (left, first, right) != (0, top, width):
            return None
        top, end = bottom, end + (bottom - top) * stride
    if top != height or end > len(data):
        return None
    rows = np.frombuffer(data, dtype=np.uint8, count=end - start, offset=start).reshape(height, stride)
    pixels: np.ndarray = rows[:, : width * depth].reshape(height, width, depth)
    if layout[0] == "RGBA" and not is_opaque(pixels):
        return None
    if conversion is not None:
        pixels = cv2.cvtColor(pixels, conversion)
    return cv2.flip(pixels, 0) if layout[2] == -1 else pixels

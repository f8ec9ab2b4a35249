"""Find image files, decode them to RGB, and resize them to the square that a network takes.

Every part of the project decodes images with `decode_image`, so training and evaluation treat grey, transparent and
16-bit files alike. The resize gives the pixels of Pillow's Lanczos filter, bit for bit, in less than half of its time:
two passes of sparse sums.

Dimension key:  H height, W width, S side of the square, T filter taps, [n] pixels of an axis after the resize
"""

import io
import logging
import os
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, NoReturn

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dinov2.utils.files import check_regular_file

logger = logging.getLogger("dinov2")

# of pixels; not those formats of Pillow that hold drawings, films or measurements, or that start another program
FORMATS = (*("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP"),)
IMAGE_SUFFIXES = tuple(sorted(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS))
KNOWN_SUFFIXES = ", ".join(IMAGE_SUFFIXES)
N_SUFFIXES = 10  # of other files, in a log line
# an image with more pixels than both is no image: in the best case a byte of a compressed file holds some 1,000 of them
ALWAYS_ALLOWED_PIXELS, MAX_PIXELS_PER_BYTE = 2**24, 2000
MAX_FILE_BYTES = 2**30
EIGHT_BITS = ((np.arange(2**16) + 128) // 257).astype(np.uint8)  # of each 16-bit grey value
# Pillow's errors for truncated and damaged data
DAMAGE = (OSError, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError)
FITS = ("crop", "pad", "squash")
LANCZOS_A = 3  # lobes on each side of the centre
WEIGHT_STEPS = 2**22  # per unit, in Pillow
SUM_ERROR = 2.0**-15  # grey levels for each tap: more than the rounding error of adding to a float32 sum below 512
ROWS_PER_PASS = 512  # bounds the float32 copy of a large image


class UnreadableImageError(ValueError):
    """An image file cannot be decoded; `reason` says why in a few words."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both, since unpickling calls the class with them
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot read the image {self.path!r}: {self.reason}"


def is_image_name(name: str) -> bool:
    """Return True if a file of this name counts as an image: a known suffix, in any case, and not hidden."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def walk_images(folder: str | os.PathLike[str], with_hidden: bool = False) -> Iterator[str]:
    """Yield the paths of all images in a folder and its subfolders, sorted in each.

    Links to folders are followed, but no folder is read twice. Hidden names are left out by default. The files that are
    no images are counted by suffix in the log. A folder that cannot be read is an OSError.
    """
    read: set[str] = set()
    others: Counter[str] = Counter()
    for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        if (real := os.path.realpath(parent)) in read:
            logger.warning("%s leads to a folder that was read already: it is left out", parent)
            folders.clear()
            continue
        read.add(real)
        folders[:] = sorted(name for name in folders if with_hidden or not name.startswith("."))
        for name in sorted(files):
            if with_hidden or not name.startswith("."):
                if name.lower().endswith(IMAGE_SUFFIXES):
                    yield os.path.join(parent, name)
                else:
                    others[os.path.splitext(name)[1].lower() or "without a suffix"] += 1
    if others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(N_SUFFIXES))
        more = ", ..." if len(others) > N_SUFFIXES else ""
        logger.info("%s: files that are no images are passed over: %s%s", folder, counts, more)


def _raise(error: OSError) -> NoReturn:
    raise error


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the paths of all images in a folder and its subfolders, sorted; see `walk_images`."""
    return sorted(map(Path, walk_images(folder)))


def read_file(path: str) -> bytes:
    """Read the bytes of an image file; raise an UnreadableImageError if that fails."""
    try:
        file = check_regular_file(path)
        if (n_bytes := file.stat().st_size) > MAX_FILE_BYTES:
            raise ValueError(f"its {n_bytes:,} bytes are more than those of any image of cells")
        return file.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: not a file, or no possible name of one
        reason = getattr(error.__cause__ or error, "strerror", None) or str(error).removeprefix(path).lstrip(": ")
        raise UnreadableImageError(path, reason) from error


class Span(NamedTuple):
    """The part of an axis that is kept by a resize, in pixels of the original."""

    start: float
    end: float


def decode_image(source: str | os.PathLike[str] | bytes, name: str = "") -> np.ndarray:
    """Decode an image to uint8 [H, W, 3], red, green, blue, which may be read-only.

    Transparent pixels are blended with white, the colour of an empty slide; 16-bit grey is scaled to 8 bits; the first
    of several frames is taken. Orientation tags are not applied.

    An UnreadableImageError, which has `name` or the file's path, is raised if the file is missing, no regular file,
    empty, truncated, damaged, not an image, suspiciously large (`PIL.Image.MAX_IMAGE_PIXELS`, or more pixels than its
    bytes can hold), or if its pixels have no defined brightness (floats, wide integers).
    """
    name = name or ("" if isinstance(source, bytes) else os.fspath(source))
    data = source if isinstance(source, bytes) else read_file(os.fspath(source))
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max(ALWAYS_ALLOWED_PIXELS, MAX_PIXELS_PER_BYTE * len(data)):
                raise ValueError(f"its {len(data)} bytes cannot hold {image.width} x {image.height} pixels")
            image.load()
            return np.asarray(to_rgb(image))
    except UnidentifiedImageError as error:
        raise UnreadableImageError(name, "not a known image format" if data else "the file is empty") from error
    except DAMAGE as error:
        raise UnreadableImageError(name, getattr(error, "strerror", None) or str(error)) from error


def unreadable_reason(path: str) -> str:
    """Return why the image file cannot be decoded; empty if it can."""
    try:
        decode_image(path)
    except UnreadableImageError as error:
        return error.reason
    return ""


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode a file to a PIL image in mode RGB."""
    return Image.fromarray(decode_image(path))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to mode RGB; return the same object if it has this mode already."""
    if image.mode == "F":
        raise ValueError("its pixels are floats, which have no fixed range; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # depending on its version, Pillow opens 16-bit PNGs in mode I (32 bits) or I;16
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"its grey values, {grey.min()} to {grey.max()}, go beyond 16 bits; save it with 8 or 16")
        return Image.fromarray(EIGHT_BITS[grey]).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema()[0] == 255:
            return rgba.convert("RGB")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def resize_image(image: Image.Image | np.ndarray, size: int, fit: str = "crop", center_crop: float = 1.0) -> Tensor:
    """Resize an image (Pillow's, or uint8 [H, W, 3]) to uint8 [3, S, S], in memory [S, S, 3], with a Lanczos filter.

    The `fit` "crop" scales the shorter side to S and keeps the centre (torchvision's Resize and CenterCrop in one
    step); "pad" scales the longer side to S and repeats the border pixels; "squash" scales both sides to S and changes
    the aspect ratio, as upstream does.

    `center_crop`, of "crop" only, is the side of the central square that is kept, as a share of the shorter side
    (timm's crop_pct). Its sides may fall between pixels. As where an image is resized and then cropped, pixels at the
    border of the result depend a little on those beyond it.

    Raises:
        ValueError: the fit is unknown, the share is not above 0 and at most 1, or below 1 with another fit than "crop".
    """
    check_fit(fit, center_crop)
    pixels = image if isinstance(image, np.ndarray) else np.asarray(to_rgb(image))
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"image: an array of uint8 [H, W, 3] is needed, not {pixels.dtype} {list(pixels.shape)}")
    height, width = pixels.shape[:2]
    if fit == "pad":
        longer = max(width, height)
        inner = (max(1, round(height * size / longer)), max(1, round(width * size / longer)))
        square = resize_lanczos(pixels, *inner, Span(0, height), Span(0, width))
        (top, bottom), (left, right) = (((size - n) // 2, size - n - (size - n) // 2) for n in inner)
        square = cv2.copyMakeBorder(square, top, bottom, left, right, cv2.BORDER_REPLICATE)
    elif fit == "squash":
        square = resize_lanczos(pixels, size, size, Span(0, height), Span(0, width))
    else:
        square = resize_lanczos(pixels, size, size, *_spans_of_crop(height, width, size, center_crop))
    return torch.from_numpy(square).permute(2, 0, 1)  # [3, S, S]


def check_fit(fit: str, center_crop: float = 1.0) -> None:
    """Raise ValueError unless `fit` is one of `FITS` and has this `center_crop`; see `resize_image`."""
    if fit not in FITS:
        raise ValueError(f"fit: {fit!r} is not a way to resize; it is one of {', '.join(FITS)}")
    if not 0 < center_crop <= 1:
        raise ValueError(f"train.center_crop must be above 0 and at most 1, found {center_crop}")
    if center_crop != 1 and fit != "crop":
        raise ValueError(
            f"train.center_crop={center_crop} keeps the centre of images, and train.image_fit={fit} all of them; set "
            f"train.image_fit=crop or train.center_crop=1"
        )


def _spans_of_crop(height: int, width: int, size: int, center_crop: float) -> tuple[Span, Span]:
    """Return the rows and columns of the original that the crop keeps, so that no large image is made in between."""
    shorter = min(height, width)
    if center_crop != 1:
        kept = center_crop * shorter
        return Span((height - kept) / 2, (height + kept) / 2), Span((width - kept) / 2, (width + kept) / 2)
    spans = []
    for side in (height, width):
        scaled = size * side // shorter  # rounded as in torchvision, and so is the offset
        offset = round((scaled - size) / 2)
        spans.append(Span(offset * side / scaled, (offset + size) * side / scaled))
    return spans[0], spans[1]


class Taps(NamedTuple):
    """The filter of an axis: each new pixel is a weighted sum of T old ones."""

    first: int  # first pixel that the filter reads
    end: int  # one past the last
    lines: Tensor  # int64 [n, T] the old pixels of each new one, counted from `first`
    weights: Tensor  # float32 [n, T], rows summing to 1


def resize_lanczos(pixels: np.ndarray, height: int, width: int, rows: Span, columns: Span) -> np.ndarray:
    """Cut rows and columns out of uint8 [H, W, 3], at borders between any pixels, and resize to [height, width, 3].

    As in Pillow, the filter (Duchon 1979) is widened by the scale where the image shrinks, reads pixels outside the
    box, is cut off at the image's borders and normalised; its weights are multiples of 2^-22; values are rounded and
    clamped to 0-255 after each pass. The few float32 sums too close to a half to be rounded safely are computed again
    with integers. The horizontal pass is the first, as in Pillow up to 12 (Pillow 13 changes the order for images that
    are much taller than wide). The result is contiguous and never shares memory with `pixels`.
    """
    vertical, horizontal = _taps(len(pixels), height, *rows), _taps(pixels.shape[1], width, *columns)
    pixels = pixels[vertical.first : vertical.end, horizontal.first : horizontal.end]
    narrowed = np.empty((len(pixels), width, 3), dtype=np.uint8)
    for top in range(0, len(pixels), ROWS_PER_PASS):
        part = pixels[top : top + ROWS_PER_PASS]
        filtered = _filter_lines(cv2.transpose(part), horizontal)  # [width, rows of the part, 3]
        cv2.transpose(filtered, dst=narrowed[top : top + ROWS_PER_PASS])
    return _filter_lines(narrowed, vertical)


def _filter_lines(pixels: np.ndarray, taps: Taps) -> np.ndarray:
    """Replace the lines of [lines, length, 3] by weighted sums of them: [n, length, 3]."""
    lines = torch.from_numpy(pixels).flatten(1).float()  # [lines, length * 3]
    # a product with a sparse matrix: the embedding bag is torch's fastest kernel for it
    bags = torch.nn.functional.embedding_bag(taps.lines, lines, per_sample_weights=taps.weights, mode="sum")
    # convertScaleAbs rounds and saturates in one call, but takes absolute values: negative ones become 0 before it.
    sums: np.ndarray = bags.relu_().numpy()  # [n, length * 3]
    error = SUM_ERROR * taps.lines.shape[1]
    rounded, lower = (cv2.convertScaleAbs(sums, beta=shift) for shift in (error, -error))
    doubtful = np.flatnonzero(rounded != lower)
    if len(doubtful):
        row, column = np.divmod(doubtful, rounded.shape[1])
        taken = pixels.reshape(len(pixels), -1)[taps.lines.numpy()[row], column[:, None]]  # [doubtful, T]
        exact = (taken * (taps.weights.numpy()[row] * WEIGHT_STEPS).astype(np.int64)).sum(axis=1)
        rounded.ravel()[doubtful] = ((exact + WEIGHT_STEPS // 2) // WEIGHT_STEPS).clip(0, 255)
    return rounded.reshape(-1, *pixels.shape[1:])


@lru_cache(maxsize=128)  # images of a dataset share few sizes
def _taps(n_in: int, n_out: int, start: float, end: float) -> Taps:
    """Compute the filter that resizes the pixels from `start` to `end` of an axis of `n_in` to `n_out` pixels."""
    single = np.float32(start), np.float32(end)  # Pillow's boxes have single precision, and so has their size
    start, scale = float(single[0]), float(single[1] - single[0]) / n_out
    widening = max(scale, 1.0)
    radius = LANCZOS_A * widening
    centres = start + (np.arange(n_out) + 0.5) * scale  # [n]
    firsts = np.maximum(np.trunc(centres - radius + 0.5), 0).astype(np.int64)
    ends = np.minimum(np.trunc(centres + radius + 0.5), n_in).astype(np.int64)
    lines = firsts[:, None] + np.arange((ends - firsts).max())  # [n, T]
    distances = (lines + 0.5 - centres[:, None]) / widening
    weights = np.where(np.abs(distances) < LANCZOS_A, np.sinc(distances) * np.sinc(distances / LANCZOS_A), 0)
    weights[lines >= ends[:, None]] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    weights = np.rint(weights * WEIGHT_STEPS) / WEIGHT_STEPS
    first, end = int(firsts.min()), int(ends.max())
    lines = np.minimum(lines, end - 1)  # those past the end have weight 0, but must exist
    return Taps(first, end, torch.from_numpy(lines - first), torch.from_numpy(weights.astype(np.float32)))

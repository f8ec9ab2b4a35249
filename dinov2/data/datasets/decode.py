"""Picture files to RGB, and RGB to the square that a network sees.

Every part of the project reads pictures through `load_image`, so training and evaluation agree on what a grey,
transparent or 16-bit file looks like. Letters: S side of the square in pixels.
"""

import io
import os

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dinov2.data.datasets.codecs import decode_faster, is_opaque
from dinov2.data.datasets.resize import Span, resize_lanczos

FITS = ("crop", "pad", "squash")


class UnreadableImageError(ValueError):
    """A picture file that cannot be decoded.

    Attributes:
        path: the file.
        reason: what is wrong with it, in a few words.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both in `args`: pickling between processes calls the class with them
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot read the picture {self.path!r}: {self.reason}"


def decode_image(source: str | os.PathLike[str] | bytes, name: str = "") -> np.ndarray:
    """Decode a picture.

    Transparent pixels are laid over white, the colour of an empty slide; 16-bit grey is scaled to 8 bits; of a file
    with several frames the first is taken. Orientation tags are not applied: the pixels come as they are stored.

    Args:
        source: a file, or the bytes of one.
        name: what an error calls the picture; the file's path unless given.

    Returns:
        uint8 [H, W, 3], red, green, blue; it may be read-only.

    Raises:
        UnreadableImageError: the file is missing, empty, truncated, damaged, not a picture, suspiciously large
            (`PIL.Image.MAX_IMAGE_PIXELS`), or its pixels have no defined brightness (floats, wide integers).
    """
    if not isinstance(source, bytes):
        name = name or os.fspath(source)
        try:
            with open(source, "rb") as file:
                source = file.read()
        except OSError as error:
            raise UnreadableImageError(name, error.strerror or str(error)) from error
        except ValueError as error:  # a null character in the path
            raise UnreadableImageError(name, str(error)) from error
    return _decode(source, name)


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """`decode_image` of a file as a picture in mode RGB."""
    return Image.fromarray(decode_image(path))


def _decode(data: bytes, name: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:  # reads the header alone
            pixels = decode_faster(image, data)
            if pixels is None:
                image.load()
                pixels = rgb_array(image)
            return pixels
    except UnidentifiedImageError as error:
        raise UnreadableImageError(name, "not a known picture format" if data else "the file is empty") from error
    except OSError as error:  # Pillow's, for truncated and damaged data
        raise UnreadableImageError(name, error.strerror or str(error)) from error
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's, for damaged headers and chunks
        raise UnreadableImageError(name, str(error)) from error


def rgb_array(image: Image.Image) -> np.ndarray:
    """`to_rgb` as an array, uint8 [H, W, 3]."""
    if image.mode == "RGBA":
        pixels = np.asarray(image)
        if is_opaque(pixels):
            return cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB)
    return np.asarray(to_rgb(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in mode RGB; the same object if it is that already.

    Raises:
        ValueError: the pixels have no defined brightness.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floats, which have no fixed range; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _wide_grey_to_rgb(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema()[0] == 255:
            return rgba.convert("RGB")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _wide_grey_to_rgb(image: Image.Image) -> Image.Image:
    # depending on its version, Pillow opens 16-bit PNGs in mode I (32 bits) or I;16
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError(
            f"its grey values go from {grey.min()} to {grey.max()}, beyond 16 bits; save it with 8 or 16 bits"
        )
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")


def resize_image(image: Image.Image | np.ndarray, size: int, fit: str = "crop") -> Tensor:
    """Bring a picture to `size` x `size` pixels with Lanczos filtering.

    Args:
        image: of any size and mode; or uint8 [H, W, 3], red, green, blue.
        size: S, in pixels.
        fit: "crop" scales the shorter side to S and keeps the centre (torchvision's Resize and CenterCrop in one step);
            "pad" scales the longer side to S and repeats the border pixels; "squash" scales both sides to S and loses
            the aspect, as upstream does.

    Returns:
        uint8 [3, S, S], which lies in memory as [S, S, 3].

    Raises:
        ValueError: an unknown `fit`, an array of another type or shape, or pixels with no defined brightness.
    """
    check_fit(fit)
    picture = image if isinstance(image, np.ndarray) else rgb_array(image)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise ValueError(f"picture: an array of uint8 [H, W, 3] is needed, not {picture.dtype} {list(picture.shape)}")
    height, width = picture.shape[:2]
    if fit == "pad":
        longer = max(width, height)
        inner = (max(1, round(height * size / longer)), max(1, round(width * size / longer)))
        square = resize_lanczos(picture, *inner, Span(0, height), Span(0, width))
        (top, bottom), (left, right) = (((size - n) // 2, size - n - (size - n) // 2) for n in inner)
        square = cv2.copyMakeBorder(square, top, bottom, left, right, cv2.BORDER_REPLICATE)
    elif fit == "squash":
        square = resize_lanczos(picture, size, size, Span(0, height), Span(0, width))
    else:
        square = resize_lanczos(picture, size, size, *_spans_of_crop(height, width, size))
    return torch.from_numpy(square).permute(2, 0, 1)  # [3, S, S]


def check_fit(fit: str) -> None:
    """Raise ValueError unless `resize_image` knows this way to make a picture square."""
    if fit not in FITS:
        raise ValueError(f"fit: {fit!r} is not a way to resize; it is one of {', '.join(FITS)}")


def _spans_of_crop(height: int, width: int, size: int) -> tuple[Span, Span]:
    """Rows and columns that stay when the shorter side is scaled to `size` and the centre kept.

    Only what the crop keeps is computed: no large picture in between, however long and thin the original is. The grid
    is torchvision's: longer side floored, offset rounded.
    """
    shorter = min(height, width)
    spans = []
    for side in (height, width):
        scaled = size * side // shorter
        offset = round((scaled - size) / 2)
        spans.append(Span(offset * side / scaled, (offset + size) * side / scaled))
    return spans[0], spans[1]

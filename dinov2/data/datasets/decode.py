"""Picture files to RGB, and RGB to the square that a network sees.

Every part of the project reads pictures through `load_image`, so training and evaluation agree on what a grey,
transparent or 16-bit file looks like. Letters: S side of the square in pixels.
"""

import os

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

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


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode a picture file.

    Transparent pixels are laid over white, the colour of an empty slide; 16-bit grey is scaled to 8 bits; of a file
    with several frames the first is taken. Orientation tags are not applied: the pixels come as they are stored.

    Returns:
        the picture in mode RGB, fully decoded, with its file closed.

    Raises:
        UnreadableImageError: the file is missing, empty, truncated, damaged, not a picture, suspiciously large
            (`PIL.Image.MAX_IMAGE_PIXELS`), or its pixels have no defined brightness (floats, wide integers).
    """
    path = os.fspath(path)
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(image)
    except UnidentifiedImageError as error:
        empty = os.path.getsize(path) == 0
        raise UnreadableImageError(path, "the file is empty" if empty else "not a known picture format") from error
    except OSError as error:  # the file system's own errors, and Pillow's for truncated and damaged data
        raise UnreadableImageError(path, error.strerror or str(error)) from error
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's, for damaged headers and chunks
        raise UnreadableImageError(path, str(error)) from error


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


def resize_image(image: Image.Image, size: int, fit: str = "crop") -> Tensor:
    """Bring a picture to `size` x `size` pixels with Lanczos filtering.

    Args:
        image: of any size and mode.
        size: S, in pixels.
        fit: "crop" scales the shorter side to S and keeps the centre (torchvision's Resize and CenterCrop in one step);
            "pad" scales the longer side to S and repeats the border pixels; "squash" scales both sides to S and loses
            the aspect, as upstream does.

    Returns:
        uint8 [3, S, S], contiguous.
    """
    check_fit(fit)
    image = to_rgb(image)
    width, height = image.size
    if fit == "squash" or width == height:
        return _to_tensor(np.asarray(image.resize((size, size), Image.Resampling.LANCZOS)))
    if fit == "crop":
        return _to_tensor(np.asarray(_scale_and_crop(image, size)))
    longer = max(width, height)
    inner = (max(1, round(width * size / longer)), max(1, round(height * size / longer)))
    array = np.asarray(image.resize(inner, Image.Resampling.LANCZOS))
    pads = [((size - n) // 2, size - n - (size - n) // 2) for n in array.shape[:2]]
    return _to_tensor(np.pad(array, [*pads, (0, 0)], mode="edge"))


def check_fit(fit: str) -> None:
    """Raise ValueError unless `resize_image` knows this way to make a picture square."""
    if fit not in FITS:
        raise ValueError(f"fit: {fit!r} is not a way to resize; it is one of {', '.join(FITS)}")


def _scale_and_crop(image: Image.Image, size: int) -> Image.Image:
    # Pillow filters over pixels outside `box` too, so only the part that the crop keeps is computed: no large picture
    # in between, however long and thin the original is. The grid is torchvision's: longer side floored, offset rounded.
    shorter = min(image.size)
    spans = []
    for side in image.size:
        scaled = size * side // shorter
        offset = round((scaled - size) / 2)
        spans.append((offset * side / scaled, (offset + size) * side / scaled))
    (left, right), (top, bottom) = spans
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, right, bottom))


def _to_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))  # [3, S, S]

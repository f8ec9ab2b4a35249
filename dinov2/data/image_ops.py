"""Picture operations on batches, each with its own strength per picture; the same code runs on CPU and GPU.

Dimension key:  N pictures, H height, W width, S side of a crop, T filter taps

Pictures are float32 in [0, 1] and lie in memory as [N, H, 3, W], a line of each colour after the other: a vertical
filter is then a weighted sum of whole rows of memory, and a horizontal one is the same on the transposed picture.
Functions whose name ends in `_` change their argument. Nothing is rounded between two operations; PIL does round, and
so does `image_ops_uint8`, which has the same operations for single pictures and is several times as fast on a CPU.
"""

import math

import torch
from torch import Tensor

# ITU-R 601 luma, the weights of PIL's mode "L" and of torchvision.
GRAY_WEIGHTS = (0.299, 0.587, 0.114)

BICUBIC_A = -0.5  # the value that PIL and torch's antialiased resize use (torch without antialias: -0.75)


def resize_taps(start: Tensor, length: Tensor, flip: Tensor, n_out: int, n_in: int) -> tuple[Tensor, Tensor]:
    """Filter taps that crop, resize (bicubic, antialiased) and mirror one axis, for `filter_lines`.

    The kernel is the cubic of Keys (1981) with a = -0.5, widened by the scale factor where the axis shrinks, cut off at
    the crop's borders and normalised to sum 1: what PIL and torchvision do.

    Args:
        start: [N] first pixel of the crop on this axis.
        length: [N] pixels of the crop, 1 <= length and start + length <= n_in.
        flip: [N] bool, True mirrors.
        n_out: pixels after the resize.
        n_in: pixels of the whole picture.

    Returns:
        int64 [N, n_out, T] pixels of the picture and their float32 [N, n_out, T] weights.
    """
    start, length = start.to(torch.float32)[:, None], length.to(torch.float32)[:, None]  # [N, 1]
    positions = torch.arange(n_out, device=start.device, dtype=torch.float32)
    positions = torch.where(flip[:, None], n_out - 1 - positions, positions)  # [N, n_out]
    scale = length / n_out
    widening = scale.clamp_min(1.0)
    centre = (positions + 0.5) * scale  # [N, n_out], in pixels of the crop

    # From shapes alone, so that no value has to come back from the device.
    n_taps = min(n_in, math.ceil(4 * max(1.0, n_in / n_out)))
    first = (centre - 2 * widening - 0.5).ceil_().clamp_min_(0.0)
    first = torch.minimum(first, (length - n_taps).clamp_min(0.0))
    taps = first[..., None] + torch.arange(n_taps, device=start.device)  # [N, n_out, T], in pixels of the crop
    distance = ((taps + 0.5 - centre[..., None]) / widening[..., None]).abs_()
    weights = _cubic(distance).mul_(taps < length[..., None])
    weights /= weights.sum(dim=-1, keepdim=True)
    # Taps past the crop's end have weight 0; their index must be in the crop all the same.
    pixels = torch.minimum(taps, length[..., None] - 1) + start[..., None]
    return pixels.long(), weights


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic at distances >= 0 in units of the sampling step; 0 from 2 on."""
    a = BICUBIC_A
    near = ((a + 2) * distance - (a + 3)) * distance.square() + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def filter_lines(pictures: Tensor, picture: Tensor, taps: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of the lines of pictures.

    A sparse matrix product per output, for which torch's embedding bag is the kernel that is fast on CPU and GPU.

    Args:
        pictures: [B, H, 3, W].
        picture: int64 [N], of which picture each output is made.
        taps: int64 [N, S, T], lines in [0, H).
        weights: [N, S, T].

    Returns:
        [N, S, 3, W].
    """
    n_pictures, height, _, width = pictures.shape
    lines = torch.nn.functional.embedding_bag(
        (taps + height * picture.view(-1, 1, 1)).flatten(0, 1),
        pictures.reshape(n_pictures * height, 3 * width),
        per_sample_weights=weights.flatten(0, 1),
        mode="sum",
    )
    return lines.view(len(picture), -1, 3, width)


def crop_resize(
    pictures: Tensor, picture: Tensor, vertical: tuple[Tensor, Tensor], horizontal: tuple[Tensor, Tensor]
) -> Tensor:
    """Apply the `resize_taps` of both axes.

    Args:
        pictures: [B, 3, H, W] of any type and memory layout.
        picture: int64 [N], of which picture each crop is.
        vertical: taps into H and their weights.
        horizontal: taps into W and their weights.

    Returns:
        float32 [N, S, 3, S], not clamped (the cubic overshoots at edges).
    """
    n_pictures, _, height, width = pictures.shape
    columns = torch.empty(n_pictures, width, 3, height, device=pictures.device)
    columns.copy_(pictures.permute(0, 3, 1, 2))
    narrow = transpose(filter_lines(columns, picture, *horizontal))  # [N, H, 3, S]
    return filter_lines(narrow, torch.arange(len(picture), device=pictures.device), *vertical)


def transpose(pictures: Tensor) -> Tensor:
    """Swap rows and columns, in memory too: [N, H, 3, W] -> [N, W, 3, H]."""
    return pictures.transpose(1, 3).contiguous()


def rotate(pictures: Tensor, cosine: Tensor, sine: Tensor, fill: Tensor) -> Tensor:
    """Turn square pictures counter-clockwise about their centre, nearest pixel, corners filled with a gray level.

    Args:
        pictures: [N, S, 3, S].
        cosine: [N] of the angle.
        sine: [N] of the angle.
        fill: [N] gray level in [0, 1] where the turned picture has no pixel.
    """
    n, size = pictures.shape[:2]
    offset = torch.arange(size, device=pictures.device, dtype=torch.float32) + (0.5 - size / 2)
    cosine, sine = cosine.view(n, 1, 1), sine.view(n, 1, 1)
    source_x = (cosine * offset - sine * offset[:, None] + size / 2).floor_()  # [N, S, S]
    source_y = (sine * offset + cosine * offset[:, None] + size / 2).floor_()
    outside = (source_x < 0) | (source_x >= size) | (source_y < 0) | (source_y >= size)
    # Each of the three lines of a row lies `size` further on in memory.
    source = (source_y * (3 * size) + source_x).masked_fill_(outside, 0).long()[:, :, None]  # [N, S, 1, S]
    source = source + torch.arange(0, 3 * size, size, device=pictures.device).view(3, 1)  # [N, S, 3, S]
    turned = pictures.reshape(n, -1).gather(1, source.view(n, -1)).view_as(pictures)
    return torch.where(outside[:, :, None], fill.view(n, 1, 1, 1), turned)


def _gray(pictures: Tensor) -> Tensor:
    """[N, H, 1, W] luma."""
    red, green, blue = pictures.split(1, dim=2)
    return (red * GRAY_WEIGHTS[0]).add_(green, alpha=GRAY_WEIGHTS[1]).add_(blue, alpha=GRAY_WEIGHTS[2])


def adjust_brightness_(pictures: Tensor, factor: Tensor) -> Tensor:
    """Multiply by `factor` [N] >= 0 and clamp to [0, 1]."""
    return pictures.mul_(factor.view(-1, 1, 1, 1)).clamp_max_(1.0)


def adjust_contrast_(pictures: Tensor, factor: Tensor) -> Tensor:
    """Move away from (factor > 1) or towards the picture's mean luma, clamp to [0, 1]; `factor` [N] >= 0."""
    red, green, blue = pictures.mean(dim=(1, 3)).unbind(dim=1)  # [N]
    luma = red * GRAY_WEIGHTS[0] + green * GRAY_WEIGHTS[1] + blue * GRAY_WEIGHTS[2]
    blended = torch.lerp(luma.view(-1, 1, 1, 1), pictures, factor.view(-1, 1, 1, 1), out=pictures)
    return blended.clamp_(0.0, 1.0)


def adjust_saturation_(pictures: Tensor, factor: Tensor) -> Tensor:
    """Move away from (factor > 1) or towards each pixel's luma, clamp to [0, 1]; `factor` [N] >= 0."""
    return torch.lerp(_gray(pictures), pictures, factor.view(-1, 1, 1, 1), out=pictures).clamp_(0.0, 1.0)


def adjust_hue_(pictures: Tensor, shift: Tensor) -> Tensor:
    """Add `shift` [N], in turns of the colour circle, to the hue of HSV; value and saturation stay.

    With V = max, C = max - min and the hue h in sixths of a turn, a channel is V - C + C * clamp(t(h), 0, 1), where t
    is a trapezium round that channel's own hue: |h - 3| - 1 for red, 2 - |h - 2| for green, 2 - |h - 4| for blue.
    Selections are written as interpolations with weights 0 and 1: on a CPU several times as fast as masks.
    """
    red, green, blue = pictures.unbind(dim=2)  # [N, H, W]
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    per_chroma = chroma.clamp_min(1e-12).reciprocal_()  # a gray pixel has differences 0, so any divisor does
    hue = (red - green).mul_(per_chroma).add_(4)  # where blue is the largest
    is_largest = torch.eq(green, high, out=torch.empty_like(high))
    hue.lerp_((blue - red).mul_(per_chroma).add_(2), is_largest)
    torch.eq(red, high, out=is_largest)
    hue.lerp_((green - blue).mul_(per_chroma), is_largest)
    hue += 6 * shift.view(-1, 1, 1)
    hue.remainder_(6)  # [0, 6)
    torch.addcmul(low, chroma, (hue - 3).abs_().sub_(1).clamp_(0.0, 1.0), out=red)
    torch.addcmul(low, chroma, (hue - 2).abs_().neg_().add_(2).clamp_(0.0, 1.0), out=green)
    torch.addcmul(low, chroma, (hue - 4).abs_().neg_().add_(2).clamp_(0.0, 1.0), out=blue)
    return pictures


def to_grayscale_(pictures: Tensor) -> Tensor:
    """Replace all three channels by the luma."""
    return pictures.copy_(_gray(pictures))


def solarize_(pictures: Tensor, threshold: float) -> Tensor:
    """Invert every value >= `threshold` (in [0, 1])."""
    return torch.where(pictures >= threshold, 1 - pictures, pictures, out=pictures)


def gaussian_blur(pictures: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Blur with a normalised Gaussian of `kernel_size` taps; beyond a border pixel the picture is mirrored.

    This is torchvision's GaussianBlur, which upstream runs with 9 taps.

    Args:
        pictures: [N, S, 3, S], S > kernel_size // 2.
        sigma: [N] standard deviation in pixels, > 0.
        kernel_size: odd, the same for all pictures.
    """
    n, size = pictures.shape[:2]
    radius = kernel_size // 2
    offsets = torch.arange(-radius, radius + 1, device=pictures.device)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]).square())
    weights = (weights / weights.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)  # [3 N, T]
    # Each colour of each picture is a channel that is filtered alone.
    planes = torch.nn.functional.pad(pictures.transpose(1, 2), [radius] * 4, mode="reflect")
    planes = planes.reshape(1, 3 * n, size + 2 * radius, size + 2 * radius)
    planes = torch.nn.functional.conv2d(planes, weights[:, None, :, None], groups=3 * n)
    planes = torch.nn.functional.conv2d(planes, weights[:, None, None, :], groups=3 * n)
    return planes.view(n, 3, size, size).transpose(1, 2)

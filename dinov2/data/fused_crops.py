"""All that is done to the crops of a batch as one program for `torch.compile`, which makes a few kernels of it.

The operations of `image_ops` one after the other read and write every crop some fifty times. Here shapes depend on
nothing but those of the batch: each crop goes through each operation, which for a crop that shall not have it is the
identity. The arithmetic that this adds costs less than the memory traffic that it saves. Nothing is rounded between
operations; run without `torch.compile` the program gives the same crops, slowly.

Dimension key:  B pictures, R crops (all crops of one size of a batch), S crop side, H height, W width, T filter taps

Crops are [R, 3, S, S] here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2.data.crop_parameters import JITTER_NAMES, CropParameters
from dinov2.data.image_ops import GRAY_WEIGHTS, resize_taps
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD

_CONTRAST, _SATURATION, _HUE = (JITTER_NAMES.index(name) for name in ("contrast", "saturation", "hue"))


class Program(NamedTuple):
    """What happens to R crops, as numbers that are the identity for an operation that a crop does not get.

    A jitter operation other than hue, and the loss of colour, are a blend: clamp(scale * x + luma_share * luma of the
    pixel + mean_share * mean luma of the crop, 0, 1). Three blends come before the hue and four after it: the jitter's
    order says which of the six are at work, and the last is the loss of colour. The mean is that of the crop when its
    contrast has its turn, so a first run of the blends before that, the `early` numbers, has to find it.
    """

    picture: Tensor  # int64 [R]
    box: Tensor  # int64 [R, 4]: top, left, height, width
    turn: Tensor  # [R, 2, 2]: from (x, y) of a pixel of the crop, seen from the middle, to that of its source
    fill: Tensor  # [R] gray level in [0, 1] where the source is outside
    scale: Tensor  # [R, 7]
    luma_share: Tensor  # [R, 7]
    mean_share: Tensor  # [R, 7]
    hue_shift: Tensor  # [R], in sixths of the colour circle
    early_scale: Tensor  # [R, 7]
    early_luma_share: Tensor  # [R, 7]
    early_hue_shift: Tensor  # [R]
    blur_weights: Tensor  # [R, T]
    solarize_from: Tensor  # [R]: values from here on are inverted


def program_of(crops: CropParameters, kernel_size: int, solarize_threshold: float) -> Program:
    """The numbers of `Program` on the CPU.

    Args:
        crops: what shall happen to R crops.
        kernel_size: taps of the blur, odd.
        solarize_threshold: level, of 0 to 255.
    """
    place = crops.jitter_order.argsort(dim=1)  # [R, 4]: when each of JITTER_NAMES has its turn
    turns = torch.tensor([0, 1, 2, 1, 2, 3])  # of the six blends of the jitter
    is_late = torch.tensor([False] * 3 + [True] * 3)
    number = crops.jitter_order[:, turns]  # [R, 6], which of JITTER_NAMES
    at_work = crops.jittered[:, None] & torch.where(is_late, turns > place[:, _HUE, None], turns < place[:, _HUE, None])
    factor = torch.where(at_work, crops.jitter_strength.gather(1, number), 1.0)
    is_early = turns < place[:, _CONTRAST, None]

    def with_grayscale(blends: Tensor, last: Tensor) -> Tensor:
        return torch.cat([blends, last.float()[:, None]], dim=1)  # [R, 7]

    luma_share = torch.where(number == _SATURATION, 1 - factor, 0.0)
    nothing = torch.zeros(len(crops))
    hue_shift = torch.where(crops.jittered, 6 * crops.jitter_strength[:, _HUE], 0.0)
    offsets = torch.arange(kernel_size) - kernel_size // 2
    weights = torch.exp(-0.5 * (offsets / crops.sigma[:, None]).square())
    weights = torch.where(crops.blurred[:, None], weights / weights.sum(dim=1, keepdim=True), (offsets == 0).float())
    return Program(
        picture=crops.picture,
        box=crops.box,
        turn=_turn(crops),
        fill=crops.fill,
        scale=with_grayscale(factor, ~crops.grayscale),
        luma_share=with_grayscale(luma_share, crops.grayscale),
        mean_share=with_grayscale(torch.where(number == _CONTRAST, 1 - factor, 0.0), nothing),
        hue_shift=hue_shift,
        early_scale=with_grayscale(torch.where(is_early, factor, 1.0), nothing + 1),
        early_luma_share=with_grayscale(torch.where(is_early, luma_share, 0.0), nothing),
        early_hue_shift=torch.where(place[:, _HUE] < place[:, _CONTRAST], hue_shift, 0.0),
        blur_weights=weights,
        solarize_from=torch.where(crops.solarized, solarize_threshold / 255, float("inf")),
    )


def _turn(crops: CropParameters) -> Tensor:
    """[R, 2, 2] for the rotation, the mirrors and the quarter turn, undone in reverse."""
    radians = torch.deg2rad(torch.where(crops.rotated, crops.angle, 0.0).double())
    cosine, sine = radians.cos(), radians.sin()
    rotation = torch.stack([cosine, -sine, sine, cosine], dim=1).view(-1, 2, 2)
    signs = 1 - 2 * torch.stack([crops.hflip, crops.vflip], dim=1).double()  # [R, 2]
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]]).double()
    quarter = torch.where(crops.quarter_turn[:, None, None], quarter, torch.eye(2).double())
    return (rotation @ torch.diag_embed(signs) @ quarter).float()


def run_program(images: Tensor, program: Program, size: int, dtype: torch.dtype) -> Tensor:
    """Make the crops.

    Args:
        images: uint8 [B, 3, H, W].
        program: on the device of the pictures.
        size: S.
        dtype: of the result.

    Returns:
        [R, 3, S, S], normalised with ImageNet's mean and standard deviation.
    """
    planes = _cut(images, program, size).unbind(dim=1)  # three [R, S, S]
    early = _colours(planes, program.early_scale, program.early_luma_share, None, program.early_hue_shift)
    means = program.mean_share * _luma(early).mean(dim=(1, 2))[:, None]  # [R, 7]
    crops = torch.stack(_colours(planes, program.scale, program.luma_share, means, program.hue_shift), dim=1)
    crops = _blur(_blur(crops, program.blur_weights, 2), program.blur_weights, 3)
    crops = torch.where(crops >= program.solarize_from.view(-1, 1, 1, 1), 1 - crops, crops)
    mean = torch.tensor(IMAGENET_MEAN, device=crops.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=crops.device).view(3, 1, 1)
    return ((crops - mean) / std).to(dtype)


_compiled: dict[str, Callable[..., Tensor]] = {}


def run_compiled(*arguments: Any) -> Tensor:
    """`run_program`, compiled at the first call and once more for each further shape."""
    if "run" not in _compiled:
        _compiled["run"] = torch.compile(run_program, dynamic=False)
    return _compiled["run"](*arguments)


def _cut(images: Tensor, program: Program, size: int) -> Tensor:
    """Crops of the boxes, resized, turned and mirrored: float32 [R, 3, S, S] in [0, 1]."""
    n, (height, width), device = len(program.picture), images.shape[2:], images.device
    no = torch.zeros(n, dtype=torch.bool, device=device)
    top, left, box_height, box_width = program.box.unbind(dim=1)
    rows, row_weights = resize_taps(top, box_height, no, size, height)  # [R, S, T]
    columns, column_weights = resize_taps(left, box_width, no, size, width)
    picture = program.picture.view(n, 1, 1, 1)
    channel = torch.arange(3, device=device).view(3, 1, 1)
    line = torch.arange(height, device=device).view(height, 1)
    wide = torch.zeros(n, 3, height, size, device=device)
    for tap in range(columns.shape[2]):
        pixels = images[picture, channel, line, columns[:, None, None, :, tap]]
        wide = wide + column_weights[:, None, None, :, tap] * pixels  # [R, 3, H, S]

    crop = torch.arange(n, device=device).view(n, 1, 1, 1)
    column = torch.arange(size, device=device)
    resized = torch.zeros(n, 3, size, size, device=device)
    for tap in range(rows.shape[2]):
        lines = wide[crop, channel, rows[:, None, :, None, tap], column]
        resized = resized + row_weights[:, None, :, None, tap] * lines  # [R, 3, S, S]
    resized = (resized / 255).clamp(0.0, 1.0)

    middle = size / 2
    place = column + (0.5 - middle)
    turn = program.turn[..., None, None]  # [R, 2, 2, 1, 1]
    x = (turn[:, 0, 0] * place + turn[:, 0, 1] * place[:, None] + middle).floor().long()[:, None]  # [R, 1, S, S]
    y = (turn[:, 1, 0] * place + turn[:, 1, 1] * place[:, None] + middle).floor().long()[:, None]
    outside = (x < 0) | (x >= size) | (y < 0) | (y >= size)
    turned = resized[crop, channel, y.clamp(0, size - 1), x.clamp(0, size - 1)]
    return torch.where(outside, program.fill.view(n, 1, 1, 1), turned)


Planes = tuple[Tensor, ...]  # red, green and blue [R, S, S]


def _luma(planes: Planes) -> Tensor:
    return planes[0] * GRAY_WEIGHTS[0] + planes[1] * GRAY_WEIGHTS[1] + planes[2] * GRAY_WEIGHTS[2]


def _colours(planes: Planes, scale: Tensor, luma_share: Tensor, means: Tensor | None, hue_shift: Tensor) -> Planes:
    """Three blends, the hue and four blends; `means` [R, 7] are what the blends add."""
    for blend in range(7):
        if blend == 3:
            planes = _shift_hue(planes, hue_shift.view(-1, 1, 1))
        target = luma_share[:, blend, None, None] * _luma(planes)
        target = target if means is None else target + means[:, blend, None, None]
        planes = tuple((scale[:, blend, None, None] * plane + target).clamp(0.0, 1.0) for plane in planes)
    return planes


def _shift_hue(planes: Planes, sixths: Tensor) -> Planes:
    """`image_ops.adjust_hue_`, with all hues multiplied by the chroma C: no division, and gray needs no exception."""
    red, green, blue = planes
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    hue = torch.where(green == high, blue - red + 2 * chroma, red - green + 4 * chroma)
    hue = torch.where(red == high, green - blue, hue) + sixths * chroma  # from -4 C to 8 C
    hue = torch.where(hue < 0, hue + 6 * chroma, hue)
    hue = torch.where(hue >= 6 * chroma, hue - 6 * chroma, hue)

    def channel(trapezium: Tensor) -> Tensor:
        return low + torch.minimum(trapezium.clamp_min(0.0), chroma)

    return (
        channel((hue - 3 * chroma).abs() - chroma),
        channel(2 * chroma - (hue - 2 * chroma).abs()),
        channel(2 * chroma - (hue - 4 * chroma).abs()),
    )


def _blur(crops: Tensor, weights: Tensor, axis: int) -> Tensor:
    """One pass of the blur along `axis` of [R, 3, S, S]; beyond a border pixel the picture is mirrored."""
    size, n_taps = crops.shape[axis], weights.shape[1]
    pixel = torch.arange(size, device=crops.device)
    blurred = torch.zeros_like(crops)
    for tap in range(n_taps):
        source = (pixel + (tap - n_taps // 2)).abs()
        source = torch.minimum(source, 2 * (size - 1) - source)
        blurred = blurred + weights[:, tap].view(-1, 1, 1, 1) * crops.index_select(axis, source)
    return blurred

"""Making the crops that `crop_parameters` describes: with OpenCV on a CPU, with tensors on other devices.

All ways do the same operations with the same parameters in the same order. OpenCV's rounds to whole levels after each
operation, as PIL and so upstream does; the others never round: tensor operations one after the other, or the program
of `fused_crops`, compiled, which moves a fifth of the memory. The outcomes of OpenCV and of the others differ by 0.4 of
255 levels on average and by at most 3 for 99.9 % of values (99.8 % where pictures are noisy and colours saturated).

Dimension key:  B pictures, R crops (all crops of one size of a batch), S crop side
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2.data import fused_crops, image_ops, image_ops_uint8
from dinov2.data.crop_parameters import AugmentationSettings, CropParameters
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD

# Values, of pictures read and crops made, that tensors work on at a time: fills a GPU and bounds the memory that is
# used on the way (some five float32 buffers of this size).
CHUNK_VALUES = 2**26

# In the order of JITTER_NAMES.
UINT8_JITTER = (
    image_ops_uint8.adjust_brightness,
    image_ops_uint8.adjust_contrast,
    image_ops_uint8.adjust_saturation,
    image_ops_uint8.adjust_hue,
)
Operation = Callable[..., Tensor]  # (crops [n, S, 3, S], parameters [n], ...) -> crops; may overwrite them
TENSOR_JITTER: tuple[Operation, ...] = (
    image_ops.adjust_brightness_,
    image_ops.adjust_contrast_,
    image_ops.adjust_saturation_,
    image_ops.adjust_hue_,
)


def apply_crops(
    images: Tensor,
    crops: CropParameters,
    size: int,
    settings: AugmentationSettings,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> Tensor:
    """Make the crops that `crops` describes.

    Args:
        images: uint8 [B, 3, H, W] on any device, of any memory layout; on a CPU channels-last is the fast one.
        crops: R crops of these pictures.
        size: S, the crops' side.
        settings: `blur_kernel_size` and `solarize_threshold` are read from it.
        dtype: of the crops, float32 or shorter; the work itself is the same.
        compiled: on a device other than the CPU, let `torch.compile` make a few kernels of all operations. Takes a
            while at the first batch of each shape, and a C compiler.

    Returns:
        [R, 3, S, S] on the pictures' device, normalised with ImageNet's mean and standard deviation.
    """
    if images.device.type == "cpu":
        return apply_crops_with_opencv(images, crops, size, settings, dtype)
    make = apply_crops_compiled if compiled else apply_crops_as_tensors
    return make(images, crops, size, settings, dtype)


def apply_crops_with_opencv(
    images: Tensor,
    crops: CropParameters,
    size: int,
    settings: AugmentationSettings,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`apply_crops` for pictures on the CPU, one crop at a time, by as many threads as torch has."""
    pictures = images.permute(0, 2, 3, 1).numpy()  # a view
    # NumPy asks the system for huge pages, torch does not: first touching a batch's memory took a third of all time.
    made = np.empty((len(crops), 3, size, size), dtype=np.float32)
    drawn = SimpleNamespace(**{name: values.tolist() for name, values in vars(crops).items()})

    def make(i: int) -> None:
        crop = image_ops_uint8.crop_resize(pictures[drawn.picture[i]], drawn.box[i], size)
        if drawn.rotated[i]:
            crop = image_ops_uint8.rotate(crop, drawn.angle[i], round(255 * drawn.fill[i]))
        crop = image_ops_uint8.flip(crop, drawn.hflip[i], drawn.vflip[i])
        if drawn.quarter_turn[i]:
            crop = image_ops_uint8.quarter_turn(crop)
        if drawn.jittered[i]:
            for number in drawn.jitter_order[i]:
                crop = UINT8_JITTER[number](crop, drawn.jitter_strength[i][number])
        if drawn.grayscale[i]:
            crop = image_ops_uint8.to_grayscale(crop)
        if drawn.blurred[i]:
            crop = image_ops_uint8.gaussian_blur(crop, drawn.sigma[i], settings.blur_kernel_size)
        if drawn.solarized[i]:
            crop = image_ops_uint8.solarize(crop, settings.solarize_threshold)
        image_ops_uint8.normalize(crop, made[i])

    n_threads = min(torch.get_num_threads(), len(crops))

    def make_share(first: int) -> None:
        for i in range(first, len(crops), n_threads):
            make(i)

    if n_threads == 1:
        make_share(0)
    else:
        # One task a thread: a task for each crop cost a tenth more. Threads that outlived the call would be missing in
        # a process forked later, and waited for in vain.
        with ThreadPoolExecutor(n_threads) as threads:
            list(threads.map(make_share, range(n_threads)))
    return torch.from_numpy(made).to(dtype)


def apply_crops_as_tensors(
    images: Tensor,
    crops: CropParameters,
    size: int,
    settings: AugmentationSettings,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`apply_crops` on any device; nothing waits for the device, as which crop gets what is settled on the CPU."""
    return _in_chunks(_operations_on_chunk, images, crops, size, settings, dtype)


def apply_crops_compiled(
    images: Tensor,
    crops: CropParameters,
    size: int,
    settings: AugmentationSettings,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`apply_crops` on any device for which torch has a compiler; nothing waits for the device."""
    return _in_chunks(_program_on_chunk, images, crops, size, settings, dtype)


def _in_chunks(
    make: Callable[..., Tensor],
    images: Tensor,
    crops: CropParameters,
    size: int,
    settings: AugmentationSettings,
    dtype: torch.dtype,
) -> Tensor:
    """All crops of some pictures at a time."""
    per_picture = 3 * (size * size * math.ceil(len(crops) / len(images)) + images.shape[2] * images.shape[3])
    n_chunks = math.ceil(len(images) / max(1, CHUNK_VALUES // per_picture))
    if n_chunks == 1:
        return make(images, crops, size, settings, dtype)
    output = torch.empty(len(crops), 3, size, size, device=images.device, dtype=dtype)
    chunk = math.ceil(len(images) / n_chunks)  # of equal sizes if possible: each other one is compiled again
    for start in range(0, len(images), chunk):
        rows = ((crops.picture >= start) & (crops.picture < start + chunk)).nonzero().flatten()
        here = crops.select(rows)
        made = make(images[start : start + chunk], replace(here, picture=here.picture - start), size, settings, dtype)
        [[rows]] = _send([[rows]], images.device)
        output.index_copy_(0, rows, made)
    return output


def _program_on_chunk(
    images: Tensor, crops: CropParameters, size: int, settings: AugmentationSettings, dtype: torch.dtype
) -> Tensor:
    numbers = fused_crops.program_of(crops, settings.blur_kernel_size, settings.solarize_threshold)
    [sent] = _send([list(numbers)], images.device)
    return fused_crops.run_compiled(images, fused_crops.Program(*sent), size, dtype)


def _operations_on_chunk(
    images: Tensor, crops: CropParameters, size: int, settings: AugmentationSettings, dtype: torch.dtype
) -> Tensor:
    device = images.device
    height, width = images.shape[2:]
    # A quarter turn is a left-right flip, made with the cut, and a transposition, the first step of the plan.
    top, left, box_height, box_width = crops.box.unbind(dim=1)
    per_std = 1 / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    constants = [-torch.tensor(IMAGENET_MEAN).view(3, 1, 1) * per_std, per_std]
    [[picture, top, box_height, vflip, left, box_width, hflip], [offset, per_std]] = _send(
        [[crops.picture, top, box_height, crops.vflip, left, box_width, crops.hflip ^ crops.quarter_turn], constants],
        device,
    )
    rows, row_weights = image_ops.resize_taps(top, box_height, vflip, size, height)
    columns, column_weights = image_ops.resize_taps(left, box_width, hflip, size, width)
    column_weights /= 255
    work = image_ops.crop_resize(images, picture, (rows, row_weights), (columns, column_weights)).clamp_(0.0, 1.0)
    work = _carry_out(_plan(crops, settings), work)
    output = torch.empty(len(crops), 3, size, size, device=device, dtype=dtype)
    return torch.addcmul(offset, work.transpose(1, 2), per_std, out=output)


class _Step(NamedTuple):
    """One operation on some crops of a chunk."""

    operation: Operation
    rows: Tensor | None  # int64 [n], which crops; None: all
    arguments: tuple[Tensor, ...]  # [n] each


def _plan(crops: CropParameters, settings: AugmentationSettings) -> list[_Step]:
    """All steps after the cut, in order; steps that no crop gets are left out."""

    def blur(pictures: Tensor, sigma: Tensor) -> Tensor:
        return image_ops.gaussian_blur(pictures, sigma, settings.blur_kernel_size)

    def solarize(pictures: Tensor) -> Tensor:
        return image_ops.solarize_(pictures, settings.solarize_threshold / 255)

    steps: list[_Step] = []

    def add(operation: Operation, chosen: list[bool], *arguments: Tensor) -> None:
        if all(chosen):
            steps.append(_Step(operation, None, arguments))
        elif any(chosen):
            rows = torch.tensor([row for row, is_chosen in enumerate(chosen) if is_chosen])
            steps.append(_Step(operation, rows, tuple(values[rows] for values in arguments)))

    add(image_ops.transpose, crops.quarter_turn.tolist())
    # The recipe rotates, then mirrors. After the mirroring, the same rotation goes the other way if only one axis was.
    degrees = torch.where(crops.hflip ^ crops.vflip, -crops.angle, crops.angle)
    radians = torch.deg2rad(degrees.double())
    add(image_ops.rotate, crops.rotated.tolist(), radians.cos().float(), radians.sin().float(), crops.fill)
    jittered = crops.jittered.tolist()
    for numbers in crops.jitter_order.T.tolist():
        for number, operation in enumerate(TENSOR_JITTER):
            chosen = [is_jittered and number == its for is_jittered, its in zip(jittered, numbers, strict=True)]
            add(operation, chosen, crops.jitter_strength[:, number])
    add(image_ops.to_grayscale_, crops.grayscale.tolist())
    add(blur, crops.blurred.tolist(), crops.sigma)
    add(solarize, crops.solarized.tolist())
    return steps


def _carry_out(steps: list[_Step], work: Tensor) -> Tensor:
    """Take the crops [R, S, 3, S] through the steps; `work` is overwritten."""
    on_device = _send([[*([] if step.rows is None else [step.rows]), *step.arguments] for step in steps], work.device)
    for step, sent in zip(steps, on_device, strict=True):
        if step.rows is None:
            work = step.operation(work, *sent)
        else:
            rows, *arguments = sent
            work.index_copy_(0, rows, step.operation(work.index_select(0, rows), *arguments))
    return work


def _send(groups: list[list[Tensor]], device: torch.device) -> list[list[Tensor]]:
    """Copy many small CPU tensors to `device`, one transfer per type, without waiting for it.

    A copy to a GPU is asynchronous only from pinned memory.
    """
    if device.type == "cpu":
        return groups
    sent: dict[int, Tensor] = {}
    tensors = [tensor for group in groups for tensor in group]
    for dtype in {tensor.dtype for tensor in tensors}:
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        packed = torch.cat([tensor.flatten() for tensor in same])
        packed = (packed.pin_memory() if device.type == "cuda" else packed).to(device, non_blocking=True)
        for tensor, values in zip(same, packed.split([tensor.numel() for tensor in same]), strict=True):
            sent[id(tensor)] = values.view(tensor.shape)
    return [[sent[id(tensor)] for tensor in group] for group in groups]

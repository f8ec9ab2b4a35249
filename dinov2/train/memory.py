"""What training steps take in memory and time: estimated, measured, and the largest batch that fits.

Dimension key:  B images that a process has at a time (train.batch_size_per_gpu), K prototypes of a head
"""

import bisect
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.distributed.tensor import DTensor

from dinov2 import distributed
from dinov2.data.datasets.hema_data import HemaStandardDataset
from dinov2.fsdp.precision import resolve_dtype
from dinov2.layers.block import Block
from dinov2.train.batches import TrainBatches, resolve_batch_size
from dinov2.train.optimizer import StepGuard, build_optimizer, clip_gradients
from dinov2.train.schedules import Schedules, StepSettings
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.memory import PeakMemory, memory_room, size_text

logger = logging.getLogger("dinov2")

MARGIN = 0.1  # share of the room that stays free: fragments, data workers, evaluation, masks that differ
MAX_IMAGES = 2**16
N_SMALL = 8  # images of the larger of the small steps that a dry run measures
N_SMALL_TRIED = 6  # steps of growing size that are extrapolated from, at most
_STUDENT_ROWS = 256  # of logits that the losses have at a time
_LIBRARIES = 3 * 2**28  # bytes that Python, PyTorch and its kernels take on a CPU

Step = Callable[[int], "StepCost"]  # from B to what it takes


@dataclass(frozen=True)
class StepCost:
    """What a step takes: with B images at a time, all its images, bytes at the peak, seconds; and its losses."""

    batch_size: int
    n_images: int
    peak: int
    seconds: float
    losses: dict[str, float]

    @property
    def images_per_second(self) -> float:
        """Besides decoding and augmentation."""
        return self.n_images / self.seconds


@dataclass(frozen=True)
class Growth:
    """Bytes at the peak as a straight line in the number of images."""

    fixed: float
    per_image: float

    @classmethod
    def through(cls, fewer: StepCost, more: StepCost) -> "Growth":
        per_image = max(0.0, (more.peak - fewer.peak) / (more.batch_size - fewer.batch_size))
        return cls(more.peak - per_image * more.batch_size, per_image)

    def at(self, batch_size: int) -> float:
        return self.fixed + self.per_image * batch_size


class StepTrials:
    """Real training steps of a run, with any batch size; nothing is written, but the weights move."""

    def __init__(self, cfg: DictConfig, model: SSLMetaArch, dataset: HemaStandardDataset) -> None:
        self.model, self.dataset = model, dataset
        self.optimizer = build_optimizer(cfg.optim, model.get_params_groups())
        self.guard = StepGuard(model.device)
        model.backbone_is_frozen = False  # as it may be in the first steps of a run, which then take less

    def step(self, cfg: DictConfig) -> StepCost:
        """Two steps of a settled configuration: the first also warms the device up, the second is timed.

        Raises:
            torch.OutOfMemoryError: they do not fit on the GPU.
        """
        device, train = self.model.device, cfg.train
        if self.model.uses_graphs:
            torch.compiler.reset()  # graphs of earlier sizes keep memory of their own
        now = Schedules(cfg).at(0)
        now.apply_to(self.optimizer)
        with tempfile.TemporaryDirectory() as scratch, PeakMemory(device) as peak:
            batches = TrainBatches(OmegaConf.merge(cfg, {"train": {"output_dir": scratch}}), self.dataset, device)
            for _, parts in zip(range(2), batches.starting_at(), strict=False):
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                started = time.perf_counter()
                losses = self._step(parts, now)
                values = {name: value.item() for name, value in losses.items()}  # waits for the device
                seconds = time.perf_counter() - started
        most = max(distributed.all_gather_objects(peak.bytes))
        n_images = train.batch_size_per_gpu * train.accumulation_steps * distributed.get_world_size()
        return StepCost(train.batch_size_per_gpu, n_images, most, seconds, values)

    def _step(self, parts: Sequence[Mapping[str, Any]], now: StepSettings) -> dict[str, Tensor]:
        model = self.model
        self.optimizer.zero_grad(set_to_none=True)
        losses = model.forward_backward(parts, teacher_temp=now.teacher_temp)
        if model.fp16_scaler is not None:
            model.fp16_scaler.unscale_(self.optimizer)
        norms = clip_gradients(model.student, max_norm=model.cfg.optim.clip_grad)
        self.guard.step(self.optimizer, losses, norms, model.fp16_scaler)
        model.update_teacher(now.teacher_momentum)
        return losses


def measure_steps(cfg: DictConfig, model: SSLMetaArch, dataset: HemaStandardDataset) -> tuple[StepCost | None, str]:
    """A step as configured, or None where it does not fit; and a line for the log about memory.

    Small steps tell what an image costs, and one with half of the prototypes what a prototype does (with one process
    only). A CPU, which would swap, tries the whole step only if by these it fits. The model's weights are given up.
    """
    n_images, alone = cfg.train.batch_size_per_gpu, distributed.get_world_size() == 1
    trials, device = StepTrials(cfg, model, dataset), model.device
    fewest = _fewest_images(cfg, has_others=not alone or cfg.train.accumulation_steps > 1)
    small = max(fewest, min(N_SMALL // 2, n_images // 2))
    fewer, more = (trials.step(_with_images(cfg, n)) for n in (small, 2 * small))
    growth, room = Growth.through(fewer, more), memory_room(device)
    estimates = [estimate_memory_gib(_with_images(cfg, n), model) for n in (2 * small, n_images)]
    whole = next((cost for cost in (fewer, more) if cost.batch_size == n_images), None)
    if whole is None and (device.type == "cuda" or not alone or growth.at(n_images) <= room):
        with suppress(torch.OutOfMemoryError):
            whole = trials.step(cfg)
    need = growth.at(n_images) if whole is None else whole.peak
    how = "would need about" if whole is None else "need"

    prototype = ""
    if alone:
        del trials
        model.to("meta")
        prototype = _prototype_text(cfg, type(model), dataset, device, more)
    text = (
        f"memory    measured {size_text(more.peak)} at {2 * small} images (estimated from shapes: {estimates[0]:.1f} "
        f"GiB), {size_text(growth.per_image)} an image{prototype}; {n_images} images {how} {size_text(need)} "
        f"(estimated: {estimates[1]:.1f} GiB) of {size_text(room)}"
    )
    return whole, text


def _prototype_text(
    cfg: DictConfig, kind: type[SSLMetaArch], dataset: HemaStandardDataset, device: torch.device, whole: StepCost
) -> str:
    """What of the peak of `whole` is for a prototype of a head: from a step of as many images with half of them."""
    halved = _with_images(cfg, whole.batch_size)
    n_fewer = 0
    for section in (halved.dino, halved.ibot) if halved.ibot.separate_head else (halved.dino,):
        n_fewer += section.head_n_prototypes // 2
        section.head_n_prototypes -= section.head_n_prototypes // 2
    model = kind(halved, load_weights=False).to(device)
    model.prepare_for_distributed_training()  # compiled, if the whole one is
    if model.fp16_scaler is not None:
        model.fp16_scaler.to(device)
    cost = StepTrials(halved, model, dataset).step(halved)
    return f", {size_text(max(0, whole.peak - cost.peak) / n_fewer)} a prototype"


def _with_images(cfg: DictConfig, batch_size: int) -> DictConfig:
    """The settled configuration with another B, in as many parts; decoded in this process, which takes no workers."""
    if batch_size == cfg.train.batch_size_per_gpu:
        return cfg.copy()
    changed = cfg.copy()
    changed.train.batch_size_per_gpu, changed.train.num_workers = batch_size, 0
    changed.train.global_batch_size = batch_size * cfg.train.accumulation_steps * distributed.get_world_size()
    return changed


def _fewest_images(cfg: DictConfig, *, has_others: bool) -> int:
    """The smallest B: KoLeo needs two to compare, unless a step `has_others` to compare with."""
    is_free = cfg.dino.koleo_loss_weight == 0 or (cfg.dino.koleo_loss_distributed and has_others)
    return 1 if is_free else 2


def batch_sizes(cfg: DictConfig) -> Sequence[int]:
    """Sizes that `train.batch_size_per_gpu` may have in one process; `cfg` is as given, not yet settled."""
    train = cfg.train
    has_others = train.global_batch_size is not None or (train.accumulation_steps or 1) > 1
    fewest = _fewest_images(cfg, has_others=has_others)
    if train.global_batch_size is None:
        return range(fewest, MAX_IMAGES + 1)
    if train.accumulation_steps is not None:
        return [settled(cfg, train.global_batch_size).train.batch_size_per_gpu]
    return [n for n in range(fewest, train.global_batch_size + 1) if train.global_batch_size % n == 0]


def settled(cfg: DictConfig, batch_size: int) -> DictConfig:
    """The configuration with `batch_size` as train.batch_size_per_gpu, and what follows from it, for one process."""
    changed = cfg.copy()
    changed.train.batch_size_per_gpu, changed.train.num_workers = batch_size, 0
    resolve_batch_size(changed.train, world_size=1)
    return changed


def find_batch_size(cfg: DictConfig, model: SSLMetaArch, dataset: HemaStandardDataset) -> int | None:
    """The largest `train.batch_size_per_gpu` whose step leaves MARGIN of the free memory; None where no step does.

    A GPU tries sizes until one does not fit. A CPU would swap, or its process be killed: there the sizes follow from
    the growth over small steps. With `train.global_batch_size` sizes are its divisors, in as many parts as they need.

    Args:
        cfg: as given, before resolve_batch_size.
    """
    device, sizes = model.device, batch_sizes(cfg)
    trials = StepTrials(settled(cfg, sizes[0]), model, dataset)

    def step(batch_size: int) -> StepCost:
        cost = trials.step(settled(cfg, batch_size))
        speed = f"{cost.images_per_second:.3g} images/s besides decoding"
        logger.info("%6d images: fit, %s at the peak, %s", batch_size, size_text(cost.peak), speed)
        return cost

    room = memory_room(device)
    limit = (1 - MARGIN) * room
    logger.info(
        "looking for the largest batch that needs at most %s: %.0f %% of the %s that are there; %.0f %% stay free for "
        "what differs between steps",
        *(size_text(limit), 100 * (1 - MARGIN), size_text(room), 100 * MARGIN),
    )
    if device.type != "cuda":
        return largest_by_extrapolation(
            step, sizes, limit, lambda n: estimate_memory_gib(settled(cfg, n), model) * 2**30
        )
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    try:
        return largest_by_trying(step, sizes)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def largest_by_trying(step: Step, sizes: Sequence[int]) -> int | None:
    """The largest of the ascending `sizes` whose step raises no torch.OutOfMemoryError, to 3 %; None if all do.

    Doubles from N_SMALL images on until one does not fit, then halves the gap.
    """

    def fits(index: int) -> bool:
        try:
            step(sizes[index])
        except torch.OutOfMemoryError:
            logger.info("%6d images: do not fit", sizes[index])
            return False
        return True

    # Sizes up to that at `low` fit, those from that at `high` on do not
    low, high = -1, len(sizes)
    trying = min(bisect.bisect_left(sizes, N_SMALL), high - 1)
    while low < high - 1:
        if fits(trying):
            low = trying
        else:
            high = trying
        if high == len(sizes):
            trying = min(max(low + 1, bisect.bisect_left(sizes, 2 * sizes[low])), high - 1)
        elif low >= 0 and sizes[high] - sizes[low] <= max(1, sizes[low] // 32):
            break
        else:
            trying = (low + high) // 2
    return sizes[low] if low >= 0 else None


def largest_by_extrapolation(
    step: Step, sizes: Sequence[int], limit: float, estimate: Callable[[int], float]
) -> int | None:
    """The largest of the ascending `sizes` that needs at most `limit` bytes, by the growth over small steps.

    Small steps double until their growth is steady: the peak of very small ones may lie elsewhere, in the optimizer's
    step or the teacher's pass, and grow less. An image counts as half of what `estimate` says it takes at the least. No
    step is tried that may need more than half of `limit`, except the first.

    Args:
        estimate: from B to bytes.
    """
    if estimate(sizes[0]) > limit:
        logger.info("%6d images: would need about %s, not tried", sizes[0], size_text(estimate(sizes[0])))
        return None
    costs, growth = [step(sizes[0])], Growth(0.0, 0.0)
    for size in _doubling(sizes):
        if max(estimate(size), growth.at(size)) > limit / 2 or len(costs) == N_SMALL_TRIED:
            break
        costs.append(step(size))
        before, growth = growth, Growth.through(*costs[-2:])
        least = (estimate(size) - estimate(sizes[0])) / (size - sizes[0]) / 2
        if growth.per_image >= least and 0 < growth.per_image <= 1.05 * before.per_image:
            break
    last = costs[-1]
    if sizes[-1] > last.batch_size:
        least = (estimate(sizes[-1]) - estimate(last.batch_size)) / (sizes[-1] - last.batch_size) / 2
        per_image = max(growth.per_image, least)
        growth = Growth(last.peak - per_image * last.batch_size, per_image)
        logger.info("by these each image beyond %d takes %s more", last.batch_size, size_text(growth.per_image))
    else:
        growth = Growth(last.peak, 0.0)
    fitting = bisect.bisect_right(sizes, limit, key=growth.at)
    return sizes[fitting - 1] if fitting else None


def _doubling(sizes: Sequence[int]) -> Iterator[int]:
    """Of ascending sizes the first that is at least twice the first one, then that is twice as large, and so on."""
    index = bisect.bisect_left(sizes, 2 * sizes[0])
    while index < len(sizes):
        yield sizes[index]
        index = bisect.bisect_left(sizes, 2 * sizes[index])


def estimate_memory_gib(cfg: Any, model: SSLMetaArch) -> float:
    """Peak memory of a training step of the settled `cfg` on each device, estimated from shapes.

    Left out are the allocator's fragments, the pictures themselves, work space of matrix products and, on a CPU, the
    data workers.
    """
    device_type = model.device.type
    name = cfg.compute_precision.student.backbone.mixed_precision.param_dtype
    width = torch.finfo(resolve_dtype(name, device_type)).bits // 8
    n_student, n_teacher = _held(model.student.parameters()), _held(model.teacher.parameters())
    learned = {name: _held(p for p in part.parameters() if p.requires_grad) for name, part in model.student.items()}
    n_learned = sum(learned.values())
    # fp32: student, two moments, teacher; and what autocast makes of the student's
    always = 4 * (n_student + 2 * n_learned + n_teacher) + (width * n_student if width < 4 else 0)

    batch, patch = cfg.train.batch_size_per_gpu, cfg.student.patch_size
    backbone = model.teacher_backbone  # the student has the same shape
    extra, crops = 1 + backbone.num_register_tokens, cfg.crops
    sequences = [
        (2 * batch, (crops.global_crops_size // patch) ** 2 + extra),
        (crops.local_crops_number * batch, (crops.local_crops_size // patch) ** 2 + extra),
    ]
    tokens = sum(n * length for n, length in sequences)
    # What a block keeps for its backward pass, a channel and token: the inputs of both branches in fp32; q, k, v, the
    # attention's output and four times the width in the MLP. On a GPU, by the modules, also both norms' outputs, both
    # branches before layer scale, and the other side of the GELU.
    kept = tokens * backbone.embed_dim * (8 + (8 if device_type == "cpu" else 16) * width)
    # Computed again in backward, a block keeps its input only, and one of them at a time the rest
    student_blocks = [module for module in model.student["backbone"].modules() if isinstance(module, Block)]
    n_again = sum(block.checkpoint_activations for block in student_blocks)
    n_kept = backbone.n_blocks - n_again
    activations = max(n_kept, 1) * kept + n_again * 4 * tokens * backbone.embed_dim

    # Of the teacher's logits one copy of all rows of all parts is kept, of the student's a few rows at a time
    cls_rows = (2 + cfg.crops.local_crops_number) * batch
    teacher_rows = 2 * batch * cfg.train.accumulation_steps
    masked = 2 * batch * cfg.ibot.mask_sample_probability * sum(cfg.ibot.mask_ratio_min_max) / 2
    patch_rows = masked * (cfg.crops.global_crops_size // patch) ** 2 if model.do_ibot else 0
    patch_prototypes = (cfg.ibot if model.ibot_separate_head else cfg.dino).head_n_prototypes
    targets = teacher_rows * cfg.dino.head_n_prototypes * model.do_dino
    targets += patch_rows * cfg.train.accumulation_steps * patch_prototypes
    chunk = max(
        min(cls_rows, _STUDENT_ROWS) * cfg.dino.head_n_prototypes * model.do_dino,
        min(patch_rows, _STUDENT_ROWS) * patch_prototypes,
    )
    # The peak is before backward begins, with targets and the gradients of the heads alone, or where it ends, with all
    # gradients
    begins = activations + 4 * (targets + chunk + n_learned - learned["backbone"])
    ends = 4 * n_learned
    base = _LIBRARIES if device_type == "cpu" else 0
    return (base + always + max(begins, ends)) / 2**30


def _held(parameters: Iterable[Tensor]) -> int:
    """Weights that this process holds for good: of sharded ones its part."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)

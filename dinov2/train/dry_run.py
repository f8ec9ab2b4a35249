"""Measure the cost of a training step (arithmetic, seconds, memory), for `--dry-run` and `--find-batch-size`.

Dimension key:  B images of a micro-batch (train.batch_size_per_gpu), P patches of a global crop
"""

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.nn import parameter_count_table
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dinov2 import distributed
from dinov2.data.augmentations import N_GLOBAL_CROPS
from dinov2.data.datasets.hema_data import HemaStandardDataset
from dinov2.layers import DINOHead
from dinov2.train.batches import TrainBatches, resolve_batch_size
from dinov2.train.distillation import build_frozen_teacher
from dinov2.train.micro_batches import forward_backward
from dinov2.train.optimizer import StepGuard, build_optimizer, clip_gradients
from dinov2.train.schedules import Schedules
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.resources import PeakMemory, memory_limit, resident_memory, size_text

logger = logging.getLogger("dinov2")

MARGIN = 0.1  # share of the free memory that stays free: for fragments, data workers, evaluation, other masks
MAX_IMAGES = 2**16
N_SMALL = 8  # images of the larger of the two small steps that a dry run measures
VISIBLE_GROWTH = 1.5  # peak over that of the smallest step, above which the memory of an image can be measured

Step = Callable[[int], "StepCost"]  # from B to its cost


# --- arithmetic -----------------------------------------------------------------------------------------------------


def count_step_flops(cfg: Any, *, backbone_is_frozen: bool = False) -> int:
    """Count the floating-point operations in the matrix products of one process's step, on the "meta" device.

    They are those of the backbones on all tokens, of heads and prototypes, forward and backward. Losses,
    Sinkhorn-Knopp and optimizer take time, but are about a hundredth of the arithmetic. `cfg` has resolved batch sizes.
    """
    crops, ibot, batch_size = cfg.crops, cfg.ibot, cfg.train.batch_size_per_gpu
    with torch.device("meta"):
        frozen = build_frozen_teacher(cfg)
        model = SSLMetaArch(cfg, load_weights=False, frozen_teacher=frozen)
        for head in (*model.student.values(), *model.teacher.values()):
            if isinstance(head, DINOHead):  # "meta" has no autocast for its weight norm; the product is the same
                layer = head.last_layer
                head.add_module("last_layer", nn.Linear(layer.in_features, layer.out_features, bias=False))
        batches = [torch.empty(N_GLOBAL_CROPS * batch_size, 3, crops.global_crops_size, crops.global_crops_size)]
        if crops.local_crops_number:
            n_crops, size = crops.local_crops_number * batch_size, crops.local_crops_size
            batches.append(torch.empty(n_crops, 3, size, size))
    grid = crops.global_crops_size // cfg.student.patch_size
    n_patches = grid**2
    masked_share = ibot.mask_sample_probability * sum(ibot.mask_ratio_min_max) / 2
    n_masked = round(len(batches[0]) * n_patches * masked_share)

    def sum_of_logits(networks: nn.ModuleDict, tokens: Sequence[Mapping[str, Tensor]]) -> Tensor:
        total = torch.zeros((), device="meta")
        if model.do_dino:
            total = total + networks["dino_head"](torch.cat([each["x_norm_clstoken"] for each in tokens])).sum()
        if model.do_ibot:
            head = networks["ibot_head" if model.ibot_separate_head else "dino_head"]
            total = total + head(tokens[0]["x_norm_patchtokens"].flatten(0, 1)[:n_masked]).sum()
        if model.do_lejepa and networks is model.student:
            total = total + networks["lejepa_head"](torch.cat([each["x_norm_clstoken"] for each in tokens])).sum()
        if model.do_distillation and networks is model.student:
            made = networks["distillation_head"](tokens[0]["x_norm_clstoken"], tokens[0]["x_norm_patchtokens"])
            total = total + made[0].sum() + made[1].sum()
        if model.do_metadata and networks is model.student:
            total = total + networks["metadata_head"](tokens[0]["x_norm_clstoken"]).sum()
        return total

    with FlopCounterMode(display=False) as counter:
        if model.has_targets:
            with torch.no_grad():
                sum_of_logits(model.teacher, [model.teacher["backbone"](batches[0], is_training=True)])
        if frozen is not None:
            size = grid * frozen.patch_size
            with torch.no_grad():
                frozen(torch.empty(len(batches[0]), 3, size, size, device="meta"), is_training=True)
        with torch.set_grad_enabled(not backbone_is_frozen):
            tokens = model.student["backbone"](batches, masks=[None] * len(batches), is_training=True)
        sum_of_logits(model.student, tokens).backward()
    return counter.get_total_flops() * int(cfg.train.accumulation_steps)


@torch.no_grad()
def measured_matmul_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """Measure the rate in FLOP/s at which the device multiplies large square matrices of `dtype`.

    Unlike a data sheet's value it depends on this machine's clock, cores, libraries and matmul precision.
    """
    device = torch.device(device)
    side = 16384 // dtype.itemsize if device.type == "cuda" else 1024
    # random numbers as in training: a GPU multiplies zeros at a higher clock
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def seconds() -> float:
        started = time.perf_counter()
        torch.mm(a, b.T, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    seconds()  # selects a kernel
    return 2 * side**3 / statistics.median(seconds() for _ in range(9))


# --- real steps -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepCost:
    """Cost of a step."""

    batch_size: int  # B
    n_images: int  # of the global batch
    before: int  # bytes in use before the step
    peak: int  # bytes in use at its peak
    seconds: float  # without decoding
    losses: dict[str, float]


class StepTrials:
    """Runs real training steps with any batch size; it writes no files, but changes the weights."""

    def __init__(self, cfg: DictConfig, model: SSLMetaArch, dataset: HemaStandardDataset) -> None:
        self.model, self.dataset = model, dataset
        self.optimizer = build_optimizer(cfg.optim, model.get_params_groups())
        self.guard = StepGuard(model.device)
        model.backbone_is_frozen = False  # steps with a frozen backbone take less

    def step(self, cfg: DictConfig) -> StepCost:
        """Run two steps of a resolved configuration: the first warms the device up, the second is timed."""
        model, device, train = self.model, self.model.device, cfg.train
        now = Schedules(cfg).at(0)
        now.apply_to(self.optimizer)
        with tempfile.TemporaryDirectory() as scratch, PeakMemory(device) as peak:
            before = resident_memory()
            batches = TrainBatches(OmegaConf.merge(cfg, {"train": {"output_dir": scratch}}), self.dataset, device)
            for _, micro_batches in zip(range(2), batches.starting_at(), strict=False):
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                started = time.perf_counter()
                with _memory_error_on_all_ranks():
                    self.optimizer.zero_grad(set_to_none=True)
                    losses = forward_backward(model, micro_batches, now.teacher_temp)
                    if model.fp16_scaler is not None:
                        model.fp16_scaler.unscale_(self.optimizer)
                    norms = clip_gradients(model.student, max_norm=cfg.optim.clip_grad)
                    self.guard.step(self.optimizer, losses, norms, model.fp16_scaler)
                    model.update_teacher(now.teacher_momentum)
                values = {name: value.item() for name, value in losses.items()}  # waits for the device
                seconds = time.perf_counter() - started
        n_images = train.batch_size_per_gpu * train.accumulation_steps * distributed.get_world_size()
        highest = max(distributed.all_gather_objects(peak.bytes))
        return StepCost(train.batch_size_per_gpu, n_images, before, highest, seconds, values)


@contextmanager
def _memory_error_on_all_ranks() -> Iterator[None]:
    """Raise OutOfMemoryError on every rank if one runs out of memory: on GPUs, the others would wait for it."""
    does_not_fit = False
    try:
        yield
    except torch.OutOfMemoryError:
        does_not_fit = True
    if distributed.any_rank(does_not_fit):
        raise torch.OutOfMemoryError("a step does not fit into the memory of each rank")


def growth_per_image(fewer: StepCost, more: StepCost) -> float:
    """Estimate the peak memory in bytes per added image, at least 0, from a step with `fewer` and one with `more`."""
    return max(0.0, (more.peak - fewer.peak) / (more.batch_size - fewer.batch_size))


def dry_run(cfg: DictConfig, model: SSLMetaArch, dataset: HemaStandardDataset) -> int:
    """Log the networks' parameters and the cost of real steps; the weights are useless afterwards.

    Two small steps show the cost of an image. On a CPU, which would swap, the run's batch is tried only if it fits.
    Return the exit code: 1 if the run's batch does not fit into the memory.
    """
    logger.info("the student's parameters\n%s", parameter_count_table(model.student, max_depth=2))
    logger.info("flops     %.3g TFLOP in matrix products of a step of each process", count_step_flops(cfg) / 1e12)
    batch_size, limit = cfg.train.batch_size_per_gpu, memory_limit(model.device)
    n_processes = distributed.get_world_size()
    trials, whole, need = StepTrials(cfg, model, dataset), None, "do not fit, and fewer do not either"
    other_sizes = cfg.copy()
    other_sizes.train.global_batch_size = None
    fewest = _smallest_batch_size(cfg, has_others=n_processes > 1 or cfg.train.accumulation_steps > 1)
    small = max(fewest, min(N_SMALL, batch_size) // 2)
    with suppress(torch.OutOfMemoryError):
        fewer, more = (trials.step(_set_batch_size(other_sizes, n, n_processes)) for n in (small, 2 * small))
        per_image = growth_per_image(fewer, more)
        expected = more.peak + per_image * (batch_size - more.batch_size)
        need = f"would need about {size_text(expected)}, {size_text(per_image)} for each image"
        if model.device.type == "cuda" or n_processes > 1 or expected <= limit:
            whole = trials.step(cfg)
            need = f"need {size_text(whole.peak)}, {size_text(per_image)} for each image"
    logger.info("memory    measured: %d images %s; there are %s", batch_size, need, size_text(limit))
    if whole is None:
        logger.error(
            "train.batch_size_per_gpu=%d does not fit; --find-batch-size looks for one that does, and "
            "train.activation_checkpointing=1 or fewer head_n_prototypes need less memory",
            batch_size,
        )
        return 1
    logger.info("one step works: %s", "  ".join(f"{name} {value:.4f}" for name, value in whole.losses.items()))
    hours = whole.seconds * Schedules(cfg).n_iterations / 3600
    logger.info("a step takes about %.2f s without decoding, so the run at least %.1f h", whole.seconds, hours)
    return 0


# --- the largest batch ----------------------------------------------------------------------------------------------


def find_batch_size(cfg: DictConfig, model: SSLMetaArch, dataset: HemaStandardDataset) -> int | None:
    """Find the largest `train.batch_size_per_gpu` whose step leaves MARGIN of the memory free; None if no step does.

    It is extrapolated from the peaks of small steps. A GPU, which does not swap as a CPU does, then tries it, and
    smaller sizes if it does not fit. With `train.global_batch_size` the sizes are its divisors. `cfg` is not resolved.
    """
    sizes, available = batch_sizes(cfg), memory_limit(model.device)
    trials = StepTrials(_set_batch_size(cfg, sizes[0]), model, dataset)
    limit = (1 - MARGIN) * available

    def step(batch_size: int) -> StepCost:
        cost = trials.step(_set_batch_size(cfg, batch_size))
        text = "%6d images: fit, %s at the peak, %.3g images/s without decoding"
        logger.info(text, batch_size, size_text(cost.peak), cost.n_images / cost.seconds)
        return cost

    text = "looking for the largest batch that needs at most %s of %s: %.0f %% stay free, since steps differ"
    logger.info(text, size_text(limit), size_text(available), 100 * MARGIN)
    with suppress(torch.OutOfMemoryError):
        size = largest_by_extrapolation(step, sizes, limit)
        return size if model.device.type != "cuda" else largest_that_fits(step, [n for n in sizes if n <= (size or 0)])
    return None


def largest_that_fits(step: Step, sizes: Sequence[int]) -> int | None:
    """Return the largest of the ascending `sizes` whose step raises no torch.OutOfMemoryError, to 10 %."""
    while sizes:
        try:
            step(sizes[-1])
            return sizes[-1]
        except torch.OutOfMemoryError:
            logger.info("%6d images: do not fit", sizes[-1])
            sizes = [n for n in sizes if n <= 0.9 * sizes[-1]]
    return None


def largest_by_extrapolation(step: Step, sizes: Sequence[int], limit: float) -> int | None:
    """Estimate the largest of the ascending `sizes` that needs at most `limit` bytes, or None if none fits.

    It runs small steps, each at least twice as large as the last, until the peak is 1.5 times the first one: in very
    small steps the optimizer's memory may be the peak. It extrapolates from there. Doubling stops earlier if the next
    step might exceed the limit, so only the first step can: twice the images add at most twice the memory.
    """
    first = last = step(sizes[0])
    growth = (first.peak - first.before) / first.batch_size  # bytes an image, at most
    for size in sizes:
        if size < 2 * last.batch_size:
            continue
        if last.before + growth * size > limit:
            break
        last, earlier = step(size), last
        growth = (last.peak - last.before) / last.batch_size
        if last.peak >= VISIBLE_GROWTH * first.peak:
            growth = growth_per_image(earlier, last)
            break
    logger.info("each image beyond %d takes %s more", last.batch_size, size_text(growth))
    return max((n for n in sizes if last.peak + growth * (n - last.batch_size) <= limit), default=None)


def batch_sizes(cfg: DictConfig) -> Sequence[int]:
    """Return the possible values of `train.batch_size_per_gpu` in one process; `cfg` is not yet resolved."""
    total, accumulation_steps = cfg.train.global_batch_size, cfg.train.accumulation_steps
    if total is not None and accumulation_steps is not None:
        return [_set_batch_size(cfg, total).train.batch_size_per_gpu]
    fewest = _smallest_batch_size(cfg, has_others=total is not None or (accumulation_steps or 1) > 1)
    if total is None:
        return range(fewest, MAX_IMAGES + 1)
    return [n for n in range(fewest, total + 1) if total % n == 0]


def _smallest_batch_size(cfg: DictConfig, *, has_others: bool) -> int:
    """Return the smallest B: KoLeo compares two images, of this micro-batch or of others in the global batch."""
    return 1 if cfg.dino.koleo_loss_weight == 0 or (cfg.dino.koleo_loss_distributed and has_others) else 2


def _set_batch_size(cfg: DictConfig, batch_size: int, world_size: int = 1) -> DictConfig:
    """Resolve a configuration for another B; images are decoded in this process."""
    changed = cfg.copy()
    changed.train.batch_size_per_gpu, changed.train.num_workers = batch_size, 0
    resolve_batch_size(changed.train, world_size)
    return changed

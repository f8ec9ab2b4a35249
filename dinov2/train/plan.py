"""The plan that a run logs before it starts: images, batches, passes over the data, learning rate, networks."""

import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.nn import parameter_count

import dinov2
from dinov2.data.datasets.hema_data import HemaStandardDataset
from dinov2.distributed import get_world_size, is_enabled
from dinov2.fsdp.precision import resolve_dtype
from dinov2.hub.downloads import RELEASES
from dinov2.train.batches import build_balance
from dinov2.train.finetuning import count_learned, weights_of
from dinov2.train.schedules import Schedules
from dinov2.train.ssl_meta_arch import SSLMetaArch

N_SETS_SHOWN = 12


def describe_run(cfg: Any, model: SSLMetaArch, dataset: HemaStandardDataset) -> str:
    """Return the plan as a few lines for the start of the log."""
    schedules = Schedules(cfg)
    n_images = len(dataset)
    n, batch, epoch = schedules.n_iterations, schedules.global_batch_size, cfg.train.OFFICIAL_EPOCH_LENGTH
    crops = cfg.crops
    local = (
        f"{crops.local_crops_number} local of {crops.local_crops_size} px" if crops.local_crops_number else "no local"
    )
    precision = cfg.compute_precision.student.backbone.mixed_precision.param_dtype
    dtype = str(resolve_dtype(precision, model.device.type)).removeprefix("torch.")
    frozen = f"; backbone frozen for {schedules.n_backbone_frozen:,} steps" if schedules.n_backbone_frozen else ""
    n_parameters = parameter_count(model.student)
    n_backbone = n_parameters["backbone"]
    lines = [
        f"data      {n_images:,} images in {dataset.source.kind}",
        *describe_sets(cfg, dataset, n * batch),
        f"crops     2 global of {crops.global_crops_size} px, {local}; augmentation {cfg.data_transform}",
        f"schedule  {n:,} steps of {batch} images = {n * batch / n_images:,.1f} passes over the data "
        f"({cfg.optim.epochs:g} epochs of {epoch} steps)",
        f"processes {get_world_size()} x {cfg.train.batch_size_per_gpu} images at a time x "
        f"{cfg.train.accumulation_steps} micro-batches; backbone {_spread(cfg)}",
        f"lr        peak {schedules.peak_lr:.3g} (optim.base_lr {cfg.optim.base_lr:g}, {cfg.optim.scaling_rule}) after "
        f"{schedules.n_warmup:,} warm-up steps, then cosine to {cfg.optim.min_lr:g}; last layers frozen for "
        f"{schedules.n_last_layer_frozen:,} steps{frozen}",
        f"teacher   momentum {cfg.teacher.momentum_teacher:g} to {cfg.teacher.final_momentum_teacher:g}, temperature "
        f"{cfg.teacher.warmup_teacher_temp:g} to {cfg.teacher.teacher_temp:g}, {cfg.train.centering}",
        f"model     {cfg.student.arch}: {n_backbone / 1e6:.1f} backbone + {(n_parameters[''] - n_backbone) / 1e6:.1f} "
        f"heads million parameters, {dtype} on {model.device}{_learned(cfg, model)}",
        f"start     {weights_of(cfg) or _random_start(cfg)}",
    ]
    return "\n".join(lines)


def describe_sets(cfg: Any, dataset: HemaStandardDataset, n_seen: int) -> Iterator[str]:
    """Yield a line for each set, with how often a run of `n_seen` images sees it; nothing where there is one set.

    Of many sets, those with the largest shares and the most repetitions have lines.
    """
    names, sizes = dataset.source.set_names, dataset.source.set_sizes
    balance = build_balance(cfg)
    if len(names) == 1:
        return
    quotas = sizes if balance.is_natural else balance.quotas(names, sizes)
    shares = quotas / quotas.sum()
    passes = n_seen * shares / np.maximum(sizes, 1)
    shown = list(range(len(names)))
    if len(names) > N_SETS_SHOWN:
        largest = np.argsort(-shares, kind="stable")[: N_SETS_SHOWN // 2].tolist()
        repeated = [i for i in np.argsort(-passes, kind="stable").tolist() if i not in largest]
        shown = largest + repeated[: N_SETS_SHOWN - len(largest)]
    width, how = max(len(names[i]) for i in shown), "as many as there are" if balance.is_natural else "as balanced"
    yield f"sets      {len(names)}, seen {how}:"
    for i in shown:
        yield (
            f"          {names[i]:<{width}}  {sizes[i]:>11,} images, {shares[i]:6.2%} of the run's images, "
            f"{passes[i]:,.1f} passes over it"
        )
    rest = np.setdiff1d(np.arange(len(names)), shown)
    if len(rest):
        yield (
            f"          and {len(rest)} more: {sizes[rest].sum():,} images, {shares[rest].sum():.2%} of the run's "
            f"images, at most {passes[rest].max():,.1f} passes"
        )


def _random_start(cfg: Any) -> str:
    name = cfg.student.arch if cfg.student.arch in RELEASES else "<name, file or URL>"
    return f"random weights; student.pretrained_weights={name} would start from trained ones"


def _learned(cfg: Any, model: SSLMetaArch) -> str:
    """Describe what of the backbone learns, where that is not all of it."""
    n_learned, n_plain = count_learned(model.student["backbone"])
    if n_learned == n_plain:
        return ""
    rank = cfg.student.lora.rank
    return f"; of the backbone {n_learned:,} parameters learn" + (f" (LoRA of rank {rank})" if rank else "")


def _spread(cfg: Any) -> str:
    strategy = cfg.compute_precision.student.backbone.sharding_strategy
    how = "on one device" if not is_enabled() else "copied (DDP)" if strategy == "NO_SHARD" else f"sharded ({strategy})"
    share = cfg.train.activation_checkpointing
    which = "activations" if share == 1 else f"activations of {share:.0%} of the blocks"
    return how + (f", {which} computed again in backward" if share else "")


def run_environment(cfg: Any) -> dict[str, str]:
    """Return the seed and the versions of code and libraries, without which a result cannot be repeated."""
    commit = ""
    if shutil.which("git"):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "seed": str(cfg.train.seed),
        "dinov2": dinov2.__version__,
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def describe_environment(cfg: Any) -> str:
    """Return `run_environment` as a line of the log."""
    found = run_environment(cfg)
    code = f"dinov2 {found['dinov2']}" + (f" at {found['commit']}" if found["commit"] else "")
    return f"seed {found['seed']}; {code}; torch {found['torch']}; Python {found['python']}"

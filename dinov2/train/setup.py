"""What happens before the first step: configuration, device, processes, cache, and the plan in the log."""

import argparse
import logging
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.nn import parameter_count
from omegaconf import DictConfig

import dinov2
from dinov2 import distributed
from dinov2.data.datasets.hema_data import HemaStandardDataset
from dinov2.distributed import Launch
from dinov2.fsdp.precision import resolve_dtype, resolve_precision
from dinov2.hub.downloads import RELEASES
from dinov2.models import fixed_settings
from dinov2.train.batches import build_balance, resolve_batch_size
from dinov2.train.finetuning import count_learned, weights_of
from dinov2.train.schedules import Schedules
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.config import load_run_config, missing_keys
from dinov2.utils.cores import available_cores
from dinov2.utils.matmul import fast_matmul
from dinov2.utils.memory import keep_freed_memory
from dinov2.utils.stop_signals import StopSignals

logger = logging.getLogger("dinov2")

N_SETS_SHOWN = 12
WAIT_FOREVER_SECONDS = 7 * 24 * 3600.0  # what train.hang_timeout_seconds=0 means between ranks


def read_settings(args: argparse.Namespace, world_size: int) -> DictConfig:
    """Read the configuration that the command's arguments describe, with every value resolved.

    Raises:
        FileNotFoundError, KeyError, ValueError: a setting that is missing, unknown or wrong.
    """

    def resolve(cfg: DictConfig) -> None:
        resolve_arch(cfg)
        resolve_batch_size(cfg.train, world_size)

    cfg = load_run_config(args.config_file, args.overrides, resolve)
    missing = [key for key in missing_keys(cfg) if not (args.eval_only and key == "train.dataset_path")]
    if missing:
        raise ValueError(f"no value for {', '.join(missing)}; add {missing[0]}=<value> to the command or the file")
    return cfg


def resolve_arch(cfg: DictConfig) -> None:
    """Write what the name student.arch decides into the configuration."""
    for key, value in fixed_settings(cfg.student.arch).items():
        if cfg.student[key] != value:
            logger.info("student.%s is %s, as student.arch=%s says", key, value, cfg.student.arch)
            cfg.student[key] = value


def set_up_device(cfg: DictConfig, launch: Launch | None) -> torch.device:
    """Choose the device and its number formats, and join the processes that were started together."""
    device = pick_device(cfg.train.device, launch)
    resolve_precision(cfg.compute_precision, device.type)
    fast_matmul(cfg.compute_precision.fp32_matmul == "fast", device)
    if device.type == "cpu":
        keep_freed_memory()
    if cfg.train.num_workers > available_cores():
        logger.info("train.num_workers=%d becomes %d, the cores here", cfg.train.num_workers, available_cores())
        cfg.train.num_workers = available_cores()
    if launch is not None:
        distributed.enable(launch, device, cfg.train.hang_timeout_seconds or WAIT_FOREVER_SECONDS)
    return device


def pick_device(name: str, launch: Launch | None) -> torch.device:
    """Return the device of this process: of several processes on a node, each takes the GPU of its number."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"train.device={name}, but PyTorch sees no CUDA device; set train.device=auto or cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train.device must be auto, cpu, cuda or cuda:<n>, found {name!r}") from error
    if device.type != "cuda":
        return device
    n_devices = torch.cuda.device_count()
    if launch is None:
        index = device.index or 0
    elif device.index is not None and launch.local_world_size > 1:
        raise ValueError(f"train.device={name} is one GPU for {launch.local_world_size} processes; set it to auto")
    else:
        # a SLURM step may show each of its processes only its own GPU
        index = 0 if n_devices == 1 and launch.launcher == "slurm" else launch.local_rank
    if index >= n_devices:
        raise ValueError(
            f"this process needs CUDA device {index}, but there are only {n_devices}; start as many processes a node "
            "as it has GPUs, or set train.device"
        )
    return torch.device("cuda", index)


def fill_cache(dataset: HemaStandardDataset, signals: StopSignals, *, only_report: bool) -> bool:
    """Write missing images into the data set's cache, if it has one; all processes share the work.

    With `only_report` nothing is written, and images are decoded as if there were no cache.

    Returns:
        False if a signal asked to stop.
    """
    if dataset.cache is None:
        return True
    if only_report:
        logger.info("packed cache %s: %s", dataset.cache.folder, dataset.cache.plan())
        dataset.cache = None
        return True
    summary = dataset.cache.build(should_stop=lambda: signals.received is not None)
    return all(distributed.all_gather_objects(summary.is_complete))


# --- the plan in the log ----------------------------------------------------------------------------------------------


def describe_run(cfg: Any, model: SSLMetaArch, dataset: HemaStandardDataset) -> str:
    """Return the plan as a few lines for the start of the log."""
    schedules = Schedules(cfg)
    n_images = len(dataset)
    n, batch, epoch = schedules.n_iterations, schedules.global_batch_size, cfg.train.OFFICIAL_EPOCH_LENGTH
    crops = cfg.crops
    precision = cfg.compute_precision.student.backbone.mixed_precision.param_dtype
    dtype = str(resolve_dtype(precision, model.device.type)).removeprefix("torch.")
    n_parameters = parameter_count(model.student)
    n_backbone = n_parameters["backbone"]
    name = cfg.student.arch if cfg.student.arch in RELEASES else "<name, file or URL>"
    random_start = f"random weights; student.pretrained_weights={name} would start from trained ones"
    lines = [
        f"data      {n_images:,} images in {dataset.source.kind}",
        *describe_sets(cfg, dataset, n * batch),
        f"crops     2 global of {crops.global_crops_size} px, {crops.local_crops_number} local of "
        f"{crops.local_crops_size} px; augmentation {cfg.data_transform}",
        f"schedule  {n:,} steps of {batch} images = {n * batch / n_images:,.1f} passes over the data "
        f"({cfg.optim.epochs:g} epochs of {epoch} steps)",
        f"processes {distributed.get_world_size()} x {cfg.train.batch_size_per_gpu} images at a time x "
        f"{cfg.train.accumulation_steps} micro-batches; backbone {_spread(cfg)}",
        f"lr        peak {schedules.peak_lr:.3g} (optim.base_lr {cfg.optim.base_lr:g}, {cfg.optim.scaling_rule}) after "
        f"{schedules.n_warmup:,} warm-up steps, then cosine to {cfg.optim.min_lr:g}; last layers frozen for "
        f"{schedules.n_last_layer_frozen:,} steps, backbone for {schedules.n_backbone_frozen:,}",
        f"teacher   momentum {cfg.teacher.momentum_teacher:g} to {cfg.teacher.final_momentum_teacher:g}, temperature "
        f"{cfg.teacher.warmup_teacher_temp:g} to {cfg.teacher.teacher_temp:g}, {cfg.train.centering}",
        f"model     {cfg.student.arch}: {n_backbone / 1e6:.1f} backbone + {(n_parameters[''] - n_backbone) / 1e6:.1f} "
        f"heads million parameters, {dtype} on {model.device}{_learned(cfg, model)}",
        f"start     {weights_of(cfg) or random_start}",
    ]
    return "\n".join(lines)


def describe_sets(cfg: Any, dataset: HemaStandardDataset, n_seen: int) -> Iterator[str]:
    """Yield a line for each set, with how often a run of `n_seen` images sees it; nothing where there is one set.

    Of many sets, those with the largest shares have lines.
    """
    names, sizes = dataset.source.set_names, dataset.source.set_sizes
    if len(names) == 1:
        return
    balance = build_balance(cfg)
    quotas = sizes if balance.is_natural else balance.quotas(names, sizes)
    shares = quotas / quotas.sum()
    passes = n_seen * shares / np.maximum(sizes, 1)
    order = np.argsort(-shares, kind="stable")
    rest, width = order[N_SETS_SHOWN:], max(map(len, names))
    yield f"sets      {len(names)}, seen {'as many as there are' if balance.is_natural else 'as balanced'}:"
    for i in order[:N_SETS_SHOWN]:
        yield (
            f"          {names[i]:<{width}}  {sizes[i]:>11,} images, {shares[i]:6.2%} of the run's images, "
            f"{passes[i]:,.1f} passes over it"
        )
    if len(rest):
        yield (
            f"          and {len(rest)} more: {sizes[rest].sum():,} images, {shares[rest].sum():.2%} of the run's "
            f"images, at most {passes[rest].max():,.1f} passes"
        )


def _learned(cfg: Any, model: SSLMetaArch) -> str:
    """Describe what of the backbone learns, where that is not all of it."""
    n_learned, n_plain = count_learned(model.student["backbone"])
    if n_learned == n_plain:
        return ""
    rank = cfg.student.lora.rank
    return f"; of the backbone {n_learned:,} parameters learn" + (f" (LoRA of rank {rank})" if rank else "")


def _spread(cfg: Any) -> str:
    strategy, share = cfg.compute_precision.student.backbone.sharding_strategy, cfg.train.activation_checkpointing
    how = strategy if distributed.is_enabled() else "on one device"
    return how + (f", activations of {share:.0%} of the blocks computed again in backward" if share else "")


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

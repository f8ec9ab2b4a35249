"""What happens before a run has a model: its configuration, device, processes and cache."""

import argparse
import logging

import torch
from omegaconf import DictConfig

from dinov2 import distributed
from dinov2.data.datasets.hema_data import HemaStandardDataset
from dinov2.distributed import Launch
from dinov2.fsdp.precision import resolve_precision
from dinov2.models import fixed_settings
from dinov2.train.batches import resolve_batch_size
from dinov2.utils.config import load_run_config, missing_keys
from dinov2.utils.matmul import fast_matmul
from dinov2.utils.memory import keep_freed_memory
from dinov2.utils.parallel import available_cores
from dinov2.utils.stop_signals import StopSignals

logger = logging.getLogger("dinov2")

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
    """Write missing images into the data set's cache, if it has one; rank 0 does the work.

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
    return dataset.cache.build(should_stop=lambda: signals.received is not None).is_complete

"""Set up a run: configuration, device, processes, cache, the plan in the log; and supervise its steps.

Supervision detects hangs, handles stop signals, and writes status.json.
"""

import argparse
import faulthandler
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from fvcore.nn import parameter_count
from omegaconf import DictConfig
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention
from torch.utils import collect_env

import dinov2
from dinov2 import distributed
from dinov2.data.datasets.hema_data import HemaStandardDataset
from dinov2.distributed import Launch, any_rank, get_rank, get_world_size, is_lost_connection, name_missing_ranks
from dinov2.hub.sources import RELEASES
from dinov2.logging import MetricLogger, log_file
from dinov2.models import build_model_from_cfg, fixed_settings
from dinov2.train.batches import build_balance, resolve_batch_size
from dinov2.train.finetuning import configured_weights, count_learned
from dinov2.train.run_folder import RunFolder
from dinov2.train.schedules import Schedules
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.command import StopSignals
from dinov2.utils.config import load_run_config, missing_keys
from dinov2.utils.numerics import fast_matmul, resolve_dtype, resolve_precision
from dinov2.utils.resources import cores_of_this_rank, keep_freed_memory, size_text

logger = logging.getLogger("dinov2")

N_SETS_SHOWN = 12
MAX_COPIED_PARAMETERS = 2e8  # of a backbone that sharding_strategy `auto` does not shard: ViT-S and ViT-B
HANG_EXIT_CODE = 76  # differs from 75, that of a run that was stopped after its checkpoint
# Hangs are noticed in this order: by the timeouts of the process groups, raised in the rank that waits; by a timer;
# by faulthandler, which also ends a process that holds Python's lock
GROUP_FIRST_SECONDS, TIMER_FIRST_SECONDS = 20.0, 80.0
WAIT_FOREVER_SECONDS = 7 * 24 * 3600.0  # timeout between ranks for train.hang_timeout_seconds=0


def read_settings(args: argparse.Namespace, world_size: int) -> DictConfig:
    """Read the configuration of the command's arguments, with every value resolved."""

    def resolve(cfg: DictConfig) -> None:
        resolve_arch(cfg)
        resolve_sharding(cfg)
        resolve_batch_size(cfg.train, world_size)

    cfg = load_run_config(args.config_file, args.overrides, resolve)
    missing = [key for key in missing_keys(cfg) if not (args.eval_only and key == "train.dataset_path")]
    if missing:
        raise ValueError(f"no value for {', '.join(missing)}; add {missing[0]}=<value> to the command or the file")
    return cfg


def resolve_arch(cfg: DictConfig) -> None:
    """Set the values that the name student.arch fixes."""
    try:
        fixed = fixed_settings(cfg.student.arch)
    except ValueError as error:
        raise ValueError(f"student.{error}") from error
    for key, value in fixed.items():
        if cfg.student[key] != value:
            logger.info("student.%s is %s, the value of student.arch=%s", key, value, cfg.student.arch)
            cfg.student[key] = value


def resolve_sharding(cfg: DictConfig) -> None:
    """Replace sharding_strategy `auto`; copies of a small network need half the host's time and little more memory."""
    with torch.device("meta"):
        backbone, _ = build_model_from_cfg(cfg, only_teacher=True)
    strategy = "NO_SHARD" if parameter_count(backbone)[""] <= MAX_COPIED_PARAMETERS else "SHARD_GRAD_OP"
    for role in ("student", "teacher"):
        for network in cfg.compute_precision[role].values():
            if network.sharding_strategy == "auto":
                network.sharding_strategy = strategy


def set_up_device(cfg: DictConfig, launch: Launch | None) -> torch.device:
    """Choose the device and its floating-point types, and join the other processes."""
    device = pick_device(cfg.train.device, launch)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the device of all calls that name none
    for key in ("compile_blocks", "compile_loss"):
        if cfg.train[key] and (obstacle := obstacle_to_compiling(device)):
            raise ValueError(f"train.{key}=true: {obstacle}; set it to false")
    resolve_precision(cfg.compute_precision, device.type)
    fast_matmul(cfg.compute_precision.fp32_matmul == "fast", device)
    if device.type == "cpu":
        keep_freed_memory()
    if launch is not None:
        distributed.enable(launch, device, cfg.train.hang_timeout_seconds or WAIT_FOREVER_SECONDS)
    if cfg.train.num_workers > (n_cores := cores_of_this_rank()):
        logger.info("train.num_workers=%d becomes %d, the cores of this process", cfg.train.num_workers, n_cores)
        cfg.train.num_workers = n_cores
    return device


def pick_device(name: str, launch: Launch | None) -> torch.device:
    """Return the device of this process; of several processes on a node, each takes the GPU of its local rank."""
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
        # in a SLURM step a process may see only its own GPU
        index = 0 if n_devices == 1 and launch.launcher == "slurm" else launch.local_rank
    if index >= n_devices:
        raise ValueError(
            f"this process needs CUDA device {index}, but there are only {n_devices}; start as many processes a node "
            "as it has GPUs, or set train.device"
        )
    return torch.device("cuda", index)


def obstacle_to_compiling(device: torch.device) -> str | None:
    """Return what torch.compile lacks on `device` and how to install it, or None."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is missing; `pip install triton` installs it"
        if "CC" in os.environ or shutil.which("gcc") or shutil.which("clang"):
            return None
        return "no C compiler was found; install gcc, or name one in the variable CC"
    if shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")):
        return None
    return "no C++ compiler was found; install g++, or name one in the variable CXX"


def fill_cache(dataset: HemaStandardDataset, signals: StopSignals, *, only_report: bool) -> bool:
    """Write missing images into the data set's cache, if it has one, on rank 0.

    With `only_report` nothing is written, and images are decoded without the cache. Return False after a stop signal.
    """
    if dataset.cache is None:
        return True
    if only_report:
        logger.info("packed cache %s: %s", dataset.cache.folder, dataset.cache.plan())
        dataset.cache = None
        return True
    return dataset.cache.build(should_stop=lambda: signals.received is not None).is_complete


# --- the plan in the log ----------------------------------------------------------------------------------------------


def describe_run(cfg: Any, model: SSLMetaArch, dataset: HemaStandardDataset) -> str:
    """Return the plan of a run as lines for the start of the log."""
    schedules = Schedules(cfg)
    n_images = len(dataset)
    n, batch, epoch = schedules.n_iterations, schedules.global_batch_size, cfg.train.OFFICIAL_EPOCH_LENGTH
    crops = cfg.crops
    precision = cfg.compute_precision.student.backbone.mixed_precision.param_dtype
    dtype = resolve_dtype(precision, model.device.type)
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
        f"processes {get_world_size()} x {cfg.train.batch_size_per_gpu} images at a time x "
        f"{cfg.train.accumulation_steps} micro-batches; backbone {_describe_sharding(cfg)}",
        f"lr        peak {schedules.peak_lr:.3g} (optim.base_lr {cfg.optim.base_lr:g}, {cfg.optim.scaling_rule}) after "
        f"{schedules.n_warmup:,} warm-up steps, then cosine to {cfg.optim.min_lr:g}; last layers frozen for "
        f"{schedules.n_last_layer_frozen:,} steps, backbone for {schedules.n_backbone_frozen:,}",
        *describe_guidance(cfg, dataset),
        f"teacher   momentum {cfg.teacher.momentum_teacher:g} to {cfg.teacher.final_momentum_teacher:g}, "
        + (
            f"temperature {cfg.teacher.warmup_teacher_temp:g} to {cfg.teacher.teacher_temp:g}, {cfg.train.centering}"
            if model.has_targets
            else "used by no loss, only by evaluations and files"
        ),
        f"model     {cfg.student.arch}: {n_backbone / 1e6:.1f} backbone + {(n_parameters[''] - n_backbone) / 1e6:.1f} "
        f"heads million parameters{_describe_learning(cfg, model)}",
        f"device    {model.device}, {str(dtype).removeprefix('torch.')}; {describe_device(model.device, dtype)}",
        f"start     {configured_weights(cfg) or random_start}",
    ]
    return "\n".join(lines)


def describe_device(device: torch.device, dtype: torch.dtype) -> str:
    """Describe a GPU, its driver and the fused attention kernels for `dtype`; of a CPU, its threads."""
    if device.type != "cuda":
        return f"{torch.get_num_threads()} threads"
    gpu, query = torch.cuda.get_device_properties(device), torch.empty(1, 1, 8, 64, device=device, dtype=dtype)
    attention = SDPAParams(query, query, query, None, 0.0, False, False)
    kernels = {"flash": can_use_flash_attention, "memory-efficient": can_use_efficient_attention}
    usable = " or ".join(name for name, can_use in kernels.items() if can_use(attention)) or "not fused"
    driver = collect_env.get_nvidia_driver_version(collect_env.run) or "unknown"
    memory = size_text(gpu.total_memory)
    return f"{gpu.name} (capability {gpu.major}.{gpu.minor}), {memory}, driver {driver}; attention kernels: {usable}"


def describe_guidance(cfg: Any, dataset: HemaStandardDataset) -> Iterator[str]:
    """Yield a line about metadata and one about the frozen teacher, if the run has them."""
    metadata, teacher = cfg.train.metadata, cfg.teacher
    if dataset.source.metadata is not None:
        yield f"metadata  {metadata.mode} {dataset.source.metadata.describe()}; weight {metadata.weight:g}"
    if teacher.frozen is not None:
        yield (
            f"distilled {teacher.pretrained_weights}, frozen: {teacher.frozen.arch} of width "
            f"{teacher.frozen.embed_dim}, patches of {teacher.frozen.patch_size} px; weight "
            f"{teacher.distillation_loss_weight:g}"
        )


def describe_sets(cfg: Any, dataset: HemaStandardDataset, n_seen: int) -> Iterator[str]:
    """Yield a line for each image set with its share and passes in a run of `n_seen` images; nothing for one set.

    Of many sets, only those with the largest shares get a line.
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


def _describe_learning(cfg: Any, model: SSLMetaArch) -> str:
    """Describe the part of the backbone that learns; empty if all of it learns."""
    n_learned, n_plain = count_learned(model.student["backbone"])
    if n_learned == n_plain:
        return ""
    rank = cfg.student.lora.rank
    return f"; of the backbone {n_learned:,} parameters learn" + (f" (LoRA of rank {rank})" if rank else "")


def _describe_sharding(cfg: Any) -> str:
    strategy, share = cfg.compute_precision.student.backbone.sharding_strategy, cfg.train.activation_checkpointing
    strategy = strategy if distributed.is_enabled() else "on one device"
    return strategy + (f", activations of {share:.0%} of the blocks computed again in backward" if share else "")


def run_environment(cfg: Any) -> dict[str, str]:
    """Return the seed and the versions of code and libraries, which are needed to repeat a result."""
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
    """Format `run_environment` as a line of the log."""
    versions = run_environment(cfg)
    code = f"dinov2 {versions['dinov2']}" + (f" at {versions['commit']}" if versions["commit"] else "")
    return f"seed {versions['seed']}; {code}; torch {versions['torch']}; Python {versions['python']}"


# --- supervision of the steps ----------------------------------------------------------------------------------------


class Supervision:
    """Supervises the steps of a run; a context manager around the loop.

    A process that begins no step for `hang_timeout_seconds` (0: no limit) writes the stacks of its threads into its log
    and ends. Ranks that wait so long for another rank name it and end with HANG_EXIT_CODE, by the timeout of their
    process group or by a timer. Evaluations and checkpoints may take longer: they run inside `pause`.
    """

    def __init__(
        self, hang_timeout_seconds: float, folder: RunFolder, metrics: MetricLogger, signals: StopSignals
    ) -> None:
        self.timeout_seconds, self.metrics, self.signals = hang_timeout_seconds, metrics, signals
        self.folder = folder
        self._timer: threading.Timer | None = None
        log_file(folder.path, get_rank()).parent.mkdir(parents=True, exist_ok=True)
        self._stacks = open(log_file(folder.path, get_rank()), "a", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> "Supervision":
        self.folder.write_status("running")
        return self

    def begin_step(self) -> None:
        """Restart the timers of the hang detection."""
        self._stop_clock()
        seconds = self.timeout_seconds
        if seconds > 0 and get_world_size() > 1:
            error = TimeoutError(f"no step began in {seconds:g} s")
            self._timer = threading.Timer(seconds + GROUP_FIRST_SECONDS, self._end_hanging_run, [error])
            self._timer.daemon = True
            self._timer.start()
            seconds += TIMER_FIRST_SECONDS
        if seconds > 0:
            faulthandler.dump_traceback_later(seconds, exit=True, file=self._stacks)

    def _stop_clock(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._timer is not None:
            self._timer.cancel()

    @contextmanager
    def pause(self, state: str) -> Iterator[None]:
        """Run something other than a step: it has no time limit and does not count in speed and ETA."""
        self._stop_clock()
        with self.metrics.interruption():
            self.folder.write_status(state)
            yield
        self.folder.status.evaluation |= self.metrics.newest_evaluation
        self.folder.write_status("running")
        self.begin_step()

    def report(self, rows: Sequence[Mapping[str, float]], collapse: list[str]) -> None:
        """Write the newest rates and losses and the present signs of a collapse into status.json."""
        self.folder.status.take_rates(rows[-1], len(rows))
        self.folder.status.collapse = collapse
        self.folder.write_status("running")

    def must_stop(self) -> bool:
        """Return whether any rank has received a stop signal."""
        return any_rank(self.signals.received is not None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_clock()
        if error is not None and is_lost_connection(error):
            self._end_hanging_run(error)
        if error is not None:
            self.folder.write_status("failed", str(error) or type(error).__name__)
        self._stacks.close()

    def _end_hanging_run(self, error: BaseException) -> None:
        """Name the rank that did not arrive, and end at once: cleaning up would hang too."""
        message = (
            f"training hangs: {name_missing_ranks()} did not arrive, and this rank waited for "
            f"train.hang_timeout_seconds={self.timeout_seconds:g} s or lost the connection. That process is stopped, "
            "dead, or waits for its data: look at its log, its host and its data mount. The run can be resumed from "
            "its last checkpoint: start the same command again"
        )
        logger.error("%s", message, exc_info=error)
        if get_rank() != 0:  # the log of rank 0 goes to stderr already
            print(message, file=sys.stderr)
        self.folder.write_status("failed", message)
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        os._exit(HANG_EXIT_CODE)

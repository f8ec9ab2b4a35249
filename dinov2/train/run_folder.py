"""Prepare the folder of a run; save, resume and roll back the run in it.

<output-dir>/<name>/config.yaml               every value that the run uses
                   training_metrics.json      one JSON object per iteration
                   status.json                progress of the run
                   checkpoints/               to resume from
                   eval/training_<n>/teacher_checkpoint.pth   to use
                   views/                     images of the crops and masks of some batches
                   logs/  tensorboard/  bad_images.csv
"""

import fcntl
import logging
import os
import socket
import tempfile
import time
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import IO, Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from dinov2.configs import dinov2_default_config
from dinov2.distributed import is_main_process, on_main_process
from dinov2.fsdp.checkpoint import Checkpointer
from dinov2.logging import MetricLogger
from dinov2.logging.trackers import open_trackers
from dinov2.train.monitor import CollapseMonitor
from dinov2.train.optimizer import LossScaler, StepGuard
from dinov2.train.schedules import Schedules
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.config import differences, read_config, write_config
from dinov2.utils.run_status import RunStatus, StatusFile

logger = logging.getLogger("dinov2")

# Keys that set the shapes of the weights and the optimizer's groups: if they differ, a checkpoint cannot be resumed.
_SHAPE_KEYS = (
    *("student.arch", "student.embed_dim", "student.depth", "student.num_heads", "student.patch_size"),
    *("student.ffn_layer", "student.block_chunks", "student.num_register_tokens", "student.qkv_bias"),
    *("optim.layerwise_decay", "optim.patch_embed_lr_mult", "student.freeze", "student.unfreeze"),
    *("student.lora.rank", "student.lora.alpha", "student.lora.targets"),
    *("student.proj_bias", "student.ffn_bias", "dino.head", "ibot.head", "ibot.separate_head", "lejepa.head"),
    *("crops.global_crops_size", "teacher.frozen"),
    *("train.metadata.column", "train.metadata.n_values"),
)
# Keys that may change on resume without a warning: they do not affect results.
_HARMLESS_KEYS = (
    *("train.output_dir", "train.device", "train.num_workers", "train.saveckp_freq", "train.keep_checkpoints"),
    *("train.milestone_freq", "train.log_period", "train.tensorboard", "train.wandb", "train.mlflow", "train.max_bad"),
    *("evaluation", "train.batch_size_per_gpu", "train.accumulation_steps", "train.activation_checkpointing"),
    *("train.compile", "train.hang_timeout_seconds", "train.max_rollbacks", "train.views"),
)
_LOCK_TIMEOUT_SECONDS = 120  # an NFS server keeps the locks of a dead machine for this long


def run_folder_path(output_dir: Path, name: str | None, config_file: str | None) -> Path:
    """Return `output_dir/name`; without a name, a folder named after the configuration and the time or SLURM job.

    A requeued job keeps its number, and so its folder.
    """
    if name is not None:
        return output_dir / name
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise ValueError("--name: missing, although torchrun --max-restarts may restart the run; add one")
    stem = Path(config_file).stem if config_file else "run"
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return output_dir / f"{stem}_{time.strftime('%Y%m%d-%H%M%S')}"
    path = output_dir / f"{stem}_{job}"
    if path.exists() and int(os.environ.get("SLURM_RESTART_COUNT", "0")) == 0:
        raise ValueError(f"--name: missing, and {path} already holds a run of this SLURM job; add one")
    return path


@dataclass
class Progress:
    """Progress of a run. Its random streams depend only on train.seed and these numbers, so no generator is saved."""

    iteration: int = 0  # steps done
    batch_number: int = 0  # batches drawn: more than steps after a roll-back, which skips batches
    position: int = 0  # images drawn from the global stream, over all processes
    rollbacks: int = 0

    def advance(self, global_batch_size: int) -> None:
        """Count one step: one iteration, one batch, and `global_batch_size` images more in `position`."""
        self.iteration += 1
        self.batch_number += 1
        self.position += global_batch_size


@dataclass
class TrainState:
    """Networks, optimizer, guard, loss scaler and progress of a run."""

    model: SSLMetaArch
    optimizer: torch.optim.Optimizer
    guard: StepGuard
    monitor: CollapseMonitor
    progress: Progress = field(default_factory=Progress)

    @property
    def scaler(self) -> LossScaler | None:
        """Return the scaler of the loss, if the student computes in fp16."""
        return self.model.fp16_scaler

    def tensors(self, with_scaler: bool) -> dict[str, Any]:
        """Return the tensors themselves, nested by name, to save them or to fill them from a checkpoint."""
        tensors = {"model": self.model.state_dict(), "optimizer": self._moments(), "guard": self.guard.state_dict()}
        if with_scaler and self.scaler is not None:
            tensors["scaler"] = self.scaler.state_dict()
        return tensors

    def numbers(self) -> dict[str, Any]:
        """Return the state that is not in tensors."""
        return {
            **vars(self.progress),
            "seed": self.model.cfg.train.seed,
            "global_batch_size": self.model.cfg.train.global_batch_size,
            "has_scaler": self.scaler is not None,
            "monitor": self.monitor.state_dict(),
        }

    def resume_from(self, numbers: dict[str, Any]) -> None:
        """Set the state from the `numbers` of a checkpoint whose tensors are loaded already."""
        for name in vars(self.progress):
            setattr(self.progress, name, int(numbers[name]))
        self.monitor.load_state_dict(numbers["monitor"])
        self.guard.forget_streak()

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        """Return AdamW's state by parameter name; its settings come from configuration and schedules."""
        return {
            name: self.optimizer.state[parameter]
            for name, parameter in self.model.student.named_parameters()
            if parameter in self.optimizer.state
        }


class RunFolder:
    """Files of one run. Every process makes one and calls its methods; the main process writes."""

    def __init__(self, cfg: Any, path: Path) -> None:
        self.cfg, self.path = cfg, path
        self._lock_file: IO[str] | None = None
        self._status_file: StatusFile | None = None
        cfg.train.output_dir = str(path)
        cfg.optim.lr = Schedules(cfg).peak_lr
        epoch = cfg.train.OFFICIAL_EPOCH_LENGTH
        self._period = round(cfg.train.saveckp_freq * epoch)
        self.checkpointer = Checkpointer(
            path / "checkpoints", cfg.train.keep_checkpoints, round(cfg.train.milestone_freq * epoch)
        )

    def prepare(self, *, resume: bool, eval_only: bool = False) -> None:
        """Make the folder and write config.yaml into it.

        An earlier run that is not resumed (it has no checkpoint, or `resume` is False) is moved to a folder beside
        this one. It is never overwritten or mixed with the new run.
        """
        on_main_process(lambda: self._prepare(resume, eval_only))

    def _prepare(self, resume: bool, eval_only: bool) -> None:
        self._check_writable()
        earlier = self.path / "config.yaml"
        has_checkpoint = bool(self.checkpointer.paths())
        if eval_only:
            return
        self._lock()
        if earlier.is_file() and not (resume and has_checkpoint):
            aside = self.path.with_name(f"{self.path.name}.before_{time.strftime('%Y%m%d-%H%M%S')}")
            self.path.rename(aside)
            self.path.mkdir()
            self._lock()
            reason = "has no checkpoint to resume" if resume else "is not resumed (--no-resume)"
            logger.warning("the run in %s %s; it is now in %s", self.path, reason, aside)
        elif has_checkpoint and earlier.is_file():
            self._compare_with(earlier)
        for pattern in (".*.tmp", "eval/**/.*.tmp", "views/.*.tmp", "tensorboard/**/.*.tmp"):
            for incomplete in self.path.glob(pattern):
                incomplete.unlink()  # left by a process that was killed while it wrote
        write_config(self.cfg, earlier)

    def open_status(self, environment: dict[str, str]) -> None:
        """Start status.json for this start of the run, with its `run_environment`."""
        n_iterations = Schedules(self.cfg).n_iterations
        self._status_file = StatusFile(self.path, n_iterations, resumed=self.has_checkpoint())
        self.status.starts.append(environment)
        self.write_status("starting")

    def record_images(self, images: str) -> None:
        """Record the fingerprint of this start's images in status.json; warn if the start before had others."""
        earlier = [start["images"] for start in self.status.starts if "images" in start]
        if earlier and earlier[-1] != images:
            logger.warning(
                "the run so far had %s, and its lists or folders now have %s; from here on the run takes these, in a "
                "new order",
                *(earlier[-1], images),
            )
        self.status.starts[-1]["images"] = images

    @property
    def status(self) -> RunStatus:
        """Return the content of status.json; `write_status` writes changes to it."""
        assert self._status_file is not None, "opened before the training"
        return self._status_file.status

    def write_status(self, state: str, reason: str = "") -> None:
        """Write status.json on the main process, if it was opened."""
        if self._status_file is not None and is_main_process():
            self._status_file.write(state, reason)

    def has_checkpoint(self) -> bool:
        """Return whether there is a checkpoint, readable or not."""
        return on_main_process(lambda: bool(self.checkpointer.paths()))

    def restore(self, state: TrainState, before: int | None = None) -> bool:
        """Resume from the newest readable checkpoint, by any number of processes; return False if there is none."""
        newest = self.checkpointer.newest(before)
        if newest is None:
            return False
        path, numbers = newest
        self._load(path, state.tensors(with_scaler=numbers["has_scaler"]))
        state.resume_from(numbers)
        on_main_process(lambda: self.checkpointer.set_aside_after(state.progress.iteration))
        logger.info("resuming %s after iteration %d", self.path, state.progress.iteration)
        return True

    def roll_back(self, state: TrainState, newest: dict[str, float]) -> None:
        """Restore the newest checkpoint before too many skipped steps in a row, and skip the batches since then."""
        self.checkpointer.wait()
        stuck, what = replace(state.progress), state.guard.describe(newest)
        in_row = int(newest["longest_skipped_in_row"])
        advice = "Lower optim.base_lr, or set compute_precision to bf16 or fp32, and start the run again"
        if stuck.rollbacks >= self.cfg.train.max_rollbacks:
            raise FloatingPointError(f"{what}; the run was rolled back {stuck.rollbacks} times. {advice}")
        if not self.restore(state, before=stuck.iteration - in_row):
            raise FloatingPointError(f"{what}; there is no earlier checkpoint to roll back to. {advice}")
        state.progress.batch_number, state.progress.position = stuck.batch_number, stuck.position
        state.progress.rollbacks = self.status.rollbacks = stuck.rollbacks + 1
        logger.warning(
            "%s: rolled back to iteration %d; %d batches are skipped (rollback %d of %d)",
            *(what, state.progress.iteration, stuck.iteration - state.progress.iteration),
            *(state.progress.rollbacks, self.cfg.train.max_rollbacks),
        )

    def restore_networks(self, model: SSLMetaArch) -> int:
        """Load only the networks of the newest readable checkpoint; return the number of iterations done."""
        newest = self.checkpointer.newest()
        if newest is None:
            raise FileNotFoundError(f"no checkpoint in {self.checkpointer.folder}; check --output-dir and --name")
        path, numbers = newest
        self._load(path, {"model": model.state_dict()})
        return int(numbers["iteration"])

    def _load(self, path: Path, tensors: dict[str, Any]) -> None:
        try:
            self.checkpointer.load(path, tensors)
        except ValueError as error:
            raise ValueError(
                f"the checkpoint in {self.path} has another architecture than the configuration: "
                f"{' '.join(str(error).split())[:500]}; use the settings of that run, or choose another --name"
            ) from error

    def checkpoint_is_due(self, done: int) -> bool:
        return self._period > 0 and done % self._period == 0

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        """Write a checkpoint in the background; with `wait`, return when it is on disk."""
        state.model.apply_center_updates()
        self.checkpointer.save(state.progress.iteration, state.tensors(with_scaler=True), state.numbers())
        if wait:
            self.checkpointer.wait()

    def _check_writable(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path) as file:
                file.write(bytes(4096))  # an empty file would fit on a full disk
        except OSError as error:
            is_file = isinstance(error, FileExistsError | NotADirectoryError)
            reason = "it or a part of it is a file" if is_file else error.strerror
            raise PermissionError(
                f"--output-dir/--name: cannot write to {self.path} ({reason}); fix that or choose another --output-dir"
            ) from error

    def _lock(self) -> None:
        """Lock the folder against other trainings until this process ends."""
        file = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
        for second in count():
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, works on NFS and not in forked workers
                break
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                holder = file.read().strip() or "another process"
                if second >= _LOCK_TIMEOUT_SECONDS:
                    raise PermissionError(
                        f"--output-dir/--name: {holder} writes the run in {self.path}; end it first, or choose another "
                        "--name"
                    ) from error
                if second == 0:
                    logger.warning("%s still writes the run in %s; waiting for its end", holder, self.path)
                time.sleep(1)
            except OSError as error:  # a file system without locks
                logger.info("no lock on %s (%s): start only one run in it", self.path, error.strerror)
                break
        file.truncate(0)
        print(f"process {os.getpid()} of {socket.gethostname()}", file=file, flush=True)
        self._lock_file = file  # closing it releases the lock

    def _compare_with(self, earlier: Path) -> None:
        # a key that is newer than the run gets its default, which means that it is not used
        try:
            before = OmegaConf.merge(dinov2_default_config, read_config(earlier))
        except (OmegaConfBaseException, TypeError) as error:
            raise ValueError(f"--name: {earlier} is no longer that of a run ({error}); choose another name") from error
        assert isinstance(before, DictConfig), "both are"
        changed = differences(self.cfg, before)
        shapes = {k: v for k, v in changed.items() if k.startswith(_SHAPE_KEYS)}
        if shapes:
            text = "; ".join(f"{k}: {old} there, {new} now" for k, (new, old) in shapes.items())
            raise ValueError(
                f"{self.path} holds a run of another architecture ({text}); set the old values to resume it, or choose "
                "another --name"
            )
        for key, (new, old) in changed.items():
            if not key.startswith(_HARMLESS_KEYS):
                logger.warning("resuming with %s=%s; the run so far had %s", key, new, old)


def open_metrics(cfg: Any, path: Path, start: int, schedules: Schedules) -> MetricLogger:
    """Open training_metrics.json and the trackers, to continue from iteration `start`."""
    trackers = open_trackers(cfg.train, path, start, OmegaConf.to_container(cfg))  # type: ignore[arg-type]
    n_iterations, batch_size, period = schedules.n_iterations, schedules.global_batch_size, cfg.train.log_period
    return MetricLogger(path / "training_metrics.json", start, n_iterations, batch_size, period, trackers)

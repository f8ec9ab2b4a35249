"""The folder of a run: where it is, that it can be written, and how a run in it is saved, resumed and rolled back.

<output-dir>/<name>/config.yaml               every value the run uses
                   training_metrics.json      one JSON object an iteration
                   status.json                how the run is doing now
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
from pathlib import Path
from typing import IO, Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dinov2.configs import dinov2_default_config
from dinov2.distributed import is_main_process, on_main_process
from dinov2.fsdp.checkpoint import Checkpointer
from dinov2.logging import MetricLogger, open_trackers
from dinov2.train.monitor import CollapseMonitor
from dinov2.train.optimizer import LossScaler, StepGuard
from dinov2.train.schedules import Schedules
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.config import differences, write_config
from dinov2.utils.run_status import RunStatus, StatusFile

logger = logging.getLogger("dinov2")

# What decides the shape of the weights and the optimizer's groups: a checkpoint that differs here cannot be resumed.
_SHAPE_KEYS = (
    *("student.arch", "student.embed_dim", "student.depth", "student.num_heads", "student.patch_size"),
    *("student.ffn_layer", "student.block_chunks", "student.num_register_tokens", "student.qkv_bias"),
    *("optim.layerwise_decay", "optim.patch_embed_lr_mult", "student.freeze", "student.unfreeze"),
    *("student.lora.rank", "student.lora.alpha", "student.lora.targets"),
    *("student.proj_bias", "student.ffn_bias", "dino.head", "ibot.head", "ibot.separate_head"),
    "crops.global_crops_size",
)
# Keys that may change on resume without a warning: they do not affect results.
_HARMLESS_KEYS = (
    *("train.output_dir", "train.device", "train.num_workers", "train.saveckp_freq", "train.keep_checkpoints"),
    *("train.milestone_freq", "train.log_period", "train.tensorboard", "train.wandb", "train.max_bad", "evaluation"),
    *("train.batch_size_per_gpu", "train.accumulation_steps", "train.activation_checkpointing"),
    *("train.compile", "train.hang_timeout_seconds", "train.max_rollbacks", "train.views"),
)
# An NFS server keeps the locks of a machine that died for this long
_LOCK_PATIENCE_SECONDS = 120.0


def run_folder_path(output_dir: str, name: str | None, config_file: str | None) -> Path:
    """Return `output_dir/name`; without a name a folder called after the configuration and the time or SLURM job.

    A job that is requeued keeps its number, and so finds its folder.

    Raises:
        ValueError: no name, though torchrun may have to start the run again, or an earlier run of the same job has it.
    """
    if name is not None:
        return Path(output_dir) / name
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise ValueError("--name: missing, though torchrun --max-restarts may have to take the run up again; add one")
    stem = Path(config_file).stem if config_file else "run"
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return Path(output_dir) / f"{stem}_{time.strftime('%Y%m%d-%H%M%S')}"
    path = Path(output_dir) / f"{stem}_{job}"
    if path.exists() and int(os.environ.get("SLURM_RESTART_COUNT", "0")) == 0:
        raise ValueError(f"--name: missing, and {path} holds a run of this SLURM job already; add one")
    return path


@dataclass
class Progress:
    """How far a run is. Its random streams are functions of train.seed and these: no generator has a state to save."""

    iteration: int = 0  # steps done
    batch_number: int = 0  # batches drawn: more than steps after a roll-back, which skips some
    position: int = 0  # images drawn from the global stream, over all processes
    rollbacks: int = 0

    def advance(self, global_batch_size: int) -> None:
        """Count one step."""
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
        """The scaler of the loss, if the student computes in fp16."""
        return self.model.fp16_scaler

    def tensors(self, with_scaler: bool) -> dict[str, Any]:
        """Return the tensors themselves, nested by name: to be copied into a checkpoint, or filled from one."""
        tensors: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self._moments(),
            "guard": self.guard.state_dict(),
        }
        if with_scaler and self.scaler is not None:
            tensors["scaler"] = self.scaler.state_dict()
        return tensors

    def numbers(self) -> dict[str, Any]:
        """Return what is no tensor."""
        return {
            **vars(self.progress),
            "seed": self.model.cfg.train.seed,
            "global_batch_size": self.model.cfg.train.global_batch_size,
            "has_scaler": self.scaler is not None,
            "monitor": self.monitor.state_dict(),
        }

    def resume_from(self, numbers: dict[str, Any]) -> None:
        """Resume from the `numbers` of a checkpoint whose tensors have been filled in."""
        for name in vars(self.progress):
            setattr(self.progress, name, int(numbers[name]))
        self.monitor.load_state_dict(numbers["monitor"])
        self.guard.forget_streak()

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        """Return AdamW's state by parameter name; its settings come from the configuration and the schedules."""
        return {
            name: self.optimizer.state[parameter]
            for name, parameter in self.model.student.named_parameters()
            if parameter in self.optimizer.state
        }


class RunFolder:
    """One run's files. Every process has one and calls its methods; the main process writes."""

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

        What cannot be resumed (a run without a checkpoint, or any run without `resume`) is moved to a folder beside
        this one. It is never overwritten, and never mixed with the new run.

        Raises:
            PermissionError, NotADirectoryError: the folder cannot be written, or another process writes it.
            ValueError: the checkpoint that would be resumed has weights of another shape.
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
            for torn in self.path.glob(pattern):
                torn.unlink()  # a process that was killed while it wrote could not remove it
        write_config(self.cfg, earlier)

    def open_status(self, environment: dict[str, str]) -> None:
        """Start status.json for this part of the run, which has this `environment`."""
        n_iterations = Schedules(self.cfg).n_iterations
        self._status_file = StatusFile(self.path, n_iterations, resumed=self.has_checkpoint())
        self.status.starts.append(environment)
        self.write_status("starting")

    @property
    def status(self) -> RunStatus:
        """The content of status.json, for changes before the next `write_status`."""
        assert self._status_file is not None, "opened before the training"
        return self._status_file.status

    def write_status(self, state: str, reason: str = "") -> None:
        """Write status.json on the main process, if it is open."""
        if self._status_file is not None and is_main_process():
            self._status_file.write(state, reason)

    def has_checkpoint(self) -> bool:
        """Return whether there is a checkpoint, readable or not."""
        return on_main_process(lambda: bool(self.checkpointer.paths()))

    def restore(self, state: TrainState, before: int | None = None) -> bool:
        """Resume from the newest readable checkpoint, whatever number of processes wrote it; False if there is none.

        Args:
            before: the most iterations that it may be after.

        Raises:
            ValueError: no checkpoint can be read, or it holds networks of another shape.
        """
        found = self.checkpointer.newest(before)
        if found is None:
            return False
        path, numbers = found
        self._load(path, state.tensors(with_scaler=numbers["has_scaler"]))
        state.resume_from(numbers)
        on_main_process(lambda: self.checkpointer.set_aside_after(state.progress.iteration))
        logger.info("resuming %s after iteration %d", self.path, state.progress.iteration)
        return True

    def roll_back(self, state: TrainState, newest: dict[str, float]) -> None:
        """Restore the newest checkpoint from before too many skipped steps in a row, and skip the batches since then.

        Raises:
            FloatingPointError: there is none, or the run was rolled back train.max_rollbacks times already.
        """
        self.checkpointer.wait()
        stuck, what = replace(state.progress), state.guard.describe(newest)
        in_row = int(newest["longest_skipped_in_row"])
        advice = "Lower optim.base_lr, or set compute_precision to bf16 or fp32, and start the run again"
        if stuck.rollbacks >= self.cfg.train.max_rollbacks:
            raise FloatingPointError(f"{what}; the run went back {stuck.rollbacks} times. {advice}")
        if not self.restore(state, before=stuck.iteration - in_row):
            raise FloatingPointError(f"{what}; there is no checkpoint from before to go back to. {advice}")
        state.progress.batch_number, state.progress.position = stuck.batch_number, stuck.position
        state.progress.rollbacks = self.status.rollbacks = stuck.rollbacks + 1
        logger.warning(
            "%s: went back to iteration %d, and passes over %d batches (rollback %d of %d)",
            *(what, state.progress.iteration, stuck.iteration - state.progress.iteration),
            *(state.progress.rollbacks, self.cfg.train.max_rollbacks),
        )

    def restore_networks(self, model: SSLMetaArch) -> int:
        """Load only the networks of the newest readable checkpoint; returns the number of iterations done.

        Raises:
            FileNotFoundError: there is none.
            ValueError: as `restore`.
        """
        found = self.checkpointer.newest()
        if found is None:
            raise FileNotFoundError(f"no checkpoint in {self.checkpointer.folder}; check --output-dir and --name")
        path, numbers = found
        self._load(path, {"model": model.state_dict()})
        return int(numbers["iteration"])

    def _load(self, path: Path, tensors: dict[str, Any]) -> None:
        try:
            self.checkpointer.load(path, tensors)
        except ValueError as error:
            raise ValueError(
                f"the checkpoint in {self.path} is of another architecture than the configuration: "
                f"{' '.join(str(error).split())[:500]}; restore the settings that it was made with, or choose another "
                "--name"
            ) from error

    def checkpoint_is_due(self, done: int) -> bool:
        return self._period > 0 and done % self._period == 0

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        """Write all that `restore` needs, in the background; with `wait`, return when it is on disk."""
        state.model.apply_center_updates()
        self.checkpointer.save(state.progress.iteration, state.tensors(with_scaler=True), state.numbers())
        if wait:
            self.checkpointer.wait()

    def _check_writable(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path) as file:
                file.write(bytes(4096))  # an empty file has room on a full disk, too
        except (FileExistsError, NotADirectoryError) as error:
            raise NotADirectoryError(
                f"--output-dir/--name: {self.path} or a part of it is a file; choose another --output-dir"
            ) from error
        except OSError as error:
            raise PermissionError(
                f"--output-dir/--name: cannot write to {self.path} ({error.strerror}); mend that or choose another "
                "--output-dir"
            ) from error

    def _lock(self) -> None:
        """Lock the folder against other trainings for as long as this process lives."""
        file = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
        deadline = time.monotonic() + _LOCK_PATIENCE_SECONDS
        waits = False
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock: on NFS, and not kept by forked workers
                break
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                holder = file.read().strip() or "another process"
                if time.monotonic() > deadline:
                    raise PermissionError(
                        f"--output-dir/--name: {holder} writes the run in {self.path}; end it first, or choose another "
                        "--name"
                    ) from error
                if not waits:
                    logger.warning("%s still writes the run in %s; waiting for its end", holder, self.path)
                waits = True
                time.sleep(1)
            except OSError as error:  # a file system without locks
                logger.info("no lock on %s (%s): nothing keeps two runs from writing it", self.path, error.strerror)
                break
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}\n")
        file.flush()
        self._lock_file = file  # closing it gives the lock back

    def _compare_with(self, earlier: Path) -> None:
        before = OmegaConf.load(earlier)
        assert isinstance(before, DictConfig), f"{earlier} was written by a run and holds a mapping"
        # A key that is younger than the run was not used in it, which is what its default means
        completed = OmegaConf.merge(dinov2_default_config, before)
        assert isinstance(completed, DictConfig), "two mappings make a mapping"
        changed = differences(self.cfg, completed)
        shapes = {k: v for k, v in changed.items() if k.startswith(_SHAPE_KEYS)}
        if shapes:
            text = "; ".join(f"{k}: {old} there, {new} now" for k, (new, old) in shapes.items())
            raise ValueError(
                f"{self.path} holds a run of another architecture ({text}); give these values to resume it, or choose "
                "another --name"
            )
        for key, (new, old) in changed.items():
            if not key.startswith(_HARMLESS_KEYS):
                logger.warning("resuming with %s=%s; the run so far had %s", key, new, old)


def open_metrics(cfg: Any, path: Path, start: int, schedules: Schedules) -> MetricLogger:
    """Open the run's numbers, to continue from iteration `start`."""
    trackers = open_trackers(cfg.train, path, start, OmegaConf.to_container(cfg))  # type: ignore[arg-type]
    return MetricLogger(
        path / "training_metrics.json",
        start,
        schedules.n_iterations,
        schedules.global_batch_size,
        cfg.train.log_period,
        trackers,
    )

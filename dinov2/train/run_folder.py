"""The folder of a run: where it is, that it can be written, and how a run in it is saved and taken up again.

<output-dir>/<name>/config.yaml               every value the run uses
                   training_metrics.json      one JSON object an iteration
                   checkpoints/               to resume from
                   eval/training_<n>/teacher_checkpoint.pth   to use
                   logs/  tensorboard/  bad_images.csv
"""

import logging
import tempfile
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer

from dinov2.distributed import get_world_size
from dinov2.fsdp.checkpoint import Checkpointer
from dinov2.logging import MetricLogger, open_trackers
from dinov2.train.optimizer import StepGuard
from dinov2.train.schedules import Schedules
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.config import differences, write_config

logger = logging.getLogger("dinov2")

# What decides the shape of the weights: a checkpoint that differs in one of these cannot be resumed.
_SHAPE_KEYS = (
    *("student.arch", "student.embed_dim", "student.depth", "student.num_heads", "student.patch_size"),
    *("student.ffn_layer", "student.block_chunks", "student.num_register_tokens", "student.qkv_bias"),
    *("student.proj_bias", "student.ffn_bias", "dino.head", "ibot.head", "ibot.separate_head"),
    "crops.global_crops_size",
)
# What may differ between the parts of a run without a word, since it changes no number.
_HARMLESS_KEYS = (
    *("train.output_dir", "train.device", "train.num_workers", "train.saveckp_freq", "train.keep_checkpoints"),
    *("train.log_period", "train.tensorboard", "train.wandb", "train.max_bad", "evaluation"),
)


def run_folder_path(output_dir: str, name: str | None, config_file: str | None) -> Path:
    """`output_dir/name`; without a name a new folder called after the configuration and the time."""
    stem = Path(config_file).stem if config_file else "run"
    return Path(output_dir) / (name or f"{stem}_{time.strftime('%Y%m%d-%H%M%S')}")


class RunFolder:
    """One run's files."""

    def __init__(self, cfg: Any, path: Path) -> None:
        self.cfg, self.path = cfg, path
        cfg.train.output_dir = str(path)
        cfg.optim.lr = Schedules(cfg, get_world_size()).peak_lr
        self.checkpointer = Checkpointer(path / "checkpoints", cfg.train.keep_checkpoints)
        self._period = round(cfg.train.saveckp_freq * cfg.train.OFFICIAL_EPOCH_LENGTH)

    def prepare(self, *, resume: bool, must_exist: bool = False) -> None:
        """Make the folder and write config.yaml into it.

        Without `resume`, a run that is there already is moved to a folder beside it, never overwritten.

        Raises:
            PermissionError, NotADirectoryError: the folder cannot be written.
            FileNotFoundError: `must_exist`, and there is no checkpoint.
            ValueError: the checkpoint that would be resumed has weights of another shape.
        """
        if must_exist and not self.checkpointer.paths():
            raise FileNotFoundError(
                f"--eval-only: no checkpoint in {self.checkpointer.folder}; check --output-dir and --name"
            )
        self._check_writable()
        if not resume and not must_exist and self.checkpointer.paths():
            aside = self.path.with_name(f"{self.path.name}.before_{time.strftime('%Y%m%d-%H%M%S')}")
            self.path.rename(aside)
            logger.warning("--no-resume: the run that was in %s is now in %s", self.path, aside)
        earlier = self.path / "config.yaml"
        if self.checkpointer.paths() and earlier.is_file():
            self._compare_with(earlier)
        if not must_exist:
            write_config(self.cfg, earlier)

    def restore(self, model: SSLMetaArch, optimizer: Optimizer | None = None, guard: StepGuard | None = None) -> int:
        """Take up the newest readable checkpoint; returns the number of iterations done, 0 where there is none."""
        state = self.checkpointer.load_latest()
        if state is None:
            return 0
        model.load_state_dict(state["model"])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
        if guard is not None:
            guard.load_state_dict(state["guard"])
        if model.fp16_scaler is not None and state["scaler"]:
            model.fp16_scaler.load_state_dict(state["scaler"])
        logger.info("resuming %s after iteration %d", self.path, state["iteration"])
        return int(state["iteration"])

    def checkpoint_is_due(self, done: int) -> bool:
        return self._period > 0 and done % self._period == 0

    def save(self, done: int, model: SSLMetaArch, optimizer: Optimizer, guard: StepGuard) -> None:
        """Write all that `restore` needs after `done` iterations."""
        model.apply_center_updates()
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "guard": guard.state_dict(),
            "scaler": model.fp16_scaler.state_dict() if model.fp16_scaler is not None else {},
        }
        self.checkpointer.save(done, state)

    def _check_writable(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except (FileExistsError, NotADirectoryError) as error:
            raise NotADirectoryError(
                f"--output-dir/--name: {self.path} or a part of it is a file; choose another --output-dir"
            ) from error
        except OSError as error:
            raise PermissionError(
                f"--output-dir/--name: cannot write to {self.path} ({error.strerror}); choose another --output-dir"
            ) from error

    def _compare_with(self, earlier: Path) -> None:
        before = OmegaConf.load(earlier)
        assert isinstance(before, DictConfig), f"{earlier} was written by a run and holds a mapping"
        changed = differences(self.cfg, before)
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
    """The run's numbers, continued from iteration `start`."""
    trackers = open_trackers(cfg.train, path, start, OmegaConf.to_container(cfg))  # type: ignore[arg-type]
    return MetricLogger(
        path / "training_metrics.json",
        start,
        schedules.n_iterations,
        schedules.global_batch_size,
        cfg.train.log_period,
        trackers,
    )

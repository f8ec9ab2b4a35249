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

# What decides the shape of the weights and the optimizer's groups: a checkpoint that differs here cannot be resumed.
_SHAPE_KEYS = (
    *("student.arch", "student.embed_dim", "student.depth", "student.num_heads", "student.patch_size"),
    *("student.ffn_layer", "student.block_chunks", "student.num_register_tokens", "student.qkv_bias"),
    *("optim.layerwise_decay", "optim.patch_embed_lr_mult"),
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

    def prepare(self, *, resume: bool, eval_only: bool = False) -> None:
        """Make the folder and write config.yaml into it.

        What cannot be continued (a run without a checkpoint, or any run without `resume`) is moved to a folder beside
        this one, never overwritten and never mixed with what comes.

        Raises:
            PermissionError, NotADirectoryError: the folder cannot be written.
            ValueError: the checkpoint that would be resumed has weights of another shape.
        """
        self._check_writable()
        earlier = self.path / "config.yaml"
        has_checkpoint = bool(self.checkpointer.paths())
        if eval_only:
            return
        if earlier.is_file() and not (resume and has_checkpoint):
            aside = self.path.with_name(f"{self.path.name}.before_{time.strftime('%Y%m%d-%H%M%S')}")
            self.path.rename(aside)
            reason = "has no checkpoint to resume" if resume else "is not resumed (--no-resume)"
            logger.warning("the run in %s %s; it is now in %s", self.path, reason, aside)
        elif has_checkpoint and earlier.is_file():
            self._compare_with(earlier)
        write_config(self.cfg, earlier)

    def restore(self, model: SSLMetaArch, *, must_exist: bool = False) -> dict[str, Any] | None:
        """Load the newest readable checkpoint into `model`; returns all that it holds, None where there is none.

        Raises:
            FileNotFoundError: there is none, and it `must_exist`.
            ValueError: no checkpoint can be read, or it holds networks of another shape.
        """
        state = self.checkpointer.load_latest()
        if state is None:
            if must_exist:
                raise FileNotFoundError(f"no checkpoint in {self.checkpointer.folder}; check --output-dir and --name")
            return None
        try:
            model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise ValueError(
                f"the checkpoint in {self.path} is of another architecture than the configuration: "
                f"{' '.join(str(error).split())[:500]}; restore the settings that it was made with, or choose another "
                "--name"
            ) from error
        return state

    def restore_progress(
        self, state: dict[str, Any] | None, model: SSLMetaArch, optimizer: Optimizer, guard: StepGuard
    ) -> int:
        """Take up optimizer and counters from what `restore` gave; returns the number of iterations done."""
        if state is None:
            return 0
        # The optimizer's state also holds its settings; those of the configuration, which may have changed, stay
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        for group, wanted in zip(optimizer.param_groups, settings, strict=True):
            group.update(wanted)
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

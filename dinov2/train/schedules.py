"""Learning rate, weight decay, teacher momentum and temperature as functions of the iteration (DINOv2, appendix B)."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from omegaconf import DictConfig
from torch.optim import Optimizer


class CosineScheduler:
    """Schedule: zero for `freeze_iters`, linear for `warmup_iters`, then half a cosine to `final_value`.

    Beyond `total_iters` the value is `final_value`.
    """

    def __init__(
        self,
        base_value: float,
        final_value: float,
        total_iters: int,
        warmup_iters: int = 0,
        start_warmup_value: float = 0,
        freeze_iters: int = 0,
    ) -> None:
        n_cosine = total_iters - warmup_iters - freeze_iters
        if n_cosine < 0:
            raise ValueError(
                f"schedule of {total_iters} iterations cannot hold {warmup_iters} of warm-up and "
                f"{freeze_iters} frozen; lower optim.warmup_epochs or raise optim.epochs"
            )
        phase = np.arange(n_cosine) / max(n_cosine, 1)
        self.final_value = float(final_value)
        self.values = np.concatenate(
            [
                np.zeros(freeze_iters),
                np.linspace(start_warmup_value, base_value, warmup_iters),
                final_value + 0.5 * (base_value - final_value) * (1 + np.cos(np.pi * phase)),
            ]
        )

    def __getitem__(self, iteration: int) -> float:
        return float(self.values[iteration]) if iteration < len(self.values) else self.final_value


@dataclass(frozen=True)
class StepSettings:
    """Settings of one iteration."""

    lr: float
    last_layer_lr: float
    weight_decay: float
    teacher_momentum: float
    teacher_temp: float
    backbone_is_frozen: bool = False  # while random heads warm up on its features

    def apply_to(self, optimizer: Optimizer) -> None:
        """Set each parameter group's lr and weight decay, times its multipliers."""
        for group in optimizer.param_groups:
            lr = self.last_layer_lr if group["is_last_layer"] else self.lr
            group["lr"] = lr * group["lr_multiplier"]
            group["weight_decay"] = self.weight_decay * group["wd_multiplier"]

    def log_values(self) -> dict[str, float]:
        """Return the values by their names in the log."""
        values = {"lr": self.lr, "last_layer_lr": self.last_layer_lr, "wd": self.weight_decay}
        return {**values, "mom": self.teacher_momentum, "teacher_temp": self.teacher_temp}


class Schedules:
    """All schedules of a run, computed from its config; an epoch is OFFICIAL_EPOCH_LENGTH iterations."""

    def __init__(self, cfg: DictConfig | Any) -> None:
        epoch = cfg.train.OFFICIAL_EPOCH_LENGTH
        optim, teacher = cfg.optim, cfg.teacher
        self.n_iterations = round(optim.epochs * epoch)
        self.global_batch_size = cfg.train.global_batch_size
        self.peak_lr = scaled_lr(optim, self.global_batch_size)
        self.n_warmup = round(optim.warmup_epochs * epoch)
        self.n_last_layer_frozen = round(optim.freeze_last_layer_epochs * epoch)
        self.n_backbone_frozen = optim.freeze_backbone_iterations
        if self.n_backbone_frozen >= max(self.n_iterations, 1):
            raise ValueError(
                f"optim.freeze_backbone_iterations={self.n_backbone_frozen} is all of the run, which has "
                f"{self.n_iterations} iterations (optim.epochs x train.OFFICIAL_EPOCH_LENGTH); lower it, or train "
                "longer"
            )
        n_temp_warmup = round(teacher.warmup_teacher_temp_epochs * epoch)
        self._lr = CosineScheduler(self.peak_lr, optim.min_lr, self.n_iterations, warmup_iters=self.n_warmup)
        self._weight_decay = CosineScheduler(optim.weight_decay, optim.weight_decay_end, self.n_iterations)
        self._momentum = CosineScheduler(teacher.momentum_teacher, teacher.final_momentum_teacher, self.n_iterations)
        self._temp = CosineScheduler(
            teacher.teacher_temp,
            teacher.teacher_temp,
            n_temp_warmup,
            warmup_iters=n_temp_warmup,
            start_warmup_value=teacher.warmup_teacher_temp,
        )

    def at(self, iteration: int) -> StepSettings:
        """Return the settings of the 0-based `iteration`."""
        lr = self._lr[iteration]
        return StepSettings(
            lr=lr,
            last_layer_lr=0.0 if iteration < self.n_last_layer_frozen else lr,
            weight_decay=self._weight_decay[iteration],
            teacher_momentum=self._momentum[iteration],
            teacher_temp=self._temp[iteration],
            backbone_is_frozen=iteration < self.n_backbone_frozen,
        )


def scaled_lr(optim: Any, global_batch_size: int) -> float:
    """Compute the peak learning rate: `optim.base_lr` * sqrt(global_batch_size / 1024).

    If `optim.scaling_rule` is "none", it is `optim.base_lr`.
    """
    if optim.scaling_rule == "none":
        return float(optim.base_lr)
    return optim.base_lr * math.sqrt(global_batch_size / 1024.0)

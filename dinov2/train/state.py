"""All of a run that changes while it trains, as it goes into a checkpoint and comes back."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dinov2.train.monitor import CollapseMonitor
from dinov2.train.optimizer import LossScaler, StepGuard
from dinov2.train.ssl_meta_arch import SSLMetaArch


@dataclass
class Progress:
    """How far a run is. Its random streams are functions of train.seed and these: no generator has a state to save."""

    iteration: int = 0  # steps done
    batch_number: int = 0  # batches drawn: more than steps where the run went back and passed over some
    position: int = 0  # pictures drawn from the global stream, over all processes
    rollbacks: int = 0

    def advance(self, global_batch_size: int) -> None:
        """One step done."""
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
        """Of the loss, where the student computes in fp16."""
        return self.model.fp16_scaler

    def tensors(self, with_scaler: bool) -> dict[str, Any]:
        """The tensors themselves, nested by name: to be copied into a checkpoint, or filled from one."""
        tensors: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self._moments(),
            "guard": self.guard.state_dict(),
        }
        if with_scaler and self.scaler is not None:
            tensors["scaler"] = self.scaler.state_dict()
        return tensors

    def numbers(self) -> dict[str, Any]:
        """What is no tensor."""
        return {
            **vars(self.progress),
            "seed": self.model.cfg.train.seed,
            "global_batch_size": self.model.cfg.train.global_batch_size,
            "has_scaler": self.scaler is not None,
            "monitor": self.monitor.state_dict(),
        }

    def take_up(self, numbers: dict[str, Any]) -> None:
        """Go on from the `numbers` of a checkpoint whose tensors have been filled in."""
        for name in vars(self.progress):
            setattr(self.progress, name, int(numbers[name]))
        self.monitor.load_state_dict(numbers["monitor"])
        self.guard.forget_streak()

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        """AdamW's state by the parameter's name; its settings are the configuration's and the schedules'."""
        return {
            name: self.optimizer.state[parameter]
            for name, parameter in self.model.student.named_parameters()
            if parameter in self.optimizer.state
        }

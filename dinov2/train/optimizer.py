"""AdamW, clipping by sub-network, and the guard that skips bad steps.

Nothing here makes the host wait for the device: decisions stay on it, and the log reads the counts some steps later.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dinov2.distributed import get_rank
from dinov2.fsdp.sharding import local_shards, total_norm

logger = logging.getLogger("dinov2")

SPIKE_MEMORY = 0.98  # momentum of the running mean of the loss: about fifty steps
SPIKE_FLOOR = 0.01  # the spread is at least this share of the mean, so that a flat loss has no spikes
SPIKE_WARM_UP = 50  # steps before the mean is used


def build_optimizer(optim: Any, params_groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """Build AdamW with the betas of the `optim` section; the schedules set lr and weight decay at each step.

    Every parameter has its moments from the start, so that all checkpoints have the same entries.
    """
    optimizer = torch.optim.AdamW(params_groups, lr=0.0, betas=(optim.adamw_beta1, optim.adamw_beta2), fused=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # changes no parameter: lr and gradients are 0
    optimizer.zero_grad(set_to_none=True)
    for parameter in parameters:
        optimizer.state[parameter]["step"].zero_()
    return optimizer


def clip_gradients(student: nn.ModuleDict, max_norm: float) -> dict[str, Tensor]:
    """Clip each sub-network's gradient to a norm of at most `max_norm` (0: no limit); return the norms before."""
    norms = {}
    for name, module in student.items():
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if not gradients:
            norms[name] = torch.zeros((), device=next(module.parameters()).device)
            continue
        norms[name] = total_norm(gradients)
        if max_norm > 0:
            _scale_(gradients, (max_norm / (norms[name] + 1e-6)).clamp(max=1.0))
    return norms


def _scale_(gradients: Sequence[Tensor], factor: Tensor) -> None:
    torch._foreach_mul_(local_shards(gradients), factor)


@torch.no_grad()
def adamw_step(optimizer: torch.optim.Optimizer, found_inf: Tensor) -> None:
    """Make AdamW's step on this process's shards of the parameters; with `found_inf` 1.0, change nothing.

    On shards the host needs a fifth of the time of `optimizer.step()` on DTensors.
    """
    for group in optimizer.param_groups:
        parameters = [p for p in group["params"] if p.grad is not None]
        states = [optimizer.state[p] for p in parameters]
        adamw(
            local_shards(parameters),
            local_shards(p.grad for p in parameters if p.grad is not None),
            local_shards(state["exp_avg"] for state in states),
            local_shards(state["exp_avg_sq"] for state in states),
            [],  # of AMSGrad
            local_shards(state["step"] for state in states),
            fused=True,
            found_inf=found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


class LossScaler:
    """Keeps fp16 gradients in range: the loss is multiplied by `scale`, gradients are divided by it before the step.

    The scale halves after an overflow and doubles after 2,000 steps without one, as in PyTorch's GradScaler. That one
    checks each process's own shard of the gradients; here StepGuard decides, equally on all ranks.
    """

    def __init__(self, scale: float = 65536.0, growth_interval: int = 2000) -> None:
        self.scale_factor = torch.tensor(scale)
        self.good_steps = torch.tensor(0.0)
        self.growth_interval = growth_interval

    def to(self, device: torch.device) -> "LossScaler":
        self.scale_factor, self.good_steps = self.scale_factor.to(device), self.good_steps.to(device)
        return self

    def scale(self, loss: Tensor) -> Tensor:
        """Multiply the loss by the scale."""
        return loss * self.scale_factor

    @torch.no_grad()
    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale; after an overflow they are infinite or NaN."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        _scale_(gradients, 1.0 / self.scale_factor)

    def update(self, is_bad: Tensor) -> None:
        """Adapt the scale after a step with an overflow (`is_bad` 1.0) or without (0.0)."""
        self.good_steps.add_(1).mul_(1 - is_bad)
        grows = self.good_steps >= self.growth_interval
        self.scale_factor.mul_(torch.where(is_bad > 0, 0.5, torch.where(grows, 2.0, 1.0)))
        self.good_steps.mul_((~grows).float())

    def state_dict(self) -> dict[str, Tensor]:
        return {"scale": self.scale_factor, "good_steps": self.good_steps}


class StepGuard:
    """Skips the optimizer step if a loss or gradient is not finite, or if the loss spikes.

    A spike is a total loss of more than `max_spike` standard deviations above its running mean; 0 allows any. The
    decision is the `found_inf` flag of the fused AdamW, so a bad step changes neither weights nor moments.
    All processes have the same losses and norms, and so make the same decision.
    """

    def __init__(self, device: torch.device, max_spike: float = 0.0) -> None:
        self.max_spike = max_spike
        self.skipped = torch.zeros((), device=device)
        self.skipped_in_row = torch.zeros((), device=device)
        self.longest_in_row = torch.zeros((), device=device)
        self.good_steps = torch.zeros((), device=device)
        self.loss_mean = torch.zeros((), device=device)
        self.loss_variance = torch.zeros((), device=device)
        self._reported = 0

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        losses: Mapping[str, Tensor],
        norms: Mapping[str, Tensor],
        scaler: LossScaler | None = None,
    ) -> None:
        """Make one optimizer step, or skip it. Gradients must be unscaled already; `scaler` is then updated."""
        values = torch.stack([value.float() for value in (*losses.values(), *norms.values())])
        overflows = (~torch.isfinite(values).all()).float()
        total = torch.stack([value.float() for value in losses.values()]).sum()
        is_bad = torch.maximum(overflows, self._spikes(total))
        self.skipped += is_bad
        self.skipped_in_row = (self.skipped_in_row + 1) * is_bad
        self.longest_in_row = torch.maximum(self.longest_in_row, self.skipped_in_row)
        adamw_step(optimizer, is_bad)
        if scaler is not None:
            scaler.update(overflows)

    def _spikes(self, total: Tensor) -> Tensor:
        """Return 1.0 if `total` is far above the running mean of the loss, else 0.0; update the mean."""
        spread = (self.loss_variance + (SPIKE_FLOOR * self.loss_mean).square()).sqrt()
        limit = self.loss_mean + self.max_spike * spread
        is_warm = self.good_steps >= SPIKE_WARM_UP
        spikes = (is_warm & (total > limit)).float() if self.max_spike > 0 else torch.zeros_like(total)
        # A spike enters the mean as the limit, so that the mean follows a loss that stays on a new level
        counted = torch.where(is_warm & (total > limit), limit, total)
        finite = torch.isfinite(counted)
        # a plain mean at first, since the running mean starts at 0
        weight = torch.clamp(1 / (self.good_steps + 1), min=1 - SPIKE_MEMORY) * finite
        difference = torch.where(finite, counted, self.loss_mean) - self.loss_mean
        self.loss_mean += weight * difference
        self.loss_variance = (1 - weight) * (self.loss_variance + weight * difference.square())
        self.good_steps += finite
        return spikes

    def log_values(self, losses: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the values of a step for the log, on the device."""
        return {
            "total_loss": torch.stack(list(losses.values())).sum(),
            **losses,
            **{f"grad_norm_{name}": norm for name, norm in norms.items()},
            "skipped_steps": self.skipped.clone(),
            "longest_skipped_in_row": self.longest_in_row.clone(),
        }

    def is_stuck(self, newest: Mapping[str, float], max_in_row: int) -> bool:
        """Return whether there were `max_in_row` bad steps in a row; warn of newly skipped steps."""
        n_skipped = int(newest["skipped_steps"])
        if n_skipped > self._reported:
            logger.warning("%d steps so far were skipped: a loss or gradient was not finite, or spiked", n_skipped)
        self._reported = n_skipped
        return newest["longest_skipped_in_row"] >= max_in_row

    def describe(self, newest: Mapping[str, float]) -> str:
        """Describe the bad steps, for the log and for errors."""
        terms = ", ".join(f"{k}={v}" for k, v in newest.items() if k.endswith("_loss") or k.startswith("grad_norm"))
        return (
            f"iteration {int(newest['iteration'])}, rank {get_rank()}: {int(newest['longest_skipped_in_row'])} steps "
            f"in a row had losses or gradients that were not finite, or spiked, and were skipped (now: {terms})"
        )

    def forget_streak(self) -> None:
        """Count bad steps in a row from 0 again, after a roll-back."""
        self.skipped_in_row.zero_()
        self.longest_in_row.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        names = ("skipped", "skipped_in_row", "good_steps", "loss_mean", "loss_variance")
        return {name: getattr(self, name) for name in names}

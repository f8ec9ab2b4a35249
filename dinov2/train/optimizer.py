"""AdamW on parameter groups, clipping by sub-network, and the guard that keeps bad steps out of the weights."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.distributed import get_rank

logger = logging.getLogger("dinov2")


def build_optimizer(optim: Any, params_groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW with the betas of the `optim` section; lr and weight decay are set by the schedules at each step."""
    return torch.optim.AdamW(params_groups, betas=(optim.adamw_beta1, optim.adamw_beta2), fused=True)


def clip_gradients(student: nn.ModuleDict, max_norm: float) -> dict[str, Tensor]:
    """Scale each sub-network's gradient to a norm of at most `max_norm` (0: leave it); returns the norms before."""
    norms = {}
    for name, module in student.items():
        parameters = [p for p in module.parameters() if p.grad is not None]
        norms[name] = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if max_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norms[name])
    return norms


class StepGuard:
    """Skips the optimizer step when a loss or gradient is not finite, without the host waiting for the device.

    The verdict stays on the device and goes to the fused AdamW as its `found_inf` flag, so a bad step changes neither
    weights nor moments. The log reads the counts, a few iterations late.
    """

    def __init__(self, device: torch.device) -> None:
        self.skipped_in_row = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.longest_in_row = torch.zeros((), device=device)
        self._reported = 0

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        losses: dict[str, Tensor],
        norms: dict[str, Tensor],
        scaler: "torch.amp.GradScaler | None" = None,
    ) -> None:
        """One optimizer step, or none. Gradients must be unscaled already; `scaler` then learns of overflows."""
        evidence = torch.stack([value.float() for value in (*losses.values(), *norms.values())])
        is_bad = (~torch.isfinite(evidence).all()).float()
        self.skipped += is_bad
        self.skipped_in_row = (self.skipped_in_row + 1) * is_bad
        self.longest_in_row = torch.maximum(self.longest_in_row, self.skipped_in_row)
        optimizer.grad_scale = None  # type: ignore[attr-defined]  # read by the fused step, as GradScaler sets it
        optimizer.found_inf = is_bad  # type: ignore[attr-defined]
        optimizer.step()
        if scaler is not None:
            scaler.update()

    def shown(self, losses: dict[str, Tensor], norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the log keeps of a step, on the device."""
        return {
            "total_loss": torch.stack(list(losses.values())).sum(),
            **losses,
            **{f"grad_norm_{name}": norm for name, norm in norms.items()},
            "skipped_steps": self.skipped.clone(),
            "longest_skipped_in_row": self.longest_in_row.clone(),
        }

    def stop_if_stuck(self, newest: Mapping[str, float], max_in_row: int) -> None:
        """Warn of skipped steps, and give up after `max_in_row` of them in a row.

        Raises:
            FloatingPointError: with the iteration, the rank and each loss.
        """
        n_skipped = int(newest["skipped_steps"])
        if n_skipped > self._reported:
            logger.warning("%d steps so far were skipped: a loss or gradient was not finite", n_skipped)
            self._reported = n_skipped
        if newest["longest_skipped_in_row"] >= max_in_row:
            terms = ", ".join(f"{k}={v}" for k, v in newest.items() if k.endswith("_loss") or k.startswith("grad_norm"))
            in_row = int(newest["longest_skipped_in_row"])
            raise FloatingPointError(
                f"iteration {int(newest['iteration'])}, rank {get_rank()}: {in_row} steps in a row had no finite "
                f"losses and gradients and were skipped (now: {terms}); the last checkpoint is from before. Lower "
                "optim.base_lr, or set compute_precision to bf16 or fp32, and start the run again"
            )

    def state_dict(self) -> dict[str, Tensor]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.skipped.copy_(state["skipped"])

"""Gradient accumulation with the loss of the global batch.

Sinkhorn-Knopp, centering, KoLeo, LeJEPA, metadata guidance and the smooth rank compare images across micro-batches. So
the teacher runs over all A micro-batches of a step first, and its logits are balanced together. The student's features
are first computed without gradient, so that each micro-batch can be compared with all others.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from dinov2.distributed import all_gather_rows, get_rank
from dinov2.fsdp.sharding import without_gradient_sync
from dinov2.train.ssl_meta_arch import BatchFeatures, SSLMetaArch


def forward_backward(
    model: SSLMetaArch, micro_batches: Sequence[Mapping[str, Any]], teacher_temp: float
) -> dict[str, Tensor]:
    """Compute one step's losses and gradients over this process's micro-batches.

    Args:
        micro_batches: A batch dicts of `dinov2.data.collate`, of equal size.
        teacher_temp: temperature of the teacher's targets.

    Returns:
        the losses that `SSLMetaArch.forward_backward` returns, averaged over the micro-batches.
    """
    if len(micro_batches) == 1:
        return model.forward_backward(micro_batches[0], teacher_temp)
    batches = [model.to_device(images) for images in micro_batches]
    n = len(batches)
    targets = model.step_targets(batches, teacher_temp)
    with model.clock.stage("student"):
        features = _features_without_gradient(model, batches) if model.compares_images else None
    losses: list[dict[str, Tensor]] = []
    for number, (images, target) in enumerate(zip(batches, targets, strict=True)):
        own = None if features is None else BatchFeatures(features, get_rank() * n + number)
        with ExitStack() as stack:
            if number < n - 1:
                for module in model.callables.values():
                    stack.enter_context(without_gradient_sync(module))
            losses.append(model.student_step(images, target, own, n_micro_batches=n))
    return {name: torch.stack([loss[name] for loss in losses]).mean() for name in losses[0]}


@torch.no_grad()
def _features_without_gradient(model: SSLMetaArch, batches: Sequence[Mapping[str, Any]]) -> Tensor:
    """Compute the compared CLS tokens of all micro-batches of all processes, `BatchFeatures.all`: a forward pass."""
    return all_gather_rows(torch.stack([model.compared_tokens(model.student_tokens(images)) for images in batches]))

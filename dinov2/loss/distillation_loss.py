"""Regression of a frozen network's tokens.

Dimension key:  R crops, P patches of a crop, D embedding dim of the student, T of the frozen teacher
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DistillationHead(nn.Module):
    """Two linear maps of the student's tokens to the teacher's: of CLS tokens and of patch tokens."""

    def __init__(self, embed_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.cls = nn.Linear(embed_dim, teacher_dim)
        self.patches = nn.Linear(embed_dim, teacher_dim)

    def forward(self, cls_tokens: Tensor, patch_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Map CLS tokens [R, D] and patch tokens [R, P, D] to [R, T] and [R, P, T]."""
        return self.cls(cls_tokens), self.patches(patch_tokens)


def token_distance(predicted: Tensor, tokens: Tensor) -> Tensor:
    """Average the squared distance between predictions [..., T] and standardised tokens [..., T] of the teacher.

    Each token is given mean 0 and variance 1 over its T numbers, so networks of any scale have losses of a like size: 1
    for predictions of 0. Unlike statistics over images, this does not depend on the batch.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        targets = F.layer_norm(tokens.float(), tokens.shape[-1:])
        return F.mse_loss(predicted.float(), targets)

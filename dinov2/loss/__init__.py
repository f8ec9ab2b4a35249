"""Losses of the self-distillation step: tensors in, scalar out."""

from dinov2.loss.dino_clstoken_loss import DINOLoss
from dinov2.loss.distillation_loss import DistillationHead, token_distance
from dinov2.loss.ibot_patch_loss import iBOTPatchLoss
from dinov2.loss.koleo_loss import KoLeoLoss
from dinov2.loss.metadata_loss import MetadataLoss, reverse_gradient
from dinov2.loss.sigreg_loss import SIGRegLoss
from dinov2.loss.smooth_rank_loss import smooth_rank_loss

__all__ = [
    "DINOLoss",
    "DistillationHead",
    "KoLeoLoss",
    "MetadataLoss",
    "SIGRegLoss",
    "iBOTPatchLoss",
    "reverse_gradient",
    "smooth_rank_loss",
    "token_distance",
]

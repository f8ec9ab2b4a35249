"""iBOT loss between masked patch tokens (Zhou et al. 2021, arXiv 2111.07832), as DINOv2 scales it.

Dimension key:  C crops in the batch (2B), P patches per crop, M masked patches in the batch, K prototypes,
                d bottleneck dim
"""

import torch
import torch.distributed as dist
from torch import Tensor

from dinov2.distributed import is_enabled
from dinov2.loss.prototype_cross_entropy import prototype_cross_entropy
from dinov2.loss.sinkhorn import TeacherCenter, sinkhorn_knopp


class iBOTPatchLoss(TeacherCenter):
    """Cross-entropy of student predictions at masked patches against the teacher's view of the same patches.

    Args:
        patch_out_dim: K.
        student_temp: temperature of the predictions.
        center_momentum: momentum of the moving center of teacher logits.
        compiled: fuse the loss with torch.compile (for CUDA).
    """

    def __init__(
        self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9, compiled: bool = False
    ) -> None:
        super().__init__((1, 1, patch_out_dim), center_momentum)
        self.student_temp = student_temp
        self.compiled = compiled

    def targets(
        self, teacher_output: Tensor, teacher_temp: float, centering: str, n_masked_patches_tensor: Tensor
    ) -> Tensor:
        """Compute targets [M, K] from teacher logits [M, K] by "sinkhorn_knopp" or "centering"."""
        if centering == "sinkhorn_knopp":
            return self.sinkhorn_knopp_teacher(teacher_output, teacher_temp, n_masked_patches_tensor)
        batch = teacher_output.unsqueeze(0)  # [1, M, K]
        targets = self.softmax_center_teacher(batch, teacher_temp).squeeze(0)
        self.update_center(batch)
        return targets

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self, teacher_output: Tensor, teacher_temp: float, n_masked_patches_tensor: Tensor, n_iterations: int = 3
    ) -> Tensor:
        """Balance teacher logits [M, K] at the masked patches into assignments [M, K].

        Args:
            n_masked_patches_tensor: [1] int, M of this process; processes mask different numbers of patches.
        """
        n_rows_global = n_masked_patches_tensor.float()
        if is_enabled():
            dist.all_reduce(n_rows_global)
        return sinkhorn_knopp(teacher_output, teacher_temp, n_rows_global, n_iterations)

    def forward(self, student_patch_tokens: Tensor, teacher_patch_tokens: Tensor, student_masks_flat: Tensor) -> Tensor:
        """Average over crops the mean cross-entropy over each crop's masked patches.

        Args:
            student_patch_tokens: [C, P, K] logits.
            teacher_patch_tokens: [C, P, K] targets.
            student_masks_flat: [C, P] bool, True where the student saw the mask token.
        """
        masks = student_masks_flat
        return self.forward_masked(student_patch_tokens[masks], teacher_patch_tokens[masks], masks)

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: Tensor,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
        prototypes: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss from the masked patches alone, in the order of the flattened masks.

        Args:
            student_patch_tokens_masked: [M, K] logits; or, with `prototypes`, embeddings [M, d] of the head.
            teacher_patch_tokens_masked: [M, K] targets.
            student_masks_flat: [C, P] bool; crops without a mask count in C.
            n_masked_patches: M, if the tensors have padding rows after it.
            masks_weight: [M] one over the number of masked patches of the patch's crop; computed if not given.
            prototypes: [K, d], the weight of the head's last layer.

        Returns:
            scalar: -1/C sum_m w_m sum_k t_mk log softmax(s_m / student_temp)_k
        """
        if masks_weight is None:
            per_crop = (1.0 / student_masks_flat.sum(dim=-1).clamp(min=1.0)).unsqueeze(-1)
            masks_weight = per_crop.expand_as(student_masks_flat)[student_masks_flat]  # [M]
        n_crops, rows = student_masks_flat.shape[0], slice(n_masked_patches)
        return prototype_cross_entropy(
            student_patch_tokens_masked[rows],
            teacher_patch_tokens_masked[rows],
            masks_weight / n_crops,
            self.student_temp,
            prototypes,
            self.compiled,
        )

    @torch.no_grad()
    def update_center(self, teacher_patch_tokens: Tensor) -> None:
        """Queue this batch's logits [C, P, K] (or [1, M, K]) for the moving center."""
        self._queue_update(teacher_patch_tokens.flatten(0, 1))

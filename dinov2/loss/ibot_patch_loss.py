"""iBOT loss between masked patch tokens (Zhou et al. 2021, arXiv 2111.07832), as DINOv2 scales it.

Dimension key:  C crops in the batch (2B), P patches per crop, M masked patches in the batch, K prototypes
"""

import torch
import torch.distributed as dist
from torch import Tensor

from dinov2.distributed import is_enabled
from dinov2.loss.prototype_loss import Targets
from dinov2.loss.teacher_targets import TeacherCenter, balance_, similarity


class iBOTPatchLoss(TeacherCenter):
    """Cross-entropy of student predictions at masked patches against the teacher's view of the same patches."""

    def __init__(self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__((1, 1, patch_out_dim), center_momentum)
        self.student_temp = student_temp

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self, teacher_output: Tensor, teacher_temp: float, n_masked_patches_tensor: Tensor, n_iterations: int = 3
    ) -> Tensor:
        """Balanced assignments [M, K] of teacher logits [M, K] at the masked patches.

        Args:
            n_masked_patches_tensor: [1] int, M of this process; processes mask different numbers of patches.
        """
        logits = teacher_output.float().clone()
        return self.balance_teacher_(logits, teacher_temp, n_masked_patches_tensor, n_iterations).dense()

    @torch.no_grad()
    def balance_teacher_(
        self, teacher_output: Tensor, teacher_temp: float, n_masked_patches_tensor: Tensor, n_iterations: int = 3
    ) -> Targets:
        """`sinkhorn_knopp_teacher` in the place of the logits and not written out."""
        n_rows_global = n_masked_patches_tensor.float()
        if is_enabled():
            dist.all_reduce(n_rows_global)
        return balance_(teacher_output, teacher_temp, n_rows_global, n_iterations)

    def forward(self, student_patch_tokens: Tensor, teacher_patch_tokens: Tensor, student_masks_flat: Tensor) -> Tensor:
        """Mean over crops of the mean cross-entropy over each crop's masked patches.

        Args:
            student_patch_tokens: [C, P, K] logits.
            teacher_patch_tokens: [C, P, K] targets.
            student_masks_flat: [C, P] bool, True where the student saw the mask token.
        """
        cross_entropy = -similarity(student_patch_tokens, teacher_patch_tokens, self.student_temp)  # [C, P]
        masks = student_masks_flat.float()
        return ((cross_entropy * masks).sum(dim=-1) / masks.sum(dim=-1).clamp(min=1.0)).mean()

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: Tensor,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
    ) -> Tensor:
        """The same from the masked patches alone, in the order in which they stand in the flattened masks.

        Args:
            student_patch_tokens_masked: [M, K] logits.
            teacher_patch_tokens_masked: [M, K] targets.
            student_masks_flat: [C, P] bool; crops without a mask count in C.
            n_masked_patches: M, where the tensors carry padding rows behind it.
            masks_weight: [M] one over the number of masked patches of the patch's crop; worked out if not given.

        Returns:
            scalar: -1/C sum_m w_m sum_k t_mk log softmax(s_m / student_temp)_k
        """
        if masks_weight is None:
            per_crop = (1.0 / student_masks_flat.sum(dim=-1).clamp(min=1.0)).unsqueeze(-1)
            masks_weight = per_crop.expand_as(student_masks_flat)[student_masks_flat]  # [M]
        agreement = similarity(student_patch_tokens_masked, teacher_patch_tokens_masked, self.student_temp)  # [M]
        if n_masked_patches is not None:
            agreement = agreement[:n_masked_patches]
        return -(agreement * masks_weight).sum() / student_masks_flat.shape[0]

    @torch.no_grad()
    def update_center(self, teacher_patch_tokens: Tensor) -> None:
        """Queue this batch's logits [C, P, K] (or [1, M, K]) for the moving center."""
        self._queue_update(teacher_patch_tokens.flatten(0, 1))

"""DINO loss between CLS tokens (Caron et al. 2021, arXiv 2104.14294), as DINOv2 scales it.

Dimension key:  B images on this process, n crops, K prototypes, d bottleneck dim
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dinov2.distributed import get_world_size
from dinov2.loss.prototype_cross_entropy import prototype_cross_entropy
from dinov2.loss.sinkhorn import TeacherCenter, sinkhorn_knopp


class DINOLoss(TeacherCenter):
    """Cross-entropy of student CLS predictions against teacher assignments, summed over pairs of crops.

    Args:
        out_dim: K.
        student_temp: temperature of the predictions.
        center_momentum: momentum of the moving center of teacher logits.
        compiled: fuse the loss with torch.compile (for CUDA).
    """

    def __init__(
        self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9, compiled: bool = False
    ) -> None:
        super().__init__((1, out_dim), center_momentum)
        self.student_temp = student_temp
        self.compiled = compiled

    def targets(self, teacher_output: Tensor, teacher_temp: float, centering: str) -> Tensor:
        """Compute targets [R, K] from teacher logits [R, K] by "sinkhorn_knopp" or "centering"."""
        if centering == "sinkhorn_knopp":
            return self.sinkhorn_knopp_teacher(teacher_output, teacher_temp)
        targets = self.softmax_center_teacher(teacher_output, teacher_temp)
        self.update_center(teacher_output)
        return targets

    @torch.no_grad()
    def sinkhorn_knopp_teacher(self, teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3) -> Tensor:
        """Balance teacher logits [R, K] into assignments [R, K]; every process must hold the same R."""
        n_rows_global = teacher_output.shape[0] * get_world_size()
        return sinkhorn_knopp(teacher_output, teacher_temp, n_rows_global, n_iterations)

    def forward(
        self,
        student_output_list: Sequence[Tensor],
        teacher_out_softmaxed_centered_list: Sequence[Tensor] | Tensor,
        prototypes: Tensor | None = None,
    ) -> Tensor:
        """Compute the sum over all (student, teacher) pairs of the mean cross-entropy.

        Args:
            student_output_list: n logits [B, K]; or, with `prototypes`, n embeddings [B, d] of the head.
            teacher_out_softmaxed_centered_list: targets whose rows sum to 1, each [B, K] (or one tensor [n, B, K]).
            prototypes: [K, d], the weight of the head's last layer.

        Returns:
            scalar: -sum_pairs mean_b sum_k t_bk log softmax(s_b / student_temp)_k
        """
        if not len(student_output_list):
            raise ValueError(
                "DINOLoss: student_output_list is empty; leave the term out when there are no crops for it"
            )
        # A student crop is compared with all targets of its image. The loss is linear in them: their sum is one target
        targets = torch.stack([target.float() for target in teacher_out_softmaxed_centered_list]).sum(dim=0)  # [B, K]
        student = torch.cat(list(student_output_list))  # [n * B, K or d]
        weights = torch.full((len(student),), 1 / len(targets), device=student.device)
        return prototype_cross_entropy(student, targets, weights, self.student_temp, prototypes, self.compiled)

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """Queue this batch's logits [R, K] for the moving center."""
        self._queue_update(teacher_output)

"""DINO loss between CLS tokens (Caron et al. 2021, arXiv 2104.14294), as DINOv2 scales it.

Dimension key:  B images on this process, K prototypes
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dinov2.distributed import get_world_size
from dinov2.loss.teacher_targets import TeacherCenter, similarity, sinkhorn_knopp


class DINOLoss(TeacherCenter):
    """Cross-entropy of student CLS predictions against teacher assignments, summed over pairs of crops."""

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__((1, out_dim), center_momentum)
        self.student_temp = student_temp

    @torch.no_grad()
    def sinkhorn_knopp_teacher(self, teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3) -> Tensor:
        """Balanced assignments [R, K] of teacher logits [R, K]; every process must hold the same R."""
        n_rows_global = teacher_output.shape[0] * get_world_size()
        return sinkhorn_knopp(teacher_output, teacher_temp, n_rows_global, n_iterations)

    def forward(
        self, student_output_list: Sequence[Tensor], teacher_out_softmaxed_centered_list: Sequence[Tensor] | Tensor
    ) -> Tensor:
        """Sum over all (student, teacher) pairs of the mean cross-entropy.

        Args:
            student_output_list: logits, each [B, K].
            teacher_out_softmaxed_centered_list: targets whose rows sum to 1, each [B, K] (or one tensor [n, B, K]).

        Returns:
            scalar: -sum_pairs mean_b sum_k t_bk log softmax(s_b / student_temp)_k
        """
        # The targets meet a student's log-probabilities only in sums of products, so they can be added up first.
        target = torch.stack([targets.float() for targets in teacher_out_softmaxed_centered_list]).sum(dim=0)
        total: Tensor | float = 0.0
        for logits in student_output_list:
            total = total - similarity(logits, target, self.student_temp).mean()
        if not isinstance(total, Tensor):
            raise ValueError(
                "DINOLoss: student_output_list is empty; leave the term out when there are no crops for it"
            )
        return total

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """Queue this batch's logits [R, K] for the moving center."""
        self._queue_update(teacher_output)

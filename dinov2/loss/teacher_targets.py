"""From teacher logits to targets: Sinkhorn-Knopp balancing and softmax centering, shared by the CLS and patch losses.

Dimension key:  R rows (CLS tokens or masked patches of this process), K prototypes
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov2.distributed import is_enabled
from dinov2.loss import sinkhorn_passes, triton_kernels
from dinov2.loss.prototype_loss import Targets


@torch.no_grad()
def balance_(logits: Tensor, teacher_temp: float, n_rows_global: int | Tensor, n_iterations: int = 3) -> Targets:
    """Assign rows to prototypes so that every prototype gets the same mass over all processes (SwAV, arXiv 2006.09882).

    The balanced matrix is diag(v) M diag(u) with M = exp(logits / temp): only the two scaling vectors are iterated, and
    M stands where the logits stood. Starting from the rows as they are gives what normalising the whole matrix in turn
    gives. A round reads M once: what makes the new v of some rows then adds these to the next u.

    Args:
        logits: [R, K] teacher outputs, overwritten; R may differ between processes and may be 0.
        teacher_temp: temperature of the assignment.
        n_rows_global: R summed over all processes.
        n_iterations: rounds of prototype- then row-normalisation.

    Returns:
        targets whose rows sum to 1.
    """
    passes = triton_kernels if triton_kernels.available(logits.device) else sinkhorn_passes
    n_rows, n_prototypes = logits.shape
    # Row b of M is kept divided by exp(its largest logit), so that exp() neither overflows nor loses a whole row; the
    # factors come back through v, relative to the largest over all processes, so that rows keep their weights.
    row_max = passes.exponentiate_(logits, 1 / teacher_temp)
    largest = row_max.max() if n_rows else row_max.new_full((), float("-inf"))
    if is_enabled():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    mass = logits
    column_mass = passes.column_sums(mass, torch.exp(row_max - largest))  # [K]
    for is_last in [False] * (n_iterations - 1) + [True]:
        if is_enabled():
            dist.all_reduce(column_mass)
        # a prototype that no row comes near has no mass to scale up
        column_scale = 1.0 / (n_prototypes * column_mass.clamp(min=torch.finfo(torch.float32).tiny))  # u: [K]
        if not is_last:
            _, column_mass = passes.row_and_column_sums(mass, column_scale, n_rows_global)
    return Targets(mass, 1.0 / passes.row_sums(mass, column_scale), column_scale)


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, teacher_temp: float, n_rows_global: int | Tensor, n_iterations: int = 3) -> Tensor:
    """`balance_` of a copy of the logits, written out: float32 [R, K], each row sums to 1."""
    return balance_(logits.float().clone(), teacher_temp, n_rows_global, n_iterations).dense()


def similarity(student: Tensor, targets: Tensor, student_temp: float) -> Tensor:
    """sum_k t_k log softmax(s / student_temp)_k of logits and targets [..., K]: minus their cross-entropy.

    Written as t.s / temp - (sum_k t_k) logsumexp(s / temp), so that no K-wide log-probabilities are kept for backward.
    """
    scaled = student.float() / student_temp
    targets = targets.float()
    return torch.einsum("...k,...k->...", targets, scaled) - targets.sum(dim=-1) * scaled.logsumexp(dim=-1)


class TeacherCenter(nn.Module):
    """Moving average of teacher logits, subtracted before the softmax (DINO, arXiv 2104.14294, section 3.1).

    The update asked for by `update` is reduced over processes while the student runs and takes effect at the next
    `softmax_center_teacher`: each step is centred by the steps before it, never by itself.
    """

    center: Tensor

    def __init__(self, shape: tuple[int, ...], momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(shape))
        self._pending: tuple[Tensor, dist.Work | None] | None = None

    @torch.no_grad()
    def softmax_center_teacher(self, teacher_output: Tensor, teacher_temp: float) -> Tensor:
        """softmax((logits - center) / temp) over the last dimension, float32, same shape as `teacher_output`."""
        self.apply_center_update()
        return torch.softmax((teacher_output.float() - self.center) / teacher_temp, dim=-1)

    @torch.no_grad()
    def _queue_update(self, rows: Tensor) -> None:
        """Take up the mean of this batch's logits [R, K] over all processes, applied at the next use.

        Each row counts the same, wherever it is: processes mask different numbers of patches, and R may be 0.
        """
        self.apply_center_update()
        total = rows.float().sum(dim=0)  # [K]
        sums = torch.cat([total, total.new_full((1,), rows.shape[0])])
        work = dist.all_reduce(sums, async_op=True) if is_enabled() else None
        self._pending = (sums, work)

    @torch.no_grad()
    def apply_center_update(self) -> None:
        """Move the center by the update that is waiting, if one is (a checkpoint calls this, so that none is lost)."""
        if self._pending is None:
            return
        sums, work = self._pending
        if work is not None:
            work.wait()
        batch_center = sums[:-1] / sums[-1]
        moved = self.center * self.momentum + batch_center.view_as(self.center) * (1 - self.momentum)
        # A batch that is not finite is skipped by the optimizer too; here it would stay in every target to come. Nor
        # does a batch without a masked patch move the center.
        self.center.copy_(torch.where(moved.isfinite().all(), moved, self.center))
        self._pending = None

"""KoLeo regulariser: spreads features over the sphere (Sablayrolles et al. 2019, arXiv 1806.03198)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# DinoBloom's value; DINOv2 has 1e-8. The distance between two identical features is eps * sqrt(D), so it bounds the
# gradient of a duplicate image in the batch.
PAIRWISE_EPS = 1e-4


class KoLeoLoss(nn.Module):
    """Minus the Kozachenko-Leonenko estimate of entropy: -mean_i log min_j ||x_i - x_j||, x on the unit sphere."""

    def __init__(self) -> None:
        super().__init__()
        self.pdist = nn.PairwiseDistance(2, eps=PAIRWISE_EPS)

    def pairwise_NNs_inner(self, x: Tensor) -> Tensor:
        """Return the index [B] of each row's nearest other row, for unit vectors x [B, D]."""
        similarities = x @ x.T
        similarities.fill_diagonal_(-1)
        return similarities.argmax(dim=1)

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """Compute the loss of features [B, D]; B must be at least 2, since a single feature has no neighbour."""
        if student_output.shape[0] < 2:
            raise ValueError(
                f"KoLeo needs two images per view to have neighbours, found {student_output.shape[0]}; "
                "raise train.batch_size_per_gpu or set dino.koleo_loss_weight=0"
            )
        with torch.autocast(student_output.device.type, enabled=False):
            x = F.normalize(student_output.float(), eps=eps, p=2.0, dim=-1)
            with torch.no_grad():
                neighbours = self.pairwise_NNs_inner(x)
            return -torch.log(self.pdist(x, x[neighbours]) + eps).mean()

"""Layer normalisation of a residual stream that may be of a higher precision than the weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that takes float32 also with half-precision weights, as sharding gathers them.

    Autocast takes care of it on CUDA; on a CPU it leaves the types as they are, and the kernel refuses the mixture.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to the same shape."""
        if x.dtype != torch.float32 or self.weight.dtype == torch.float32:
            return super().forward(x)
        return F.layer_norm(x, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)

"""Feed-forward network with a gated SiLU unit (Shazeer 2020, arXiv 2002.05202), as in ViT-g/14."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLUFFN(nn.Module):
    """Feed-forward network W3 (silu(W1 x) * W2 x); W1 and W2 are one matrix, `w12`, as in the released weights.

    `act_layer` and `drop` are not used; a block passes the same arguments to either kind of network.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] | None = None,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.w12 = nn.Linear(in_features, 2 * hidden_features, bias=bias)
        self.w3 = nn.Linear(hidden_features, out_features or in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class SwiGLUFFNFused(SwiGLUFFN):
    """SwiGLUFFN with about as many parameters as an Mlp of the same `hidden_features`.

    It has three matrices instead of two, so its width is 2/3 of `hidden_features`, rounded up to a multiple of 8.
    (Upstream fuses the products with xFormers, hence the name; here they are plain torch.)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] | None = None,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        width = (int((hidden_features or in_features) * 2 / 3) + 7) // 8 * 8
        super().__init__(in_features, width, out_features, act_layer, drop, bias)

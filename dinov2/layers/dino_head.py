"""Projection head of DINO and iBOT: tokens to scores over prototypes (Caron et al. 2021, arXiv 2104.14294).

Dimension key:  N tokens, D embedding dim, d bottleneck dim, K prototypes
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightNormLinear(nn.Module):
    """Linear map x W^T with weight normalisation: W_k = g_k v_k / ||v_k|| (Salimans & Kingma, arXiv 1602.07868).

    Its parameters `weight_g` [K, 1] and `weight_v` [K, d] have the names of the released state dicts, which torch's
    parametrizations would change.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        bound = 1 / math.sqrt(in_features)  # nn.Linear's initialisation, which upstream keeps for this layer
        nn.init.uniform_(self.weight_v, -bound, bound)

    def weight(self) -> Tensor:
        """Compute W = g v / |v|, [K, d], in float32, even if sharding gathers the parameters in half precision.

        A rounding error in |v| would scale all logits of its prototype, and the temperature would magnify it.
        """
        with torch.autocast(self.weight_v.device.type, enabled=False):
            direction = self.weight_v.float()
            return direction * (self.weight_g.float() / direction.norm(dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., d] to [..., K]."""
        return F.linear(x, self.weight().to(x.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class DINOHead(nn.Module):
    """MLP with `nlayers` linear layers to a bottleneck [d], L2 normalisation, then K weight-normalised prototypes."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        self.mlp = _build_mlp(max(nlayers, 1), in_dim, bottleneck_dim, hidden_dim, use_bn, mlp_bias)
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)

    def forward(self, x: Tensor, with_logits: bool = True) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the logits [N, K] of tokens [N, D].

        Without `with_logits`, return their factors instead: embeddings [N, d] (unit vectors) and prototypes [K, d], for
        a loss that computes logits in chunks. Sharded prototypes are gathered only during this call.
        """
        x = self.mlp(x)
        # normalised in float32, then converted back: the products with the prototypes use the head's type
        embedding = F.normalize(x.float(), dim=-1).to(x.dtype)
        if with_logits:
            return self.last_layer(embedding)
        return embedding, self.last_layer.weight()


def _build_mlp(
    nlayers: int, in_dim: int, bottleneck_dim: int, hidden_dim: int, use_bn: bool, bias: bool
) -> nn.Linear | nn.Sequential:
    if nlayers == 1:
        return nn.Linear(in_dim, bottleneck_dim, bias=bias)
    layers: list[nn.Module] = []
    for width in [in_dim] + [hidden_dim] * (nlayers - 2):
        layers.append(nn.Linear(width, hidden_dim, bias=bias))
        if use_bn:
            layers.append(nn.BatchNorm1d(hidden_dim))
        layers.append(nn.GELU())
    return nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim, bias=bias))

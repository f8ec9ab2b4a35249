"""Projection head of DINO and iBOT: tokens to scores over prototypes (Caron et al. 2021, arXiv 2104.14294).

Dimension key:  N tokens, D embedding dim, d bottleneck dim, K prototypes
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Result = TypeVar("Result")

# Prototypes, and rows of tokens, that a CPU multiplies at a time: both and what they make fit its caches
PIECE, PIECE_ROWS = 4096, 256


class WeightNormLinear(nn.Module):
    """x W^T without bias, W's rows having a direction and a length of their own (Salimans & Kingma, arXiv 1602.07868).

    W_k = g_k v_k / ||v_k||

    Owns `weight_g` [K, 1] and `weight_v` [K, d] under the names of the released state dicts, which torch's
    parametrizations would rename.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        bound = 1 / math.sqrt(in_features)  # nn.Linear's own start, which upstream keeps for this layer
        nn.init.uniform_(self.weight_v, -bound, bound)

    def weight(self) -> Tensor:
        """W, [K, d], in float32 also where sharding gathers half-precision weights: a rounded length shifts a whole
        prototype, and the temperature magnifies it."""
        return torch._weight_norm(self.weight_v.float(), self.weight_g.float(), 0)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to [..., K]."""
        if x.device.type == "cpu" and not torch.is_grad_enabled():
            return self._by_pieces(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return F.linear(x, self.weight().to(x.dtype))

    def _by_pieces(self, x: Tensor) -> Tensor:
        """[N, d] to [N, K], with some of W in the processor's cache at a time: it is never whole."""
        logits = x.new_empty(len(x), self.out_features)
        with torch.autocast("cpu", enabled=False):
            for start in range(0, self.out_features, PIECE):
                some = slice(start, start + PIECE)
                w = torch._weight_norm(self.weight_v[some].float(), self.weight_g[some].float(), 0).to(x.dtype)
                for rows, of_rows in zip(x.split(PIECE_ROWS), logits[:, some].split(PIECE_ROWS), strict=True):
                    torch.mm(rows, w.T, out=of_rows)
        return logits

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class DINOHead(nn.Module):
    """MLP to a bottleneck, L2 normalisation there, then weight-normalised prototypes.

    Args:
        in_dim: D.
        out_dim: K.
        use_bn: batch norm after each hidden layer.
        nlayers: linear layers of the MLP; 1 or less for a single one without activation.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: d.
        mlp_bias: whether the MLP's layers have a bias.
    """

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

    def embed(self, x: Tensor) -> Tensor:
        """The bottleneck's unit vectors: [N, D] to [N, d]."""
        x = self.mlp(x)
        # 1e-12 is 0 in float16, where a zero vector would become NaN
        return F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)

    @overload
    def forward(self, x: Tensor) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, score: Callable[[Tensor, Tensor, Tensor], Result]) -> Result: ...

    def forward(self, x: Tensor, score: Callable[[Tensor, Tensor, Tensor], Any] | None = None) -> Any:
        """Logits: [N, D] to [N, K]; or what `score` makes without them of unit vectors [N, d] and of the prototypes'
        directions [K, d] and lengths [K, 1].

        A loss is to be worked out here, not outside: sharded prototypes are whole only within this call.
        """
        embedding = self.embed(x)
        if score is None:
            return self.last_layer(embedding)
        return score(embedding, self.last_layer.weight_v, self.last_layer.weight_g)


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

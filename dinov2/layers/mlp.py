"""The transformer's two-layer feed-forward network."""

from collections.abc import Callable

from torch import Tensor, nn

from .lean_branches import has_hooks


class Mlp(nn.Module):
    """fc2(act(fc1(x))), token by token.

    Args:
        in_features: width of the input.
        hidden_features: width between the layers; None for in_features.
        out_features: width of the output; None for in_features.
        act_layer: builds the activation.
        drop: dropout probability after each layer, while training.
        bias: whether both layers have a bias.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))

    @property
    def is_plain(self) -> bool:
        """Whether this is two linear layers around the exact GELU, with nothing that listens or drops."""
        return (
            type(self.fc1) is nn.Linear
            and type(self.fc2) is nn.Linear
            and type(self.act) is nn.GELU
            and self.act.approximate == "none"
            and not (self.training and self.drop.p > 0)
            and not any(has_hooks(module) for module in (self.fc1, self.act, self.fc2))
        )

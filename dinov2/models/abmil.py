"""Aggregators: from a patient's bag of cell features to class logits and the attention of each cell.

Every aggregator maps cells [B, N, D] and is_cell [B, N] to logits [B, C] and attention [B, A, N]. A is C if each class
has its own column (`classwise`, `clam`, `dsmil`), else 1; each column sums to 1 over a bag's cells. Padding never
changes a bag, and only `transmil` depends on the order of the cells.

- `classwise`: attention, weighted mean and head per class, as in DinoBloom's AML subtyping.
- `gated`: gated attention (Ilse et al. 2018, arXiv 1802.04712).
- `mean`, `max`: baselines without learned attention.
- `transmil` (Shao et al. 2021, arXiv 2106.00908), `clam` (Lu et al. 2021, arXiv 2004.09666), `dsmil` (Li et al. 2021,
  arXiv 2011.08939): from torchmil, an optional package.

Dimension key:  B bags (patients), N cells per bag after padding, D feature dim, C classes, A attention columns
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2.layers.gated_attention_pool import ClassWiseAttentionPool, GatedAttentionPool, check_no_bag_is_empty

ATTENTION_DIM = 128
HEAD_DIM = 64
TRANSMIL_DIM = 512


class Aggregator(nn.Module, ABC):
    """Base of all aggregators."""

    architecture: dict[str, Any]

    @abstractmethod
    def forward(self, cells: Tensor, is_cell: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits [B, C] and attention [B, A, N] of cells [B, N, D] (zero where padded) and is_cell [B, N]."""

    def auxiliary_loss(self, cells: Tensor, is_cell: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss that training adds to the cross-entropy of the logits; 0 except for `clam` and `dsmil`."""
        return cells.new_zeros(())


class ClassWiseAttentionMIL(Aggregator):
    """DinoBloom's aggregator: each class has its own attention over the bag and its own head."""

    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__()
        self.pool = ClassWiseAttentionPool(dim, n_classes, ATTENTION_DIM)
        self.heads = nn.ModuleList(_head(dim, 1) for _ in range(n_classes))

    def forward(self, cells: Tensor, is_cell: Tensor) -> tuple[Tensor, Tensor]:
        bags, attention = self.pool(cells, is_cell)  # [B, C, D], [B, C, N]
        logits = [head(bags[:, i]) for i, head in enumerate(self.heads)]  # C x [B, 1]
        return torch.cat(logits, dim=1), attention


class GatedAttentionMIL(Aggregator):
    """One gated attention for all classes, one head."""

    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__()
        self.pool = GatedAttentionPool(dim, ATTENTION_DIM)
        self.head = _head(dim, n_classes)

    def forward(self, cells: Tensor, is_cell: Tensor) -> tuple[Tensor, Tensor]:
        bags, attention = self.pool(cells, is_cell)  # [B, D], [B, N]
        return self.head(bags), attention[:, None]


class MeanPoolMIL(Aggregator):
    """Mean of a bag's cells, and a head; each cell's attention is 1 / (number of cells)."""

    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__()
        self.head = _head(dim, n_classes)

    def forward(self, cells: Tensor, is_cell: Tensor) -> tuple[Tensor, Tensor]:
        check_no_bag_is_empty(is_cell)
        attention = is_cell.to(cells.dtype) / is_cell.sum(dim=1, keepdim=True)  # [B, N]
        return self.head(torch.einsum("bn,bnd->bd", attention, cells)), attention[:, None]


class MaxPoolMIL(Aggregator):
    """Maximum of each feature over a bag's cells, and a head; a cell's attention is its share of the maxima."""

    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__()
        self.head = _head(dim, n_classes)

    def forward(self, cells: Tensor, is_cell: Tensor) -> tuple[Tensor, Tensor]:
        check_no_bag_is_empty(is_cell)
        bags, winners = cells.masked_fill(~is_cell[..., None], float("-inf")).max(dim=1)  # [B, D] each
        share = torch.full_like(bags, 1 / bags.shape[1])  # [B, D]
        attention = torch.zeros_like(cells[..., 0]).scatter_add(1, winners, share)  # [B, N]
        return self.head(bags), attention[:, None]


def _head(dim: int, n_outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, HEAD_DIM), nn.ReLU(), nn.Linear(HEAD_DIM, n_outputs))


class _OneBagAtATime(Aggregator):
    """Base of networks without padding: they get each bag alone, cut to its cells."""

    def forward(self, cells: Tensor, is_cell: Tensor) -> tuple[Tensor, Tensor]:
        check_no_bag_is_empty(is_cell)
        logits, columns = [], []
        for bag, mask in zip(cells, is_cell, strict=True):
            of_bag, attention = self.forward_bag(bag[mask][None])  # [C], [A, n]
            padded = attention.new_zeros(len(attention), len(mask))
            padded[:, mask] = attention
            logits.append(of_bag)
            columns.append(padded)
        return torch.stack(logits), torch.stack(columns)

    @abstractmethod
    def forward_bag(self, bag: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits [C] and attention [A, n] of one bag [1, n, D]."""


class TransMIL(_OneBagAtATime):
    """torchmil's TransMIL with C outputs instead of one.

    It puts the cells on a square in their order, so the order matters. The attention is that of the class token in the
    last layer. The Nystroem approximation can make it negative: such cells get 0, and the rest is scaled to sum to 1.
    """

    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__()
        self.network = _torchmil_class("TransMIL")(in_shape=(dim,), att_dim=TRANSMIL_DIM)
        self.network.classifier = nn.Linear(TRANSMIL_DIM, n_classes)

    def forward_bag(self, bag: Tensor) -> tuple[Tensor, Tensor]:
        logits, attention = self.network(bag, return_att=True)  # [1, C], [1, n]
        attention = attention.clamp_min(torch.finfo(attention.dtype).tiny)  # not 0, as all might be negative
        return logits[0], attention / attention.sum()


class _OneVersusRest(_OneBagAtATime):
    """C two-class networks of torchmil, one per class; a softmax over their logits makes them one classifier."""

    def __init__(self, name: str, dim: int, n_classes: int) -> None:
        super().__init__()
        build = _torchmil_class(name)
        self.networks = nn.ModuleList(build(in_shape=(dim,), att_dim=ATTENTION_DIM) for _ in range(n_classes))

    def auxiliary_loss(self, cells: Tensor, is_cell: Tensor, labels: Tensor) -> Tensor:
        networks: list[Any] = list(self.networks)
        losses = []
        for bag, mask, label in zip(cells, is_cell, labels, strict=True):
            for i, network in enumerate(networks):
                _, parts = network.compute_loss((label == i).float()[None], bag[mask][None])
                losses.append(parts[self.auxiliary_name])
        return torch.stack(losses).mean()

    auxiliary_name: str  # the part of torchmil's loss that does not depend on the bag's logit


class CLAM(_OneVersusRest):
    """torchmil's CLAM: attention, and a second classifier that separates cells of high and low attention."""

    auxiliary_name = "InstLoss"

    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__("CLAM_SB", dim, n_classes)
        for network in self.networks:
            network.inst_loss_fn = _SmoothTopOneSVM()

    def forward_bag(self, bag: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [network(bag, return_att=True) for network in self.networks]  # C x ([1], [1, n])
        scores = torch.cat([score for _, score in pairs])  # [C, n], before the softmax
        return torch.cat([logit for logit, _ in pairs]), scores.softmax(dim=1)


class DSMIL(_OneVersusRest):
    """torchmil's DSMIL: the bag's logit is the mean of its highest cell's and of a pooling by similarity to it."""

    auxiliary_name = "BCEWithLogitsLoss_max"

    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__("DSMIL", dim, n_classes)

    def forward_bag(self, bag: Tensor) -> tuple[Tensor, Tensor]:
        logits, columns = [], []
        for network in self.networks:
            pooled, attention, of_cells = network(bag, return_att=True, return_inst_pred=True)  # [1], [1, n, 1], [1, n]
            logits.append((pooled + of_cells.amax(dim=1)) / 2)
            columns.append(attention[..., 0])
        return torch.cat(logits), torch.cat(columns)


class _SmoothTopOneSVM(nn.Module):
    """Mean of log sum_j exp(x_j + [j != y]) - x_y (Berrada et al. 2018, arXiv 1802.07595, for k = 1).

    torchmil 1.0.2 passes the targets to its own version as a column, whose sums then mix cells.
    """

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of logits [n, 2] and targets [n, 1]."""
        is_target = F.one_hot(targets.flatten().long(), 2).bool()  # [n, 2]
        return ((logits + (~is_target).to(logits.dtype)).logsumexp(dim=1) - logits[is_target]).mean()


def _torchmil_class(name: str) -> Callable[..., nn.Module]:
    try:
        from torchmil import models
    except ImportError as error:
        raise ValueError(
            f"model: {name} comes from the package torchmil, which cannot be imported here ({error}); "
            f"install it with `pip install torchmil`, or choose one of {', '.join(OWN_MODELS)}"
        ) from error
    return getattr(models, name)


OWN_MODELS: dict[str, Callable[[int, int], Aggregator]] = {
    "classwise": ClassWiseAttentionMIL,
    "gated": GatedAttentionMIL,
    "mean": MeanPoolMIL,
    "max": MaxPoolMIL,
}
TORCHMIL_MODELS: dict[str, Callable[[int, int], Aggregator]] = {"transmil": TransMIL, "clam": CLAM, "dsmil": DSMIL}
MODELS = {**OWN_MODELS, **TORCHMIL_MODELS}


class Standardised(Aggregator):
    """An aggregator of standardised features: of each feature, its mean is subtracted, and it is divided by its scale.

    Training sets `mean` and `scale` [D], which belong to the weights.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, network: Aggregator, dim: int) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def forward(self, cells: Tensor, is_cell: Tensor) -> tuple[Tensor, Tensor]:
        logits, attention = self.network(self._standardised(cells, is_cell), is_cell)
        return logits, attention

    def auxiliary_loss(self, cells: Tensor, is_cell: Tensor, labels: Tensor) -> Tensor:
        return self.network.auxiliary_loss(self._standardised(cells, is_cell), is_cell, labels)

    def _standardised(self, cells: Tensor, is_cell: Tensor) -> Tensor:
        return (cells - self.mean) / self.scale * is_cell[..., None]


def build_aggregator(model: str, dim: int, n_classes: int, standardised: bool = False) -> Aggregator:
    """Build an aggregator with random weights; with `standardised` it standardises the features itself."""
    if model not in MODELS:
        raise ValueError(f"model: {model!r} is unknown; choose one of {', '.join(MODELS)}")
    if n_classes < 2 or dim < 1:
        raise ValueError(f"model: {n_classes} classes and {dim} features; give at least two classes and one feature")
    aggregator = MODELS[model](dim, n_classes)
    architecture = {"model": model, "dim": dim, "n_classes": n_classes}
    if standardised:
        aggregator = Standardised(aggregator, dim)
        architecture["standardised"] = True
    aggregator.architecture = architecture
    return aggregator

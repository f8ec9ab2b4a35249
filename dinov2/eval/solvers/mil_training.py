"""Train one aggregator of bags of cells, and apply it.

Training minimises the cross-entropy by SGD, one bag a step, with Nesterov momentum and a cosine schedule that takes one
step an epoch. It stops when the validation loss has not fallen for `patience` epochs. The result has the weights of the
epoch with the lowest validation loss. Test patients decide nothing.

Dimension key:  P patients, N cells of one, D feature dim, C classes, T tested patients, A attention columns (C or 1)
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2.models.abmil import Aggregator, build_aggregator


@dataclass(frozen=True)
class TrainingSettings:
    """How one aggregator is trained; the defaults are DinoBloom's.

    Attributes:
        epochs: the most epochs, and the length of the cosine schedule.
        learning_rate: at the start.
        momentum: Nesterov's.
        patience: epochs without a lower validation loss after which training stops.
        class_weights: multiply a bag's loss by P_train / (C_train * training patients of its class).
    """

    epochs: int = 150
    learning_rate: float = 1e-3
    momentum: float = 0.9
    patience: int = 20
    class_weights: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.patience < 1:
            raise ValueError(f"--epochs {self.epochs}, --patience {self.patience}: both must be at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"--learning-rate {self.learning_rate}: choose a number above 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum {self.momentum}: choose a number from 0 to below 1")


@dataclass(frozen=True)
class Epoch:
    """One line of the history of a training."""

    learning_rate: float
    train_loss: float
    val_loss: float


@dataclass(frozen=True, eq=False)
class Training:
    """A trained aggregator.

    Attributes:
        network: with the weights of its best epoch, on the device of the bags.
        best_epoch: the first epoch with the lowest validation loss, counted from 0.
        history: all epochs of the training.
    """

    network: Aggregator
    best_epoch: int
    history: list[Epoch]


def train_aggregator(
    bags: Sequence[Tensor],
    labels: np.ndarray,
    train: np.ndarray,
    val: np.ndarray,
    n_classes: int,
    model: str = "classwise",
    settings: TrainingSettings | None = None,
    seed: int = 0,
) -> Training:
    """Train one aggregator.

    Args:
        bags: P tensors, float32 [N, D], all on one device.
        labels: int64 [P].
        train, val: positions of the training and validation patients; no other patient is used.
        n_classes: C.
        model: a key of `MODELS`.
        settings: None for DinoBloom's.
        seed: of the initial weights and of the order of the bags.

    Raises:
        ValueError: if the model is unknown, or the loss becomes infinite or NaN.
    """
    settings = settings or TrainingSettings()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would change the GPUs' generators too
        network = build_aggregator(model, bags[0].shape[1], n_classes)
    network.to(bags[0].device)
    targets = torch.from_numpy(labels).to(bags[0].device)  # [P]
    weights = _class_weights(labels[train], n_classes) if settings.class_weights else np.ones(n_classes)
    bag_weights = torch.from_numpy(weights[labels]).to(bags[0])  # [P]
    optimizer = torch.optim.SGD(
        network.parameters(), lr=settings.learning_rate, momentum=settings.momentum, nesterov=settings.momentum > 0
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.epochs)
    rng = np.random.default_rng(seed)
    history: list[Epoch] = []
    best_epoch, best_weights = 0, network.state_dict()
    for epoch in range(settings.epochs):
        learning_rate = float(schedule.get_last_lr()[0])
        train_loss = _train_epoch(network, optimizer, bags, targets, bag_weights, rng.permutation(train))
        val_loss = _validation_loss(network, bags, targets, bag_weights, val)
        if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
            raise ValueError(
                f"--learning-rate {settings.learning_rate}: the loss is {train_loss} in training and {val_loss} in "
                f"validation after {epoch + 1} epochs; choose a smaller one, or scale the features"
            )
        history.append(Epoch(learning_rate, train_loss, val_loss))
        if epoch == 0 or val_loss < history[best_epoch].val_loss:
            # a copy: state_dict() returns the tensors that the next step changes
            best_epoch, best_weights = epoch, copy.deepcopy(network.state_dict())
        elif epoch - best_epoch >= settings.patience:
            break
        schedule.step()
    network.load_state_dict(best_weights)
    return Training(network.eval(), best_epoch, history)


def _class_weights(labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Return P / (C * patients of the class), float64 [C], where C counts the classes that occur."""
    counts = np.bincount(labels, minlength=n_classes)
    return len(labels) / ((counts > 0).sum() * np.maximum(counts, 1))


def _train_epoch(
    network: Aggregator,
    optimizer: torch.optim.Optimizer,
    bags: Sequence[Tensor],
    targets: Tensor,
    bag_weights: Tensor,
    order: np.ndarray,
) -> float:
    """Take one step per bag and return the mean loss."""
    network.train()
    total = torch.zeros((), device=targets.device)
    for i in order.tolist():
        cells, is_cell = _as_batch(bags[i])
        target = targets[i : i + 1]
        logits, _ = network(cells, is_cell)  # [1, C]
        # weighted here: cross_entropy's own weights cancel in the mean over a batch of one
        loss = bag_weights[i] * (F.cross_entropy(logits, target) + network.auxiliary_loss(cells, is_cell, target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return float(total) / len(order)


@torch.no_grad()
def _validation_loss(
    network: Aggregator, bags: Sequence[Tensor], targets: Tensor, bag_weights: Tensor, val: np.ndarray
) -> float:
    """Return the weighted mean cross-entropy over the validation bags."""
    network.eval()
    logits = torch.cat([network(*_as_batch(bags[i]))[0] for i in val])  # [V, C]
    losses = F.cross_entropy(logits, targets[val], reduction="none")  # [V]
    return float((bag_weights[val] * losses).sum() / bag_weights[val].sum())


def _as_batch(bag: Tensor) -> tuple[Tensor, Tensor]:
    """Return one bag [N, D] as cells [1, N, D] and is_cell [1, N]."""
    return bag[None], torch.ones(1, len(bag), dtype=torch.bool, device=bag.device)


# --- predictions ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict_bags(network: Aggregator, bags: Iterable[Tensor]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return probabilities, float64 [T, C], and attention, T arrays float64 [A, N], of bags float32 [N, D]."""
    network.eval()
    probabilities, attention = [], []
    for bag in bags:
        logits, columns = network(*_as_batch(bag))  # [1, C], [1, A, N]
        probabilities.append(logits[0].double().softmax(dim=0).cpu().numpy())
        attention.append(columns[0].double().cpu().numpy())
    return np.stack(probabilities), attention

"""Train one aggregator of bags of cells; keep trained aggregators in a file and average their predictions.

Training minimises the cross-entropy by SGD, one bag a step, with Nesterov momentum and a cosine schedule that takes one
step an epoch. It stops when the validation loss has not fallen for `patience` epochs. The result has the weights of the
epoch with the lowest validation loss. Test patients decide nothing.

Dimension key:  P patients, N cells of one, D feature dim, C classes, T tested patients, A attention columns (C or 1)
"""

import copy
import math
import pickle
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2.eval.metrics import classification_metrics
from dinov2.eval.results import AVERAGED_METRICS
from dinov2.models.abmil import Aggregator, build_aggregator
from dinov2.utils.files import atomic_write

FILE_FORMAT = "dinov2 aggregator 1"


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


@dataclass(frozen=True, eq=False)
class BagPredictions:
    """Predictions of several networks for T patients.

    Attributes:
        positions: int64 [T], the patients, ascending.
        by_network: T arrays float64 [networks of this patient, C], the probabilities of each network.
        attention: T arrays float64 [A, N], the mean over the networks; each row sums to 1 over the cells.
    """

    positions: np.ndarray
    by_network: list[np.ndarray]
    attention: list[np.ndarray]

    @classmethod
    def collect(cls, outputs: Iterable[tuple[np.ndarray, np.ndarray, list[np.ndarray]]]) -> "BagPredictions":
        """Group the (positions, probabilities, attention) of each network by patient."""
        probabilities, attention = defaultdict(list), defaultdict(list)
        for positions, by_patient, attention_by_patient in outputs:
            for i, of_classes, columns in zip(positions.tolist(), by_patient, attention_by_patient, strict=True):
                probabilities[i].append(of_classes)
                attention[i].append(columns)
        patients = sorted(probabilities)
        return cls(
            np.array(patients, dtype=np.int64),
            [np.stack(probabilities[i]) for i in patients],
            [np.mean(attention[i], axis=0) for i in patients],
        )

    @property
    def probabilities(self) -> np.ndarray:
        """Return the mean over each patient's networks, float64 [T, C]."""
        return np.stack([networks.mean(axis=0) for networks in self.by_network])

    @property
    def classes(self) -> np.ndarray:
        """Return the predicted class of each patient, int64 [T]."""
        return self.probabilities.argmax(axis=1)

    def predicted_attention(self) -> list[np.ndarray]:
        """Return the attention [N] of each patient's predicted class."""
        pairs = zip(self.attention, self.classes, strict=True)
        return [columns[i if len(columns) > 1 else 0] for columns, i in pairs]


@dataclass(frozen=True, eq=False)
class TrainedAggregator:
    """One or more networks of one architecture that predict together, and what they were trained on.

    Attributes:
        architecture: of each of them, as `Aggregator.architecture`.
        class_names: C names, in the order of the logits.
        members: a state dict each.
        features: attributes of the features they were trained on: `checkpoint_sha256`, `transform`, ...
        seen: `PatientBags.bag_hashes` of all training and validation patients.
    """

    architecture: dict[str, Any]
    class_names: list[str]
    members: list[dict[str, Tensor]]
    features: dict[str, str] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)

    def predict(self, bags: Sequence[np.ndarray], device: str | torch.device = "cpu") -> BagPredictions:
        """Predict the classes of bags, T arrays float32 [N, D].

        Raises:
            ValueError: if the bags have another feature dimension than the networks.
        """
        dim = self.architecture["dim"]
        if bags[0].shape[1] != dim:
            raise ValueError(
                f"aggregator: it was trained on features of {dim} dimensions, these have {bags[0].shape[1]}; extract "
                f"them with the checkpoint it was trained with"
            )
        on_device = [torch.from_numpy(bag).to(device) for bag in bags]
        network = build_aggregator(**self.architecture).to(device)
        outputs = []
        for weights in self.members:
            network.load_state_dict(weights)
            outputs.append((np.arange(len(bags)), *predict_bags(network, on_device)))
        return BagPredictions.collect(outputs)

    def save(self, path: Path) -> None:
        """Write a file that `load` reads."""
        content = {name.name: getattr(self, name.name) for name in fields(self)}
        with atomic_write(path) as file:
            torch.save({"format": FILE_FORMAT, **content}, file)

    @classmethod
    def load(cls, path: Path) -> "TrainedAggregator":
        """Read a file of `save`, without executing anything in it.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is something else or damaged.
        """
        if not path.is_file():
            raise FileNotFoundError(f"--apply: no file {str(path)!r}; a training writes <output-dir>/aggregator.pth")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"--apply: {str(path)!r} is no aggregator or is damaged; train it again") from error
        names = {name.name for name in fields(cls)}
        if not isinstance(content, dict) or content.pop("format", None) != FILE_FORMAT or set(content) != names:
            raise ValueError(
                f"--apply: {str(path)!r} is no aggregator, or one of another version; give the aggregator.pth that "
                f"this command wrote"
            )
        return cls(**content)


# --- several networks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Network:
    """One training and its predictions for the test patients of its fold.

    Attributes:
        fold, run: numbers from 0.
        test: positions of the test patients, int64 [T].
        probabilities: float64 [T, C].
        training: the network, on the CPU, and its history.
    """

    fold: int
    run: int
    test: np.ndarray
    probabilities: np.ndarray
    training: Training


def describe_networks(networks: Sequence[Network], labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Summarize the metrics of each network on its test patients.

    Returns:
        `mean`, `sd` (with n - 1; None for a single network), `min`, `max` ({metric: number}, without the networks for
        which the metric is undefined) and `networks` (a dict each).
    """
    rows = []
    for network in networks:
        training, probabilities = network.training, network.probabilities
        metrics = classification_metrics(labels[network.test], probabilities.argmax(axis=1), class_names, probabilities)
        rows.append(
            {
                "fold": network.fold,
                "run": network.run,
                "best_epoch": training.best_epoch,
                "epochs": len(training.history),
                "val_loss": training.history[training.best_epoch].val_loss,
                **{name: metrics[name] for name in AVERAGED_METRICS},
            }
        )
    values = pd.DataFrame(rows)[list(AVERAGED_METRICS)].astype(float)
    spread = {"mean": values.mean(), "sd": values.std(), "min": values.min(), "max": values.max()}
    numbers = {
        key: {name: None if np.isnan(value) else float(value) for name, value in by_metric.items()}
        for key, by_metric in spread.items()
    }
    return {**numbers, "networks": rows}

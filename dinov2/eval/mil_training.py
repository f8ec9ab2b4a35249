"""Training aggregators of bags of cells: folds of patients, one training, all trainings of a protocol.

Training minimises the cross-entropy by SGD, a bag a step, with Nesterov momentum and a cosine schedule that takes one
step an epoch. It stops when the validation loss has not fallen for some epochs, and the weights of the epoch with the
lowest validation loss are the result. Test patients choose nothing.

All randomness is derived from (seed, fold, run): a network depends neither on the others nor on their number.

Dimension key:  P patients, N cells of one, D feature dim, C classes, T test patients, A attention columns (C or 1)
"""

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2.data.datasets.fold_files import PARTS
from dinov2.data.splits import make_folds
from dinov2.eval.metrics import classification_metrics
from dinov2.eval.results import AVERAGED_METRICS
from dinov2.models.abmil import Aggregator, build_aggregator
from dinov2.utils.seeds import derive_seed

logger = logging.getLogger("dinov2")


# --- splits ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Fold:
    """Positions of patients, int64 and ascending: learned from, used to stop, judged by."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def dinobloom_folds(
    labels: np.ndarray, patients: Sequence[str], n_folds: int = 4, seed: int = 0, test: np.ndarray | None = None
) -> list[Fold]:
    """One test set; the other patients in `n_folds` stratified parts, each the validation set once.

    Args:
        labels: int64 [P].
        patients: P ids.
        n_folds: 2 or more.
        seed: of the draws.
        test: positions of the test patients; None takes the first of n_folds + 1 stratified parts.

    Raises:
        ValueError: if there are too few patients.
    """
    if test is None:
        rest, test = make_folds(labels, patients, n_folds + 1, seed)[0]
    else:
        rest = np.setdiff1d(np.arange(len(labels)), test)
    of_rest = make_folds(labels[rest], [patients[i] for i in rest], n_folds, seed)
    return [Fold(rest[train], rest[val], test) for train, val in of_rest]


def crossval_folds(labels: np.ndarray, patients: Sequence[str], n_folds: int = 5, seed: int = 0) -> list[Fold]:
    """`n_folds` stratified parts, each the test set once; the part after it is the validation set then.

    Args:
        labels: int64 [P].
        patients: P ids.
        n_folds: 3 or more.
        seed: of the draw.

    Raises:
        ValueError: if there are too few patients or parts.
    """
    if n_folds < 3:
        raise ValueError(f"--folds {n_folds}: protocol crossval needs a part to test, one to stop by and one to train")
    parts = make_folds(labels, patients, n_folds, seed)
    folds = []
    for i, (rest, test) in enumerate(parts):
        val = parts[(i + 1) % n_folds][1]
        folds.append(Fold(np.setdiff1d(rest, val), val, test))
    return folds


def check_folds(folds: Sequence[Fold], labels: np.ndarray, class_names: Sequence[str]) -> None:
    """Refuse folds that would learn from whom they are judged by, or cannot learn a class.

    Classes that a validation or test part lacks are only warned of: their metrics tell.

    Args:
        folds: positions in `labels`.
        labels: int64 [P], positions in `class_names`.
        class_names: C names.

    Raises:
        ValueError: if all patients are of one class, a part is empty, a patient is in two parts of a fold, or a
            training part lacks a class.
    """
    classes = np.unique(labels)
    if len(classes) < 2:
        names = ", ".join(class_names[i] for i in classes)
        raise ValueError(f"labels: all patients are {names or 'missing'}, one class, so there is nothing to learn")
    for number, fold in enumerate(folds):
        parts = {part: getattr(fold, part) for part in PARTS}
        empty = [name for name, part in parts.items() if not len(part)]
        if empty:
            raise ValueError(f"fold {number}: its part {' and '.join(empty)} has no patient; each needs at least one")
        _, counts = np.unique(np.concatenate(list(parts.values())), return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"fold {number}: {(counts > 1).sum()} patients are in it more than once; a patient is learned from, or "
                f"stops the training, or is judged"
            )
        for name, part in parts.items():
            lacking = ", ".join(class_names[i] for i in np.setdiff1d(classes, labels[part]))
            if lacking and name == "train":
                raise ValueError(
                    f"fold {number}: no patient of {lacking} in its training part, so it cannot be learned; take other "
                    f"folds, another --seed, or leave the class out"
                )
            if lacking:
                logger.warning("fold %d: no patient of %s in its part %s", number, lacking, name)


# --- one training ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingSettings:
    """How one aggregator is trained.

    Attributes:
        epochs: at most; the cosine's length.
        learning_rate: at the start.
        momentum: Nesterov's.
        patience: epochs without a lower validation loss after which training stops.
        class_weights: a bag's loss is multiplied by P_train / (C_train * patients of its class in training).
    """

    epochs: int = 150
    learning_rate: float = 1e-3
    momentum: float = 0.9
    patience: int = 20
    class_weights: bool = False


DINOBLOOM = TrainingSettings()


@dataclass(frozen=True)
class Epoch:
    """One line of a training's history."""

    learning_rate: float
    train_loss: float
    val_loss: float


@dataclass(frozen=True, eq=False)
class Trained:
    """An aggregator with the weights of its best epoch.

    Attributes:
        network: on the device of the bags.
        best_epoch: from 0, the first with the lowest validation loss.
        history: all epochs that were trained.
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
    settings: TrainingSettings = DINOBLOOM,
    seed: int = 0,
) -> Trained:
    """Train one aggregator and return it as it was after its best epoch.

    Args:
        bags: P tensors, float32 [N, D], all on one device.
        labels: int64 [P].
        train, val: positions of the patients to learn from and to stop by; others are not looked at.
        n_classes: C.
        model: one of `MODELS`.
        settings: how.
        seed: of the weights and of the order of the bags.

    Raises:
        ValueError: for settings that make no sense, an unknown model, or if the loss becomes infinite or NaN.
    """
    _check_settings(settings)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would change the GPUs' generators too
        network = build_aggregator(model, bags[0].shape[1], n_classes)
    network.to(bags[0].device)
    targets = torch.from_numpy(labels).to(bags[0].device)  # [P]
    weights = _class_weights(labels[train], n_classes) if settings.class_weights else np.ones(n_classes)
    weights_of_bags = torch.from_numpy(weights[labels]).to(bags[0])  # [P]
    optimizer = torch.optim.SGD(
        network.parameters(), lr=settings.learning_rate, momentum=settings.momentum, nesterov=settings.momentum > 0
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.epochs)
    rng = np.random.default_rng(seed)
    history: list[Epoch] = []
    best_epoch, best_weights = 0, network.state_dict()
    for epoch in range(settings.epochs):
        learning_rate = float(schedule.get_last_lr()[0])
        train_loss = _train_epoch(network, optimizer, bags, targets, weights_of_bags, rng.permutation(train))
        val_loss = _validation_loss(network, bags, targets, weights_of_bags, val)
        if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
            raise ValueError(
                f"--learning-rate {settings.learning_rate}: the loss is {train_loss} in training and {val_loss} in "
                f"validation after {epoch + 1} epochs; choose a smaller one, or scale the features"
            )
        history.append(Epoch(learning_rate, train_loss, val_loss))
        if epoch == 0 or val_loss < history[best_epoch].val_loss:
            # a copy: state_dict() gives the tensors that the next step changes
            best_epoch, best_weights = epoch, copy.deepcopy(network.state_dict())
        elif epoch - best_epoch >= settings.patience:
            break
        schedule.step()
    network.load_state_dict(best_weights)
    return Trained(network.eval(), best_epoch, history)


def _check_settings(settings: TrainingSettings) -> None:
    if settings.epochs < 1 or settings.patience < 1:
        raise ValueError(f"--epochs {settings.epochs}, --patience {settings.patience}: both must be at least 1")
    if not settings.learning_rate > 0:
        raise ValueError(f"--learning-rate {settings.learning_rate}: choose a number above 0")
    if not 0 <= settings.momentum < 1:
        raise ValueError(f"momentum {settings.momentum}: choose a number from 0 to below 1")


def _class_weights(labels: np.ndarray, n_classes: int) -> np.ndarray:
    """P / (C * patients of the class) for the classes that occur; float64 [C]."""
    counts = np.bincount(labels, minlength=n_classes)
    return len(labels) / ((counts > 0).sum() * np.maximum(counts, 1))


def _train_epoch(
    network: Aggregator,
    optimizer: torch.optim.Optimizer,
    bags: Sequence[Tensor],
    targets: Tensor,
    weights: Tensor,
    order: np.ndarray,
) -> float:
    """A step per bag; the mean loss."""
    network.train()
    total = torch.zeros((), device=targets.device)
    for i in order.tolist():
        cells, is_cell = _as_batch(bags[i])
        logits, _ = network(cells, is_cell)  # [1, C]
        # weighted here: cross_entropy's own weights cancel in the mean over a batch of one
        loss = weights[i] * (
            F.cross_entropy(logits, targets[i : i + 1]) + network.auxiliary_loss(cells, is_cell, targets[i : i + 1])
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return float(total) / len(order)


@torch.no_grad()
def _validation_loss(
    network: Aggregator, bags: Sequence[Tensor], targets: Tensor, weights: Tensor, val: np.ndarray
) -> float:
    """The mean cross-entropy over bags, weighted."""
    network.eval()
    logits = torch.cat([network(*_as_batch(bags[i]))[0] for i in val])  # [V, C]
    losses = F.cross_entropy(logits, targets[val], reduction="none")  # [V]
    return float((weights[val] * losses).sum() / weights[val].sum())


def _as_batch(bag: Tensor) -> tuple[Tensor, Tensor]:
    """One bag [N, D] as cells [1, N, D] and is_cell [1, N]."""
    return bag[None], torch.ones(1, len(bag), dtype=torch.bool, device=bag.device)


# --- all trainings --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Run:
    """One training of `cross_validate`.

    Attributes:
        fold, run: their numbers, from 0.
        test: int64 [T], positions of the test patients.
        probabilities: float64 [T, C].
        best_epoch, history: as in `Trained`.
        weights: the network's state dict, on the CPU.
    """

    fold: int
    run: int
    test: np.ndarray
    probabilities: np.ndarray
    best_epoch: int
    history: list[Epoch]
    weights: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Predictions:
    """What several networks together say of patients, each judged only by networks that did not see them.

    Attributes:
        positions: int64 [T], which patients, ascending.
        n_networks: int64 [T], how many networks judged each.
        probabilities: float64 [T, C], the mean of theirs.
        attention: T arrays float64 [A, N], the mean of theirs; each column sums to 1 over the cells.
        of_networks: T arrays float64 [networks of that patient, C], what each network says.
    """

    positions: np.ndarray
    n_networks: np.ndarray
    probabilities: np.ndarray
    attention: list[np.ndarray]
    of_networks: list[np.ndarray]

    @property
    def classes(self) -> np.ndarray:
        """The predicted class of each patient, int64 [T]."""
        return self.probabilities.argmax(axis=1)

    def attention_of_prediction(self, i: int) -> np.ndarray:
        """The attention [N] that patient i's predicted class gives to the cells."""
        columns = self.attention[i]
        return columns[self.classes[i] if len(columns) > 1 else 0]


class PredictionSums:
    """Adds up probabilities and attention of patients over networks."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.probabilities: dict[int, np.ndarray] = {}
        self.attention: dict[int, np.ndarray] = {}
        self.of_networks: dict[int, list[np.ndarray]] = {}

    def add(self, positions: np.ndarray, probabilities: np.ndarray, attention: Sequence[np.ndarray]) -> None:
        for i, of_patient, columns in zip(positions.tolist(), probabilities, attention, strict=True):
            is_new = i not in self.counts
            self.counts[i] = 1 if is_new else self.counts[i] + 1
            self.probabilities[i] = of_patient if is_new else self.probabilities[i] + of_patient
            self.attention[i] = columns if is_new else self.attention[i] + columns
            self.of_networks.setdefault(i, []).append(of_patient)

    def mean(self) -> Predictions:
        positions = sorted(self.counts)
        return Predictions(
            np.array(positions, dtype=np.int64),
            np.array([self.counts[i] for i in positions], dtype=np.int64),
            np.stack([self.probabilities[i] / self.counts[i] for i in positions]),
            [self.attention[i] / self.counts[i] for i in positions],
            [np.stack(self.of_networks[i]) for i in positions],
        )


def cross_validate(
    bags: Sequence[np.ndarray],
    labels: np.ndarray,
    class_names: Sequence[str],
    folds: Sequence[Fold],
    n_runs: int = 5,
    model: str = "classwise",
    settings: TrainingSettings = DINOBLOOM,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> tuple[list[Run], Predictions]:
    """Train on each fold `n_runs` times and judge the fold's test patients.

    Args:
        bags: P arrays, float32 [N, D].
        labels: int64 [P].
        class_names: C names.
        folds: positions of patients.
        n_runs: trainings of each fold.
        model: one of `MODELS`.
        settings: of each training.
        seed: decides all that is random.
        device: where the networks are; all bags are kept there.

    Returns:
        the trainings, all runs of the first fold first, and what they say together of the test patients.

    Raises:
        ValueError: as `check_folds` and `train_aggregator`.
    """
    if n_runs < 1:
        raise ValueError(f"--runs {n_runs}: train at least once")
    check_folds(folds, labels, class_names)
    on_device = [torch.from_numpy(bag).to(device) for bag in bags]
    runs, sums = [], PredictionSums()
    for fold_number, fold in enumerate(folds):
        for run_number in range(n_runs):
            run_seed = derive_seed(seed, "abmil", fold_number, run_number)
            trained = train_aggregator(
                on_device, labels, fold.train, fold.val, len(class_names), model, settings, run_seed
            )
            best, history = trained.best_epoch, trained.history
            probabilities, attention = apply_aggregator(trained.network, [on_device[i] for i in fold.test])
            sums.add(fold.test, probabilities, attention)
            weights = {name: value.cpu() for name, value in trained.network.state_dict().items()}
            runs.append(Run(fold_number, run_number, fold.test, probabilities, best, history, weights))
            text = "fold %d run %d: %d epochs, validation loss %.4f after epoch %d"
            logger.info(text, fold_number, run_number, len(history), history[best].val_loss, best)
    return runs, sums.mean()


@torch.no_grad()
def apply_aggregator(network: Aggregator, bags: Sequence[Tensor]) -> tuple[np.ndarray, list[np.ndarray]]:
    """What one aggregator says of bags.

    Args:
        network: on the bags' device.
        bags: T tensors, float32 [N, D].

    Returns:
        probabilities, float64 [T, C], and attention, T arrays float64 [A, N].
    """
    network.eval()
    probabilities, attention = [], []
    for bag in bags:
        logits, columns = network(*_as_batch(bag))  # [1, C], [1, A, N]
        probabilities.append(logits[0].double().softmax(dim=0).cpu().numpy())
        attention.append(columns[0].double().cpu().numpy())
    return np.stack(probabilities), attention


def describe_networks(runs: Sequence[Run], labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """The metrics of each network on its test patients, their mean and their spread.

    Args:
        runs: as `cross_validate` returns them.
        labels: int64 [P].
        class_names: C names.

    Returns:
        `mean`, `sd` (with n - 1; None for a single network), `min`, `max` ({metric: number}; networks for which a
        metric is undefined are left out of it) and `networks` (a dict each).
    """
    networks = []
    for run in runs:
        metrics = classification_metrics(
            labels[run.test], run.probabilities.argmax(axis=1), class_names, run.probabilities
        )
        networks.append(
            {
                "fold": run.fold,
                "run": run.run,
                "best_epoch": run.best_epoch,
                "epochs": len(run.history),
                "val_loss": run.history[run.best_epoch].val_loss,
                **{name: metrics[name] for name in AVERAGED_METRICS},
            }
        )
    spread: dict[str, dict[str, float | None]] = {"mean": {}, "sd": {}, "min": {}, "max": {}}
    for name in AVERAGED_METRICS:
        values = np.array([network[name] for network in networks if network[name] is not None], dtype=np.float64)
        spread["mean"][name] = float(values.mean()) if len(values) else None
        spread["sd"][name] = float(values.std(ddof=1)) if len(values) > 1 else None
        spread["min"][name] = float(values.min()) if len(values) else None
        spread["max"][name] = float(values.max()) if len(values) else None
    return {**spread, "networks": networks}

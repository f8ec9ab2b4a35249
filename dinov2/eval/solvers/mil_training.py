"""Train aggregators of bags of cells, apply them, and keep several that predict together.

Training minimises the cross-entropy by SGD with Nesterov momentum, one bag a step, or by AdamW and batches, with a
cosine schedule that takes one step an epoch. It stops when the validation loss has not fallen for `patience` epochs.
The result has the weights of the epoch with the lowest validation loss. Test patients decide nothing. On a CPU every
network is trained by one thread, and several at a time: that is faster for matrices of this size, and numbers do not
depend on the threads.

Dimension key:  P patients, N cells of one, D feature dim, C classes, T tested patients, B bags in a batch, A attention
                columns (C or 1)
"""

import copy
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from dinov2.data.datasets.bag_folds import BagFold
from dinov2.eval.metrics import classification_metrics
from dinov2.eval.results import AVERAGED_METRICS, FoldPredictions
from dinov2.hub.weight_files import read_weights_file
from dinov2.models.abmil import Aggregator, Standardised, build_aggregator
from dinov2.utils.command import progress_bar
from dinov2.utils.files import atomic_write, check_regular_file, local_path
from dinov2.utils.resources import available_cores

Item = TypeVar("Item")
Output = TypeVar("Output")

FILE_FORMAT = "dinov2 aggregator 1"
N_FOR_BAR = 8  # shorter lists of trainings show no progress bar
_INITIALISATION = threading.Lock()  # it uses torch's only default generator


@dataclass(frozen=True)
class TrainingSettings:
    """How one aggregator is trained; the defaults are DinoBloom's."""

    epochs: int = 150  # the most epochs, and the length of the cosine schedule
    learning_rate: float = 1e-3  # at the start
    momentum: float = 0.9  # Nesterov's, or AdamW's first beta
    patience: int = 20  # epochs without a lower validation loss after which training stops
    class_weights: bool = False  # multiply a bag's loss by P_train / (C_train * training patients of its class)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 0.0
    cell_dropout: float = 0.0  # share of a bag's cells that a step leaves out, drawn anew each time
    batch_size: int = 1  # bags in a step
    standardise: bool = False  # features by the mean and deviation of training cells; each patient counts the same

    def __post_init__(self) -> None:
        if not (self.epochs >= 1 and self.patience >= 1 and self.learning_rate > 0):
            settings = f"--epochs {self.epochs}, --patience {self.patience}, --learning-rate {self.learning_rate}"
            raise ValueError(f"{settings}: choose numbers above 0")


class Epoch(NamedTuple):
    learning_rate: float
    train_loss: float
    val_loss: float


@dataclass(frozen=True, eq=False)
class Training:
    """A network with the weights of `best_epoch` (from 0), the first with the lowest validation loss of the history."""

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
    """Train a model of `MODELS` on the bags [N, D] (all on one device) at the positions `train`, stopped by `val`.

    No other patient is used. The seed decides the initial weights and the order of the bags. A loss that becomes
    infinite or NaN is a ValueError.
    """
    settings = settings or TrainingSettings()
    with _INITIALISATION, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would change the GPUs' generators too
        network = build_aggregator(model, bags[0].shape[1], n_classes, settings.standardise)
    if isinstance(network, Standardised):
        network.mean, network.scale = _mean_and_scale([bags[i] for i in train])
    network.to(bags[0].device)
    targets = torch.from_numpy(labels).to(bags[0].device)  # [P]
    weights = _class_weights(labels[train], n_classes) if settings.class_weights else np.ones(n_classes)
    bag_weights = torch.from_numpy(weights[labels]).to(bags[0])  # [P]
    optimizer = _optimizer(network, settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.epochs)
    rng = np.random.default_rng(seed)
    history: list[Epoch] = []
    best_epoch, best_weights = 0, network.state_dict()
    for epoch in range(settings.epochs):
        learning_rate = float(schedule.get_last_lr()[0])
        network.train()
        total = torch.zeros((), device=targets.device)
        for chosen in np.split(rng.permutation(train), range(settings.batch_size, len(train), settings.batch_size)):
            cells, is_cell = as_batch([_some_cells(bags[i], settings.cell_dropout, rng) for i in chosen])
            of_chosen = targets[chosen]
            logits, _ = network(cells, is_cell)  # [B, C]
            losses = F.cross_entropy(logits, of_chosen, reduction="none") + network.auxiliary_loss(
                cells, is_cell, of_chosen
            )
            # weighted here: cross_entropy's own weights cancel in the mean over a batch of one
            loss = (bag_weights[chosen] * losses).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(chosen)
        train_loss = float(total) / len(train)
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


def _optimizer(network: Aggregator, settings: TrainingSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(
            network.parameters(),
            lr=settings.learning_rate,
            betas=(settings.momentum, 0.999),
            weight_decay=settings.weight_decay,
        )
    return torch.optim.SGD(
        network.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
        weight_decay=settings.weight_decay,
    )


def _some_cells(bag: Tensor, dropout: float, rng: np.random.Generator) -> Tensor:
    """Return a bag [N, D] without a drawn share of its cells; at least one cell stays."""
    if dropout == 0:
        return bag
    n_kept = max(1, round(len(bag) * (1 - dropout)))
    return bag[torch.from_numpy(rng.permutation(len(bag))[:n_kept]).to(bag.device)]


def _mean_and_scale(bags: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each feature, float32 [D]; 1 instead of a deviation of 0."""
    mean = torch.stack([bag.double().mean(dim=0) for bag in bags]).mean(dim=0)
    variance = torch.stack([(bag.double() - mean).square().mean(dim=0) for bag in bags]).mean(dim=0)
    return mean.float(), torch.where(variance > 0, variance.sqrt(), 1.0).float()


def _class_weights(labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Return P / (C * patients of the class), float64 [C], where C counts the classes that occur."""
    counts = np.bincount(labels, minlength=n_classes)
    return len(labels) / ((counts > 0).sum() * np.maximum(counts, 1))


@torch.no_grad()
def _validation_loss(
    network: Aggregator, bags: Sequence[Tensor], targets: Tensor, bag_weights: Tensor, val: np.ndarray
) -> float:
    """Return the weighted mean cross-entropy over the validation bags."""
    network.eval()
    logits = torch.cat([network(*as_batch([bags[i]]))[0] for i in val])  # [V, C]
    losses = F.cross_entropy(logits, targets[val], reduction="none")  # [V]
    return float((bag_weights[val] * losses).sum() / bag_weights[val].sum())


@dataclass(frozen=True, eq=False)
class Job:
    """One training to do: for the fold of this number, on the patients at the positions `train`, stopped by `val`."""

    fold: int
    train: np.ndarray
    val: np.ndarray
    settings: TrainingSettings
    seed: int


def train_all(
    bags: Sequence[Tensor], labels: np.ndarray, jobs: Sequence[Job], n_classes: int, model: str
) -> list[Training]:
    """Train an aggregator for each job, in their order."""

    def train(job: Job) -> Training:
        return train_aggregator(bags, labels, job.train, job.val, n_classes, model, job.settings, job.seed)

    return map_by_single_threads(train, jobs, "training", bags[0].device)


def map_by_single_threads(
    function: Callable[[Item], Output], items: Sequence[Item], title: str, device: torch.device | str = "cpu"
) -> list[Output]:
    """Apply a function of torch to all items: on a CPU each by one thread, as many at a time as there are cores.

    Sums of several threads depend on their number; these do not.
    """
    is_cpu = torch.device(device).type == "cpu"
    n_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(available_cores() if is_cpu else 1, initializer=torch.set_num_threads, initargs=(1,))
    try:
        return list(progress_bar(pool.map(function, items), title, len(items), unit="", disable=len(items) < N_FOR_BAR))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(n_threads)


def as_batch(bags: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return bags [N, D] as cells [B, N, D], padded with zeros, and is_cell [B, N]."""
    sizes = torch.tensor([len(bag) for bag in bags], device=bags[0].device)
    cells = pad_sequence(list(bags), batch_first=True)
    return cells, torch.arange(cells.shape[1], device=cells.device) < sizes[:, None]


# --- predictions ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict_bags(network: Aggregator, bags: Iterable[Tensor]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return probabilities, float64 [T, C], and attention, T arrays float64 [A, N], of bags float32 [N, D]."""
    network.eval()
    probabilities, attention = [], []
    for bag in bags:
        logits, columns = network(*as_batch([bag]))  # [1, C], [1, A, N]
        probabilities.append(logits[0].double().softmax(dim=0).cpu().numpy())
        attention.append(columns[0].double().cpu().numpy())
    return np.stack(probabilities), attention


@dataclass(frozen=True, eq=False)
class BagPredictions:
    """Predictions of several networks for T patients: probabilities of each network, and their mean attention."""

    positions: np.ndarray  # int64 [T], ascending
    by_network: list[np.ndarray]  # T arrays float64 [networks of this patient, C]
    attention: list[np.ndarray]  # T arrays float64 [A, N], whose rows sum to 1

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

    def by_fold(self, folds: Sequence[BagFold], n_patients: int) -> FoldPredictions:
        """Return the mean predictions for all P patients; `folds` have different test sets."""
        probabilities = np.full((n_patients, self.probabilities.shape[1]), np.nan)
        probabilities[self.positions] = self.probabilities
        classes = np.full(n_patients, -1, dtype=np.int64)
        classes[self.positions] = self.classes
        sides = [(fold.train, fold.test) for fold in folds]
        return FoldPredictions(sides, classes, probabilities, [{} for _ in sides])


# --- what attention is worth ---------------------------------------------------------------------------------------

SHARES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # of a bag's cells that are removed
RANDOM_DRAWS = 3
CELLS_AT_A_TIME = 100_000


@torch.no_grad()
def deletion_curve(
    networks: Sequence[Aggregator], bag: np.ndarray, attention: np.ndarray, column: int, seed: int = 0
) -> dict[str, list[float]]:
    """Return the mean probability of a class without part of a bag's cells, for each of `SHARES`; one cell stays.

    Args:
        bag: cells, float32 [N, D].
        attention: [N]; `most_attended` is the curve without the cells of the highest attention.
        column: number of the class.
        seed: of the cells whose removal gives the curve `random`, the mean of `RANDOM_DRAWS` draws.
    """
    rng = np.random.default_rng(seed)
    orders = [np.argsort(-attention, kind="stable"), *(rng.permutation(len(bag)) for _ in range(RANDOM_DRAWS))]
    kept = np.ones((len(orders), len(SHARES), len(bag)), dtype=bool)
    for of_order, order in zip(kept, orders, strict=True):
        for is_kept, share in zip(of_order, SHARES, strict=True):
            is_kept[order[: min(round(share * len(bag)), len(bag) - 1)]] = False
    # bags without cells are masked, so that one forward serves many of them
    is_cell = torch.from_numpy(kept.reshape(-1, len(bag))).split(max(1, CELLS_AT_A_TIME // len(bag)))
    cells = torch.from_numpy(bag)[None]
    of_networks = [
        torch.cat([network(cells.expand(len(mask), -1, -1), mask)[0] for mask in is_cell]).double().softmax(dim=1)
        for network in networks
    ]
    curves = torch.stack(of_networks).mean(dim=0)[:, column].reshape(kept.shape[:2])
    return {
        "share": list(SHARES),
        "most_attended": curves[0].tolist(),
        "random": curves[1:].mean(dim=0).tolist(),
    }


# --- several networks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TrainedAggregator:
    """One or more networks of one architecture that predict together, and what they were trained on."""

    architecture: dict[str, Any]  # as `Aggregator.architecture`
    class_names: list[str]  # in the order of the logits
    members: list[dict[str, Tensor]]  # a state dict each
    features: dict[str, str] = field(default_factory=dict)  # attributes: `checkpoint_sha256`, `transform`, ...
    seen: list[str] = field(default_factory=list)  # `PatientBags.bag_hashes` of training and validation patients

    def predict(self, bags: Sequence[np.ndarray], device: str | torch.device = "cpu") -> BagPredictions:
        """Predict the classes of bags, T arrays float32 [N, D]."""
        dim = self.architecture["dim"]
        if bags[0].shape[1] != dim:
            what = f"it was trained on features of {dim} dimensions, these have {bags[0].shape[1]}"
            raise ValueError(f"aggregator: {what}; extract them with the checkpoint it was trained with")
        on_device = [torch.from_numpy(bag).to(device) for bag in bags]
        networks = [network.to(device) for network in self.networks()]
        outputs = map_by_single_threads(lambda network: predict_bags(network, on_device), networks, "networks", device)
        return BagPredictions.collect((np.arange(len(bags)), *output) for output in outputs)

    def networks(self) -> list[Aggregator]:
        """Build the networks, on the CPU and in eval mode."""
        networks = [build_aggregator(**self.architecture).eval() for _ in self.members]
        for network, weights in zip(networks, self.members, strict=True):
            network.load_state_dict(weights)
        return networks

    def save(self, path: Path) -> None:
        """Write a file that `load` reads."""
        with atomic_write(path) as file:
            torch.save({"format": FILE_FORMAT, **vars(self)}, file)

    @classmethod
    def load(cls, path: Path) -> "TrainedAggregator":
        """Read a file of `save`, without executing anything in it; ValueError for any other file."""
        try:
            content = read_weights_file(check_regular_file(local_path(path), "--apply"))
            if content.pop("format", None) != FILE_FORMAT:
                raise ValueError("it has another format")
            aggregator = cls(**content)
            n_classes, n_names = aggregator.architecture["n_classes"], len(set(aggregator.class_names))
            if not aggregator.members or n_names != n_classes:
                raise ValueError(f"it has {len(aggregator.members)} networks, {n_names} names for {n_classes} classes")
            with torch.device("meta"):  # whatever sizes the file declares, they take no memory
                network = build_aggregator(**aggregator.architecture)
            for weights in aggregator.members:
                network.load_state_dict(weights, assign=True)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            what = f"{str(path)!r} is no aggregator, or it is damaged or of another version ({error})"
            raise ValueError(f"--apply: {what}; give the aggregator.pth that this command wrote") from error
        return aggregator


@dataclass(frozen=True, eq=False)
class Member:
    """A classifier by the numbers of its fold and run, and the probabilities [T, C] of the fold's test patients [T]."""

    fold: int
    run: int
    test: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True, eq=False)
class Network(Member):
    """A trained aggregator."""

    training: Training


def describe_members(
    members: Sequence[Member], labels: np.ndarray, class_names: Sequence[str], key: str = "networks"
) -> dict[str, Any]:
    """Return under `key` the metrics of each on its test patients, and their `mean`, `sd`, `min` and `max`.

    `sd` (with n - 1) is None for a single one. Members for which a metric is undefined are left out of it.
    """
    rows = []
    for member in members:
        probabilities = member.probabilities
        metrics = classification_metrics(labels[member.test], probabilities.argmax(axis=1), class_names, probabilities)
        row: dict[str, Any] = {"fold": member.fold, "run": member.run}
        if isinstance(member, Network):
            best, history = member.training.best_epoch, member.training.history
            row |= {"learning_rate": history[0].learning_rate, "best_epoch": best, "epochs": len(history)}
            row["val_loss"] = history[best].val_loss
        rows.append(row | {name: metrics[name] for name in AVERAGED_METRICS})
    values = pd.DataFrame(rows)[list(AVERAGED_METRICS)].astype(float)
    spread = values.agg(["mean", "std", "min", "max"]).rename({"std": "sd"})
    return {**spread.astype(object).where(spread.notna(), None).to_dict("index"), key: rows}

"""Networks that predict together: the mean of their predictions, their file, their metrics and their tables.

Dimension key:  P patients, N cells of one, D feature dim, C classes, T tested patients, A attention columns (C or 1)
"""

import pickle
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dinov2.data.datasets.bag_folds import BagFold, FoldedBags
from dinov2.data.datasets.bags import PatientBags
from dinov2.eval.metrics import classification_metrics
from dinov2.eval.results import AVERAGED_METRICS, PROBABILITY_PREFIX, FoldPredictions, write_csv
from dinov2.eval.solvers.mil_training import Epoch, Training, predict_bags
from dinov2.models.abmil import build_aggregator
from dinov2.utils.files import atomic_write

FILE_FORMAT = "dinov2 aggregator 1"


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

    def by_fold(self, folds: Sequence[BagFold], n_patients: int) -> FoldPredictions:
        """Return the mean predictions for all P patients; folds with the same test set count as one."""
        learned: dict[tuple[int, ...], np.ndarray] = {}
        for fold in folds:
            key = tuple(fold.test.tolist())
            learned[key] = np.unique(np.concatenate([fold.train, fold.val, learned.get(key, fold.train)]))
        probabilities = np.full((n_patients, self.probabilities.shape[1]), np.nan)
        probabilities[self.positions] = self.probabilities
        classes = np.full(n_patients, -1, dtype=np.int64)
        classes[self.positions] = self.classes
        sides = [(train, np.array(test, dtype=np.int64)) for test, train in learned.items()]
        return FoldPredictions(sides, classes, probabilities, [{} for _ in sides])


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


# --- tables ---------------------------------------------------------------------------------------------------------


def prediction_header(class_names: Sequence[str], *keys: str) -> list[str]:
    """Return the names of key columns, `prediction` and p_<class>."""
    return [*keys, "prediction", *(f"{PROBABILITY_PREFIX}{name}" for name in class_names)]


def write_networks(output_dir: Path, data: FoldedBags, networks: Sequence[Network]) -> None:
    """Write predictions_of_networks.csv (a row for each network and test patient) and history.csv (for each epoch)."""
    label_of, names = data.bags.label_of(), data.bags.class_names
    predictions, epochs = [], []
    for network in networks:
        key = (data.fold_names[network.fold], network.run)
        for i, probabilities in zip(network.test.tolist(), network.probabilities, strict=True):
            patient = data.bags.patients[i]
            predictions.append([*key, patient, label_of[patient], names[probabilities.argmax()], *probabilities])
        epochs += [[*key, i, *map(str, astuple(epoch))] for i, epoch in enumerate(network.training.history)]
    header = prediction_header(names, "fold", "run", "patient", "label")
    write_csv(output_dir / "predictions_of_networks.csv", header, predictions)
    header = ["fold", "run", "epoch", *(column.name for column in fields(Epoch))]
    write_csv(output_dir / "history.csv", header, epochs)


def write_attention(
    output_dir: Path, bags: PatientBags, predictions: BagPredictions, class_names: Sequence[str], n_top: int
) -> None:
    """Write attention.csv, a row for each cell of the tested patients, and top_cells.csv, the first few of each.

    The column `attention` is that of the predicted class; where each class has its own, `attention_<class>` follow.
    """
    has_columns = len(predictions.attention[0]) > 1
    rows, top_rows = [], []
    predicted = zip(predictions.classes, predictions.predicted_attention(), predictions.attention, strict=True)
    for position, (i, attention, by_class) in zip(predictions.positions.tolist(), predicted, strict=True):
        patient, sources = bags.patients[position], bags.cells[position]
        columns = np.stack([attention, *(by_class if has_columns else ())], axis=1)  # [N, 1 or 1 + C]
        texts = [[f"{value:.6g}" for value in values] for values in columns]
        rows += [[patient, cell, source, *texts[cell]] for cell, source in enumerate(sources)]
        top_cells = np.argsort(-attention, kind="stable")[:n_top].tolist()
        top_rows += [
            [patient, class_names[i], rank, cell, sources[cell], texts[cell][0]]
            for rank, cell in enumerate(top_cells, start=1)
        ]
    names = [f"attention_{name}" for name in class_names] if has_columns else []
    write_csv(output_dir / "attention.csv", ["patient", "cell", "source", "attention", *names], rows)
    header = ["patient", "prediction", "rank", "cell", "source", "attention"]
    write_csv(output_dir / "top_cells.csv", header, top_rows)

"""The recipe `robust`: an ensemble of aggregators for one to two hundred patients.

All patients that are not tested are learned from. They are divided into inner folds, stratified by class; each inner
fold stops the networks that learn from the others, and the learning rate is the one with the lowest mean validation
loss over the inner folds. The networks of all inner folds and runs with this rate predict together. Features are
standardised, a step sees a part of a bag's cells, and classes weigh the same. `ROBUST` has the settings; they were
chosen on drawn patients and on patients made of PBC cells (docs/benchmarks/patients.md).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from dinov2.data.datasets.bag_folds import BagFold
from dinov2.data.splits import make_folds
from dinov2.eval.solvers.mil_training import Job, Training, TrainingSettings, train_all
from dinov2.utils.numerics import derive_seed

ROBUST = TrainingSettings(
    epochs=60,
    patience=15,
    class_weights=True,
    optimizer="adamw",
    weight_decay=0.1,
    cell_dropout=0.5,
    batch_size=8,
    standardise=True,
)
RATES = (3e-4, 1e-3, 3e-3)
INNER_FOLDS = 4
RUNS = 2


def train_robust(
    bags: Sequence[Tensor],
    labels: np.ndarray,
    folds: Sequence[BagFold],
    n_classes: int,
    model: str,
    settings: TrainingSettings = ROBUST,
    rates: Sequence[float] = RATES,
    runs: int = RUNS,
    seed: int = 0,
) -> tuple[list[Job], list[Training]]:
    """Train the networks of the recipe for each fold; return the jobs and the trainings of all that predict.

    A fold's training and validation patients are learned from. `settings.learning_rate` is replaced by one of `rates`.
    """
    first_jobs = []
    for number, fold in enumerate(folds):
        learned = np.union1d(fold.train, fold.val)
        inner = make_folds(labels[learned], None, INNER_FOLDS, seed)
        for rate in rates:
            for part, (train, val) in enumerate(inner):
                of_rate = replace(settings, learning_rate=rate)
                network_seed = derive_seed(seed, "abmil", number, part, 0)
                first_jobs.append(Job(number, learned[train], learned[val], of_rate, network_seed))
    first = train_all(bags, labels, first_jobs, n_classes, model)
    losses = defaultdict(list)
    for job, training in zip(first_jobs, first, strict=True):
        losses[job.fold, job.settings.learning_rate].append(training.history[training.best_epoch].val_loss)
    best = {
        number: min(rates, key=lambda rate: np.mean(losses[number, rate]))  # noqa: B023
        for number in range(len(folds))
    }
    kept = [
        (job, training)
        for job, training in zip(first_jobs, first, strict=True)
        if job.settings.learning_rate == best[job.fold]
    ]
    more_jobs = [replace(job, seed=derive_seed(job.seed, "run", run)) for job, _ in kept for run in range(1, runs)]
    kept += zip(more_jobs, train_all(bags, labels, more_jobs, n_classes, model), strict=True)
    kept.sort(key=lambda pair: pair[0].fold)  # stable
    return [job for job, _ in kept], [training for _, training in kept]

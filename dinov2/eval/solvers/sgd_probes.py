"""DINOv2's linear probe: softmax layers for many learning rates and kinds of features, trained on the same batches.

SGD with momentum 0.9, cosine schedule to 0, no weight decay, batches of 128. Weights start normal with standard
deviation 0.01, biases at 0 (Oquab et al. 2023, arXiv 2304.07193).

Dimension key:  N cells, D numbers a cell, C classes, L learning rates, B cells in a batch
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from dinov2.data.splits import Fold
from dinov2.eval.metrics import log_losses
from dinov2.eval.solvers.logistic import LinearProbe, check_cells
from dinov2.utils.seeds import derive_seed

# for batches of 256
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
SGD_ITERATIONS = 12_500  # 10 epochs of 1250 batches
SGD_BATCH_SIZE = 128
SGD_MOMENTUM = 0.9


def fit_sgd_probes(
    features: Mapping[str, np.ndarray],
    labels: np.ndarray,
    n_classes: int,
    learning_rates: Sequence[float] = LEARNING_RATES,
    n_iterations: int = SGD_ITERATIONS,
    batch_size: int = SGD_BATCH_SIZE,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> dict[tuple[str, float], LinearProbe]:
    """Train a softmax layer for each kind of features and each learning rate.

    Args:
        features: {kind: [N, D]}.
        labels: int64 [N].
        n_classes: C.
        learning_rates: L, for 256 cells a batch; scaled by batch_size / 256.
        n_iterations: number of batches; each pass over the cells has a new random order.
        batch_size: B; all cells if there are fewer.
        seed: of weights and order.
        device: where the layers are trained, in float32.

    Returns:
        {(kind, learning rate): probe}; `has_converged` is False where weights are infinite or NaN.

    Raises:
        ValueError: for unusable cells (`check_cells`).
    """
    for values in features.values():
        _, labels = check_cells(values, labels, n_classes)
    order_rng = torch.Generator().manual_seed(derive_seed(seed, "order"))
    n_cells, batch_size = len(labels), min(batch_size, len(labels))
    rates = torch.tensor(learning_rates, device=device)[:, None, None] * batch_size / 256  # [L, 1, 1]
    inputs = {kind: torch.as_tensor(x, dtype=torch.float32, device=device) for kind, x in features.items()}
    one_hot = torch.nn.functional.one_hot(torch.as_tensor(labels, device=device), n_classes).float()  # [N, C]
    weights, momenta = {}, {}
    for kind, x in inputs.items():
        # seeded by the kind's name: its result does not depend on the other kinds
        rng = torch.Generator().manual_seed(derive_seed(seed, "weights", kind))
        start = torch.randn(n_classes, x.shape[1], generator=rng) * 0.01
        start = torch.cat([start, torch.zeros(n_classes, 1)], dim=1)  # the bias is the last column
        weights[kind] = start.to(device).expand(len(learning_rates), -1, -1).clone()  # [L, C, D + 1]
        momenta[kind] = torch.zeros_like(weights[kind])
    order = torch.empty(0, dtype=torch.int64)
    for iteration in range(n_iterations):
        if len(order) < batch_size:
            order = torch.cat([order, torch.randperm(n_cells, generator=order_rng)])
        batch, order = order[:batch_size].to(device), order[batch_size:]
        step = rates * (1 + math.cos(math.pi * iteration / n_iterations)) / 2
        for kind, x in inputs.items():
            cells = torch.nn.functional.pad(x[batch], (0, 1), value=1.0)  # [B, D + 1]
            gradient = (cells @ weights[kind].mT).softmax(dim=2) - one_hot[batch]  # [L, B, C], by the logits
            momenta[kind].mul_(SGD_MOMENTUM).add_(gradient.mT @ cells, alpha=1 / batch_size)
            weights[kind] -= step * momenta[kind]
    probes = {}
    for kind, weights_of_rates in weights.items():
        for rate, trained in zip(learning_rates, weights_of_rates.double().cpu().numpy(), strict=True):
            is_finite = bool(np.isfinite(trained).all())
            probes[kind, rate] = LinearProbe(trained[:, :-1], trained[:, -1], n_iterations, is_finite)
    return probes


def choose_sgd_probe(
    features: Mapping[str, np.ndarray],
    labels: np.ndarray,
    fold: Fold,
    fit: Callable[[Mapping[str, np.ndarray], np.ndarray], dict[tuple[str, float], LinearProbe]],
) -> tuple[str, float, float]:
    """Return the kind of features and the learning rate with the highest validation accuracy, and that accuracy.

    Of equal accuracies the one with the lower log loss counts.

    Args:
        features: {kind: [N, D]}.
        labels: int64 [N].
        fold: positions to fit and to validate on; other cells are not used.
        fit: `fit_sgd_probes` with its settings.

    Raises:
        ValueError: for unusable cells (`check_cells`), and if no probe has finite weights.
    """
    train, validation = fold
    scores = {}
    for (kind, rate), probe in fit({kind: x[train] for kind, x in features.items()}, labels[train]).items():
        if probe.has_converged:
            probabilities = probe.predict_proba(features[kind][validation])
            accuracy = float((probabilities.argmax(axis=1) == labels[validation]).mean())
            scores[kind, rate] = accuracy, -float(log_losses(labels[validation], probabilities).mean())
    if not scores:
        raise ValueError("sgd: all learning rates led to infinite weights; normalise the features, or lower the rates")
    best = max(scores, key=lambda kind_and_rate: scores[kind_and_rate])
    return (*best, scores[best][0])

"""Linear probes: multinomial logistic regression at the optimum of scikit-learn's objective, and DINOv2's SGD probes.

    minimise  sum_n -ln softmax(W x_n + b)[y_n]  +  lambda / 2 |W|^2        (b is free; scikit-learn's C = 1 / lambda)

Backend `torch`: SciPy's L-BFGS, with loss and gradient computed by torch in float64. Features of a network are strongly
correlated and the penalty is weak, so on features as they are it needs thousands of iterations. Here they are centred,
rotated onto their principal axes and scaled by 1 / sqrt(c s^2 + lambda / N), where s^2 is the variance along an axis
and c a typical p (1 - p); the penalty is scaled along, so the optimum is the same. Backend `sklearn`: its default
solver and tolerance, which stop earlier. SGD probes: Oquab et al. 2023, arXiv 2304.07193.

Dimension key:  N samples, D feature dim, r = min(N, D) axes, C classes, L learning rates, B samples in a batch
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import scipy.optimize
import scipy.special
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from dinov2.data.splits import Fold
from dinov2.eval.metrics import log_losses
from dinov2.utils.numerics import derive_seed

logger = logging.getLogger("dinov2")

Backend = Literal["torch", "sklearn"]

CURVATURE = 0.02  # c: smaller than at the start (1 / C), since most samples are fitted well at the optimum
MAX_ITER = {"torch": 3000, "sklearn": 1000}
# L-BFGS stops when the mean loss changes by less. Probabilities of held-out samples are then within about 1e-4 of the
# optimum's, for penalties like dinobloom's.
LOSS_TOLERANCE = 1e-13

# for batches of 256
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
SGD_ITERATIONS = 12_500  # 10 epochs of 1250 batches
SGD_BATCH_SIZE = 128
SGD_MOMENTUM = 0.9


@dataclass(frozen=True)
class LinearProbe:
    """Weights of one fit; a class without training cells has the bias -inf, so it is never predicted."""

    weights: np.ndarray  # float64 [C, D]
    bias: np.ndarray  # float64 [C]
    n_iterations: int  # of the solver
    has_converged: bool

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Return logits float64 [N, C] for features [N, D]."""
        return np.asarray(features, dtype=np.float64) @ self.weights.T + self.bias

    def predict_proba(self, features: np.ndarray) -> np.ndarray:
        """Return probabilities float64 [N, C] for features [N, D]."""
        return scipy.special.softmax(self.logits(features), axis=1)


def check_cells(features: np.ndarray, labels: np.ndarray) -> None:
    """Raise ValueError if features [N, D] are infinite or NaN, or labels int64 [N] are of one class only."""
    n_broken = int((~np.isfinite(features).all(axis=1)).sum())
    if n_broken:
        what = f"{n_broken} of {len(features)} cells have infinite or NaN ones"
        raise ValueError(f"features: {what}; extract again, with weights that did not diverge")
    if len(np.unique(labels)) < 2:
        raise ValueError(
            f"labels: all {len(labels)} training cells are of one class (number {labels[0]}); a probe needs two or more"
        )


def fit_logistic(
    features: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    lams: Sequence[float],
    device: str | torch.device = "cpu",
    backend: Backend = "torch",
) -> list[LinearProbe]:
    """Fit one probe for each lambda, on features [N, D] as they are, and warn about fits that did not converge.

    Labels are int64 [N]; classes without a cell get probability 0. Backend `torch` finds the optimum on `device`;
    `sklearn` has its defaults, and 1000 iterations at most.
    """
    check_cells(features, labels)
    if not min(lams) > 0:
        raise ValueError(f"lambda: {min(lams)}; choose a penalty above 0")
    max_iter = MAX_ITER[backend]
    present, ids = np.unique(labels, return_inverse=True)
    if backend == "torch":
        solutions = _solve_torch(torch.as_tensor(features, device=device), torch.as_tensor(ids, device=device), lams)
    else:
        solutions = _solve_sklearn(features, ids, lams)
    probes = []
    for lam, (weights_of_present, bias_of_present, n_iterations) in zip(lams, solutions, strict=True):
        weights, bias = np.zeros((n_classes, features.shape[1])), np.full(n_classes, -np.inf)
        weights[present], bias[present] = weights_of_present, bias_of_present
        has_converged = n_iterations < max_iter
        if not has_converged:
            logger.warning("logistic regression, lambda %.3g: not converged in %d iterations", lam, n_iterations)
        probes.append(LinearProbe(weights, bias, n_iterations, has_converged))
    return probes


Solutions: TypeAlias = Iterator[tuple[np.ndarray, np.ndarray, int]]  # weights [C, D], bias [C], iterations


def _solve_torch(features: Tensor, labels: Tensor, lams: Sequence[float]) -> Solutions:
    mean = features.mean(dim=0, dtype=torch.float64)
    centred = features - mean  # [N, D]
    if len(features) < len(mean):
        axes = torch.linalg.svd(centred, full_matrices=False).Vh.T  # [D, r]
    else:
        axes = torch.linalg.eigh(centred.T @ centred).eigenvectors
    rotated = centred @ axes  # [N, r]
    del centred
    variances = rotated.square().mean(dim=0)  # [r]
    n_classes = int(labels.max()) + 1
    for lam in lams:
        # scikit-learn has one weight vector w for two classes: here +w / 2 and -w / 2, whose squares sum to half
        penalty = lam / len(labels) * (2 if n_classes == 2 else 1)
        scales = (CURVATURE * variances + penalty).rsqrt()  # [r]
        solution, n_iterations = _minimise(rotated * scales, labels, n_classes, penalty * scales.square())
        weights = (solution[:, :-1] * scales) @ axes.T  # [C, D]
        bias = solution[:, -1] * CURVATURE**-0.5 - weights @ mean  # [C]
        yield weights.cpu().numpy(), (bias - bias.mean()).cpu().numpy(), n_iterations


def _minimise(features: Tensor, labels: Tensor, n_classes: int, penalties: Tensor) -> tuple[Tensor, int]:
    """Return the weights [C, r + 1] with the least mean loss, the bias as last column, and the number of iterations.

    Features are float64 [N, r], labels int64 [N]; `penalties` [r] are those of the squared weights along each axis.
    """
    one_hot = torch.nn.functional.one_hot(labels, n_classes).double()  # [N, C]

    def loss_and_gradient(values: np.ndarray) -> tuple[float, np.ndarray]:
        solution = torch.as_tensor(values, device=features.device).view(n_classes, -1)
        weights, bias = solution[:, :-1], solution[:, -1] * CURVATURE**-0.5
        log_p = torch.addmm(bias, features, weights.T).log_softmax(dim=1)  # [N, C]
        loss = (penalties * weights.square()).sum() / 2 - (log_p * one_hot).sum() / len(labels)
        by_logits = (log_p.exp() - one_hot) / len(labels)  # [N, C]
        by_bias = by_logits.sum(dim=0)[:, None] * CURVATURE**-0.5
        gradient = torch.cat([by_logits.T @ features + penalties * weights, by_bias], dim=1)  # [C, r + 1]
        return loss.item(), gradient.cpu().numpy().ravel()

    solution = scipy.optimize.minimize(
        loss_and_gradient,
        np.zeros(n_classes * (features.shape[1] + 1)),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": MAX_ITER["torch"], "maxfun": 2 * MAX_ITER["torch"], "ftol": LOSS_TOLERANCE, "gtol": 0.0},
    )
    return torch.as_tensor(solution.x, device=features.device).view(n_classes, -1), int(solution.nit)


def _solve_sklearn(features: np.ndarray, labels: np.ndarray, lams: Sequence[float]) -> Solutions:
    for lam in lams:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # `fit_logistic` logs it
            model = LogisticRegression(C=1 / lam, max_iter=MAX_ITER["sklearn"]).fit(features, labels)
        weights, bias = model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
        if len(bias) == 1:  # of two classes it has the second one's
            weights, bias = (np.concatenate([np.zeros_like(x), x]) for x in (weights, bias))
        yield weights, bias, int(model.n_iter_.max())


# --- DINOv2's probes --------------------------------------------------------------------------------------------------


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
    """Train a softmax layer in float32 for each kind of features [N, D] and each learning rate.

    SGD with a cosine schedule to 0 and no weight decay. Weights start normal with standard deviation 0.01, biases at 0.
    Rates are for 256 cells a batch and scaled by batch_size / 256; a batch is all cells if there are fewer. Each pass
    over the cells has a new random order.

    Returns:
        {(kind, learning rate): probe}; `has_converged` is False where weights are infinite or NaN.
    """
    for values in features.values():
        check_cells(values, labels)
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

    Of equal accuracies the one with the lower log loss counts. `fold` are positions to fit and to validate on, in
    features {kind: [N, D]} and labels int64 [N]; `fit` is `fit_sgd_probes` with its settings.
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

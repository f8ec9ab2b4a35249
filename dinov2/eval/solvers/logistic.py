"""Multinomial logistic regression: the optimum of scikit-learn's objective, on a CPU or GPU, or scikit-learn itself.

    minimise  sum_n -ln softmax(W x_n + b)[y_n]  +  lambda / 2 |W|^2        (b is free)

This is scikit-learn's objective with C = 1 / lambda. Backend `torch` minimises it by SciPy's L-BFGS; loss and gradient
are computed by torch, in float64. Features of a network are strongly correlated and the penalty is weak, so L-BFGS on
the features as they are needs thousands of iterations. Here the features are centred, rotated onto their principal axes
and scaled by 1 / sqrt(c s^2 + lambda / N), where s^2 is the variance along an axis and c a typical p (1 - p). The
penalty is scaled along, so the optimum is the same. Backend `sklearn` is scikit-learn's default solver and tolerance,
which stop earlier.

Dimension key:  N samples, D feature dim, r = min(N, D) axes, C classes
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import scipy.optimize
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

logger = logging.getLogger("dinov2")

Backend = Literal["torch", "sklearn"]

CHUNK = 8192  # samples that are converted to float64 at a time
CURVATURE = 0.02  # c: smaller than at the start (1 / C), since most samples are fitted well at the optimum
MAX_ITER = {"torch": 3000, "sklearn": 1000}
# L-BFGS stops when the mean loss changes by less. Probabilities of held-out samples are then within about 1e-4 of the
# optimum's, for penalties like dinobloom's.
LOSS_TOLERANCE = 1e-13


@dataclass(frozen=True)
class LinearProbe:
    """Weights of one fit.

    Attributes:
        weights: float64 [C, D].
        bias: float64 [C]; -inf for a class without training cells, which is never predicted.
        n_iterations: of the solver.
        has_converged: False if the solver stopped at its limit of iterations.
    """

    weights: np.ndarray
    bias: np.ndarray
    n_iterations: int
    has_converged: bool

    def predict_proba(self, features: np.ndarray) -> np.ndarray:
        """Return probabilities float64 [N, C] for features [N, D]."""
        logits = np.asarray(features, dtype=np.float64) @ self.weights.T + self.bias  # [N, C]
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)


def check_cells(features: np.ndarray, labels: np.ndarray, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Validate training features and labels and return them as arrays.

    Raises:
        ValueError: if shapes are not [N, D] and [N], features are infinite or NaN, or labels are of one class only or
            not from 0 to `n_classes` - 1.
    """
    features, labels = np.asarray(features), np.asarray(labels)
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(
            f"features {list(features.shape)} with labels {list(labels.shape)}: expected [N, D] and [N], with N cells"
        )
    n_broken = int((~np.isfinite(features).all(axis=1)).sum())
    if n_broken:
        raise ValueError(
            f"features: {n_broken} of {len(features)} cells have infinite or NaN ones; extract again, with weights "
            f"that did not diverge"
        )
    if labels.min() < 0 or labels.max() >= n_classes:
        raise ValueError(f"labels: from {labels.min()} to {labels.max()}, but there are {n_classes} classes")
    if labels.min() == labels.max():
        raise ValueError(
            f"labels: all {len(labels)} training cells are of one class (number {labels[0]}); a probe needs two or more"
        )
    return features, labels


def fit_logistic(
    features: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    lams: Sequence[float],
    device: str | torch.device = "cpu",
    backend: Backend = "torch",
) -> list[LinearProbe]:
    """Fit one probe for each lambda and warn about fits that did not converge.

    Args:
        features: [N, D], used as they are.
        labels: int64 [N], 0 to C - 1; classes without a cell get probability 0.
        n_classes: C.
        lams: penalties.
        device: where `torch` computes.
        backend: `torch` (the optimum) or `sklearn` (its defaults, 1000 iterations at most).

    Raises:
        ValueError: for unusable cells (`check_cells`), a penalty that is not above 0, or an unknown backend.
    """
    features, labels = check_cells(features, labels, n_classes)
    if not min(lams) > 0:
        raise ValueError(f"lambda: {min(lams)}; choose a penalty above 0")
    if backend not in get_args(Backend):
        raise ValueError(f"backend: {backend!r} is unknown; choose one of {', '.join(get_args(Backend))}")
    present, ids = np.unique(labels, return_inverse=True)
    if backend == "torch":
        solutions = _solve_torch(torch.as_tensor(features, device=device), torch.as_tensor(ids, device=device), lams)
    else:
        solutions = _solve_sklearn(features, ids, lams)
    probes = []
    for lam, (weights_of_present, bias_of_present, n_iterations) in zip(lams, solutions, strict=True):
        weights, bias = np.zeros((n_classes, features.shape[1])), np.full(n_classes, -np.inf)
        weights[present], bias[present] = weights_of_present, bias_of_present
        has_converged = n_iterations < MAX_ITER[backend]
        if not has_converged:
            logger.warning("logistic regression, lambda %.3g: not converged in %d iterations", lam, n_iterations)
        probes.append(LinearProbe(weights, bias, n_iterations, has_converged))
    return probes


Solutions: TypeAlias = Iterator[tuple[np.ndarray, np.ndarray, int]]  # weights [C, D], bias [C], iterations


def _solve_torch(features: Tensor, labels: Tensor, lams: Sequence[float]) -> Solutions:
    mean, axes = _principal_axes(features)
    rotated = torch.cat([(chunk - mean) @ axes for chunk in features.split(CHUNK)])  # [N, r]
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


def _principal_axes(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean [D] and the principal axes [D, r] of features [N, D], in float64."""
    mean = features.mean(dim=0, dtype=torch.float64)
    n_samples, dim = features.shape
    if n_samples < dim:
        return mean, torch.linalg.svd(features - mean, full_matrices=False).Vh.T
    products = features.new_zeros(dim, dim, dtype=torch.float64)
    for chunk in features.split(CHUNK):
        centred = chunk - mean
        products.addmm_(centred.T, centred)
    return mean, torch.linalg.eigh(products).eigenvectors


def _minimise(features: Tensor, labels: Tensor, n_classes: int, penalties: Tensor) -> tuple[Tensor, int]:
    """Return the weights [C, r + 1] with the least mean loss, the bias as last column, and the number of iterations.

    Args:
        features: float64 [N, r].
        labels: int64 [N], 0 to C - 1.
        n_classes: C.
        penalties: float64 [r], of the squared weights along each axis.
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

"""Multinomial logistic regression to convergence, on a CPU or GPU: the optimum that scikit-learn's solvers head for.

    minimise  sum_n -ln softmax(W x_n + b)[y_n]  +  lambda / 2 |W|^2        (b is free)

which is scikit-learn's objective with C = 1 / lambda. With two classes it has one weight vector, the other class's is
zero, as scikit-learn has it. Newton's method; each step comes from conjugate gradients, which need products with the
Hessian only (Steihaug 1983). Features are centred and rotated onto their principal axes, which changes no optimum but
gives a good preconditioner: were all samples' H_n = diag(p) - p p^T the same, the Hessian would be (their mean) x (sums
of squares s^2 of the axes) + lambda, which is diagonal in the eigenvectors of the first and inverted at once. Features
of a network are strongly correlated and the probe hardly regularised: first-order methods on the features as they are
take many more passes over them, or stop far from the optimum. Loss and gradient are float64, products with the Hessian
float32: they decide how the optimum is found, not where it is.

Dimension key:  N samples, D feature dim, r = min(N, D) axes, C classes, K weight vectors (C, or 1 for two classes)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CHUNK = 8192  # samples that are float64 beside the rotated ones
MAX_NEWTON_STEPS = 100
MAX_PRODUCTS = 500  # with the Hessian, for one step
STEP_TOLERANCE = 0.2  # of conjugate gradients: by how much they reduce the residual
# The last step, as the root of the mean change of the training samples' logits, squared and weighted by p (1 - p), over
# the root of the mean p (1 - p). What is left after such a step changes no probability by more than some 5e-5.
TOLERANCE = 1e-3
SMALLEST_CURVATURE = 1e-12  # where every sample is decided none is left, and divisors must stay above 0
SMALLEST_STEP = 1e-8
SMALL_PRODUCT = 1 << 22  # N r K up to which threads cost more than they save


@dataclass(frozen=True)
class LinearProbe:
    """Weights of one fit.

    Attributes:
        weights: float64 [C, D].
        bias: float64 [C]; -inf for a class that had no training cell, which is never predicted.
        n_iterations: of the solver.
        has_converged: whether it met its tolerance.
    """

    weights: np.ndarray
    bias: np.ndarray
    n_iterations: int
    has_converged: bool

    def predict_proba(self, features: np.ndarray) -> np.ndarray:
        """Probabilities float64 [N, C] of features [N, D]."""
        logits = np.asarray(features, dtype=np.float64) @ self.weights.T + self.bias  # [N, C]
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)


def check_cells(features: np.ndarray, labels: np.ndarray, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays, if something can be learned from them.

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


@dataclass(frozen=True)
class Solution:
    """Weights of one regularisation.

    Attributes:
        weights: float64 [C, D].
        bias: float64 [C].
        rotated: float64 [K, r + 1], the same in the solver's coordinates: the start for a neighbouring lambda.
        n_iterations: steps of Newton's method.
        has_converged: whether the last of them met the tolerance.
    """

    weights: Tensor
    bias: Tensor
    rotated: Tensor
    n_iterations: int
    has_converged: bool


class LogisticProblem:
    """Samples to fit, rotated once; `solve` then answers for any lambda.

    Weight vectors are rows, [K, r + 1] with the bias at the end, and so are logits, [K, N]: products of this shape take
    a fraction of the time of their transposes.
    """

    def __init__(self, features: Tensor, labels: Tensor, n_classes: int) -> None:
        """
        Args:
            features: [N, D], finite, on the device to compute on.
            labels: int64 [N], 0 to C - 1, each of them present.
            n_classes: C, 2 or more.
        """
        self.mean = features.mean(dim=0, dtype=torch.float64)  # [D]
        n_samples, dim = features.shape
        if n_samples < dim:
            _, lengths, axes = torch.linalg.svd(features - self.mean, full_matrices=False)
            self.axes, self.squares = axes.T, lengths.square()  # [D, r], [r]
        else:
            products = features.new_zeros(dim, dim, dtype=torch.float64)
            for chunk in features.split(CHUNK):
                centred = chunk - self.mean
                products.addmm_(centred.T, centred)
            squares, self.axes = torch.linalg.eigh(products)
            self.squares = squares.clamp_min(0)
        self.rotated = torch.cat([(chunk - self.mean) @ self.axes for chunk in features.split(CHUNK)])  # [N, r]
        self.rotated32 = self.rotated.float()
        self.labels = labels[None]  # [1, N]
        self.n_classes = n_classes
        self.n_vectors = n_classes if n_classes > 2 else 1
        self.one_hot = torch.nn.functional.one_hot(labels, n_classes).T[-self.n_vectors :].double()  # [K, N]

    def solve(self, lam: float, start: Tensor | None = None) -> Solution:
        """The optimum for one lambda > 0.

        Args:
            lam: lambda.
            start: `rotated` of another solution; None starts from zero.
        """
        n_samples, n_axes = self.rotated.shape
        with _one_thread(n_samples * n_axes * self.n_vectors <= SMALL_PRODUCT):
            return self._solve(lam, self.rotated.new_zeros(self.n_vectors, n_axes + 1) if start is None else start)

    def _solve(self, lam: float, solution: Tensor) -> Solution:
        loss, gradient, p = self._evaluate(solution, lam)
        n_iterations, has_converged, is_stuck = 0, False, False
        while not (has_converged or is_stuck) and n_iterations < MAX_NEWTON_STEPS:
            curvature = (p * (1 - p)).mean(dim=1, keepdim=True).clamp_min(SMALLEST_CURVATURE)  # [K, 1]
            step = self._newton_step(gradient, p, lam)
            slope = float((gradient * step).sum())  # below 0
            size = 1.0
            while True:
                candidate = solution + size * step
                new_loss, new_gradient, new_p = self._evaluate(candidate, lam)
                # near the optimum rounding outweighs the gain
                if new_loss <= loss + 1e-4 * size * slope + 1e-12 * abs(loss):
                    solution, loss, gradient, p = candidate, new_loss, new_gradient, new_p
                    break
                size /= 2
                if size < SMALLEST_STEP:
                    is_stuck = True
                    break
            n_iterations += 1
            has_converged = max(-slope, 0.0) ** 0.5 <= TOLERANCE * (float(curvature.mean()) * len(self.rotated)) ** 0.5
        weights = solution[:, :-1] @ self.axes.T  # [K, D]
        bias = solution[:, -1] - weights @ self.mean  # [K]
        if self.n_classes == 2:
            weights, bias = (torch.cat([torch.zeros_like(x), x]) for x in (weights, bias))
        else:
            bias = bias - bias.mean()  # which no probability depends on
        return Solution(weights, bias, solution, n_iterations, has_converged)

    def _evaluate(self, solution: Tensor, lam: float) -> tuple[float, Tensor, Tensor]:
        """Loss, gradient [K, r + 1] and probabilities [K, N]."""
        weights, bias = solution[:, :-1], solution[:, -1:]
        logits = torch.addmm(bias, weights, self.rotated.T)  # [K, N]
        if self.n_classes == 2:
            logits = torch.cat([torch.zeros_like(logits), logits])  # [C, N]
        log_p = logits.log_softmax(dim=0)
        loss = lam / 2 * weights.square().sum() - log_p.gather(0, self.labels).sum()
        p = log_p[-self.n_vectors :].exp()
        return float(loss), self._gradient(p - self.one_hot, weights, lam), p

    def _gradient(self, of_logits: Tensor, weights: Tensor, lam: float) -> Tensor:
        """Gradient [K, r + 1], given that with respect to the logits [K, N]."""
        of_weights = torch.addmm(weights, of_logits, self.rotated, beta=lam)
        return torch.cat([of_weights, of_logits.sum(dim=1, keepdim=True)], dim=1)

    def _newton_step(self, gradient: Tensor, p: Tensor, lam: float) -> Tensor:
        """About -H^-1 gradient: conjugate gradients, preconditioned as the module docstring says."""
        n_samples = p.shape[1]
        of_classes = p.mean(dim=1).diag() - p @ p.T / n_samples  # [K, K]
        curvatures, basis = torch.linalg.eigh(of_classes)
        curvatures = curvatures.clamp_min(SMALLEST_CURVATURE)[:, None]  # [K, 1]
        diagonal = torch.cat([curvatures * self.squares + lam, curvatures * n_samples], dim=1)  # [K, r + 1]

        def scale(vectors: Tensor) -> Tensor:
            return basis @ ((basis.T @ vectors) / diagonal)

        p = p.float()
        step, residual = torch.zeros_like(gradient), -gradient
        direction = scaled = scale(residual)
        first = left = (residual * scaled).sum()
        for _ in range(MAX_PRODUCTS if first > 0 else 0):
            product = self._times_hessian(direction, p, lam)
            bend = (direction * product).sum()
            if bend <= 0:  # rounding; the Hessian itself bends upwards everywhere
                break
            length = left / bend
            step = step + length * direction
            residual = residual - length * product
            scaled = scale(residual)
            before, left = left, (residual * scaled).sum()
            if left <= STEP_TOLERANCE**2 * first:
                break
            direction = scaled + left / before * direction
        return step

    def _times_hessian(self, direction: Tensor, p: Tensor, lam: float) -> Tensor:
        """The Hessian times float64 [K, r + 1], given probabilities in float32."""
        weights, bias = direction[:, :-1], direction[:, -1:]
        change = torch.addmm(bias.float(), weights.float(), self.rotated32.T)  # [K, N], of the logits
        # of two classes the first one's logit is 0 and stays so
        of_logits = p * (change - (p * change).sum(dim=0, keepdim=True))
        of_bias = of_logits.sum(dim=1, keepdim=True, dtype=torch.float64)
        product = torch.cat([(of_logits @ self.rotated32).double(), of_bias], dim=1)
        if self.n_vectors > 1:
            # What all classes have in common changes nothing: only lambda holds it, and rounding would be taken for it
            product -= product.mean(dim=0)
        product[:, :-1] += lam * weights
        return product


@contextmanager
def _one_thread(is_wanted: bool) -> Iterator[None]:
    n_threads = torch.get_num_threads()
    if is_wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)

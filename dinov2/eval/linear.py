"""Linear probes of frozen features: DinoBloom's logistic regression, one with a chosen penalty, DINOv2's SGD sweep.

Protocol `dinobloom`: multinomial logistic regression (`linear_solver`), features as they are, lambda = 100 / (M C)
for M numbers a cell and C classes. Nothing is tuned. The optimum is computed. scikit-learn's L-BFGS with its defaults,
from which published numbers are, stops at a mean gradient of 1e-4, on unscaled features often far from the optimum;
`--backend sklearn` does just that.

Protocol `sweep`: the lambda of `LAMBDAS` with the least log loss over validation folds of the training side alone,
which are stratified and keep patients whole; then a fit with it on all of the training side.

Protocol `sgd`: DINOv2's. A softmax layer for each learning rate and each kind of features (`linear_sgd`: CLS tokens of
the last block and of the last four, with and without the mean of the patch tokens, or whatever kinds a features file
has), all trained on the same batches by SGD with momentum 0.9, cosine schedule and no weight decay. The one with the
highest accuracy on the first validation fold of the training side (then the least log loss) is trained again on all of
the training side.

Split. `judged_set` tells how it is made. Test cells choose nothing. Metrics are those of all test cells together, with
bootstrap intervals (by patient where known), and of each fold, with mean and spread. With a few cells a class
(--few-shot) the protocol is `dinobloom` whatever the rest takes, on the first kind of features.

Dimension key:  N cells, D or M numbers a cell, C classes
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from dinov2.data.splits import Fold, make_folds
from dinov2.eval.extract_features import device_of, positive_int
from dinov2.eval.features import DEFAULT_KIND
from dinov2.eval.judged_report import FewShotMethod, ReportStyle, few_shot_rows, format_report, write_results
from dinov2.eval.judged_set import N_FOLDS, JudgedSet, add_judging_arguments, complete_arguments, load_judged_set
from dinov2.eval.linear_sgd import SGD_ITERATIONS, choose_sgd_probe, fit_sgd_probes
from dinov2.eval.linear_solver import LinearProbe, LogisticProblem, check_cells
from dinov2.eval.metrics import log_losses
from dinov2.eval.results import FoldPredictions
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code

logger = logging.getLogger("dinov2")

Protocol = Literal["dinobloom", "sweep", "sgd"]
Backend = Literal["torch", "sklearn"]
MAX_ITER = 1000  # of scikit-learn's solver
LAMBDAS = tuple(10.0**exponent for exponent in range(4, -4, -1))
SGD_KINDS = ("cls", "cls+mean", "last4", "last4+mean")  # those that DINOv2's probes choose among


def dinobloom_lambda(n_features: int, n_classes: int) -> float:
    """100 / (M C)."""
    return 100 / (n_features * n_classes)


def fit_linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    lam: float | None = None,
    device: str | torch.device = "cpu",
    backend: Backend = "torch",
) -> LinearProbe:
    """Multinomial logistic regression, with the objective of scikit-learn's LogisticRegression(C=1 / lam).

    Args:
        features: [N, D], used as they are.
        labels: int64 [N], 0 to C - 1; classes without a cell are left out of the fit.
        n_classes: C.
        lam: penalty; None for `dinobloom_lambda`.
        device: where "torch" computes, in float64.
        backend: "torch", to the optimum; or "sklearn", with its default solver and tolerance and 1000 iterations at
            most. A warning says which fits did not converge.

    Raises:
        ValueError: if shapes do not fit, features are infinite or NaN, labels are of one class only or no positions of
            classes, or lam is not above 0.
    """
    lam = dinobloom_lambda(features.shape[1], n_classes) if lam is None else lam
    return _fit_path(features, labels, n_classes, (lam,), device, backend)[0]


def _fit_path(
    features: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    lams: Sequence[float],
    device: str | torch.device = "cpu",
    backend: Backend = "torch",
) -> list[LinearProbe]:
    """`fit_linear_probe` for several lambdas, each from where the one before ended."""
    features, labels = check_cells(features, labels, n_classes)
    if not min(lams) > 0:
        raise ValueError(f"lambda: {min(lams)}; choose a penalty above 0")
    if backend not in get_args(Backend):
        raise ValueError(f"backend: {backend!r} is unknown; choose one of {', '.join(get_args(Backend))}")
    present, ids = np.unique(labels, return_inverse=True)
    solve = _solve_torch if backend == "torch" else _solve_sklearn
    probes = [
        _with_all_classes(probe, present, n_classes) for probe in solve(features, ids, lams, torch.device(device))
    ]
    for lam, probe in zip(lams, probes, strict=True):
        if not probe.has_converged:
            logger.warning("logistic regression, lambda %.3g: not converged in %d iterations", lam, probe.n_iterations)
    return probes


def _solve_torch(
    features: np.ndarray, ids: np.ndarray, lams: Sequence[float], device: torch.device
) -> Iterator[LinearProbe]:
    on_device = torch.as_tensor(features, device=device), torch.as_tensor(ids, device=device)
    problem = LogisticProblem(*on_device, n_classes=int(ids.max()) + 1)
    start = None
    for lam in lams:
        solution = problem.solve(lam, start)
        start = solution.rotated
        weights, bias = solution.weights.cpu().numpy(), solution.bias.cpu().numpy()
        yield LinearProbe(weights, bias, solution.n_iterations, solution.has_converged)


def _solve_sklearn(
    features: np.ndarray, ids: np.ndarray, lams: Sequence[float], device: torch.device
) -> Iterator[LinearProbe]:
    for lam in lams:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the log tells of it
            model = LogisticRegression(C=1 / lam, max_iter=MAX_ITER).fit(features, ids)
        weights, bias = model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
        if len(bias) == 1:  # of two classes it tells the second one's
            weights, bias = (np.concatenate([np.zeros_like(x), x]) for x in (weights, bias))
        n_iterations = int(model.n_iter_.max())
        yield LinearProbe(weights, bias, n_iterations, n_iterations < MAX_ITER)


def _with_all_classes(probe: LinearProbe, present: np.ndarray, n_classes: int) -> LinearProbe:
    """A probe of the classes `present` as one of all classes."""
    weights, bias = np.zeros((n_classes, probe.weights.shape[1])), np.full(n_classes, -np.inf)
    weights[present], bias[present] = probe.weights, probe.bias
    return replace(probe, weights=weights, bias=bias)


def choose_lambda(
    features: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    folds: Sequence[Fold],
    lams: Sequence[float] = LAMBDAS,
    device: str | torch.device = "cpu",
    backend: Backend = "torch",
) -> tuple[float, dict[float, float]]:
    """The penalty with the least log loss on validation folds, and the loss of each.

    Args:
        features: [N, D].
        labels: int64 [N].
        n_classes: C.
        folds: positions to fit and to validate on each; nothing else is looked at.
        lams: from the strongest on; of equal losses the first counts.
        device, backend: as for `fit_linear_probe`.

    Raises:
        ValueError: as `fit_linear_probe`.
    """
    losses = np.zeros(len(lams))
    for fitted, validated in folds:
        probes = _fit_path(features[fitted], labels[fitted], n_classes, lams, device=device, backend=backend)
        for i, probe in enumerate(probes):
            losses[i] += log_losses(labels[validated], probe.predict_proba(features[validated])).sum()
    losses /= sum(len(validated) for _, validated in folds)
    best = int(losses.argmin())
    if best in (0, len(lams) - 1) and len(lams) > 1:
        logger.warning("lambda %.3g is the best and at the end of those tried; others may do better", lams[best])
    return lams[best], dict(zip(lams, losses.tolist(), strict=True))


def evaluate_linear(
    features: np.ndarray | Mapping[str, np.ndarray],
    labels: np.ndarray,
    n_classes: int,
    folds: Sequence[Fold],
    patients: Sequence[str] | None = None,
    validation: np.ndarray | None = None,
    protocol: Protocol = "dinobloom",
    n_validation_folds: int = N_FOLDS,
    sgd_iterations: int = SGD_ITERATIONS,
    seed: int = 0,
    device: str | torch.device = "cpu",
    backend: Backend = "torch",
) -> FoldPredictions:
    """A protocol on given features.

    Args:
        features: [N, D]; for `sgd` also {kind: [N, D]} to choose among.
        labels: int64 [N].
        n_classes: C.
        folds: training and test positions each.
        patients: N patient ids, which validation folds keep whole; or None.
        validation: positions to choose hyper-parameters by; None for folds of each training side.
        protocol: "dinobloom", "sweep" or "sgd".
        n_validation_folds: of which `sgd` uses the first.
        sgd_iterations: batches of `sgd`.
        seed: of validation folds and of `sgd`.
        device, backend: as for `fit_linear_probe`.

    Returns:
        predictions, probabilities and, for each fold, what was chosen.

    Raises:
        ValueError: for an unknown protocol, and as the functions above.
    """
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol: {protocol!r} is unknown; choose one of {', '.join(get_args(Protocol))}")
    kinds = dict(features) if isinstance(features, Mapping) else {"features": features}
    if protocol != "sgd" and len(kinds) > 1:
        raise ValueError(f"protocol {protocol}: takes one array of features, got {', '.join(kinds)}; give one of them")

    def inner_folds(train: np.ndarray) -> list[Fold]:
        if validation is not None:
            return [(train, validation)]
        of_train = None if patients is None else [patients[i] for i in train]
        inner = make_folds(labels[train], of_train, n_validation_folds, seed)
        return [(train[fitted], train[validated]) for fitted, validated in inner]

    def fit_sgd(train: np.ndarray) -> tuple[str, LinearProbe, dict[str, Any]]:
        fit = partial(fit_sgd_probes, n_classes=n_classes, n_iterations=sgd_iterations, seed=seed, device=device)
        kind, rate, accuracy = choose_sgd_probe(kinds, labels, inner_folds(train)[0], fit)
        (probe,) = fit({kind: kinds[kind][train]}, labels[train], learning_rates=(rate,)).values()
        return kind, probe, {"features": kind, "learning_rate": rate, "validation_accuracy": accuracy}

    def fit_logistic(train: np.ndarray) -> tuple[str, LinearProbe, dict[str, Any]]:
        ((kind, of_cells),) = kinds.items()
        lam, tried = dinobloom_lambda(of_cells.shape[1], n_classes), {}
        if protocol == "sweep":
            folds = inner_folds(train)
            lam, losses = choose_lambda(of_cells, labels, n_classes, folds, device=device, backend=backend)
            tried = {"validation_log_loss": {f"{lam:.4g}": loss for lam, loss in losses.items()}}
        probe = fit_linear_probe(of_cells[train], labels[train], n_classes, lam, device=device, backend=backend)
        return kind, probe, {"lambda": lam, "iterations": probe.n_iterations, "converged": probe.has_converged, **tried}

    predictions = np.full(len(labels), -1, dtype=np.int64)
    probabilities = np.full((len(labels), n_classes), np.nan)
    settings = []
    for train, test in folds:
        kind, probe, chosen = fit_sgd(train) if protocol == "sgd" else fit_logistic(train)
        probabilities[test] = probe.predict_proba(kinds[kind][test])
        predictions[test] = probabilities[test].argmax(axis=1)
        settings.append(chosen)
    return FoldPredictions(list(folds), predictions, probabilities, settings)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Classify cells by a linear probe of their features; print a table and write results.json, "
        "predictions.csv, split.csv, confusion.png, curves.png to <output-dir>. Give --checkpoint or --encoder with "
        "--train and --test or with --data, or else --features, with or without --test-features.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--protocol",
        choices=get_args(Protocol),
        default="dinobloom",
        help="dinobloom: logistic regression, lambda = 100 / (feature size x classes); sweep: the same, lambda chosen "
        "on validation folds; sgd: DINOv2's, learning rate and kind of features chosen on a validation fold",
    )
    parser.add_argument("--validation-folds", type=positive_int, default=N_FOLDS, help="of sweep and sgd, in training")
    parser.add_argument("--sgd-iterations", type=positive_int, default=SGD_ITERATIONS, help="batches of 128 cells")
    parser.add_argument(
        "--backend",
        choices=get_args(Backend),
        default="torch",
        help="of logistic regression; torch: the optimum, on --device; sklearn: what its defaults stop at, on the CPU",
    )
    add_judging_arguments(parser)
    args = parser.parse_args(argv)
    complete_arguments(parser, args, SGD_KINDS if args.protocol == "sgd" else (DEFAULT_KIND,))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    setup_logging()
    report = judge(args, load_judged_set(args, with_all_kinds=args.protocol == "sgd"))
    print(format_report(report, _style(args)))


def judge(args: argparse.Namespace, judged: JudgedSet) -> dict[str, Any]:
    """Judge cells as `args` of `parse_arguments` say, and write the results; returns the content of results.json."""
    row, n_classes = f"linear_{args.protocol}", len(judged.cells.class_names)
    fit = {"device": device_of(args), "backend": args.backend}
    predicted = {
        name: {
            row: evaluate_linear(
                of_kinds,
                judged.cells.labels,
                n_classes,
                judged.folds,
                patients=judged.cells.patients,
                validation=judged.split.validation,
                protocol=args.protocol,
                n_validation_folds=args.validation_folds,
                sgd_iterations=args.sgd_iterations,
                seed=args.seed,
                **fit,
            )
        }
        for name, of_kinds in judged.sources.items()
    }

    def predict(train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray) -> np.ndarray:
        probe = fit_linear_probe(train_features, train_labels, n_classes, **fit)
        return probe.predict_proba(test_features).argmax(axis=1)

    few_shot = few_shot_rows(args, judged, {"linear_dinobloom": FewShotMethod(predict)})
    return write_results(args, judged, predicted, few_shot, _style(args))


def _style(args: argparse.Namespace) -> ReportStyle:
    return ReportStyle("linear", "protocol", f"linear probe ({args.protocol})")


if __name__ == "__main__":
    sys.exit(exit_code(main))

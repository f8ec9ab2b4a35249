"""Linear probes of frozen features.

Protocol `dinobloom`: multinomial logistic regression, features as they are, lambda = 100 / (D C); nothing is tuned.
Published numbers are from scikit-learn's defaults, which stop before the optimum; `--backend sklearn` does the same.
Protocol `sweep`: the same with the lambda of `LAMBDAS` that has the lowest log loss over validation folds.
Protocol `sgd`: DINOv2's. Softmax layers for many learning rates and kinds of features (`solvers/linear_probes.py`); the
one with the highest accuracy on the first validation fold is trained again on the whole training side.

Validation folds are stratified folds of the training side that keep patients whole: test cells choose nothing. With a
few cells per class (--few-shot) the protocol is always `dinobloom`.

Dimension key:  N cells, D features per cell, C classes
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import torch

from dinov2.data.splits import Fold, make_folds
from dinov2.eval.features import DEFAULT_KIND
from dinov2.eval.metrics import log_losses
from dinov2.eval.protocol import N_FOLDS, EvaluationData, Predictions, Protocol, runner
from dinov2.eval.results import FoldPredictions
from dinov2.eval.solvers.linear_probes import (
    SGD_ITERATIONS,
    Backend,
    LinearProbe,
    choose_sgd_probe,
    fit_logistic,
    fit_sgd_probes,
)
from dinov2.utils.command import exit_code, positive_int

logger = logging.getLogger("dinov2")

ProtocolName = Literal["dinobloom", "sweep", "sgd"]
LAMBDAS = tuple(10.0**exponent for exponent in range(4, -4, -1))
SGD_KINDS = ("cls", "cls+mean", "last4", "last4+mean")  # those that DINOv2's probes choose among


@dataclass(frozen=True)
class LinearOptions:
    protocol: ProtocolName = "dinobloom"
    validation_folds: int = N_FOLDS  # of each training side; `sgd` uses the first
    sgd_iterations: int = SGD_ITERATIONS
    backend: Backend = "torch"  # of logistic regression


def evaluate(data: EvaluationData, options: LinearOptions) -> Predictions:
    """Classify the test cells of each fold by a probe of its training cells; one row, linear_<protocol>.

    The settings of each fold have what was chosen: lambda, or the kind of features and the learning rate.
    """
    fit = {"dinobloom": _fit_logistic, "sweep": _fit_logistic, "sgd": _fit_sgd}[options.protocol]
    predictions = np.full(len(data.labels), -1, dtype=np.int64)
    probabilities = np.full((len(data.labels), len(data.class_names)), np.nan)
    settings = []
    for train, test in data.folds:
        kind, probe, chosen = fit(data, train, options)
        probabilities[test] = probe.predict_proba(data.features[kind][test])
        predictions[test] = probabilities[test].argmax(axis=1)
        settings.append(chosen)
    return {f"linear_{options.protocol}": FoldPredictions(list(data.folds), predictions, probabilities, settings)}


def dinobloom_lambda(n_features: int, n_classes: int) -> float:
    """Return 100 / (D C)."""
    return 100 / (n_features * n_classes)


def fit_linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    lam: float | None = None,
    device: str | torch.device = "cpu",
    backend: Backend = "torch",
) -> LinearProbe:
    """Fit logistic regression to features [N, D] as `fit_logistic`; `lam` None: `dinobloom_lambda`."""
    lams = (dinobloom_lambda(features.shape[1], n_classes) if lam is None else lam,)
    return fit_logistic(features, labels, n_classes, lams, device, backend)[0]


def choose_lambda(
    features: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    folds: Sequence[Fold],
    device: str | torch.device = "cpu",
    backend: Backend = "torch",
) -> tuple[float, dict[float, float]]:
    """Return the penalty of `LAMBDAS` with the lowest log loss on validation folds, and the loss of each.

    `folds` are training and validation positions in features [N, D] and labels int64 [N].
    """
    losses = np.zeros(len(LAMBDAS))
    for train, validation in folds:
        for i, probe in enumerate(fit_logistic(features[train], labels[train], n_classes, LAMBDAS, device, backend)):
            losses[i] += log_losses(labels[validation], probe.predict_proba(features[validation])).sum()
    losses /= sum(len(validation) for _, validation in folds)
    best = int(losses.argmin())
    if best in (0, len(LAMBDAS) - 1):
        logger.warning("lambda %.3g is the best and at the end of those tried; others may do better", LAMBDAS[best])
    return LAMBDAS[best], dict(zip(LAMBDAS, losses.tolist(), strict=True))


Fit = tuple[str, LinearProbe, dict[str, Any]]  # kind of features, probe of them, chosen settings


def _fit_logistic(data: EvaluationData, train: np.ndarray, options: LinearOptions) -> Fit:
    kind, features = next(iter(data.features.items()))
    n_classes, chosen = len(data.class_names), {}
    lam = dinobloom_lambda(features.shape[1], n_classes)
    if options.protocol == "sweep":
        folds = _validation_folds(data, train, options)
        lam, losses = choose_lambda(features, data.labels, n_classes, folds, data.device, options.backend)
        chosen = {"validation_log_loss": {f"{tried:.4g}": loss for tried, loss in losses.items()}}
    probe = fit_linear_probe(features[train], data.labels[train], n_classes, lam, data.device, options.backend)
    return kind, probe, {"lambda": lam, "iterations": probe.n_iterations, "converged": probe.has_converged, **chosen}


def _fit_sgd(data: EvaluationData, train: np.ndarray, options: LinearOptions) -> Fit:
    n_classes, n_batches = len(data.class_names), options.sgd_iterations
    fit = partial(fit_sgd_probes, n_classes=n_classes, n_iterations=n_batches, seed=data.seed, device=data.device)
    fold = _validation_folds(data, train, options)[0]
    kind, rate, accuracy = choose_sgd_probe(data.features, data.labels, fold, fit)
    (probe,) = fit({kind: data.features[kind][train]}, data.labels[train], learning_rates=(rate,)).values()
    return kind, probe, {"features": kind, "learning_rate": rate, "validation_accuracy": accuracy}


def _validation_folds(data: EvaluationData, train: np.ndarray, options: LinearOptions) -> list[Fold]:
    """Return folds to choose hyperparameters by: those of the given validation cells, or of the training side."""
    if data.validation is not None:
        return [(train, data.validation)]
    patients = None if data.patients is None else [data.patients[i] for i in train]
    folds = make_folds(data.labels[train], patients, options.validation_folds, data.seed)
    return [(train[inner_train], train[validation]) for inner_train, validation in folds]


# --- the command -----------------------------------------------------------------------------------------------------


def protocol(options: LinearOptions) -> Protocol:
    """Return the protocol with its options, for `runner.run` and the list in `evaluate.py`."""
    return Protocol(
        name="linear",
        title=f"linear probe ({options.protocol})",
        setting="protocol",
        evaluate=evaluate,
        options=options,
        few_shot_options=lambda n_train: LinearOptions("dinobloom", backend=options.backend),
        kinds=SGD_KINDS if options.protocol == "sgd" else (DEFAULT_KIND,),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, LinearOptions()
    protocols = (
        "dinobloom: logistic regression, lambda = 100 / (feature size x classes); sweep: the same, lambda chosen on "
        "validation folds; sgd: DINOv2's, learning rate and kind of features chosen on a validation fold"
    )
    backends = "of logistic regression; torch: the optimum, on --device; sklearn: what its defaults stop at, on the CPU"
    add("--protocol", choices=get_args(ProtocolName), default=default.protocol, help=protocols)
    add("--validation-folds", type=positive_int, default=default.validation_folds, help="of sweep and sgd, in training")
    add("--sgd-iterations", type=positive_int, default=default.sgd_iterations, help="batches of 128 cells")
    add("--backend", choices=get_args(Backend), default=default.backend, help=backends)


COMMAND = (
    "Classify cells by a linear probe of their features; print a table and write results.json, predictions.csv, "
    "split.csv, confusion.png, curves.png to <output-dir>.",
    lambda args: protocol(LinearOptions(args.protocol, args.validation_folds, args.sgd_iterations, args.backend)),
    add_arguments,
)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return runner.parse_arguments(*COMMAND, argv)


def main(argv: Sequence[str] | None = None) -> None:
    runner.run_command(*COMMAND, argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))

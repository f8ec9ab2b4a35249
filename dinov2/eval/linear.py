"""Linear probes of frozen features: DinoBloom's logistic regression, one with a chosen penalty, DINOv2's SGD sweep.

Protocol `dinobloom`: multinomial logistic regression, features as they are, lambda = 100 / (D C). Nothing is tuned, and
the optimum is computed (`solvers/logistic.py`). Published numbers are from scikit-learn's L-BFGS with its defaults,
which stops at a mean gradient of 1e-4, on unscaled features often far from the optimum; `--backend sklearn` does the
same.

Protocol `sweep`: the lambda of `LAMBDAS` with the lowest log loss over validation folds of the training side, which are
stratified and keep patients whole; then a fit with it on the whole training side.

Protocol `sgd`: DINOv2's. A softmax layer for each learning rate and each kind of features (CLS tokens of the last block
and of the last four, with and without the mean of the patch tokens, or the kinds of a features file), all trained on
the same batches (`solvers/sgd_probes.py`). The one with the highest accuracy on the first validation fold of the
training side (then the lowest log loss) is trained again on the whole training side.

Test cells choose nothing. With a few cells per class (--few-shot) the protocol is always `dinobloom`, on the first kind
of features. Split, metrics and intervals: `protocol.py`, `runner.py`.

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
from dinov2.eval.extract_features import positive_int
from dinov2.eval.features import DEFAULT_KIND
from dinov2.eval.metrics import log_losses
from dinov2.eval.protocol import N_FOLDS, EvaluationData, Predictions, Protocol
from dinov2.eval.results import FoldPredictions
from dinov2.eval.runner import run_command
from dinov2.eval.solvers.logistic import Backend, LinearProbe, fit_logistic
from dinov2.eval.solvers.sgd_probes import SGD_ITERATIONS, choose_sgd_probe, fit_sgd_probes
from dinov2.utils.command import exit_code

logger = logging.getLogger("dinov2")

ProtocolName = Literal["dinobloom", "sweep", "sgd"]
LAMBDAS = tuple(10.0**exponent for exponent in range(4, -4, -1))
SGD_KINDS = ("cls", "cls+mean", "last4", "last4+mean")  # those that DINOv2's probes choose among


@dataclass(frozen=True)
class LinearOptions:
    """Options of the protocol.

    Attributes:
        protocol: `dinobloom`, `sweep` or `sgd`.
        validation_folds: of each training side; `sgd` uses the first.
        sgd_iterations: batches of `sgd`.
        backend: of logistic regression, as in `fit_logistic`.

    Raises:
        ValueError: for an unknown protocol.
    """

    protocol: ProtocolName = "dinobloom"
    validation_folds: int = N_FOLDS
    sgd_iterations: int = SGD_ITERATIONS
    backend: Backend = "torch"

    def __post_init__(self) -> None:
        if self.protocol not in get_args(ProtocolName):
            known = ", ".join(get_args(ProtocolName))
            raise ValueError(f"protocol: {self.protocol!r} is unknown; choose one of {known}")


def evaluate(data: EvaluationData, options: LinearOptions) -> Predictions:
    """Classify the test cells of each fold by a probe of its training cells; one row, linear_<protocol>.

    The settings of each fold have what was chosen: lambda, or the kind of features and the learning rate.

    Raises:
        ValueError: for cells that no probe can be fitted to (`check_cells`).
    """
    fit = _fit_sgd if options.protocol == "sgd" else _fit_logistic
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
    """Fit logistic regression to features [N, D]; arguments as in `fit_logistic`, `lam` None: `dinobloom_lambda`."""
    lam = dinobloom_lambda(features.shape[1], n_classes) if lam is None else lam
    return fit_logistic(features, labels, n_classes, (lam,), device, backend)[0]


def choose_lambda(
    features: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    folds: Sequence[Fold],
    device: str | torch.device = "cpu",
    backend: Backend = "torch",
) -> tuple[float, dict[float, float]]:
    """Return the penalty of `LAMBDAS` with the lowest log loss on validation folds, and the loss of each.

    Args:
        features: [N, D].
        labels: int64 [N].
        n_classes: C.
        folds: training and validation positions each; other cells are not used.
        device, backend: as in `fit_logistic`.

    Raises:
        ValueError: as `fit_logistic`.
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
    fit = partial(
        fit_sgd_probes,
        n_classes=len(data.class_names),
        n_iterations=options.sgd_iterations,
        seed=data.seed,
        device=data.device,
    )
    fold = _validation_folds(data, train, options)[0]
    kind, rate, accuracy = choose_sgd_probe(data.features, data.labels, fold, fit)
    (probe,) = fit({kind: data.features[kind][train]}, data.labels[train], learning_rates=(rate,)).values()
    return kind, probe, {"features": kind, "learning_rate": rate, "validation_accuracy": accuracy}


def _validation_folds(data: EvaluationData, train: np.ndarray, options: LinearOptions) -> list[Fold]:
    """Return folds to choose hyperparameters by: the given validation cells, or folds of the training side."""
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
    parser.add_argument(
        "--protocol",
        choices=get_args(ProtocolName),
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


def main(argv: Sequence[str] | None = None) -> None:
    run_command(
        "Classify cells by a linear probe of their features; print a table and write results.json, predictions.csv, "
        "split.csv, confusion.png, curves.png to <output-dir>.",
        lambda args: protocol(LinearOptions(args.protocol, args.validation_folds, args.sgd_iterations, args.backend)),
        add_arguments,
        argv,
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))

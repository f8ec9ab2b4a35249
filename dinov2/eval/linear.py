"""Linear probes of frozen features: DinoBloom's logistic regression, one with a chosen penalty, DINOv2's SGD sweep.

Protocol `dinobloom`: multinomial logistic regression (`linear_solver`), features as they are, lambda = 100 / (M C)
for M numbers a cell and C classes. Nothing is tuned. The optimum is computed. scikit-learn's L-BFGS with its defaults,
from which published numbers are, stops at a mean gradient of 1e-4, on unscaled features often far from the optimum;
`--backend sklearn` does just that.

Protocol `sweep`: the lambda of `LAMBDAS` with the least log loss over validation folds of the training side alone,
which are stratified and keep patients whole; then a fit with it on all of the training side.

Protocol `sgd`: DINOv2's. A softmax layer for each learning rate and each kind of features (`linear_sgd`: CLS tokens of
the last layers, with and without the mean of the patch tokens; a features file holds one kind), all trained on the same
batches by SGD with momentum 0.9, cosine schedule and no weight decay. The one with the highest accuracy on the first
validation fold of the training side (then the least log loss) is trained again on all of the training side.

Split. `--folds` stratified folds of one set, by whole patients where the set names them; or a split file; or two sets.
Test cells choose nothing. Training pictures whose bytes a test picture has are dropped and counted. A split file with a
patient on two sides, or with a class that is tested and not learned, is an error; folds made here that cannot avoid the
latter (a class of one patient) are reported. Metrics are those of all test cells together, with bootstrap intervals (by
patient where known), and of each fold, with mean and spread.

Dimension key:  N cells, D or M numbers a cell, C classes
"""

import argparse
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from dinov2.data.splits import (
    Fold,
    Split,
    check_no_patient_on_two_sides,
    describe_folds,
    log_fold_problems,
    make_folds,
    read_split,
    write_split,
)
from dinov2.eval.cell_sets import (
    add_baseline_argument,
    add_source_arguments,
    baseline_features,
    input_hashes,
    join,
    load_sets,
    without_copies,
    wrong_combination,
)
from dinov2.eval.extract_features import add_embedder_arguments, device_of, embedder_from, positive_int
from dinov2.eval.features import Features
from dinov2.eval.few_shot import evaluate_few_shot
from dinov2.eval.linear_sgd import SGD_ITERATIONS, choose_sgd_probe, fit_sgd_probes
from dinov2.eval.linear_solver import LinearProbe, LogisticProblem, check_cells
from dinov2.eval.metrics import log_losses
from dinov2.eval.results import (
    FoldPredictions,
    class_table,
    draw_confusion,
    metrics_table,
    provenance,
    scores_table,
    settings_of,
    summarize,
    write_predictions,
    write_report,
)
from dinov2.hub.backbones import file_sha256
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code

logger = logging.getLogger("dinov2")

Protocol = Literal["dinobloom", "sweep", "sgd"]
Backend = Literal["torch", "sklearn"]
MAX_ITER = 1000  # of scikit-learn's solver
LAMBDAS = tuple(10.0**exponent for exponent in range(4, -4, -1))
N_FOLDS = 5


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
        "predictions.csv, split.csv, confusion.png to <output-dir>. Give --checkpoint with --train and --test or with "
        "--data, or else --features, with or without --test-features.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_embedder_arguments(parser, checkpoint_required=False)
    add_source_arguments(parser)
    parser.add_argument(
        "--protocol",
        choices=get_args(Protocol),
        default="dinobloom",
        help="dinobloom: logistic regression, lambda = 100 / (feature size x classes); sweep: the same, lambda chosen "
        "on validation folds; sgd: DINOv2's, learning rate chosen on a validation fold",
    )
    parser.add_argument("--folds", type=positive_int, default=N_FOLDS, help="of --data or of --features alone")
    parser.add_argument(
        "--split", type=Path, help="CSV instead of --folds: path,fold (tested in), or path,part (train, val, test)"
    )
    parser.add_argument("--validation-folds", type=positive_int, default=N_FOLDS, help="of sweep and sgd, in training")
    parser.add_argument("--sgd-iterations", type=positive_int, default=SGD_ITERATIONS, help="batches of 128 cells")
    parser.add_argument(
        "--few-shot", type=positive_int, nargs="+", default=[], help="learn from this many cells a class too"
    )
    parser.add_argument("--repeats", type=positive_int, default=10, help="draws for each of --few-shot")
    parser.add_argument("--seed", type=int, default=0, help="of folds, draws, intervals, sgd and the untrained network")
    parser.add_argument(
        "--backend",
        choices=get_args(Backend),
        default="torch",
        help="of logistic regression; torch: the optimum, on --device; sklearn: what its defaults stop at, on the CPU",
    )
    add_baseline_argument(parser)
    parser.add_argument("--output-dir", type=Path, required=True, help="for results and features; made if missing")
    args = parser.parse_args(argv)
    if problem := wrong_combination(args):
        parser.error(problem)
    if args.split and (args.test or args.test_features):
        parser.error("--split divides one set; give it with --data or with --features alone")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    setup_logging()

    embedder = embedder_from(args) if args.checkpoint else None
    cells, split = _cells_and_split(args, *load_sets(args, embedder))
    folds, copies = without_copies(cells.paths, split.folds)
    description = _described(cells, folds, is_given=bool(args.split or args.test or args.test_features))
    sources = {"model": cells.features}
    for name in args.baseline:
        sources[name] = baseline_features(name, cells.paths, embedder, args.seed)
    predicted = {
        name: _evaluate(args, features, cells, replace(split, folds=folds)) for name, features in sources.items()
    }
    report: dict[str, Any] = {
        "protocol": "linear",
        "results": {
            name: {
                f"linear_{args.protocol}": summarize(cells.labels, found, cells.class_names, cells.patients, args.seed)
            }
            for name, found in predicted.items()
        },
        "few_shot": {name: _few_shot(args, features, cells, folds) for name, features in sources.items()},
        "class_names": cells.class_names,
        "counts": {
            "cells": len(cells),
            "tested": len(predicted["model"].tested),
            "train_per_class": _mean_per_class(cells, [train for train, _ in folds]),
            "unreadable": len(cells.unreadable),
            **copies,
        },
        "split": description,
        "patients_kept_apart": _patients_kept_apart(cells, folds),
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_split(args.output_dir / "split.csv", cells.paths, split)
    files = {}
    for name, found in predicted.items():
        file = args.output_dir / ("predictions.csv" if name == "model" else f"predictions_{name}.csv")
        write_predictions(file, cells.paths, cells.labels, found, cells.class_names, cells.patients)
        files[file.name] = file_sha256(file)
    confusion = report["results"]["model"][f"linear_{args.protocol}"]["confusion"]
    draw_confusion(args.output_dir / "confusion.png", confusion, cells.class_names, f"linear probe ({args.protocol})")
    report |= {"files": files, **provenance(cells.attributes, settings_of(args), input_hashes(args))}
    write_report(args.output_dir, report)
    print(format_report(report))


def format_report(report: dict[str, Any]) -> str:
    """results.json as tables: all rows, the classes of the model's row, and the few-shot rows if there are any."""
    results, counts = report["results"], report["counts"]
    key = next(iter(results["model"]))
    protocol = key.removeprefix("linear_")
    model = results["model"][key]
    unit = "cells" if report["patients_kept_apart"] is None else "patients"
    lines = [
        f"linear probe, {counts['tested']} of {counts['cells']} cells tested, {len(model['folds'])} fold(s), "
        f"{len(report['class_names'])} classes (in percent; 95 % intervals over {unit})",
        "",
        *metrics_table([(name, protocol, row[key]) for name, row in results.items()], "protocol"),
        "",
        *scores_table([(name, row[key]) for name, row in results.items()]),
        "",
        *class_table("model", model, counts["train_per_class"]),
    ]
    for name, by_number in report["few_shot"].items():
        for number, row in by_number.items():
            accuracy = row["balanced_accuracy"]
            spread = "" if accuracy["sd"] is None else f" +- {100 * accuracy['sd']:.1f}"
            mean, n_draws = f"{100 * accuracy['mean']:.1f}{spread}", row["n_draws"]
            lines.append(f"{name}, {number} cells a class: balanced accuracy {mean} ({n_draws} draws)")
    return "\n".join(lines)


def _cells_and_split(args: argparse.Namespace, first: Features, second: Features | None) -> tuple[Features, Split]:
    """All cells as one set, and who is tested when.

    Raises:
        ValueError: if a picture stands twice, all cells are of one class, or a split file puts a patient on two sides.
    """
    cells = first if second is None else join(first, second)
    if len(set(cells.paths)) < len(cells):
        twice = next(path for path, n in Counter(cells.paths).items() if n > 1)
        raise ValueError(f"cells: the picture {twice!r} is listed twice; list each once, on one side")
    if len(set(cells.labels.tolist())) < 2:
        raise ValueError(
            f"labels: all {len(cells)} cells are of class {cells.class_names[cells.labels[0]]!r}; a probe needs two "
            f"classes or more"
        )
    if second is None and not args.split:
        split = Split(make_folds(cells.labels, cells.patients, args.folds, args.seed))
    elif second is None:
        split = read_split(args.split, cells.paths)
        if cells.patients is not None:
            for fold in split.folds:
                check_no_patient_on_two_sides(
                    cells.patients, *fold, *(() if split.validation is None else (split.validation,))
                )
    else:
        split = Split([(np.arange(len(first)), np.arange(len(first), len(cells)))])
    return cells, split


def _described(cells: Features, folds: Sequence[Fold], is_given: bool) -> dict[str, Any]:
    """`describe_folds`, with what they lack in the log.

    Raises:
        ValueError: if folds that were given, not made here, test a class that they do not learn.
    """
    found = describe_folds(cells.labels, folds, cells.class_names)
    if is_given and found["not_learned_in"]:
        name, numbers = next(iter(found["not_learned_in"].items()))
        raise ValueError(
            f"split: {len(found['not_learned_in'])} classes are tested without a training cell, for instance {name!r} "
            f"in fold {numbers[0]}; give each such class training cells, or leave its cells out"
        )
    log_fold_problems(found)
    return found


def _evaluate(args: argparse.Namespace, features: np.ndarray, cells: Features, split: Split) -> FoldPredictions:
    return evaluate_linear(
        features,
        cells.labels,
        len(cells.class_names),
        split.folds,
        patients=cells.patients,
        validation=split.validation,
        protocol=args.protocol,
        n_validation_folds=args.validation_folds,
        sgd_iterations=args.sgd_iterations,
        seed=args.seed,
        device=device_of(args),
        backend=args.backend,
    )


def _few_shot(args: argparse.Namespace, features: np.ndarray, cells: Features, folds: Sequence[Fold]) -> dict[str, Any]:
    def predict(train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray) -> np.ndarray:
        n_classes = len(cells.class_names)
        probe = fit_linear_probe(train_features, train_labels, n_classes, device=device_of(args), backend=args.backend)
        return probe.predict_proba(test_features).argmax(axis=1)

    numbers = sorted(set(args.few_shot))
    return evaluate_few_shot(
        features, cells.labels, cells.class_names, folds, predict, numbers, args.repeats, args.seed
    )


def _mean_per_class(cells: Features, sides: Sequence[np.ndarray]) -> dict[str, int]:
    """Number of cells of each class on a side, rounded down, in the mean over folds."""
    counts = np.mean([np.bincount(cells.labels[side], minlength=len(cells.class_names)) for side in sides], axis=0)
    return {name: int(count) for name, count in zip(cells.class_names, counts, strict=True)}


def _patients_kept_apart(cells: Features, folds: Sequence[Fold]) -> bool | None:
    """Whether no patient is on two sides; None where patients are unknown."""
    if cells.patients is None:
        return None
    of_cells = np.asarray(cells.patients)
    shared = [np.intersect1d(of_cells[train], of_cells[test]) for train, test in folds]
    if n_shared := len(np.unique(np.concatenate(shared))):
        logger.warning("%d patients have cells in both train and test", n_shared)
    return not n_shared


if __name__ == "__main__":
    sys.exit(exit_code(main))

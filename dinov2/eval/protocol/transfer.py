"""Protocol `transfer` of cross.py: train a probe in one hospital and test it in others, as it is and corrected.

Each of five splits draws a stratified 70 % of the source set for training (whole patients, where they are known). The
probe is logistic regression with lambda = 1 (scikit-learn's C = 1 / lambda), at the optimum, on features standardised
with the mean and deviation of the training cells. It is tested on the other 30 % and on all cells of each other set;
only classes that both sets have count. Nothing is tuned. Numbers are means over the five splits; intervals draw cells
(or patients) of the tested set, the same for all splits. A training image with the bytes of a tested one is dropped.
This is the protocol of arXiv 2608.25148, except for patients and copies.

Corrections (`metrics.corrections`) are applied to other sets only, since the source needs none:

    source-temperature      fitted on the 30 % of the source
    target-temperature      fitted on K labelled cells of the target, drawn ten times; they are not tested
    cbr                     target standardised by class-balanced statistics of its predicted classes
    cbr-matched             the same, then moved and scaled to the class-balanced statistics of the source's training
                            cells; without a shift it changes (almost) nothing
    target-standardisation  target standardised by its own mean and deviation; a control

Letters: N cells, D feature dim, C classes, K labelled target cells, E encoders, T targets
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import scipy.special
from sklearn.model_selection import train_test_split

from dinov2.data.splits import Fold, stratified_parts, without_copies
from dinov2.eval.features.data_sets import CrossData
from dinov2.eval.metrics import classification_metrics, log_losses
from dinov2.eval.metrics.classification import expected_calibration_error, metrics_of_confusion, reliability
from dinov2.eval.metrics.corrections import (
    CBR_MIN_CELLS,
    class_balanced_statistics,
    fit_temperature,
    standardise,
    statistics,
)
from dinov2.eval.metrics.intervals import WeightedMetrics, intervals_of
from dinov2.eval.metrics.summaries import SCORES, TABLE_METRICS
from dinov2.eval.solvers.linear_probes import LinearProbe, fit_logistic
from dinov2.utils.numerics import derive_seed

logger = logging.getLogger("dinov2")

Correction = Literal["source-temperature", "target-temperature", "cbr", "cbr-matched", "target-standardisation"]

CORRECTIONS = get_args(Correction)
LAMBDA = 1.0  # scikit-learn's C = 1
HELD_OUT = 0.3
N_PATIENT_PARTS = 10  # three of them are held out
N_LABELLED = (8, 16, 32, 64, 128)  # K
N_DRAWS = 10  # of K cells
STRESS_LABELLED = 32  # K in the stress test
STRESS_CELLS = 2000  # at most, of a resampled target
METRICS = (*TABLE_METRICS, *SCORES)
STRESS_METRICS = {"macro_f1": 1, "calibration_error": -1, "log_loss": -1}  # 1: higher is better; -1: lower is
# shares of the white cells in healthy blood, rounded
CLINICAL = {"neutrophil": 0.6, "lymphocyte": 0.3, "monocyte": 0.06, "eosinophil": 0.03, "basophil": 0.01}
HEAVY_SHARE = 0.8


@dataclass(frozen=True)
class TransferOptions:
    """Settings of the protocol; the seed is that of splits, draws and intervals."""

    corrections: tuple[Correction, ...] = ()
    n_splits: int = 5
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class SourceModel:
    """A probe of one split of a source, with the statistics that it standardises by."""

    n_train: int
    mean: np.ndarray  # [D], of training cells
    deviation: np.ndarray  # [D]
    balanced: tuple[np.ndarray, np.ndarray]  # class-balanced mean and deviation [D] of standardised training cells
    probe: LinearProbe
    held_out: np.ndarray  # positions of the source's cells that are not trained on
    held_out_features: np.ndarray
    held_out_labels: np.ndarray

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Return logits [N, C] for features [N, D]."""
        return self.probe.logits(standardise(features, self.mean, self.deviation))

    @cached_property
    def temperature(self) -> float:
        """Temperature fitted on the held-out cells of the source."""
        return fit_temperature(self.logits(self.held_out_features), self.held_out_labels)

    def corrected(self, correction: str, features: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Return logits [N, C] with a correction that needs no labels; `logits` are those without one."""
        if correction == "source-temperature":
            return logits / self.temperature
        if correction == "target-standardisation":
            return self.probe.logits(standardise(features, *statistics(features)))
        balanced = standardise(features, *class_balanced_statistics(features, logits.argmax(axis=1)))
        if correction == "cbr-matched":
            mean, deviation = self.balanced
            balanced = balanced * deviation + mean
        return self.probe.logits(balanced)


# --- splits and probes ----------------------------------------------------------------------------------------------


def draw_splits(labels: np.ndarray, patients: Sequence[str], n_splits: int, seed: int) -> list[Fold]:
    """Draw stratified splits with 30 % held out, by whole patients if some have several of the N cells.

    Split k has the seed `seed` + k. The only cell of a class is trained on. With fewer than ten patients the number of
    those held out is rounded, one at least.

    Raises:
        ValueError: the cells are of one patient, or too few to hold out one of each class.
    """
    candidates = np.flatnonzero(np.bincount(labels)[labels] > 1)
    n_classes, n_patients = len(np.unique(labels[candidates])), len(set(patients))
    splits = []
    for number in range(n_splits):
        split_seed = (seed + number) % 2**32
        if n_patients == len(labels):
            if HELD_OUT * len(candidates) < max(n_classes, 1):
                raise ValueError(f"{len(labels)} cells, too few to hold out 30 % with a cell of each class")
            strata = labels[candidates]
            test = train_test_split(candidates, test_size=HELD_OUT, stratify=strata, random_state=split_seed)[1]
        elif n_patients < 2:
            raise ValueError(f"all {len(labels)} cells are of one patient, of whom no part can be held out")
        else:
            n_parts = min(N_PATIENT_PARTS, n_patients)
            parts = stratified_parts(labels, patients, n_parts, split_seed)
            test = np.concatenate(parts[: max(1, round(HELD_OUT * n_parts))])
        splits.append((np.setdiff1d(np.arange(len(labels)), test), np.sort(test)))
    return splits


def source_splits(
    data: CrossData, paths: Sequence[str], options: TransferOptions
) -> tuple[dict[str, list[Fold]], dict[str, str], dict[str, int]]:
    """Draw the splits of each set, positions in all N cells, and drop copies of tested images from training.

    Returns:
        {set: its splits}, {set: why it has none}, and the counts of `without_copies`.
    """
    drawn: dict[str, list[Fold]] = {}
    reasons: dict[str, str] = {}
    for name in data.names:
        cells = data.positions(name)
        try:
            own = draw_splits(data.labels[cells], [data.patients[i] for i in cells], options.n_splits, options.seed)
            drawn[name] = [(cells[train], cells[test]) for train, test in own]
        except ValueError as error:  # it can still be tested
            reasons[name] = f"{name}: {error}"
    everything = np.arange(len(data.labels))
    # a cell of the source is either trained on or held out, and all cells of the others are tested
    folds = [(train, np.setdiff1d(everything, train)) for splits in drawn.values() for train, _ in splits]
    kept, counts = without_copies(paths, folds)
    remaining = iter(kept)
    without = {name: [(next(remaining)[0], held_out) for _, held_out in splits] for name, splits in drawn.items()}
    return without, reasons, counts


def fit_source(data: CrossData, splits: Sequence[Fold], classes: np.ndarray, device: str) -> list[SourceModel]:
    """Fit a probe for each split, to the cells of these `classes` (positions in `class_names`, ascending).

    Raises:
        ValueError: a split trains on one class only, or holds out no cell; with few patients it happens.
    """
    models = []
    for number, (train, held_out) in enumerate(splits):
        train, held_out = (cells[np.isin(data.labels[cells], classes)] for cells in (train, held_out))
        if len(np.unique(data.labels[train])) < 2 or not len(held_out):
            raise ValueError(f"split {number} trains on one class only, or holds out no cell; it has few patients")
        labels, features = np.searchsorted(classes, data.labels[train]), data.features[train]
        mean, deviation = statistics(features)
        standardised = standardise(features, mean, deviation)
        (probe,) = fit_logistic(standardised, labels, len(classes), [LAMBDA], device)
        balanced = class_balanced_statistics(standardised, labels)
        tested = data.features[held_out], np.searchsorted(classes, data.labels[held_out])
        models.append(SourceModel(len(train), mean, deviation, balanced, probe, held_out, *tested))
    return models


# --- the matrix -----------------------------------------------------------------------------------------------------


def evaluate(
    data: CrossData, splits: Mapping[str, Sequence[Fold]], reasons: Mapping[str, str], options: TransferOptions
) -> dict[str, Any]:
    """Evaluate each ordered pair of sets; `splits` and `reasons` are those of `source_splits`.

    Returns:
        `matrix` {source: {target: entry}} (entries as of `evaluate_pair`) and, with corrections and two sets or more
        that share classes, `stress_test` (as of `summarise_scenarios`), else None.
    """
    matrix: dict[str, dict[str, Any]] = {name: {} for name in data.names}
    classes = {name: np.unique(data.labels[data.positions(name)]) for name in data.names}
    scenarios = []
    for source in data.names:
        models: dict[tuple[int, ...], list[SourceModel]] = {}  # targets with the same classes share them
        for target in data.names:
            shared, reason = np.intersect1d(classes[source], classes[target]), reasons.get(source, "")
            if not reason and len(shared) < 2:
                common = ", ".join(data.class_names[i] for i in shared) or "none"
                reason = f"classes in both sets: {common}; two or more are needed"
            key = tuple(shared.tolist())
            if not reason and key not in models:
                try:
                    models[key] = fit_source(data, splits[source], shared, options.device)
                except ValueError as error:
                    reason = f"{source}: {error}"
            pair = Pair(data, source, target, shared, [] if reason else models[key])
            matrix[source][target] = evaluate_pair(pair, options, reason)
            if options.corrections and not reason and source != target:
                scenarios += stress_scenarios(pair, options)
            logger.info("%s -> %s is done", source, target)
    return {"matrix": matrix, "stress_test": summarise_scenarios(scenarios) if scenarios else None}


@dataclass(frozen=True, eq=False)
class Pair:
    """A source's models of the classes that it shares with a target, and the target's cells of these classes."""

    data: CrossData
    source: str
    target: str
    classes: np.ndarray  # positions in `data.class_names`
    models: list[SourceModel]  # one for each split

    @cached_property
    def cells(self) -> np.ndarray:
        """Positions of the target's N cells."""
        cells = self.data.positions(self.target)
        return cells[np.isin(self.data.labels[cells], self.classes)]

    @cached_property
    def features(self) -> np.ndarray:
        return self.data.features[self.cells]

    @cached_property
    def labels(self) -> np.ndarray:
        return np.searchsorted(self.classes, self.data.labels[self.cells])

    @cached_property
    def logits(self) -> list[np.ndarray]:
        """Logits [N, C] of each model."""
        return [model.logits(self.features) for model in self.models]

    @property
    def class_names(self) -> list[str]:
        return [self.data.class_names[i] for i in self.classes]


def evaluate_pair(pair: Pair, options: TransferOptions, reason: str = "") -> dict[str, Any]:
    """Evaluate one entry of the matrix; with a `reason` there are no numbers.

    Returns:
        `n_train` (of the first split), `n_test` (cells that some split tests), `classes`, `left_out` ({class: cells of
        the target that are of no shared class}), `METRICS` (means over splits) with `sd_over_splits`, `intervals`,
        `per_class` (means), `reliability` (as of `reliability_of_splits`), `splits` (metrics of each, and the probe's
        iterations), `corrections` ({name: the same metrics}), and `reason`, or None.
    """
    data, everything = pair.data, pair.data.positions(pair.target)
    entry: dict[str, Any] = {
        "n_train": pair.models[0].n_train if pair.models else 0,
        "n_test": 0,
        "classes": pair.class_names,
        "left_out": data.per_class(np.setdiff1d(everything, pair.cells)),
    }
    if reason:
        none: dict[str, Any] = {"sd_over_splits": {}, "intervals": {}, "per_class": {}, "splits": [], "corrections": {}}
        return {**entry, **dict.fromkeys(METRICS), **none, "reliability": None, "reason": reason}
    is_own = pair.source == pair.target
    whole = np.arange(len(pair.cells))
    tested = [np.searchsorted(pair.cells, model.held_out) if is_own else whole for model in pair.models]
    entry["n_test"] = len(np.unique(np.concatenate(tested)))
    entry |= _summary(pair, tested, pair.logits, options.seed)
    for row, model in zip(entry["splits"], pair.models, strict=True):
        row |= {"iterations": model.probe.n_iterations, "converged": model.probe.has_converged}
    corrections: dict[str, Any] = {}
    if not is_own:
        if {"cbr", "cbr-matched"} & set(options.corrections) and len(whole) < CBR_MIN_CELLS:
            text = "--correct cbr: %s has %d cells of shared classes; below %d it is unreliable"
            logger.warning(text, pair.target, len(whole), CBR_MIN_CELLS)
        for name in options.corrections:
            if name == "target-temperature":
                corrections |= _target_temperatures(pair, options.seed)
                continue
            pairs = zip(pair.models, pair.logits, strict=True)
            corrected = [model.corrected(name, pair.features, logits) for model, logits in pairs]
            corrections[name] = _summary(pair, tested, corrected, options.seed)
            del corrections[name]["per_class"]
    return {**entry, "corrections": corrections, "reason": None}


def _summary(pair: Pair, tested: Sequence[np.ndarray], logits: Sequence[np.ndarray], seed: int) -> dict[str, Any]:
    """Return metrics over splits; `tested` are positions in the pair's cells, `logits` [N, C] are of all of them."""
    n_classes, names, rows, classes, parts = len(pair.classes), pair.class_names, [], [], []
    for cells, of_split in zip(tested, logits, strict=True):
        labels, probabilities = pair.labels[cells], scipy.special.softmax(of_split[cells], axis=1)
        predictions = probabilities.argmax(axis=1)
        metrics = classification_metrics(labels, predictions, names, probabilities)
        rows.append({name: metrics[name] for name in METRICS})
        classes.append(pd.DataFrame(metrics["per_class"], dtype=np.float64).T)
        parts.append((cells, WeightedMetrics(labels, predictions, n_classes), log_losses(labels, probabilities)))

    def mean_over_splits(weights: np.ndarray) -> dict[str, float]:
        draws = []
        for cells, metrics_of, losses in parts:
            weight = weights[cells]
            if n := weight.sum():  # a draw may have no patient that this split tests
                # no `losses @ weight`: BLAS threads wait for each other longer than such a short product takes
                draws.append({**metrics_of(weight), "log_loss": float((losses * weight).sum() / n)})
        return {name: float(np.mean([draw[name] for draw in draws])) for name in draws[0]} if draws else {}

    patients = [pair.data.patients[i] for i in pair.cells]
    tested_logits = [of_split[cells] for cells, of_split in zip(tested, logits, strict=True)]
    known = pd.DataFrame(rows, columns=METRICS, dtype=np.float64).dropna(axis="columns")  # metrics of all splits
    of_classes = pd.concat(classes, keys=range(len(classes))).groupby(level=1, sort=False).mean()
    return {
        **dict.fromkeys(METRICS),
        **known.mean().to_dict(),
        "sd_over_splits": known.std(ddof=1).to_dict() if len(rows) > 1 else {},
        "intervals": intervals_of(mean_over_splits, len(patients), patients, seed=seed),
        "per_class": {
            name: {key: None if np.isnan(value) else value for key, value in row.items()}
            for name, row in of_classes.to_dict("index").items()
        },
        "reliability": reliability_of_splits([pair.labels[cells] for cells in tested], tested_logits),
        "splits": rows,
    }


def reliability_of_splits(labels: Sequence[np.ndarray], logits: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """Return mean confidence, accuracy and number of the cells in each bin of confidence, all splits together."""
    probabilities = scipy.special.softmax(np.concatenate(logits), axis=1)
    bins = reliability(np.concatenate(labels), probabilities.argmax(axis=1), probabilities)
    return dict(zip(("confidence", "accuracy", "n_cells"), (values.tolist() for values in bins), strict=True))


def _target_temperatures(pair: Pair, seed: int) -> dict[str, dict[str, Any]]:
    """Return {name with K: calibration error, log loss and temperature}, means over splits and draws of K cells.

    `reliability` is of the first draw of each split.
    """
    results = {}
    for n_labelled in (n for n in N_LABELLED if n < len(pair.cells)):
        rows, first_labels, first_logits = [], [], []  # of the first draw of each split
        for number, logits in enumerate(pair.logits):
            for draw in range(N_DRAWS):
                rng = np.random.default_rng(derive_seed(seed, "labelled", pair.target, number, draw))
                order = rng.permutation(len(pair.cells))  # the same for all K: 8 cells are among the 16
                scaled, temperature = _scaled(logits, pair.labels, order[:n_labelled])
                of_tested = pair.labels[order[n_labelled:]], scaled[order[n_labelled:]]
                rows.append({**_quick_metrics(*of_tested), "temperature": temperature})
                if draw == 0:
                    first_labels.append(of_tested[0])
                    first_logits.append(of_tested[1])
        table = pd.DataFrame(rows).drop(columns="macro_f1")
        spread = table.std(ddof=1).to_dict()
        results[f"target-temperature-{n_labelled}"] = {
            **table.mean().to_dict(),
            "sd_over_draws": spread,
            "reliability": reliability_of_splits(first_labels, first_logits),
        }
    return results


def _scaled(logits: np.ndarray, labels: np.ndarray, drawn: np.ndarray) -> tuple[np.ndarray, float]:
    """Return logits divided by the temperature of the drawn cells, and this temperature."""
    temperature = fit_temperature(logits[drawn], labels[drawn])
    return logits / temperature, temperature


def _quick_metrics(labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """Compute `STRESS_METRICS` of logits [N, C]."""
    probabilities = scipy.special.softmax(logits, axis=1)
    predictions, n_classes = probabilities.argmax(axis=1), logits.shape[1]
    counts = np.bincount(labels * n_classes + predictions, minlength=n_classes**2).reshape(n_classes, n_classes)
    return {
        "macro_f1": metrics_of_confusion(counts)["macro_f1"],
        "calibration_error": expected_calibration_error(labels, predictions, probabilities),
        "log_loss": float(log_losses(labels, probabilities).mean()),
    }


# --- other mixtures of classes in the target ------------------------------------------------------------------------


def target_priors(class_names: Sequence[str], counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return shares [C] of the classes by scenario: `balanced`, `clinical`, and one class heavy.

    `clinical` needs the names of the white cells. The heavy class is the neutrophil, or else the largest in `counts`.
    """
    n_classes = len(class_names)
    heavy = class_names.index("neutrophil") if "neutrophil" in class_names else int(np.argmax(counts))
    of_heavy = np.full(n_classes, (1 - HEAVY_SHARE) / (n_classes - 1))
    of_heavy[heavy] = HEAVY_SHARE
    priors = {"balanced": np.full(n_classes, 1 / n_classes), f"{class_names[heavy]} heavy": of_heavy}
    if set(class_names) <= set(CLINICAL):
        shares = np.array([CLINICAL[name] for name in class_names])
        priors["clinical"] = shares / shares.sum()
    return priors


def resample(labels: np.ndarray, priors: np.ndarray, n_cells: int, seed: int) -> np.ndarray:
    """Draw positions of cells with replacement, n_cells * priors[c] of class c (rounded, one at least)."""
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [
            rng.choice(np.flatnonzero(labels == label), size=max(1, round(n_cells * share)))
            for label, share in enumerate(priors)
        ]
    )


def stress_scenarios(pair: Pair, options: TransferOptions) -> list[dict[str, Any]]:
    """Resample the target to each of `target_priors`, and evaluate the corrections; numbers are means over splits.

    The labelled cells of the target's temperature are not tested, nor is any copy of them.
    """
    names = [f"{name}-{STRESS_LABELLED}" if name == "target-temperature" else name for name in options.corrections]
    scenarios = []
    for prior, shares in target_priors(pair.class_names, np.bincount(pair.labels)).items():
        rows = []
        for number, (model, all_logits) in enumerate(zip(pair.models, pair.logits, strict=True)):
            seed = derive_seed(options.seed, "stress", pair.target, prior, number)
            cells = resample(pair.labels, shares, min(len(pair.labels), STRESS_CELLS), seed)
            features, labels, logits = pair.features[cells], pair.labels[cells], all_logits[cells]
            before = _quick_metrics(labels, logits)
            row = {"uncorrected": before}
            for correction, name in zip(options.corrections, names, strict=True):
                if correction == "target-temperature":
                    drawn = np.random.default_rng(seed).permutation(len(cells))[:STRESS_LABELLED]
                    is_tested = ~np.isin(cells, cells[drawn])
                    if not is_tested.any():
                        continue
                    scaled, _ = _scaled(logits, labels, drawn)
                    after = _quick_metrics(labels[is_tested], scaled[is_tested])
                    base = _quick_metrics(labels[is_tested], logits[is_tested])
                else:
                    after, base = _quick_metrics(labels, model.corrected(correction, features, logits)), before
                row[name] = {metric: after[metric] - base[metric] for metric in STRESS_METRICS}
            rows.append(row)
        known = [name for name in ("uncorrected", *names) if all(name in row for row in rows)]
        means = {name: pd.DataFrame([row[name] for row in rows]).mean().to_dict() for name in known}
        scenarios.append(
            {
                **{"source": pair.source, "target": pair.target, "prior": prior, "n_cells": len(cells)},
                "shares": dict(zip(pair.class_names, shares.tolist(), strict=True)),
                "uncorrected": means.pop("uncorrected"),
                "differences": means,
            }
        )
    return scenarios


def summarise_scenarios(scenarios: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the scenarios, and for each correction and metric the share that it helps in and the mean difference."""
    summary: dict[str, Any] = {}
    for name in dict.fromkeys(name for scenario in scenarios for name in scenario["differences"]):
        of_name = [scenario["differences"][name] for scenario in scenarios if name in scenario["differences"]]
        summary[name] = {"n_scenarios": len(of_name)}
        for metric, sign in STRESS_METRICS.items():
            values = np.array([differences[metric] for differences in of_name])
            share = float((values * sign > 0).mean())
            summary[name][metric] = {"share_helped": share, "mean_difference": float(values.mean())}
    return {"corrections": summary, "scenarios": list(scenarios)}

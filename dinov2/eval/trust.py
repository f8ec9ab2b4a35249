"""Measure how far predictions and labels can be trusted, for one network (or features) and one set of labelled cells.

    python dinov2/eval/trust.py --features features.h5 --output-dir trust/

All numbers are of the linear probe of `linear.py`, protocol `dinobloom`, and of its split; no probe is trained on a
cell that it is tested on. `metrics/` has the formulas.

- Risk and coverage: the error if the least confident cells are rejected. The threshold for `--error` is chosen on one
  random half of the tested cells (of the patients, where they are known), and its error is measured on the other half.
- Out of distribution: each class is left out of training in turn. kNN and Mahalanobis distances score how well its test
  cells are separated from those of the other classes; means over folds, then over classes.
- Label errors: cells whose probability of their label is low for that label, ranked for review.
- Retrieval: tested cells are queries, the training cells of their fold are the gallery.

With a network and images also:

- Corruptions: the probe of clean images on the tested images, blurred, noisy, darker, shifted in hue, or compressed.
- Sources `background` and `centre`: probes that are trained and tested on images with the central square covered, or
  with this square alone. If the background predicts the class, the classes were photographed differently.

Dimension key:  N cells, D features per cell, C classes
"""

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
from markupsafe import Markup

from dinov2.data.splits import write_split
from dinov2.eval import linear
from dinov2.eval.extract_features import embedder_from, has_embedder
from dinov2.eval.features.changed_images import CORRUPTIONS, MASKS, Change, corrupt, mask_visible, with_change
from dinov2.eval.features.extract import Embedder
from dinov2.eval.linear import LinearOptions
from dinov2.eval.metrics import bootstrap_intervals, classification_metrics
from dinov2.eval.metrics.intervals import intervals_of
from dinov2.eval.metrics.label_errors import class_thresholds, estimate_errors, suspected_labels
from dinov2.eval.metrics.outliers import leave_class_out
from dinov2.eval.metrics.retrieval import retrieval_scores
from dinov2.eval.metrics.selective import selective_metrics
from dinov2.eval.metrics.summaries import draw_corruptions, draw_risk_coverage, metrics_table, percent, text_table
from dinov2.eval.pages.page import Section, html, make_thumbnails, write_page
from dinov2.eval.pages.results import trust_tables
from dinov2.eval.protocol import EvaluationData, EvaluationSet, load_evaluation_set, runner
from dinov2.eval.results import (
    MODEL,
    FoldPredictions,
    predictions_file,
    provenance,
    settings_of,
    summarize,
    write_csv,
    write_predictions,
    write_report,
)
from dinov2.eval.solvers.linear_probes import LinearProbe
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code, number_between
from dinov2.utils.files import file_sha256

logger = logging.getLogger("dinov2")

ROW = "linear_dinobloom"  # of the results
METRICS = ("accuracy", "balanced_accuracy")  # of corrupted images
N_THUMBNAILS = 100
THUMBNAIL_PX = 120
ERROR_COLUMNS = ("path", "label", "suggested", "score", "rank")

Embed = Callable[[Sequence[str], Change], np.ndarray]  # image files and a change of them to float32 [N, D]


# --- numbers ---------------------------------------------------------------------------------------------------------


def fit_probes(data: EvaluationData) -> list[LinearProbe]:
    """Fit the probe of `linear.py`, protocol `dinobloom`, to the training cells of each fold."""
    features, n_classes = data.main_features, len(data.class_names)
    return [
        linear.fit_linear_probe(features[train], data.labels[train], n_classes, device=data.device)
        for train, _ in data.folds
    ]


def classify(probes: Sequence[LinearProbe], data: EvaluationData, features: np.ndarray) -> FoldPredictions:
    """Classify the tested cells by the probe of their fold, by features [N, D] that may differ from those of `data`."""
    probabilities = np.full((len(data.labels), len(data.class_names)), np.nan)
    predictions = np.full(len(data.labels), -1, dtype=np.int64)
    for probe, (_, test) in zip(probes, data.folds, strict=True):
        probabilities[test] = probe.predict_proba(features[test])
        predictions[test] = probabilities[test].argmax(axis=1)
    settings = [{"iterations": probe.n_iterations, "converged": probe.has_converged} for probe in probes]
    return FoldPredictions(list(data.folds), predictions, probabilities, settings)


def analyse(data: EvaluationData, predicted: FoldPredictions, wanted_error: float) -> dict[str, Any]:
    """Compute the numbers that need no images: see the module's docstring."""
    tested, names = predicted.tested, data.class_names
    labels, probabilities = data.labels[tested], _probabilities(predicted)
    is_wrong = predicted.predictions[tested] != labels
    suspected, thresholds = suspected_labels(labels, probabilities)[0], class_thresholds(labels, probabilities)
    n_suspected, n_cells = (np.bincount(of, minlength=len(names)) for of in (labels[suspected], labels))
    shares = n_suspected / np.maximum(n_cells, 1)
    return {
        "risk_coverage": selective_metrics(
            is_wrong, probabilities.max(axis=1), wanted_error, _tested_patients(data, predicted), data.seed
        ),
        "out_of_distribution": leave_class_out(data.main_features, data.labels, names, data.folds),
        "retrieval": _retrieval(data, predicted),
        "label_errors": {
            "suspected": len(suspected),
            "estimated": estimate_errors(labels, probabilities),
            "per_class": {
                name: {"suspected": float(share), "threshold": float(threshold)}
                for name, share, threshold in zip(names, shares, thresholds, strict=True)
                if not np.isnan(threshold)
            },
        },
    }


def _retrieval(data: EvaluationData, predicted: FoldPredictions) -> dict[str, Any]:
    features, labels, tested = data.main_features, data.labels, predicted.tested
    of_cells: dict[str, np.ndarray] = {}
    for train, test in data.folds:
        for name, scores in retrieval_scores(features[train], labels[train], features[test], labels[test]).items():
            of_cells.setdefault(name, np.zeros(len(labels)))[test] = scores

    def means(weights: np.ndarray) -> dict[str, float]:
        return {name: float(np.average(scores[tested], weights=weights)) for name, scores in of_cells.items()}

    intervals = intervals_of(means, len(tested), _tested_patients(data, predicted), seed=data.seed)
    return {**means(np.ones(len(tested))), "intervals": intervals}


def corruption_curves(
    data: EvaluationData,
    predicted: FoldPredictions,
    probes: Sequence[LinearProbe],
    paths: Sequence[str],
    embed: Embed,
) -> dict[str, Any]:
    """Measure the probes of clean images on corrupted images of the tested cells; `paths` are of all N cells.

    The relative loss is (clean - corrupted) / clean; its means are over severities, and over corruptions.
    """
    tested, names = predicted.tested, data.class_names
    labels, features = data.labels[tested], data.main_features.copy()
    clean = classification_metrics(labels, predicted.predictions[tested], names)
    curves: dict[str, dict[str, Any]] = {}
    for name, (_, values, what) in CORRUPTIONS.items():
        curve: dict[str, Any] = {"what": what, "values": list(values), **{metric: [] for metric in METRICS}}
        curve["intervals"] = {metric: [] for metric in METRICS}
        for severity, value in enumerate(values, start=1):
            logger.info("corruption %s, severity %d (%s: %g)", name, severity, what, value)
            changed = partial(corrupt, name=name, severity=severity)
            features[tested] = embed([paths[i] for i in tested], changed)
            predictions = classify(probes, data, features).predictions[tested]
            metrics = classification_metrics(labels, predictions, names)
            patients = _tested_patients(data, predicted)
            ends = bootstrap_intervals(labels, predictions, len(names), None, patients, seed=data.seed)
            for metric in METRICS:
                curve[metric].append(metrics[metric])
                curve["intervals"][metric].append(ends.get(metric))
        curve["mean_relative_loss"] = {m: float(1 - np.mean(curve[m]) / clean[m]) if clean[m] else 0.0 for m in METRICS}
        curves[name] = curve
    losses = [curve["mean_relative_loss"] for curve in curves.values()]
    mean = {metric: float(np.mean([loss[metric] for loss in losses])) for metric in METRICS}
    return {"per_corruption": curves, "mean_relative_loss": mean}


def _probabilities(predicted: FoldPredictions) -> np.ndarray:
    """Return the probabilities of the tested cells."""
    assert predicted.probabilities is not None, "probes have probabilities"
    return predicted.probabilities[predicted.tested]


def _tested_patients(data: EvaluationData, predicted: FoldPredictions) -> list[str] | None:
    return None if data.patients is None else [data.patients[i] for i in predicted.tested.tolist()]


# --- the command -----------------------------------------------------------------------------------------------------


def run(evaluation: EvaluationSet, args: argparse.Namespace) -> dict[str, Any]:
    """Compute everything, write the files, results.json last, and return its content."""
    data, cells, folder = evaluation.data(MODEL), evaluation.cells, args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    probes = fit_probes(data)
    predicted = {MODEL: classify(probes, data, data.main_features)}
    trust, left_out = analyse(data, predicted[MODEL], args.error), {}
    (kind,) = data.features
    if has_embedder(args):
        embedder = embedder_from(args)
        embed = embedding(embedder, kind)
        if args.corruptions:
            trust["corruptions"] = corruption_curves(data, predicted[MODEL], probes, cells.paths, embed)
        for source, mask in MASKS.items():
            logger.info("images with the %s alone", source)
            change = partial(mask_visible, mask=mask, share=args.centre, center_crop=embedder.encoder.center_crop)
            changed = replace(data, features={kind: embed(cells.paths, change)})
            predicted[source] = linear.evaluate(changed, LinearOptions())[ROW]
    else:
        left_out["corruptions, background, centre"] = "they need a network: --checkpoint or --encoder, with images"
    results, files = {}, {}
    for source, of_source in predicted.items():
        metrics = summarize(cells.labels, of_source, cells.class_names, cells.patients, evaluation.seed)
        results[source] = {ROW: metrics}
        file = predictions_file(folder, source)
        write_predictions(file, cells.paths, cells.labels, of_source, cells.class_names, cells.patients)
        files[file.name] = file_sha256(file)
    write_split(folder / "split.csv", cells.paths, evaluation.split)
    labels = write_label_errors(folder, evaluation, predicted[MODEL])
    draw(folder, results[MODEL][ROW], trust)
    report = {
        "protocol": "trust",
        "results": results,
        "trust": trust,
        "left_out": left_out,
        **runner.describe_evaluation(evaluation, len(predicted[MODEL].tested), [kind]),
        "files": {**files, labels.name: file_sha256(labels)},
        **provenance(cells.attributes, settings_of(args), evaluation.hashes),
    }
    write_report(folder, report)
    return report


def embedding(embedder: Embedder, kind: str) -> Embed:
    """Return the function that embeds changed images."""
    embedder.kinds = [kind]

    def embed(paths: Sequence[str], change: Change) -> np.ndarray:
        extraction = embedder.extract([Path(path) for path in paths], with_change(embedder.encoder, change))
        if extraction.unreadable:
            raise ValueError(
                f"images: {len(extraction.unreadable)} can no longer be read, for instance "
                f"{next(iter(extraction.unreadable))!r}; put them back, or extract again with --overwrite"
            )
        return extraction.features

    return embed


def write_label_errors(folder: Path, evaluation: EvaluationSet, predicted: FoldPredictions) -> Path:
    """Write label_errors.csv, and the first images of it as label_errors.html; return the former."""
    cells, names, tested = evaluation.cells, evaluation.cells.class_names, predicted.tested
    positions, suggested, scores = suspected_labels(cells.labels[tested], _probabilities(predicted))
    rows: list[tuple[Any, ...]] = [
        (cells.paths[i], names[cells.labels[i]], names[c], score, rank)
        for rank, (i, c, score) in enumerate(
            zip(tested[positions].tolist(), suggested.tolist(), scores.tolist(), strict=True), start=1
        )
    ]
    file = folder / "label_errors.csv"
    write_csv(file, ERROR_COLUMNS, rows)
    uris, _ = make_thumbnails([row[0] for row in rows[:N_THUMBNAILS]], THUMBNAIL_PX)
    figure = '<figure><img src="{}" alt="{}" title="{}"><figcaption>{}. {}, perhaps {} ({:.3f})</figcaption></figure>'
    cards = [
        Markup(figure).format(uri, path, path, rank, label, suggestion, score)
        for uri, (path, label, suggestion, score, rank) in zip(uris, rows, strict=False)
    ]
    text = (
        "<p>The probe doubts the labels of {} of {} cells. The most doubtful come first, with the probability of the "
    )
    text += "label divided by its mean over cells with that label. Some are hard cells with right labels.</p>"
    grid = Markup('<div style="--size: 9rem">{}</div>').format(html.cards(cards))
    page = Section("labels", "Labels to review", Markup(text).format(len(rows), len(tested)) + grid)
    write_page(folder / "label_errors.html", "Suspected label errors", [page])
    return file


def draw(folder: Path, clean: Mapping[str, Any], trust: Mapping[str, Any]) -> None:
    """Draw the figures; `clean` are the metrics of the tested images as they are."""
    title = "linear probe (dinobloom)"
    draw_risk_coverage(folder / "risk_coverage.png", trust["risk_coverage"], title)
    if "corruptions" in trust:
        metric = "balanced_accuracy"
        lines = {name: curve[metric] for name, curve in trust["corruptions"]["per_corruption"].items()}
        draw_corruptions(folder / "corruptions.png", clean[metric], lines, title, "balanced accuracy")


def format_report(report: Mapping[str, Any]) -> str:
    """Format results.json as tables."""
    counts, n_doubted = report["counts"], report["trust"]["label_errors"]
    unit = "cells" if report["patients_kept_apart"] is None else "patients"
    lines = [
        f"Linear probe (dinobloom), {counts['tested']} of {counts['cells']} cells tested "
        f"(in percent; 95 % intervals over {unit})",
        "",
        *metrics_table([(source, "dinobloom", rows[ROW]) for source, rows in report["results"].items()], "protocol"),
    ]
    for caption, rows in trust_tables(report["trust"], percent).items():
        lines += ["", caption, *text_table(rows)]
    lines += [
        "",
        f"{n_doubted['suspected']} labels to review; confident learning counts {n_doubted['estimated']} errors",
    ]
    return "\n".join([*lines, *(f"left out: {name}: {reason}" for name, reason in report["left_out"].items())])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, share = parser.add_argument, number_between(0.01, 0.99)
    add("--error", type=number_between(0.0, 1.0), default=0.05, help="wanted error of accepted cells, 0 to 1")
    add("--centre", type=share, default=0.5, help="side of the central square, as a share of what the network sees")
    corruptions = "embed the tested images 25 times, corrupted: the slow part; with --checkpoint or --encoder"
    add("--corruptions", action=argparse.BooleanOptionalAction, default=True, help=corruptions)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    description = (
        "Measure how far predictions and labels can be trusted: rejection of unsure cells, unknown classes, suspected "
        "label errors, retrieval, corrupted images, background. Write results.json, label_errors.csv, "
        "label_errors.html, predictions*.csv, split.csv and figures to <output-dir>, and print tables."
    )
    args = runner.parse_arguments(description, lambda _: linear.protocol(LinearOptions()), add_arguments, argv)
    if args.few_shot or args.baseline:
        raise ValueError(
            f"--few-shot {args.few_shot}, --baseline {args.baseline}: trust.py measures one network on all training "
            f"cells; give these to linear.py, or a baseline as --encoder here"
        )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    setup_logging()
    args = parse_arguments(argv)
    print(format_report(run(load_evaluation_set(args), args)))


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""Apply a fine-tuned network to new cells: the class of each, and a list of those that a person should look at.

    python dinov2/eval/predict.py --checkpoint tuned/finetuned.pth --data new_cells/ --output-dir predictions/

The networks of several folds vote by their mean probabilities. The list for review has the least confident cells, and
those whose nearest training images are of another class: a network can be sure of a cell unlike all that it learned.

Cells with labels get metrics, over the images that no network learned from.

Letters: N images, C classes, K neighbours
"""

import argparse
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import torch

from dinov2.data.datasets.labelled_cells import UNLABELLED, LabelledCells
from dinov2.eval.extract_features import CELLS_HELP, add_extraction_arguments, extraction_options
from dinov2.eval.features import Features, read_features
from dinov2.eval.features.extract import extract
from dinov2.eval.features.store import check_finite
from dinov2.eval.finetune import NETWORK, REFERENCE
from dinov2.eval.knn import KnnOptions, vote_shares, winners
from dinov2.eval.metrics.summaries import class_table, metrics_table, scores_table
from dinov2.eval.results import (
    FoldPredictions,
    provenance,
    settings_of,
    summarize,
    write_csv,
    write_predictions,
    write_report,
)
from dinov2.eval.solvers.image_classifier import ImageClassifier, load_classifier, predict_images
from dinov2.hub.classifiers import read_seen, seen_images
from dinov2.hub.sources import EXPORTED_WEIGHTS, checkpoint_file, resolve_weights
from dinov2.hub.weight_files import read_weights_file
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code, number_between, positive_int
from dinov2.utils.files import PathLike, file_sha256, user_path

logger = logging.getLogger("dinov2")

LOW_CONFIDENCE, NEIGHBOURS_DISAGREE = "low confidence", "neighbours disagree"
REVIEW_COLUMNS = ("path", "prediction", "confidence", "neighbours", "agreement", "reason")
N_NEIGHBOURS = 20
N_EXAMPLES = 8


@dataclass(frozen=True)
class AppliedNetworks:
    """What networks say about the readable images of a list."""

    kept: np.ndarray  # int64 [N], ascending positions of the readable images
    unreadable: dict[str, str]  # {path: reason} of the others
    class_names: list[str]
    probabilities: np.ndarray  # float64 [N, C], the mean over the networks
    neighbours: np.ndarray | None  # float64 [N, C], mean shares of the votes of the nearest training images


def predict(
    models: ImageClassifier | Sequence[ImageClassifier],
    paths: Sequence[PathLike],
    tta: bool = False,
    references: Sequence[Features] | None = None,
    n_neighbours: int = N_NEIGHBOURS,
    **options: Any,
) -> AppliedNetworks:
    """Classify image files by one network, or by the mean probabilities of several with the same classes.

    Args:
        models: from `load_classifier`; classes come in the order of the first one.
        paths: of images; unreadable ones are left out, counted and logged.
        tta: average the probabilities over eight flips and turns.
        references: features of training images by each network, which vote for the classes of their neighbours.
        n_neighbours: K, or the number of training images if that is smaller.
        options: fields of `ExtractOptions`, such as device, batch_size, num_workers and precision.

    Raises:
        ValueError: networks of different classes, no readable image, or one that disappears meanwhile.
    """
    models = [models] if isinstance(models, ImageClassifier) else list(models)
    class_names = models[0].class_names
    for model in models[1:]:
        if different := set(class_names) ^ set(model.class_names):
            raise ValueError(
                f"--checkpoint: {models[0].encoder.origin} and {model.encoder.origin} have different classes, for "
                f"instance {min(different)!r}; give networks of one fine-tuning"
            )
    files, kept, unreadable = [Path(path) for path in paths], np.arange(len(paths)), {}
    probabilities: list[np.ndarray] = []  # of each network, [N, C]
    neighbours: list[np.ndarray] = []
    for number, model in enumerate(models):
        extraction = extract(model.encoder, files, kinds=[model.kind], **options)
        if number == 0:
            kept, unreadable = extraction.kept, extraction.unreadable
            files = [files[i] for i in kept]
        elif extraction.unreadable:
            raise ValueError(f"images: {next(iter(extraction.unreadable))!r} can no longer be read; put it back")
        order = [model.class_names.index(name) for name in class_names]
        if tta:  # the eight views need forwards of their own
            of_model = predict_images(model, [str(file) for file in files], with_views=True, **options)
        else:
            with torch.no_grad():
                logits = model.cpu().logits(torch.from_numpy(extraction.features))  # [N, C]
            of_model = logits.double().softmax(dim=1).numpy()
        probabilities.append(of_model[:, order])
        if references is not None:
            train, k = references[number], min(n_neighbours, len(references[number]))
            near = torch.as_tensor(train.features, device=options.get("device", "cpu"))
            shares = vote_shares(near, train.labels, extraction.features, len(class_names), KnnOptions(k=[k]))
            neighbours.append(shares[k][:, order])
        model.cpu()  # a device has memory for one network
    of_neighbours = np.mean(neighbours, axis=0) if neighbours else None
    return AppliedNetworks(kept, unreadable, class_names, np.mean(probabilities, axis=0), of_neighbours)


def review_rows(applied: AppliedNetworks, n_least_confident: int) -> list[tuple[int, list[Any]]]:
    """Choose the images for review, the least confident first; return their positions among the N, and their columns.

    The columns are `REVIEW_COLUMNS` after the path; those of neighbours are empty without reference features.
    """
    predictions, confidences = applied.probabilities.argmax(axis=1), applied.probabilities.max(axis=1)
    order = confidences.argsort(kind="stable")
    least_confident = set(order[:n_least_confident].tolist())
    voted = predictions if applied.neighbours is None else winners(applied.neighbours)
    rows = []
    for i in order.tolist():
        applies = {LOW_CONFIDENCE: i in least_confident, NEIGHBOURS_DISAGREE: voted[i] != predictions[i]}
        reasons = [reason for reason, is_one in applies.items() if is_one]
        if reasons:
            votes: list[Any] = ["", ""]
            if applied.neighbours is not None:
                votes = [applied.class_names[voted[i]], float(applied.neighbours[i, predictions[i]])]
            name = applied.class_names[predictions[i]]
            rows.append((i, [name, float(confidences[i]), *votes, ", ".join(reasons)]))
    return rows


# --- files of fine-tuning -------------------------------------------------------------------------------------------


def network_files(source: PathLike) -> list[Path]:
    """Return the network's file, or those in an output folder: finetuned.pth, an export's, else one for each fold."""
    folder = resolve_weights(source)
    if not folder.is_dir():
        return [checkpoint_file(source)]
    for name in (f"{NETWORK}.pth", EXPORTED_WEIGHTS[0]):
        if (folder / name).is_file():
            return [folder / name]
    numbers = {path: re.fullmatch(rf"{NETWORK}_(\d+)\.pth", path.name) for path in folder.iterdir()}
    files = {path: int(match[1]) for path, match in numbers.items() if match}
    if not files:
        raise FileNotFoundError(
            f"--checkpoint: the folder {str(folder)!r} has no {NETWORK}.pth and no {NETWORK}_<fold>.pth; give the "
            f"--output-dir of finetune.py or of an export, or a file that it wrote"
        )
    return sorted(files, key=lambda path: files[path])


def read_references(files: Sequence[Path], models: Sequence[ImageClassifier]) -> list[Features] | None:
    """Read the features of training images beside each network; None, with a warning, if they are not there.

    Labels are positions in `model.class_names`. ValueError: a file is damaged, or of another training.
    """
    references = []
    for file, model in zip(files, models, strict=True):
        path = file.with_name(f"{REFERENCE}{file.stem.removeprefix(NETWORK)}.h5")
        without = "review.csv says nothing about neighbours"
        if not path.exists():
            text = "%s: there is no %s beside it, with which finetune.py describes the training images, so %s"
            logger.warning(text, file, path.name, without)
            return None
        reference = read_features(path)
        check_finite(reference, path)
        stated = reference.attributes.get("training"), reference.class_names, reference.kind
        if stated != (read_weights_file(file).get("training"), model.class_names, model.kind):
            raise ValueError(
                f"--checkpoint {file}: {path} is of another training; copy both from one output folder of "
                f"finetune.py, or remove the latter to do without neighbours"
            )
        if reference.attributes.get("transform") != model.encoder.transform:
            text = "--image-size %d: %s has features of images of another size, so %s"
            logger.warning(text, model.encoder.image_size, path, without)
            return None
        references.append(reference)
    return references


# --- the command ----------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Classify cells by a network that finetune.py wrote. Write predictions.csv, review.csv (what a "
        "person should look at) and results.json (with metrics, if the cells have labels of the network's classes) to "
        "<output-dir>.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    networks = (
        f"{NETWORK}.pth of finetune.py; or its output folder, where the networks of several folds classify together, "
        f"by their mean probabilities"
    )
    add("--checkpoint", required=True, metavar="WEIGHTS", help=networks)
    add("--data", type=user_path, required=True, help=f"{CELLS_HELP}; or both without labels")
    add("--output-dir", type=user_path, required=True, help="of the files; made if missing")
    add("--tta", action="store_true", help="average the probabilities over eight flips and turns")
    add("--review", type=number_between(0, 10**9), default=100, help="least confident cells to list in review.csv")
    add("--neighbours", type=positive_int, default=N_NEIGHBOURS, help="training images nearest to a cell that vote")
    add_extraction_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    setup_logging()
    args = parse_arguments(argv)
    options = extraction_options(args)
    files = network_files(args.checkpoint)
    cells = LabelledCells.from_path(args.data, needs_labels=False)
    cells = replace(cells, paths=[Path(os.path.abspath(path)) for path in cells.paths])
    path, count = Counter(cells.paths).most_common(1)[0]
    if count > 1:
        raise ValueError(f"--data: the image {str(path)!r} is listed {count} times; list each once")
    models = [load_classifier(file, args.image_size) for file in files]
    references, seen = read_references(files, models), read_seen(files)
    logger.info("%d images, classified by %s", len(cells), ", ".join(file.name for file in files))
    args.output_dir.mkdir(parents=True, exist_ok=True)  # an error here comes before hours of embedding
    applied = predict(models, cells.paths, args.tta, references, args.neighbours, **options)
    is_seen = seen_images(seen, [cells.paths[i] for i in applied.kept])
    encoder, single = models[0].encoder, len(files) == 1
    hashes = {file.name: file_sha256(file) for file in files}
    attributes = {
        "model": encoder.description,
        "checkpoint": os.path.abspath(files[0] if single else files[0].parent),
        **({"checkpoint_sha256": hashes[files[0].name]} if single else {}),
        "transform": encoder.transform,
        "precision": args.precision,
        "image_size": str(encoder.image_size),
    }
    if args.data.is_file():
        hashes["data"] = file_sha256(args.data)
    origin = provenance(attributes, settings_of(args), hashes)
    print(write_results(args.output_dir, cells, applied, is_seen, args.review, origin))


def write_results(
    output_dir: Path,
    cells: LabelledCells,
    applied: AppliedNetworks,
    is_seen: np.ndarray,
    n_least_confident: int,
    origin: Mapping[str, Any],
) -> str:
    """Write predictions.csv, review.csv and results.json; return a summary.

    `is_seen` (bool [N]) are images that a network learned from; `origin` are the last entries of results.json.
    """
    names, kept = applied.class_names, applied.kept.tolist()
    cells = replace(
        cells,
        paths=[cells.paths[i] for i in kept],
        labels=cells.labels[kept],
        patients=None if cells.patients is None else [cells.patients[i] for i in kept],
    )
    folds = [(np.empty(0, dtype=np.int64), np.arange(len(kept)))]
    predicted = FoldPredictions(folds, applied.probabilities.argmax(axis=1), applied.probabilities, [{}])
    results = _metrics(cells, predicted, is_seen, names)
    file = output_dir / "predictions.csv"
    paths, labels = [str(path) for path in cells.paths], None if _has_no_labels(cells) else cells.labels
    write_predictions(file, paths, labels, predicted, names, cells.patients, label_names=cells.class_names)
    review = [[paths[i], *columns] for i, columns in review_rows(applied, n_least_confident)]
    write_csv(output_dir / "review.csv", REVIEW_COLUMNS, review)
    n_seen = int(is_seen.sum())
    counts = {
        "cells": len(kept),
        "tested": len(kept) - n_seen if results else 0,
        "seen_in_training": n_seen,
        "unreadable": len(applied.unreadable),
        "review": len(review),
    }
    report = {
        "protocol": "finetune, applied",
        "results": results,
        "class_names": names,
        "counts": counts,
        "files": {file.name: file_sha256(file)},
        **origin,
    }
    write_report(output_dir, report)
    lines = [f"{output_dir}: predictions for {len(kept)} cells, {len(review)} of them in review.csv"]
    for row, metrics in results.items():
        lines += ["", f"{counts['tested']} cells, {len(names)} classes (in percent, with 95 % intervals)", ""]
        lines += [*metrics_table([(row, "", metrics)], ""), "", *scores_table([(row, metrics)])]
        lines += ["", *class_table(row, metrics, {})]
    return "\n".join(lines)


def _has_no_labels(cells: LabelledCells) -> bool:
    return cells.class_names == [UNLABELLED]


def _metrics(
    cells: LabelledCells, predicted: FoldPredictions, is_seen: np.ndarray, class_names: list[str]
) -> dict[str, Any]:
    """Return {row: metrics} of the cells that were not learned from; empty, with a warning, if there can be none."""
    n_seen, n = int(is_seen.sum()), len(is_seen)
    if n_seen:
        text = "%d of these %d images are among those that the network learned from: their predictions say nothing "
        logger.warning(text + "about new cells, and no metrics are of them", n_seen, n)
    unknown = sorted({cells.class_names[i] for i in cells.labels} - set(class_names))
    if unknown and not _has_no_labels(cells):
        logger.warning(
            "no metrics: the labels have %d classes that the network does not know, %s; it knows %s: rename labels "
            "that mean these",
            *(len(unknown), ", ".join(map(repr, unknown[:N_EXAMPLES])), ", ".join(map(repr, class_names))),
        )
    if unknown or n_seen == n:
        return {}
    labels = np.array([class_names.index(cells.class_names[i]) for i in cells.labels])
    unseen = np.flatnonzero(~is_seen)
    tested = replace(
        predicted, folds=[(predicted.folds[0][0], unseen)], predictions=np.where(is_seen, -1, predicted.predictions)
    )
    return {"finetune_applied": summarize(labels, tested, class_names, cells.patients)}


if __name__ == "__main__":
    sys.exit(exit_code(main))

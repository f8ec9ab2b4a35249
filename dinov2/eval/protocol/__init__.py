"""What evaluation protocols have in common: their data, the flags that name labelled cells, and how these are read.

A protocol is a function of arrays: `evaluate(data: EvaluationData, options) -> Predictions`. `runner.py` calls it and
writes the results; `evaluate.py` has the list of all protocols.

The same set, seed and flags give every protocol the same split. Two mistakes are errors: a patient on two sides of a
split file, and a class that a split file or a second set tests without a training cell.

Letters: N cells, D features per cell
"""

import argparse
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from dinov2.data.datasets.decode import unreadable_reason
from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.data.splits import (
    Fold,
    Split,
    check_no_patient_on_two_sides,
    describe_folds,
    log_fold_problems,
    make_folds,
    read_split,
    split_cells,
    without_copies,
)
from dinov2.distributed import on_main_process
from dinov2.eval.extract_features import (
    CELLS_HELP,
    add_embedder_arguments,
    device_of,
    embedder_from,
    has_embedder,
)
from dinov2.eval.features import DEFAULT_KIND, Features, read_features
from dinov2.eval.features.extract import Embedder, extract
from dinov2.eval.features.named_encoders import BASELINES, build_encoder
from dinov2.eval.features.store import align_classes, check_finite, check_labels, check_same_network, join
from dinov2.eval.results import FoldPredictions
from dinov2.hub.backbones import checkpoint_file, untrained_backbone
from dinov2.hub.classifiers import read_seen, seen_images
from dinov2.utils.command import number_between, positive_int, progress_bar, seed_number
from dinov2.utils.files import file_sha256, user_path
from dinov2.utils.resources import parallel_map

logger = logging.getLogger("dinov2")

N_FOLDS = 5
N_EXAMPLES = 3
LEAST_IN_PARALLEL = 500  # images that several processes decode; they take a second to start
IMAGES = "images"  # kind of features: the paths themselves, for protocols that train on images
NETWORKS = ("checkpoint", "encoder")
SOURCES = ("train", "test", "data", "features", "test_features")

Predictions: TypeAlias = dict[str, FoldPredictions]  # {row of the results: what was predicted}, for instance knn_20


@dataclass(frozen=True, eq=False)
class EvaluationData:
    """N labelled cells and their split, as arrays."""

    # {kind: [N, D]}; protocols that take one kind of features take the first; {IMAGES: paths [N]} for fine-tuning
    features: Mapping[str, np.ndarray]
    labels: np.ndarray  # int64 [N], positions in `class_names`
    class_names: Sequence[str]
    folds: Sequence[Fold]  # training and test positions each
    patients: Sequence[str] | None = None  # N ids
    validation: np.ndarray | None = None  # positions to choose hyperparameters by; None: folds of each training side
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        lengths, labels, n_classes = [len(x) for x in self.features.values()], self.labels, len(self.class_names)
        if set(lengths) != {len(labels)} or not 0 <= labels.min() <= labels.max() < n_classes:
            raise ValueError(
                f"evaluation data: features of {lengths} cells, {len(labels)} labels from {labels.min()} to "
                f"{labels.max()}, {n_classes} classes; give each cell features and a label from 0 to {n_classes - 1}"
            )

    @property
    def main_features(self) -> np.ndarray:
        """Return the first kind of features, [N, D]."""
        return next(iter(self.features.values()))


@dataclass(frozen=True)
class Protocol:
    """An evaluation protocol with its options, and how its results are named."""

    name: str  # `protocol` in results.json; rows of results are called <name>_<value of the setting>
    title: str  # heading of tables and figures
    setting: str  # what the rows differ in, for the tables
    evaluate: Callable[[EvaluationData, Any], Predictions]
    options: Any  # a dataclass
    # returns the options for a number of training cells, or None if they are too few; without it they are `options`
    few_shot_options: Callable[[int], Any] | None = None
    kinds: tuple[str, ...] = (DEFAULT_KIND,)  # of features that a network extracts for it by default
    has_many_rows: bool = False  # each row has its own file, predictions_<row>.csv; else there is one predictions.csv

    @property
    def takes_all_kinds(self) -> bool:
        """True if the protocol chooses among several kinds of features; else it gets one."""
        return len(self.kinds) > 1

    def value(self, row: str) -> str:
        """Return the value of the setting in the name of a row."""
        return row.removeprefix(f"{self.name}_")


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Labelled cells, their split, and the features to evaluate on it."""

    cells: Features  # of all sets, the training set first
    files: list[Path]  # of the features: of one set, or of the training and the test set
    split: Split  # as it was given or made
    folds: list[Fold]  # of the split, without copies of test images in training
    copies: dict[str, int]  # their counts, of `without_copies`
    description: dict[str, Any]  # of the folds, by `describe_folds`
    sources: dict[str, dict[str, np.ndarray]]  # {"model" or a baseline: {kind: [N, D]}}
    seed: int
    device: str
    hashes: dict[str, str]  # {flag: sha256} of the input files

    def data(self, source: str, with_all_kinds: bool = False) -> EvaluationData:
        """Collect the input of a protocol: labels, folds, settings, and the features of one source.

        The features are of the source's first kind, or of all its kinds if `with_all_kinds`.
        """
        kinds = self.sources[source]
        main = next(iter(kinds))
        return EvaluationData(
            features=kinds if with_all_kinds else {main: kinds[main]},
            labels=self.cells.labels,
            class_names=self.cells.class_names,
            folds=self.folds,
            patients=self.cells.patients,
            validation=self.split.validation,
            seed=self.seed,
            device=self.device,
        )

    @cached_property
    def patients_kept_apart(self) -> bool | None:
        """True if no patient is on both sides of a fold; None if patients are unknown."""
        if self.cells.patients is None:
            return None
        patients = np.asarray(self.cells.patients)
        shared = [np.intersect1d(patients[train], patients[test]) for train, test in self.folds]
        if n_shared := len(np.unique(np.concatenate(shared))):
            examples = ", ".join(map(repr, np.unique(np.concatenate(shared)).tolist()[:N_EXAMPLES]))
            logger.warning("%d patients have cells in both train and test, for instance %s", n_shared, examples)
        return not n_shared


# --- flags -----------------------------------------------------------------------------------------------------------


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name cells, features, split and output folder; `check_evaluation_arguments` checks them."""
    add_embedder_arguments(parser, checkpoint_required=False)
    parser.set_defaults(kinds=None)  # which kinds are extracted depends on the protocol
    add = parser.add_argument
    add("--features", type=user_path, help="a features.h5: the training set, or one set to split")
    add("--test-features", type=user_path, help="a features.h5 from the same network: the test set")
    add("--kind", help="kind of features to evaluate (see --kinds); without it the file's first one")
    baselines = "evaluate these on the same split too: the same architecture untrained (with --checkpoint), "
    baselines += "colour histograms (HSV), raw 32x32 pixels"
    add("--baseline", choices=("untrained", *BASELINES), nargs="+", default=[], help=baselines)
    add_split_arguments(parser)


def add_split_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name labelled images, their split, few-shot numbers, the seed and the output folder."""
    add = parser.add_argument
    add("--train", type=user_path, help=f"cells to learn from: {CELLS_HELP}")
    add("--test", type=user_path, help="cells to classify, likewise")
    add("--data", type=user_path, help="one set to split into both, likewise")
    split = parser.add_mutually_exclusive_group()
    split.add_argument("--folds", type=positive_int, default=N_FOLDS, help="of one set")
    split.add_argument(
        "--split", type=user_path, help="CSV instead: path,fold (tested in), or path,part (train, val, test)"
    )
    split.add_argument(
        "--test-fraction", type=number_between(1e-6, 0.5), help="one split instead: share to test on, up to 0.5"
    )
    add("--few-shot", type=positive_int, nargs="+", default=[], help="learn from this many cells a class too")
    add("--repeats", type=positive_int, default=10, help="draws for each of --few-shot")
    add("--seed", type=seed_number, default=0, help="of folds, few cells, intervals, untrained networks and training")
    add("--output-dir", type=user_path, required=True, help="for results and features; made if missing")


def check_evaluation_arguments(
    parser: argparse.ArgumentParser, args: argparse.Namespace, default_kinds: Sequence[str] = (DEFAULT_KIND,)
) -> None:
    """End the command if flags do not go together; set `args.kinds` if a network is to embed images.

    `default_kinds` of features are extracted with --checkpoint, if neither --kinds nor --kind is given.
    """
    networks, sources = ({name for name in names if getattr(args, name)} for names in (NETWORKS, SOURCES))
    allowed = ({"train", "test"}, {"data"}) if networks else ({"features", "test_features"}, {"features"})
    if sources not in allowed:
        flags = ["--" + name.replace("_", "-") for name in sorted(networks | sources)]
        parser.error(
            f"got {' '.join(flags) or 'no cells'}; give --checkpoint (or --encoder) with --train --test or with "
            f"--data, or --features --test-features, or --features"
        )
    if "untrained" in args.baseline and not args.checkpoint:
        parser.error("--baseline untrained needs --checkpoint, which says what architecture to build")
    if args.test or args.test_features:
        check_one_set(parser, args)
    if has_embedder(args):
        if args.kinds is None:
            default_kinds = default_kinds if args.checkpoint else (DEFAULT_KIND,)
            args.kinds = list(default_kinds) if args.kind is None else [args.kind]
        if args.kind is not None and args.kind not in args.kinds:
            parser.error(f"--kind {args.kind} is not among --kinds {' '.join(args.kinds)}; add it there")


def check_one_set(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the command if flags divide one set, where a training and a test set are given."""
    for name in ("split", "test_fraction"):
        if getattr(args, name) is not None:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} divides one set; give it with --data or with --features alone")


# --- cells and features ----------------------------------------------------------------------------------------------


def load_evaluation_set(args: argparse.Namespace, with_all_kinds: bool = False) -> EvaluationSet:
    """Read or extract the features that the flags name, and split their cells.

    Mistakes in lists and splits are reported before images are embedded. `with_all_kinds` loads all kinds of features,
    unless `args.kind` names one.
    """
    embedder = None
    if has_embedder(args):
        lists = _read_lists(args)
        embedder = embedder_from(args)
        names = ["features"] if len(lists) == 1 else ["features_train", "features_test"]
        files = [args.output_dir / f"{name}.h5" for name in names]
        sets = [embedder.features_of(*of_set, args.overwrite) for of_set in zip(lists, files, strict=True)]
    else:
        files = [file for file in (args.features, args.test_features) if file is not None]
        sets = [read_features(file) for file in files]
    sets = [_select_kinds(args, features, with_all_kinds) for features in sets]
    for features, file in zip(sets, files, strict=True):
        check_labels(features, file)
        check_finite(features, file)
    if len(sets) == 2:
        check_same_network(*sets)
        sets[1] = align_classes(sets[1], sets[0].class_names)
    evaluation = _assemble(args, sets, files)
    del sets, features  # after joining they are a second copy of the features
    for name in args.baseline:
        kinds = list(evaluation.sources["model"])
        evaluation.sources[name] = baseline_features(name, evaluation.cells.paths, embedder, args.seed, kinds)
    return evaluation


def load_images(args: argparse.Namespace) -> EvaluationSet:
    """Read the labelled images that the flags name, leave out those that cannot be decoded, and split the others.

    The only kind of features is `IMAGES`. All processes of a group call this; the main one decodes.
    """
    sets = []
    for cells in _read_lists(args):
        reasons = on_main_process(partial(_why_unreadable, cells, args.num_workers))
        if unreadable := {str(path): reason for path, reason in zip(cells.paths, reasons, strict=True) if reason}:
            examples = "; ".join(f"{path}: {reason}" for path, reason in list(unreadable.items())[:N_EXAMPLES])
            text = "%d of %d images are unreadable and left out: %s"
            logger.warning(text, len(unreadable), len(cells), examples)
        if len(unreadable) == len(cells):
            raise ValueError(f"images: none of the {len(cells)} could be read; the log gives reasons")
        whole = Features(
            features=np.array([os.path.abspath(path) for path in cells.paths]),
            labels=cells.labels,
            class_names=cells.class_names,
            paths=[os.path.abspath(path) for path in cells.paths],
            patients=cells.patients,
            unreadable=[os.path.abspath(path) for path in unreadable],
            kind=IMAGES,
        )
        sets.append(whole.select(np.array([not reason for reason in reasons])))
    return _assemble(args, sets, [])


def _read_lists(args: argparse.Namespace) -> list[LabelledCells]:
    """Read the list to split, or those of training and test; mistakes of the split are errors here already."""
    lists = [LabelledCells.from_path(args.train or args.data)]
    if args.test is not None:
        lists.append(LabelledCells.from_path(args.test, class_names=lists[0].class_names))
    _make_split(args, lists)
    return lists


def _why_unreadable(cells: LabelledCells, n_workers: int) -> list[str]:
    """Return the reason why each image cannot be decoded; empty for those that can."""
    n_workers = n_workers if len(cells) >= LEAST_IN_PARALLEL else 1
    reasons = parallel_map(unreadable_reason, map(os.fspath, cells.paths), n_workers)
    return list(progress_bar(reasons, desc="checking", total=len(cells)))


def _assemble(args: argparse.Namespace, sets: Sequence[Features], files: list[Path]) -> EvaluationSet:
    """Join a training and a test set, split the cells, and drop copies of test images from the other sides."""
    split = _make_split(args, sets)
    cells = sets[0] if len(sets) == 1 else join(*sets)
    folds, copies = without_copies(cells.paths, split.folds)
    if split.validation is not None:
        tested = np.unique(np.concatenate([test for _, test in folds]))
        ((validation, _),), _ = without_copies(cells.paths, [(split.validation, tested)], ("validation", "test"))
        split = replace(split, validation=validation)
    _warn_of_seen(args, cells, folds)
    description = describe_folds(cells.labels, folds, cells.class_names)
    not_learned = description["not_learned_in"]
    if not_learned and (args.split or len(sets) > 1):
        name, numbers = next(iter(not_learned.items()))
        raise ValueError(
            f"split: {len(not_learned)} classes are tested without a training cell, for instance {name!r} in fold "
            f"{numbers[0]}; give each such class training cells, or leave its cells out"
        )
    log_fold_problems(description)
    sources = {"model": {cells.kind: cells.features, **cells.others}}
    inputs = {name: getattr(args, name, None) for name in (*SOURCES, "split")}
    hashes = {name: file_sha256(path) for name, path in inputs.items() if path is not None and path.is_file()}
    return EvaluationSet(cells, files, split, folds, copies, description, sources, args.seed, device_of(args), hashes)


def _warn_of_seen(args: argparse.Namespace, cells: Features, folds: Sequence[Fold]) -> None:
    """Warn of test images from which a fine-tuned --checkpoint learned."""
    if not args.checkpoint:
        return
    file = checkpoint_file(args.checkpoint)
    tested = np.unique(np.concatenate([test for _, test in folds]))
    if n_seen := int(seen_images(read_seen([file]), [cells.paths[i] for i in tested]).sum()):
        logger.warning(
            "--checkpoint %s was fine-tuned with %d of these %d test images: numbers with them say nothing about new "
            "cells; test on others",
            *(file, n_seen, len(tested)),
        )


def _select_kinds(args: argparse.Namespace, features: Features, with_all_kinds: bool) -> Features:
    """Keep the kind that --kind names or else the main one, or all kinds (of --kinds, if that is given)."""
    if args.kind is None and with_all_kinds:
        others = {kind: values for kind, values in features.others.items() if args.kinds is None or kind in args.kinds}
        return replace(features, others=others)
    return replace(features.of_kind(args.kind or features.kind), others={})


def _make_split(args: argparse.Namespace, sets: Sequence[Features] | Sequence[LabelledCells]) -> Split:
    """Make or read the split of one set, or of a training and a test set."""
    paths = [os.path.abspath(path) for cells in sets for path in cells.paths]
    if len(set(paths)) < len(paths):
        twice = Counter(paths).most_common(1)[0][0]
        raise ValueError(f"cells: the image {twice!r} is listed twice; list each once, on one side")
    labels, patients = np.concatenate([cells.labels for cells in sets]), sets[0].patients
    if len(np.unique(labels)) < 2:
        raise ValueError(
            f"labels: all {len(labels)} cells are of class {sets[0].class_names[labels[0]]!r}; two classes or more are "
            f"needed"
        )
    if len(sets) == 2:
        return Split([(np.arange(len(sets[0])), np.arange(len(sets[0]), len(paths)))])
    if args.test_fraction is not None:
        return Split([split_cells(labels, patients, args.test_fraction, args.seed)])
    if args.split is None:
        return Split(make_folds(labels, patients, args.folds, args.seed))
    split = read_split(args.split, paths)
    if patients is not None:
        validation = [] if split.validation is None else [split.validation]
        for fold in split.folds:
            check_no_patient_on_two_sides(patients, *fold, *validation)
    return split


def baseline_features(
    name: str, images: Sequence[str], embedder: Embedder | None, seed: int, kinds: Sequence[str]
) -> dict[str, np.ndarray]:
    """Compute the features of a baseline: {kind: float32 [N, D]}.

    The network "untrained" has the embedder's architecture and the `kinds`; another baseline has one kind, its name.
    """
    logger.info("baseline %s", name)
    paths = [Path(path) for path in images]
    if name == "untrained":
        assert embedder is not None, "check_evaluation_arguments asks for a checkpoint"
        extraction = embedder.extract(paths, untrained_backbone(embedder.file, embedder.image_size, seed))
        by_kind = {kind: extraction.by_kind[kind] for kind in kinds}
    else:
        extraction = extract(build_encoder(name), paths)
        by_kind = {name: extraction.features}
    if extraction.unreadable:
        raise ValueError(
            f"--baseline {name}: {len(extraction.unreadable)} images can no longer be read, for instance "
            f"{next(iter(extraction.unreadable))}; put them back, or extract again with --overwrite"
        )
    return by_kind

"""What evaluation protocols have in common: their data, the flags that name labelled cells, and how these are read.

A protocol is a function of arrays: `evaluate(data: EvaluationData, options) -> Predictions`. `runner.py` calls it and
writes the results; `evaluate.py` has the list of all protocols.

Split. `--folds` stratified folds of one set, by whole patients where the set names them; a split file; one stratified
split (`--test-fraction`); or two sets. The same set, seed and flags give every protocol the same split. Training images
whose bytes a test image has are dropped and counted. Two mistakes of a split file or of two sets are errors: a patient
on two sides, and a class that is tested without a training cell. Folds made here may have a class of one patient; they
are kept and reported.

Letters: N cells, D features per cell
"""

import argparse
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from dinov2.data.copies import without_copies
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
)
from dinov2.eval.extract_features import (
    CELLS_HELP,
    add_embedder_arguments,
    device_of,
    embedder_from,
    has_embedder,
    positive_int,
)
from dinov2.eval.features import DEFAULT_KIND, Features, read_features
from dinov2.eval.features.baselines import BASELINES
from dinov2.eval.features.extract import Embedder
from dinov2.eval.features.join import align_classes, check_finite, check_same_network, join
from dinov2.eval.results import FoldPredictions
from dinov2.hub.backbones import untrained_backbone
from dinov2.utils.files import file_sha256

logger = logging.getLogger("dinov2")

N_FOLDS = 5
NETWORKS = ("checkpoint", "encoder")
SOURCES = ("train", "test", "data", "features", "test_features")

Predictions: TypeAlias = dict[str, FoldPredictions]  # {row of the results: what was predicted}, for instance knn_20


@dataclass(frozen=True, eq=False)
class EvaluationData:
    """N labelled cells and their split, as arrays.

    Attributes:
        features: {kind: [N, D]}; protocols that take one kind of features take the first.
        labels: int64 [N], positions in `class_names`.
        class_names: C names.
        folds: training and test positions each.
        patients: N patient ids, or None.
        validation: positions to choose hyperparameters by; None: chosen on folds of each training side.
        seed: of everything random.
        device: where to compute.
    """

    features: Mapping[str, np.ndarray]
    labels: np.ndarray
    class_names: Sequence[str]
    folds: Sequence[Fold]
    patients: Sequence[str] | None = None
    validation: np.ndarray | None = None
    seed: int = 0
    device: str = "cpu"

    @property
    def main_features(self) -> np.ndarray:
        """Return the first kind of features, [N, D]."""
        return next(iter(self.features.values()))


@dataclass(frozen=True)
class Protocol:
    """An evaluation protocol with its options, and how its results are named.

    Attributes:
        name: `protocol` in results.json; rows of results are called <name>_<value of the setting>.
        title: heading of tables and figures.
        setting: what the rows differ in, for the tables.
        evaluate: the function `evaluate(data, options)`.
        options: its options, a dataclass.
        few_shot_options: return the options for so many training cells, or None if they are too few; None: `options`.
        kinds: of features that a network extracts for it by default.
        has_many_rows: True if each row has its own file, predictions_<row>.csv; else there is one predictions.csv.
    """

    name: str
    title: str
    setting: str
    evaluate: Callable[[EvaluationData, Any], Predictions]
    options: Any
    few_shot_options: Callable[[int], Any] | None = None
    kinds: tuple[str, ...] = (DEFAULT_KIND,)
    has_many_rows: bool = False

    @property
    def takes_all_kinds(self) -> bool:
        """True if the protocol chooses among several kinds of features; else it gets one."""
        return len(self.kinds) > 1

    def value(self, row: str) -> str:
        """Return the value of the setting in the name of a row."""
        return row.removeprefix(f"{self.name}_")


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Labelled cells, their split, and the features to evaluate on it.

    Attributes:
        cells: all cells, the training set first.
        split: as it was given or made.
        folds: training and test positions each, without copies of test images in training.
        copies: their counts (`without_copies`).
        description: of the folds (`describe_folds`).
        sources: {"model" or a baseline: {kind: [N, D]}}.
        seed: of everything random.
        device: where to compute.
        hashes: {flag: sha256} of the input files.
    """

    cells: Features
    split: Split
    folds: list[Fold]
    copies: dict[str, int]
    description: dict[str, Any]
    sources: dict[str, dict[str, np.ndarray]]
    seed: int = 0
    device: str = "cpu"
    hashes: dict[str, str] = field(default_factory=dict)

    def data(self, source: str, with_all_kinds: bool = False) -> EvaluationData:
        """Return what a protocol takes: the features of one source, its first kind or all kinds."""
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
            logger.warning("%d patients have cells in both train and test", n_shared)
        return not n_shared


# --- flags -----------------------------------------------------------------------------------------------------------


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name cells, features, split and output folder; `check_evaluation_arguments` checks them."""
    add_embedder_arguments(parser, checkpoint_required=False)
    parser.set_defaults(kinds=None)  # which kinds are extracted depends on the protocol
    parser.add_argument("--train", type=Path, help=f"cells to learn from: {CELLS_HELP}")
    parser.add_argument("--test", type=Path, help="cells to classify, likewise")
    parser.add_argument("--data", type=Path, help="one set to split into both, likewise")
    parser.add_argument("--features", type=Path, help="a features.h5: the training set, or one set to split")
    parser.add_argument("--test-features", type=Path, help="a features.h5 from the same network: the test set")
    parser.add_argument("--kind", help="kind of features to evaluate (see --kinds); without it the file's first one")
    split = parser.add_mutually_exclusive_group()
    split.add_argument("--folds", type=positive_int, default=N_FOLDS, help="of --data or of --features alone")
    split.add_argument("--split", type=Path, help="CSV instead: path,fold (tested in), or path,part (train, val, test)")
    split.add_argument("--test-fraction", type=float, help="one split instead: share to test on, up to 0.5")
    parser.add_argument(
        "--few-shot", type=positive_int, nargs="+", default=[], help="learn from this many cells a class too"
    )
    parser.add_argument("--repeats", type=positive_int, default=10, help="draws for each of --few-shot")
    parser.add_argument(
        "--seed", type=int, default=0, help="of all that is drawn: folds, few cells, intervals, untrained networks, sgd"
    )
    parser.add_argument(
        "--baseline",
        choices=("untrained", *BASELINES),
        nargs="+",
        default=[],
        help="evaluate these on the same split too: the same architecture untrained (with --checkpoint), colour "
        "histograms (HSV), raw 32x32 pixels",
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="for results and features; made if missing")


def check_evaluation_arguments(
    parser: argparse.ArgumentParser, args: argparse.Namespace, default_kinds: Sequence[str] = (DEFAULT_KIND,)
) -> None:
    """End the command if flags do not go together; set `args.kinds` if a network is to embed images.

    Args:
        parser: with `add_evaluation_arguments`.
        args: its result.
        default_kinds: of features to extract with --checkpoint, if neither --kinds nor --kind is given.
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
        for name in ("split", "test_fraction"):
            if getattr(args, name) is not None:
                flag = name.replace("_", "-")
                parser.error(f"--{flag} divides one set; give it with --data or with --features alone")
    if has_embedder(args):
        if args.kinds is None:
            default_kinds = default_kinds if args.checkpoint else (DEFAULT_KIND,)
            args.kinds = list(default_kinds) if args.kind is None else [args.kind]
        if args.kind is not None and args.kind not in args.kinds:
            parser.error(f"--kind {args.kind} is not among --kinds {' '.join(args.kinds)}; add it there")


# --- cells and features ----------------------------------------------------------------------------------------------


def load_evaluation_set(args: argparse.Namespace, with_all_kinds: bool = False) -> EvaluationSet:
    """Read or extract the features that the flags name, and split their cells.

    Mistakes in lists and splits are reported before images are embedded.

    Args:
        args: after `check_evaluation_arguments`.
        with_all_kinds: load all kinds of features, unless `args.kind` names one.

    Raises:
        FileNotFoundError, ValueError: for unusable lists, features files, splits and copies; if two files are of two
            networks, features are infinite or NaN, an image is listed twice, all cells are of one class, or a given
            split does not fit the cells.
    """
    embedder = None
    if has_embedder(args):
        listed = _listed_sets(args)
        _make_split(args, _concatenate_lists(listed), len(listed[0]))
        embedder = embedder_from(args)
        names = ["features"] if len(listed) == 1 else ["features_train", "features_test"]
        sets = [
            embedder.features_of(cells, args.output_dir / f"{name}.h5", args.overwrite)
            for cells, name in zip(listed, names, strict=True)
        ]
        sets = [_select_kinds(args, features, with_all_kinds) for features in sets]
    else:
        sets = _stored_sets(args, with_all_kinds)
    n_first = len(sets[0])
    cells = sets[0] if len(sets) == 1 else join(*sets)
    del sets  # after joining they are a second copy of the features
    split = _make_split(args, cells, n_first)
    folds, copies = without_copies(cells.paths, split.folds)
    description = describe_folds(cells.labels, folds, cells.class_names)
    not_learned = description["not_learned_in"]
    if not_learned and (args.split or args.test or args.test_features):
        name, numbers = next(iter(not_learned.items()))
        raise ValueError(
            f"split: {len(not_learned)} classes are tested without a training cell, for instance {name!r} in fold "
            f"{numbers[0]}; give each such class training cells, or leave its cells out"
        )
    log_fold_problems(description)
    kinds = {cells.kind: cells.features, **cells.others}
    sources = {"model": kinds}
    for name in args.baseline:
        sources[name] = baseline_features(name, cells.paths, embedder, args.seed, list(kinds))
    return EvaluationSet(
        cells, split, folds, copies, description, sources, args.seed, device_of(args), input_hashes(args)
    )


def input_hashes(args: argparse.Namespace) -> dict[str, str]:
    """Return {flag: sha256} of the input files; folders of images have none."""
    paths = {name: getattr(args, name) for name in (*SOURCES, "split")}
    return {name: file_sha256(path) for name, path in paths.items() if path is not None and path.is_file()}


def _listed_sets(args: argparse.Namespace) -> list[LabelledCells]:
    """Return the training and the test set, or the one set to split, of images to embed."""
    if args.data is not None:
        return [LabelledCells.from_path(args.data)]
    train = LabelledCells.from_path(args.train)
    return [train, LabelledCells.from_path(args.test, class_names=train.class_names)]


def _concatenate_lists(sets: Sequence[LabelledCells]) -> LabelledCells:
    """Return one list of all cells, with the paths that their features will have."""
    known = [cells.patients for cells in sets if cells.patients is not None]
    return LabelledCells(
        paths=[Path(os.path.abspath(path)) for cells in sets for path in cells.paths],
        labels=np.concatenate([cells.labels for cells in sets]),
        class_names=sets[0].class_names,
        patients=sum(known, []) if len(known) == len(sets) else None,
    )


def _stored_sets(args: argparse.Namespace, with_all_kinds: bool) -> list[Features]:
    """Read the training and the test set, or the one set to split, from features files."""
    sets = []
    for file in filter(None, (args.features, args.test_features)):
        features = _select_kinds(args, read_features(file), with_all_kinds)
        check_finite(features, file)
        sets.append(features)
    if len(sets) == 2:
        check_same_network(*sets)
        sets[1] = align_classes(sets[1], sets[0].class_names)
    return sets


def _select_kinds(args: argparse.Namespace, features: Features, with_all_kinds: bool) -> Features:
    """Keep the kind that --kind names or else the main one, or all kinds (of --kinds, if that is given)."""
    if args.kind is None and with_all_kinds:
        others = {kind: values for kind, values in features.others.items() if args.kinds is None or kind in args.kinds}
        return replace(features, others=others)
    return replace(features.of_kind(args.kind or features.kind), others={})


def _make_split(args: argparse.Namespace, cells: Features | LabelledCells, n_first: int) -> Split:
    """Make or read the split.

    Args:
        args: with `folds`, `split` and `test_fraction`.
        cells: all cells.
        n_first: size of the training set, or of the one set.

    Raises:
        ValueError: if an image is listed twice, all cells are of one class, a split file puts a patient on two sides,
            and as `make_folds`, `read_split` and `split_cells`.
    """
    paths, labels, patients = list(map(str, cells.paths)), cells.labels, cells.patients
    if len(set(paths)) < len(paths):
        twice = next(path for path, n in Counter(paths).items() if n > 1)
        raise ValueError(f"cells: the image {twice!r} is listed twice; list each once, on one side")
    if len(set(labels.tolist())) < 2:
        raise ValueError(
            f"labels: all {len(labels)} cells are of class {cells.class_names[labels[0]]!r}; two classes or more are "
            f"needed"
        )
    if n_first < len(paths):
        return Split([(np.arange(n_first), np.arange(n_first, len(paths)))])
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

    Args:
        name: "untrained" or one of `BASELINES`.
        images: N image files.
        embedder: for "untrained": the architecture, and how to embed.
        seed: of the untrained network.
        kinds: of the untrained network's features; other baselines have one kind with their own name.

    Raises:
        ValueError: if an image cannot be read any more.
    """
    logger.info("baseline %s", name)
    paths = [Path(path) for path in images]
    if name != "untrained":
        return {name: BASELINES[name](paths)}
    assert embedder is not None, "check_evaluation_arguments asks for a checkpoint"
    extraction = embedder.extract(paths, untrained_backbone(embedder.file, embedder.image_size, seed))
    if extraction.unreadable:
        raise ValueError(
            f"--baseline untrained: {len(extraction.unreadable)} images can no longer be read, for instance "
            f"{next(iter(extraction.unreadable))}; put them back, or extract again with --overwrite"
        )
    return {kind: extraction.by_kind[kind] for kind in kinds}

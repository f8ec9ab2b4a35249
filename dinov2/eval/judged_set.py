"""The cells that a command judges features by: its flags, the split, and what else is judged on the same split.

Split. `--folds` stratified folds of one set, by whole patients where the set names them; a split file; one stratified
split (`--test-fraction`); or two sets. The same set, seed and flags give every method the same split. Training pictures
whose bytes a test picture has are dropped and counted. A split file with a patient on two sides, and a split file or
two sets with a class that is tested and not learned, are errors; folds made here that cannot avoid the latter (a class
of one patient) are reported.

Letters: N cells, D numbers a cell
"""

import argparse
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

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
from dinov2.eval.cell_sets import (
    add_baseline_argument,
    add_source_arguments,
    baseline_features,
    embedded_sets,
    join,
    judged_kinds,
    listed_sets,
    stored_sets,
    without_copies,
    wrong_combination,
)
from dinov2.eval.extract_features import add_embedder_arguments, embedder_from, has_embedder, positive_int
from dinov2.eval.features import DEFAULT_KIND, Features

logger = logging.getLogger("dinov2")

N_FOLDS = 5


@dataclass(frozen=True, eq=False)
class JudgedSet:
    """N labelled cells, who of them is tested when, and the features to judge.

    Attributes:
        cells: all of them, training sets first.
        split: as it was given or made.
        folds: training and test positions each, without copies of test pictures in training.
        copies: counts of these, as `without_copies` tells them.
        description: `describe_folds` of `folds`.
        sources: {"model" or a baseline: {kind: [N, D]}}; the first kind is what methods for one kind take.
    """

    cells: Features
    split: Split
    folds: list[Fold]
    copies: dict[str, int]
    description: dict[str, Any]
    sources: dict[str, dict[str, np.ndarray]]

    @property
    def main_features(self) -> dict[str, np.ndarray]:
        """{source: [N, D] of its first kind}."""
        return {name: next(iter(of_kinds.values())) for name, of_kinds in self.sources.items()}

    @cached_property
    def patients_kept_apart(self) -> bool | None:
        """Whether no patient is on both sides of a fold; None where patients are unknown."""
        if self.cells.patients is None:
            return None
        of_cells = np.asarray(self.cells.patients)
        shared = [np.intersect1d(of_cells[train], of_cells[test]) for train, test in self.folds]
        if n_shared := len(np.unique(np.concatenate(shared))):
            logger.warning("%d patients have cells in both train and test", n_shared)
        return not n_shared


def add_judging_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is judged, by which cells, and where results go; `complete_arguments` checks them."""
    add_embedder_arguments(parser, checkpoint_required=False)
    parser.set_defaults(kinds=None)  # what is extracted depends on what is judged
    add_source_arguments(parser)
    parser.add_argument("--kind", help="of the features to judge (see --kinds); without it the file's first one")
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
    add_baseline_argument(parser)
    parser.add_argument("--output-dir", type=Path, required=True, help="for results and features; made if missing")


def complete_arguments(
    parser: argparse.ArgumentParser, args: argparse.Namespace, default_kinds: Sequence[str] = (DEFAULT_KIND,)
) -> None:
    """End the command if flags do not go together; set `args.kinds` where a network is to embed pictures.

    Args:
        parser: with `add_judging_arguments`.
        args: what it found.
        default_kinds: of features to extract with --checkpoint, where neither --kinds nor --kind says so.
    """
    if problem := wrong_combination(args):
        parser.error(problem)
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


def load_judged_set(args: argparse.Namespace, with_all_kinds: bool = False) -> JudgedSet:
    """What the flags say, with pictures embedded where a network is given.

    Mistakes in lists and splits show before pictures are embedded.

    Args:
        args: of a command with `add_judging_arguments`, after `complete_arguments`.
        with_all_kinds: judge all kinds of features that there are, unless `args.kind` names one.

    Raises:
        FileNotFoundError, ValueError: as `LabelledCells.from_path`, `read_features`, `make_folds`, `read_split` and
            `without_copies`; if two files are of two networks, features are infinite or NaN, a picture is listed
            twice, all cells are of one class, or a split that was given does not fit the cells.
    """
    if has_embedder(args):
        listed = listed_sets(args)
        _split_of(args, _listed_together(listed), len(listed[0]))
        embedder = embedder_from(args)
        sets = [judged_kinds(args, found, with_all_kinds) for found in embedded_sets(args, embedder, listed)]
    else:
        embedder = None
        sets = stored_sets(args, with_all_kinds)
    n_first = len(sets[0])
    cells = sets[0] if len(sets) == 1 else join(*sets)
    del sets  # joined, the features are there a second time
    split = _split_of(args, cells, n_first)
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
    return JudgedSet(cells, split, folds, copies, description, sources)


def _listed_together(sets: Sequence[LabelledCells]) -> LabelledCells:
    """One list of all cells, with the paths that their features will have."""
    known = [cells.patients for cells in sets if cells.patients is not None]
    return LabelledCells(
        paths=[Path(os.path.abspath(path)) for cells in sets for path in cells.paths],
        labels=np.concatenate([cells.labels for cells in sets]),
        class_names=sets[0].class_names,
        patients=sum(known, []) if len(known) == len(sets) else None,
    )


def _split_of(args: argparse.Namespace, cells: Features | LabelledCells, n_first: int) -> Split:
    """Who is tested when.

    Args:
        args: with `folds`, `split` and `test_fraction`.
        cells: all cells.
        n_first: those of the training set, or all of the one set.

    Raises:
        ValueError: if a picture stands twice, all cells are of one class, a split file puts a patient on two sides,
            and as `make_folds`, `read_split` and `split_cells`.
    """
    paths, labels, patients = list(map(str, cells.paths)), cells.labels, cells.patients
    if len(set(paths)) < len(paths):
        twice = next(path for path, n in Counter(paths).items() if n > 1)
        raise ValueError(f"cells: the picture {twice!r} is listed twice; list each once, on one side")
    if len(set(labels.tolist())) < 2:
        raise ValueError(
            f"labels: all {len(labels)} cells are of class {cells.class_names[labels[0]]!r}; to tell classes apart "
            f"takes two or more"
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

"""Labelled cells that a command learns from and is judged by: flags that name them, their features, copies among them.

Letters: N cells
"""

import argparse
import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.data.splits import Fold
from dinov2.eval.extract_features import CELLS_HELP
from dinov2.eval.features import Features, read_features
from dinov2.eval.features.baselines import BASELINES
from dinov2.eval.features.extract import Embedder
from dinov2.hub.backbones import file_sha256, untrained_backbone

logger = logging.getLogger("dinov2")

# what two sets must have in common for a distance or a product between them to mean anything
NETWORK_ATTRIBUTES = ("checkpoint_sha256", "transform")
NETWORKS = ("checkpoint", "encoder")
SOURCES = ("train", "test", "data", "features", "test_features")


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say where labelled cells or their features are, beside `add_embedder_arguments`."""
    parser.add_argument("--train", type=Path, help=f"cells to learn from: {CELLS_HELP}")
    parser.add_argument("--test", type=Path, help="cells to classify, likewise")
    parser.add_argument("--data", type=Path, help="one set to split into both, likewise")
    parser.add_argument("--features", type=Path, help="a features.h5: the training set, or one set to split")
    parser.add_argument("--test-features", type=Path, help="a features.h5 from the same network: the test set")


def add_baseline_argument(parser: argparse.ArgumentParser) -> None:
    """The flag that says what to compare with."""
    parser.add_argument(
        "--baseline",
        choices=("untrained", *BASELINES),
        nargs="+",
        default=[],
        help="judge these on the same split too: the same architecture untrained (with --checkpoint), colour "
        "histograms (HSV), raw 32x32 pixels",
    )


def wrong_combination(args: argparse.Namespace) -> str:
    """What is wrong with the sources that were given, or ""."""
    networks, sources = ({name for name in names if getattr(args, name)} for names in (NETWORKS, SOURCES))
    allowed = ({"train", "test"}, {"data"}) if networks else ({"features", "test_features"}, {"features"})
    if sources not in allowed:
        flags = ["--" + name.replace("_", "-") for name in sorted(networks | sources)]
        return (
            f"got {' '.join(flags) or 'no cells'}; give --checkpoint (or --encoder) with --train --test or with "
            f"--data, or --features --test-features, or --features"
        )
    if "untrained" in args.baseline and not args.checkpoint:
        return "--baseline untrained needs --checkpoint, which says what architecture to build"
    return ""


def listed_sets(args: argparse.Namespace) -> list[LabelledCells]:
    """The training and the test set, or the one set to split, of pictures that a network is to embed.

    Raises:
        FileNotFoundError, ValueError: as `LabelledCells.from_path`.
    """
    if args.data is not None:
        return [LabelledCells.from_path(args.data)]
    train = LabelledCells.from_path(args.train)
    return [train, LabelledCells.from_path(args.test, class_names=train.class_names)]


def embedded_sets(args: argparse.Namespace, embedder: Embedder, listed: Sequence[LabelledCells]) -> list[Features]:
    """Features of `listed_sets`, from the output folder if they are there.

    Raises:
        FileNotFoundError, ValueError: as `Embedder.features_of`.
    """
    names = ["features"] if len(listed) == 1 else ["features_train", "features_test"]
    return [
        embedder.features_of(cells, args.output_dir / f"{name}.h5", args.overwrite)
        for cells, name in zip(listed, names, strict=True)
    ]


def stored_sets(args: argparse.Namespace, with_all_kinds: bool = False) -> list[Features]:
    """The training and the test set, or the one set to split, of features files.

    Args:
        args: with `features`, `test_features` and `kind`.
        with_all_kinds: as for `judged_kinds`.

    Raises:
        FileNotFoundError, ValueError: as `read_features`, `judged_kinds` and the checks below.
    """
    sets = []
    for file in filter(None, (args.features, args.test_features)):
        found = judged_kinds(args, read_features(file), with_all_kinds)
        check_finite(found, file)
        sets.append(found)
    if len(sets) == 2:
        check_same_network(*sets)
        sets[1] = align_classes(sets[1], sets[0].class_names)
    return sets


def judged_kinds(args: argparse.Namespace, features: Features, with_all_kinds: bool = False) -> Features:
    """The kind that --kind names, or else the main one, alone or `with_all_kinds` (of --kinds, where that is given).

    Raises:
        ValueError: as `Features.of_kind`.
    """
    if args.kind is None and with_all_kinds:
        others = {kind: values for kind, values in features.others.items() if args.kinds is None or kind in args.kinds}
        return replace(features, others=others)
    return replace(features.of_kind(args.kind or features.kind), others={})


def check_finite(features: Features, source: Path) -> None:
    """Refuse features that are infinite or NaN, naming the file they are from."""
    for of_kind in (features.features, *features.others.values()):
        is_finite = np.isfinite(of_kind).all(axis=1)
        if not is_finite.all():
            example = features.paths[int(np.argmin(is_finite))]
            raise ValueError(
                f"features: {int((~is_finite).sum())} of {len(features)} in {str(source)!r} are infinite or NaN, for "
                f"instance those of {example!r}; extract again, with weights that did not diverge"
            )


def check_same_network(train: Features, test: Features) -> None:
    """Refuse features of two networks, or of one network that saw its pictures in two ways."""
    for name in NETWORK_ATTRIBUTES:
        if train.attributes.get(name) != test.attributes.get(name):
            raise ValueError(
                f"--features and --test-features: {name} differs, {train.attributes.get(name)!r} and "
                f"{test.attributes.get(name)!r}; extract both with one checkpoint and one image size"
            )
    if train.kind != test.kind:
        raise ValueError(
            f"--features and --test-features: features are {train.kind!r} in one and {test.kind!r} in the other; "
            f"choose a kind that both have (--kind), or extract both with the same --kinds"
        )
    dims = train.features.shape[1], test.features.shape[1]
    if dims[0] != dims[1]:
        raise ValueError(
            f"--features and --test-features: {dims[0]} and {dims[1]} numbers a cell; extract both with one checkpoint"
        )


def align_classes(features: Features, class_names: list[str]) -> Features:
    """The same features with labels that count in `class_names`.

    Raises:
        ValueError: if a cell's class is not among them.
    """
    unknown = sorted({features.class_names[i] for i in features.labels} - set(class_names))
    if unknown:
        raise ValueError(
            f"test features: classes {', '.join(map(repr, unknown))} are not among the training set's "
            f"{', '.join(map(repr, class_names))}; extract both from sets with the same class names"
        )
    new_ids = np.array([class_names.index(name) if name in class_names else -1 for name in features.class_names])
    return replace(features, labels=new_ids[features.labels], class_names=class_names)


def join(train: Features, test: Features) -> Features:
    """Both sets as one, the training set first; patients and further kinds of features only where both sets have them.

    Args:
        train: with the attributes and classes of both.
        test: of the same network, with the same classes (`check_same_network`, `align_classes`).
    """
    patients = None if train.patients is None or test.patients is None else train.patients + test.patients
    if patients is None and (train.patients is not None or test.patients is not None):
        logger.warning("patients are known of one of the two sets only and not used")
    return replace(
        train,
        features=np.concatenate([train.features, test.features]),
        labels=np.concatenate([train.labels, test.labels]),
        paths=train.paths + test.paths,
        patients=patients,
        unreadable=list(dict.fromkeys(train.unreadable + test.unreadable)),
        others={
            kind: np.concatenate([values, test.others[kind]])
            for kind, values in train.others.items()
            if kind in test.others
        },
    )


def without_copies(paths: Sequence[str], folds: Sequence[Fold]) -> tuple[list[Fold], dict[str, int]]:
    """Drop from each fold's training side the pictures whose bytes its test side has too.

    Args:
        paths: N picture files.
        folds: training and test positions each.

    Returns:
        the folds, and counts: `dropped_identical_bytes` (pictures that some fold cannot train on) and `not_checked`
        (pictures that are not on this disk).

    Raises:
        ValueError: if a picture file is on both sides of a fold, or none is left to train on.
    """
    files = [os.path.realpath(path) for path in paths]
    for train, test in folds:
        both = {files[i] for i in train} & {files[i] for i in test}
        if both:
            raise ValueError(
                f"train and test share {len(both)} picture files, for instance {', '.join(sorted(both)[:3])}; "
                f"remove them from one of the two (a picture listed twice can also fall on both sides of a split)"
            )
    contents, n_unchecked = _contents(paths, folds)
    dropped: set[int] = set()
    kept_folds = []
    for train, test in folds:
        tested = set(contents[test].tolist())
        is_copy = np.array([content in tested for content in contents[train].tolist()], dtype=bool)
        dropped |= set(train[is_copy].tolist())
        if is_copy.all():
            raise ValueError("train: every picture is a copy of a test picture; give a test set of other cells")
        kept_folds.append((train[~is_copy], test))
    if dropped:
        logger.warning("%d training pictures are byte-equal to test pictures and dropped from training", len(dropped))
    if n_unchecked:
        logger.warning("%d pictures are not on this disk: whether train and test share copies is unknown", n_unchecked)
    return kept_folds, {"dropped_identical_bytes": len(dropped), "not_checked": n_unchecked}


def _contents(paths: Sequence[str], folds: Sequence[Fold]) -> tuple[np.ndarray, int]:
    """A number for each picture, the same on both sides of a fold where the bytes are the same: int64 [N]; and how many
    pictures are not on this disk."""
    sides = np.zeros((2, len(folds), len(paths)), dtype=bool)
    for number, fold in enumerate(folds):
        for side, positions in enumerate(fold):
            sides[side, number, positions] = True
    by_size: dict[int, list[int]] = defaultdict(list)
    n_unchecked = 0
    for i, path in enumerate(paths):
        try:
            by_size[os.path.getsize(path)].append(i)
        except OSError:
            n_unchecked += 1
    contents = np.arange(len(paths))
    for alike in by_size.values():  # only files of one size can be equal
        if sides[:, :, alike].any(axis=2).all(axis=0).any():  # and only across the sides of a fold it matters
            first: dict[str, int] = {}
            for i in alike:
                contents[i] = first.setdefault(file_sha256(paths[i]), i)
    return contents, n_unchecked


def baseline_features(
    name: str, cells: Sequence[str], embedder: Embedder | None, seed: int, kinds: Sequence[str]
) -> dict[str, np.ndarray]:
    """Other features of the same cells: {kind: float32 [N, D]}.

    Args:
        name: "untrained" or one of `BASELINES`.
        cells: N picture files.
        embedder: tells the architecture and how to embed; needed by "untrained" alone.
        seed: of the untrained network.
        kinds: of the untrained network's features; the others have one kind, of their name.

    Raises:
        ValueError: if a picture can no longer be read.
    """
    logger.info("baseline %s", name)
    paths = [Path(path) for path in cells]
    if name != "untrained":
        return {name: BASELINES[name](paths)}
    assert embedder is not None, "wrong_combination asks for a checkpoint"
    extraction = embedder.extract(paths, untrained_backbone(embedder.file, embedder.image_size, seed))
    if extraction.unreadable:
        raise ValueError(
            f"--baseline untrained: {len(extraction.unreadable)} pictures can no longer be read, for instance "
            f"{next(iter(extraction.unreadable))}; put them back, or extract again with --overwrite"
        )
    return {kind: extraction.by_kind[kind] for kind in kinds}


def input_hashes(args: argparse.Namespace) -> dict[str, str]:
    """{flag: sha256} of the files among the sources; folders of pictures have none."""
    given: dict[str, Any] = {name: getattr(args, name, None) for name in (*SOURCES, "split", "patient_labels")}
    return {name: file_sha256(path) for name, path in given.items() if path is not None and path.is_file()}

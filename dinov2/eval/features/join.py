"""Features of two sets: checked to be finite and of one network, their classes aligned, and joined."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from dinov2.eval.features.store import Features

logger = logging.getLogger("dinov2")

# attributes that two sets must share, or distances between their features mean nothing
NETWORK_ATTRIBUTES = ("checkpoint_sha256", "transform")


def check_finite(features: Features, source: Path) -> None:
    """Raise ValueError with the name of the file if features are infinite or NaN."""
    for values in (features.features, *features.others.values()):
        is_finite = np.isfinite(values).all(axis=1)
        if not is_finite.all():
            example = features.paths[int(np.argmin(is_finite))]
            raise ValueError(
                f"features: {int((~is_finite).sum())} of {len(features)} in {str(source)!r} are infinite or NaN, for "
                f"instance those of {example!r}; extract again, with weights that did not diverge"
            )


def check_same_network(train: Features, test: Features) -> None:
    """Raise ValueError if features are of two networks, kinds, sizes or image transforms."""
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
    """Return the features with labels that are positions in `class_names`.

    Raises:
        ValueError: if the class of a cell is not among them.
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
    """Join two sets of one network and the same classes, the training set first, with the attributes of the first.

    Patients and further kinds of features are kept if both sets have them.
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

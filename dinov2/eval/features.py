"""From pictures to features: extracted once per checkpoint, kept in one file, read by every protocol.

A feature is the backbone's CLS token after its last norm (`x_norm_clstoken`). The network sees the picture with its
shorter side scaled to the image size and the centre kept, normalised with the ImageNet statistics; nothing is random.

Dimension key:  B pictures in a batch, N pictures, D embedding dim, S image side in pixels
"""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2.data.datasets.cells import LabelledCells
from dinov2.data.datasets.decode import UnreadableImageError, load_image, resize_image
from dinov2.data.transforms import normalize_images
from dinov2.hub.backbones import (
    PathLike,
    checkpoint_file,
    describe_backbone,
    file_sha256,
    load_backbone,
    trained_image_size,
)
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.files import atomic_write

logger = logging.getLogger("dinov2")

Precision = Literal["fp32", "bf16"]
SECONDS_BETWEEN_REPORTS = 10.0
N_EXAMPLES = 5
DEFAULT_IMAGE_SIZE = 224


@torch.no_grad()
def embed_images(model: DinoVisionTransformer, images: Tensor, precision: Precision = "fp32") -> Tensor:
    """The features of one batch.

    Args:
        model: in eval mode.
        images: uint8 [B, 3, S, S], on the model's device.
        precision: "bf16" runs the network under autocast.

    Returns:
        float32 [B, D], on the model's device.

    Raises:
        ValueError: for an unknown precision.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision: {precision!r} is unknown; choose one of {', '.join(get_args(Precision))}")
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        features = model.forward_features(normalize_images(images))
    return features["x_norm_clstoken"].float()


@dataclass(frozen=True)
class Extraction:
    """What `extract` found.

    Attributes:
        features: float32 [n_kept, D].
        kept: int64 [n_kept], which of the pictures these are, ascending.
        unreadable: {path: reason} of all others.
    """

    features: np.ndarray
    kept: np.ndarray
    unreadable: dict[str, str]


def extract(
    model: DinoVisionTransformer,
    paths: Sequence[Path],
    image_size: int = 224,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    num_workers: int = 0,
    precision: Precision = "fp32",
    progress: bool = True,
) -> Extraction:
    """Embed picture files in their order; unreadable ones are left out, counted and named in the log.

    Args:
        model: as for `embed_images`; it is moved to `device`.
        paths: N picture files.
        image_size: S.
        batch_size: pictures in one forward.
        device: where the network runs.
        num_workers: processes that decode; 0 decodes in this one.
        precision: "fp32" or "bf16".
        progress: log speed and remaining time every ten seconds.

    Raises:
        ValueError: if no picture could be read, or features came out infinite or NaN.
    """
    model = model.to(device).eval()
    is_cuda = torch.device(device).type == "cuda"
    loader: DataLoader[Any] = DataLoader(
        _Pictures(paths, image_size),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=is_cuda,
    )
    features: list[Tensor] = []
    kept: list[int] = []
    unreadable: dict[str, str] = {}
    report = _Progress(len(paths)) if progress else None
    for images, indices, failures in loader:
        if indices:
            features.append(embed_images(model, images.to(device, non_blocking=True), precision).cpu())  # [B, D]
        kept += indices
        unreadable |= failures
        if report:
            report.advance(len(indices) + len(failures))
    if unreadable:
        examples = "; ".join(f"{path}: {reason}" for path, reason in list(unreadable.items())[:N_EXAMPLES])
        logger.warning("%d of %d pictures are unreadable and left out: %s", len(unreadable), len(paths), examples)
    if not features:
        raise ValueError(f"pictures: none of the {len(paths)} could be read; the log gives reasons")
    stacked = torch.cat(features).numpy()  # [n_kept, D]
    n_bad = int((~np.isfinite(stacked).all(axis=1)).sum())
    if n_bad:
        raise ValueError(
            f"features: {n_bad} of {len(stacked)} are infinite or NaN; the weights are broken (did the run diverge?)"
        )
    return Extraction(stacked, np.array(kept, dtype=np.int64), unreadable)


class _Pictures(Dataset[tuple[int, Tensor | None, str, str]]):
    """(index, uint8 [3, S, S] or None, path, why it is unreadable or "")."""

    def __init__(self, paths: Sequence[Path], image_size: int) -> None:
        self.paths = paths
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str, str]:
        path = os.fspath(self.paths[index])
        try:
            return index, resize_image(load_image(path), self.image_size, fit="crop"), path, ""
        except UnreadableImageError as error:
            return index, None, path, error.reason


def _collate(items: list[tuple[int, Tensor | None, str, str]]) -> tuple[Tensor, list[int], dict[str, str]]:
    """Readable pictures [B, 3, S, S] with their indices, and {path: reason} of the others."""
    images = [image for _, image, _, _ in items if image is not None]
    indices = [index for index, image, _, _ in items if image is not None]
    failures = {path: reason for _, image, path, reason in items if image is None}
    return torch.stack(images) if images else torch.empty(0), indices, failures


class _Progress:
    """Log lines like `embedded 1,200 of 5,000 pictures, 95.2 a second, 40 s to go`, ten seconds apart or more."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.start = self.last_report = time.monotonic()

    def advance(self, n: int) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.last_report < SECONDS_BETWEEN_REPORTS and self.done < self.total:
            return
        self.last_report = now
        rate = self.done / max(now - self.start, 1e-9)
        logger.info(
            "embedded %s of %s pictures, %.1f a second, %.0f s to go",
            f"{self.done:,}",
            f"{self.total:,}",
            rate,
            (self.total - self.done) / rate,
        )


@dataclass(frozen=True)
class Features:
    """Features of labelled cells, as they stand in a features file.

    Attributes:
        features: float32 [N, D].
        labels: int64 [N], positions in `class_names`.
        class_names: of all classes, also of those without a cell here.
        paths: N picture files, absolute.
        patients: N patient ids, or None where the source names none.
        unreadable: pictures of the source that have no features here.
        attributes: where the features are from: `model`, `checkpoint`, `checkpoint_sha256`, `transform`, `precision`,
            `date`.
    """

    features: np.ndarray
    labels: np.ndarray
    class_names: list[str]
    paths: list[str]
    patients: list[str] | None = None
    unreadable: list[str] = field(default_factory=list)
    attributes: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, rows: np.ndarray) -> "Features":
        """The features of some cells: integer positions or a mask [N]."""
        positions = np.arange(len(self))[rows].tolist()
        return Features(
            features=self.features[positions],
            labels=self.labels[positions],
            class_names=self.class_names,
            paths=[self.paths[i] for i in positions],
            patients=[self.patients[i] for i in positions] if self.patients is not None else None,
            unreadable=self.unreadable,
            attributes=self.attributes,
        )


def write_features(path: PathLike, features: Features) -> None:
    """Write an .h5 file with the datasets `features`, `labels`, `class_names`, `paths`, `patients` (if there are any)
    and `unreadable`, and the attributes; `path` appears when the file is complete."""
    text = h5py.string_dtype()
    with atomic_write(path, "w+b") as stream, h5py.File(stream, "w") as file:
        file["features"] = features.features.astype(np.float32)
        file["labels"] = features.labels.astype(np.int64)
        for name in ("class_names", "paths", "patients", "unreadable"):
            values = getattr(features, name)
            if values is not None:
                file.create_dataset(name, data=np.array(values, dtype=object), dtype=text)
        file.attrs.update(features.attributes)


def read_features(path: PathLike) -> Features:
    """Read what `write_features` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file, is damaged, or its parts do not fit together.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"features: no file {str(path)!r}; dinov2/eval/extract_features.py writes one")
    try:
        with h5py.File(path, "r") as file:
            missing = [name for name in ("features", "labels", "class_names", "paths") if name not in file]
            if missing:
                raise ValueError(
                    f"features: {str(path)!r} has no dataset {', '.join(missing)}; "
                    f"dinov2/eval/extract_features.py writes a file that has"
                )
            texts = {
                name: file[name].asstr()[:].tolist()
                for name in ("class_names", "paths", "patients", "unreadable")
                if name in file
            }
            found = Features(
                features=file["features"][:].astype(np.float32),
                labels=file["labels"][:].astype(np.int64),
                class_names=texts["class_names"],
                paths=texts["paths"],
                patients=texts.get("patients"),
                unreadable=texts.get("unreadable", []),
                attributes={name: str(value) for name, value in file.attrs.items()},
            )
    except (OSError, RuntimeError) as error:  # h5py's, for files of another kind and for broken parts
        raise ValueError(
            f"features: {str(path)!r} is not an HDF5 file or is damaged ({error}); extract again"
        ) from error
    lengths = {name: len(getattr(found, name)) for name in ("features", "labels", "paths")}
    if found.patients is not None:
        lengths["patients"] = len(found.patients)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"features: {str(path)!r} has parts of different lengths {lengths}; extract again")
    n_classes = len(found.class_names)
    if found.features.ndim != 2 or not len(found) or not 0 <= found.labels.min() <= found.labels.max() < n_classes:
        raise ValueError(
            f"features: {str(path)!r} has features of shape {list(found.features.shape)} and labels that should be "
            f"positions among {n_classes} class names; extract again"
        )
    return found


@dataclass
class Embedder:
    """A checkpoint, and the settings that the features of a picture depend on.

    Attributes:
        checkpoint: a file or run's folder, as `load_backbone` takes it.
        image_size: S; 0 takes that of the training run where the file tells it, and 224 otherwise.
        precision: "fp32" or "bf16".
        device, batch_size, num_workers: as for `extract`; they change speed alone.
    """

    checkpoint: PathLike
    image_size: int = 0
    precision: Precision = "fp32"
    device: str = "cpu"
    batch_size: int = 64
    num_workers: int = 0

    def __post_init__(self) -> None:
        if not self.image_size:
            self.image_size = trained_image_size(self.file) or DEFAULT_IMAGE_SIZE

    @cached_property
    def file(self) -> Path:
        """The file with the weights."""
        return checkpoint_file(self.checkpoint)

    @cached_property
    def sha256(self) -> str:
        """Of the file."""
        return file_sha256(self.file)

    @cached_property
    def model(self) -> DinoVisionTransformer:
        """The backbone, read when it is first asked for: features that are on disk need none."""
        return load_backbone(self.file, self.image_size)

    @property
    def transform(self) -> str:
        """What happens to a picture before the network, in words that differ when it differs."""
        return f"RGB, shorter side to {self.image_size} px (Lanczos), centre crop, ImageNet mean and std"

    def extract(self, paths: Sequence[Path], model: DinoVisionTransformer | None = None) -> Extraction:
        """`extract` with these settings, by this backbone or by another one."""
        return extract(
            self.model if model is None else model,
            paths,
            image_size=self.image_size,
            batch_size=self.batch_size,
            device=self.device,
            num_workers=self.num_workers,
            precision=self.precision,
        )

    def features_of(self, cells: LabelledCells, file: Path, overwrite: bool = False) -> Features:
        """Features of labelled cells, from `file` if it holds just these, else extracted and written there.

        Raises:
            ValueError: if `file` holds features of another checkpoint, transform or list of cells, and `overwrite` is
                False.
        """
        if file.exists() and not overwrite:
            stored = read_features(file)
            differences = list(self._differences(stored, cells))
            if differences:
                raise ValueError(
                    f"features: {str(file)!r} holds other features than asked for ({'; '.join(differences)}); "
                    f"pass --overwrite to replace them, or another --output-dir"
                )
            logger.info("features of %d cells are in %s already", len(stored), file)
            return stored
        extraction = self.extract(cells.paths)
        features = Features(
            features=extraction.features,
            labels=cells.labels[extraction.kept],
            class_names=cells.class_names,
            paths=[os.path.abspath(cells.paths[i]) for i in extraction.kept],
            patients=[cells.patients[i] for i in extraction.kept] if cells.patients is not None else None,
            unreadable=[os.path.abspath(path) for path in extraction.unreadable],
            attributes={
                "model": describe_backbone(self.model),
                "checkpoint": os.path.abspath(self.file),
                "checkpoint_sha256": self.sha256,
                "transform": self.transform,
                "precision": self.precision,
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            },
        )
        write_features(file, features)
        logger.info("wrote features of %d cells to %s", len(features), file)
        return features

    def _differences(self, stored: Features, cells: LabelledCells) -> Iterator[str]:
        wanted = {"checkpoint_sha256": self.sha256, "transform": self.transform, "precision": self.precision}
        for name, value in wanted.items():
            if stored.attributes.get(name) != value:
                yield f"{name} is {stored.attributes.get(name)!r} there and {value!r} here"
        paths, unreadable = [os.path.abspath(path) for path in cells.paths], set(stored.unreadable)
        kept = [i for i, path in enumerate(paths) if path not in unreadable]
        if [paths[i] for i in kept] != stored.paths or not unreadable.issubset(paths):
            n_there = len(stored) + len(unreadable)
            yield f"the pictures or their order differ: {n_there} there and {len(cells)} here"
        elif cells.class_names != stored.class_names or not np.array_equal(cells.labels[kept], stored.labels):
            yield "the labels differ"
        elif (None if cells.patients is None else [cells.patients[i] for i in kept]) != stored.patients:
            yield "the patients differ"

"""Extract features of image files: a batch, a list of files, or labelled cells into a features file.

`encoders` states what the features of an image depend on; nothing is random.

Dimension key:  B images in a batch, N images, D embedding dim, S image side in pixels
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.distributed import all_gather_objects, get_rank, get_world_size, on_main_process
from dinov2.eval.features.encoders import DinoEncoder, Encoder, Kind
from dinov2.eval.features.loop import (
    Extraction,
    ExtractOptions,
    Fp32Matmul,
    Precision,
    concatenate,
    embed_in_pieces,
    extract_ranges,
    part_ranges,
)
from dinov2.eval.features.named_encoders import build_encoder
from dinov2.eval.features.parts import Parts
from dinov2.eval.features.store import DEFAULT_KIND, PATCHES, Features, read_features, stored_kinds, write_features
from dinov2.hub.backbones import PathLike, checkpoint_file, file_sha256, load_backbone, trained_image_size
from dinov2.hub.transform import ImageTransform
from dinov2.models.vision_transformer import DinoVisionTransformer

__all__ = ["Embedder", "ExtractOptions", "Extraction", "Fp32Matmul", "Precision", "embed_images", "extract"]

logger = logging.getLogger("dinov2")

DEFAULT_IMAGE_SIZE = 224


def embed_images(
    model: DinoVisionTransformer | Encoder,
    images: Tensor,
    precision: Precision = "fp32",
    kind: str = DEFAULT_KIND,
    fp32_matmul: Fp32Matmul = "fast",
) -> Tensor:
    """Return the features of one batch.

    Args:
        model: in eval mode.
        images: stacked outputs of the encoder's preparation, on the model's device: uint8 [B, 3, S, S] for backbones.
        precision, kind, fp32_matmul: as in `ExtractOptions`.

    Returns:
        float32 [B, D], on the model's device.

    Raises:
        ValueError: as `ExtractOptions`, or for a kind that the model does not have.
    """
    options = ExtractOptions(kinds=[kind], precision=precision, fp32_matmul=fp32_matmul)
    encoder = _as_encoder(model, images.shape[-1])
    encoder.check(options.kinds)
    with options.arithmetic(images.device):
        outputs = embed_in_pieces(encoder, images, options.kinds)
    return torch.cat([output[kind] for output in outputs])


def extract(
    model: DinoVisionTransformer | Encoder, paths: Sequence[Path], image_size: int = DEFAULT_IMAGE_SIZE, **options: Any
) -> Extraction:
    """Extract the features of image files in their order; unreadable ones are left out, counted and logged.

    Args:
        model: a backbone, or an encoder; it is moved to the device.
        paths: N image files.
        image_size: S, for a backbone; an encoder has its own.
        options: fields of `ExtractOptions`: kinds, precision, device, batch_size, num_workers, ...

    Raises:
        ValueError: as `ExtractOptions`; or if no image is readable, features are infinite or NaN, or the model lacks a
            kind.
    """
    return _extract(_as_encoder(model, image_size), paths, ExtractOptions(**options))


def _as_encoder(model: DinoVisionTransformer | Encoder, image_size: int) -> Encoder:
    return model if isinstance(model, Encoder) else DinoEncoder(model, image_size)


def _extract(encoder: Encoder, paths: Sequence[Path], options: ExtractOptions) -> Extraction:
    ranges = part_ranges(len(paths), options.kinds)
    return concatenate(list(extract_ranges(encoder, paths, ranges, options)), ranges, options.kinds)


@dataclass
class Embedder(ExtractOptions):
    """An encoder and the options of an extraction; extracts labelled cells into files.

    Attributes:
        checkpoint: as for `load_backbone`: a file, a folder, a name or a URL; None for an encoder by name.
        image_size: S; 0: that of the training run if the file states it, else 224; or the named encoder's own.
        encoder_name, encoder_weights: as for `build_encoder`, in place of a checkpoint.

    Raises:
        ValueError: unless either checkpoint or encoder_name is given; for kinds that are unknown, repeated or begin
            with patch grids; and as `ExtractOptions` and `build_encoder`.
    """

    checkpoint: PathLike | None = None
    image_size: int = 0
    encoder_name: str = ""
    encoder_weights: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.checkpoint is None) == (not self.encoder_name):
            raise ValueError("one network is needed: give either --checkpoint or --encoder")
        if self.encoder_weights and not self.encoder_name:
            raise ValueError("--encoder-weights belongs to --encoder; weights of this project go with --checkpoint")
        kinds = [Kind.parse(kind) for kind in self.kinds]
        if not kinds or kinds[0].is_grid:
            raise ValueError(
                "--kinds: protocols take the first one, which must be a vector: put cls or another before patches"
            )
        if len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"--kinds: one is repeated in {' '.join(self.kinds)}; drop it")
        if self.checkpoint is None:
            self.image_size = self.encoder.image_size
        elif not self.image_size:
            self.image_size = trained_image_size(self.file) or DEFAULT_IMAGE_SIZE

    @cached_property
    def file(self) -> Path:
        """Return the file with the checkpoint's weights; ValueError for an encoder by name."""
        if self.checkpoint is None:
            raise ValueError(f"--encoder {self.encoder_name}: it is no checkpoint of this project; give --checkpoint")
        return checkpoint_file(self.checkpoint)

    @cached_property
    def encoder(self) -> Encoder:
        """Return the network; a checkpoint is loaded at the first call, as features on disk need none."""
        if self.checkpoint is None:
            return build_encoder(self.encoder_name, self.image_size, self.encoder_weights)
        return DinoEncoder(load_backbone(self.file, self.image_size), self.image_size, self.file)

    @cached_property
    def identity(self) -> dict[str, str]:
        """Return everything that the features of an image depend on."""
        if self.checkpoint is not None:
            sha256, transform = file_sha256(self.file), str(ImageTransform(self.image_size))
            return {"checkpoint_sha256": sha256, "transform": transform, "precision": self.precision}
        return {
            "model": self.encoder.description,  # two networks of a library may have the same tensors
            "checkpoint_sha256": self.encoder.sha256,
            "transform": self.encoder.transform,
            "precision": self.precision,
        }

    def extract(self, paths: Sequence[Path], model: DinoVisionTransformer | Encoder | None = None) -> Extraction:
        """Extract the features of image files with these options, by this network or by another one."""
        return _extract(self.encoder if model is None else _as_encoder(model, self.image_size), paths, self)

    def features_of(self, cells: LabelledCells, file: Path, overwrite: bool = False) -> Features:
        """Return the features of labelled cells: from `file` if it holds them, else extracted and written there.

        All processes of a group call this and share the work; the main one writes. Finished parts stay beside the
        file until it is complete, and the same call continues from them.

        Raises:
            ValueError: if `file` holds features of another network, transform or list of cells, or lacks a kind, and
                `overwrite` is False.
        """
        if on_main_process(lambda: not overwrite and self.is_stored(file, cells)):
            logger.info("the features are already in %s", file)
        else:
            parts = self.make_parts(file.parent / f".{file.name}.parts", cells.paths)
            on_main_process(lambda: self._write(file, cells, parts))
        return read_features(file).of_kind(self.kinds[0])

    def is_stored(self, file: Path, cells: LabelledCells) -> bool:
        """Return whether `file` exists and holds these features; ValueError if it holds other ones."""
        if not file.exists():
            return False
        differences = list(self._differences(file, cells))
        if differences:
            raise ValueError(
                f"features: {str(file)!r} holds other features than asked for ({'; '.join(differences)}); "
                f"pass --overwrite to replace them, or another --output-dir"
            )
        return True

    def make_parts(self, folder: Path, paths: Sequence[Path]) -> Parts:
        """Extract the parts that are missing in `folder`; all processes of the group share the work.

        Raises:
            ValueError: on all processes, as `extract` on one, except that all images may be unreadable.
        """
        parts = Parts(
            folder, {**self.identity, "kinds": " ".join(self.kinds)}, paths, part_ranges(len(paths), self.kinds)
        )
        missing = on_main_process(parts.missing)
        if len(missing) < len(parts.files):
            logger.info("%d of %d parts are done already", len(parts.files) - len(missing), len(parts.files))
        own = missing[get_rank() :: get_world_size()]
        _on_all_processes(lambda: self._extract_parts(parts, own, paths))
        return parts

    def collect(self, cells: LabelledCells, parts: Parts) -> Features:
        """Return the features of all parts, without patch grids.

        Raises:
            ValueError: if no image is readable.
        """
        vectors = [kind for kind in self.kinds if kind != PATCHES]
        whole = concatenate([parts.read(number, vectors) for number in range(len(parts.files))], parts.ranges, vectors)
        return Features(
            features=whole.by_kind.pop(vectors[0]),
            labels=cells.labels[whole.kept],
            class_names=cells.class_names,
            paths=[os.path.abspath(cells.paths[i]) for i in whole.kept],
            patients=[cells.patients[i] for i in whole.kept] if cells.patients is not None else None,
            unreadable=[os.path.abspath(path) for path in whole.unreadable],
            attributes={
                "model": self.encoder.description,
                "checkpoint": self.encoder.origin,
                **self.identity,
                "image_size": str(self.image_size),
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            },
            kind=vectors[0],
            others=whole.by_kind,
        )

    def _extract_parts(self, parts: Parts, numbers: Sequence[int], paths: Sequence[Path]) -> None:
        if numbers:
            found = extract_ranges(self.encoder, paths, [parts.ranges[number] for number in numbers], self)
            for number, part in zip(numbers, found, strict=True):
                parts.write(number, part)

    def _write(self, file: Path, cells: LabelledCells, parts: Parts) -> None:
        features = self.collect(cells, parts)
        numbers = range(len(parts.files)) if PATCHES in self.kinds else ()
        grids = (parts.read(number, [PATCHES]).by_kind for number in numbers)
        write_features(file, features, (grid[PATCHES] for grid in grids if grid))
        parts.remove()
        logger.info("wrote features of %d cells to %s", len(features), file)

    def _differences(self, file: Path, cells: LabelledCells) -> Iterator[str]:
        """Yield how the content of a features file differs from what these options give for these cells."""
        stored = read_features(file)
        for name, value in self.identity.items():
            if stored.attributes.get(name) != value:
                yield f"{name} is {stored.attributes.get(name)!r} there and {value!r} here"
        missing = [kind for kind in self.kinds if kind not in stored_kinds(file)]
        if missing:
            yield f"it has no features of kind {', '.join(missing)}"
        paths, unreadable = [os.path.abspath(path) for path in cells.paths], set(stored.unreadable)
        kept = [i for i, path in enumerate(paths) if path not in unreadable]
        if [paths[i] for i in kept] != stored.paths or not unreadable.issubset(paths):
            yield f"the images or their order differ: {len(stored) + len(unreadable)} there and {len(cells)} here"
        elif cells.class_names != stored.class_names or not np.array_equal(cells.labels[kept], stored.labels):
            yield "the labels differ"
        elif (None if cells.patients is None else [cells.patients[i] for i in kept]) != stored.patients:
            yield "the patients differ"


def _on_all_processes(action: Callable[[], None]) -> None:
    """Run `action` on each process and wait for all; an error of one is raised on all.

    Errors that no user causes end their process, and with it the group.
    """
    error: Exception | None = None
    try:
        action()
    except (ValueError, OSError) as caught:
        error = caught
    for failure in all_gather_objects(error):
        if failure is not None:
            raise failure

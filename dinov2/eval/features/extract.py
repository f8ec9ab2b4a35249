"""Extract features of image files: a batch, a list of files, or labelled cells into one file.

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
from dinov2.data.exposure import seen_in_pretraining
from dinov2.distributed import all_gather_objects, get_rank, get_world_size, on_main_process
from dinov2.eval.features.encoders import DinoEncoder, Encoder, Kind
from dinov2.eval.features.loop import (
    Extraction,
    ExtractOptions,
    Fp32Matmul,
    Parts,
    Precision,
    concatenate,
    embed_in_pieces,
    extract_ranges,
    part_ranges,
)
from dinov2.eval.features.named_encoders import build_encoder
from dinov2.eval.features.store import DEFAULT_KIND, PATCHES, Features, read_features, stored_kinds, write_features
from dinov2.hub.backbones import ImageTransform, checkpoint_file, load_backbone, recorded_transform
from dinov2.hub.sources import published_name
from dinov2.models import architecture
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.files import PathLike, file_sha256

logger = logging.getLogger("dinov2")


def embed_images(
    model: DinoVisionTransformer | Encoder,
    images: Tensor,
    precision: Precision = "fp32",
    kind: str = DEFAULT_KIND,
    fp32_matmul: Fp32Matmul = "fast",
) -> Tensor:
    """Return the features of one batch, float32 [B, D], on the model's device; the model is in eval mode.

    `images` are stacked outputs of the encoder's preparation, on the same device: uint8 [B, 3, S, S] for backbones.
    """
    options = ExtractOptions(kinds=[kind], precision=precision, fp32_matmul=fp32_matmul)
    encoder = _as_encoder(model, images.shape[-1])
    encoder.check(options.kinds)
    with options.arithmetic(images.device):
        outputs = embed_in_pieces(encoder, images, options.kinds)
    return torch.cat([output[kind] for output in outputs])


def extract(
    model: DinoVisionTransformer | Encoder, paths: Sequence[Path], image_size: int | None = None, **options: Any
) -> Extraction:
    """Extract the features of image files in their order; unreadable ones are left out, counted and logged.

    The model is moved to the device. `image_size` is that of a backbone, by default the size it was loaded for; an
    encoder has its own. `options` are fields of `ExtractOptions`: kinds, precision, device, batch_size, ...
    """
    return _extract(_as_encoder(model, image_size), paths, ExtractOptions(**options))


def _as_encoder(model: DinoVisionTransformer | Encoder, image_size: int | None) -> Encoder:
    if isinstance(model, Encoder):
        return model
    return DinoEncoder(model, image_size or int(architecture(model)["img_size"]))


def _extract(encoder: Encoder, paths: Sequence[Path], options: ExtractOptions) -> Extraction:
    ranges = part_ranges(len(paths), options.kinds)
    return concatenate(list(extract_ranges(encoder, paths, ranges, options)), ranges, options.kinds)


@dataclass
class Embedder(ExtractOptions):
    """An encoder and the options of an extraction; extracts labelled cells into files.

    Give either a checkpoint or the name of an encoder; the first of the kinds must be a vector.
    """

    checkpoint: PathLike | None = None  # as for `load_backbone`
    image_size: int = 0  # S; 0: that of the training run if the file states it, else 224; or the named encoder's own
    encoder_name: str = ""  # as for `build_encoder`
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
            self.image_size = self._transform.image_size

    @cached_property
    def file(self) -> Path:
        """Return the file with the checkpoint's weights; ValueError for an encoder by name."""
        if self.checkpoint is None:
            raise ValueError(f"--encoder {self.encoder_name}: it is no checkpoint of this project; give --checkpoint")
        return checkpoint_file(self.checkpoint)

    @cached_property
    def _transform(self) -> ImageTransform:
        return recorded_transform(self.file, self.image_size)

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
            sha256, transform = file_sha256(self.file), str(self._transform)
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
        """
        self.warn_of_pretraining(cells)
        if on_main_process(lambda: not overwrite and self.is_stored(file, cells)):
            logger.info("the features are already in %s", file)
        else:
            parts = self.make_parts(file.parent / f".{file.name}.parts", cells.paths)
            on_main_process(lambda: self._write(file, cells, parts))
        return read_features(file).of_kind(self.kinds[0])

    def warn_of_pretraining(self, cells: LabelledCells) -> None:
        """Warn of cells of a public data set that the checkpoint, a release, saw in its pretraining."""
        if self.checkpoint is None or not cells.datasets:
            return
        name = published_name(self.file, self.identity["checkpoint_sha256"])
        if seen := seen_in_pretraining(name, cells.datasets):
            logger.warning(
                "%s saw %s in its pretraining, without labels: results with these cells say less about new data",
                *(name, ", ".join(seen)),
            )

    def is_stored(self, file: Path, cells: LabelledCells) -> bool:
        """Return whether `file` exists and holds these features; ValueError if it holds other ones."""
        if not file.exists():
            return False
        if differences := list(self._differences(file, cells)):
            raise ValueError(
                f"features: {str(file)!r} holds other features than asked for ({'; '.join(differences)}); "
                f"pass --overwrite to replace them, or another --output-dir"
            )
        return True

    def make_parts(self, folder: Path, paths: Sequence[Path]) -> Parts:
        """Extract the parts that are missing in `folder`; an error of one process is raised on all."""
        identity = {**self.identity, "kinds": " ".join(self.kinds)}
        parts = Parts(folder, identity, paths, part_ranges(len(paths), self.kinds))
        missing = on_main_process(parts.missing)
        if len(missing) < len(parts.files):
            logger.info("%d of %d parts are done already", len(parts.files) - len(missing), len(parts.files))
        own = missing[get_rank() :: get_world_size()]

        def extract_own() -> None:
            if own:
                extractions = extract_ranges(self.encoder, paths, [parts.ranges[number] for number in own], self)
                for number, part in zip(own, extractions, strict=True):
                    parts.write(number, part)

        _on_all_processes(extract_own)
        return parts

    def collect(self, cells: LabelledCells, parts: Parts) -> Features:
        """Return the features of all parts, without patch grids; ValueError if no image is readable."""
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

    def _write(self, file: Path, cells: LabelledCells, parts: Parts) -> None:
        features = self.collect(cells, parts)
        numbers = range(len(parts.files)) if PATCHES in self.kinds else ()
        grids = (parts.read(number, [PATCHES]).by_kind for number in numbers)
        write_features(file, features, (grid[PATCHES] for grid in grids if grid))
        parts.remove()
        logger.info("wrote features of %d cells to %s", len(features), file)

    def _differences(self, file: Path, cells: LabelledCells) -> Iterator[str]:
        """Yield how the content of a features file differs from what these options give for these cells."""
        stored = read_features(file, with_vectors=False)
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
    """Run `action` on each process and wait for all; raise the first ValueError or OSError of any on all."""
    error: Exception | None = None
    try:
        action()
    except (ValueError, OSError) as caught:  # other errors end their process, and with it the group
        error = caught
    for failure in all_gather_objects(error):
        if failure is not None:
            raise failure

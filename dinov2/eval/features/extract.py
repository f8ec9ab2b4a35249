"""From picture files to features: the loop over pictures, alone or shared by several processes, and its resumption.

What a picture's features depend on is said by `encoders`; nothing is random. Batches are cut the same way however many
processes there are, so on one kind of device they give the same features, bit for bit.

Nobody waits for the other: pictures of the next batches are decoded while the network has one, by processes or by a
thread; on CUDA, they are copied there while it computes, and its features come back behind it.

Dimension key:  B pictures in a batch, N pictures, D embedding dim, S image side in pixels
"""

import logging
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2.data.datasets.decode import UnreadableImageError, decode_image
from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.distributed import all_gather_objects, get_rank, get_world_size, is_main_process, on_main_process
from dinov2.eval.features.encoders import DinoEncoder, Encoder, Kind, Preparation, build_encoder
from dinov2.eval.features.parts import PART_SIZE, PATCH_PART_SIZE, Extraction, FeatureParts
from dinov2.eval.features.store import DEFAULT_KIND, PATCHES, Features, read_features, stored_kinds, write_features
from dinov2.hub.backbones import PathLike, checkpoint_file, file_sha256, load_backbone, trained_image_size
from dinov2.hub.transform import ImageTransform
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.matmul import fast_matmul_within

__all__ = ["Embedder", "Extraction", "Fp32Matmul", "Precision", "embed_images", "extract"]

logger = logging.getLogger("dinov2")

T = TypeVar("T")
Precision = Literal["fp32", "bf16"]
Fp32Matmul = Literal["fast", "exact"]
SECONDS_BETWEEN_REPORTS = 10.0
N_EXAMPLES = 5
DEFAULT_IMAGE_SIZE = 224
# A CPU takes a batch in pieces of so many pictures for each of its threads: what a layer writes is then still in its
# cache when the next one reads it (docs/benchmarks/features.md)
PICTURES_PER_THREAD = 8
N_BATCHES_AHEAD = 2  # that wait decoded, and features of as many on their way back from a GPU
N_COMPARED = 8  # pictures whose bf16 features are held against fp32
BF16_COSINE = 0.999


def embed_images(
    model: DinoVisionTransformer | Encoder,
    images: Tensor,
    precision: Precision = "fp32",
    kind: str = DEFAULT_KIND,
    fp32_matmul: Fp32Matmul = "fast",
) -> Tensor:
    """The features of one batch.

    Args:
        model: in eval mode.
        images: uint8 [B, 3, S, S] (what the encoder's preparation gives), on the model's device.
        precision: "bf16" runs the network under autocast.
        kind: of the features, see `encoders`.
        fp32_matmul: as for `extract`.

    Returns:
        float32 [B, D], on the model's device.

    Raises:
        ValueError: for an unknown precision, or a kind that the model does not have.
    """
    encoder = _as_encoder(model, images.shape[-1])
    encoder.check([kind])
    with _arithmetic(images.device, precision, fp32_matmul):
        return _embed(encoder, images, [kind])[kind]


def _embed(encoder: Encoder, images: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
    if images.device.type != "cpu":
        return encoder.embed(images, kinds)
    size = PICTURES_PER_THREAD * torch.get_num_threads()
    pieces = [encoder.embed(piece, kinds) for piece in images.split(size)]
    if len(pieces) == 1:
        return pieces[0]
    with torch.autocast("cpu", enabled=False):  # which would not let float16 be put together
        return {kind: torch.cat([piece[kind] for piece in pieces]) for kind in kinds}


@contextmanager
def _arithmetic(device: torch.device, precision: Precision, fp32_matmul: Fp32Matmul) -> Iterator[None]:
    """How the network computes inside, without gradients; bf16 weights are made once for all batches of a block."""
    for name, value, known in (("precision", precision, Precision), ("fp32_matmul", fp32_matmul, Fp32Matmul)):
        if value not in get_args(known):
            raise ValueError(f"{name}: {value!r} is unknown; choose one of {', '.join(get_args(known))}")
    is_bf16 = precision == "bf16"
    with (
        torch.no_grad(),
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16),
        fast_matmul_within(fp32_matmul == "fast", device),
    ):
        yield


def _as_encoder(model: DinoVisionTransformer | Encoder, image_size: int) -> Encoder:
    return model if isinstance(model, Encoder) else DinoEncoder(model, image_size)


def extract(
    model: DinoVisionTransformer | Encoder,
    paths: Sequence[Path],
    image_size: int = DEFAULT_IMAGE_SIZE,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    num_workers: int = 0,
    precision: Precision = "fp32",
    progress: bool = True,
    kinds: Sequence[str] = (DEFAULT_KIND,),
    fp32_matmul: Fp32Matmul = "fast",
    compiled: bool = False,
) -> Extraction:
    """Embed picture files in their order; unreadable ones are left out, counted and named in the log.

    Args:
        model: a backbone, or an encoder; it is moved to `device`.
        paths: N picture files.
        image_size: S, for a backbone; an encoder has its own.
        batch_size: pictures in one forward.
        device: where the network runs.
        num_workers: processes that decode; 0: a thread of this one does.
        precision: "fp32" or "bf16", which is held against fp32 on a few pictures; a large difference is a warning.
        progress: log speed and remaining time every ten seconds.
        kinds: of features, see `encoders`.
        fp32_matmul: "fast" or "exact": how a CPU multiplies float32 matrices, see `dinov2.utils.matmul`.
        compiled: have torch compile the network on CUDA: a minute at the start, worth it for many pictures. A CPU gains
            nothing, so there it is ignored.

    Raises:
        ValueError: if no picture could be read, features came out infinite or NaN, or the model lacks a kind.
    """
    encoder = _as_encoder(model, image_size)
    settings = _LoopSettings(
        tuple(kinds), precision, device, batch_size, num_workers, fp32_matmul, compiled, progress=progress
    )
    (found,) = _embed_ranges(encoder, paths, [range(len(paths))], settings)
    _report_unreadable(found.unreadable, len(paths))
    return found


@dataclass(frozen=True)
class _LoopSettings:
    kinds: Sequence[str]
    precision: Precision
    device: str | torch.device
    batch_size: int
    num_workers: int
    fp32_matmul: Fp32Matmul
    compiled: bool
    progress: bool = True


def _embed_ranges(
    encoder: Encoder, paths: Sequence[Path], ranges: Sequence[range], settings: _LoopSettings
) -> Iterator[Extraction]:
    """What each range of the pictures gives, one after the other; no batch reaches across two of them."""
    encoder.check(settings.kinds)
    device, size = torch.device(settings.device), settings.batch_size
    batches = [[list(part[start : start + size]) for start in range(0, len(part), size)] for part in ranges]
    loader: DataLoader[Any] = DataLoader(
        _Pictures(paths, encoder.preparation),
        batch_sampler=[batch for of_part in batches for batch in of_part],
        num_workers=settings.num_workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
    )
    report = _Progress(sum(map(len, ranges))) if settings.progress else None
    network = _Network(encoder, device, settings)
    with closing(_loaded(loader)) as loaded:
        for part, of_part in zip(ranges, batches, strict=True):
            kept: list[int] = []
            unreadable: dict[str, str] = {}
            with _arithmetic(device, settings.precision, settings.fp32_matmul):
                for batch, (images, indices, failures) in zip(of_part, loaded, strict=False):
                    if indices:
                        network.embed(images)
                    kept += indices
                    unreadable |= failures
                    if report:
                        report.advance(len(batch))
            of_kinds = {kind: _finite(values) for kind, values in network.collect().items()}
            yield Extraction(np.array(kept, dtype=np.int64) - part.start, unreadable, of_kinds)


class _Network:
    """An encoder on its device: nobody waits while pictures go there and features come back.

    Args:
        encoder: its network is moved to the device.
        device: where it runs.
        settings: of the extraction.
    """

    def __init__(self, encoder: Encoder, device: torch.device, settings: _LoopSettings) -> None:
        encoder.network.to(device).eval()
        self.encoder, self.device, self.settings = encoder, device, settings
        self._has_started = False
        self._uploads = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._coming: deque[tuple[dict[str, Tensor], torch.cuda.Event]] = deque()
        self._here: dict[str, list[Tensor]] = defaultdict(list)

    def embed(self, images: Tensor) -> None:
        """Take a batch, uint8 [B, 3, S, S] (what the encoder's preparation gives), pinned where the device is CUDA."""
        images = self._on_device(images)
        if not self._has_started:
            self._start(images)
        self._fetch(_embed(self.encoder, images, self.settings.kinds))

    def collect(self) -> dict[str, np.ndarray]:
        """{kind: [N, D]} of the batches since it was last asked."""
        self._receive(all_of_them=True)
        found = {kind: torch.cat(values).numpy() for kind, values in self._here.items()}
        self._here.clear()
        return found

    def _start(self, images: Tensor) -> None:
        self._has_started = True
        if self.settings.precision == "bf16":
            self._compare_with_fp32(images[:N_COMPARED])
        if self.settings.compiled and self.device.type == "cuda":
            self.encoder.compile()
        elif self.settings.compiled:
            logger.info("--compile: a CPU gains nothing by it, so the network runs as it is")

    def _compare_with_fp32(self, images: Tensor) -> None:
        vectors = [kind for kind in self.settings.kinds if kind != PATCHES]
        fast = self.encoder.embed(images, vectors)
        with torch.autocast(self.device.type, enabled=False):
            exact = self.encoder.embed(images, vectors)
        least = 1.0
        for kind in vectors:
            # zeros, as of a black picture to the encoder `pixels`, have no direction
            has_direction = exact[kind].any(dim=1)
            cosines = torch.cosine_similarity(fast[kind], exact[kind])[has_direction]
            least = min([least, *cosines.tolist()])
        if least < BF16_COSINE:
            logger.warning(
                "precision bf16: features of the first pictures differ from fp32's (least cosine %.4f); "
                "use --precision fp32",
                least,
            )
        else:
            logger.info("precision bf16: least cosine to fp32 features of the first pictures %.5f", least)

    def _on_device(self, images: Tensor) -> Tensor:
        if self._uploads is None:
            return images
        with torch.cuda.stream(self._uploads):  # beside the batch that is being computed
            there = images.to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._uploads)
        there.record_stream(computing)
        return there

    def _fetch(self, of_kinds: dict[str, Tensor]) -> None:
        if self._uploads is None:
            for kind, values in of_kinds.items():
                self._here[kind].append(values)  # [B, D]
            return
        pinned = {}
        for kind, values in of_kinds.items():
            pinned[kind] = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            pinned[kind].copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.device))
        self._coming.append((pinned, copied))
        self._receive()

    def _receive(self, all_of_them: bool = False) -> None:
        """Wait for batches that are far behind the newest one, which also bounds how many are on their way."""
        while self._coming and (all_of_them or len(self._coming) > N_BATCHES_AHEAD):
            pinned, copied = self._coming.popleft()
            copied.synchronize()
            for kind, values in pinned.items():
                self._here[kind].append(values.clone())  # not pinned: there is only so much of that memory


def _finite(features: np.ndarray) -> np.ndarray:
    n_bad = int((~np.isfinite(features).reshape(len(features), -1).all(axis=1)).sum())
    if n_bad:
        raise ValueError(
            f"features: {n_bad} of {len(features)} are infinite or NaN; the weights are broken (did the run diverge?)"
        )
    return features


def _report_unreadable(unreadable: Mapping[str, str], n_pictures: int) -> None:
    """Name pictures that could not be read in the log; ValueError if there are no others."""
    if unreadable:
        examples = "; ".join(f"{path}: {reason}" for path, reason in list(unreadable.items())[:N_EXAMPLES])
        logger.warning("%d of %d pictures are unreadable and left out: %s", len(unreadable), n_pictures, examples)
    if len(unreadable) >= n_pictures:
        raise ValueError(f"pictures: none of the {n_pictures} could be read; the log gives reasons")


class _Batch(NamedTuple):
    """Readable pictures, stacked, with their indices, and {path: reason} of the others."""

    images: Tensor
    indices: list[int]
    failures: dict[str, str]


def _loaded(loader: DataLoader[Any]) -> Generator[_Batch, None, None]:
    """The loader's batches; without processes that are ahead of the network, a thread is."""
    yield from loader if loader.num_workers else _ahead(loader, N_BATCHES_AHEAD)


def _ahead(items: Iterable[T], n_ahead: int) -> Generator[T, None, None]:
    """The same items in their order, made by a thread while those before are in use; its errors are raised here."""
    iterator, end = iter(items), object()
    thread = ThreadPoolExecutor(1, thread_name_prefix="pictures")
    try:
        coming: deque[Future[Any]] = deque(thread.submit(next, iterator, end) for _ in range(n_ahead))
        while (item := coming.popleft().result()) is not end:
            coming.append(thread.submit(next, iterator, end))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


class _Pictures(Dataset[tuple[int, Tensor | None, str, str]]):
    """(index, what the network gets or None, path, why it is unreadable or "")."""

    def __init__(self, paths: Sequence[Path], preparation: Preparation) -> None:
        self.paths = paths
        self.preparation = preparation

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str, str]:
        path = os.fspath(self.paths[index])
        try:
            return index, self.preparation(decode_image(path)), path, ""
        except UnreadableImageError as error:
            return index, None, path, error.reason


def _collate(items: list[tuple[int, Tensor | None, str, str]]) -> _Batch:
    images = [image for _, image, _, _ in items if image is not None]
    indices = [index for index, image, _, _ in items if image is not None]
    failures = {path: reason for _, image, path, reason in items if image is None}
    return _Batch(torch.stack(images) if images else torch.empty(0), indices, failures)


class _Progress:
    """Log lines like `embedded 1,200 of 5,000 pictures, 95.2 a second, 40 s to go`, ten seconds apart or more."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.start = self.last_report = time.monotonic()
        self.whose = f" of one of {get_world_size()} processes" if get_world_size() > 1 else ""

    def advance(self, n: int) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.last_report < SECONDS_BETWEEN_REPORTS and self.done < self.total:
            return
        self.last_report = now
        rate = self.done / max(now - self.start, 1e-9)
        logger.info(
            "embedded %s of %s pictures%s, %.1f a second, %.0f s to go",
            f"{self.done:,}",
            f"{self.total:,}",
            self.whose,
            rate,
            (self.total - self.done) / rate,
        )


@dataclass
class Embedder:
    """A network, and the settings that the features of a picture depend on.

    Attributes:
        checkpoint: whatever `load_backbone` takes: a file, a folder, a name or a URL; None for an encoder by name.
        image_size: S; 0 takes that of the training run where the file tells it and 224 otherwise, or the named
            encoder's own.
        precision: "fp32" or "bf16".
        device, batch_size, num_workers: as for `extract`; they change speed alone.
        kinds: of features; the first is `Features.features`, a vector.
        encoder_name, encoder_weights: as for `build_encoder`, instead of a checkpoint.
        fp32_matmul, compiled: as for `extract`; features differ by rounding in float32 alone.

    Raises:
        ValueError: unless there is one of checkpoint and encoder_name; for kinds that are unknown, named twice or begin
            with patch grids; and as `build_encoder`.
    """

    checkpoint: PathLike | None = None
    image_size: int = 0
    precision: Precision = "fp32"
    device: str = "cpu"
    batch_size: int = 64
    num_workers: int = 0
    kinds: Sequence[str] = (DEFAULT_KIND,)
    encoder_name: str = ""
    encoder_weights: str = ""
    fp32_matmul: Fp32Matmul = "fast"
    compiled: bool = False

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (not self.encoder_name):
            raise ValueError("a network is needed, and one only: give either --checkpoint or --encoder")
        if self.encoder_weights and not self.encoder_name:
            raise ValueError("--encoder-weights belongs to --encoder; weights of this project go with --checkpoint")
        parsed = [Kind.parse(kind) for kind in self.kinds]
        if not parsed or parsed[0].is_grid:
            raise ValueError(
                "--kinds: the first one is what protocols take, a vector: put cls or another before patches"
            )
        if len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"--kinds: one is named twice in {' '.join(self.kinds)}; drop it")
        if self.checkpoint is None:
            self.image_size = self.encoder.image_size
        elif not self.image_size:
            self.image_size = trained_image_size(self.file) or DEFAULT_IMAGE_SIZE

    @cached_property
    def file(self) -> Path:
        """The file with the checkpoint's weights; ValueError for an encoder by name."""
        if self.checkpoint is None:
            raise ValueError(f"--encoder {self.encoder_name}: it is no checkpoint of this project; give --checkpoint")
        return checkpoint_file(self.checkpoint)

    @cached_property
    def encoder(self) -> Encoder:
        """The network; a checkpoint is read when it is first asked for: features that are on disk need none."""
        if self.checkpoint is None:
            return build_encoder(self.encoder_name, self.image_size, self.encoder_weights)
        return DinoEncoder(load_backbone(self.file, self.image_size), self.image_size, self.file)

    @cached_property
    def identity(self) -> dict[str, str]:
        """What must be the same for features to be the same."""
        if self.checkpoint is None:
            sha256, transform = self.encoder.sha256, self.encoder.transform
        else:
            sha256, transform = file_sha256(self.file), str(ImageTransform(self.image_size))
        identity = {"checkpoint_sha256": sha256, "transform": transform, "precision": self.precision}
        # networks of a library may differ by an activation alone, which no tensor tells
        return identity if self.checkpoint is not None else {"model": self.encoder.description, **identity}

    def extract(self, paths: Sequence[Path], model: DinoVisionTransformer | Encoder | None = None) -> Extraction:
        """`extract` with these settings, by this network or by another one."""
        return extract(
            self.encoder if model is None else model,
            paths,
            image_size=self.image_size,
            batch_size=self.batch_size,
            device=self.device,
            num_workers=self.num_workers,
            precision=self.precision,
            kinds=self.kinds,
            fp32_matmul=self.fp32_matmul,
            compiled=self.compiled,
        )

    def features_of(self, cells: LabelledCells, file: Path, overwrite: bool = False) -> Features:
        """Features of labelled cells, from `file` if it holds just these, else extracted and written there.

        Where there is a process group, all its processes call this and share the work; the main one writes. Finished
        parts are kept beside the file until it is whole: the same call goes on from them.

        Raises:
            ValueError: if `file` holds features of another network, transform or list of cells, or lacks a kind, and
                `overwrite` is False.
        """
        if not on_main_process(lambda: self._holds(file, cells, overwrite)):
            parts = self.make_parts(file.parent / f".{file.name}.parts", cells.paths)
            on_main_process(lambda: self._write(file, cells, parts))
        return read_features(file).of_kind(self.kinds[0])

    def _holds(self, file: Path, cells: LabelledCells, overwrite: bool) -> bool:
        if not file.exists() or overwrite:
            return False
        differences = list(self.differences(file, cells))
        if differences:
            raise ValueError(
                f"features: {str(file)!r} holds other features than asked for ({'; '.join(differences)}); "
                f"pass --overwrite to replace them, or another --output-dir"
            )
        logger.info("the features are in %s already", file)
        return True

    def make_parts(self, folder: Path, paths: Sequence[Path]) -> FeatureParts:
        """Embed what `folder` does not have yet of these pictures; all processes of the group share the work.

        Raises:
            ValueError: in all of them, as `extract` in one, except that pictures may all be unreadable.
        """
        size = PATCH_PART_SIZE if PATCHES in self.kinds else PART_SIZE
        parts = FeatureParts(folder, {**self.identity, "kinds": " ".join(self.kinds)}, paths, size)
        missing = on_main_process(parts.missing)
        if len(missing) < len(parts.names):
            logger.info("%d of %d parts are done already", len(parts.names) - len(missing), len(parts.names))
        mine = missing[get_rank() :: get_world_size()]
        _on_all_processes(lambda: self._make(parts, mine, paths))
        return parts

    def _make(self, parts: FeatureParts, numbers: Sequence[int], paths: Sequence[Path]) -> None:
        if not numbers:
            return
        settings = _LoopSettings(
            self.kinds,
            self.precision,
            self.device,
            self.batch_size,
            self.num_workers,
            self.fp32_matmul,
            self.compiled,
            progress=is_main_process(),
        )
        found = _embed_ranges(self.encoder, paths, [parts.ranges[number] for number in numbers], settings)
        for number, part in zip(numbers, found, strict=True):
            parts.write(number, part)

    def _write(self, file: Path, cells: LabelledCells, parts: FeatureParts) -> None:
        features = self.collect(cells, parts)
        numbers = range(len(parts.names)) if PATCHES in self.kinds else ()
        grids = (parts.read(number, [PATCHES]).of_kinds for number in numbers)
        write_features(file, features, (grid[PATCHES] for grid in grids if grid))
        parts.remove()
        logger.info("wrote features of %d cells to %s", len(features), file)

    def collect(self, cells: LabelledCells, parts: FeatureParts) -> Features:
        """All parts as one, without patch grids.

        Raises:
            ValueError: if no picture could be read.
        """
        vectors = [kind for kind in self.kinds if kind != PATCHES]
        found = [parts.read(number, vectors) for number in range(len(parts.names))]
        unreadable = {path: reason for part in found for path, reason in part.unreadable.items()}
        _report_unreadable(unreadable, len(cells))
        kept = np.concatenate([part.kept + pictures.start for part, pictures in zip(found, parts.ranges, strict=True)])
        of_kinds = {
            kind: np.concatenate([part.of_kinds[kind] for part in found if part.of_kinds]) for kind in vectors
        }  # [n_kept, D] each
        return Features(
            features=of_kinds.pop(vectors[0]),
            labels=cells.labels[kept],
            class_names=cells.class_names,
            paths=[os.path.abspath(cells.paths[i]) for i in kept],
            patients=[cells.patients[i] for i in kept] if cells.patients is not None else None,
            unreadable=[os.path.abspath(path) for path in unreadable],
            attributes={
                "model": self.encoder.description,
                "checkpoint": self.encoder.origin,
                **self.identity,
                "image_size": str(self.image_size),
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            },
            kind=vectors[0],
            others=of_kinds,
        )

    def differences(self, file: Path, cells: LabelledCells) -> Iterator[str]:
        """How what a features file holds differs from what these settings would give for these cells."""
        stored = read_features(file)
        for name, value in self.identity.items():
            if stored.attributes.get(name) != value:
                yield f"{name} is {stored.attributes.get(name)!r} there and {value!r} here"
        lacking = [kind for kind in self.kinds if kind not in stored_kinds(file)]
        if lacking:
            yield f"there are none of the kind {', '.join(lacking)}"
        paths, unreadable = [os.path.abspath(path) for path in cells.paths], set(stored.unreadable)
        kept = [i for i, path in enumerate(paths) if path not in unreadable]
        if [paths[i] for i in kept] != stored.paths or not unreadable.issubset(paths):
            n_there = len(stored) + len(unreadable)
            yield f"the pictures or their order differ: {n_there} there and {len(cells)} here"
        elif cells.class_names != stored.class_names or not np.array_equal(cells.labels[kept], stored.labels):
            yield "the labels differ"
        elif (None if cells.patients is None else [cells.patients[i] for i in kept]) != stored.patients:
            yield "the patients differ"


def _on_all_processes(action: Callable[[], None]) -> None:
    """Run `action` on each process and wait for all; what goes wrong in one is raised in all.

    Errors that no user causes end their process, and with it the group.
    """
    error: Exception | None = None
    try:
        action()
    except (ValueError, OSError) as caught:
        error = caught
    failed = [found for found in all_gather_objects(error) if found is not None]
    if failed:
        raise failed[0]


def cells_of(cells: LabelledCells, positions: Sequence[int]) -> LabelledCells:
    """Some of the cells; classes keep their ids."""
    return replace(
        cells,
        paths=[cells.paths[i] for i in positions],
        labels=cells.labels[list(positions)],
        patients=None if cells.patients is None else [cells.patients[i] for i in positions],
    )

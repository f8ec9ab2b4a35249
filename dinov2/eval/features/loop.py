"""The extraction loop: image files to the features of each part of a list, and finished parts on disk.

Batches do not depend on the number of processes that share the parts, so on one kind of device the features are the
same bit for bit with any number.

Dimension key:  B images in a batch, N images, n images of a part, D embedding dim, S image side in pixels
"""

import hashlib
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2.data.datasets.decode import UnreadableImageError, decode_image
from dinov2.data.loaders import receive_batches, share_batch
from dinov2.distributed import get_world_size, is_main_process, on_main_process
from dinov2.eval.features.encoders import Encoder, Preparation
from dinov2.eval.features.store import DEFAULT_KIND, PATCHES
from dinov2.utils.command import progress_bar
from dinov2.utils.files import atomic_write
from dinov2.utils.h5 import open_h5, read_numbers
from dinov2.utils.numerics import fast_matmul_within

logger = logging.getLogger("dinov2")

T = TypeVar("T")
Precision = Literal["fp32", "bf16"]
Fp32Matmul = Literal["fast", "exact"]
PART_SIZE = 2048  # images whose features leave the device together, and are one file of `Parts`
PATCH_PART_SIZE = 256  # with patch grids, which are larger by a factor of some hundred
# A CPU embeds so many images per thread at a time: the output of a layer is still in its cache when the next layer
# reads it (docs/benchmarks/features.md)
IMAGES_PER_THREAD = 8
N_PREFETCHED = 2  # batches
N_COMPARED = 8  # images whose bf16 features are compared with fp32
BF16_COSINE = 0.999
N_EXAMPLES = 5


@dataclass(kw_only=True)
class ExtractOptions:
    """How images are embedded; only kinds and precision change the features by more than rounding in float32."""

    kinds: Sequence[str] = (DEFAULT_KIND,)  # see `encoders`
    precision: Precision = "fp32"  # bf16 (autocast) is compared with fp32 on a few images; a large difference is logged
    device: str | torch.device = "cpu"
    batch_size: int = 64  # images in one forward
    num_workers: int = 0  # processes that decode images; 0: a thread of this process
    fp32_matmul: Fp32Matmul = "fast"  # float32 products on a CPU, see `dinov2.utils.numerics`
    compiled: bool = False  # compile the network on CUDA, which takes a minute; ignored on a CPU, which gains nothing
    progress: bool = True  # show a progress bar, on the main process

    def __post_init__(self) -> None:
        for name, known in (("precision", Precision), ("fp32_matmul", Fp32Matmul)):
            if (value := getattr(self, name)) not in get_args(known):
                raise ValueError(f"{name}: {value!r} is unknown; choose one of {', '.join(get_args(known))}")

    @contextmanager
    def arithmetic(self, device: torch.device) -> Iterator[None]:
        """Set gradients, autocast and float32 products for the network within a `with` block."""
        is_bf16 = self.precision == "bf16"
        with (
            torch.no_grad(),
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16),
            fast_matmul_within(self.fp32_matmul == "fast", device),
        ):
            yield


@dataclass(frozen=True)
class Extraction:
    """Features of the readable images of a list."""

    kept: np.ndarray  # int64 [n_kept], ascending positions of the readable images
    unreadable: dict[str, str]  # {path: reason} of the others
    # {kind: float32 [n_kept, D], or float16 [n_kept, h, w, D] for patch grids}; empty where n_kept is 0
    by_kind: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def features(self) -> np.ndarray:
        """Return the features of the first kind."""
        return next(iter(self.by_kind.values()))


def part_ranges(n: int, kinds: Sequence[str]) -> list[range]:
    size = PATCH_PART_SIZE if PATCHES in kinds else PART_SIZE
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


def concatenate(parts: Sequence[Extraction], ranges: Sequence[range], kinds: Sequence[str]) -> Extraction:
    """Concatenate the parts of an extraction and log unreadable images; ValueError if no image is readable."""
    unreadable = {path: reason for part in parts for path, reason in part.unreadable.items()}
    n = sum(map(len, ranges))
    if unreadable:
        examples = "; ".join(f"{path}: {reason}" for path, reason in list(unreadable.items())[:N_EXAMPLES])
        logger.warning("%d of %d images are unreadable and left out: %s", len(unreadable), n, examples)
    if not any(part.by_kind for part in parts):
        raise ValueError(f"images: none of the {n} could be read; the log gives reasons")
    kept = np.concatenate([part.kept + numbers.start for part, numbers in zip(parts, ranges, strict=True)])
    by_kind = {kind: np.concatenate([part.by_kind[kind] for part in parts if part.by_kind]) for kind in kinds}
    return Extraction(kept, unreadable, by_kind)


def extract_ranges(
    encoder: Encoder, paths: Sequence[Path], ranges: Sequence[range], options: ExtractOptions
) -> Iterator[Extraction]:
    """Yield the extraction of each range of the images, in order; a batch is of one range."""
    encoder.check(options.kinds)
    device, size = torch.device(options.device), options.batch_size
    encoder.network.to(device).eval()
    batches = [[numbers[start : start + size] for start in range(0, len(numbers), size)] for numbers in ranges]
    loader: DataLoader[Any] = DataLoader(
        _Batches(paths, encoder.preparation),
        sampler=[batch for in_range in batches for batch in in_range],
        batch_size=None,  # the sampler's items are whole batches
        collate_fn=share_batch,
        num_workers=options.num_workers,
        pin_memory=device.type == "cuda",
    )
    is_first = True
    title = "extracting" if get_world_size() == 1 else f"extracting, process 1 of {get_world_size()}"
    bar = progress_bar(total=sum(map(len, ranges)), desc=title, disable=not (options.progress and is_main_process()))
    loaded = receive_batches(loader) if options.num_workers else prefetch(loader, N_PREFETCHED)
    with bar, closing(loaded):
        for numbers, in_range in zip(ranges, batches, strict=True):
            kept: list[int] = []
            unreadable: dict[str, str] = {}
            outputs: list[dict[str, Tensor]] = []  # stay on the device: a copy per batch would wait for it
            with options.arithmetic(device):
                for batch, (images, readable, failures) in zip(in_range, loaded, strict=False):
                    if readable:
                        images = images.to(device, non_blocking=True)
                        if is_first:
                            _start_network(encoder, images, options)
                            is_first = False
                        outputs += embed_in_pieces(encoder, images, options.kinds)
                    kept += readable
                    unreadable |= failures
                    bar.update(len(batch))
            by_kind = {kind: _to_numpy([output[kind] for output in outputs]) for kind in options.kinds if outputs}
            yield Extraction(np.array(kept, dtype=np.int64) - numbers.start, unreadable, by_kind)


def _start_network(encoder: Encoder, images: Tensor, options: ExtractOptions) -> None:
    if options.precision == "bf16":
        _compare_with_fp32(encoder, images[:N_COMPARED], [kind for kind in options.kinds if kind != PATCHES])
    if options.compiled and images.device.type == "cuda":
        encoder.compile()
    elif options.compiled:
        logger.info("--compile: a CPU gains nothing by it, so the network runs as it is")


def _compare_with_fp32(encoder: Encoder, images: Tensor, kinds: Sequence[str]) -> None:
    """Log the least cosine between bf16 and fp32 features of a few images."""
    fast = encoder.embed(images, kinds)
    with torch.autocast(images.device.type, enabled=False):
        exact = encoder.embed(images, kinds)
    least = 1.0
    for kind in kinds:
        is_nonzero = exact[kind].any(dim=1)  # the encoder `pixels` turns a black image into zeros, without a direction
        least = min([least, *torch.cosine_similarity(fast[kind], exact[kind])[is_nonzero].tolist()])
    logger.info("precision bf16: least cosine to fp32 features of the first images %.5f", least)
    if least < BF16_COSINE:
        logger.warning("precision bf16: a cosine of %.4f to fp32 features is too low; use --precision fp32", least)


def embed_in_pieces(encoder: Encoder, images: Tensor, kinds: Sequence[str]) -> list[dict[str, Tensor]]:
    """Return the features of the pieces of a batch: several on a CPU, else one."""
    is_cpu = images.device.type == "cpu"
    pieces = images.split(IMAGES_PER_THREAD * torch.get_num_threads()) if is_cpu else [images]
    return [encoder.embed(piece, kinds) for piece in pieces]


def _to_numpy(outputs: Sequence[Tensor]) -> np.ndarray:
    features = torch.cat(list(outputs)).cpu()
    if n_bad := int((~features.isfinite().flatten(1).all(dim=1)).sum()):
        what = f"{n_bad} of {len(features)} are infinite or NaN"
        raise ValueError(f"features: {what}; the weights are broken (did the run diverge?)")
    return features.numpy()


class _Batches(Dataset[tuple[Tensor, list[int], dict[str, str]]]):
    """Batches by positions: decoded images, the positions of readable ones, and {path: reason} of the others."""

    def __init__(self, paths: Sequence[Path], preparation: Preparation) -> None:
        self.paths, self.preparation = paths, preparation

    def __getitem__(self, batch: range) -> tuple[Tensor, list[int], dict[str, str]]:
        images: list[Tensor] = []
        readable: list[int] = []
        failures: dict[str, str] = {}
        for i in batch:
            path = os.fspath(self.paths[i])
            try:
                images.append(self.preparation(decode_image(path)))
                readable.append(i)
            except UnreadableImageError as error:
                failures[path] = error.reason
        return torch.stack(images) if images else torch.empty(0), readable, failures


def prefetch(items: Iterable[T], n: int) -> Generator[T, None, None]:
    """Yield the items in order while a thread makes the next n of them; its errors are raised here."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, thread_name_prefix="images") as thread:
        queue: deque[Future[Any]] = deque(thread.submit(next, iterator, end) for _ in range(n))
        while (item := queue.popleft().result()) is not end:
            queue.append(thread.submit(next, iterator, end))
            yield item


class Parts:
    """Finished parts of one extraction on disk: a killed extraction continues from them.

    A part is a file that is complete or absent. Its name is a hash of everything that its content depends on: the
    `identity` of the network, and path, size and time of each image. All processes create this object together.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, str], paths: Sequence[Path], ranges: Sequence[range]
    ) -> None:
        self.folder, self.ranges = folder, ranges
        self.files: list[Path] = on_main_process(
            lambda: [folder / _file_name(identity, [paths[i] for i in part]) for part in ranges]
        )

    def missing(self) -> list[int]:
        """Return the numbers of the parts without a file."""
        # A listing: network file systems cache that a file they were asked for is absent
        existing = set(self.folder.iterdir()) if self.folder.is_dir() else set()
        return [number for number, file in enumerate(self.files) if file not in existing]

    def write(self, number: int, part: Extraction) -> None:
        """Write a part, whose `kept` counts from the start of the part."""
        with atomic_write(self.files[number], "w+b") as stream, h5py.File(stream, "w") as file:
            file["kept"] = part.kept
            file.attrs["unreadable"] = json.dumps(part.unreadable)
            for kind, values in part.by_kind.items():
                file[f"kinds/{kind}"] = values

    def read(self, number: int, kinds: Sequence[str]) -> Extraction:
        """Read these kinds of a part; ValueError if the file is missing or damaged."""
        path = self.files[number]
        try:
            with open_h5(path, "features") as file:
                kept = read_numbers(file, "kept", (1,), "i")
                by_kind = {kind: read_numbers(file, f"kinds/{kind}", (2, 4)) for kind in kinds if len(kept)}
                return Extraction(kept, json.loads(file.attrs["unreadable"]), by_kind)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(
                f"features: part {number} of {len(self.files)}, {str(path)!r}, is missing or damaged ({error}); all "
                f"processes must write to the same file system: check that, remove the folder and start again"
            ) from error

    def remove(self) -> None:
        """Remove the folder with all parts, also those of other extractions."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _file_name(identity: Mapping[str, str], paths: Sequence[Path]) -> str:
    """Return a hash with size and modification time of each image, so that a repaired image is read again."""
    images: list[tuple[Any, ...]] = []
    for path in paths:
        try:
            status = os.stat(path)
            images.append((os.path.abspath(path), status.st_size, status.st_mtime_ns))
        except OSError:
            images.append((os.path.abspath(path), 0, 0))
    content = json.dumps([sorted(identity.items()), images])
    return hashlib.sha256(content.encode()).hexdigest() + ".h5"

"""The extraction loop: image files to the features of each part of a list.

Batches do not depend on the number of processes that share the parts, so on one kind of device the features are the
same bit for bit with any number.

Dimension key:  B images in a batch, N images, D embedding dim, S image side in pixels
"""

import logging
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2.data.datasets.decode import UnreadableImageError, decode_image
from dinov2.distributed import get_world_size, is_main_process
from dinov2.eval.features.encoders import Encoder, Preparation
from dinov2.eval.features.store import DEFAULT_KIND, PATCHES
from dinov2.utils.matmul import fast_matmul_within
from dinov2.utils.progress import progress_bar

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
    """How images are embedded; only kinds and precision change the features by more than rounding in float32.

    Attributes:
        kinds: of features, see `encoders`.
        precision: "fp32" or "bf16" (autocast). bf16 is compared with fp32 on a few images; a large difference is a
            warning.
        device: of the network.
        batch_size: images in one forward.
        num_workers: processes that decode images; 0: a thread of this process.
        fp32_matmul: "fast" or "exact": float32 products on a CPU, see `dinov2.utils.matmul`.
        compiled: compile the network on CUDA, which takes a minute. A CPU gains nothing, so it is ignored there.
        progress: show a progress bar, on the main process.

    Raises:
        ValueError: for an unknown precision or fp32_matmul.
    """

    kinds: Sequence[str] = (DEFAULT_KIND,)
    precision: Precision = "fp32"
    device: str | torch.device = "cpu"
    batch_size: int = 64
    num_workers: int = 0
    fp32_matmul: Fp32Matmul = "fast"
    compiled: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name, known in (("precision", Precision), ("fp32_matmul", Fp32Matmul)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(
                    f"{name}: {getattr(self, name)!r} is unknown; choose one of {', '.join(get_args(known))}"
                )

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
    """Features of the readable images of a list.

    Attributes:
        kept: int64 [n_kept], ascending positions of the readable images.
        unreadable: {path: reason} of the others.
        by_kind: {kind: float32 [n_kept, D], or float16 [n_kept, h, w, D] for patch grids}; empty where n_kept is 0.
    """

    kept: np.ndarray
    unreadable: dict[str, str]
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
        num_workers=options.num_workers,
        pin_memory=device.type == "cuda",
    )
    is_first = True
    title = "extracting" if get_world_size() == 1 else f"extracting, process 1 of {get_world_size()}"
    bar = progress_bar(total=sum(map(len, ranges)), desc=title, disable=not (options.progress and is_main_process()))
    loaded = (batch for batch in loader) if options.num_workers else prefetch(loader, N_PREFETCHED)
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
    if least < BF16_COSINE:
        logger.warning(
            "precision bf16: features of the first images differ from those of fp32 (least cosine %.4f); "
            "use --precision fp32",
            least,
        )
    else:
        logger.info("precision bf16: least cosine to fp32 features of the first images %.5f", least)


def embed_in_pieces(encoder: Encoder, images: Tensor, kinds: Sequence[str]) -> list[dict[str, Tensor]]:
    """Return the features of the pieces of a batch: several on a CPU, else one."""
    is_cpu = images.device.type == "cpu"
    pieces = images.split(IMAGES_PER_THREAD * torch.get_num_threads()) if is_cpu else [images]
    return [encoder.embed(piece, kinds) for piece in pieces]


def _to_numpy(outputs: Sequence[Tensor]) -> np.ndarray:
    features = torch.cat(list(outputs)).cpu()
    n_bad = int((~features.isfinite().flatten(1).all(dim=1)).sum())
    if n_bad:
        raise ValueError(
            f"features: {n_bad} of {len(features)} are infinite or NaN; the weights are broken (did the run diverge?)"
        )
    return features.numpy()


class _Batch(NamedTuple):
    images: Tensor
    readable: list[int]  # positions of the images
    failures: dict[str, str]  # {path: reason} of unreadable images


class _Batches(Dataset[_Batch]):
    """Batches of decoded images by their positions."""

    def __init__(self, paths: Sequence[Path], preparation: Preparation) -> None:
        self.paths = paths
        self.preparation = preparation

    def __getitem__(self, batch: range) -> _Batch:
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
        return _Batch(torch.stack(images) if images else torch.empty(0), readable, failures)


def prefetch(items: Iterable[T], n: int) -> Generator[T, None, None]:
    """Yield the items in order while a thread makes the next n of them; its errors are raised here."""
    iterator, end = iter(items), object()
    queue: deque[Future[Any]]
    with ThreadPoolExecutor(1, thread_name_prefix="images") as thread:
        queue = deque(thread.submit(next, iterator, end) for _ in range(n))
        while (item := queue.popleft().result()) is not end:
            queue.append(thread.submit(next, iterator, end))
            yield item

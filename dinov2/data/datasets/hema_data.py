"""Read unlabelled single-cell images for pre-training, as squares.

Letters: N images, S side of an image in pixels.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dinov2.data.cache import PackedCache
from dinov2.data.datasets.decode import UnreadableImageError, check_fit, decode_image, resize_image
from dinov2.data.datasets.sources import ImageSource

MAX_REPLACEMENTS = 20
N_PROBED_PATHS = 16
MAX_IMAGE_SIZE = 8192  # side in pixels


class Sample(NamedTuple):
    """An image, and the images that could not be read before it."""

    image: Tensor  # uint8 [3, S, S], in memory [S, S, 3]
    # the requested index, also if another image replaces it
    index: int  # type: ignore[assignment]  # hides tuple.index, which is not used
    failures: tuple[tuple[str, str], ...]  # (path, reason), the requested image first; usually empty
    metadata: int | None = None  # number of the image's value in `source.metadata.names`, or NO_VALUE; None: no column


class HemaStandardDataset(Dataset):
    """Unlabelled images: `HemaStandardDataset:root=<folder with *.txt lists>:shuffle=1`.

    `root` may also be one list, a .csv or .parquet file with a column of paths, a folder of images, or .tar shards: see
    `ImageSource.from_root`. An image that cannot be read is replaced by another one, always the same for an index; the
    sample names the failed images, for the training loop to record. `source` has the N images before any shuffling.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        shuffle: bool = False,
        image_size: int = 224,
        fit: str = "crop",
        center_crop: float = 1.0,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[None], Any] | None = None,
        seed: int = 0,
        column: str | None = None,
        cache: str | os.PathLike[str] | None = None,
        metadata: str | None = None,
    ) -> None:
        """Read the lists; no image is opened, but at least one of some probed files must exist.

        Args:
            root, column, metadata: see `ImageSource.from_root`.
            shuffle: permute the order by `seed`.
            image_size: S in pixels.
            fit, center_crop: how an image becomes square, see `resize_image`.
            transform: called with the decoded image (PIL, RGB, full size); items are then the pair
                (transform(image), target), without the failed images.
            target_transform: called with None, since the images have no labels; without it the target is ().
            seed: of the order and of the replacements of unreadable images; not negative.
            cache: folder of a packed cache of the squares, which `dataset.cache.build` fills before items are read.
        """
        check_fit(fit, center_crop)
        if seed < 0:
            raise ValueError(f"seed: {seed} is negative; choose 0 or more")
        if not 1 <= image_size <= MAX_IMAGE_SIZE:
            raise ValueError(f"image_size: {image_size} pixels; choose 1 to {MAX_IMAGE_SIZE}")
        if cache is not None and transform is not None:
            raise ValueError(
                f"train.dataset_path: cache={os.fspath(cache)!r} holds squares of {image_size} px, and a transform is "
                f"given whole images; leave one of the two out"
            )
        self.root = Path(root)
        self.image_size, self.fit, self.center_crop, self.seed = image_size, fit, center_crop, seed
        self.transform, self.target_transform = transform, target_transform
        self.source = ImageSource.from_root(root, column, metadata)
        n = len(self.source)
        order = np.random.default_rng(seed).permutation(n) if shuffle else np.arange(n)
        # a tensor, whose memory spawned workers share
        self._order = torch.from_numpy(order.astype(np.int32))
        probes = np.linspace(0, n - 1, num=min(n, N_PROBED_PATHS)).astype(int).tolist()
        if not any(os.path.exists(self.source.file(position)) for position in probes):  # as after a move of the data
            raise FileNotFoundError(
                f"train.dataset_path: none of the {len(probes)} images probed among the {n} that {self.source.kind} in "
                f"{str(root)!r} name exists on this machine, for instance {self.source.path(probes[0])!r}; relative "
                f"paths count from the folder of what names them"
            )
        self.cache = None if cache is None else PackedCache(cache, self.source, image_size, fit, center_crop)

    def __len__(self) -> int:
        return len(self.source)

    def path(self, index: int) -> str:
        """Return the absolute path of the image at `index`; `<shard>.tar::<member>` for one in a shard."""
        return self.source.path(self._position(index))

    def sets(self) -> np.ndarray:
        """Return the set of the image at each index, as a position in `source.set_names`: int32 [N]."""
        return self.source.set_ids()[self._order.numpy()]

    def __getitem__(self, index: int) -> Any:
        """Return a `Sample`, or with a `transform` the pair (transform(image), target)."""
        if self.transform is None:
            square, position, failures = self._first_readable(index, self._read_square)
            metadata = None if self.source.metadata is None else self.source.metadata[position]
            image = torch.from_numpy(np.require(square, requirements="W")).permute(2, 0, 1)
            return Sample(image, index, failures, metadata)
        pixels, *_ = self._first_readable(index, self._read_whole)
        target = () if self.target_transform is None else self.target_transform(None)
        return self.transform(Image.fromarray(pixels)), target

    def _position(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a dataset with {len(self)} images")
        return int(self._order[index])

    def _read_whole(self, position: int) -> np.ndarray:
        return decode_image(self.source.read(position), name=self.source.path(position))

    def _read_square(self, position: int) -> np.ndarray:
        """Read an image as uint8 [S, S, 3]."""
        if self.cache is not None:
            return self.cache.fetch(position)
        whole = self._read_whole(position)
        return resize_image(whole, self.image_size, self.fit, self.center_crop).permute(1, 2, 0).numpy()

    def _first_readable(
        self, index: int, read: Callable[[int], np.ndarray]
    ) -> tuple[np.ndarray, int, tuple[tuple[str, str], ...]]:
        """Read the image at `index` or its first readable replacement.

        Return it, its position in `source`, and (path, reason) of all failures.
        """
        failures: list[tuple[str, str]] = []
        for candidate in self._candidates(index):
            position = self._position(candidate)
            try:
                return read(position), position, tuple(failures)
            except UnreadableImageError as error:
                failures.append((self.path(candidate), error.reason))
        reasons = "; ".join(f"{path}: {reason}" for path, reason in failures[:3])
        raise OSError(
            f"train.dataset_path: image {index} and all {len(failures) - 1} tried in its place cannot be read "
            f"({reasons}); check that the files are whole and readable from this machine"
        )

    def _candidates(self, index: int) -> Iterator[int]:
        """Yield the index, then those of its replacements: distinct, and the same in a resumed run."""
        yield index
        n = len(self)
        draws = np.random.default_rng((self.seed, index)).choice(n, size=min(n, MAX_REPLACEMENTS + 1), replace=False)
        yield from [int(draw) for draw in draws if draw != index][:MAX_REPLACEMENTS]

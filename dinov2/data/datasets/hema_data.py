"""Unlabelled single-cell pictures for pre-training, decoded to squares.

Letters: N pictures, B of them in a batch, S side of a picture in pixels.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dinov2.data.datasets.decode import UnreadableImageError, check_fit, decode_image, resize_image
from dinov2.data.datasets.pictures import Pictures
from dinov2.data.packed_cache import PackedCache

MAX_REPLACEMENTS = 20
N_PROBED_PATHS = 16


class UnreadablePicture(NamedTuple):
    """One picture that had to be replaced."""

    path: str
    reason: str


class Sample(NamedTuple):
    """One picture, and what went wrong on the way to it.

    Attributes:
        image: uint8 [3, S, S], which lies in memory as [S, S, 3].
        index: the index that was asked for, also when another picture stands in.
        failures: the pictures that could not be read, the asked one first; empty as a rule.
    """

    image: Tensor
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    failures: tuple[UnreadablePicture, ...]


class Samples(list[Sample]):
    """The samples of a batch, whose pictures are views of one tensor.

    Attributes:
        images: uint8 [B, 3, S, S], which lies in memory as [B, S, S, 3].
    """

    def __init__(self, samples: Sequence[Sample], images: Tensor) -> None:
        super().__init__(samples)
        self.images = images


class HemaStandardDataset(Dataset):
    """Unlabelled pictures: `HemaStandardDataset:root=<folder with *.txt lists>:shuffle=1`.

    `root` may also be one list, a .csv or .parquet file with a column of paths, a folder of pictures, or .tar shards:
    see `Pictures.from_root`. In a list, blank lines and lines that begin with `#` are skipped, and relative paths count
    from the list's own folder; the lists of a folder are read in sorted order. A picture that cannot be read is
    replaced by another one, the same whenever this index is asked for; what failed travels with the sample, for the
    training loop to record.

    Attributes:
        pictures: where the N pictures lie, in the order before any shuffling.
        cache: the packed store that they are read from, or None.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        shuffle: bool = False,
        image_size: int = 224,
        fit: str = "crop",
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[None], Any] | None = None,
        seed: int = 0,
        column: str | None = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        """Read the lists; the pictures themselves are not looked at, but for a few that must not all be missing.

        Args:
            root: what names the pictures.
            shuffle: permute the order by `seed`, so that neighbours in a list are not neighbours here.
            image_size: S in pixels.
            fit: how a picture becomes square, see `resize_image`.
            transform: called with the decoded picture (PIL, RGB, full size); items are then the pair
                (transform(picture), target) and do not tell of replacements.
            target_transform: called with None, since nothing is labelled; without it the target is ().
            seed: decides the order under `shuffle` and which pictures replace unreadable ones; not negative.
            column: of a table, the column with the paths; None: "Image Path", or else "path".
            cache: folder of a packed store of the squares, which has to be built before items are read
                (`dataset.cache.build`).

        Raises:
            FileNotFoundError: nothing known is at `root`, or none of its pictures exists.
            ValueError: what is there names no picture or cannot be read, or an argument is not allowed.
        """
        check_fit(fit)
        if seed < 0:
            raise ValueError(f"seed: {seed} is negative; choose 0 or more")
        if cache is not None and transform is not None:
            raise ValueError(
                f"train.dataset_path: cache={os.fspath(cache)!r} holds squares of {image_size} px, and a transform is "
                f"given whole pictures; leave one of the two out"
            )
        self.root = Path(root)
        self.image_size = image_size
        self.fit = fit
        self.transform = transform
        self.target_transform = target_transform
        self.seed = seed
        self.pictures = Pictures.from_root(root, column)
        n = len(self.pictures)
        self._order: Tensor | None = None  # a tensor, as what `pictures` holds: spawned workers share its memory
        if shuffle:
            order = np.random.default_rng(seed).permutation(n)
            self._order = torch.from_numpy(order.astype(np.int32) if n <= np.iinfo(np.int32).max else order)
        self._check_that_some_exist()
        self.cache = None if cache is None else PackedCache(cache, self.pictures, image_size, fit)

    def __len__(self) -> int:
        return len(self.pictures)

    def path(self, index: int) -> str:
        """The absolute path of the picture at `index`; `<shard>.tar::<member>` of one in a shard."""
        return self.pictures.path(self._position(index))

    def sets(self) -> np.ndarray:
        """The set of the picture at each index, as a position in `pictures.set_names`: int32 [N]."""
        sets = self.pictures.all_sets()
        return sets if self._order is None else sets[self._order.numpy()]

    def __getitem__(self, index: int) -> Any:
        """`Sample`, or with a `transform` the pair (transform(picture), target).

        Raises:
            RuntimeError: neither this picture nor any of its replacements can be read.
        """
        if self.transform is None:
            square, failures = self._first_readable(index, self._read_square)
            return Sample(torch.from_numpy(np.require(square, requirements="W")).permute(2, 0, 1), index, failures)
        array, _ = self._first_readable(index, self._read_whole)
        target = () if self.target_transform is None else self.target_transform(None)
        return self.transform(Image.fromarray(array)), target

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The items of a batch; samples come as `Samples`, each picture copied once, to its place in the batch."""
        if self.transform is not None:
            return [self[index] for index in indices]
        batch = torch.empty((len(indices), self.image_size, self.image_size, 3), dtype=torch.uint8)
        images = batch.permute(0, 3, 1, 2)  # [B, 3, S, S]
        unread: Iterable[int] = range(len(indices))
        if self.cache is not None:
            unread = self.cache.copy_into([self._position(index) for index in indices], batch.numpy())
        samples = [Sample(image, index, ()) for image, index in zip(images, indices, strict=True)]
        for number in unread:
            square, failures = self._first_readable(indices[number], self._read_square)
            np.copyto(batch[number].numpy(), square)
            samples[number] = samples[number]._replace(failures=failures)
        return Samples(samples, images)

    def _position(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a dataset with {len(self)} pictures")
        return index if self._order is None else int(self._order[index])

    def _read_whole(self, position: int) -> np.ndarray:
        """uint8 [H, W, 3]."""
        return decode_image(self.pictures.read(position), name=self.pictures.path(position))

    def _read_square(self, position: int) -> np.ndarray:
        """uint8 [S, S, 3]."""
        if self.cache is not None:
            return self.cache.fetch(position)
        return resize_image(self._read_whole(position), self.image_size, self.fit).permute(1, 2, 0).numpy()

    def _first_readable(
        self, index: int, read: Callable[[int], np.ndarray]
    ) -> tuple[np.ndarray, tuple[UnreadablePicture, ...]]:
        failures: list[UnreadablePicture] = []
        for candidate in self._candidates(index):
            try:
                return read(self._position(candidate)), tuple(failures)
            except UnreadableImageError as error:
                failures.append(UnreadablePicture(self.path(candidate), error.reason))
        reasons = "; ".join(f"{path}: {reason}" for path, reason in failures[:3])
        raise RuntimeError(
            f"train.dataset_path: picture {index} and all {len(failures) - 1} tried in its place cannot be read "
            f"({reasons}); check that the files are whole and readable from this machine"
        )

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        # distinct, so that a small set is searched to its end; keyed by the index, so that a resumed run draws the same
        n = len(self)
        draws = np.random.default_rng((self.seed, index)).choice(n, size=min(n, MAX_REPLACEMENTS + 1), replace=False)
        yield from [int(draw) for draw in draws if draw != index][:MAX_REPLACEMENTS]

    def _check_that_some_exist(self) -> None:
        probes = np.linspace(0, len(self) - 1, num=min(len(self), N_PROBED_PATHS)).astype(int).tolist()
        for position in probes:
            try:
                self.pictures.stamp(position)
            except OSError:
                continue
            return
        raise FileNotFoundError(
            f"train.dataset_path: none of the {len(probes)} pictures probed among the {len(self)} that "
            f"{self.pictures.kind} in {str(self.root)!r} name exists on this machine, for instance "
            f"{self.pictures.path(probes[0])!r}; relative paths count from the folder of what names them"
        )

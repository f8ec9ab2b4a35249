"""Unlabelled single-cell pictures for pre-training, named by .txt lists with one path a line.

Letters: N pictures, S side of a picture in pixels.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dinov2.data.datasets.decode import UnreadableImageError, check_fit, load_image, resize_image

MAX_REPLACEMENTS = 20
N_PROBED_PATHS = 16


class UnreadablePicture(NamedTuple):
    """One picture that had to be replaced."""

    path: str
    reason: str


class Sample(NamedTuple):
    """One picture, and what went wrong on the way to it.

    Attributes:
        image: uint8 [3, S, S].
        index: the index that was asked for, also when another picture stands in.
        failures: the pictures that could not be read, the asked one first; empty as a rule.
    """

    image: Tensor
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    failures: tuple[UnreadablePicture, ...]


class PathLists:
    """The lines of all lists as one block of bytes: a million Python strings would cost every worker some 100 MB."""

    def __init__(self, files: list[Path]) -> None:
        lines: list[bytes] = []
        counts = []
        for file in files:
            listed = _read_list(file)
            lines += listed
            counts.append(len(listed))
        self._folders = [os.path.abspath(file.parent) for file in files]
        self._ends_of_lists = np.cumsum(counts, dtype=np.int64)
        self._ends = np.cumsum([len(line) for line in lines], dtype=np.int64)  # [N]
        self._bytes = b"".join(lines)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, position: int) -> str:
        """The absolute path of one picture."""
        start = self._ends[position - 1] if position else 0
        line = self._bytes[start : self._ends[position]].decode()
        folder = self._folders[int(np.searchsorted(self._ends_of_lists, position, side="right"))]
        return os.path.join(folder, line)  # which leaves an absolute line as it is


class HemaStandardDataset(Dataset):
    """Pictures named by path lists: `HemaStandardDataset:root=<folder with *.txt, or one list>:shuffle=1`.

    In a list, blank lines and lines that begin with `#` are skipped, and relative paths count from the list's own
    folder; the lists of a folder are read in sorted order. A picture that cannot be read is replaced by another one,
    the same whenever this index is asked for; what failed travels with the sample, for the training loop to record.
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
    ) -> None:
        """Read the lists; the pictures themselves are not looked at, but for a few that must not all be missing.

        Args:
            root: a folder with .txt lists, or one list.
            shuffle: permute the order by `seed`, so that neighbours in a list are not neighbours here.
            image_size: S in pixels.
            fit: how a picture becomes square, see `resize_image`.
            transform: called with the decoded picture (PIL, RGB, full size); items are then the pair
                (transform(picture), target) and do not tell of replacements.
            target_transform: called with None, since nothing is labelled; without it the target is ().
            seed: decides the order under `shuffle` and which pictures replace unreadable ones; not negative.

        Raises:
            FileNotFoundError: no list at `root`, or none of its pictures exists.
            ValueError: the lists name no picture, one is not UTF-8 text, or `fit` or `seed` is not allowed.
        """
        check_fit(fit)
        if seed < 0:
            raise ValueError(f"seed: {seed} is negative; choose 0 or more")
        self.root = Path(root)
        self.image_size = image_size
        self.fit = fit
        self.transform = transform
        self.target_transform = target_transform
        self.seed = seed
        files = _find_lists(self.root)
        self.n_lists = len(files)
        self._paths = PathLists(files)
        n = len(self._paths)
        if n == 0:
            raise ValueError(
                f"train.dataset_path: the lists in {str(root)!r} ({', '.join(file.name for file in files)}) name no "
                f"picture; write one picture path per line"
            )
        self._order = np.random.default_rng(seed).permutation(n) if shuffle else None
        self._check_that_some_exist()

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        """The absolute path of the picture at `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a dataset with {len(self)} pictures")
        return self._paths[index if self._order is None else int(self._order[index])]

    def __getitem__(self, index: int) -> Any:
        """`Sample`, or with a `transform` the pair (transform(picture), target).

        Raises:
            RuntimeError: neither this picture nor any of its replacements can be read.
        """
        image, failures = self._load_or_replace(index)
        if self.transform is None:
            return Sample(resize_image(image, self.image_size, self.fit), index, failures)
        target = () if self.target_transform is None else self.target_transform(None)
        return self.transform(image), target

    def _load_or_replace(self, index: int) -> tuple[Image.Image, tuple[UnreadablePicture, ...]]:
        failures: list[UnreadablePicture] = []
        for candidate in self._candidates(index):
            path = self.path(candidate)
            try:
                return load_image(path), tuple(failures)
            except UnreadableImageError as error:
                failures.append(UnreadablePicture(path, error.reason))
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
        probes = np.linspace(0, len(self) - 1, num=min(len(self), N_PROBED_PATHS)).astype(int)
        paths = [self._paths[int(position)] for position in probes]
        if not any(os.path.exists(path) for path in paths):
            raise FileNotFoundError(
                f"train.dataset_path: none of the {len(paths)} pictures probed among the {len(self)} in "
                f"{str(self.root)!r} exists on this machine, for instance {paths[0]!r}; "
                f"relative paths count from the folder of their list"
            )


def _find_lists(root: Path) -> list[Path]:
    hint = "scripts/make_patch_lists.py writes one (one picture path per line)"
    if root.is_file():
        if root.suffix.lower() != ".txt":
            raise ValueError(f"train.dataset_path: root={str(root)!r} is not a .txt list of picture paths; {hint}")
        return [root]
    if not root.is_dir():
        raise FileNotFoundError(
            f"train.dataset_path: root={str(root)!r} does not exist; it must hold *.txt lists; {hint}"
        )
    found = sorted(root.glob("[!.]*"))
    files = [file for file in found if file.suffix.lower() == ".txt" and file.is_file()]
    if not files:
        raise FileNotFoundError(f"train.dataset_path: no *.txt list of picture paths in {str(root)!r}; {hint}")
    return files


def _read_list(file: Path) -> list[bytes]:
    data = file.read_bytes().removeprefix(b"\xef\xbb\xbf")  # Windows editors put this mark before UTF-8
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"train.dataset_path: {str(file)!r}, line {line}, is not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error
    lines = (line.strip() for line in data.splitlines())
    return [line for line in lines if line and not line.startswith(b"#")]

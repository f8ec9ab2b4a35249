"""Finished parts of an extraction, so that one that was killed goes on where it was.

A part is the features of some consecutive pictures in a file of its own, which is there whole or not at all. Its
name is a hash of what decides its content (network, transform, precision, kinds; path, size and time of each picture),
so parts of anything else are never taken for it. How many processes make the parts does not matter.

Letters: n pictures of a part, D embedding dim
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from dinov2.distributed import on_main_process
from dinov2.utils.files import atomic_write

PART_SIZE = 2048
PATCH_PART_SIZE = 256  # with patch grids, which are some thousand times as large
SUFFIX = ".h5"


@dataclass(frozen=True)
class Extraction:
    """Features of those of some pictures that could be read.

    Attributes:
        kept: int64 [n_kept], which of the pictures these are, ascending.
        unreadable: {path: reason} of all others.
        of_kinds: {kind: float32 [n_kept, D], or float16 [n_kept, h, w, D] for patch grids}; empty where n_kept is 0.
    """

    kept: np.ndarray
    unreadable: dict[str, str]
    of_kinds: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def features(self) -> np.ndarray:
        """Those of the kind that was asked for first."""
        return next(iter(self.of_kinds.values()))


class FeatureParts:
    """The parts of one extraction. All processes make this object, and at the same time.

    Args:
        folder: where the parts are; all processes must see the same one.
        identity: what decides the features of a picture.
        paths: all pictures.
        size: pictures of a part.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str], paths: Sequence[Path], size: int = PART_SIZE) -> None:
        self.folder = folder
        self.ranges = [range(start, min(start + size, len(paths))) for start in range(0, len(paths), size)]
        self.names: list[str] = on_main_process(
            lambda: [_name(identity, [paths[i] for i in part]) for part in self.ranges]
        )

    def missing(self) -> list[int]:
        """Numbers of the parts that are not there yet."""
        # from a listing: asking for each file makes network file systems remember that it was not there
        there = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        return [number for number, name in enumerate(self.names) if name not in there]

    def write(self, number: int, part: Extraction) -> None:
        """Keep a part; its `kept` counts from the start of the part."""
        with atomic_write(self.folder / self.names[number], "w+b") as stream, h5py.File(stream, "w") as file:
            file["kept"] = part.kept
            file.attrs["unreadable"] = json.dumps(part.unreadable)
            for kind, values in part.of_kinds.items():
                file[f"kinds/{kind}"] = values

    def read(self, number: int, kinds: Sequence[str]) -> Extraction:
        """A part with these kinds only.

        Raises:
            ValueError: if it is not there, or damaged.
        """
        path = self.folder / self.names[number]
        try:
            with h5py.File(path, "r") as file:
                kept = file["kept"][:]
                of_kinds = {kind: file[f"kinds/{kind}"][:] for kind in kinds} if len(kept) else {}
                return Extraction(kept, json.loads(file.attrs["unreadable"]), of_kinds)
        except (OSError, RuntimeError, KeyError) as error:
            raise ValueError(
                f"features: part {number} of {len(self.names)}, {str(path)!r}, is not there or is damaged ({error}); "
                f"all processes must write to one file system: see to that, remove the folder and start again"
            ) from error

    def remove(self) -> None:
        """Remove all parts, of this extraction and of others that wrote to the same folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _name(identity: Mapping[str, str], paths: Sequence[Path]) -> str:
    pictures = [[os.path.abspath(path), *_stamp(path)] for path in paths]
    content = json.dumps([sorted(identity.items()), pictures])
    return hashlib.sha256(content.encode()).hexdigest() + SUFFIX


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of change: a picture that was repaired is read again. Zeros for one that is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns

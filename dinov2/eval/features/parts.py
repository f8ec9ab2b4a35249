"""Finished parts of an extraction on disk: a killed extraction continues from them.

A part is the features of consecutive images, in a file that is complete or absent. Its name is a hash of everything
that its content depends on (network, transform, precision, kinds; path, size and time of each image), so a part of
another extraction is never used. The number of processes does not matter.

Dimension key:  n images of a part, D embedding dim
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py

from dinov2.distributed import on_main_process
from dinov2.eval.features.loop import Extraction
from dinov2.utils.files import atomic_write


class Parts:
    """The parts of one extraction. With several processes, all of them create this object together.

    Args:
        folder: of the part files; all processes see the same one.
        identity: what the features of an image depend on.
        paths: all images.
        ranges: positions of the images of each part.
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
        """Read these kinds of a part.

        Raises:
            ValueError: if the file is missing or damaged.
        """
        path = self.files[number]
        try:
            with h5py.File(path, "r") as file:
                kept = file["kept"][:]
                by_kind = {kind: file[f"kinds/{kind}"][:] for kind in kinds} if len(kept) else {}
                return Extraction(kept, json.loads(file.attrs["unreadable"]), by_kind)
        except (OSError, RuntimeError, KeyError) as error:
            raise ValueError(
                f"features: part {number} of {len(self.files)}, {str(path)!r}, is missing or damaged ({error}); all "
                f"processes must write to the same file system: check that, remove the folder and start again"
            ) from error

    def remove(self) -> None:
        """Remove the folder with all parts, also those of other extractions."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _file_name(identity: Mapping[str, str], paths: Sequence[Path]) -> str:
    images = [[os.path.abspath(path), *_size_and_time(path)] for path in paths]
    content = json.dumps([sorted(identity.items()), images])
    return hashlib.sha256(content.encode()).hexdigest() + ".h5"


def _size_and_time(path: Path) -> tuple[int, int]:
    """Return size and modification time, so that a repaired image is read again; zeros for a missing file."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns

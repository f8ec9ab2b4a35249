"""Record the images that cannot be read in `bad_images.csv` in the run's folder, and limit their number."""

import csv
import logging
from collections.abc import Iterable
from pathlib import Path

from dinov2.data.datasets.decode import UnreadableImageError, decode_image
from dinov2.data.datasets.sources import read_image
from dinov2.data.datasets.tables import open_table
from dinov2.distributed import all_gather_objects, is_main_process
from dinov2.utils.files import atomic_write

logger = logging.getLogger("dinov2")


class BadImages:
    """Record each unreadable image once, over all processes and resumes, and stop a run with too many of them.

    A resumed run drops the images that can be read again.
    """

    def __init__(self, path: Path, n_listed: int, max_fraction: float) -> None:
        self.path, self.n_listed, self.max_fraction = path, n_listed, max_fraction
        self.reasons: dict[str, str] = {}
        self._new: dict[str, str] = {}
        self._is_written = True
        if path.is_file():
            recorded = dict(values for _, values in open_table(path, "bad images").rows("path", "reason"))
            self.reasons = {image: reason for image, reason in recorded.items() if not _is_readable(image)}

    def record(self, failures: Iterable[tuple[str, str]]) -> None:
        """Add (path, reason) pairs of this process."""
        for path, reason in failures:
            path = path.encode(errors="backslashreplace").decode()  # a name that is not UTF-8 text
            if path not in self.reasons and path not in self._new:
                logger.warning("cannot read %s (%s); another image takes its place", path, reason)
                self._new[path] = reason

    def settle(self) -> None:
        """Gather and write the records; every process must call this, and raises if there are too many."""
        gathered = {path: reason for new in all_gather_objects(self._new) for path, reason in new.items()}
        self._new = {}
        if gathered.keys() <= self.reasons.keys() and self._is_written:
            return
        self.reasons = {**gathered, **self.reasons}
        if is_main_process():
            self._write()
        if len(self.reasons) > self.max_fraction * self.n_listed:
            raise OSError(
                f"train.max_bad_fraction: {len(self.reasons)} of {self.n_listed} listed images cannot be read, more "
                f"than the {self.max_fraction:.2%} allowed; see {self.path}, then mend the lists or raise the limit"
            )

    def _write(self) -> None:
        try:
            with atomic_write(self.path, "w") as file:
                csv.writer(file).writerows([("path", "reason"), *self.reasons.items()])
        except OSError as error:  # a full disk must not end a run
            if self._is_written:
                logger.warning("cannot write %s (%s); it is tried again later", self.path, error.strerror)
            self._is_written = False
        else:
            self._is_written = True


def _is_readable(path: str) -> bool:
    try:
        decode_image(read_image(path), name=path)
    except UnreadableImageError:
        return False
    return True

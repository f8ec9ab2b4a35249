"""Write and read checkpoints to resume from, with any number of processes; each is complete or absent.

<folder>/iteration_<n>/   n iterations done
    __<rank>_<i>.distcp   tensors of each process (torch.distributed.checkpoint)
    .metadata             place of each tensor
    run.json              iteration and other plain numbers
    checksums_all.json    CRC-32 and size of these files

A checkpoint is written into a hidden folder in the background. When all processes have written and synced their files,
the folder gets its final name. Checksums are verified before a checkpoint is used.
"""

import itertools
import json
import logging
import pickle
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from dinov2.distributed import all_gather_objects, get_rank, get_world_size, is_enabled, on_main_process
from dinov2.utils.files import atomic_write, check_regular_file, sync_folder
from dinov2.utils.sharded_checkpoints import TensorReader, first_error_line

logger = logging.getLogger("dinov2")

# Warnings about checkpoints of a single process, which are intended, and about torch's own use of its storages
for _noise in ("torch.distributed is disabled, unavailable", "TypedStorage is deprecated"):
    warnings.filterwarnings("ignore", message=_noise, module=r"torch\.distributed\.checkpoint")

_PREFIX = "iteration_"
_NUMBERS, _CHECKSUMS = "run.json", "checksums_all.json"
_CHUNK_BYTES = 1 << 24

Tensors = Mapping[str, Any]  # nested mappings with tensors as leaves


class Checkpointer:
    """Keeps the newest `keep` checkpoints of a run, and all of every `milestone_period`-th iteration.

    Every process makes one and calls its methods at the same points of the run.
    """

    def __init__(self, folder: Path, keep: int, milestone_period: int = 0) -> None:
        self.folder, self.keep, self.milestone_period = folder, keep, milestone_period
        self._group: Any = None
        self._pending: Future[bool] | None = None
        self._last_is_good = True

    def save(self, iteration: int, tensors: Tensors, numbers: Mapping[str, Any]) -> None:
        """Start to write the state after `iteration` iterations; tensors are copied, so the training may continue.

        It waits for the previous checkpoint. A failure is logged and does not change earlier checkpoints; `wait`
        returns the outcome.

        Args:
            tensors: nested mappings of tensors; DTensors are written shard by shard.
            numbers: plain values for JSON.
        """
        self.wait()
        if self._group is None and is_enabled():
            self._group = dist.new_group(backend="gloo")  # separates its messages from those of the training
        final = self.path_of(iteration)
        temporary = self.folder / f".{final.name}.tmp"
        try:
            on_main_process(lambda: self._make_room(temporary))
            future = dcp.async_save(
                dict(tensors),
                storage_writer=_CommittingWriter(
                    temporary, lambda: self._commit(temporary, final, {"iteration": iteration, **numbers})
                ),
                process_group=self._group,
                no_dist=not is_enabled(),
            )
        except OSError as error:
            self._report(iteration, error)
            return
        assert isinstance(future, Future), "torch returns something else only with asynchronous staging"
        self._pending = Future()
        future.add_done_callback(partial(self._settle, iteration, self._pending))

    def wait(self) -> bool:
        """Wait for the checkpoint that is being written; return False if the write failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._last_is_good = pending.result()
        return self._last_is_good

    def path_of(self, iteration: int) -> Path:
        """Return the folder of the checkpoint after `iteration` iterations."""
        return self.folder / f"{_PREFIX}{iteration:07d}"

    def paths(self) -> list[Path]:
        """List all complete checkpoints, oldest first."""
        folders = (path for path in self.folder.glob(f"{_PREFIX}*") if path.is_dir() and _number(path) >= 0)
        return sorted(folders, key=_number)

    def newest(self, before: int | None = None) -> tuple[Path, dict[str, Any]] | None:
        """Find the newest undamaged checkpoint up to iteration `before`, and its numbers; None if there is none.

        Every process checks a part of the files.
        """
        paths = on_main_process(self.paths)
        if before is not None:
            paths = [path for path in paths if _number(path) <= before]
        for path in reversed(paths):
            faults = [fault for faults in all_gather_objects(_find_damage(path)) for fault in faults]
            if not faults:
                return path, json.loads((path / _NUMBERS).read_text(encoding="utf-8"))
            logger.warning("checkpoint %s is damaged (%s); trying the one before", path, "; ".join(faults[:3]))
        if paths:
            raise ValueError(
                f"none of the {len(paths)} checkpoints in {self.folder} can be read; "
                "start under another --name, or remove that folder if nothing in it is needed"
            )
        return None

    def set_aside_after(self, iteration: int) -> None:
        """Rename checkpoints after `iteration`, from which a run continues: they are not its newest ones."""
        for path in self.paths():
            if _number(path) > iteration:
                names = (f"unused_{path.name}_{n}" for n in itertools.count(1))  # a run may roll back several times
                aside = next(free for name in names if not (free := path.with_name(name)).exists())
                path.rename(aside)
                logger.warning("%s is now %s, since the run continues from iteration %d", path, aside.name, iteration)

    def load(self, path: Path, tensors: Tensors) -> None:
        """Fill `tensors` in place from the checkpoint at `path`, however many processes wrote it."""
        try:
            dcp.load(
                dict(tensors), storage_reader=TensorReader(path), process_group=self._group, no_dist=not is_enabled()
            )
        except (CheckpointException, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path}: {first_error_line(error)}") from error

    def _settle(self, iteration: int, pending: "Future[bool]", written: "Future[Any]") -> None:
        """Log whether the checkpoint was written and pass the outcome to `pending`.

        `pending` gets True, False for a failed write, or the error itself if it is unexpected.
        """
        error = written.exception()
        if error is None:
            logger.info("checkpoint: %s", self.path_of(iteration))
            pending.set_result(True)
        elif isinstance(error, (CheckpointException, OSError, RuntimeError)):
            try:
                self._report(iteration, error)  # it reads the disk, which may fail
            finally:
                pending.set_result(False)
        else:
            pending.set_exception(error)

    def _make_room(self, temporary: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for incomplete in self.folder.glob(f".{_PREFIX}*.tmp"):
            shutil.rmtree(incomplete)  # left by a process that was killed while it wrote
        temporary.mkdir()

    def _commit(self, temporary: Path, final: Path, numbers: dict[str, Any]) -> None:
        """Give the folder its final name, on the coordinating process, when all processes have written their files."""
        with atomic_write(temporary / _NUMBERS, "w") as file:
            json.dump(numbers, file)
        files = [temporary / ".metadata", temporary / _NUMBERS, *sorted(temporary.glob("*.distcp"))]
        sums = {file.name: {"crc32": _crc32(file), "bytes": file.stat().st_size} for file in files}
        with atomic_write(temporary / _CHECKSUMS, "w") as file:
            json.dump(sums, file)
        if final.exists():
            self._remove(final)
        temporary.rename(final)
        sync_folder(self.folder)
        for old in self.paths()[: -self.keep]:
            if not self.milestone_period or _number(old) % self.milestone_period:
                self._remove(old)

    def _remove(self, path: Path) -> None:
        """Rename a checkpoint, then remove it: a folder with its final name must be complete."""
        doomed = path.with_name(f".{path.name}.old.tmp")
        path.rename(doomed)
        shutil.rmtree(doomed)

    def _report(self, iteration: int, error: BaseException) -> None:
        self._last_is_good = False
        kept = self.paths()
        logger.error(
            "checkpoint after iteration %d could not be written (%s); %s. Make room or repair the disk: the run "
            "continues and tries again at its next checkpoint",
            *(
                iteration,
                first_error_line(error),
                f"{kept[-1]} is the last good one" if kept else "there is none before it",
            ),
        )


class _CommittingWriter(FileSystemWriter):
    """Commits a checkpoint when all processes have written."""

    def __init__(self, path: Path, commit: Callable[[], None]) -> None:
        super().__init__(path, single_file_per_rank=True, sync_files=True)
        self._commit = commit

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        self._commit()


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value


def _find_damage(path: Path) -> list[str]:
    """List the damage in this process's part of the files."""
    faults = []
    lists = {path / _CHECKSUMS, *path.glob("checksums_*.json")}  # in old checkpoints, each process wrote its own
    try:
        contents = [json.loads(check_regular_file(file).read_bytes()) for file in lists]
        expected = {
            name: (int(entry["bytes"]), entry["crc32"]) for content in contents for name, entry in content.items()
        }
    except (OSError, ValueError, AttributeError, TypeError, LookupError, RecursionError) as error:
        return [f"its checksums cannot be read: {error}"]
    if not expected:
        return ["its checksums list no file"]
    for name, (n_bytes, crc32) in sorted(expected.items())[get_rank() :: get_world_size()]:
        file = path / name
        try:
            if not file.is_file():
                faults.append(f"{name} is missing")
            elif file.stat().st_size != n_bytes:
                faults.append(f"{name} has {file.stat().st_size} of {n_bytes} bytes")
            elif _crc32(file) != crc32:
                faults.append(f"{name} has changed since it was written")
        except (OSError, ValueError) as error:  # of the disk; a zero byte in a name
            faults.append(f"{name} cannot be read: {error}")
    return faults


def _number(path: Path) -> int:
    digits = path.name.removeprefix(_PREFIX)
    return int(digits) if digits.isdecimal() else -1

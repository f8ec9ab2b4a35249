"""Locks between processes and between machines, by fcntl.lockf, which the kernel gives back when a process dies.

Unlike flock they work on NFS, and forked workers do not keep them. A process that closes any descriptor of a file
loses its locks on it, so each lock file is open at most once in a process.
"""

import fcntl
import logging
import os
from pathlib import Path

logger = logging.getLogger("dinov2")

_in_use: dict[Path, int] = {}  # descriptors of IN_USE files; open until this process ends
_told_of: set[int] = set()


def _lock(handle: int, kind: int) -> bool | None:
    """Whether the lock was had; None where the file system has none."""
    try:
        fcntl.lockf(handle, kind)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        device = os.fstat(handle).st_dev
        if device not in _told_of:
            _told_of.add(device)
            logger.info("packed cache: its file system has no locks (%s); builders may do work twice", error.strerror)
        return None
    return True


class PartLock:
    """The right to build a part of the cache, and the list of shards that builders made of it.

    Who gets the lock reads in its file what others finished: a file system that shows new files to other machines
    late still shows this file as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_certain = False  # that nobody else has it; never where the file system has no locks
        self._handle: int | None = None

    def take(self) -> bool:
        """Try to get it, without waiting. Where the file system has no locks, everybody gets it.

        Raises:
            OSError: the lock file cannot be written.
        """
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        locked = _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if locked is False:
            os.close(handle)
            return False
        self._handle, self.is_certain = handle, locked is True
        return True

    def shards(self) -> list[str]:
        """Names that were added, some perhaps of shards that were never finished or are gone again."""
        assert self._handle is not None, "the lock is taken before its file is read"
        size = os.fstat(self._handle).st_size
        return os.pread(self._handle, size, 0).decode().split()

    def add(self, name: str) -> None:
        """Tell later holders of a shard that is about to appear."""
        assert self._handle is not None, "the lock is taken before its file is written"
        os.write(self._handle, f"{name}\n".encode())

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def share(path: Path) -> None:
    """Say, until this process ends, that the files beside `path` are in use here. Does nothing if `path` is missing."""
    handle = _open_in_use(path)
    if handle is not None:
        _lock(handle, fcntl.LOCK_SH)  # waits while another process removes files


def _open_in_use(path: Path) -> int | None:
    handle = _in_use.get(path)
    try:
        if handle is not None and os.path.samestat(os.fstat(handle), os.stat(path)):
            return handle
        try:
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # somebody else's cache, which is only read here
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    _in_use[path] = handle
    return handle


class OnlyUser:
    """A context in which nobody else has the files beside `path` in use; false if that cannot be had now.

    with OnlyUser(path) as alone:
        if alone: ...
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def __enter__(self) -> bool:
        handle = _open_in_use(self.path)
        if handle is None:
            return False
        self._handle = handle
        return _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB) is True

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            _lock(self._handle, fcntl.LOCK_SH)

"""Files that exist whole or not at all, and their checksums."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

PathLike: TypeAlias = str | os.PathLike[str]

_BLOCK_BYTES = 1 << 20


@contextmanager
def atomic_write(path: PathLike, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary neighbour of `path`; rename it to `path` once the block has ended and the bytes are on disk.

    If the block raises, or the process dies inside it, whatever stood at `path` before still stands there.

    Args:
        path: the final name; its folder is made if missing.
        mode: "wb" or "w" (text is UTF-8 with "\\n" line ends).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    is_text = "b" not in mode
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with open(handle, mode, encoding="utf-8" if is_text else None, newline="\n" if is_text else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sync_folder(path.parent)


def _umask() -> int:
    # mkstemp makes files that only the owner reads; others in the group expect the usual rights
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Make the rename itself durable; some file systems do not let folders be opened, and those need no sync."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def file_sha256(path: PathLike) -> str:
    """SHA-256 of a file, in hexadecimal; of a folder, that of the names and SHA-256 of the files in it."""
    digest = hashlib.sha256()
    if os.path.isdir(path):
        for file in sorted(file for file in Path(path).rglob("*") if file.is_file()):
            digest.update(f"{file_sha256(file)}  {file.relative_to(path).as_posix()}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as opened:
        while block := opened.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()

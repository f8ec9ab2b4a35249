"""Write files atomically, and compute their checksums."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeAlias

PathLike: TypeAlias = str | os.PathLike[str]


@contextmanager
def atomic_write(path: PathLike, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`, and rename it to `path` after the block, when its bytes are on disk.

    If the block raises an error or the process is killed, an earlier file at `path` does not change.

    Args:
        path: the final name; its folder is made if missing.
        mode: "wb" or "w" (text is UTF-8 with "\\n" line ends).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    is_text = "b" not in mode
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, mode, encoding="utf-8" if is_text else None, newline="\n" if is_text else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Write a rename in `folder` to disk; file systems that do not open folders need no sync."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def file_sha256(path: PathLike) -> str:
    """Compute the SHA-256 of a file in hexadecimal; of a folder, that of the names and SHA-256 of its files."""
    if os.path.isdir(path):
        files = sorted(file for file in Path(path).rglob("*") if file.is_file())
        lines = [f"{file_sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    digest = hashlib.sha256()
    with open(path, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""Write files atomically, compute checksums, and resolve a user's paths and URLs to files on this machine.

Paths may contain `~` and `$VARIABLES`. `http://` and `https://` URLs are downloaded once, and so are `s3://` URLs if
boto3 is installed, by iopath. Downloads are stored in torch.hub's folder (TORCH_HOME moves it), each URL in its own
folder. A URL may end in `#sha256=<64 digits>`, the checksum that its file must have.
"""

import errno
import glob
import hashlib
import importlib.util
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, TypeAlias
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from filelock import FileLock
from iopath.common.file_io import PathManager
from tqdm import tqdm

from dinov2.utils.command import find_cause

PathLike: TypeAlias = str | os.PathLike[str]

SILENCE_SECONDS = 60.0  # of a server, after which a try of a download ends
PAUSES = (1.0, 4.0)  # seconds before the second and third try
RETRIED_CODES = (408, 429, 500, 502, 503, 504)  # of HTTP: the server asks to try again


@contextmanager
def atomic_write(path: PathLike, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`, and rename it to `path` after the block, when its bytes are on disk.

    If the block raises an error or the process is killed, an earlier file at `path` does not change. The folder is made
    if missing; text is UTF-8, except for names of files that are not: their bytes are written as they are.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a folder or a device, which no file can replace; choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "errors": "surrogateescape", "newline": "\n"}
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = find_cause(error)
        if isinstance(cause, OSError) and cause.filename is None:
            cause.filename = str(path)  # a full disk: neither `write` nor torch.save names the file
        if cause is error:
            raise
        raise cause from error
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
    with open(path, "rb") as opened, name_in_errors(path):
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def name_in_errors(path: PathLike) -> Iterator[None]:
    """Add a file's name to an error of the system in this block; errors of reads and writes have none."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def check_regular_file(path: PathLike, setting: str = "") -> Path:
    """Return `path` as a Path if it is a regular file with bytes in it that this user may read.

    Opening a named pipe or a device could wait for ever, and files below /proc have no size.

    Raises:
        FileNotFoundError, PermissionError, ValueError: it is not; the message names the setting and what it is instead.
    """
    path = Path(path)
    where = f"{setting}: {path}" if setting else str(path)
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}: no such file; check the path") from error
    except ValueError as error:  # a zero byte
        raise ValueError(f"{str(path)!r} is no name of a file ({error})") from error
    kind = next((name for is_kind, name in _OTHER_KINDS if is_kind(status.st_mode)), None)
    if kind is not None:
        raise ValueError(f"{where} is {kind}, not a file; give the path of a file")
    if status.st_size == 0:
        raise ValueError(f"{where} is empty (0 bytes); copy or write it again")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{where}: you may not read this file; ask for the right to, or copy it")
    return path


def is_web_page(start: bytes) -> bool:
    """Return whether a file begins like HTML or XML; other formats have zero bytes near their start."""
    return start.lstrip().startswith(b"<") and b"\0" not in start


_OTHER_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


# --- paths and URLs -------------------------------------------------------------------------------------------------


def user_path(text: PathLike) -> Path:
    """Return a path with `~` and `$VARIABLES` expanded, which shells leave alone in `--flag=~/runs`."""
    return Path(os.path.expanduser(os.path.expandvars(text)))


def local_path(source: PathLike) -> Path:
    """Return the local file or folder of a path or URL; a URL is downloaded once.

    Raises:
        FileNotFoundError: the server has no such file. A path is not checked.
        ConnectionError: a URL cannot be downloaded; the message says where to put the file instead.
        ValueError: the URL is of an unknown kind, or the download has another checksum or is a web page.
    """
    text = os.fspath(source)
    url = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?=[^/])", text)
    if url is None:
        return user_path(text)
    kind = url[1].lower()
    text = f"{kind}://{text[url.end() :]}"  # pathlib turns two slashes into one
    if kind in ("http", "https"):
        text, _, sha256 = text.partition("#sha256=")
        name = re.sub(r"[^\w.+-]", "_", unquote(urlsplit(text).path.rpartition("/")[2])).lstrip(".") or "file"
        # a folder for each URL, since two URLs may end in the same name
        folder = cache_folder() / f"url_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        return download(text, folder / name[-200:], sha256.lower())
    if kind == "s3" and importlib.util.find_spec("boto3") is not None:
        from iopath.common.s3 import S3PathHandler

        manager = PathManager()
        manager.set_logging(False)
        manager.register_handler(S3PathHandler(cache_dir=str(cache_folder())))
        return Path(manager.get_local_path(text))
    hint = "; install boto3 for s3://" if kind == "s3" else ""
    raise ValueError(f"{text}: only http://, https://, s3:// and paths can be read here{hint}")


def cache_folder() -> Path:
    """Return the folder of downloads."""
    import torch  # here, since commands that only read a run's files start without it

    return Path(torch.hub.get_dir()) / "checkpoints"


def download(url: str, file: Path, sha256: str = "") -> Path:
    """Download `url` to `file`, unless it exists; `sha256` is the checksum that it must have, empty if unknown.

    A download that was cut or killed goes on where it ended if the server names the version of its file (ETag).
    """
    if file.is_file():
        _check(file, sha256, f"remove it, and it is downloaded again from {url}")
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with lock_if_possible(file.with_name(f"{file.name}.lock")) as is_locked:
        if not file.is_file():  # no other process has downloaded it meanwhile
            part = _download(url, file, "" if is_locked else f".{uuid.uuid4().hex[:8]}")
            try:
                _check(part, sha256, f"it came from {url} and is not kept; try again, or put the right file at {file}")
                part.replace(file)
            finally:
                part.unlink(missing_ok=True)
            if is_locked:  # of older versions, and of processes that were killed
                for unfinished in file.parent.glob(f"{glob.escape(file.name)}*.part"):
                    unfinished.unlink()
    return file


@contextmanager
def lock_if_possible(path: Path) -> Iterator[bool]:
    """Hold a lock between processes, after an hour's wait at most; yield False on a file system without locks."""
    lock = FileLock(path, timeout=3600)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _check(file: Path, sha256: str, advice: str) -> None:
    with open(file, "rb") as opened:
        if is_web_page(opened.read(256)):
            raise ValueError(f"{file}: holds a web page, not what was asked for; {advice}")
    if sha256 and (digest := file_sha256(file)) != sha256:
        raise ValueError(f"{file}: has the sha256 {digest} instead of {sha256}; {advice}")


def _download(url: str, file: Path, suffix: str) -> Path:
    """Download beside `file` in up to three tries; return the temporary file, which is whole."""
    reason: object = None
    for pause in (0.0, *PAUSES):
        time.sleep(pause)
        try:
            return _try_download(url, file, suffix)
        except HTTPError as error:
            if error.code in (404, 410):
                raise FileNotFoundError(f"{url}: the server has no such file ({error.code})") from error
            if error.code not in RETRIED_CODES:
                raise ConnectionError(f"{url}: the server says {error.code} {error.reason}") from error
            reason = f"the server says {error.code} {error.reason}"
        except (URLError, ConnectionError, TimeoutError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                reason = f"the server sent nothing for {SILENCE_SECONDS:g} s"
    raise ConnectionError(
        f"{url} cannot be downloaded ({reason}); without a network, fetch it elsewhere and put it at {file}, or "
        "pass the path of your copy"
    )


def _try_download(url: str, file: Path, suffix: str) -> Path:
    """Download once, from where the temporary file of an earlier try ends if the server still has the same version."""
    with urlopen(url, timeout=SILENCE_SECONDS) as answer:
        n_bytes = int(answer.headers.get("Content-Length") or 0)
        version = answer.headers.get("ETag") or ""
        can_resume = version.startswith('"') and not suffix  # W/"..." marks versions that may differ in bytes
        key = f".{hashlib.sha256(f'{url} {version} {n_bytes}'.encode()).hexdigest()[:8]}" if can_resume else suffix
        part = file.with_name(f"{file.name}{key}.part")
        n_done = part.stat().st_size if can_resume and part.is_file() else 0
        if not 0 < n_done <= n_bytes:
            return _write(answer, part, 0, n_bytes, can_resume)
    if n_done == n_bytes:
        return part
    request = Request(url, headers={"Range": f"bytes={n_done}-", "If-Range": version})
    with urlopen(request, timeout=SILENCE_SECONDS) as answer:
        return _write(answer, part, n_done if answer.status == 206 else 0, n_bytes, can_resume)


def _write(answer: Any, part: Path, n_done: int, n_bytes: int, is_kept: bool) -> Path:
    """Write an answer to `part` after its first `n_done` bytes, with a progress bar; a cut is a ConnectionError."""
    free = shutil.disk_usage(part.parent).free
    if n_bytes - n_done > free:
        raise OSError(errno.ENOSPC, f"the download needs {n_bytes - n_done:,} bytes, and {free:,} are free", str(part))
    sizes = {"initial": n_done, "total": n_bytes or None, "unit": "B", "unit_scale": True, "unit_divisor": 1024}
    try:
        with (
            name_in_errors(part),
            open(part, "r+b" if n_done else "wb") as opened,
            tqdm(desc=part.name, **sizes) as bar,
        ):
            opened.seek(n_done)
            for block in _blocks(answer):
                bar.update(opened.write(block))
        if part.stat().st_size < n_bytes:
            raise ConnectionError(f"got only {part.stat().st_size} out of {n_bytes} bytes")
    except BaseException:
        if not is_kept and part.is_file():
            part.unlink()
        raise
    return part


def _blocks(answer: Any) -> Iterator[bytes]:
    """Yield the bytes of an answer; any error of the network is a ConnectionError or TimeoutError."""
    try:
        while block := answer.read(1 << 20):
            yield block
    except TimeoutError:
        raise
    except (OSError, HTTPException) as error:
        raise ConnectionError(str(error)) from error

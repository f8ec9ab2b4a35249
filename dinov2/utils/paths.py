"""Paths and URLs that a user gives, as files on this machine.

iopath opens them: paths with `~` and `$VARIABLES`; `http://` and `https://`, which are downloaded once; and `s3://`
where boto3 is installed. Downloads are kept in torch.hub's folder (TORCH_HOME moves it), each URL in a folder of its
own. A URL may end in `#sha256=<64 digits>`, which its file must then have.
"""

import hashlib
import importlib.util
import os
import re
import shutil
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

import torch
from iopath.common.file_io import HTTPURLHandler, PathManager, file_lock
from tqdm import tqdm

from dinov2.utils.files import PathLike, file_sha256

SILENCE_SECONDS = 60.0  # of a server, before a download is given up


def local_path(source: PathLike) -> Path:
    """Return the file or folder on this machine that a path or URL names; a URL is downloaded once.

    Raises:
        FileNotFoundError: the server has no such file. A path is not checked.
        ConnectionError: a URL cannot be downloaded; the message says which file to put where instead.
        ValueError: a URL of an unknown kind; or what was downloaded has another checksum, or is a web page.
    """
    text = os.fspath(source)
    url = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?=[^/])", text)
    if url is None:
        return Path(os.path.expanduser(os.path.expandvars(text)))
    text = f"{url[1].lower()}://{text[url.end() :]}"  # pathlib makes one slash of two
    manager, prefixes = _path_manager(str(cache_folder()))
    if not text.startswith(prefixes):
        hint = "; install boto3 for s3://" if text.startswith("s3://") else ""
        raise ValueError(f"{text}: only {', '.join(prefixes)} and paths can be read here{hint}")
    return Path(manager.get_local_path(text))


def cache_folder() -> Path:
    """Return the folder where downloads are kept."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def download(url: str, file: Path, sha256: str = "") -> Path:
    """Download `url` to `file`, unless it is there; of several processes that ask for a file, one downloads.

    Args:
        sha256: the checksum that the file must have; empty where none is known.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: as `local_path`.
    """
    if file.is_file():
        _check(file, sha256, f"remove it, and it is downloaded again from {url}")
        return file
    with file_lock(str(file)):
        if not file.is_file():  # no other process was faster
            part = file.with_name(f"{file.name}.part")
            try:
                _download(url, part, file)
                _check(part, sha256, f"it came from {url} and is not kept; try again, or put the right file at {file}")
                part.replace(file)
            finally:
                part.unlink(missing_ok=True)
    return file


def _check(file: Path, sha256: str, advice: str) -> None:
    with open(file, "rb") as opened:
        if opened.read(256).lstrip().startswith(b"<"):
            raise ValueError(f"{file}: holds a web page, not what was asked for; {advice}")
    if sha256 and (digest := file_sha256(file)) != sha256:
        raise ValueError(f"{file}: has the sha256 {digest} instead of {sha256}; {advice}")


def _download(url: str, part: Path, file: Path) -> None:
    """Download with a progress bar; a connection that ends early or falls silent is an error."""
    try:
        with urlopen(url, timeout=SILENCE_SECONDS) as answer, open(part, "wb") as opened:
            n_bytes = int(answer.headers.get("Content-Length", 0))
            with tqdm.wrapattr(opened, "write", n_bytes or None, desc=file.name) as written:
                shutil.copyfileobj(answer, written)
        if part.stat().st_size < n_bytes:
            raise ConnectionError(f"got only {part.stat().st_size} out of {n_bytes} bytes")
    except HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError(f"{url}: the server has no such file ({error.code})") from error
        raise ConnectionError(f"{url}: the server says {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            reason = f"the server sent nothing for {SILENCE_SECONDS:g} s"
        raise ConnectionError(
            f"{url} cannot be downloaded ({reason}); without a network, fetch it elsewhere and put it at {file}, or "
            "pass the path of your copy"
        ) from error


class _CachedURLHandler(HTTPURLHandler):
    """Keep each URL in a folder of its own, also where the last parts of two URLs are the same."""

    def _get_supported_prefixes(self) -> list[str]:
        return ["http://", "https://"]

    def _get_local_path(self, path: str, force: bool = False, cache_dir: str | None = None, **kwargs: Any) -> str:
        url, _, sha256 = path.partition("#sha256=")
        name = re.sub(r"[^\w.+-]", "_", unquote(urlsplit(url).path.rpartition("/")[2])).lstrip(".") or "file"
        folder = cache_folder() / f"url_{hashlib.sha256(url.encode()).hexdigest()[:16]}"
        return str(download(url, folder / name[-200:], sha256.lower()))


@lru_cache(maxsize=1)
def _path_manager(cache: str) -> tuple[Any, tuple[str, ...]]:
    manager = PathManager()
    manager.set_logging(False)
    handlers: list[Any] = [_CachedURLHandler()]
    if importlib.util.find_spec("boto3") is not None:
        from iopath.common.s3 import S3PathHandler

        handlers.append(S3PathHandler(cache_dir=cache))
    for handler in handlers:
        manager.register_handler(handler)
    return manager, tuple(prefix for handler in handlers for prefix in handler._get_supported_prefixes())

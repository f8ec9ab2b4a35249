"""Weights by name or URL: fetched once, whole, checked, and kept in torch.hub's folder for the next time.

The folder is `torch.hub.get_dir()/checkpoints` (TORCH_HOME moves it). A release is kept there under its own file name,
so a file fetched by hand or by torch.hub is found; files of other URLs go into a folder of their own for each URL.
Beside a file F there may be

    F.sha256        its checksum, in the format of sha256sum: what is published or, if nothing is, of the file as first
                    seen. F is hashed again when it is newer than this, and must not have changed.
    F.part          what has arrived of it so far; F.part.json tells what it is a part of
    .F.lock         held by the process that fetches it; others wait

Mirrors: DINOV2_RELEASES_URL and DINOBLOOM_RELEASES_URL replace the beginning of the releases' URLs.
"""

import errno
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from email.message import Message
from functools import lru_cache
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, TypeAlias
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import torch
from iopath.common.file_io import HTTPURLHandler, PathManager

from dinov2.utils.files import atomic_write, sync_folder

PathLike: TypeAlias = str | os.PathLike[str]

logger = logging.getLogger("dinov2")

TRIES = 4  # without a single new byte
SECONDS_BETWEEN_TRIES = 2.0  # doubled each time
SECONDS_OF_SILENCE = 60.0
SECONDS_BETWEEN_REPORTS = 10.0
TEMPORARY_STATUS = (408, 425, 429, 500, 502, 503, 504)
BLOCK_BYTES = 1 << 20
MEGABYTE = 1e6


@dataclass(frozen=True)
class Release:
    """Published weights.

    Attributes:
        name: what users call it.
        arch: as `dinov2.models` knows it.
        img_size: side in pixels of the pictures that its position embeddings are for.
        folder: default beginning of its URL.
        folder_variable: environment variable that replaces that beginning.
        path: the rest of the URL.
        title: for readers.
        sha256: of the file; empty where none is published.
    """

    name: str
    arch: str
    img_size: int
    folder: str
    folder_variable: str
    path: str
    title: str
    sha256: str = ""

    @property
    def url(self) -> str:
        return f"{(os.environ.get(self.folder_variable) or self.folder).rstrip('/')}/{self.path}"

    @property
    def file(self) -> Path:
        """Where it is kept."""
        return cache_folder() / urlsplit(self.path).path.rpartition("/")[2]


def _dinov2(letter: str, has_registers: bool) -> Release:
    arch = f"dinov2_vit{letter}14"
    title = f"DINOv2's ViT-{'g' if letter == 'g' else letter.upper()}/14"
    return Release(
        name=arch + ("_reg" if has_registers else ""),
        arch=arch + ("_reg" if has_registers else ""),
        img_size=518,
        folder="https://dl.fbaipublicfiles.com/dinov2",
        folder_variable="DINOV2_RELEASES_URL",
        path=f"{arch}/{arch}{'_reg4' if has_registers else ''}_pretrain.pth",
        title=f"{title} with four registers (arXiv 2309.16588)" if has_registers else f"{title} (arXiv 2304.07193)",
    )


def _dinobloom(letter: str, sha256: str = "") -> Release:
    return Release(
        name=f"dinobloom_{letter}",
        arch=f"dinov2_vit{letter}14",
        img_size=224,
        folder="https://zenodo.org/records/10908163/files",
        folder_variable="DINOBLOOM_RELEASES_URL",
        path=f"DinoBloom-{letter.upper()}.pth?download=1",
        title=f"DinoBloom-{letter.upper()}, for single blood and bone-marrow cells (arXiv 2404.05022)",
        sha256=sha256,
    )


RELEASES: dict[str, Release] = {
    release.name: release
    for release in (
        # the one checksum that is published, by users of the file
        _dinobloom("s", "c2f7990b003e89bcece80e379fb8fe0ba2ec392ce19b286e8a294abd99568e44"),
        *(_dinobloom(letter) for letter in "blg"),
        *(_dinov2(letter, has_registers) for has_registers in (False, True) for letter in "sblg"),
    )
}


def resolve_weights(source: PathLike) -> Path:
    """What `source` means, on this machine: a path is given back as it is, a name or URL is downloaded once.

    Args:
        source: an existing file or folder; a name out of `RELEASES`; or a URL. An http(s) URL may end in
            `#sha256=<64 digits>`, which the file must then have. s3:// needs boto3.

    Raises:
        FileNotFoundError: it is none of these, or the server has no such file.
        ConnectionError: it cannot be downloaded; the message says which file to put where instead.
        ValueError: the file does not have its checksum, or is a web page; or a URL of an unknown kind.
    """
    text = os.fspath(source)
    if url := _as_url(text):
        return Path(_path_manager(url).get_local_path(url))
    if Path(text).exists():
        return Path(text)
    if text in RELEASES:
        return Path(_path_manager(text).get_local_path(RELEASES[text].url))
    close = get_close_matches(text, RELEASES, n=3)
    names = f"perhaps {' or '.join(close)}?" if close else f"names are {', '.join(RELEASES)}"
    raise FileNotFoundError(f"checkpoint: no file or folder {text!r}, and no release has that name; {names}")


def cache_folder() -> Path:
    """Where downloads are kept."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def file_sha256(path: PathLike) -> str:
    """SHA-256 of a file, in hexadecimal; of a folder, that of the names and SHA-256 of the files in it."""
    digest = hashlib.sha256()
    if os.path.isdir(path):
        for file in sorted(file for file in Path(path).rglob("*") if file.is_file()):
            digest.update(f"{file_sha256(file)}  {file.relative_to(path).as_posix()}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as opened:
        while block := opened.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _as_url(text: str) -> str:
    """`text` if it is a URL, "" otherwise; pathlib makes one slash of two, which is undone."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?=[^/])", text)
    return f"{match[1].lower()}://{text[match.end() :]}" if match else ""


# --- iopath ---------------------------------------------------------------------------------------------------------


class CheckedHTTPHandler(HTTPURLHandler):
    """iopath's door to http(s), with downloads of this module: resumed, checked, one process at a time."""

    def _get_supported_prefixes(self) -> list[str]:
        return ["http://", "https://"]

    def _get_local_path(self, path: str, force: bool = False, cache_dir: str | None = None, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        url, _, fragment = path.partition("#")
        release = next((known for known in RELEASES.values() if known.url == url), None)
        if release is not None:
            file, sha256 = release.file, release.sha256
        else:
            file, sha256 = _file_of(url), ""
        if cache_dir is not None:
            file = Path(cache_dir) / file.name
        if fragment.startswith("sha256="):
            sha256 = fragment.removeprefix("sha256=").lower()
        return str(fetch(url, file, sha256, force))


def _file_of(url: str) -> Path:
    """Two URLs never share a file, also where their last parts are the same."""
    name = re.sub(r"[^\w.+-]", "_", unquote(urlsplit(url).path.rpartition("/")[2])).lstrip(".") or "weights"
    return cache_folder() / f"url_{hashlib.sha256(url.encode()).hexdigest()[:16]}" / name[-200:]


def _path_manager(source: str) -> Any:
    manager, prefixes = _handlers(str(cache_folder()))
    if _as_url(source) and not source.startswith(prefixes):
        hint = "; install boto3 for s3://" if source.startswith("s3://") else ""
        raise ValueError(f"checkpoint: {source}: only {', '.join(prefixes)} and paths can be read here{hint}")
    return manager


@lru_cache(maxsize=1)
def _handlers(cache: str) -> tuple[Any, tuple[str, ...]]:
    handlers: list[Any] = [CheckedHTTPHandler()]
    if importlib.util.find_spec("boto3") is not None:
        from iopath.common.s3 import S3PathHandler

        handlers.append(S3PathHandler(cache_dir=cache))
    manager = PathManager()
    for handler in handlers:
        manager.register_handler(handler)
    return manager, tuple(prefix for handler in handlers for prefix in handler._get_supported_prefixes())


# --- one file -------------------------------------------------------------------------------------------------------


def fetch(url: str, file: Path, sha256: str = "", force: bool = False) -> Path:
    """Download `url` to `file`, unless it is there; either way it must have its checksum.

    What arrived before a connection was cut, in this call or an earlier one, is not fetched again where the server
    tells that its file is still the same. Of several processes that ask for a file, one downloads.

    Args:
        sha256: that it must have; empty for the one recorded when it was first seen.
        force: download again.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: as `resolve_weights`.
    """
    if file.is_file() and not force:
        _check(file, sha256)
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with _alone(file):
        if file.is_file() and not force:  # another process was faster
            _check(file, sha256)
            return file
        part = _beside(file, ".part")
        logger.info("downloading %s to %s", url, file)
        _download(url, file, part)
        digest = file_sha256(part)
        _beside(part, ".json").unlink(missing_ok=True)
        if sha256 and digest != sha256:
            part.unlink()
            raise ValueError(
                f"checkpoint: what {url} gave has the sha256 {digest} instead of {sha256} and is not kept; try again "
                f"or elsewhere, and put the right file at {file}"
            )
        os.replace(part, file)
        sync_folder(file.parent)
        _record(file, digest, is_published=bool(sha256))
    return file


def _beside(file: Path, suffix: str) -> Path:
    return file.with_name(file.name + suffix)


def _check(file: Path, sha256: str) -> None:
    """Refuse a file that is not what was published or first seen."""
    record = _beside(file, ".sha256")
    recorded = record.read_text(encoding="utf-8")[:64] if record.is_file() else ""
    if recorded and sha256 in ("", recorded):
        stat = file.stat()
        if max(stat.st_mtime_ns, stat.st_ctime_ns) <= record.stat().st_mtime_ns:
            return
    digest = file_sha256(file)
    for expected, whence in ((sha256, "published"), (recorded, f"recorded in {record.name}")):
        if expected and digest != expected:
            raise ValueError(
                f"checkpoint {file}: has the sha256 {digest}, and {expected} is {whence}: it is damaged or another "
                f"file; remove both it and {record.name}, and it is downloaded again"
            )
    _record(file, digest, is_published=bool(sha256), is_new=not recorded)


def _record(file: Path, digest: str, is_published: bool, is_new: bool = True) -> None:
    if is_new and not is_published:
        logger.info("%s: no sha256 is published; recorded %s", file, digest)
    try:
        with atomic_write(_beside(file, ".sha256"), "w") as record:
            record.write(f"{digest}  {file.name}\n")
    except OSError as error:  # a folder that others keep: it is hashed again next time
        logger.debug("%s: its checksum is not recorded (%s)", file, error)


_threads = threading.Lock()  # locks of files are between processes only


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Wait until no other process or thread fetches this file; a process that dies lets go."""
    with _threads, open(file.with_name(f".{file.name}.lock"), "a") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            logger.info("another process downloads %s; waiting for it", file.name)
            fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


# --- one connection -------------------------------------------------------------------------------------------------


class _CutError(Exception):
    """A connection that ended early, or did not come about, where another try may help."""


class _NoServerError(_CutError):
    """Nobody answers at all."""


def _download(url: str, file: Path, part: Path) -> None:
    """Bring `part` to its full length, over as many connections as it takes."""
    at_first = most = _size(part)
    failures = 0
    while True:
        try:
            _continue(url, part)
            return
        except _CutError as error:
            if _size(part) > most:  # a server that starts anew each time gets no further
                most, failures = _size(part), 0
            failures += 1
            if failures >= TRIES or (isinstance(error, _NoServerError) and most == at_first):
                n_kept = _size(part) if _read_state(_beside(part, ".json"), url).get("validator") else 0
                kept = f" {n_kept:,} bytes are kept, and the next try goes on from there." if n_kept else ""
                raise ConnectionError(
                    f"checkpoint: {url} cannot be downloaded ({error}).{kept} Without a network, fetch it elsewhere "
                    f"and put it at {file}, or pass the path of your copy"
                ) from error
            pause = SECONDS_BETWEEN_TRIES * 2 ** (failures - 1)
            logger.warning("%s: %s; trying again in %.0f s", url, error, pause)
            time.sleep(pause)


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _continue(url: str, part: Path) -> None:
    """One connection: what is missing of `part`, or all of it."""
    state_file = _beside(part, ".json")
    state = _read_state(state_file, url)
    start = _size(part)
    if start and not state.get("validator"):
        start = 0  # nothing would tell whether it belongs to what the server has now
    if start and start == state.get("total"):
        return  # killed between the last byte and the new name
    headers = {"Accept-Encoding": "identity", "User-Agent": "dinobloom"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": str(state["validator"])}
    with _connected(Request(url, headers=headers), part) as response:
        if response.headers.get_content_type() == "text/html":
            raise ValueError(f"checkpoint: {url} gives a web page, not a file; look for the URL of the download itself")
        if response.status == 206:
            begin, total = _range_of(response.headers)
            if begin != start or total is None or total != state.get("total", total):
                part.unlink()
                raise _CutError(f"the server sends bytes from {begin} of {total}, asked for from {start}")
            logger.info("going on after %.1f MB that are here already", start / MEGABYTE)
        else:
            start, total = 0, _number(response.headers.get("Content-Length"))
            part.unlink(missing_ok=True)  # before its description changes
            with atomic_write(state_file, "w") as file:
                json.dump({"url": url, "validator": _validator(response.headers), "total": total}, file)
        progress = _Progress(part.name.removesuffix(".part"), start, total)
        with open(part, "ab") as out:
            try:
                while block := _read(response):
                    out.write(block)
                    progress.advance(len(block))
            finally:
                out.flush()
                os.fsync(out.fileno())
    if total is not None and _size(part) != total:
        raise _CutError(f"the connection was cut after {_size(part):,} of {total:,} bytes")


@contextmanager
def _connected(request: Request, part: Path) -> Iterator[HTTPResponse]:
    """The server's answer.

    Raises:
        FileNotFoundError, ConnectionError: for an answer that stays the same however often one asks.
    """
    url = request.full_url
    try:
        response = urlopen(request, timeout=SECONDS_OF_SILENCE)
    except HTTPError as error:
        error.close()
        if error.code == 416:  # there is no rest of what we have a part of
            part.unlink(missing_ok=True)
            raise _CutError("the file has changed on the server") from error
        if error.code in TEMPORARY_STATUS:
            raise _CutError(f"the server says {error.code} {error.reason}") from error
        if error.code in (404, 410):
            raise FileNotFoundError(f"checkpoint: {url}: the server has no such file ({error.code})") from error
        raise ConnectionError(f"checkpoint: {url}: the server says {error.code} {error.reason}") from error
    except TimeoutError as error:
        raise _CutError(f"no answer for {SECONDS_OF_SILENCE:g} s") from error
    except URLError as error:
        raise _NoServerError(str(error.reason)) from error
    except (HTTPException, ConnectionError) as error:
        raise _CutError(str(error) or type(error).__name__) from error
    with response:
        yield response


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read(BLOCK_BYTES)
    except (HTTPException, OSError) as error:
        raise _CutError(str(error) or type(error).__name__) from error


def _read_state(file: Path, url: str) -> dict[str, Any]:
    """What a part is of; {} if that is not known, or is another URL."""
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return state if isinstance(state, dict) and state.get("url") == url else {}


def _validator(headers: Message) -> str:
    """What tells one version of the server's file from another byte by byte, as If-Range takes it; "" if nothing."""
    tag = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")


def _range_of(headers: Message) -> tuple[int | None, int | None]:
    """First byte sent, and the whole file's size, of `bytes 10-99/100`."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
    return (int(match[1]), int(match[2])) if match else (None, None)


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


class _Progress:
    """Log lines like `DinoBloom-B.pth: 120.0 of 346.0 MB, 11.8 MB/s, 19 s to go`, ten seconds apart."""

    def __init__(self, name: str, start: int, total: int | None) -> None:
        self.name, self.begin, self.done, self.total = name, start, start, total
        self.started = self.reported = time.monotonic()

    def advance(self, n: int) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.reported < SECONDS_BETWEEN_REPORTS:
            return
        self.reported = now
        rate = (self.done - self.begin) / (now - self.started)
        of_all = "" if self.total is None else f" of {self.total / MEGABYTE:.1f}"
        to_go = "" if self.total is None else f", {(self.total - self.done) / rate:.0f} s to go"
        logger.info("%s: %.1f%s MB, %.1f MB/s%s", self.name, self.done / MEGABYTE, of_all, rate / MEGABYTE, to_go)

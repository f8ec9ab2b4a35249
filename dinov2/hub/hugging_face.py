"""Weights in repositories of the Hugging Face hub: download them, and upload an export.

`hf-hub:<owner>/<name>` names a repository, `hf-hub:<owner>/<name>/<file or folder>` a part of it, and `@<revision>` at
the end a branch, tag or commit. The client is huggingface_hub, with its cache (HF_HOME moves it) and settings:
HF_ENDPOINT for a mirror, HF_HUB_OFFLINE=1 for no network, HF_TOKEN or `hf auth login` for repositories that are gated
or private.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dinov2.hub.descriptions import CONFIG_FILE, HUB_NAME, HUB_PREFIX, PREPROCESSOR_FILE

logger = logging.getLogger("dinov2")

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_NAME = re.compile(rf"{HUB_PREFIX}({_REPOSITORY.pattern})(?:/([^@]+?)/?)?(?:@(.+))?")
# What the client raises: its bases are the errors of requests, httpx or httpx2, which depends on its release, and the
# downloader of large files (hf_xet) raises RuntimeError
_CLIENT_ERRORS: tuple[type[Any], ...] = (OSError, RuntimeError, HFValidationError, *HfHubHTTPError.__bases__)
_LOG_IN = "run `hf auth login` or set HF_TOKEN"
N_NAMES_IN_ERRORS = 20


def download_from_hub(source: str, choose: Callable[[Sequence[str], str], list[str]]) -> Path:
    """Return the local file with the weights of a name of the form HUB_NAME.

    If the server cannot be reached, the newest version in the cache is used.

    Args:
        source: the name of a file, or of a repository or folder.
        choose: returns the files with weights of a repository or folder, the one to open first. Its arguments are the
            names of all files and, for errors, the name of the folder.

    Raises:
        FileNotFoundError: there is no such repository, revision or file, or it is private.
        ConnectionError: it is not in the cache and cannot be downloaded, or the account has no access.
        ValueError: the name has another form.
    """
    match = _NAME.fullmatch(source)
    if match is None:
        raise ValueError(f"checkpoint {source}: names on the Hugging Face hub have the form {HUB_NAME}")
    repository, inner, revision = match.groups()
    with _errors_explained(f"checkpoint {source}", repository):
        names, is_reachable = _list_files(repository, revision)
    if inner in names:
        inner, _, file = inner.rpartition("/")
        weights = [file]
    else:
        inner = inner or ""
        inside = [name.removeprefix(f"{inner}/") for name in names if not inner or name.startswith(f"{inner}/")]
        if not inside:
            listed = ", ".join(sorted(names)[:N_NAMES_IN_ERRORS]) or "no files"
            raise FileNotFoundError(f"checkpoint {source}: {repository} has no {inner or 'weights'!r}; it has {listed}")
        weights = choose(inside, f"{HUB_PREFIX}{repository}/{inner}".rstrip("/"))
    descriptions = [name for name in (CONFIG_FILE, PREPROCESSOR_FILE) if f"{inner}/{name}".lstrip("/") in names]
    wanted = [f"{inner}/{name}".lstrip("/") for name in [*weights, *descriptions]]
    with _errors_explained(f"checkpoint {source}", repository):
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=wanted, local_files_only=not is_reachable
        )
    return Path(folder) / wanted[0]


def _list_files(repository: str, revision: str | None) -> tuple[list[str], bool]:
    """Return the names of a repository's files and True; if it cannot be reached, those in the cache and False."""
    try:
        info = HfApi().model_info(repository, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return [file.rfilename for file in info.siblings or ()], True
    except RevisionNotFoundError:
        raise
    except _CLIENT_ERRORS as error:
        try:
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=[], local_files_only=True))
        except LocalEntryNotFoundError:
            raise error from None
        logger.info("%s cannot be reached (%s): its files in the cache are used", repository, _first_line(error))
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()], False


@contextmanager
def _errors_explained(what: str, repository: str) -> Iterator[None]:
    """Replace the client's errors in this block by one sentence about `what`, and what to do."""
    page = f"{constants.ENDPOINT}/{repository}"
    otherwise = f"or download it elsewhere (`hf download {repository}`) and pass the path"
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{what}: {error}") from error
    except GatedRepoError as error:
        raise ConnectionError(
            f"{what}: {page} is open only to accounts that were granted access; ask for it on that page, then "
            f"{_LOG_IN}, {otherwise}"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{what}: {page} does not exist, or it is private; check the name, and for a private one {_LOG_IN}"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{what}: {page} has no such revision; take a branch, tag or commit of it") from error
    except _CLIENT_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise ConnectionError(f"{what}: {page} refuses access ({status}); {_LOG_IN}, {otherwise}") from error
        raise ConnectionError(
            f"{what}: not in the cache {constants.HF_HUB_CACHE} and cannot be downloaded ({_first_line(error)}); "
            f"try again, {otherwise}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- upload ---------------------------------------------------------------------------------------------------------


def check_upload(repository: str) -> None:
    """Raise ValueError if the name is not <owner>/<name> or no token is stored, before the work of an export."""
    if not _REPOSITORY.fullmatch(repository):
        raise ValueError(
            f"--push-to-hub {repository}: it is no repository on the Hugging Face hub; give <owner>/<name>"
        )
    if get_token() is None:
        raise ValueError(f"--push-to-hub {repository}: no access token of the Hugging Face hub here; {_LOG_IN}")


def upload_to_hub(folder: Path, repository: str, is_public: bool = False) -> str:
    """Upload a folder's files as one commit of a repository, which is made if it does not exist; return its address.

    A repository that exists keeps its visibility, and its other files. ConnectionError: the upload failed; the folder
    stays.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=not is_public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of dinobloom")
    except _CLIENT_ERRORS as error:
        raise ConnectionError(
            f"--push-to-hub {repository}: not uploaded ({_first_line(error)}); the export is whole in {folder}: check "
            f"the name and the token's right to write, then run `hf upload {repository} {folder}`"
        ) from error
    return str(address)

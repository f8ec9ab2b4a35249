"""Released weights: names, URLs and checksums. Each is downloaded once.

A release is stored in `torch.hub.get_dir()/checkpoints` under its own file name, so a file that torch.hub or the user
downloaded there is used. Mirrors: DINOV2_RELEASES_URL and DINOBLOOM_RELEASES_URL replace the beginning of their URLs.
"""

import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import urlsplit

from dinov2.utils.files import PathLike, cache_folder, download, local_path


@dataclass(frozen=True)
class Release:
    """Published weights."""

    name: str  # for users
    arch: str  # for `dinov2.models`
    img_size: int  # side in pixels of the images that its position embeddings are for
    folder: str  # default beginning of its URL
    folder_variable: str  # environment variable that replaces this beginning
    path: str  # the rest of the URL
    title: str
    sha256: str = ""  # of the file; empty if none is published

    @property
    def url(self) -> str:
        return f"{(os.environ.get(self.folder_variable) or self.folder).rstrip('/')}/{self.path}"

    @property
    def file(self) -> Path:
        """Return the path at which it is stored."""
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
        # the only published checksum, by users of the file
        _dinobloom("s", "c2f7990b003e89bcece80e379fb8fe0ba2ec392ce19b286e8a294abd99568e44"),
        *(_dinobloom(letter) for letter in "blg"),
        *(_dinov2(letter, has_registers) for has_registers in (False, True) for letter in "sblg"),
    )
}


def resolve_weights(source: PathLike) -> Path:
    """Return the local file or folder of `source`; names and URLs are downloaded once."""
    text = os.fspath(source)
    release = next((known for known in RELEASES.values() if known.url == text), None)
    if release is None and (path := local_path(source)).exists():
        return path
    release = release or RELEASES.get(text)
    if release is not None:
        return download(release.url, release.file, release.sha256)
    close = get_close_matches(text, RELEASES, n=3)
    names = f"perhaps {' or '.join(close)}?" if close else f"names are {', '.join(RELEASES)}"
    raise FileNotFoundError(f"checkpoint: no file or folder {text!r}, and no release has that name; {names}")

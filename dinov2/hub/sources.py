"""From a source of weights (a name, URL, folder or file) to a local file: releases, packaged networks, names of files.

A release is downloaded once, to `torch.hub.get_dir()/checkpoints` under its own file name, so a file that torch.hub or
the user downloaded there is used. DINOV2_RELEASES_URL and DINOBLOOM_RELEASES_URL replace the beginning of their URLs.
"""

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import urlsplit

from dinov2.hub.descriptions import DINOBLOOM_SIZE, DINOV2_SIZE, HUB_NAME, HUB_PREFIX
from dinov2.utils.files import PathLike, cache_folder, check_regular_file, download, local_path
from dinov2.utils.sharded_checkpoints import METADATA_FILE

TEACHER_FILE = "teacher_checkpoint.pth"
# transformers' and timm's names of the file in a folder
FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
EXPORTED_WEIGHTS = ("backbone.pth", "backbone.safetensors")  # of hub/export.py; only the first one has a classifier
# one network of several in a folder, as DinoBloom's repository on the Hugging Face hub has them
LETTERED_WEIGHTS = re.compile(r"pytorch_model_([a-z])\.bin")
INDEX_ENDING = ".index.json"
INDEX_FILES = tuple(f"{name}{INDEX_ENDING}" for name in FOLDER_WEIGHTS)  # if the weights are split over files
WEIGHTS_ENDINGS = (".safetensors", ".bin", ".pth", ".pt")
N_NAMES_IN_ERRORS = 8
# {project: beginning of its URLs}; the environment variable <PROJECT>_RELEASES_URL replaces one
FOLDERS = {
    "dinov2": "https://dl.fbaipublicfiles.com/dinov2",
    "dinobloom": "https://zenodo.org/records/10908163/files",
}


@dataclass(frozen=True)
class Release:
    """Published weights."""

    name: str  # for users: <project>_...
    arch: str  # for `dinov2.models`
    img_size: int  # side in pixels of the images that its position embeddings are for
    path: str  # end of its URL
    title: str
    sha256: str = ""  # of the file; empty if none is published

    @property
    def url(self) -> str:
        project = self.name.partition("_")[0]
        folder = os.environ.get(f"{project.upper()}_RELEASES_URL") or FOLDERS[project]
        return f"{folder.rstrip('/')}/{self.path}"

    @property
    def file(self) -> Path:
        """Return the path at which it is stored."""
        return cache_folder() / urlsplit(self.path).path.rpartition("/")[2]


def _dinov2(letter: str, has_registers: bool) -> Release:
    arch = f"dinov2_vit{letter}14"
    path = f"{arch}/{arch}{'_reg4' if has_registers else ''}_pretrain.pth"
    name = arch + ("_reg" if has_registers else "")
    about = "with four registers (arXiv 2309.16588)" if has_registers else "(arXiv 2304.07193)"
    return Release(name, name, DINOV2_SIZE, path, f"DINOv2's ViT-{'g' if letter == 'g' else letter.upper()}/14 {about}")


def _dinobloom(letter: str, sha256: str = "") -> Release:
    path = f"DinoBloom-{letter.upper()}.pth?download=1"
    title = f"DinoBloom-{letter.upper()}, for single blood and bone-marrow cells (arXiv 2404.05022)"
    return Release(f"dinobloom_{letter}", f"dinov2_vit{letter}14", DINOBLOOM_SIZE, path, title, sha256)


RELEASES: dict[str, Release] = {
    release.name: release
    for release in (
        # the only published checksum, by users of the file
        _dinobloom("s", "c2f7990b003e89bcece80e379fb8fe0ba2ec392ce19b286e8a294abd99568e44"),
        *(_dinobloom(letter) for letter in "blg"),
        *(_dinov2(letter, has_registers) for has_registers in (False, True) for letter in "sblg"),
    )
}
# {name: file in this package}
PACKAGED = {"dinobloom_tiny_pbc": Path(__file__).parent / "dinobloom_tiny_pbc.safetensors"}


def published_name(file: Path, sha256: str) -> str:
    """Return the name of the network of this package or the release that a file holds; empty if of neither.

    A release is known by its checksum if one is published, else by the file's name.
    """
    if lettered := LETTERED_WEIGHTS.fullmatch(file.name):
        name = f"dinobloom_{lettered[1]}"
        return name if name in RELEASES else ""
    known = [name for name, path in PACKAGED.items() if path == file]
    known += [
        release.name
        for release in RELEASES.values()
        if (release.sha256 == sha256 if release.sha256 else release.file.name == file.name)
    ]
    return known[0] if known else ""


def resolve_weights(source: PathLike) -> Path:
    """Return the local file or folder of `source`; names and URLs are downloaded once, but for those of `PACKAGED`.

    A repository of the Hugging Face hub is asked for a newer version each time.
    """
    text = os.fspath(source)
    if text.startswith(HUB_PREFIX):
        # here: in a notebook the client's import warns of a progress bar that is missing there
        from dinov2.hub.hugging_face import download_from_hub

        file = download_from_hub(text, _choose_weights)
        return file.parent if file.name in INDEX_FILES else file
    release = next((known for known in RELEASES.values() if known.url == text), None)
    if release is None and (path := local_path(source)).exists():
        return path
    if text in PACKAGED:
        return PACKAGED[text]
    release = release or RELEASES.get(text)
    if release is not None:
        return download(release.url, release.file, release.sha256)
    known_names = [*PACKAGED, *RELEASES]
    close = get_close_matches(text, known_names, n=3)
    names = f"perhaps {' or '.join(close)}?" if close else f"names are {', '.join(known_names)} and {HUB_NAME}"
    raise FileNotFoundError(f"checkpoint: no file or folder {text!r}, and no release has that name; {names}")


def checkpoint_file(source: PathLike) -> Path:
    """Return the file with the weights of a file, folder, name or URL; for weights in several files, their folder.

    In a run's folder it is the newest teacher or, before the first one, the newest checkpoint to resume from. In a
    folder of transformers, of timm or of an export it is the file with the weights.
    """
    path = resolve_weights(source)
    if not path.is_dir():
        return check_regular_file(path, "checkpoint")
    if (path / METADATA_FILE).is_file():
        return path
    if name := _weights_name([file.name for file in path.iterdir() if file.is_file()], str(path)):
        return path if name in INDEX_FILES else check_regular_file(path / name, "checkpoint")
    for pattern in (
        f"eval/training_*/{TEACHER_FILE}",
        f"checkpoints/iteration_*/{METADATA_FILE}",
        f"iteration_*/{METADATA_FILE}",
    ):
        numbers = {file: file.parent.name.rpartition("_")[2] for file in path.glob(pattern)}
        files = [file for file, number in numbers.items() if number.isdecimal()]
        if files:
            newest = max(files, key=lambda file: int(numbers[file]))
            return check_regular_file(newest, "checkpoint") if newest.name == TEACHER_FILE else newest.parent
    raise FileNotFoundError(
        f"checkpoint: no weights in the folder {str(path)!r}: neither eval/training_<iteration>/{TEACHER_FILE}, which "
        f"a run writes at each evaluation, nor checkpoints/iteration_<n>/, nor {' or '.join(FOLDER_WEIGHTS)}, nor "
        f"{' or '.join(EXPORTED_WEIGHTS)}; pass a run's folder or a file with weights"
    )


def _weights_name(names: Collection[str], folder: str) -> str:
    """Return the file to open out of the files in a folder; empty if none has a known name."""
    for name in (*INDEX_FILES, TEACHER_FILE, *FOLDER_WEIGHTS, *EXPORTED_WEIGHTS):
        if name in names:
            return name
    lettered = sorted(filter(LETTERED_WEIGHTS.fullmatch, names))
    if len(lettered) > 1:
        raise ValueError(
            f"checkpoint {folder}: has {len(lettered)} networks, {', '.join(lettered)}; choose one, for instance "
            f"{folder}/{lettered[0]}"
        )
    return lettered[0] if lettered else ""


def _choose_weights(names: Sequence[str], folder: str) -> list[str]:
    """Return the files to download out of those of a repository or folder on the Hugging Face hub."""
    name = _weights_name(names, folder)
    if not name:
        files = [each for each in names if each.endswith(WEIGHTS_ENDINGS)]
        advice = f"; give the path of one, for instance {folder}/{files[0]}" if files else ""
        raise FileNotFoundError(
            f"checkpoint {folder}: no file of a known name among {join_names(sorted(files or names))}{advice}"
        )
    if name not in INDEX_FILES:
        return [name]
    stem, _, ending = name.removesuffix(INDEX_ENDING).rpartition(".")
    return [name, *(each for each in names if re.fullmatch(rf"{stem}-\d+-of-\d+\.{ending}", each))]


def join_names(names: list[str]) -> str:
    """Join the first few names, and count the others."""
    more = f" and {len(names) - N_NAMES_IN_ERRORS} more" if len(names) > N_NAMES_IN_ERRORS else ""
    return ", ".join(names[:N_NAMES_IN_ERRORS]) + more

"""Releases by name and URL, the file with the weights of a source, and its tensors under our names.

A release is downloaded once, to `torch.hub.get_dir()/checkpoints` under its own file name, so a file that torch.hub or
the user downloaded there is used. DINOV2_RELEASES_URL and DINOBLOOM_RELEASES_URL replace the beginning of their URLs.

No code in a file is ever run: pickles are read with `weights_only=True`.
"""

import json
import os
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from dinov2.hub.conversions import LAYER_NORM_EPS, is_adapter, lora_scaling, merge_adapters, to_own_names
from dinov2.models import architecture, build_model_from_cfg
from dinov2.utils.config import read_config
from dinov2.utils.files import PathLike, cache_folder, download, local_path
from dinov2.utils.sharded_checkpoints import METADATA_FILE, read_tensors

TEACHER_FILE = "teacher_checkpoint.pth"
CONFIG_FILE, PREPROCESSOR_FILE = "config.json", "preprocessor_config.json"
# transformers' and timm's names of the file in a folder
FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = tuple(f"{name}.index.json" for name in FOLDER_WEIGHTS)  # if the weights are split over files
# parts that torch.compile, DistributedDataParallel, FSDP and activation checkpointing add to parameter names
WRAPPER_COMPONENTS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
HEADS = ("dino_head", "ibot_head")
CLASSIFIER_PREFIX = "head."  # of timm and other projects; not used here
# names of torch's parametrization of weight norm -> the older names, which this project uses
WEIGHT_NORM = {".parametrizations.weight.original0": ".weight_g", ".parametrizations.weight.original1": ".weight_v"}
N_NAMES_IN_ERRORS = 8
# {project: beginning of its URLs}; the environment variable <PROJECT>_RELEASES_URL replaces one
FOLDERS = {
    "dinov2": "https://dl.fbaipublicfiles.com/dinov2",
    "dinobloom": "https://zenodo.org/records/10908163/files",
}

# transformers' settings -> those of `models.architecture`
_HF_SETTINGS = {
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "patch_size": "patch_size",
}
_HF_FIXED = {"hidden_act": "gelu", "layer_norm_eps": LAYER_NORM_EPS}
_HF_TYPES = ("dinov2", "dinov2_with_registers")
_TIMM_SETTINGS = {**{name: name for name in ("embed_dim", "depth", "num_heads")}, "reg_tokens": "num_register_tokens"}


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
    return Release(name, name, 518, path, f"DINOv2's ViT-{'g' if letter == 'g' else letter.upper()}/14 {about}")


def _dinobloom(letter: str, sha256: str = "") -> Release:
    path = f"DinoBloom-{letter.upper()}.pth?download=1"
    title = f"DinoBloom-{letter.upper()}, for single blood and bone-marrow cells (arXiv 2404.05022)"
    return Release(f"dinobloom_{letter}", f"dinov2_vit{letter}14", 224, path, title, sha256)


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


@dataclass
class StoredNetworks:
    """The teacher's networks of a checkpoint, or its only networks: tensors in fp32 on the CPU."""

    backbone: dict[str, Tensor]  # without prefixes and block chunks
    heads: dict[str, dict[str, Tensor]]  # {"dino_head": tensors, "ibot_head": tensors}, as far as they exist
    recorded: dict[str, Any]  # as of `models.architecture`; img_size is the side of the images it was made for


def checkpoint_file(source: PathLike) -> Path:
    """Return the file with the weights of a file, folder, name or URL; for weights in several files, their folder.

    In a run's folder it is the newest teacher or, before the first one, the newest checkpoint to resume from. In a
    folder of transformers or timm it is the file with the weights.
    """
    path = resolve_weights(source)
    if not path.is_dir() or any((path / name).is_file() for name in (METADATA_FILE, *INDEX_FILES)):
        return path
    for name in (TEACHER_FILE, *FOLDER_WEIGHTS):
        if (path / name).is_file():
            return path / name
    for pattern in (
        f"eval/training_*/{TEACHER_FILE}",
        f"checkpoints/iteration_*/{METADATA_FILE}",
        f"iteration_*/{METADATA_FILE}",
    ):
        numbers = {file: file.parent.name.rpartition("_")[2] for file in path.glob(pattern)}
        files = [file for file, number in numbers.items() if number.isdigit()]
        if files:
            newest = max(files, key=lambda file: int(numbers[file]))
            return newest if newest.name == TEACHER_FILE else newest.parent
    raise FileNotFoundError(
        f"checkpoint: no weights in the folder {str(path)!r}: neither eval/training_<iteration>/{TEACHER_FILE}, which "
        f"a run writes at each evaluation, nor checkpoints/iteration_<n>/, nor {' or '.join(FOLDER_WEIGHTS)}; pass a "
        f"run's folder or a file with weights"
    )


# --- tensors under our names ----------------------------------------------------------------------------------------


def read_networks(path: Path) -> StoredNetworks:
    """Read the networks of a file or folder that `checkpoint_file` returned."""
    content, recorded = _read(path)
    backbone, heads = _split(_named_tensors(content, path), path)
    return StoredNetworks(
        {name: value.float() for name, value in backbone.items()},
        {head: {name: value.float() for name, value in state.items()} for head, state in heads.items()},
        recorded,
    )


def _named_tensors(content: Mapping[str, Any], path: Path) -> list[tuple[str, Tensor]]:
    """Return (name, tensor) of the teacher, without wrappers and their names; a name may occur twice."""
    while wrapper := next(
        (key for key in ("teacher", "model", "state_dict") if isinstance(content.get(key), Mapping)), None
    ):
        content = content[wrapper]
    if isinstance(content.get("student"), Mapping):
        content = {f"student.{name}": value for name, value in content["student"].items()}
    named = [(_plain_name(name), value) for name, value in content.items() if isinstance(value, Tensor)]
    named = _select_prefix("teacher.", named) or named
    if any(name.startswith("student.") for name, _ in named):
        raise ValueError(
            f"checkpoint {path}: holds a student and no teacher, which is the network to use; a run writes it to "
            f"eval/training_<iteration>/{TEACHER_FILE}"
        )
    return named


def _split(named: list[tuple[str, Tensor]], path: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Split named tensors into backbone and heads, without their prefixes."""
    heads = {head: _check_unique(_select_prefix(f"{head}.", named), path) for head in HEADS}
    inside = _select_prefix("backbone.", named) or [
        (name, value) for name, value in named if not name.startswith(tuple(f"{head}." for head in HEADS))
    ]
    backbone = [(without_chunk(name), value) for name, value in inside if not name.startswith(CLASSIFIER_PREFIX)]
    return to_own_names(_check_unique(backbone, path)), {head: state for head, state in heads.items() if state}


def _select_prefix(prefix: str, named: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return [(name.removeprefix(prefix), value) for name, value in named if name.startswith(prefix)]


def _check_unique(named: list[tuple[str, Tensor]], path: Path) -> dict[str, Tensor]:
    """Return the tensors by name; ValueError if a name occurs twice."""
    twice = [name for name, count in Counter(name for name, _ in named).items() if count > 1]
    if twice:
        raise ValueError(
            f"checkpoint {path}: under different prefixes it holds these twice: {join_names(twice)}; keep one"
        )
    return dict(named)


def _plain_name(name: str) -> str:
    """Remove the parts that wrappers add to a name, and return the older name of a parameter of weight norm."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPER_COMPONENTS)
    for new, old in WEIGHT_NORM.items():
        name = name.replace(new, old)
    return name


def without_chunk(name: str) -> str:
    """Replace `blocks.<chunk>.<i>.` of a backbone with block_chunks by `blocks.<i>.`; other names stay."""
    return re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)


# --- files ----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the content, and the architecture that is recorded in it or beside it."""
    if path.is_dir():
        return _read_run_checkpoint(path) if (path / METADATA_FILE).is_file() else _read_split(path)
    content = read_weights_file(path)
    recorded = content.pop("architecture", None)
    if isinstance(recorded, Mapping):
        return content, dict(recorded)
    return content, _read_description(path.parent) if path.name in FOLDER_WEIGHTS else {}


def read_weights_file(path: Path) -> dict[str, Any]:
    """Read tensors and plain values of a .pth/.pt or .safetensors file to the CPU, without running code in it."""
    with open(path, "rb") as file:
        start = file.read(256)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"checkpoint {path}: a git-lfs pointer, not the weights; run `git lfs pull` where it lies")
    if start.lstrip().startswith(b"<"):
        raise ValueError(
            f"checkpoint {path}: a web page, not weights; the server sent a page instead, perhaps a login or an error: "
            f"fetch the file again"
        )
    damaged = f"checkpoint {path}: damaged or cut short at {path.stat().st_size} bytes; fetch or copy it again"
    # A safetensors file begins with the length of its header (8 bytes); a file of torch.save is a zip archive, or,
    # before torch 1.6, a pickle
    if start[8:9] == b"{":
        return _read_safetensors(path, damaged)
    if not start.startswith((b"PK", b"\x80")) or (start.startswith(b"PK") and not zipfile.is_zipfile(path)):
        raise ValueError(damaged)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if forbidden := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"checkpoint {path}: holds a {forbidden[1]}, and to make one would run code that the file names; if "
                f"you trust its source, read it with torch.load(..., weights_only=False) and save its state dict alone"
            ) from error
        raise ValueError(damaged) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{damaged} ({error or 'it ends too early'})") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint {path}: holds a {type(content).__name__}, not a dict of tensors")
    return dict(content)


def _read_safetensors(path: Path, damaged: str) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            content: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            described = (file.metadata() or {}).get("architecture")
    except SafetensorError as error:
        raise ValueError(f"{damaged} ({error})") from error
    if described and described.startswith("{"):  # other tools write a name there
        content["architecture"] = _parse_json(described, path)
    return content


def _read_split(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a network of transformers from several files."""
    index = next(folder / name for name in INDEX_FILES if (folder / name).is_file())
    parts = sorted(set(_parse_json(index.read_text(encoding="utf-8"), index).get("weight_map", {}).values()))
    content: dict[str, Any] = {}
    for name in parts:
        if not (folder / name).is_file():
            raise ValueError(f"checkpoint {folder}: {name} is missing, which {index.name} lists; copy the whole folder")
        content |= read_weights_file(folder / name)
    return content, _read_description(folder)


def _read_run_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the teacher of a checkpoint to resume from, and the architecture from the run's config.yaml."""
    prefix = "model.teacher."
    try:
        tensors = read_tensors(folder, lambda name: name.startswith(prefix))
    except ValueError as error:
        raise ValueError(f"checkpoint {error}; damaged, cut short or not written by a run of this project") from error
    if not tensors:
        raise ValueError(f"checkpoint {folder}: holds no tensors {prefix}*; only those of a run of this project do")
    config = folder.parents[1] / "config.yaml"
    recorded: dict[str, Any] = {}
    scaling = 0.0
    if config.is_file():
        try:
            cfg = read_config(config)
            with torch.device("meta"):
                recorded = architecture(build_model_from_cfg(cfg, only_teacher=True)[0])
            scaling = lora_scaling(OmegaConf.select(cfg, "student"))
        except OmegaConfBaseException as error:
            raise ValueError(f"checkpoint {folder}: {config} is not what a run writes ({error})") from error
    if any(map(is_adapter, tensors)) and not scaling:
        raise ValueError(
            f"checkpoint {folder}: has adapters, whose scaling is only in the run's config.yaml; it should be at "
            f"{config}"
        )
    plain = merge_adapters(tensors, scaling)
    return {"teacher": {name.removeprefix(prefix): value for name, value in plain.items()}}, recorded


# --- descriptions beside weights ------------------------------------------------------------------------------------


def _read_description(folder: Path) -> dict[str, Any]:
    """Read the architecture from transformers' or timm's config.json; ValueError for an unsupported one."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        return {}
    config = _parse_json(file.read_text(encoding="utf-8"), file)
    if "model_type" in config:
        return _describe_by_transformers(config, file)
    if "architecture" in config:
        return _describe_by_timm(config, file)
    return {}


def _describe_by_transformers(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    if config["model_type"] not in _HF_TYPES:
        raise ValueError(
            f"checkpoint {file.parent}: {file.name} says model_type {config['model_type']!r}, and only "
            f"{' and '.join(_HF_TYPES)} can be read"
        )
    for name, value in _HF_FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"checkpoint {file.parent}: {name} is {config[name]} in {file.name}, only {value} is known"
            )
    recorded = {ours: config[theirs] for theirs, ours in _HF_SETTINGS.items() if theirs in config}
    preprocessor = file.with_name(PREPROCESSOR_FILE)
    if preprocessor.is_file():
        settings = _parse_json(preprocessor.read_text(encoding="utf-8"), preprocessor)
        unchanged = {} if settings.get("do_normalize", True) else {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        used = {**settings, **unchanged}
        _check_normalisation(used.get("image_mean"), used.get("image_std"), preprocessor)
        size = settings.get("crop_size" if settings.get("do_center_crop") else "size")
        if isinstance(size, Mapping):
            size = size.get("height", size.get("shortest_edge"))
        if isinstance(size, int):
            recorded["img_size"] = size
    return recorded


def _describe_by_timm(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    preparation = config.get("pretrained_cfg", config)
    _check_normalisation(preparation.get("mean"), preparation.get("std"), file)
    arguments = config.get("model_args") or {}
    recorded = {ours: arguments[theirs] for theirs, ours in _TIMM_SETTINGS.items() if theirs in arguments}
    size = preparation.get("input_size")
    return {**recorded, "img_size": size[-1]} if size else recorded


def _check_normalisation(mean: Any, std: Any, file: Path) -> None:
    for name, stated, known in (("mean", mean, IMAGENET_MEAN), ("std", std, IMAGENET_STD)):
        if stated and not (len(stated) == len(known) and np.allclose(stated, known, rtol=0, atol=1e-3)):
            raise ValueError(
                f"checkpoint {file.parent}: {file.name} asks for images of {name} {list(stated)}; here they are "
                f"normalised by ImageNet's, {list(known)}, so its features would be wrong"
            )


def _parse_json(text: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"checkpoint {file}: what should be JSON in it cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {file}: holds a JSON {type(content).__name__} where settings should be")
    return content


def join_names(names: list[str]) -> str:
    """Join the first few names, and count the others."""
    more = f" and {len(names) - N_NAMES_IN_ERRORS} more" if len(names) > N_NAMES_IN_ERRORS else ""
    return ", ".join(names[:N_NAMES_IN_ERRORS]) + more

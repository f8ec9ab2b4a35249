"""The tensors of a file with weights, under our names.

No code in a file is ever run: pickles are read with `weights_only=True`.
"""

import math
import mmap
import pickle
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dinov2.hub.adapters import is_adapter, lora_scaling, merge_adapters
from dinov2.hub.conversions import to_own_names
from dinov2.hub.descriptions import (
    DINOBLOOM_SIZE,
    DINOV2_SIZE,
    LARGEST_DESCRIPTION,
    TIMM_TAG,
    WRONG_TYPES,
    check_description,
    is_named_dinobloom,
    parse_json,
    read_description,
    read_json,
)
from dinov2.hub.sources import FOLDER_WEIGHTS, INDEX_FILES, TEACHER_FILE, join_names
from dinov2.models import architecture, build_model_from_cfg, check_settings
from dinov2.utils.config import read_config
from dinov2.utils.files import check_regular_file, is_web_page, name_in_errors
from dinov2.utils.sharded_checkpoints import first_error_line, read_tensors

# parts that torch.compile, DistributedDataParallel, FSDP and activation checkpointing add to parameter names
WRAPPER_COMPONENTS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
HEADS = ("dino_head", "ibot_head", "lejepa_head")
CLASSIFIER_PREFIX = "head."  # of timm and other projects; not used here
# names of torch's parametrization of weight norm -> the older names, which this project uses
WEIGHT_NORM = {".parametrizations.weight.original0": ".weight_g", ".parametrizations.weight.original1": ".weight_v"}
FLOAT_TYPES = ("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16", "torch.float8")
WRAPPERS = ("teacher", "model", "state_dict")
MOST_WRAPPERS = 8  # mappings around the tensors of a file
LARGEST_COMPRESSION = 4  # bytes of a file's content for each of its bytes; torch.save does not compress


@dataclass
class StoredNetworks:
    """The teacher's networks of a checkpoint, or its only networks: tensors in fp32 on the CPU."""

    backbone: dict[str, Tensor]  # without prefixes and block chunks
    heads: dict[str, dict[str, Tensor]]  # {"dino_head": tensors, "ibot_head": tensors}, as far as they exist
    recorded: dict[str, Any]  # as of `models.architecture`; img_size is the side of the images it was made for
    note: str = ""  # why img_size is not the one that the file states


# --- tensors under our names ----------------------------------------------------------------------------------------


def read_networks(path: Path) -> StoredNetworks:
    """Read the networks of a file or folder that `checkpoint_file` returned."""
    try:
        with name_in_errors(path):
            content, recorded = _read(path)
    except MemoryError as error:
        raise MemoryError(f"to read {path}") from error
    tag = recorded.pop(TIMM_TAG, None)
    check_settings(recorded, f"checkpoint {path}: its recorded ")
    if not isinstance(recorded.get("img_size"), int):  # no square: it says nothing of the square images here
        recorded.pop("img_size", None)
    try:
        backbone, heads = _split(_named_tensors(content, path), path)
    except (RuntimeError, IndexError) as error:  # of joining tensors
        raise ValueError(f"checkpoint {path}: its tensors do not fit together: {first_error_line(error)}") from error
    folder = path if path.is_dir() else path.parent
    note = "" if tag is None else _correct_size(recorded, backbone, is_named_dinobloom(folder, tag))
    return StoredNetworks(backbone, heads, recorded, note)


def _correct_size(recorded: dict[str, Any], backbone: Mapping[str, Tensor], is_dinobloom: bool) -> str:
    """Correct the size of images that a description by timm records; return what was corrected, empty if nothing.

    It is often that of the architecture's released weights, 518 px, whatever these weights were trained on.
    """
    stated, reason = recorded.get("img_size"), ""
    pos_embed, projection = (backbone.get(name) for name in ("pos_embed", "patch_embed.proj.weight"))
    if stated and pos_embed is not None and projection is not None and pos_embed.ndim == 3 and projection.ndim == 4:
        patch_size, n_patches = projection.shape[-1], max(0, pos_embed.shape[1] - 1)
        side = math.isqrt(n_patches)
        if patch_size and side and side**2 == n_patches and side != stated // patch_size:
            recorded["img_size"], reason = side * patch_size, "for which its position embeddings are"
    if is_dinobloom and recorded.get("img_size") == DINOV2_SIZE:
        recorded["img_size"], reason = DINOBLOOM_SIZE, "at which DinoBloom was trained"
    if recorded.get("img_size") == stated:
        return ""
    return f"for images of {recorded['img_size']} px, {reason}, not of {stated} px as config.json says"


def _named_tensors(content: Mapping[str, Any], path: Path) -> list[tuple[str, Tensor]]:
    """Return (name, tensor) of the teacher, without wrappers and their names; a name may occur twice."""
    content = unwrap(content, path)
    if isinstance(content.get("student"), Mapping):
        content = {f"student.{name}": value for name, value in content["student"].items()}
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    named = [(_plain_name(name), value) for name, value in tensors.items()]
    named = _select_prefix("teacher.", named) or named
    if any(name.startswith("student.") for name, _ in named):
        raise ValueError(
            f"checkpoint {path}: holds a student and no teacher, which is the network to use; a run writes it to "
            f"eval/training_<iteration>/{TEACHER_FILE}"
        )
    return named


def unwrap(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return the innermost mapping of a file's content, inside `teacher`, `model` and `state_dict`."""
    for _ in range(MOST_WRAPPERS):
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if wrapper is None:
            return content
        content = content[wrapper]
    raise ValueError(f"checkpoint {path}: its tensors lie in more than {MOST_WRAPPERS} mappings, or in themselves")


def _split(named: list[tuple[str, Tensor]], path: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Split named tensors into backbone and heads, without their prefixes."""
    heads = {head: to_fp32(_select_prefix(f"{head}.", named), path) for head in HEADS}
    inside = _select_prefix("backbone.", named) or [
        (name, value) for name, value in named if not name.startswith(tuple(f"{head}." for head in HEADS))
    ]
    backbone = [(without_chunk(name), value) for name, value in inside if not name.startswith(CLASSIFIER_PREFIX)]
    return to_own_names(to_fp32(backbone, path)), {head: state for head, state in heads.items() if state}


def _select_prefix(prefix: str, named: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return [(name.removeprefix(prefix), value) for name, value in named if name.startswith(prefix)]


def to_fp32(named: list[tuple[str, Tensor]], path: Path) -> dict[str, Tensor]:
    """Return the tensors by name in fp32; ValueError if a name occurs twice or for a tensor that is no plain one."""
    twice = [name for name, count in Counter(name for name, _ in named).items() if count > 1]
    if twice:
        raise ValueError(
            f"checkpoint {path}: under different prefixes it holds these twice: {join_names(twice)}; keep one"
        )
    for name, value in named:
        if fault := _fault_of(value):
            raise ValueError(f"checkpoint {path}: {name[:80]} {fault}; save the network in fp32, fp16 or bf16")
    return {name: value.float() for name, value in named}


def _fault_of(value: Tensor) -> str:
    """Return what distinguishes a tensor from a plain one of floating-point numbers; empty if nothing."""
    if value.is_meta:
        return "has a shape and no numbers"
    if value.layout != torch.strided or value.is_nested:
        return f"is not dense ({value.layout})"
    if not str(value.dtype).startswith(FLOAT_TYPES):
        return f"has numbers of the type {value.dtype}"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"has the shape {list(value.shape)} and only {value.untyped_storage().nbytes()} bytes"
    return ""


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
        index = next((path / name for name in INDEX_FILES if (path / name).is_file()), None)
        return _read_run_checkpoint(path) if index is None else _read_split(path, index)
    content = read_weights_file(path)
    if isinstance(encoder := content.get("encoder"), str):
        raise ValueError(
            f"checkpoint {path}: a fine-tuned {encoder[:60]}, which only predict.py reads; for its features give "
            f"--encoder {encoder[:60]} --encoder-weights {path}"
        )
    recorded = content.pop("architecture", None)
    if isinstance(recorded, Mapping):
        return content, dict(recorded)
    return content, read_description(path.parent) if path.name in FOLDER_WEIGHTS else {}


def read_weights_file(path: Path) -> dict[str, Any]:
    """Read tensors and plain values of a .pth/.pt or .safetensors file to the CPU, without running code in it."""
    with open(check_regular_file(path, "checkpoint"), "rb") as file:
        start = file.read(256)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"checkpoint {path}: a git-lfs pointer, not the weights; run `git lfs pull` where it lies")
    if is_web_page(start):
        raise ValueError(
            f"checkpoint {path}: a web page, not weights; the server sent a page instead, perhaps a login or an error: "
            f"fetch the file again"
        )
    damaged = f"checkpoint {path}: damaged or cut short at {path.stat().st_size} bytes; fetch or copy it again"
    # A safetensors file begins with the length of its header (8 bytes); a file of torch.save is a zip archive, or,
    # before torch 1.6, a pickle
    if start[8:9] == b"{":
        if int.from_bytes(start[:8], "little") > min(path.stat().st_size, LARGEST_DESCRIPTION):
            raise ValueError(damaged)
        return _read_safetensors(path, damaged)
    if not start.startswith((b"PK", b"\x80")) or (start.startswith(b"PK") and not zipfile.is_zipfile(path)):
        raise ValueError(damaged)
    is_zip = start.startswith(b"PK")
    if is_zip:
        _check_unpacked_size(path, damaged)
    try:
        if is_zip:
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:  # mapped, since reading a file takes the memory that a text in the pickle says it needs
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                content = torch.load(cast(Any, mapped), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if forbidden := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"checkpoint {path}: holds a {forbidden[1]}, and to make one would run code that the file names; if "
                f"you trust its source, read it with torch.load(..., weights_only=False) and save its state dict alone"
            ) from error
        raise ValueError(damaged) from error
    except (MemoryError, OSError):
        raise
    except Exception as error:  # torch raises errors of many kinds for bytes that it did not write
        if "allocate memory" in str(error):
            raise MemoryError from error
        raise ValueError(f"{damaged} ({first_error_line(error)})") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint {path}: holds a {type(content).__name__}, not a dict of tensors")
    return dict(content)


def _check_unpacked_size(path: Path, damaged: str) -> None:
    """Raise ValueError for a zip archive whose content needs far more memory than the file has bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            n_bytes = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise ValueError(f"{damaged} ({error})") from error
    if n_bytes > LARGEST_COMPRESSION * path.stat().st_size:
        raise ValueError(
            f"checkpoint {path}: {path.stat().st_size} bytes that unpack to {n_bytes}: no file of torch.save, which "
            f"does not compress; fetch it again, or load it where you trust it and save it with torch.save"
        )


def _read_safetensors(path: Path, damaged: str) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            content: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            described = (file.metadata() or {}).get("architecture")
    except SafetensorError as error:
        raise ValueError(f"{damaged} ({error})") from error
    if described and described.startswith("{"):  # other tools write a name there
        content["architecture"] = parse_json(described, path)
    return content


def _read_split(folder: Path, index: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a network of transformers from several files."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"checkpoint {index}: it has no weight_map from names of tensors to names of files")
    content: dict[str, Any] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise ValueError(f"checkpoint {index}: {name[:80]!r} is no file of this folder")
        if not (folder / name).is_file():
            raise ValueError(f"checkpoint {folder}: {name} is missing, which {index.name} lists; copy the whole folder")
        content |= read_weights_file(folder / name)
    return content, read_description(folder)


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
            cfg = read_config(check_description(config), "checkpoint")
            with torch.device("meta"):
                recorded = architecture(build_model_from_cfg(cfg, only_teacher=True)[0])
            scaling = lora_scaling(OmegaConf.select(cfg, "student"))
        except (OmegaConfBaseException, ValueError, *WRONG_TYPES) as error:
            text = first_error_line(error)
            raise ValueError(f"checkpoint {folder}: {config} is not what a run writes ({text})") from error
    if any(map(is_adapter, tensors)) and not scaling:
        raise ValueError(
            f"checkpoint {folder}: has adapters, whose scaling is only in the run's config.yaml; it should be at "
            f"{config}"
        )
    plain = merge_adapters(tensors, scaling)
    return {"teacher": {name.removeprefix(prefix): value for name, value in plain.items()}}, recorded

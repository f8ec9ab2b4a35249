"""Read the description of a network that transformers and timm write beside its weights, and check its JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from dinov2.hub.conversions import LAYER_NORM_EPS
from dinov2.utils.files import PathLike, check_regular_file

HUB_PREFIX = "hf-hub:"  # of names on the Hugging Face hub
HUB_NAME = f"{HUB_PREFIX}<owner>/<name>[/<file or folder>][@<revision>]"
CONFIG_FILE, PREPROCESSOR_FILE = "config.json", "preprocessor_config.json"
# Side in pixels of the images that DinoBloom was trained on. Its ports to timm may state the one of DINOv2's networks.
DINOBLOOM_SIZE, DINOV2_SIZE = 224, 518
LARGEST_DESCRIPTION = 100_000_000  # bytes of a header of safetensors, and of a JSON or YAML file
# what using a setting of another type, or one that is nested deeply, raises
WRONG_TYPES = (TypeError, AttributeError, LookupError, RecursionError)

# transformers' settings -> those of `models.architecture`
_HF_SETTINGS = {
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "patch_size": "patch_size",
}
_HF_FIXED = {"hidden_act": "gelu", "layer_norm_eps": LAYER_NORM_EPS}
_HF_TYPES = ("dinov2", "dinov2_with_registers")
TIMM_CENTER_CROP = "center_crop"  # key of our exports in config.json, which timm neither writes nor reads
TIMM_TAG = "timm_tag"  # key of a description by timm: the tag of the network's name, which may be empty
_TIMM_SETTINGS = {**{name: name for name in ("embed_dim", "depth", "num_heads")}, "reg_tokens": "num_register_tokens"}


def read_description(folder: Path) -> dict[str, Any]:
    """Read the architecture from transformers' or timm's config.json; ValueError for an unsupported one."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        return {}
    config = read_json(file)
    try:
        if "model_type" in config:
            return _describe_by_transformers(config, file)
        if "architecture" in config:
            return _describe_by_timm(config, file)
    except WRONG_TYPES as error:
        raise ValueError(f"checkpoint {file.parent}: {file.name} has a value of another type ({error})") from error
    return {}


def _describe_by_transformers(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    if config["model_type"] not in _HF_TYPES:
        raise ValueError(
            f"checkpoint {file.parent}: {file.name} says model_type {config['model_type']!r:.60}, and only "
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
        settings = read_json(preprocessor)
        unchanged = {} if settings.get("do_normalize", True) else {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        used = {**settings, **unchanged}
        _check_normalisation(used.get("image_mean"), used.get("image_std"), preprocessor)
        size = settings.get("crop_size" if settings.get("do_center_crop") else "size")
        if isinstance(size, Mapping):
            size = size.get("height", size.get("shortest_edge"))
        recorded["img_size"] = size
        if settings.get("do_center_crop") and "crop_pct" in settings:  # only our exports have both
            recorded["center_crop"] = settings["crop_pct"]
    return recorded


def _describe_by_timm(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    preparation = config.get("pretrained_cfg", config)
    _check_normalisation(preparation.get("mean"), preparation.get("std"), file)
    arguments = config.get("model_args") or {}
    recorded = {ours: arguments[theirs] for theirs, ours in _TIMM_SETTINGS.items() if theirs in arguments}
    size = preparation.get("input_size") or [None]
    if TIMM_CENTER_CROP in config:
        recorded["center_crop"] = config[TIMM_CENTER_CROP]
    return {**recorded, "img_size": size[-1], TIMM_TAG: str(preparation.get("tag") or "")}


def repository_name(path: PathLike) -> str:
    """Return the name of the repository to whose copy in huggingface_hub's cache a path leads; empty if to none."""
    # the folders are models--<owner>--<name>/snapshots/<commit>
    folder = next((part for part in Path(path).parts if part.startswith("models--")), "")
    return folder.rpartition("--")[2]


def is_named_dinobloom(folder: PathLike, tag: str = "") -> bool:
    """Return whether the name of a timm network's folder or repository, or its tag, says that it is DinoBloom."""
    return "dinobloom" in f"{Path(folder).name} {repository_name(folder)} {tag}".lower()


def _check_normalisation(mean: Any, std: Any, file: Path) -> None:
    for name, stated, known in (("mean", mean, IMAGENET_MEAN), ("std", std, IMAGENET_STD)):
        is_known = len(stated or known) == len(known) and all(
            isinstance(a, float) and abs(a - b) <= 1e-3 for a, b in zip(stated or known, known, strict=True)
        )
        if not is_known:
            raise ValueError(
                f"checkpoint {file.parent}: {file.name} asks for images of {name} {stated!s:.60}; here they are "
                f"normalised by ImageNet's, {list(known)}, so its features would be wrong"
            )


def check_description(file: Path) -> Path:
    """Return the path of a JSON or YAML file; ValueError for one that is no regular file or too large to be one."""
    size = check_regular_file(file, "checkpoint").stat().st_size
    if size > LARGEST_DESCRIPTION:
        raise ValueError(f"checkpoint {file}: has {size:,} bytes, far more than settings need; copy it again")
    return file


def read_json(file: Path) -> dict[str, Any]:
    return parse_json(check_description(file).read_bytes(), file)


def parse_json(text: str | bytes, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint {file}: what should be JSON in it cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {file}: holds a JSON {type(content).__name__} where settings should be")
    return content

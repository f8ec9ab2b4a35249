"""Build student and teacher from a config, and describe a network in plain Python."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from .vision_transformer import SIZES, DinoVisionTransformer, vit_base, vit_giant2, vit_large, vit_small, vit_tiny

logger = logging.getLogger("dinov2")

_BUILDERS: dict[str, Callable[..., DinoVisionTransformer]] = {
    "vit_tiny": vit_tiny,
    "vit_small": vit_small,
    "vit_base": vit_base,
    "vit_large": vit_large,
    "vit_giant2": vit_giant2,
}


def _released(size: str, has_registers: bool, ffn_layer: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"size": size, "patch_size": 14, "ffn_layer": ffn_layer}
    if has_registers:
        settings |= {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0}
    return settings


# settings of Meta's released networks, by name
_RELEASED: dict[str, dict[str, Any]] = {
    f"dinov2_vit{letter}14{suffix}": _released(size, bool(suffix), ffn_layer)
    for letter, size, ffn_layer in (
        ("s", "vit_small", "mlp"),
        ("b", "vit_base", "mlp"),
        ("l", "vit_large", "mlp"),
        ("g", "vit_giant2", "swiglufused"),
    )
    for suffix in ("", "_reg")
}

ARCHITECTURES = (*_BUILDERS, *_RELEASED)

# names in the config and in architecture() -> the constructor's, if they differ
_CONSTRUCTOR_NAMES = {"layerscale": "init_values"}

# fields that a config may lack or set to null: then the constructor or `arch` decides
_DIMENSIONS = ("embed_dim", "depth", "num_heads")
_OPTIONAL_FIELDS = (*_DIMENSIONS, "num_register_tokens", "interpolate_antialias", "interpolate_offset")
_REQUIRED_FIELDS = ("patch_size", "layerscale", "ffn_layer", "block_chunks", "qkv_bias", "proj_bias", "ffn_bias")
_ARCHITECTURE_FIELDS = ("patch_size", *_OPTIONAL_FIELDS, *_REQUIRED_FIELDS[1:], "img_size", "in_chans", "mlp_ratio")

_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false,"}
# type, smallest and largest value of fields: wide, and small enough to build the network in seconds
_BOUNDS: dict[str, tuple[type, float, int]] = {
    **{"patch_size": (int, 1, 1024), "embed_dim": (int, 1, 65536), "depth": (int, 1, 1000)},
    **{"num_heads": (int, 1, 65536), "num_register_tokens": (int, 0, 10_000), "block_chunks": (int, 0, 1000)},
    **{"img_size": (int, 1, 8192), "in_chans": (int, 1, 1024), "interpolate_antialias": (bool, 0, 1)},
    "center_crop": (float, 0.01, 1),
    **{"mlp_ratio": (float, 0, 1000), "layerscale": (float, 0, 1000), "interpolate_offset": (float, -1, 1)},
}


def _resolve(arch: str) -> tuple[Callable[..., DinoVisionTransformer], dict[str, Any]]:
    """Return the function that builds `arch`, and the settings that its name fixes."""
    name = str(arch).removesuffix("_memeff")  # upstream's old mark for xFormers attention
    if name in _RELEASED:
        settings = dict(_RELEASED[name])
        return _BUILDERS[settings.pop("size")], settings
    if name in _BUILDERS:
        return _BUILDERS[name], {}
    raise ValueError(f"arch: {arch!r} is unknown; choose one of {', '.join(ARCHITECTURES)}")


def check_settings(settings: Mapping[str, Any], origin: str = "") -> None:
    """Raise ValueError if a setting of an architecture has another type or is out of its bounds; None is accepted."""
    for name, (kind, low, high) in _BOUNDS.items():
        value: Any = settings.get(name)
        is_pair = name == "img_size" and isinstance(value, list | tuple) and len(value) == 2
        values = value if is_pair else [value]
        kinds = (int, float) if kind is float else (kind,)
        if value is not None and not all(type(each) in kinds and low <= each <= high for each in values):
            text = repr(value)[:60] if isinstance(value, bool | float | str) else f"a {type(value).__name__}"
            text = str(value) if type(value) is int and abs(value) < 2**63 else text
            raise ValueError(f"{origin}{name} is {text}, expected {_TYPE_NAMES[kind]} from {low} to {high}")


def fixed_settings(arch: str) -> dict[str, Any]:
    """Return the fields of the config's section `student` that the name `arch` fixes, for Meta's released networks."""
    return _resolve(arch)[1]


def build_model(args: Any, only_teacher: bool = False, img_size: int = 224, center_crop: float = 1.0) -> Any:
    """Build the student and teacher that the config's section `student` describes.

    Args:
        args: object with the fields of `student`; it is not changed. `arch` is a function of vision_transformer
            ("vit_small", ...), or a name like "dinov2_vits14", whose patch size, feed-forward network and registers
            override the other fields. embed_dim, depth and num_heads, if not null, override those of `arch`.
        only_teacher: build no student.
        img_size: side of the global crops in pixels.
        center_crop: share of an image that the crops come from, as of `DinoVisionTransformer`.

    Returns:
        (student, teacher, embed_dim), or (teacher, embed_dim). Only the student has stochastic depth.
    """
    build, fixed = _resolve(args.arch)
    settings = {name: getattr(args, name) for name in _REQUIRED_FIELDS}
    optional = {name: getattr(args, name, None) for name in _OPTIONAL_FIELDS}
    settings |= {name: value for name, value in optional.items() if value is not None}
    for name, value in fixed.items():
        if name in settings and settings[name] != value:
            logger.info("student.%s: %r becomes %r, the value of arch %s", name, settings[name], value, args.arch)
        settings[name] = value
    check_settings({**settings, "img_size": img_size}, "student.")
    check_settings({"center_crop": center_crop}, "train.")
    settings |= {"img_size": img_size, "center_crop": center_crop}
    settings = {_CONSTRUCTOR_NAMES.get(name, name): value for name, value in settings.items()}

    teacher = build(**settings)
    if only_teacher:
        return teacher, teacher.embed_dim
    student = build(drop_path_rate=args.drop_path_rate, drop_path_uniform=args.drop_path_uniform, **settings)
    return student, teacher, student.embed_dim


def build_model_from_cfg(cfg: Any, only_teacher: bool = False) -> Any:
    """Call build_model with a config's section `student`, `crops.global_crops_size` and `train.center_crop`."""
    center_crop = getattr(getattr(cfg, "train", None), "center_crop", 1.0)  # older files of runs have none
    return build_model(cfg.student, only_teacher, img_size=cfg.crops.global_crops_size, center_crop=center_crop)


def architecture(model: DinoVisionTransformer) -> dict[str, Any]:
    """Describe a network for `build_backbone`; `arch` is the name of its size, like "vit_small", or "custom".

    `center_crop` is only there if it is not 1, so that other files stay as they were.
    """
    attributes = {"depth": "n_blocks", "layerscale": "init_values"}
    description = {name: getattr(model, attributes.get(name, name)) for name in _ARCHITECTURE_FIELDS}
    if not isinstance(model.img_size, int):
        description["img_size"] = list(model.img_size)
    if model.center_crop != 1:
        description["center_crop"] = model.center_crop
    dimensions = {name: description[name] for name in _DIMENSIONS}
    return {"arch": next((name for name, size in SIZES.items() if size == dimensions), "custom"), **description}


def build_backbone(architecture: Mapping[str, Any]) -> DinoVisionTransformer:
    """Build the network that `architecture(model)` describes, with new weights and without stochastic depth.

    Missing fields follow from `arch`, else they have DinoVisionTransformer's defaults.
    """
    unknown = sorted(set(architecture) - set(_ARCHITECTURE_FIELDS) - {"arch", "center_crop"})
    if unknown:
        raise ValueError(
            f"architecture: unknown fields {', '.join(unknown)}; fields are arch, {', '.join(_ARCHITECTURE_FIELDS)}, "
            f"center_crop"
        )
    check_settings(architecture, "architecture: ")
    build: Callable[..., DinoVisionTransformer] = DinoVisionTransformer
    settings: dict[str, Any] = {}
    if not set(_DIMENSIONS) <= set(architecture):
        if architecture.get("arch", "custom") == "custom":
            raise ValueError(
                "architecture: the size is unknown; give embed_dim, depth and num_heads, or an arch out of "
                + ", ".join(ARCHITECTURES)
            )
        build, settings = _resolve(architecture["arch"])
    settings |= {_CONSTRUCTOR_NAMES.get(name, name): v for name, v in architecture.items() if name != "arch"}
    if not isinstance(settings.get("img_size", 0), int):
        settings["img_size"] = tuple(settings["img_size"])
    return build(**settings)

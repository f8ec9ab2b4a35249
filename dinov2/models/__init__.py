"""Student and teacher networks from a config, and a network's description in plain Python."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

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


# what the names of Meta's released networks stand for
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

# names in the config and in architecture() -> the constructor's, where they differ
_CONSTRUCTOR_NAMES = {"layerscale": "init_values"}

# fields that a config may lack or set to null: then the constructor or `arch` decides
_OPTIONAL_FIELDS = (
    "embed_dim",
    "depth",
    "num_heads",
    "num_register_tokens",
    "interpolate_antialias",
    "interpolate_offset",
)
_REQUIRED_FIELDS = (
    "patch_size",
    "layerscale",
    "ffn_layer",
    "block_chunks",
    "qkv_bias",
    "proj_bias",
    "ffn_bias",
)
_ARCHITECTURE_FIELDS = (
    "patch_size",
    "embed_dim",
    "depth",
    "num_heads",
    "img_size",
    "in_chans",
    "mlp_ratio",
    "ffn_layer",
    "qkv_bias",
    "proj_bias",
    "ffn_bias",
    "layerscale",
    "block_chunks",
    "num_register_tokens",
    "interpolate_antialias",
    "interpolate_offset",
)


def _resolve(arch: str) -> tuple[Callable[..., DinoVisionTransformer], dict[str, Any]]:
    """The function that builds `arch` and the settings that its name fixes."""
    name = arch.removesuffix("_memeff")  # upstream's old mark for xFormers attention
    if name in _RELEASED:
        settings = dict(_RELEASED[name])
        return _BUILDERS[settings.pop("size")], settings
    if name in _BUILDERS:
        return _BUILDERS[name], {}
    raise ValueError(f"arch: {arch!r} is unknown; choose one of {', '.join(ARCHITECTURES)}")


def fixed_settings(arch: str) -> dict[str, Any]:
    """Fields of the config's section `student` that the name `arch` decides: those of Meta's released networks.

    Raises:
        ValueError: for an unknown arch.
    """
    return _resolve(arch)[1]


@overload
def build_model(
    args: Any, only_teacher: Literal[False] = False, img_size: int = 224
) -> tuple[DinoVisionTransformer, DinoVisionTransformer, int]: ...


@overload
def build_model(args: Any, only_teacher: Literal[True], img_size: int = 224) -> tuple[DinoVisionTransformer, int]: ...


def build_model(args: Any, only_teacher: bool = False, img_size: int = 224) -> Any:
    """Student and teacher as the config's section `student` describes them.

    Args:
        args: object with the fields of `student`; it isn't changed. `arch` is a function of vision_transformer
            ("vit_small", ...), or "dinov2_vits14" and alike, whose patch size, feed-forward network and registers
            then win over the other fields. embed_dim, depth and num_heads, if not null, replace what `arch` says.
        only_teacher: build no student.
        img_size: pixels of the global crops.

    Returns:
        (student, teacher, embed_dim), or (teacher, embed_dim). Stochastic depth is the student's only.

    Raises:
        ValueError: for an unknown arch.
    """
    build, fixed = _resolve(args.arch)
    settings = {name: getattr(args, name) for name in _REQUIRED_FIELDS}
    optional = {name: getattr(args, name, None) for name in _OPTIONAL_FIELDS}
    settings |= {name: value for name, value in optional.items() if value is not None}
    for name, value in fixed.items():
        if name in settings and settings[name] != value:
            logger.info("student.%s: %r becomes %r, which is what arch %s has", name, settings[name], value, args.arch)
        settings[name] = value
    settings = {_CONSTRUCTOR_NAMES.get(name, name): value for name, value in settings.items()}

    teacher = build(img_size=img_size, **settings)
    if only_teacher:
        return teacher, teacher.embed_dim
    student = build(
        img_size=img_size,
        drop_path_rate=args.drop_path_rate,
        drop_path_uniform=args.drop_path_uniform,
        **settings,
    )
    return student, teacher, student.embed_dim


@overload
def build_model_from_cfg(
    cfg: Any, only_teacher: Literal[False] = False
) -> tuple[DinoVisionTransformer, DinoVisionTransformer, int]: ...


@overload
def build_model_from_cfg(cfg: Any, only_teacher: Literal[True]) -> tuple[DinoVisionTransformer, int]: ...


def build_model_from_cfg(cfg: Any, only_teacher: bool = False) -> Any:
    """build_model of a whole config: section `student`, and `crops.global_crops_size` for the image size."""
    img_size = cfg.crops.global_crops_size
    if only_teacher:
        return build_model(cfg.student, only_teacher=True, img_size=img_size)
    return build_model(cfg.student, img_size=img_size)


def architecture(model: DinoVisionTransformer) -> dict[str, Any]:
    """All that build_backbone needs to make the same network, as numbers, strings, booleans and None.

    `arch` is the name of the size, for readers: "vit_small" and alike, or "custom".
    """
    attributes = {"depth": "n_blocks", "layerscale": "init_values"}
    dimensions = {"embed_dim": model.embed_dim, "depth": model.n_blocks, "num_heads": model.num_heads}
    name_of_size = next((name for name, size in SIZES.items() if size == dimensions), "custom")
    description: dict[str, Any] = {"arch": name_of_size}
    description |= {name: getattr(model, attributes.get(name, name)) for name in _ARCHITECTURE_FIELDS}
    if not isinstance(model.img_size, int):
        description["img_size"] = list(model.img_size)
    return description


def build_backbone(architecture: Mapping[str, Any]) -> DinoVisionTransformer:
    """The network of a description, with fresh weights and without stochastic depth.

    Args:
        architecture: as `architecture(model)` gives it. What is missing follows from `arch`, or else is
            DinoVisionTransformer's default; img_size may be a pair (height, width).

    Raises:
        ValueError: for an unknown arch without its dimensions, or for unknown fields.
    """
    unknown = sorted(set(architecture) - set(_ARCHITECTURE_FIELDS) - {"arch"})
    if unknown:
        raise ValueError(
            f"architecture: unknown fields {', '.join(unknown)}; fields are arch, {', '.join(_ARCHITECTURE_FIELDS)}"
        )
    build: Callable[..., DinoVisionTransformer] = DinoVisionTransformer
    settings: dict[str, Any] = {}
    if not {"embed_dim", "depth", "num_heads"} <= set(architecture):
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

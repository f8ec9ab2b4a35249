"""Load a backbone from weights in any known layout; the names that torch.hub finds.

`load_backbone` reads, by path, name or URL: a training run's `teacher_checkpoint.pth`, folder, or checkpoint to resume
from; DinoBloom's releases (`{"teacher": {"backbone.*"}}`); bare state dicts like DINOv2's releases, with and without
registers; `{"model": ...}` and `{"state_dict": ...}` around any of these; safetensors; a folder or file of
transformers' Dinov2 and of timm's DINOv2 networks. The architecture is inferred from the tensors. No code in a file is
ever run.

Dimension key:  B images, S image side in pixels, D embedding dim, g patches along one side of the grid
"""

import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2.data.datasets.decode import decode_image, resize_image
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize_images
from dinov2.hub.sources import RELEASES, Release, checkpoint_file, join_names
from dinov2.hub.weight_files import read_networks
from dinov2.models import build_backbone, check_settings
from dinov2.models.vision_transformer import DinoVisionTransformer, resize_pos_embed
from dinov2.utils.files import PathLike

logger = logging.getLogger("dinov2")

DEFAULT_IMAGE_SIZE = 224  # of files that record none


@dataclass(frozen=True)
class ImageTransform:
    """Crop an image to a square and normalise it by ImageNet's mean and std, as all of these networks expect.

    Transforms can be pickled and compared; `str()` describes one in results and cache keys.
    """

    image_size: int
    center_crop: float = 1.0  # side of the square as a share of the image's shorter side
    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __call__(self, image: Image.Image | np.ndarray | str | os.PathLike[str]) -> Tensor:
        """Transform an image, or the file at a path, to float32 [3, S, S]."""
        decoded = image if isinstance(image, Image.Image | np.ndarray) else decode_image(image)
        return normalize_images(self.resize(decoded))

    def resize(self, image: Image.Image | np.ndarray) -> Tensor:
        """Cut the central square and resize it to S: uint8 [3, S, S], before normalisation."""
        return resize_image(image, self.image_size, fit="crop", center_crop=self.center_crop)

    def __str__(self) -> str:
        if self.center_crop != 1:
            part = f"central square of {self.center_crop} of the shorter side"
            return f"RGB, {part} to {self.image_size} px (Lanczos), ImageNet mean and std"
        return f"RGB, shorter side to {self.image_size} px (Lanczos), centre crop, ImageNet mean and std"


def load_backbone(source: PathLike, img_size: int | None = None) -> DinoVisionTransformer:
    """Load a backbone with its weights, in eval mode and fp32 on the CPU.

    Its attribute `transform` prepares an image or the file at a path: `model(model.transform(path)[None])` is [1, D].

    Position embeddings of another grid are resized once, as DinoBloom does before training. A DINOv2 release loaded
    with `img_size=518` keeps its 37 x 37 grid and interpolates in each forward, as Meta's code does. Heads are ignored,
    and a missing `mask_token` becomes zero.

    Args:
        source: a file in any layout of the module docstring; a folder, from which `checkpoint_file` chooses; a name of
            `dinov2.hub.RELEASES` (`dinobloom_b`, `dinov2_vits14_reg`, ...) or a URL, which are downloaded once; a
            repository of the Hugging Face hub (`hf-hub:<owner>/<name>`, see `dinov2.hub.hugging_face`).
        img_size: S, side of the square images to embed; a multiple of the patch size. By default the size that the
            file records, as a training run does, else 224.

    Raises:
        FileNotFoundError: there is no such file, no weights in the folder, or no such name.
        ConnectionError: it cannot be downloaded, or the hub refuses access.
        ValueError: the file is damaged, is no checkpoint or needs pickled code; or its tensors do not make a whole
            backbone (the message lists them); or it holds another architecture than the release of that name.
    """
    return _load(source, img_size, DEFAULT_IMAGE_SIZE)


def _load(source: PathLike, img_size: int | None, default_size: int) -> DinoVisionTransformer:
    path = checkpoint_file(source)
    stored = read_networks(path)
    state = stored.backbone
    description = infer_architecture(state, stored.recorded, path)
    img_size = img_size or stored.recorded.get("img_size") or default_size
    try:
        with torch.device("meta"):  # saves time and random numbers for weights that are replaced at once
            model = build_backbone({**description, "img_size": img_size})
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from error
    report = [describe_backbone(model), *filter(None, [stored.note]), f"all {len(state)} tensors loaded"]
    pos_embed = state["pos_embed"]
    if pos_embed.shape != model.pos_embed.shape:
        grid = img_size // model.patch_size
        own_grid = math.isqrt(pos_embed.shape[1] - 1)
        if own_grid * own_grid != pos_embed.shape[1] - 1:
            raise ValueError(f"checkpoint {path}: pos_embed {list(pos_embed.shape)} is for no square grid of patches")
        state["pos_embed"] = resize_pos_embed(pos_embed, grid)  # [1, 1 + g*g, D]
        report.append(f"position embeddings resized from {own_grid} x {own_grid} to {grid} x {grid} patches")
    state.setdefault("mask_token", torch.zeros(1, model.embed_dim))
    check_names_and_shapes(model.state_dict(), state, path)
    if release := RELEASES.get(os.fspath(source)):
        _check_architecture(model, release, path)
    model.load_state_dict(state, assign=True)
    logger.info("%s: %s", path, "; ".join(report + [f"without its {head}" for head in stored.heads]))
    return _attach_transform(model.eval(), img_size)


def _attach_transform(model: DinoVisionTransformer, img_size: int) -> DinoVisionTransformer:
    # a plain attribute, which is not in the state dict and does not disturb copies, compilation and sharding
    cast(Any, model).transform = ImageTransform(img_size, model.center_crop) if model.in_chans == 3 else None
    return model


def trained_image_size(source: PathLike) -> int | None:
    """Return the side in pixels of the images that a network was trained on or made for; None if unknown."""
    return read_networks(checkpoint_file(source)).recorded.get("img_size")


def recorded_transform(source: PathLike, img_size: int | None = None) -> ImageTransform:
    """Return the `transform` of `load_backbone(source, img_size)`, without building the network."""
    recorded = read_networks(checkpoint_file(source)).recorded
    return ImageTransform(
        img_size or recorded.get("img_size") or DEFAULT_IMAGE_SIZE, recorded.get("center_crop") or 1.0
    )


def untrained_backbone(source: PathLike, img_size: int | None = None, seed: int = 0) -> DinoVisionTransformer:
    """Build the architecture of `load_backbone(source, img_size)` with random weights from `seed`: a baseline.

    Layer scale has the initial value in the file's `architecture`, or 1.0, with which an untrained network is stronger.
    """
    path = checkpoint_file(source)
    stored = read_networks(path)
    description = infer_architecture(stored.backbone, stored.recorded, path)
    img_size = img_size or stored.recorded.get("img_size") or DEFAULT_IMAGE_SIZE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _attach_transform(build_backbone({**description, "img_size": img_size}).eval(), img_size)


def read_heads(source: PathLike) -> dict[str, dict[str, Tensor]]:
    """Read the heads of a checkpoint: {"dino_head": tensors, "ibot_head": tensors} in fp32, as far as they exist.

    The names are those of `DINOHead`, also for files that use torch's parametrization of weight norm. Raises the errors
    of `load_backbone`.
    """
    return read_networks(checkpoint_file(source)).heads


def describe_backbone(model: DinoVisionTransformer) -> str:
    """Describe a backbone's architecture in one line, for logs and result files."""
    registers = f", {model.num_register_tokens} registers" if model.num_register_tokens else ""
    return (
        f"ViT with dim {model.embed_dim}, depth {model.n_blocks}, {model.num_heads} heads, patch {model.patch_size}"
        f"{registers}"
    )


def infer_architecture(state: Mapping[str, Tensor], recorded: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Infer the architecture, for `models.build_backbone`, from the tensors' names and shapes.

    Tensors do not show the number of heads, how position embeddings are interpolated and which part of an image the
    network is made for. These come from `recorded`, else they are those of all released networks: 64 dimensions per
    head; with registers antialiasing and no offset, without registers no antialiasing and offset 0.1; whole images.
    """
    essential = ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "norm.weight"]
    absent = [name for name in essential if name not in state]
    if absent:
        holds = join_names(sorted(state)) if state else "no tensors"
        raise ValueError(f"checkpoint {path}: not a DINOv2 backbone: no {join_names(absent)}; it holds {holds}")
    is_gated = "blocks.0.mlp.w3.weight" in state
    last_ffn_layer = "blocks.0.mlp.w3" if is_gated else "blocks.0.mlp.fc2"
    if f"{last_ffn_layer}.weight" not in state:
        raise ValueError(
            f"checkpoint {path}: the feed-forward network of block 0 has neither fc1 and fc2 nor w12 and w3, "
            f"so its kind is unknown"
        )
    shapes = {"pos_embed": 3, f"{last_ffn_layer}.weight": 2, "register_tokens": 3}  # number of dimensions
    for name in shapes.keys() & state.keys():
        if state[name].ndim != shapes[name]:
            raise ValueError(
                f"checkpoint {path}: {name} has the shape {list(state[name].shape)}, expected {shapes[name]} "
                f"dimensions: it is another kind of network"
            )
    projection = list(state["patch_embed.proj.weight"].shape)
    if len(projection) != 4 or projection[2] != projection[3]:
        raise ValueError(
            f"checkpoint {path}: patch_embed.proj.weight has the shape {projection}, expected [embed_dim, channels, "
            f"patch, patch]: it is another kind of network"
        )
    embed_dim, in_chans, patch_size, _ = projection
    has_registers = "register_tokens" in state
    measured = {
        "in_chans": in_chans,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if re.match(r"blocks\.\d+\.", name)),
        "num_register_tokens": state["register_tokens"].shape[1] if has_registers else 0,
    }
    check_settings(measured, f"checkpoint {path}: from its tensors, ")
    hidden_dim = state[f"{last_ffn_layer}.weight"].shape[1]
    mlp_ratio = hidden_dim / embed_dim
    if is_gated:  # 2/3 of the width, rounded up to a multiple of 8: several ratios give the same width; 4 is usual
        mlp_ratio = 4.0 if (int(embed_dim * 8 / 3) + 7) // 8 * 8 == hidden_dim else 1.5 * hidden_dim / embed_dim
    contradictions = [
        f"{name} is {recorded[name]} there and {value} in the tensors"
        for name, value in measured.items()
        if recorded.get(name, value) != value
    ]
    if contradictions:
        raise ValueError(
            f"checkpoint {path}: its 'architecture' contradicts its tensors ({join_names(contradictions)}); "
            f"some tensors may be lost: write the file again"
        )
    num_heads = recorded.get("num_heads", embed_dim // 64)
    if not num_heads or embed_dim % num_heads:
        raise ValueError(
            f"checkpoint {path}: the number of attention heads is unknown ({num_heads} do not share dim {embed_dim} "
            f"equally); put {{'architecture': {{'num_heads': ...}}}} into the file"
        )
    return {
        **measured,
        "num_heads": num_heads,
        "mlp_ratio": mlp_ratio,
        "ffn_layer": "swiglufused" if is_gated else "mlp",
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "ffn_bias": f"{last_ffn_layer}.bias" in state,
        "layerscale": (recorded.get("layerscale") or 1.0) if "blocks.0.ls1.gamma" in state else None,
        "block_chunks": 0,
        "center_crop": recorded.get("center_crop") or 1.0,
        "interpolate_antialias": recorded.get("interpolate_antialias", has_registers),
        "interpolate_offset": recorded.get("interpolate_offset", 0.0 if has_registers else 0.1),
    }


def check_names_and_shapes(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    """Check that a file has exactly a network's tensors; the ValueError lists the differences."""
    if wrong := mismatches(wanted, state):
        raise ValueError(f"checkpoint {path}: its tensors do not make a whole backbone: {wrong}")


def mismatches(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """List the missing, unexpected and misshapen tensors of a file; empty if it has exactly the wanted ones."""
    problems = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "misshapen": [
            f"{name} {list(state[name].shape)} instead of {list(value.shape)}"
            for name, value in wanted.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    return "; ".join(f"{len(names)} {kind}: {join_names(names)}" for kind, names in problems.items() if names)


# --- torch.hub ------------------------------------------------------------------------------------------------------


def _check_architecture(model: DinoVisionTransformer, release: Release, path: PathLike) -> None:
    with torch.device("meta"):
        expected = describe_backbone(build_backbone({"arch": release.arch}))
    if describe_backbone(model) != expected:
        raise ValueError(
            f"{release.name}: {str(path)!r} holds a {describe_backbone(model)}, not a {expected}; take {release.url}"
        )


def _make_entry_point(release: Release) -> Callable[..., DinoVisionTransformer]:
    """Make the function that torch.hub finds by the name of a release."""

    def build(
        *, pretrained: bool = True, weights: PathLike | None = None, img_size: int | None = None
    ) -> DinoVisionTransformer:
        if not pretrained:
            if weights is not None:
                raise ValueError(
                    f"{release.name}: weights={str(weights)!r} contradicts pretrained=False; leave one of them out"
                )
            size = img_size or release.img_size
            description = {"arch": release.arch, "layerscale": 1.0, "block_chunks": 0, "img_size": size}
            return _attach_transform(build_backbone(description), size)
        source = release.url if weights is None else weights  # not its name, which a local folder may have
        model = _load(source, img_size, release.img_size)
        _check_architecture(model, release, source)
        return model

    build.__name__ = build.__qualname__ = release.name
    build.__doc__ = f"""{release.title}.

    Args:
        pretrained: load the released weights, which are downloaded once; False for random weights.
        weights: your copy of these weights, instead of a download; any source of `load_backbone`.
        img_size: as for `load_backbone`; by default the size that the file records, else that of the released weights.
    """
    return build


ENTRY_POINTS: dict[str, Callable[..., DinoVisionTransformer]] = {
    name: _make_entry_point(release) for name, release in RELEASES.items()
}

"""Encoders turn images into features: the interface, and the backbones of this project (`named_encoders` has others).

An encoder has the network, the preparation of an image for it, and several kinds of features from one forward:

- `cls`: the CLS token after the last norm; for library networks that pool otherwise, the input of the classifier;
- `mean`: the mean of the patch tokens after the last norm;
- `cls+mean`: both, concatenated;
- `last<n>`: the CLS tokens of the last n blocks, each after the last norm, the last block at the end;
- `last<n>+mean`: the same, then the mean of the last block's patch tokens (the input of DINOv2's linear probe);
- `patches`: the patch tokens after the last norm, as a grid.

Dimension key:  B images, S image side in pixels, D embedding dim, P = h x w patches
"""

import hashlib
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.data.transforms import normalize_images
from dinov2.eval.features.store import PATCHES
from dinov2.hub.backbones import ImageTransform, describe_backbone
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.files import file_sha256

KINDS_HELP = "cls, mean, cls+mean, last<n>, last<n>+mean, patches"

Preparation = Callable[[np.ndarray], Tensor]


@dataclass(frozen=True)
class Kind:
    """The components of a kind of features, in the order of the fields; the module's docstring lists the kinds."""

    name: str
    has_cls: bool = False
    n_last: int = 0  # number of blocks whose CLS tokens it contains
    has_mean: bool = False
    is_grid: bool = False

    @classmethod
    def parse(cls, name: str) -> "Kind":
        """Return the kind of this name; ValueError for an unknown one."""
        if name == PATCHES:
            return cls(name, is_grid=True)
        if name == "mean":
            return cls(name, has_mean=True)
        match = re.fullmatch(r"(?:cls|last([1-9]\d*))(\+mean)?", name)
        if match is None:
            raise ValueError(f"kind of features: {name!r} is unknown; there are {KINDS_HELP}")
        return cls(name, has_cls=match[1] is None, n_last=int(match[1] or 0), has_mean=match[2] is not None)


class Encoder(ABC):
    """A network and everything else that its features depend on, except the precision."""

    network: nn.Module  # its tensors identify it, and it is moved between devices
    preparation: Preparation  # turns uint8 [H, W, 3] in RGB into an input of `embed`; other processes pickle it
    transform: str  # describes everything that happens to an image before the network
    description: str  # of the network
    origin: str  # of its weights
    image_size: int  # S; 0 if images are not resized
    center_crop: float = 1.0  # side of the square that the network gets, as a share of the image's shorter side
    has_patch_tokens: bool = False
    n_blocks: int = 0  # blocks with CLS tokens

    @cached_property
    def sha256(self) -> str:
        """Return the hash of everything that the features depend on besides the transform."""
        return state_sha256(self.network)

    def check(self, kinds: Sequence[str]) -> None:
        """Raise ValueError for a kind of features that the encoder does not have."""
        known = ["cls"]
        if self.has_patch_tokens:
            known += ["mean", "cls+mean", PATCHES]
        if self.n_blocks:
            known += [f"last<n> and last<n>+mean with n up to {self.n_blocks}"]
        for kind in map(Kind.parse, kinds):
            lacks_patches = (kind.has_mean or kind.is_grid) and not self.has_patch_tokens
            if lacks_patches or kind.n_last > self.n_blocks:
                raise ValueError(f"--kinds {kind.name}: {self.description} has only {', '.join(known)}")

    def compile(self, backend: str = "inductor") -> None:
        """Compile the network at its next call."""
        for module in self.modules_to_compile():
            module.compile(backend=backend)

    def modules_to_compile(self) -> Iterable[nn.Module]:
        """Return modules that `embed` calls; equal ones are compiled once for all of them."""
        return [self.network]

    @abstractmethod
    def embed(self, images: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
        """Return {kind: float32 [B, D of the kind]} of prepared images; `patches` is float16 [B, h, w, D]."""


class DinoEncoder(Encoder):
    """A backbone of this project, or a released one of DINOv2 or DinoBloom.

    The hash of the weights file is its identity, without a file that of the tensors.
    """

    network: DinoVisionTransformer
    has_patch_tokens = True

    def __init__(self, network: DinoVisionTransformer, image_size: int, file: Path | None = None) -> None:
        check_divisible(image_size, network.patch_size)
        transform = ImageTransform(image_size, network.center_crop)
        self.network, self.n_blocks, self.description = network, network.n_blocks, describe_backbone(network)
        self.preparation, self.transform, self.image_size = transform.resize, str(transform), image_size
        self.center_crop, self.file = network.center_crop, file
        self.origin = os.path.abspath(file) if file is not None else "memory"

    @cached_property
    def sha256(self) -> str:
        return state_sha256(self.network) if self.file is None else file_sha256(self.file)

    def modules_to_compile(self) -> Iterable[nn.Module]:
        return self.network.each_block()

    def embed(self, images: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
        parsed = [Kind.parse(kind) for kind in kinds]
        if not any(kind.has_mean or kind.is_grid or kind.n_last > 1 for kind in parsed):
            cls_token = self.network(normalize_images(images))  # [B, D]
            return dict.fromkeys(kinds, cls_token.float())
        n = max(1, *(kind.n_last for kind in parsed))
        layers = self.network.get_intermediate_layers(normalize_images(images), n=n, return_class_token=True)
        cls_tokens = [cls_token for _, cls_token in layers]  # n times [B, D]
        return assemble(parsed, cls_tokens[-1], cls_tokens, layers[-1][0])


def state_sha256(network: nn.Module) -> str:
    """Return the hash of a network's tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_divisible(image_size: int, patch_size: int) -> None:
    """Raise ValueError if patches do not fill the image."""
    if image_size < patch_size or image_size % patch_size:
        below, above = image_size // patch_size * patch_size, -(-image_size // patch_size) * patch_size
        raise ValueError(
            f"--image-size {image_size}: the network's patches of {patch_size} px do not fill it; take "
            f"{f'{below} or {above}' if below else above}"
        )


def assemble(
    kinds: Sequence[Kind], pooled: Tensor, cls_tokens: Sequence[Tensor], patch_tokens: Tensor
) -> dict[str, Tensor]:
    """Assemble kinds of features from `cls` [B, D], CLS tokens of the last blocks and patch tokens [B, P, D]."""
    features = {}
    for kind in kinds:
        if kind.is_grid:
            side = math.isqrt(patch_tokens.shape[1])
            features[kind.name] = patch_tokens.unflatten(1, (side, side)).half()  # [B, h, w, D]
            continue
        tokens = [pooled] if kind.has_cls else list(cls_tokens[len(cls_tokens) - kind.n_last :])
        if kind.has_mean:
            tokens.append(patch_tokens.float().mean(dim=1))  # [B, D]
        features[kind.name] = torch.cat([token.float() for token in tokens], dim=1)
    return features

"""Distillation: a student learns to predict the tokens of a frozen network, of any width and patch size.

DINOv2 distils through its own loss: the frozen network's head gives the targets. That needs a file with heads, which
released backbones lack, ties the student to their prototypes, and fills few of them with a small batch. Here two
linear maps of the student's tokens predict the frozen network's CLS and patch tokens themselves (`token_distance`),
which works for every file that `load_backbone` reads, and for any batch. The teacher of other losses and of the written
files stays the moving average of the student: it is the network to use afterwards.

Letters: R crops, S side of a crop in pixels, g patches along an edge
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.hub.backbones import checkpoint_file, load_backbone
from dinov2.models import architecture, build_backbone
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.files import file_sha256

logger = logging.getLogger("dinov2")


def load_frozen_teacher(cfg: Any, device: torch.device) -> DinoVisionTransformer | None:
    """Load the network of `teacher.pretrained_weights`, if it is set, and set `teacher.frozen` to its description.

    `teacher.frozen` has its architecture and the checksum of its file. A resumed run compares them: another network
    under the same name would be another run.
    """
    weights = cfg.teacher.pretrained_weights
    cfg.teacher.frozen = None  # a file of settings may have it from another run
    if not weights:
        return None
    kinds = (FileNotFoundError, ConnectionError, ValueError)
    try:
        path = checkpoint_file(weights)
        network = load_backbone(path)
        if network.in_chans != 3:
            raise ValueError(f"{path} takes images of {network.in_chans} channels, and training has RGB")
    except kinds as error:
        kind = next(kind for kind in kinds if isinstance(error, kind))  # subclasses may want other arguments
        raise kind(
            f"teacher.pretrained_weights={weights}: {error}. Give a file, folder, name or URL of a network to distil, "
            "or null for none"
        ) from error
    cfg.teacher.frozen = {**architecture(network), "sha256": file_sha256(path)}
    return network.to(device)


def build_frozen_teacher(cfg: Any) -> DinoVisionTransformer | None:
    """Build the network that `teacher.frozen` describes, without its weights."""
    if cfg.teacher.frozen is None:
        return None
    return build_backbone({name: value for name, value in cfg.teacher.frozen.items() if name != "sha256"})


def resize_to_grid(crops: Tensor, grid: int, patch_size: int) -> Tensor:
    """Resize crops [R, 3, S, S] to g x g patches of a network, so that its patch tokens are those of the student's."""
    size = grid * patch_size
    if crops.shape[-1] == size:
        return crops
    return F.interpolate(crops, size=(size, size), mode="bicubic", antialias=True)

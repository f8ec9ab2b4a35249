"""The weights that a run starts from: those of the backbone, and of the heads where the file has them.

`student.pretrained_weights` (or MODEL.WEIGHTS) is whatever `load_backbone` reads: a file or folder, a name or a URL.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dinov2.distributed import is_main_process
from dinov2.hub.backbones import checkpoint_file, file_sha256, load_backbone, read_heads, without_chunk
from dinov2.hub.downloads import RELEASES

logger = logging.getLogger("dinov2")

HEADS = ("dino_head", "ibot_head")
N_NAMES_IN_ERRORS = 4
_KINDS = (FileNotFoundError, ConnectionError, ValueError)  # of errors that a user can mend


def weights_of(cfg: Any) -> str | None:
    """What the run starts from; None for random weights."""
    return cfg.student.pretrained_weights or cfg.MODEL.WEIGHTS or None


def locate_weights(cfg: Any) -> Path | None:
    """The file that the run starts from (or folder, where weights lie in several), downloaded if it has to be; None for
    random weights.

    Of several processes that ask, one downloads.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: it cannot be had, or is not what was published.
    """
    weights = weights_of(cfg)
    if weights is None:
        return None
    try:
        return checkpoint_file(weights)
    except _KINDS as error:
        key = "student.pretrained_weights" if cfg.student.pretrained_weights else "MODEL.WEIGHTS"
        kind = next(kind for kind in _KINDS if isinstance(error, kind))
        raise kind(
            f"{key}={weights}: {error}. To start from a file of yours set {key}=<file>, and to start from random "
            f"weights {key}=null"
        ) from error


def start_from_weights(student: nn.ModuleDict, cfg: Any) -> None:
    """Fill the student from the file that the configuration names, if it names one.

    All of the backbone must fit; position embeddings are resized to the grid of the global crops, as `load_backbone`
    does it. A head is taken as a whole or, with a warning if the file has one of other shapes, not at all.

    Args:
        student: `backbone`, and heads out of `HEADS`, before they are spread over processes.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: as `locate_weights`, or the file's backbone is another one; the
            message lists names and shapes.
    """
    path = locate_weights(cfg)
    if path is None:
        return
    n_tensors = _fill_backbone(student["backbone"], path, cfg)
    in_file = read_heads(path)
    taken = [name for name in HEADS if name in student and _fill_head(student[name], name, in_file.get(name))]
    if is_main_process():
        random = [name for name in HEADS if name in student and name not in taken]
        hint = " (optim.freeze_backbone_iterations=<n> lets them warm up first)"
        logger.info(
            "student and teacher start from %s (sha256 %s...): all %d tensors of the backbone%s; at random: %s",
            *(path, file_sha256(path)[:12], n_tensors, "".join(f", {name}" for name in taken)),
            (", ".join(random) + ("" if cfg.optim.freeze_backbone_iterations else hint)) if random else "nothing",
        )


def _fill_backbone(backbone: nn.Module, path: Path, cfg: Any) -> int:
    loaded = load_backbone(path, img_size=cfg.crops.global_crops_size).state_dict()
    own = backbone.state_dict()
    in_file = {name: without_chunk(name) for name in own}  # load_backbone gives names without block_chunks
    wrong = _misfits(loaded, {in_file[name]: value for name, value in own.items()})
    if wrong:
        release = RELEASES.get(weights_of(cfg) or "")
        advice = f"; set student.arch={release.arch}" if release and release.arch != cfg.student.arch else ""
        raise ValueError(
            f"student.pretrained_weights: {path} holds another architecture than student.arch={cfg.student.arch}: "
            f"{_listed(wrong)}{advice}"
        )
    backbone.load_state_dict({name: loaded[in_file[name]] for name in own})
    return len(own)


def _fill_head(head: nn.Module, name: str, tensors: Mapping[str, Tensor] | None) -> bool:
    if tensors is None:
        return False
    wrong = _misfits(tensors, head.state_dict())
    if wrong:
        section = name.removesuffix("_head")
        logger.warning(
            "student.pretrained_weights: its %s does not fit that of this run, which starts at random: %s; the keys "
            "%s.head_* would have to be those that it was trained with",
            *(name, _listed(wrong), section),
        )
        return False
    head.load_state_dict(dict(tensors))
    return True


def _misfits(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    wrong = []
    for name, tensor in own.items():
        there = list(found[name].shape) if name in found else "absent"
        if there != list(tensor.shape):
            wrong.append(f"{name}: {there} in the file, {list(tensor.shape)} here")
    return wrong + [f"{name}: in the file only" for name in found if name not in own]


def _listed(wrong: list[str]) -> str:
    more = len(wrong) - N_NAMES_IN_ERRORS
    return "; ".join(wrong[:N_NAMES_IN_ERRORS]) + (f"; and {more} more" if more > 0 else "")

"""Fine-tuning: weights to start from, frozen parts, and low-rank adapters (LoRA, Hu et al. 2021).

`student.pretrained_weights` (or MODEL.WEIGHTS) is any source that `load_backbone` reads. The words of
`student.freeze`, `student.unfreeze` and `student.lora.targets` select parts of a backbone:

    all             everything
    3, 0-7          blocks by number, from 0
    patch_embed, pos_embed, norm, attn.qkv, norm1, bias, blocks.3.mlp, ...   every parameter with this part in its name

Without LoRA, a parameter learns unless `freeze` selects it and `unfreeze` does not. With LoRA, only parameters that
`unfreeze` selects learn directly. Layers that `lora.targets` selects, and neither list, learn through adapters
(arXiv 2106.09685):

    y = W x + b + (alpha / rank) B A x,   A [rank, in] random at the start, B [out, rank] zero

The teacher's A and B are moving averages of the student's. Written teachers have the adapters merged into W.
"""

import difflib
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dinov2.distributed import is_main_process
from dinov2.hub.adapters import add_adapters, is_adapter
from dinov2.hub.backbones import checkpoint_file, load_backbone, mismatches, read_heads
from dinov2.hub.sources import RELEASES
from dinov2.hub.weight_files import without_chunk
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.files import PathLike, file_sha256

logger = logging.getLogger("dinov2")

HEADS = ("dino_head", "ibot_head", "lejepa_head")
EVERYTHING = "all"


# --- weights to start from ------------------------------------------------------------------------------------------


def configured_weights(cfg: Any) -> str | None:
    """Return the path, name or URL of the weights that the run starts from; None for random weights."""
    return cfg.student.pretrained_weights or cfg.MODEL.WEIGHTS or None


def locate_weights(cfg: Any) -> Path | None:
    """Return the file or folder that the run starts from; None for random weights. A name or URL is downloaded once."""
    weights, kinds = configured_weights(cfg), (FileNotFoundError, ConnectionError, ValueError)
    if weights is None:
        return None
    try:
        return checkpoint_file(weights)
    except kinds as error:
        key = "student.pretrained_weights" if cfg.student.pretrained_weights else "MODEL.WEIGHTS"
        kind = next(kind for kind in kinds if isinstance(error, kind))  # subclasses may want other arguments
        raise kind(
            f"{key}={weights}: {error}. To start from your own file set {key}=<file>, and from random weights "
            f"{key}=null"
        ) from error


def start_from_weights(student: nn.ModuleDict, cfg: Any) -> None:
    """Load the weights that the configuration names, if any, into the student.

    The whole backbone must fit; `load_backbone` resizes position embeddings to the grid of the global crops. A head is
    loaded if all of its tensors fit; if the file has a head of other shapes, a warning says so.
    """
    path = locate_weights(cfg)
    if path is None:
        return
    n_tensors = _fill_backbone(student["backbone"], path, cfg)
    in_file = read_heads(path)
    filled = [name for name in HEADS if name in student and _fill_head(student[name], name, in_file.get(name))]
    if is_main_process():
        random = ", ".join(name for name in HEADS if name in student and name not in filled) or "nothing"
        if random != "nothing" and not cfg.optim.freeze_backbone_iterations:
            random += " (optim.freeze_backbone_iterations=<n> lets them warm up first)"
        text = "student and teacher start from %s (sha256 %s...): all %d tensors of the %s; at random: %s"
        logger.info(text, path, file_sha256(path)[:12], n_tensors, ", ".join(["backbone", *filled]), random)


def _fill_backbone(backbone: nn.Module, path: Path, cfg: Any) -> int:
    network = load_backbone(path, img_size=cfg.crops.global_crops_size)
    warn_of_other_crop("student.pretrained_weights", path, network, cfg)
    loaded, own = network.state_dict(), backbone.state_dict()
    in_file = {name: without_chunk(name) for name in own}  # load_backbone gives names without block_chunks
    if wrong := mismatches({in_file[name]: value for name, value in own.items()}, loaded):
        release = RELEASES.get(configured_weights(cfg) or "")
        advice = f"; set student.arch={release.arch}" if release and release.arch != cfg.student.arch else ""
        raise ValueError(
            f"student.pretrained_weights: {path} holds another architecture than student.arch={cfg.student.arch}: "
            f"{wrong}{advice}"
        )
    backbone.load_state_dict({name: loaded[in_file[name]] for name in own})
    return len(own)


def warn_of_other_crop(key: str, source: PathLike, network: DinoVisionTransformer, cfg: Any) -> None:
    """Log a warning if a network was trained on another part of images than this run takes."""
    if network.center_crop != cfg.train.center_crop:
        logger.warning(
            "%s: %s was trained with train.center_crop=%s, and this run has %s",
            *(key, source, network.center_crop, cfg.train.center_crop),
        )


def _fill_head(head: nn.Module, name: str, tensors: Mapping[str, Tensor] | None) -> bool:
    if tensors is None:
        return False
    if wrong := mismatches(head.state_dict(), tensors):
        logger.warning(
            "student.pretrained_weights: its %s does not fit this run's, which starts at random: %s; to load it, give "
            "the keys %s.head_* the values of its training",
            *(name, wrong, name.removesuffix("_head")),
        )
        return False
    head.load_state_dict(dict(tensors))
    return True


# --- frozen parts and adapters --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned:
    """Names of a backbone's parameters that learn directly, and of linear layers that learn through adapters."""

    parameters: frozenset[str]
    layers: tuple[str, ...]


def choose_learned(backbone: nn.Module, student: Any) -> Learned:
    """Resolve the settings `freeze`, `unfreeze` and `lora` of the section `student` for a backbone without adapters."""
    names = [name for name, _ in backbone.named_parameters()]
    frozen = _select_names(student.freeze, names, "student.freeze")
    unfrozen = _select_names(student.unfreeze, names, "student.unfreeze")
    if not student.lora.rank:
        if unfrozen and not frozen:
            raise ValueError(
                f"student.unfreeze={list(student.unfreeze)} takes parts out of student.freeze, which is empty; set "
                f"student.freeze=[{EVERYTHING}]"
            )
        learned = frozenset(names) - (frozen - unfrozen)
        if not learned:
            raise ValueError(
                f"student.freeze={list(student.freeze)} leaves nothing of the backbone to learn; freeze less, or name "
                "the parts that should learn in student.unfreeze"
            )
        return Learned(learned, ())
    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    targets = _select_names(student.lora.targets, linear, "student.lora.targets")
    layers = tuple(name for name in linear if name in targets and f"{name}.weight" not in frozen | unfrozen)
    if not layers:
        raise ValueError(
            f"student.lora: no layer is left to adapt: student.lora.targets={list(student.lora.targets)}, "
            f"student.freeze={list(student.freeze)}, student.unfreeze={list(student.unfreeze)}; freeze or unfreeze "
            "less, or set student.lora.rank=0"
        )
    return Learned(unfrozen, layers)


def limit_learning(student: DinoVisionTransformer, teacher: DinoVisionTransformer, settings: Any) -> None:
    """Freeze parts of the student's backbone and add adapters to both backbones, by the section `student`.

    Call it after pretrained weights are loaded, since adapters rename parameters, and before sharding. The adapters of
    student and teacher still differ.
    """
    learned = choose_learned(student, settings)
    by_name, lora = dict(student.named_parameters()), settings.lora
    if learned.layers:
        for backbone in (student, teacher):
            add_adapters(
                backbone, learned.layers, lora.rank, lora.alpha, lora.dropout, f"student.lora.rank={lora.rank}"
            )
    for name, parameter in by_name.items():  # injected layers keep the parameters themselves
        parameter.requires_grad_(name in learned.parameters)


def _select_names(words: Iterable[Any], names: list[str], key: str) -> frozenset[str]:
    """Return the `names` that `words` select."""
    plain = {name: without_chunk(name) for name in names}
    block_of = {name: int(match[1]) for name in names if (match := re.match(r"blocks\.(\d+)\.", plain[name]))}
    n_blocks = 1 + max(block_of.values(), default=-1)
    chosen: set[str] = set()
    for word in map(str, words):
        blocks = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if blocks:
            first, last = int(blocks[1]), int(blocks[2] or blocks[1])
            if not first <= last < n_blocks:
                raise ValueError(f"{key}: {word!r} names blocks that do not exist; blocks are 0-{n_blocks - 1}")
            selected = {name for name, block in block_of.items() if first <= block <= last}
        else:
            selected = {name for name in names if word == EVERYTHING or f".{word}." in f".{plain[name]}."}
        if not selected:
            raise ValueError(f"{key}: {word!r} is no part of the backbone's names; {_suggest(word, plain.values())}")
        chosen |= selected
    return frozenset(chosen)


def _suggest(word: str, names: Iterable[str]) -> str:
    parts = {EVERYTHING}
    for name in names:
        words = re.sub(r"^blocks\.\d+\.", "", name).split(".")
        parts |= {".".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    near = difflib.get_close_matches(word, sorted(parts), n=1, cutoff=0.4)
    return f"did you mean {near[0]}?" if near else "valid are for instance norm, attn.qkv, 3 or 0-7"


def count_learned(backbone: nn.Module) -> tuple[int, int]:
    """Count the parameters that learn, with adapters, and all parameters without adapters."""
    learned = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    plain = sum(p.numel() for name, p in backbone.named_parameters() if not is_adapter(name))
    return learned, plain

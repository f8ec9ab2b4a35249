"""Training from weights: which ones a run starts from, frozen parts, and low-rank adapters (LoRA, Hu et al. 2021).

`student.pretrained_weights` (or MODEL.WEIGHTS) is whatever `load_backbone` reads: a file or folder, a name or a URL.
Parts of a backbone are chosen by words, of `student.freeze`, `student.unfreeze` and `student.lora.targets`:

    all             everything
    3, 0-7          blocks by number, from 0
    patch_embed, pos_embed, norm, attn.qkv, norm1, bias, blocks.3.mlp, ...   every parameter whose name has this part

Without LoRA a parameter learns unless `freeze` has it and `unfreeze` does not. With LoRA nothing learns in full but
what `unfreeze` has, and the layers of `lora.targets` that neither list has learn through adapters (arXiv 2106.09685):

    y = W x + b + (alpha / rank) B A x,   A [rank, in] random at the start, B [out, rank] zero

The teacher has adapters of its own, whose A and B follow the student's by the moving average. The product of two
averages is not the average of the products; the difference is second order in how far the student moves within the
average's memory. Files to use have the adapters merged into W: they are those of a plain network.
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
from dinov2.hub.backbones import checkpoint_file, file_sha256, load_backbone, read_heads, without_chunk
from dinov2.hub.conversions import is_adapter
from dinov2.hub.downloads import RELEASES
from dinov2.models.vision_transformer import DinoVisionTransformer

logger = logging.getLogger("dinov2")

HEADS = ("dino_head", "ibot_head")
N_NAMES_IN_ERRORS = 4
EVERYTHING = "all"


# --- weights to start from ------------------------------------------------------------------------------------------


def weights_of(cfg: Any) -> str | None:
    """Return what the run starts from; None for random weights."""
    return cfg.student.pretrained_weights or cfg.MODEL.WEIGHTS or None


def locate_weights(cfg: Any) -> Path | None:
    """Return the file or folder that the run starts from, downloaded if it has to be; None for random weights.

    Of several processes that ask, one downloads.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: it cannot be had, or is not what was published.
    """
    weights = weights_of(cfg)
    if weights is None:
        return None
    try:
        return checkpoint_file(weights)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        key = "student.pretrained_weights" if cfg.student.pretrained_weights else "MODEL.WEIGHTS"
        kinds = (FileNotFoundError, ConnectionError, ValueError)
        kind = next(kind for kind in kinds if isinstance(error, kind))  # subclasses may want other arguments
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
    filled = [name for name in HEADS if name in student and _fill_head(student[name], name, in_file.get(name))]
    if is_main_process():
        random = ", ".join(name for name in HEADS if name in student and name not in filled) or "nothing"
        if random != "nothing" and not cfg.optim.freeze_backbone_iterations:
            random += " (optim.freeze_backbone_iterations=<n> lets them warm up first)"
        text = "student and teacher start from %s (sha256 %s...): all %d tensors of the %s; at random: %s"
        logger.info(text, path, file_sha256(path)[:12], n_tensors, ", ".join(["backbone", *filled]), random)


def _fill_backbone(backbone: nn.Module, path: Path, cfg: Any) -> int:
    loaded = load_backbone(path, img_size=cfg.crops.global_crops_size).state_dict()
    own = backbone.state_dict()
    in_file = {name: without_chunk(name) for name in own}  # load_backbone gives names without block_chunks
    if wrong := _misfits(loaded, {in_file[name]: value for name, value in own.items()}):
        release = RELEASES.get(weights_of(cfg) or "")
        advice = f"; set student.arch={release.arch}" if release and release.arch != cfg.student.arch else ""
        raise ValueError(
            f"student.pretrained_weights: {path} holds another architecture than student.arch={cfg.student.arch}: "
            f"{wrong}{advice}"
        )
    backbone.load_state_dict({name: loaded[in_file[name]] for name in own})
    return len(own)


def _fill_head(head: nn.Module, name: str, tensors: Mapping[str, Tensor] | None) -> bool:
    if tensors is None:
        return False
    if wrong := _misfits(tensors, head.state_dict()):
        logger.warning(
            "student.pretrained_weights: its %s does not fit that of this run, which starts at random: %s; the keys "
            "%s.head_* would have to be those that it was trained with",
            *(name, wrong, name.removesuffix("_head")),
        )
        return False
    head.load_state_dict(dict(tensors))
    return True


def _misfits(in_file: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """List tensors that are missing, of another shape or in the file only; empty if all fit."""
    wrong = []
    for name, tensor in own.items():
        there = list(in_file[name].shape) if name in in_file else "absent"
        if there != list(tensor.shape):
            wrong.append(f"{name}: {there} in the file, {list(tensor.shape)} here")
    wrong += [f"{name}: in the file only" for name in in_file if name not in own]
    n_more = len(wrong) - N_NAMES_IN_ERRORS
    return "; ".join(wrong[:N_NAMES_IN_ERRORS]) + (f"; and {n_more} more" if n_more > 0 else "")


# --- what learns ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned:
    """What of a backbone learns: names of parameters in full, and of linear layers through adapters."""

    parameters: frozenset[str]
    layers: tuple[str, ...]


def choose_learned(backbone: nn.Module, student: Any) -> Learned:
    """Resolve the settings `freeze`, `unfreeze` and `lora` of the section `student` for a plain backbone.

    Raises:
        ValueError: a word that no part has, or nothing is left to learn.
    """
    names = [name for name, _ in backbone.named_parameters()]
    frozen = _chosen(student.freeze, names, "student.freeze")
    unfrozen = _chosen(student.unfreeze, names, "student.unfreeze")
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
                "what is to learn in student.unfreeze"
            )
        return Learned(learned, ())
    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    targets = _chosen(student.lora.targets, linear, "student.lora.targets")
    layers = tuple(name for name in linear if name in targets and f"{name}.weight" not in frozen | unfrozen)
    if not layers:
        raise ValueError(
            f"student.lora: no layer is left to adapt: student.lora.targets={list(student.lora.targets)}, "
            f"student.freeze={list(student.freeze)}, student.unfreeze={list(student.unfreeze)}; freeze or unfreeze "
            "less, or set student.lora.rank=0"
        )
    return Learned(unfrozen, layers)


def limit_learning(student: DinoVisionTransformer, teacher: DinoVisionTransformer, settings: Any) -> None:
    """Freeze parts of the student's backbone and put adapters into both, as the section `student` says.

    To be called when pretrained weights are in place, since adapters rename parameters, and before the backbones are
    spread over processes. The teacher's adapters still have values of their own.

    Raises:
        ValueError: as `choose_learned`, or peft is not installed.
    """
    learned = choose_learned(student, settings)
    by_name = dict(student.named_parameters())
    if learned.layers:
        for backbone in (student, teacher):
            _add_adapters(backbone, learned.layers, settings.lora)
    for name, parameter in by_name.items():  # injected layers keep the parameters themselves
        parameter.requires_grad_(name in learned.parameters)


def _add_adapters(backbone: nn.Module, layers: Iterable[str], lora: Any) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise ValueError(
            f"student.lora.rank={lora.rank} needs the package peft; run `pip install peft`, or set student.lora.rank=0"
        ) from error
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="|".join(re.escape(layer) for layer in layers),  # taken as a pattern for whole names
        bias="none",
    )
    # without its wrapper, which would change names, signatures and types
    inject_adapter_in_model(settings, backbone)
    for module in backbone.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # autocast decides, as for all layers


def _chosen(words: Iterable[Any], names: list[str], key: str) -> frozenset[str]:
    """Return those of `names` that one of `words` means; each must mean at least one.

    Raises:
        ValueError: a word means none.
    """
    plain = {name: without_chunk(name) for name in names}
    block_of = {name: int(match[1]) for name in names if (match := re.match(r"blocks\.(\d+)\.", plain[name]))}
    n_blocks = 1 + max(block_of.values(), default=-1)
    chosen: set[str] = set()
    for word in map(str, words):
        blocks = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if blocks:
            first, last = int(blocks[1]), int(blocks[2] or blocks[1])
            if not first <= last < n_blocks:
                raise ValueError(f"{key}: {word!r} means blocks that there are not; they are 0-{n_blocks - 1}")
            found = {name for name, block in block_of.items() if first <= block <= last}
        else:
            found = {name for name in names if word == EVERYTHING or f".{word}." in f".{plain[name]}."}
        if not found:
            raise ValueError(f"{key}: {word!r} is no part of the backbone's names; {_hint(word, plain.values())}")
        chosen |= found
    return frozenset(chosen)


def _hint(word: str, names: Iterable[str]) -> str:
    parts = {EVERYTHING}
    for name in names:
        words = re.sub(r"^blocks\.\d+\.", "", name).split(".")
        parts |= {".".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    near = difflib.get_close_matches(word, sorted(parts), n=1, cutoff=0.4)
    return f"did you mean {near[0]}?" if near else "for instance norm, attn.qkv, 3 or 0-7 do"


def count_learned(backbone: nn.Module) -> tuple[int, int]:
    """Count the parameters that learn, adapters included, and those of the plain network, without them."""
    learned = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    plain = sum(p.numel() for name, p in backbone.named_parameters() if not is_adapter(name))
    return learned, plain

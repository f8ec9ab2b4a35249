"""Training less than the whole backbone: frozen parts, and low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685).

Parts of a backbone are chosen by words, of `student.freeze`, `student.unfreeze` and `student.lora.targets`:

    all             everything
    3, 0-7          blocks by number, from 0
    patch_embed, pos_embed, norm, attn.qkv, norm1, bias, blocks.3.mlp, ...   every parameter whose name has this part

Without LoRA a parameter learns unless `freeze` has it and `unfreeze` does not. With LoRA nothing learns in full but
what `unfreeze` has, and the layers of `lora.targets` that neither list has learn through adapters:

    y = W x + b + (alpha / rank) B A x,   A [rank, in] random at the start, B [out, rank] zero

The teacher has adapters of its own, whose A and B follow the student's by the moving average. The product of two
averages is not the average of the products, so this is not quite the average of W + (alpha / rank) B A; but that has no
rank this low, and the difference is second order in how far the student moves within the average's memory.
Files to use have the adapters merged into W: they are those of a plain network.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from dinov2.hub.adapters import is_adapter
from dinov2.hub.backbones import without_chunk
from dinov2.models.vision_transformer import DinoVisionTransformer

EVERYTHING = "all"


@dataclass(frozen=True)
class Learned:
    """What of a backbone learns: names of parameters that do in full, and of linear layers that do through adapters."""

    parameters: frozenset[str]
    layers: tuple[str, ...]


def choose_learned(backbone: nn.Module, student: Any) -> Learned:
    """What the settings `freeze`, `unfreeze` and `lora` of the section `student` mean for a plain backbone.

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
        learned = frozenset(name for name in names if name not in frozen - unfrozen)
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
    """Those of `names` that one of `words` means; each must mean at least one.

    Raises:
        ValueError: a word means none.
    """
    plain = {name: without_chunk(name) for name in names}
    chosen: set[str] = set()
    n_blocks = 1 + max((block for name in plain.values() if (block := _block_of(name)) is not None), default=-1)
    for word in map(str, words):
        found = {name for name in names if _means(word, plain[name])}
        blocks = _block_range(word)
        if blocks is not None and (not found or blocks.stop > n_blocks):
            raise ValueError(f"{key}: {word!r} means blocks that there are not; they are 0-{n_blocks - 1}")
        if not found:
            raise ValueError(f"{key}: {word!r} {_complaint(word, list(plain.values()))}")
        chosen |= found
    return frozenset(chosen)


def _means(word: str, name: str) -> bool:
    if word == EVERYTHING:
        return True
    blocks = _block_range(word)
    if blocks is not None:
        return _block_of(name) in blocks
    return f".{word}." in f".{name}."


def _block_range(word: str) -> range | None:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
    return range(int(match[1]), int(match[2] or match[1]) + 1) if match else None


def _block_of(name: str) -> int | None:
    match = re.match(r"blocks\.(\d+)\.", name)
    return int(match[1]) if match else None


def _complaint(word: str, names: list[str]) -> str:
    parts = {EVERYTHING}
    for name in names:
        words = re.sub(r"^blocks\.\d+\.", "", name).split(".")
        parts |= {".".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    near = difflib.get_close_matches(word, sorted(parts), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else "for instance norm, attn.qkv, 3 or 0-7 do"
    return f"is no part of the backbone's names; {hint}"


def count_learned(backbone: nn.Module) -> tuple[int, int]:
    """Numbers of parameters that learn, and of the plain network's.

    Adapters count among the first only.
    """
    learned = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    plain = sum(p.numel() for name, p in backbone.named_parameters() if not is_adapter(name))
    return learned, plain

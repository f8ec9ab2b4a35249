"""From a file with weights to a ready backbone, whatever layout the file has, and the torch.hub names.

Layouts that `load_backbone` reads: a training run's `teacher_checkpoint.pth`, the DinoBloom releases
(`{"teacher": {"backbone.*"}}`), bare state dicts as DINOv2 releases them, `{"model": ...}` and `{"state_dict": ...}`
around any of these, safetensors, and the folder of a run. The architecture is read off the tensors. Nothing that a file
holds is ever executed (`weights_only=True`).

Dimension key:  D embedding dim, g patches along one side of the grid
"""

import hashlib
import os
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dinov2.models import build_backbone
from dinov2.models.vision_transformer import DinoVisionTransformer, resize_pos_embed

PathLike: TypeAlias = str | os.PathLike[str]

TEACHER_FILE = "teacher_checkpoint.pth"
# what torch.compile, DistributedDataParallel, FSDP and activation checkpointing put into parameter names
WRAPPER_COMPONENTS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
HEAD_PREFIXES = ("dino_head.", "ibot_head.", "head.")
N_NAMES_IN_ERRORS = 8


def load_backbone(source: PathLike, img_size: int = 224) -> DinoVisionTransformer:
    """Read a backbone from a file or a run's folder, in eval mode and fp32 on the CPU.

    Position embeddings of another grid are resized once, as DinoBloom does before it trains. A DINOv2 release that is
    loaded with `img_size=518` keeps its own 37 x 37 grid and interpolates in each forward, as Meta's code does.

    Args:
        source: a .pth/.pt or .safetensors file in any layout of the module docstring, or a run's folder, whose newest
            `eval/training_<iteration>/teacher_checkpoint.pth` is taken.
        img_size: side of the square pictures it will see, in pixels; a multiple of the patch size.

    Raises:
        FileNotFoundError: if there is no such file, or no teacher in the folder.
        ValueError: if the file is damaged, not a checkpoint or needs pickled code, or its tensors do not make a whole
            backbone; the message lists missing, unexpected and misshapen ones. Heads are ignored, and a missing
            `mask_token` becomes zero.
    """
    path = checkpoint_file(source)
    state, recorded = read_backbone_state(path)
    description = infer_architecture(state, recorded, path)
    with torch.device("meta"):  # neither time nor random numbers for weights that are replaced at once
        model = build_backbone({**description, "img_size": img_size})
    if state["pos_embed"].shape != model.pos_embed.shape:
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], img_size // model.patch_size)  # [1, 1 + g*g, D]
    state.setdefault("mask_token", torch.zeros(1, model.embed_dim))
    check_names_and_shapes(model.state_dict(), state, path)
    model.load_state_dict(state, assign=True)
    return model.eval()


def trained_image_size(source: PathLike) -> int | None:
    """Side in pixels of the global crops that a training run's teacher saw; None where the file does not say."""
    size = read_backbone_state(checkpoint_file(source))[1].get("img_size")
    return None if size is None else int(size)


def untrained_backbone(source: PathLike, img_size: int = 224, seed: int = 0) -> DinoVisionTransformer:
    """The architecture of `load_backbone(source)` with fresh weights drawn from `seed`, in eval mode.

    This is what training has to beat. Layer scale starts where the file's `architecture` says, or at 1.0, where an
    untrained network is the stronger baseline.
    """
    path = checkpoint_file(source)
    description = infer_architecture(*read_backbone_state(path), path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_backbone({**description, "img_size": img_size}).eval()


def checkpoint_file(source: PathLike) -> Path:
    """The file that `source` means: itself, or the newest teacher of a run's folder, by iteration.

    Raises:
        FileNotFoundError: if there is nothing at `source`, or no teacher in the folder.
    """
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint: no file or folder {str(path)!r}")
    if (path / TEACHER_FILE).is_file():
        return path / TEACHER_FILE
    teachers = {
        int(match[1]): file
        for file in path.glob(f"eval/training_*/{TEACHER_FILE}")
        if (match := re.fullmatch(r"training_(\d+)", file.parent.name))
    }
    if not teachers:
        raise FileNotFoundError(
            f"checkpoint: no eval/training_<iteration>/{TEACHER_FILE} in the folder {str(path)!r}; a run writes one at "
            f"each evaluation; pass a run's folder or a file with weights"
        )
    return teachers[max(teachers)]


def file_sha256(path: PathLike) -> str:
    """The file's SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe_backbone(model: DinoVisionTransformer) -> str:
    """One line for logs and result files: what tells one backbone's size from another's."""
    registers = f", {model.num_register_tokens} registers" if model.num_register_tokens else ""
    return (
        f"ViT with dim {model.embed_dim}, depth {model.n_blocks}, {model.num_heads} heads, patch {model.patch_size}"
        f"{registers}"
    )


def read_backbone_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file's backbone tensors and its `architecture` entry.

    Returns:
        tensors in fp32 on the CPU, named without prefixes and block chunks; and the entry, {} where there is none.

    Raises:
        ValueError: if the file cannot be read, or holds a student and no teacher.
    """
    content = read_weights_file(path)
    recorded = content.get("architecture")
    tensors = {name: value.float() for name, value in _backbone_tensors(content, path).items()}
    return tensors, dict(recorded) if isinstance(recorded, Mapping) else {}


def without_chunk(name: str) -> str:
    """`blocks.<chunk>.<i>.` of a backbone with block_chunks as `blocks.<i>.`; other names as they are."""
    return re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)


def infer_architecture(state: Mapping[str, Tensor], recorded: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Read the architecture off the tensors' names and shapes, as `models.build_backbone` takes it.

    What tensors do not tell is the number of heads and how position embeddings are interpolated. That comes from
    `recorded`, else from what all released networks have: 64 dimensions a head; antialiasing and no offset with
    registers, no antialiasing and offset 0.1 without.

    Raises:
        ValueError: if the tensors are not those of a DINOv2 backbone, or `recorded` contradicts them.
    """
    essential = ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "norm.weight"]
    absent = [name for name in essential if name not in state]
    if absent:
        holds = _listed(sorted(state)) if state else "no tensors"
        raise ValueError(f"checkpoint {path}: not a DINOv2 backbone: no {_listed(absent)}; it holds {holds}")
    is_gated = "blocks.0.mlp.w3.weight" in state
    last_ffn_layer = "blocks.0.mlp.w3" if is_gated else "blocks.0.mlp.fc2"
    if f"{last_ffn_layer}.weight" not in state:
        raise ValueError(
            f"checkpoint {path}: the feed-forward network of block 0 has neither fc1 and fc2 nor w12 and w3, "
            f"so it is of an unknown kind"
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
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if re.match(r"blocks\.\d+\.", name)),
        "num_register_tokens": state["register_tokens"].shape[1] if has_registers else 0,
    }
    contradictions = [
        f"{name} is {recorded[name]} there and {value} in the tensors"
        for name, value in measured.items()
        if recorded.get(name, value) != value
    ]
    if contradictions:
        raise ValueError(
            f"checkpoint {path}: its 'architecture' contradicts its tensors ({_listed(contradictions)}); "
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
        "in_chans": in_chans,
        "num_heads": num_heads,
        "mlp_ratio": _mlp_ratio(embed_dim, state[f"{last_ffn_layer}.weight"].shape[1], is_gated),
        "ffn_layer": "swiglufused" if is_gated else "mlp",
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "ffn_bias": f"{last_ffn_layer}.bias" in state,
        "layerscale": (recorded.get("layerscale") or 1.0) if "blocks.0.ls1.gamma" in state else None,
        "block_chunks": 0,
        "interpolate_antialias": recorded.get("interpolate_antialias", has_registers),
        "interpolate_offset": recorded.get("interpolate_offset", 0.0 if has_registers else 0.1),
    }


def _mlp_ratio(embed_dim: int, hidden_dim: int, is_gated: bool) -> float:
    if not is_gated:
        return hidden_dim / embed_dim
    # gated networks take 2/3 of the width and round up to a multiple of 8, so several ratios give one width;
    # 4 is the one that everybody uses
    return 4.0 if (int(embed_dim * 8 / 3) + 7) // 8 * 8 == hidden_dim else 1.5 * hidden_dim / embed_dim


def check_names_and_shapes(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse the tensors of a file unless they are just those that a network has; ValueError lists what differs."""
    problems = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "misshapen": [
            f"{name} {list(state[name].shape)} instead of {list(value.shape)}"
            for name, value in wanted.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(names)} {kind}: {_listed(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"checkpoint {path}: its tensors do not make a whole backbone: {found}")


def _backbone_tensors(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Unwrap, choose the teacher, strip prefixes, leave out heads, drop the chunk number from block names."""
    while wrapper := next((key for key in ("teacher", "model", "state_dict") if _is_dict(content.get(key))), None):
        content = content[wrapper]
    if _is_dict(content.get("student")):
        content = {f"student.{name}": value for name, value in content["student"].items()}
    named = [
        (".".join(part for part in name.split(".") if part not in WRAPPER_COMPONENTS), value)
        for name, value in content.items()
        if isinstance(value, Tensor)
    ]
    for prefix in ("teacher.", "backbone."):
        inner = [(name.removeprefix(prefix), value) for name, value in named if name.startswith(prefix)]
        named = inner or named
    if any(name.startswith("student.") for name, _ in named):
        raise ValueError(
            f"checkpoint {path}: holds a student and no teacher, which is the network to use; a run writes it to "
            f"eval/training_<iteration>/{TEACHER_FILE}"
        )
    named = [(without_chunk(name), value) for name, value in named if not name.startswith(HEAD_PREFIXES)]
    twice = [name for name, count in Counter(name for name, _ in named).items() if count > 1]
    if twice:
        raise ValueError(
            f"checkpoint {path}: under different prefixes it holds these twice: {_listed(twice)}; keep one"
        )
    return dict(named)


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping)


def read_weights_file(path: Path) -> dict[str, Any]:
    """Tensors and plain values of a .pth/.pt or .safetensors file, on the CPU; nothing in it is executed.

    Raises:
        ValueError: if the file is damaged, is something else, or needs pickled code.
    """
    with open(path, "rb") as file:
        start = file.read(256)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"checkpoint {path}: a git-lfs pointer, not the weights; run `git lfs pull` where it lies")
    if start.lstrip().startswith(b"<"):
        raise ValueError(
            f"checkpoint {path}: a web page, not weights; the download was answered by a page, perhaps a login or an "
            f"error: fetch the file again"
        )
    damaged = f"checkpoint {path}: damaged or cut short at {path.stat().st_size} bytes; fetch or copy it again"
    if path.suffix == ".safetensors":
        return _read_safetensors(path, damaged)
    # torch.save begins a zip archive, or before torch 1.6 a pickle
    if not start.startswith((b"PK", b"\x80")) or (start.startswith(b"PK") and not zipfile.is_zipfile(path)):
        raise ValueError(damaged)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if forbidden := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"checkpoint {path}: holds a {forbidden[1]}, and to make one would run code that the file names; if "
                f"you trust its source, read it with torch.load(..., weights_only=False) and save its state dict alone"
            ) from error
        raise ValueError(damaged) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{damaged} ({error or 'it ends too early'})") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint {path}: holds a {type(content).__name__}, not a dict of tensors")
    return dict(content)


def _read_safetensors(path: Path, damaged: str) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"checkpoint {path}: to read it, run `pip install safetensors`") from error
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{damaged} ({error})") from error


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - N_NAMES_IN_ERRORS} more" if len(names) > N_NAMES_IN_ERRORS else ""
    return ", ".join(names[:N_NAMES_IN_ERRORS]) + more


def _released_backbone(
    name: str, arch: str, origin: str, pretrained: bool, weights: PathLike | None, img_size: int
) -> DinoVisionTransformer:
    """What a torch.hub name gives: the user's copy of the released file `origin`, or an untrained network."""
    description = {"arch": arch, "layerscale": 1.0, "block_chunks": 0, "img_size": img_size}
    if weights is None:
        if pretrained:
            raise ValueError(
                f"{name}: no weights given; download {origin} and pass weights=<that file>, "
                f"or pretrained=False for an untrained network"
            )
        return build_backbone(description)
    if not pretrained:
        raise ValueError(f"{name}: weights={str(weights)!r} contradicts pretrained=False; leave one of them out")
    model = load_backbone(weights, img_size)
    with torch.device("meta"):
        expected = describe_backbone(build_backbone(description))
    if describe_backbone(model) != expected:
        raise ValueError(
            f"{name}: {str(weights)!r} holds a {describe_backbone(model)}, not a {expected}; pass {origin}"
        )
    return model


def _dinov2(
    letter: str, suffix: str, pretrained: bool, weights: PathLike | None, img_size: int
) -> DinoVisionTransformer:
    folder = f"dinov2_vit{letter}14"
    origin = f"https://dl.fbaipublicfiles.com/dinov2/{folder}/{folder}{'_reg4' if suffix else ''}_pretrain.pth"
    return _released_backbone(folder + suffix, folder + suffix, origin, pretrained, weights, img_size)


def _dinobloom(letter: str, pretrained: bool, weights: PathLike | None, img_size: int) -> DinoVisionTransformer:
    origin = f"DinoBloom-{letter.upper()}.pth from https://zenodo.org/records/10908163"
    return _released_backbone(f"dinobloom_{letter}", f"dinov2_vit{letter}14", origin, pretrained, weights, img_size)


# The torch.hub names. `weights` is the user's copy of the released file; with pretrained=False instead, the network is
# untrained. `img_size` is load_backbone's; its default is the size that the released weights were made for.


def dinov2_vits14(
    *, pretrained: bool = True, weights: PathLike | None = None, img_size: int = 518
) -> DinoVisionTransformer:
    """DINOv2's ViT-S/14 (arXiv 2304.07193)."""
    return _dinov2("s", "", pretrained, weights, img_size)


def dinov2_vitb14(
    *, pretrained: bool = True, weights: PathLike | None = None, img_size: int = 518
) -> DinoVisionTransformer:
    """DINOv2's ViT-B/14 (arXiv 2304.07193)."""
    return _dinov2("b", "", pretrained, weights, img_size)


def dinov2_vitl14(
    *, pretrained: bool = True, weights: PathLike | None = None, img_size: int = 518
) -> DinoVisionTransformer:
    """DINOv2's ViT-L/14 (arXiv 2304.07193)."""
    return _dinov2("l", "", pretrained, weights, img_size)


def dinov2_vitg14(
    *, pretrained: bool = True, weights: PathLike | None = None, img_size: int = 518
) -> DinoVisionTransformer:
    """DINOv2's ViT-g/14 (arXiv 2304.07193)."""
    return _dinov2("g", "", pretrained, weights, img_size)


def dinov2_vits14_reg(
    *, pretrained: bool = True, weights: PathLike | None = None, img_size: int = 518
) -> DinoVisionTransformer:
    """DINOv2's ViT-S/14 with four registers (arXiv 2309.16588)."""
    return _dinov2("s", "_reg", pretrained, weights, img_size)


def dinov2_vitb14_reg(
    *, pretrained: bool = True, weights: PathLike | None = None, img_size: int = 518
) -> DinoVisionTransformer:
    """DINOv2's ViT-B/14 with four registers (arXiv 2309.16588)."""
    return _dinov2("b", "_reg", pretrained, weights, img_size)


def dinov2_vitl14_reg(
    *, pretrained: bool = True, weights: PathLike | None = None, img_size: int = 518
) -> DinoVisionTransformer:
    """DINOv2's ViT-L/14 with four registers (arXiv 2309.16588)."""
    return _dinov2("l", "_reg", pretrained, weights, img_size)


def dinov2_vitg14_reg(
    *, pretrained: bool = True, weights: PathLike | None = None, img_size: int = 518
) -> DinoVisionTransformer:
    """DINOv2's ViT-g/14 with four registers (arXiv 2309.16588)."""
    return _dinov2("g", "_reg", pretrained, weights, img_size)


def dinobloom_s(
    *, pretrained: bool = True, weights: PathLike | None = None, img_size: int = 224
) -> DinoVisionTransformer:
    """DinoBloom-S, a ViT-S/14 for single blood and bone-marrow cells (arXiv 2404.05022)."""
    return _dinobloom("s", pretrained, weights, img_size)


def dinobloom_b(
    *, pretrained: bool = True, weights: PathLike | None = None, img_size: int = 224
) -> DinoVisionTransformer:
    """DinoBloom-B, a ViT-B/14 for single blood and bone-marrow cells (arXiv 2404.05022)."""
    return _dinobloom("b", pretrained, weights, img_size)


def dinobloom_l(
    *, pretrained: bool = True, weights: PathLike | None = None, img_size: int = 224
) -> DinoVisionTransformer:
    """DinoBloom-L, a ViT-L/14 for single blood and bone-marrow cells (arXiv 2404.05022)."""
    return _dinobloom("l", pretrained, weights, img_size)


def dinobloom_g(
    *, pretrained: bool = True, weights: PathLike | None = None, img_size: int = 224
) -> DinoVisionTransformer:
    """DinoBloom-G, a ViT-g/14 for single blood and bone-marrow cells (arXiv 2404.05022)."""
    return _dinobloom("g", pretrained, weights, img_size)

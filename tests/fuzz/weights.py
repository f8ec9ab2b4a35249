"""Weights: .pth and .safetensors files, and folders of transformers, timm and training runs."""

import io
import json
import random
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from dinov2.configs import dinov2_default_config
from dinov2.fsdp.checkpoint import Checkpointer
from dinov2.hub.classifiers import Classifier, Network, load_network
from dinov2.hub.export_formats import FORMATS as EXPORTS
from dinov2.models import architecture, build_backbone
from tests.fuzz.mutations import (
    Content,
    Format,
    damaged,
    damaged_folder,
    json_with_odd_values,
    odd_value,
    read_folder,
    with_odd_values,
)

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 14, "img_size": 28, "block_chunks": 0}


@cache
def backbone() -> Any:
    return build_backbone(TINY).eval()


def pth_content() -> dict[str, Any]:
    """Return what a fine-tuned network's file has; without its classifier, what a run writes."""
    classifier = Classifier(torch.ones(2, 32), torch.zeros(2), ["blast", "lymphocyte"], "cls")
    known = architecture(backbone())
    return {"teacher": dict(backbone().state_dict()), "architecture": known, "classifier": classifier.content()}


def odd_tensor(rng: random.Random) -> Any:
    """Return a tensor that is no plain fp32 parameter, or another odd value."""
    kind = rng.randrange(12)
    if kind == 0:
        return torch.empty(3, 32, device="meta")
    if kind == 1:
        return torch.eye(32).to_sparse()
    if kind == 2:
        return torch.quantize_per_tensor(torch.ones(32), 0.1, 0, torch.qint8)
    if kind == 3:
        return torch.zeros(1).expand(10**6, 10**6)  # four bytes in the file
    if kind == 4:
        return torch.ones(rng.choice(((), (0,), (1,), (32,), (0, 32), (1, 1, 32), (32, 3, 14, 14), (2, 2, 2, 2, 2))))
    if kind == 5:
        types = (torch.complex64, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.bfloat16)
        return torch.ones(32).to(rng.choice(types))
    if kind == 6:
        return torch.full((32,), rng.choice((float("nan"), float("inf"))))
    if kind == 7:
        return torch.nn.Parameter(torch.ones(32))
    return odd_value(rng)


ODD_NAMES = (
    "blocks.1000000000.norm1.weight",
    "blocks.-1.norm1.weight",
    "blocks.x.norm1.weight",
    "teacher.teacher.",
    "",
)
ODD_NAMES += (
    "register_tokens",
    "blocks.0.mlp.w3.weight",
    "blocks.0.attn.qkv.lora_a",
    "backbone.cls_token",
    "\0",
    "a" * 999,
)


def spoil(content: dict[str, Any], rng: random.Random) -> Any:
    """Return the content of a .pth file with odd parts."""
    content = with_odd_values(content, rng, odd_tensor)
    if isinstance(content, dict) and rng.random() < 0.4:
        inner = content.get("teacher", content)
        if isinstance(inner, dict) and rng.random() < 0.2:
            inner[rng.choice(("teacher", "model", "state_dict", "student"))] = rng.choice((inner, content))  # itself
        elif isinstance(inner, dict):
            inner[rng.choice((*ODD_NAMES, 7, None, (1, 2)))] = odd_tensor(rng)
    return content


def pth_bytes(content: Any, is_zip: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=is_zip)
    return buffer.getvalue()


@cache
def exported(name: str) -> dict[str, bytes]:
    """Return the files of the tiny network in an export format."""
    with tempfile.TemporaryDirectory() as folder:
        EXPORTS[name].write(Network(backbone(), Classifier(**pth_content()["classifier"])), Path(folder))
        return read_folder(next(Path(folder).rglob("*.safetensors")).parent)


def pth_case(rng: random.Random) -> tuple[str, Content]:
    is_zip = rng.random() < 0.8
    if rng.random() < 0.5:
        return "weights.pth", damaged(pth_bytes(pth_content(), is_zip), rng)
    try:
        return "weights.pth", pth_bytes(spoil(pth_content(), rng), is_zip)
    except (RuntimeError, RecursionError, NotImplementedError, UnicodeError):  # torch cannot save such a thing
        return "weights.pth", damaged(pth_bytes(pth_content(), is_zip), rng)


def safetensors_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file that is damaged, or whose header has odd values."""
    if rng.random() < 0.4:
        return damaged(data, rng)
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    name = rng.choice([each for each in header if each != "__metadata__"])
    action = rng.random()
    if action < 0.3:
        types = ("I8", "F4", "F8_E5M2", "F8_E8M0", "BOOL", "F64", "C64", "U64", "F6_E2M3", "x", "")
        header[name]["dtype"] = rng.choice(types)
    elif action < 0.6:
        header[name]["shape"] = rng.choice(([], [0], [-1], [2**63], [2**32, 2**32], [1e9], "x", [[1]], [1] * 70))
    changed = json.dumps(header).encode()
    if action >= 0.6:
        changed = json_with_odd_values(changed, rng)
    return struct.pack("<Q", len(changed)) + changed + data[end:]


def safetensors_case(rng: random.Random) -> tuple[str, Content]:
    (data,) = exported("safetensors").values()
    return "weights.safetensors", safetensors_bytes(data, rng)


def exported_case(name: str, rng: random.Random) -> tuple[str, Content]:
    return name, damaged_folder(exported(name), rng)


@cache
def run_files() -> dict[str, bytes]:
    """Return the files of a run with a checkpoint to resume from."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpointer(Path(folder) / "checkpoints", 1)
        checkpoints.save(5, {"model": {"teacher": {"backbone": dict(backbone().state_dict())}}}, {})
        assert checkpoints.wait()
        cfg = dinov2_default_config.copy()
        cfg.student.update({name: TINY[name] for name in ("embed_dim", "depth", "num_heads", "patch_size")})
        cfg.student.arch, cfg.student.block_chunks, cfg.crops.global_crops_size = "vit_small", 0, TINY["img_size"]
        text = OmegaConf.to_yaml(cfg)
        Path(folder, "config.yaml").write_text(text, encoding="utf-8")
        return read_folder(Path(folder))


def run_case(rng: random.Random) -> tuple[str, Content]:
    return "run", damaged_folder(run_files(), rng)


def read_weights(path: Path) -> None:
    load_network(path, 28)


FORMATS = {
    "pth": Format(pth_case, read_weights),
    "safetensors": Format(safetensors_case, read_weights),
    "huggingface": Format(lambda rng: exported_case("huggingface", rng), read_weights),
    "timm": Format(lambda rng: exported_case("timm", rng), read_weights),
    "run_checkpoint": Format(run_case, read_weights),
}

"""The README.md beside exported weights: what network this is, where it comes from, how to load each file.

A card goes where the weights go, so it names files and lists without their folders.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import dinov2
from dinov2.data.loaders import VALUE_READERS
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from dinov2.hub.conversions import timm_arguments
from dinov2.hub.export_formats import (
    FORMATS,
    HUGGING_FACE_FOLDER,
    ONNX_FILE,
    PROCESSOR_ARGUMENTS,
    PTH_FILE,
    SAFETENSORS_FILE,
    TIMM_FOLDER,
    TORCH_EXPORT_FILE,
    WEIGHTS_NAME,
    Network,
)
from dinov2.utils.files import file_sha256

# what a run's config.yaml tells of the method and of the schedule
_RECIPE = (
    *("student.arch", "student.drop_path_rate", "student.layerscale", "crops.global_crops_size"),
    *("crops.global_crops_scale", "crops.local_crops_number", "crops.local_crops_size", "crops.local_crops_scale"),
    *("data_transform", "train.image_fit", "train.centering", "dino.loss_weight", "dino.head_n_prototypes"),
    *("dino.koleo_loss_weight", "ibot.loss_weight", "ibot.separate_head", "ibot.mask_ratio_min_max"),
)
_SCHEDULE = (
    *("optim.epochs", "train.OFFICIAL_EPOCH_LENGTH", "train.global_batch_size", "optim.lr", "optim.base_lr"),
    *("optim.warmup_epochs", "optim.min_lr", "optim.weight_decay", "optim.weight_decay_end", "optim.clip_grad"),
    *("optim.layerwise_decay", "teacher.momentum_teacher", "teacher.final_momentum_teacher", "train.seed"),
)
_METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "weighted_f1": "weighted F1",
    "macro_f1": "macro F1",
    "auroc": "AUROC",
}
_DATA_FLAGS = ("data", "train", "test", "features", "test_features", "bags", "names")


@dataclass(frozen=True)
class Origin:
    """Where a network comes from.

    Attributes:
        file: the checkpoint; a folder where its weights lie in several files.
        sha256: of it.
        grid: patches along one side of the checkpoint's position embeddings.
    """

    file: Path
    sha256: str
    grid: int

    @property
    def title(self) -> str:
        """The run's name where there is a run, else the file's, or its folder's where all such files have one name."""
        if self.run_folder is not None:
            return self.run_folder.name
        return self.file.parent.name if self.file.name == WEIGHTS_NAME else self.file.stem

    @property
    def iteration(self) -> int | None:
        """How many steps it was trained for, from the names that runs give; None where they do not tell."""
        match = re.fullmatch(r"training_(\d+)", self.file.parent.name) or re.fullmatch(
            r"iteration_(\d+)", self.file.name
        )
        return int(match[1]) if match else None

    @property
    def run_folder(self) -> Path | None:
        """The run that wrote eval/training_<n>/<file> or checkpoints/iteration_<n>, if it has its config.yaml yet."""
        if self.iteration is None:
            return None
        parents = [parent for parent in self.file.parents if parent.name in ("eval", "checkpoints")]
        folder = parents[0].parent if parents else None
        return folder if folder is not None and (folder / "config.yaml").is_file() else None


def write_card(
    folder: Path,
    network: Network,
    origin: Origin,
    differences: Mapping[str, Mapping[str, float]],
    results: Mapping[Path, Mapping[str, Any]],
    left_out: Mapping[str, str],
) -> None:
    """Write README.md into a folder with exported files.

    Args:
        folder: with all the files.
        network: what they hold.
        origin: of the network.
        differences: {format: {output: largest difference from ours}} of what was written.
        results: {file: its content}, as `read_results` gives it.
        left_out: {format: why it was not written}.
    """
    sections = [
        _network_section(network, origin),
        _origin_section(origin),
        *(_run_sections(origin.run_folder) if origin.run_folder is not None else ()),
        *([_results_section(results)] if results else ()),
        _usage_section(network, list(differences)),
        _check_section(network, differences, left_out),
        _files_section(folder),
    ]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _network_section(network: Network, origin: Origin) -> str:
    known, model, size = network.architecture, network.model, network.image_size
    grid = size // model.patch_size
    n_parameters = sum(value.numel() for value in network.state.values())
    positions = f"{grid} x {grid} patches"
    if origin.grid != grid:
        positions += f", resized once from the checkpoint's {origin.grid} x {origin.grid} (bicubic, as DinoBloom does)"
    rows = {
        "network": f"vision transformer with {model.patch_size} x {model.patch_size} px patches ({known['arch']})",
        "width, blocks, heads": f"{model.embed_dim}, {model.n_blocks}, {model.num_heads}",
        "feed-forward network": f"{known['ffn_layer']}, {known['mlp_ratio']:g} times the width",
        "registers": model.num_register_tokens,
        "layer scale": "yes" if known["layerscale"] else "no",
        "parameters": f"{n_parameters:,}",
        "precision of the files": "fp32",
        "input": f"RGB, {size} x {size} px: shorter side to {size} px (Lanczos), centre crop; x / 255, less mean "
        f"{list(IMAGENET_MEAN)}, by deviation {list(IMAGENET_STD)}",
        "position embeddings": positions,
        "output": f"CLS token [{model.embed_dim}] and {grid * grid} patch tokens [{model.embed_dim}], after the last "
        "norm",
    }
    about = (
        "A vision transformer that turns pictures into features, pre-trained by self-distillation "
        "(DINOv2, arXiv 2304.07193)."
    )
    return f"# {origin.title}\n\n{about}\n\n{_table(rows)}"


def _origin_section(origin: Origin) -> str:
    rows = {"checkpoint": origin.file.name, "its sha256": origin.sha256}
    if origin.iteration is not None:
        rows["trained for"] = f"{origin.iteration:,} iterations"
    if origin.run_folder is not None:
        rows |= {
            "run": origin.run_folder.name,
            "sha256 of its config.yaml": file_sha256(origin.run_folder / "config.yaml"),
        }
    rows |= {
        "weights": "the teacher's backbone, without heads",
        "exported": f"{datetime.now(timezone.utc):%Y-%m-%d}, with dinobloom {dinov2.__version__}",
    }
    return f"## Origin\n\n{_table(rows)}"


# --- the run --------------------------------------------------------------------------------------------------------


def _run_sections(folder: Path) -> Iterator[str]:
    cfg = OmegaConf.load(folder / "config.yaml")
    assert isinstance(cfg, DictConfig), "a run writes a mapping"
    started_from = Path(str(OmegaConf.select(cfg, "student.pretrained_weights") or "")).name
    recipe = {"started from": started_from or "random weights", **_chosen(cfg, _RECIPE)}
    yield f"## Recipe\n\n{_table(recipe)}"
    schedule: dict[str, Any] = _chosen(cfg, _SCHEDULE)
    if {"optim.epochs", "train.OFFICIAL_EPOCH_LENGTH"} <= schedule.keys():
        n_iterations = round(schedule["optim.epochs"] * schedule["train.OFFICIAL_EPOCH_LENGTH"])
        schedule = {"iterations planned": f"{n_iterations:,}", **schedule}
    yield f"## Schedule\n\n{_table(schedule)}"
    yield f"## Pictures it was trained on\n\n{_lists(str(OmegaConf.select(cfg, 'train.dataset_path') or ''))}"


def _chosen(cfg: DictConfig, keys: Sequence[str]) -> dict[str, Any]:
    """Those of the keys that a config has; an older one may lack some."""
    found = {key: OmegaConf.select(cfg, key) for key in keys}
    return {key: value for key, value in found.items() if value is not None}


def _lists(dataset_path: str) -> str:
    """The path lists of a dataset string, as they are now."""
    parts = re.split(rf":(?=(?:{'|'.join(VALUE_READERS)})=)", dataset_path)
    root = next((Path(part.removeprefix("root=")) for part in parts if part.startswith("root=")), None)
    files = [] if root is None else [root] if root.is_file() else sorted(root.glob("*.txt"))
    if not files:
        return "The run's path lists were not where its configuration says when this was written."
    rows = [(file.name, f"{_count_pictures(file):,}", file_sha256(file)) for file in files]
    return "Path lists, as they were when this was written.\n\n" + _grid(("list", "pictures", "sha256"), rows)


def _count_pictures(file: Path) -> int:
    lines = (line.strip() for line in file.read_bytes().splitlines())
    return sum(bool(line) and not line.startswith(b"#") for line in lines)


# --- results --------------------------------------------------------------------------------------------------------


def read_results(file: Path, origin: Origin) -> dict[str, Any]:
    """A results.json about this checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else, or about another checkpoint.
    """
    if not file.is_file():
        raise FileNotFoundError(f"--results: no file {str(file)!r}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--results: {file} is not JSON ({error})") from error
    if not isinstance(content, dict) or not list(_rows(_numbers_of(content))):
        raise ValueError(f"--results: {file} holds no accuracies; give results.json files that an evaluation wrote")
    judged, iteration = content.get("checkpoint"), content.get("iteration")
    sha256 = judged.get("checkpoint_sha256") if isinstance(judged, dict) else None
    if sha256 not in (None, origin.sha256):
        raise ValueError(
            f"--results: {file} is about the checkpoint with sha256 {sha256}, not about {origin.file.name} "
            f"({origin.sha256}); give results of the checkpoint that is exported"
        )
    if None not in (iteration, origin.iteration) and iteration != origin.iteration:
        raise ValueError(
            f"--results: {file} is about the teacher after iteration {iteration}, not {origin.iteration}; give results "
            f"of the checkpoint that is exported"
        )
    return content


def _numbers_of(content: Mapping[str, Any]) -> Any:
    """The part with metrics: of an evaluation's results.json, or of one that training wrote."""
    return content.get("results", content.get("datasets"))


def _results_section(results: Mapping[Path, Mapping[str, Any]]) -> str:
    parts = [_quoted(file, content) for file, content in results.items()]
    return "## Results\n\nIn percent, quoted from the files named.\n\n" + "\n\n".join(parts)


def _quoted(file: Path, content: Mapping[str, Any]) -> str:
    settings = content.get("settings", {})
    data = {flag: _names(settings[flag]) for flag in _DATA_FLAGS if settings.get(flag)}
    date = content.get("date")
    about = [
        f"`{file.name}` ({file_sha256(file)})",
        f"protocol {content.get('protocol', 'of training')}",
        *(f"{flag} {names}" for flag, names in data.items()),
        *([f"{str(date)[:10]}"] if date else []),
    ]
    rows = list(_rows(_numbers_of(content)))
    columns = [name for name in _METRICS if any(name in metrics for _, metrics in rows)]
    body = [[label, *(_percent(metrics.get(name)) for name in columns)] for label, metrics in rows]
    return ", ".join(about) + ":\n\n" + _grid(["features and method", *(_METRICS[name] for name in columns)], body)


def _rows(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Mapping[str, float]]]:
    """(where it stands, metrics) of each innermost dictionary with an accuracy."""
    if not isinstance(content, Mapping):
        return
    if _is_number(content.get("accuracy")):
        yield " / ".join(path), {name: content[name] for name in _METRICS if _is_number(content.get(name))}
        return
    for name, value in content.items():
        yield from _rows(value, (*path, str(name)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _names(value: Any) -> str:
    """Paths by their last part."""
    return ", ".join(Path(str(one)).name for one in (value if isinstance(value, list) else [value]))


# --- use ------------------------------------------------------------------------------------------------------------


def _usage_section(network: Network, formats: Sequence[str]) -> str:
    code = _code(network)
    size, mean, deviation = network.image_size, list(IMAGENET_MEAN), list(IMAGENET_STD)
    preparation = f"""
import numpy as np
import torch
from PIL import Image, ImageOps

torch.set_grad_enabled(False)  # features only
cell = ImageOps.fit(Image.open("cell.png").convert("RGB"), ({size}, {size}), Image.Resampling.LANCZOS)
pixels = (np.asarray(cell) / 255 - {mean}) / {deviation}
images = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], dtype=np.float32)  # [1, 3, {size}, {size}]"""
    parts = [
        "## Use",
        "Run these in this folder. First a picture as the network takes it. The package `dinov2` is this project's; "
        "only formats that import it need it. `cls` is [pictures, width], `patches` [pictures, patches, width].",
        _python(preparation),
        *(f"{FORMATS[name].title}:\n\n{_python(code[name])}" for name in formats),
    ]
    return "\n\n".join(parts)


def _code(network: Network) -> dict[str, str]:
    """How each format is loaded, from normalised `images` to `cls` and `patches`."""
    timm_name, arguments = timm_arguments(network.architecture)
    arguments["checkpoint_path"] = f"{TIMM_FOLDER}/{WEIGHTS_NAME}"
    take_tokens = f"cls, patches = tokens[:, 0], tokens[:, {1 + network.n_registers}:]"
    return {
        "pth": _own_code(PTH_FILE, network),
        "safetensors": _own_code(SAFETENSORS_FILE, network),
        "huggingface": f"""
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{HUGGING_FACE_FOLDER}"{_as_arguments(PROCESSOR_ARGUMENTS)})
model = AutoModel.from_pretrained("{HUGGING_FACE_FOLDER}").eval()
tokens = model(**processor(Image.open("cell.png").convert("RGB"), return_tensors="pt")).last_hidden_state
{take_tokens}""",
        "timm": f"""
import timm

model = timm.create_model("{timm_name}"{_as_arguments(arguments)}).eval()
tokens = model.forward_features(torch.from_numpy(images))
{take_tokens}""",
        "onnx": f"""
import onnxruntime

session = onnxruntime.InferenceSession("{ONNX_FILE}", providers=["CPUExecutionProvider"])
cls, patches = session.run(["cls", "patches"], {{"images": images}})""",
        "torch_export": f"""
model = torch.export.load("{TORCH_EXPORT_FILE}").module()
cls, patches = model(torch.from_numpy(images))""",
    }


def _as_arguments(arguments: Mapping[str, Any]) -> str:
    """Further arguments of a call, as code."""
    return "".join(
        f", {name}={json.dumps(value) if isinstance(value, str) else value}" for name, value in arguments.items()
    )


def _own_code(file: str, network: Network) -> str:
    return f"""
from dinov2.hub import load_backbone

model = load_backbone("{file}", img_size={network.image_size})
tokens = model(torch.from_numpy(images), is_training=True)
cls, patches = tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"]"""


def _check_section(
    network: Network, differences: Mapping[str, Mapping[str, float]], left_out: Mapping[str, str]
) -> str:
    rows = [(name, f"{max(found.values()):.1e}", ", ".join(found)) for name, found in differences.items()]
    text = (
        "## What was compared\n\nEach file was read back by the library it is for and gave these features of drawn "
        "cells, with one and with several pictures at a time; the last column names the outputs compared.\n\n"
        + _grid(("format", "largest difference", "outputs"), rows)
    )
    size = network.image_size
    text += (
        f"\n\nPictures of another side than {size} px: transformers and timm (`dynamic_img_size=True`) interpolate "
        f"position embeddings by rules of their own, and ONNX and torch.export files take {size} px only."
    )
    if "huggingface" in differences:
        text += (
            "\n\nWith the arguments above, transformers' image processor gives just this project's own pixels for "
            "square pictures; others may differ by single grey levels. Without them and before torchvision 0.27 it has "
            "no Lanczos filter, and takes a bicubic one or fails."
        )
    reasons = "".join(f"\n- {name}: {reason}" for name, reason in left_out.items())
    return f"{text}\n\nNot written:\n{reasons}" if reasons else text


def _files_section(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    rows = [(path.relative_to(folder).as_posix(), f"{path.stat().st_size:,}", file_sha256(path)) for path in files]
    return "## Files\n\n" + _grid(("file", "bytes", "sha256"), rows)


def _python(code: str) -> str:
    return f"```python\n{code.strip()}\n```"


def _table(rows: Mapping[str, Any]) -> str:
    return _grid(("", ""), [(name, _shown(value)) for name, value in rows.items()])


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)

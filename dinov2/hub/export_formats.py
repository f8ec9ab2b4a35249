"""Write a network in each export format, read it back with the format's own library, and compare the outputs.

In each format the tokens after the last norm equal ours up to rounding. transformers' `last_hidden_state` and timm's
`forward_features(images)` have them in the order CLS token, registers, patches:

    ours (forward_features)         these two          ONNX and torch.export
    x_norm_clstoken [B, D]          [:, 0]             first output, `cls`
    x_norm_regtokens [B, R, D]      [:, 1 : 1 + R]     none
    x_norm_patchtokens [B, P, D]    [:, 1 + R :]       second output, `patches`

The logits [B, C] of a fine-tuned network are those of transformers' and timm's whole network, and the third output,
`logits`. safetensors, and timm for a classifier of the kind `cls+mean`, have the backbone only.

This holds for images of the exported size, on the CPU in fp32. For other sizes, transformers and timm interpolate
position embeddings in their own ways, and ONNX and torch.export files raise an error.

Dimension key:  B images, S image side in pixels, D embedding dim, R registers, P patches, C classes
"""

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from dinov2.data.sample_cells import Slide, draw_cell
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from dinov2.hub import conversions
from dinov2.hub.backbones import DEFAULT_IMAGE_SIZE, ImageTransform, infer_architecture
from dinov2.hub.classifiers import CLASSIFIER, Network, load_network
from dinov2.hub.descriptions import TIMM_CENTER_CROP
from dinov2.models import architecture
from dinov2.models.vision_transformer import DinoVisionTransformer

logger = logging.getLogger("dinov2")

PTH_FILE, SAFETENSORS_FILE = "backbone.pth", "backbone.safetensors"
HUGGING_FACE_FOLDER, TIMM_FOLDER = "huggingface", "timm"
ONNX_FILE, TORCH_EXPORT_FILE = "backbone.onnx", "backbone.pt2"
WEIGHTS_NAME = "model.safetensors"  # transformers' and timm's name of the file in a folder
# transformers' other image processors have no Lanczos filter before torchvision 0.27: they fail, or use bicubic. Its
# releases have two names for this argument; each release ignores the other name.
PROCESSOR_ARGUMENTS: dict[str, Any] = {"backend": "pil", "use_fast": False}
ONNX_OPSET = 18
# protobuf files are limited to 2 GiB; larger weights go into a second file
ONNX_ONE_FILE_BYTES = 1_500_000_000
INPUT_NAME, OUTPUT_NAMES = "images", ("cls", "patches")
# kinds of features for which timm has a classifier -> its arguments
TIMM_KINDS: dict[str, dict[str, Any]] = {"cls": {}, "mean": {"global_pool": "avg", "fc_norm": False}}

CHECKED_CELLS = ("neutrophil_segmented", "lymphocyte", "platelet")
CHECKED_BATCH_SIZES = (1, len(CHECKED_CELLS))

# normalised images [B, 3, S, S] -> {"cls": [B, D], "patches": [B, P, D], and if it has them, "registers": [B, R, D],
# "logits": [B, C]}
Embed = Callable[[Tensor], dict[str, Tensor]]


class ExportError(RuntimeError):
    """An exported file does not reproduce the network's outputs."""


def exported_size(model: DinoVisionTransformer) -> int:
    """Return S of a backbone that `load_backbone` made."""
    return int(architecture(model)["img_size"])


def own_outputs(network: Network, images: Tensor) -> dict[str, Tensor]:
    """Compute the outputs of `Embed` with one of our networks."""
    features = network.backbone.forward_features(images)
    outputs = {"cls": features["x_norm_clstoken"], "patches": features["x_norm_patchtokens"]}
    if network.backbone.num_register_tokens:
        outputs["registers"] = features["x_norm_regtokens"]
    if network.classifier is not None:
        outputs["logits"] = network.classifier.logits(outputs["cls"], outputs["patches"])
    return outputs


@dataclass(frozen=True)
class Format:
    """An export format: functions that write it below a folder and read it with its own library."""

    title: str
    packages: tuple[str, ...]  # modules that it needs beyond this project's requirements
    write: Callable[[Network, Path], None]
    read: Callable[[Network, Path], Embed]
    # raises ValueError for a network that it does not support
    check: Callable[[DinoVisionTransformer], object] = lambda model: None
    # transforms images with its own library to normalised [B, 3, S, S]
    prepare: Callable[[Path, Sequence[Image.Image]], Tensor] | None = None


# --- our own names --------------------------------------------------------------------------------------------------


def _write_pth(network: Network, folder: Path) -> None:
    """Write a bare state dict like DINOv2's releases, or one beside what its tensors do not show."""
    state: dict[str, Any] = dict(network.backbone.state_dict())
    if network.classifier is not None or not _is_described_by_tensors(network.backbone):
        state = {"model": state, "architecture": architecture(network.backbone)}
    if network.classifier is not None:
        state[CLASSIFIER] = network.classifier.content()
    torch.save(state, folder / PTH_FILE)


def _is_described_by_tensors(model: DinoVisionTransformer) -> bool:
    """Return whether `load_backbone` builds the network again from names and shapes of the tensors alone."""
    try:
        inferred = infer_architecture(model.state_dict(), {}, Path(PTH_FILE))
    except ValueError:  # the number of heads is unknown
        return False
    names = ("num_heads", "mlp_ratio", "interpolate_antialias", "interpolate_offset")
    is_default = exported_size(model) == DEFAULT_IMAGE_SIZE and model.center_crop == 1
    return is_default and all(inferred[name] == architecture(model)[name] for name in names)


def _write_safetensors(network: Network, folder: Path) -> None:
    metadata = {"format": "pt", "architecture": json.dumps(architecture(network.backbone))}
    save_file(network.backbone.state_dict(), folder / SAFETENSORS_FILE, metadata)


def _read_own(file: str, network: Network, folder: Path) -> Embed:
    return partial(own_outputs, load_network(folder / file))


# --- transformers ---------------------------------------------------------------------------------------------------


def hugging_face_preprocessor(image_size: int) -> dict[str, Any]:
    """Return preprocessor_config.json: shorter side to S by Lanczos, centre crop, ImageNet's mean and std."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": int(Image.Resampling.LANCZOS),
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def _write_hugging_face(network: Network, folder: Path) -> None:
    from transformers import Dinov2Config, Dinov2WithRegistersConfig

    folder = folder / HUGGING_FACE_FOLDER
    folder.mkdir()
    model, classifier = network.backbone, network.classifier
    config_class = Dinov2WithRegistersConfig if model.num_register_tokens else Dinov2Config
    settings = conversions.hugging_face_config(architecture(model))
    state, task = conversions.to_hugging_face(model.state_dict()), "Model"
    if classifier is not None:
        settings["id2label"] = dict(enumerate(classifier.class_names))
        settings["label2id"] = {name: i for i, name in settings["id2label"].items()}
        state = {f"{config_class.model_type}.{name}": value for name, value in state.items()}
        state |= {"classifier.weight": classifier.weight_of_both(), "classifier.bias": classifier.bias}
        task = "ForImageClassification"
    config = config_class(**settings)
    config.architectures = [config_class.__name__.removesuffix("Config") + task]
    config.save_pretrained(folder)
    save_file(state, folder / WEIGHTS_NAME, {"format": "pt"})
    preprocessor = hugging_face_preprocessor(exported_size(model))
    if model.center_crop != 1:  # crop_pct, which the processor does not read, is the exact share for `load_backbone`
        preprocessor["size"] = {"shortest_edge": round(exported_size(model) / model.center_crop)}
        preprocessor["crop_pct"] = model.center_crop
    _write_json(folder / "preprocessor_config.json", preprocessor)


def _read_hugging_face(network: Network, folder: Path) -> Embed:
    from transformers import AutoModel, AutoModelForImageClassification

    path = folder / HUGGING_FACE_FOLDER
    auto_class = AutoModel if network.classifier is None else AutoModelForImageClassification
    theirs, report = auto_class.from_pretrained(path, local_files_only=True, output_loading_info=True)
    lost = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if lost:  # transformers only warns, and initialises missing tensors at random
        raise ValueError(f"transformers does not load all tensors: {lost}")
    theirs.eval()

    def embed(images: Tensor) -> dict[str, Tensor]:
        tokens = theirs.base_model(pixel_values=images).last_hidden_state  # base_model of a backbone is itself
        outputs = _split_tokens(tokens, network.backbone.num_register_tokens)
        return outputs if network.classifier is None else {**outputs, "logits": theirs(pixel_values=images).logits}

    return embed


def _prepare_hugging_face(folder: Path, cells: Sequence[Image.Image]) -> Tensor:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(
        folder / HUGGING_FACE_FOLDER, local_files_only=True, **PROCESSOR_ARGUMENTS
    )
    pixels: Tensor = processor(list(cells), return_tensors="pt")["pixel_values"]
    return pixels


# --- timm -----------------------------------------------------------------------------------------------------------


def timm_network_arguments(network: Network) -> tuple[str, dict[str, Any]]:
    """Return `conversions.timm_arguments`, with the classes if timm has a classifier for this kind of features."""
    name, arguments = conversions.timm_arguments(architecture(network.backbone))
    if network.classifier is not None and (pooling := TIMM_KINDS.get(network.classifier.kind)) is not None:
        arguments |= {"num_classes": len(network.classifier.class_names), **pooling}
    return name, arguments


def _write_timm(network: Network, folder: Path) -> None:
    folder = folder / TIMM_FOLDER
    folder.mkdir()
    model, classifier = network.backbone, network.classifier
    name, arguments = timm_network_arguments(network)
    state = conversions.to_timm(model.state_dict())
    preparation = {
        "input_size": [3, exported_size(model), exported_size(model)],
        "fixed_input_size": True,
        "interpolation": "lanczos",
        "crop_pct": model.center_crop,
        "crop_mode": "center",
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "num_classes": arguments["num_classes"],
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    content: dict[str, Any] = {
        "architecture": name,
        "num_classes": arguments["num_classes"],
        "num_features": model.embed_dim,
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "pretrained_cfg": preparation,
    }
    if model.center_crop != 1:  # for `load_backbone`: networks of others have a crop_pct too
        content[TIMM_CENTER_CROP] = model.center_crop
    if classifier is not None and arguments["num_classes"]:
        state |= {"head.weight": classifier.weight, "head.bias": classifier.bias}
        content["label_names"] = classifier.class_names
    save_file(state, folder / WEIGHTS_NAME, {"format": "pt"})
    _write_json(folder / "config.json", content)


def _read_timm(network: Network, folder: Path) -> Embed:
    import timm

    name, arguments = timm_network_arguments(network)
    # checkpoint_path is read strictly: no tensor may be missing or left over
    path = folder / TIMM_FOLDER / WEIGHTS_NAME
    theirs: Any = timm.create_model(name, **arguments, checkpoint_path=str(path)).eval()

    def embed(images: Tensor) -> dict[str, Tensor]:
        tokens = theirs.forward_features(images)
        outputs = _split_tokens(tokens, network.backbone.num_register_tokens)
        return {**outputs, "logits": theirs.forward_head(tokens)} if arguments["num_classes"] else outputs

    return embed


# --- graphs ---------------------------------------------------------------------------------------------------------


def output_names(network: Network) -> list[str]:
    """Return the names of the outputs of ONNX and torch.export files, in their order."""
    return [*OUTPUT_NAMES] if network.classifier is None else [*OUTPUT_NAMES, "logits"]


class Graph(nn.Module):
    """Return the outputs of `output_names` for normalised images [B, 3, S, S]."""

    weight: Tensor
    bias: Tensor

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.backbone, self.classifier = network.backbone, network.classifier
        if self.classifier is not None:  # as buffers: constants of a graph do not follow it to a GPU
            self.register_buffer("weight", self.classifier.weight)
            self.register_buffer("bias", self.classifier.bias)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        classifier = self.classifier and replace(self.classifier, weight=self.weight, bias=self.bias)
        outputs = own_outputs(network := Network(self.backbone, classifier), images)
        return tuple(outputs[name] for name in output_names(network))


@lru_cache(maxsize=1)
def _export_program(network: Network) -> ExportedProgram:
    """Export the graph of a network for any number of images."""
    # two images: torch.export treats a batch of one as a constant
    side = exported_size(network.backbone)
    any_number = {INPUT_NAME: {0: torch.export.Dim("batch")}}
    with _exporter_warnings_off():
        return torch.export.export(Graph(network).eval(), (torch.zeros(2, 3, side, side),), dynamic_shapes=any_number)


def _write_onnx(network: Network, folder: Path) -> None:
    with _exporter_warnings_off():
        onnx_program = torch.onnx.export(
            _export_program(network),
            dynamo=True,
            input_names=[INPUT_NAME],
            output_names=output_names(network),
            opset_version=ONNX_OPSET,
            verbose=False,
        )
    assert onnx_program is not None, "torch returns the program with dynamo=True"
    n_bytes = sum(value.numel() * value.element_size() for value in network.backbone.state_dict().values())
    onnx_program.save(folder / ONNX_FILE, external_data=n_bytes > ONNX_ONE_FILE_BYTES)


def _read_onnx(network: Network, folder: Path) -> Embed:
    import onnxruntime

    names = output_names(network)
    session = onnxruntime.InferenceSession(folder / ONNX_FILE, providers=["CPUExecutionProvider"])

    def embed(images: Tensor) -> dict[str, Tensor]:
        outputs = session.run(names, {INPUT_NAME: images.numpy()})
        return {name: torch.from_numpy(output) for name, output in zip(names, outputs, strict=True)}

    return embed


def _write_torch_export(network: Network, folder: Path) -> None:
    with _exporter_warnings_off():
        torch.export.save(_export_program(network), folder / TORCH_EXPORT_FILE)


def _read_torch_export(network: Network, folder: Path) -> Embed:
    with _exporter_warnings_off():
        module = torch.export.load(folder / TORCH_EXPORT_FILE).module()
    return lambda images: dict(zip(output_names(network), module(images), strict=True))


@contextmanager
def _exporter_warnings_off() -> Iterator[None]:
    """Silence warnings of torch's exporters about their own internals."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _split_tokens(tokens: Tensor, n_registers: int) -> dict[str, Tensor]:
    """Split tokens [B, 1 + R + P, D] into those of `Embed`."""
    parts = {"cls": tokens[:, 0], "patches": tokens[:, 1 + n_registers :]}
    return {**parts, "registers": tokens[:, 1 : 1 + n_registers]} if n_registers else parts


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


FORMATS: dict[str, Format] = {
    "pth": Format("bare state dict", (), _write_pth, partial(_read_own, PTH_FILE)),
    "safetensors": Format("safetensors", (), _write_safetensors, partial(_read_own, SAFETENSORS_FILE)),
    "huggingface": Format(
        "Hugging Face transformers",
        ("transformers",),
        _write_hugging_face,
        _read_hugging_face,
        lambda model: conversions.hugging_face_config(architecture(model)),
        _prepare_hugging_face,
    ),
    "timm": Format("timm", ("timm",), _write_timm, _read_timm),
    "onnx": Format(f"ONNX, opset {ONNX_OPSET}", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _read_onnx),
    "torch_export": Format("torch.export", (), _write_torch_export, _read_torch_export),
}


# --- comparing ------------------------------------------------------------------------------------------------------


def draw_cells() -> list[Image.Image]:
    """Draw the cells on which exported networks are compared, always the same."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(draw_cell(name, Slide(rng), rng)) for name in CHECKED_CELLS]


def compare(
    name: str, network: Network, folder: Path, cells: Sequence[Image.Image], tolerance: float
) -> dict[str, float]:
    """Compare the outputs of a written format with ours, for one and several cells, and its own preprocessing.

    Returns {output: largest difference}; ExportError if one is above the tolerance or the file cannot be read.
    """
    form, size = FORMATS[name], exported_size(network.backbone)
    # as transformers' processor, which resizes the whole image and then cuts a smaller centre
    whole = round(size / network.backbone.center_crop)
    kept = slice((whole - size) // 2, (whole - size) // 2 + size)
    images = torch.stack([ImageTransform(whole)(cell)[:, kept, kept] for cell in cells])  # [B, 3, S, S]
    expected = own_outputs(network, images)
    try:
        embed = form.read(network, folder)
        outputs = [(expected, images[:n], embed(images[:n])) for n in CHECKED_BATCH_SIZES]
        if form.prepare is not None:
            prepared = form.prepare(folder, cells)
            outputs.append(({**expected, "pixels": images}, prepared, {**embed(prepared), "pixels": prepared}))
    except (RuntimeError, ValueError, KeyError, OSError) as error:  # from libraries that cannot read a file
        raise ExportError(f"{name}: what was written cannot be used: {' '.join(str(error).split())}") from error
    differences: dict[str, float] = {}
    for ours, given, theirs in outputs:
        for output, value in theirs.items():
            largest = _largest_difference(ours[output][: len(given)], value)
            differences[output] = max(differences.get(output, 0.0), largest)
    text = ", ".join(f"{output} {value:.2g}" for output, value in differences.items())
    logger.info("%s: largest difference %s", name, text)
    if any(value > tolerance for value in differences.values()):
        raise ExportError(
            f"{name}: what was written differs from the network by more than --tolerance {tolerance:g}: {text}; "
            "nothing is exported"
        )
    return differences


def _largest_difference(expected: Tensor, actual: Tensor) -> float:
    """Return the largest difference; infinite if shapes differ or a value is not finite."""
    if expected.shape != actual.shape:
        return math.inf
    largest = (expected - actual).abs().max().item()
    return largest if math.isfinite(largest) else math.inf

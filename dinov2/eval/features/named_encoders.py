"""Encoders by name, to compare backbones with: `timm:<model>`, `torchvision:<model>`, and the baselines.

The libraries are imported where they are used. A trained backbone must beat the baselines, which have no network.

Dimension key:  B images, N images of a list, S image side in pixels, D embedding dim
"""

import hashlib
import inspect
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinov2.data.datasets.decode import resize_image
from dinov2.eval.features.encoders import Encoder, Kind, Preparation, assemble, check_divisible
from dinov2.hub.backbones import check_names_and_shapes
from dinov2.hub.descriptions import DINOBLOOM_SIZE, is_named_dinobloom
from dinov2.hub.weight_files import read_weights_file, unwrap
from dinov2.utils.files import local_path

logger = logging.getLogger("dinov2")

UNTRAINED = "untrained"  # in place of a weights file
UNTRAINED_SEED = 0
CENTRE_SHARE = 0.55  # of each side: about 200 of the 360 px of an Acevedo image, the cell without its surroundings
BINS = 8  # of hue, saturation and value each
PIXELS_SIDE = 32


def colour_histogram(image: np.ndarray) -> Tensor:
    """Return the square roots of the joint histogram of hue, saturation and value over the centre: float32 [512].

    The squares sum to 1. With the root, Euclidean distance is the Hellinger distance of the histograms, in which the
    full bin of a plain background no longer outweighs all others: on 1,776 Acevedo cells of eight classes, a quarter
    of them held out, kNN-20 goes from 0.68 to 0.88 accuracy.
    """
    top, left = (round(side * (1 - CENTRE_SHARE) / 2) for side in image.shape[:2])
    centre = image[top : len(image) - top, left : image.shape[1] - left]
    hsv = np.asarray(Image.fromarray(centre).convert("HSV"))
    hue, saturation, value = np.moveaxis(hsv.astype(np.int64) * BINS // 256, -1, 0)  # [h, w] each, 0-7
    bins = (hue * BINS + saturation) * BINS + value
    counts = np.bincount(bins.ravel(), minlength=BINS**3)  # [512]
    return torch.from_numpy(np.sqrt(counts / bins.size).astype(np.float32))


def raw_pixels(image: np.ndarray) -> Tensor:
    """Scale the shorter side to 32 px, crop the centre and return its pixels: float32 [3072], 0-1."""
    return resize_image(image, PIXELS_SIDE, fit="crop").flatten() / 255


# {name: (features of a decoded image, uint8 [H, W, 3] in RGB; their description; side in pixels after resizing or 0)}
BASELINES: dict[str, tuple[Preparation, str, int]] = {
    "histogram": (
        colour_histogram,
        f"RGB, centre {CENTRE_SHARE:g} of each side, {BINS} x {BINS} x {BINS} HSV bins, square root of their shares",
        0,
    ),
    "pixels": (raw_pixels, f"RGB, shorter side to {PIXELS_SIDE} px (Lanczos), centre crop, 0 to 1", PIXELS_SIDE),
}


class TimmEncoder(Encoder):
    """A network of the timm library, with timm's size, interpolation, crop, mean and std for it.

    The name is timm's, with a tag or without: `vit_base_patch14_dinov2.lvd142m`, `hf-hub:owner/name`, ...
    """

    def __init__(self, name: str, image_size: int = 0, weights: str = "") -> None:
        try:
            import timm
            import timm.data
        except ImportError as error:
            raise ValueError(
                f"--encoder timm:{name}: the package timm cannot be imported ({error}); run `pip install timm`"
            ) from error
        self.description = f"timm:{name}"
        if not image_size and _is_dinobloom(name):
            image_size = DINOBLOOM_SIZE
            logger.info(
                "%s: images of %d px, at which DinoBloom was trained, whatever its config.json says",
                *(self.description, image_size),
            )
        self.network = network = _timm_network(timm, name, image_size, weights)
        self.has_patch_tokens = _is_plain_vit(network)
        has_cls_token = self.has_patch_tokens and getattr(network, "cls_token", None) is not None
        self.n_blocks = len(network.blocks) if has_cls_token else 0
        config = timm.data.resolve_model_data_config(network)
        own_size = config["input_size"][-1]
        self.image_size = size = image_size or own_size
        self.origin = _origin(weights, f"pretrained, {network.pretrained_cfg.get('tag') or 'timm'}")
        if self.has_patch_tokens:
            check_divisible(size, network.patch_embed.patch_size[0])
        config["input_size"] = (3, size, size)
        self.preparation = partial(_prepare, transform=timm.data.create_transform(**config, is_training=False))
        scaled = math.floor(size / config["crop_pct"])
        geometry = f"timm's {config['crop_mode']} fit: to {scaled} px ({config['interpolation']}), crop {size} px"
        self.transform = _describe_transform(geometry, config["mean"], config["std"])
        if size != own_size:
            _check_size(self)

    def modules_to_compile(self) -> Iterable[nn.Module]:
        network: Any = self.network
        return network.blocks if self.has_patch_tokens else network.children()

    def embed(self, images: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
        network: Any = self.network
        parsed = [Kind.parse(kind) for kind in kinds]
        n = max((kind.n_last for kind in parsed), default=0)
        cls_tokens: list[Tensor] = []
        if n == 0:
            tokens = network.forward_features(images)
        else:
            tokens, layers = network.forward_intermediates(
                images, indices=n, return_prefix_tokens=True, norm=True, output_fmt="NLC"
            )
            cls_tokens = [prefix[:, 0] for _, prefix in layers]  # n times [B, D]
        pooled = network.forward_head(tokens, pre_logits=True)  # [B, D]
        if not self.has_patch_tokens:
            return dict.fromkeys(kinds, pooled.flatten(1).float())
        return assemble(parsed, pooled, cls_tokens, tokens[:, network.num_prefix_tokens :])


class TorchvisionEncoder(Encoder):
    """A classification network of torchvision; its feature `cls` is the input of its last linear layer.

    An image is scaled in proportion to `image_size` before the crop. For the arguments see `build_encoder`.
    """

    def __init__(self, name: str, image_size: int = 0, weights: str = "") -> None:
        from torchvision import models  # type: ignore[import-untyped]

        self.description = f"torchvision:{name}"
        known = models.list_models(module=models)
        if name not in known:
            raise ValueError(_unknown(self.description, name, known))
        released = models.get_model_weights(name).DEFAULT
        self.network = _torchvision_network(models, name, released, weights)
        self.origin = _origin(weights, f"pretrained, {released.name}")
        preset = released.transforms()
        own_size = preset.crop_size[0]
        self.image_size = size = image_size or own_size
        scaled = round(preset.resize_size[0] * size / own_size)
        self.preparation = partial(_prepare, transform=released.transforms(crop_size=size, resize_size=scaled))
        geometry = f"shorter side to {scaled} px ({preset.interpolation.value}), centre crop {size} px"
        self.transform = _describe_transform(geometry, preset.mean, preset.std)
        if size != own_size:
            _check_size(self)

    def embed(self, images: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
        return dict.fromkeys(kinds, self.network(images).float())  # [B, D]


class BaselineEncoder(Encoder):
    """A baseline; its only kind is `cls`."""

    def __init__(self, name: str) -> None:
        self.network, self.description, self.origin = nn.Identity(), name, "no weights"
        self.preparation, self.transform, self.image_size = BASELINES[name]

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(f"{self.description}: {self.transform}".encode()).hexdigest()

    def embed(self, images: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
        return dict.fromkeys(kinds, images.float())


_LIBRARIES: dict[str, Callable[[str, int, str], Encoder]] = {"timm": TimmEncoder, "torchvision": TorchvisionEncoder}


def encoder_name(text: str) -> str:
    """Return `text` if it has the form of an encoder's name; ValueError otherwise."""
    library, _, model = text.partition(":")
    if text in BASELINES or (library in _LIBRARIES and model):
        return text
    known = [*(f"{library}:<model>" for library in _LIBRARIES), *BASELINES]
    raise ValueError(f"encoder: {text!r} is unknown; there are {', '.join(known)}")


def build_encoder(name: str, image_size: int = 0, weights: str = "") -> Encoder:
    """Build the encoder of this name.

    Args:
        name: `timm:<model>`, `torchvision:<model>`, `pixels` or `histogram`.
        image_size: S; 0 for its own.
        weights: a file with a state dict, "untrained", or "" for the library's pretrained weights.

    Raises:
        ConnectionError: if the pretrained weights are neither in the library's cache nor can be downloaded.
    """
    encoder_name(name)
    if weights not in ("", UNTRAINED):
        weights = str(local_path(weights))
        if not Path(weights).exists():
            raise FileNotFoundError(f"--encoder-weights: no file {weights!r}; give one, or the word {UNTRAINED}")
    library, _, model = name.partition(":")
    if model:
        return _LIBRARIES[library](model, image_size, weights)
    if image_size or weights:
        raise ValueError(f"--encoder {name}: it has no weights and one image size; drop --encoder-weights/--image-size")
    return BaselineEncoder(name)


def _prepare(image: np.ndarray, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    return transform(Image.fromarray(image))  # [3, S, S]


def _describe_transform(geometry: str, mean: Sequence[float], std: Sequence[float]) -> str:
    means, deviations = (" ".join(f"{value:.4g}" for value in values) for values in (mean, std))
    return f"RGB, {geometry}, mean {means}, std {deviations}"


def _origin(weights: str, pretrained: str) -> str:
    if weights == UNTRAINED:
        return f"untrained, seed {UNTRAINED_SEED}"
    return os.path.abspath(weights) if weights else pretrained


def _unknown(description: str, name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=5)
    return f"--encoder {description}: there is no such model" + (f"; perhaps {', '.join(close)}" if close else "")


def _check_size(encoder: Encoder) -> None:
    """Embed a black image, of a size that is not the network's own; ValueError if the network cannot."""
    side = encoder.image_size
    try:
        with torch.no_grad():
            encoder.embed(encoder.preparation(np.zeros((side, side, 3), np.uint8))[None], ["cls"])
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"--image-size {side}: {encoder.description} cannot take it ({error}); leave it out for its own"
        ) from error


def _is_dinobloom(name: str) -> bool:
    """Return whether a timm name is that of a repository or folder with DinoBloom."""
    return ":" in name and is_named_dinobloom(name.partition(":")[2])


def _has_fixed_size(timm: Any, name: str) -> bool:
    return bool(getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False))


def _timm_network(timm: Any, name: str, image_size: int, weights: str) -> Any:
    plain_name = name.partition(".")[0]
    if ":" not in name and not timm.is_model(plain_name):
        raise ValueError(_unknown(f"timm:{name}", plain_name, timm.list_models()))
    settings: dict[str, Any] = {"num_classes": 0}
    # what a repository or folder states is known only after timm has built the network
    if image_size and (_is_dinobloom(name) or (":" not in name and _has_fixed_size(timm, name))):
        settings["img_size"] = image_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED_SEED)
        try:
            network = timm.create_model(name, pretrained=not weights, **settings)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(f"--encoder timm:{name}: timm does not build it: {error}") from error
        except OSError as error:  # of the hub's client and of the network
            raise ConnectionError(
                f"--encoder timm:{name}: its pretrained weights are not here and cannot be downloaded "
                f"({_first_line(error)}); on a machine with access fetch {_timm_source(timm, name)}"
            ) from error
    if weights not in ("", UNTRAINED):
        state = _read_tensors(Path(weights))
        # timm's own conversion of other layouts, and of position embeddings of another grid
        convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
        state = dict(convert(state, network)) if convert is not None else state
        heads = network.pretrained_cfg.get("classifier") or ()
        _load(network, state, Path(weights), [heads] if isinstance(heads, str) else heads)
    return network.eval()


def _is_plain_vit(network: Any) -> bool:
    """Return whether `forward_features` of a timm network gives prefix tokens and patch tokens."""
    names = ("num_prefix_tokens", "blocks", "patch_embed", "forward_intermediates")
    has_parts = all(hasattr(network, name) for name in names)
    return has_parts and "return_prefix_tokens" in inspect.signature(network.forward_intermediates).parameters


def _timm_source(timm: Any, name: str) -> str:
    """Say what to download by hand, and how to pass it."""
    if ":" in name:
        return "the whole repository, and give it as --encoder timm:local-dir:<folder>"
    hub = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None)
    source = f"model.safetensors from https://huggingface.co/{hub}" if hub else "its file"
    return f"{source}, and pass that as --encoder-weights"


def _torchvision_network(models: Any, name: str, released: Any, weights: str) -> nn.Module:
    """Build a network whose last linear layer, the classifier, is replaced by the identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED_SEED)
        network = models.get_model(name, weights=None)
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"--encoder torchvision:{name}: it has no linear classifier whose input could be `cls`")
    if hasattr(network, "transform_input"):  # converts ImageNet's mean and std to those that released weights expect
        network.transform_input = True
    network.set_submodule(linear[-1], nn.Identity())
    if weights != UNTRAINED:
        content = _read_tensors(Path(weights)) if weights else _download_torchvision(name, released)
        # the released DenseNets are from a time when names of modules could have dots
        old_name = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d\.)")
        state = {old_name.sub(r"\1\2", key): value for key, value in content.items()}
        _load(network, state, Path(weights or released.url), [linear[-1]])
    return network.eval()


def _download_torchvision(name: str, released: Any) -> Mapping[str, Any]:
    try:
        return released.get_state_dict(progress=False, check_hash=True)
    except OSError as error:  # urllib's
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise ConnectionError(
            f"--encoder torchvision:{name}: its pretrained weights are not in {str(folder)!r} and cannot be "
            f"downloaded ({_first_line(error)}); fetch {released.url} on a machine with access and pass it as "
            f"--encoder-weights"
        ) from error


def _load(network: nn.Module, state: Mapping[str, Tensor], file: Path, heads: Iterable[str]) -> None:
    """Load all tensors of a network; those of classifier heads are left out, others must match exactly."""
    prefixes = tuple(f"{head}." for head in heads)
    wanted = network.state_dict()
    # counts of batches, which eval mode does not use and files from before torch 0.4.1 do not have
    counts = {key: value for key, value in wanted.items() if key.endswith(".num_batches_tracked")}
    state = {**counts, **{key: value for key, value in state.items() if not key.startswith(prefixes)}}
    check_names_and_shapes(wanted, state, file)
    network.load_state_dict(state)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the state dict inside a file's content."""
    content = unwrap(read_weights_file(file), file)
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

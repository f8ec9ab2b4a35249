"""What turns pictures into features: this project's backbones, and others to compare them with.

An encoder says what happens to a picture before the network (`preparation`, run where pictures are decoded, and then
`transform` in words), whose weights it has, and gives several kinds of features in one forward:

- `cls`: the CLS token after the last norm; of library networks that pool otherwise, the feature before the classifier;
- `mean`: the mean of the patch tokens after the last norm;
- `cls+mean`: both, one after the other;
- `last<n>`: CLS tokens of the last n blocks, each after the last norm, that of the last block at the end;
- `last<n>+mean`: these, then the mean of the last block's patch tokens (what DINOv2's linear probe takes);
- `patches`: the patch tokens after the last norm, as a grid.

By name there are `timm:<model>`, `torchvision:<model>`, and the baselines `pixels` and `histogram`. The two libraries
are imported where they are used: most commands need neither.

Dimension key:  B pictures, S image side in pixels, D embedding dim, P = h x w patches
"""

import hashlib
import inspect
import math
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinov2.data.transforms import normalize_images
from dinov2.eval.features.baselines import BINS, CENTRE_SHARE, PIXELS_SIDE, Description, histogram_of, pixels_of
from dinov2.eval.features.store import PATCHES
from dinov2.hub.backbones import (
    check_names_and_shapes,
    describe_backbone,
    file_sha256,
    read_weights_file,
)
from dinov2.hub.transform import ImageTransform
from dinov2.models.vision_transformer import DinoVisionTransformer

TIMM, TORCHVISION = "timm:", "torchvision:"
UNTRAINED = "untrained"  # in place of a file with weights
UNTRAINED_SEED = 0
KINDS_HELP = "cls, mean, cls+mean, last<n>, last<n>+mean, patches"

Preparation = Callable[[np.ndarray], Tensor]


@dataclass(frozen=True)
class Kind:
    """What a kind of features is made of, in this order; see the module's docstring for their names."""

    name: str
    has_cls: bool = False
    n_last: int = 0  # blocks whose CLS tokens it has
    has_mean: bool = False
    is_grid: bool = False

    @classmethod
    def parse(cls, name: str) -> "Kind":
        """The kind of this name; ValueError for an unknown one."""
        if name == PATCHES:
            return cls(name, is_grid=True)
        if name == "mean":
            return cls(name, has_mean=True)
        match = re.fullmatch(r"(?:cls|last([1-9]\d*))(\+mean)?", name)
        if match is None:
            raise ValueError(f"kind of features: {name!r} is unknown; there are {KINDS_HELP}")
        return cls(name, has_cls=match[1] is None, n_last=int(match[1] or 0), has_mean=match[2] is not None)


class Encoder(ABC):
    """A network with all that its features depend on, except the numbers' precision.

    Attributes:
        network: its parameters are the identity, and it is moved between devices.
        preparation: a decoded picture, uint8 [H, W, 3] in RGB, to what `embed` takes a batch of; goes to the processes
            that decode.
        transform: what happens to a picture before the network, in words that differ when it differs.
        description: the network, in words.
        origin: where its weights are from.
        image_size: S; 0 where pictures are not resized.
        has_patch_tokens: whether it gives any.
        n_blocks: how many blocks give CLS tokens; 0 for networks without such.
    """

    network: nn.Module
    preparation: Preparation
    transform: str
    description: str
    origin: str
    image_size: int
    has_patch_tokens: bool = False
    n_blocks: int = 0

    @cached_property
    def sha256(self) -> str:
        """Of what decides the features besides the transform."""
        return state_sha256(self.network)

    def check(self, kinds: Sequence[str]) -> None:
        """Refuse kinds of features that this encoder does not have.

        Raises:
            ValueError: for one of these, or for an unknown one.
        """
        has = ["cls"]
        if self.has_patch_tokens:
            has += ["mean", "cls+mean", PATCHES]
        if self.n_blocks:
            has += [f"last<n> and last<n>+mean with n up to {self.n_blocks}"]
        for kind in map(Kind.parse, kinds):
            lacks_patches = (kind.has_mean or kind.is_grid) and not self.has_patch_tokens
            if lacks_patches or kind.n_last > self.n_blocks:
                raise ValueError(f"--kinds {kind.name}: {self.description} has only {', '.join(has)}")

    def compile(self, backend: str = "inductor") -> None:
        """Have torch compile the network, where it is next called with inputs of a new kind."""
        for part in self._parts_to_compile():
            part.compile(backend=backend)

    def _parts_to_compile(self) -> Iterable[nn.Module]:
        """Modules that `embed` calls; equal ones are compiled once for all of them."""
        return [self.network]

    @abstractmethod
    def embed(self, images: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
        """All these kinds of features of a batch, in one forward.

        Args:
            images: what `preparation` gave, stacked, on the network's device: uint8 [B, 3, S, S] for networks.
            kinds: checked ones.

        Returns:
            {kind: float32 [B, D of the kind]}; `patches` is float16 [B, h, w, D].
        """


class DinoEncoder(Encoder):
    """A backbone of this project, or a released one of DINOv2 or DinoBloom.

    Args:
        network: the backbone.
        image_size: S.
        file: with its weights; then the identity is the file's hash, otherwise the tensors'.

    Raises:
        ValueError: if the patch size does not divide S.
    """

    network: DinoVisionTransformer

    def __init__(self, network: DinoVisionTransformer, image_size: int, file: Path | None = None) -> None:
        check_divisible(image_size, network.patch_size)
        self.network = network
        self.has_patch_tokens, self.n_blocks = True, network.n_blocks
        self.image_size = image_size
        transform = ImageTransform(image_size)
        self.preparation, self.transform = transform.resize, str(transform)
        self.description = describe_backbone(network)
        self.file = file
        self.origin = os.path.abspath(file) if file is not None else "memory"

    @cached_property
    def sha256(self) -> str:
        return state_sha256(self.network) if self.file is None else file_sha256(self.file)

    def _parts_to_compile(self) -> Iterable[nn.Module]:
        return self.network.each_block()

    def embed(self, images: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
        parsed = [Kind.parse(kind) for kind in kinds]
        if not any(kind.has_mean or kind.is_grid or kind.n_last > 1 for kind in parsed):
            cls_token = self.network(normalize_images(images))  # [B, D]
            return dict.fromkeys(kinds, cls_token.float())
        n = max(1, *(kind.n_last for kind in parsed))
        layers = self.network.get_intermediate_layers(normalize_images(images), n=n, return_class_token=True)
        cls_tokens = [cls_token for _, cls_token in layers]  # n times [B, D]
        return _of_kinds(kinds, cls_tokens[-1], cls_tokens, layers[-1][0])


class TimmEncoder(Encoder):
    """A network of the timm library, with the size, interpolation, crop, mean and std that timm gives for it.

    Args:
        name: as timm has it, with a tag or without: `vit_base_patch14_dinov2.lvd142m`, `hf-hub:owner/name`, ...
        image_size: S; 0 for the network's own.
        weights: a file with a state dict, "untrained", or "" for the pretrained ones, which timm downloads.

    Raises:
        ValueError: without timm, for an unknown model, a size it cannot take, or weights that are not its own.
        FileNotFoundError: if there is no such file.
        ConnectionError: if the pretrained weights are neither in timm's cache nor can be downloaded.
    """

    def __init__(self, name: str, image_size: int = 0, weights: str = "") -> None:
        timm = _timm()
        self.description = TIMM + name
        network = _timm_network(timm, name, image_size, weights)
        self.network = network
        self.has_patch_tokens = _gives_tokens(network)
        has_cls_token = self.has_patch_tokens and getattr(network, "cls_token", None) is not None
        self.n_blocks = len(network.blocks) if has_cls_token else 0
        config = timm.data.resolve_model_data_config(network)
        own_size = config["input_size"][-1]
        self.image_size = image_size or own_size
        self.origin = _origin(weights, f"pretrained, {network.pretrained_cfg.get('tag') or 'timm'}")
        if self.has_patch_tokens:
            check_divisible(self.image_size, network.patch_embed.patch_size[0])
        config["input_size"] = (3, self.image_size, self.image_size)
        self.preparation = _TimmPreparation(
            timm.data.create_transform(**config, is_training=False, use_prefetcher=True)
        )
        scaled = math.floor(self.image_size / config["crop_pct"])
        self.transform = _in_words(
            f"timm's {config['crop_mode']} fit: to {scaled} px ({config['interpolation']}), crop {self.image_size} px",
            config["mean"],
            config["std"],
        )
        self._normalize = partial(_normalize, mean=config["mean"], std=config["std"])
        if self.image_size != own_size:
            _check_takes(self, lambda images: self.embed(images, ["cls"]))

    def _parts_to_compile(self) -> Iterable[nn.Module]:
        network: Any = self.network
        return network.blocks if self.has_patch_tokens else network.children()

    def embed(self, images: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
        network: Any = self.network
        inputs = self._normalize(images)
        n = max(0, *(Kind.parse(kind).n_last for kind in kinds))
        cls_tokens: list[Tensor] = []
        if n == 0:
            tokens = network.forward_features(inputs)
        else:
            tokens, layers = network.forward_intermediates(
                inputs, indices=n, return_prefix_tokens=True, norm=True, output_fmt="NLC"
            )
            cls_tokens = [prefix[:, 0] for _, prefix in layers]  # n times [B, D]
        pooled = network.forward_head(tokens, pre_logits=True)  # [B, D]
        if not self.has_patch_tokens:
            return {kind: pooled.flatten(1).float() for kind in kinds}
        return _of_kinds(kinds, pooled, cls_tokens, tokens[:, network.num_prefix_tokens :])


class TorchvisionEncoder(Encoder):
    """A classification network of torchvision: its feature `cls` is what its last linear layer takes.

    Args:
        name: as torchvision has it: `resnet50`, `convnext_tiny`, ...
        image_size: S; 0 for the network's own. The picture is scaled in proportion before the crop.
        weights: as for `TimmEncoder`.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: as `TimmEncoder`.
    """

    def __init__(self, name: str, image_size: int = 0, weights: str = "") -> None:
        from torchvision import models  # type: ignore[import-untyped]

        self.description = TORCHVISION + name
        known = models.list_models(module=models)
        if name not in known:
            raise ValueError(_unknown(self.description, name, known))
        released = models.get_model_weights(name).DEFAULT
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(UNTRAINED_SEED)
            network = models.get_model(name, weights=None)
        linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError(f"--encoder {self.description}: it has no linear classifier whose input could be `cls`")
        if hasattr(network, "transform_input"):  # released weights of these expect another mean and std than theirs
            network.transform_input = True
        network.set_submodule(linear[-1], nn.Identity())
        if weights != UNTRAINED:
            state = _torchvision_state(self.description, released, weights)
            state = {key: value for key, value in state.items() if not key.startswith(f"{linear[-1]}.")}
            _load(network, state, Path(weights or released.url))
        self.network = network.eval()
        self.origin = _origin(weights, f"pretrained, {released.name}")

        preset = released.transforms()
        own_size = preset.crop_size[0]
        self.image_size = image_size or own_size
        scaled = round(preset.resize_size[0] * self.image_size / own_size)
        self.preparation = _TorchvisionPreparation(scaled, self.image_size, preset.interpolation, preset.antialias)
        self.transform = _in_words(
            f"shorter side to {scaled} px ({preset.interpolation.value}), centre crop {self.image_size} px",
            preset.mean,
            preset.std,
        )
        self._normalize = partial(_normalize, mean=preset.mean, std=preset.std)
        if self.image_size != own_size:
            _check_takes(self, lambda images: self.embed(images, ["cls"]))

    def embed(self, images: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
        features = self.network(self._normalize(images)).float()  # [B, D]
        return dict.fromkeys(kinds, features)


class BaselineEncoder(Encoder):
    """A description of the picture that needs no network (`baselines`); `cls` is all of it."""

    def __init__(self, name: str) -> None:
        describe, self.transform, self.image_size = _BASELINES[name]
        self.network = nn.Identity()
        self.preparation = _BaselinePreparation(describe)
        self.description = name
        self.origin = "no weights"

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(f"{self.description}: {self.transform}".encode()).hexdigest()

    def embed(self, images: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
        return dict.fromkeys(kinds, images.float())


_BASELINES: dict[str, tuple[Description, str, int]] = {
    "histogram": (
        histogram_of,
        f"RGB, centre {CENTRE_SHARE:g} of each side, {BINS} x {BINS} x {BINS} HSV bins, square root of their shares",
        0,
    ),
    "pixels": (pixels_of, f"RGB, shorter side to {PIXELS_SIDE} px (Lanczos), centre crop, 0 to 1", PIXELS_SIDE),
}


def encoder_name(text: str) -> str:
    """`text`, if it reads like the name of an encoder; ValueError otherwise."""
    if text in _BASELINES or any(text.startswith(prefix) and text != prefix for prefix in (TIMM, TORCHVISION)):
        return text
    raise ValueError(
        f"encoder: {text!r} is unknown; there are timm:<model>, torchvision:<model>, {', '.join(sorted(_BASELINES))}"
    )


def build_encoder(name: str, image_size: int = 0, weights: str = "") -> Encoder:
    """The encoder of this name.

    Args:
        name: `timm:<model>`, `torchvision:<model>`, `pixels` or `histogram`.
        image_size: S; 0 for its own.
        weights: a file with a state dict, "untrained", or "" for the library's pretrained ones.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: as `TimmEncoder`; and for a size or weights with a baseline.
    """
    encoder_name(name)
    if weights not in ("", UNTRAINED) and not Path(weights).is_file():
        raise FileNotFoundError(f"--encoder-weights: no file {weights!r}; give one, or the word {UNTRAINED}")
    if name.startswith(TIMM):
        return TimmEncoder(name.removeprefix(TIMM), image_size, weights)
    if name.startswith(TORCHVISION):
        return TorchvisionEncoder(name.removeprefix(TORCHVISION), image_size, weights)
    if image_size or weights:
        raise ValueError(f"--encoder {name}: it has no weights and one image size; drop --encoder-weights/--image-size")
    return BaselineEncoder(name)


def state_sha256(network: nn.Module) -> str:
    """Of a network's tensors with their names, types and shapes, whatever file they were in."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_divisible(image_size: int, patch_size: int) -> None:
    """Refuse pictures that patches do not fill."""
    if image_size < patch_size or image_size % patch_size:
        below, above = image_size // patch_size * patch_size, -(-image_size // patch_size) * patch_size
        raise ValueError(
            f"--image-size {image_size}: the network's patches of {patch_size} px do not fill it; take "
            f"{f'{below} or {above}' if below else above}"
        )


def _of_kinds(
    kinds: Sequence[str], pooled: Tensor, cls_tokens: Sequence[Tensor], patch_tokens: Tensor
) -> dict[str, Tensor]:
    """From tokens to kinds.

    Args:
        kinds: those wanted.
        pooled: [B, D], what `cls` is.
        cls_tokens: [B, D] each, of the last blocks.
        patch_tokens: [B, P, D] of the last block, of a square grid.
    """
    found = {}
    for kind in map(Kind.parse, kinds):
        if kind.is_grid:
            side = math.isqrt(patch_tokens.shape[1])
            found[kind.name] = patch_tokens.unflatten(1, (side, side)).half()  # [B, h, w, D]
            continue
        parts = [pooled] if kind.has_cls else list(cls_tokens[len(cls_tokens) - kind.n_last :])
        parts = [part.float() for part in parts]
        if kind.has_mean:
            parts.append(patch_tokens.float().mean(dim=1))  # [B, D]
        found[kind.name] = torch.cat(parts, dim=1)
    return found


# Preparations go to other processes, so they are objects that can be pickled


class _TimmPreparation:
    def __init__(self, transform: Callable[[Image.Image], Any]) -> None:
        self.transform = transform

    def __call__(self, picture: np.ndarray) -> Tensor:
        image = Image.fromarray(picture)
        return torch.as_tensor(self.transform(image)).contiguous()  # uint8 [3, S, S]; a NumPy array in older releases


class _TorchvisionPreparation:
    def __init__(self, scaled: int, crop: int, interpolation: Any, antialias: bool | None) -> None:
        self.scaled, self.crop, self.interpolation, self.antialias = scaled, crop, interpolation, antialias

    def __call__(self, picture: np.ndarray) -> Tensor:
        from torchvision.transforms import functional  # type: ignore[import-untyped]

        image = Image.fromarray(picture)
        image = functional.resize(image, [self.scaled], interpolation=self.interpolation, antialias=self.antialias)
        return functional.pil_to_tensor(functional.center_crop(image, [self.crop]))  # uint8 [3, S, S]


class _BaselinePreparation:
    def __init__(self, describe: Description) -> None:
        self.describe = describe

    def __call__(self, picture: np.ndarray) -> Tensor:
        return torch.from_numpy(self.describe(picture))  # [D]


def _normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x / 255 - mean) / std of uint8 [B, 3, S, S]."""
    means, deviations = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return (images / 255).sub_(means).div_(deviations)


def _in_words(geometry: str, mean: Sequence[float], std: Sequence[float]) -> str:
    means, deviations = (" ".join(f"{value:.4g}" for value in values) for values in (mean, std))
    return f"RGB, {geometry}, mean {means}, std {deviations}"


def _origin(weights: str, pretrained: str) -> str:
    if weights == UNTRAINED:
        return f"untrained, seed {UNTRAINED_SEED}"
    return os.path.abspath(weights) if weights else pretrained


def _unknown(description: str, name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=5)
    return f"--encoder {description}: there is no such model" + (f"; perhaps {', '.join(close)}" if close else "")


def _check_takes(encoder: Encoder, forward: Callable[[Tensor], Any]) -> None:
    """Try a picture of a size that is not the network's own."""
    side = encoder.image_size
    try:
        with torch.no_grad():
            forward(torch.zeros(1, 3, side, side, dtype=torch.uint8))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"--image-size {side}: {encoder.description} cannot take it ({error}); leave it out for its own"
        ) from error


def _timm() -> Any:
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise ValueError(
            f"--encoder timm:...: the package timm cannot be imported here ({error}); run `pip install timm`"
        ) from error
    return timm


def _timm_network(timm: Any, name: str, image_size: int, weights: str) -> Any:
    plain_name = name.partition(".")[0]
    if ":" not in name and not timm.is_model(plain_name):
        raise ValueError(_unknown(TIMM + name, plain_name, timm.list_models()))
    settings: dict[str, Any] = {"num_classes": 0}
    if image_size and ":" not in name and getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
        settings["img_size"] = image_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED_SEED)
        try:
            network = timm.create_model(name, pretrained=not weights, **settings)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(f"--encoder {TIMM}{name}: timm does not build it: {error}") from error
        except OSError as error:  # of the hub's client and of the network
            raise ConnectionError(
                f"--encoder {TIMM}{name}: its pretrained weights are not here and cannot be downloaded "
                f"({_first_line(error)}); on a machine with access fetch {_where_timm_has_it(timm, name)}"
            ) from error
    if weights not in ("", UNTRAINED):
        state = _unwrapped(read_weights_file(Path(weights)))
        # what the library does to files of other layouts and to position embeddings of another grid
        adapt = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
        state = dict(adapt(state, network)) if adapt is not None else state
        classifier = network.pretrained_cfg.get("classifier") or ()
        heads = tuple(f"{head}." for head in ((classifier,) if isinstance(classifier, str) else classifier))
        state = {key: value for key, value in state.items() if not (heads and key.startswith(heads))}
        _load(network, state, Path(weights))
    return network.eval()


def _gives_tokens(network: Any) -> bool:
    """Whether a network of timm is a plain ViT, whose `forward_features` gives prefix tokens and patch tokens."""
    forward = getattr(network, "forward_intermediates", None)
    has_parts = all(hasattr(network, name) for name in ("num_prefix_tokens", "blocks", "patch_embed"))
    return has_parts and forward is not None and "return_prefix_tokens" in inspect.signature(forward).parameters


def _where_timm_has_it(timm: Any, name: str) -> str:
    """What to fetch, and how to pass it."""
    if ":" in name:
        return "the whole repository, and give it as --encoder timm:local-dir:<folder>"
    hub = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None)
    if hub is None:
        return "its file, and pass that as --encoder-weights"
    return f"model.safetensors from https://huggingface.co/{hub}, and pass that as --encoder-weights"


def _torchvision_state(description: str, released: Any, weights: str) -> dict[str, Tensor]:
    content = read_weights_file(Path(weights)) if weights else _downloaded(description, released)
    # the released DenseNets are from a time when names of modules could have dots
    old_name = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d\.)")
    return {old_name.sub(r"\1\2", key): value for key, value in _unwrapped(content).items()}


def _downloaded(description: str, released: Any) -> Mapping[str, Any]:
    try:
        return released.get_state_dict(progress=False, check_hash=True)
    except OSError as error:  # urllib's
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise ConnectionError(
            f"--encoder {description}: its pretrained weights are not in {str(folder)!r} and cannot be downloaded "
            f"({_first_line(error)}); fetch {released.url} on a machine with access and pass it as --encoder-weights"
        ) from error


def _load(network: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    """Give a network all of its tensors; ValueError if these are not just them."""
    wanted = network.state_dict()
    # counts of batches, which eval mode does not use and files from before torch 0.4.1 do not have
    counts = {key: value for key, value in wanted.items() if key.endswith(".num_batches_tracked")}
    state = {**counts, **state}
    check_names_and_shapes(wanted, state, file)
    network.load_state_dict(state)


def _unwrapped(content: Mapping[str, Any]) -> dict[str, Tensor]:
    while inner := next(
        (content[key] for key in ("state_dict", "model") if isinstance(content.get(key), Mapping)), None
    ):
        content = inner
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""An encoder with a linear classifier of its features: what of it learns, its probabilities, and its file.

Dimension key:  B images, S image side, N images of a list, F features of an image, C classes
"""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor, nn

from dinov2.distributed import all_gather_objects, get_rank, get_world_size
from dinov2.eval.features.encoders import DinoEncoder, Encoder
from dinov2.eval.features.extract import extract
from dinov2.eval.features.named_encoders import TimmEncoder, build_encoder
from dinov2.hub.adapters import add_adapters, merge_adapters
from dinov2.hub.backbones import checkpoint_file, load_backbone
from dinov2.hub.classifiers import CLASSIFIER, KINDS, Classifier, read_classifier
from dinov2.hub.weight_files import read_weights_file
from dinov2.models import architecture
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.files import PathLike
from dinov2.utils.param_groups import layer_of

logger = logging.getLogger("dinov2")

Mode = Literal["full", "last-n", "lora", "head"]
LORA_LAYERS = re.compile(r"(^|\.)attn\.(qkv|proj)$")  # of our networks and of timm's ViTs
LORA_SCALING = 2.0  # alpha / rank


class ImageClassifier(nn.Module):
    """Logits of images: W x + b of one kind of an encoder's features x [F]."""

    centre: Tensor  # [F]
    whitening: Tensor  # [F, F]

    def __init__(self, encoder: Encoder, kind: str, class_names: Sequence[str]) -> None:
        """Start with a random classifier; ValueError for an encoder or a kind that cannot learn."""
        super().__init__()
        if not isinstance(encoder, DinoEncoder | TimmEncoder):
            raise ValueError(
                f"--encoder {encoder.description}: only a --checkpoint or a timm:<model> can learn; evaluate "
                f"this one by knn.py or linear.py"
            )
        if kind not in KINDS:
            raise ValueError(f"--kinds {kind}: a classifier takes one of {', '.join(KINDS)}")
        encoder.check([kind])
        self.encoder, self.network, self.kind = encoder, encoder.network, kind
        self.class_names = list(class_names)
        self.head = nn.Linear(_n_features(encoder, kind), len(class_names))
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        n_features = self.head.in_features
        self.register_buffer("centre", torch.zeros(n_features))
        self.register_buffer("whitening", torch.eye(n_features))
        self.lora_scaling = 0.0

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits, float32 [B, C], of images that the encoder's preparation made."""
        return self.logits(self.encoder.embed(images, [self.kind])[self.kind])

    def logits(self, features: Tensor) -> Tensor:
        """Compute the logits, float32 [B, C], of the encoder's features [B, F]."""
        return self.head((features - self.centre) @ self.whitening).float()

    def whiten(self, features: np.ndarray) -> None:
        """Let the classifier learn in whitened features, with the statistics of the features [N, F] of its images.

        A few directions have nearly all variance of a network's features, and classes also differ in the others, in
        which gradients are small. The covariance is Ledoit and Wolf's (2004), which few images do not mislead.
        """
        estimate = LedoitWolf().fit(features.astype(np.float64))
        variances, directions = np.linalg.eigh(estimate.covariance_)
        scale = 1 / np.sqrt(variances.clip(min=1e-12))
        self.centre.copy_(torch.from_numpy(estimate.location_))
        self.whitening.copy_(torch.from_numpy((directions * scale) @ directions.T))

    @torch.no_grad()
    def fold_whitening(self) -> None:
        """Let the classifier take the features as they are, with the same logits."""
        weight = self.head.weight.double() @ self.whitening.double()  # [C, F]
        bias = self.head.bias.double() - weight @ self.centre.double()
        self.head.weight.copy_(weight)
        self.head.bias.copy_(bias)
        self.centre.zero_()
        self.whitening.copy_(torch.eye(len(self.centre)))

    def limit_learning(self, mode: Mode, last_blocks: int, lora_rank: int) -> None:
        """Let the whole network learn, its last blocks, adapters of its attention, or the classifier alone."""
        depths = layers_from_end(self.network)
        if mode == "last-n" and last_blocks > (deepest := max(depths.values()) - 1):
            raise ValueError(f"--last-blocks {last_blocks}: the network has {deepest}; take fewer, or --mode full")
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(mode == "full" or (mode == "last-n" and depths[name] <= last_blocks))
        if isinstance(self.network, DinoVisionTransformer):
            self.network.mask_token.requires_grad_(False)  # images have no masks here
        if mode == "lora":
            layers = [name for name, module in self.network.named_modules() if isinstance(module, nn.Linear)]
            layers = [name for name in layers if LORA_LAYERS.search(name)]
            if not layers:
                raise ValueError(f"--mode lora: {self.encoder.description} has no attention; take full, last-n or head")
            add_adapters(self.network, layers, lora_rank, LORA_SCALING * lora_rank, setting="--mode lora")
            self.lora_scaling = LORA_SCALING

    def set_drop_path(self, rate: float) -> None:
        """Set stochastic depth: 0 in the first block to `rate` in the last one; timm's networks keep their own."""
        if isinstance(self.network, DinoVisionTransformer):
            for i, block in enumerate(blocks := list(self.network.each_block())):
                block.sample_drop_ratio = rate * i / max(1, len(blocks) - 1)

    def train_learned(self) -> None:
        """Set train mode, but eval mode for modules that do not learn, such as frozen blocks and batch norms."""
        self.train()
        for module in self.network.modules():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()

    def parameter_groups(
        self, weight_decay: float, layer_decay: float, head_lr_multiplier: float
    ) -> list[dict[str, Any]]:
        """Return groups for an optimizer, each with its `lr_multiplier`; vectors have no weight decay."""
        depths = layers_from_end(self.network)
        groups = [
            {
                "params": [parameter],
                "weight_decay": weight_decay if parameter.ndim > 1 else 0.0,
                "lr_multiplier": layer_decay ** depths.get(name, 0),  # adapters have none
            }
            for name, parameter in self.network.named_parameters()
            if parameter.requires_grad
        ]
        head = {"params": [self.head.weight], "weight_decay": weight_decay, "lr_multiplier": head_lr_multiplier}
        return [*groups, head, {**head, "params": [self.head.bias], "weight_decay": 0.0}]

    def learned_state(self) -> dict[str, Tensor]:
        """Return the tensors that training changes: parameters that learn, and buffers."""
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        return {name: value for name, value in self.state_dict().items() if name not in frozen}

    def content(self) -> dict[str, Any]:
        """Return what a file of this classifier holds, adapters merged, after `fold_whitening`."""
        state = merge_adapters(self.network.state_dict(), self.lora_scaling)
        state = {name: value.detach().cpu().clone() for name, value in state.items()}
        own: dict[str, Any] = {"state_dict": state, "encoder": self.encoder.description}
        if isinstance(self.network, DinoVisionTransformer):
            own = {"model": state, "architecture": architecture(self.network)}
        classifier = Classifier(self.head.weight, self.head.bias, self.class_names, self.kind)
        return {**own, "image_size": self.encoder.image_size, CLASSIFIER: classifier.content()}

    def start_head(self, classifier: Classifier, path: PathLike) -> None:
        """Start from another classifier, whose classes may be in another order; ValueError if it lacks some."""
        if missing := [name for name in self.class_names if name not in classifier.class_names]:
            raise ValueError(
                f"checkpoint {path}: its classifier has {len(classifier.class_names)} classes and lacks "
                f"{', '.join(map(repr, missing[:8]))}; pass --new-head to start with a new one for all "
                f"{len(self.class_names)} classes"
            )
        if classifier.kind != self.kind:
            raise ValueError(
                f"checkpoint {path}: its classifier takes features of kind {classifier.kind}; pass --kinds "
                f"{classifier.kind}, or --new-head"
            )
        rows = [classifier.class_names.index(name) for name in self.class_names]
        with torch.no_grad():
            weight, bias = classifier.weight[rows].double(), classifier.bias[rows].double()
            self.head.weight.copy_(weight @ torch.linalg.inv(self.whitening.double()))
            self.head.bias.copy_(bias + weight @ self.centre.double())


def layers_from_end(network: nn.Module) -> dict[str, int]:
    """Return {parameter: depth}: 0 after the blocks, 1 for the last block, and so on, to the embeddings."""
    names = [name for name, _ in network.named_parameters()]
    if isinstance(network, DinoVisionTransformer):
        return {name: network.n_blocks + 1 - layer_of(name, network.n_blocks) for name in names}
    from timm.models import group_parameters

    layers = group_parameters(network, network.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    last = max(layers.values())
    return {name: last + 1 - layers[name] for name in names}  # timm counts the norm to the last block


def _n_features(encoder: Encoder, kind: str) -> int:
    side = encoder.image_size
    black = encoder.preparation(np.zeros((side, side, 3), np.uint8))[None]
    device = next(encoder.network.parameters()).device
    with torch.no_grad():
        return encoder.embed(black.to(device), [kind])[kind].shape[1]


# --- its file -------------------------------------------------------------------------------------------------------


def load_classifier(source: PathLike, image_size: int = 0) -> ImageClassifier:
    """Read what `ImageClassifier.content` gave, in eval mode on the CPU.

    The source is as for `load_backbone`; `image_size` 0 is that of the training. ValueError: it has no classifier.
    """
    path = checkpoint_file(source)
    classifier = read_classifier(path)
    if classifier is None:
        raise ValueError(f"--checkpoint {path}: it has no classifier; finetune.py writes a file with one")
    model = ImageClassifier(_read_encoder(path, image_size), classifier.kind, classifier.class_names)
    if model.head.weight.shape != classifier.weight.shape:
        shapes = f"{list(classifier.weight.shape)} instead of {list(model.head.weight.shape)}"
        raise ValueError(f"checkpoint {path}: its classifier does not fit its network: weight {shapes}; copy it again")
    model.start_head(classifier, path)
    return model.eval()


def _read_encoder(path: Path, image_size: int) -> Encoder:
    content = read_weights_file(path) if path.is_file() else {}
    name, trained = content.get("encoder"), content.get("image_size")
    size = image_size or (trained if isinstance(trained, int) else 0)
    if isinstance(name, str):
        return build_encoder(name, size, str(path))
    network = load_backbone(path, size or None)
    return DinoEncoder(network, int(architecture(network)["img_size"]), path)


# --- probabilities --------------------------------------------------------------------------------------------------


class _Probabilities(Encoder):
    """The probabilities of a classifier in the place of features: the extraction loop computes them."""

    def __init__(self, model: ImageClassifier, with_views: bool) -> None:
        self.network, self.with_views = model, with_views
        encoder = model.encoder
        self.preparation, self.transform, self.image_size = encoder.preparation, encoder.transform, encoder.image_size
        self.description, self.origin = encoder.description, encoder.origin

    def check(self, kinds: Sequence[str]) -> None:
        pass

    def embed(self, images: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
        views = list(dihedral_views(images)) if self.with_views else [images]
        probabilities = torch.stack([self.network(view).softmax(dim=1) for view in views]).mean(dim=0)  # [B, C]
        return dict.fromkeys(kinds, probabilities)


def dihedral_views(images: Tensor) -> Iterator[Tensor]:
    """Yield the eight views of square images [B, 3, S, S] by quarter turns and a flip, the images themselves first."""
    for n_turns in range(4):
        turned = images.rot90(n_turns, (2, 3))
        yield turned
        yield turned.flip(3)


def predict_images(
    model: ImageClassifier, paths: Sequence[str], with_views: bool = False, **options: Any
) -> np.ndarray:
    """Return the probabilities of image files, float64 [N, C]; the processes of a group share them.

    `with_views` averages over the eight views of `dihedral_views`; `options` are fields of `ExtractOptions`. ValueError
    names an image that cannot be read.
    """
    rank, world_size = get_rank(), get_world_size()
    own = [Path(path) for path in paths[rank::world_size]]
    found = extract(_Probabilities(model, with_views), own, **options) if own else None
    unreadable = [path for of_rank in all_gather_objects(list(found.unreadable) if found else []) for path in of_rank]
    if unreadable:
        raise ValueError(
            f"images: {len(unreadable)} can no longer be read, for instance {unreadable[0]!r}; put it back"
        )
    parts = all_gather_objects(found.features if found else np.empty((0, len(model.class_names)), np.float32))
    probabilities = np.empty((len(paths), len(model.class_names)))
    for i, part in enumerate(parts):
        probabilities[i::world_size] = part
    return probabilities / probabilities.sum(axis=1, keepdims=True)

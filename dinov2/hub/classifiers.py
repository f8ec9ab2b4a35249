"""What fine-tuning writes beside a network: a linear classifier of its features, and which images it learned from.

Letters: B images, P patches, D embedding dim, C classes, F features of a cell (D for `cls` and `mean`, 2 D for
`cls+mean`), N images
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.hub.backbones import load_backbone
from dinov2.hub.descriptions import CONFIG_FILE, read_json
from dinov2.hub.sources import FOLDER_WEIGHTS, checkpoint_file
from dinov2.hub.weight_files import read_weights_file, to_fp32
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.files import PathLike, file_sha256

CLASSIFIER, SEEN = "classifier", "seen"  # keys of a file
SEEN_BYTES = 16  # of the sha256 of each image that a network learned from, validation included
KINDS = ("cls", "mean", "cls+mean")  # of features that a classifier can take


@dataclass(frozen=True, eq=False)
class Classifier:
    """logits = W x + b of the features x of a cell."""

    weight: Tensor  # float32 [C, F]
    bias: Tensor  # float32 [C]
    class_names: list[str]
    kind: str  # of the features, one of KINDS

    def content(self) -> dict[str, Any]:
        """Return what a file has under the key `classifier`."""
        weight, bias = (value.detach().float().cpu().clone() for value in (self.weight, self.bias))
        return {"weight": weight, "bias": bias, "class_names": list(self.class_names), "kind": self.kind}

    def logits(self, cls_token: Tensor, patch_tokens: Tensor) -> Tensor:
        """Compute the logits [B, C] of CLS tokens [B, D] and patch tokens [B, P, D], both after the last norm."""
        parts = {"cls": cls_token, "mean": patch_tokens.mean(dim=1)}
        features = torch.cat([parts[part] for part in self.kind.split("+")], dim=1)  # [B, F]
        return nn.functional.linear(features, self.weight, self.bias)

    def weight_of_both(self) -> Tensor:
        """Return the weight [C, 2 D] for `cls+mean`, with zeros for features that the classifier does not take."""
        zeros = torch.zeros_like(self.weight)
        halves = {"cls": [self.weight, zeros], "mean": [zeros, self.weight], "cls+mean": [self.weight]}
        return torch.cat(halves[self.kind], dim=1)


@dataclass(frozen=True, eq=False)
class Network:
    """A backbone, and the classifier if it was fine-tuned."""

    backbone: DinoVisionTransformer
    classifier: Classifier | None = None


def load_network(source: PathLike, img_size: int | None = None) -> Network:
    """Load backbone and classifier; for sources, image size and errors see `load_backbone`."""
    backbone, classifier = load_backbone(source, img_size), read_classifier(checkpoint_file(source))
    if classifier is not None:
        n_features = backbone.embed_dim * len(classifier.kind.split("+"))
        if classifier.weight.shape[1] != n_features:
            raise ValueError(
                f"checkpoint {source}: its classifier takes {classifier.weight.shape[1]} features, and the network has "
                f"{n_features} of the kind {classifier.kind}; run finetune.py again"
            )
    return Network(backbone, classifier)


def read_classifier(path: Path) -> Classifier | None:
    """Read the classifier of a file that `checkpoint_file` returned; None if it has none.

    That of a folder of transformers takes `cls+mean`, with zeros for features that do not count.

    ValueError: it is damaged, or not what fine-tuning writes.
    """
    if path.is_dir() or (path.suffix == ".safetensors" and path.name not in FOLDER_WEIGHTS):
        return None
    stored, config = read_weights_file(path), path.with_name(CONFIG_FILE)
    content = stored.get(CLASSIFIER)
    if path.name in FOLDER_WEIGHTS and f"{CLASSIFIER}.weight" in stored and config.is_file():
        labels = read_json(config).get("id2label")
        names = [labels.get(str(i)) for i in range(len(labels))] if isinstance(labels, dict) else []
        content = {name: stored.get(f"{CLASSIFIER}.{name}") for name in ("weight", "bias")}
        content |= {"class_names": names, "kind": "cls+mean"}
    return classifier_of(content, path) if isinstance(content, Mapping) else None


def classifier_of(content: Mapping[str, Any], path: Path) -> Classifier:
    """Check the mapping under `classifier` in the file at `path`."""
    weight, bias, names, kind = (content.get(name) for name in ("weight", "bias", "class_names", "kind"))
    if isinstance(weight, Tensor) and isinstance(bias, Tensor):
        weight, bias = to_fp32([("classifier.weight", weight), ("classifier.bias", bias)], path).values()
        if (
            isinstance(names, list)
            and all(isinstance(name, str) for name in names)
            and 0 < len(set(names)) == len(names)
            and weight.ndim == 2
            and weight.shape[:1] == bias.shape == (len(names),)
            and bool(weight.isfinite().all() and bias.isfinite().all())
            and kind in KINDS
        ):
            return Classifier(weight.contiguous(), bias.contiguous(), names, kind)
    raise ValueError(
        f"checkpoint {path}: its classifier is damaged: expected finite weight [C, F] and bias [C], C different "
        f"class_names (id2label of a Hugging Face folder) and a kind out of {', '.join(KINDS)}; run finetune.py again"
    )


def read_seen(networks: Iterable[Path]) -> set[bytes]:
    """Read the digests of the images that at least one network learned from, for `seen_images`.

    The networks are files that `checkpoint_file` returned; those that fine-tuning did not write have none. ValueError:
    a file's list of seen images is damaged.
    """
    seen: set[bytes] = set()
    for path in networks:
        stored = {} if path.is_dir() or path.suffix == ".safetensors" else read_weights_file(path)
        digests = stored.get(SEEN, torch.empty((0, SEEN_BYTES), dtype=torch.uint8))
        if not (isinstance(digests, Tensor) and digests.dtype == torch.uint8 and digests.shape[1:] == (SEEN_BYTES,)):
            raise ValueError(
                f"checkpoint {path}: its list of seen images is damaged: expected uint8 [n, {SEEN_BYTES}]; copy the "
                f"file again, or run finetune.py again"
            )
        seen.update(map(bytes, digests.tolist()))
    return seen


def seen_images(seen: set[bytes], images: Sequence[PathLike]) -> np.ndarray:
    """Return which images are among those that `read_seen` read, by their bytes: bool [N]."""
    if not seen:
        return np.zeros(len(images), dtype=bool)
    return np.array([bytes.fromhex(file_sha256(image))[:SEEN_BYTES] in seen for image in images], dtype=bool)

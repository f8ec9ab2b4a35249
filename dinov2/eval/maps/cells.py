"""Maps of image files: choose cells, compute their maps, and turn maps into colours.

Dimension key:  N images, S side in pixels, h x w patches, P = h * w
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bokeh.palettes import Viridis256

from dinov2.data.datasets import LabelledCells, find_images
from dinov2.data.datasets.decode import UnreadableImageError, decode_image
from dinov2.data.transforms import normalize_images
from dinov2.eval.extract_features import CELLS_HELP
from dinov2.eval.features.encoders import check_divisible
from dinov2.eval.features.extract import Embedder
from dinov2.eval.maps import patch_maps
from dinov2.hub.backbones import ImageTransform
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.command import progress_bar

logger = logging.getLogger("dinov2")

# The similarities of a cell take up to P * P bytes of the page before compression: 3.4 MB of text for this many patches
MAX_PATCHES = 1600
TITLES = {
    "pca": "PCA of patch tokens",
    "attention": "CLS attention, mean of heads",
    "rollout": "attention rollout",
    "occlusion": "occlusion",
}
PALETTE = np.array([list(bytes.fromhex(colour[1:])) for colour in Viridis256], dtype=np.uint8)  # [256, 3]


@dataclass(frozen=True, eq=False)
class CellMaps:
    """Maps of N images; `colours` gives them as images."""

    names: list[str]
    images: np.ndarray  # uint8 [N, S, S, 3], before normalisation
    pca: np.ndarray  # uint8 [N, h, w, 3]
    attention: np.ndarray  # float32 [N, heads, h, w], of the last block's CLS token
    rollout: np.ndarray  # float32 [N, h, w]
    similarity: np.ndarray  # uint8 [N, P, P]; round((c + 1) * 127.5) of cosine c
    occlusion: np.ndarray | None = None  # float32 [N, h, w], 1 - cosine of the CLS token
    unreadable: dict[str, str] = field(default_factory=dict)  # {path: reason} of images that were left out
    pca_per_image: bool = False  # then `pca` cannot be compared between images

    def __len__(self) -> int:
        return len(self.names)

    @property
    def grid(self) -> tuple[int, int]:
        """Return h and w."""
        return self.rollout.shape[1], self.rollout.shape[2]

    def colours(self) -> dict[str, np.ndarray]:
        """Return {kind: uint8 [N, h, w, 3]} for each computed kind of `TITLES`."""
        numbers = {"attention": self.attention.mean(axis=1), "rollout": self.rollout, "occlusion": self.occlusion}
        return {"pca": self.pca, **{kind: colour_map(maps) for kind, maps in numbers.items() if maps is not None}}


def levels(maps: np.ndarray) -> np.ndarray:
    """Scale each map [..., h, w] from its lowest (0) to its highest value (255), uint8; a uniform map is 0."""
    low, high = (edge(maps, axis=(-2, -1), keepdims=True) for edge in (np.min, np.max))
    return np.rint(255 * (maps - low) / np.where(high > low, high - low, 1)).astype(np.uint8)


def colour_map(maps: np.ndarray) -> np.ndarray:
    """Return the colours of the `levels` of maps [..., h, w]: uint8 [..., h, w, 3], dark to bright."""
    return PALETTE[levels(maps)]


def make_cell_maps(
    model: DinoVisionTransformer,
    paths: Sequence[Path],
    image_size: int,
    *,
    names: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    with_occlusion: bool = True,
    per_image: bool = False,
    foreground: bool = False,
) -> CellMaps:
    """Compute all maps of image files; unreadable files are left out and logged.

    Args:
        model: the backbone; it is moved to `device` and put in eval mode.
        paths: image files, at least one.
        image_size: S; more patches than in training show finer detail, by interpolated position embeddings.
        names: N texts to show; None for folder and file name.
        device: of the network.
        with_occlusion: also compute occlusion, which is slow: about a hundred forward passes per image.
        per_image, foreground: see `pca_colours`.
    """
    check_divisible(image_size, model.patch_size)
    largest = int(MAX_PATCHES**0.5) * model.patch_size
    if image_size > largest:
        raise ValueError(
            f"--image-size {image_size}: the similarities of {(image_size // model.patch_size) ** 2} patches to each "
            f"other are too many for a page; choose {largest} or less"
        )
    model.to(device).eval()
    transform = ImageTransform(image_size)
    names = names or [f"{path.parent.name}/{path.name}" for path in paths]
    kept_names: list[str] = []
    maps: dict[str, list[Any]] = defaultdict(list)
    unreadable: dict[str, str] = {}
    for path, name in zip(progress_bar(paths, "cell maps"), names, strict=True):
        try:
            image = transform.resize(decode_image(path))  # uint8 [3, S, S]
        except UnreadableImageError as error:
            unreadable[str(path)] = error.reason
            logger.warning("left out: %s: %s", path, error.reason)
            continue
        batch = normalize_images(image[None]).to(device)  # [1, 3, S, S]
        tokens = patch_maps.patch_tokens(model, batch)  # [1, h, w, D]
        kept_names.append(name)
        maps["images"].append(image.permute(1, 2, 0))
        maps["tokens"].append(tokens[0].cpu())
        maps["attention"].append(patch_maps.cls_attention(model, batch)[0].cpu())
        maps["rollout"].append(patch_maps.attention_rollout(model, batch)[0].cpu())
        maps["similarity"].append(((patch_maps.similarity_maps(tokens)[0].cpu() + 1) * 127.5).round().to(torch.uint8))
        if with_occlusion:
            likeness = patch_maps.likeness_to(model, batch[0])
            maps["occlusion"].append(patch_maps.occlusion_map(likeness, batch[0], model.patch_size))
    if not kept_names:
        raise ValueError(f"images: none of the {len(paths)} could be read; the log gives reasons")
    arrays = {kind: torch.stack(values).numpy() for kind, values in maps.items()}
    pca = patch_maps.pca_colours(arrays.pop("tokens"), per_image=per_image, foreground=foreground)
    return CellMaps(names=kept_names, pca=pca, unreadable=unreadable, pca_per_image=per_image, **arrays)


def backbone_of(embedder: Embedder) -> DinoVisionTransformer:
    """Return the backbone of an embedder; ValueError if cell maps cannot be made of it."""
    network = embedder.encoder.network
    if not isinstance(network, DinoVisionTransformer):
        raise ValueError(
            f"--encoder {embedder.encoder_name}: cell maps need a backbone of this project or of DINOv2's kind; "
            f"give --checkpoint"
        )
    return network


def choose_images(data: Path, n: int) -> tuple[list[Path], list[str]]:
    """Choose up to n images of all classes in turn, evenly spread within each class; return paths and names to show.

    `data` is a folder, where the class of an image is its parent folder, or a CSV of labelled cells.
    """
    classes: dict[str, list[Path]] = defaultdict(list)
    if data.is_dir():
        for path in find_images(data):
            classes[path.parent.name].append(path)
    else:
        cells = LabelledCells.from_path(data)
        for path, label in zip(cells.paths, cells.labels.tolist(), strict=True):
            classes[cells.class_names[label]].append(path)
    if not classes:
        raise ValueError(f"--data: no image in {str(data)!r}; give {CELLS_HELP}")
    turns = zip_longest(*([name] * len(paths) for name, paths in classes.items()))
    counts = Counter([name for turn in turns for name in turn if name is not None][:n])
    chosen = [
        paths[int((i + 0.5) * len(paths) / counts[name])]
        for name, paths in classes.items()
        for i in range(counts[name])
    ]
    return chosen, [f"{name}/{path.name}" for name, path in zip(counts.elements(), chosen, strict=True)]

"""Measure the data path against upstream's: images a second and core, and augmentation alone.

    python scripts/benchmarks/data.py --folder bench [--images <folder of cells>] [--only files augmentation]

  files         from image files to a normalised batch, without and with the packed cache, by recipe and format
  augmentation  the same images already decoded, without and with eight local crops

Upstream's way is Pillow and torchvision's transforms, with the local crop that DinoBloom's recipe makes and never
uses. Everything runs on one core, as in one worker of the DataLoader.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import cv2
import torch
from harness import Measured, Part, choose_images, make_parser, ratio, run_parts, seconds_of, table, take_turns
from PIL import Image
from torch import Tensor
from torchvision import transforms as tv

from dinov2.data import DataAugmentationDINO, DataAugmentationHEMA
from dinov2.data.datasets.decode import decode_image, load_image, resize_image
from dinov2.data.loaders import make_dataset
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize_images
from dinov2.utils.command import exit_code
from dinov2.utils.resources import keep_freed_memory

N_IMAGES, SIZE, LOCAL_SIZE = 64, 224, 98
SCALE, LOCAL_SCALE = (0.32, 1.0), (0.05, 0.32)
RECIPES = {"default": DataAugmentationDINO, "hema": DataAugmentationHEMA}
FORMATS = {"JPEG": (360, 363, ".jpg"), "BMP": (120, 120, ".bmp"), "PNG": (256, 256, ".png"), "TIFF": (400, 400, ".tif")}


def our_augmentation(recipe: str, n_local_crops: int = 0) -> Any:
    return RECIPES[recipe](SCALE, LOCAL_SCALE, n_local_crops, SIZE, LOCAL_SIZE, dtype=torch.uint8)


def our_batch(recipe: str, n_local_crops: int, images: Sequence[Tensor]) -> list[Tensor]:
    """Augment, stack and normalise, as a batch of training."""
    augmentation = our_augmentation(recipe, n_local_crops)
    samples = [augmentation(image, Random(i)) for i, image in enumerate(images)]
    crops = [[crop for key in ("global_crops", "local_crops") for crop in sample[key]] for sample in samples]
    return [normalize_images(torch.stack(stacked)) for stacked in zip(*crops, strict=True)]


def upstream_transforms(recipe: str, n_local_crops: int) -> list[Any]:
    """Return a transform of Pillow images for each crop, with the settings of our augmentation."""
    s = our_augmentation(recipe).settings

    def maybe(probability: float, transform: Any) -> Any:
        return tv.RandomApply([transform], p=probability)

    def view(kind: int, size: int, scale: tuple[float, float]) -> Any:
        return tv.Compose(
            [
                tv.RandomResizedCrop(size, scale, interpolation=tv.InterpolationMode.BICUBIC),
                *(tv.RandomHorizontalFlip(s.hflip_probability), tv.RandomVerticalFlip(s.vflip_probability)),
                maybe(s.quarter_turn_probability, lambda image: image.transpose(Image.Transpose.ROTATE_90)),
                maybe(s.rotation_probability, tv.RandomRotation((0, 360))),
                maybe(s.jitter_probability, tv.ColorJitter(s.brightness, s.contrast, s.saturation, s.hue)),
                tv.RandomGrayscale(s.grayscale_probability),
                maybe(s.blur_probability[kind], tv.GaussianBlur(s.blur_kernel_size, s.blur_sigma)),
                tv.RandomSolarize(s.solarize_threshold, s.solarize_probability[kind]),
                *(tv.ToTensor(), tv.Normalize(IMAGENET_MEAN, IMAGENET_STD)),
            ]
        )

    return [view(0, SIZE, SCALE), view(1, SIZE, SCALE), *[view(2, LOCAL_SIZE, LOCAL_SCALE)] * n_local_crops]


def upstream_batch(views: Sequence[Any], images: Sequence[Image.Image]) -> list[Tensor]:
    samples = [[view(image) for view in views] for image in images]
    return [torch.stack(crops) for crops in zip(*samples, strict=True)]


def measure_files(args: argparse.Namespace) -> Measured:
    write_formats(args.folder, choose_images(args, N_IMAGES))
    works: dict[str, dict[str, Callable[[], Any]]] = {}
    for recipe in RECIPES:
        for kind in FORMATS:
            dataset = f"HemaStandardDataset:root={args.folder / kind / 'list.txt'}"
            plain = make_dataset(dataset, image_size=SIZE)
            packed = make_dataset(f"{dataset}:cache={args.folder / 'cache'}", image_size=SIZE)
            packed.cache.build(n_workers=1)
            works[f"{recipe} {kind}"] = {
                "upstream": partial(upstream_files, recipe, [plain.path(i) for i in range(N_IMAGES)]),
                "no cache": partial(our_files, recipe, plain),
                "cache": partial(our_files, recipe, packed),
            }
    return compare("Images a second and core", works, args.rounds)


def upstream_files(recipe: str, paths: Sequence[Path]) -> list[Tensor]:
    images = [Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS) for path in paths]
    return upstream_batch(upstream_transforms(recipe, 1), images)


def our_files(recipe: str, dataset: Any) -> list[Tensor]:
    return our_batch(recipe, 0, [dataset[i].image for i in range(len(dataset))])


def measure_augmentation(args: argparse.Namespace) -> Measured:
    squares = [resize_image(decode_image(path), SIZE, "crop") for path in choose_images(args, N_IMAGES)]
    images = [Image.fromarray(square.permute(1, 2, 0).numpy()) for square in squares]
    works: dict[str, dict[str, Callable[[], Any]]] = {
        f"{recipe}, {n_local_crops or 'no'} local crops": {
            "upstream": partial(upstream_batch, upstream_transforms(recipe, n_local_crops), images),
            "ours": partial(our_batch, recipe, n_local_crops, squares),
        }
        for recipe in RECIPES
        for n_local_crops in (0, 8)
    }
    return compare("Augmentation alone", works, args.rounds)


def compare(title: str, works: dict[str, dict[str, Callable[[], Any]]], rounds: int) -> Measured:
    """Measure each case: upstream's images/s, and how many times as fast each other way is."""
    numbers, rows = {}, []
    for case, ways in works.items():
        seconds = take_turns({way: partial(seconds_of, work) for way, work in ways.items()}, rounds, case)
        upstream, *ours = seconds.values()
        rows.append(
            [case, f"{N_IMAGES / statistics.median(upstream):.0f}", *(f"{ratio(upstream, each)}x" for each in ours)]
        )
        numbers[case] = seconds
    _, *names = next(iter(works.values()))
    return numbers, {title: table(["recipe", "upstream: images/s", *names], rows)}


def write_formats(folder: Path, paths: Sequence[Path]) -> None:
    """Write the same images in each format and size, and a list of each."""
    for kind, (width, height, suffix) in FORMATS.items():
        (folder / kind).mkdir(exist_ok=True)
        for number, path in enumerate(paths):
            image = load_image(path).resize((width, height))
            if kind == "PNG":
                image.putalpha(255)
            image.save(folder / kind / f"{number:03d}{suffix}")
        (folder / kind / "list.txt").write_text("".join(f"{number:03d}{suffix}\n" for number in range(N_IMAGES)))


PARTS: dict[str, Part] = {"files": measure_files, "augmentation": measure_augmentation}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, PARTS, list(PARTS))
    parser.add_argument("--images", type=Path, help=f"folder of cells, of which {N_IMAGES} are taken; else drawn cells")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    keep_freed_memory()  # as training does
    run_parts(args, PARTS, "torchvision", "pillow", "opencv-python-headless")


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""Measure the data path against upstream's: images a second and core, augmentation alone, a list of a million paths.

    python scripts/benchmarks/data.py --folder bench [--images <folder of cells>] [--only files augmentation lists]

  files         from image files to a normalised batch, without and with the packed cache, by recipe and format
  augmentation  the same images already decoded, without and with eight local crops
  lists         opening a list, memory of the process, and of a worker that has looked up every path

Upstream's way is Pillow and torchvision's transforms, with the local crop that DinoBloom's recipe makes and never
uses. Everything runs on one core, as in one worker of the DataLoader.
"""

import argparse
import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import cv2
import torch
from harness import Part, Worker, make_parser, memory_mib, ratio, run_parts, seconds_of, table, take_turns
from PIL import Image
from torch import Tensor
from torchvision import transforms as tv

from dinov2.data import DataAugmentationDINO, DataAugmentationHEMA
from dinov2.data.datasets import find_images
from dinov2.data.datasets.decode import decode_image, load_image, resize_image
from dinov2.data.loaders import make_dataset
from dinov2.data.sample_cells import write_sample_cells
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize_images
from dinov2.utils.memory import keep_freed_memory

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


# --- parts -----------------------------------------------------------------------------------------------------------


def measure_files(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    write_formats(args.folder, args.images)
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


def measure_augmentation(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    squares = [resize_image(decode_image(path), SIZE, "crop") for path in chosen_images(args.folder, args.images)]
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


def compare(
    title: str, works: dict[str, dict[str, Callable[[], Any]]], rounds: int
) -> tuple[dict[str, Any], dict[str, str]]:
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


def measure_lists(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    folder = args.folder / "million"
    folder.mkdir(exist_ok=True)
    lines = [f"/data/prepared/set_{i % 15:02d}/slide_{i // 500:04d}/cell_{i:07d}.png\n" for i in range(args.n_listed)]
    lines[0] = f"{Path(__file__).absolute()}\n"  # a few of the files are looked for
    (folder / "all.txt").write_text("".join(lines))
    numbers, rows = {}, []
    for way in LISTS:
        worker = Worker(OpenedList, way, folder)
        numbers[way] = seconds, mib, worker_mib = worker.call("costs")
        worker.close()
        rows.append([way, f"{seconds:.1f} s", f"{mib:.0f} MiB", f"{worker_mib:.0f} MiB"])
    header = [f"a list of {args.n_listed:,} paths", "opened in", "memory of the process", "memory of each worker"]
    return numbers, {"Start-up": table(header, rows)}


class StringList:
    """Upstream's way: a Python list with a string an image."""

    def __init__(self, folder: Path) -> None:
        self.paths = [line.strip() for file in sorted(folder.glob("*.txt")) for line in file.open()]

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        return self.paths[index]


def our_list(folder: Path) -> Any:
    return make_dataset(f"HemaStandardDataset:root={folder}:shuffle=1")


LISTS: dict[str, Callable[[Path], Any]] = {"upstream": StringList, "ours": our_list}


class OpenedList:
    """A list in a process of its own, with a worker that looks up every path, as the DataLoader has."""

    def __init__(self, way: str, folder: Path) -> None:
        self.way, self.folder = way, folder

    def costs(self) -> tuple[float, float, float]:
        """Return the seconds to open the list, and the MiB that it adds to this process and to a worker."""
        before, opened = memory_mib(), []
        seconds = seconds_of(lambda: opened.append(LISTS[self.way](self.folder)))
        added = memory_mib() - before
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe()
        context.Process(target=send_memory, args=(opened[0], sender)).start()
        return seconds, added, receiver.recv()


def send_memory(dataset: Any, sender: Any) -> None:
    """Look up every path, and send the MiB that became this process's own."""
    before = private_mib()
    for index in range(len(dataset)):
        dataset.path(index)
    sender.send(private_mib() - before)


def private_mib() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


# --- images ----------------------------------------------------------------------------------------------------------


def chosen_images(folder: Path, source: Path | None) -> list[Path]:
    """Return N_IMAGES files of a folder, or drawn cells."""
    if source is None:
        source = folder / "cells"
        write_sample_cells(source, N_IMAGES, 10, 10, 2, seed=0, size=360, n_workers=os.cpu_count() or 1)
    paths = find_images(source)
    if len(paths) < N_IMAGES:
        raise SystemExit(f"--images: {source} has {len(paths)} images; {N_IMAGES} are needed")
    return paths[:: len(paths) // N_IMAGES][:N_IMAGES]


def write_formats(folder: Path, source: Path | None) -> None:
    """Write the same images in each format and size, and a list of each."""
    for kind, (width, height, suffix) in FORMATS.items():
        (folder / kind).mkdir(exist_ok=True)
        for number, path in enumerate(chosen_images(folder, source)):
            image = load_image(path).resize((width, height))
            if kind == "PNG":
                image.putalpha(255)
            image.save(folder / kind / f"{number:03d}{suffix}")
        (folder / kind / "list.txt").write_text("".join(f"{number:03d}{suffix}\n" for number in range(N_IMAGES)))


PARTS: dict[str, Part] = {"files": measure_files, "augmentation": measure_augmentation, "lists": measure_lists}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, PARTS, list(PARTS))
    parser.add_argument("--images", type=Path, help=f"folder of cells, of which {N_IMAGES} are taken; else drawn cells")
    parser.add_argument("--n-listed", type=int, default=1_000_000, help="paths of lists (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    keep_freed_memory()  # as training does
    run_parts(args, PARTS, "torchvision", "pillow", "opencv-python-headless")


if __name__ == "__main__":
    main()

"""Images a second and core: upstream's data path against ours, without and with a packed cache; lists of a million.

    python scripts/bench_data.py --folder bench [--pictures <folder of cells>] [--rounds 7] [--only steps stages lists]

The ways, each in one process on one thread:

  upstream   Pillow decodes and LANCZOS-resizes one image; torchvision's transforms make its two global crops and the
             local crop that DinoBloom's recipe makes and never uses; then they are collated
  no cache   ours: read, decode, resize and augment an image, then collate and normalise the batch
  cache      ours from a packed cache: the same without decoding and resizing

`stages` shows where the time goes, `lists` opens a list of a million paths.

A round runs all of them on the same images, rounds take turns in their order, and a ratio is that of the medians.
Pictures are real ones (or drawn), saved as JPEG of 360 x 363, BMP of 120 x 120, RGBA PNG of 256 x 256 and TIFF of 400 x
400 pixels: the formats and sizes of PBC, SSL Seg, Aslan and AML Matek. Lists name images that do not exist.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

from benchmarking import machine, ratio, resident_mib, take_turns

FORMATS = {"JPEG": (360, 363, ".jpg"), "BMP": (120, 120, ".bmp"), "PNG": (256, 256, ".png"), "TIFF": (400, 400, ".tif")}
RECIPES = ("default", "hema")
N_PICTURES = 64
SIZE, LOCAL_SIZE = 224, 98
SCALE, LOCAL_SCALE = (0.32, 1.0), (0.05, 0.32)
UPSTREAM, NO_CACHE, CACHE = "upstream", "no cache", "cache"
N_LISTED = 1_000_000
PARTS = ["steps", "stages", "lists"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for what is made, and results.json")
    parser.add_argument("--pictures", type=Path, help=f"folder of cells, of which {N_PICTURES} are taken; else drawn")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--open-list", choices=[*LIST_WAYS], help=argparse.SUPPRESS)  # a process of its own
    args = parser.parse_args()
    if args.open_list:
        print(json.dumps(open_list(args.open_list, args.folder)))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine("torch", "torchvision", "pillow", "opencv-python-headless")}
    if {"steps", "stages"} & {*args.only}:
        make_formats(args.folder, args.pictures)
        one_thread()
    if "steps" in args.only:
        results["steps"] = {f"{recipe} {kind}": time_ways(recipe, kind, args) for recipe in RECIPES for kind in FORMATS}
        print("\n".join(steps_table(results["steps"])), end="\n\n")
    if "stages" in args.only:
        results["stages"] = time_stages(args)
        print("\n".join(stages_table(results["stages"])), end="\n\n")
    if "lists" in args.only:
        make_list(args.folder)
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in LIST_WAYS}
        for _ in range(min(3, args.rounds)):
            for way in LIST_WAYS:
                command = [sys.executable, __file__, "--folder", str(args.folder), "--open-list", way]
                done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
                runs[way].append(json.loads(done.stdout.splitlines()[-1]))
        results["lists"] = {
            way: {key: statistics.median(run[key] for run in found) for key in found[0]} for way, found in runs.items()
        }
        print("\n".join(lists_table(results["lists"])), end="\n\n")
    print(f"Machine: {results['machine']}.")
    (args.folder / "results.json").write_text(json.dumps(results, indent=1))


# --- a batch, by each way -------------------------------------------------------------------------------------------


def time_ways(recipe: str, kind: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of N_PICTURES images, a round each."""
    from dinov2.data.loaders import make_dataset

    plain = make_dataset(f"HemaStandardDataset:root={args.folder / kind / 'list.txt'}", image_size=SIZE)
    packed = make_dataset(
        f"HemaStandardDataset:root={args.folder / kind / 'list.txt'}:cache={args.folder / 'cache'}", image_size=SIZE
    )
    packed.cache.build(n_workers=1)
    paths = [plain.path(index) for index in range(len(plain))]
    upstream, augmentation = UpstreamTransform(recipe), our_augmentation(recipe)
    indices = list(range(len(plain)))

    def read(dataset: Any) -> Any:
        return [dataset[index].image for index in indices]

    def augmented(dataset: Any) -> Any:
        return collated([augmentation(image, Random(i)) for i, image in enumerate(read(dataset))])

    ways = {
        UPSTREAM: lambda: upstream.collate([upstream(path) for path in paths]),
        NO_CACHE: lambda: augmented(plain),
        CACHE: lambda: augmented(packed),
    }
    return take_turns(ways, args.rounds, f"{recipe}, {kind}")


def steps_table(found: dict[str, dict[str, list[float]]]) -> list[str]:
    lines = [
        f"| recipe, images | {UPSTREAM}: images/s | " + " | ".join((NO_CACHE, CACHE)) + " |",
        "|---|---|---|---|",
    ]
    for name, seconds in found.items():
        cells = []
        for way in (NO_CACHE, CACHE):
            middle, least, most = ratio(seconds[UPSTREAM], seconds[way])
            cells.append(f"{middle:.1f}x ({least:.1f} to {most:.1f})")
        rate = N_PICTURES / statistics.median(seconds[UPSTREAM])
        lines.append(f"| {name} | {rate:.0f} | {' | '.join(cells)} |")
    return lines


def our_augmentation(recipe: str, n_local: int = 0) -> Any:
    import torch

    from dinov2.data import DataAugmentationDINO, DataAugmentationHEMA

    which = {"default": DataAugmentationDINO, "hema": DataAugmentationHEMA}[recipe]
    return which(SCALE, LOCAL_SCALE, n_local, SIZE, LOCAL_SIZE, dtype=torch.uint8)


def collated(samples: list[Any]) -> list[Any]:
    """Stack and normalise the crops, as a batch of training."""
    import torch

    from dinov2.data.transforms import normalize_images

    views = ([view for key in ("global_crops", "local_crops") for view in crops[key]] for crops in samples)
    return [normalize_images(torch.stack(crops)) for crops in zip(*views, strict=True)]


class UpstreamTransform:
    """One image at a time with Pillow and torchvision's transforms: what upstream's recipe does, with equal settings.

    `seconds` adds up the time of each stage.
    """

    def __init__(self, recipe: str, with_local_crop: bool = True) -> None:
        from PIL import Image
        from torchvision import transforms as tv

        from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD

        s = our_augmentation(recipe).settings
        bicubic = tv.InterpolationMode.BICUBIC

        def quarter_turn(image: Image.Image) -> Image.Image:
            return image.transpose(Image.Transpose.ROTATE_90)

        def maybe(probability: float, transform: Any) -> Any:
            return tv.RandomApply([transform], p=probability)

        flips = tv.Compose([tv.RandomHorizontalFlip(s.hflip_probability), tv.RandomVerticalFlip(s.vflip_probability)])
        turns = tv.Compose(
            [
                maybe(s.quarter_turn_probability, quarter_turn),
                maybe(s.rotation_probability, tv.RandomRotation((0, 360))),
            ]
        )
        jitter = maybe(s.jitter_probability, tv.ColorJitter(s.brightness, s.contrast, s.saturation, s.hue))
        gray = tv.RandomGrayscale(s.grayscale_probability)
        blur = tv.GaussianBlur(s.blur_kernel_size, s.blur_sigma)
        to_tensor, normalize = tv.ToTensor(), tv.Normalize(IMAGENET_MEAN, IMAGENET_STD)

        def view(kind: int, size: int, scale: tuple[float, float]) -> list[tuple[str, Any]]:
            return [
                ("random resized crop", tv.RandomResizedCrop(size, scale, interpolation=bicubic)),
                ("flips", flips),
                ("turns", turns),
                ("colour jitter", jitter),
                ("grayscale", gray),
                ("blur", maybe(s.blur_probability[kind], blur)),
                ("solarize", tv.RandomSolarize(s.solarize_threshold, s.solarize_probability[kind])),
                ("to tensor", to_tensor),
                ("normalise", normalize),
            ]

        self.views = [view(0, SIZE, SCALE), view(1, SIZE, SCALE)]
        if with_local_crop:
            self.views.append(view(2, LOCAL_SIZE, LOCAL_SCALE))
        self.seconds: dict[str, float] = {}

    def __call__(self, path: str) -> list[Any]:
        from PIL import Image

        image = self.timed("decode", lambda: Image.open(path).convert("RGB"))
        image = self.timed("resize", lambda: image.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
        crops = []
        for view in self.views:
            crop = image
            for name, transform in view:
                crop = self.timed(name, lambda transform=transform, crop=crop: transform(crop))
            crops.append(crop)
        return crops

    def collate(self, samples: list[list[Any]]) -> list[Any]:
        import torch

        return self.timed("collate", lambda: [torch.stack(crops) for crops in zip(*samples, strict=True)])

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
        return result


# --- where the time goes --------------------------------------------------------------------------------------------


def time_stages(args: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Share of each stage in upstream's time for an image, by recipe and way, of JPEG images."""
    from dinov2.data.datasets.decode import decode_image, resize_image
    from dinov2.data.loaders import make_dataset

    packed = make_dataset(
        f"HemaStandardDataset:root={args.folder / 'JPEG' / 'list.txt'}:cache={args.folder / 'cache'}", image_size=SIZE
    )
    packed.cache.build(n_workers=1)
    paths = [Path(packed.path(index)) for index in range(len(packed))]
    indices = list(range(len(packed)))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for recipe in RECIPES:
        augmentation = our_augmentation(recipe)
        stages: dict[str, list[float]] = {}
        upstream_stages: dict[str, list[float]] = {}
        for _ in range(args.rounds):
            upstream = UpstreamTransform(recipe)
            upstream.collate([upstream(str(path)) for path in paths])
            for name, seconds in upstream.seconds.items():
                upstream_stages.setdefault(name, []).append(seconds)
            results: list[Any] = [path.read_bytes() for path in paths]  # warm
            for name, work in {
                "read": lambda _: [path.read_bytes() for path in paths],
                "decode": lambda files: [decode_image(file) for file in files],
                "resize": lambda images: [resize_image(image, SIZE, "crop") for image in images],
                "augment": lambda images, augmentation=augmentation: [
                    augmentation(image, Random(i)) for i, image in enumerate(images)
                ],
                "collate and normalise": collated,
                "copy from the cache": lambda _: [packed[index].image for index in indices],
            }.items():
                begin = time.perf_counter()
                results = work(results)
                stages.setdefault(name, []).append(time.perf_counter() - begin)
        medians = {
            way: {name: statistics.median(seconds) for name, seconds in times.items()}
            for way, times in ((UPSTREAM, upstream_stages), ("ours", stages))
        }
        total = sum(medians[UPSTREAM].values())
        found[recipe] = {
            way: {name: seconds / total for name, seconds in times.items()} for way, times in medians.items()
        }
    return found


def stages_table(found: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    lines = ["| recipe | way | stages, of upstream's time for an image |", "|---|---|---|"]
    for recipe, ways in found.items():
        for way, stages in ways.items():
            told = ", ".join(f"{name} {share:.1%}" for name, share in stages.items())
            lines.append(f"| {recipe} | {way} | {told} |")
    return lines


# --- a list of a million paths --------------------------------------------------------------------------------------


def open_list(way: str, folder: Path) -> dict[str, float]:
    """Seconds to open the list, MiB that it adds to this process, and MiB that a started worker has of its own."""
    import torch  # loaded before, so that only the list counts

    from dinov2.data.loaders import make_dataset

    del torch, make_dataset
    before, begin = resident_mib(), time.perf_counter()
    dataset = LIST_WAYS[way](folder / "million")
    seconds, added = time.perf_counter() - begin, resident_mib() - before
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=use_all, args=(dataset, theirs))
    worker.start()
    own = ours.recv()
    worker.join()
    return {"seconds": seconds, "added_mib": added, "worker_mib": own}


def use_all(dataset: Any, pipe: Any) -> None:
    """In a worker: look every path up, then tell how much memory became this process's own."""
    before = private_mib()
    for index in range(len(dataset)):
        dataset.path(index)
    pipe.send(private_mib() - before)


def private_mib() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


class StringList:
    """Upstream's way: a Python list with a string an image."""

    def __init__(self, folder: Path) -> None:
        self.paths: list[str] = []
        for file in sorted(folder.glob("*.txt")):
            with open(file) as lines:
                self.paths += [line.strip() for line in lines]

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        return self.paths[index]


def our_list(folder: Path) -> Any:
    from dinov2.data.loaders import make_dataset

    return make_dataset(f"HemaStandardDataset:root={folder}:shuffle=1")


LIST_WAYS: dict[str, Callable[[Path], Any]] = {UPSTREAM: StringList, "ours": our_list}


def lists_table(found: dict[str, dict[str, float]]) -> list[str]:
    lines = [
        f"| a list of {N_LISTED:,} paths | opened in | memory of the process | memory of each worker |",
        "|---|---|---|---|",
    ]
    for way, values in found.items():
        lines.append(
            f"| {way} | {values['seconds']:.1f} s | {values['added_mib']:.0f} MiB | {values['worker_mib']:.0f} MiB |"
        )
    return lines


# --- inputs ---------------------------------------------------------------------------------------------------------


def one_thread() -> None:
    import cv2
    import torch

    from dinov2.utils.memory import keep_freed_memory

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    keep_freed_memory()  # as training does


def make_formats(folder: Path, source: Path | None) -> None:
    """The same images in each format and size, and a list of each."""
    from dinov2.data.datasets.decode import load_image

    paths = list(chosen_images(folder, source))
    for kind, (width, height, suffix) in FORMATS.items():
        where = folder / kind
        where.mkdir(exist_ok=True)
        for number, path in enumerate(paths):
            image = load_image(path).resize((width, height))
            if kind == "PNG":
                image.putalpha(255)
            image.save(where / f"{number:03d}{suffix}")
        (where / "list.txt").write_text("".join(f"{number:03d}{suffix}\n" for number in range(len(paths))))


def chosen_images(folder: Path, source: Path | None) -> Iterable[Path]:
    from dinov2.data.datasets import find_images
    from dinov2.data.sample_cells import write_sample_cells

    if source is None:
        source = folder / "cells"
        if not source.is_dir():
            write_sample_cells(source, N_PICTURES, 10, 10, 2, seed=0, size=360, n_workers=os.cpu_count() or 1)
    found = find_images(source)
    if len(found) < N_PICTURES:
        raise SystemExit(f"--images: {source} has {len(found)} images; {N_PICTURES} are needed")
    return found[:: len(found) // N_PICTURES][:N_PICTURES]


def make_list(folder: Path) -> None:
    """Real paths are as long; a probed few must exist."""
    where = folder / "million"
    if where.is_dir():
        return
    where.mkdir()
    lines = [
        f"/data/hematology/prepared/set_{i % 15:02d}/slide_{i // 500:04d}/cell_{i:07d}.png\n" for i in range(N_LISTED)
    ]
    lines[0] = f"{next(iter(sorted((folder / 'JPEG').glob('*.jpg'))), Path(__file__)).absolute()}\n"
    (where / "all.txt").write_text("".join(lines))


if __name__ == "__main__":
    main()

"""Augmented images a second: upstream's way and ours, on one core and on all.

    python scripts/bench_augment.py --folder bench [--pictures <folder of cells>] [--rounds 7]

Both ways take the same decoded images of 224 x 224 pixels, one at a time, for both recipes, with no and with 8 local
crops of 98 pixels:

  upstream   Pillow and torchvision's transforms
  ours       OpenCV on uint8 pixels, as a worker of the DataLoader does it; the stacked crops are normalised

As in a DataLoader, a core is one process with one thread. Processes keep their crops to themselves. A round runs both
ways, rounds take turns in their order, ratios are of the medians.
"""

import argparse
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from bench_data import RECIPES, SIZE, UpstreamTransform, chosen_images, collated, one_thread, our_augmentation
from benchmarking import machine, ratio, take_turns
from PIL import Image

from dinov2.data.datasets.decode import decode_image, resize_image

UPSTREAM, OURS = "upstream", "ours"
CASES = {f"{name}, {n or 'no'} local crops": (name, n) for name in RECIPES for n in (0, 8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for drawn cells, and results.json")
    parser.add_argument("--pictures", type=Path, help="folder of cells, of which 64 are taken; else drawn")
    parser.add_argument("--batch", type=int, default=32, help="images a round, at most 64 (%(default)s)")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    one_thread()
    args.folder.mkdir(parents=True, exist_ok=True)
    paths = [str(path) for path in chosen_images(args.folder, args.pictures)][: args.batch]
    cases = [case for case, (name, _) in CASES.items() if name in args.recipes]
    counts = sorted({1, os.cpu_count() or 1})
    found = {
        f"{case}, {n} core{'s' if n > 1 else ''}": time_ways(case, n, paths, args.rounds)
        for case in cases
        for n in counts
    }
    print("\n".join(ways_table(found, len(paths))), end="\n\n")
    name = machine("torch", "torchvision", "pillow", "opencv-python-headless")
    print(f"Machine: {name}.")
    (args.folder / "results.json").write_text(json.dumps({"machine": name, "ways": found}, indent=1))


def ways_of(case: str, paths: list[str]) -> dict[str, Callable[[], Any]]:
    """Both ways to make the batch of these images."""
    name, n_local = CASES[case]
    upstream, augmentation = UpstreamTransform(name), our_augmentation(name, n_local)
    views = upstream.views[:2] + upstream.views[2:] * n_local
    squares = [resize_image(decode_image(path), SIZE, "crop") for path in paths]
    images = [Image.fromarray(square.permute(1, 2, 0).numpy()) for square in squares]

    def crops_of(image: Image.Image) -> list[Any]:
        crops = []
        for view in views:
            crop: Any = image
            for _, transform in view:
                crop = transform(crop)
            crops.append(crop)
        return crops

    return {
        UPSTREAM: lambda: upstream.collate([crops_of(image) for image in images]),
        OURS: lambda: collated([augmentation(square, Random(i)) for i, square in enumerate(squares)]),
    }


def time_ways(case: str, n_processes: int, paths: list[str], rounds: int) -> dict[str, list[float]]:
    """Measure the seconds of a batch in each round."""
    title = f"{case}, {n_processes} cores"
    if n_processes == 1:
        return take_turns(ways_of(case, paths), rounds, title)
    of_processes = [paths[i::n_processes] for i in range(n_processes)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(n_processes, start_process, (case, of_processes)) as pool:

        def in_processes(way: str) -> Callable[[], Any]:
            return lambda: pool.starmap(run_in_process, [(way, i) for i in range(n_processes)], chunksize=1)

        return take_turns({way: in_processes(way) for way in (UPSTREAM, OURS)}, rounds, title)


_ways: list[dict[str, Callable[[], Any]]] = []


def start_process(case: str, of_processes: list[list[str]]) -> None:
    one_thread()
    _ways.extend(ways_of(case, paths) for paths in of_processes)


def run_in_process(way: str, number: int) -> None:
    _ways[number][way]()


def ways_table(found: dict[str, dict[str, list[float]]], batch: int) -> list[str]:
    lines = [f"| recipe | {UPSTREAM}: images/s | {OURS} | ratio |", "|---|---|---|---|"]
    for title, seconds in found.items():
        middle, least, most = ratio(seconds[UPSTREAM], seconds[OURS])
        rates = [batch / statistics.median(seconds[way]) for way in (UPSTREAM, OURS)]
        lines.append(f"| {title} | {rates[0]:.0f} | {rates[1]:.0f} | {middle:.1f}x ({least:.1f} to {most:.1f}) |")
    return lines


if __name__ == "__main__":
    main()

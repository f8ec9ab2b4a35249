"""Crops of decoded pictures a second: upstream's way, OpenCV a picture at a time, ours on a CPU, tensors, and a GPU.

    python scripts/bench_augment.py --folder bench [--pictures <folder of cells>] [--rounds 7] [--only ways bytes ...]

The ways, on the same pictures of 224 x 224 pixels, for both recipes, with no and with 8 local crops of 98 pixels:

  upstream     Pillow and torchvision's transforms, one picture at a time, and the batch is stacked
  one by one   our OpenCV operations, the augmentation called with one picture at a time, and the batch is stacked
  ours         the batch at once, as training does on a CPU: the same operations, a crop at a time
  tensors      the operations that a GPU gets, on the CPU

`ways` times them with one thread, and with as many as there are cores: then upstream's way and "one by one" are done by
as many processes, which keep their crops to themselves (in training they would be copied), and ours by threads.
`memory` tells by how much the process grows at most during a batch. `bytes` counts what the operations for a GPU read
and write, and needs none: every tensor that an operation takes or makes counts once, whether a cache has it or not, and
for the compiled program the number is that of torch's compiler for the CPU. `gpu` times both there, and the training
steps that they should not delay. A round runs all ways, rounds take turns in their order, ratios are of the medians.
"""

import argparse
import gc
import json
import logging
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import cv2
import torch
from bench_data import LOCAL_SCALE, LOCAL_SIZE, RECIPES, SCALE, SIZE, UpstreamTransform, chosen_pictures
from benchmarking import machine, ratio, take_turns
from PIL import Image
from step_setup import OurStep, build_model, made_up_batch, recipe
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinov2.data import DataAugmentationDINO, DataAugmentationHEMA
from dinov2.data.crop_making import apply_crops_as_tensors, apply_crops_compiled
from dinov2.data.datasets.decode import decode_image, resize_image

UPSTREAM, ONE_BY_ONE, OURS, TENSORS = "upstream", "one by one", "ours", "tensors"
WAYS = (UPSTREAM, ONE_BY_ONE, OURS, TENSORS)
CASES = {f"{name}, {n or 'no'} local crops": (name, n) for name in RECIPES for n in (0, 8)}
N_COUNTED = 16  # pictures that bytes are counted for
# images/s of a training step without local crops at half of what matrix products allow an H100 in bf16
HALF_OF_CEILING = {"ViT-S/14": 3571, "ViT-B/14": 1039, "ViT-L/14": 305}
BYTES_PER_SECOND = 3e12  # of an H100's memory, nearly
STEPS = {"ViT-S/14": ("dinov2_vits14", 128), "ViT-B/14": ("dinov2_vitb14", 64), "ViT-L/14": ("dinov2_vitl14", 32)}
PARTS = ["ways", "memory", "bytes", "gpu"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for drawn pictures, and results.json")
    parser.add_argument("--pictures", type=Path, help="folder of cells, of which 64 are taken; else drawn")
    parser.add_argument("--batch", type=int, default=32, help="pictures a round on the CPU, at most 64 (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", nargs=2, metavar=("WAY", "CASE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    use_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    images = read_pictures(args)
    if args.memory_of:
        way, case = args.memory_of
        print(json.dumps(growth_mib(ways_of(case, images)[way])))
        return
    cases = [case for case, (name, _) in CASES.items() if name in args.recipes]
    results: dict[str, Any] = {"machine": machine("torch", "torchvision", "pillow", "opencv-python-headless")}
    if "ways" in args.only:
        counts = sorted({1, os.cpu_count() or 1})
        results["ways"] = {
            f"{case}, {n} core{'s' if n > 1 else ''}": time_ways(case, n, images, args)
            for case in cases
            for n in counts
        }
        print("\n".join(ways_table(results["ways"], len(images))), end="\n\n")
    if "memory" in args.only:
        results["memory"] = {case: {way: memory_of(way, case, args) for way in WAYS} for case in cases}
        print("\n".join(memory_table(results["memory"])), end="\n\n")
    if "bytes" in args.only:
        results["bytes"] = {case: count_bytes(case) for case in cases}
        print("\n".join(bytes_table(results["bytes"])), end="\n\n")
    if "gpu" in args.only:
        if torch.cuda.is_available():
            results["gpu"] = {"name": torch.cuda.get_device_name(), **time_gpu(cases, images, args)}
            print("\n".join(gpu_table(results["gpu"])), end="\n\n")
        else:
            print("gpu: not measured, there is none", file=sys.stderr)
    print(f"Machine: {results['machine']}.")
    (args.folder / "results.json").write_text(json.dumps(results, indent=1))


def use_threads(count: int) -> None:
    torch.set_num_threads(count)
    cv2.setNumThreads(1)  # its operations are too short for more


def read_pictures(args: argparse.Namespace) -> Tensor:
    """uint8 [B, 3, S, S], channels-last in memory, as the training gets it."""
    paths = list(chosen_pictures(args.folder, args.pictures))[: args.batch]
    squares = [resize_image(decode_image(str(path)), SIZE, "crop").permute(1, 2, 0) for path in paths]
    return torch.stack(squares).permute(0, 3, 1, 2)


def our_augmentation(name: str, n_local: int, **options: Any) -> Any:
    which = {"default": DataAugmentationDINO, "hema": DataAugmentationHEMA}[name]
    return which(SCALE, LOCAL_SCALE, n_local, SIZE, LOCAL_SIZE, **options)


# --- on a CPU -------------------------------------------------------------------------------------------------------


def ways_of(case: str, images: Tensor) -> dict[str, Callable[[], Any]]:
    name, n_local = CASES[case]
    upstream, augmentation = UpstreamTransform(name), our_augmentation(name, n_local)
    upstream.views = upstream.views[:2] + upstream.views[2:] * n_local
    pictures = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in images]

    def crops_of(picture: Image.Image) -> list[Any]:
        crops = []
        for view in upstream.views:
            crop: Any = picture
            for _, transform in view:
                crop = transform(crop)
            crops.append(crop)
        return crops

    def one_by_one() -> Any:
        made = [augmentation(picture) for picture in images]
        return [
            torch.stack(views)
            for key in ("global_crops", "local_crops")
            for views in zip(*(crops[key] for crops in made), strict=True)
        ]

    def as_tensors() -> Any:
        drawn = zip(augmentation.draw(len(images), SIZE, SIZE), (SIZE, LOCAL_SIZE), strict=True)
        return [apply_crops_as_tensors(images, c, size, augmentation.settings) for c, size in drawn if len(c)]

    return {
        UPSTREAM: lambda: upstream.collate([crops_of(picture) for picture in pictures]),
        ONE_BY_ONE: one_by_one,
        OURS: lambda: augmentation(images),
        TENSORS: as_tensors,
    }


def time_ways(case: str, n_threads: int, images: Tensor, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a batch in each round."""
    title = f"{case}, {n_threads} cores"
    if n_threads == 1:
        return take_turns(ways_of(case, images), args.rounds, title)
    shares = list(images.chunk(n_threads))
    context = multiprocessing.get_context("spawn")
    with context.Pool(n_threads, start_share, (case, [share.numpy() for share in shares])) as pool:

        def in_processes(way: str) -> Callable[[], Any]:
            return lambda: pool.starmap(run_share, [(way, i) for i in range(len(shares))], chunksize=1)

        ways = ways_of(case, images) | {way: in_processes(way) for way in (UPSTREAM, ONE_BY_ONE)}
        use_threads(n_threads)
        try:
            return take_turns(ways, args.rounds, title)
        finally:
            use_threads(1)


_share_ways: list[dict[str, Callable[[], Any]]] = []


def start_share(case: str, shares: list[Any]) -> None:
    use_threads(1)
    _share_ways.extend(ways_of(case, torch.from_numpy(share)) for share in shares)


def run_share(way: str, share: int) -> None:
    _share_ways[share][way]()


def ways_table(found: dict[str, dict[str, list[float]]], batch: int) -> list[str]:
    others = (ONE_BY_ONE, OURS, TENSORS)
    lines = [f"| recipe | {UPSTREAM}: images/s | {' | '.join(others)} |", "|---|---|---|---|---|"]
    for title, seconds in found.items():
        cells = []
        for way in others:
            middle, least, most = ratio(seconds[UPSTREAM], seconds[way])
            cells.append(f"{middle:.1f}x ({least:.1f} to {most:.1f})")
        lines.append(f"| {title} | {batch / statistics.median(seconds[UPSTREAM]):.0f} | {' | '.join(cells)} |")
    return lines


def memory_of(way: str, case: str, args: argparse.Namespace) -> float:
    """MiB, in a process of its own."""
    command = [sys.executable, __file__, "--folder", str(args.folder), "--batch", str(args.batch)]
    command += ["--memory-of", way, case, *(["--pictures", str(args.pictures)] if args.pictures else [])]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    print(f"memory: {case}, {way} done", file=sys.stderr)
    return float(json.loads(done.stdout.splitlines()[-1]))


def growth_mib(work: Callable[[], Any]) -> float:
    """By how much this process is larger at its largest during the work than before it."""

    def kib(entry: str) -> int:
        return int(re.findall(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])

    Path("/proc/self/clear_refs").write_text("5")  # the largest size so far is forgotten
    before = kib("VmRSS")
    work()
    return (kib("VmHWM") - before) / 1024


def memory_table(found: dict[str, dict[str, float]]) -> list[str]:
    lines = [f"| recipe | {' | '.join(WAYS)} |", "|---|---|---|---|---|"]
    return lines + [f"| {case} | {' | '.join(f'{mib[way]:.0f} MiB' for way in WAYS)} |" for case, mib in found.items()]


# --- what a GPU would read and write --------------------------------------------------------------------------------


class OperationCounter(TorchDispatchMode):
    """Counts the operations that are carried out, and the bytes that they take and make."""

    def __init__(self) -> None:
        super().__init__()
        self.n_operations, self.n_bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        changes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        is_view = not changes and any(r.alias_info is not None for r in func._schema.returns)
        name = func.overloadpacket.__name__
        if is_view or "empty" in name:
            return result
        taken = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.n_operations += 1
        if name in ("index_select", "gather"):  # only what was chosen is read
            self.n_bytes += 2 * stored_bytes(made[0]) + stored_bytes(taken[1])
        elif name == "index_copy_":
            self.n_bytes += 2 * stored_bytes(taken[2]) + stored_bytes(taken[1])
        else:
            self.n_bytes += sum(map(stored_bytes, taken)) + sum(map(stored_bytes, made))
        return result


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that there are: an expanded tensor's values lie in memory once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def count_bytes(case: str) -> dict[str, float]:
    """Operations or kernels a batch, and MB a picture."""
    name, n_local = CASES[case]
    augmentation = our_augmentation(name, n_local)
    images = torch.zeros(N_COUNTED, 3, SIZE, SIZE, dtype=torch.uint8)
    drawn = augmentation.draw(N_COUNTED, SIZE, SIZE, torch.Generator().manual_seed(0))
    sizes = [(crops, size) for crops, size in zip(drawn, (SIZE, LOCAL_SIZE), strict=True) if len(crops)]
    with OperationCounter() as counter:
        for crops, size in sizes:
            apply_crops_as_tensors(images, crops, size, augmentation.settings)
    compiled = [count_compiled(n_local if size == LOCAL_SIZE else 0) for _, size in sizes]
    return {
        "operations": counter.n_operations,
        "operations_mb": counter.n_bytes / N_COUNTED / 1e6,
        "kernels": sum(kernels for kernels, _ in compiled),
        "kernels_mb": sum(n_bytes for _, n_bytes in compiled) / N_COUNTED / 1e6,
    }


_compiled_counts: dict[int, tuple[int, int]] = {}


def count_compiled(n_local: int) -> tuple[int, int]:
    """Kernels and bytes of the program for the local crops, or (0) for the global ones: the recipe changes neither."""
    from torch._inductor import compile_fx, metrics

    if n_local not in _compiled_counts:
        print("bytes: the program is compiled, about a minute", file=sys.stderr)
        compile_fx.inductor_metrics_log.setLevel(logging.INFO)  # the compiler counts only if it may tell
        compile_fx.inductor_metrics_log.propagate = False
        torch._inductor.config.force_disable_caches = True
        metrics.reset()
        augmentation = our_augmentation("hema", n_local)
        images = torch.zeros(N_COUNTED, 3, SIZE, SIZE, dtype=torch.uint8)
        crops = augmentation.draw(N_COUNTED, SIZE, SIZE)[1 if n_local else 0]
        apply_crops_compiled(images, crops, LOCAL_SIZE if n_local else SIZE, augmentation.settings)
        _compiled_counts[n_local] = metrics.generated_kernel_count, metrics.num_bytes_accessed
    return _compiled_counts[n_local]


def bytes_table(found: dict[str, dict[str, float]]) -> list[str]:
    names = list(HALF_OF_CEILING)
    lines = [
        f"| recipe | way | kernels a batch | MB a picture | at 3 TB/s, us a picture | {' | '.join(names)} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, counts in found.items():
        for title, key in (("one after the other", "operations"), ("compiled", "kernels")):
            seconds = 1e6 * counts[f"{key}_mb"] / BYTES_PER_SECOND
            shares = " | ".join(f"{100 * seconds * HALF_OF_CEILING[name]:.1f} %" for name in names)
            lines.append(
                f"| {case} | {title} | {counts[key]:.0f} | {counts[f'{key}_mb']:.1f} | {1e6 * seconds:.1f} | {shares} |"
            )
    return lines


# --- on a GPU -------------------------------------------------------------------------------------------------------


def time_gpu(cases: list[str], images: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a picture of each way and, without augmentation, of a training step."""
    device = torch.device("cuda")
    batch = images.to(device).repeat(4, 1, 1, 1)

    def waited_for(work: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(5):
                work()
            torch.cuda.synchronize()

        return run

    def per_picture(seconds: list[float], n: int) -> list[float]:
        return [value / (5 * n) for value in seconds]

    ways: dict[str, dict[str, list[float]]] = {}
    memory: dict[str, dict[str, float]] = {}
    for case in cases:
        name, n_local = CASES[case]
        works: dict[str, Callable[[], None]] = {}
        memory[case] = {}
        for title, compiled in (("one after the other", False), ("compiled", True)):
            augmentation = our_augmentation(name, n_local, compiled=compiled)
            works[title] = waited_for(partial(augmentation, batch))
            works[title]()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            works[title]()
            memory[case][title] = (torch.cuda.max_memory_allocated() - before) / 2**20
        found = take_turns(works, args.rounds, f"{case}, GPU")
        ways[case] = {title: per_picture(seconds, len(batch)) for title, seconds in found.items()}
    steps = {}
    for title, (arch, size) in STEPS.items():
        settings = [f"student.arch={arch}", f"train.batch_size_per_gpu={size}"]
        cfg = recipe(device, "auto", settings)
        step, made_up = OurStep(build_model(cfg, device)), made_up_batch(cfg, device)
        work = waited_for(partial(step, made_up))
        steps[title] = per_picture(take_turns({title: work}, args.rounds, "step")[title], size)
        del step, made_up, work
        gc.collect()
        torch.cuda.empty_cache()
    return {"ways": ways, "steps": steps, "memory_mib": memory}


def gpu_table(found: dict[str, Any]) -> list[str]:
    lines = [
        f"| recipe, {found['name']} | way | images/s | memory on the way | share of a step: {' | '.join(STEPS)} |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, ways in found["ways"].items():
        for title, seconds in ways.items():
            middle = statistics.median(seconds)
            shares = " | ".join(f"{100 * middle / statistics.median(found['steps'][name]):.1f} %" for name in STEPS)
            memory = f"{found['memory_mib'][case][title]:.0f} MiB"
            lines.append(f"| {case} | {title} | {1 / middle:.0f} | {memory} | {shares} |")
    return lines


if __name__ == "__main__":
    main()

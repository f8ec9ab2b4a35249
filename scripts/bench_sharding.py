"""Times training steps with and without sharding, interleaved in one run, and looks for the largest batch that fits.

    python scripts/bench_sharding.py --arch dinov2_vitb14 --batch 64                       # ratios to no wrapper
    python scripts/bench_sharding.py --arch dinov2_vitg14 --largest --ways FULL_SHARD --checkpointing

One process on one device; `torchrun` in front of it uses more, of which rank 0 prints. Crops are made up, so nothing
but the step is timed. Memory is the device's peak, on a GPU only.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import torch
from step_setup import NETWORKS, OurStep, build_model, made_up_batch, recipe

from dinov2 import distributed
from dinov2.distributed import Launch

WAYS = ("none", "NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD")


def build(args: argparse.Namespace, way: str, batch: int, device: torch.device) -> Callable[[], object]:
    """One training step of custom.yaml's recipe on made-up crops."""
    overrides = [
        *(f"student.arch={args.arch}", f"train.batch_size_per_gpu={batch}"),
        *(f"train.activation_checkpointing={args.checkpointing}", *args.overrides),
        *(f"{network}.sharding_strategy={way}" for network in NETWORKS if way != "none"),
    ]
    cfg = recipe(device, args.precision, overrides)
    model = build_model(cfg, device)
    if way != "none":
        model.prepare_for_distributed_training()
    step, images = OurStep(model), made_up_batch(cfg, device)
    return lambda: step(images)


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - started


def peak_gib(device: torch.device) -> str:
    return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else "not measured"


def compare(args: argparse.Namespace, device: torch.device) -> list[str]:
    """images/s of each way, and its ratio to the first."""
    steps = {way: build(args, way, args.batch, device) for way in args.ways}
    seconds: dict[str, list[float]] = {way: [] for way in args.ways}
    for _ in range(args.warm_up):
        for step in steps.values():
            step()
    for _ in range(args.steps):
        for way, step in steps.items():
            seconds[way].append(seconds_of(step, device))
    images = args.batch * distributed.get_world_size()
    first = statistics.median(seconds[args.ways[0]])
    return [
        f"{way:<14} {images / statistics.median(times):8.1f} images/s   ratio to {args.ways[0]}: "
        f"{first / statistics.median(times):.3f}   (steps from {min(times):.3f} to {max(times):.3f} s)"
        for way, times in seconds.items()
    ]


def largest(args: argparse.Namespace, device: torch.device) -> list[str]:
    """The largest multiple of four pictures that fits, by doubling and halving the interval."""
    if device.type != "cuda":
        raise SystemExit("--largest needs a GPU: a CPU's memory ends in swap, not in an error")
    fits, too_large, line = 0, None, "not even 4 pictures fit"
    batch = 4
    while too_large is None or too_large - fits > 4:
        torch.cuda.reset_peak_memory_stats(device)
        try:
            step = build(args, args.ways[0], batch, device)
            times = [seconds_of(step, device) for _ in range(args.warm_up + args.steps)][args.warm_up :]
            fits, images = batch, batch * distributed.get_world_size()
            line = f"batch {batch}: {images / statistics.median(times):.1f} images/s, peak {peak_gib(device)}"
        except torch.cuda.OutOfMemoryError:
            too_large = batch
        step = None
        gc.collect()
        torch.cuda.empty_cache()
        batch = batch * 2 if too_large is None else (fits + too_large) // 8 * 4
        if batch in (fits, 0):
            break
    return [line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="dinov2_vitb14")
    parser.add_argument("--batch", type=int, default=64, help="pictures a process (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["none", "NO_SHARD", "FULL_SHARD"])
    parser.add_argument("--precision", default="auto", help="param_dtype of all networks (default: %(default)s)")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again in backward")
    parser.add_argument("--largest", action="store_true", help="look for the largest batch of the first way")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    launch = distributed.read_launch() or Launch(0, 1, 0, 1, "localhost", 0, "alone")
    device = torch.device("cuda", launch.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    distributed.enable(launch, device, 600)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    lines = [f"{args.arch}, {launch.world_size} process(es) on {name}, torch {torch.__version__}"]
    lines += largest(args, device) if args.largest else compare(args, device)
    if distributed.is_main_process():
        print("\n".join(lines))
    distributed.disable()


if __name__ == "__main__":
    main()

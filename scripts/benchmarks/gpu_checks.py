"""The checks of scripts/gpu_check.py: functions of `Settings` that return an `Outcome`."""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import dinov2  # before torch loads: it limits how OpenMP threads spin

# isort: split
import features
import step
import torch
import torch.nn.functional as F
from harness import seconds_of
from torch.utils import collect_env

from dinov2.configs import CONFIG_FOLDER
from dinov2.data.datasets import find_images
from dinov2.data.sample_cells import write_sample_cells
from dinov2.loss.sinkhorn import sinkhorn_knopp
from dinov2.train import train
from dinov2.train.batches import TrainBatches, build_dataset
from dinov2.train.optimizer import LossScaler
from dinov2.utils.numerics import fast_matmul_within, resolve_dtype
from dinov2.utils.resources import available_cores

ROOT = Path(__file__).resolve().parents[2]
BATCH_SIZES = {"S": 152, "B": 120, "L": 56}  # DinoBloom's, for each GPU
PEAK_GOALS, SPEEDUP_GOAL = {"S": 0.35, "B": 0.50, "L": 0.60}, 2.5  # on the GPUs of PEAK_FLOPS
# dense bf16 of the data sheets; the first name that is in the GPU's name counts
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12}
# largest relative error of a loss, and largest 1 - cosine of the gradients, against fp32 on the CPU
STEP_TOLERANCES = {"fp32": (1e-4, 1e-4), "bf16": (0.01, 2e-3), "fp16": (5e-3, 2e-3)}
SINKHORN_TOLERANCE, CROP_TOLERANCE, RESUME_TOLERANCE = 1e-3, 1e-5, 1e-4
FP16_LOSS_SCALE = 256.0  # small enough for the first step not to overflow
SMALLEST_LOSS = 0.1  # errors of smaller losses are relative to this

TINY = [
    *("student.arch=vit_tiny", "student.embed_dim=32", "student.depth=2", "student.num_heads=2", "train.image_size=56"),
    *("crops.global_crops_size=56", "crops.local_crops_size=28", "train.batch_size_per_gpu=4", "train.num_workers=0"),
    *("dino.head_n_prototypes=32", "dino.head_hidden_dim=16", "dino.head_bottleneck_dim=8"),
    *("ibot.head_n_prototypes=16", "ibot.head_hidden_dim=16", "ibot.head_bottleneck_dim=8"),
]


@dataclass
class Outcome:
    """Result of a check: rows of a table, and what fell short."""

    rows: Sequence[Mapping[str, Any]] = ()
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Settings:
    output: Path
    device: str
    is_tiny: bool

    @property
    def tiny_overrides(self) -> list[str]:
        """Return the overrides that replace a recipe's network and batch by tiny ones, if they are wanted."""
        return TINY if self.is_tiny else []

    @property
    def precision(self) -> str:
        """Return the type that `param_dtype: auto` means on the device."""
        return next(name for name, dtype in step.DTYPES.items() if dtype == resolve_dtype("auto", self.device))

    def draw_cells(self) -> Path:
        """Draw the sample cells, unless they exist, and return their folder."""
        folder = self.output / "cells"
        counts = (16, 20, 10, 2) if self.is_tiny else (1600, 400, 400, 2)
        size, n_workers = (56, 1) if self.is_tiny else (144, available_cores())
        write_sample_cells(folder, *counts, size=size, n_workers=n_workers)
        return folder


# --- environment and tests -------------------------------------------------------------------------------------------


def check_environment(settings: Settings) -> Outcome:
    """List GPU, driver, versions, and the attention kernel of each type."""
    facts = {"Python": platform.python_version(), "cores": available_cores(), "CUDA": torch.version.cuda}
    facts |= {"dinov2": dinov2.__version__, "torch": torch.__version__}
    has_xformers = importlib.util.find_spec("xformers") is not None
    facts["xFormers"] = importlib.metadata.version("xformers") if has_xformers else "not installed"
    if settings.device != "cpu":
        properties = torch.cuda.get_device_properties(settings.device)
        facts |= {"GPU": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        facts["memory, GiB"] = round(properties.total_memory / 2**30, 1)
        facts["driver"] = collect_env.get_nvidia_driver_version(collect_env.run) or "unknown"
    facts["param_dtype auto"] = settings.precision
    for name, dtype in step.DTYPES.items():
        facts[f"attention in {name}"] = attention_kernel(settings.device, dtype)
    return Outcome([{"what": name, "value": value} for name, value in facts.items()])


def attention_kernel(device: str, dtype: torch.dtype) -> str:
    """Return which kernel scaled_dot_product_attention takes for 224-px crops of ViT-S."""
    query, key, value = torch.randn(3, 2, 6, 257, 64, device=device).to(dtype)
    attended = F.scaled_dot_product_attention(query.requires_grad_(), key, value)
    name = attended.grad_fn.name()
    return name.removesuffix("Backward0") if name.startswith("ScaledDotProduct") else "Math"


def check_tests(settings: Settings) -> Outcome:
    """Run the tests marked gpu; without a GPU they are all skipped."""
    file = (settings.output / "tests.xml").resolve()
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={file}", "tests"]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if not file.is_file():
        raise RuntimeError(f"pytest ended with exit code {code} and wrote no results")
    results = {"passed": 0, "failure": 0, "error": 0, "skipped": 0}
    problems = []
    for case in ElementTree.parse(file).iter("testcase"):
        result = next((each.tag for each in case if each.tag in results), "passed")
        results[result] += 1
        if result in ("failure", "error"):
            problems.append(f"{case.get('classname')}::{case.get('name')} failed")
    if settings.device != "cpu" and not results["passed"]:
        problems.append("no test marked gpu passed")
    return Outcome([{"tests": name, "number": count} for name, count in results.items()], problems)


# --- values against the CPU ------------------------------------------------------------------------------------------


def compare(errors: Mapping[str, tuple[float, float]]) -> Outcome:
    """Compare errors {what: (error, tolerance)}; one above its tolerance, or NaN, falls short."""
    rows = [{"what": name, "error": error, "tolerance": allowed} for name, (error, allowed) in errors.items()]
    bad = [row for row in rows if not row["error"] <= row["tolerance"]]
    return Outcome(rows, [f"{row['what']}: error {row['error']:.1e} above {row['tolerance']:g}" for row in bad])


def losses_of(row: Mapping[str, float]) -> dict[str, float]:
    """Return the losses among a step's numbers."""
    return {name: value for name, value in row.items() if name.endswith("_loss")}


def largest_loss_error(losses: Mapping[str, float], wanted: Mapping[str, float]) -> float:
    """Return the largest relative error of the losses, or NaN."""
    errors = [abs(losses[name] - value) / max(abs(value), SMALLEST_LOSS) for name, value in wanted.items()]
    return max(errors) if all(map(math.isfinite, errors)) else math.nan


def check_losses(settings: Settings) -> Outcome:
    """Compare losses and gradients of one step with those of fp32 on the CPU, with the same weights and crops."""
    overrides = ["student.arch=dinov2_vits14", "train.batch_size_per_gpu=4", *settings.tiny_overrides]
    wanted_losses, wanted = step.Way("ours fp32", "cpu", overrides).losses_and_gradient()
    errors = {}
    for precision, tolerances in STEP_TOLERANCES.items():
        if precision == "fp16" and settings.device == "cpu":
            continue
        way = step.Way(f"ours {precision}", settings.device, overrides)
        if way.model.fp16_scaler is not None:
            way.model.fp16_scaler = LossScaler(FP16_LOSS_SCALE).to(way.device)
        losses, gradient = way.losses_and_gradient()
        error, cosine = largest_loss_error(losses, wanted_losses), F.cosine_similarity(gradient, wanted, dim=0).item()
        errors[f"step in {precision}, losses"] = error, tolerances[0]
        errors[f"step in {precision}, 1 - cosine of the gradients"] = 1 - cosine, tolerances[1]
    return compare(errors)


def check_sinkhorn(settings: Settings) -> Outcome:
    """Compare the targets of 512 rows and 4,096 prototypes, in each type of the logits."""
    logits = 0.5 * torch.randn(512, 4096, generator=torch.Generator().manual_seed(0))
    errors = {}
    for name, dtype in step.DTYPES.items():
        rounded = logits.to(dtype)
        wanted = sinkhorn_knopp(rounded.float(), step.TEACHER_TEMP, len(logits))
        targets = sinkhorn_knopp(rounded.to(settings.device), step.TEACHER_TEMP, len(logits)).cpu()
        errors[f"Sinkhorn-Knopp of {name} logits"] = ((targets / wanted - 1).abs().max().item(), SINKHORN_TOLERANCE)
    return compare(errors)


def check_batches(settings: Settings) -> Outcome:
    """Compare a batch: its masks are equal, and so are its crops, but for rounding when the device normalises them."""
    data = f"train.dataset_path=HemaStandardDataset:root={settings.draw_cells()}/lists:shuffle=1"
    overrides = [data, *settings.tiny_overrides, "train.batch_size_per_gpu=8", "train.num_workers=0"]
    cfg = step.load_recipe(torch.device("cpu"), "fp32", overrides)
    cfg.train.output_dir = str(settings.output)
    dataset = build_dataset(cfg)
    wanted, batch = (
        next(TrainBatches(cfg, dataset, torch.device(device)).starting_at())[0] for device in ("cpu", settings.device)
    )
    errors = {}
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            error = (batch[name].cpu().double() - value.double()).abs().max().item()
            errors[f"batch, {name}"] = error, CROP_TOLERANCE if name.endswith("_crops") else 0.0
    return compare(errors)


# --- training --------------------------------------------------------------------------------------------------------


def run_training(settings: Settings, name: str, config: str, *arguments: str) -> tuple[Path, list[dict[str, float]]]:
    """Train on the sample cells; return the run's folder and its rows of numbers.

    Raises:
        RuntimeError: if the training fails.
    """
    folder, cells = settings.output / "runs" / name, settings.draw_cells()
    command = ["--config-file", str(CONFIG_FOLDER / "train" / config), "--output-dir", str(folder.parent)]
    command += ["--name", name, f"train.dataset_path=HemaStandardDataset:root={cells}/lists:shuffle=1"]
    command += [f"train.device={settings.device}", "train.num_workers=8", "student.pretrained_weights=null"]
    if code := train.main([*command, "train.tensorboard=false", *arguments, *settings.tiny_overrides]):
        raise RuntimeError(f"the training {folder} ended with exit code {code}")
    return folder, [json.loads(line) for line in (folder / "training_metrics.json").read_text().splitlines()]


def check_training(settings: Settings) -> Outcome:
    """Train a small network from scratch: the losses are finite, and kNN rises, but for a tiny network."""
    probe, steps_an_epoch = settings.draw_cells() / "probe", 1 if settings.is_tiny else 20
    arguments = [
        f"evaluation.datasets=[{{name: drawn, train: '{probe}/train', test: '{probe}/test'}}]",
        *("augmentation.hema.hue=0.15", "augmentation.hema.saturation=0.3", "augmentation.hema.brightness=0.3"),
        *("augmentation.hema.contrast=0.3", "evaluation.eval_period_iterations=0", "optim.epochs=10"),
        f"train.OFFICIAL_EPOCH_LENGTH={steps_an_epoch}",
    ]
    folder, steps = run_training(settings, "training", "small_with_prototypes.yaml", "--no-resume", *arguments)
    bad = sum(not all(map(math.isfinite, losses_of(each).values())) for each in steps)
    problems = [f"{bad} of {len(steps)} steps have a loss that is not finite"] if bad else []

    def knn_after(n_steps: int) -> float:
        results = json.loads((folder / "eval" / f"training_{n_steps}" / "results.json").read_text())
        accuracy: float = [*results["datasets"]["drawn"]["knn"].values()][-1]["balanced_accuracy"]
        return accuracy

    before, after = knn_after(0), knn_after(len(steps))
    if after <= before and not settings.is_tiny:
        problems.append(f"kNN did not rise in {len(steps)} steps: {before:.3f}, then {after:.3f}")
    pairs = {"kNN, balanced accuracy": (before, after)}
    pairs |= {name: (steps[0][name], value) for name, value in losses_of(steps[-1]).items()}
    rows = [{"training": name, "at the start": first, "at the end": last} for name, (first, last) in pairs.items()]
    return Outcome(rows, problems)


def check_resume(settings: Settings) -> Outcome:
    """Remove the last checkpoint of a run in fp32 and resume: the second half has the same losses again."""
    steps = ["train.OFFICIAL_EPOCH_LENGTH=4", "optim.epochs=2", "optim.warmup_epochs=1", "train.saveckp_freq=1"]
    precision = [f"compute_precision.{role}.mixed_precision.param_dtype=fp32" for role in step.ROLES]
    arguments = settings, "resume", "small_with_prototypes.yaml", *steps, *precision
    folder, first = run_training(*arguments, "--no-resume")
    shutil.rmtree(max((folder / "checkpoints").iterdir()))
    _, again = run_training(*arguments)
    pairs = list(zip(again, first, strict=True))[4:]
    errors = [largest_loss_error(losses_of(row), losses_of(wanted)) for row, wanted in pairs]
    return compare({f"resumed, losses of step {4 + i}": (error, RESUME_TOLERANCE) for i, error in enumerate(errors)})


# --- speed -----------------------------------------------------------------------------------------------------------


def check_extraction(settings: Settings) -> Outcome:
    """Measure images/s of a network, and of image files to features.h5."""
    arch, size, batch = ("Ti", 28, 4) if settings.is_tiny else ("B", 224, 256)
    weights = features.save_weights(argparse.Namespace(weights={}, image_size=size, folder=settings.output), arch)
    paths, rows = find_images(settings.draw_cells() / "train"), []
    compiled = [] if settings.device == "cpu" else ["ours bf16 compiled"]
    for way in ("ours fp32", "ours bf16", *compiled, "plain fp32", "plain bf16"):
        row = {"extraction": f"ViT-{arch}/14, batch {batch}, {way}"}
        for source, files in {"memory": [], "files": paths}.items():
            embedding = features.Way(way, weights, files, size, batch, settings.device)
            embedding.seconds()  # fills caches and compiles
            seconds = statistics.median(embedding.seconds() for _ in range(3))
            row[f"images/s from {source}"] = (len(files) or batch) / seconds
        rows.append(row)
    return Outcome(rows)


def check_trace(settings: Settings) -> Outcome:
    """Profile DinoBloom's training of ViT-S with images from files."""
    steps = ["train.OFFICIAL_EPOCH_LENGTH=10", "optim.epochs=1", "optim.warmup_epochs=0", "train.log_period=10"]
    arguments = ["student.arch=dinov2_vits14", "train.batch_size_per_gpu=64", *steps, "--profile", "--no-resume"]
    folder, rows = run_training(settings, "trace", "custom.yaml", *arguments)
    trace = folder / "profile" / "trace.json.gz"
    stages = {name: value for name, value in rows[-1].items() if name.startswith("seconds_")}
    problems = [] if trace.is_file() else [f"{trace} was not written"]
    return Outcome([{"trace": str(trace), "images/s": rows[-1]["images_per_second"], **stages}], problems)


def take_steps(way: step.Way, n_steps: int) -> None:
    with fast_matmul_within(way.is_ours, way.device):
        for _ in range(n_steps):
            way.step(way.images, step.TEACHER_TEMP, step.MOMENTUM, step.MAX_NORM)


def count_waits(way: step.Way) -> int | None:
    """Return how often the host waits for the device in a step; None on a CPU."""
    if way.device.type == "cpu":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            take_steps(way, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def measure_step(name: str, device: str, overrides: Sequence[str], n_steps: int) -> dict[str, Any]:
    """Measure one way: seconds of a step, waits and `costs`."""
    if device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    way = step.Way(name, device, overrides)
    take_steps(way, 3)  # fills caches and compiles
    seconds = statistics.median(seconds_of(partial(take_steps, way, n_steps)) / n_steps for _ in range(3))
    return {"seconds": seconds, "waits": count_waits(way), **way.costs()}


def check_speed(settings: Settings, network: str) -> Outcome:
    """Measure our step, eager and compiled, and the plain one; on the GPUs that have goals, compare with these."""
    batch, precision = 4 if settings.is_tiny else BATCH_SIZES[network], settings.precision
    overrides = [f"student.arch={step.ARCHS[network]}", f"dino.head_bottleneck_dim={384 if network == 'L' else 256}"]
    overrides += [*settings.tiny_overrides, f"train.batch_size_per_gpu={batch}"]
    gpu = "CPU" if settings.device == "cpu" else torch.cuda.get_device_name(settings.device)
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), None)
    compiled = [] if settings.device == "cpu" else ["ours compiled"]
    rows, problems, plain_seconds = [], [], math.nan
    for name in ("plain", "ours", *compiled):
        changes = ["train.compile_blocks=true", "train.compile_loss=true"] if name in compiled else []
        way, n_steps = f"{name.split()[0]} {precision}", 2 if settings.is_tiny else 10
        try:
            cost = measure_step(way, settings.device, [*overrides, *changes], n_steps)
        except torch.OutOfMemoryError:
            problems.append(f"{name}: batch {batch} does not fit into the memory")
            continue
        seconds, flops = cost["seconds"], cost["flops"] / cost["seconds"]
        plain_seconds = seconds if name == "plain" else plain_seconds
        row = {"model": f"ViT-{network}/14", "GPU": gpu, "batch": batch, "way": f"{name}, {precision}"}
        row |= {"images/s": batch / seconds, "plain / it": plain_seconds / seconds}
        row |= {"share of bf16 peak": flops / peak if peak else None, "share of matmul rate": flops / cost["rate"]}
        row |= {"waits a step": cost["waits"], "peak memory, GiB": cost["peak"] / 1024}
        rows.append(row)
    if peak and not settings.is_tiny:
        for name, goal in {"share of bf16 peak": PEAK_GOALS[network], "plain / it": SPEEDUP_GOAL}.items():
            best = max((row[name] for row in rows if row["way"].startswith("ours")), default=math.nan)
            if not best >= goal:
                problems.append(f"{name} is {best:.2f}; the goal is {goal:g}")
    return Outcome(rows, problems)

"""Do the fast step, the one in bf16 and upstream's learn equally well? Trains each on drawn cells, and writes a table.

    python scripts/compare_learning.py --folder runs/compare_learning [--seeds 0 1 2] [--steps 300]

Each way takes the same steps from the same weights on the same crops and masks, which a seed decides: the recipe of
small_from_scratch.yaml with a smaller net and smaller crops.

  ours fp32   the step of train.py
  ours bf16   the same, computed in bf16
  plain fp32  upstream's step, scripts/plain_step.py
  plain bf16  the same, computed in bf16
  untrained   the weights that they start from

kNN-20 (protocol dinobloom) votes with labelled cells of slides that the others do not come from, on the teacher's
features, always computed in fp32. A run that the folder holds is not trained again.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import torch
from benchmarking import machine
from omegaconf import DictConfig
from step_setup import SMALL_RECIPE, OurStep, UpstreamsStep, recipe

from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.data.sample_cells import write_sample_cells
from dinov2.eval.features.extract import extract
from dinov2.eval.knn import evaluate_knn
from dinov2.train.batches import TrainBatches, build_dataset
from dinov2.train.schedules import Schedules
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.files import atomic_write
from dinov2.utils.parallel import available_cores
from dinov2.utils.precision import fast_matmul_within
from dinov2.utils.seeds import derive_seed

UNTRAINED, REFERENCE = "untrained", "plain fp32"
# how each way makes its step, and the type that it computes in
WAYS: dict[str, tuple[str, Callable[[SSLMetaArch], OurStep | UpstreamsStep] | None]] = {
    "ours fp32": ("fp32", OurStep),
    "ours bf16": ("bf16", OurStep),
    REFERENCE: ("fp32", lambda model: UpstreamsStep(model, torch.float32)),
    "plain bf16": ("bf16", lambda model: UpstreamsStep(model, torch.bfloat16)),
    UNTRAINED: ("fp32", None),
}
SETTINGS = [
    *("student.depth=4", "crops.global_crops_size=70", "train.image_size=80", "train.num_workers=0"),
    *("optim.epochs=60", "optim.warmup_epochs=3", "teacher.warmup_teacher_temp_epochs=1"),
]
PICTURE_PX = 80  # what the pictures are decoded to, so that nothing is resized
N_LAST = 20  # steps whose loss is shown


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for cells, runs and results.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=300, help="a multiple of 60 (default: %(default)s)")
    parser.add_argument("--n-train", type=int, default=2400, help="unlabelled cells (default: %(default)s)")
    parser.add_argument("--n-probe", type=int, default=800, help="cells that vote, and as many that are judged")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="config values for every run")
    args = parser.parse_args(argv)
    if args.steps % 60:
        parser.error(f"--steps: {args.steps} is not a multiple of 60, the spans in which the recipe's schedules count")
    folder = args.folder.resolve()
    cells = folder / "cells"
    counts = (args.n_train, args.n_probe, args.n_probe, 0)
    write_sample_cells(cells, *counts, size=PICTURE_PX, n_workers=available_cores())

    found: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
    todo = [(seed, way) for seed in args.seeds for way in args.ways if not record_of(folder, seed, way).exists()]
    started, n_done = time.monotonic(), 0
    for seed in args.seeds:
        for way in args.ways:
            record, settings = record_of(folder, seed, way), [f"steps={args.steps}", *args.set]
            if (seed, way) in todo:
                result = {"settings": settings, **run(way, seed, cells, args.steps, args.set)}
                with atomic_write(record, "w") as file:
                    json.dump(result, file, indent=1)
                n_done += 1
                left = (time.monotonic() - started) / n_done * (len(todo) - n_done)
                score = result["balanced_accuracy"]
                print(f"{n_done} of {len(todo)}: {way}, seed {seed}: {score:.3f}, {left:.0f} s to go", file=sys.stderr)
            result = json.loads(record.read_text())
            if result["settings"] != settings:
                raise SystemExit(
                    f"{record} was made with {' '.join(result['settings'])}; choose another --folder, or remove it"
                )
            found[way].append(result)
    lines = [*table(found, args.seeds), "", f"Machine: {machine('torch')}, {torch.get_num_threads()} threads."]
    with atomic_write(folder / "results.md", "w") as file:
        file.write("\n".join(lines) + "\n")
    print("\n".join(lines))


def record_of(folder: Path, seed: int, way: str) -> Path:
    return folder / "runs" / f"{way.replace(' ', '_')}_seed{seed}.json"


def settings_of(way: str, seed: int, cells: Path, n_steps: int, overrides: Sequence[str]) -> DictConfig:
    given = [
        f"train.dataset_path=HemaStandardDataset:root={cells / 'lists'}:shuffle=1",
        *(f"train.seed={seed}", f"train.OFFICIAL_EPOCH_LENGTH={n_steps // 60}", *SETTINGS, *overrides),
    ]
    cfg = recipe(torch.device("cpu"), WAYS[way][0], given, SMALL_RECIPE)
    cfg.train.output_dir = str(cells.parent)  # where pictures that cannot be read would be listed
    return cfg


def run(way: str, seed: int, cells: Path, n_steps: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Train one way, and judge its teacher: balanced accuracy and the losses of the last steps."""
    cfg = settings_of(way, seed, cells, n_steps, overrides)
    torch.manual_seed(derive_seed(seed, "weights"))
    model = SSLMetaArch(cfg)
    make_step = WAYS[way][1]
    losses: list[dict[str, float]] = []
    if make_step is not None:
        step, schedules = make_step(model), Schedules(cfg)
        batches = TrainBatches(cfg, build_dataset(cfg), model.device).starting_at()
        for iteration, (part,) in zip(range(schedules.n_iterations), batches, strict=False):
            now = schedules.at(iteration)
            now.apply_to(step.optimizer)
            shown = step(part, now.teacher_temp, now.teacher_momentum, cfg.optim.clip_grad)
            losses.append({name: value.item() for name, value in shown.items()})
            check_finite(losses[-1], way, iteration)
        if isinstance(step, UpstreamsStep):
            model.teacher_backbone.load_state_dict(step.plain.teacher.backbone.state_dict())
    last = losses[-N_LAST:]
    return {
        "balanced_accuracy": judge(model, cells, cfg.crops.global_crops_size),
        "last_losses": {name: statistics.mean(row[name] for row in last) for name in last[0]} if last else {},
    }


def check_finite(losses: Mapping[str, float], way: str, iteration: int) -> None:
    wrong = [name for name, value in losses.items() if not np.isfinite(value)]
    if wrong:
        raise SystemExit(f"{way}: {', '.join(wrong)} not finite in step {iteration}")


def judge(model: SSLMetaArch, cells: Path, image_size: int) -> float:
    """kNN-20 balanced accuracy of the teacher's CLS tokens on the cells of other slides."""
    voting = LabelledCells.from_path(cells / "probe" / "train.csv")
    judged = LabelledCells.from_path(cells / "probe" / "test.csv", voting.class_names)
    with fast_matmul_within(False):
        features = [
            extract(model.teacher_backbone, part.paths, image_size=image_size, progress=False).features
            for part in (voting, judged)
        ]
    scores = evaluate_knn(features[0], voting.labels, features[1], judged.labels, voting.class_names, ks=(20,))
    return float(scores["knn_20"]["balanced_accuracy"])


def table(found: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Sequence[int]) -> list[str]:
    """A row a way: each seed's balanced accuracy, mean and spread, distance to the plain step with the same seed."""
    lines = [
        f"| way | {' | '.join(f'seed {seed}' for seed in seeds)} | mean, standard deviation | minus {REFERENCE}, mean "
        "and largest | total loss at the end |",
        "|---" * (len(seeds) + 4) + "|",
    ]
    reference = [each["balanced_accuracy"] for each in found.get(REFERENCE, [])]
    for way, results in found.items():
        scores = [each["balanced_accuracy"] for each in results]
        spread = f"{statistics.mean(scores):.3f}, {statistics.stdev(scores) if len(scores) > 1 else 0.0:.3f}"
        away = ""
        if reference and way not in (REFERENCE, UNTRAINED):
            differences = [score - wanted for score, wanted in zip(scores, reference, strict=True)]
            away = f"{statistics.mean(differences):+.3f}, {max(differences, key=abs):+.3f}"
        losses = [sum(each["last_losses"].values()) for each in results if each["last_losses"]]
        loss = f"{statistics.mean(losses):.3f}" if losses else ""
        points = " | ".join(f"{score:.3f}" for score in scores)
        lines.append(f"| {way} | {points} | {spread} | {away} | {loss} |")
    return lines


if __name__ == "__main__":
    main()

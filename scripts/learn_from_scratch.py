"""Does a small ViT learn from scratch on real cells? Trains the recipe with several seeds and writes a table.

    python scripts/learn_from_scratch.py --pbc <PBC_dataset_normal_DIB> --output-dir runs/from_scratch

Three quarters of the pictures (Acevedo et al. 2020) are trained on by a .txt list, labels unused; kNN votes with them
and is judged on the rest, byte-identical copies left out. The ten classes are DinoBloom's: file prefixes split `ig` and
`neutrophil` into stages. Platelets and cells of unspecified stage count only in the eight classes of the folders.
"""

import argparse
import csv
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import torch
from omegaconf import OmegaConf

import dinov2.train.train as train_command
from dinov2.configs import CONFIG_FOLDER
from dinov2.data.datasets import LabelledCells, find_images
from dinov2.eval.features.extract import extract
from dinov2.eval.features.named_encoders import colour_histogram
from dinov2.eval.knn import evaluate_knn
from dinov2.hub import load_backbone
from dinov2.hub.backbones import file_sha256
from dinov2.models import architecture, build_backbone
from dinov2.utils.files import atomic_write
from dinov2.utils.seeds import derive_seed

TEN_CLASSES = {
    "MMY": "metamyelocyte",
    "MY": "myelocyte",
    "PMY": "promyelocyte",
    "SNE": "neutrophil_segmented",
    "BNE": "neutrophil_band",
    "BA": "basophil",
    "EO": "eosinophil",
    "ERB": "erythroblast",
    "LY": "lymphocyte",
    "MO": "monocyte",
}
SPLITS = ("train", "test")
LAYER_SCALES = (1e-5, 1.0)


def write_split(pbc: Path, folder: Path, seed: int = 0) -> dict[str, int]:
    """lists/train.txt, and {train,test}{8,10}.csv; returns the number of pictures of each."""
    by_content = defaultdict(list)
    for path in find_images(pbc):
        by_content[file_sha256(path)].append(path)
    by_stage = defaultdict(list)
    for copies in by_content.values():
        if len({path.parent.name for path in copies}) == 1:  # a picture with two labels has none
            first = min(copies)
            by_stage[first.name.split("_")[0]].append(first.resolve())
    parts: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for stage in sorted(by_stage):
        paths = sorted(by_stage[stage])
        random.Random(derive_seed(seed, stage)).shuffle(paths)
        parts["test"] += paths[: len(paths) // 4]
        parts["train"] += paths[len(paths) // 4 :]
    with atomic_write(folder / "lists" / "train.txt", "w") as file:
        file.writelines(f"{path}\n" for path in parts["train"])
    for split, paths in parts.items():
        ten = [(path, TEN_CLASSES[path.name.split("_")[0]]) for path in paths if path.name.split("_")[0] in TEN_CLASSES]
        for name, rows in (("8", [(path, path.parent.name) for path in paths]), ("10", ten)):
            with atomic_write(folder / f"{split}{name}.csv", "w") as file:
                csv.writer(file).writerows([("Image Path", "Label"), *rows])
    return {split: len(paths) for split, paths in parts.items()}


def train(config: Path, folder: Path, seed: int, overrides: Iterable[str]) -> None:
    """Run train.py as a user would, for the run `seed<seed>`; a run that is there already is continued."""
    labelled = {"name": "pbc", **{split: str(folder / f"{split}10.csv") for split in SPLITS}}
    command = [sys.executable, train_command.__file__, "--config-file", config, "--output-dir", folder]
    settings = [
        f"train.dataset_path=HemaStandardDataset:root={folder / 'lists'}:shuffle=1",
        f"train.seed={seed}",
        f"evaluation.datasets={json.dumps([labelled])}",
    ]
    subprocess.run([*map(str, command), "--name", f"seed{seed}", *settings, *overrides], check=True)


def minutes(run: Path) -> float:
    """Training time from the median step, which other work on the machine does not stretch; evaluations not counted."""
    rows = [json.loads(line) for line in (run / "training_metrics.json").read_text().splitlines()]
    return statistics.median(row["iter_time"] for row in rows) * len(rows) / 60


def curve(run: Path) -> list[tuple[int, float]]:
    """(iteration, kNN-20 balanced accuracy on ten classes) along a run."""
    results = [json.loads(path.read_text()) for path in run.glob("eval/training_*/results.json")]
    return sorted((r["iteration"], r["datasets"]["pbc"]["knn"]["knn_20"]["balanced_accuracy"]) for r in results)


def cls_loss(run: Path, at: slice) -> float:
    """Mean cross-entropy of a global CLS prediction, in nats, over some iterations."""
    rows = [json.loads(line) for line in (run / "training_metrics.json").read_text().splitlines()]
    # the log divides the two global terms by all 2 + 2L of them
    share = 1 / (1 + _value(run, "crops.local_crops_number"))
    return statistics.mean(row["dino_global_crops_loss"] for row in rows[at]) / share


def judge(features_of, folder: Path) -> dict[str, float]:
    """kNN-20 of any features: accuracy on eight classes, accuracy and balanced accuracy on ten."""
    scores = {}
    for n_classes in (8, 10):
        train_cells = LabelledCells.from_path(folder / f"train{n_classes}.csv")
        test_cells = LabelledCells.from_path(folder / f"test{n_classes}.csv", train_cells.class_names)
        found = evaluate_knn(
            features_of(train_cells.paths),
            train_cells.labels,
            features_of(test_cells.paths),
            test_cells.labels,
            train_cells.class_names,
            ks=(20,),
        )["knn_20"]
        scores |= {f"acc{n_classes}": found["accuracy"], f"bacc{n_classes}": found["balanced_accuracy"]}
    return scores


def embedder(model, image_size: int):
    return lambda paths: extract(model, paths, image_size=image_size, progress=False).features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pbc", type=Path, required=True, help="the data set's folder, with a folder per class")
    parser.add_argument("--output-dir", type=Path, required=True, help="for split, runs and results.md")
    parser.add_argument("--config-file", type=Path, default=CONFIG_FOLDER / "train" / "small_from_scratch.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values for every run")
    args = parser.parse_args()
    folder = args.output_dir.resolve()
    counts = write_split(args.pbc, folder)

    lines = [
        f"Trained on {counts['train']} PBC pictures without labels, judged on {counts['test']} others; "
        f"`{args.config_file.name}`, seeds {', '.join(map(str, args.seeds))}.",
        "",
        "| features | kNN-20 accuracy, 8 classes | accuracy, 10 classes | balanced accuracy, 10 classes |",
        "|---|---|---|---|",
    ]
    runs = []
    scores = defaultdict(list)
    for seed in args.seeds:
        train(args.config_file, folder, seed, args.overrides)
        run = folder / f"seed{seed}"
        runs.append((seed, run))
        model = load_backbone(run, img_size=_crop_size(run))
        scores["trained"].append(judge(embedder(model, _crop_size(run)), folder))
        for scale in LAYER_SCALES:
            torch.manual_seed(derive_seed(seed, "untrained"))
            untrained = build_backbone({**architecture(model), "layerscale": scale}).eval()
            scores[f"untrained, layer scale {scale:g}"].append(judge(embedder(untrained, _crop_size(run)), folder))
    scores["colour histogram (HSV, centre)"].append(judge(colour_histogram, folder))
    for name, results in scores.items():
        cells = " | ".join(_spread([r[key] for r in results]) for key in ("acc8", "acc10", "bacc10"))
        lines.append(f"| {name} | {cells} |")

    n_prototypes = _value(runs[0][1], "dino.head_n_prototypes")
    lines += [
        "",
        "kNN-20 balanced accuracy on ten classes over training, and the CLS loss (uniform predictions give "
        f"ln {n_prototypes} = {torch.tensor(float(n_prototypes)).log().item():.2f}):",
        "",
    ]
    header = [str(iteration) for iteration, _ in curve(runs[0][1])]
    lines += [
        f"| seed | {' | '.join(header)} | CLS loss, first 20 | CLS loss, last 20 | minutes |",
        "|---" * (len(header) + 4) + "|",
    ]
    for seed, run in runs:
        points = " | ".join(f"{score:.3f}" for _, score in curve(run))
        first, last = cls_loss(run, slice(0, 20)), cls_loss(run, slice(-20, None))
        lines.append(f"| {seed} | {points} | {first:.2f} | {last:.2f} | {minutes(run):.1f} |")
    lines += ["", f"Machine: {_machine()}; Python {platform.python_version()}, torch {torch.__version__}."]
    with atomic_write(folder / "results.md", "w") as file:
        file.write("\n".join(lines) + "\n")
    print("\n".join(lines))


def _spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})"


def _value(run: Path, key: str):
    return OmegaConf.select(OmegaConf.load(run / "config.yaml"), key)


def _crop_size(run: Path) -> int:
    return int(_value(run, "crops.global_crops_size"))


def _machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()

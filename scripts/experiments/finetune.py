"""Fine-tune a small network on real cells in every mode, from its weights and from random ones, against linear and kNN.

    python scripts/experiments/finetune.py --split runs/pbc --network runs/pbc/from_scratch/seed0 --output-dir tuned

`--split` is an output folder of learn.py, whose split of ten PBC classes is used. Its images are scaled once to squares
of 128 px, since decoding photographs would take longer than learning. Every protocol has the same training and test
images; a fifth of the training images chooses the weights of fine-tuning, and linear and kNN learn from all of them.
`--settings` trains with other flags instead (a row each), and `--images` from a stratified part of the images. A
stopped experiment continues.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import pandas as pd
import torch
from learn import markdown, spread
from PIL import Image

from dinov2.data.datasets.decode import decode_image, resize_image
from dinov2.eval import finetune, knn, linear
from dinov2.hub.backbones import load_backbone, untrained_backbone
from dinov2.models import architecture
from dinov2.utils.command import exit_code
from dinov2.utils.files import atomic_write

SIDE = 128  # px
MODES = ("full", "last-n", "lora", "head")
SHUFFLED = "full, shuffled labels"
METRIC = "balanced_accuracy"


def write_cells(split: Path, folder: Path, n_images: int) -> dict[str, Path]:
    """Write the scaled images, the lists of both sides, and the training list with shuffled labels."""
    files = {side: folder / f"{side}.csv" for side in ("train", "test", "shuffled")}
    for side in ("train", "test"):
        table = pd.read_csv(split / f"{side}10.csv")
        if side == "train" and n_images:
            share = n_images / len(table)
            table = table.groupby("Label").sample(frac=share, random_state=0)
        paths = [folder / "images" / f"{Path(path).stem}.png" for path in table["Image Path"]]
        for source, path in zip(table["Image Path"], paths, strict=True):
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = resize_image(decode_image(source), SIDE).permute(1, 2, 0).numpy()
                with atomic_write(path) as stream:
                    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG")
        table["Image Path"] = paths
        table.to_csv(files[side], index=False)
    table = pd.read_csv(files["train"])
    table["Label"] = np.random.default_rng(0).permutation(table["Label"])
    table.to_csv(files["shuffled"], index=False)
    return files


def write_random(network: Path, folder: Path, seed: int) -> Path:
    """Write a checkpoint of the same architecture with random weights."""
    model = untrained_backbone(network, seed=seed)
    file = folder / f"random_{seed}.pth"
    with atomic_write(file) as stream:
        torch.save({"model": model.state_dict(), "architecture": architecture(model)}, stream)
    return file


def evaluate(command: object, folder: Path, *flags: object) -> dict:
    """Run a protocol's command, unless its results are there; return the metrics of its last row."""
    if not (folder / "results.json").exists():
        command.main([*map(str, flags), "--output-dir", str(folder)])  # type: ignore[attr-defined]
    return list(json.loads((folder / "results.json").read_text())["results"]["model"].values())[-1]


def interval(metrics: Mapping) -> str:
    low, high = metrics["intervals"][METRIC]
    return f"{metrics[METRIC]:.3f} [{low:.3f}, {high:.3f}]"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", type=Path, required=True, help="output folder of learn.py")
    parser.add_argument("--network", type=Path, required=True, help="a run's folder or a checkpoint")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of fine-tuning and of random weights")
    parser.add_argument("--images", type=int, default=0, help="training images; 0: all")
    parser.add_argument("--epochs", type=int, default=0, help="0: the default of finetune.py")
    parser.add_argument("--settings", nargs="+", metavar="'--lr 1e-3'", help="flags of finetune.py, a row for each")
    args = parser.parse_args(argv)
    folder = args.output_dir.resolve()
    files = write_cells(args.split, folder, args.images)
    size = load_backbone(args.network).transform.image_size  # type: ignore[union-attr]
    common = ["--train", files["train"], "--test", files["test"], "--image-size", size]
    rows: dict[str, dict[str, list[dict]]] = {}
    methods = {mode: ["--mode", mode] for mode in MODES}
    if args.settings:
        methods = {text: shlex.split(text) for text in args.settings}
    for seed in args.seeds:
        starts = {"pretrained": args.network}
        if not args.settings:
            starts["random"] = write_random(args.network, folder, seed)
        for start, weights in starts.items():
            results = rows.setdefault(start, {})
            place = folder / start / f"seed{seed}"
            tuning = ["--checkpoint", weights, *common, "--seed", seed, "--epochs", args.epochs]
            if not args.settings:
                for command in (knn, linear):
                    name = command.__name__.rpartition(".")[2]
                    metrics = evaluate(command, place / name, "--checkpoint", weights, *common)
                    results.setdefault(name, []).append(metrics)
            for number, (name, flags) in enumerate(methods.items()):
                output = place / (f"settings{number}" if args.settings else name)
                results.setdefault(name, []).append(evaluate(finetune, output, *tuning, *flags))
            if seed == args.seeds[0] and not args.settings:
                tuning[3] = files["shuffled"]
                results[SHUFFLED] = [evaluate(finetune, place / "shuffled", *tuning)]
    n = {side: len(pd.read_csv(files[side])) for side in ("train", "test")}
    lines = [f"{n['train']} training and {n['test']} test images, ten classes; balanced accuracy.", ""]
    for start, results in rows.items():
        table = {
            name: {
                f"seeds {', '.join(map(str, args.seeds))}": spread([each[METRIC] for each in of_method]),
                f"seed {args.seeds[0]} with its 95 % interval": interval(of_method[0]),
                "epochs (best)": ", ".join(
                    f"{fold['epochs']} ({fold['best_epoch']})"
                    for each in of_method
                    for fold in each["folds"]
                    if "epochs" in fold
                ),
            }
            for name, of_method in results.items()
        }
        lines += [*markdown(f"from {start} weights", table), ""]
    with atomic_write(folder / "results.md", "w") as file:
        file.write("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(exit_code(main))

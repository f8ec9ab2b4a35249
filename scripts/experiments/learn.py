"""Train a small ViT on real cells with several seeds, and write tables of kNN after and during training.

    python scripts/experiments/learn.py --pbc <PBC_dataset_normal_DIB> --output-dir runs/pbc
    python scripts/experiments/learn.py --pbc <PBC_dataset_normal_DIB> --output-dir runs/pbc --name from_weights \
        student.pretrained_weights=<run or file>

Three quarters of the images (Acevedo et al. 2020) are trained on by a .txt list, without labels; kNN searches them
for neighbours of the rest. Byte-identical copies are left out. The ten classes are DinoBloom's: file prefixes split
`ig` and `neutrophil` into stages. Platelets and cells of unspecified stage count only in the eight classes of the
folders. All names in one output folder share the split, so that their tables can be compared.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import pandas as pd
from omegaconf import OmegaConf

import dinov2.train.train as train_command
from dinov2.configs import CONFIG_FOLDER
from dinov2.data.datasets import find_images
from dinov2.data.prepare.class_folders import ACEVEDO_STAGES
from dinov2.eval import knn
from dinov2.utils.files import atomic_write, file_sha256
from dinov2.utils.numerics import derive_seed

SPLITS = ("train", "test")


def write_split(pbc: Path, folder: Path, seed: int = 0) -> dict[str, int]:
    """Write lists/train.txt and {train,test}{8,10}.csv; return the number of images of each split."""
    images = pd.DataFrame({"path": sorted(find_images(pbc))})
    images["content"] = images["path"].map(file_sha256)
    images["class"] = images["path"].map(lambda path: path.parent.name)
    images["stage"] = images["path"].map(lambda path: path.name.split("_")[0])
    has_one_class = images.groupby("content")["class"].transform("nunique") == 1
    images = images[has_one_class].drop_duplicates("content")
    order: dict[str, list[int]] = {split: [] for split in SPLITS}
    for stage, rows in images.groupby("stage"):
        positions = rows.index.tolist()
        random.Random(derive_seed(seed, stage)).shuffle(positions)
        order["test"] += positions[: len(positions) // 4]
        order["train"] += positions[len(positions) // 4 :]
    images["path"] = images["path"].map(Path.resolve)
    parts = {split: images.loc[positions] for split, positions in order.items()}
    with atomic_write(folder / "lists" / "train.txt", "w") as file:
        file.writelines(f"{path}\n" for path in parts["train"]["path"])
    for split, part in parts.items():
        for n_classes, labels in ((8, part["class"]), (10, part["stage"].map(ACEVEDO_STAGES))):
            table = pd.DataFrame({"Image Path": part["path"], "Label": labels}).dropna()
            table.to_csv(folder / f"{split}{n_classes}.csv", index=False)
    return {split: len(part) for split, part in parts.items()}


def train(config: Path, run: Path, split: Path, seed: int, overrides: Iterable[str]) -> None:
    """Run train.py as a user would; an unfinished run is resumed."""
    labelled = {"name": "pbc", **{side: str(split / f"{side}10.csv") for side in SPLITS}}
    command = [sys.executable, train_command.__file__, "--config-file", config, "--output-dir", run.parent]
    settings = [
        f"train.dataset_path=HemaStandardDataset:root={split / 'lists'}:shuffle=1",
        f"train.seed={seed}",
        f"evaluation.datasets={json.dumps([labelled])}",
    ]
    subprocess.run([*map(str, command), "--name", run.name, *settings, *overrides], check=True)


def evaluate(run: Path, split: Path, seed: int) -> dict[str, dict[str, float]]:
    """Return kNN-20 scores of the network, the untrained one and a colour histogram, on eight and ten classes."""
    scores: dict[str, dict[str, float]] = {}
    for n_classes in (8, 10):
        output = run / f"knn{n_classes}"
        sides = [text for side in SPLITS for text in (f"--{side}", str(split / f"{side}{n_classes}.csv"))]
        flags = ["--checkpoint", str(run), "--baseline", "untrained", "histogram", "--k", "20", "--seed", str(seed)]
        knn.main([*flags, *sides, "--output-dir", str(output), "--overwrite"])
        for source, rows in json.loads((output / "results.json").read_text())["results"].items():
            names = ("accuracy", "balanced_accuracy") if n_classes == 10 else ("accuracy",)
            values = {f"{name.replace('_', ' ')}, {n_classes} classes": rows["knn_20"][name] for name in names}
            scores.setdefault(source, {}).update(values)
    return scores


def describe_training(run: Path) -> dict[str, str]:
    """Return kNN-20 balanced accuracy on ten classes by iteration, the CLS loss at both ends, and the minutes."""
    reports = [json.loads(path.read_text()) for path in run.glob("eval/training_*/results.json")]
    scores = {r["iteration"]: r["datasets"]["pbc"]["knn"]["knn_20"]["balanced_accuracy"] for r in reports}
    row = {str(iteration): f"{scores[iteration]:.3f}" for iteration in sorted(scores)}
    metrics = pd.read_json(run / "training_metrics.json", lines=True)
    # the log divides the two global terms by all 2 + 2L of them
    losses = metrics["dino_global_crops_loss"] * (1 + config_value(run, "crops.local_crops_number"))
    row |= {"CLS loss, first 20": f"{losses[:20].mean():.2f}", "CLS loss, last 20": f"{losses[-20:].mean():.2f}"}
    # the median step, which other work on the machine does not stretch; evaluations are not counted
    return row | {"minutes": f"{metrics['iter_time'].median() * len(metrics) / 60:.1f}"}


def config_value(run: Path, key: str) -> Any:
    return OmegaConf.select(OmegaConf.load(run / "config.yaml"), key)


def markdown(first: str, rows: Mapping[Any, Mapping[str, str]]) -> list[str]:
    """Return a Markdown table with a row for each entry."""
    header = list(next(iter(rows.values())))
    lines = [[first, *header], ["---"] * (len(header) + 1)]
    lines += [[str(name), *(row.get(column, "") for column in header)] for name, row in rows.items()]
    return [f"| {' | '.join(line)} |" for line in lines]


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pbc", type=Path, required=True, help="the data set's folder, with a folder per class")
    parser.add_argument("--output-dir", type=Path, required=True, help="for the split, and a folder for each --name")
    parser.add_argument("--name", default="from_scratch", help="of these settings (default: %(default)s)")
    parser.add_argument("--config-file", type=Path, default=CONFIG_FOLDER / "train" / "small_from_scratch.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values for every run")
    args = parser.parse_intermixed_args(argv)
    split = args.output_dir.resolve()
    folder = split / args.name
    counts = write_split(args.pbc, split)
    scores, training = [], {}
    for seed in args.seeds:
        run = folder / f"seed{seed}"
        train(args.config_file, run, split, seed, args.overrides)
        scores.append(evaluate(run, split, seed))
        training[seed] = describe_training(run)
    features = {
        source: {name: spread([each[source][name] for each in scores]) for name in row}
        for source, row in scores[0].items()
    }
    n_prototypes = config_value(run, "dino.head_n_prototypes")
    lines = [
        f"`{args.config_file.name}` {' '.join(args.overrides)}: trained on {counts['train']} PBC images without "
        f"labels, evaluated on {counts['test']} others by kNN-20; means over seeds, with the range in brackets.",
        *("", *markdown("features", features), ""),
        "kNN-20 balanced accuracy on ten classes by iteration, and the CLS loss (uniform predictions give "
        f"ln {n_prototypes} = {np.log(n_prototypes):.2f}):",
        *("", *markdown("seed", training)),
    ]
    with atomic_write(folder / "results.md", "w") as file:
        file.write("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

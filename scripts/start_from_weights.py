"""Does a run that starts from weights do better than one from nothing, at equal iterations? Writes a table.

    python scripts/start_from_weights.py --pbc <PBC_dataset_normal_DIB> --output-dir runs/start_from_weights

Each seed trains the small recipe on the PBC pictures of learn_from_scratch.py's split, for the same iterations and with
the same settings: from random weights, from weights, and from weights with a LoRA on a frozen backbone. The weights are
those of --weights or, without it, of the same recipe on drawn cells, which no clinic's picture went into. kNN-20 votes
with the pictures of the training split and is judged on the others, before the first step and along the way.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import torch
from learn_from_scratch import SPLITS, curve, minutes, write_split
from omegaconf import OmegaConf

import dinov2.train.train as train_command
from dinov2.configs import CONFIG_FOLDER
from dinov2.data.sample_cells import write_sample_cells
from dinov2.hub import load_backbone
from dinov2.train.finetuning import choose_learned
from dinov2.utils.files import atomic_write

WAYS = {"random weights": [], "weights": [], "weights, LoRA": ["student.lora.rank={rank}", "student.lora.alpha={rank}"]}


def train(config: Path, run: Path, lists: Path, overrides: list[str]) -> None:
    """Run train.py as a user would; a run that is there already is continued."""
    command = [sys.executable, train_command.__file__, "--config-file", config, "--output-dir", run.parent]
    dataset = f"train.dataset_path=HemaStandardDataset:root={lists}:shuffle=1"
    subprocess.run([*map(str, command), "--name", run.name, dataset, *overrides], check=True)


def pretrain(args: argparse.Namespace, folder: Path) -> Path:
    """A run of the recipe on drawn cells."""
    cells = folder / "drawn_cells"
    n_probe = 24  # the set is made with labelled cells, which nothing here uses
    write_sample_cells(cells, args.drawn_cells, n_probe, n_probe, 5, cells_per_patient=(2, 3), n_workers=2)
    settings = [f"optim.epochs={args.pretrain_epochs}", "evaluation.eval_period_iterations=0", *args.overrides]
    train(args.config_file, folder / "pretrained", cells / "lists", settings)
    return folder / "pretrained"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pbc", type=Path, required=True, help="the data set's folder, with a folder per class")
    parser.add_argument("--output-dir", type=Path, required=True, help="for split, runs and results.md")
    parser.add_argument("--config-file", type=Path, default=CONFIG_FOLDER / "train" / "small_from_scratch.yaml")
    parser.add_argument(
        "--weights", help="start from these (file, run, name, URL) instead of pretraining on drawn cells"
    )
    parser.add_argument("--drawn-cells", type=int, default=1600, help="how many are drawn (default: %(default)s)")
    parser.add_argument("--pretrain-epochs", type=float, default=30.0, help="on those (default: %(default)s)")
    parser.add_argument(
        "--epochs", type=float, default=20.0, help="of each run that is compared (default: %(default)s)"
    )
    parser.add_argument("--lora-rank", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values for every run")
    args = parser.parse_intermixed_args()
    folder = args.output_dir.resolve()
    counts = write_split(args.pbc, folder)
    weights = args.weights or pretrain(args, folder)

    labelled = {"name": "pbc", **{split: str(folder / f"{split}10.csv") for split in SPLITS}}
    judged = [f"evaluation.datasets={json.dumps([labelled])}", "evaluation.eval_period_iterations=100"]
    common = [f"optim.epochs={args.epochs}", *judged]
    runs: dict[str, list[Path]] = {}
    for way, settings in WAYS.items():
        begin = [] if way == "random weights" else [f"student.pretrained_weights={weights}"]
        adapters = [text.format(rank=args.lora_rank) for text in settings]
        for seed in args.seeds:
            run = folder / f"{way.replace(', ', '_').replace(' ', '_')}_seed{seed}"
            overrides = [*common, *args.overrides, *begin, *adapters, f"train.seed={seed}"]
            train(args.config_file, run, folder / "lists", overrides)
            runs.setdefault(way, []).append(run)

    points = [iteration for iteration, _ in curve(runs["weights"][0])]
    lines = [
        f"Trained on {counts['train']} PBC pictures without labels, judged on {counts['test']} others; "
        f"`{args.config_file.name}`, seeds {', '.join(map(str, args.seeds))}; weights: {describe(args, weights)}. "
        "kNN-20 balanced accuracy on ten classes after so many iterations: mean over seeds, in brackets the lowest and "
        "highest.",
        "",
        f"| start | {' | '.join(map(str, points))} | backbone parameters that learn | minutes a run |",
        "|---" * (len(points) + 3) + "|",
    ]
    for way, of_way in runs.items():
        scores = [dict(curve(run)) for run in of_way]
        cells = " | ".join(spread([score[point] for score in scores]) for point in points)
        took = statistics.mean(minutes(run) for run in of_way)
        lines.append(f"| {way} | {cells} | {n_learned(of_way[0]):,} | {took:.1f} |")
    lines += [
        "",
        f"Settings for every run: {' '.join(args.overrides) or 'those of the file'}; torch {torch.__version__}.",
    ]
    with atomic_write(folder / "results.md", "w") as file:
        file.write("\n".join(lines) + "\n")
    print("\n".join(lines))


def describe(args: argparse.Namespace, weights: str | Path) -> str:
    if args.weights:
        return f"`{weights}`"
    return f"the same recipe, {args.pretrain_epochs:g} epochs on {args.drawn_cells} drawn cells"


def spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})"


def n_learned(run: Path) -> int:
    """Parameters of the backbone that learn, by the run's configuration."""
    cfg = OmegaConf.load(run / "config.yaml")
    model = load_backbone(run, img_size=cfg.crops.global_crops_size)
    rank = cfg.student.lora.rank
    if not rank:
        return sum(parameter.numel() for parameter in model.parameters())
    shapes = [model.get_parameter(f"{name}.weight").shape for name in choose_learned(model, cfg.student).layers]
    return sum(rank * (n_out + n_in) for n_out, n_in in shapes)


if __name__ == "__main__":
    main()

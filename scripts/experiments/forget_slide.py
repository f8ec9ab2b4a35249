r"""Measure on drawn and on real cells whether metadata guidance makes features forget the slide, and what it costs.

    python scripts/experiments/forget_slide.py --output-dir runs/forget_slide
    python scripts/experiments/forget_slide.py --output-dir runs/forget_hospital --hospitals \
        acevedo_centre=<PBC> ssl_seg_whole=<segmentation_WBC> bccd=<BCCD_Dataset> \
        aslan=<blood-cell-detection-dataset> -- train.center_crop=1

Small networks train on cells of 64 drawn slides, each with its own stain, light and camera, by small_from_scratch.yaml
with the values of SETTINGS. The recipes: no guidance, `train.metadata` that suppresses the column `slide`, stronger
jitter of colour or stains, colours that are standardised in each image before, and no other images' backgrounds. Cells
of 16 other slides test the features (CLS token): kNN-20 and a linear probe of the ten classes, which learn from the
training slides; and the batch effect, how well a linear probe and 1-NN tell these 16 slides apart within a class
(chance 1/16; dinov2/eval/cross.py). The first row of a table is the same network, not trained.

With `--hospitals` real cells take the place of drawn ones, and data sets that of slides. Their common classes are kinds
of cell, as in transfer.py; a quarter of the smear images, or of the cells of sets without them, tests. Four classes of
white cells are also learned from the first data set and tested on the second, two hospitals that name them. The names
above cut all cells about the same, so nothing more is cut off.

The same command continues a stopped experiment. After each run, scores.csv and results.md are written.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import pandas as pd
from learn import METRIC, checksum, keep_settings, markdown, spread, write_table
from PIL import Image
from transfer import KINDS, WHITE, write_cells

import dinov2.train.train as train_command
from dinov2.configs import CONFIG_FOLDER
from dinov2.data.sample_cells import CELL_CLASSES, Slide, draw_cell
from dinov2.data.splits import make_folds
from dinov2.eval import extract_features, knn, linear
from dinov2.eval.cross import CrossOptions, batch_effect
from dinov2.eval.features import Features, read_features
from dinov2.eval.features.data_sets import Comparison, CrossData
from dinov2.eval.knn import KnnOptions
from dinov2.eval.linear import LinearOptions
from dinov2.eval.protocol import EvaluationData
from dinov2.eval.results import summarize
from dinov2.utils.command import exit_code, progress_bar
from dinov2.utils.config import load_run_config
from dinov2.utils.files import atomic_write

CONFIG = CONFIG_FOLDER / "train" / "small_from_scratch.yaml"
SIZE = 96  # px
# {part: (slides, cells of each class on a slide)}; half of the latter train a predictor of the slide
PARTS = {"train": (64, 2), "unseen": (16, 6)}
N_FOLDS = 2
MOST_CELLS = 300  # of a kind in a hospital
UNTRAINED, STANDARDISED = "untrained", "standardised images"
LEVEL, SPREAD = 160, 45  # mean and standard deviation of each colour in a standardised image, about those of a smear
SETTINGS = [
    *("optim.freeze_last_layer_epochs=0", "optim.warmup_epochs=0.05", "train.views=0"),
    # most of a drawn cell; and stains are jittered in some recipes only
    *("train.center_crop=0.65", "augmentation.hema.background_radius=[0.7,1.0]", "augmentation.hema.stain=0"),
]
RECIPES = {
    "without": [],
    "suppress slide, weight 0.1": ["train.metadata.column=slide", "train.metadata.weight=0.1"],
    "suppress slide, weight 0.5": ["train.metadata.column=slide", "train.metadata.weight=0.5"],
    "colour jitter": [
        *("augmentation.hema.brightness=0.3", "augmentation.hema.contrast=0.3", "augmentation.hema.saturation=0.2"),
        "augmentation.hema.hue=0.1",
    ],
    "stain jitter": ["augmentation.hema.stain=0.4"],
    "stain jitter, suppress slide, weight 0.5": [
        *("augmentation.hema.stain=0.4", "train.metadata.column=slide", "train.metadata.weight=0.5")
    ],
    STANDARDISED: [],
    "own backgrounds": ["augmentation.hema.background_probability=0"],
}


def draw_part(folder: Path, part: str, n_slides: int, n_cells: int) -> Path:
    """Draw the cells of a part, unless they are there; return their table with the columns Label and slide."""
    table, rows = folder / f"{part}.csv", []
    if table.is_file():
        return table
    number = list(PARTS).index(part)
    for slide_number in progress_bar(range(n_slides), f"drawing {part} slides", n_slides):
        slide = Slide(np.random.default_rng([number, slide_number]))
        for label in CELL_CLASSES:
            for i in range(n_cells):
                path = folder / part / f"{slide_number:02d}_{label}_{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                rng = np.random.default_rng([number, slide_number, CELL_CLASSES.index(label), i + 1])
                Image.fromarray(draw_cell(label, slide, rng, SIZE)).save(path)
                rows.append({"Image Path": str(path), "Label": label, "slide": f"{part}_{slide_number:02d}"})
    write_table(pd.DataFrame(rows), table)
    return table


def standardise_part(table: Path, folder: Path) -> Path:
    """Write copies of the images of a part with the same mean and deviation of each colour; return their table."""
    rows, copied = pd.read_csv(table), folder / table.name
    if copied.is_file():
        return copied
    copies = [folder / table.stem / Path(name).name for name in rows["Image Path"]]
    for name, copy in zip(rows["Image Path"], copies, strict=True):
        levels = np.asarray(Image.open(name), dtype=np.float32)
        scaled = (levels - levels.mean(axis=(0, 1))) / (levels.std(axis=(0, 1)) + 1) * SPREAD + LEVEL
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(scaled).clip(0, 255).astype(np.uint8)).save(copy)
    write_table(rows.assign(**{"Image Path": list(map(str, copies))}), copied)
    return copied


def cut_hospitals(sources: dict[str, str], folder: Path) -> dict[str, Path]:
    """Cut out the cells of data sets; return tables of parts with the columns Label, slide and white (class or "")."""
    tables = {part: folder / f"{part}.csv" for part in PARTS}
    if all(table.is_file() for table in tables.values()):
        return tables
    parts: dict[str, list[pd.DataFrame]] = {part: [] for part in PARTS}
    for name, source in sources.items():
        cells = write_cells(name, source, folder / name).sample(frac=1, random_state=0)
        cells["Image Path"] = [str((folder / name / path).resolve()) for path in cells["Image Path"]]
        names = cells["Label"].str.lower()
        cells = cells.assign(Label=names.map(KINDS), white=names.map(WHITE).fillna(""), slide=name).dropna(
            subset="Label"
        )
        cells = cells.groupby("Label").head(MOST_CELLS)
        smears = cells["patient"] if "patient" in cells else cells["Image Path"]
        numbers, _ = pd.factorize(smears)
        parts["unseen"].append(cells[numbers % 4 == 0])
        parts["train"].append(cells[numbers % 4 != 0])
    for part, rows in parts.items():
        write_table(pd.concat(rows)[["Image Path", "Label", "slide", "white"]], tables[part])
    return tables


def train(run: Path, table: Path, *overrides: str) -> None:
    """Run train.py as a user would, which resumes an unfinished run; exit as it does if it is stopped or fails."""
    command = [sys.executable, train_command.__file__, "--config-file", CONFIG, "--output-dir", run.parent]
    cache = run.parent.parent / "cache"  # decoded images, for all runs
    images = f"train.dataset_path=HemaStandardDataset:root={table}:shuffle=1:cache={cache}"
    done = subprocess.run([*map(str, command), "--name", run.name, images, *overrides])
    if done.returncode:
        sys.exit(done.returncode)


def score(checkpoint: Path, tables: dict[str, Path], folder: Path) -> dict[str, float]:
    """Extract features, and evaluate classes on unseen slides and the batch effect among these."""
    features = {}
    for part, table in tables.items():
        flags = ["--data", str(table), "--num-workers", "0", "--overwrite", "--output-dir", str(folder / part)]
        extract_features.main(["--checkpoint", str(checkpoint), *flags])
        features[part] = read_features(folder / part / "features.h5")
    labels = np.concatenate([each.labels for each in features.values()])
    values = np.concatenate([each.features for each in features.values()])
    n_known = len(features["train"])
    sides = np.arange(n_known), np.arange(n_known, len(labels))
    scores = class_scores(values, labels, list(features["train"].class_names), *sides, "class")
    rows = pd.concat([pd.read_csv(table, keep_default_na=False) for table in tables.values()]).set_index("Image Path")
    if "white" in rows:
        rows = rows.loc[[path for each in features.values() for path in each.paths]]
        first, second, *_ = rows["slide"].unique()
        numbers, names = pd.factorize(rows["white"])
        is_white = rows["white"].ne("").to_numpy()
        sides = tuple(np.flatnonzero(is_white & rows["slide"].eq(name).to_numpy()) for name in (first, second))
        scores |= class_scores(values, numbers, list(names), *sides, f"{first} to {second}")
    return scores | slide_scores(features["unseen"], tables["unseen"])


def class_scores(
    values: np.ndarray, labels: np.ndarray, class_names: list[str], known: np.ndarray, tested: np.ndarray, task: str
) -> dict[str, float]:
    """Return the balanced accuracies of kNN-20 and a linear probe of features [N, D], at positions of both sides."""
    data = EvaluationData({"cls": values}, labels, class_names, [(known, tested)])
    predictions = knn.evaluate(data, KnnOptions(k=[20])) | linear.evaluate(data, LinearOptions("sweep"))
    names = {"knn_20": f"{task}, kNN-20", "linear_sweep": f"{task}, linear"}
    return {names[name]: summarize(labels, made, data.class_names)[METRIC] for name, made in predictions.items()}


def slide_scores(unseen: Features, table: Path) -> dict[str, float]:
    """Return how well a linear probe and 1-NN tell slides apart, as the mean over classes."""
    rows = pd.read_csv(table)
    slide_of = dict(zip(rows["Image Path"], rows["slide"], strict=True))
    slides = [slide_of[path] for path in unseen.paths]
    names = sorted(set(slides))
    sets = np.array([names.index(slide) for slide in slides])
    folds = make_folds(sets * len(unseen.class_names) + unseen.labels, None, N_FOLDS, 0)
    patients = [str(i) for i in range(len(sets))]
    batch = Comparison("", "", folds)
    data = CrossData(names, unseen.features, sets, unseen.labels, list(unseen.class_names), patients, batch=batch)
    means = batch_effect(data, CrossOptions())["mean_over_classes"]
    return {f"slide, {name}": means[key][METRIC] for name, key in (("linear", "linear"), ("1-NN", "knn_1"))}


def report(scores: pd.DataFrame) -> list[str]:
    """Return the table of all runs as lines of Markdown."""
    rows: dict[str, dict[str, str]] = {}
    for name, of_recipe in scores.groupby("recipe", sort=False):
        row: dict[str, Any] = {"seeds": str(len(of_recipe))}
        values = of_recipe.drop(columns=["recipe", "seed"])
        rows[str(name)] = row | {column: spread(values[column].tolist()) for column in values}
    return markdown("recipe", rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="for the cells, and a folder for each recipe")
    parser.add_argument("--hospitals", nargs="+", metavar="NAME=FOLDER", help="data sets of prepare_dataset.py")
    parser.add_argument("--only", nargs="+", choices=[*RECIPES], default=[*RECIPES], help="recipes (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="of each run (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values for every run")
    args = parser.parse_intermixed_args(argv)
    folder = args.output_dir.resolve()
    settings = {"steps": args.steps, "hospitals": args.hospitals, "overrides": args.overrides}
    keep_settings(folder, settings, "--output-dir")
    if args.hospitals:
        cells = cut_hospitals(dict(text.split("=", 1) for text in args.hospitals), folder / "cells")
    else:
        cells = {part: draw_part(folder / "cells", part, *numbers) for part, numbers in PARTS.items()}
    scores = pd.read_csv(folder / "scores.csv").to_dict("records") if (folder / "scores.csv").is_file() else []
    for seed in args.seeds:
        for name in (UNTRAINED, *args.only):
            own = [*SETTINGS, *RECIPES.get(name, []), *args.overrides]
            cfg = load_run_config(CONFIG, [*own, "train.dataset_path=HemaStandardDataset:root=lists"])
            runs = folder / name.replace(",", "").replace(" ", "_")
            keep_settings(runs, {"checksum of all values": checksum(cfg)}, "--output-dir")
            if any((row["recipe"], row["seed"]) == (name, seed) for row in scores):
                continue
            tables = cells
            if name == STANDARDISED:
                tables = {part: standardise_part(table, folder / "standardised") for part, table in cells.items()}
            run = runs / f"seed{seed}"
            steps = 1 if name == UNTRAINED else args.steps
            length = [f"train.OFFICIAL_EPOCH_LENGTH={steps}", "optim.epochs=1", "train.saveckp_freq=0.25"]
            if name == UNTRAINED:
                length += ["optim.base_lr=0", "optim.min_lr=0"]
            settings = [*length, "evaluation.eval_period_iterations=0", f"train.seed={seed}"]
            train(run, tables["train"], *settings, *own)
            scores.append({"recipe": name, "seed": seed, **score(run, tables, run / "features")})
            write_table(pd.DataFrame(scores), folder / "scores.csv")
            with atomic_write(folder / "results.md", "w") as file:
                file.write("\n".join(report(pd.DataFrame(scores))) + "\n")
    print("\n".join(report(pd.DataFrame(scores))))


if __name__ == "__main__":
    sys.exit(exit_code(main))

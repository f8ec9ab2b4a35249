"""Patients made of real cells with planted rules: pooled vectors, ABMIL by DinoBloom's protocol, and the robust recipe.

    python scripts/experiments/learn.py --pbc <PBC_dataset_normal_DIB> --output-dir runs/pbc
    python scripts/experiments/patients.py --split runs/pbc --checkpoint runs/pbc/from_scratch/seed0 \\
        --output-dir patients

Three rules tell two classes of patients apart: `rare class`, some erythroblasts that the others lack; `ratio`, more
lymphocytes and fewer neutrophils, though both vary between patients; and `morphology`, larger monocytes. The images are
divided into five parts, and all patients of a fold get cells of one part: no image is in training and test. Beside them
stand shuffled labels, and the first rule with features a tenth as large, as those of another network may be. `--curve`
measures a learning curve over the number of patients on drawn features instead, with its time; it needs no images. A
stopped experiment continues.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import pandas as pd
from learn import markdown, spread
from PIL import Image

from dinov2.data.datasets.bag_folds import BagFold, FoldedBags, draw_folds
from dinov2.data.datasets.bags import PatientBags
from dinov2.data.datasets.decode import decode_image
from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.eval import abmil
from dinov2.eval.features.extract import Embedder
from dinov2.eval.results import summarize
from dinov2.utils.command import exit_code
from dinov2.utils.files import atomic_write

N_PARTS, N_PATIENTS, N_CELLS = 5, 150, (60, 140)
RARE, CHANGED, ZOOM = "erythroblast", "monocyte", 1.2
# shares of the classes; each patient's are drawn around them (a Dirichlet distribution of this concentration)
SHARES = {
    **{"neutrophil_segmented": 0.45, "neutrophil_band": 0.05, "lymphocyte": 0.22, "monocyte": 0.12},
    **{"eosinophil": 0.06, "basophil": 0.03, "metamyelocyte": 0.03, "myelocyte": 0.02, "promyelocyte": 0.02},
}
CONCENTRATION = 30
RARE_SHARE, RATIO_SHIFT, SCALE = 0.03, 0.10, 0.1
RULES = ("rare class", "ratio", "morphology")
RECIPES = {"dinobloom": abmil.DEFAULTS, "robust": abmil.ROBUST_DEFAULTS}
METRIC = "balanced_accuracy"
# the learning curve: cells are drawn numbers, of which a few of half the patients are shifted along one direction
CURVE_PATIENTS, CURVE_CELLS, CURVE_DIM, CURVE_SHARE, CURVE_SHIFT = (20, 40, 80, 150), 500, 384, 0.03, 4.0


def write_changed(paths: Sequence[str], folder: Path) -> list[str]:
    """Write the images with a larger cell: the middle, scaled to the size of the whole."""
    files = []
    for path in paths:
        file = folder / f"{Path(path).stem}.png"
        if not file.exists():
            image = Image.fromarray(decode_image(path))
            width, height = image.size
            x, y = (side * (1 - 1 / ZOOM) / 2 for side in image.size)
            with atomic_write(file) as stream:
                image.resize(image.size, Image.Resampling.BICUBIC, (x, y, width - x, height - y)).save(stream, "PNG")
        files.append(str(file))
    return files


def embed(args: argparse.Namespace) -> dict[str, list[np.ndarray]]:
    """Return the features of each class by part, {class: arrays [N, D]}; `changed` are the larger monocytes."""
    cells = pd.concat([pd.read_csv(args.split / f"{side}10.csv") for side in ("train", "test")], ignore_index=True)
    of_class = cells[cells["Label"] == CHANGED]
    changed = write_changed(of_class["Image Path"].tolist(), args.output_dir / "changed")
    table = pd.concat([cells, pd.DataFrame({"Image Path": changed, "Label": "changed"})], ignore_index=True)
    table.to_csv(args.output_dir / "cells.csv", index=False)
    # a changed image is in the part of its original
    part = pd.Series(np.random.default_rng(0).permutation(len(cells)) % N_PARTS, index=cells.index)
    part = np.concatenate([part, part[of_class.index]])
    embedder = Embedder(args.checkpoint)
    features = embedder.features_of(LabelledCells.from_path(args.output_dir / "cells.csv"), args.output_dir / "f.h5")
    labels = np.array([features.class_names[i] for i in features.labels])
    return {
        name: [features.features[(labels == name) & (part == k)] for k in range(N_PARTS)]
        for name in set(table["Label"])
    }


def make_patients(
    cells: dict[str, list[np.ndarray]], rule: str, seed: int, shuffled: bool = False, scale: float = 1.0
) -> FoldedBags:
    """Make patients of two classes and their folds: patients of one part of the images are tested together.

    `scale` multiplies all features.
    """
    rng = np.random.default_rng([seed, RULES.index(rule)])
    bags, labels, parts = {}, {}, {}
    for number in range(N_PATIENTS):
        patient, has_rule, part = f"p{number:03d}", bool(number // N_PARTS % 2), number % N_PARTS
        wanted = dict(SHARES)
        if has_rule and rule == "ratio":
            wanted["neutrophil_segmented"] -= RATIO_SHIFT
            wanted["lymphocyte"] += RATIO_SHIFT
        shares = rng.dirichlet(CONCENTRATION * np.array(list(wanted.values())))
        counts = rng.multinomial(rng.integers(*N_CELLS), shares)
        kinds = dict(zip(wanted, counts.tolist(), strict=True))
        if has_rule and rule == "rare class":
            kinds[RARE] = max(1, round(RARE_SHARE * sum(counts)))
        if has_rule and rule == "morphology":
            kinds["changed"] = kinds.pop(CHANGED)
        drawn = [cells[kind][part][rng.integers(len(cells[kind][part]), size=n)] for kind, n in kinds.items()]
        bags[patient], parts[patient] = np.concatenate(drawn) * np.float32(scale), part
        labels[patient] = "with" if has_rule else "without"
    if shuffled:
        labels = dict(zip(labels, rng.permutation(list(labels.values())).tolist(), strict=True))
    of = PatientBags(list(bags), list(bags.values()), [["cell"] * len(bag) for bag in bags.values()]).with_labels(
        labels
    )
    part_of = np.array(list(parts.values()))
    folds = []
    for k in range(N_PARTS):
        val = (k + 1) % N_PARTS
        positions = (part_of != k) & (part_of != val), part_of == val, part_of == k
        folds.append(BagFold(*map(np.flatnonzero, positions)))
    return FoldedBags(of, folds, [str(k) for k in range(N_PARTS)])


def measure(file: Path, data: FoldedBags, seed: int, recipes: Sequence[str], models: Sequence[str]) -> dict[str, dict]:
    """Return {method: metrics and seconds}, from the file where it is there."""
    if file.exists():
        return json.loads(file.read_text())
    vectors, _ = abmil.evaluate_vectors(data, seed)
    results = {row: {"metrics": found["together"]} for row, found in vectors.items()}
    for recipe in recipes:
        for model in models:
            started = time.perf_counter()
            options = replace(RECIPES[recipe], model=model, seed=seed)
            predictions, _ = abmil.evaluate(data, options)
            seconds = time.perf_counter() - started
            by_fold = predictions.by_fold(data.test_sets(), len(data.bags))
            metrics = summarize(data.labels, by_fold, data.bags.class_names, seed=seed)
            results[f"ABMIL {model}, {recipe}"] = {"metrics": metrics, "seconds": seconds}
    with atomic_write(file, "w") as stream:
        json.dump(results, stream)
    return results


def drawn_patients(n_patients: int, seed: int) -> FoldedBags:
    """Draw patients for the learning curve, of whom every other one has shifted cells."""
    rng = np.random.default_rng([seed, n_patients])
    direction = rng.normal(size=CURVE_DIM)
    direction *= CURVE_SHIFT / np.linalg.norm(direction)
    bags, labels = [], {}
    for number in range(n_patients):
        cells = rng.normal(size=(CURVE_CELLS, CURVE_DIM)) + rng.normal(size=CURVE_DIM) * 0.1
        if number % 2:
            cells[: round(CURVE_SHARE * CURVE_CELLS)] += direction
        bags.append(cells.astype(np.float32))
        labels[f"p{number:03d}"] = "with" if number % 2 else "without"
    of = PatientBags(list(labels), bags, [["cell"] * CURVE_CELLS] * n_patients).with_labels(labels)
    return draw_folds(of, "crossval", seed=seed)


def table_of(first: str, results: dict[str, list[dict[str, dict]]]) -> list[str]:
    """Return a markdown table: a row for each method, a column for each group of results of several seeds."""
    rows: dict[str, dict[str, str]] = {}
    for column, of_seeds in results.items():
        for method in of_seeds[0]:
            low, high = of_seeds[0][method]["metrics"]["intervals"][METRIC]
            text = f"{spread([each[method]['metrics'][METRIC] for each in of_seeds])}; [{low:.2f}, {high:.2f}]"
            if "seconds" in of_seeds[0][method]:
                text += f"; {np.median([each[method]['seconds'] for each in of_seeds]):.0f} s"
            rows.setdefault(method, {})[column] = text
    return markdown(first, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", type=Path, help="output folder of learn.py")
    parser.add_argument("--checkpoint", help="the network: a file, a run's folder or a name")
    parser.add_argument("--curve", action="store_true", help="measure the learning curve on drawn features")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument("--models", nargs="+", choices=tuple(abmil.MODELS), default=["classwise"])
    args = parser.parse_args(argv)
    if not args.curve and not (args.split and args.checkpoint):
        parser.error("give --split and --checkpoint, or --curve")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, dict]]] = {}
    how = args.seeds, args.recipes, args.models
    if args.curve:
        for n_patients in CURVE_PATIENTS:
            for seed in args.seeds:
                file = args.output_dir / f"curve_{n_patients}_{seed}.json"
                found = measure(file, drawn_patients(n_patients, seed), seed, *how[1:])
                results.setdefault(f"{n_patients} patients", []).append(found)
        title = f"{CURVE_CELLS} drawn cells a patient, {CURVE_DIM} features"
    else:
        cells = embed(args)
        cases = {rule: (rule, False, 1.0) for rule in RULES}
        cases |= {f"{RULES[0]}, shuffled labels": (RULES[0], True, 1.0)}
        cases |= {f"{RULES[0]}, features x {SCALE}": (RULES[0], False, SCALE)}
        for name, (rule, shuffled, scale) in cases.items():
            for seed in args.seeds:
                file = args.output_dir / f"{name.replace(' ', '_').replace(',', '')}_{seed}.json"
                data = make_patients(cells, rule, seed, shuffled, scale)
                results.setdefault(name, []).append(measure(file, data, seed, *how[1:]))
        title = f"{N_PATIENTS} patients of {N_CELLS[0]} to {N_CELLS[1]} PBC cells"
    lines = [
        f"{title}; five folds; balanced accuracy: mean and range over seeds {', '.join(map(str, args.seeds))}; the "
        "95 % interval over patients of the first seed; the median time.",
        "",
        *table_of("method", results),
    ]
    with atomic_write(args.output_dir / ("curve.md" if args.curve else "results.md"), "w") as file:
        file.write("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(exit_code(main))

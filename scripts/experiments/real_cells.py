"""Evaluate a network by all protocols on real cells: PBC, SSL Seg Dataset 1, and patients made of PBC cells.

    python scripts/experiments/learn.py --pbc <PBC_dataset_normal_DIB> --output-dir runs/pbc
    python scripts/experiments/real_cells.py --split runs/pbc --run runs/pbc/from_scratch/seed0 \
        --ssl <segmentation_WBC> --output-dir <folder>

The network never saw the tested PBC images. SSL Seg (Zheng et al. 2018) is of another hospital, stain and size; one of
its five classes has a single image. The patients are made up: bags of PBC cells with a few erythroblasts or none.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dinov2.eval import abmil, evaluate, extract_features, linear
from dinov2.utils.files import atomic_write

SSL_CLASSES = {1: "neutrophil", 2: "lymphocyte", 3: "monocyte", 4: "eosinophil", 5: "basophil"}
PLANTED, N_PATIENTS, CELLS_OF_A_PATIENT, PLANTED_CELLS = "erythroblast", 60, 20, (2, 4)


def evaluate_cells(run: str, cells: Sequence[str], output: Path) -> list[str]:
    """Return the table of all protocols, DINOv2's SGD sweep with 2,000 batches instead of 12,500."""
    evaluate.main(
        ["--checkpoint", run, "--baseline", "untrained", "histogram", "pixels", *cells, "--output-dir", str(output)]
    )
    sgd = ["--protocol", "sgd", "--sgd-iterations", "2000", "--output-dir", str(output / "linear-sgd")]
    linear.main(["--checkpoint", run, *cells, *sgd])
    results = read_results(output) | {
        "linear-sgd": {"model": read_results(output / "linear-sgd")["model"]["linear_sgd"]}
    }
    lines = ["| features | protocol | accuracy | balanced accuracy | weighted F1 |", "|---|---|---|---|---|"]
    for protocol, rows in results.items():
        if protocol in ("knn-dino_100", "knn-dino_200"):
            continue  # few classes have as many cells
        for source, row in rows.items():
            values = [percent(row, name) for name in ("accuracy", "balanced_accuracy", "weighted_f1")]
            lines.append(f"| {source} | {protocol} | {' | '.join(values)} |")
    return lines


def read_results(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))["results"]
    return results


def percent(row: dict[str, Any], name: str) -> str:
    low, high = row["intervals"][name]
    return f"{100 * row[name]:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def write_ssl_cells(repository: Path, file: Path) -> None:
    """Write a CSV of the SSL Seg images that are there, without the masks beside them."""
    labels = pd.read_csv(repository / "Class Labels of Dataset 1.csv", names=["number", "class"], encoding="utf-8-sig")
    labels = labels.apply(pd.to_numeric, errors="coerce").dropna().astype(int)
    paths = labels["number"].map(lambda number: (repository / "Dataset 1" / f"{number:03d}.bmp").resolve())
    cells = pd.DataFrame({"Image Path": paths, "Label": labels["class"].map(SSL_CLASSES)})
    file.parent.mkdir(parents=True, exist_ok=True)
    cells[paths.map(Path.is_file)].to_csv(file, index=False)


def evaluate_patients(run: str, split: Path, output: Path) -> list[str]:
    """Return a table of ABMIL on made-up patients, by aggregator, with the attention on planted cells."""
    cells = pd.concat([pd.read_csv(split / f"{side}10.csv") for side in ("test", "train")])
    patients = make_patients(cells)
    output.mkdir(parents=True, exist_ok=True)
    patients.to_csv(output / "patients.csv", index=False)
    data = ["--data", str(output / "patients.csv"), "--output-dir", str(output)]
    extract_features.main(["--checkpoint", run, *data])
    classes = cells.set_index("Image Path")["Label"]
    lines = ["| aggregator | accuracy | AUROC | planted cells, share of attention (of cells) |", "|---|---|---|---|"]
    for model in ("classwise", "gated", "mean", "max"):
        flags = ["--model", model, "--protocol", "crossval", "--runs", "3", "--learning-rate", "0.01"]
        abmil.main([*flags, "--features", str(output / "features.h5"), "--output-dir", str(output / model)])
        metrics, share = read_results(output / model)[model]["together"], "-"
        if model in ("classwise", "gated"):
            attention = pd.read_csv(output / model / "attention.csv")
            is_planted = attention["source"].map(classes) == PLANTED
            ill = attention["patient"].isin(attention["patient"][is_planted])
            of_attention = attention["attention"][is_planted].sum() / attention["attention"][ill].sum()
            share = f"{of_attention:.0%} ({is_planted.sum() / ill.sum():.0%})"
        lines.append(f"| {model} | {percent(metrics, 'accuracy')} | {percent(metrics, 'auroc')} | {share} |")
    return lines


def make_patients(cells: pd.DataFrame) -> pd.DataFrame:
    """Make bags, every other one with a few planted cells; a cell is in one bag."""
    rng = random.Random(0)
    planted = cells["Image Path"][cells["Label"] == PLANTED].tolist()
    classes = cells[cells["Label"] != PLANTED].groupby("Label", sort=False)
    others = [path for _, rows in classes for path in rows["Image Path"]]
    rng.shuffle(planted)
    rng.shuffle(others)
    rows = []
    for number in range(N_PATIENTS):
        n_planted = rng.randint(*PLANTED_CELLS) if number % 2 == 1 else 0
        bag = [planted.pop() for _ in range(n_planted)] + [others.pop() for _ in range(CELLS_OF_A_PATIENT - n_planted)]
        rows += [(path, "with" if n_planted else "without", f"patient_{number:02d}") for path in bag]
    return pd.DataFrame(rows, columns=["Image Path", "Label", "patient"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", type=Path, required=True, help="output folder of learn.py")
    parser.add_argument("--run", required=True, help="one of its runs")
    parser.add_argument("--ssl", type=Path, required=True, help="the repository segmentation_WBC")
    parser.add_argument("--output-dir", type=Path, required=True, help="for results and results.md")
    args = parser.parse_args(argv)
    output = args.output_dir.resolve()
    sides = [text for side in ("train", "test") for text in (f"--{side}", str(args.split / f"{side}10.csv"))]
    pbc = evaluate_cells(args.run, sides, output / "pbc")
    write_ssl_cells(args.ssl, output / "ssl_seg.csv")
    ssl = evaluate_cells(args.run, ["--data", str(output / "ssl_seg.csv")], output / "ssl_seg")
    patients = evaluate_patients(args.run, args.split, output / "patients")
    lines = ["# The protocols on real cells", "", "In percent; in brackets 95 % bootstrap intervals."]
    lines += ["", "## PBC, ten classes", "", *pbc, "", "## SSL Seg Dataset 1, five classes, five folds", "", *ssl]
    lines += ["", "## Patients made of PBC cells, with or without erythroblasts", "", *patients]
    with atomic_write(output / "results.md", "w") as file:
        file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""All protocols on real cells: ten classes of PBC, SSL Seg Dataset 1, and patients made of PBC cells. Writes a page.

    python scripts/learn_from_scratch.py --pbc <PBC_dataset_normal_DIB> --output-dir runs/from_scratch
    python scripts/judge_real_cells.py --trained runs/from_scratch --ssl <segmentation_WBC> --output-dir <folder>

The network is the small ViT of the first command (`--seed` tells which of its runs), whose split is used again: it
never saw the PBC pictures that are judged. SSL Seg (Zheng et al. 2018) is of another hospital, stain and size; one of
its five classes has a single picture. The patients are made up: bags of PBC cells that have a few erythroblasts or
none, which is what is to be found.
"""

import argparse
import csv
import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.eval import abmil, evaluate, extract_features, linear
from dinov2.utils.files import atomic_write

SSL_CLASSES = {1: "neutrophil", 2: "lymphocyte", 3: "monocyte", 4: "eosinophil", 5: "basophil"}
BASELINES = ("untrained", "histogram", "pixels")
SGD_ITERATIONS = 2000
PLANTED, N_PATIENTS, CELLS_OF_A_PATIENT, PLANTED_CELLS = "erythroblast", 60, 20, (2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, required=True, help="output folder of learn_from_scratch.py")
    parser.add_argument("--seed", type=int, default=0, help="which of its runs (default: %(default)s)")
    parser.add_argument("--ssl", type=Path, required=True, help="the repository segmentation_WBC")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="where the page goes (default: results.md in the output folder)")
    args = parser.parse_args()
    output = args.output_dir.resolve()
    network = ["--checkpoint", str(args.trained / f"seed{args.seed}"), "--baseline", *BASELINES]

    train, test = (str(args.trained / f"{side}10.csv") for side in ("train", "test"))
    pbc = judge_cells(network, ["--train", train, "--test", test], output / "pbc")
    cells = write_ssl_cells(args.ssl, output / "ssl_seg.csv")
    ssl = judge_cells(network, ["--data", str(cells)], output / "ssl_seg")
    patients = judge_patients(network[:2], args.trained, output / "patients")

    lines = [
        *("# The protocols on real cells", ""),
        "Made by `scripts/judge_real_cells.py`, which tells what the data are. In percent; in brackets 95 % bootstrap",
        "intervals over cells (patients in the last table). Nothing here was chosen by test cells.",
        *("", "## PBC, ten classes", "", *pbc),
        *("", "## SSL Seg Dataset 1, five classes, five folds", "", *ssl),
        *("", "## Patients made of PBC cells, with or without erythroblasts", "", *patients),
    ]
    page = args.page or output / "results.md"
    with atomic_write(page, "w") as file:
        file.write("\n".join(lines) + "\n")
    print(f"{page} is written")


def judge_cells(network: list[str], cells: list[str], output: Path) -> list[str]:
    """A table of all protocols, DINOv2's SGD sweep with fewer batches than its 12,500."""
    evaluate.main([*network, *cells, "--output-dir", str(output)])
    sgd = ["--protocol", "sgd", "--sgd-iterations", str(SGD_ITERATIONS), "--output-dir", str(output / "linear-sgd")]
    linear.main([*network[:2], *cells, *sgd])
    rows = json.loads((output / "results.json").read_text(encoding="utf-8"))["results"]
    of_sgd = json.loads((output / "linear-sgd" / "results.json").read_text(encoding="utf-8"))["results"]["model"]
    return markdown({**rows, "linear-sgd": {"model": of_sgd["linear_sgd"]}})


def write_ssl_cells(repository: Path, file: Path) -> Path:
    """SSL Seg's pictures that are there, with their classes, as a CSV; the masks beside them are left out."""
    with open(repository / "Class Labels of Dataset 1.csv", encoding="utf-8-sig", newline="") as labels:
        rows = [row for row in csv.reader(labels) if row and row[0].strip().isdigit()]
    found = [(repository / "Dataset 1" / f"{int(number):03d}.bmp", SSL_CLASSES[int(label)]) for number, label in rows]
    with atomic_write(file, "w") as stream:
        present = [(path.resolve(), label) for path, label in found if path.is_file()]
        csv.writer(stream).writerows([("Image Path", "Label"), *present])
    return file


def judge_patients(network: list[str], trained: Path, output: Path) -> list[str]:
    """ABMIL on made-up patients, for a few aggregators, and where the attention goes."""
    classes = write_patients(LabelledCells.from_path(trained / "test10.csv"), trained, output / "patients.csv")
    extract_features.main([*network, "--data", str(output / "patients.csv"), "--output-dir", str(output)])
    lines = ["| aggregator | accuracy | AUROC | planted cells, share of attention (of cells) |", "|---|---|---|---|"]
    for model in ("classwise", "gated", "mean", "max"):
        flags = ["--model", model, "--protocol", "crossval", "--runs", "3", "--learning-rate", "0.01"]
        folder = output / model
        abmil.main([*flags, "--features", str(output / "features.h5"), "--output-dir", str(folder)])
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))["results"][model]["together"]
        shares = attention_on_planted(folder / "attention.csv", classes) if model in ("classwise", "gated") else "-"
        lines.append(f"| {model} | {percent(found, 'accuracy')} | {percent(found, 'auroc')} | {shares} |")
    return lines


def write_patients(tested: LabelledCells, trained: Path, file: Path) -> dict[str, str]:
    """Bags without an `erythroblast`, and bags with a few, of cells that are in one bag each; {path: class}."""
    rng = random.Random(0)
    by_class = defaultdict(list)
    for cells in (tested, LabelledCells.from_path(trained / "train10.csv")):
        for path, label in zip(cells.paths, cells.labels, strict=True):
            by_class[cells.class_names[label]].append(str(path))
    planted = by_class.pop(PLANTED)
    others = [path for paths in by_class.values() for path in paths]
    rng.shuffle(planted)
    rng.shuffle(others)
    rows = []
    for number in range(N_PATIENTS):
        is_ill = number % 2 == 1
        n_planted = rng.randint(*PLANTED_CELLS) if is_ill else 0
        bag = [planted.pop() for _ in range(n_planted)] + [others.pop() for _ in range(CELLS_OF_A_PATIENT - n_planted)]
        rows += [(path, "with" if is_ill else "without", f"patient_{number:02d}") for path in bag]
    with atomic_write(file, "w") as stream:
        csv.writer(stream).writerows([("Image Path", "Label", "patient"), *rows])
    known = {path: name for name, paths in by_class.items() for path in paths}
    return {path: known.get(path, PLANTED) for path, _, _ in rows}


def attention_on_planted(file: Path, classes: dict[str, str]) -> str:
    """Of patients that have planted cells: their share of the attention, and of the cells."""
    attention: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    with open(file, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    ill = {row["patient"] for row in rows if classes[row["source"]] == PLANTED}
    for row in rows:
        if row["patient"] in ill:
            kind = "planted" if classes[row["source"]] == PLANTED else "other"
            attention[kind] += float(row["attention"])
            counts[kind] += 1
    shares = [100 * counted["planted"] / sum(counted.values()) for counted in (attention, counts)]
    return f"{shares[0]:.0f} % ({shares[1]:.0f} %)"


def markdown(results: dict[str, Any]) -> list[str]:
    """The rows of evaluate.py's results as a table, without the larger numbers of neighbours."""
    lines = ["| features | protocol | accuracy | balanced accuracy | weighted F1 |", "|---|---|---|---|---|"]
    for protocol, by_source in results.items():
        if protocol in ("knn-dino_100", "knn-dino_200"):
            continue
        for source, row in by_source.items():
            values = [percent(row, name) for name in ("accuracy", "balanced_accuracy", "weighted_f1")]
            lines.append(f"| {source} | {protocol} | {' | '.join(values)} |")
    return lines


def percent(row: dict[str, Any], name: str) -> str:
    low, high = row["intervals"][name]
    return f"{100 * row[name]:.1f} ({100 * low:.1f} to {100 * high:.1f})"


if __name__ == "__main__":
    main()

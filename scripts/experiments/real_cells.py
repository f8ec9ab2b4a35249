"""Make two sets of real cells to evaluate on, and measure where the attention of ABMIL goes.

    python scripts/experiments/learn.py --pbc <PBC_dataset_normal_DIB> --output-dir runs/pbc
    python scripts/experiments/real_cells.py --split runs/pbc --ssl <segmentation_WBC> --output-dir real_cells
    python scripts/experiments/real_cells.py --output-dir real_cells --attention real_cells/gated/attention.csv

The second command writes ssl_seg.csv and patients.csv. SSL Seg Dataset 1 (Zheng et al. 2018) is of another hospital,
stain and size than PBC; one of its five classes has a single image. The patients are made up: bags of PBC cells with a
few erythroblasts or none. The third command prints the share of the attention that the erythroblasts get.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from dinov2.utils.command import exit_code

SSL_CLASSES = {1: "neutrophil", 2: "lymphocyte", 3: "monocyte", 4: "eosinophil", 5: "basophil"}
PLANTED, N_PATIENTS, CELLS_OF_A_PATIENT, PLANTED_CELLS = "erythroblast", 60, 20, (2, 4)


def find_ssl_cells(repository: Path) -> pd.DataFrame:
    """Return the SSL Seg images that are there, without the masks beside them."""
    labels = pd.read_csv(repository / "Class Labels of Dataset 1.csv", names=["number", "class"], encoding="utf-8-sig")
    labels = labels.apply(pd.to_numeric, errors="coerce").dropna().astype(int)
    paths = labels["number"].map(lambda number: (repository / "Dataset 1" / f"{number:03d}.bmp").resolve())
    cells = pd.DataFrame({"Image Path": paths, "Label": labels["class"].map(SSL_CLASSES)})
    return cells[paths.map(Path.is_file)]


def make_patients(cells: pd.DataFrame) -> pd.DataFrame:
    """Make bags, every other one with a few planted cells; a cell is in one bag at most."""
    rng = random.Random(0)
    planted = cells["Image Path"][cells["Label"] == PLANTED].tolist()
    classes = cells[cells["Label"] != PLANTED].groupby("Label", sort=False)
    others = [path for _, rows in classes for path in rows["Image Path"]]
    rng.shuffle(planted)
    rng.shuffle(others)
    rows = []
    for number in range(N_PATIENTS):
        n_planted = rng.randint(*PLANTED_CELLS) if number % 2 == 1 else 0
        bag = [(planted.pop(), PLANTED) for _ in range(n_planted)]
        bag += [(others.pop(), "other") for _ in range(CELLS_OF_A_PATIENT - n_planted)]
        rows += [(path, "with" if n_planted else "without", f"patient_{number:02d}", cell) for path, cell in bag]
    return pd.DataFrame(rows, columns=["Image Path", "Label", "patient", "cell"])


def share_of_planted(attention: pd.DataFrame, patients: pd.DataFrame) -> str:
    """Describe the share of planted cells in the attention and in the cells of the patients that have them."""
    is_planted = attention["source"].map(patients.set_index("Image Path")["cell"]) == PLANTED
    of_patients = attention["patient"].isin(attention["patient"][is_planted])
    share = attention["attention"][is_planted].sum() / attention["attention"][of_patients].sum()
    of_cells = is_planted.sum() / of_patients.sum()
    return f"planted cells get {share:.0%} of the attention; they are {of_cells:.0%} of the cells"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="for ssl_seg.csv and patients.csv")
    parser.add_argument("--split", type=Path, help="output folder of learn.py")
    parser.add_argument("--ssl", type=Path, help="the repository segmentation_WBC")
    parser.add_argument("--attention", type=Path, help="attention.csv of abmil.py on these patients")
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.ssl is not None:
        find_ssl_cells(args.ssl).to_csv(args.output_dir / "ssl_seg.csv", index=False)
    if args.split is not None:
        cells = pd.concat([pd.read_csv(args.split / f"{side}10.csv") for side in ("test", "train")])
        make_patients(cells).to_csv(args.output_dir / "patients.csv", index=False)
    if args.attention is not None:
        print(share_of_planted(pd.read_csv(args.attention), pd.read_csv(args.output_dir / "patients.csv")))


if __name__ == "__main__":
    sys.exit(exit_code(main))

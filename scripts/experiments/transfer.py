"""Train a probe on the real cells of one public set and test it on another: the tables of docs/benchmarks/transfer.md.

    python scripts/experiments/transfer.py --network runs/pbc/from_scratch/seed0 --output-dir transfer --sources \
        acevedo=<PBC> ssl_seg=<segmentation_WBC> bccd=<BCCD_Dataset> aslan=<blood-cell-detection-dataset>

`four classes` are white cells of PBC and SSL Seg, without basophils, of which SSL Seg Dataset 1 has one image. With
`the same cut` a cell has about the same share of the image: the centre of PBC's images, and whole images of SSL Seg.
`kinds of cell` are white cell, red cell and platelet: boxes of BCCD and Aslan say no more. Cells of one smear image are
on one side of a split. A stopped experiment continues.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import pandas as pd
from learn import markdown
from torchvision.transforms.functional import center_crop

from dinov2.data.datasets.decode import load_image
from dinov2.data.prepare import get_dataset
from dinov2.data.prepare.write import Options, prepare
from dinov2.eval import cross, extract_features
from dinov2.eval.protocol.transfer import CORRECTIONS
from dinov2.utils.command import exit_code

FOUR = ("eosinophil", "lymphocyte", "monocyte", "neutrophil")
KINDS = dict.fromkeys((*FOUR, "basophil", "wbc"), "white cell") | {"rbc": "red cell"}
KINDS |= dict.fromkeys(("platelet", "platelets"), "platelet")
WHITE = dict(zip(FOUR, FOUR, strict=True))
MATRICES = {
    "four classes": (WHITE, ("acevedo", "ssl_seg")),
    "four classes, the same cut": (WHITE, ("acevedo_centre", "ssl_seg_whole")),
    "kinds of cell": (KINDS, ("acevedo", "ssl_seg", "bccd", "aslan")),
}
CENTRE = 200  # px of 360 x 363
ENCODERS = {name: ["--encoder", name] for name in ("histogram", "pixels")}
ENCODERS |= {"untrained ResNet-18": ["--encoder", "timm:resnet18", "--encoder-weights", "untrained"]}


def write_cells(name: str, source: str, folder: Path) -> pd.DataFrame:
    """Cut out the cells of all classes; the smear image of a cell stands for its patient."""
    options = Options(keep=("all",), check=False, whole=name.endswith("_whole"))
    prepare(get_dataset(name.removesuffix("_whole").removesuffix("_centre")), source, folder, options)
    cells = pd.read_csv(folder / "labels.csv")
    if name in ("bccd", "aslan"):
        cells["patient"] = cells["Image Path"].str.replace(r"_\d+\.png$", "", regex=True)
    if name.endswith("_centre"):
        (folder / "centres").mkdir(exist_ok=True)
        centres = [folder.resolve() / "centres" / f"{Path(path).stem}.png" for path in cells["Image Path"]]
        for path, centre in zip(cells["Image Path"], centres, strict=True):
            center_crop(load_image(path), CENTRE).save(centre)
        cells["Image Path"] = centres
    cells.to_csv(folder / "labels.csv", index=False)
    return cells


def tables(title: str, matrix: pd.DataFrame) -> list[str]:
    """Return the rows of all encoders' matrix.csv as Markdown."""
    matrix["pair"] = matrix["train"] + " to " + matrix["test"]
    reasons = matrix.dropna(subset="reason").drop_duplicates("pair")
    matrix = matrix[matrix["reason"].isna() & ~matrix["correction"].str.contains("-16|-64|-128", na=False)].fillna(
        {"correction": "uncorrected"}
    )
    matrix["row"] = matrix["pair"] + ", " + matrix["encoder"]
    matrix["cells"] = matrix["n_train"].astype(str) + " / " + matrix["n_test"].astype(str)
    percents = "{macro_f1:.1%} ({macro_f1_low:.1%} to {macro_f1_high:.1%})"
    is_moved = ~matrix["correction"].str.contains("temperature")  # temperatures change no prediction
    captions = {
        "macro F1, 95 % interval": (matrix[is_moved], percents),
        "calibration error ± standard deviation": (matrix, "{calibration_error:.3f} ± {calibration_error_sd:.3f}"),
    }
    lines = [f"## {title.capitalize()}", "", *("- " + reasons["pair"] + ": " + reasons["reason"])]
    for caption, (rows, form) in captions.items():
        texts = rows.assign(text=[form.format(**row).replace("%", "") for row in rows.to_dict("records")])
        table = texts.pivot_table("text", ["row", "cells"], "correction", aggfunc="first", sort=False).fillna("-")
        lines += ["", caption, "", *markdown("", table.reset_index("cells").to_dict("index"))]
    return [*lines, ""]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", required=True, metavar="NAME=FOLDER", help="of prepare_dataset.py")
    parser.add_argument("--network", required=True, help="a run's folder or a checkpoint")
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args(argv)
    out, sources = args.output_dir, dict(text.split("=", 1) for text in args.sources)
    sources |= {"acevedo_centre": sources["acevedo"], "ssl_seg_whole": sources["ssl_seg"]}
    cells = {name: write_cells(name, source, out / "cells" / name) for name, source in sources.items()}
    encoders = ENCODERS | {"small ViT": ["--checkpoint", args.network]}
    for encoder, flags in encoders.items():
        for name in cells:
            data = ["--data", str(out / "cells" / name / "labels.csv"), "--num-workers", "0"]
            extract_features.main([*flags, *data, "--output-dir", str(out / encoder / name)])
    for title, (common, names) in MATRICES.items():
        rows = [(name, label, common.get(label.lower(), "")) for name in names for label in set(cells[name]["Label"])]
        pd.DataFrame(rows, columns=["dataset", "label", "common"]).to_csv(out / "map.csv", index=False)
        matrices = []
        for encoder in encoders:
            folder, features = out / f"{title}, {encoder}", [str(out / encoder / n / "features.h5") for n in names]
            flags = ["--protocol", "transfer", "--classes-map", str(out / "map.csv"), "--correct", *CORRECTIONS]
            cross.main([*flags, "--features", *features, "--names", *names, "--output-dir", str(folder)])
            matrices.append(pd.read_csv(folder / "matrix.csv").assign(encoder=encoder))
        print("\n".join(tables(title, pd.concat(matrices))))


if __name__ == "__main__":
    sys.exit(exit_code(main))

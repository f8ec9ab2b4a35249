import json

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import LabelledCells
from dinov2.data.splits import read_split

KU_HEADER = "path,image_name,cell_type,patient_id,split\n"


def save_bloodmnist(file, size: int, counts: dict[str, int]) -> dict[str, np.ndarray]:
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(size)
    arrays = {}
    for part, n in counts.items():
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(n, dtype=np.uint8) % 8)[:, None]
    np.savez_compressed(file, **arrays)
    return arrays


def test_bloodmnist_unpacks_its_largest_file_with_the_official_split(tmp_path, run):
    save_bloodmnist(tmp_path / "source" / "bloodmnist.npz", 28, {"train": 8, "val": 8, "test": 8})
    arrays = save_bloodmnist(tmp_path / "source" / "bloodmnist_64.npz", 64, {"train": 10, "val": 8, "test": 9})
    summary = run("bloodmnist")
    assert summary["counts"]["splits"] == {"test": 9, "train": 10, "val": 8}
    assert summary["sizes"] == {"64x64": 27}
    assert sorted(summary["counts"]["classes"]) == [
        *("basophil", "eosinophil", "erythroblast", "ig", "lymphocyte", "monocyte", "neutrophil", "platelet"),
    ]
    cells = LabelledCells.from_path(tmp_path / "out" / "labels.csv")
    split = read_split(tmp_path / "out" / "split.csv", list(map(str, cells.paths)))
    assert [len(side) for side in (*split.folds[0], split.validation)] == [10, 9, 8]
    first = split.folds[0][1][0]
    np.testing.assert_array_equal(np.asarray(Image.open(cells.paths[first])), arrays["test_images"][0])
    assert cells.class_names[cells.labels[first]] == "basophil"
    assert cells.paths[first].is_relative_to(tmp_path / "out")
    written = cells.paths[first].stat().st_mtime_ns
    assert run("bloodmnist") == summary  # a second run keeps the images
    assert cells.paths[first].stat().st_mtime_ns == written


def test_ku_optofil_takes_the_split_by_patient_from_its_table(tree, run, tmp_path):
    rows = (
        ("train/Segmented Neutrophil", "BM1.jpg", "segmented_neutrophil", "P001", "train"),
        ("train/Blast", "BM2.jpg", "Blast", "P002", "validation"),
        ("test/Blast", "BM3.jpg", "blast", "P003", "test"),
        ("train/Basophil", "BM4.jpg", "basophil", "", "train"),
        ("train/Basophil", "BM5.jpg", "basophil", "P001", "train"),
        ("train/Basophil", "BM6.jpg", "dust", "P001", "train"),
    )
    for path, name, *_ in rows[:4]:
        tree(f"dataset/{path}/{name}", size=(368, 368))
    tree("dataset/train/Blast/BM9.jpg")
    tree("metadata.csv", text="image_name,cell_type\nBM1.jpg,blast\n")
    tree("metadata_with_patient_level_splits.csv", text=KU_HEADER + "".join(f"{','.join(row)}\n" for row in rows))
    summary = run("ku_optofil")
    assert summary["counts"]["classes"] == {"basophil": 1, "blast": 2, "segmented_neutrophil": 1}
    assert summary["counts"]["splits"] == {"test": 1, "train": 2, "val": 1}
    assert {kind: note["count"] for kind, note in summary["oddities"].items()} == {
        "classes with a single image": 1,
        "images that the layout does not explain, left out": 1,
        "images that the train list names and that are not there": 1,
        "rows of the CSV that are not understood": 1,
    }
    cells = LabelledCells.from_path(tmp_path / "out" / "labels.csv")
    assert dict(zip([path.name for path in cells.paths], cells.patients, strict=True)) == {
        "BM1.jpg": "P001",
        "BM2.jpg": "P002",
        "BM3.jpg": "P003",
        "BM4.jpg": "unknown",
    }
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["dataset"] == "ku_optofil"


def test_ku_optofil_says_which_column_is_missing(tree, run):
    tree("metadata_with_patient_level_splits.csv", text="path,image_name,cell_type,split\na,b.jpg,blast,train\n")
    with pytest.raises(ValueError, match="lacks the column.s. 'patient_id'"):
        run("ku_optofil")

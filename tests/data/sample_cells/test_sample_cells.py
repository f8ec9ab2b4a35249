import csv
import json
import logging
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data import sample_cells
from dinov2.data.datasets import HemaStandardDataset, LabelledCells
from dinov2.data.sample_cells import CELL_CLASSES, SUBTYPES, Slide, contact_sheet, draw_cell, write_sample_cells

SCRIPT = Path(__file__).parents[3] / "scripts" / "make_sample_cells.py"
SMALL = {
    "n_train": 21,
    "n_probe_train": 12,
    "n_probe_test": 11,
    "n_patients": 6,
    "cells_per_patient": (2, 4),
    "size": 32,
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(table: Path) -> list[dict[str, str]]:
    with open(table, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def small_set(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("sample_cells") / "set"
    return folder, write_sample_cells(folder, **SMALL)


@pytest.fixture
def blank_images(monkeypatch):
    """For tests that read the tables alone: images cost no time."""
    monkeypatch.setattr(sample_cells, "draw_cell", lambda name, slide, rng, size: np.zeros((size, size, 3), np.uint8))


def test_training_lists_name_all_images_of_several_slides(small_set):
    folder, summary = small_set
    lists = sorted((folder / "lists").glob("*.txt"))
    assert len(lists) == summary["slides"]["train"] == 3
    listed = [path for file in lists for path in file.read_text().splitlines()]
    assert len(listed) == len(set(listed)) == 21
    assert all((folder / "lists" / path).is_file() for path in listed)
    assert len(HemaStandardDataset(root=str(folder / "lists"), image_size=32)) == 21


@pytest.mark.parametrize(("split", "n_cells"), [("train", 12), ("test", 11)])
def test_probe_cells_are_balanced_and_the_same_as_folders_and_as_table(small_set, split, n_cells):
    folder, summary = small_set
    from_csv = LabelledCells.from_path(folder / "probe" / f"{split}.csv")
    from_folder = LabelledCells.from_path(folder / "probe" / split)
    assert from_csv.class_names == from_folder.class_names == sorted(CELL_CLASSES)
    assert len(from_csv) == n_cells
    assert dict(zip(from_csv.paths, from_csv.labels, strict=True)) == dict(
        zip(from_folder.paths, from_folder.labels, strict=True)
    )
    counts = np.bincount(from_csv.labels)
    assert counts.max() - counts.min() <= 1
    assert summary["classes"][f"probe_{split}"] == Counter(from_csv.class_names[i] for i in from_csv.labels)


def test_no_slide_is_in_two_splits(small_set):
    folder, _ = small_set
    patients = [
        {row["patient"] for row in rows_of(folder / table)}
        for table in ("probe/train.csv", "probe/test.csv", "patients.csv")
    ]
    assert [len(ids) for ids in patients] == [2, 2, 6]
    assert len(set.union(*patients)) == 10


def test_slides_of_different_splits_differ_in_stain():
    streams = ("train", "probe_train", "probe_test")
    slides = [Slide(sample_cells._rng(0, stream, index)) for stream in streams for index in (0, 1)]
    assert len({slide.dyes.tobytes() for slide in slides}) == 6


def test_every_slide_of_a_split_shows_every_class(tmp_path, blank_images):
    write_sample_cells(tmp_path / "set", 0, 100, 0, 0, size=16)
    rows = rows_of(tmp_path / "set" / "probe" / "train.csv")
    assert {(row["patient"], row["Label"]) for row in rows} == {
        (f"probe_train_slide_{i:02d}", name) for i in range(10) for name in CELL_CLASSES
    }
    assert not (tmp_path / "set" / "patients.csv").exists()


def test_patients_tables_and_summary_agree(small_set):
    folder, summary = small_set
    rows = rows_of(folder / "patients.csv")
    subtype_of = {row["patient"]: row["Label"] for row in rows}
    assert (
        Counter(subtype_of.values())
        == summary["subtypes"]
        == {name: 2 if name == "control" else 1 for name in SUBTYPES}
    )
    assert {(row["patient"], row["Label"]) for row in rows} == set(subtype_of.items())  # a patient has one subtype
    assert all(2 <= n <= 4 for n in Counter(row["patient"] for row in rows).values())
    assert all(row["Image Path"].startswith(f"patients/{row['patient']}/") for row in rows)
    assert set(LabelledCells.from_path(folder / "patients.csv").class_names) == set(SUBTYPES)
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["pictures"] == 21 + 12 + 11 + len(rows) == sum(1 for _ in folder.rglob("*.png"))


def test_mixture_of_cells_depends_on_the_subtype(tmp_path, blank_images):
    write_sample_cells(tmp_path / "set", 0, 0, 0, n_patients=25, cells_per_patient=(20, 24), size=16)
    subtype_of = {row["patient"]: row["Label"] for row in rows_of(tmp_path / "set" / "patients.csv")}
    cells = [(row["patient"], row["Label"]) for row in rows_of(tmp_path / "set" / "patients_cell_classes.csv")]

    def share(subtype: str, *cell_classes: str) -> float:
        bag = [cell_class for patient, cell_class in cells if subtype_of[patient] == subtype]
        return sum(cell_class in cell_classes for cell_class in bag) / len(bag)

    assert share("PML::RARA", "promyelocyte") > share("control", "promyelocyte") + 0.15
    assert share("RUNX1::RUNX1T1", "myeloblast") > share("control", "myeloblast") + 0.1
    assert share("CBFB::MYH11", "eosinophil") > share("control", "eosinophil") + 0.05
    assert share("NPM1", "monocyte", "myeloblast") > share("control", "monocyte", "myeloblast") + 0.15
    # the mark is in the bag, not in each of its cells
    assert all(share(subtype, "neutrophil_segmented", "lymphocyte") > 0.15 for subtype in SUBTYPES)


def test_mixtures_are_probabilities():
    for mixture in SUBTYPES.values():
        assert list(mixture) == list(CELL_CLASSES)
        assert sum(mixture.values()) == pytest.approx(1)


def test_command_with_two_processes_writes_the_same_bytes(small_set, tmp_path):
    folder, summary = small_set
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "cells_per_patient"] + [
        "--cells-per-patient",
        "2",
        "4",
        "--n-workers=2",
        f"--contact-sheet={tmp_path / 'sheet.png'}",
    ]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), f"--output={tmp_path / 'set'}", *flags],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"drawing {summary['pictures']} images" in done.stderr  # progress shows without a flag
    assert contents(tmp_path / "set") == contents(folder)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "sheet.png")), contact_sheet())


def test_another_seed_gives_other_images_of_the_same_layout(small_set, tmp_path):
    folder, _ = small_set
    write_sample_cells(tmp_path / "set", **{**SMALL, "n_probe_train": 0, "n_probe_test": 0, "n_patients": 0}, seed=1)
    one, other = contents(folder / "train"), contents(tmp_path / "set" / "train")
    assert one.keys() == other.keys()
    assert all(one[name] != other[name] for name in one)


def test_the_same_set_is_not_drawn_twice(small_set, monkeypatch, caplog):
    folder, summary = small_set
    before = contents(folder)
    monkeypatch.setattr(sample_cells, "draw_cell", None)  # calling it would fail
    with caplog.at_level(logging.INFO, logger="dinov2"):
        assert write_sample_cells(folder, **SMALL) == summary
    assert "already holds this set" in caplog.text
    assert contents(folder) == before


def test_a_killed_run_is_done_again(small_set, tmp_path, monkeypatch):
    folder, _ = small_set
    n_drawn = 0

    def killed_in_the_middle(*args):
        nonlocal n_drawn
        n_drawn += 1
        if n_drawn == 30:
            raise KeyboardInterrupt
        return draw_cell(*args)

    monkeypatch.setattr(sample_cells, "draw_cell", killed_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        write_sample_cells(tmp_path / "set", **SMALL)
    assert not (tmp_path / "set" / "summary.json").exists()
    with pytest.raises(FileExistsError, match="n_train 21 where 9 is asked for"):
        write_sample_cells(tmp_path / "set", **{**SMALL, "n_train": 9})
    write_sample_cells(tmp_path / "set", **SMALL)
    assert contents(tmp_path / "set") == contents(folder)


def test_a_lost_image_is_drawn_again(tmp_path):
    settings = {"n_train": 3, "n_probe_train": 0, "n_probe_test": 0, "n_patients": 0, "size": 16}
    write_sample_cells(tmp_path / "set", **settings)
    before = contents(tmp_path / "set")
    (tmp_path / "set" / "train" / "slide_00" / "train_00_0001.png").unlink()
    write_sample_cells(tmp_path / "set", **settings)
    assert contents(tmp_path / "set") == before


@pytest.mark.parametrize("name", ["holiday.jpg", "summary.json"])
def test_a_folder_with_something_else_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text('{"accuracy": 0.9}')
    with pytest.raises(FileExistsError, match="holds no sample cells .* give an empty or new folder"):
        write_sample_cells(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_another_set_in_the_folder_is_an_error_that_names_the_difference(small_set):
    folder, _ = small_set
    with pytest.raises(FileExistsError, match="another set of sample cells, seed 0 where 3 is asked for"):
        write_sample_cells(folder, **SMALL, seed=3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"n_train": -1}, "n_train: -1; give a number from 0"),
        ({"n_patients": 10**20}, "n_patients: 1"),
        ({"size": 10**20}, "size: 1"),
        ({"seed": -2}, "seed: -2; give a number from 0"),
        ({"size": 8}, "size: 8 px; give 16"),
        ({"cells_per_patient": (9, 4)}, "cells_per_patient: 9 to 4"),
    ],
)
def test_settings_out_of_range(tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        write_sample_cells(tmp_path / "set", **setting)
    assert not (tmp_path / "set").exists()


def test_progress_is_shown(tmp_path, capsys, blank_images):
    write_sample_cells(tmp_path / "set", 12, 0, 0, 0, size=16)
    assert "12/12" in capsys.readouterr().err


def test_contact_sheet_has_a_column_per_class_and_a_row_per_slide():
    sheet = contact_sheet(n_slides=2, size=32)
    height, width, _ = sheet.shape
    assert width == 32 * len(CELL_CLASSES)
    header = height - 2 * 32
    assert (sheet[:header] == 255).mean() > 0.5  # names on white
    assert (sheet[header:] == 255).mean() < 0.05

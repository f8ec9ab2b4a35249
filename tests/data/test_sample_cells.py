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
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from dinov2.data import sample_cells
from dinov2.data.datasets import HemaStandardDataset, LabelledCells
from dinov2.data.sample_cells import CELL_CLASSES, SUBTYPES, Slide, contact_sheet, draw_cell, write_sample_cells
from dinov2.eval.baselines import colour_histogram

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_sample_cells.py"
SMALL = {
    "n_train": 25,
    "n_probe_train": 20,
    "n_probe_test": 13,
    "n_patients": 6,
    "cells_per_patient": (2, 4),
    "size": 32,
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(table: Path) -> list[dict[str, str]]:
    with open(table, newline="") as file:
        return list(csv.DictReader(file))


def draw_set(n_per_class: int, n_slides: int, key: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Pictures, their classes and their slides; different keys have different slides."""
    slides = [Slide.sample(np.random.default_rng([key, i])) for i in range(n_slides)]
    order = [(i, j) for j in range(n_per_class) for i in range(len(CELL_CLASSES))]
    pictures = [
        draw_cell(CELL_CLASSES[i], slides[j % n_slides], np.random.default_rng([key, i, j, 1])) for i, j in order
    ]
    return pictures, np.array([i for i, _ in order]), np.array([j % n_slides for _, j in order])


def gradient_histograms(pictures: list[np.ndarray]) -> np.ndarray:
    """Where edges of which direction are, from the gray picture alone: 8 x 8 places, 9 directions."""
    side, n_places, n_directions = 48, 8, 9
    features = []
    for picture in pictures:
        gray = Image.fromarray(picture).convert("L").crop((24, 24, 120, 120)).resize((side, side))
        down, right = np.gradient(np.asarray(gray, dtype=np.float64))
        direction = (np.arctan2(down, right) % np.pi / np.pi * n_directions).astype(int) % n_directions
        place = np.arange(side) * n_places // side
        bins = (place[:, None] * n_places + place) * n_directions + direction
        counts = np.bincount(bins.ravel(), np.hypot(down, right).ravel(), n_places**2 * n_directions)
        features.append(np.sqrt(counts / counts.sum()))
    return np.array(features)


@pytest.fixture(scope="module")
def small_set(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("sample_cells") / "set"
    return folder, write_sample_cells(folder, **SMALL)


@pytest.fixture(scope="module")
def pictures_by_split():
    return draw_set(20, n_slides=10, key=1), draw_set(10, n_slides=5, key=2)


@pytest.mark.parametrize("cell_class", CELL_CLASSES)
def test_a_picture_depends_on_its_generator_alone(cell_class):
    slide = Slide.sample(np.random.default_rng(1))
    first, again, other = (draw_cell(cell_class, slide, np.random.default_rng(seed), size=50) for seed in (5, 5, 6))
    assert first.shape == (50, 50, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5


def test_an_unknown_class_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown class 'neutrophile'; the classes are neutrophil_segmented"):
        draw_cell("neutrophile", Slide.sample(np.random.default_rng(0)), np.random.default_rng(0))


def test_pictures_show_a_dark_cell_in_the_middle_of_a_bright_field(pictures_by_split):
    pictures, labels, _ = pictures_by_split[0]
    has_nucleus = labels != CELL_CLASSES.index("platelet")
    green = np.stack(pictures)[..., 1].astype(float)  # [N, S, S]; nuclei absorb green most
    border = np.concatenate([green[:, :12].reshape(len(green), -1), green[:, -12:].reshape(len(green), -1)], axis=1)
    middle = np.percentile(green[:, 42:-42, 42:-42], 5, axis=(1, 2))
    assert (middle < 0.75 * np.percentile(border, 90, axis=1))[has_nucleus].mean() > 0.97
    assert (green > 254).mean() < 0.01  # the light does not saturate the camera
    assert (green.std(axis=(1, 2)) > 8).all()


def test_platelets_have_no_nucleus_and_blasts_a_larger_one_than_erythroblasts(pictures_by_split):
    pictures, labels, _ = pictures_by_split[0]
    green = np.stack(pictures)[..., 1].astype(float)  # [N, S, S]
    is_dark = green < 0.6 * np.percentile(green, 95, axis=(1, 2), keepdims=True)
    area = is_dark[:, 36:-36, 36:-36].mean(axis=(1, 2))
    median = {name: np.median(area[labels == i]) for i, name in enumerate(CELL_CLASSES)}
    assert 2 * median["platelet"] < median["erythroblast"] < 0.8 * median["myeloblast"]


def test_colour_of_the_nuclei_tells_more_about_the_slide_than_about_the_class(pictures_by_split):
    pictures, labels, slides = pictures_by_split[0]
    pixels = np.stack([picture[36:-36, 36:-36].reshape(-1, 3) for picture in pictures]).astype(float)  # [N, P, 3]
    is_darkest = pixels[..., 1] <= np.percentile(pixels[..., 1], 8, axis=1, keepdims=True)
    colours = (pixels * is_darkest[..., None]).sum(axis=1) / is_darkest.sum(axis=1)[:, None]  # [N, 3]
    has_nucleus = labels != CELL_CLASSES.index("platelet")

    def variance_between(groups: np.ndarray) -> float:
        groups, nuclei = groups[has_nucleus], colours[has_nucleus]
        return np.var([nuclei[groups == group].mean(axis=0) for group in np.unique(groups)], axis=0).sum()

    assert variance_between(slides) > 2 * variance_between(labels)


def test_form_tells_the_classes_apart_on_new_slides_and_colour_does_not(pictures_by_split):
    (train, train_labels, _), (test, test_labels, _) = pictures_by_split
    by_colour = KNeighborsClassifier(20).fit(colour_histogram(train), train_labels)
    by_form = LogisticRegression(C=30, max_iter=300).fit(gradient_histograms(train), train_labels)
    assert by_colour.score(colour_histogram(test), test_labels) < 0.55
    assert by_form.score(gradient_histograms(test), test_labels) > 0.35  # chance is 0.1; 200 pictures teach little


def test_training_lists_name_all_pictures_of_several_slides(small_set):
    folder, summary = small_set
    lists = sorted((folder / "lists").glob("*.txt"))
    assert len(lists) == summary["slides"]["train"] == 3
    listed = [path for file in lists for path in file.read_text().splitlines()]
    assert len(listed) == len(set(listed)) == 25
    assert all((folder / "lists" / path).is_file() for path in listed)
    assert len(HemaStandardDataset(root=str(folder / "lists"), image_size=32)) == 25


@pytest.mark.parametrize(("split", "n_cells"), [("train", 20), ("test", 13)])
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
    slides = [
        sample_cells._slide(0, stream, index) for stream in ("train", "probe_train", "probe_test") for index in (0, 1)
    ]
    assert len({slide.dyes.tobytes() for slide in slides}) == 6


def test_every_slide_of_a_split_shows_every_class(tmp_path):
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
    assert summary["pictures"] == 25 + 20 + 13 + len(rows) == sum(1 for _ in folder.rglob("*.png"))


def test_mixture_of_cells_depends_on_the_subtype(tmp_path):
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
    folder, _ = small_set
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
    assert contents(tmp_path / "set") == contents(folder)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "sheet.png")), contact_sheet())


def test_another_seed_gives_other_pictures_of_the_same_layout(small_set, tmp_path):
    folder, _ = small_set
    write_sample_cells(tmp_path / "set", **{**SMALL, "n_patients": 0}, seed=1)
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
    with pytest.raises(FileExistsError, match="n_train 25 where 9 is asked for"):
        write_sample_cells(tmp_path / "set", **{**SMALL, "n_train": 9})
    write_sample_cells(tmp_path / "set", **SMALL)
    assert contents(tmp_path / "set") == contents(folder)


def test_a_lost_picture_is_drawn_again(tmp_path):
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
        ({"n_train": -1}, "n_train: -1 is negative"),
        ({"seed": -2}, "seed: -2 is negative"),
        ({"size": 8}, "size: 8 px is too small"),
        ({"cells_per_patient": (9, 4)}, "cells_per_patient: 9 to 4"),
    ],
)
def test_settings_out_of_range(tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        write_sample_cells(tmp_path / "set", **setting)
    assert not (tmp_path / "set").exists()


def test_progress_tells_the_rate_and_the_time_left(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sample_cells, "_SECONDS_BETWEEN_REPORTS", 0.0)
    with caplog.at_level(logging.INFO, logger="dinov2"):
        write_sample_cells(tmp_path / "set", 12, 0, 0, 0, size=16)
    reports = [record.getMessage() for record in caplog.records if "left" in record.getMessage()]
    assert len(reports) == 2  # one per slide
    assert "10 of 12 pictures" in reports[0]
    assert reports[1].endswith("0 s left")


def test_contact_sheet_has_a_column_per_class_and_a_row_per_slide():
    sheet = contact_sheet(n_slides=2, size=32)
    height, width, _ = sheet.shape
    assert width == 32 * len(CELL_CLASSES)
    header = height - 2 * 32
    assert (sheet[:header] == 255).mean() > 0.5  # names on white
    assert (sheet[header:] == 255).mean() < 0.05

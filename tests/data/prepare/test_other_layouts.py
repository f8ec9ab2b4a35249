"""The preparers of sets that are not at hand, on small trees after each distributor's layout and with its traps."""

import csv

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import LabelledCells
from dinov2.data.prepare import get_dataset
from dinov2.data.prepare.write import Options, prepare


@pytest.fixture
def tree(tmp_path):
    """Writes files below `tmp_path/source`: a random image, a mask with these boxes, or text."""
    rng = np.random.default_rng(0)

    def make(path: str, boxes: list[tuple[int, int, int, int]] | None = None, text: str | None = None, mode="RGB"):
        file = tmp_path / "source" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            file.write_text(text)
        elif boxes is not None:
            mask = np.zeros((60, 80), np.uint8)
            for left, top, right, bottom in boxes:
                mask[top:bottom, left:right] = 255
            Image.fromarray(mask).save(file, quality=80)
        else:
            Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).convert(mode).save(file)
        return file

    return make


@pytest.fixture
def run(tmp_path):
    def prepared(name: str, **options) -> dict:
        return prepare(get_dataset(name), tmp_path / "source", tmp_path / "out", Options(n_workers=1, **options))

    return prepared


def odd(summary: dict) -> dict[str, int]:
    return {kind: note["count"] for kind, note in summary["oddities"].items()}


def test_bmc_looks_into_the_folders_of_a_thousand(tree, run):
    for path in ("ABE/0001-1000/ABE_00001.jpg", "NGS/0001-1000/NGS_00001.jpg", "NGS/1001-2000/NGS_01001.jpg"):
        tree(f"BM_cytomorphology_data/{path}")
    tree("BM_cytomorphology_data/NGS/1001-2000/EBO_01002.jpg")
    tree("BM_cytomorphology_data/XYZ/XYZ_00001.jpg")
    summary = run("bmc")
    assert summary["counts"]["classes"] == {"abnormal_eosinophil": 1, "neutrophil_segmented": 3}
    assert odd(summary) == {
        "classes with a single image": 1,
        "folders with images that are no known class": 1,
        "images that the layout does not explain, left out": 1,
        "images whose name says another class than their folder": 1,
    }


def test_aml_matek_reads_tiffs_with_alpha_and_its_own_codes(tree, run):
    for path in ("MYO/MYO_0001.tiff", "MYO/MYO_0002.tiff", "MYB/MYB_0001.tiff", "MYB/MYB_0002.tiff"):
        tree(f"AML-Cytomorphology_LMU/{path}", mode="RGBA")
    summary = run("aml_matek")
    assert summary["counts"]["classes"] == {"myeloblast": 2, "myelocyte": 2}
    assert summary["modes"] == {"RGBA": 4}
    assert odd(summary) == {}


def test_aml_hehr_has_patients_whose_subtype_is_the_label(tree, run, tmp_path):
    for path in ("NPM1/AAA/image_0.tif", "NPM1/AAA/image_1.tif", "control/BBB/image_0.tif", "control/AAA/image_0.tif"):
        tree(f"PKG - AML/data/{path}")
    tree("PKG - AML/data/control/image_9.tif")
    summary = run("aml_hehr")
    assert summary["counts"]["patients"] == 2
    assert odd(summary) == {
        "classes with a single image": 1,
        "images beside the patients' folders, left out": 1,
        "images of a patient who has another subtype already, left out": 1,
    }
    assert sorted(LabelledCells.from_path(tmp_path / "out" / "labels.csv").patients) == ["AAA", "AAA", "BBB"]


def test_raabin_wbc_has_two_test_sets_and_folders_inside_folders(tree, run, tmp_path):
    for path in ("Train/Train/Basophil/1.jpg", "Train/Train/Neutrophil/1.jpg", "TestA/Basophil/2.jpg"):
        tree(path)
    tree("Test-B/neutrophil/3.jpg")
    tree("TestA/Artifact/4.jpg")
    summary = run("raabin_wbc")
    assert summary["counts"]["splits"] == {"testA": 1, "testB": 1, "train": 2}
    assert odd(summary)["folders with images that are no known class"] == 1
    assert len(LabelledCells.from_path(tmp_path / "out" / "splits" / "testA.csv")) == 1
    assert not (tmp_path / "out" / "split.csv").exists()  # two test sets are not one


def test_raabin_leukemia_counts_what_names_no_disease(tree, run):
    for path in ("ALL-L1/1.jpg", "AML/M3/2.jpg", "AML or ALL/3.jpg", "CML/4.png"):
        tree(path)
    summary = run("raabin_leukemia")
    assert summary["counts"]["classes"] == {"ALL": 1, "AML": 1, "CML": 1}
    assert summary["counts"]["listed"] == 4
    assert odd(summary)["images whose folders name no leukaemia (or several), unlabelled"] == 1


def test_warty_pig_takes_cell_types_from_folders_of_any_spelling(tree, run):
    for path in (
        "Train/Neutrophils/1.jpg",
        "Test/neutrophil (crop)/2.jpg",
        "Train/EOSINOPHIL/3.jpg",
        "Train/new/4.jpg",
    ):
        tree(path)
    summary = run("warty_pig")
    assert summary["counts"]["classes"] == {"eosinophil": 1, "neutrophil": 2}
    assert summary["counts"]["splits"] == {"test": 1, "train": 3}
    assert odd(summary)["images whose folders name no cell type (or several), unlabelled"] == 1


def test_nuclick_cuts_each_cell_of_a_mask(tree, run, tmp_path):
    tree("Hemato_Data/Train/images/img (1).png")
    tree("Hemato_Data/Train/masks/img (1)_mask.png", boxes=[(5, 5, 25, 25), (50, 30, 70, 50), (40, 2, 42, 4)])
    tree("Hemato_Data/Train/images/img (2).png")
    tree("Hemato_Data/Validation/images/img (3).png")
    tree("Hemato_Data/Validation/masks/img (3)_mask.png", boxes=[])
    tree("Hemato_Data/Validation/masks/img (4)_mask.png", boxes=[(5, 5, 25, 25)])
    summary = run("nuclick", margin=0)
    assert summary["counts"]["listed"] == 2
    assert summary["counts"]["labelled"] == 0
    assert not (tmp_path / "out" / "labels.csv").exists()
    assert odd(summary) == {
        "masks of images that are not there": 1,
        "masks that are missing": 1,
        "masks without a cell": 1,
        "images with several cells": 1,
        "specks in masks, smaller than 4 px": 1,
    }
    with Image.open(tmp_path / "out" / "cells/Train/images/img (1).png_001.png") as cell:
        original = Image.open(tmp_path / "source/Hemato_Data/Train/images/img (1).png")
        np.testing.assert_array_equal(np.asarray(cell), np.asarray(original)[30:50, 50:70])


def test_lisc_pairs_masks_of_the_expert_and_leaves_mixed_cells_unlabelled(tree, run):
    for kind, number in (("Baso", 1), ("Baso", 2), ("neut", 1), ("mixt", 1)):
        tree(f"LISC Database/Main Dataset/{kind}/{number}.bmp")
    for kind, number in (("Baso", 1), ("neut", 1), ("neut", 7)):
        masks = f"LISC Database/Ground Truth Segmentation/{kind}/areaforexpert1"
        tree(f"{masks}/{number}_expert.bmp", boxes=[(10, 10, 40, 40)])
    mixed = "LISC Database/Ground Truth Segmentation/mixt/areaforexpert1/1_expert.bmp"
    tree(mixed, boxes=[(10, 10, 30, 30), (50, 10, 70, 30)])
    summary = run("lisc")
    assert summary["counts"]["classes"] == {"basophil": 1, "neutrophil": 1}
    assert summary["counts"]["listed"] == 4
    assert odd(summary) == {
        "classes with a single image": 1,
        "masks of images that are not there": 1,
        "masks that are missing": 1,
        "images with several cells": 1,
    }


def test_krd_wbc_reads_its_misspelt_column_and_grey_edges_of_jpeg_masks(tree, run, tmp_path):
    for number in (1, 2, 10):
        tree(f"KRD-WBC dataset/Dataset/image/image{number}.jpg")
        tree(f"KRD-WBC dataset/Dataset/mask/mask{number}.jpg", boxes=[(16, 16, 48, 48)])
    text = "Image name,Categoriy\nimage1,Neutrophil\nimage10,Monocyte \nimage11,Monocyte\nnothing,Monocyte\n"
    tree("KRD-WBC dataset/class labels.csv", text=text)
    summary = run("krd_wbc", margin=0)
    assert summary["counts"]["classes"] == {"monocyte": 1, "neutrophil": 1}
    assert odd(summary) == {
        "classes with a single image": 1,
        "images that the CSV names and that are not there": 1,
        "images without a class in the CSV": 1,
        "rows of the CSV that are not understood": 1,
    }
    with Image.open(tmp_path / "out" / "cells/Dataset/image/image1.jpg_000.png") as cell:
        assert cell.size == (32, 32)


def test_krd_wbc_says_which_column_it_looked_for(tree, run):
    tree("Dataset/image/image1.jpg")
    tree("class labels.csv", text="Image name,kind\nimage1,Neutrophil\n")
    with pytest.raises(ValueError, match="no column of classes .'Categoriy'. among"):
        run("krd_wbc")


def test_aslan_says_which_column_is_missing(tree, run):
    tree("images/image-1.png")
    tree("annotations.csv", text="image,xmin,xmax,ymax,label\nimage-1.png,0,1,1,wbc\n")
    with pytest.raises(ValueError, match="lacks the column.s. 'ymin'; its first line has .'image', 'xmin'"):
        run("aslan")


def test_bccd_tells_annotations_that_cannot_be_read(tree, run):
    for name in ("a", "b", "c", "d"):
        tree(f"BCCD/JPEGImages/{name}.jpg")
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bndbox>"
    tree("BCCD/Annotations/a.xml", text=f"<annotation><object><name>WBC</name>{box}</object></annotation>")
    tree("BCCD/Annotations/b.xml", text=f"<annotation><object><name>Cat</name>{box}</object></annotation>")
    tree("BCCD/Annotations/c.xml", text="<annotation>")
    summary = run("bccd")
    assert summary["counts"]["classes"] == {"WBC": 1}
    assert odd(summary) == {
        "annotation files that cannot be read": 1,
        "classes with a single image": 1,
        "objects that are not understood": 1,
        "images without a white cell": 3,
        "images without an annotation file": 1,
        "split lists that are not there": 3,
    }


def test_apl_aml_lists_unsigned_cells_without_a_label(tree, run, tmp_path):
    first = tree("All/All/Patient_00/Signed slides/Lymphocyte, variant form/1.jpg")
    tree("All/All/Patient_01/Signed slides/Smudge cells/1.jpg").write_bytes(first.read_bytes())
    tree("All/All/Patient_01/Unsigned slides/2.jpg")
    tree("All/All/Patient_01/3.jpg")
    summary = run("apl_aml")
    assert summary["counts"]["patients"] == 2
    assert summary["counts"]["listed"] == 4
    assert summary["counts"]["classes"] == {"lymphocyte,_variant_form": 1, "smudge_cells": 1}
    assert odd(summary)["groups of byte-identical images with different labels"] == 1
    assert odd(summary)["images outside '<Signed slides>/<cell type>', unlabelled"] == 1
    with open(tmp_path / "out" / "labels.csv", newline="") as file:
        assert {row["patient"] for row in csv.DictReader(file)} == {"Patient_00", "Patient_01"}


def test_white_blood_cell_dataset_joins_the_lobes_of_a_nucleus(tree, run, tmp_path):
    tree("BloodImageSetS6NucSeg/BloodImage_00000.jpg")
    tree(
        "BloodImageSetS6NucSeg_masks/BloodImage_00000.png", boxes=[(10, 20, 18, 30), (22, 20, 30, 30), (70, 50, 80, 60)]
    )
    summary = run("white_blood_cell_dataset", margin=0)
    assert summary["counts"]["listed"] == 2
    with Image.open(tmp_path / "out" / "cells/BloodImageSetS6NucSeg/BloodImage_00000.jpg_000.png") as cell:
        assert cell.size == (20, 20)
    assert "BCCD" in summary["remarks"]

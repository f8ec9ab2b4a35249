"""The preparers of sets that are not at hand, on small trees after each distributor's layout and with its traps."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import LabelledCells
from dinov2.data.datasets.bag_folds import FoldedBags, draw_folds, folds_from_files
from dinov2.data.datasets.bags import PatientBags, read_patient_labels
from dinov2.data.splits import read_split


def rows_of(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def folds_of(file: Path, patients: list[str]) -> FoldedBags:
    """Read folds as abmil.py does, with invented features of these patients."""
    features = [np.full((1, 2), i, dtype=np.float32) for i in range(len(patients))]
    return folds_from_files(PatientBags(sorted(patients), features, [["cell"]] * len(patients)), file)


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


def test_bmc_takes_the_fixed_split_of_dinobloom_by_base_names(tree, run, tmp_path):
    for path in (
        "OTH/OTH_00167.jpg",
        "NGB/0001-1000/NGB_00003.jpg",
        "NGB/7001-8000/NGB_07290.jpg",
        "MYB/MYB_05527.jpg",
    ):
        tree(f"BM_cytomorphology_data/{path}")
    tree("BM_cytomorphology_data/MYB/MYB_05527.jpg", text=b"damaged")
    rows = ("test/OTH/OTH_00167.jpg,OTH", "test/NGB/NGB_07290.jpg,NGB", "test/NGB/NGB_09999.jpg,NGB")
    tree("bm_test.csv", text="Image Path,Label\n" + "".join(f"/another/disk/{row}\n" for row in rows))
    tree("bm_train.csv", text="Image Path,Label\n/another/disk/train/NGB/NGB_00003.jpg,NGB\n")
    summary = run("bmc")
    assert summary["counts"]["splits"] == {"test": 2, "train": 1}
    assert odd(summary)["images that the test list names and that are not there"] == 1
    assert odd(summary)["unreadable images and masks"] == 1
    cells = LabelledCells.from_path(tmp_path / "out" / "labels.csv")
    ((train, test),) = read_split(tmp_path / "out" / "split.csv", list(map(str, cells.paths))).folds
    assert [cells.paths[i].name for i in train] == ["NGB_00003.jpg"]
    assert {cells.paths[i].name for i in test} == {"NGB_07290.jpg", "OTH_00167.jpg"}


def test_aml_matek_reads_tiffs_with_alpha_and_its_own_codes(tree, run):
    for path in ("MYO/MYO_0001.tiff", "MYO/MYO_0002.tiff.tiff", "MYB/MYB_0001.tiff", "MYB/MYB_0002.tiff"):
        tree(f"AML-Cytomorphology_LMU/{path}", mode="RGBA")
    summary = run("aml_matek")
    assert summary["counts"]["classes"] == {"myeloblast": 2, "myelocyte": 2}
    assert summary["modes"] == {"RGBA": 4}
    assert odd(summary) == {}


def test_aml_hehr_has_patients_whose_subtype_is_the_label(tree, run, tmp_path):
    for path in ("NPM1/AAA/image_0.tif", "NPM1/AAA/image_1.tif", "control/BBB/image_0.tif", "control/AAA/image_0.tif"):
        tree(f"PKG - AML/data/{path}")
    tree("PKG - AML/data/control/image_9.tif")
    metadata = tree(
        "PKG - AML/metadata.csv", text="patient_id,bag_label,leucocytes_per_µl\nAAA,NPM1,3\n".encode("latin-1")
    )
    summary = run("aml_hehr")
    assert summary["counts"]["patients"] == 2
    assert odd(summary) == {
        "classes with a single image": 1,
        "images beside the patients' folders, left out": 1,
        "images of a patient who has another subtype already, left out": 1,
    }
    assert sorted(LabelledCells.from_path(tmp_path / "out" / "labels.csv").patients) == ["AAA", "AAA", "BBB"]
    assert read_patient_labels(tmp_path / "out" / "patient_labels.csv") == {"AAA": "NPM1", "BBB": "control"}
    with pytest.raises(ValueError, match=r"metadata.csv', line 1, is not UTF-8 text.*save it as UTF-8"):
        read_patient_labels(metadata)


def test_aml_hehr_has_folds_that_test_each_patient_once(tree, run, tmp_path, caplog):
    subtypes = {f"{letter}{name[0]}X": name for name in ("NPM1", "control") for letter in "ABCDE"}
    for patient, subtype in subtypes.items():
        tree(f"data/{subtype}/{patient}/image_0.tif", size=(8, 8))
    run("aml_hehr")
    data = folds_of(tmp_path / "out" / "folds.csv", list(subtypes))
    assert data.bags.label_of() == dict(sorted(subtypes.items()))
    assert sorted(i for fold in data.folds for i in fold.test) == list(range(10))
    assert [(len(fold.train), len(fold.val), len(fold.test)) for fold in data.folds] == [(6, 2, 2)] * 5
    again = draw_folds(data.bags, "crossval", 5, seed=0)
    assert [fold.test.tolist() for fold in again.folds] == [fold.test.tolist() for fold in data.folds]
    (tmp_path / "source" / "data" / "NPM1" / "ANX" / "image_0.tif").unlink()
    run("aml_hehr")
    assert "folds.csv is not written: 5 folds need two classes with as many patients each" in caplog.text
    assert not (tmp_path / "out" / "folds.csv").exists(), "folds of an earlier run would name a patient without cells"


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


def test_raabin_wbc_keeps_the_smear_of_each_cell_and_names_what_is_not_unpacked(tree, run, tmp_path):
    for path in ("Train/Basophil/95-5-24-1_1_1.jpg", "Train/Lymphocyte/95-8-12-4_86_1.jpg"):
        tree(path)
    tree("TestA/Lymphocyte/95-8-12-4_85_1.jpg")
    tree("TestA/Lymphocyte/95-8-22-3_6_2.jpg")
    tree("TestB.zip", text="an archive")
    tree("Train.rar", text="an archive that was unpacked")
    summary = run("raabin_wbc")
    assert summary["oddities"]["smears with cells in several parts"]["examples"] == ["95-8-12-4: testA, train"]
    assert summary["oddities"]["archives that are not unpacked, left out"]["examples"] == ["TestB.zip"]
    smears = {Path(row["Image Path"]).name: row["smear"] for row in rows_of(tmp_path / "out" / "labels.csv")}
    assert smears["95-8-12-4_85_1.jpg"] == smears["95-8-12-4_86_1.jpg"] == "95-8-12-4"
    assert smears["95-8-22-3_6_2.jpg"] == "95-8-22-3"
    assert LabelledCells.from_path(tmp_path / "out" / "labels.csv").patients is None  # a smear is no patient


def test_raabin_leukemia_counts_what_names_no_disease(tree, run, tmp_path):
    for path in ("ALL-L1/1.jpg", "AML/M3/2.jpg", "AML or ALL/3.jpg", "CML/4.png"):
        tree(path)
    summary = run("raabin_leukemia")
    assert [row["fab_type"] for row in rows_of(tmp_path / "out" / "labels.csv")] == ["L1", "M3", ""]
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


def test_warty_pig_names_the_folders_beside_the_one_it_reads(tree, run):
    for kind in ("augmented", "cropped", "raw"):
        for name in ("Basophil/1.jpg", "Neutrophil/2.jpg"):
            tree(f"{kind}/{name}")
    tree("documents/readme.txt", text="no images")
    summary = run("warty_pig")
    assert summary["counts"]["listed"] == 2
    note = summary["oddities"]["folders with images beside the one that was read, left out"]
    assert sorted(Path(example).name for example in note["examples"]) == ["cropped", "raw"]


def test_nuclick_keeps_cells_apart_that_touch_each_other(tree, run):
    tree("Hemato_Data/Train/images/a.png")
    touching = [(5, 5, 25, 25), (25, 5, 45, 25), (10, 25, 30, 45)]
    tree("Hemato_Data/Train/masks/a_mask.png", boxes=touching, numbers=[1, 2, 3])
    tree("Hemato_Data/Validation/images/b.png")
    tree("Hemato_Data/Validation/masks/b_mask.png", boxes=touching, numbers=[1, 2, 300])  # 16 bits
    summary = run("nuclick", margin=0)
    assert summary["counts"]["splits"] == {"train": 3, "val": 3}
    assert odd(summary) == {"images with several cells": 2}


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


def test_lisc_pairs_masks_of_the_expert_and_leaves_mixed_cells_unlabelled(tree, run, tmp_path):
    for kind, number in (("Baso", 1), ("Baso", 2), ("neut", 1), ("mixt", 1)):
        tree(f"LISC Database/Main Dataset/{kind}/{number}.bmp", size=(720, 576))
    for kind, number in (("Baso", 1), ("neut", 1), ("neut", 7)):
        masks = f"LISC Database/Ground Truth Segmentation/{kind}/areaforexpert1"
        tree(f"{masks}/{number}_expert.bmp", boxes=[(10, 20, 140, 120)], size=(712, 568))
    mixed = "LISC Database/Ground Truth Segmentation/mixt/areaforexpert1/1_expert.bmp"
    tree(mixed, boxes=[(10, 10, 130, 130), (450, 10, 570, 130)], size=(712, 568))
    summary = run("lisc", margin=0)
    assert summary["counts"]["classes"] == {"basophil": 1, "neutrophil": 1}
    assert summary["counts"]["listed"] == 4
    assert odd(summary) == {
        "classes with a single image": 1,
        "masks of images that are not there": 1,
        "masks that are missing": 1,
        "masks that lack a border of their image, centred": 3,
        "images with several cells": 1,
    }
    with Image.open(tmp_path / "out" / "cells/Main Dataset/Baso/1.bmp_000.png") as cell:
        original = Image.open(tmp_path / "source/LISC Database/Main Dataset/Baso/1.bmp")
        square = np.asarray(original)[9:139, 14:144]  # the box and the mask's border of 4 pixels
        np.testing.assert_array_equal(np.asarray(cell), square)


@pytest.mark.parametrize("size", [(711, 568), (712, 548), (728, 584)])
def test_lisc_refuses_masks_that_no_border_explains(tree, run, size):
    tree("Main Dataset/Baso/1.bmp", size=(720, 576))
    tree("Ground Truth Segmentation/Baso/areaforexpert1/1_expert.bmp", boxes=[(10, 20, 140, 120)], size=size)
    with pytest.raises(ValueError, match="no cell in .* 1 masks of another size than their image"):
        run("lisc")


def test_krd_wbc_reads_its_misspelt_column_and_grey_edges_of_jpeg_masks(tree, run, tmp_path):
    for number in (1, 2, 10):
        tree(f"KRD-WBC dataset/Dataset/image/image{number}.jpg")
        tree(f"KRD-WBC dataset/Dataset/mask/mask{number}.jpg", boxes=[(16, 16, 48, 48)])
    text = "Image ID,Categoriy\nimage1,Neutrophil\nimage10,Monocyte \nimage11,Monocyte\nnothing,Monocyte\n"
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
    tree(
        "All/master.csv",
        text="Patient_ID,Diagnosis,Cohort,Age at Diagnosis,Gender\nPatient_00,APL,Discovery,29,Female\n",
    )
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
    assert odd(summary)["patients that master.csv does not name"] == 1
    with open(tmp_path / "out" / "labels.csv", newline="") as file:
        assert {row["patient"] for row in csv.DictReader(file)} == {"Patient_00", "Patient_01"}


def test_apl_aml_has_diagnoses_of_patients_a_split_and_no_overview_images(tree, run, tmp_path):
    master = "Patient_ID,Diagnosis,Cohort,Age at Diagnosis,Gender\n"
    master += (
        "Patient_00,APL,Discovery,29,Female\nPatient_01,AML,Discovery,28,Male\nPatient_82,APL,Validation,43,Female\n"
    )
    tree("Data/master.csv", text=master)
    signed = "Data/All/Patient_00/Signed slides"
    copied = tree(f"{signed}/Smudge cells/SMU_13884248.jpg", size=(360, 363))
    # a folder name before "Signed": the unlabelled copy is the first of the two
    tree("Data/All/Patient_00/A Unsigned/Unsigned slides/SMU_13884248.jpg").write_bytes(copied.read_bytes())
    tree(f"{signed}/Arifact/ART_1.jpg", size=(360, 363))
    tree("Data/All/Patient_01/Signed slides/Artifact/ART_2.jpg", size=(360, 363))
    tree("Data/All/Patient_82/Unsigned slides/overview.jpg", size=(2900, 2000))
    tree("Data/All/Patient_82/Signed slides/Promyelocyte/PMY_1.jpg", size=(360, 363))
    summary = run("apl_aml", drop_duplicates=True)
    assert summary["counts"]["classes"] == {"artifact": 2, "promyelocyte": 1, "smudge_cells": 1}
    assert summary["counts"]["listed"] == 4
    assert odd(summary) == {
        "classes with a single image": 1,
        "groups of byte-identical images": 1,
        "overview images of smears, which are no cells, left out": 1,
    }
    assert rows_of(tmp_path / "out" / "patient_labels.csv") == [
        {"patient": "Patient_00", "label": "APL", "part": "train"},
        {"patient": "Patient_01", "label": "AML", "part": "train"},
        {"patient": "Patient_82", "label": "APL", "part": "test"},
    ]
    assert read_patient_labels(tmp_path / "out" / "patient_labels.csv")["Patient_82"] == "APL"
    cells = LabelledCells.from_path(tmp_path / "out" / "labels.csv")
    ((train, test),) = read_split(tmp_path / "out" / "split.csv", list(map(str, cells.paths))).folds
    assert {cells.patients[i] for i in train} == {"Patient_00", "Patient_01"}
    assert {cells.patients[i] for i in test} == {"Patient_82"}


def test_apl_aml_has_five_folds_with_the_validation_cohort_as_their_test_set(tree, run, tmp_path):
    names = {f"Patient_{i:02d}": "APL" if i % 2 else "AML" for i in range(15)}
    rows = [
        f"{patient},{name},{'Discovery' if i < 11 else 'Validation'},29,Female"
        for i, (patient, name) in enumerate(names.items())
    ]
    tree("master.csv", text="\n".join(["Patient_ID,Diagnosis,Cohort,Age at Diagnosis,Gender", *rows]))
    for i, patient in enumerate(names):
        folder = "Unsigned slides" if i == 3 else "Signed slides/Monocyte"  # no cell of one patient has a type
        tree(f"{patient}/{folder}/1.jpg", size=(8, 8))
    run("apl_aml")
    cells = LabelledCells.from_path(tmp_path / "out" / "labels_patients.csv")
    labels = [cells.class_names[i] for i in cells.labels]
    assert dict(zip(cells.patients, labels, strict=True)) == names
    data = folds_of(tmp_path / "out" / "folds.csv", list(names))
    assert data.bags.label_of() == names
    for fold in data.folds:
        assert fold.test.tolist() == [11, 12, 13, 14]
        assert len(set(data.labels[fold.val])) == 2
    assert sorted(i for fold in data.folds for i in fold.val) == list(range(11))


def test_white_blood_cell_dataset_joins_the_lobes_of_a_nucleus(tree, run, tmp_path):
    tree("BloodImageSetS6NucSeg/BloodImage_00000.jpg", size=(640, 480))
    boxes = [(100, 200, 140, 250), (160, 200, 200, 250), (400, 300, 423, 340)]  # two lobes and a speck
    tree("BloodImageSetS6NucSeg_masks/BloodImage_00000.png", boxes=boxes, size=(640, 480))
    summary = run("white_blood_cell_dataset", margin=0)
    assert summary["counts"]["listed"] == 1
    assert odd(summary) == {"specks in masks, smaller than 32 px": 1}
    with Image.open(tmp_path / "out" / "cells/BloodImageSetS6NucSeg/BloodImage_00000.jpg_000.png") as cell:
        assert cell.size == (100, 100)
    assert "BCCD" in summary["remarks"]


MLL23_HARMONISED = """mll23_label,matek_label,acevedo_label
basophil,basophil,basophil
lymphocyte_neoplastic,lymphocyte_atypical,
normoblast,erythroblast,erythroblast
thrombocyte,,platelet
"""


def test_mll23_reads_a_folder_a_class_and_its_names_in_other_sets(tree, run, tmp_path):
    for path in ("basophil/basophil/1.tif", "lymphocyte_neoplastic/2.tif", "normoblast/3.tif", "smudge_cell/4.tif"):
        tree(f"MLL23/{path}", size=(288, 288))
    tree("MLL23/myeloblast.zip", text="a class that is not unpacked")
    tree("MLL23/labels_harmonised.csv", text=MLL23_HARMONISED)
    summary = run("mll23")
    assert summary["counts"]["classes"] == {
        "basophil": 1,
        "lymphocyte_neoplastic": 1,
        "normoblast": 1,
        "smudge_cell": 1,
    }
    assert summary["sizes"] == {"288x288": 4}
    rows = {row["Label"]: (row["matek"], row["acevedo"]) for row in rows_of(tmp_path / "out" / "labels.csv")}
    assert rows == {
        "basophil": ("basophil", "basophil"),
        "lymphocyte_neoplastic": ("lymphocyte_atypical", ""),
        "normoblast": ("erythroblast", "erythroblast"),
        "smudge_cell": ("", ""),
    }
    assert odd(summary) == {
        "archives that are not unpacked, left out": 1,
        "classes with a single image": 1,
        "rows of the CSV that are not understood": 1,
    }


def test_mll23_says_which_columns_it_looked_for(tree, run):
    for path in ("basophil/1.tif", "eosinophil/2.tif", "labels_harmonised.csv"):
        tree(path, text="name,matek\n" if path.endswith("csv") else None)
    with pytest.raises(ValueError, match="has the columns .'name', 'matek'.; expected one of MLL23's classes"):
        run("mll23")


def test_c_nmc_has_patients_and_official_folds(tree, run, tmp_path):
    top = "PKG - C-NMC 2019/C-NMC_training_data"
    names = ("fold_0/all/UID_11_1_1_all.bmp", "fold_0/hem/UID_H10_1_1_hem.bmp", "fold_1/all/UID_15_20_8_all.bmp")
    for name in (*names, "fold_1/hem/UID_H12_3_1_hem.bmp", "fold_2/all/UID_57_29_1_all.bmp", "fold_2/all/copy.bmp"):
        tree(f"{top}/{name}")
    tree("PKG - C-NMC 2019/C-NMC_test_prelim_phase_data/1.bmp")
    summary = run("c_nmc")
    assert summary["counts"]["classes"] == {"all": 3, "hem": 2}
    assert odd(summary) == {
        "folders with images beside the one that was read, left out": 1,
        "images whose name names no patient, left out": 1,
    }
    cells = LabelledCells.from_path(tmp_path / "out" / "labels.csv")
    assert sorted(cells.patients) == ["11", "15", "57", "H10", "H12"]
    folds = read_split(tmp_path / "out" / "split.csv", list(map(str, cells.paths))).folds
    assert [{cells.patients[i] for i in test} for _, test in folds] == [{"11", "H10"}, {"15", "H12"}, {"57"}]

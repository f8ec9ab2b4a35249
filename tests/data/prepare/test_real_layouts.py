"""The preparers on real files of PBC, SSL Seg, BCCD and Aslan, as their distributors lay them out."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import HemaStandardDataset, LabelledCells
from dinov2.data.prepare import get_dataset
from dinov2.data.prepare.write import Options, prepare
from dinov2.data.splits import read_split


def prepared(name: str, source: Path, output: Path, **options) -> dict:
    if not source.is_dir():
        pytest.skip(f"{name}'s real images are not at {source}")
    return prepare(get_dataset(name), source, output, Options(n_workers=1, **options))


def odd(summary: dict) -> dict[str, int]:
    return {kind: note["count"] for kind, note in summary["oddities"].items()}


def test_acevedo_has_eight_folders_ten_stages_and_every_oddity_named(shared_data, tmp_path):
    summary = prepared("acevedo", shared_data / "acevedo_pbc", tmp_path)
    counts = summary["counts"]
    assert counts["pictures"] == counts["listed"] == counts["labelled"] == 1776
    assert counts["classes"]["neutrophil"] == 220  # not .DS_169665.jpg
    assert len(counts["classes"]) == 8
    assert len(counts["dinobloom_classes"]) == 10
    assert {k: counts["dinobloom_classes"][k] for k in ("metamyelocyte", "myelocyte", "promyelocyte")} == {
        "metamyelocyte": 77,
        "myelocyte": 85,
        "promyelocyte": 50,
    }
    assert counts["dinobloom_classes"]["lymphocyte_typical"] == counts["classes"]["lymphocyte"]  # DinoBloom's name
    assert sum(counts["dinobloom_classes"].values()) == 1776 - 220 - 12 - 3  # platelets, IG, NEUTROPHIL
    assert summary["sizes"] == {"360x360": 16, "360x363": 1734, "366x369": 26}
    assert odd(summary) == {
        "groups of byte-identical images": 17,
        "groups of byte-identical images with different labels": 1,
        "hidden files that are named like images, left out": 1,
        "images that the train list names and that are not there": 6169 - 944,
        "images that the val list names and that are not there": 1030 - 160,
    }
    (pair,) = summary["oddities"]["groups of byte-identical images with different labels"]["examples"]
    assert pair == "eosinophil/EO_225902.jpg = neutrophil/BNE_191112.jpg"
    assert summary["expected"]["pictures"] == {"published": 17092, "here": 1776}
    assert len(HemaStandardDataset(root=str(tmp_path / "acevedo.txt"))) == 1776
    cells = LabelledCells.from_path(tmp_path / "labels.csv")
    assert cells.patients is None  # the set names none
    assert len(LabelledCells.from_path(tmp_path / "labels_dinobloom.csv").class_names) == 10
    assert len(LabelledCells.from_path(tmp_path / "splits" / "train.csv")) == 944
    assert not (tmp_path / "split.csv").exists()  # its test list is not at hand


def test_duplicates_can_be_dropped_and_a_contradicted_label_with_them(shared_data, tmp_path):
    counts = prepared("acevedo", shared_data / "acevedo_pbc", tmp_path, drop_duplicates=True)["counts"]
    assert counts["listed"] == 1776 - 17
    assert counts["labelled"] == 1776 - 17 - 1


def test_ssl_seg_cells_are_cut_out_by_their_masks(shared_data, tmp_path):
    summary = prepared("ssl_seg", shared_data / "segmentation_WBC", tmp_path)
    assert summary["counts"]["classes"] == {
        "basophil": 1,
        "eosinophil": 22,
        "lymphocyte": 53,
        "monocyte": 48,
        "neutrophil": 40,
    }
    assert odd(summary) == {
        "classes with a single image": 1,
        "groups of byte-identical images": 1,
        "images that the CSV names and that are not there": 136,
    }
    assert summary["oddities"]["groups of byte-identical images"]["examples"] == [
        "Dataset 1/112.bmp = Dataset 1/139.bmp"
    ]
    assert len(summary["sizes"]) == 28
    mask = np.asarray(Image.open(shared_data / "segmentation_WBC" / "Dataset 1" / "001.png")) > 64
    rows, columns = np.nonzero(mask)
    longer = max(np.ptp(rows), np.ptp(columns)) + 1
    with Image.open(tmp_path / "cells" / "Dataset 1" / "001.bmp_000.png") as cell:
        assert max(cell.size) == min(120, round(longer * 1.2))


def test_bccd_white_cells_are_cut_out_and_boxes_of_no_area_are_told(shared_data, tmp_path):
    source = shared_data / "BCCD_Dataset"
    summary = prepared("bccd", source, tmp_path, size=64)
    assert summary["counts"]["classes"] == {"WBC": 122}
    assert summary["counts"]["annotated_classes"] == {"Platelets": 105, "RBC": 1387, "WBC": 122}
    assert summary["counts"]["splits"] == {"test": 29, "train": 61, "val": 32}
    assert odd(summary) == {
        "boxes of no area, left out": 2,
        "images that the test list names and that are not there": 43,
        "images that the train list names and that are not there": 146,
        "images that the val list names and that are not there": 55,
        "images with several white cells": 4,
        "images without a white cell": 2,
    }
    cells = LabelledCells.from_path(tmp_path / "labels.csv")
    assert len(cells) == 122
    with Image.open(cells.paths[0]) as cell:
        assert cell.size == (64, 64)
    split = read_split(tmp_path / "split.csv", [str(path) for path in cells.paths])
    assert [len(side) for side in split.folds[0]] == [61, 29]
    with open(tmp_path / "splits" / "val.csv", newline="") as file:
        val = list(csv.DictReader(file))
    assert len(val) == 32
    assert (tmp_path / "splits" / val[0]["Image Path"]).is_file()


def test_aslan_boxes_are_fractions_of_rgba_images(shared_data, tmp_path):
    summary = prepared("aslan", shared_data / "blood-cell-detection-dataset", tmp_path, margin=0)
    assert summary["counts"]["classes"] == {"wbc": 26}
    assert summary["counts"]["annotated_classes"] == {"rbc": 519, "wbc": 26}
    assert summary["modes"] == {"RGBA": 24}
    assert odd(summary) == {
        "hidden folders, left out": 1,
        "images that annotations.csv names and that are not there": 76,
        "images with several white cells": 3,
        "images without a white cell": 1,
    }
    sizes = [Image.open(path).size for path in LabelledCells.from_path(tmp_path / "labels.csv").paths]
    assert min(min(size) for size in sizes) > 20  # pixels, not fractions

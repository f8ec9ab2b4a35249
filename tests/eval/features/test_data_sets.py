"""Data sets side by side: the table of common class names; test_cross.py has the tests of joined features."""

import logging

import pandas as pd
import pytest

from dinov2.data.prepare import all_datasets
from dinov2.data.prepare.class_folders import ACEVEDO_STAGES, CELL_TYPES, HEHR_SUBTYPES
from dinov2.eval.features.data_sets import WHITE_CELLS_FILE, read_classes_map, white_cells_map

LABELS = {"pbc": ["basophil", "blast", "monocyte"], "ssl": ["blast"], "bm": ["BAS"]}


def test_a_map_is_read_and_an_empty_name_drops_the_cells(tmp_path):
    (tmp_path / "map.csv").write_text("label,dataset,common\nBAS,bm,basophil\nblast,ssl,\n", encoding="utf-8-sig")
    assert read_classes_map(tmp_path / "map.csv", LABELS) == {("bm", "BAS"): "basophil", ("ssl", "blast"): ""}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label,common\nx,y\n", r"has the columns \['label', 'common'\]; expected dataset,label,common"),
        ("dataset,label,common\nmll,blast,x\n", "line 2: no data set is called 'mll'; there are pbc, ssl, bm"),
        ("dataset,label,common\npbc,Blast,x\n", "line 2: pbc has no label 'Blast'; it has basophil, blast, monocyte"),
        ("dataset,label,common\npbc,blast,x\npbc,blast,y\n", "line 3: 'blast' of pbc has a row already"),
    ],
)
def test_maps_that_are_wrong(text, message, tmp_path):
    (tmp_path / "map.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_classes_map(tmp_path / "map.csv", LABELS)
    with pytest.raises(FileNotFoundError, match="--classes-map: .*no such file"):
        read_classes_map(tmp_path / "absent.csv", LABELS)


# --- the shipped map

# names in files of the distributor, which no code lists, and DinoBloom's name of a class of labels_dinobloom.csv
FROM_FILES = {"krd_wbc": set(CELL_TYPES), "acevedo": {*ACEVEDO_STAGES.values(), "lymphocyte_typical"}}
FREE = "apl_aml"  # its labels are names of folders


def test_the_map_has_the_labels_that_the_preparers_write():
    table = pd.read_csv(WHITE_CELLS_FILE, dtype=str, keep_default_na=False)
    assert not table.duplicated(["dataset", "label"]).any()
    assert set(table["common"]) == {*CELL_TYPES, ""}
    datasets = all_datasets()
    for name, rows in table.groupby("dataset"):
        written = set(datasets[name].classes.values()) | FROM_FILES.get(name, set())
        assert name == FREE or set(rows["label"]) == written, name
    assert set(datasets) - set(table["dataset"]) == {"nuclick", "white_blood_cell_dataset"}  # without classes
    assert set(datasets["aml_hehr"].classes) == set(HEHR_SUBTYPES)


def test_the_map_gives_the_five_white_cells():
    common = white_cells_map({"acevedo": ["ig", "neutrophil"], "aml_matek": ["neutrophil_band", "lymphocyte_typical"]})
    assert common == {
        ("acevedo", "ig"): "",
        ("acevedo", "neutrophil"): "neutrophil",
        ("aml_matek", "neutrophil_band"): "neutrophil",
        ("aml_matek", "lymphocyte_typical"): "lymphocyte",
    }


def test_the_map_names_what_it_does_not_know(caplog):
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        assert white_cells_map({"apl_aml": ["monocyte", "odd"]}) == {
            ("apl_aml", "monocyte"): "monocyte",
            ("apl_aml", "odd"): "",
        }
    assert "cells of apl_aml with the labels odd are left out" in caplog.text
    with pytest.raises(ValueError, match="no data set 'pbc', only acevedo, .*; give these names with --names"):
        white_cells_map({"pbc": ["monocyte"]})

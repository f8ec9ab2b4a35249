"""Data sets side by side: the table of common class names; test_cross.py has the tests of joined features."""

import pytest

from dinov2.eval.features.data_sets import read_classes_map

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

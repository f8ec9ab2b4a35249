"""Labelled cells from folders and from CSV files."""

import csv

import numpy as np
import pytest

from dinov2.data.datasets import LabelledCells, find_images
from dinov2.data.datasets.labelled_cells import UNLABELLED


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def write_csv(folder, text, name="cells.csv", encoding="utf-8"):
    touch(folder, "a.png", "b.png", "sub/c d.png")
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


def test_a_folder_per_class(tmp_path):
    touch(tmp_path, "b/2.PNG", "b/1.jpg", "a/x.tiff", "a/deep/er/y.Jpeg", "C/z.webp", "a/notes.txt", "a/w.svg")
    touch(tmp_path, "a/.hidden.jpg", "b/._1.jpg", ".ipynb_checkpoints/1.jpg", "a/.cache/q.png", "readme.md")
    cells = LabelledCells.from_path(tmp_path)
    assert cells.class_names == ["C", "a", "b"]
    assert [str(path.relative_to(tmp_path)) for path in cells.paths] == [
        "C/z.webp",
        "a/deep/er/y.Jpeg",
        "a/x.tiff",
        "b/1.jpg",
        "b/2.PNG",
    ]
    assert cells.labels.dtype == np.int64
    assert cells.labels.tolist() == [0, 1, 1, 2, 2]
    assert cells.patients is None
    assert len(cells) == 5


def test_folders_and_images_that_are_no_class_are_told(tmp_path, caplog):
    touch(tmp_path, "a/1.jpg", "empty/notes.txt", "loose.png")
    cells = LabelledCells.from_path(tmp_path)
    assert cells.class_names == ["a"]
    assert "not classes: empty" in caplog.text
    assert "1 images beside the class folders" in caplog.text


def test_the_training_sets_ids_are_kept(tmp_path):
    touch(tmp_path, "b/1.jpg", "a/1.jpg")
    cells = LabelledCells.from_path(tmp_path, class_names=["z", "b", "a"])
    assert cells.class_names == ["z", "b", "a"]
    assert cells.labels.tolist() == [2, 1]
    with pytest.raises(ValueError, match="label\\(s\\) 'b', which are not among the known classes 'a', 'c'"):
        LabelledCells.from_path(tmp_path, class_names=["a", "c"])
    with pytest.raises(ValueError, match="stands twice"):
        LabelledCells.from_path(tmp_path, class_names=["a", "b", "a"])


def test_a_folder_without_classes(tmp_path):
    touch(tmp_path, "1.jpg", "empty/notes.txt")
    with pytest.raises(ValueError, match="expected one folder per class"):
        LabelledCells.from_path(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        LabelledCells.from_path(tmp_path / "gone")
    with pytest.raises(ValueError, match="neither a folder nor a .csv"):
        LabelledCells.from_path(tmp_path / "1.jpg")


def test_a_csv(tmp_path, monkeypatch):
    monkeypatch.chdir("/")  # relative paths count from the CSV, not from here
    absolute = tmp_path / "b.png"
    text = f"Image Path,Label\na.png,mono\n{absolute},eos\n\nsub/c d.png,mono\n"
    cells = LabelledCells.from_path(write_csv(tmp_path, text))
    assert cells.paths == [tmp_path / "a.png", absolute, tmp_path / "sub/c d.png"]
    assert cells.class_names == ["eos", "mono"]
    assert cells.labels.tolist() == [1, 0, 1]
    assert cells.patients is None
    assert LabelledCells.from_path(tmp_path / "cells.csv", ["mono", "eos"]).labels.tolist() == [0, 1, 0]


def test_a_csv_as_spreadsheets_write_it(tmp_path):
    text = '\ufeffid,Label , "Image Path",patient\r\n7, 12 ,a.png,P1\r\n8,3,"sub/c d.png", P2\r\n,,,\r\n'
    cells = LabelledCells.from_path(write_csv(tmp_path, text, name="cells.CSV"))
    assert [path.name for path in cells.paths] == ["a.png", "c d.png"]
    assert cells.class_names == ["12", "3"]
    assert cells.labels.tolist() == [0, 1]
    assert cells.patients == ["P1", "P2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n", "lacks the column\\(s\\) 'Image Path', 'Label'.*nothing"),
        (
            "Image Path Label\na.png x\n",
            "lacks the column.*has \\['Image Path Label'\\], expected Image Path,Label\\[,patient\\]",
        ),
        ("Image Path,label\na.png,x\n", "lacks the column\\(s\\) 'Label'"),
        ("Image Path,Label\n", "no rows"),
        ("Image Path,Label\n,\n", "no rows"),
        ("Image Path,Label\na.png,x\nb.png\n", "line 3: no value for 'Label'"),
        ("Image Path,Label,patient\na.png,x,\n", "line 2: no value for 'patient'"),
    ],
)
def test_malformed_csv_files(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        LabelledCells.from_path(write_csv(tmp_path, text))


def test_labels_hold_commas_quotes_and_line_breaks(tmp_path):
    labels = ["band, left", 'the "other"', "two\nlines", "a\u2028b", "<b>&"]
    image = touch(tmp_path, "a.png") / "a.png"
    with open(tmp_path / "cells.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["Image Path", "Label"], *([image, label] for label in labels)])
    cells = LabelledCells.from_path(tmp_path / "cells.csv")
    assert [cells.class_names[i] for i in cells.labels] == labels


def test_cells_without_labels_where_none_are_needed(tmp_path):
    file = write_csv(tmp_path, "Image Path,patient\na.png,2\nb.png,1\n")
    for source in (file, tmp_path / "sub"):
        with pytest.raises(ValueError, match="'Label'|expected one folder per class"):
            LabelledCells.from_path(source)
        cells = LabelledCells.from_path(source, needs_labels=False)
        assert cells.class_names == [UNLABELLED]
        assert cells.labels.tolist() == [0] * len(cells)
    assert cells.paths == [tmp_path / "sub" / "c d.png"]
    assert LabelledCells.from_path(file, needs_labels=False).patients == ["2", "1"]
    labelled = LabelledCells.from_path(tmp_path, needs_labels=False)  # with a class folder the layout is the usual one
    assert labelled.class_names == ["sub"]


def test_a_csv_in_another_encoding(tmp_path):
    path = write_csv(tmp_path, "Image Path,Label\na.png,Stäbchen\n", encoding="latin-1")
    with pytest.raises(ValueError, match="not UTF-8"):
        LabelledCells.from_path(path)


def test_images_that_are_not_there_are_named(tmp_path):
    path = write_csv(tmp_path, "Image Path,Label\na.png,x\ngone.png,x\n")
    with pytest.raises(FileNotFoundError, match=r"1 of the 2 images.*gone\.png; relative paths count from"):
        LabelledCells.from_path(path)


def test_a_name_that_is_too_long_is_of_an_image_that_is_not_there(tmp_path):
    path = write_csv(tmp_path, f"Image Path,Label\n{'a' * 5000}.png,x\n")
    with pytest.raises(FileNotFoundError, match=r"1 of the 1 images in .*cells.csv' do not exist"):
        LabelledCells.from_path(path)


def test_find_images_goes_deep_and_skips_the_hidden(tmp_path):
    touch(tmp_path, "b.png", "a/c.JPG", "a/.d.jpg", ".e/f.jpg", "g.txt")
    assert find_images(tmp_path) == [tmp_path / "a/c.JPG", tmp_path / "b.png"]


def test_the_real_pbc_folder(shared_data):
    cells = LabelledCells.from_path(shared_data / "acevedo_pbc" / "PBC_dataset_normal_DIB")
    assert len(cells) == 1776
    assert cells.class_names == [
        "basophil",
        "eosinophil",
        "erythroblast",
        "ig",
        "lymphocyte",
        "monocyte",
        "neutrophil",
        "platelet",
    ]
    assert not any(path.name.startswith(".") for path in cells.paths)
    assert np.bincount(cells.labels).min() > 150


def test_a_folder_with_metadata_of_hugging_face(tmp_path):
    touch(tmp_path, "images/1.png", "images/2.png", "images/3.png")
    (tmp_path / "metadata.csv").write_text(
        "file_name,label,patient,age\nimages/2.png,blast,p1,7\nimages/1.png,mono,p2,8\n"
    )
    cells = LabelledCells.from_path(tmp_path)
    assert cells.paths == [tmp_path / "images/2.png", tmp_path / "images/1.png"]
    assert cells.class_names == ["blast", "mono"]
    assert cells.patients == ["p1", "p2"]
    (tmp_path / "metadata.csv").write_text("file_name,kind\nimages/2.png,blast\n")
    with pytest.raises(ValueError, match="metadata.csv' lacks the column.s. 'Label'"):
        LabelledCells.from_path(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,label\nimages/9.png,blast\n")
    with pytest.raises(FileNotFoundError, match="1 of the 1 images in .*metadata.csv"):
        LabelledCells.from_path(tmp_path)


def test_another_metadata_file_beside_class_folders_is_left_alone(tmp_path):
    touch(tmp_path, "a/1.jpg", "b/1.jpg")
    (tmp_path / "metadata.csv").write_bytes("patient_id,leucocytes_per_µl\nAAA,3\n".encode("latin-1"))
    assert LabelledCells.from_path(tmp_path).class_names == ["a", "b"]

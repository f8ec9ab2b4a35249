"""The list of all images below some folders."""

import os
import runpy
from pathlib import Path

import pytest
from PIL import Image

from dinov2.data import make_dataset
from dinov2.data.datasets import LabelledCells

main = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "make_patch_lists.py"))["main"]


def test_lists_training_and_evaluation_count_the_same_images(tmp_path, capsys):
    cells = tmp_path / "cells"
    for name in ("a/1.png", "a/2.JP2", "b/deep/3.ppm", "b/.hidden.png", "b/notes.md"):
        (cells / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(cells / name) if "md" not in name else (cells / name).write_text("x")
    (cells / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (8, 8)).save(os.fsencode(tmp_path / "elsewhere") + b"/f\xfcr.png", "PNG")
    assert main([str(cells), "--output", str(tmp_path / "lists" / "all.txt")]) == 0
    output = capsys.readouterr()
    assert "4 images" in output.out
    assert "passed over: 1 .md" in output.err
    for root in (cells, tmp_path / "lists"):
        dataset = make_dataset(f"HemaStandardDataset:root={root}:image_size=8")
        assert [dataset[i].failures for i in range(len(dataset))] == [()] * 4
    assert len(LabelledCells.from_path(cells)) == 4


def test_home_folders_and_errors(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "cells").mkdir()
    assert main(["~/cells", "--output=~/all.txt"]) == 2
    assert f"no images below {tmp_path / 'cells'}" in capsys.readouterr().err
    (tmp_path / "cells" / "two\nlines.png").touch()
    assert main(["~/cells", "--output=~/all.txt"]) == 2
    assert "rename this file" in capsys.readouterr().err
    (tmp_path / "cells" / "two\nlines.png").rename(tmp_path / "cells" / "1.png")
    assert main(["~/cells", "--output=~/cells"]) == 2  # a folder has this name
    assert main(["~/cells", "--output=~/all.txt"]) == 0
    assert (tmp_path / "all.txt").read_text() == f"{tmp_path / 'cells' / '1.png'}\n"
    with pytest.raises(SystemExit):
        main([str(tmp_path / "gone"), "--output", str(tmp_path / "all.txt")])

"""The command: its files, its flags, and its sheets of images."""

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.sample_cells import write_sample_cells
from dinov2.eval.cell_maps import main, sheet
from dinov2.eval.maps.patch_maps import TITLES
from dinov2.models import architecture, build_backbone

SIZE, PATCH = 56, 14


@pytest.fixture(scope="module")
def checkpoint(formulas, tmp_path_factory):
    settings = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": PATCH, "img_size": SIZE, "layerscale": 1.0}
    model = formulas.fill_(build_backbone({**settings, "num_register_tokens": 2}), "cells")
    file = tmp_path_factory.mktemp("weights") / "teacher_checkpoint.pth"
    teacher = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    torch.save({"teacher": teacher, "architecture": architecture(model)}, file)
    return file


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Drawn cells, a folder for each class."""
    folder = tmp_path_factory.mktemp("cells")
    write_sample_cells(folder, n_train=0, n_probe_train=20, n_probe_test=0, n_patients=0, size=64)
    return folder / "probe" / "train"


def test_what_the_command_writes(checkpoint, cells, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(checkpoint), "--output-dir", str(out), "--device", "cpu"]
    main([*arguments, "--data", str(cells), "--n", "2", "--image-size", "42"])
    assert "2 cells, 3 x 3 patches" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "cells.html",
        "cells.png",
        "similarity.png",
        *(f"{kind}.png" for kind in TITLES),
    }
    sizes = {path.stem: Image.open(path).size for path in out.glob("*.png")}
    assert sizes["attention"][1] > sizes["pca"][1], "a row for each head"
    page = (out / "cells.html").read_bytes()
    main([*arguments, "--data", str(cells), "--n", "2", "--image-size", "42"])
    assert (out / "cells.html").read_bytes() == page
    chosen = sorted(cells.rglob("*.png"))[:2]
    main([*arguments, "--pictures", *map(str, chosen), "--no-occlusion"])
    assert all(path.name in (out / "cells.html").read_text() for path in chosen)
    assert "4 x 4 patches" in capsys.readouterr().out, "the size that the network was trained on"


def test_networks_without_patches_are_refused(cells, tmp_path):
    image = next(cells.rglob("*.png"))
    with pytest.raises(ValueError, match="--encoder pixels: cell maps need a backbone"):
        main(["--encoder", "pixels", "--pictures", str(image), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_sheet_shortens_names_that_are_too_long():
    images = np.full((2, 8, 8, 3), 99, dtype=np.uint8)
    written = sheet({"a rather long title of this row": images, "b": images}, [f"class/{'W' * 90}.png", "y"])
    header, right_edge = written[:34], written[:34, -4:]
    assert (right_edge == 255).all()
    assert (header[:, 150:290] < 255).any()
    assert (header[:, 290:294] == 255).all(), "the gap to the next name"
    assert (written[34:174, 150:290] == 99).all()

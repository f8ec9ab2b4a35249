"""A features file for each patient: what is written is what `PatientBags` reads, whole and with nothing mixed in."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.datasets import LabelledCells
from dinov2.data.datasets.bags import PatientBags
from dinov2.eval.extract_features import main
from dinov2.eval.features import loop, read_features
from dinov2.eval.features.extract import Embedder
from dinov2.eval.features.patient_files import extract_patient_files
from dinov2.models import build_backbone

CLASSES = {"p1": "APL", "p2": "control", "p.3": "APL"}
ROWS = ["p1", "p2", "p1", "p.3", "p2", "p1"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working folder with weights.pth, and six images of three patients in cells.csv."""
    monkeypatch.chdir(tmp_path)
    save_weights(0)
    rng = np.random.default_rng(0)
    for i in range(len(ROWS)):
        Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(f"{i}.png")
    write_table([(f"{i}.png", CLASSES[patient], patient) for i, patient in enumerate(ROWS)])
    return tmp_path


def save_weights(seed):
    torch.manual_seed(seed)
    settings = {"embed_dim": 64, "depth": 1, "num_heads": 1, "patch_size": 14, "img_size": 28, "block_chunks": 0}
    torch.save(build_backbone(settings).state_dict(), "weights.pth")


def write_table(rows):
    with open("cells.csv", "w") as file:
        file.write("\n".join(",".join(row) for row in [("Image Path", "Label", "patient"), *rows]) + "\n")


def extract(*flags, layout="genbloom", out="bags"):
    common = ["--checkpoint", "weights.pth", "--data", "cells.csv", "--image-size", "28", "--num-workers", "0"]
    main([*common, "--device", "cpu", "--layout", layout, "--output-dir", out, *flags])


def written(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_bags_from_the_folder_equal_bags_from_one_file(work, capsys):
    extract()
    assert "bags: 3 patients, 6 cells, 2 classes" in capsys.readouterr().out
    assert written(work / "bags") == ["APL/p.3.h5", "APL/p1.h5", "control/p2.h5"]
    extract(layout="file", out="one")
    whole = read_features("one/features.h5")
    names = [whole.class_names[i] for i in whole.labels]
    expected = PatientBags.from_cells(whole.features, whole.patients, whole.paths, names, whole.attributes)
    found = PatientBags.from_path("bags")
    assert found.sha256() == expected.sha256()
    assert found.cells == expected.cells
    assert found.label_of() == CLASSES
    for name in ("checkpoint_sha256", "transform", "model", "precision"):
        assert found.attributes[name] == whole.attributes[name]
    assert found.attributes["kind"] == "cls"


def test_existing_files_are_kept_and_missing_ones_made(work):
    extract("--kinds", "mean", "cls")
    times = {name: (work / "bags" / name).stat().st_mtime_ns for name in written(work / "bags")}
    extract("--kinds", "mean")
    assert {name: (work / "bags" / name).stat().st_mtime_ns for name in written(work / "bags")} == times
    (work / "bags" / "control" / "p2.h5").unlink()
    extract("--kinds", "mean", "cls")
    assert written(work / "bags") == list(times)
    assert PatientBags.from_path("bags").attributes["kind"] == "mean"


def other_weights():
    save_weights(1)


def one_cell_less():
    write_table([(f"{i}.png", CLASSES[patient], patient) for i, patient in enumerate(ROWS[:-1])])


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (other_weights, [], r"p1\.h5' holds other features than asked for \(checkpoint_sha256 is"),
        (one_cell_less, [], r"p1\.h5' holds other features .*the images or their order differ: 3 there and 2 here"),
        (None, ["--precision", "bf16"], "precision is 'fp32' there and 'bf16' here"),
    ],
)
def test_older_files_are_not_mixed_in(change, flags, message, work):
    extract()
    before = {name: (work / "bags" / name).read_bytes() for name in written(work / "bags")}
    if change:
        change()
    with pytest.raises(ValueError, match=message):
        extract(*flags)
    assert {name: (work / "bags" / name).read_bytes() for name in written(work / "bags")} == before
    extract(*flags, "--overwrite")
    extract(*flags)
    assert len(PatientBags.from_path("bags")) == 3


@pytest.mark.parametrize("foreign", ["features.h5", "APL/p9.h5", "old/p1.h5", "APL/p9/cell.h5"])
def test_files_of_other_patients_are_refused(foreign, work):
    extract()
    (work / "bags" / foreign).parent.mkdir(exist_ok=True)
    shutil.copy("bags/APL/p1.h5", f"bags/{foreign}")
    for flags in ([], ["--overwrite"]):
        with pytest.raises(ValueError, match="1 files in 'bags' are of no patient in --data, for instance"):
            extract(*flags)


def test_unreadable_images_are_listed_in_the_file_of_their_patient(work):
    (work / "2.png").write_bytes(b"no image")
    extract()
    assert read_features("bags/APL/p1.h5").unreadable == [str(work / "2.png")]
    assert read_features("bags/control/p2.h5").unreadable == []
    assert len(PatientBags.from_path("bags").features[1]) == 2
    extract()  # they are what was asked for


def test_a_patient_without_a_readable_image_is_refused_and_parts_are_kept(work, monkeypatch):
    monkeypatch.setattr(loop, "PART_SIZE", 3)
    (work / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 patients have no readable image \('p\.3'\), so bags without cells"):
        extract()
    assert all(name.startswith(".patients.parts/") for name in written(work / "bags"))
    shutil.copy("0.png", "3.png")
    cells = LabelledCells.from_path("cells.csv")
    embedder = Embedder("weights.pth", image_size=28)
    seen, embed = [], embedder.encoder.embed

    def counting(images, kinds):
        seen.append(len(images))
        return embed(images, kinds)

    monkeypatch.setattr(embedder.encoder, "embed", counting)
    assert extract_patient_files(embedder, cells, work / "bags") == 3
    assert seen == [3]  # the part with the image that was repaired
    assert written(work / "bags") == ["APL/p.3.h5", "APL/p1.h5", "control/p2.h5"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("0.png", "APL"), ("1.png", "control")], "the cells name no patients; give --data as a CSV with the columns"),
        ([("0.png", "APL", "p1"), ("1.png", "control", "p1")], "1 patients have two labels, for instance 'p1'"),
        ([("0.png", "APL", "a/b")], "'a/b' cannot be file names"),
        ([("0.png", "..", "p1")], r"'\.\.' cannot be file names"),
    ],
)
def test_cells_without_valid_patients_are_refused(rows, message, work):
    header = ("Image Path", "Label", "patient")[: len(rows[0])]
    (work / "cells.csv").write_text("\n".join(",".join(row) for row in [header, *rows]) + "\n")
    with pytest.raises(ValueError, match=message):
        extract()
    assert not (work / "bags").exists()


def test_patient_files_have_no_patch_grids(work):
    with pytest.raises(ValueError, match="--layout genbloom: it has no place for patch grids"):
        extract("--kinds", "cls", "patches")

import csv
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import HemaStandardDataset, LabelledCells
from dinov2.data.prepare import Box, Cell, DataSet, all_datasets, components, get_dataset, overview_table
from dinov2.data.prepare.write import Options, cut, describe, prepare

ROOT = Path(__file__).parents[3]


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (40, 50)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def smears(cells: list[tuple[str, str | None, Box | None]], **fields) -> DataSet:
    """A data set whose images lie in `smears/` and whose annotations are `cells`."""

    def find(top, notes):
        for name, label, box in cells:
            yield Cell(top / name, label, box=box)

    return DataSet(
        **{
            "name": "smears",
            "title": "Smears",
            "modality": "peripheral blood",
            "origin": "https://example.org/smears",
            "paper": "none",
            "layout": "smears/*.png",
            "entries": ("*.png",),
            "cuts": True,
            "find": find,
            **fields,
        }
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_odd_boxes_are_counted_and_the_others_cut_out(tmp_path):
    write_image(tmp_path / "in" / "a.png")
    boxes = [
        Box(10, 10, 20, 20),
        Box(10, 10, 20, 20),
        Box(30, 30, 30, 40),
        Box(60, 5, 70, 15),
        Box(-5, 30, 5, 40),
        Box(20, 9, 10, 19),
    ]
    dataset = smears([("a.png", "white", box) for box in boxes])
    summary = prepare(dataset, tmp_path / "in", tmp_path / "out", Options(margin=0))
    assert {kind: note["count"] for kind, note in summary["oddities"].items()} == {
        "boxes of no area, left out": 2,
        "boxes outside their image, left out": 1,
        "boxes that reach beyond their image, cut off": 1,
        "boxes that stand twice, left out": 1,
    }
    assert (tmp_path / "out" / "smears.txt").read_text() == "cells/a.png_000.png\ncells/a.png_004.png\n"
    original = np.asarray(Image.open(tmp_path / "in" / "a.png"))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/cells/a.png_000.png")), original[10:20, 10:20])
    assert len(HemaStandardDataset(root=str(tmp_path / "out"))) == 2
    text = describe(summary, tmp_path / "out")
    assert "2 boxes of no area, left out: a.png: white (30, 30, 30, 40)" in text
    assert "licence: not stated" in text


def test_a_killed_run_goes_on_and_a_second_run_gives_the_same_bytes(tmp_path):
    for seed in range(3):
        write_image(tmp_path / "in" / f"{seed}.png", seed)
    dataset = smears([(f"{seed}.png", "white", Box(5, 5, 25, 30)) for seed in range(3)])
    prepare(dataset, tmp_path / "in", tmp_path / "out")
    before = contents(tmp_path / "out")
    kept = tmp_path / "out" / "cells" / "0.png_000.png"
    written = kept.stat().st_mtime_ns
    for name in ("cells/1.png_000.png", "smears.txt", "labels.csv", "summary.json"):  # as if it had been killed early
        (tmp_path / "out" / name).unlink()
    prepare(dataset, tmp_path / "in", tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert kept.stat().st_mtime_ns == written


def test_a_run_that_was_killed_while_it_wrote_its_settings_goes_on(tmp_path):
    write_image(tmp_path / "in" / "a.png")
    (tmp_path / "out" / "cells").mkdir(parents=True)
    (tmp_path / "out" / "cells" / ".settings.json.0123abcd.tmp").touch()  # the first file that is written
    prepare(smears([("a.png", "white", Box(5, 5, 25, 25))]), tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "cells" / "a.png_000.png").is_file()


def test_cells_cut_in_another_way_are_not_mixed(tmp_path):
    write_image(tmp_path / "in" / "a.png")
    dataset = smears([("a.png", "white", Box(5, 5, 25, 25))])
    prepare(dataset, tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match="margin 0.1, now 0.5.*--overwrite"):
        prepare(dataset, tmp_path / "in", tmp_path / "out", Options(margin=0.5))
    prepare(dataset, tmp_path / "in", tmp_path / "out", Options(margin=0.5, overwrite=True))
    assert Image.open(tmp_path / "out" / "cells" / "a.png_000.png").size == (40, 40)
    (tmp_path / "mine" / "cells").mkdir(parents=True)
    (tmp_path / "mine" / "cells" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="in use by something else"):
        prepare(dataset, tmp_path / "in", tmp_path / "mine", Options(overwrite=True))


def test_numbers_of_cells_do_not_depend_on_which_classes_are_kept(tmp_path):
    write_image(tmp_path / "in" / "a.png")
    cells = [("a.png", "red", Box(0, 0, 10, 10)), ("a.png", "white", Box(20, 20, 40, 40))]
    prepare(smears(cells, keep=("white",)), tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "smears.txt").read_text() == "cells/a.png_001.png\n"
    summary = prepare(smears(cells, keep=("white",)), tmp_path / "in", tmp_path / "out", Options(keep=("all",)))
    assert summary["counts"]["classes"] == {"red": 1, "white": 1}
    with pytest.raises(ValueError, match="--keep: no class 'blue'; there are red, white"):
        prepare(smears(cells), tmp_path / "in", tmp_path / "other", Options(keep=("blue",)))


def test_whole_images_with_several_classes_have_no_label(tmp_path):
    for name in "ab":
        write_image(tmp_path / "in" / f"{name}.png", ord(name))
    cells = [
        ("a.png", "red", Box(0, 0, 9, 9)),
        ("a.png", "white", Box(9, 9, 20, 20)),
        ("b.png", "red", Box(0, 0, 9, 9)),
    ]
    summary = prepare(smears(cells), tmp_path / "in", tmp_path / "out", Options(whole=True))
    assert (summary["counts"]["listed"], summary["counts"]["labelled"]) == (2, 1)
    assert not (tmp_path / "out" / "cells").exists()
    assert LabelledCells.from_path(tmp_path / "out" / "labels.csv").paths == [tmp_path / "in" / "b.png"]


@pytest.mark.parametrize("check", [True, False])
def test_unreadable_images_are_left_out_and_counted(tmp_path, check):
    write_image(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "empty.png").touch()
    (tmp_path / "in" / "text.png").write_text("not an image")
    cells = [(name, "white", Box(0, 0, 9, 9)) for name in ("good.png", "empty.png", "text.png")]
    summary = prepare(smears(cells), tmp_path / "in", tmp_path / "out", Options(check=check))
    assert summary["counts"]["listed"] == 1
    assert summary["oddities"]["unreadable images and masks"]["count"] == 2


def test_a_truncated_image_leaves_no_half_cell(tmp_path):
    good = write_image(tmp_path / "in" / "good.png", size=(200, 200))
    (tmp_path / "in" / "cut.png").write_bytes(good.read_bytes()[:5000])
    cells = [(name, "white", Box(100, 150, 180, 190)) for name in ("cut.png", "good.png")]
    summary = prepare(smears(cells), tmp_path / "in", tmp_path / "out", Options(check=False))
    assert summary["oddities"]["unreadable images and masks"]["count"] == 1
    assert sorted(path.name for path in (tmp_path / "out" / "cells").iterdir()) == ["good.png_000.png", "settings.json"]


def test_labels_say_the_data_set_and_the_summary_the_options(tmp_path):
    write_image(tmp_path / "in" / "a.png")
    prepare(smears([("a.png", "white", None)], cuts=False), tmp_path / "in", tmp_path / "out")
    with open(tmp_path / "out" / "labels.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"Image Path": str(tmp_path / "in" / "a.png"), "Label": "white", "dataset": "smears"}
        ]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["origin"] == "https://example.org/smears"
    assert summary["options"]["check"] is True


def test_a_wrong_source_is_told_what_was_expected_and_where_to_get_it(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "archive.zip").touch()
    with pytest.raises(FileNotFoundError, match=r"expected BCCD/JPEG.*found archive.zip. Unpack.*Shenggan"):
        prepare(get_dataset("bccd"), tmp_path / "in", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        prepare(get_dataset("bccd"), tmp_path / "no", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="is a file; unpack it"):
        prepare(get_dataset("bccd"), tmp_path / "in" / "archive.zip", tmp_path / "out")


def test_a_layout_without_cells_says_what_was_there_instead(tmp_path):
    write_image(tmp_path / "in" / "a.png")
    with pytest.raises(ValueError, match="no cell in .* What was there instead: 1 images that the layout"):
        prepare(smears([]), tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match="--output: .* is inside the data set's own folder"):
        prepare(smears([("a.png", "white", None)]), tmp_path / "in", tmp_path / "in" / "out")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"margin": -0.1}, "--margin"), ({"size": 3}, "--size"), ({"n_workers": 0}, "--n-workers")],
)
def test_options_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Options(**wrong)


def test_a_cut_is_square_inside_the_image_and_scaled_with_repeated_borders():
    image = Image.fromarray(np.arange(30 * 60, dtype=np.uint8).reshape(30, 60)).convert("RGB")
    assert cut(image, Box(50, 20, 60, 30), margin=0.5).size == (20, 20)  # moved inside, not cut off
    np.testing.assert_array_equal(np.asarray(cut(image, Box(50, 20, 60, 30), 0.5)), np.asarray(image)[10:30, 40:60])
    assert cut(image, Box(0, 0, 50, 20), margin=0).size == (50, 30)
    scaled = np.asarray(cut(image, Box(0, 0, 50, 20), margin=0, size=50))
    assert scaled.shape == (50, 50, 3)
    np.testing.assert_array_equal(scaled[0], scaled[9])  # ten rows above repeat the first


def test_parts_of_a_mask_are_joined_by_their_distance():
    mask = np.zeros((40, 60), bool)
    mask[5:10, 5:10] = mask[5:10, 16:20] = mask[30:38, 40:50] = True
    assert components(mask) == [Box(5, 5, 10, 10), Box(16, 5, 20, 10), Box(40, 30, 50, 38)]
    assert components(mask, gap=8) == [Box(5, 5, 20, 10), Box(40, 30, 50, 38)]
    assert components(np.ones((7, 9), bool), gap=3) == [Box(0, 0, 9, 7)]


def test_all_sets_are_declared_and_a_misspelt_name_is_helped():
    assert set(all_datasets()) == {
        *("acevedo", "aml_hehr", "aml_matek", "apl_aml", "aslan", "bccd", "bmc", "krd_wbc", "lisc", "nuclick"),
        *("raabin_leukemia", "raabin_wbc", "ssl_seg", "warty_pig", "white_blood_cell_dataset"),  # DinoBloom's fifteen
        *("bloodmnist", "c_nmc", "ku_optofil", "mll23"),
    }
    with pytest.raises(ValueError, match="did you mean 'acevedo'"):
        get_dataset("Acevdo")


def test_the_overview_in_the_documents_is_made_from_the_modules():
    text = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    table = text.split("<!-- datasets: begin -->\n")[1].split("\n<!-- datasets: end -->")[0]
    assert table == overview_table(), "python scripts/prepare_dataset.py --table prints it"


def test_the_data_set_in_the_documents_works(tmp_path):
    """The module in the documents, taken as it stands there."""
    text = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(compile(code, "docs/datasets.md", "exec"), names)
    for path in ("slides/p01/blast/1.png", "slides/p02/lymphocyte/2.png", "slides/p02/unknown/3.png"):
        write_image(tmp_path / "in" / path, len(path))
    summary = prepare(names["marrow"], tmp_path / "in", tmp_path / "out")
    assert summary["counts"]["classes"] == {"blast": 1, "lymphocyte": 1}
    assert summary["counts"]["patients"] == 2


def test_the_command_prepares_and_answers_mistakes_in_one_line(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("prepare_dataset", ROOT / "scripts" / "prepare_dataset.py")
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    for name in ("basophil/BA_1.png", "eosinophil/EO_2.png"):
        write_image(tmp_path / "in" / name, len(name))
    where = ["--source", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert command.main(["acevedo", *where, "--size", "64"]) == 0
    said = capsys.readouterr()
    assert "2 images, 2 lines in the list, 2 labelled" in said.out
    assert "single cells: --margin, --size and --keep change nothing" in said.err
    for wrong, message in ((["acevdo"], "did you mean 'acevedo'"), (["acevedo", "--margin", "-1"], "--margin -1.0")):
        assert command.main([*wrong, *where]) == 2
        assert message in capsys.readouterr().err
    assert command.main(["--list"]) == 0
    assert "https://data.mendeley.com/datasets/snkd93bnjr/1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["acevedo"])
    assert "give NAME --source DIR --output DIR" in capsys.readouterr().err


def test_progress_is_shown(tmp_path, capsys):
    for seed in range(3):
        write_image(tmp_path / "in" / f"{seed}.png", seed)
    dataset = smears([(f"{seed}.png", "white", Box(5, 5, 25, 30)) for seed in range(3)])
    prepare(dataset, tmp_path / "in", tmp_path / "out")
    shown = capsys.readouterr().err
    assert "reading: 100%" in shown
    assert "cutting out: 100%" in shown


def test_names_of_any_bytes_pipes_and_damaged_settings(tmp_path, capfd):
    odd = "f\udcfcr.png"  # the byte fc, which is not UTF-8
    write_image(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "a.png").rename(tmp_path / "in" / odd)
    os.mkfifo(tmp_path / "in" / "pipe.png")
    dataset = smears([(name, "white", Box(10, 10, 20, 20)) for name in (odd, "pipe.png")])
    for check in (True, False):
        summary = prepare(dataset, tmp_path / "in", tmp_path / "out", Options(check=check))
        assert summary["counts"]["listed"] == 1
        assert "pipe.png" in summary["oddities"]["unreadable images and masks"]["examples"][0]
    assert not HemaStandardDataset(root=str(tmp_path / "out"), image_size=8)[0].failures
    assert len(LabelledCells.from_path(tmp_path / "out" / "labels.csv")) == 1
    settings = tmp_path / "out" / "cells" / "settings.json"
    for text in ("{", "[1]", "7", "[" * 100_000):
        settings.write_text(text)
        with pytest.raises(ValueError, match="settings.json' is damaged .*give --overwrite"):
            prepare(dataset, tmp_path / "in", tmp_path / "out")
    prepare(dataset, tmp_path / "in", tmp_path / "out", Options(overwrite=True))
    assert json.loads(settings.read_text())["margin"] == dataset.margin

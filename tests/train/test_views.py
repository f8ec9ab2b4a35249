"""What a run shows of its batches and cells: the sheets, which of them stay, and that the run is the same without."""

import errno

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.collate import assemble_batch
from dinov2.data.transforms import normalize_images
from dinov2.train import views
from dinov2.train.views import GAP, MASK_COLOUR, MASK_OPACITY, draw_sheets

EACH = "evaluation.eval_period_iterations=1"
RED, GREEN, BLUE, GREY = (200, 10, 10), (10, 200, 10), (10, 10, 200), (90, 90, 90)


def flat(colours, size: int) -> torch.Tensor:
    """Normalised crops [B, 3, S, S], each of one colour."""
    pixels = torch.tensor(colours, dtype=torch.uint8)[:, :, None, None]
    return normalize_images(pixels.expand(-1, -1, size, size).contiguous())


def batch(size=56, local_size=28, n_local=3):
    """Two images: red and green in their first crops, blue in the second, grey in local ones; one mask."""
    crops = {
        "global_crops": [flat([RED, GREEN], size), flat([BLUE, BLUE], size)],
        "local_crops": [flat([GREY, GREY], local_size)] * n_local,
    }
    masks = torch.zeros(4, (size // 14) ** 2, dtype=torch.bool)
    masks[1, 0] = True  # the first patch of the second image's first crop
    return assemble_batch(crops, masks, 1, torch.float32)


def shown(folder) -> dict[str, list[int]]:
    """Return the iterations of the sheets by kind."""
    files = sorted(file.stem.split("_") for file in (folder / "views").glob("*.png"))
    kinds = {kind for kind, _ in files}
    return {kind: sorted(int(n) for of, n in files if of == kind) for kind in sorted(kinds)}


# --- a sheet --------------------------------------------------------------------------------------------------------


def test_each_row_is_an_image_in_its_own_colours_and_masks_lie_over_their_patches():
    sheets = draw_sheets(batch(), 8)
    tile = 84  # small crops are made larger, and patches are whole pixels
    crops, masks = sheets["crops"], sheets["masks"]
    step = tile + GAP
    assert crops.shape == (2 * step, 5 * step, 3)
    assert masks.shape == (2 * step, 2 * step, 3)

    def tile_of(sheet, row, column):
        top, left = row * step, column * step
        return sheet[top : top + tile, left : left + tile]

    for row, first in enumerate((RED, GREEN)):
        for column, colour in enumerate((first, BLUE, GREY, GREY, GREY)):
            assert (tile_of(crops, row, column) == colour).all()
    assert (crops[tile:step] == 255).all()

    patch = tile // 4
    covered = [round((1 - MASK_OPACITY) * a + MASK_OPACITY * b) for a, b in zip(GREEN, MASK_COLOUR, strict=True)]
    masked = tile_of(masks, 1, 0)
    assert (np.abs(masked[:patch, :patch] - np.array(covered)) <= 1).all()
    assert (masked[:patch, patch:] == GREEN).all()
    assert (masked[patch:] == GREEN).all()
    assert (tile_of(masks, 0, 0) == RED).all()


def test_a_large_crop_is_made_smaller_and_a_sheet_stays_below_three_megabytes():
    sheet = draw_sheets(batch(size=224, local_size=98, n_local=10), 1)["crops"]
    assert sheet.shape == (160 + GAP, 10 * (160 + GAP), 3)  # of the local crops eight
    n_many = 60
    crops = {"global_crops": [torch.rand(n_many, 3, 224, 224)] * 2, "local_crops": [torch.rand(n_many, 3, 98, 98)] * 8}
    many = assemble_batch(crops, torch.ones(2 * n_many, 256, dtype=torch.bool), 256, torch.float32)
    for sheet in draw_sheets(many, 64).values():
        assert sheet.size <= 3_000_000


def test_without_masks_there_is_no_sheet_of_them_and_broken_numbers_are_drawn():
    broken = batch(n_local=0)
    broken["collated_masks"][:] = False
    broken["collated_global_crops"][0, 0, 0, 0] = float("nan")
    before = {name: value.clone() for name, value in broken.items() if isinstance(value, torch.Tensor)}
    sheets = draw_sheets(broken, 1)
    assert list(sheets) == ["crops"]
    assert tuple(sheets["crops"][0, 0]) == (255, RED[1], RED[2])
    assert all(torch.equal(broken[name], value) for name, value in before.items() if name != "collated_global_crops")


# --- of a run -------------------------------------------------------------------------------------------------------


def test_a_run_shows_its_first_batch_and_those_before_evaluations_and_keeps_the_newest(run, monkeypatch):
    monkeypatch.setattr(views, "N_KEPT", 2)
    code, folder = run(EACH, "ibot.mask_sample_probability=1.0", "train.views=3")
    assert code == 0
    assert shown(folder) == {"crops": [0, 3, 4], "masks": [0, 3, 4]}
    for n in (0, 3, 4):
        with Image.open(folder / "views" / f"crops_{n}.png") as crops:
            assert crops.height == 3 * (84 + GAP)


def test_no_views_where_none_are_asked_for(run):
    code, folder = run(EACH, "train.views=0")
    assert code == 0
    assert not (folder / "views").exists()


def test_a_run_that_goes_on_shows_what_comes_and_drops_what_was_lost(run):
    _, folder = run("evaluation.eval_period_iterations=2")
    lost = folder / "views" / "crops_12.png"
    lost.write_bytes((folder / "views" / "crops_4.png").read_bytes())
    (folder / "views" / ".crops_12.png.abc.tmp").write_bytes(b"torn")
    code, _ = run("evaluation.eval_period_iterations=2", "optim.epochs=4")
    assert code == 0
    assert shown(folder)["crops"] == [0, 2, 4, 6, 8]
    assert not list((folder / "views").glob(".*"))


def test_no_number_of_the_run_changes(run, rows):
    _, without = run("train.views=0", "student.drop_path_rate=0.5", EACH, name="without")
    _, shown_too = run("student.drop_path_rate=0.5", EACH, name="with")
    assert rows(shown_too) == rows(without)


def test_a_full_disk_costs_the_sheets_and_not_the_run(run, monkeypatch, caplog, rows):
    def full(path, mode="wb"):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(views, "atomic_write", full)
    monkeypatch.setattr("dinov2.train.train.setup_logging", lambda *_, **__: None)  # caplog reads along
    code, folder = run(EACH)
    assert code == 0
    assert len(rows(folder)) == 4
    assert "crops and masks after iteration 0 are not in" in caplog.text
    assert "No space left on device" in caplog.text


# --- in TensorBoard -------------------------------------------------------------------------------------------------


def test_tensorboard_gets_the_sheets(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code, folder = run("train.tensorboard=true", "train.views=2")
    assert code == 0

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"views/crops", "views/masks"}
    assert [image.step for image in events.Images("views/crops")] == [0, 3]
    with Image.open(folder / "views" / "crops_4.png") as sheet:
        assert (events.Images("views/crops")[-1].width, events.Images("views/crops")[-1].height) == sheet.size

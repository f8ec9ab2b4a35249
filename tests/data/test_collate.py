"""The batch dict against upstream's: keys, order, shapes, and every number that follows from the masks."""

import random

import numpy as np
import pytest
import torch

from dinov2.data.collate import MicroBatch, assemble_batch, collate_data_and_cast, draw_masks
from dinov2.data.masking import MaskingGenerator

RATIOS, PROBABILITY = (0.1, 0.5), 0.5


@pytest.fixture
def mask_generator():
    return MaskingGenerator((16, 16), max_num_patches=128)


def crops_of_image(i: int, n_local: int) -> tuple[dict, tuple]:
    """Crops that tell which image and which view they are: value 10 * image + view."""
    return {
        "global_crops": [torch.full((3, 8, 8), 10.0 * i + view) for view in range(2)],
        "global_crops_teacher": [torch.full((3, 8, 8), 10.0 * i + view) for view in range(2)],
        "local_crops": [torch.full((3, 4, 4), 10.0 * i + view) for view in range(2, 2 + n_local)],
        "offsets": (),
    }, ()


@pytest.mark.parametrize(("style", "n_local"), [("dinobloom", 1), ("dinov2", 8)])
def test_structure_is_upstreams(golden_json, mask_generator, style, n_local):
    golden = golden_json[f"collate/{style}"]
    crops, target = (
        {"global_crops": [torch.zeros(3, 224, 224)] * 2, "local_crops": [torch.zeros(3, 98, 98)] * n_local},
        (),
    )
    random.seed(7)
    batch = collate_data_and_cast(
        [(crops, target)] * 8, RATIOS, PROBABILITY, torch.half, n_tokens=256, mask_generator=mask_generator
    )
    assert set(batch) == {key for key in golden if key not in ("per_crop_masked", "n_masked_patches_value")}
    assert batch["upperbound"] == golden["upperbound"] == 663
    for key in ("collated_global_crops", "collated_local_crops", "collated_masks", "n_masked_patches"):
        assert list(batch[key].shape) == golden[key]["shape"], key
    for key in ("collated_global_crops", "collated_masks", "mask_indices_list", "masks_weight", "n_masked_patches"):
        assert str(batch[key].dtype) == golden[key]["dtype"], key
    assert batch["collated_local_crops"].dtype == torch.half  # upstream casts these and drops the result
    n_masked = int(batch["n_masked_patches"])
    assert n_masked == batch["collated_masks"].sum() == len(batch["mask_indices_list"]) == len(batch["masks_weight"])
    assert n_masked <= 663
    assert abs(n_masked - golden["n_masked_patches_value"]) < 70
    assert (batch["collated_masks"].any(dim=1)).sum() == sum(n > 0 for n in golden["per_crop_masked"])


@pytest.mark.parametrize("style", ["dinobloom", "dinov2"])
def test_numbers_that_follow_from_upstreams_masks(golden_json, golden_arrays, style):
    golden = golden_json[f"collate/{style}"]
    masks = torch.from_numpy(golden_arrays[f"collate/{style}/masks_seed7"])
    crops = {"global_crops": [torch.zeros(8, 3, 2, 2)] * 2, "local_crops": []}
    batch = assemble_batch(crops, masks, golden["upperbound"], torch.float32)
    assert masks.sum(dim=1).tolist() == golden["per_crop_masked"]
    assert batch["mask_indices_list"].sum() == golden["mask_indices_list"]["sum"]
    assert batch["n_masked_patches"].tolist() == [golden["n_masked_patches_value"]]
    np.testing.assert_array_equal(batch["masks_weight"].numpy(), golden_arrays[f"collate/{style}/masks_weight"])
    assert torch.equal(batch["collated_masks"].flatten().nonzero().flatten(), batch["mask_indices_list"])


def test_views_come_one_after_the_other(mask_generator):
    samples = [crops_of_image(i, n_local=3) for i in range(4)]
    batch = collate_data_and_cast(samples, RATIOS, PROBABILITY, torch.float32, mask_generator=mask_generator)
    assert batch["collated_global_crops"][:, 0, 0, 0].tolist() == [0, 10, 20, 30, 1, 11, 21, 31]
    assert batch["collated_local_crops"][:, 0, 0, 0].tolist() == [2, 12, 22, 32, 3, 13, 23, 33, 4, 14, 24, 34]


def test_no_local_crops_leave_the_key_out(mask_generator):
    samples = [crops_of_image(i, n_local=0) for i in range(2)]
    batch = collate_data_and_cast(samples, RATIOS, PROBABILITY, torch.float32, mask_generator=mask_generator)
    assert "collated_local_crops" not in batch


@pytest.mark.parametrize(("ratios", "probability"), [(RATIOS, 0.0), ((0.0, 0.0), 0.5)])
def test_no_masks_give_empty_tensors(mask_generator, ratios, probability):
    samples = [crops_of_image(i, n_local=0) for i in range(4)]
    batch = collate_data_and_cast(samples, ratios, probability, torch.float32, mask_generator=mask_generator)
    assert batch["mask_indices_list"].shape == batch["masks_weight"].shape == (0,)
    assert batch["mask_indices_list"].dtype == torch.int64
    assert batch["masks_weight"].dtype == torch.float32
    assert batch["n_masked_patches"].tolist() == [0]
    assert batch["upperbound"] == 0
    assert batch["collated_masks"].shape == (8, 256)


def test_the_range_of_ratios_is_covered_in_every_batch(mask_generator):
    edges = np.linspace(0.1, 0.5, 9)
    where = np.zeros(16)
    for seed in range(60):
        masks, upperbound = draw_masks(16, RATIOS, PROBABILITY, mask_generator, seed)
        counts = masks.sum(dim=1).numpy()
        where += counts > 0
        ordered = np.sort(counts[counts > 0])
        assert len(ordered) == 8
        assert upperbound == 663
        assert (ordered <= 256 * edges[1:]).all()
        assert (ordered >= 256 * edges[:-1] - 8).all()  # a mask may miss its target by a few patches
    assert (where > 15).all()  # every crop has its turn
    assert (where < 45).all()


def test_masks_are_a_function_of_the_seed(mask_generator):
    first, second = (draw_masks(16, RATIOS, PROBABILITY, mask_generator, 2)[0] for _ in range(2))
    assert torch.equal(first, second)
    other = draw_masks(16, RATIOS, PROBABILITY, mask_generator, 3)[0]
    assert not torch.equal(first, other)


def test_only_the_masks_that_are_asked_for_are_drawn(mask_generator, monkeypatch):
    """The work of a process depends on its own crops; their masks are those that the whole batch has."""
    whole, _ = draw_masks(64, RATIOS, PROBABILITY, mask_generator, 2)
    n_drawn = 0
    draw = MaskingGenerator.__call__

    def counted(*arguments):
        nonlocal n_drawn
        n_drawn += 1
        return draw(*arguments)

    monkeypatch.setattr(MaskingGenerator, "__call__", counted)
    crops = [5, 3, 40, 63]
    masks, upperbound = draw_masks(64, RATIOS, PROBABILITY, mask_generator, 2, crops)
    assert torch.equal(masks, whole[crops])
    assert n_drawn == whole[crops].any(dim=1).sum()
    assert upperbound == sum(int(256 * (0.1 + 0.4 * k / 32)) for k in (29, 30, 31, 32))


def test_a_micro_batch_has_the_masks_of_its_place_in_the_global_batch(mask_generator):
    samples = [crops_of_image(i, n_local=0) for i in range(8)]
    settings = (RATIOS, PROBABILITY, torch.float32, None, mask_generator)
    whole = collate_data_and_cast(samples, *settings, MicroBatch(range(8), 8, mask_seed=5))
    images = [1, 4, 7]
    some = collate_data_and_cast([samples[i] for i in images], *settings, MicroBatch(images, 8, mask_seed=5))
    rows = images + [8 + i for i in images]
    for key in ("collated_global_crops", "collated_masks"):
        assert torch.equal(some[key], whole[key][rows])


def test_weights_sum_to_one_per_masked_crop(mask_generator):
    masks, upperbound = draw_masks(16, RATIOS, PROBABILITY, mask_generator, 2)
    crops = {"global_crops": [torch.zeros(8, 3, 2, 2)] * 2, "local_crops": ()}
    batch = assemble_batch(crops, masks, upperbound, torch.float32)
    per_crop = torch.zeros(16).index_add(0, batch["mask_indices_list"] // 256, batch["masks_weight"])
    torch.testing.assert_close(per_crop, masks.any(dim=1).float())


def test_missing_or_contradicting_mask_settings(mask_generator):
    samples = [crops_of_image(0, n_local=0)]
    with pytest.raises(ValueError, match="mask_generator: None"):
        collate_data_and_cast(samples, RATIOS, PROBABILITY, torch.float32, n_tokens=256)
    with pytest.raises(ValueError, match="n_tokens: 49, but mask_generator draws 16 x 16"):
        collate_data_and_cast(samples, RATIOS, PROBABILITY, torch.float32, 49, mask_generator)

"""The batch dict against upstream's: keys, order, shapes, and every number that follows from the masks."""

import random

import numpy as np
import pytest
import torch

from dinov2.data.collate import assemble_batch, collate_data_and_cast, draw_masks
from dinov2.data.masking import MaskingGenerator

RATIOS, PROBABILITY = (0.1, 0.5), 0.5


@pytest.fixture
def mask_generator():
    return MaskingGenerator((16, 16), max_num_patches=128)


def picture(i: int, n_local: int) -> tuple[dict, tuple]:
    """Crops that tell which picture and which view they are: value 10 * picture + view."""
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
    samples = [picture(i, n_local=3) for i in range(4)]
    batch = collate_data_and_cast(samples, RATIOS, PROBABILITY, torch.float32, mask_generator=mask_generator)
    assert batch["collated_global_crops"][:, 0, 0, 0].tolist() == [0, 10, 20, 30, 1, 11, 21, 31]
    assert batch["collated_local_crops"][:, 0, 0, 0].tolist() == [2, 12, 22, 32, 3, 13, 23, 33, 4, 14, 24, 34]


def test_batched_and_single_crops_give_the_same_batch(mask_generator):
    samples = [picture(i, n_local=2) for i in range(4)]
    random.seed(3)
    single = collate_data_and_cast(samples, RATIOS, PROBABILITY, torch.bfloat16, mask_generator=mask_generator)
    stacked = {
        key: [torch.stack([crops[key][view] for crops, _ in samples]) for view in range(2)]
        for key in ("global_crops", "local_crops")
    }
    random.seed(3)
    masks, upperbound = draw_masks(8, RATIOS, PROBABILITY, mask_generator)
    batched = assemble_batch(stacked, masks, upperbound, torch.bfloat16)
    assert single.keys() == batched.keys()
    for key, value in single.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(batched[key])), key


def test_no_local_crops_leave_the_key_out(mask_generator):
    samples = [picture(i, n_local=0) for i in range(2)]
    batch = collate_data_and_cast(samples, RATIOS, PROBABILITY, torch.float32, mask_generator=mask_generator)
    assert "collated_local_crops" not in batch


@pytest.mark.parametrize(("ratios", "probability"), [(RATIOS, 0.0), ((0.0, 0.0), 0.5)])
def test_no_masks_give_empty_tensors(mask_generator, ratios, probability):
    samples = [picture(i, n_local=0) for i in range(4)]
    batch = collate_data_and_cast(samples, ratios, probability, torch.float32, mask_generator=mask_generator)
    assert batch["mask_indices_list"].shape == batch["masks_weight"].shape == (0,)
    assert batch["mask_indices_list"].dtype == torch.int64
    assert batch["masks_weight"].dtype == torch.float32
    assert batch["n_masked_patches"].tolist() == [0]
    assert batch["upperbound"] == 0
    assert batch["collated_masks"].shape == (8, 256)


def test_the_range_of_ratios_is_covered_in_every_batch(mask_generator):
    rng = np.random.default_rng(0)
    edges = np.linspace(0.1, 0.5, 9)
    where = np.zeros(16)
    for _ in range(60):
        masks, upperbound = draw_masks(16, RATIOS, PROBABILITY, mask_generator, rng)
        counts = masks.sum(dim=1).numpy()
        where += counts > 0
        ordered = np.sort(counts[counts > 0])
        assert len(ordered) == 8
        assert upperbound == 663
        assert (ordered <= 256 * edges[1:]).all()
        assert (ordered >= 256 * edges[:-1] - 8).all()  # a mask may miss its target by a few patches
    assert (where > 15).all()  # every crop has its turn
    assert (where < 45).all()


def test_masks_are_a_function_of_the_generator(mask_generator):
    first, second = (draw_masks(16, RATIOS, PROBABILITY, mask_generator, np.random.default_rng(2))[0] for _ in range(2))
    assert torch.equal(first, second)
    other = draw_masks(16, RATIOS, PROBABILITY, mask_generator, np.random.default_rng(3))[0]
    assert not torch.equal(first, other)


def test_weights_sum_to_one_per_masked_crop(mask_generator):
    masks, upperbound = draw_masks(16, RATIOS, PROBABILITY, mask_generator, np.random.default_rng(2))
    crops = {"global_crops": [torch.zeros(8, 3, 2, 2)] * 2, "local_crops": ()}
    batch = assemble_batch(crops, masks, upperbound, torch.float32)
    per_crop = torch.zeros(16).index_add(0, batch["mask_indices_list"] // 256, batch["masks_weight"])
    torch.testing.assert_close(per_crop, masks.any(dim=1).float())


def test_missing_or_contradicting_mask_settings(mask_generator):
    samples = [picture(0, n_local=0)]
    with pytest.raises(ValueError, match="mask_generator: None"):
        collate_data_and_cast(samples, RATIOS, PROBABILITY, torch.float32, n_tokens=256)
    with pytest.raises(ValueError, match="n_tokens: 49, but mask_generator draws 16 x 16"):
        collate_data_and_cast(samples, RATIOS, PROBABILITY, torch.float32, 49, mask_generator)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_assembling_on_a_gpu_does_not_wait_for_it(mask_generator):
    masks, upperbound = draw_masks(256, RATIOS, PROBABILITY, mask_generator, np.random.default_rng(2))
    crops = {"global_crops": [torch.zeros(128, 3, 8, 8, device="cuda")] * 2, "local_crops": []}
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = assemble_batch(crops, masks, upperbound, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {value.device.type for value in batch.values() if isinstance(value, torch.Tensor)} == {"cuda"}
    assert torch.equal(batch["collated_masks"].cpu(), masks)

"""Block-wise masks: their statistics against upstream's, and their shape."""

import random

import numpy as np
import pytest

from dinov2.data.masking import MaskingGenerator

N_MASKS = 6000
N_GOLDEN = 2000


@pytest.mark.parametrize("target", [0, 1, 3, 4, 10, 25, 40, 64, 100, 128])
def test_statistics_are_upstreams(golden_json, target):
    golden = golden_json["masking"][f"target={target}"]
    generate, rng = MaskingGenerator((16, 16), max_num_patches=128), np.random.default_rng(target)
    counts = np.array([generate(target, rng).sum() for _ in range(N_MASKS)])

    per_mask = 1 / N_MASKS + 1 / N_GOLDEN
    assert counts.mean() == pytest.approx(golden["mean"], abs=4 * golden["std"] * per_mask**0.5)
    p = golden["frac_exact"]
    assert (counts == target).mean() == pytest.approx(p, abs=4 * (p * (1 - p) * per_mask) ** 0.5)
    assert counts.std() == pytest.approx(golden["std"], rel=0.25)
    assert counts.max() == golden["max"] == target
    assert counts.min() >= golden["min"] - 4


def test_the_golden_generator_settings(golden_json):
    generate = MaskingGenerator((16, 16), max_num_patches=0.5 * 224 // 14 * 224 // 14)
    assert generate.max_num_patches == golden_json["masking"]["repr_max_num_patches"]
    assert list(generate.log_aspect_ratio) == pytest.approx(golden_json["masking"]["log_aspect_ratio"])


def test_masks_are_blocks(golden_arrays):
    """As many of a masked patch's neighbours are masked as in upstream's; scattered patches would have far fewer."""

    def neighbours(masks):
        pairs = (masks[:, 1:] & masks[:, :-1]).sum() + (masks[:, :, 1:] & masks[:, :, :-1]).sum()
        return pairs / masks.sum()

    generate, rng = MaskingGenerator(16, max_num_patches=128), np.random.default_rng(0)
    ours = np.stack([generate(50, rng) for _ in range(400)])
    scattered = rng.permuted(ours.reshape(400, 256), axis=1).reshape(400, 16, 16)
    assert neighbours(ours) == pytest.approx(neighbours(golden_arrays["masking/seed123_target50_first4"]), abs=0.25)
    assert neighbours(ours) > 3 * neighbours(scattered)


def test_a_single_block_is_a_rectangle_of_allowed_shape():
    generate, rng = MaskingGenerator((12, 20), min_num_patches=20, max_num_patches=40), np.random.default_rng(0)
    n_single = 0
    for _ in range(300):
        mask = generate(40, rng)
        assert mask.shape == generate.get_shape() == (12, 20)
        rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        if mask.sum() == height * width:
            n_single += 1
            assert height < 12
            assert width < 20
            # sides are rounded, which widens the range of aspects
            assert (height - 0.5) / (width + 0.5) < 1 / 0.3
            assert (height + 0.5) / (width - 0.5) > 0.3
    assert n_single > 3


def test_every_patch_is_masked_now_and_then():
    generate, rng = MaskingGenerator((5, 9)), np.random.default_rng(0)
    shares = np.mean([generate(15, rng) for _ in range(2000)], axis=0)
    assert shares.min() > 0.1
    np.testing.assert_allclose(shares, shares[::-1, ::-1], atol=0.08)


def test_reproducible_by_generator_and_by_pythons_seed():
    generate = MaskingGenerator((16, 16))
    first, second = (generate(60, np.random.default_rng(4)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    by_python = []
    for seed in (5, 5, 6):
        random.seed(seed)
        by_python.append(generate(60))
    np.testing.assert_array_equal(by_python[0], by_python[1])
    assert (by_python[0] != by_python[2]).any()


def test_more_than_there_is_ends():
    generate, rng = MaskingGenerator((4, 4)), np.random.default_rng(0)
    assert generate(999, rng).sum() <= 16
    assert generate(0, rng).dtype == bool
    assert not MaskingGenerator((1, 1))(1, rng).any()  # no block is smaller than the crop


def test_limits_default_as_upstream():
    assert MaskingGenerator((16, 16), num_masking_patches=75).max_num_patches == 75
    assert MaskingGenerator((16, 16)).max_num_patches == 256

import pytest
import torch

from dinov2.layers import DropPath
from dinov2.layers.drop_path import choose_samples, n_kept_samples


def test_drop_path_zeroes_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    out = DropPath(0.25)(torch.ones(4000, 2, 3))
    per_sample = out.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert abs(out.mean().item() - 1) < 0.03


def test_drop_path_is_for_training_only_and_may_drop_all():
    x = torch.randn(5, 2)
    assert DropPath(0.9).eval()(x) is x
    assert DropPath(0.0)(x) is x
    assert not DropPath(1.0)(x).any()


@pytest.mark.parametrize(("n", "rate", "kept"), [(4, 0.5, 2), (7, 0.5, 3), (32, 0.4, 19), (3, 0.9, 1), (1, 0.3, 1)])
def test_kept_samples_are_rounded_down_and_never_none(n, rate, kept):
    assert n_kept_samples(n, rate) == kept


def test_chosen_samples_are_distinct_and_every_sample_gets_its_turn():
    torch.manual_seed(0)
    draws = torch.stack([choose_samples(6, 0.5, torch.device("cpu")) for _ in range(600)])
    assert all(len(set(row)) == 3 for row in draws.tolist())
    counts = draws.flatten().bincount(minlength=6)
    assert (counts - 300).abs().max() < 60  # five standard deviations


def test_a_batch_with_no_sample_to_spare_is_computed_whole():
    assert choose_samples(1, 0.3, torch.device("cpu")) is None

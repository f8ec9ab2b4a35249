"""Regression of a frozen network's tokens: the distance in numpy, and the maps."""

import numpy as np
import torch

from dinov2.loss import DistillationHead, token_distance


def test_it_is_the_mean_square_to_tokens_of_mean_zero_and_variance_one():
    rng = np.random.default_rng(0)
    predicted, tokens = rng.standard_normal((3, 5, 8)), 7 + 4 * rng.standard_normal((3, 5, 8))
    standard = (tokens - tokens.mean(axis=-1, keepdims=True)) / tokens.std(axis=-1, keepdims=True)
    found = token_distance(torch.from_numpy(predicted), torch.from_numpy(tokens))
    np.testing.assert_allclose(found.item(), ((predicted - standard) ** 2).mean(), rtol=1e-4)
    np.testing.assert_allclose(token_distance(torch.zeros(3, 5, 8), torch.from_numpy(tokens)).item(), 1, rtol=1e-4)


def test_each_kind_of_token_has_a_map_to_the_teachers_width():
    head = DistillationHead(embed_dim=6, teacher_dim=10)
    cls_tokens, patch_tokens = head(torch.ones(2, 6), torch.ones(2, 4, 6))
    assert cls_tokens.shape == (2, 10)
    assert patch_tokens.shape == (2, 4, 10)
    assert not torch.equal(cls_tokens, patch_tokens[:, 0])

"""Attention pooling: its formula, and that order and padding change nothing."""

import pytest
import torch

from dinov2.layers.gated_attention_pool import ClassWiseAttentionPool, GatedAttentionPool

POOLS = {"gated": lambda: GatedAttentionPool(8), "classwise": lambda: ClassWiseAttentionPool(8, 3)}


@pytest.fixture(params=POOLS)
def pool(request):
    torch.manual_seed(0)
    return POOLS[request.param]()


def test_padding_and_order_do_not_change_a_bag(pool):
    cells = torch.randn(1, 5, 8)
    padded = torch.cat([cells.flip(1), torch.zeros(1, 3, 8)], dim=1)  # [1, 8, 8]
    alone, of_alone = pool(cells, torch.ones(1, 5, dtype=torch.bool))
    among, attention = pool(padded, torch.arange(8)[None] < 5)
    torch.testing.assert_close(among, alone)
    torch.testing.assert_close(attention[..., :5].flip(-1), of_alone)
    assert attention[..., 5:].abs().sum() == 0


def test_attention_sums_to_one_over_the_cells_of_each_bag(pool):
    """Also in a bag of one cell, which a softmax along the wrong axis or a stray squeeze gets wrong."""
    is_cell = torch.arange(6)[None] < torch.tensor([[6], [3], [1]])
    _, attention = pool(torch.randn(3, 6, 8) * is_cell[..., None] * 5, is_cell)
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:-1]))
    assert (attention[2, ..., 0] == 1).all()


def test_a_bag_without_cells_is_named(pool):
    is_cell = torch.tensor([[True, False], [False, False]])
    with pytest.raises(ValueError, match=r"bags \[1\] of this batch have no cells"):
        pool(torch.randn(2, 2, 8), is_cell)


def test_the_formula_of_gated_attention():
    pool, cells = GatedAttentionPool(4, hidden_dim=3), torch.randn(1, 6, 4)
    (v, b), (u, c), (w, d) = ((layer.weight, layer.bias) for layer in (pool.tanh_proj, pool.gate_proj, pool.score))
    scores = torch.stack([w[0] @ (torch.tanh(v @ h + b) * torch.sigmoid(u @ h + c)) + d[0] for h in cells[0]])
    weights = scores.exp() / scores.exp().sum()
    pooled, attention = pool(cells, torch.ones(1, 6, dtype=torch.bool))
    torch.testing.assert_close(attention[0], weights)
    torch.testing.assert_close(pooled[0], sum(a * h for a, h in zip(weights, cells[0], strict=True)))


def test_the_formula_of_class_wise_attention():
    pool, cells = ClassWiseAttentionPool(4, n_classes=2, hidden_dim=3), torch.randn(1, 6, 4)
    v, b = pool.tanh_proj.weight, pool.tanh_proj.bias
    pooled, attention = pool(cells, torch.ones(1, 6, dtype=torch.bool))
    for label, (w, d) in enumerate(zip(pool.score.weight, pool.score.bias, strict=True)):
        scores = torch.stack([w @ torch.tanh(v @ h + b) + d for h in cells[0]])
        weights = scores.exp() / scores.exp().sum()
        torch.testing.assert_close(attention[0, label], weights)
        torch.testing.assert_close(pooled[0, label], sum(a * h for a, h in zip(weights, cells[0], strict=True)))

"""Aggregators: shapes, what order and padding may not change, and that each can be told by name and built again."""

import sys

import pytest
import torch

from dinov2.models import abmil
from dinov2.models.abmil import MODELS, OWN_MODELS, TORCHMIL_MODELS, build_aggregator

DIM, N_CLASSES = 12, 3
COLUMNS = {"classwise": N_CLASSES, "clam": N_CLASSES, "dsmil": N_CLASSES}


@pytest.fixture(params=MODELS)
def model(request, monkeypatch):
    if request.param in TORCHMIL_MODELS:
        pytest.importorskip("torchmil")
    monkeypatch.setattr(abmil, "TRANSMIL_DIM", 16)
    return request.param


@pytest.fixture
def aggregator(model):
    torch.manual_seed(0)
    return build_aggregator(model, DIM, N_CLASSES).eval()


def mask(*lengths: int) -> torch.Tensor:
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


@torch.no_grad()
def test_shapes_and_attention_that_sums_to_one(model, aggregator):
    is_cell = mask(7, 4, 1)
    logits, attention = aggregator(torch.randn(3, 7, DIM) * is_cell[..., None], is_cell)
    assert logits.shape == (3, N_CLASSES)
    assert attention.shape == (3, COLUMNS.get(model, 1), 7)
    assert (attention >= 0).all()
    assert attention.masked_select(~is_cell[:, None]).abs().sum() == 0
    torch.testing.assert_close(attention.sum(dim=2), torch.ones(attention.shape[:2]))


@torch.no_grad()
def test_padding_does_not_change_a_bag(aggregator):
    cells = torch.randn(1, 5, DIM)
    alone, of_alone = aggregator(cells, mask(5))
    padded, is_cell = torch.zeros(2, 9, DIM), mask(5, 9)
    padded[0, :5], padded[1] = cells[0], torch.randn(9, DIM)
    logits, attention = aggregator(padded, is_cell)
    torch.testing.assert_close(logits[:1], alone)
    torch.testing.assert_close(attention[:1, :, :5], of_alone)


@torch.no_grad()
def test_the_order_of_the_cells_does_not_change_a_bag(model, aggregator):
    if model == "transmil":
        pytest.skip("TransMIL places the cells on a square in their order")
    cells, order = torch.randn(1, 9, DIM), torch.randperm(9)
    logits, attention = aggregator(cells, mask(9))
    of_permuted, columns = aggregator(cells[:, order], mask(9))
    torch.testing.assert_close(of_permuted, logits)
    torch.testing.assert_close(columns, attention[:, :, order])


def test_a_bag_without_cells_is_refused(aggregator):
    with pytest.raises(ValueError, match="have no cells"):
        aggregator(torch.zeros(2, 3, DIM), torch.tensor([[True] * 3, [False] * 3]))


def test_every_parameter_learns(model, aggregator):
    is_cell, labels = mask(6, 4), torch.tensor([0, 2])
    cells = torch.randn(2, 6, DIM) * is_cell[..., None]
    logits, _ = aggregator(cells, is_cell)
    extra = aggregator.auxiliary_loss(cells, is_cell, labels)
    assert extra.shape == ()
    assert (extra > 0) == (model in ("clam", "dsmil"))
    (torch.nn.functional.cross_entropy(logits, labels) + extra).backward()
    still = [name for name, p in aggregator.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not [name for name in still if "norm2" not in name]  # torchmil's, without its optional MLP


def test_it_can_be_built_again_from_its_architecture(model, aggregator):
    assert aggregator.architecture == {"model": model, "dim": DIM, "n_classes": N_CLASSES}
    again = build_aggregator(**aggregator.architecture)
    again.load_state_dict(aggregator.state_dict())
    cells = torch.randn(1, 4, DIM)
    torch.testing.assert_close(again.eval()(cells, mask(4)), aggregator(cells, mask(4)))


def test_class_wise_attention_is_dinoblooms():
    """Linear(D, 128) - tanh - Linear(128, C) for the attention, Linear(D, 64) - ReLU - Linear(64, 1) for each class."""
    shapes = {name: tuple(p.shape) for name, p in build_aggregator("classwise", 384, 5).named_parameters()}
    assert shapes["pool.tanh_proj.weight"] == (128, 384)
    assert shapes["pool.score.weight"] == (5, 128)
    assert [shapes[f"heads.{i}.0.weight"] for i in range(5)] == [(64, 384)] * 5
    assert [shapes[f"heads.{i}.2.weight"] for i in range(5)] == [(1, 64)] * 5
    assert len(shapes) == 4 + 5 * 4


@torch.no_grad()
def test_baselines_are_the_mean_and_the_maximum():
    cells, is_cell = torch.randn(1, 6, DIM), mask(4, 6)[:1]
    for model, pooled in (("mean", cells[:, :4].mean(dim=1)), ("max", cells[:, :4].amax(dim=1))):
        aggregator = build_aggregator(model, DIM, N_CLASSES)
        torch.testing.assert_close(aggregator(cells, is_cell)[0], aggregator.head(pooled))
    winners = cells[0, :4].argmax(dim=0).bincount(minlength=6) / DIM
    torch.testing.assert_close(aggregator(cells, is_cell)[1][0, 0], winners)


@torch.no_grad()
def test_the_smooth_svm_loss_is_a_mean_over_cells():
    """A sum that mixes cells would change when a cell is added twice."""
    logits, targets = torch.tensor([[0.5, -1.0], [2.0, 0.1]]), torch.tensor([[1], [0]])
    loss = abmil._SmoothTopOneSVM()
    expected = [torch.tensor([1.5, -1.0]).logsumexp(0) + 1.0, torch.tensor([2.0, 1.1]).logsumexp(0) - 2.0]
    torch.testing.assert_close(loss(logits, targets), torch.stack(expected).mean())
    torch.testing.assert_close(loss(logits.repeat(3, 1), targets.repeat(3, 1)), loss(logits, targets))


def test_wrong_names_and_sizes():
    with pytest.raises(ValueError, match="'abmil' is unknown; choose one of classwise, gated, mean, max, transmil"):
        build_aggregator("abmil", DIM, N_CLASSES)
    with pytest.raises(ValueError, match="1 classes and 12 features; give at least two classes"):
        build_aggregator("gated", DIM, 1)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmil", None)
    with pytest.raises(ValueError, match=r"pip install torchmil.*or choose one of " + ", ".join(OWN_MODELS)):
        build_aggregator("transmil", DIM, N_CLASSES)

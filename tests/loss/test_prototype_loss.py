"""The fused prototype layer and cross-entropy against logits that are written out."""

import pytest
import torch
import torch.nn.functional as F

from dinov2.loss import Targets, prototype_cross_entropy, prototype_loss
from dinov2.loss.teacher_targets import balance_, sinkhorn_knopp

N_ROWS, N_PROTOTYPES, DIM, TEMP = 23, 37, 8, 0.1


@pytest.fixture(params=[None, 5 * N_PROTOTYPES, 1], ids=["one chunk", "five rows at a time", "row by row"])
def cut(request, monkeypatch):
    """However the rows are cut into chunks."""
    if request.param:
        monkeypatch.setattr(prototype_loss, "CHUNK_ELEMENTS", request.param)
        monkeypatch.setattr(prototype_loss, "CACHED_ELEMENTS", max(1, request.param // 2))


@pytest.fixture
def problem():
    """Embedding, prototypes, targets of three segments (one of them implicit, one empty), and weights."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    implicit = Targets(draw(9, N_PROTOTYPES).exp(), draw(9).exp(), draw(N_PROTOTYPES).exp())
    targets = [Targets(draw(14, N_PROTOTYPES).softmax(dim=1)), implicit, Targets(torch.empty(0, N_PROTOTYPES))]
    embedding = F.normalize(draw(N_ROWS, DIM), dim=1).requires_grad_()
    return embedding, draw(N_PROTOTYPES, DIM).requires_grad_(), targets, draw(N_ROWS).abs()


def written_out(embedding, prototypes, targets, weights):
    log_probabilities = F.log_softmax(embedding @ prototypes.T / TEMP, dim=1)
    losses = -(torch.cat([target.dense() for target in targets]) * log_probabilities).sum(dim=1)
    return (losses * weights).sum(), losses


def test_loss_and_gradients_are_those_of_logits_written_out(problem, cut):
    embedding, prototypes, _, _ = problem
    total, losses = prototype_cross_entropy(*problem, TEMP)
    expected, expected_losses = written_out(*problem)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(losses, expected_losses.detach())
    found = torch.autograd.grad(3 * total, [embedding, prototypes])
    for ours, theirs in zip(found, torch.autograd.grad(3 * expected, [embedding, prototypes]), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_and_small_gradients_survive(problem, dtype):
    embedding, prototypes, targets, weights = problem
    weights = weights * 1e-7  # times a probability: below what float16 can hold
    total, _ = prototype_cross_entropy(embedding.to(dtype), prototypes, targets, weights, TEMP)
    expected, _ = written_out(embedding, prototypes, targets, weights)
    torch.testing.assert_close(total, expected, rtol=1e-2, atol=0)
    gradients = torch.autograd.grad(1e6 * total, [embedding, prototypes])
    for ours, theirs in zip(gradients, torch.autograd.grad(1e6 * expected, [embedding, prototypes]), strict=True):
        assert ours.dtype == torch.float32
        assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.999


def test_only_what_learns_gets_a_gradient(problem):
    embedding, prototypes, targets, weights = problem
    total, _ = prototype_cross_entropy(embedding, prototypes.detach(), targets, weights, TEMP)
    expected, _ = written_out(*problem)
    torch.testing.assert_close(
        torch.autograd.grad(total, embedding), torch.autograd.grad(expected, embedding), atol=1e-4, rtol=1e-4
    )
    with torch.no_grad():
        assert not prototype_cross_entropy(*problem, TEMP)[0].requires_grad


def test_no_rows_give_no_loss_and_zero_gradients():
    embedding, prototypes = torch.empty(0, DIM, requires_grad=True), torch.randn(5, DIM, requires_grad=True)
    total, losses = prototype_cross_entropy(embedding, prototypes, [Targets(torch.empty(0, 5))], torch.empty(0), TEMP)
    assert (total.item(), losses.shape) == (0.0, (0,))
    of_embedding, of_prototypes = torch.autograd.grad(total, [embedding, prototypes])
    assert of_embedding.shape == (0, DIM)
    assert not of_prototypes.any()


def test_student_logits_are_never_kept(problem, monkeypatch):
    """No tensor that waits for backward is as large as the logits."""
    embedding, prototypes, targets, weights = problem
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (sizes.append(tensor.numel()), tensor)[1], lambda t: t
    ):
        prototype_cross_entropy(embedding, prototypes, targets, weights, TEMP)
    assert sizes
    assert max(sizes) < N_ROWS * N_PROTOTYPES


def test_balanced_targets_are_sinkhorns_whatever_the_cutting(cut):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N_ROWS, N_PROTOTYPES, generator=generator)
    expected = (logits.double() / 0.05).exp()
    for _ in range(3):
        expected = expected / expected.sum(dim=0, keepdim=True) / N_PROTOTYPES
        expected = expected / expected.sum(dim=1, keepdim=True) / N_ROWS
    before = logits.clone()
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.05, N_ROWS).double(), expected * N_ROWS, atol=1e-6, rtol=1e-4)
    assert torch.equal(logits, before)
    targets = balance_(logits, 0.05, N_ROWS)
    assert targets.mass.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(targets.choices(), expected.argmax(dim=1))
    torch.testing.assert_close(targets[3:7].dense().double(), expected[3:7] * N_ROWS, atol=1e-6, rtol=1e-4)


def test_balanced_targets_of_bfloat16_logits_are_near():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N_ROWS, N_PROTOTYPES, generator=generator).bfloat16()
    expected = sinkhorn_knopp(logits, 0.1, N_ROWS)
    torch.testing.assert_close(balance_(logits, 0.1, N_ROWS).dense(), expected, atol=1e-3, rtol=2e-2)

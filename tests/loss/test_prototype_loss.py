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
    """Embedding, prototypes' directions and lengths, targets of three segments (one implicit, one empty), weights."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    implicit = Targets(draw(9, N_PROTOTYPES).exp(), draw(9).exp(), draw(N_PROTOTYPES).exp())
    targets = [Targets(draw(14, N_PROTOTYPES).softmax(dim=1)), implicit, Targets(torch.empty(0, N_PROTOTYPES))]
    embedding = F.normalize(draw(N_ROWS, DIM), dim=1).requires_grad_()
    directions, lengths = draw(N_PROTOTYPES, DIM).requires_grad_(), draw(N_PROTOTYPES, 1).exp().requires_grad_()
    return embedding, directions, lengths, targets, draw(N_ROWS).abs()


def written_out(embedding, directions, lengths, targets, weights):
    prototypes = lengths * F.normalize(directions, dim=1)
    log_probabilities = F.log_softmax(embedding @ prototypes.T / TEMP, dim=1)
    losses = -(torch.cat([target.dense() for target in targets]) * log_probabilities).sum(dim=1)
    return (losses * weights).sum(), losses


def test_loss_and_gradients_are_those_of_logits_written_out(problem, cut):
    learning = problem[:3]
    total, losses = prototype_cross_entropy(*problem, TEMP)
    expected, expected_losses = written_out(*problem)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(losses, expected_losses.detach())
    found = torch.autograd.grad(3 * total, learning)
    for ours, theirs in zip(found, torch.autograd.grad(3 * expected, learning), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_and_small_gradients_survive(problem, dtype):
    *learning, targets, weights = problem
    weights = weights * 1e-7  # times a probability: below what float16 can hold
    total, _ = prototype_cross_entropy(learning[0].to(dtype), *learning[1:], targets, weights, TEMP)
    expected, _ = written_out(*learning, targets, weights)
    torch.testing.assert_close(total, expected, rtol=1e-2, atol=0)
    gradients = torch.autograd.grad(1e6 * total, learning)
    for ours, theirs in zip(gradients, torch.autograd.grad(1e6 * expected, learning), strict=True):
        assert ours.dtype == torch.float32
        assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.999


def test_only_what_learns_gets_a_gradient(problem):
    embedding, directions, lengths, targets, weights = problem
    expected, _ = written_out(*problem)
    fixed = directions.detach(), lengths.detach()
    for prototypes, learning in ((fixed, [embedding]), ((directions, fixed[1]), [embedding, directions])):
        total, _ = prototype_cross_entropy(embedding, *prototypes, targets, weights, TEMP)
        found = torch.autograd.grad(total, learning)
        for ours, theirs in zip(found, torch.autograd.grad(expected, learning, retain_graph=True), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert not prototype_cross_entropy(*problem, TEMP)[0].requires_grad


def test_no_rows_give_no_loss_and_zero_gradients():
    learning = [each.requires_grad_() for each in (torch.empty(0, DIM), torch.randn(5, DIM), torch.ones(5, 1))]
    total, losses = prototype_cross_entropy(*learning, [Targets(torch.empty(0, 5))], torch.empty(0), TEMP)
    assert (total.item(), losses.shape) == (0.0, (0,))
    of_embedding, of_directions, of_lengths = torch.autograd.grad(total, learning)
    assert of_embedding.shape == (0, DIM)
    assert of_directions.shape == (5, DIM)
    assert of_lengths.shape == (5, 1)
    assert not of_directions.any()
    assert not of_lengths.any()


def test_student_logits_are_never_kept(problem, monkeypatch):
    """No tensor that waits for backward is as large as the logits."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (sizes.append(tensor.numel()), tensor)[1], lambda t: t
    ):
        prototype_cross_entropy(*problem, TEMP)
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
    # prototypes that one row has for itself are equally much its own: their order is one of rounding
    chosen = expected.gather(1, targets.choices().unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(chosen, expected.amax(dim=1), atol=0, rtol=1e-5)
    first, second = expected.topk(2, dim=1).values.T
    is_clear = first > 1.0001 * second
    assert is_clear.sum() > N_ROWS // 2
    assert torch.equal(targets.choices()[is_clear], expected.argmax(dim=1)[is_clear])
    torch.testing.assert_close(targets[3:7].dense().double(), expected[3:7] * N_ROWS, atol=1e-6, rtol=1e-4)


def test_balanced_targets_of_bfloat16_logits_are_near():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N_ROWS, N_PROTOTYPES, generator=generator).bfloat16()
    expected = sinkhorn_knopp(logits, 0.1, N_ROWS)
    torch.testing.assert_close(balance_(logits, 0.1, N_ROWS).dense(), expected, atol=1e-3, rtol=2e-2)

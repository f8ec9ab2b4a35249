"""The chunked cross-entropy over prototypes against logits that are written out."""

import pytest
import torch
import torch.nn.functional as F

from dinov2.loss import prototype_cross_entropy as module
from dinov2.loss.prototype_cross_entropy import prototype_cross_entropy

N_REPEATS, N_ROWS, N_PROTOTYPES, DIM, TEMP = 2, 11, 37, 8, 0.1


@pytest.fixture(params=[2**20, 5 * N_PROTOTYPES, 1], ids=["one chunk", "five rows a chunk", "row by row"])
def chunked(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", request.param)


@pytest.fixture
def problem():
    """Embeddings, targets, weights and prototypes."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    embeddings = F.normalize(draw(N_REPEATS * N_ROWS, DIM), dim=1).requires_grad_()
    targets = draw(N_ROWS, N_PROTOTYPES).exp()  # rows of any sum
    return embeddings, targets, draw(N_REPEATS * N_ROWS).abs(), draw(N_PROTOTYPES, DIM).requires_grad_()


def written_out(embeddings, targets, weights, prototypes):
    log_probabilities = F.log_softmax(embeddings @ prototypes.T / TEMP, dim=1)
    return -((targets.repeat(N_REPEATS, 1) * log_probabilities).sum(dim=1) * weights).sum()


def test_loss_and_gradients_are_those_of_logits_written_out(problem, chunked):
    embeddings, targets, weights, prototypes = problem
    total = prototype_cross_entropy(embeddings, targets, weights, TEMP, prototypes)
    expected = written_out(*problem)
    torch.testing.assert_close(total, expected)
    found = torch.autograd.grad(3 * total, (embeddings, prototypes))
    for ours, theirs in zip(found, torch.autograd.grad(3 * expected, (embeddings, prototypes)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_logits_in_place_of_embeddings_give_the_same(problem, chunked):
    embeddings, targets, weights, prototypes = problem
    logits = (embeddings @ prototypes.T).detach().requires_grad_()
    total = prototype_cross_entropy(logits, targets, weights, TEMP)
    torch.testing.assert_close(total, written_out(*problem))
    (found,) = torch.autograd.grad(total, logits)
    of_embeddings, of_prototypes = torch.autograd.grad(written_out(*problem), (embeddings, prototypes))
    torch.testing.assert_close(found @ prototypes, of_embeddings, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.T @ embeddings, of_prototypes, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_and_small_gradients_survive(problem, dtype):
    embeddings, targets, weights, prototypes = problem
    weights = weights * 1e-7  # times a probability: less than float16 can hold
    total = prototype_cross_entropy(embeddings.to(dtype), targets, weights, TEMP, prototypes)
    expected = written_out(embeddings, targets, weights, prototypes)
    torch.testing.assert_close(total, expected, rtol=1e-2, atol=0)
    gradients = torch.autograd.grad(1e6 * total, (embeddings, prototypes))
    for ours, theirs in zip(gradients, torch.autograd.grad(1e6 * expected, (embeddings, prototypes)), strict=True):
        assert ours.dtype == torch.float32
        assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.999


def test_fixed_prototypes_get_no_gradient(problem):
    embeddings, targets, weights, prototypes = problem
    total = prototype_cross_entropy(embeddings, targets, weights, TEMP, prototypes.detach())
    (ours,) = torch.autograd.grad(total, embeddings)
    (theirs,) = torch.autograd.grad(written_out(*problem), embeddings)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert not prototype_cross_entropy(embeddings, targets, weights, TEMP, prototypes).requires_grad


def test_no_rows_give_no_loss_and_zero_gradients():
    embeddings, prototypes = torch.empty(0, DIM).requires_grad_(), torch.randn(5, DIM).requires_grad_()
    total = prototype_cross_entropy(embeddings, torch.empty(0, 5), torch.empty(0), TEMP, prototypes)
    assert total.item() == 0
    of_embeddings, of_prototypes = torch.autograd.grad(total, (embeddings, prototypes))
    assert of_embeddings.shape == (0, DIM)
    assert of_prototypes.shape == (5, DIM)
    assert not of_prototypes.any()


def test_student_logits_are_never_kept(problem):
    """No tensor that waits for backward is as large as the logits."""
    embeddings, targets, weights, prototypes = problem
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (sizes.append(tensor.numel()), tensor)[1], lambda t: t
    ):
        prototype_cross_entropy(embeddings, targets, weights, TEMP, prototypes)
    assert sizes
    assert max(sizes) < len(embeddings) * N_PROTOTYPES


def test_the_compiled_loss_is_the_plain_one(problem, monkeypatch):
    embeddings, targets, weights, prototypes = problem
    compiled = torch.compile(module.cross_entropy_and_gradient, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(module, "_compiled_cross_entropy", lambda: compiled)
    results = [prototype_cross_entropy(embeddings, targets, weights, TEMP, prototypes, c) for c in (False, True)]
    torch.testing.assert_close(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_gives_the_same_loss_and_gradients(problem, compiled):
    def loss_and_gradients(device, is_compiled):
        values = [value.detach().to(device).requires_grad_(value.requires_grad) for value in problem]
        embeddings, targets, weights, prototypes = values
        total = prototype_cross_entropy(embeddings, targets, weights, TEMP, prototypes, is_compiled)
        return [value.cpu() for value in (total, *torch.autograd.grad(total, (embeddings, prototypes)))]

    expected = loss_and_gradients("cpu", False)
    torch.testing.assert_close(loss_and_gradients("cuda", compiled), expected, atol=1e-4, rtol=1e-4)

"""Sinkhorn-Knopp against its definition."""

import pytest
import torch

from dinov2.loss.sinkhorn import sinkhorn_knopp

N_ROWS, N_PROTOTYPES = 23, 37


@pytest.fixture
def logits():
    return torch.randn(N_ROWS, N_PROTOTYPES, generator=torch.Generator().manual_seed(0))


def balanced(logits, temp):
    """Rows and columns of the whole matrix normalised in turn, in float64."""
    mass = (logits.double() / temp).exp()
    for _ in range(3):
        mass = mass / mass.sum(dim=0, keepdim=True) / N_PROTOTYPES
        mass = mass / mass.sum(dim=1, keepdim=True) / N_ROWS
    return mass * N_ROWS


def test_two_scaling_vectors_give_what_normalising_the_matrix_gives(logits):
    before = logits.clone()
    targets = sinkhorn_knopp(logits, 0.05, N_ROWS)
    torch.testing.assert_close(targets.double(), balanced(logits, 0.05), atol=1e-6, rtol=1e-4)
    assert torch.equal(logits, before)
    assert torch.equal(targets, sinkhorn_knopp(logits, 0.05, torch.tensor([float(N_ROWS)])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gap", [0.5, 5, 16, 20])
def test_half_precision_logits_lose_no_gap_between_prototypes(dtype, gap):
    """The mass is float32: a prototype `gap` temperatures below a row's best keeps its share."""
    temp = 0.0625
    logits = (torch.arange(8).float() % 2 * -gap * temp).expand(16, 8).to(dtype)  # exact in both types
    logits = logits + torch.eye(16, 8, dtype=dtype)
    torch.testing.assert_close(
        sinkhorn_knopp(logits, temp, 16), sinkhorn_knopp(logits.float(), temp, 16), rtol=1e-5, atol=1e-12
    )
    assert (sinkhorn_knopp(logits, temp, 16) > 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_gives_the_same_targets(dtype, logits):
    targets = sinkhorn_knopp(logits.to("cuda", dtype), 0.05, N_ROWS)
    expected = balanced(logits.to(dtype), 0.05)
    torch.testing.assert_close(targets.double().cpu(), expected, atol=1e-6, rtol=1e-3)

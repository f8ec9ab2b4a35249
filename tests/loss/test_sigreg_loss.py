"""SIGReg against the Epps-Pulley integral in numpy, and its properties."""

import numpy as np
import pytest
import torch

from dinov2.loss import SIGRegLoss


def embeddings(n_views=2, n=40, dim=6, scale=1.0) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.standard_normal((n_views, n, dim)) * scale + 0.3).float()


def statistic(x: torch.Tensor, seed=3, **settings) -> torch.Tensor:
    return SIGRegLoss(**settings)(x, seed)


def test_it_is_the_epps_pulley_integral_over_both_halves():
    x, n_slices, knots = embeddings(), 5, np.linspace(-5, 5, 17)
    slices = torch.randn(6, n_slices, generator=torch.Generator().manual_seed(3)).double().numpy()
    slices /= np.linalg.norm(slices, axis=0)
    normal = np.exp(-(knots**2) / 2)
    values = []
    for view in x.double().numpy():
        for direction in slices.T:
            empirical = np.exp(1j * np.outer(view @ direction, knots)).mean(axis=0)
            values.append(len(view) * np.trapezoid(np.abs(empirical - normal) ** 2 * normal, knots))
    assert statistic(x, n_slices=n_slices).item() == pytest.approx(np.mean(values), rel=1e-5)


def test_it_is_lowest_for_standard_normal_embeddings():
    rng = np.random.default_rng(1)
    normal = torch.from_numpy(rng.standard_normal((1, 2000, 8))).float()
    value = statistic(normal).item()
    for other in (0.5 * normal, 2 * normal, normal + 0.5, torch.zeros_like(normal), normal[..., :1].expand(1, 2000, 8)):
        assert statistic(other).item() > 5 * value


def test_gradient_descent_spreads_collapsed_embeddings():
    x = (0.01 * embeddings(n_views=1, n=64, dim=2)).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for step in range(200):
        optimizer.zero_grad()
        statistic(x, seed=step, n_slices=16).backward()
        optimizer.step()
    assert x.std(dim=1).tolist()[0] == pytest.approx([1, 1], abs=0.25)


def test_slices_follow_from_the_seed_alone():
    x = embeddings()
    first = statistic(x, seed=1)
    torch.rand(5)
    assert torch.equal(statistic(x, seed=1), first)
    assert not torch.equal(statistic(x, seed=2), first)


def test_it_is_float32_under_autocast():
    x = embeddings().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = statistic(x)
    assert torch.equal(found, statistic(x.float()))

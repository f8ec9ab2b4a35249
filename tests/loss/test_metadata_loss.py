"""Metadata guidance against InfoNCE and the bank in numpy, and its properties."""

import numpy as np
import pytest
import torch

from dinov2.loss import MetadataLoss, reverse_gradient

VALUES = [np.array(step) for step in ([0, 2, -1, 0, 2], [1, 2, -1, 0, 2], [3, 1, 1, -1, 0])]


def steps() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((len(values), 6)).astype(np.float32) for values in VALUES]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Reference:
    """The mean loss of a step over its rows with a prototype, and the bank after it, in float64."""

    def __init__(self, temperature=0.1, momentum=0.9) -> None:
        self.bank: dict[int, np.ndarray] = {}
        self.temperature, self.momentum = temperature, momentum

    def step(self, rows: np.ndarray, values: np.ndarray) -> float:
        losses, rows = [], unit(rows.astype(np.float64))
        for row, value in zip(rows, values.tolist(), strict=True):
            if value in self.bank:
                scores = {v: np.exp(row @ unit(p) / self.temperature) for v, p in self.bank.items()}
                losses.append(-np.log(scores[value] / sum(scores.values())))
        for value in set(values.tolist()) - {-1}:
            mean = rows[values == value].mean(axis=0)
            self.bank[value] = self.momentum * self.bank[value] + 0.1 * mean if value in self.bank else mean
        return float(np.mean(losses)) if losses else 0.0


def test_it_is_info_nce_against_the_moving_means_of_the_values():
    ours, reference = MetadataLoss(n_values=5, dim=6), Reference()
    for number, (rows, values) in enumerate(zip(steps(), VALUES, strict=True)):
        loss = ours(torch.from_numpy(rows), torch.from_numpy(values))
        ours.update_bank()
        assert loss.item() == pytest.approx(reference.step(rows, values), rel=1e-5)
        assert (loss > 0) == (number > 0)  # the first step has no prototypes yet
        for value in range(5):
            np.testing.assert_allclose(ours.prototypes[value], reference.bank.get(value, np.zeros(6)), atol=1e-6)


def test_rows_without_value_or_prototype_get_no_gradient_and_are_not_counted():
    loss = MetadataLoss(n_values=5, dim=6)
    before = torch.from_numpy(steps()[0]).requires_grad_()
    loss(before, torch.from_numpy(VALUES[0])).backward()
    assert torch.equal(before.grad, torch.zeros_like(before))
    loss.update_bank()
    rows, values = torch.from_numpy(steps()[1]).requires_grad_(), torch.from_numpy(VALUES[1])
    loss(rows, values).backward()
    takes_part = [False, True, False, True, True]
    assert (rows.grad.abs().sum(dim=1) > 0).tolist() == takes_part
    torch.testing.assert_close(loss(rows, values), loss(rows[takes_part], values[takes_part]))


def test_a_row_that_is_not_finite_stays_out_of_the_bank():
    loss, rows = MetadataLoss(n_values=5, dim=6), torch.from_numpy(steps()[0])
    rows[0] = torch.nan
    loss(rows, torch.from_numpy(VALUES[0]))
    loss.update_bank()
    torch.testing.assert_close(loss.prototypes[0], torch.nn.functional.normalize(rows[3], dim=0))
    assert torch.isfinite(loss.prototypes).all()


def test_only_the_bank_is_saved():
    assert set(MetadataLoss(n_values=5, dim=6).state_dict()) == {"prototypes"}


@pytest.mark.parametrize("suppresses", [True, False])
def test_gradient_descent_suppresses_or_encourages_a_value(suppresses):
    """Features whose first coordinate is the value; a linear map projects them, as the head does."""
    torch.manual_seed(0)
    values = torch.arange(60) % 3
    features = torch.randn(60, 8)
    features[:, :3] += 2 * torch.nn.functional.one_hot(values, 3)
    scale = torch.ones(8, requires_grad=True)  # what the backbone learns: which coordinates to keep
    head, loss = torch.nn.Linear(8, 4), MetadataLoss(n_values=3, dim=4)
    optimizer = torch.optim.Adam([scale, *head.parameters()], lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        kept = features * scale
        loss(head(reverse_gradient(kept) if suppresses else kept), values).backward()
        optimizer.step()
        loss.update_bank()
    about_value, other = scale.detach()[:3].abs().mean(), scale.detach()[3:].abs().mean()
    assert (about_value < 0.5 * other) if suppresses else (about_value > 1.2 * other), (about_value, other)


def test_a_reversed_gradient_leaves_values_alone():
    x = torch.tensor([1.5, -0.1, 3e5], requires_grad=True)
    y = reverse_gradient(x)
    (y * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert torch.equal(y, x)
    assert x.grad.tolist() == [-1, -2, -3]

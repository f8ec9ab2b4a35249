"""The guard in front of the optimizer, and clipping."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from dinov2.train.optimizer import StepGuard, build_optimizer, clip_gradients


@pytest.fixture
def setting():
    module = nn.ModuleDict({"backbone": nn.Linear(3, 3), "dino_head": nn.Linear(3, 2)})
    optim = OmegaConf.create({"adamw_beta1": 0.9, "adamw_beta2": 0.999})
    optimizer = build_optimizer(optim, [{"params": list(module.parameters()), "lr": 0.1, "weight_decay": 0.1}])
    return module, optimizer, StepGuard(torch.device("cpu"))


def step(setting, loss: float, gradient: float) -> None:
    module, optimizer, guard = setting
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    guard.step(optimizer, {"loss": torch.tensor(loss)}, clip_gradients(module, max_norm=3.0))


def snapshot(setting) -> list[torch.Tensor]:
    module, optimizer, _ = setting
    moments = [v for state in optimizer.state.values() for v in state.values()]
    return [value.clone() for value in [*module.parameters(), *moments]]


@pytest.mark.parametrize(("loss", "gradient"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan"))])
def test_a_bad_step_changes_neither_weights_nor_moments(setting, loss, gradient):
    step(setting, 1.0, 1.0)
    before = snapshot(setting)
    step(setting, loss, gradient)
    for ours, theirs in zip(snapshot(setting), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    step(setting, 1.0, 1.0)
    assert not torch.equal(snapshot(setting)[0], before[0])


def test_bad_steps_are_counted_and_stop_the_run_when_they_do_not_end(setting):
    *_, guard = setting
    for loss in (float("nan"), 1.0, float("nan"), float("nan")):
        step(setting, loss, 1.0)
    shown = {name: value.item() for name, value in guard.shown({"ibot_loss": torch.tensor(2.0)}, {}).items()}
    assert (shown["skipped_steps"], shown["longest_skipped_in_row"]) == (3, 2)
    guard.stop_if_stuck({"iteration": 3, **shown}, max_in_row=3)
    step(setting, 1.0, 1.0)  # a good step before the log looks does not hide a bad stretch
    shown = {name: value.item() for name, value in guard.shown({"ibot_loss": torch.tensor(2.0)}, {}).items()}
    with pytest.raises(FloatingPointError, match=r"iteration 3, rank 0: 2 steps in a row.*ibot_loss=2\.0"):
        guard.stop_if_stuck({"iteration": 3, **shown}, max_in_row=2)


def test_an_overflow_under_the_fp16_scaler_skips_the_step_and_lowers_the_scale(setting):
    module, optimizer, guard = setting
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def scaled_step(factor: float) -> None:
        optimizer.zero_grad()
        loss = module["dino_head"](module["backbone"](torch.ones(1, 3))).sum()
        scaler.scale(loss * factor).backward()
        scaler.unscale_(optimizer)
        guard.step(optimizer, {"loss": loss.detach()}, clip_gradients(module, max_norm=3.0), scaler)

    scaled_step(1.0)
    before = snapshot(setting)
    scaled_step(1e38)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(snapshot(setting), before, strict=True))
    assert scaler.get_scale() == 512.0
    assert guard.skipped.item() == 1
    scaled_step(1.0)
    assert not torch.equal(snapshot(setting)[0], before[0])


def test_each_sub_network_is_clipped_for_itself(setting):
    module, *_ = setting
    for scale, part in ((100.0, module["backbone"]), (0.1, module["dino_head"])):
        for parameter in part.parameters():
            parameter.grad = torch.full_like(parameter, scale)
    norms = clip_gradients(module, max_norm=3.0)
    assert norms["backbone"].item() == pytest.approx(100 * 12**0.5)
    assert torch.stack([p.grad.norm() for p in module["backbone"].parameters()]).norm().item() == pytest.approx(
        3, rel=1e-4
    )
    assert module["dino_head"].bias.grad.tolist() == pytest.approx([0.1, 0.1])


def test_zero_means_no_clipping(setting):
    module, *_ = setting
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 50.0)
    clip_gradients(module, max_norm=0)
    assert all((p.grad == 50).all() for p in module.parameters())

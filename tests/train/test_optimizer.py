"""The guard in front of the optimizer, and clipping."""

import re

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dinov2.fsdp import sharding
from dinov2.train import optimizer as optimizer_module
from dinov2.train.optimizer import (
    LossScaler,
    StepGuard,
    build_optimizer,
    clip_gradients,
)


@pytest.fixture
def setting():
    module = nn.ModuleDict({"backbone": nn.Linear(3, 3), "dino_head": nn.Linear(3, 2)})
    optim = OmegaConf.create({"adamw_beta1": 0.9, "adamw_beta2": 0.999})
    optimizer = build_optimizer(optim, [{"params": list(module.parameters()), "weight_decay": 0.1}])
    optimizer.param_groups[0]["lr"] = 0.1
    return module, optimizer, StepGuard(torch.device("cpu"))


def step(setting, loss: float, gradient: float) -> None:
    module, optimizer, guard = setting
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    guard.step(optimizer, {"loss": torch.tensor(loss)}, clip_gradients(module, max_norm=3.0))


def snapshot(setting) -> list[torch.Tensor]:
    module, optimizer, *_ = setting
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


def test_bad_steps_are_counted_and_a_streak_is_noticed(setting):
    *_, guard = setting
    for loss in (float("nan"), 1.0, float("nan"), float("nan")):
        step(setting, loss, 1.0)

    def newest() -> dict[str, float]:
        shown = {name: value.item() for name, value in guard.log_values({"ibot_loss": torch.tensor(2.0)}, {}).items()}
        return {"iteration": 3, **shown}

    assert (newest()["skipped_steps"], newest()["longest_skipped_in_row"]) == (3, 2)
    assert not guard.is_stuck(newest(), max_in_row=3)
    step(setting, 1.0, 1.0)  # a good step before the log looks does not hide a bad stretch
    assert guard.is_stuck(newest(), max_in_row=2)
    assert re.search(r"iteration 3, rank 0: 2 steps in a row.*ibot_loss=2\.0", guard.describe(newest()))
    guard.forget_streak()
    assert not guard.is_stuck(newest(), max_in_row=1)


def losses_with_a_spike(n_before: int, spike: float) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(n_before, generator=generator)
    return [*(10 - 0.01 * torch.arange(n_before) + noise).tolist(), spike]


@pytest.mark.parametrize(
    ("n_before", "spike", "max_spike", "skipped"),
    [(100, 30.0, 10.0, 1), (100, 10.5, 10.0, 0), (100, 30.0, 0.0, 0), (20, 30.0, 10.0, 0), (100, 3.0, 10.0, 0)],
    ids=["spike", "noise", "switched off", "too early to tell", "a fall"],
)
def test_a_spike_of_the_loss_skips_the_step(setting, n_before, spike, max_spike, skipped):
    module, optimizer, _ = setting
    guard = StepGuard(torch.device("cpu"), max_spike)
    for loss in losses_with_a_spike(n_before, spike):
        before = snapshot((module, optimizer, guard))
        step((module, optimizer, guard), loss, 1.0)
    assert guard.skipped.item() == skipped
    changed = any(not torch.equal(a, b) for a, b in zip(snapshot((module, optimizer, guard)), before, strict=True))
    assert changed == (skipped == 0)


def test_a_loss_that_stays_on_its_new_level_is_believed(setting):
    module, optimizer, _ = setting
    guard = StepGuard(torch.device("cpu"), max_spike=10.0)
    for loss in [*losses_with_a_spike(100, 14.0), *[14.0] * 30]:
        step((module, optimizer, guard), loss, 1.0)
    assert 0 < guard.skipped.item() < 15
    assert guard.skipped_in_row.item() == 0


def test_an_overflow_under_the_fp16_scaler_skips_the_step_and_lowers_the_scale(setting):
    module, optimizer, guard = setting
    scaler = LossScaler(scale=1024.0, growth_interval=3)

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
    assert scaler.scale_factor.item() == 512.0
    assert guard.skipped.item() == 1
    scaled_step(1.0)
    assert not torch.equal(snapshot(setting)[0], before[0])


def test_the_loss_scale_moves_as_pytorchs_scaler_moves_it():
    ours, theirs = LossScaler(scale=64.0, growth_interval=3), torch.amp.GradScaler("cpu", 64.0, growth_interval=3)
    parameter = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for overflows in (0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0):
        theirs.scale(parameter * (float("inf") if overflows else 1.0)).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(torch.tensor(float(overflows)))
        assert ours.scale_factor.item() == theirs.get_scale()


def test_every_parameter_has_moments_before_the_first_step():
    module = nn.Linear(3, 2)
    before = [p.clone() for p in module.parameters()]
    optim = OmegaConf.create({"adamw_beta1": 0.9, "adamw_beta2": 0.999})
    optimizer = build_optimizer(optim, [{"params": list(module.parameters()), "weight_decay": 0.1}])
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))
    for parameter in module.parameters():
        assert all(not value.any() for value in optimizer.state[parameter].values())
        assert parameter.grad is None


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_parameters_are_clipped_and_updated_as_whole_ones_without_operations_on_dtensors(one_rank, monkeypatch):
    torch.manual_seed(0)
    whole, sharded = (nn.ModuleDict({"backbone": nn.Linear(3, 3)}) for _ in range(2))
    sharded.load_state_dict(whole.state_dict())
    mesh = sharding.make_mesh("FULL_SHARD", "cpu", 1)
    dtypes = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}
    sharding.shard(sharded["backbone"], (), mesh=mesh, reshard_after_forward=True, **dtypes)
    settings = OmegaConf.create({"adamw_beta1": 0.9, "adamw_beta2": 0.95})
    groups = [[{"params": list(module.parameters()), "weight_decay": 0.1}] for module in (whole, sharded)]
    plain, ours = (build_optimizer(settings, group) for group in groups)
    plain.param_groups[0]["lr"] = ours.param_groups[0]["lr"] = 0.1
    guard, given = StepGuard(torch.device("cpu")), []
    for module, name in ((optimizer_module, "adamw"), (sharding.nn.utils, "get_total_norm"), (torch, "_foreach_mul_")):
        function = getattr(module, name)

        def recorded(tensors, *others, function=function, **more):
            given.extend([*tensors, *(tensor for each in others if isinstance(each, list) for tensor in each)])
            return function(tensors, *others, **more)

        monkeypatch.setattr(module, name, recorded)
    for scale in (1.0, 50.0, 0.1):
        for parameter, twin in zip(whole.parameters(), sharded.parameters(), strict=True):
            parameter.grad = scale * torch.randn_like(parameter)
            twin.grad = distribute_tensor(parameter.grad, mesh, twin.placements)
        norm = nn.utils.clip_grad_norm_(whole.parameters(), 3.0)
        plain.step()
        given.clear()
        norms = clip_gradients(sharded, max_norm=3.0)
        guard.step(ours, {"loss": torch.tensor(1.0)}, norms)
        assert len(given) == 2 + 2 + 5 * 2
        assert not any(isinstance(tensor, DTensor) for tensor in given)
        torch.testing.assert_close(norms["backbone"], norm)
        for parameter, twin in zip(whole.parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(twin.full_tensor(), parameter)
            torch.testing.assert_close(
                ours.state[twin]["exp_avg_sq"].full_tensor(), plain.state[parameter]["exp_avg_sq"]
            )


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

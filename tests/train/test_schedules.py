"""Schedules against upstream's numbers."""

import pytest

from dinov2.train.batches import resolve_batch_size
from dinov2.train.schedules import CosineScheduler, Schedules
from dinov2.utils.config import load_run_config


def settle(cfg):
    """What train.py does for a lone process."""
    resolve_batch_size(cfg.train, world_size=1)


OVERRIDES = {
    "dinobloom": ["teacher.momentum_teacher=0.994", "optim.weight_decay_end=0.2"],
    "dinov2": ["teacher.momentum_teacher=0.992", "optim.weight_decay_end=0.4"],
}


def schedules_of(golden: dict, style: str) -> Schedules:
    keys = [
        f"train.OFFICIAL_EPOCH_LENGTH={golden['OFFICIAL_EPOCH_LENGTH']}",
        f"optim.epochs={golden['epochs']}",
        f"optim.warmup_epochs={golden['warmup_epochs']}",
        f"optim.base_lr={golden['base_lr']}",
        "train.batch_size_per_gpu=120",
    ]
    return Schedules(load_run_config(None, keys + OVERRIDES[style], settle))


@pytest.mark.parametrize("style", ["dinobloom", "dinov2"])
def test_every_value_is_upstreams(style, golden_json):
    golden = golden_json["schedules"][style]
    schedules = schedules_of(golden, style)
    assert schedules.n_iterations == golden["total"]
    assert schedules.peak_lr == pytest.approx(golden["scaled_lr"], rel=1e-12)
    names = {
        "lr": "lr",
        "wd": "weight_decay",
        "momentum": "teacher_momentum",
        "teacher_temp": "teacher_temp",
        "last_layer_lr": "last_layer_lr",
    }
    for i, iteration in enumerate(golden["iterations"]):
        now = schedules.at(iteration)
        for theirs, ours in names.items():
            assert getattr(now, ours) == pytest.approx(golden[theirs][i], rel=1e-9, abs=1e-15), (iteration, ours)


def test_freeze_comes_before_warmup():
    schedule = CosineScheduler(1.0, 0.1, total_iters=10, warmup_iters=3, freeze_iters=2)
    assert [schedule[i] for i in range(6)] == pytest.approx([0, 0, 0, 0.5, 1.0, 1.0])
    assert schedule[10] == schedule[999] == 0.1


def test_a_warmup_longer_than_the_run_is_an_error():
    with pytest.raises(ValueError, match=r"optim\.warmup_epochs"):
        Schedules(load_run_config(None, ["optim.epochs=2", "optim.warmup_epochs=3"], settle))


def test_the_unscaled_rule_leaves_base_lr():
    assert Schedules(load_run_config(None, ["optim.scaling_rule=none", "optim.base_lr=0.01"], settle)).peak_lr == 0.01

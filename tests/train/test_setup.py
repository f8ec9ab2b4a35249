"""The device with what it lacks, and what the start of the log says about the data."""

import argparse
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from dinov2.train import setup
from dinov2.train.setup import describe_device, describe_sets, read_settings, set_up_device
from dinov2.utils import resources
from dinov2.utils.config import load_run_config


def lines(sizes, n_seen, weights=(), temperature=1.0):
    names = [f"set{i}" for i in range(len(sizes))]
    cfg = OmegaConf.create({"train": {"balance": {"weights": dict(weights), "temperature": temperature}}})
    source = SimpleNamespace(set_names=names, set_sizes=np.array(sizes))
    return list(describe_sets(cfg, SimpleNamespace(source=source), n_seen))


def test_one_set_needs_no_lines():
    assert lines([100], 1000) == []


def test_how_often_each_set_is_seen():
    title, *rows = lines([75_000, 25_000, 0], 1_000_000)
    assert title == "sets      3, seen as many as there are:"
    assert [" ".join(row.split()) for row in rows] == [
        "set0 75,000 images, 75.00% of the run's images, 10.0 passes over it",
        "set1 25,000 images, 25.00% of the run's images, 10.0 passes over it",
        "set2 0 images, 0.00% of the run's images, 0.0 passes over it",
    ]
    title, *rows = lines([75_000, 25_000, 0], 1_000_000, temperature=float("inf"))
    assert title == "sets      3, seen as balanced:"
    assert "50.00% of the run's images, 6.7 passes" in rows[0]
    assert "50.00% of the run's images, 20.0 passes" in rows[1]


@pytest.mark.parametrize("n_sets", [12, 13, 60])
def test_of_many_sets_the_most_seen_have_lines(n_sets):
    _, *rows = lines([1000 * (i + 1) for i in range(n_sets)], 10**6, weights={"set0": 50})
    assert len(rows) == min(n_sets, 13)
    assert any(row.split()[0] == "set0" for row in rows)
    assert any(row.split()[0] == f"set{n_sets - 1}" for row in rows)
    if n_sets > 12:
        assert rows[-1].strip().startswith(f"and {n_sets - 12} more: ")
        shown = [float(row.split("images, ")[1].split("%")[0]) for row in rows]
        assert sum(shown) == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize("key", ["train.compile_blocks", "train.compile_loss"])
def test_a_missing_compiler_is_named_with_the_setting(key, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    cfg = load_run_config(None, [f"{key}=true", "train.device=cpu"])
    with pytest.raises(ValueError, match=rf"{key}=true: no C\+\+ compiler was found; install g\+\+.*set it to false"):
        set_up_device(cfg, None)


@pytest.mark.parametrize(
    ("arch", "strategy"),
    [
        ("vit_small", "NO_SHARD"),
        ("vit_base", "NO_SHARD"),
        ("vit_large", "SHARD_GRAD_OP"),
        ("vit_giant2", "SHARD_GRAD_OP"),
    ],
)
def test_the_size_of_the_backbone_decides_if_weights_are_sharded(arch, strategy):
    given = "compute_precision.teacher.dino_head.sharding_strategy=FULL_SHARD"
    overrides = ["train.dataset_path=lists", f"student.arch={arch}", given]
    cfg = read_settings(argparse.Namespace(config_file=None, overrides=overrides, eval_only=False), world_size=8)
    student, teacher = (
        {name: part.sharding_strategy for name, part in cfg.compute_precision[role].items()}
        for role in ("student", "teacher")
    )
    assert teacher.pop("dino_head") == "FULL_SHARD"
    assert {*student.values(), *teacher.values()} == {strategy}


def test_the_chosen_gpu_is_the_current_one_before_its_types_are_asked_for(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device))
    monkeypatch.setattr(setup, "resolve_precision", lambda *_: calls.append("types"))
    assert set_up_device(load_run_config(None, ["train.device=cuda:1"]), None) == torch.device("cuda", 1)
    assert calls == [torch.device("cuda", 1), "types"]


@pytest.mark.parametrize(("other_cores", "n_workers"), [(range(8), 2), (range(8, 16), 8)])
def test_ranks_of_a_node_divide_its_cores_unless_each_has_its_own(monkeypatch, other_cores, n_workers):
    own, others = (socket.gethostname(), list(range(8))), [(socket.gethostname(), list(other_cores))] * 3
    on_another_node = [("elsewhere", list(range(8)))] * 4
    monkeypatch.setattr(resources, "_cores", lambda: own[1])
    monkeypatch.setattr(resources, "all_gather_objects", lambda mine: [mine, *others, *on_another_node])
    cfg = load_run_config(None, ["train.device=cpu", "train.num_workers=10"])
    set_up_device(cfg, None)
    assert cfg.train.num_workers == n_workers


def test_a_gpu_is_described_with_its_driver_and_the_kernels_of_attention(monkeypatch):
    gpu = SimpleNamespace(name="NVIDIA A100", major=8, minor=0, total_memory=40 * 2**30)
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch, "empty", lambda *sizes, device, dtype: empty(*sizes, dtype=dtype))
    monkeypatch.setattr(setup, "can_use_flash_attention", lambda attention: attention.query.dtype == torch.bfloat16)
    monkeypatch.setattr(setup, "can_use_efficient_attention", lambda attention: True)
    monkeypatch.setattr(setup.collect_env, "get_nvidia_driver_version", lambda run: "550.54")
    text = describe_device(torch.device("cuda", 0), torch.bfloat16)
    assert text == "NVIDIA A100 (capability 8.0), 40.0 GiB, driver 550.54; attention kernels: flash or memory-efficient"
    assert describe_device(torch.device("cuda", 0), torch.float32).endswith("attention kernels: memory-efficient")

"""Batches of training: presets, and that a batch depends on nothing but the seed and its number."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from dinov2.configs import dinov2_default_config
from dinov2.data.augmentations import DINO_SETTINGS, HEMA_SETTINGS
from dinov2.layers.drop_path import BatchShare
from dinov2.train.batches import TrainBatches, build_balance, build_dataset, resolve_batch_size
from dinov2.utils.config import load_run_config


@pytest.mark.parametrize(("name", "preset"), [("default", DINO_SETTINGS), ("hema", HEMA_SETTINGS)])
def test_the_config_states_the_presets_of_the_classes(name, preset):
    stated = OmegaConf.to_container(dinov2_default_config.augmentation[name])
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in stated.items()} == dataclasses.asdict(preset)


def batches(cfg, start, n):
    loader = TrainBatches(cfg, build_dataset(cfg), torch.device("cpu"))
    iterator = loader.starting_at(start, start * cfg.train.global_batch_size)
    return [part for _ in range(n) for part in next(iterator)]


@pytest.fixture
def config(tmp_path, picture_list, tiny_overrides):
    def make(n_pictures: int, *more: str, world_size: int = 1):
        if n_pictures not in folders:
            folders[n_pictures] = picture_list(n=n_pictures)
        cfg = load_run_config(None, tiny_overrides(folders[n_pictures], *more))
        resolve_batch_size(cfg.train, world_size)
        cfg.train.output_dir = str(tmp_path)
        return cfg

    folders: dict[int, Path] = {}
    return make


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_a_function_of_seed_and_number(config, workers):
    whole = batches(config(7), 0, 4)
    tail = batches(config(7, f"train.num_workers={workers}"), 2, 2)
    for ours, theirs in zip(tail, whole[2:], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, theirs[key], rtol=0, atol=0)
            else:
                assert value == theirs[key]
    assert not torch.equal(whole[0]["collated_global_crops"], whole[1]["collated_global_crops"])


def test_processes_share_the_batch_that_one_process_would_have(config, monkeypatch):
    (whole,) = batches(config(8, "train.batch_size_per_gpu=4"), 0, 1)
    half = config(8, "train.batch_size_per_gpu=2", world_size=2)
    for rank in range(2):
        for module in ("dinov2.train.batches", "dinov2.data.samplers", "dinov2.data.loaders"):
            monkeypatch.setattr(f"{module}.get_rank", lambda rank=rank: rank)
            monkeypatch.setattr(f"{module}.get_world_size", lambda: 2)
        (part,) = batches(half, 0, 1)
        for key, views in (("collated_global_crops", 2), ("collated_masks", 2), ("collated_local_crops", 8)):
            expected = whole[key].unflatten(0, (views, -1))[:, rank::2].flatten(0, 1)
            torch.testing.assert_close(part[key], expected, rtol=0, atol=0)
        assert (part["seed"], part["share"]) == (whole["seed"], BatchShare(rank, 2))


def test_parts_share_the_batch_that_one_process_would_have_at_once(config):
    (whole,) = batches(config(8), 0, 1)
    parts = batches(config(8, "train.batch_size_per_gpu=2", "train.global_batch_size=4"), 0, 1)
    assert [part["share"] for part in parts] == [BatchShare(0, 2), BatchShare(1, 2)]
    for number, part in enumerate(parts):
        for key, views in (("collated_global_crops", 2), ("collated_masks", 2), ("collated_local_crops", 8)):
            expected = whole[key].unflatten(0, (views, -1))[:, number::2].flatten(0, 1)
            torch.testing.assert_close(part[key], expected, rtol=0, atol=0)


def test_a_balance_is_kept_when_a_run_goes_on_with_more_processes(config, monkeypatch):
    cfg = config(8, "train.balance.weights={all:3,few:1}", "train.batch_size_per_gpu=4")
    lists = next(iter(Path(cfg.train.dataset_path.split("root=")[1].split(":shuffle")[0]).glob("all.txt"))).parent
    (lists / "few.txt").write_text("pictures/000.png\n")
    whole = batches(cfg, 0, 3)
    assert not torch.equal(whole[0]["collated_global_crops"], batches(config(8), 0, 1)[0]["collated_global_crops"])
    half = config(8, "train.balance.weights={all:3,few:1}", "train.batch_size_per_gpu=2", world_size=2)
    for rank in range(2):
        for module in ("dinov2.train.batches", "dinov2.data.samplers", "dinov2.data.loaders"):
            monkeypatch.setattr(f"{module}.get_rank", lambda rank=rank: rank)
            monkeypatch.setattr(f"{module}.get_world_size", lambda: 2)
        (part,) = batches(half, 2, 1)
        expected = whole[2]["collated_global_crops"].unflatten(0, (2, -1))[:, rank::2].flatten(0, 1)
        torch.testing.assert_close(part["collated_global_crops"], expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.balance.weights={none:2}", "no set is called 'none'; the sets here are all"),
        ("train.balance.weights={all:-1}", "all has -1.0; a weight is 0"),
        ("train.balance.weights={all:.nan}", "all has nan"),
        ("train.balance.weights={all:0}", "every set that has pictures has weight 0"),
        ("train.balance.weights={all:much}", "must give numbers to names, like {bmc: 0.5"),
        ("train.balance.weights=2", "must give numbers to names"),
        ("train.balance.temperature=0", "0.0 is not above 0"),
        ("train.balance.temperature=.nan", "nan is not above 0"),
        ("train.balance.temperature=inf", "must be a number"),
    ],
)
def test_a_balance_that_cannot_be_kept_is_an_error_before_the_run(config, override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_dataset(config(3, override))


def test_weights_come_from_file_and_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train: {balance: {weights: {bmc: 2, 2024: 0.5}}}")
    cfg = load_run_config(file, ["train.balance.weights.apl-1=3", "train.balance.temperature=.inf"])
    assert dict(cfg.train.balance.weights) == {"bmc": 2, "2024": 0.5, "apl-1": 3}
    assert build_balance(cfg).temperature == float("inf")
    assert build_balance(load_run_config(None)).is_natural


@pytest.mark.parametrize(
    ("given", "world_size", "settled"),  # (batch_size_per_gpu, accumulation_steps, global_batch_size)
    [
        ((4, None, None), 2, (4, 1, 8)),
        ((4, 3, None), 2, (4, 3, 24)),
        ((64, None, 48), 4, (12, 1, 48)),
        ((8, None, 48), 2, (8, 3, 48)),
        ((5, None, 48), 2, (4, 6, 48)),
        ((64, 4, 48), 2, (6, 4, 48)),
    ],
)
def test_a_step_keeps_its_pictures_however_many_processes_share_them(given, world_size, settled):
    names = ("batch_size_per_gpu", "accumulation_steps", "global_batch_size")
    train = OmegaConf.create(dict(zip(names, given, strict=True)))
    resolve_batch_size(train, world_size)
    assert tuple(train[name] for name in names) == settled


def test_a_batch_that_does_not_divide_is_an_error_with_one_that_does():
    train = OmegaConf.create({"batch_size_per_gpu": 4, "accumulation_steps": None, "global_batch_size": 16})
    with pytest.raises(ValueError, match="do not spread evenly over 3 processes; 15 would"):
        resolve_batch_size(train, 3)
    train.accumulation_steps = 3
    with pytest.raises(ValueError, match="leave accumulation_steps at null"):
        resolve_batch_size(train, 2)

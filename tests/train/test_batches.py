"""Batches of training: presets, and that a batch depends on nothing but the seed and its number."""

import dataclasses
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from dinov2.configs import dinov2_default_config
from dinov2.data.augmentations import DINO_SETTINGS, HEMA_SETTINGS
from dinov2.train.batches import TrainBatches, build_dataset
from dinov2.utils.config import load_run_config


@pytest.mark.parametrize(("name", "preset"), [("default", DINO_SETTINGS), ("hema", HEMA_SETTINGS)])
def test_the_config_states_the_presets_of_the_classes(name, preset):
    stated = OmegaConf.to_container(dinov2_default_config.augmentation[name])
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in stated.items()} == dataclasses.asdict(preset)


def batches(cfg, start, n):
    iterator = iter(TrainBatches(cfg, build_dataset(cfg), torch.device("cpu"), start))
    return [next(iterator) for _ in range(n)]


@pytest.fixture
def config(tmp_path, picture_list, tiny_overrides):
    def make(n_pictures: int, *more: str):
        if n_pictures not in folders:
            folders[n_pictures] = picture_list(n=n_pictures)
        cfg = load_run_config(None, tiny_overrides(folders[n_pictures], *more))
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
            torch.testing.assert_close(value, theirs[key], rtol=0, atol=0)
    assert not torch.equal(whole[0]["collated_global_crops"], whole[1]["collated_global_crops"])


def test_processes_share_the_batch_that_one_process_would_have(config, monkeypatch):
    (whole,) = batches(config(8, "train.batch_size_per_gpu=4"), 0, 1)
    half = config(8, "train.batch_size_per_gpu=2")
    for rank in range(2):
        for module in ("dinov2.train.batches", "dinov2.data.samplers", "dinov2.data.loaders"):
            monkeypatch.setattr(f"{module}.get_rank", lambda rank=rank: rank)
            monkeypatch.setattr(f"{module}.get_world_size", lambda: 2)
        (part,) = batches(half, 0, 1)
        for key, views in (("collated_global_crops", 2), ("collated_masks", 2), ("collated_local_crops", 8)):
            expected = whole[key].unflatten(0, (views, -1))[:, rank::2].flatten(0, 1)
            torch.testing.assert_close(part[key], expected, rtol=0, atol=0)

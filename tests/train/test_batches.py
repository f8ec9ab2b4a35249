"""Batches of training: each depends on nothing but the seed and its number, however it is cut."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import get_worker_info

from dinov2.data import MaskingGenerator
from dinov2.train.batches import TrainBatches, build_augmentation, build_balance, build_dataset, resolve_batch_size
from dinov2.utils.config import load_run_config


def batches(cfg, start, n):
    loader = TrainBatches(cfg, build_dataset(cfg), torch.device("cpu"))
    iterator = loader.starting_at(start, start * cfg.train.global_batch_size)
    return [micro_batch for _ in range(n) for micro_batch in next(iterator)]


@pytest.fixture
def config(tmp_path, image_list, tiny_overrides):
    def make(n_images: int, *more: str, world_size: int = 1):
        if n_images not in folders:
            folders[n_images] = image_list(n=n_images)
        cfg = load_run_config(None, tiny_overrides(folders[n_images], *more))
        resolve_batch_size(cfg.train, world_size)
        cfg.train.output_dir = str(tmp_path)
        return cfg

    folders: dict[int, Path] = {}
    return make


def as_rank(monkeypatch, rank, world_size):
    for module in ("dinov2.train.batches", "dinov2.data.samplers", "dinov2.data.loaders"):
        monkeypatch.setattr(f"{module}.get_rank", lambda: rank)
    monkeypatch.setattr("dinov2.data.samplers.get_world_size", lambda: world_size)


def by_image(batch, key):
    """The rows of a key, image by image: [B, views, ...]."""
    n_views = {"collated_global_crops": 2, "collated_masks": 2, "collated_local_crops": 8}[key]
    return batch[key].unflatten(0, (n_views, -1)).transpose(0, 1)


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
    assert not torch.equal(whole[0]["collated_masks"], whole[1]["collated_masks"])


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size", "global_batch_size", "first_batch", "workers"),
    [(1, 3, 6, 0, 2), (1, 1, 4, 1, 0), (2, 2, 4, 1, 0), (2, 1, 6, 0, 2), (4, 1, 4, 2, 0)],
)
def test_crops_of_an_image_depend_on_seed_and_position_only(
    config, monkeypatch, world_size, micro_batch_size, global_batch_size, first_batch, workers
):
    whole = batches(config(5, "train.batch_size_per_gpu=12"), 0, 1)[0]  # positions 0 to 11, twice through the images
    cfg = config(
        *(5, f"train.batch_size_per_gpu={micro_batch_size}", f"train.global_batch_size={global_batch_size}"),
        f"train.num_workers={workers}",
        world_size=world_size,
    )
    seen = []
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        positions = range(first_batch * global_batch_size + rank, 12, world_size)
        n_batches = 12 // global_batch_size - first_batch
        micro_batches = batches(cfg, first_batch, n_batches)
        assert len(micro_batches) * micro_batch_size == len(positions)
        for key in ("collated_global_crops", "collated_local_crops"):
            ours = torch.cat([by_image(batch, key) for batch in micro_batches])
            torch.testing.assert_close(ours, by_image(whole, key)[list(positions)], rtol=0, atol=0)
        seen += positions
    assert sorted(seen) == list(range(first_batch * global_batch_size, 12))


@pytest.mark.parametrize(("world_size", "n_micro_batches"), [(2, 1), (1, 2), (2, 2)])
def test_masks_do_not_depend_on_how_a_global_batch_is_cut(config, monkeypatch, world_size, n_micro_batches):
    (whole,) = batches(config(8, "train.batch_size_per_gpu=8"), 3, 1)
    size = 8 // (world_size * n_micro_batches)
    cfg = config(8, f"train.batch_size_per_gpu={size}", "train.global_batch_size=8", world_size=world_size)
    seeds, n_masked = set(), 0
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        micro_batches = batches(cfg, 3, 1)
        masks = torch.cat([by_image(batch, "collated_masks") for batch in micro_batches])
        assert torch.equal(masks, by_image(whole, "collated_masks")[rank::world_size])
        for batch in micro_batches:
            assert batch["n_masked_patches"] <= batch["upperbound"] <= whole["upperbound"]
            n_masked += int(batch["n_masked_patches"])
            seeds.add(batch["seed"])
    assert n_masked == whole["n_masked_patches"] > 0
    assert len(seeds) == world_size * n_micro_batches  # each draws its own stochastic depth


def test_crops_arrive_normalised(config):
    (batch,) = batches(config(8, "train.batch_size_per_gpu=8"), 0, 1)
    assert batch["collated_global_crops"].dtype == batch["collated_local_crops"].dtype == torch.float32
    assert batch["collated_global_crops"].is_contiguous()
    lowest, highest = batch["collated_global_crops"].aminmax()
    assert -2.2 < lowest < -1.5  # black is -2.1 in red, white 2.6 in blue
    assert 2.0 < highest < 2.7


def test_an_augmentation_that_cannot_be_is_an_error_with_its_place_in_the_config(config):
    cfg = config(4, "data_transform=hema", "augmentation.hema.background_radius=[1.0,0.5]")
    with pytest.raises(
        ValueError, match=r"augmentation\.hema\.\* and crops\.\*: background_radius: expected 0 < lowest"
    ):
        build_augmentation(cfg)


def test_failures_come_with_the_batch(config):
    cfg = config(4, "train.batch_size_per_gpu=4", "train.num_workers=1", "train.max_bad_fraction=1")
    lists = Path(cfg.train.dataset_path.split("root=")[1].split(":shuffle")[0])
    (lists / "images" / "002.png").write_bytes(b"junk")
    loader = TrainBatches(cfg, build_dataset(cfg), torch.device("cpu"))
    next(loader.starting_at())
    loader.bad_images.settle()
    assert {Path(path).name for path in loader.bad_images.reasons} == {"002.png"}
    assert "not a known image format" in (Path(cfg.train.output_dir) / "bad_images.csv").read_text()


def test_a_balance_is_kept_when_a_run_goes_on_with_more_processes(config, monkeypatch):
    cfg = config(8, "train.balance.weights={all:3,few:1}", "train.batch_size_per_gpu=4")
    lists = next(iter(Path(cfg.train.dataset_path.split("root=")[1].split(":shuffle")[0]).glob("all.txt"))).parent
    (lists / "few.txt").write_text("images/000.png\n")
    whole = batches(cfg, 0, 3)
    assert not torch.equal(whole[0]["collated_global_crops"], batches(config(8), 0, 1)[0]["collated_global_crops"])
    half = config(8, "train.balance.weights={all:3,few:1}", "train.batch_size_per_gpu=2", world_size=2)
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        (ours,) = batches(half, 2, 1)
        expected = by_image(whole[2], "collated_global_crops")[rank::2]
        torch.testing.assert_close(by_image(ours, "collated_global_crops"), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.balance.weights={none:2}", "no set is called 'none'; the sets here are all"),
        ("train.balance.weights={all:-1}", "train.balance.weights must be at least 0, found {'all': -1.0}"),
        ("train.balance.weights={all:.nan}", "train.balance.weights must be at least 0, found {'all': nan}"),
        ("train.balance.weights={all:0}", "every set that has images has weight 0"),
        ("train.balance.weights={all:much}", "must be a mapping like {bmc: 0.5"),
        ("train.balance.weights=2", "must be a mapping like {bmc: 0.5"),
        ("train.balance.temperature=0", "0.0 is not above 0"),
        ("train.balance.temperature=.nan", "must be at least 0, found nan"),
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
def test_a_step_keeps_its_images_however_many_processes_there_are(given, world_size, settled):
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


def test_workers_draw_the_masks(config, monkeypatch):
    def full_in_a_worker(generator, n_patches, rng):
        return np.full(generator.get_shape(), get_worker_info() is not None)

    monkeypatch.setattr(MaskingGenerator, "__call__", full_in_a_worker)
    (batch,) = batches(config(8, "train.num_workers=2"), 0, 1)
    masked = batch["collated_masks"].sum(dim=1)
    assert sorted(set(masked.tolist())) == [0, batch["collated_masks"].shape[1]]


def test_tensors_are_contiguous_before_their_copy_to_the_device(config, monkeypatch):
    """A strided one would reach a GPU through pageable memory, and the host would wait for it."""
    to, strided, n_copied = torch.Tensor.to, [], 0

    def copied(tensor, *arguments, **settings):
        nonlocal n_copied
        if arguments[0] == torch.device("cpu"):
            n_copied += 1
            strided.extend([] if tensor.is_contiguous() else [tensor.shape])
        return to(tensor, *arguments, **settings)

    monkeypatch.setattr(torch.Tensor, "to", copied)
    batches(config(8), 0, 1)
    assert not strided
    assert n_copied >= 6


def test_a_data_set_of_another_centre_than_the_networks_is_refused(configured, image_list):
    dataset = f"train.dataset_path=HemaStandardDataset:root={image_list(2)}"
    assert build_dataset(configured(dataset, "train.center_crop=0.5")).center_crop == 0.5
    assert build_dataset(configured(f"{dataset}:center_crop=0.5", "train.center_crop=0.5")).center_crop == 0.5
    with pytest.raises(
        ValueError, match=r"center_crop=0\.5 and train\.center_crop is 1\.0; set train\.center_crop alone"
    ):
        build_dataset(configured(f"{dataset}:center_crop=0.5"))

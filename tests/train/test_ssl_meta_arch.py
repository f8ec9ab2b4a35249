"""What the networks are set up with, and statistics of a step; losses are in test_golden_steps.py."""

import pytest
import torch

from dinov2.train import ssl_meta_arch
from dinov2.train.batches import TrainBatches, build_dataset, resolve_batch_size
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.config import load_run_config


@pytest.fixture
def make(image_list, tiny_overrides):
    """Configuration and networks of a tiny run."""
    folder = image_list()

    def build(*overrides):
        cfg = load_run_config(None, tiny_overrides(folder, *overrides), lambda cfg: resolve_batch_size(cfg.train, 1))
        return cfg, SSLMetaArch(cfg)

    return build


def test_all_networks_of_a_strategy_share_one_mesh(make, monkeypatch):
    """Each mesh of HYBRID_SHARD has process groups of its own, and each group its communicator and buffers."""
    networks = [
        f"compute_precision.{role}.{name}" for role in ("student", "teacher") for name in ("backbone", "dino_head")
    ]
    _, model = make(*(f"{network}.sharding_strategy=HYBRID_SHARD" for network in networks))
    made, used = [], []
    monkeypatch.setattr(ssl_meta_arch, "is_enabled", lambda: True)
    monkeypatch.setattr(ssl_meta_arch, "make_mesh", lambda *_, **__: made.append(object()) or made[-1])
    monkeypatch.setattr(ssl_meta_arch, "shard", lambda *_, mesh, **__: used.append(mesh))
    model.prepare_for_distributed_training(n_nodes=2)
    assert len(made) == 1
    assert used == made * len(networks)


@pytest.mark.parametrize("is_logged", [True, False])
def test_targets_of_patches_are_searched_for_prototypes_only_when_asked(make, is_logged):
    cfg, model = make()
    (images,) = next(TrainBatches(cfg, build_dataset(cfg), torch.device("cpu")).starting_at())
    model.counts_patch_prototypes = is_logged
    model.forward_backward(images, teacher_temp=0.07)
    assert ("patch_prototype_use" in model.statistics) == is_logged
    assert "prototype_use" in model.statistics

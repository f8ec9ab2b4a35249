"""What the networks are set up with, and statistics of a step; losses are in test_golden_steps.py."""

import pytest
import torch

from dinov2.loss import SIGRegLoss
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


def test_without_targets_neither_heads_nor_the_teacher_are_used(make, lejepa_alone):
    cfg, model = make(*lejepa_alone)
    assert set(model.student) == set(model.teacher) == {"backbone", "lejepa_head"}
    assert not hasattr(model, "dino_loss")
    model.teacher["backbone"].register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    (images,) = next(TrainBatches(cfg, build_dataset(cfg), torch.device("cpu")).starting_at())
    losses = model.forward_backward(images, teacher_temp=0.07)
    assert set(losses) == {"invariance_loss", "sigreg_loss"}
    assert set(model.statistics) == {"effective_rank", "feature_spread"}
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.student["lejepa_head"].parameters())


@pytest.mark.parametrize("n_local_crops", [0, 2])
def test_lejepa_is_the_distance_to_the_mean_of_global_views_and_sigreg_of_each_view(make, lejepa_alone, n_local_crops):
    cfg, model = make(*lejepa_alone, f"crops.local_crops_number={n_local_crops}", "student.drop_path_rate=0")
    (images,) = next(TrainBatches(cfg, build_dataset(cfg), torch.device("cpu")).starting_at())
    losses = model.forward_backward(images, teacher_temp=0.07)
    crops = [*images["collated_global_crops"].chunk(2)]
    crops += images["collated_local_crops"].chunk(n_local_crops) if n_local_crops else []
    tokens = torch.cat([model.student["backbone"](view) for view in crops])
    views = model.student["lejepa_head"](tokens).unflatten(0, (-1, 4))
    centres = (views[0] + views[1]) / 2
    distances = torch.stack([torch.nn.functional.mse_loss(view, centres) for view in views])
    torch.testing.assert_close(losses["invariance_loss"], distances.mean())
    sigreg = SIGRegLoss()
    each = [sigreg(view[None], images["slices_seed"]) for view in views]
    torch.testing.assert_close(losses["sigreg_loss"], torch.stack(each).mean())


def test_slices_are_those_of_the_step_on_every_rank_and_micro_batch(make, lejepa_alone, monkeypatch):
    seeds = []
    for rank in (0, 1):
        monkeypatch.setattr("dinov2.train.batches.get_rank", lambda rank=rank: rank)
        cfg, _ = make(*lejepa_alone, "train.accumulation_steps=2")
        batches = TrainBatches(cfg, build_dataset(cfg), torch.device("cpu")).starting_at(batch_number=3)
        seeds.append([[images["slices_seed"] for images in next(batches)] for _ in range(2)])
    assert seeds[0] == seeds[1]
    assert [len({*step}) for step in seeds[0]] == [1, 1]
    assert seeds[0][0] != seeds[0][1]


@pytest.fixture
def guided(configured, image_list):
    """Networks and a batch of images of three lists, whose names are the values; the image at 1 has none."""
    lists = image_list()
    names = (lists / "all.txt").read_text().split()
    (lists / "all.txt").unlink()
    for i, name in enumerate("abc"):
        (lists / f"{name}.txt").write_text("\n".join(names[i::3]))

    def make(*overrides):
        cfg = configured("train.metadata.column=dataset", "student.drop_path_rate=0", *overrides, lists=lists)
        dataset = build_dataset(cfg)
        torch.manual_seed(0)
        model = SSLMetaArch(cfg)
        (images,) = next(TrainBatches(cfg, dataset, torch.device("cpu")).starting_at())
        images["metadata"][1] = -1
        return model, images

    return make


@pytest.mark.parametrize("objective", ["lejepa", "dino"])
def test_metadata_guides_the_crops_with_a_known_value(guided, lejepa_alone, objective):
    model, images = guided(*(lejepa_alone if objective == "lejepa" else []))
    first = model.forward_backward(images, teacher_temp=0.07)
    assert first["metadata_loss"] == 0  # no value has a prototype yet
    model.update_teacher(1.0)
    loss = model.forward_backward(images, teacher_temp=0.07)["metadata_loss"]
    tokens = model.student["backbone"](images["collated_global_crops"], images["collated_masks"])
    rows = torch.nn.functional.normalize(model.student["metadata_head"](tokens), dim=1)  # its norm sees all crops
    values = images["metadata"].repeat(2)
    bank = torch.nn.functional.normalize(model.metadata_loss.prototypes, dim=1)
    known = values >= 0
    seen = torch.unique(values[known])
    logits = (rows[known] @ bank[seen].T) / 0.1
    expected = torch.nn.functional.cross_entropy(logits, torch.searchsorted(seen, values[known]))
    torch.testing.assert_close(loss, expected)
    assert "metadata_head" not in model.teacher


def test_suppression_reverses_the_backbones_gradient_and_not_the_heads(guided, lejepa_alone):
    gradients = {}
    for mode in ("suppress", "encourage"):
        # a weight that leaves the other terms no share in the digits
        settings = [f"train.metadata.mode={mode}", "train.metadata.weight=1e6", "student.layerscale=1.0"]
        model, images = guided(*lejepa_alone, *settings)
        model.forward_backward(images, teacher_temp=0.07)
        model.update_teacher(1.0)
        model.zero_grad()
        model.forward_backward(images, teacher_temp=0.07)
        backbone = model.student["backbone"].blocks[-1].mlp.fc2.weight.grad
        gradients[mode] = backbone, model.student["metadata_head"].fc1.weight.grad
    torch.testing.assert_close(gradients["suppress"][0], -gradients["encourage"][0], rtol=1e-3, atol=1.0)
    assert gradients["suppress"][0].abs().max() > 1000
    torch.testing.assert_close(gradients["suppress"][1], gradients["encourage"][1])


def test_the_head_that_finds_the_value_learns_faster_than_the_backbone(guided, lejepa_alone):
    model, _ = guided(*lejepa_alone)
    mine = {id(parameter) for parameter in model.student["metadata_head"].parameters()}
    factors = {
        name: {
            group["lr_multiplier"]
            for group in model.get_params_groups()
            for parameter in group["params"]
            if (id(parameter) in mine) == (name == "head")
        }
        for name in ("head", "rest")
    }
    assert min(factors["head"]) > max(factors["rest"])


def test_guidance_leaves_all_other_initial_weights_as_they_are(guided, configured):
    model, _ = guided()
    torch.manual_seed(0)
    plain = SSLMetaArch(configured("student.drop_path_rate=0")).state_dict()
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.items())
    assert {name.split(".")[1] for name in state.keys() - plain.keys()} == {"metadata_head", "prototypes"}

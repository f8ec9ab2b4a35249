"""Fine-tuning of a classifier against plain PyTorch, stopped and continued, and what learns in each mode."""

import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight

from dinov2.data.augmentations import SupervisedAugmentation
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from dinov2.eval.features.encoders import DinoEncoder
from dinov2.eval.solvers import finetuning
from dinov2.eval.solvers.finetuning import (
    LabelledImages,
    Machine,
    TrainingSettings,
    class_weights,
    default_epochs,
    epoch_order,
    fine_tune,
    lr_factor,
    mix_images,
    training_loss,
)
from dinov2.eval.solvers.image_classifier import ImageClassifier
from dinov2.models import build_backbone
from dinov2.utils.command import StoppedError
from dinov2.utils.numerics import derive_seed

NAMES = ["basophil", "eosinophil", "lymphocyte"]
CPU = Machine()
# without what is random in a step, and without averages
PLAIN = TrainingSettings(epochs=1, batch_size=8, drop_path=0.0, ema=0.0, balance="none", warmup=0.0)


@pytest.fixture
def images(tmp_path, draw_cells):
    """12 training images and 6 validation images of three classes."""
    files = sorted(draw_cells(tmp_path / "cells", 6, seed=0).rglob("*.png"))
    labels = np.array([NAMES.index(file.parent.name) for file in files])
    is_validation = np.arange(len(files)) % 6 >= 4
    sides = [np.flatnonzero(~is_validation), np.flatnonzero(is_validation)]
    return [LabelledImages([str(files[i]) for i in side], labels[side]) for side in sides]


def make_model(kind="cls", seed=0, n_classes=3):
    torch.manual_seed(seed)
    settings = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 14, "img_size": 28, "layerscale": 1.0}
    return ImageClassifier(DinoEncoder(build_backbone({**settings, "block_chunks": 0}), 28), kind, NAMES[:n_classes])


def plain_batch(train, positions, seed):
    """The normalised images of the first step, made one by one."""
    made = []
    for number, i in enumerate(positions):
        image = np.asarray(Image.open(train.paths[i]).convert("RGB"))
        crop = SupervisedAugmentation(28)(image, random.Random(derive_seed(seed, "crop", number)))
        made.append((crop / 255 - IMAGENET_MEAN) / IMAGENET_STD)
    return torch.from_numpy(np.stack(made)).float().permute(0, 3, 1, 2)


def depth_from_end(name):
    """0 for the classifier and the norm, 1 for the last of three blocks, 4 for the embeddings."""
    if "blocks" in name:
        return 3 - int(name.split(".")[2])
    return 0 if "head" in name or "network.norm" in name else 4


@pytest.mark.parametrize("kind", ["cls", "cls+mean"])
@pytest.mark.parametrize(
    ("accumulate", "balance"), [(1, "none"), (2, "loss")], ids=["one forward", "two forwards, weighted"]
)
def test_a_step_is_that_of_plain_pytorch(images, kind, accumulate, balance):
    train, validation = images
    train = LabelledImages(train.paths[:10], train.labels[:10])  # 4, 4 and 2 of the classes
    settings = replace(PLAIN, batch_size=8 // accumulate, accumulate=accumulate, balance=balance, layer_decay=0.5)
    training = finetuning._Training(make_model(kind), train, validation, settings, 3, CPU)
    gradients = {}
    make_step = training.optimizer.step

    def step():
        gradients.update({name: p.grad.clone() for name, p in training.model.named_parameters() if p.grad is not None})
        make_step()

    training.optimizer.step = step
    training._train_step(*next(training._batches()))

    model = make_model(kind)
    order = epoch_order(train.labels, "none", 3, 0)[:8]
    tokens = model.network.forward_features(plain_batch(train, order, 3))
    features = {"cls": tokens["x_norm_clstoken"]}
    features["cls+mean"] = torch.cat([features["cls"], tokens["x_norm_patchtokens"].mean(dim=1)], dim=1)
    logits = features[kind] @ model.head.weight.T + model.head.bias
    labels = torch.from_numpy(train.labels[order])
    targets = F.one_hot(labels, 3) * 0.9 + 0.1 / 3  # smoothed
    if balance == "loss":
        targets = targets * torch.tensor([10 / (3 * 4), 10 / (3 * 4), 10 / (3 * 2)])
    loss = -(targets * logits.log_softmax(dim=1)).sum() / 8
    loss.backward()
    assert float(training.epoch_loss) == pytest.approx(loss.item(), abs=1e-6)
    named = dict(model.named_parameters())
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in named.values() if p.grad is not None))
    for name, gradient in gradients.items():
        expected = named[name].grad * min(1, 1 / (norm + 1e-6))
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)
        rate = 3e-3 if name.startswith("head") else 3e-4 * 0.5 ** depth_from_end(name)
        decay = 0.05 if named[name].ndim > 1 else 0.0
        # Adam's first step: moments are corrected to the gradient and its square
        expected = named[name] * (1 - rate * decay) - rate * expected / (expected.abs() + 1e-8)
        is_steep = gradient.abs() > 1e-5  # below, rounding of the gradient decides the step
        after = dict(training.model.named_parameters())[name]
        torch.testing.assert_close(after[is_steep], expected[is_steep], atol=1e-6, rtol=0)
    assert gradients.keys() == {name for name in named if not name.endswith("mask_token")}


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_stopped_training_continues_bit_for_bit(images, tmp_path, monkeypatch, mode):
    settings = TrainingSettings(mode, epochs=5, batch_size=4, drop_path=0.3, mix="mixup", lora_rank=2, patience=0)
    whole, history, best = fine_tune(make_model(), *images, settings, 5, CPU)
    file, n_steps = tmp_path / "state.pth", []
    for _ in range(10):
        n_left = iter([False, False, False, True])  # a signal arrives in the fourth step of each start
        monkeypatch.setattr(finetuning, "any_rank", lambda condition, left=n_left: next(left))
        try:
            again, history_again, best_again = fine_tune(make_model(), *images, settings, 5, CPU, file)
        except StoppedError as stopped:
            n_steps.append(str(stopped))
            assert file.exists()
        else:
            break
    assert ["after step 4 of 15" in n_steps[0], "after step 8 of 15" in n_steps[1]] == [True, True]
    assert (history_again, best_again) == (history, best)
    at_the_end, _, _ = fine_tune(make_model(), *images, settings, 5, CPU, file)  # makes no step
    assert torch.equal(at_the_end.head.weight, again.head.weight)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_state_of_another_training_is_refused(images, tmp_path):
    file = tmp_path / "state.pth"
    torch.save({"step": 1, "model": {}}, file)
    with pytest.raises(ValueError, match="state.pth: not the state of this training"):
        fine_tune(make_model(), *images, PLAIN, 0, CPU, file)
    file.write_bytes(b"PK")
    with pytest.raises(ValueError, match="damaged or cut short"):
        fine_tune(make_model(), *images, PLAIN, 0, CPU, file)


@pytest.mark.parametrize(
    ("mode", "learned"),
    [
        ("full", {"cls_token", "pos_embed", "patch_embed", "blocks.0", "blocks.1", "blocks.2", "norm"}),
        ("last-n", {"blocks.1", "blocks.2", "norm"}),
        ("lora", {"blocks.0", "blocks.1", "blocks.2"}),
        ("head", set()),
    ],
)
def test_only_what_a_mode_names_changes(images, mode, learned):
    before = make_model().network.state_dict()
    settings = TrainingSettings(mode, epochs=2, batch_size=6, lora_rank=2, ema=0.5)
    model, _, _ = fine_tune(make_model(), *images, settings, 0, CPU)
    after = model.content()["model"]
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {".".join(name.split(".")[: 1 + name.startswith("blocks")]) for name in changed} == learned
    if mode == "lora":
        assert {name.split(".", 2)[2] for name in changed} == {"attn.qkv.weight", "attn.proj.weight"}
    assert not torch.equal(model.head.weight, make_model().head.weight)


def test_the_best_epoch_is_kept_and_patience_ends_the_training(images, monkeypatch):
    scores = iter([0.5, 0.9, 0.9, 0.2, 0.1, 0.1, 0.1])
    losses = iter([1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(
        finetuning, "classification_metrics", lambda *_: {"macro_f1": next(scores), "log_loss": next(losses)}
    )
    weights = []
    end = finetuning._Training._end_epoch

    def record(training):
        end(training)
        weights.append(training.averaged().head.weight.clone())

    monkeypatch.setattr(finetuning._Training, "_end_epoch", record)
    model, history, best = fine_tune(make_model(), *images, replace(PLAIN, epochs=20, patience=3), 0, CPU)
    assert (len(history), best) == (
        5,
        1,
    )  # of equal scores the one with the lower loss; three more without a better one
    assert torch.equal(model.head.weight, weights[1])


def test_without_validation_the_last_weights_are_kept(images):
    nothing = LabelledImages([], np.empty(0, dtype=np.int64))
    model, history, best = fine_tune(make_model(), images[0], nothing, replace(PLAIN, epochs=3, patience=1), 0, CPU)
    assert (len(history), best) == (3, 2)
    assert history[0].val_loss is None
    assert history[2].train_loss < history[0].train_loss


def test_averaged_weights_follow_their_formula(images):
    settings = replace(PLAIN, epochs=3, batch_size=12, ema=0.9)
    training = finetuning._Training(make_model(), *images, settings, 0, CPU)
    weights = []
    for batch in training._batches():
        training._train_step(*batch)
        weights.append(training.model.head.weight.detach().clone())
    expected = make_model().head.weight
    for decay, weight in zip((1 / 10, 2 / 11, 3 / 12), weights, strict=True):  # n / (9 + n), until that exceeds 0.9
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(training.averaged().head.weight, expected)


def test_a_loss_that_is_not_finite_ends_the_training(images):
    model = make_model()
    model.head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"the loss is nan after step 1: lower --lr \(now 0.0003\)"):
        fine_tune(model, *images, PLAIN, 0, CPU)


def test_an_image_that_vanished_is_named(images):
    train, validation = images
    gone = LabelledImages([*train.paths[:-1], "/nowhere/cell.png"], train.labels)
    with pytest.raises(ValueError, match="/nowhere/cell.png.*put it back"):
        fine_tune(make_model(), gone, validation, replace(PLAIN, batch_size=12), 0, CPU)


def test_orders_and_weights():
    labels = np.repeat([0, 1, 2], [900, 90, 10])
    order = epoch_order(labels, "none", 0, 0)
    assert sorted(order) == list(range(1000))
    assert not np.array_equal(order, epoch_order(labels, "none", 0, 1))
    drawn = Counter(labels[epoch_order(labels, "sampling", 0, 0)].tolist())
    assert all(drawn[label] == pytest.approx(333, abs=60) for label in range(3))
    weights = class_weights(labels, 3, "loss")
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert class_weights(labels, 3, "sampling") is None
    weights = class_weights(np.array([0, 0, 2]), 4, "loss")  # classes 1 and 3 have no image
    np.testing.assert_allclose(
        weights[[0, 2]], compute_class_weight("balanced", classes=np.array([0, 2]), y=[0, 0, 2]), rtol=1e-6
    )


def test_schedules():
    assert [default_epochs(n) for n in (3, 200, 2000, 20_000, 10**6)] == [100, 60, 24, 10, 5]
    factors = [lr_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[99] < 1e-3


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_mixed_images_have_the_targets_of_their_parts(mix):
    torch.manual_seed(0)
    levels = torch.tensor([0, 100, 200], dtype=torch.uint8)  # the images of class i are of one level
    labels = torch.arange(3).repeat(8)
    mixed, targets = mix_images(levels[labels].view(-1, 1, 1, 1).expand(-1, 3, 32, 32), labels, 3, mix)
    assert mixed.dtype == torch.uint8
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(24))
    assert len(targets.unique()) > 2
    expected = targets @ levels.float()
    torch.testing.assert_close(mixed.float().mean(dim=(1, 2, 3)), expected, atol=1.0, rtol=0)


def test_the_loss_is_a_mean_over_all_images_of_a_step():
    logits, targets = torch.randn(6, 3), F.one_hot(torch.arange(6) % 3, 3).float()
    parts = [training_loss(logits[part], targets[part], 6, 0.1) for part in (slice(0, 2), slice(2, 6))]
    expected = F.cross_entropy(logits, torch.arange(6) % 3, label_smoothing=0.1)
    torch.testing.assert_close(sum(parts), expected)

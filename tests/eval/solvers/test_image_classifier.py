"""A classifier on an encoder: its file in all modes, its start from another one, views, and layers of networks."""

import numpy as np
import pytest
import torch

from dinov2.eval.features.encoders import DinoEncoder
from dinov2.eval.features.named_encoders import build_encoder
from dinov2.eval.solvers.finetuning import LabelledImages, Machine, TrainingSettings, fine_tune
from dinov2.eval.solvers.image_classifier import (
    ImageClassifier,
    dihedral_views,
    layers_from_end,
    load_classifier,
    predict_images,
)
from dinov2.hub.classifiers import Classifier, read_classifier
from dinov2.models import build_backbone

NAMES = ["basophil", "eosinophil", "lymphocyte"]


def own_encoder(**settings):
    torch.manual_seed(0)
    default = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 14, "img_size": 28, "layerscale": 1.0}
    return DinoEncoder(build_backbone({**default, "block_chunks": 0, **settings}), 28)


def timm_encoder(name="resnet18"):
    return build_encoder(f"timm:{name}", 32, "untrained")


@pytest.fixture
def images(tmp_path, draw_cells):
    files = sorted(draw_cells(tmp_path / "cells", 4, seed=0).rglob("*.png"))
    labels = np.array([NAMES.index(file.parent.name) for file in files])
    return LabelledImages([str(file) for file in files], labels)


@pytest.mark.parametrize(
    ("encoder", "mode", "kind"),
    [(own_encoder, "full", "cls+mean"), (own_encoder, "lora", "mean"), (timm_encoder, "full", "cls")],
    ids=["whole network", "adapters", "timm"],
)
def test_a_written_classifier_is_the_trained_one(images, tmp_path, encoder, mode, kind):
    torch.manual_seed(0)
    settings = TrainingSettings(mode, epochs=4, batch_size=4, lora_rank=4, lr=3e-3, patience=0)
    nothing = LabelledImages([], np.empty(0, dtype=np.int64))
    model, _, _ = fine_tune(ImageClassifier(encoder(), kind, NAMES), images, nothing, settings, 0, Machine())
    torch.save(model.content(), tmp_path / "finetuned.pth")
    loaded = load_classifier(tmp_path / "finetuned.pth")
    assert (loaded.class_names, loaded.kind, loaded.encoder.image_size) == (NAMES, kind, model.encoder.image_size)
    with torch.no_grad():
        prepared = torch.stack([model.encoder.preparation(np.full((30, 30, 3), level, np.uint8)) for level in (0, 99)])
        torch.testing.assert_close(loaded(prepared), model(prepared), atol=1e-5, rtol=0)
        untrained = ImageClassifier(encoder(), kind, NAMES)
        assert (loaded(prepared) - untrained(prepared)).abs().max() > 1e-3
    ours = predict_images(model, images.paths, progress=False)
    np.testing.assert_allclose(predict_images(loaded, images.paths, progress=False), ours, atol=1e-5)
    np.testing.assert_allclose(ours.sum(axis=1), 1)


def test_a_classifier_starts_from_one_with_its_classes_in_another_order():
    weight, bias = torch.arange(96.0).view(3, 32), torch.tensor([1.0, 2.0, 3.0])
    classifier = Classifier(weight, bias, ["lymphocyte", "basophil", "eosinophil"], "cls")
    model = ImageClassifier(own_encoder(), "cls", NAMES[:2])
    model.start_head(classifier, "a.pth")
    assert torch.equal(model.head.weight, weight[1:])
    assert model.head.bias.tolist() == [2, 3]
    more = ImageClassifier(own_encoder(), "cls", [*NAMES, "blast"])
    with pytest.raises(ValueError, match=r"a\.pth: its classifier has 3 classes and lacks 'blast'; pass --new-head"):
        more.start_head(classifier, "a.pth")
    with pytest.raises(ValueError, match="features of kind cls; pass --kinds cls, or --new-head"):
        ImageClassifier(own_encoder(), "mean", NAMES).start_head(classifier, "a.pth")


def test_whitened_features_change_no_logit():
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(500, 32)) @ rng.normal(size=(32, 32)) + 3).astype(np.float32)
    model = ImageClassifier(own_encoder(), "cls", NAMES)
    model.whiten(features)
    with torch.no_grad():
        white = (torch.from_numpy(features) - model.centre) @ model.whitening
        torch.testing.assert_close(white.mean(dim=0), torch.zeros(32), atol=1e-3, rtol=0)
        before, after = (torch.linalg.eigvalsh(x.T.cov()) for x in (torch.from_numpy(features), white))  # ascending
        assert after[-1] == pytest.approx(1, abs=0.2)
        assert after[-1] / after[8] < 2 < before[-1] / before[8] / 5  # the smallest ones are shrunk, not amplified
        weight = torch.from_numpy(rng.normal(size=(3, 32))).float()
        model.start_head(Classifier(weight, torch.tensor([1.0, 2.0, 3.0]), NAMES, "cls"), "a.pth")
        expected = torch.from_numpy(features) @ weight.T + torch.tensor([1.0, 2.0, 3.0])
        torch.testing.assert_close(model.logits(torch.from_numpy(features)), expected, atol=1e-3, rtol=1e-4)
        model.fold_whitening()
        torch.testing.assert_close(model.head.weight, weight, atol=1e-4, rtol=1e-4)
        assert torch.equal(model.whitening, torch.eye(32))
        few = ImageClassifier(own_encoder(), "cls", NAMES)
        few.whiten(features[:4])  # fewer images than features
        assert few.whitening.isfinite().all()


def test_eight_views_and_their_mean(images):
    image = torch.arange(16.0).view(1, 1, 4, 4)
    views = list(dihedral_views(image))
    assert torch.equal(views[0], image)
    assert len({tuple(view.flatten().tolist()) for view in views}) == 8
    model = ImageClassifier(own_encoder(), "cls", NAMES)
    torch.nn.init.normal_(model.head.weight)
    batch = torch.randint(256, (2, 3, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        expected = sum(model(view).softmax(dim=1) for view in dihedral_views(batch)) / 8
        turned = sum(model(view).softmax(dim=1) for view in dihedral_views(batch.rot90(1, (2, 3)))) / 8
    torch.testing.assert_close(turned, expected)
    plain = predict_images(model, images.paths, progress=False)
    of_views = predict_images(model, images.paths, with_views=True, progress=False)
    assert np.abs(plain - of_views).max() > 1e-4


def test_an_image_that_cannot_be_read_is_named(images, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 can no longer be read, for instance '.*broken.png'"):
        predict_images(ImageClassifier(own_encoder(), "cls", NAMES), [*images.paths, str(tmp_path / "broken.png")])


def test_layers_count_from_the_end():
    depths = layers_from_end(own_encoder(block_chunks=2).network)
    assert depths["norm.weight"] == 0
    assert {depths[name] for name in depths if name.startswith("blocks.1.1")} == {1}
    assert {depths[name] for name in depths if name.startswith("blocks.0.0")} == {2}
    assert depths["patch_embed.proj.bias"] == depths["pos_embed"] == 3
    depths = layers_from_end(timm_encoder("vit_tiny_patch16_224").network)
    assert (depths["norm.weight"], depths["blocks.11.mlp.fc1.weight"], depths["blocks.0.norm1.bias"]) == (1, 1, 12)
    assert depths["cls_token"] == 13
    depths = layers_from_end(timm_encoder().network)
    assert depths["conv1.weight"] == max(depths.values()) > depths["layer4.1.conv2.weight"] == 1


def test_batch_norms_of_frozen_layers_do_not_change(images):
    model = ImageClassifier(timm_encoder(), "cls", NAMES)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    settings = TrainingSettings("last-n", last_blocks=1, epochs=1, batch_size=6, ema=0.0)
    nothing = LabelledImages([], np.empty(0, dtype=np.int64))
    model, _, _ = fine_tune(model, images, nothing, settings, 0, Machine())
    changed = {name for name, value in model.network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("layer4") for name in changed)


def test_what_cannot_learn_is_refused():
    with pytest.raises(ValueError, match="histogram: only a --checkpoint or a timm:<model> can learn"):
        ImageClassifier(build_encoder("histogram"), "cls", NAMES)
    with pytest.raises(ValueError, match="--kinds last4: a classifier takes one of cls, mean, cls\\+mean"):
        ImageClassifier(own_encoder(), "last4", NAMES)
    with pytest.raises(ValueError, match="--kinds mean: timm:resnet18 has only cls"):
        ImageClassifier(timm_encoder(), "mean", NAMES)
    with pytest.raises(ValueError, match="--mode lora: timm:resnet18 has no attention"):
        ImageClassifier(timm_encoder(), "cls", NAMES).limit_learning("lora", 1, 2)
    with pytest.raises(ValueError, match="--last-blocks 3: the network has 2"):
        ImageClassifier(own_encoder(), "cls", NAMES).limit_learning("last-n", 3, 2)


def test_files_without_a_classifier_or_with_a_damaged_one(tmp_path):
    content = ImageClassifier(own_encoder(), "cls", NAMES).content()
    file = tmp_path / "network.pth"
    torch.save({"model": content["model"], "architecture": content["architecture"]}, file)
    assert read_classifier(file) is None
    with pytest.raises(ValueError, match=r"network\.pth: it has no classifier; finetune\.py writes a file with one"):
        load_classifier(file)
    good = content["classifier"]
    wrong = [
        {**good, "weight": good["weight"][:2]},
        {**good, "class_names": ["a", "a", "b"]},
        {**good, "kind": "last4"},
        {**good, "bias": torch.tensor([0.0, float("inf"), 0.0])},
        {name: value for name, value in good.items() if name != "bias"},
    ]
    for classifier in wrong:
        torch.save({**content, "classifier": classifier}, file)
        with pytest.raises(ValueError, match=r"network\.pth: its classifier is damaged"):
            load_classifier(file)
    torch.save({**content, "classifier": {**good, "weight": good["weight"][:, :8]}}, file)
    with pytest.raises(ValueError, match=r"does not fit its network: weight \[3, 8\] instead of \[3, 32\]"):
        load_classifier(file)

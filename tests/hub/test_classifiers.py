"""A fine-tuned network is read as any other, and its classifier only if it is whole and fits."""

import json

import numpy as np
import pytest
import torch

from dinov2.eval.cell_maps import main as map_cells
from dinov2.eval.features.extract import Embedder
from dinov2.hub import export_formats
from dinov2.hub.backbones import load_backbone, trained_image_size
from dinov2.hub.classifiers import Classifier, load_network, read_classifier
from dinov2.hub.sources import checkpoint_file
from dinov2.hub.weight_files import read_networks
from dinov2.models import architecture, build_backbone

TINY = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 14, "img_size": 56, "block_chunks": 0}
NAMES = ["blast", "lymphocyte", "smudge cell"]


@pytest.fixture
def write(formulas, tmp_path):
    """Writes what fine-tuning writes, with changes to the classifier; returns the backbone and the path."""

    def write(kind="cls", **changes):
        model = formulas.fill_(build_backbone(TINY), "classifiers").eval()
        n_features = 128 if kind == "cls+mean" else 64
        classifier = {
            "weight": formulas.sym("weight", (3, n_features), 0.3),
            "bias": formulas.sym("bias", (3,), 0.3),
            "class_names": NAMES,
            "kind": kind,
            **changes,
        }
        content = {"model": model.state_dict(), "architecture": architecture(model), "classifier": classifier}
        path = tmp_path / "finetuned.pth"
        torch.save({**content, "seen": torch.zeros(5, 16, dtype=torch.uint8)}, path)
        return model, path

    return write


@pytest.fixture
def cell(tmp_path):
    path = tmp_path / "cells" / "cell.png"
    path.parent.mkdir()
    export_formats.draw_cells()[0].save(path)
    return path


def test_a_fine_tuned_network_is_read_as_any_other(write, cell, tmp_path):
    model, path = write()
    loaded, stored = load_backbone(path), read_networks(path)
    assert loaded.state_dict().keys() == stored.backbone.keys() == model.state_dict().keys()
    assert (loaded.num_heads, trained_image_size(path), stored.heads) == (2, 56, {})  # heads and size as recorded
    expected = model(loaded.transform(cell)[None]).detach()
    np.testing.assert_allclose(Embedder(checkpoint=path).extract([cell]).features, expected, rtol=0, atol=1e-5)
    out = tmp_path / "maps"
    arguments = ["--checkpoint", str(path), "--output-dir", str(out), "--device", "cpu", "--no-occlusion"]
    map_cells([*arguments, "--pictures", str(cell)])
    assert (out / "attention.png").is_file()


@pytest.mark.parametrize("kind", ["cls", "mean", "cls+mean"])
def test_logits_are_linear_in_the_features_that_extraction_gives(kind, write, cell):
    _, path = write(kind)
    network = load_network(path)
    assert (network.classifier.class_names, network.classifier.kind) == (NAMES, kind)
    features = torch.from_numpy(Embedder(checkpoint=path, kinds=[kind]).extract([cell]).by_kind[kind]).float()
    tokens = network.backbone.forward_features(network.backbone.transform(cell)[None])
    logits = network.classifier.logits(tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"])
    expected = features @ network.classifier.weight.T + network.classifier.bias
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_other_files_have_no_classifier(write, tmp_path):
    model, _ = write()
    torch.save({"teacher": model.state_dict()}, tmp_path / "teacher.pth")
    for name in ("safetensors", "huggingface", "timm"):
        export_formats.FORMATS[name].write(load_network(tmp_path / "teacher.pth"), tmp_path)
    for source in ("teacher.pth", "backbone.safetensors", "huggingface", "timm"):
        assert read_classifier(checkpoint_file(tmp_path / source)) is None


def test_half_precision_and_transposed_weights_are_made_plain(write):
    weight = torch.arange(192.0).reshape(64, 3).T.half()
    _, path = write(weight=weight)
    classifier = read_classifier(path)
    assert classifier.weight.dtype == torch.float32
    assert classifier.weight.is_contiguous()  # safetensors writes no other ones
    torch.testing.assert_close(classifier.weight, weight.float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ["blast", "blast", "other"]}, "C different"),
        ({"class_names": ["blast"]}, "classifier is damaged"),
        ({"class_names": None}, "classifier is damaged"),
        ({"bias": torch.tensor([0.0, 1.0, float("nan")])}, "classifier is damaged"),
        ({"bias": "none"}, "classifier is damaged"),
        ({"kind": "patches"}, "a kind out of cls, mean"),
        ({"weight": torch.ones(3, 64).to_sparse()}, "classifier.weight is not dense"),
        ({"bias": torch.zeros(3, device="meta")}, "classifier.bias has a shape and no numbers"),
        ({"weight": torch.ones(3, 48)}, "takes 48 features, and the network has 64 of the kind cls"),
        ({"kind": "cls+mean", "weight": torch.ones(3, 64)}, "takes 64 features, and the network has 128"),
    ],
)
def test_a_damaged_classifier_is_refused_and_the_backbone_still_loads(changes, message, write):
    _, path = write(**changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_network(path)
    assert str(path) in str(caught.value)
    assert load_backbone(path).embed_dim == 64


def test_labels_of_a_folder_of_transformers_are_checked(write, tmp_path):
    _, path = write()
    export_formats.FORMATS["huggingface"].write(load_network(path), tmp_path)
    folder = tmp_path / "huggingface"
    config = folder / "config.json"
    known = json.loads(config.read_text())
    for labels in (None, ["blast"], {"0": "blast", "1": "blast", "2": "other"}, {"1": "a", "2": "b", "3": "c"}):
        config.write_text(json.dumps({**known, "id2label": labels}))
        with pytest.raises(ValueError, match="id2label of a Hugging Face folder"):
            load_network(folder)
    config.unlink()
    assert read_classifier(checkpoint_file(folder)) is None


def test_features_that_a_classifier_does_not_take_get_zeros():
    cls_token, patch_tokens = torch.randn(2, 8), torch.randn(2, 5, 8)
    both = torch.cat([cls_token, patch_tokens.mean(dim=1)], dim=1)
    for kind, n_features in (("cls", 8), ("mean", 8), ("cls+mean", 16)):
        classifier = Classifier(torch.randn(3, n_features), torch.randn(3), NAMES, kind)
        logits = classifier.logits(cls_token, patch_tokens)
        torch.testing.assert_close(both @ classifier.weight_of_both().T + classifier.bias, logits)

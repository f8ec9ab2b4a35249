"""A run with train.center_crop: training, evaluation and fine-tuning take the same part of each image."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.eval.cell_maps import make_cell_maps
from dinov2.eval.features.encoders import DinoEncoder
from dinov2.eval.features.extract import Embedder, extract
from dinov2.eval.solvers.finetuning import LabelledImages, _AugmentedImages
from dinov2.eval.solvers.image_classifier import ImageClassifier, load_classifier
from dinov2.hub.backbones import ImageTransform, load_backbone
from dinov2.models import architecture
from dinov2.train.train import main

SHARE, SIDE, START = 0.65, 26, 7  # of images of 40 px
N = 20


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Cells on a plain ground, of two classes, and beside them what lies outside of the centre; the same cells, cut."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(N):
        whole = np.full((40, 40, 3), 220, np.uint8)
        whole[16:24, 16:24] = rng.integers(0, 120, (8, 8, 3)) + 15 * (i % 2)
        whole[:2], whole[:, :2] = rng.integers(0, 255, (2, 40, 3)), rng.integers(0, 255, (40, 2, 3))
        part = whole[START : START + SIDE, START : START + SIDE]
        for name, pixels in (("whole", whole), ("cut", part)):
            path = folder / name / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return folder


def paths(images, name: str) -> list:
    return sorted((images / name).rglob("*.png"))


@pytest.fixture(scope="module")
def train(images, tmp_path_factory, make_tiny_overrides):
    folder = tmp_path_factory.mktemp("runs")

    def go(name: str, data: str, *overrides: str):
        settings = [
            *make_tiny_overrides(images / data, *overrides, "student.layerscale=1"),
            f"evaluation.datasets=[{{name: cells, data: {images / data}}}]",
            *("evaluation.knn_k=[3]", "evaluation.eval_period_iterations=4"),
        ]
        assert main(["--output-dir", str(folder), "--name", name, *settings]) == 0
        return folder / name

    return go


@pytest.fixture(scope="module")
def run(train):
    return train("centre", "whole", f"train.center_crop={SHARE}")


@pytest.fixture(scope="module")
def without(run, tmp_path_factory):
    """The run's teacher without its share."""
    content = torch.load(next(run.glob("eval/training_*/teacher_checkpoint.pth")), weights_only=True)
    assert content["architecture"].pop("center_crop") == SHARE
    file = tmp_path_factory.mktemp("without") / "teacher_checkpoint.pth"
    torch.save(content, file)
    return file


def numbers(run, name: str):
    rows = [json.loads(line) for line in (run / "training_metrics.json").read_text().splitlines()]
    results = json.loads(next(run.glob("eval/training_*/results.json")).read_text())
    return [row["total_loss"] for row in rows], results["datasets"]


def test_training_and_its_evaluation_are_those_on_images_cut_before(run, train):
    assert numbers(run, "centre") == numbers(train("cut", "cut"), "cut")
    assert numbers(run, "centre") != numbers(train("whole", "whole"), "whole")


def test_every_way_to_features_cuts_the_images(run, without, images):
    plain = load_backbone(without)
    expected = extract(plain, paths(images, "cut")).features
    assert not np.allclose(extract(plain, paths(images, "whole")).features, expected, atol=1e-4)
    for source in (run, run / "checkpoints", next(run.glob("eval/training_*/teacher_checkpoint.pth"))):
        model = load_backbone(source)
        assert (architecture(model)["center_crop"], model.transform) == (SHARE, ImageTransform(28, SHARE))
        embedder = Embedder(checkpoint=source)
        assert embedder.identity["transform"] == str(model.transform) == embedder.encoder.transform
        assert "0.65" in str(model.transform)
        for features in (
            extract(model, paths(images, "whole")).features,
            embedder.extract(paths(images, "whole")).features,
            model(torch.stack([model.transform(path) for path in paths(images, "whole")])).detach().numpy(),
        ):
            np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5)
        maps = make_cell_maps(model, paths(images, "whole")[:2], 28, with_occlusion=False)
        cut = make_cell_maps(plain, paths(images, "cut")[:2], 28, with_occlusion=False)
        np.testing.assert_array_equal(maps.images, cut.images)


def test_fine_tuning_augments_the_centre_and_its_file_keeps_the_share(run, without, images, tmp_path):
    labels = np.repeat([0, 1], N // 2)
    crops = {}
    for name, source in (("whole", run), ("cut", without)):
        model = ImageClassifier(DinoEncoder(load_backbone(source), 28), "cls", ["a", "b"])
        data = LabelledImages([str(path) for path in paths(images, name)], labels)
        crops[name], _ = _AugmentedImages(data, model, seed=3)[[(i, i) for i in range(N)]]
        torch.save(model.content(), tmp_path / f"{name}.pth")
    assert torch.equal(crops["whole"], crops["cut"])
    assert load_classifier(tmp_path / "whole.pth").encoder.transform == str(ImageTransform(28, SHARE))
    assert load_classifier(tmp_path / "cut.pth").encoder.transform == str(ImageTransform(28))


def test_a_run_from_a_network_of_another_share_warns(run, train):
    for share, warns in ((SHARE, False), (0.8, True)):
        weights = f"student.pretrained_weights={run}"
        started = train(f"from-{share}", "whole", weights, f"train.center_crop={share}", "optim.epochs=1")
        log = (started / "logs" / "log.txt").read_text()
        assert ("was trained with train.center_crop=0.65, and this run has 0.8" in log) is warns
        assert load_backbone(started).center_crop == share

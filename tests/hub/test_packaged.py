"""The small network that comes with the package."""

import numpy as np
import torch

from dinov2.data.datasets import find_images
from dinov2.data.exposure import seen_in_pretraining
from dinov2.data.sample_cells import write_sample_cells
from dinov2.eval.knn import knn_predict
from dinov2.hub import load_backbone, resolve_weights, untrained_backbone
from dinov2.hub.sources import PACKAGED, published_name
from dinov2.utils.files import file_sha256

NAME = "dinobloom_tiny_pbc"


def test_it_is_small_and_says_which_part_of_an_image_it_takes():
    file = resolve_weights(NAME)
    assert file == PACKAGED[NAME]
    assert file.stat().st_size < 12e6
    model = load_backbone(NAME)
    assert sum(parameter.numel() for parameter in model.parameters()) < 5e6
    assert (model.transform.image_size, model.transform.center_crop) == (64, 0.65)
    assert published_name(file, file_sha256(file)) == NAME
    assert seen_in_pretraining(NAME, ["acevedo", "bccd"]) == ["acevedo"]


def test_its_features_tell_drawn_cells_apart_which_it_never_saw(tmp_path):
    write_sample_cells(tmp_path, n_train=0, n_probe_train=200, n_probe_test=200, n_patients=0, size=96)

    def accuracy(model):
        sides = []
        for part in ("train", "test"):
            paths = find_images(tmp_path / "probe" / part)
            with torch.inference_mode():
                features = model(torch.stack([model.transform(path) for path in paths])).numpy()
            names = np.array([path.parent.name for path in paths])
            sides.append((features, np.unique(names, return_inverse=True)[1]))
        (train, known), (test, labels) = sides
        return (knn_predict(train, known, test, 5, 10) == labels).mean()

    trained, untrained = accuracy(load_backbone(NAME)), accuracy(untrained_backbone(NAME))
    assert trained > untrained + 0.1

"""The metadata of a card are what the Hugging Face hub's client reads from it."""

import hashlib
import json

import pytest
import torch
from huggingface_hub import ModelCard
from omegaconf import OmegaConf

from dinov2.configs import CONFIG_FOLDER
from dinov2.data.exposure import PRETRAINED_ON
from dinov2.hub.classifiers import Classifier
from dinov2.hub.export import main
from dinov2.models import architecture, build_backbone
from dinov2.utils.config import load_run_config

TINY = {"embed_dim": 64, "depth": 1, "num_heads": 1, "patch_size": 14, "img_size": 56, "block_chunks": 0}


@pytest.fixture
def export_card(tmp_path):
    """Exports a tiny network of this file name; returns the text of its card."""

    def export(name, *more, classifier=None, **content):
        file, model = tmp_path / name, build_backbone({**TINY, "layerscale": 1.0})
        file.parent.mkdir(parents=True, exist_ok=True)
        state = {f"backbone.{key}": value for key, value in model.state_dict().items()}
        content |= {"classifier": classifier.content()} if classifier else {}
        torch.save({"teacher": state, "architecture": architecture(model), **content}, file)
        flags = ["--checkpoint", str(file), "--output-dir", str(tmp_path / "out"), "--formats", "pth", *map(str, more)]
        assert main(flags) == 0
        return (tmp_path / "out" / "README.md").read_text(encoding="utf-8")

    return export


def test_a_file_of_unknown_origin(export_card):
    text = export_card("net: 'a'.pth")
    data = ModelCard(text).data
    assert (data.license, data.datasets, data.eval_results) == (None, None, None)
    assert (data.library_name, data.pipeline_tag) == ("dinov2", "image-feature-extraction")
    assert "hematology" in data.tags
    assert "| trained at | 56 x 56 px |" in text
    assert "# net: 'a'\n" in text
    assert "\nA vision transformer that turns images into features.\n" in text


def test_a_run_on_a_public_set(export_card, tmp_path):
    lists = tmp_path / "lists"
    lists.mkdir()
    for name in ("acevedo.txt", "ours.txt"):
        (lists / name).write_text("one.png\n")
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.yaml").write_text(f"train: {{dataset_path: 'HemaStandardDataset:root={lists}'}}")
    data = ModelCard(export_card("first/eval/training_9/teacher_checkpoint.pth")).data
    assert (data.license, data.datasets) == ("apache-2.0", ["acevedo"])


def test_a_release(export_card):
    text = export_card("DinoBloom-B.pth")
    data = ModelCard(text).data
    assert (data.license, data.datasets) == ("apache-2.0", list(PRETRAINED_ON["dinobloom"]))
    assert "features, pre-trained by self-distillation (DINOv2, arXiv 2304.07193).\n" in text


def test_the_network_of_the_package(tmp_path):
    flags = ["--checkpoint", "dinobloom_tiny_pbc", "--output-dir", str(tmp_path), "--formats", "pth"]
    assert main(flags) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert (data.license, data.datasets) == ("apache-2.0", ["acevedo"])
    assert "features, pre-trained by LeJEPA (arXiv 2511.08544).\n" in text


OBJECTIVES = {
    "dino and ibot": ({}, "self-distillation (DINOv2, arXiv 2304.07193)", "apache-2.0"),
    "lejepa": (
        {"config": "small_from_scratch", "student.pretrained_weights": "dinobloom_tiny_pbc"},
        "LeJEPA (arXiv 2511.08544)",
        "apache-2.0",
    ),
    "all": (
        {"lejepa.loss_weight": 1, "teacher.pretrained_weights": "/home/me/other.pth", "train.metadata.column": "slide"},
        "self-distillation (DINOv2, arXiv 2304.07193), LeJEPA (arXiv 2511.08544), distillation of other.pth, "
        "metadata guidance (FINO, arXiv 2606.05107)",
        None,
    ),
    "from other weights": (
        {"student.pretrained_weights": "/home/me/other.pth"},
        "self-distillation (DINOv2, arXiv 2304.07193)",
        None,
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_card_says_how_a_run_learned_and_claims_no_licence_for_weights_of_others(name, export_card, tmp_path):
    values, objective, licence = OBJECTIVES[name]
    values = dict(values)
    config = CONFIG_FOLDER / "train" / f"{values.pop('config', 'custom')}.yaml"
    overrides = [f"{key}={value}" for key, value in values.items()]
    cfg = load_run_config(config, ["train.dataset_path=HemaStandardDataset:root=cells", *overrides])
    (tmp_path / "run").mkdir()
    OmegaConf.save(cfg, tmp_path / "run" / "config.yaml")
    text = export_card("run/eval/training_9/teacher_checkpoint.pth")
    assert f"features, pre-trained by {objective}.\n" in text
    assert ModelCard(text).data.license == licence
    assert "/home/me" not in text
    for key, value in values.items():
        assert (
            f"| {'started from' if key == 'student.pretrained_weights' else key} | {value}".replace("/home/me/", "")
            in text
        )
    assert ("| dino.head_n_prototypes |" in text) == ("self-distillation" in objective)
    assert ("| augmentation.hema.background_probability | 0.8 |" in text) == (name == "lejepa")


def test_what_the_user_says(export_card):
    classifier = Classifier(torch.zeros(2, 64), torch.zeros(2), ["a", "b"], "cls")
    flags = ["--licence", "cc-by-nc-4.0", "--datasets", "lab/cells", "lab/more"]
    data = ModelCard(export_card("finetuned.pth", *flags, classifier=classifier)).data
    assert (data.license, data.datasets) == ("cc-by-nc-4.0", ["lab/cells", "lab/more"])
    assert data.pipeline_tag == "image-classification"


def test_results_are_in_the_model_index(export_card, tmp_path):
    scores = {"accuracy": 0.81239, "balanced_accuracy": 0.5, "weighted_f1": 0.7, "auroc": None}
    training = {"datasets": {"pbc: new": {"knn": {"knn_20": scores}}}}
    protocol = {
        "protocol": "linear",
        "results": {"model": {"cls": scores, "mean": {"accuracy": 0.5}}, "histogram": {"cls": scores}},
        "settings": {"train": "/private/acevedo", "test": "/private/Raabin WBC"},
    }
    for name, content in (("training.json", training), ("linear.json", protocol)):
        (tmp_path / name).write_text(json.dumps(content))
    text = export_card("net.pth", "--results", tmp_path / "training.json", tmp_path / "linear.json")
    data = ModelCard(text).data
    assert data.model_name == "net"
    assert {result.task_type for result in data.eval_results} == {"image-classification"}
    found = [
        (each.dataset_type, each.dataset_name, each.metric_type, each.metric_name, each.metric_value)
        for each in data.eval_results
    ]
    pbc, raabin = ("pbc-new", "pbc: new"), ("raabin-wbc", "Raabin WBC")
    assert found == [
        (*pbc, "accuracy", "accuracy (knn / knn_20)", 0.8124),
        (*pbc, "balanced_accuracy", "balanced accuracy (knn / knn_20)", 0.5),
        (*pbc, "f1", "weighted f1 (knn / knn_20)", 0.7),
        (*raabin, "accuracy", "accuracy (linear, model / cls)", 0.8124),
        (*raabin, "balanced_accuracy", "balanced accuracy (linear, model / cls)", 0.5),
        (*raabin, "f1", "weighted f1 (linear, model / cls)", 0.7),
        (*raabin, "accuracy", "accuracy (linear, model / mean)", 0.5),
    ]
    assert "| histogram / cls | 81.2 |" in text  # a baseline is in the table only
    assert "/private" not in text
    sums = (tmp_path / "out" / "sha256sums.txt").read_text()
    assert f"{hashlib.sha256(text.encode()).hexdigest()}  README.md" in sums

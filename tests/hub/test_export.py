"""What is exported gives our features in the library it is for, or nothing is exported."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, pipeline

from dinov2.data.datasets.decode import resize_image
from dinov2.data.transforms import normalize_images
from dinov2.hub import conversions, export, export_formats
from dinov2.hub.backbones import load_backbone
from dinov2.hub.classifiers import load_network, read_classifier
from dinov2.hub.export import main, parse_arguments
from dinov2.models import architecture, build_backbone

COMMAND = Path(__file__).parents[2] / "dinov2" / "hub" / "export.py"
TINY = {
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 1,
    "patch_size": 14,
    "img_size": 56,
    "layerscale": 1.0,
    "block_chunks": 0,
}
ALL_FORMATS = list(export_formats.FORMATS)
TENSORS_ONLY = ["pth", "safetensors", "huggingface", "timm"]  # graphs take seconds each


def random_backbone(**settings):
    """A network whose every parameter matters."""
    model = build_backbone(settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            deviation = value[0].numel() ** -0.5 if value.ndim > 1 and "_" not in name.rpartition(".")[2] else 0.1
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.5 if name.endswith("gamma") else 0.0
            value.normal_(mean, deviation, generator=generator)
    return model


def write_release(path, **settings):
    """A file as DinoBloom releases them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = random_backbone(**{**TINY, **settings}).state_dict()
    heads = {"dino_head.mlp.0.weight": torch.ones(2, 3)}
    torch.save({"teacher": {**{f"backbone.{name}": value for name, value in state.items()}, **heads}}, path)
    return path


@pytest.fixture
def release(tmp_path):
    return lambda name="DinoBloom-T.pth", **settings: write_release(tmp_path / name, **settings)


def arguments(checkpoint, output, *more, formats=("pth",)):
    return ["--checkpoint", str(checkpoint), "--output-dir", str(output), "--formats", *formats, *map(str, more)]


def python_blocks(folder):
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def features_by_the_cards_code(folder, monkeypatch):
    """{first line of a block: (cls, patches)}: what users get who follow the card."""
    monkeypatch.chdir(folder)
    first, *blocks = python_blocks(folder)
    found = {}
    with torch.no_grad():
        for block in blocks:
            names = {}
            exec(compile(first + block, "README.md", "exec"), names)
            found[block] = [np.asarray(names[output]) for output in ("cls", "patches")]
    return found


def assert_card_gives_our_features(checkpoint, folder, image_size, monkeypatch, center_crop=1.0):
    cell = export_formats.draw_cells()[1].resize((image_size + 31, image_size + 31))
    cell.save(folder / "cell.png")
    with torch.no_grad():
        pixels = normalize_images(resize_image(cell, image_size, center_crop=center_crop))[None]
        ours = load_backbone(checkpoint, image_size).forward_features(pixels)
    found = features_by_the_cards_code(folder, monkeypatch)
    for cls, patches in found.values():
        np.testing.assert_allclose(cls, ours["x_norm_clstoken"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(patches, ours["x_norm_patchtokens"], rtol=0, atol=1e-4)
    return found


def test_a_small_network_for_every_library(tmp_path, monkeypatch):
    """ViT-S/14 with 518-px position embeddings, as DINOv2's weights are, loaded as the card says."""
    checkpoint = write_release(tmp_path / "DinoBloom-S.pth", embed_dim=384, depth=12, num_heads=6, img_size=518)
    out = tmp_path / "out"
    formats = [*TENSORS_ONLY, "onnx"]
    assert main(arguments(checkpoint, out, formats=formats)) == 0
    assert len(assert_card_gives_our_features(checkpoint, out, 224, monkeypatch)) == len(formats)
    card = (out / "README.md").read_text()
    assert 'timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0, checkpoint_path=' in card
    assert "16 x 16 patches, resized once from the checkpoint's 37 x 37" in card
    assert f"its sha256 | {hashlib.sha256(checkpoint.read_bytes()).hexdigest()}" in card
    assert "21,629,184" in card
    state = torch.load(out / "backbone.pth", weights_only=True)
    assert (
        state.keys()
        == build_backbone({"arch": "dinov2_vits14", "layerscale": 1.0, "block_chunks": 0}).state_dict().keys()
    )


VARIANTS = {
    "gated, registers": {"ffn_layer": "swiglufused", "num_register_tokens": 4, "embed_dim": 128, "num_heads": 2},
    "no layer scale, no biases": {"layerscale": None, "qkv_bias": False, "proj_bias": False, "ffn_bias": False},
    "gated, another width": {"ffn_layer": "swiglufused", "mlp_ratio": 3.0},
    "block chunks, two registers": {"block_chunks": 2, "num_register_tokens": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_networks(variant, release, tmp_path, monkeypatch):
    formats = ALL_FORMATS if variant == "gated, registers" else TENSORS_ONLY
    checkpoint, out = release(**VARIANTS[variant]), tmp_path / "out"
    asked_for = ["--formats", *formats] if formats != ALL_FORMATS else []
    command = ["--checkpoint", str(checkpoint), "--output-dir", str(out), "--image-size", "70", *asked_for]
    assert main(command) == 0
    assert len(assert_card_gives_our_features(checkpoint, out, 70, monkeypatch)) == len(formats)


def test_every_library_gets_the_centre_of_an_image(tmp_path, monkeypatch):
    """The whole image has 70 / 0.7 = 100 px, so that transformers, which rounds them, gives our pixels too."""
    model = random_backbone(**TINY, center_crop=0.7)
    checkpoint, out = tmp_path / "centre.pth", tmp_path / "out"
    torch.save({"model": model.state_dict(), "architecture": architecture(model)}, checkpoint)
    assert main([*arguments(checkpoint, out, formats=ALL_FORMATS), "--image-size", "70"]) == 0
    found = assert_card_gives_our_features(checkpoint, out, 70, monkeypatch, center_crop=0.7)
    assert len(found) == len(ALL_FORMATS)
    assert "central square of 0.7 of the shorter side to 70 px" in (out / "README.md").read_text()
    assert load_backbone(out).center_crop == 0.7


@pytest.mark.slow
@pytest.mark.parametrize(("embed_dim", "depth", "num_heads"), [(768, 12, 12), (1024, 24, 16)], ids=["B", "L"])
def test_large_networks_in_every_format(embed_dim, depth, num_heads, release, tmp_path, monkeypatch):
    checkpoint = release(embed_dim=embed_dim, depth=depth, num_heads=num_heads, img_size=224)
    out = tmp_path / "out"
    assert main(arguments(checkpoint, out, formats=ALL_FORMATS)) == 0
    assert len(assert_card_gives_our_features(checkpoint, out, 224, monkeypatch)) == len(ALL_FORMATS)


def test_graphs_with_weights_in_a_second_file(release, tmp_path, monkeypatch):
    monkeypatch.setattr(export_formats, "ONNX_ONE_FILE_BYTES", 0)  # as the largest networks need
    checkpoint, out = release(), tmp_path / "out"
    assert main(arguments(checkpoint, out, "--image-size", 56, formats=["onnx"])) == 0
    assert (out / "backbone.onnx.data").stat().st_size > 500_000 > 2 * (out / "backbone.onnx").stat().st_size
    assert_card_gives_our_features(checkpoint, out, 56, monkeypatch)


def test_heads_that_tensors_do_not_tell_are_written_down(tmp_path):
    model = random_backbone(**{**TINY, "num_heads": 4})
    torch.save({"teacher": model.state_dict(), "architecture": architecture(model)}, tmp_path / "teacher.pth")
    assert main(arguments(tmp_path / "teacher.pth", tmp_path / "out", formats=TENSORS_ONLY)) == 0
    for file in ("backbone.pth", "backbone.safetensors"):
        loaded = load_backbone(tmp_path / "out" / file, 56)
        assert (loaded.num_heads, loaded.img_size) == (4, 56)  # the size that the run's own file tells
    assert json.loads((tmp_path / "out" / "timm" / "config.json").read_text())["model_args"]["num_heads"] == 4


def test_an_export_can_be_exported(release, tmp_path):
    """From transformers' and timm's folders too, and from one whose weights lie in several files."""
    first = tmp_path / "first"
    assert main(arguments(release(num_register_tokens=4), first, formats=TENSORS_ONLY)) == 0
    sharded = tmp_path / "sharded"
    AutoModel.from_pretrained(first / "huggingface").save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    expected = load_backbone(first / "backbone.pth")
    pixels = normalize_images(resize_image(export_formats.draw_cells()[0], 224))[None]
    for source in ("first/huggingface", "first/timm", "sharded"):
        assert main(arguments(tmp_path / source, tmp_path / "again", "--overwrite")) == 0
        again = load_backbone(tmp_path / "again" / "backbone.pth")
        torch.testing.assert_close(again(pixels), expected(pixels), rtol=0, atol=1e-5)
        assert re.search(r"its sha256 \| [0-9a-f]{64} ", (tmp_path / "again" / "README.md").read_text())


def test_a_tilde_in_a_path_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    args = parse_arguments(arguments("run", "~/out", "--results", "~/results.json"))
    assert (args.output_dir, args.results) == (Path("/home/somebody/out"), [Path("/home/somebody/results.json")])


# --- a fine-tuned network -------------------------------------------------------------------------------------------

NAMES = ["blast", "lympho|cyte", 'it\'s "smudge"']


@pytest.fixture
def finetuned(tmp_path):
    """Writes what fine-tuning writes."""

    def write(kind, **settings):
        model = random_backbone(**{**TINY, "num_heads": 2, **settings})
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(3, 128 if kind == "cls+mean" else 64, generator=generator)
        classifier = {"weight": weight, "bias": torch.randn(3, generator=generator), "class_names": NAMES, "kind": kind}
        content = {"model": model.state_dict(), "architecture": architecture(model), "classifier": classifier}
        path = tmp_path / "wbc" / "finetuned.pth"
        path.parent.mkdir()
        torch.save({**content, "seen": torch.zeros(5, 16, dtype=torch.uint8)}, path)
        return path

    return write


@pytest.mark.parametrize(
    ("kind", "settings", "formats", "bare"),
    [
        ("cls", {}, ALL_FORMATS, {"safetensors"}),
        ("mean", {"num_register_tokens": 4}, TENSORS_ONLY, {"safetensors"}),
        ("cls+mean", {"num_register_tokens": 4, "ffn_layer": "swiglufused"}, ALL_FORMATS, {"safetensors", "timm"}),
    ],
)
def test_a_classifier_in_every_format(kind, settings, formats, bare, finetuned, tmp_path, monkeypatch, capsys):
    """By the card's code, and the logits that another program gets are those of the file of fine-tuning."""
    checkpoint, out = finetuned(kind, **settings), tmp_path / "out"
    assert main(arguments(checkpoint, out, formats=formats)) == 0
    export_formats.draw_cells()[1].resize((87, 87)).save(out / "cell.png")
    network = load_network(checkpoint)
    images = network.backbone.transform(out / "cell.png")[None]
    monkeypatch.chdir(out)
    capsys.readouterr()
    with torch.no_grad():
        expected = export_formats.own_outputs(network, images)
        classify, first, *blocks = python_blocks(out)
        exec(compile(classify, "README.md", "exec"), {})
        probabilities = expected["logits"].softmax(dim=1)[0].tolist()
        lines = [f"{name}: {probability:.3f}" for name, probability in zip(NAMES, probabilities, strict=True)]
        assert capsys.readouterr().out.splitlines()[-3:] == lines
        for name, block in zip(formats, blocks, strict=True):
            values = {}
            exec(compile(first + block, "README.md", "exec"), values)
            # transformers' block is the one for features
            outputs = ["cls", "patches", *(["logits"] if name not in {*bare, "huggingface"} else [])]
            for output in outputs:
                np.testing.assert_allclose(values[output], expected[output], rtol=0, atol=1e-4, err_msg=name)
            assert len(outputs) == 3 or "logits" not in values
    card = (out / "README.md").read_text()
    assert "# wbc\n" in card
    assert "pipeline_tag: image-classification" in card
    assert f"`{NAMES}`" in card
    assert {
        name for name, form in export_formats.FORMATS.items() if f"{form.title}: the backbone only." in card
    } == bare
    compared = re.findall(r"^\| (\w+) \| \S+ \| .*logits", card, re.MULTILINE)
    assert set(compared) == set(formats) - bare


def test_the_folder_of_transformers_is_a_classifier_and_a_backbone(finetuned, tmp_path):
    """Its pipeline names the class, and what is read from it is a backbone and the same classifier."""
    checkpoint, out = finetuned("mean"), tmp_path / "out"
    assert main(arguments(checkpoint, out, formats=["huggingface"])) == 0
    folder, network = out / "huggingface", load_network(checkpoint)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Dinov2ForImageClassification"]
    assert config["label2id"] == {name: i for i, name in enumerate(NAMES)}
    cell = export_formats.draw_cells()[0]
    images = network.backbone.transform(cell)[None]
    with torch.no_grad():
        expected = export_formats.own_outputs(network, images)
        again = export_formats.own_outputs(load_network(folder), images)
        theirs, report = AutoModel.from_pretrained(folder, output_loading_info=True)
        tokens = theirs.eval()(pixel_values=images).last_hidden_state
    assert not report["missing_keys"]
    torch.testing.assert_close(tokens[:, 0], expected["cls"], rtol=0, atol=1e-4)
    for output, value in expected.items():
        torch.testing.assert_close(again[output], value, rtol=0, atol=1e-5)
    best = pipeline("image-classification", model=str(folder))(cell.resize((56, 56)))[0]["label"]
    assert best == NAMES[expected["logits"].argmax()]

    assert main(arguments(folder, tmp_path / "again")) == 0  # an export can be exported
    assert read_classifier(tmp_path / "again" / "backbone.pth").class_names == NAMES


def test_a_graph_follows_to_another_type_with_its_classifier(finetuned, tmp_path):
    """As to a GPU: constants of a graph would stay behind."""
    checkpoint, out = finetuned("cls"), tmp_path / "out"
    assert main(arguments(checkpoint, out, formats=["torch_export"])) == 0
    graph = torch.export.load(out / "backbone.pt2").module().double()
    assert graph(torch.zeros(1, 3, 56, 56, dtype=torch.float64))[2].dtype == torch.float64


@pytest.mark.parametrize("form", ["huggingface", "timm"])
def test_a_wrong_classifier_is_noticed(form, finetuned, tmp_path, monkeypatch, caplog):
    def shifted(content, *args):
        return save({n: v + 1e-3 if n in ("classifier.bias", "head.bias") else v for n, v in content.items()}, *args)

    save = export_formats.save_file
    monkeypatch.setattr(export_formats, "save_file", shifted)
    monkeypatch.setattr(export, "setup_logging", lambda: None)
    assert main(arguments(finetuned("cls"), tmp_path / "out", formats=[form])) == 1
    assert re.search(rf"{form}: .*differs.*logits 0\.001", caplog.text)
    assert not (tmp_path / "out").exists()


# --- a wrong export -------------------------------------------------------------------------------------------------


def swapped(convert):
    """A conversion that mistakes one norm for the other."""

    def wrong(state):
        converted = convert(state)
        first, second = (next(name for name in converted if f"norm{i}.weight" in name) for i in (1, 2))
        return {**converted, first: converted[second], second: converted[first]}

    return wrong


def incomplete(convert):
    def wrong(state):
        converted = convert(state)
        return {name: value for name, value in converted.items() if "norm1.weight" not in name}

    return wrong


@pytest.mark.parametrize(
    ("spoil", "conversion", "form", "message"),
    [
        (swapped, "to_timm", "timm", r"timm: .*differs.* by more than --tolerance 0\.0001: cls \d.*, patches \d"),
        (swapped, "to_hugging_face", "huggingface", r"huggingface: .*differs.*cls \d.*, patches \d"),
        (incomplete, "to_timm", "timm", r"timm: .*cannot be used.*norm1\.weight"),
        (incomplete, "to_hugging_face", "huggingface", r"huggingface: .*cannot be used.*norm1\.weight"),
    ],
)
def test_a_wrong_file_is_noticed_and_nothing_is_left(
    spoil, conversion, form, message, release, tmp_path, monkeypatch, caplog
):
    checkpoint, out = release(), tmp_path / "results" / "out"
    monkeypatch.setattr(conversions, conversion, spoil(getattr(conversions, conversion)))
    monkeypatch.setattr(export, "setup_logging", lambda: None)  # so that pytest sees the log
    assert main(arguments(checkpoint, out, formats=["pth", form])) == 1
    assert re.search(message, caplog.text)
    assert list(out.parent.iterdir()) == []


def test_wrong_images_are_noticed(release, tmp_path, monkeypatch, caplog):
    right = export_formats.hugging_face_preprocessor
    monkeypatch.setattr(
        export_formats, "hugging_face_preprocessor", lambda size: {**right(size), "image_std": [0.2, 0.2, 0.2]}
    )
    monkeypatch.setattr(export, "setup_logging", lambda: None)
    assert main(arguments(release(), tmp_path / "out", formats=["huggingface"])) == 1
    assert re.search(r"huggingface: .*differs.*pixels \d", caplog.text)
    assert not (tmp_path / "out").exists()


def test_a_network_that_gives_no_numbers_is_not_exported(tmp_path):
    state = random_backbone(**TINY).state_dict()
    state["norm.bias"][0] = float("nan")
    torch.save(state, tmp_path / "broken.pth")
    assert main(arguments(tmp_path / "broken.pth", tmp_path / "out")) == 1
    assert not (tmp_path / "out").exists()


def test_the_tolerance_decides(release, tmp_path, monkeypatch):
    monkeypatch.setattr(export_formats, "_largest_difference", lambda expected, found: 1e-3)
    assert main(arguments(release(), tmp_path / "out")) == 1
    assert main(arguments(release(), tmp_path / "out", "--tolerance", 2e-3)) == 0


# --- the folder -----------------------------------------------------------------------------------------------------


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_an_export_is_replaced_and_only_if_asked(release, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    assert main(arguments(release(), out, formats=["pth", "timm"])) == 0  # an empty folder is free
    before = contents(out)
    assert main(arguments(release(), out)) == 2
    with monkeypatch.context() as patch:
        patch.setattr(conversions, "to_timm", swapped(conversions.to_timm))
        assert main(arguments(release(), out, "--overwrite", formats=["timm"])) == 1
    assert contents(out) == before
    assert main(arguments(release(num_register_tokens=4), out, "--overwrite")) == 0
    assert sorted(contents(out)) == ["README.md", "backbone.pth", "sha256sums.txt"]
    assert load_backbone(out / "backbone.pth").num_register_tokens == 4

    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("years of work")
    assert main(arguments(release(), foreign, "--overwrite")) == 2
    assert main(arguments(release(), foreign / "chapter.txt", "--overwrite")) == 2
    assert contents(foreign) == {"chapter.txt": b"years of work"}
    assert not list(tmp_path.glob(".*"))


def test_sums_are_right_and_files_have_the_usual_rights(release, tmp_path):
    out = tmp_path / "out"
    assert main(arguments(release(), out, formats=TENSORS_ONLY)) == 0
    lines = dict(reversed(line.split("  ")) for line in (out / "sha256sums.txt").read_text().splitlines())
    files = contents(out)
    del files["sha256sums.txt"]
    assert lines == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    (tmp_path / "usual").touch()
    assert {path.stat().st_mode for path in out.rglob("*") if path.is_file()} == {(tmp_path / "usual").stat().st_mode}
    card = (out / "README.md").read_text()
    assert all(lines[name] in card for name in lines if name != "README.md")


# --- what was asked for ---------------------------------------------------------------------------------------------


def test_a_package_that_is_not_installed(release, tmp_path, monkeypatch, caplog):
    for package in ("onnxscript", "timm"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(export, "setup_logging", lambda: None)
    assert main(arguments(release(), tmp_path / "out", formats=["pth", "onnx"])) == 2
    assert "--formats onnx: it needs onnxscript, which cannot be imported here" in caplog.text
    assert "pip install 'dinobloom[export]'" in caplog.text
    assert not (tmp_path / "out").exists()
    for not_of_interest in ("torch_export", "huggingface"):
        monkeypatch.delitem(export.FORMATS, not_of_interest)
    assert main(["--checkpoint", str(release()), "--output-dir", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- onnx: it needs onnxscript" in card
    assert "- timm: it needs timm" in card
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "backbone.pth",
        "backbone.safetensors",
        "sha256sums.txt",
    ]


@pytest.mark.parametrize(
    ("settings", "more", "formats", "message"),
    [
        ({"mlp_ratio": 2.5}, (), ["huggingface"], r"--formats huggingface: .*whole multiples"),
        ({"in_chans": 1}, (), ["pth"], "has 1 channels"),
        ({}, ("--image-size", 60), ["pth"], "60"),
        ({}, ("--results", "nowhere.json"), ["pth"], r"--results: no file 'nowhere\.json'"),
    ],
)
def test_mistakes(settings, more, formats, message, release, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(export, "setup_logging", lambda: None)
    assert main(arguments(release(**settings), tmp_path / "out", *more, formats=formats)) == 2
    assert re.search(message, caplog.text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [("--formats", "jpeg"), ("--tolerance", "0"), ("--image-size", "-1")])
def test_wrong_flags(wrong, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--checkpoint", "a", "--output-dir", "b", *wrong])
    assert caught.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_it_runs_as_a_script_from_any_folder(release, tmp_path):
    command = [sys.executable, str(COMMAND), *arguments(release(), "out")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out" / "backbone.pth").is_file()


# --- the card of a run ----------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    """A run with one teacher, two path lists, and results of its own."""
    run, lists = tmp_path / "private" / "marrow_b", tmp_path / "private" / "lists"
    lists.mkdir(parents=True)
    (lists / "a.txt").write_text("# scanner 1\none.png\n\ntwo.png\n")
    (lists / "b.txt").write_text("three.png\n")
    teacher = write_release(run / "eval" / "training_1200" / "teacher_checkpoint.pth")
    (run / "config.yaml").write_text(
        f"""
student: {{arch: vit_small, pretrained_weights: {tmp_path}/private/dinov2_vits14_pretrain.pth, drop_path_rate: 0.0}}
train:
  dataset_path: HemaStandardDataset:root={lists}:shuffle=1
  OFFICIAL_EPOCH_LENGTH: 500
  global_batch_size: 960
  seed: 3
optim: {{epochs: 4.0, lr: 0.0002, base_lr: 0.0002}}
crops: {{global_crops_scale: [0.32, 1.0], local_crops_number: 0}}
"""
    )
    scores = {"accuracy": 0.8123, "balanced_accuracy": 0.5, "per_class": {"a": {"recall": 1.0}}}
    judged = {"iteration": 1200, "datasets": {"pbc": {"n_train": 9, "knn": {"knn_20": scores}}}, "teacher": {}}
    (teacher.parent / "results.json").write_text(json.dumps(judged))
    report = {
        "protocol": "linear",
        "results": {"model": {"cls": {**scores, "weighted_f1": 0.777}}},
        "checkpoint": {"checkpoint_sha256": hashlib.sha256(teacher.read_bytes()).hexdigest()},
        "settings": {"data": f"{tmp_path}/private/acevedo", "test": None},
        "date": "2026-11-02T10:00:00+00:00",
    }
    (tmp_path / "linear.json").write_text(json.dumps(report))
    return run


def test_the_card_of_a_run(run_folder, tmp_path):
    results = [run_folder / "eval" / "training_1200" / "results.json", tmp_path / "linear.json"]
    assert main(arguments(run_folder, tmp_path / "out", "--results", *results)) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    digest = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.rglob("*.*") if path.is_file()
    }
    for line in (
        "# marrow_b\n",
        "| trained for | 1,200 iterations |",
        f"| sha256 of its config.yaml | {digest['config.yaml']} |",
        "| started from | dinov2_vits14_pretrain.pth |",
        "| crops.global_crops_scale | [0.32, 1.0] |",
        "| iterations planned | 2,000 |",
        "| train.global_batch_size | 960 |",
        "| optim.lr | 0.0002 |",
        f"| a.txt | 2 | {digest['a.txt']} |",
        f"| b.txt | 1 | {digest['b.txt']} |",
        f"`results.json` ({digest['results.json']}), protocol of training:",
        "| pbc / knn / knn_20 | 81.2 | 50.0 |",
        f"`linear.json` ({digest['linear.json']}), protocol linear, data acevedo, 2026-11-02:",
        "| model / cls | 81.2 | 50.0 | 77.7 |",
    ):
        assert line in card
    assert str(tmp_path) not in card  # folders are nobody's business


def test_a_card_does_without_what_is_gone(run_folder, tmp_path):
    for path in (tmp_path / "private" / "lists").iterdir():
        path.unlink()
    assert main(arguments(run_folder, tmp_path / "out")) == 0
    assert "path lists were not where" in (tmp_path / "out" / "README.md").read_text()
    (run_folder / "config.yaml").unlink()
    assert main(arguments(run_folder, tmp_path / "out", "--overwrite")) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# teacher_checkpoint\n" in card
    assert "## Schedule" not in card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": {"checkpoint_sha256": "0" * 64}}, "is about the checkpoint with sha256 000"),
        ({"iteration": 800}, "is about the teacher after iteration 800, not 1200"),
        ({"results": {}}, "holds no accuracies"),
    ],
)
def test_results_of_something_else_are_refused(change, message, run_folder, tmp_path, monkeypatch, caplog):
    file = tmp_path / "linear.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    monkeypatch.setattr(export, "setup_logging", lambda: None)
    assert main(arguments(run_folder, tmp_path / "out", "--results", file)) == 2
    assert message in caplog.text
    file.write_text("{")
    assert main(arguments(run_folder, tmp_path / "out", "--results", file)) == 2
    assert "is not JSON" in caplog.text


def test_checked_images_are_images():
    for cell in export_formats.draw_cells():
        assert isinstance(cell, Image.Image)
        assert np.asarray(cell).std() > 10

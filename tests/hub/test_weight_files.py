"""Folders of transformers, timm and training runs: the right file, its tensors under our names, nothing executed."""

import errno
import json
import os
import pickle
import re
import shutil
import zipfile

import pytest
import torch
from omegaconf import OmegaConf

from dinov2.fsdp.checkpoint import Checkpointer
from dinov2.hub.backbones import load_backbone, read_heads, trained_image_size
from dinov2.hub.sources import checkpoint_file
from dinov2.models import architecture, build_backbone
from dinov2.utils.command import error_text
from dinov2.utils.files import file_sha256

TINY = {"embed_dim": 64, "depth": 2, "num_heads": 4, "patch_size": 14, "img_size": 56, "layerscale": 1.0}


@pytest.fixture
def images(formulas):
    return formulas.sym("x", (2, 3, 56, 56), 2)


def fill_with(formulas, network):
    state = {name: formulas.sym(f"files/{name}", tuple(v.shape), 0.3) for name, v in network.state_dict().items()}
    network.load_state_dict(state)
    return network.eval()


# --- transformers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def save_dinov2(formulas, tmp_path):
    """Saves a tiny network of transformers; returns it and its folder."""
    transformers = pytest.importorskip("transformers")

    def save(kind="Dinov2Model", folder=tmp_path / "dinov2", n_registers=0, config=None, **options):
        config_class = transformers.Dinov2WithRegistersConfig if n_registers else transformers.Dinov2Config
        settings = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56}
        settings |= {"num_register_tokens": n_registers} if n_registers else {}
        network = getattr(transformers, kind)(config_class(**settings, patch_size=14, **(config or {})))
        fill_with(formulas, network).save_pretrained(folder, **options)
        return network, folder

    return save


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Dinov2Model", {}),
        ("Dinov2Model", {"max_shard_size": "100KB"}),
        ("Dinov2Model", {"config": {"use_swiglu_ffn": True}}),
        ("Dinov2WithRegistersModel", {"n_registers": 4}),
        ("Dinov2ForImageClassification", {"config": {"num_labels": 3}}),
    ],
    ids=["plain", "in several files", "gated", "registers", "with a classifier"],
)
def test_a_folder_of_transformers_gives_its_features(kind, settings, save_dinov2, images):
    network, folder = save_dinov2(kind, **settings)
    if "max_shard_size" in settings:
        assert len(list(folder.glob("*.safetensors"))) > 1
        assert checkpoint_file(folder) == folder
    loaded = load_backbone(folder, img_size=56)
    assert (loaded.num_heads, loaded.num_register_tokens) == (4, settings.get("n_registers", 0))
    with torch.no_grad():
        backbone = getattr(network, "dinov2", network)
        expected = backbone(pixel_values=images).last_hidden_state
        found = loaded(images, is_training=True)
    torch.testing.assert_close(found["x_norm_clstoken"], expected[:, 0], rtol=0, atol=2e-5)
    n_patches = found["x_norm_patchtokens"].shape[1]
    torch.testing.assert_close(found["x_norm_patchtokens"], expected[:, -n_patches:], rtol=0, atol=2e-5)


def test_the_file_in_a_folder_of_transformers_is_the_same(save_dinov2, images):
    _, folder = save_dinov2()
    assert checkpoint_file(folder) == folder / "model.safetensors"
    from_folder = load_backbone(folder, img_size=56)
    assert load_backbone(folder / "model.safetensors", img_size=56).num_heads == from_folder.num_heads == 4
    state = load_backbone(folder, img_size=56).state_dict()
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors or pytorch_model\.bin"):
        load_backbone(folder)
    # of older releases of transformers
    from safetensors.torch import load_file

    torch.save(load_file(folder.parent / "elsewhere.safetensors"), folder / "pytorch_model.bin")
    old = load_backbone(folder, img_size=56)
    assert all(torch.equal(old.state_dict()[name], value) for name, value in state.items())


def test_a_lost_part_is_named(save_dinov2):
    _, folder = save_dinov2(max_shard_size="100KB")
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    before = file_sha256(checkpoint_file(folder))
    lost.unlink()
    with pytest.raises(ValueError, match=rf"{lost.name} is missing, which model\.safetensors\.index\.json lists"):
        load_backbone(folder, img_size=56)
    assert file_sha256(checkpoint_file(folder)) != before


PREPROCESSOR = {
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_center_crop": True,
    "crop_size": {"height": 112, "width": 112},
    "size": {"shortest_edge": 256},
}


def test_what_the_preprocessor_says_of_images(save_dinov2):
    _, folder = save_dinov2()
    assert trained_image_size(folder) is None
    file = folder / "preprocessor_config.json"
    for change, size in (({}, 112), ({"do_center_crop": False}, 256), ({"crop_size": 70}, 70)):
        file.write_text(json.dumps({**PREPROCESSOR, **change}))
        assert trained_image_size(folder) == size
    for change in ({"image_mean": [0.5, 0.5, 0.5]}, {"image_std": [0.225, 0.224, 0.229]}, {"do_normalize": False}):
        file.write_text(json.dumps({**PREPROCESSOR, **change}))
        with pytest.raises(ValueError, match=r"preprocessor_config\.json asks for .*so its features would be wrong"):
            load_backbone(folder, img_size=56)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: what should be JSON"):
        load_backbone(folder, img_size=56)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "vit"}, "says model_type 'vit', and only dinov2 and"),
        ({"hidden_act": "relu"}, "hidden_act is relu"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05"),
        ({"num_hidden_layers": 3}, "depth is 3 there and 2 in the tensors"),
    ],
    ids=str,
)
def test_another_network_than_its_config_is_refused(change, message, save_dinov2):
    _, folder = save_dinov2()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        load_backbone(folder, img_size=56)


# --- timm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["dinov2", "reg4_dinov2"])
@pytest.mark.parametrize("layout", ["file", "folder"])
def test_timms_files_and_folders_give_its_features(suffix, layout, formulas, images, tmp_path):
    timm = pytest.importorskip("timm")
    heads = 4 if layout == "folder" else 1  # a file cannot tell
    arguments = {"embed_dim": 64, "depth": 2, "num_heads": heads, "img_size": 56}
    network = fill_with(formulas, timm.create_model(f"vit_small_patch14_{suffix}", num_classes=3, **arguments))
    if layout == "file":
        torch.save(network.state_dict(), tmp_path / "weights.pth")
        source = tmp_path / "weights.pth"
    else:
        source = tmp_path / "timm"
        timm.models.save_for_hf(network, source, model_args=arguments, safe_serialization="both")
        assert trained_image_size(source) == 56
    loaded = load_backbone(source, img_size=56)
    assert loaded.num_register_tokens == (4 if "reg4" in suffix else 0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), network.forward_features(images)[:, 0], rtol=0, atol=2e-5)
    if layout == "folder":
        config = json.loads((source / "config.json").read_text())
        config["pretrained_cfg"]["mean"] = [0.5, 0.5, 0.5]
        (source / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"config\.json asks for images of mean \[0\.5, 0\.5, 0\.5\]"):
            load_backbone(source, img_size=56)


# --- runs -----------------------------------------------------------------------------------------------------------


def config_of(settings):
    student = {"arch": "vit_small", "ffn_layer": "mlp", "block_chunks": 2, "layerscale": 1.0, "patch_size": 14}
    student |= {"qkv_bias": True, "proj_bias": True, "ffn_bias": True, "drop_path_rate": 0.0, "drop_path_uniform": True}
    student |= {name: settings[name] for name in ("embed_dim", "depth", "num_heads")}
    return OmegaConf.create({"student": student, "crops": {"global_crops_size": settings["img_size"]}})


@pytest.fixture
def run(formulas, tmp_path):
    """A run's folder with checkpoints after 10 and 200 iterations, and its teacher."""
    folder = tmp_path / "run"
    teacher = formulas.fill_(build_backbone({**TINY, "block_chunks": 2}), "run").eval()
    checkpoints = Checkpointer(folder / "checkpoints", 5)
    for iteration in (10, 200):
        backbone = {name: value.clone() for name, value in teacher.state_dict().items()}
        backbone["norm.bias"] += iteration
        head = {"last_layer": {"weight_g": torch.ones(3, 1), "weight_v": torch.ones(3, 2)}}
        tensors = {
            "model": {
                "student": {"backbone": {name: value + 1 for name, value in backbone.items()}, "dino_head": head},
                "teacher": {"backbone": backbone, "dino_head": head},
                "dino_loss": {"center": torch.zeros(1, 3)},
            },
            "optimizer": {"backbone.cls_token": {"step": torch.tensor(3.0), "exp_avg": torch.ones(1, 1, 64)}},
        }
        checkpoints.save(iteration, tensors, {})
        assert checkpoints.wait()
    OmegaConf.save(config_of(TINY), folder / "config.yaml")
    return folder, teacher


def test_a_runs_checkpoint_gives_its_teacher(run, images):
    folder, teacher = run
    newest = folder / "checkpoints" / "iteration_0000200"
    for source in (folder, folder / "checkpoints", newest):
        assert checkpoint_file(source) == newest
    loaded = load_backbone(newest, img_size=56)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), teacher(images) + 200, rtol=0, atol=5e-5)
    assert architecture(loaded) == architecture(teacher) | {"block_chunks": 0}
    assert trained_image_size(folder) == 56
    assert read_heads(folder).keys() == {"dino_head"}
    earlier = folder / "checkpoints" / "iteration_0000010"
    assert load_backbone(earlier, img_size=56).norm.bias[0] == teacher.norm.bias[0] + 10
    assert file_sha256(checkpoint_file(earlier)) != file_sha256(checkpoint_file(newest))


def test_a_runs_teacher_goes_before_its_checkpoints(run):
    folder, teacher = run
    (folder / "eval" / "training_9").mkdir(parents=True)
    file = folder / "eval" / "training_9" / "teacher_checkpoint.pth"
    torch.save({"teacher": {f"backbone.{name}": value for name, value in teacher.state_dict().items()}}, file)
    assert checkpoint_file(folder) == file


def test_a_checkpoint_away_from_its_run_has_no_config(run, tmp_path):
    shutil.copytree(run[0] / "checkpoints" / "iteration_0000010", tmp_path / "alone" / "here" / "copied")
    assert load_backbone(tmp_path / "alone" / "here" / "copied", img_size=56).num_heads == 1  # 64 dimensions a head


def test_damaged_and_foreign_checkpoints_are_named(run, tmp_path):
    newest = run[0] / "checkpoints" / "iteration_0000200"
    data = newest / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(ValueError, match="iteration_0000200.*damaged, cut short"):
        load_backbone(run[0], img_size=56)
    checkpoints = Checkpointer(tmp_path / "other", 1)
    checkpoints.save(1, {"net": {"weight": torch.ones(2)}}, {})
    assert checkpoints.wait()
    with pytest.raises(ValueError, match=r"iteration_0000001: holds no tensors model\.teacher\.\*"):
        load_backbone(tmp_path / "other")
    (run[0] / "config.yaml").write_text("student: {arch: vit_small}\n")
    with pytest.raises(ValueError, match=r"config\.yaml is not what a run writes"):
        load_backbone(run[0] / "checkpoints" / "iteration_0000010")


class RunsCode:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def test_a_checkpoint_that_would_run_code_does_not(run, tmp_path):
    trace = tmp_path / "trace"
    (run[0] / "checkpoints" / "iteration_0000200" / ".metadata").write_bytes(pickle.dumps(RunsCode(trace)))
    with pytest.raises(ValueError, match=r"holds a \S*open, and to make one would run code"):
        load_backbone(run[0], img_size=56)
    assert not trace.exists()


# --- files that no tool of this field writes -------------------------------------------------------------------------


def refusal(source):
    """The message with which a file is refused; it names the file and is short."""
    with pytest.raises((ValueError, OSError, MemoryError)) as caught:
        load_backbone(source)
    text = error_text(caught.value)
    assert source.name in text
    assert len(text.splitlines()) <= 10
    return text


@pytest.fixture
def tiny_state():
    return dict(build_backbone({**TINY, "block_chunks": 0}).state_dict())


@pytest.mark.parametrize(
    ("tensor", "fault"),
    [
        (lambda: torch.ones(64, 64).to_sparse(), r"is not dense \(torch.sparse_coo\)"),
        (lambda: torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.qint8), "has numbers of the type torch.qint8"),
        (lambda: torch.ones(64, dtype=torch.int8), "has numbers of the type torch.int8"),
        (lambda: torch.ones(64, dtype=torch.complex64), "has numbers of the type torch.complex64"),
        (lambda: torch.empty(2**40, device="meta"), "has a shape and no numbers"),
        (lambda: torch.ones(1).expand(2**40), r"has the shape \[1099511627776\] and only 4 bytes"),
        (lambda: torch.ones(()), "misshapen"),
    ],
)
def test_tensors_that_are_no_plain_numbers_are_named(tensor, fault, tiny_state, tmp_path):
    torch.save({**tiny_state, "norm.weight": tensor()}, tmp_path / "weights.pth")
    assert re.search(f"norm.weight {fault}|{fault}: norm.weight", refusal(tmp_path / "weights.pth"))


def in_itself(state):
    state["model"] = state
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_itself, "in more than 8 mappings, or in themselves"),
        (lambda state: dict(enumerate(state.values())), "not a DINOv2 backbone"),
        (lambda state: {**state, "blocks.1000000000.norm1.weight": torch.ones(64)}, "depth is 1000000001, expected"),
        (
            lambda state: {**state, "pos_embed": torch.ones(17)},
            r"pos_embed has the shape \[17\], expected 3 dimensions",
        ),
        (lambda state: {**state, "pos_embed": torch.ones(1, 4, 64)}, "is for no square grid"),
        (lambda state: {**state, "patch_embed.proj.weight": torch.ones(0, 3, 14, 14)}, "embed_dim is 0, expected"),
        (lambda state: {"embeddings.cls_token": torch.ones(()), **split_attention()}, "do not fit together"),
    ],
)
def test_odd_structures_are_named(change, message, tiny_state, tmp_path):
    torch.save(change(tiny_state), tmp_path / "weights.pth")
    assert re.search(message, refusal(tmp_path / "weights.pth"))


def split_attention():
    sizes = {"query": 64, "key": 64, "value": ()}
    return {f"encoder.layer.0.attention.attention.{part}.bias": torch.ones(size) for part, size in sizes.items()}


@pytest.mark.parametrize("value", [-1, 0, 10**9, 2**70, "many", 2.5, True, [3], float("nan"), torch.ones(1)], ids=str)
@pytest.mark.parametrize("setting", ["num_heads", "img_size"])
def test_recorded_settings_out_of_bounds_are_named(setting, value, tiny_state, tmp_path):
    torch.save({"model": tiny_state, "architecture": {setting: value}}, tmp_path / "weights.pth")
    assert f"its recorded {setting} is" in refusal(tmp_path / "weights.pth")


def test_a_zip_bomb_is_not_unpacked(tiny_state, tmp_path):
    torch.save(tiny_state, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "weights.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name) + (bytes(50_000_000) if name.endswith("data/0") else b""))
    assert "bytes that unpack to 50" in refusal(tmp_path / "weights.pth")


@pytest.mark.parametrize("kind", ["I8", "F4"])
def test_small_numbers_in_safetensors_are_named(kind, tmp_path):
    """The header has 60 bytes, so the file begins with the byte of <, as web pages do."""
    header = json.dumps({"cls_token": {"dtype": kind, "shape": [4], "data_offsets": [0, 4 if kind == "I8" else 2]}})
    header = header.encode().ljust(60 + 256 * (len(header) > 60))
    data = len(header).to_bytes(8, "little") + header + bytes(4 if kind == "I8" else 2)
    (tmp_path / "model.safetensors").write_bytes(data)
    assert "web page" not in refusal(tmp_path / "model.safetensors")


def test_a_header_longer_than_the_file_is_damage(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((2**32).to_bytes(8, "little") + b"{}" + bytes(500))
    assert "damaged or cut short" in refusal(tmp_path / "model.safetensors")


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "weights.pth")
    assert "is a named pipe" in refusal(tmp_path / "weights.pth")
    (tmp_path / "teacher_checkpoint.pth").touch()
    with pytest.raises(ValueError, match=r"teacher_checkpoint\.pth is empty \(0 bytes\)"):
        load_backbone(tmp_path)
    (tmp_path / "zero.pth").symlink_to("/dev/zero")
    assert "is a device" in refusal(tmp_path / "zero.pth")


def test_too_little_memory_names_the_file(tiny_state, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4398046511104 bytes")

    torch.save(tiny_state, tmp_path / "weights.pth")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(MemoryError, match=r"to read \S*weights\.pth"):
        load_backbone(tmp_path / "weights.pth")


def test_an_error_of_the_disk_names_the_file(tiny_state, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    torch.save(tiny_state, tmp_path / "weights.pth")
    monkeypatch.setattr(torch, "load", fail)
    assert refusal(tmp_path / "weights.pth").startswith(f"{tmp_path / 'weights.pth'}: Input/output error; the disk")


def test_a_checkpoint_without_its_metadata_is_named(run):
    newest = run[0] / "checkpoints" / "iteration_0000200"
    (newest / ".metadata").unlink()
    (newest / ".metadata").mkdir()
    assert ".metadata is a folder" in refusal(run[0])


@pytest.mark.parametrize("places", [5, None, {"a": 5}, {"a": "../weights.safetensors"}, {"a": "/dev/zero"}])
def test_an_index_that_names_no_files_of_its_folder(places, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=r"index\.json: (it has no weight_map|.* is no file of this folder)"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *("student: {depth: 1000000000}", "student: {num_heads: -3}", "student: 5", "- 1", "student: [", "a: &a [*a]"),
        *("crops: {global_crops_size: 1e30}", "crops: null", "student: {arch: 7}", "student: {layerscale: many}"),
        "[" * 5000,
    ],
)
def test_a_config_that_no_run_writes(text, run):
    folder = run[0]
    if re.match(r"student: {|crops: {", text):
        text = OmegaConf.to_yaml(OmegaConf.merge(config_of(TINY), OmegaConf.create(text)))
    (folder / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml is not what a run writes"):
        load_backbone(folder)


def test_descriptions_of_a_checkpoint_that_promise_more_than_its_files(run):
    newest = run[0] / "checkpoints" / "iteration_0000200"
    good = (newest / ".metadata").read_bytes()

    def spoil(change):
        metadata = pickle.loads(good)
        change(metadata)
        (newest / ".metadata").write_bytes(pickle.dumps(metadata))
        return refusal(newest)

    entry = "model.teacher.backbone.cls_token"
    assert re.search(
        r"lists tensors of \d+ bytes, and the files have \d+",
        spoil(lambda metadata: setattr(metadata.state_dict_metadata[entry], "size", torch.Size([2**40]))),
    )
    for place in ("../../config.yaml", "/dev/zero"):
        text = spoil(
            lambda metadata, place=place: [
                setattr(each, "relative_path", place) for each in metadata.storage_data.values()
            ]
        )
        assert "is no file of this folder" in text
    (newest / ".metadata").write_bytes(good)
    (newest / "__0_0.distcp").rename(newest / "elsewhere")
    os.mkfifo(newest / "__0_0.distcp")
    assert "is a named pipe" in refusal(newest)

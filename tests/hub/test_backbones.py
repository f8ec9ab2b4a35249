"""Whatever layout a weights file has, load_backbone gives the network that was saved, or names the fault."""

import copy
import json
import logging
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dinov2.data.datasets.decode import UnreadableImageError, resize_image
from dinov2.data.transforms import normalize_images
from dinov2.hub import backbones
from dinov2.hub.backbones import ImageTransform, load_backbone
from dinov2.models import architecture, build_backbone

TINY = {
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 1,
    "patch_size": 14,
    "img_size": 56,
    "layerscale": 1.0,
    "block_chunks": 0,
}


@pytest.fixture
def tiny(formulas):
    """Builds a tiny network whose every parameter is set by a formula."""

    def build(**settings):
        return formulas.fill_(build_backbone({**TINY, **settings}), "hub").eval()

    return build


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


HEADS = {
    "dino_head.mlp.0.weight": torch.ones(2, 3),
    "dino_head.last_layer.parametrizations.weight.original0": torch.full((2, 1), 3.0),
    "dino_head.last_layer.parametrizations.weight.original1": torch.ones(2, 4),
    "ibot_head.last_layer.weight_g": torch.ones(2, 1),
    "ibot_head.last_layer.weight_v": torch.ones(2, 4),
}
LAYOUTS = {
    "bare, as DINOv2 releases": lambda state: state,
    "DinoBloom release": lambda state: {"teacher": {**prefixed("backbone.", state), **HEADS}},
    "DinoBloom release without heads": lambda state: {"teacher": prefixed("backbone.", state)},
    "bare inside teacher": lambda state: {"teacher": state, "epoch": 3},
    "model": lambda state: {"model": {**state, "head.weight": torch.ones(2, 2)}, "iteration": 7},
    "state_dict": lambda state: {"state_dict": prefixed("module.backbone.", state)},
    "DistributedDataParallel": lambda state: {"teacher": prefixed("module.backbone.", state)},
    "compiled": lambda state: {"teacher": prefixed("backbone._orig_mod.", state)},
    "compiled blocks": lambda state: {
        name.replace("blocks.1.", "blocks.1._orig_mod."): value for name, value in state.items()
    },
    "FSDP": lambda state: {"model": prefixed("_fsdp_wrapped_module.teacher.backbone._fsdp_wrapped_module.", state)},
    "whole training state": lambda state: {
        "model": {
            **prefixed("student.backbone.", {name: value + 1 for name, value in state.items()}),
            **prefixed("teacher.backbone.", state),
            **prefixed("teacher.", HEADS),
            "dino_loss.center": torch.zeros(1, 2),
        }
    },
    "student and teacher apart": lambda state: {
        "student": {name: value + 1 for name, value in state.items()},
        "teacher": state,
    },
    "with the optimizer's state": lambda state: {
        "model": prefixed("module.", state),
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(64)}},
            "param_groups": [{"lr": 1}],
        },
        "scaler": None,
    },
    "compiled twice and wrapped": lambda state: {"teacher": prefixed("module._orig_mod.backbone._orig_mod.", state)},
    "without the mask token": lambda state: {name: value for name, value in state.items() if name != "mask_token"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_saved_network(layout, tiny, tmp_path, formulas):
    saved = tiny()
    torch.save(LAYOUTS[layout](saved.state_dict()), tmp_path / "weights.pth")
    loaded = load_backbone(tmp_path / "weights.pth", img_size=56)
    assert not loaded.training
    images = formulas.sym("x", (2, 3, 56, 56), 2)
    torch.testing.assert_close(loaded(images), saved(images), rtol=0, atol=0)
    assert all(parameter.dtype == torch.float32 and not parameter.is_meta for parameter in loaded.parameters())


@pytest.mark.parametrize("name", ["model.safetensors", "weights.pth", "safetensors under another name.bin"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_fp32(name, dtype, tiny, tmp_path):
    saved = tiny().to(dtype).state_dict()
    (torch.save if name.endswith(".pth") else save_file)(saved, tmp_path / name)
    loaded = load_backbone(tmp_path / name, img_size=56).state_dict()
    for parameter, value in saved.items():
        torch.testing.assert_close(loaded[parameter], value.float(), rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["DinoBloom release", "whole training state", "bare, as DINOv2 releases"])
def test_heads_come_under_the_names_of_the_old_weight_norm(layout, tiny, tmp_path):
    torch.save(LAYOUTS[layout](tiny().half().state_dict()), tmp_path / "weights.pth")
    heads = backbones.read_heads(tmp_path / "weights.pth")
    if layout.startswith("bare"):
        assert heads == {}
        return
    assert heads.keys() == {"dino_head", "ibot_head"}
    assert heads["dino_head"].keys() == {"mlp.0.weight", "last_layer.weight_g", "last_layer.weight_v"}
    assert heads["ibot_head"].keys() == {"last_layer.weight_g", "last_layer.weight_v"}
    assert torch.equal(heads["dino_head"]["last_layer.weight_g"], torch.full((2, 1), 3.0))


def test_the_metadata_of_safetensors_tell_what_tensors_do_not(tiny, tmp_path):
    saved = tiny(num_heads=4)
    save_file(saved.state_dict(), tmp_path / "a.safetensors", {"architecture": json.dumps(architecture(saved))})
    assert load_backbone(tmp_path / "a.safetensors", img_size=56).num_heads == 4
    assert backbones.trained_image_size(tmp_path / "a.safetensors") == 56
    save_file(saved.state_dict(), tmp_path / "b.safetensors", {"architecture": "vit_small", "format": "pt"})
    assert load_backbone(tmp_path / "b.safetensors", img_size=56).num_heads == 1
    save_file(saved.state_dict(), tmp_path / "c.safetensors", {"architecture": "{half"})
    with pytest.raises(ValueError, match=r"c\.safetensors: what should be JSON"):
        load_backbone(tmp_path / "c.safetensors", img_size=56)


def test_the_log_says_what_was_loaded(tiny, tmp_path, caplog):
    torch.save({"teacher": {**prefixed("backbone.", tiny(img_size=70).state_dict()), **HEADS}}, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "dinov2"):
        load_backbone(tmp_path / "w.pth", img_size=56)
    assert caplog.messages == [
        f"{tmp_path / 'w.pth'}: ViT with dim 64, depth 2, 1 heads, patch 14; all 35 tensors loaded; position "
        "embeddings resized from 5 x 5 to 4 x 4 patches; without its dino_head; without its ibot_head"
    ]


def test_the_transform_comes_with_the_network(tiny, tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "weights.pth")
    model = load_backbone(tmp_path / "weights.pth", img_size=56)
    pixels = np.random.default_rng(0).integers(0, 256, (70, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cell.png")
    image = model.transform(tmp_path / "cell.png")
    assert torch.equal(image, normalize_images(resize_image(Image.fromarray(pixels), 56)))
    assert model(image[None]).shape == (1, 64)
    assert not [name for name in model.state_dict() if "transform" in name]
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert copied.transform == model.transform == ImageTransform(56)
    copied.load_state_dict(model.state_dict())
    assert torch.compile(model, backend="eager").transform == model.transform
    untrained = backbones.untrained_backbone(tmp_path / "weights.pth", img_size=70)
    assert untrained.transform == ImageTransform(70)
    torch.save(tiny(in_chans=1).state_dict(), tmp_path / "grey.pth")
    assert load_backbone(tmp_path / "grey.pth", img_size=56).transform is None


@pytest.mark.parametrize(
    "settings",
    [
        {"ffn_layer": "swiglufused"},
        {"ffn_layer": "swiglufused", "mlp_ratio": 3.0},
        {"mlp_ratio": 2.0},
        {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0},
        {"layerscale": None},
        {"block_chunks": 2},
        {"depth": 5, "block_chunks": 2},
        {"qkv_bias": False, "proj_bias": False, "ffn_bias": False},
        {"patch_size": 8, "in_chans": 1},
        {"embed_dim": 128, "num_heads": 2, "depth": 1},
    ],
    ids=str,
)
def test_the_architecture_is_read_off_the_tensors(settings, tiny, tmp_path, formulas):
    saved = tiny(**settings)
    torch.save(saved.state_dict(), tmp_path / "weights.pth")
    loaded = load_backbone(tmp_path / "weights.pth", img_size=56)
    images = formulas.sym("x", (2, saved.in_chans, 56, 56), 2)
    torch.testing.assert_close(loaded(images), saved(images), rtol=0, atol=0)
    expected = architecture(saved) | {"block_chunks": 0}
    assert architecture(loaded) == expected


def test_a_runs_file_tells_what_tensors_do_not(tiny, tmp_path, formulas):
    saved = tiny(num_heads=4, interpolate_antialias=True, interpolate_offset=0.0)
    torch.save(
        {"teacher": prefixed("backbone.", saved.state_dict()), "architecture": architecture(saved)}, tmp_path / "t.pth"
    )
    loaded = load_backbone(tmp_path / "t.pth", img_size=56)
    assert (loaded.num_heads, loaded.interpolate_antialias, loaded.interpolate_offset) == (4, True, 0.0)
    images = formulas.sym("x", (2, 3, 98, 98), 2)  # another size than the grid's: interpolation shows
    torch.testing.assert_close(loaded(images), saved(images), rtol=0, atol=0)


@pytest.mark.parametrize("config", ["chunk2", "reg4", "swiglu", "nols"])
def test_upstreams_weights_give_upstreams_features(config, golden_json, golden_arrays, formulas, tmp_path):
    shapes = golden_json["backbone_params"][config]
    state = {name: formulas.parameter(f"golden/{config}", name, tuple(shape)) for name, shape in shapes.items()}
    torch.save({"teacher": prefixed("backbone.", state), "architecture": {"num_heads": 4}}, tmp_path / "upstream.pth")
    height, width = golden_json["backbone_configs"][config]["input"]
    images = formulas.sym(f"golden/{config}/x", (2, 3, height, width), 2)
    features = load_backbone(tmp_path / "upstream.pth")(images)
    expected = torch.from_numpy(golden_arrays[f"bb/{config}/nomask/cls"])
    torch.testing.assert_close(features, expected, rtol=0, atol=2e-5)


def test_position_embeddings_of_another_grid_become_dinoblooms(tiny, tmp_path, formulas, golden_arrays):
    state = tiny(img_size=518).state_dict()
    state["pos_embed"] = formulas.sym("golden/pe518", (1, 37 * 37 + 1, 64), 0.2)
    torch.save(state, tmp_path / "dinov2.pth")
    loaded = load_backbone(tmp_path / "dinov2.pth", img_size=224)
    expected = golden_arrays["pe/get_downloaded_dino_vit_interpolated(37->16)"]
    torch.testing.assert_close(loaded.pos_embed[0, :, :16].detach(), torch.from_numpy(expected), rtol=0, atol=2e-6)
    assert architecture(loaded)["img_size"] == 224
    unchanged = load_backbone(tmp_path / "dinov2.pth", img_size=518)
    torch.testing.assert_close(unchanged.pos_embed.detach(), state["pos_embed"], rtol=0, atol=0)


def test_the_newest_teacher_of_a_run_is_the_one_of_the_highest_iteration(tiny, tmp_path):
    for iteration in (9, 1000, 200):
        folder = tmp_path / "eval" / f"training_{iteration}"
        folder.mkdir(parents=True)
        state = tiny().state_dict() | {"cls_token": torch.full((1, 1, 64), float(iteration))}
        torch.save({"teacher": prefixed("backbone.", state)}, folder / "teacher_checkpoint.pth")
    (tmp_path / "eval" / "training_5000").mkdir()  # killed before it wrote
    assert load_backbone(tmp_path, img_size=56).cls_token[0, 0, 0] == 1000
    assert load_backbone(tmp_path / "eval" / "training_200", img_size=56).cls_token[0, 0, 0] == 200


def test_nothing_to_load(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_backbone(tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match="neither eval/training_<iteration>/teacher_checkpoint.pth"):
        load_backbone(tmp_path)


def torch_bytes(content, tmp_path, **options):
    file = tmp_path / "whole.pth"
    torch.save(content, file, **options)
    return file.read_bytes()


BAD_FILES = {
    "empty": ("weights.pth", lambda whole, legacy: b"", r"is empty \(0 bytes\)"),
    "web page": ("weights.pth", lambda whole, legacy: b"\n<!DOCTYPE html><html>Sign in</html>", "a web page"),
    "git-lfs": (
        "weights.safetensors",
        lambda whole, legacy: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "git lfs pull",
    ),
    "text": ("weights.pth", lambda whole, legacy: b"hello", "damaged or cut short"),
    "half a file": ("weights.pth", lambda whole, legacy: whole[: len(whole) // 2], "damaged or cut short"),
    "last bytes missing": ("weights.pth", lambda whole, legacy: whole[:-20], "damaged or cut short"),
    "its header overwritten": (
        "weights.pth",
        lambda whole, legacy: whole[:60] + bytes(200) + whole[260:],
        "damaged or cut short",
    ),
    "half an old file": ("weights.pth", lambda whole, legacy: legacy[: len(legacy) // 2], "damaged or cut short"),
    "start of an old file": ("weights.pth", lambda whole, legacy: legacy[:40], "damaged or cut short"),
    "half a safetensors": ("w.safetensors", lambda whole, legacy: (99).to_bytes(8, "little") + b"{}", "damaged or cut"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_holds_no_weights_is_named_with_the_reason(kind, tmp_path):
    name, spoil, message = BAD_FILES[kind]
    content = {"cls_token": torch.ones(5000)}
    whole = torch_bytes(content, tmp_path)
    legacy = torch_bytes(content, tmp_path, _use_new_zipfile_serialization=False)
    (tmp_path / name).write_bytes(spoil(whole, legacy))
    with pytest.raises(ValueError, match=message) as caught:
        load_backbone(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


class RunsCode:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_not_run(zipped, tiny, tmp_path):
    trace = tmp_path / "trace"
    content = {"teacher": tiny().state_dict(), "args": RunsCode(trace)}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"holds a \S*open, and to make one would run code"):
        load_backbone(tmp_path / "evil.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(content["args"], protocol=2))
    with pytest.raises(ValueError, match="run code|damaged"):
        load_backbone(tmp_path / "plain.pkl")
    assert not trace.exists()


def test_missing_unexpected_and_misshapen_tensors_are_listed(tiny, tmp_path):
    state = tiny(depth=3).state_dict()
    del state["blocks.1.mlp.fc1.bias"]
    state["blocks.0.attn.extra"] = torch.ones(1)
    state["norm.bias"] = torch.ones(3)
    torch.save(state, tmp_path / "spoilt.pth")
    with pytest.raises(ValueError, match="not make a whole backbone") as caught:
        load_backbone(tmp_path / "spoilt.pth", img_size=56)
    for part in (
        "1 missing: blocks.1.mlp.fc1.bias",
        "1 unexpected: blocks.0.attn.extra",
        "1 misshapen: norm.bias [3] instead of [64]",
    ):
        assert part in str(caught.value)


def without_block(state, number):
    return {name: value for name, value in state.items() if not name.startswith(f"blocks.{number}.")}


def test_a_lost_block_is_noticed(tiny, tmp_path):
    saved = tiny(depth=3)
    torch.save(without_block(saved.state_dict(), 1), tmp_path / "middle.pth")
    with pytest.raises(ValueError, match=r"14 missing: blocks\.1\.norm1\.weight.* and 6 more"):
        load_backbone(tmp_path / "middle.pth", img_size=56)
    last_lost = {"teacher": without_block(saved.state_dict(), 2), "architecture": architecture(saved)}
    torch.save(last_lost, tmp_path / "last.pth")
    with pytest.raises(ValueError, match="depth is 3 there and 2 in the tensors"):
        load_backbone(tmp_path / "last.pth", img_size=56)


def other_networks():
    state = {name: torch.ones(2, 2) for name in ("embeddings.cls_token", "encoder.layer.0.norm1.weight")}
    return [
        ({"model": state}, "not a DINOv2 backbone: no pos_embed, patch_embed.proj.weight, norm.weight; it holds"),
        ({"epoch": 3}, "it holds no tensors"),
        ([torch.ones(2)], "holds a list, not a dict"),
        ({"student": prefixed("backbone.", state)}, "a student and no teacher"),
        ({"model": prefixed("student.backbone.", state)}, "a student and no teacher"),
    ]


@pytest.mark.parametrize(("content", "message"), other_networks())
def test_other_networks_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        load_backbone(tmp_path / "other.pth")


def test_ambiguous_and_unfit_weights_are_refused(tiny, tmp_path):
    state = tiny().state_dict()
    torch.save(state | prefixed("module.", state), tmp_path / "twice.pth")
    with pytest.raises(ValueError, match="holds these twice: cls_token"):
        load_backbone(tmp_path / "twice.pth", img_size=56)
    torch.save(state | {"patch_embed.proj.weight": torch.ones(64, 588)}, tmp_path / "linear.pth")
    with pytest.raises(ValueError, match=r"proj.weight has the shape \[64, 588\]"):
        load_backbone(tmp_path / "linear.pth", img_size=56)
    torch.save(state, tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match="60"):
        load_backbone(tmp_path / "tiny.pth", img_size=60)
    torch.save(tiny(embed_dim=48, num_heads=3).state_dict(), tmp_path / "narrow.pth")
    with pytest.raises(ValueError, match="number of attention heads is unknown"):
        load_backbone(tmp_path / "narrow.pth", img_size=56)


def test_loading_leaves_the_random_numbers_alone(tiny, tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "weights.pth")
    before = torch.get_rng_state()
    load_backbone(tmp_path / "weights.pth", img_size=56)
    backbones.untrained_backbone(tmp_path / "weights.pth", img_size=56, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_untrained_backbone_follows_its_seed_and_not_the_weights(tiny, tmp_path):
    torch.save(tiny(num_register_tokens=4).state_dict(), tmp_path / "weights.pth")
    first, again, other = (
        backbones.untrained_backbone(tmp_path / "weights.pth", img_size=56, seed=seed).state_dict()
        for seed in (0, 0, 1)
    )
    trained = load_backbone(tmp_path / "weights.pth", img_size=56).state_dict()
    name = "blocks.0.attn.qkv.weight"
    assert first.keys() == trained.keys()
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], trained[name])


def test_an_image_becomes_normalised_squares_by_formula():
    levels = np.full((40, 60, 3), (51, 102, 204), dtype=np.uint8)
    found = ImageTransform(28)(Image.fromarray(levels))
    assert found.shape == (3, 28, 28)
    assert found.dtype == torch.float32
    expected = [(0.2 - 0.485) / 0.229, (0.4 - 0.456) / 0.224, (0.8 - 0.406) / 0.225]
    torch.testing.assert_close(found.amax(dim=(1, 2)), torch.tensor(expected))
    torch.testing.assert_close(found.amin(dim=(1, 2)), torch.tensor(expected))


def test_the_centre_is_kept_with_its_proportions():
    levels = np.zeros((30, 90, 3), dtype=np.uint8)
    levels[:, 30:60] = 255
    found = ImageTransform(30).resize(Image.fromarray(levels))
    assert found.min() == 255


def test_paths_and_images_give_the_same(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (33, 44, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "cell.png")
    transform = ImageTransform(28)
    expected = transform(Image.fromarray(levels))
    assert torch.equal(transform(tmp_path / "cell.png"), expected)
    assert torch.equal(transform(str(tmp_path / "cell.png")), expected)
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImageError, match=r"bad\.png"):
        transform(tmp_path / "bad.png")


def test_it_travels_between_processes_and_says_what_it_does():
    transform = ImageTransform(224)
    assert pickle.loads(pickle.dumps(transform)) == transform
    assert transform != ImageTransform(112)
    assert transform.mean == (0.485, 0.456, 0.406)
    assert transform.std == (0.229, 0.224, 0.225)
    assert "224 px" in str(transform)

"""Whatever layout a weights file has, load_backbone gives the network that was saved, or says what is wrong."""

import hashlib
import pickle
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinov2.hub import backbones
from dinov2.hub.backbones import load_backbone
from dinov2.models import architecture, build_backbone

REPOSITORY = Path(__file__).parents[2]
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


HEADS = {"dino_head.mlp.0.weight": torch.ones(2, 3), "ibot_head.last_layer.weight_g": torch.ones(2, 1)}
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
    "without the mask token": lambda state: {name: value for name, value in state.items() if name != "mask_token"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_saved_network(layout, tiny, tmp_path, formulas):
    saved = tiny()
    torch.save(LAYOUTS[layout](saved.state_dict()), tmp_path / "weights.pth")
    loaded = load_backbone(tmp_path / "weights.pth", img_size=56)
    assert not loaded.training
    pictures = formulas.sym("x", (2, 3, 56, 56), 2)
    torch.testing.assert_close(loaded(pictures), saved(pictures), rtol=0, atol=0)
    assert all(parameter.dtype == torch.float32 and not parameter.is_meta for parameter in loaded.parameters())


def test_safetensors_and_half_precision(tiny, tmp_path):
    saved = tiny().half().state_dict()
    save_file(saved, tmp_path / "model.safetensors")
    loaded = load_backbone(tmp_path / "model.safetensors", img_size=56).state_dict()
    for name, value in saved.items():
        torch.testing.assert_close(loaded[name], value.float(), rtol=0, atol=0)


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
    pictures = formulas.sym("x", (2, saved.in_chans, 56, 56), 2)
    torch.testing.assert_close(loaded(pictures), saved(pictures), rtol=0, atol=0)
    expected = architecture(saved) | {"block_chunks": 0}
    assert architecture(loaded) == expected


def test_a_runs_file_tells_what_tensors_do_not(tiny, tmp_path, formulas):
    saved = tiny(num_heads=4, interpolate_antialias=True, interpolate_offset=0.0)
    torch.save(
        {"teacher": prefixed("backbone.", saved.state_dict()), "architecture": architecture(saved)}, tmp_path / "t.pth"
    )
    loaded = load_backbone(tmp_path / "t.pth", img_size=56)
    assert (loaded.num_heads, loaded.interpolate_antialias, loaded.interpolate_offset) == (4, True, 0.0)
    pictures = formulas.sym("x", (2, 3, 98, 98), 2)  # another size than the grid's: interpolation shows
    torch.testing.assert_close(loaded(pictures), saved(pictures), rtol=0, atol=0)


@pytest.mark.parametrize("config", ["chunk2", "reg4", "swiglu", "nols"])
def test_upstreams_weights_give_upstreams_features(config, golden_json, golden_arrays, formulas, tmp_path):
    shapes = golden_json["backbone_params"][config]
    state = {name: formulas.parameter(f"golden/{config}", name, tuple(shape)) for name, shape in shapes.items()}
    torch.save({"teacher": prefixed("backbone.", state), "architecture": {"num_heads": 4}}, tmp_path / "upstream.pth")
    height, width = golden_json["backbone_configs"][config]["input"]
    pictures = formulas.sym(f"golden/{config}/x", (2, 3, height, width), 2)
    features = load_backbone(tmp_path / "upstream.pth")(pictures)
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
    with pytest.raises(FileNotFoundError, match="no eval/training_<iteration>/teacher_checkpoint.pth"):
        load_backbone(tmp_path)


def torch_bytes(content, tmp_path, **options):
    file = tmp_path / "whole.pth"
    torch.save(content, file, **options)
    return file.read_bytes()


BAD_FILES = {
    "empty": ("weights.pth", lambda whole, legacy: b"", "cut short at 0 bytes"),
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
        ({"model": state}, "not a DINOv2 backbone: no cls_token.*it holds embeddings.cls_token"),
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


def test_file_sha256(tmp_path):
    content = bytes(range(256)) * 5000  # more than one block
    (tmp_path / "file").write_bytes(content)
    assert backbones.file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_hub_names_ask_for_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"download DinoBloom-L\.pth from https://zenodo.org/records/10908163"):
        backbones.dinobloom_l()
    with pytest.raises(ValueError, match=r"dinov2_vitb14/dinov2_vitb14_reg4_pretrain\.pth and pass weights="):
        backbones.dinov2_vitb14_reg()
    with pytest.raises(ValueError, match="contradicts pretrained=False"):
        backbones.dinobloom_s(pretrained=False, weights=tmp_path / "DinoBloom-S.pth")


def test_torch_hub_finds_the_names_in_a_clone():
    names = runpy.run_path(str(REPOSITORY / "hubconf.py"))
    assert {f"dinobloom_{size}" for size in "sblg"} <= names.keys()
    assert {f"dinov2_vit{size}14{registers}" for size in "sblg" for registers in ("", "_reg")} <= names.keys()
    model = torch.hub.load(str(REPOSITORY), "dinov2_vits14_reg", source="local", pretrained=False, img_size=28)
    assert (model.embed_dim, model.n_blocks, model.num_heads, model.num_register_tokens) == (384, 12, 6, 4)
    assert (model.interpolate_antialias, model.interpolate_offset) == (True, 0.0)


def test_dinobloom_s_by_name(tmp_path):
    released = backbones.dinobloom_s(pretrained=False)
    torch.save({"teacher": {**prefixed("backbone.", released.state_dict()), **HEADS}}, tmp_path / "DinoBloom-S.pth")
    model = backbones.dinobloom_s(weights=tmp_path / "DinoBloom-S.pth")
    assert model.pos_embed.shape == (1, 257, 384)
    assert model.num_heads == 6
    n_parameters = 22_056_576 - (1370 - 257) * 384  # DINOv2's ViT-S/14, less the positions of 518 px
    assert sum(parameter.numel() for parameter in model.parameters()) == n_parameters
    assert torch.equal(model.blocks[11].attn.qkv.weight, released.blocks[11].attn.qkv.weight)
    with pytest.raises(ValueError, match=r"holds a ViT with dim 384, depth 12, 6 heads.*not a ViT with dim 768"):
        backbones.dinobloom_b(weights=tmp_path / "DinoBloom-S.pth")

"""torch.hub with a clone of this project, and released networks by name."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinov2.hub.backbones import ENTRY_POINTS, load_backbone
from dinov2.models import build_backbone

REPOSITORY = Path(__file__).parents[2]
NAMES = [f"dinobloom_{size}" for size in "sblg"]
NAMES += [f"dinov2_vit{size}14{registers}" for size in "sblg" for registers in ("", "_reg")]


@pytest.fixture(scope="module")
def small():
    """The state dict of an untrained ViT-S/14 as DINOv2 releases it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_backbone(
            {"arch": "dinov2_vits14", "layerscale": 1.0, "block_chunks": 0, "img_size": 518}
        ).state_dict()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty torch hub folder, and nobody to download from."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    for variable in ("DINOV2_RELEASES_URL", "DINOBLOOM_RELEASES_URL"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def test_torch_hub_finds_the_names_in_a_clone():
    hubconf = runpy.run_path(str(REPOSITORY / "hubconf.py"))
    assert set(NAMES) <= hubconf.keys()
    assert "your copy of these weights" in hubconf["dinobloom_b"].__doc__
    model = torch.hub.load(str(REPOSITORY), "dinov2_vits14_reg", source="local", pretrained=False, img_size=28)
    assert (model.embed_dim, model.n_blocks, model.num_heads, model.num_register_tokens) == (384, 12, 6, 4)
    assert (model.interpolate_antialias, model.interpolate_offset) == (True, 0.0)
    assert model.transform.image_size == 28


def test_a_clone_needs_no_installation(tmp_path):
    program = (
        "import sys, torch; sys.path = [p for p in sys.path if p != sys.argv[1]]\n"
        "model = torch.hub.load(sys.argv[1], 'dinobloom_s', source='local', pretrained=False, img_size=14)\n"
        "print(sys.modules['dinov2'].__file__)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", program, str(REPOSITORY)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(REPOSITORY / "dinov2" / "__init__.py"), done.stderr


def test_each_name_has_the_size_of_its_release():
    assert set(ENTRY_POINTS) == set(NAMES)
    for name, entry_point in ENTRY_POINTS.items():
        assert entry_point.__name__ == name
    with torch.device("meta"):
        models = {name: ENTRY_POINTS[name](pretrained=False) for name in NAMES}
    for name, model in models.items():
        assert model.transform.image_size == model.img_size == (224 if name.startswith("dinobloom") else 518)
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert sizes["dinov2_vits14"] == 22_056_576  # the counts of the published networks
    assert sizes["dinov2_vitb14"] == 86_580_480
    assert sizes["dinov2_vitl14"] == 304_368_640
    assert sizes["dinov2_vitg14"] == 1_136_480_768
    assert sizes["dinobloom_s"] == 22_056_576 - (1370 - 257) * 384


def test_the_table_of_networks_has_the_size_of_each():
    text = (REPOSITORY / "docs" / "weights.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`dino.*?) \| ViT-\w/14 \| ([\d,]+) \| ([\d,]+) million \|", text, re.MULTILINE)
    told = {name: (dim, size) for names, dim, size in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(told) == set(NAMES)
    with torch.device("meta"):
        for name, (dim, size) in told.items():
            network = ENTRY_POINTS[name](pretrained=False)
            n_parameters = sum(p.numel() for p in network.parameters())
            assert (dim, size) == (f"{network.embed_dim:,}", f"{n_parameters / 1e6:,.0f}"), name


def test_a_released_network_by_name(small, cache):
    torch.save(small, cache / "dinov2_vits14_pretrain.pth")  # as if fetched by hand
    released = ENTRY_POINTS["dinov2_vits14"]()
    assert torch.equal(released.pos_embed, small["pos_embed"])
    assert not released.training
    model = load_backbone("dinov2_vits14")
    assert model.pos_embed.shape == (1, 257, 384)
    assert model.num_heads == 6
    assert torch.equal(model.blocks[11].attn.qkv.weight, small["blocks.11.attn.qkv.weight"])
    assert model.transform.image_size == 224
    (cache / "dinov2_vits14_pretrain.pth").rename(cache / "DinoBloom-B.pth")
    for load in (load_backbone, lambda name: ENTRY_POINTS[name]()):
        with pytest.raises(ValueError, match=r"dinobloom_b: .*holds a ViT with dim 384.*, not a ViT with dim 768"):
            load("dinobloom_b")


def test_weights_may_be_ones_own_copy(small, tmp_path):
    heads = {"dino_head.mlp.0.weight": torch.ones(2, 3)}
    content = {"teacher": {**{f"backbone.{name}": value for name, value in small.items()}, **heads}}
    torch.save(content, tmp_path / "DinoBloom-S.pth")
    model = ENTRY_POINTS["dinobloom_s"](weights=tmp_path / "DinoBloom-S.pth")
    assert model.pos_embed.shape == (1, 257, 384)
    torch.save({**content, "architecture": {"img_size": 98}}, tmp_path / "finetuned.pth")
    assert ENTRY_POINTS["dinobloom_s"](weights=tmp_path / "finetuned.pth").transform.image_size == 98
    with pytest.raises(
        ValueError, match=r"DinoBloom-S\.pth' holds a ViT with dim 384.*not a ViT with dim 768.*take http"
    ):
        ENTRY_POINTS["dinobloom_b"](weights=tmp_path / "DinoBloom-S.pth")
    with pytest.raises(ValueError, match="contradicts pretrained=False"):
        ENTRY_POINTS["dinobloom_s"](pretrained=False, weights=tmp_path / "DinoBloom-S.pth")


def test_offline_a_name_says_which_file_to_put_where(cache, monkeypatch):
    monkeypatch.setattr("dinov2.utils.files.PAUSES", (0.0,))
    for name, file in (("dinobloom_l", "DinoBloom-L.pth"), ("dinov2_vitb14_reg", "dinov2_vitb14_reg4_pretrain.pth")):
        for load in (load_backbone, lambda name: ENTRY_POINTS[name]()):
            with pytest.raises(ConnectionError, match=rf"put it at {cache / file}"):
                load(name)

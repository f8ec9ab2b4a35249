"""The benchmark of embedding: its plain network is ours, and its parts run."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from dinov2.models import build_backbone

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch):
    """A module of scripts/, by its name."""
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    return importlib.import_module


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"block_chunks": 2, "num_register_tokens": 3, "layerscale": None},
        {"interpolate_offset": 0.0},
    ],
)
def test_the_plain_network_computes_what_ours_does(settings, script, formulas):
    small = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 14, "img_size": 42, "block_chunks": 0}
    ours = formulas.fill_(build_backbone({**small, "layerscale": 0.5, **settings}), "plain").eval()
    plain = script("plain_vit").PlainViT(ours).eval()
    sizes = (42, 70) if settings.get("interpolate_offset") is None else (42,)
    for size in sizes:
        images = torch.randn(2, 3, size, size)
        masks = torch.arange(2 * (size // 14) ** 2).view(2, -1) % 3 == 0
        expected = ours.forward_features(images, masks)
        cls_token, patches = plain(images, masks)
        torch.testing.assert_close(cls_token, expected["x_norm_clstoken"])
        torch.testing.assert_close(patches, expected["x_norm_patchtokens"])
    with pytest.raises(ValueError, match="'mlp' alone, not 'swiglufused'"):
        script("plain_vit").PlainViT(build_backbone({**small, "ffn_layer": "swiglufused"}))


def test_the_network_is_timed_and_compared(script, tmp_path, capsys):
    flags = ["--only", "network", "--archs", "Ti", "--batch", "2", "--image-size", "28", "--rounds", "2"]
    script("bench_features").main([*flags, "--folder", str(tmp_path), "--device", "cpu"])
    found = json.loads((tmp_path / "results.json").read_text())["network"]["Ti"]
    ways = ["ours fp32", "ours fp32 exact", "ours bf16", "plain fp32", "plain bf16"]
    assert {way: len(seconds) for way, seconds in found["seconds"].items()} == dict.fromkeys(ways, 2)
    assert found["agreement"]["ours fp32"]["of_largest"] < 1e-4
    assert 0.999 < found["agreement"]["ours bf16"]["least_cosine"] < 1
    assert "| ours bf16 | " in capsys.readouterr().out


@pytest.mark.slow
def test_files_become_the_same_features(script, tmp_path, capsys):
    flags = ["--only", "files", "--archs", "Ti", "--batch", "2", "--image-size", "28", "--rounds", "1"]
    script("bench_features").main([*flags, "--n-pictures", "6", "--folder", str(tmp_path), "--device", "cpu"])
    found = json.loads((tmp_path / "results.json").read_text())["files"]["Ti"]
    assert found["n_pictures"] == 6
    assert "ours bf16, 1 process, a thread decoding" in found["seconds"]
    assert "plain fp32, 1 process, 1 decoding / it" in capsys.readouterr().out


def test_flags_that_are_wrong(script, capsys):
    for weights in ("XL=file", "S"):
        with pytest.raises(SystemExit):
            script("bench_features").parse_arguments(["--weights", weights])
        assert "each must read like S=FILE, with one of Ti, S, B, L" in capsys.readouterr().err

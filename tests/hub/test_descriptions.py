"""Settings beside weights that neither transformers nor timm writes are refused with the name of their file."""

import json
import re

import pytest
from safetensors.torch import save_file

from dinov2.hub import descriptions
from dinov2.hub.backbones import load_backbone
from dinov2.models import build_backbone

TINY = {"embed_dim": 64, "depth": 1, "num_heads": 1, "patch_size": 14, "img_size": 56, "block_chunks": 0}


@pytest.fixture
def folder(tmp_path):
    """A folder with weights and no description."""
    save_file(dict(build_backbone(TINY).state_dict()), tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{",
        "null",
        '"text"',
        b"\xff\xfe",
        '{"model_type": ["dinov2"]}',
        '{"architecture": "x", "pretrained_cfg": 3}',
    ]
    + [json.dumps({"model_type": "dinov2", "num_attention_heads": value}) for value in (-1, "x", 10**30, [1], 0.5)]
    + [json.dumps({"architecture": "x", "input_size": value}) for value in ("x", 5, [3, -1], [[1]], {"a": 1})]
    + [json.dumps({"architecture": "x", "mean": value}) for value in ("abc", 5, [1, 2], [[1], 2, 3], [None] * 3)],
)
def test_a_config_with_other_values_than_its_library_writes(text, folder):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        load_backbone(folder)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_description_of_gigabytes_is_not_read(name, folder, monkeypatch):
    monkeypatch.setattr(descriptions, "LARGEST_DESCRIPTION", 200)
    (folder / "config.json").write_text('{"model_type": "dinov2"}')
    (folder / name).write_text(json.dumps({"model_type": "dinov2", "comment": "a" * 200}))
    with pytest.raises(ValueError, match=rf"{name}: has 2\d\d bytes, far more than settings need"):
        load_backbone(folder)

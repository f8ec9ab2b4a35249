"""Features do not depend on the file and the command that they come by."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from dinov2.eval.features.extract import Embedder, extract
from dinov2.eval.features.named_encoders import build_encoder
from dinov2.fsdp.checkpoint import Checkpointer
from dinov2.hub import export_formats
from dinov2.hub.backbones import (
    ImageTransform,
    load_backbone,
    recorded_transform,
    trained_image_size,
    untrained_backbone,
)
from dinov2.hub.classifiers import load_network
from dinov2.models import architecture, build_backbone

TINY = {
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 1,
    "patch_size": 14,
    "img_size": 42,
    "block_chunks": 0,
    "layerscale": 1,
}


def test_a_recorded_size_holds_in_python_the_commands_and_every_export(formulas, tmp_path):
    """A run on 42-px images: its teacher, its checkpoint to resume from, and each file exported from it."""
    model = formulas.fill_(build_backbone(TINY), "formats")
    run = tmp_path / "run"
    teacher = run / "eval" / "training_3" / "teacher_checkpoint.pth"
    teacher.parent.mkdir(parents=True)
    torch.save({"teacher": model.state_dict(), "architecture": architecture(model)}, teacher)
    checkpoints = Checkpointer(run / "checkpoints", 1)
    checkpoints.save(3, {"model": {"teacher": {"backbone": model.state_dict()}}}, {})
    assert checkpoints.wait()
    student = {**architecture(model), "arch": "vit_small", "drop_path_rate": 0.0, "drop_path_uniform": True}
    OmegaConf.save(OmegaConf.create({"student": student, "crops": {"global_crops_size": 42}}), run / "config.yaml")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("pth", "safetensors", "huggingface", "timm"):
        export_formats.FORMATS[name].write(load_network(run), out)
    cell = tmp_path / "cell.png"
    export_formats.draw_cells()[0].save(cell)
    expected = model.eval()(ImageTransform(42)(cell)[None])
    exported = ("backbone.pth", "backbone.safetensors", "huggingface", "timm")
    for source in (run, teacher, run / "checkpoints", *(out / name for name in exported)):
        loaded = load_backbone(source)
        assert (loaded.img_size, loaded.transform.image_size, trained_image_size(source)) == (42, 42, 42), source
        embedder = Embedder(checkpoint=source)
        assert untrained_backbone(source).img_size == embedder.image_size == 42
        for features in (
            loaded(loaded.transform(cell)[None]).detach(),
            extract(loaded, [cell]).features,
            embedder.extract([cell]).features,
        ):
            np.testing.assert_allclose(features, expected.detach(), rtol=0, atol=1e-5, err_msg=str(source))


def test_a_smaller_centre_holds_in_every_export(formulas, tmp_path):
    """Whole images stay unnamed in files; a share is read back, and other libraries prepare images with it."""
    whole = formulas.fill_(build_backbone(TINY), "formats")
    assert "center_crop" not in architecture(whole)
    model = build_backbone({**TINY, "center_crop": 0.65})
    model.load_state_dict(whole.state_dict())
    file, cell = tmp_path / "network.pth", export_formats.draw_cells()[0]
    torch.save({"teacher": model.state_dict(), "architecture": architecture(model)}, file)
    network, cells = load_network(file), [cell]
    with torch.no_grad():
        expected = whole.eval()(ImageTransform(42, 0.65)(cell)[None])
        for name in ("pth", "safetensors", "huggingface", "timm"):
            export_formats.FORMATS[name].write(network, tmp_path)
            export_formats.compare(name, network, tmp_path, cells * 3, 1e-4)
        for name in ("backbone.pth", "backbone.safetensors", "huggingface", "timm"):
            loaded = load_backbone(tmp_path / name)
            assert architecture(loaded)["center_crop"] == 0.65, name
            assert loaded.transform == ImageTransform(42, 0.65) == recorded_transform(tmp_path / name)
            assert untrained_backbone(tmp_path / name).transform == loaded.transform
            np.testing.assert_allclose(loaded(loaded.transform(cell)[None]), expected, rtol=0, atol=1e-5, err_msg=name)
    preprocessor = json.loads((tmp_path / "huggingface" / "preprocessor_config.json").read_text())
    assert (preprocessor["size"], preprocessor["crop_pct"]) == ({"shortest_edge": 65}, 0.65)
    assert preprocessor["crop_size"] == {"height": 42, "width": 42}
    config = tmp_path / "timm" / "config.json"
    content = json.loads(config.read_text())
    assert content["pretrained_cfg"]["crop_pct"] == 0.65
    encoder = build_encoder(f"timm:local-dir:{tmp_path / 'timm'}")
    assert "64 px" in encoder.transform  # timm rounds 42 / 0.65 down

    # as folders of others have it: what they say of the crop is not what their features are compared with here
    del content["center_crop"]
    config.write_text(json.dumps(content))
    assert load_backbone(tmp_path / "timm").transform == ImageTransform(42)
    config.write_text(json.dumps({**content, "center_crop": 7}))
    with pytest.raises(ValueError, match=r"its recorded center_crop is 7, expected a number from 0\.01 to 1"):
        load_backbone(tmp_path / "timm")

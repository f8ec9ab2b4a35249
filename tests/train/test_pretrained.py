"""What a run starts from: whatever `load_backbone` reads, with heads, under a name, and what is said about it."""

import logging

import pytest
import torch

from dinov2.configs import CONFIG_FOLDER
from dinov2.models.vision_transformer import resize_pos_embed, vit_small
from dinov2.train.evaluation import save_teacher, teacher_state
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.train import main
from dinov2.utils.config import load_run_config

CUSTOM = CONFIG_FOLDER / "train" / "custom.yaml"


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dinov2"), "propagate", True)
    caplog.set_level(logging.INFO, logger="dinov2")
    return caplog


@pytest.fixture
def teacher_file(configured, tmp_path):
    """A training run's teacher with both heads."""

    def write(*overrides: str, seed: int = 7):
        torch.manual_seed(seed)
        model = SSLMetaArch(configured("ibot.separate_head=true", *overrides))
        path = tmp_path / "teacher_checkpoint.pth"
        save_teacher(teacher_state(model), model, path, 1)
        return path, teacher_state(model)

    return write


def equal_parts(model: SSLMetaArch, state: dict[str, torch.Tensor]) -> set[str]:
    """Parts of student and teacher whose tensors are all those of `state`."""
    parts = set(model.student)
    for role in (model.student, model.teacher):
        for name, value in role.state_dict().items():
            if name not in state or not torch.equal(value, state[name]):
                parts.discard(name.split(".")[0])
    return parts


def test_backbone_and_heads_of_a_run(configured, teacher_file, log):
    path, state = teacher_file()
    model = SSLMetaArch(configured("ibot.separate_head=true", f"student.pretrained_weights={path}"))
    assert equal_parts(model, state) == {"backbone", "dino_head", "ibot_head"}
    assert "all 35 tensors of the backbone, dino_head, ibot_head; at random: nothing" in log.text
    assert "(sha256 " in log.text


def test_heads_of_other_shapes_start_at_random_with_a_warning(configured, teacher_file, log):
    path, state = teacher_file("ibot.head_n_prototypes=24")
    model = SSLMetaArch(configured("ibot.separate_head=true", f"MODEL.WEIGHTS={path}"))
    assert equal_parts(model, state) == {"backbone", "dino_head"}
    (warning,) = [record.getMessage() for record in log.records if record.levelno == logging.WARNING]
    assert "its ibot_head does not fit" in warning
    assert "last_layer.weight_g [24, 1] instead of [16, 1]" in warning
    assert "the keys ibot.head_* the values of its training" in warning
    assert "at random: ibot_head" in log.text


def test_a_backbone_alone_leaves_heads_at_random(configured, teacher_file, log, tmp_path):
    path, state = teacher_file()
    alone = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    torch.save({"model": alone, "architecture": {"num_heads": 2}}, path)
    model = SSLMetaArch(configured("student.block_chunks=2", f"student.pretrained_weights={path}"))
    assert "at random: dino_head" in log.text
    own = model.student["backbone"].state_dict()
    assert torch.equal(own["blocks.1.1.attn.qkv.weight"], alone["blocks.1.attn.qkv.weight"])


def test_a_backbone_that_does_not_fit_is_an_error_with_names(configured, teacher_file):
    path, _ = teacher_file("student.depth=3")
    with pytest.raises(
        ValueError, match=r"another architecture than student\.arch=vit_small.*blocks\.2\.norm1\.weight"
    ):
        SSLMetaArch(configured(f"student.pretrained_weights={path}"))


def test_a_release_by_name(configured, log, tmp_path, monkeypatch):
    """A file that was put where the download would go; its 37 x 37 positions become those of the crops."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    released = vit_small(patch_size=14, img_size=518, init_values=1.0, block_chunks=0)
    file = tmp_path / "hub" / "checkpoints" / "dinov2_vits14_pretrain.pth"
    file.parent.mkdir(parents=True)
    torch.save(released.state_dict(), file)
    sizes = [f"student.{name}=null" for name in ("embed_dim", "depth", "num_heads")]
    whole = [*sizes, "student.arch=dinov2_vits14", "student.pretrained_weights=dinov2_vits14"]
    model = SSLMetaArch(configured(*whole, recipe=CUSTOM))
    for role in (model.student, model.teacher):
        own = role["backbone"].state_dict()
        assert torch.equal(own["blocks.11.mlp.fc2.weight"], released.blocks[11].mlp.fc2.weight)
        assert torch.equal(own["pos_embed"], resize_pos_embed(released.pos_embed, 2))
    assert f"start from {file} (sha256" in log.text
    with pytest.raises(ValueError, match=r"student\.arch=vit_small.*set student\.arch=dinov2_vits14"):
        SSLMetaArch(configured(whole[-1]))


def test_custom_yaml_starts_from_dinov2_as_dinobloom_did():
    assert load_run_config(CUSTOM).student.pretrained_weights == "dinov2_vitb14"
    assert load_run_config(CUSTOM, ["student.pretrained_weights=null"]).student.pretrained_weights is None


def test_without_a_network_the_file_to_fetch_and_its_place_are_named(
    tmp_path, image_list, tiny_overrides, capfd, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("DINOV2_RELEASES_URL", "http://127.0.0.1:9/dinov2")  # where nobody answers
    arguments = ["--config-file", str(CUSTOM), "--output-dir", str(tmp_path / "out"), "--name", "run"]
    tiny = tiny_overrides(image_list(), "student.pretrained_weights=dinov2_vitb14")
    assert main([*arguments, *tiny]) == 2
    told = capfd.readouterr().err
    assert "http://127.0.0.1:9/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth cannot be downloaded" in told
    assert f"put it at {tmp_path}/hub/checkpoints/dinov2_vitb14_pretrain.pth" in told
    assert "from random weights student.pretrained_weights=null" in told
    assert "Traceback" not in told


def test_a_run_that_goes_on_needs_its_start_no_more(tmp_path, image_list, tiny_overrides, teacher_file):
    path, _ = teacher_file()
    arguments = ["--output-dir", str(tmp_path / "out"), "--name", "run"]
    tiny = tiny_overrides(image_list(), f"student.pretrained_weights={path}")
    assert main([*arguments, *tiny, "optim.epochs=1"]) == 0
    path.unlink()
    assert main([*arguments, *tiny, "optim.epochs=2"]) == 0
    assert main([*arguments, *tiny, "--eval-only"]) == 0
    assert main([*arguments, *tiny, "--no-resume"]) == 2


def test_the_launcher_finds_weights_that_are_not_there(tmp_path, image_list, tiny_overrides, monkeypatch):
    monkeypatch.setenv("DINOV2_RELEASES_URL", "http://127.0.0.1:9/dinov2")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    pytest.importorskip("submitit")
    from dinov2.run.train.train import check_settings
    from dinov2.train.train import parse_arguments

    lists = image_list()

    def check(*overrides: str) -> None:
        check_settings(parse_arguments(tiny_overrides(lists, *overrides)), 1)

    check()
    with pytest.raises(FileNotFoundError, match="no release has that name; perhaps dinov2_vits14"):
        check("student.pretrained_weights=dinov2_vits4")
    with pytest.raises(ConnectionError, match="put it at"):
        check("student.pretrained_weights=dinov2_vits14")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ConnectionError, match=r"student.pretrained_weights=hf-hub:lab/cells@v1: .*pass the path.*=null"
    ):
        check("student.pretrained_weights=hf-hub:lab/cells@v1")
    with pytest.raises(ValueError, match="did you mean patch_embed"):
        check("student.freeze=[patch_embd]")

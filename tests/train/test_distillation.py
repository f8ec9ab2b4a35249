"""A student learns the tokens of a frozen network, which a run of the test trained."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dinov2.hub.backbones import load_backbone
from dinov2.models import architecture, build_backbone
from dinov2.train.batches import TrainBatches, build_dataset
from dinov2.train.distillation import load_frozen_teacher
from dinov2.train.dry_run import count_step_flops
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.files import file_sha256

ALONE = [f"{key}=0" for key in ("dino.loss_weight", "ibot.loss_weight", "dino.koleo_loss_weight")]
ALONE += ["crops.local_crops_number=0", "teacher.momentum_teacher=0", "teacher.final_momentum_teacher=0"]
# wider, deeper and with smaller patches than the students of the tests
LARGER = ["student.embed_dim=48", "student.depth=3", "student.patch_size=7", "crops.global_crops_size=42"]


@pytest.fixture
def teacher(run):
    code, folder = run(*LARGER, "student.layerscale=1.0", name="teacher")
    assert code == 0
    return folder


def state_of(folder, n=4) -> dict[str, torch.Tensor]:
    dcp_to_torch_save(folder / "checkpoints" / f"iteration_{n:07d}", folder / "whole.pth")
    return torch.load(folder / "whole.pth", weights_only=True)["model"]


def test_the_written_network_is_the_small_one_and_is_evaluated(run, rows, teacher, tmp_path, image_list):
    cells, table = image_list(n=12, folder=tmp_path / "cells"), tmp_path / "cells.csv"
    lines = [f"{path},{'ab'[i % 2]}\n" for i, path in enumerate(sorted(cells.glob("images/*.png")))]
    table.write_text("".join(["Image Path,Label\n", *lines]))
    evaluation = f"evaluation.datasets=[{{name: cells, data: {table}, knn_k: [1, 2]}}]"
    code, folder = run(*ALONE, f"teacher.pretrained_weights={teacher}", evaluation)
    assert code == 0
    assert {name for name in rows(folder)[0] if name.endswith("_loss")} == {
        "total_loss",
        "distill_cls_loss",
        "distill_patch_loss",
    }
    assert json.loads((folder / "eval" / "best.json").read_text())["iteration"] == 4
    written = torch.load(folder / "eval" / "training_4" / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    state = state_of(folder)
    assert {name.split(".")[0] for name in written} == {"backbone"}
    assert not any(value.shape[-1] == 48 for name, value in state.items() if "distillation_head" not in name)
    for name, value in written.items():  # momentum 0
        assert torch.equal(value, state[f"student.{name}"])
    assert load_backbone(folder, img_size=28)(torch.zeros(1, 3, 28, 28)).shape == (1, 32)
    frozen = OmegaConf.load(folder / "config.yaml").teacher.frozen
    assert (frozen.embed_dim, frozen.patch_size) == (48, 7)
    assert frozen.sha256 == file_sha256(teacher / "eval" / "training_4" / "teacher_checkpoint.pth")


def test_the_loss_is_the_distance_to_standardised_tokens_of_the_same_patches(configured, teacher, image_list, tmp_path):
    lists = image_list(folder=tmp_path / "own")
    cfg = configured(*ALONE, f"teacher.pretrained_weights={teacher}", "student.drop_path_rate=0", lists=lists)
    dataset = build_dataset(cfg)
    frozen = load_frozen_teacher(cfg, torch.device("cpu"))
    model = SSLMetaArch(cfg, frozen_teacher=frozen)
    assert not any("frozen" in name for name in model.state_dict())
    (images,) = next(TrainBatches(cfg, dataset, torch.device("cpu")).starting_at())
    losses = model.forward_backward(images, teacher_temp=0.07)
    crops = images["collated_global_crops"]
    resized = F.interpolate(crops, size=(14, 14), mode="bicubic", antialias=True)  # 2 x 2 patches of 7 px
    theirs = load_backbone(teacher)(resized, is_training=True)
    ours = model.student["backbone"](crops, is_training=True)
    head = model.student["distillation_head"]
    for name, key, project in (
        ("distill_cls_loss", "x_norm_clstoken", head.cls),
        ("distill_patch_loss", "x_norm_patchtokens", head.patches),
    ):
        tokens = theirs[key]
        deviation = tokens.var(dim=-1, correction=0, keepdim=True).add(1e-5).sqrt()
        standard = (tokens - tokens.mean(dim=-1, keepdim=True)) / deviation
        torch.testing.assert_close(losses[name], (project(ours[key]) - standard).square().mean())
    assert all(parameter.grad is None for parameter in frozen.parameters())
    assert model.student["backbone"].blocks[0].mlp.fc1.weight.grad.abs().sum() > 0


def test_the_student_learns_the_teacher(run, rows, teacher):
    schedule = ["train.OFFICIAL_EPOCH_LENGTH=60", "optim.epochs=1", "optim.warmup_epochs=0.1", "optim.base_lr=0.05"]
    code, folder = run(*ALONE, *schedule, "student.layerscale=1.0", f"teacher.pretrained_weights={teacher}")
    assert code == 0
    for name in ("distill_cls_loss", "distill_patch_loss"):
        values = [row[name] for row in rows(folder)]
        assert sum(values[-5:]) / 5 < 0.5 * values[0], name


def test_it_stands_beside_the_other_losses(run, rows, teacher):
    code, folder = run(
        f"teacher.pretrained_weights={teacher}", "train.batch_size_per_gpu=2", "train.accumulation_steps=2"
    )
    assert code == 0
    names = {"dino_global_crops_loss", "ibot_loss", "koleo_loss", "distill_cls_loss", "distill_patch_loss"}
    assert names <= rows(folder)[0].keys()
    written = torch.load(folder / "eval" / "training_4" / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    assert {name.split(".")[0] for name in written} == {"backbone", "dino_head"}


def test_a_moved_teacher_is_the_same_run_and_another_one_is_not(run, teacher, tmp_path, failing):
    weights = tmp_path / "weights.pth"
    shutil.copy(teacher / "eval" / "training_4" / "teacher_checkpoint.pth", weights)
    assert run(*ALONE, f"teacher.pretrained_weights={teacher}")[0] == 0
    assert run(*ALONE, f"teacher.pretrained_weights={weights}")[0] == 0
    assert run(*ALONE, "teacher.pretrained_weights=/gone.pth", arguments=("--eval-only",))[0] == 0
    content = torch.load(weights, weights_only=True)
    content["teacher"]["backbone.cls_token"] += 1
    torch.save(content, weights)
    assert "another architecture (teacher.frozen" in failing(*ALONE, f"teacher.pretrained_weights={weights}")


def test_mistakes_are_named(failing):
    text = failing("teacher.pretrained_weights=/nowhere.pth")
    assert "teacher.pretrained_weights=/nowhere.pth: " in text
    assert "null for none" in text
    assert "set teacher.pretrained_weights instead" in failing("teacher.frozen={arch: vit_small}")
    assert "nothing is learned" in failing(*ALONE)


def test_a_network_of_other_images_is_refused_or_named(run, failing, tmp_path):
    settings = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 14, "img_size": 28, "layerscale": 1.0}
    for name, more in (("grey", {"in_chans": 1}), ("centre", {"center_crop": 0.5}), ("whole", {})):
        model = build_backbone({**settings, **more, "block_chunks": 0})
        torch.save({"teacher": model.state_dict(), "architecture": architecture(model)}, tmp_path / f"{name}.pth")
    text = failing(*ALONE, f"teacher.pretrained_weights={tmp_path / 'grey.pth'}")
    assert "grey.pth takes images of 1 channels, and training has RGB" in text
    for name, theirs, own in (("centre", 0.5, 1.0), ("whole", 1.0, 0.5)):
        weights = f"teacher.pretrained_weights={tmp_path / name}.pth"
        code, folder = run(*ALONE, weights, f"train.center_crop={own}", name=name)
        assert code == 0
        log = (folder / "logs" / "log.txt").read_text()
        assert log.count(f"{name}.pth was trained with train.center_crop={theirs}, and this run has {own}") == 1


def test_the_frozen_network_is_counted(configured, teacher, image_list, tmp_path):
    lists = image_list(folder=tmp_path / "own")
    alone, distilled = configured(lists=lists), configured(f"teacher.pretrained_weights={teacher}", lists=lists)
    load_frozen_teacher(distilled, torch.device("cpu"))
    assert count_step_flops(distilled) > count_step_flops(alone)

"""The benchmark of the training step: both of its steps do the same mathematics, and each part writes its table."""

import json
from functools import partial

import pytest
import torch

TINY = [
    *("student.embed_dim=32", "student.depth=2", "student.num_heads=2", "student.patch_size=14"),
    *("student.layerscale=0.5", "crops.global_crops_size=56", "crops.local_crops_size=28"),
    *("dino.head_n_prototypes=48", "dino.head_hidden_dim=32", "dino.head_bottleneck_dim=16", "dino.head_nlayers=2"),
    *("ibot.head_n_prototypes=64", "ibot.head_hidden_dim=32", "ibot.head_bottleneck_dim=16", "ibot.head_nlayers=1"),
]


def name_of(name: str, text: str) -> str:
    """Put the name of what was compared before a comparison's message."""
    return f"{name}: {text}"


@pytest.fixture
def make_both(script):
    """Make our model, the plain step with its weights, and a batch."""
    step, plain = script("step"), script("plain")

    def make(*overrides, precision="fp32"):
        device = torch.device("cpu")
        settings = ["student.arch=vit_tiny", "train.batch_size_per_gpu=3", *TINY, *overrides]
        cfg = step.load_recipe(device, precision, settings)
        model = step.build_model(cfg, device)
        with torch.no_grad():  # student and teacher start equal, and the teacher would then hide mistakes in its use
            for parameter in model.teacher.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return model, plain.PlainStep(model, step.DTYPES[precision]), step.make_batch(cfg, device)

    return make


@pytest.mark.parametrize("overrides", [(), ("crops.local_crops_number=2", "dino.loss_weight=1.0")])
def test_plain_and_our_step_have_the_same_losses_and_gradients(make_both, overrides):
    model, plain, images = make_both(*overrides)
    ours, theirs = model.forward_backward(images, teacher_temp=0.05), plain.forward_backward(images, 0.05)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-6, msg=partial(name_of, name))
    gradients = {name: parameter.grad for name, parameter in plain.student.named_parameters()}
    for name, parameter in model.student.named_parameters():
        atol = 1e-4 * parameter.grad.abs().max().item()
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=atol, msg=partial(name_of, name))


def test_plain_and_our_step_move_weights_alike(make_both, script):
    model, plain, images = make_both()
    step = script("step")
    ours = step.OurStep(model)
    for group in [*ours.optimizer.param_groups, *plain.optimizer.param_groups]:
        group["lr"] = step.LR
    for _ in range(2):
        for take_step in (ours, plain):
            take_step(images, step.TEACHER_TEMP, step.MOMENTUM, step.MAX_NORM)
    for network in ("student", "teacher"):
        theirs = getattr(plain, network).state_dict()
        for name, value in getattr(model, network).state_dict().items():
            # AdamW moves an entry whose gradient is rounding alone by up to a whole learning rate
            torch.testing.assert_close(theirs[name], value, rtol=0, atol=2.1 * step.LR, msg=partial(name_of, name))


def test_plain_step_in_bf16_is_near_fp32(make_both):
    _, plain, images = make_both(precision="bf16")
    _, exact, _ = make_both()
    theirs, wanted = plain.forward_backward(images, 0.05), exact.forward_backward(images, 0.05)
    for name, value in wanted.items():
        torch.testing.assert_close(theirs[name], value, rtol=0.02, atol=1e-3, msg=partial(name_of, name))


def test_plain_step_refuses_other_recipes(make_both):
    with pytest.raises(ValueError, match=r"set train\.centering=sinkhorn_knopp, student\.drop_path_rate=0,"):
        make_both("train.centering=centering", "student.drop_path_rate=0.1")


def test_plain_step_sends_the_unused_local_crop_through_the_student(make_both):
    _, plain, images = make_both()
    rows = []
    plain.student.dino_head.mlp.register_forward_pre_hook(lambda _module, inputs: rows.append(len(inputs[0])))
    plain.forward_backward(images, 0.05)
    assert rows == [3 * 3]  # two global crops and a local one of each image


@pytest.mark.slow
def test_speed_agreement_and_attention_have_tables(script, tmp_path, rows_of):
    flags = ["--only", "speed", "agreement", "attention", "--networks", "Ti=2", "--rounds", "1", "--tokens", "5"]
    ways = ["ours bf16", "plain fp32"]
    script("step").main([*flags, "--folder", str(tmp_path), "--device", "cpu", "--ways", *ways, "--set", *TINY])
    speed = json.loads((tmp_path / "speed.json").read_text())["ViT-Ti, batch 2"]
    assert {way: len(seconds) for way, seconds in speed["seconds"].items()} == dict.fromkeys(ways, 1)
    assert all(costs["peak"] > costs["added"] > 0 and costs["rate"] > 0 for costs in speed["costs"].values())
    assert {"optimizer", "teacher update"} <= speed["stages"]["ours bf16"].keys()
    assert [row[0] for row in rows_of(tmp_path / "speed.md")] == ["way", *ways, "way", "ours bf16"]
    agreement = json.loads((tmp_path / "agreement.json").read_text())
    assert agreement["Ti, ours bf16"]["gradient_cosine"] == pytest.approx(1, abs=0.01)
    assert agreement["Ti, plain fp32"]["loss_error"] == 0
    assert [row[0] for row in rows_of(tmp_path / "attention.md")[1:]] == ["cpu, fp32, 5", "cpu, bf16, 5"]
    assert all(float(cell) > 0 for row in rows_of(tmp_path / "attention.md")[1:] for cell in row[1:3])


@pytest.mark.slow
def test_each_spin_count_has_a_rate_under_each_load(script, tmp_path, rows_of):
    flags = ["--only", "contention", "--networks", "Ti=2", "--rounds", "1", "--loads", "0", "1"]
    counts = ["--spin-counts", "300000", "0"]
    script("step").main([*flags, *counts, "--folder", str(tmp_path), "--device", "cpu", "--set", *TINY])
    _, *rows = rows_of(tmp_path / "contention.md")
    assert [row[0] for row in rows] == ["300,000", "0"]
    assert all(float(cell.split(",")[0]) > 0 for row in rows for cell in row[1:])
    assert len(rows[0]) == 3

"""The benchmark of the training step: both of its steps do the same mathematics, and its parts run."""

import importlib
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"
TINY = [
    *("student.arch=vit_tiny", "student.embed_dim=32", "student.depth=2", "student.num_heads=2"),
    *("student.layerscale=0.5", "crops.global_crops_size=56", "crops.local_crops_size=28"),
    *("dino.head_n_prototypes=48", "dino.head_hidden_dim=32", "dino.head_bottleneck_dim=16", "dino.head_nlayers=2"),
    *("ibot.head_n_prototypes=64", "ibot.head_hidden_dim=32", "ibot.head_bottleneck_dim=16", "ibot.head_nlayers=1"),
    "train.batch_size_per_gpu=3",
]


def said(name: str, text: str) -> str:
    """A failed comparison's message, with the name of what was compared."""
    return f"{name}: {text}"


@pytest.fixture
def script(monkeypatch):
    """A module of scripts/, by its name."""
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    return importlib.import_module


@pytest.fixture
def both(script):
    """Makes our model, the plain step with its weights, and a batch; `precision` and overrides as a run has them."""
    setup, plain = script("step_setup"), script("plain_step")

    def make(*overrides, precision="fp32", **options):
        device = torch.device("cpu")
        cfg = setup.recipe(device, precision, [*TINY, *overrides])
        model = setup.build_model(cfg, device)
        with torch.no_grad():  # student and teacher start equal, and the teacher would then hide mistakes in its use
            for parameter in model.teacher.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        return model, plain.PlainStep(cfg, model, dtype, **options), setup.made_up_batch(cfg, device)

    return make


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        ((), {}),
        ((), {"with_unused_local_crop": False, "attention": "sdpa"}),
        (("crops.local_crops_number=2", "dino.loss_weight=1.0"), {}),
    ],
)
def test_plain_and_our_step_have_the_same_losses_and_gradients(both, overrides, options):
    model, plain, images = both(*overrides, **options)
    ours, theirs = model.forward_backward(images, teacher_temp=0.05), plain.forward_backward(images, 0.05)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-6, msg=partial(said, name))
    gradients = {name: parameter.grad for name, parameter in plain.student.named_parameters()}
    for name, parameter in model.student.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-4 * scale, msg=partial(said, name))


def test_plain_and_our_step_move_weights_alike(both, script):
    model, plain, images = both()
    setup = script("step_setup")
    ours = setup.OurStep(model)
    for group in plain.optimizer.param_groups:
        group["lr"] = setup.LR
    for _ in range(2):
        ours(images)
        plain(images, setup.TEACHER_TEMP, setup.MOMENTUM, setup.MAX_NORM)
    for network in ("student", "teacher"):
        theirs = getattr(plain, network).state_dict()
        for name, value in getattr(model, network).state_dict().items():
            # AdamW moves an entry whose gradient is rounding alone by up to a whole learning rate
            torch.testing.assert_close(theirs[name], value, rtol=0, atol=2.1 * setup.LR, msg=partial(said, name))


def test_plain_step_in_bf16_is_near_fp32(both):
    _, plain, images = both(precision="bf16")
    _, exact, _ = both()
    theirs, wanted = plain.forward_backward(images, 0.05), exact.forward_backward(images, 0.05)
    for name, value in wanted.items():
        torch.testing.assert_close(theirs[name], value, rtol=0.02, atol=1e-3, msg=partial(said, name))


def test_plain_step_refuses_what_it_does_not_render(both):
    with pytest.raises(ValueError, match=r"train\.centering, student\.drop_path_rate"):
        both("train.centering=centering", "student.drop_path_rate=0.1")


def test_unused_local_crop_costs_time_and_changes_no_loss(both):
    _, with_crop, images = both()
    _, without, _ = both(with_unused_local_crop=False)
    seen = []
    with_crop.student.dino_head.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    losses, wanted = with_crop.forward_backward(images, 0.05), without.forward_backward(images, 0.05)
    assert seen == [3 * 3]  # two global crops and a local one of each picture
    for name, value in wanted.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-6, atol=1e-6, msg=partial(said, name))


def test_speed_and_attention_are_measured_and_told(script, tmp_path, capsys):
    bench = script("bench_step")
    settings = ["student.embed_dim=32", "student.depth=1", "student.num_heads=2", *TINY[5:-1]]
    bench.main(
        [
            *("--folder", str(tmp_path), "--only", "speed", "attention", "--rounds", "1", "--batch", "2"),
            *("--ways", "ours bf16", "plain fp32", "--tokens", "5", "--device", "cpu", "--set", *settings),
        ]
    )
    found = json.loads((tmp_path / "results.json").read_text())
    ways = found["speed"]["ways"]
    assert list(ways) == ["ours bf16", "plain fp32"]
    assert all(len(each["seconds"]) == 1 and each["flops"] > 0 for each in ways.values())
    assert found["speed"]["agreement"]["ours bf16"]["gradient_cosine"] == pytest.approx(1, abs=0.01)
    assert {"optimizer", "teacher update"} <= found["speed"]["split"]["ours bf16"].keys()
    assert [(case["dtype"], case["with_backward"]) for case in found["attention"]] == [
        *(("fp32", False), ("fp32", True), ("bf16", False), ("bf16", True)),
    ]
    assert all({"explicit", "sdpa"} <= case["seconds"].keys() for case in found["attention"])
    printed = capsys.readouterr().out
    assert "| plain fp32 |" in printed
    assert "| cpu, bf16, 5, forward and backward |" in printed


def test_a_process_of_its_own_measures_what_it_held(script):
    bench = script("bench_step")
    settings = [value for value in TINY if "arch" not in value]
    arguments = bench.parse_arguments(["--device", "cpu", "--steps", "2"])
    found = bench.in_a_process("plain fp32", ["student.arch=vit_tiny", *settings], arguments, with_rate=True)
    assert len(found["seconds"]) == 2
    assert found["images_per_second"] > 0
    assert found["peak_mib"] > found["added_mib"] > 0
    assert found["matmul_rate"] > 0


def test_learning_is_compared_seed_by_seed(script):
    compare = script("compare_learning")

    def results(*scores):
        return [{"balanced_accuracy": s, "last_losses": {"a": 1.0, "b": 2.0}} for s in scores]

    untrained = [{"balanced_accuracy": 0.1, "last_losses": {}}] * 2
    found = {"ours bf16": results(0.50, 0.60), "plain fp32": results(0.54, 0.58), "untrained": untrained}
    _, _, *rows = compare.table(found, [0, 1])
    assert rows == [
        "| ours bf16 | 0.500 | 0.600 | 0.550, 0.071 | -0.010, -0.040 | 3.000 |",
        "| plain fp32 | 0.540 | 0.580 | 0.560, 0.028 |  | 3.000 |",
        "| untrained | 0.100 | 0.100 | 0.100, 0.000 |  |  |",
    ]


def test_learning_takes_the_same_steps_by_each_way(script, tmp_path):
    compare = script("compare_learning")
    compare.write_sample_cells(tmp_path / "cells", 8, 22, 22, 0, size=24)
    small = ["student.depth=1", "student.embed_dim=32", "student.num_heads=2", "train.batch_size_per_gpu=4"]
    small += ["crops.global_crops_size=28", "train.image_size=24", "optim.epochs=3", "optim.warmup_epochs=1"]
    found = {way: compare.run(way, 0, tmp_path / "cells", 60, small) for way in ("ours fp32", "plain fp32")}
    ours, plain = found["ours fp32"], found["plain fp32"]
    assert ours["last_losses"] == pytest.approx(plain["last_losses"], rel=1e-3)
    assert 0 < ours["balanced_accuracy"] <= 1
